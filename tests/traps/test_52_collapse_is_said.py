"""Trap 52: a run collapses (answers 99% repetition, chosen log-prob -77) and ends with "accuracy 100%, done"."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.report.held_out import final_line
from simpo.report.read import read_run
from simpo.run.guard import RunGuard
from simpo.run.saved import list_checkpoints
from simpo.run.stopping import StoppedByGuard
from simpo.shipping.card import card_of
from simpo.shipping.source import find_source
from simpo.trainer import Trainer, TrainResult

Settings = dict[str, Any]
# What the guard is to see is not the rate itself.
COLLAPSE: Settings = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_steps": 8}


def train(settings: Settings, console: Console | None = None, **changes: Any) -> TrainResult:
    display = Display(quiet=True) if console is None else Display(console=console)
    return Trainer(load_recipe({**settings, **changes}), display=display).run()


def findings(folder: Path) -> list[dict[str, Any]]:
    path = folder / "guard.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_a_collapse_is_said_while_it_happens_and_at_the_end(tiny_recipe: Settings) -> None:
    console = Console(record=True, width=100, soft_wrap=True, file=io.StringIO())
    result = train(tiny_recipe, console, **COLLAPSE)
    found = {row["kind"]: row for row in findings(result.output_dir)}
    assert {"learning_rate", "displacement"} <= set(found)
    assert found["learning_rate"]["step"] == 0
    assert found["displacement"]["step"] <= 4
    assert all(row["level"] == "warn" and row["advice"] and row["saw"] for row in found.values())
    lines = console.export_text().split("\n")
    (said,) = [n for n, line in enumerate(lines) if line.startswith("warning at step") and "chosen answers" in line]
    assert "Lower learning_rate" in lines[said]
    assert said < next(n for n, line in enumerate(lines) if line.startswith("step 5/8"))
    assert any("guard" in line and "displacement at step" in line for line in lines)  # in the table at the end


def test_an_ordinary_run_and_one_that_is_not_watched_leave_nothing(tiny_recipe: Settings, tmp_path: Path) -> None:
    assert findings(train(tiny_recipe).output_dir) == []
    assert findings(train(tiny_recipe, output_dir=str(tmp_path / "off"), guard=False, **COLLAPSE).output_dir) == []


def test_the_guard_changes_no_bit_of_what_is_trained(tiny_recipe: Settings, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folders = [
        train(tiny_recipe, output_dir=str(tmp_path / level), guard=level, **COLLAPSE).model_dir
        for level in ("warn", "off")
    ]
    watched, alone = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(watched[name], alone[name]) for name in alone)


def test_stop_saves_a_checkpoint_and_resuming_goes_on_all_the_same(tiny_recipe: Settings) -> None:
    settings = {**tiny_recipe, **COLLAPSE, "guard": {"displacement": "stop"}, "save_strategy": "no"}
    with pytest.raises(StoppedByGuard, match="stopped by the guard after step") as stopped:
        train(settings)
    assert stopped.value.exit_code == 4
    folder = Path(settings["output_dir"])
    (saved,) = list_checkpoints(folder / "checkpoints")
    before = findings(folder)
    assert before[-1]["level"] == "stop"
    assert before[-1]["step"] == saved.step < 8
    assert not (folder / "model").exists()
    result = train(settings, resume_from_checkpoint=True)
    assert result.steps == 8
    assert findings(folder)[: len(before)] == before  # said once
    assert [row["kind"] for row in findings(folder)].count("displacement") == 1


def test_stop_before_the_first_step_trains_nothing(tiny_recipe: Settings) -> None:
    with pytest.raises(StoppedByGuard, match="before the first step"):
        train(tiny_recipe, **COLLAPSE, guard="stop")
    assert not list_checkpoints(Path(tiny_recipe["output_dir"]) / "checkpoints")


@pytest.mark.parametrize(
    "keys",
    [{}, {"save_total_limit": 1}, {"async_save": True, "save_total_limit": 1}],
    ids=lambda keys: next(iter(keys), ""),
)
def test_back_makes_the_best_checkpoint_from_before_the_model(tiny_recipe: Settings, keys: Settings) -> None:
    """The rate rises to 3 over the run: the first steps are harmless."""
    warm = {"learning_rate": 1.0, "lr_scheduler_type": "linear", "warmup_steps": 1000, "max_steps": 40}
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_dtype": "float32"}
    result = train(tiny_recipe, **warm, **often, **keys, guard={"all": "back", "learning_rate": "off"})
    assert not list((result.output_dir / "checkpoints").glob(".*"))
    at = {"mesh": SimpleNamespace(is_main=True), "display": Display(quiet=True), "done": result.steps}
    found, gone = findings(result.output_dir)[-2:]
    assert found["level"] == "back"
    assert result.steps == found["step"] < 40
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    earlier = {r["step"]: r["eval_loss"] for r in lines if "eval_loss" in r and r["step"] <= found["since_step"] - 2}
    best = min(earlier, key=lambda step: earlier[step])
    card = (result.model_dir / "README.md").read_text(encoding="utf-8")
    assert f"{best} of 40" in card
    assert gone["back_to"] == best
    assert final_line(read_run(result.output_dir))["step"] == best, "the report is of the same weights"
    pushed = card_of(find_source(str(result.output_dir)))
    assert f"optimizer step of these weights: {best} of 40" in pushed
    RunGuard(load_recipe({**tiny_recipe, **keys}), result.output_dir, **at)
    assert "back_to" not in (result.output_dir / "guard.jsonl").read_text(), "a run that goes on has not gone back"


def test_back_without_an_earlier_checkpoint_stops(tiny_recipe: Settings) -> None:
    late = {"eval_strategy": "steps", "eval_steps": 8, "save_steps": 8}
    with pytest.raises(StoppedByGuard, match="no earlier checkpoint with an evaluation to go back to"):
        train(tiny_recipe, **COLLAPSE, **late, guard={"displacement": "back"})
