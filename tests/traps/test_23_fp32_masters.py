"""Trap 23: pure-bf16 weights at lr 6e-7, of which 1% move and the run learns nothing. Here masters are fp32, and where
they are bf16 on purpose, optim: adamw_bf16 rounds so that on average nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simpo.display import Display
from simpo.model.load import load_model
from simpo.recipe import load_recipe
from simpo.run.optim import build_optimizer
from simpo.trainer import Trainer


def test_bf16_weights_hardly_move_and_fp32_weights_do() -> None:
    """Weights as large models have them (standard deviation 0.02), one AdamW step at the published rate."""
    recipe = load_recipe({"model_name_or_path": "any", "learning_rate": 6e-7})
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        layer = torch.nn.Linear(200, 200, bias=False)
        torch.nn.init.normal_(layer.weight, std=0.02)
        layer = layer.to(dtype)
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.randn_like(layer.weight)
        build_optimizer(layer, recipe).step()
        moved[dtype] = (layer.weight != before).float().mean().item()
    assert moved[torch.float32] > 0.99
    assert moved[torch.bfloat16] < 0.02


def test_a_bf16_run_trains_fp32_weights_and_moves_nearly_all_of_them(tiny_recipe: dict[str, Any]) -> None:
    recipe = load_recipe(
        {
            **tiny_recipe,
            "bf16": True,
            "learning_rate": 6e-7,
            "max_steps": 2,
            "warmup_ratio": 0.0,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "eval_strategy": "no",
        }
    )
    trainer = Trainer(recipe, display=Display(quiet=True))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for plan in trainer.loader.plans(0, 2):
        trainer.train_step(plan)
    matrices = {name: p for name, p in trainer.model.named_parameters() if "proj" in name}
    moved = sum(int((p != before[name]).sum()) for name, p in matrices.items())
    assert moved / sum(p.numel() for p in matrices.values()) > 0.99
    for state in trainer.optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32


def test_a_checkpoint_stored_in_bf16_is_trained_in_fp32(tiny_recipe: dict[str, Any], tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    stored = AutoModelForCausalLM.from_pretrained(tiny_recipe["model_name_or_path"], dtype=torch.bfloat16)
    stored.save_pretrained(tmp_path / "bf16")
    recipe = load_recipe({**tiny_recipe, "model_name_or_path": str(tmp_path / "bf16")})
    model = load_model(recipe, device=torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.long
def test_bf16_weights_with_stochastic_rounding_move_on_average_as_far_as_fp32_weights(
    tiny_recipe: dict[str, Any],
) -> None:
    """Displacement of the matrices in the direction that fp32 weights take, as a share of what those do."""
    masters = {
        "fp32": {},
        "bf16": {"master_dtype": "bfloat16"},
        "stochastic": {"master_dtype": "bfloat16", "optim": "adamw_bf16"},
    }
    moved = {}
    for name, keys in masters.items():
        recipe = load_recipe(
            {
                **tiny_recipe,
                **keys,
                "bf16": True,
                "learning_rate": 6e-7,
                "max_steps": 30,
                "warmup_ratio": 0.0,
                "lr_scheduler_type": "constant",
                "save_strategy": "no",
                "eval_strategy": "no",
            }
        )
        trainer = Trainer(recipe, display=Display(quiet=True))
        matrices = [p for p in trainer.model.parameters() if p.ndim == 2]
        before = [p.detach().double() for p in matrices]
        for plan in trainer.loader.plans(0, 30):
            trainer.train_step(plan)
        moved[name] = torch.cat([(p.detach().double() - b).flatten() for p, b in zip(matrices, before, strict=True)])
    direction = moved["fp32"].sign()
    distance = {name: float((values * direction).mean()) for name, values in moved.items()}
    # A weight's rounding noise after 30 steps is 8e-5, that of the mean of 90,000 weights 3% of the distance: 5 of it.
    assert distance["stochastic"] / distance["fp32"] == pytest.approx(1.0, abs=0.15)
    assert distance["bf16"] / distance["fp32"] < 0.05
