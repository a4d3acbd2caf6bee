"""Trap 24: resume skips or repeats samples, or loses moments silently. Here the data of a resumed run is exactly the
rest, every pair once an epoch; equality of weights, moments and metrics is in tests/e2e/test_resume.py."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mesh_runs import assert_equal_bits, final_weights, metrics

from simpo.display import Display
from simpo.hosts.hf import run_recipe
from simpo.recipe import load_recipe
from simpo.trainer import Trainer


@pytest.mark.parametrize("pairs_per_step", [3, 4, 7, 40, 64])
def test_plans_after_a_resume_are_the_rest_of_the_plans(tiny_recipe: dict[str, Any], pairs_per_step: int) -> None:
    settings = {**tiny_recipe, "per_device_train_batch_size": pairs_per_step, "gradient_accumulation_steps": 1}
    loader = Trainer(load_recipe(settings), display=Display(quiet=True)).loader
    total = 3 * loader.steps_per_epoch
    whole = list(loader.plans(0, total))
    for stop in (0, 1, 5, 9):
        assert whole[:stop] + list(loader.plans(min(stop, total), total)) == whole
    for epoch in range(3):
        seen = Counter(i for plan in whole if plan.epoch == epoch for items in plan.micro_batches for i in items)
        assert seen == Counter(range(40))


def test_the_trainer_does_no_step_beyond_the_last(tiny_recipe: dict[str, Any]) -> None:
    """Killed while the final model was written, it was resumed from the last checkpoint in the middle of an epoch."""
    keys = {"max_steps": 3, "save_steps": 3, "lr_scheduler_type": "constant", "resume_from_checkpoint": True}
    recipe, folder = load_recipe({**tiny_recipe, **keys}), Path(tiny_recipe["output_dir"])
    run_recipe(recipe)
    before, weights = metrics(folder), final_weights(folder)
    shutil.rmtree(folder / "model")
    run_recipe(recipe)
    assert [line["step"] for line in metrics(folder)] == [line["step"] for line in before]
    assert_equal_bits(final_weights(folder), weights)
