"""The recipes for one card start: three steps of each on a tiny model, whatever a CPU refuses left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.trainer import Trainer

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("llama-3-8b-instruct-simpo-1x80gb", {}),
        ("llama-3-8b-instruct-lora-1x24gb", {}),
        ("mistral-7b-instruct-simpo-1x40gb", {"optimizer_offload": False}),
    ],
)
def test_a_recipe_for_one_card_trains_three_steps(name, left_out, tiny_recipe):
    places = {key: tiny_recipe[key] for key in ("model_name_or_path", "dataset_mixer", "output_dir", "cache_dir")}
    small = {"global_batch_size": 4, "max_steps": 3, "logging_steps": 1, "num_threads": 1, "device": "cpu"}
    recipe = load_recipe(RECIPES / f"{name}.yaml", {**places, **small, **left_out})
    result = Trainer(recipe, display=Display(quiet=True)).run()
    assert result.steps == 3
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 3
