"""Trap 38: the warm-up eats the run: one step in all has rate 0, the weights stay as they were, "done" is the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simpo.cli import app
from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run.optim import learning_rate_at
from simpo.trainer import Trainer

BASE = {"model_name_or_path": "org/model", "dataset_mixer": {"pairs.jsonl": 1.0}, "output_dir": "out"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"max_steps": 4, "warmup_steps": 50},
            "over 50 steps leaves none of 4 at learning_rate = 1e-06 (the high",
        ),
        (
            {"max_steps": 1},
            "over 1 step leaves none of 1 at learning_rate = 1e-06 (it is 0, so",
        ),
        ({"max_steps": 5, "warmup_steps": 5}, "leaves none of 5"),
        ({"max_steps": 5, "warmup_steps": 4}, ""),
        ({"max_steps": 1, "warmup_ratio": 0.0}, ""),
        ({"max_steps": 4, "warmup_steps": 50, "lr_scheduler_type": "constant"}, ""),
    ],
)
def test_a_run_without_a_step_at_the_full_rate_is_named_by_check(
    keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    recipe = load_recipe({**BASE, **keys})
    rates = [learning_rate_at(step, recipe.max_steps, recipe) for step in range(recipe.max_steps)]
    assert (max(rates) < recipe.learning_rate) == bool(said)
    assert [said in notice for notice in recipe.notices if "warm-up" in notice] == [True] * bool(said)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    printed = CliRunner().invoke(app, ["check", str(path)])
    assert printed.exit_code == 0
    assert ("notice: warm-up" in printed.output) == bool(said)


@pytest.mark.parametrize(("ratio", "said"), [(1.0, True), (0.99, False)])
def test_a_warm_up_over_the_whole_run_is_named_though_nobody_knows_its_length(
    ratio: float, said: bool, tmp_path: Path
) -> None:
    load_recipe({**BASE, "warmup_ratio": ratio}).save(tmp_path / "recipe.yaml")
    printed = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")])
    assert ("warning: warmup_ratio = 1: no step of the run has the full learning_rate" in printed.output) == said


def test_it_is_said_at_the_start_of_a_run_whose_data_says_how_many_steps_there_are(tiny_recipe: dict[str, Any]) -> None:
    for steps, said in ((10, True), (9, False)):
        settings = {**tiny_recipe, "warmup_steps": steps}
        trainer = Trainer(load_recipe(settings), display=Display(quiet=True))
        assert ("warm-up over 10 steps leaves none of 10" in trainer._describe()["steps"]) == said
        trainer.lock.release()
