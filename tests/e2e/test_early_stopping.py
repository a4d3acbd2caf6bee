"""Early stopping: after which evaluation a run ends, that it ends as a finished run, and that it can be resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from simpo.display import Display
from simpo.hosts.hf.run import run_recipe
from simpo.recipe import load_recipe
from simpo.trainer import Interrupted, Trainer, TrainResult

Settings = dict[str, Any]

# Each step makes the model worse, so the first evaluation, after step 2, stays the best one.
WORSE = {
    **{"save_steps": 2, "eval_steps": 2, "learning_rate": 0.2, "lr_scheduler_type": "constant"},
    **{"metric_for_best_model": "logps/chosen", "early_stopping_patience": 2},
}
SHORT = {"load_best_model_at_end": False, "save_strategy": "no", "eval_steps": None}
WHY = "stopped early after step 6: eval_logps/chosen has not improved in 2 evaluations: its best value is "


def run(settings: Settings, **changes: Any) -> TrainResult:
    return Trainer(load_recipe({**settings, **changes}), display=Display(quiet=True)).run()


def lines_of(folder: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path | str) -> torch.Tensor:
    return load_file(Path(folder) / "model" / "model.safetensors")["model.norm.weight"]


def test_the_run_ends_as_a_finished_one_that_says_why(tiny_recipe: Settings, capsys: pytest.CaptureFixture[str]):
    settings = {**tiny_recipe, **WORSE, "logging_steps": 4, "load_best_model_at_end": True, "eval_on_start": True}
    result = Trainer(load_recipe(settings)).run()
    assert (result.steps, result.best_step) == (6, 2)
    assert result.why_early is not None
    assert result.why_early.startswith(WHY)
    assert WHY in " ".join(capsys.readouterr().out.split())
    assert WHY in (result.model_dir / "README.md").read_text()
    assert sorted(p.name for p in (result.output_dir / "checkpoints").iterdir()) == ["step-2", "step-4", "step-6"]
    # The steps since the last line are not lost.
    assert [line["step"] for line in lines_of(result.output_dir) if "loss" in line] == [4, 6]


@pytest.mark.parametrize("host", ["native", "accelerate"])
def test_the_best_is_kept_where_nothing_is_due_to_be_saved(tiny_recipe: Settings, host: str):
    """The best evaluation, after step 2, has a checkpoint though they are due at 4 and 8, and one is kept."""
    keys = {"load_best_model_at_end": True, "save_steps": 4, "save_total_limit": 1, "max_steps": 8, "device": "cpu"}
    settings = {**tiny_recipe, **WORSE, **keys, "early_stopping_patience": None}
    if host == "native":
        run(settings)
    else:
        run_recipe(load_recipe(settings))
    folder = Path(settings["output_dir"])
    assert "2 of 8" in (folder / "model" / "README.md").read_text()
    first = run({**settings, "output_dir": f"{folder}-2", "max_steps": 2, "eval_strategy": "no"} | SHORT)
    assert torch.allclose(weights(folder), weights(first.output_dir), atol=1e-5)


def test_a_resumed_run_ends_where_it_would_have(tiny_recipe: Settings):
    settings = {**tiny_recipe, **WORSE}
    whole = run(settings)
    folder, expected = whole.output_dir, weights(whole.output_dir)
    shutil.rmtree(folder / "model")  # killed between its last checkpoint and its model
    before = lines_of(folder)
    again = run(settings, resume_from_checkpoint=True)
    assert (again.steps, again.why_early) == (6, whole.why_early)
    assert torch.equal(weights(folder), expected)
    assert lines_of(folder) == before
    later = run(settings, resume_from_checkpoint=str(folder / "checkpoints" / "step-4"))
    assert later.steps == 6
    assert torch.equal(weights(folder), expected)
    on = run(settings, resume_from_checkpoint=str(folder / "checkpoints" / "step-6"), early_stopping_patience=None)
    assert (on.steps, on.why_early) == (10, None)


def test_an_evaluation_that_is_made_up_for_ends_the_run_without_another_step(tiny_recipe: Settings):
    settings = {**tiny_recipe, **WORSE}
    trainer = Trainer(load_recipe(settings), display=Display(quiet=True))
    evaluates_at = trainer._evaluates_at
    trainer._evaluates_at = lambda step: evaluates_at(step) and (step < 6 or trainer._stop.set() is None)
    with pytest.raises(Interrupted):
        trainer.run()
    assert [line["step"] for line in lines_of(trainer.output_dir) if "eval_loss" in line] == [2, 4]
    again = run(settings, resume_from_checkpoint=True)
    assert (again.steps, again.why_early is not None) == (6, True)


def test_only_what_surpasses_the_threshold_is_improvement(tiny_recipe: Settings):
    learns = {"eval_steps": 2, "early_stopping_patience": 2}
    assert run({**tiny_recipe, **learns}).steps == 10
    folder = str(Path(tiny_recipe["output_dir"]).with_name("other"))
    assert run({**tiny_recipe, **learns, "output_dir": folder, "early_stopping_threshold": 100.0}).steps == 6


def test_the_trainer_under_accelerate_ends_after_the_same_step(
    tiny_recipe: Settings, capsys: pytest.CaptureFixture[str]
):
    settings = {**tiny_recipe, **WORSE, "device": "cpu", "logging_steps": 4}
    folder = Path(tiny_recipe["output_dir"])
    run_recipe(load_recipe(settings))
    assert WHY in " ".join(capsys.readouterr().out.split())
    assert WHY in (folder / "model" / "README.md").read_text()
    evaluations = [line["step"] for line in lines_of(folder) if "eval_loss" in line]
    assert evaluations == [2, 4, 6]
    logged = [line for line in lines_of(folder) if "loss" in line]
    assert [line["step"] for line in logged] == [2, 4, 6]  # before each checkpoint one, so that no step is lost
    history = json.loads((folder / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "loss" in line] == [2, 4, 6]
    assert logged[-1]["pairs_seen"] == 24
    expected = weights(folder)
    for step in (4, 6):
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / "checkpoints" / "checkpoint-6" if step == 4 else folder / "none", ignore_errors=True)
        run_recipe(load_recipe({**settings, "resume_from_checkpoint": True}))
        assert torch.equal(weights(folder), expected), step
        assert WHY in " ".join(capsys.readouterr().out.split())


def test_the_best_of_a_trainers_run_that_was_moved_since_becomes_its_model(
    tiny_recipe: Settings, monkeypatch: pytest.MonkeyPatch
):
    keys = {"load_best_model_at_end": True, "max_steps": 4, "device": "cpu", "save_dtype": "float32"}
    settings = {**tiny_recipe, **WORSE, **keys, "early_stopping_patience": None}
    with monkeypatch.context() as patch:
        patch.setattr("simpo.hosts.hf.run.save_final_model", Mock(side_effect=OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run_recipe(load_recipe(settings))
    folder = Path(tiny_recipe["output_dir"]).rename(Path(tiny_recipe["output_dir"]).with_name("larger-disk"))
    on = {**settings, "output_dir": str(folder), "resume_from_checkpoint": True}
    run_recipe(load_recipe(on))
    best = load_file(folder / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert torch.equal(weights(folder), best["model.norm.weight"])
    for name in ("model", "checkpoints/checkpoint-2"):
        shutil.rmtree(folder / name)
    with pytest.raises(ValueError, match=r"best evaluation, .*checkpoint-2, is not there any more"):
        run_recipe(load_recipe(on))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_stopping_patience": 2, "eval_steps": None}, "nothing is evaluated during training"),
        ({"early_stopping_patience": 2, "eval_strategy": "no", "eval_steps": None}, "eval_strategy: no"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold = 0.1: means nothing without"),
        ({"early_stopping_patience": 0}, "early_stopping_patience"),
    ],
)
def test_it_is_refused_where_it_could_not_act(tiny_recipe: Settings, changes: Settings, message: str):
    with pytest.raises(ValueError, match=message):
        load_recipe({**tiny_recipe, **changes})


def test_it_is_refused_without_held_out_pairs(tiny_recipe: Settings, pair_files: Path):
    alone = {"dataset_mixer": {str(pair_files / "train.jsonl"): 1.0}, "validation_fraction": 0.0}
    for start in (lambda recipe: Trainer(recipe, display=Display(quiet=True)), run_recipe):
        with pytest.raises(ValueError, match="early_stopping_patience = 2: there are no held-out pairs"):
            start(load_recipe({**tiny_recipe, **alone, "early_stopping_patience": 2, "device": "cpu"}))
