"""A training step waits for the device once, and for everything together.

The step runs on torch's meta device, whose tensors have no values: whatever looks at one (`.item()`, `.tolist()`,
`bool(tensor)`, `nonzero`, a copy to the host) raises. What the step is meant to fetch is counted and made up. Ordinary
padded rows (pack and share_prompt false) are not among the cases: transformers looks at their mask, once a micro-batch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run.metrics import StepTotals, num_sums
from simpo.run.optim import build_optimizer
from simpo.trainer import Trainer

CASES = {
    "packed": {},
    "bf16 moments": {"optim": "adamw_bf16"},
    "checkpointing": {"gradient_checkpointing": True},
    "padded": {"pack": False},
    "adapters": {"use_peft": True, "lora_r": 2},
    "with a reference": {"loss_type": "dpo"},
}


@pytest.fixture
def without_values(tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """build(**keys): a trainer whose tensors have no values, and the shapes of what it fetches from its device."""

    def build(**keys: Any) -> tuple[Trainer, list[int]]:
        trainer = Trainer(load_recipe({**tiny_recipe, "optim": "adamw_torch", **keys}), display=Display(quiet=True))
        trainer.model.to("meta")
        trainer.device = trainer.mesh.device = torch.device("meta")
        trainer.optimizer = build_optimizer(trainer.model, trainer.recipe)
        fetched: list[int] = []

        def fetch(values: Tensor) -> Tensor:
            fetched.append(values.numel())
            return torch.tensor([1.0] * (values.numel() - 4) + [10.0, 0.0, 0.0, 50.0]).double()

        autocast, generator = torch.autocast, torch.Generator
        monkeypatch.setattr(torch, "Generator", lambda device: generator("cpu"))
        monkeypatch.setattr(Tensor, "cpu", fetch)
        monkeypatch.setattr(torch, "autocast", lambda kind, **options: autocast("cpu", **options))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)
        return trainer, fetched

    return build


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_a_step_fetches_its_totals_and_nothing_else(keys: dict[str, Any], without_values: Any) -> None:
    trainer, fetched = without_values(**keys)
    for plan in trainer.loader.plans(0, 2):
        assert len(plan.micro_batches) == 2
        values = trainer.train_step(plan)
    assert fetched == [num_sums(0) + 4] * 2
    assert values["grad_norm"] == 50.0


def test_an_evaluation_waits_once(without_values: Any) -> None:
    trainer, fetched = without_values()
    trainer.evaluate()
    assert fetched == [num_sums(0) + 4]


def test_metrics_by_source_are_fetched_along(without_values: Any, pair_files: Any) -> None:
    mixer = {name: {"path": str(pair_files)} for name in ("a", "b", "c")}
    trainer, fetched = without_values(dataset_mixer=mixer)
    values = trainer.train_step(next(trainer.loader.plans(0, 1)))
    trainer.evaluate()
    assert fetched == [num_sums(3) + 4] * 2
    assert values["loss/b"] == 1.0


def test_a_step_that_looks_at_a_value_is_caught(without_values: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = without_values()
    forward = trainer.forward

    def looks(*args: Any, **options: Any) -> Any:
        losses, sums = forward(*args, **options)
        return losses * (1.0 if losses.sum() > 0 else 2.0), sums

    monkeypatch.setattr(trainer, "forward", looks)
    with pytest.raises(RuntimeError, match="meta tensors"):
        trainer.train_step(next(trainer.loader.plans(0, 1)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("keys", [CASES["packed"], CASES["bf16 moments"], CASES["checkpointing"]])
def test_cuda_sees_no_other_synchronisation(
    keys: dict[str, Any], tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(load_recipe({**tiny_recipe, "bf16": True, **keys}), display=Display(quiet=True))
    plans = list(trainer.loader.plans(0, 4))
    for plan in plans[:2]:  # libraries start up, caches fill
        trainer.train_step(plan)
    over = StepTotals.over

    def allowed(*args: Any, **options: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        total = over(*args, **options)
        torch.cuda.set_sync_debug_mode("error")
        return total

    monkeypatch.setattr(StepTotals, "over", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for plan in plans[2:]:
            trainer.train_step(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
