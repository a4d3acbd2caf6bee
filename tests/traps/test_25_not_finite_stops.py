"""Trap 25: NaN is replaced by 0 and training goes on. Here the run stops before the update and names the rows."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from simpo.core.losses import PairLogps
from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.trainer import NonFiniteError, Trainer

train_module = importlib.import_module("simpo.trainer")  # `simpo.trainer` itself is the function


def poison(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, row_id: str, value: float) -> None:
    """Give one pair's chosen response a broken log-prob."""
    original = train_module.recipe_logps

    def broken(model: Any, batch: Any, recipe: Any) -> PairLogps:
        logps = original(model, batch, recipe)
        factor = torch.tensor([value if name == row_id else 1.0 for name in batch.row_ids])
        return PairLogps(logps.chosen_sum * factor, logps.rejected_sum, logps.chosen_length, logps.rejected_length)

    monkeypatch.setattr(train_module, "recipe_logps", broken)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_its_row(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    trainer = Trainer(load_recipe({**tiny_recipe, "save_steps": 2}), display=Display(quiet=True))
    plans = list(trainer.loader.plans(0, trainer.total_steps))
    victim = trainer.loader.store[plans[4].micro_batches[1][0]].row_id
    poison(monkeypatch, trainer, victim, value)
    before: dict[str, torch.Tensor] = {}
    original = trainer.train_step

    def remember(plan: Any) -> dict[str, float]:
        before.update({k: v.clone() for k, v in trainer.model.state_dict().items()})
        return original(plan)

    trainer.train_step = remember
    with pytest.raises(NonFiniteError, match=rf"step 5: .*not finite.*nothing was updated.*{victim}\..*step-4"):
        trainer.run()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_gradient_that_is_not_finite_stops_too(tiny_recipe: dict[str, Any]) -> None:
    trainer = Trainer(load_recipe(tiny_recipe), display=Display(quiet=True))
    weight = trainer.model.get_input_embeddings().weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match="step 1: the gradient norm is nan"):
        trainer.run()
    assert trainer.progress.step == 0
