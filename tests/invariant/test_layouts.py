"""The same update however rows are laid out: packed or padded, prompt shared or repeated, together or one at a time.

Every layout is compared with an independent dense reference: one unpadded sequence at a time through transformers' own
attention, full logits, log-softmax and the loss written out, none of it this package's code.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from simpo.core.batch import build_batch
from simpo.core.losses import LOSSES
from simpo.core.packing import TokenPair
from simpo.model.attention import PACKED
from simpo.model.head import compute_pair_logps, compute_token_logps
from simpo.model.load import load_model
from simpo.model.probe import check_forward
from simpo.recipe import load_recipe

BETA, RATIO = 2.0, 0.5
LAYOUTS = {
    "packed, prompt shared": {"pack": True, "share_prompt": True},
    "packed, prompt repeated": {"pack": True, "share_prompt": False},
    "padded, prompt shared": {"pack": False, "share_prompt": True},
    "padded, prompt repeated": {"pack": False, "share_prompt": False},
}
MODELS = [
    ("Llama", True),
    ("Llama", False),
    ("Qwen2", True),
    ("Qwen2", False),
    ("Mistral", False),
    ("Gemma2", True),
    ("Phi3", False),
    ("Granite", True),
    ("Cohere", True),
    ("Phi", False),
]

Result = tuple[Tensor, dict[str, Tensor]]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return gradients


def dense_reference(model: PreTrainedModel, pairs: list[TokenPair]) -> Result:
    """Losses and gradients of the mean loss, sequence by sequence, from full logits."""
    model = copy.deepcopy(model)
    softcapped = hasattr(model.config, "attn_logit_softcapping")  # transformers' sdpa refuses soft-caps
    model.set_attn_implementation("eager" if softcapped else "sdpa")
    losses = []
    for pair in pairs:
        means = []
        for ids, start, gaps in (
            (pair.chosen_ids, pair.chosen_start, pair.chosen_gaps),
            (pair.rejected_ids, pair.rejected_start, pair.rejected_gaps),
        ):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            log_probs = torch.log_softmax(logits, dim=-1)
            untrained = {t for begin, end in zip(gaps[::2], gaps[1::2]) for t in range(begin, end)}
            trained = [log_probs[t - 1, ids[t]] for t in range(start, len(ids)) if t not in untrained]
            means.append(torch.stack(trained).mean())
        z = BETA * (means[0] - means[1]) - BETA * RATIO
        losses.append(torch.log1p(torch.exp(-z)))
    (sum(losses) / len(losses)).backward()
    return torch.stack(losses).detach(), gradients_of(model)


def with_package(model: PreTrainedModel, batches: list[list[TokenPair]], **layout: bool) -> Result:
    """The same through the package: one backward per batch, each pair weighing 1 / number of pairs."""
    num_pairs = sum(len(pairs) for pairs in batches)
    losses = []
    for pairs in batches:
        logps = compute_pair_logps(model, build_batch(pairs, pad_token_id=3, **layout))
        batch_losses = LOSSES["sigmoid"](logps, beta=BETA, gamma_beta_ratio=RATIO).losses
        (batch_losses.sum() / num_pairs).backward()
        losses.append(batch_losses.detach())
    return torch.cat(losses), gradients_of(model)


def assert_equal_results(actual: Result, expected: Result, *, tolerance: float, what: str) -> None:
    """Equal up to rounding, relative to what the numbers are made from.

    Losses: to the rewards they are differences of (beta * m, m about -log 509). Gradients: to the largest gradient in
    the model, and to 10 times the largest in their own tensor, unless that is mere rounding (a bias on keys moves no
    softmax).
    """
    loss_error = float((actual[0] - expected[0]).abs().max())
    assert loss_error <= tolerance * BETA * math.log(509), f"{what}: losses off by {loss_error:.2g}"
    assert actual[1].keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        own = float(gradient.abs().max())
        limit = tolerance * (largest if own < 1e-3 * largest else min(largest, 10 * own))
        error = float((actual[1][name] - gradient).abs().max())
        assert error <= limit, f"{what}: gradient of {name} off by {error:.2g}, limit {limit:.2g}"


@pytest.mark.parametrize(("architecture", "tied"), MODELS, ids=str)
def test_every_layout_gives_the_dense_losses_and_gradients_in_fp32(random_model, ragged_pairs, architecture, tied):
    model, pairs = random_model(architecture, tied=tied), ragged_pairs(6)
    expected = dense_reference(model, pairs)
    assert expected[0].std() > 0.05, "pairs must differ, or mixing them up would go unseen"
    for name, layout in LAYOUTS.items():
        together = with_package(model, [pairs], **layout)
        assert_equal_results(together, expected, tolerance=2e-6, what=name)
        alone = with_package(model, [[pair] for pair in pairs], **layout)
        assert_equal_results(alone, expected, tolerance=2e-6, what=f"{name}, one pair at a time")
    assert model.config._attn_implementation == PACKED


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
def test_gaps_in_responses_are_seen_but_neither_trained_nor_counted_in_any_layout(
    random_model, ragged_pairs, architecture
):
    model, pairs = random_model(architecture, tied=True), []
    for index, pair in enumerate(ragged_pairs(6, seed=3)):
        gaps = {}
        for side in ("chosen", "rejected"):
            start, length = getattr(pair, f"{side}_start"), len(getattr(pair, f"{side}_ids"))
            inner = list(range(start + 1, length))[: 2 * (1 + index % 2)]
            gaps[f"{side}_gaps"] = inner[: len(inner) // 2 * 2]
        pairs.append(dataclasses.replace(pair, **gaps))
    assert sum(len(pair.chosen_gaps) + len(pair.rejected_gaps) for pair in pairs) > 12
    expected = dense_reference(model, pairs)
    without = dense_reference(model, ragged_pairs(6, seed=3))
    assert (expected[0] - without[0]).abs().max() > 0.01, "gaps must matter, or ignoring them would go unseen"
    for name, layout in LAYOUTS.items():
        assert_equal_results(with_package(model, [pairs], **layout), expected, tolerance=2e-6, what=name)


class ExactRMSNorm(nn.Module):
    """RMSNorm in the dtype of its input; transformers' own goes through fp32 even in an fp64 model."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def make_norms_exact(model: PreTrainedModel) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, ExactRMSNorm(child.weight, child.variance_epsilon))


