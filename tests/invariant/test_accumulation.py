"""One optimizer step is the same however it is cut: micro-batches, budgets, ranks, chunks, checkpointing.

`Trainer.train_step` itself runs here, on tiny models, with an optimizer that only remembers the gradients it is given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from simpo.core.batch import build_batch
from simpo.core.losses import LOSSES, ListLogps, PairLogps
from simpo.core.packing import TokenPair
from simpo.data.loader import PairStore, StepLoader, StepPlan
from simpo.display import Display
from simpo.model.head import compute_pair_logps
from simpo.model.load import checkpoint_activations
from simpo.parallel.mesh import Mesh, MeshSizes
from simpo.parallel.sharding import GradientSync
from simpo.recipe import load_recipe
from simpo.run.metrics import PAIR_METRICS, Totals
from simpo.run.stopping import StopRequest
from simpo.trainer import Progress, Trainer

Gradients = dict[str, Tensor]
LATER_METHODS: dict[str, dict[str, Any]] = {
    "confpo": {"loss_type": "confpo", "wpo_weights": True},
    "wpo and rc": {"wpo_weights": True, "reward_calibration": True, "sft_weight": 0.3},
}


class GradientRecorder:
    """In place of an optimizer: keeps a copy of the gradients and updates nothing."""

    def __init__(self, model) -> None:
        self.model = model
        self.param_groups = [{"lr": 0.0}]
        self.gradients: Gradients = {}

    def step(self) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.model.zero_grad(set_to_none=set_to_none)


def make_store(pairs, *, share_prompt: bool = True) -> PairStore:
    names = ("row_id", "chosen_ids", "chosen_start", "rejected_ids", "rejected_start", "more_ids", "more_starts")
    columns = {name: [getattr(pair, name) for pair in pairs] for name in names}
    if pairs[0].scores:
        scores = zip(*((p.scores[0], list(p.scores[1:-1]), p.scores[-1]) for p in pairs), strict=True)
        columns |= dict(zip(("score_chosen", "more_scores", "score_rejected"), map(list, scores), strict=True))
    else:
        del columns["more_ids"], columns["more_starts"]
    return PairStore(datasets.Dataset.from_dict(columns), share_prompt=share_prompt)


def bare_trainer(model, loader: StepLoader, **recipe) -> Trainer:
    """A Trainer with what one step needs, without data preparation, checkpoints or a run directory."""
    trainer = object.__new__(Trainer)
    trainer.recipe = load_recipe(
        {"model_name_or_path": "tiny", "output_dir": "unused", "bf16": False, "max_grad_norm": 0.0} | recipe
    )
    trainer.device = torch.device("cpu")
    trainer.mesh = Mesh(MeshSizes(), device=trainer.device)
    trainer.model, trainer.loader, trainer.gradients = model, loader, GradientSync(model, trainer.mesh)
    trainer._stop, trainer.display = StopRequest(print), Display(quiet=True)
    trainer.optimizer = GradientRecorder(model)
    trainer.reference, trainer.total_steps = None, 10
    trainer.progress, trainer.window = Progress(), Totals()
    return trainer


def run_step(
    model, pairs, *, micro_batches: int, step: int = 0, pairs_per_step: int = 8, layout=None, max_tokens=None, **recipe
) -> tuple[dict[str, float], Gradients, StepPlan]:
    """Metrics, gradients and plan of one step of `train_step`."""
    layout = layout or {"pack": True, "share_prompt": True}
    loader = StepLoader(
        make_store(pairs, share_prompt=layout["share_prompt"]),
        pairs_per_step=pairs_per_step,
        num_micro_batches=micro_batches,
        max_tokens=max_tokens,
        pack=layout["pack"],
        seed=3,
        with_scores=bool(pairs[0].scores),
    )
    (plan,) = loader.plans(step, step + 1)
    trainer = bare_trainer(model, loader, **layout, **recipe)
    values = trainer.train_step(plan)
    return {name: values[name] for name in (*PAIR_METRICS, "grad_norm")}, trainer.optimizer.gradients, plan


def assert_same_step(actual, expected, *, tolerance: float) -> None:
    """Metrics to tolerance; gradients to tolerance of the largest gradient in the model."""
    for name, value in expected[0].items():
        assert actual[0][name] == pytest.approx(value, rel=10 * tolerance, abs=10 * tolerance), name
    assert actual[1].keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        assert float((actual[1][name] - gradient).abs().max()) <= tolerance * largest, name


PRECISIONS = [("Llama", torch.float32, 2e-6), ("Phi", torch.float64, 1e-10)]


@pytest.mark.parametrize(("architecture", "dtype", "tolerance"), PRECISIONS, ids=str)
def test_eight_pairs_in_one_two_four_or_eight_micro_batches_are_the_same_step(
    random_model, ragged_pairs, architecture, dtype, tolerance
):
    model, pairs = random_model(architecture, dtype=dtype), ragged_pairs(8)
    whole = run_step(model, pairs, micro_batches=1)
    assert [len(items) for items in whole[2].micro_batches] == [8]
    for micro_batches in (2, 4, 8, 11):
        cut = run_step(model, pairs, micro_batches=micro_batches)
        assert len(cut[2].micro_batches) == micro_batches
        assert_same_step(cut, whole, tolerance=tolerance)


@pytest.mark.parametrize(("architecture", "dtype", "tolerance"), PRECISIONS, ids=str)
def test_the_ragged_last_step_of_an_epoch_weighs_its_five_pairs_alike(
    random_model, ragged_pairs, architecture, dtype, tolerance
):
    """13 pairs, 8 a step: the second step has 5. Against the plain mean over those 5, written out here."""
    model, pairs = random_model(architecture, dtype=dtype), ragged_pairs(13)
    _, _, plan = run_step(model, pairs, micro_batches=1, step=1)
    (indices,) = plan.micro_batches
    assert len(indices) == plan.num_pairs == 5
    logps = compute_pair_logps(model, build_batch([pairs[i] for i in indices]))
    losses = LOSSES["sigmoid"](logps, beta=2.0, gamma_beta_ratio=0.5).losses
    losses.mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for micro_batches in (1, 2, 3, 8):
        metrics, gradients, cut = run_step(model, pairs, micro_batches=micro_batches, step=1)
        assert sorted(i for items in cut.micro_batches for i in items) == sorted(indices)
        assert metrics["loss"] == pytest.approx(float(losses.detach().mean()), rel=10 * tolerance)
        assert_same_step((metrics, gradients), (metrics, expected), tolerance=tolerance)


@pytest.mark.parametrize("max_tokens", [60, 100, 1000])
def test_a_token_budget_changes_the_cut_and_not_the_step(random_model, ragged_pairs, max_tokens):
    model, pairs = random_model("Phi", dtype=torch.float64), ragged_pairs(8)
    whole = run_step(model, pairs, micro_batches=1)
    cut = run_step(model, pairs, micro_batches=1, max_tokens=max_tokens)
    tokens = make_store(pairs).tokens
    assert all(sum(tokens[i] for i in items) <= max_tokens for items in cut[2].micro_batches)
    assert (len(cut[2].micro_batches) > 1) == (max_tokens < 200)
    assert_same_step(cut, whole, tolerance=1e-10)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_gradients_of_all_ranks_add_up_to_those_of_one(random_model, ragged_pairs, num_ranks):
    model, pairs = random_model("Phi", dtype=torch.float64), ragged_pairs(13)
    for step in (0, 1):  # a full step and the ragged one
        _, expected, whole = run_step(model, pairs, micro_batches=1, step=step)
        total: Gradients = {name: torch.zeros_like(g) for name, g in expected.items()}
        seen: list[int] = []
        for rank in range(num_ranks):
            loader = StepLoader(
                make_store(pairs), pairs_per_step=8, num_micro_batches=2, seed=3, rank=rank, num_ranks=num_ranks
            )
            (plan,) = loader.plans(step, step + 1)
            assert (plan.num_pairs, plan.num_chosen_tokens) == (whole.num_pairs, whole.num_chosen_tokens)
            trainer = bare_trainer(model, loader)
            trainer.train_step(plan)
            for name, gradient in trainer.optimizer.gradients.items():
                total[name] += gradient
            seen += [i for items in plan.micro_batches for i in items]
        assert sorted(seen) == sorted(i for items in whole.micro_batches for i in items)
        assert_same_step(({}, total), ({}, expected), tolerance=1e-10)


@pytest.mark.parametrize("sft_reduction", ["pairs", "tokens"])
def test_the_sft_term_does_not_depend_on_the_cut(random_model, ragged_pairs, sft_reduction):
    model, pairs = random_model("Phi", dtype=torch.float64), ragged_pairs(13)
    recipe = {"sft_weight": 0.7, "sft_reduction": sft_reduction}
    for step in (0, 1):
        whole = run_step(model, pairs, micro_batches=1, step=step, **recipe)
        for micro_batches in (2, 8):
            cut = run_step(model, pairs, micro_batches=micro_batches, step=step, **recipe)
            assert_same_step(cut, whole, tolerance=1e-10)
        # And it is what it says: the mean over pairs, or over the step's tokens.
        (indices,) = whole[2].micro_batches
        with torch.no_grad():
            logps = compute_pair_logps(model, build_batch([pairs[i] for i in indices]))
        simpo = LOSSES["sigmoid"](logps, beta=2.0, gamma_beta_ratio=0.5).losses.mean()
        by_tokens = logps.chosen_sum.sum() / logps.chosen_length.sum()
        sft = -(logps.chosen_mean.mean() if sft_reduction == "pairs" else by_tokens)
        assert whole[0]["loss"] == pytest.approx(float(simpo + 0.7 * sft), rel=1e-10)


@pytest.mark.parametrize(
    "loss_type", [name for name, loss in LOSSES.items() if not (loss.needs_reference or loss.is_of_lists)]
)
def test_no_loss_depends_on_layout_or_cut(random_model, ragged_pairs, loss_type):
    model, pairs = random_model("Phi", dtype=torch.float64), ragged_pairs(5)
    packed = run_step(model, pairs, micro_batches=1, loss_type=loss_type)
    plain = {"pack": False, "share_prompt": False}
    padded = run_step(model, pairs, micro_batches=3, loss_type=loss_type, layout=plain)
    assert_same_step(padded, packed, tolerance=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 10_000])
def test_the_size_of_logits_chunks_does_not_matter(random_model, ragged_pairs, chunk_size):
    model, pairs = random_model("Phi", dtype=torch.float64), ragged_pairs(8)
    whole = run_step(model, pairs, micro_batches=2)
    chunked = run_step(model, pairs, micro_batches=2, logits_chunk_size=chunk_size)
    assert_same_step(chunked, whole, tolerance=1e-10)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Gemma2"])
def test_gradient_checkpointing_gives_the_same_bits(random_model, ragged_pairs, architecture):
    model, pairs = random_model(architecture), ragged_pairs(8)
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    kept = run_step(model, pairs, micro_batches=2)
    assert len(calls) == 2
    checkpoint_activations(model)
    recomputed = run_step(model, pairs, micro_batches=2)
    assert len(calls) == 2 + 4, "checkpointing was not active"
    assert recomputed[0] == kept[0]
    assert all(torch.equal(recomputed[1][name], gradient) for name, gradient in kept[1].items())


def test_the_same_step_twice_gives_the_same_bits(random_model, ragged_pairs):
    model, pairs = random_model("Llama"), ragged_pairs(8)
    first, second = (run_step(model, pairs, micro_batches=2, bf16=bf16) for bf16 in (True, True))
    assert first[0] == second[0]
    assert all(torch.equal(second[1][name], gradient) for name, gradient in first[1].items())


def test_bf16_compute_packed_and_padded_agree_to_bf16(random_model, ragged_pairs):
    """bf16 rounds to 8 bits at every product. Against fp32: mean log-probs within 0.01 nats and gradients within 3%

    (2-norm over the whole model; measured 0.0006 and 1.3%). Packed against padded: within 2% (measured 0.7%).
    """
    model, pairs = random_model("Llama"), ragged_pairs(8)
    exact = run_step(model, pairs, micro_batches=1)

    def distance(a: Gradients, b: Gradients) -> float:
        error = sum(float((a[name] - b[name]).square().sum()) for name in b)
        return (error / sum(float(g.square().sum()) for g in exact[1].values())) ** 0.5

    results = [
        run_step(model, pairs, micro_batches=1, bf16=True, layout={"pack": pack, "share_prompt": share})
        for pack, share in ((True, True), (True, False), (False, True), (False, False))
    ]
    for metrics, gradients, _ in results:
        assert {g.dtype for g in gradients.values()} == {torch.float32}
        for name in ("logps/chosen", "logps/rejected"):
            assert abs(metrics[name] - exact[0][name]) < 0.01
        assert distance(gradients, exact[1]) < 0.03
        assert distance(gradients, results[-1][1]) < 0.02


@pytest.mark.parametrize("method", LATER_METHODS)
def test_a_step_is_the_same_in_one_micro_batch_or_several(random_model, ragged_pairs, method):
    model, pairs = random_model("Phi", dtype=torch.float64), ragged_pairs(8)
    whole = run_step(model, pairs, micro_batches=1, **LATER_METHODS[method])
    for micro_batches in (2, 8):
        cut = run_step(model, pairs, micro_batches=micro_batches, **LATER_METHODS[method])
        assert_same_step(cut, whole, tolerance=1e-9)


def test_calibration_and_weights_leave_the_metrics_of_a_step_as_they_are(random_model, ragged_pairs):
    """What is scaled is the gradient; what is weighed is the trained loss alone."""
    model, pairs = random_model("Llama"), ragged_pairs(8)
    plain = run_step(model, pairs, micro_batches=1)[0]
    calibrated = run_step(model, pairs, micro_batches=1, reward_calibration=True)[0]
    assert {**calibrated, "grad_norm": 0} == {**plain, "grad_norm": 0}
    assert calibrated["grad_norm"] != plain["grad_norm"]
    weighed = run_step(model, pairs, micro_batches=1, wpo_weights=True)[0]
    assert weighed["loss"] < plain["loss"]
    assert {**weighed, "grad_norm": 0, "loss": 0} == {**plain, "grad_norm": 0, "loss": 0}


def ragged_lists(pairs: list[TokenPair]) -> list[TokenPair]:
    """Pairs with 0, 1, 2, 3, 0, ... other responses to their prompt."""
    lists = []
    for index, pair in enumerate(pairs):
        prompt, count = pair.chosen_ids[: pair.chosen_start], index % 4
        more = [prompt + pairs[(index + k + 1) % len(pairs)].rejected_ids[-5:] for k in range(count)]
        scores = (4.0, *(1.0 + k for k in range(count)), 0.5)
        lists.append(replace(pair, more_ids=more, more_starts=[len(prompt)] * count, scores=scores))
    return lists


@pytest.mark.parametrize("loss_type", ["plackett_luce", "infonca", "swepo"])
def test_a_step_of_lists_is_that_of_its_responses_one_by_one_however_it_is_cut(random_model, ragged_pairs, loss_type):
    """Against every sequence on its own; the prompt is computed once for all responses of a list."""
    model, lists = random_model("Phi", dtype=torch.float64), ragged_lists(ragged_pairs(8))
    alone = []
    for each in lists:
        ids = (each.chosen_ids, *each.more_ids, each.rejected_ids)
        starts = (each.chosen_start, *each.more_starts, each.rejected_start)
        pairs = [TokenPair("", s, start, [*s[:start], 0], start) for s, start in zip(ids, starts, strict=True)]
        found = compute_pair_logps(model, build_batch(pairs, pack=False, share_prompt=False))
        listed = ListLogps(found.chosen_sum, found.chosen_length, (len(ids),))
        one = torch.ones(1, dtype=torch.float64)
        scores = torch.tensor(each.scores, dtype=torch.float64)
        alone.append(LOSSES[loss_type](PairLogps(one, one, one, one, lists=listed, scores=scores)).losses)
    loss = torch.cat(alone).mean()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for micro_batches, layout in ((1, None), (3, None), (8, None), (2, {"pack": False, "share_prompt": False})):
        cut = run_step(model, lists, micro_batches=micro_batches, loss_type=loss_type, layout=layout)
        assert cut[0]["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert_same_step(cut, (cut[0], expected), tolerance=1e-7)
    store = make_store(lists)
    loader = StepLoader(store, pairs_per_step=8, num_micro_batches=1)
    assert [loader.build([i]).pairs.num_tokens for i in range(8)] == store.tokens.tolist()
    assert [len(loader.build([i]).pairs.labels) for i in range(8)] == store.num_labels.tolist()
    shorter = min(range(8), key=lambda i: -len(lists[i].more_ids))
    whole = [len(ids) for ids in (lists[shorter].chosen_ids, *lists[shorter].more_ids, lists[shorter].rejected_ids)]
    prefix = store.shapes.prefix[shorter]
    assert store.shapes.attended[shorter] == prefix * (prefix + 1) // 2 + sum(
        (n - prefix) * (n - prefix + 1) // 2 + prefix * (n - prefix) for n in whole
    )
