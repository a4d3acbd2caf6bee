"""Trap 49: held-out pairs are set aside and never evaluated. Without eval_strategy they are, once, at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simpo.cli import app
from simpo.display import Display
from simpo.hosts.hf import run_recipe
from simpo.recipe import load_recipe
from simpo.trainer import Trainer


def native(settings: Path) -> None:
    Trainer(load_recipe(settings), display=Display(quiet=True)).run()


def hosted(settings: Path) -> None:
    run_recipe(load_recipe(settings))


@pytest.mark.parametrize("start", [native, hosted])
@pytest.mark.parametrize(
    ("keys", "steps"),
    [({}, [3]), ({"eval_strategy": "no"}, []), ({"eval_steps": 2}, [2, 3])],
    ids=["", "no", "every 2"],
)
def test_held_out_pairs_are_evaluated_once_unless_told_otherwise(
    tiny_recipe: dict[str, Any], start: Any, keys: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    del tiny_recipe["eval_steps"]
    recipe = load_recipe({**tiny_recipe, "max_steps": 3, **keys})
    recipe.save(tmp_path / "recipe.yaml")
    start(tmp_path / "recipe.yaml")
    log = Path(tiny_recipe["output_dir"], "metrics.jsonl").read_text(encoding="utf-8")
    evaluations = [line for line in map(json.loads, log.rstrip("\n").split("\n")) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == steps
    assert all(line["eval_pairs"] == 10 for line in evaluations)
    card = Path(tiny_recipe["output_dir"], "model", "README.md").read_text(encoding="utf-8")
    assert ("No evaluation was run." in card) == (not steps)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"eval_strategy": "no"}, True),
        ({"eval_strategy": "no", "validation_fraction": 0}, False),
        ({"eval_strategy": "epoch"}, False),
        ({}, False),
    ],
)
def test_check_names_held_out_pairs_that_nothing_evaluates(keys: dict[str, Any], said: bool, tmp_path: Path) -> None:
    recipe = {"model_name_or_path": "org/model", "dataset_mixer": {"pairs.jsonl": 1.0}, "output_dir": "out", **keys}
    load_recipe(recipe).save(tmp_path / "recipe.yaml")
    printed = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")]).output
    assert ("neither trained on nor evaluated" in printed) == said