@pytest.mark.parametrize(
    ("architecture", "tied"), [("Phi", False), ("Llama", True), ("Qwen2", False), ("Mistral", False)], ids=str
)
def test_every_layout_gives_the_dense_losses_and_gradients_in_fp64(random_model, ragged_pairs, architecture, tied):
    """To 1e-10. (Rotary angles stay fp32 inside transformers; they depend on the position alone, so all agree.)"""
    model, pairs = random_model(architecture, tied=tied, dtype=torch.float64), ragged_pairs(6, seed=1)
    make_norms_exact(model)
    expected = dense_reference(model, pairs)
    assert expected[0].dtype == torch.float64
    for name, layout in LAYOUTS.items():
        together = with_package(model, [pairs], **layout)
        assert_equal_results(together, expected, tolerance=1e-10, what=name)
        alone = with_package(model, [[pair] for pair in pairs], **layout)
        assert_equal_results(alone, expected, tolerance=1e-10, what=f"{name}, one pair at a time")


@pytest.mark.parametrize("pad_token_id", [0, 1, 508])
def test_what_fills_padding_never_matters(random_model, ragged_pairs, pad_token_id):
    model, pairs = random_model("Llama"), ragged_pairs(4)
    for share in (True, False):
        batches = [
            build_batch(pairs, pack=False, share_prompt=share, pad_token_id=token) for token in (5, pad_token_id)
        ]
        first, second = (compute_token_logps(model, batch) for batch in batches)
        assert torch.equal(first, second)


def test_gradients_at_padding_tokens_are_exactly_zero(random_model, ragged_pairs):
    """A padding token that occurs nowhere else takes no gradient through an untied embedding."""
    model, pairs = random_model("Llama", tied=False), ragged_pairs(4)
    unused = min(set(range(509)) - {t for p in pairs for t in p.chosen_ids + p.rejected_ids})
    for share in (True, False):
        batch = build_batch(pairs, pack=False, share_prompt=share, pad_token_id=unused)
        compute_token_logps(model, batch).sum().backward()
        assert torch.count_nonzero(model.get_input_embeddings().weight.grad[unused]) == 0
        model.zero_grad()


@pytest.mark.parametrize(("architecture", "tied"), MODELS, ids=str)
def test_a_model_still_gives_ordinary_logits_after_its_head_was_used(random_model, ragged_pairs, architecture, tied):
    model, pairs = random_model(architecture, tied=tied), ragged_pairs(2)
    plain = copy.deepcopy(model)
    compute_pair_logps(model, build_batch(pairs))
    implementation = "eager" if architecture == "Gemma2" else "sdpa"
    ids = torch.tensor([pairs[0].chosen_ids])
    logits = []
    for each in (model, plain):
        each.set_attn_implementation(implementation)
        logits.append(each(input_ids=ids).logits)
    assert torch.equal(*logits)
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(("architecture", "tied"), MODELS, ids=str)
def test_the_start_up_check_passes_on_known_architectures(random_model, architecture, tied):
    assert check_forward(random_model(architecture, tied=tied)).rms < 1e-5


@pytest.mark.parametrize("packed", [True, False])
def test_a_model_that_changes_its_logits_after_the_head_is_not_loaded(tiny_model, monkeypatch, packed):
    """A scale that the log-prob head does not know of would silently train another loss."""
    inner = transformers.LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        out = inner(self, *args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    recipe = load_recipe({"model_name_or_path": str(tiny_model), "pack": packed, "share_prompt": packed})
    load_model(recipe, device=torch.device("cpu"))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(ValueError, match="log-probs differ from the model's ordinary ones"):
        load_model(recipe, device=torch.device("cpu"))


def test_the_loss_of_an_indifferent_model_is_known_exactly(random_model, ragged_pairs):
    """With a zero head every token has probability 1/V, every margin is 0, every loss log(1 + e^gamma)."""
    model, pairs = random_model("Llama", tied=False), ragged_pairs(4)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for layout in LAYOUTS.values():
        logps = compute_pair_logps(model, build_batch(pairs, **layout))
        assert torch.allclose(logps.chosen_mean, torch.full((4,), -math.log(509)), rtol=0, atol=1e-5)
        losses = LOSSES["sigmoid"](logps, beta=BETA, gamma_beta_ratio=RATIO).losses
        assert torch.allclose(losses, torch.full((4,), math.log1p(math.exp(BETA * RATIO))), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 reads it
def test_lora_adapters_get_the_same_gradients_in_every_layout(random_model, ragged_pairs):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model, pairs = peft.get_peft_model(random_model("Llama"), config), ragged_pairs(4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    results = []
    for layout in LAYOUTS.values():
        logps = compute_pair_logps(model, build_batch(pairs, **layout))
        losses = LOSSES["sigmoid"](logps, beta=BETA, gamma_beta_ratio=RATIO).losses
        losses.sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        assert gradients
        assert all("lora_" in name for name in gradients)
        results.append((losses.detach(), gradients))
    for name, result in zip(LAYOUTS, results, strict=True):
        assert_equal_results(result, results[-1], tolerance=2e-6, what=name)
