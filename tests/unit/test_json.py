"""`--json` prints JSON and nothing else on stdout, wherever a table would be printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from miniature import rounds_recipe
from typer.testing import CliRunner

from simpo.cli import app
from simpo.core.losses import LOSSES
from simpo.recipe import KEYS
from simpo.recipe.yaml import dump_yaml


def said(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(tiny_recipe), encoding="utf-8")
    return path


def test_what_needs_no_data(recipe: Path):
    assert [loss["name"] for loss in said("losses")] == list(LOSSES)
    assert {key["name"] for key in said("keys")} > set(KEYS)
    assert [key["name"] for key in said("keys", "--beta")] == ["beta"]
    assert [key["name"] for key in said("keys", "lr")] == ["learning_rate"]
    assert {key["section"] for key in said("keys", "generate")} == {"stages", "generate"}
    checked = said("check", recipe, "--beta", 3)
    assert (checked["recipe"]["beta"], checked["pairs_per_step"], checked["missing"]) == (3, 4, [])


def test_audit_and_eval(recipe: Path, tiny_model: Path, pair_files: Path):
    assert said("audit", recipe)["splits"]["train"]["kept"] == 40
    found = said("eval", pair_files, "--model", tiny_model, "--max-pairs", 4, "--bf16", "false")
    assert found["num_pairs"] == 4


@pytest.mark.usefixtures("rounds_in_process")
def test_the_on_policy_commands(tiny_model: Path, tmp_path: Path):
    keys = rounds_recipe(tmp_path, tiny_model, [f"water and stone, {number}?" for number in range(30)])
    more = {"save_strategy": "no", "rounds": {"rounds": 1, "prompts_per_round": 8, "eval_prompts": 4}}
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml({**keys, **more}), encoding="utf-8")
    assert said("generate", path)["rows"] == 30
    assert said("score", path)["rows"] == 30
    assert said("pair", path, code=3)["pairs"] == {"train": 20, "test": 7}  # three prompts have equal scores
    assert said("rounds", path, "--output_dir", tmp_path / "rounds")["models"][1]["round"] == 1


@pytest.mark.long
def test_a_pipe_gets_json_alone(recipe: Path):
    command = [sys.executable, "-m", "simpo", "audit", str(recipe), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert json.loads(done.stdout)["splits"]["eval"]["kept"] == 10
    assert "ledger: " in done.stderr
