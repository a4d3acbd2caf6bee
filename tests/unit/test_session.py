"""run.session: when something is due, and which evaluation is the best or a gain."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpo.recipe import Recipe, load_recipe
from simpo.run.saved import Checkpoint
from simpo.run.session import Progress, check_held_out, is_due, locate_best


@pytest.mark.parametrize(
    ("strategy", "every", "due"),
    [
        ("steps", 4, [4, 8, 10]),
        ("steps", 0.25, [3, 6, 9, 10]),  # a share is rounded up, as in transformers
        ("steps", 0.01, [*range(1, 11)]),
        ("steps", None, [10]),
        ("epoch", None, [5, 10]),
        ("no", 2, []),
        (None, 2, [10]),
    ],
)
def test_what_is_due_after_which_of_ten_steps(strategy: str | None, every: float | None, due: list[int]):
    found = {"strategy": strategy, "every": every, "steps_per_epoch": 5, "total_steps": 10}
    assert [step for step in range(1, 11) if is_due(step=step, **found)] == due


def progress_after(recipe: Recipe, values: list[float]) -> list[tuple[int | None, int]]:
    """The best step and the evaluations without a gain after each evaluation."""
    progress, found = Progress(best_in="elsewhere"), []
    for step, value in enumerate(values, start=1):
        progress.step = step
        progress.track_best({recipe.metric_for_best_model: value}, recipe)
        found.append((progress.best_step, progress.evals_without_gain))
    assert progress.best_in is None  # the run's own folder has it
    return found


@pytest.mark.parametrize(("metric", "sign"), [("eval_loss", -1.0), ("eval_rewards/accuracies", 1.0)])
def test_the_best_may_be_no_gain(metric: str, sign: float):
    """A gain surpasses the best so far by more than the threshold; the best needs only to be better."""
    keys = {"metric_for_best_model": metric, "early_stopping_threshold": 0.5, "eval_strategy": "steps", "eval_steps": 1}
    recipe = load_recipe({"model_name_or_path": "m", "early_stopping_patience": 3, "save_steps": 1, **keys})
    gains = progress_after(recipe, [sign * value for value in (1.0, 1.25, 1.25, 1.75, 2.5, 2.0)])
    assert gains == [(1, 0), (2, 1), (2, 2), (4, 3), (5, 0), (5, 1)]


def test_a_metric_that_is_no_number_is_never_the_best():
    recipe = load_recipe({"model_name_or_path": "m"})
    assert progress_after(recipe, [math.nan, 2.0, math.nan, 1.0]) == [(None, 1), (2, 0), (2, 1), (4, 0)]
    earlier = Progress(step=4, best_step=2, best_metric=math.nan)  # a checkpoint of a version that took it
    earlier.track_best({"eval_loss": 1.0}, recipe)
    assert (earlier.best_step, earlier.best_metric) == (4, 1.0)


def test_a_resumed_run_whose_best_checkpoint_is_gone_goes_on_counting(tmp_path: Path):
    recipe = load_recipe(
        {"model_name_or_path": "m", "early_stopping_patience": 3, "eval_strategy": "steps", "eval_steps": 2}
    )
    progress = Progress(step=4, best_step=2, best_metric=1.0, evals_without_gain=1, last_eval_step=4)
    progress.last_eval = {"eval_loss": 2.0}
    mesh = SimpleNamespace(on_main=lambda work: work())
    line = locate_best(progress, Checkpoint(tmp_path / "step-4", 4), tmp_path, recipe, mesh)
    assert line is not None
    assert line.endswith("From here on the best is chosen among step 4 and those after it")
    assert (progress.best_step, progress.best_metric, progress.evals_without_gain) == (4, 2.0, 1)


def test_an_evaluation_without_the_metric_names_those_it_has():
    recipe = load_recipe({"model_name_or_path": "m"})
    with pytest.raises(ValueError, match="metric_for_best_model: 'eval_loss' is not one of eval_pairs, eval_runtime"):
        Progress().track_best({"eval_runtime": 1.0, "eval_pairs": 1.0}, recipe)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience = 2"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end = true"),
        ({"guard": "back"}, "guard = back"),
    ],
)
def test_what_chooses_weights_by_held_out_pairs_needs_some(keys: dict[str, Any], said: str):
    often = {"model_name_or_path": "m", "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    with pytest.raises(ValueError, match=f"^{said}: there are no held-out pairs"):
        check_held_out(load_recipe(often | keys), SimpleNamespace(eval=None))
    assert check_held_out(load_recipe(often | keys), SimpleNamespace(eval=[])) == []


def test_what_does_nothing_without_held_out_pairs_is_said():
    recipe = load_recipe({"model_name_or_path": "m", "eval_on_start": True, "num_eval_generations": 2})
    (line,) = check_held_out(recipe, SimpleNamespace(eval=None))
    assert line.startswith("eval_on_start and num_eval_generations: without effect")
    assert check_held_out(load_recipe({"model_name_or_path": "m"}), SimpleNamespace(eval=None)) == []
