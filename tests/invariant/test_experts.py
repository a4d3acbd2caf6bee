"""The auxiliary loss of routers: that of unpadded sequences, whatever the layout, the accumulation or the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mesh_runs import MESHES, data_ranks
from torch import Tensor

from simpo.core.batch import build_batch
from simpo.core.losses import PairLogps
from simpo.core.packing import TokenPair
from simpo.display import Display
from simpo.model.attention import PACKED, plain_attention
from simpo.model.head import compute_pair_logps, install_head, install_router_loss
from simpo.model.load import checkpoint_activations
from simpo.recipe import load_recipe
from simpo.run.objective import trained_losses
from simpo.trainer import Trainer

PAIRS = [
    TokenPair("a", [*range(20, 32), 50, 51, 52], 12, [*range(20, 32), 60, 61], 12),
    TokenPair("b", [*range(90, 97), 70], 7, [*range(90, 97), 71, 72, 73, 74, 75, 76, 77], 7),
    TokenPair("c", [5, 6, 7], 1, [8, 9, 10, 11], 1),  # nothing shared
]
LAYOUTS = {
    "packed, shared": {},
    "packed": {"share_prompt": False},
    "shared": {"pack": False},
    "padded": {"pack": False, "share_prompt": False},
}
SIZES = {
    **{"vocab_size": 420, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"num_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": 256, "initializer_range": 0.3},
}


def build_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES, **changes)
    model = transformers.Qwen3MoeForCausalLM._from_config(config, attn_implementation=PACKED)
    install_head(model)
    return model


def reference(model: Any, pairs: Sequence[TokenPair]) -> list[Tensor]:
    """Expert by expert and token by token, from unpadded sequences."""
    losses = []
    for pair in pairs:
        num_experts, assigned, likely, tokens = SIZES["num_experts"], {}, {}, 0
        for ids in (pair.chosen_ids, pair.rejected_ids):
            with plain_attention(model):
                output = model(input_ids=torch.tensor([ids]), output_router_logits=True, use_cache=False)
            for layer in output.router_logits:
                for token in layer:
                    tokens += 1
                    shares = token.softmax(-1)
                    for expert in shares.argsort(descending=True)[:2].tolist():
                        assigned[expert] = assigned.get(expert, 0) + 1
                    for expert in range(num_experts):
                        likely[expert] = likely.get(expert, 0.0) + shares[expert]
        used = range(num_experts)
        losses.append(num_experts * sum(assigned.get(e, 0) / tokens * likely[e] / tokens for e in used))
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_unpadded_sequences(layout: str, checkpointing: bool) -> None:
    model = build_model().train()
    install_router_loss(model, 0.5)
    expected = torch.stack(reference(model, PAIRS))
    (0.5 * expected * torch.arange(1, 4)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if layout == "padded":
        model.set_attn_implementation("sdpa")  # as a run that pads has it
    if checkpointing:
        checkpoint_activations(model)
    found = compute_pair_logps(model, build_batch(PAIRS, **LAYOUTS[layout])).router_loss
    assert torch.allclose(found, 0.5 * expected, rtol=1e-5, atol=0)
    (found * torch.arange(1, 4)).sum().backward()
    for name, gradient in gradients.items():
        other = dict(model.named_parameters())[name].grad
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), name


def test_a_pair_gets_what_transformers_computes_for_it_alone() -> None:
    model = build_model()
    install_router_loss(model, 1.0)
    found = compute_pair_logps(model, build_batch(PAIRS)).router_loss
    for pair, loss in zip(PAIRS, found, strict=True):
        rows = build_batch([pair], pack=False, share_prompt=False)
        with plain_attention(model):
            output = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_router_logits=True)
        assert torch.allclose(loss, output.aux_loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("asked", "key", "coefficient"), [(False, None, 0), (True, None, 0.01), (False, 0.2, 0.2), (True, 0, 0)]
)
def test_the_configuration_decides_unless_the_key_does(asked: bool, key: float | None, coefficient: float) -> None:
    model = build_model(output_router_logits=asked, router_aux_loss_coef=0.01)
    assert install_router_loss(model, key) == coefficient
    assert (compute_pair_logps(model, build_batch(PAIRS)).router_loss is None) == (coefficient == 0)


@pytest.mark.parametrize("keys", [{}, {"wpo_weights": True, "reward_calibration": True, "sft_weight": 0.3}])
def test_it_is_added_once_and_nothing_weighs_it(keys: dict[str, Any]) -> None:
    sums, ones = torch.tensor([-3.0, -2.0]), torch.ones(2)
    extras = {"log_squares": ones, "pull": ones}
    plain = PairLogps(sums, 2 * sums, ones, ones, chosen_extras=extras, rejected_extras=extras)
    recipe = load_recipe({"model_name_or_path": "tiny", "bf16": False, **keys})
    with_it, without = (
        trained_losses(logps, recipe, num_pairs=2, num_chosen_tokens=2)[0]
        for logps in (replace(plain, router_loss=torch.tensor([0.25, 4.0])), plain)
    )
    torch.testing.assert_close(with_it - without, torch.tensor([0.25, 4.0]))


def test_a_model_without_routers_is_refused(tiny_model: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef = 0\.1: LlamaForCausalLM gives no logits of routers"):
        install_router_loss(model, 0.1)


def first_step(recipe: dict[str, Any], **changes: Any) -> dict[str, float]:
    trainer = Trainer(load_recipe({**recipe, "max_steps": 1, **changes}), display=Display(quiet=True))
    values = trainer.train_step(next(trainer.loader.plans(0, 1)))
    return {name: values[name] for name in ("loss", "grad_norm")}


@pytest.mark.parametrize("mesh", ["dp2", "fsdp2", "cp2", "tp2"])
def test_a_step_does_not_depend_on_the_mesh(
    mesh: str, on_mesh: Any, step_recipe: Any, saved_model: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder = saved_model(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES)))
    keys = {"eval_strategy": "no", "eval_steps": None, "router_aux_loss_coef": 0.3}
    alone = step_recipe(folder, 1, **keys)
    (whole,) = on_mesh("1 process", first_step, alone)
    spread = step_recipe(folder, data_ranks(mesh), **keys, **MESHES[mesh], output_dir=str(tmp_path / mesh))
    for found in on_mesh(mesh, first_step, spread):
        assert found == pytest.approx(whole, rel=1e-4)


def test_a_step_does_not_depend_on_its_layout_or_cut(tiny_recipe: dict[str, Any], saved_model: Any) -> None:
    torch.manual_seed(0)
    folder = saved_model(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES)))
    recipe = {**tiny_recipe, "model_name_or_path": folder, "eval_strategy": "no", "router_aux_loss_coef": 0.3}
    whole = first_step(recipe, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    other_cuts = (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"pack": False, "share_prompt": False},
    )
    for number, changes in enumerate(other_cuts):
        cut = first_step({**recipe, "output_dir": f"{recipe['output_dir']}-{number}"}, **changes)
        for name in ("loss", "grad_norm"):
            assert cut[name] == pytest.approx(whole[name], rel=1e-4), (name, changes)
    without = first_step({**recipe, "output_dir": f"{recipe['output_dir']}-without"}, router_aux_loss_coef=0)
    assert 0.3 < whole["loss"] - without["loss"] < 0.3 * 6
