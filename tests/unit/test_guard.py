"""The guard's verdicts on streams of logged numbers, each with the one thing that is wrong with it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpo.display import Display
from simpo.recipe import KEYS, load_recipe
from simpo.recipe.values import GUARD_CHECKS
from simpo.run.guard import CHECKS, Finding, Guard, RunGuard
from simpo.run.stopping import StoppedByGuard

DOC = Path(__file__).resolve().parents[2] / "docs" / "trouble.md"


def stream(steps: int = 40, *, seed: int = 0, noise: float = 0.15, **changes: Any) -> list[dict[str, Any]]:
    """An ordinary run of four pairs a step, evaluated every tenth; `changes`: name -> what to add at each step."""
    rng, lines = random.Random(seed), []

    def values(step: int, noise: float, prefix: str = "") -> dict[str, float]:
        margin = 0.02 * step + rng.gauss(0, noise)
        chosen = -1.1 - 0.002 * step + rng.gauss(0, noise)
        found = {
            "logps/chosen": chosen,
            "logps/rejected": chosen - margin / 2,
            "rewards/margins": margin,
            "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.005 * step + rng.gauss(0, noise))),
        }
        for name, of in changes.items():
            if name in found:
                found[name] += of(step)
            elif name == prefix + "own":
                found |= of(step)
        return found

    for step in range(steps + 1):
        if step:
            grad_norm = {"grad_norm": 8.0 * math.exp(rng.gauss(0, 0.4)) * changes.get("spike", lambda step: 1)(step)}
            lines.append({"step": step, "loss": 1.0, "pairs_seen": 4 * step, **values(step, noise), **grad_norm})
        if step % 10 == 0:
            numbers = {f"eval_{name}": value for name, value in values(step, 0.02, "eval_").items()}
            lines.append({"step": step, "eval_loss": 1.0, "eval_pairs": 100, **numbers})
    return lines


def judge(lines: list[dict[str, Any]], guard: Guard | None = None) -> list[Finding]:
    guard = guard or Guard(gamma=1.0)
    return [finding for line in lines for finding in guard.read(line)]


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


@pytest.mark.parametrize("seed", range(20))
def test_ordinary_numbers_are_passed_over(seed: int) -> None:
    assert judge(stream(seed=seed, noise=0.25)) == []


def test_a_chosen_log_prob_that_falls_faster_than_the_margin_grows() -> None:
    falling = {"logps/chosen": lambda step: -0.03 * step, "logps/rejected": lambda step: -0.03 * step}
    found = only(judge(stream(**falling)))
    assert (found.check, found.step <= 30, found.since_step <= found.step) == ("displacement", True, True)
    margin_too = falling | {"logps/rejected": lambda step: -0.09 * step}
    assert judge(stream(**margin_too)) == []  # the margin grows twice as fast as the chosen log-prob falls


def test_a_crash_shows_in_two_lines_and_one_odd_line_is_passed_over() -> None:
    gone = only(judge(stream(9, **{"logps/chosen": lambda step: -3.0 * (step >= 4), "logps/rejected": lambda step: 0})))
    assert (gone.check, gone.step, gone.since_step) == ("displacement", 5, 4)
    assert judge(stream(9, **{"logps/chosen": lambda step: -3.0 * (step == 4)})) == []
    far = {name: lambda step: -30.0 * (step >= 3) for name in ("logps/chosen", "logps/rejected")}
    assert only(judge(stream(9, **far))).step == 3


# Of real runs of SmolLM2-135M-Instruct, 4 pairs a step in bf16: log-prob of the chosen answers, reward margin.
AT_RATE_03 = [(-1.39, -0.40), (-1.23, 0.11), (-23.99, 2.69), (-137.69, 18.91)]  # the first step has rate 0
_NUMBERS = """
-1.32 0.02 -1.36 -0.43 -1.01 0.19 -0.93 0.30 -1.15 0.11 -1.20 -0.10 -1.09 0.42 -1.05 0.60 -0.91 -0.35 -0.89 0.04
-1.36 0.29 -1.15 0.28 -1.37 0.67 -1.47 0.04 -1.54 0.07 -1.45 0.54 -1.89 0.25 -1.66 1.04 -1.76 0.87 -1.90 1.00
-1.75 0.26 -1.59 0.04 -1.69 1.45 -1.48 0.48 -1.60 1.56 -1.29 1.06 -1.65 1.59 -1.53 0.89 -1.56 0.45 -1.28 1.36
-1.26 2.04
"""
RECOVERS = list(
    zip(*[iter(map(float, _NUMBERS.split()))] * 2, strict=True)
)  # at rate 5e-5, on its own best and worst answers


def recorded(numbers: list[tuple[float, float]]) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 1.0, "rewards/accuracies": 0.7, "rewards/margins": margin, "grad_norm": 8.0}
        | {"logps/chosen": chosen, "logps/rejected": chosen - margin / 2, "pairs_seen": 4 * step}
        for step, (chosen, margin) in enumerate(numbers, start=1)
    ]


def test_a_model_that_begins_below_what_is_broken_has_not_crashed() -> None:
    untrained = [(-10.8 + 0.01 * step, 0.1) for step in range(30)]
    assert judge(recorded(untrained)) == []
    assert only(judge(recorded([*untrained[:9], (-13.5, 0.1), (-13.5, 0.1)]))).check == "displacement"


def test_real_runs_one_that_collapses_at_its_first_update_and_one_that_recovers() -> None:
    found = only(judge(recorded(AT_RATE_03)))
    assert (found.check, found.step) == ("displacement", 3)
    assert found.saw.endswith("went from -1.39 to -23.99 nats a token")
    assert judge(recorded(RECOVERS)) == []


def test_a_margin_beyond_what_gamma_asks() -> None:
    grown = stream(**{"rewards/margins": lambda step: 0.2 * step})
    found = only(judge(grown))
    assert found.check == "margin"
    assert "asks for 1" in found.saw
    assert judge(grown, Guard(gamma=5.0)) == []  # Gemma's, whose target is 5
    assert judge(grown, Guard(gamma=None)) == []


def test_accuracy_on_training_pairs_alone() -> None:
    lines = stream(60, noise=0.05, **{"rewards/accuracies": lambda step: 0.006 * step})
    for line in lines:
        if "eval_loss" in line:
            line["eval_rewards/accuracies"] = 0.5
    found = only(judge(lines))
    assert found.check == "overfitting"
    assert "held-out pairs from 50% to 50%" in found.saw


def test_a_held_out_margin_that_falls_while_that_of_training_grows() -> None:
    lines = stream()
    for line in lines:
        if "eval_loss" in line:
            line["eval_rewards/margins"] = -0.01 * line["step"]
    found = only(judge(lines))
    assert (found.check, found.step, found.since_step) == ("overfitting", 30, 20)


def test_a_spike_of_the_gradient() -> None:
    found = only(judge(stream(spike=lambda step: 25 if step == 30 else 1)))
    assert (found.check, found.step) == ("gradient", 30)
    assert judge(stream(spike=lambda step: 25 if step == 3 else 1)) == []  # nothing is usual yet


def test_a_source_that_pulls_the_other_way_and_one_that_is_only_harder() -> None:
    def sources(bad: float) -> list[dict[str, Any]]:
        rng = random.Random(1)
        lines = stream(20)
        for line in lines:
            if "loss" in line:
                line |= {f"rewards/margins/{n}": m + rng.gauss(0, 0.5) for n, m in (("good", 0.4), ("bad", bad))}
        return lines

    found = only(judge(sources(-4.0)))
    assert (found.check, found.source, 4 <= found.step <= 8) == ("sources", "bad", True)  # four lines tell how sure
    assert judge(sources(0.1)) == []


def test_each_source_is_said_once() -> None:
    guard, dropped = Guard(gamma=1.0), {"a": (30, 50), "b": (20, 40), "c": (0, 40)}
    assert [found.source for found in guard.read_start(5e-5, dropped, 0.2)] == ["a", "b"]
    assert guard.read_start(5e-5, dropped, 0.2) == []


def test_a_share_of_all_pairs_is_no_certainty() -> None:
    """Three of three, then two of three: a binomial share of 1 has a standard error of 0."""
    lines = [
        {"step": step, "eval_loss": 1.0, **{f"eval_{name}": value for name, value in numbers.items()}}
        for step, right in ((0, 1.0), (1, 1.0), (2, 2 / 3))
        for numbers in [
            {"logps/chosen": -1.0, "logps/rejected": -1.5, "rewards/margins": 0.5, "rewards/accuracies": 0.9}
            | {"rewards/accuracies/few": right, "pairs/few": 3, "pairs": 100}
        ]
    ]
    assert judge(lines) == []
    for line in lines:
        line["eval_pairs/few"] = 300
    assert (found := only(judge(lines))).source == "few"
    assert found.saw == "accuracy on held-out pairs of few fell from 100% to 67%"


def test_the_best_step_from_before_by_a_metric_that_grows_and_by_one_that_falls(tmp_path: Path) -> None:
    """Steps 1 to 4 have checkpoints; what shows since step 6 may be in the weights that step 5's line is of."""
    for metric, values in (
        ("eval_loss", [math.nan, 1, 2, 4, 0]),
        ("eval_rewards/accuracies", [math.nan, 0.9, 0.4, 0.1, 1]),
    ):
        keys = {"metric_for_best_model": metric, "logging_steps": 1, "guard": "back", "eval_strategy": "steps"}
        recipe = load_recipe({"model_name_or_path": "m", **keys, "eval_steps": 1, "save_steps": 1})
        assert recipe.greater_is_better == (metric != "eval_loss")
        mesh = SimpleNamespace(is_main=True, from_main=lambda value: value)
        guard = RunGuard(recipe, tmp_path, mesh, Display(quiet=True), history=())
        for step, value in enumerate(values, start=1):
            numbers = {f"eval_{name}": -1.0 for name in ("logps/chosen", "logps/rejected", "rewards/margins")}
            guard.heed(step, {"eval_loss": 1.0, "eval_rewards/accuracies": 0.5, **numbers, metric: value})
        guard.verdict = (Finding(7, "gradient", 6, "saw"), "back")
        guard.choose([1, 2, 3, 4, 5])
        assert guard.back_to == 2, metric
        guard.choose([3, 4, 5])
        assert guard.back_to == 3, metric
        guard.choose([5])
        assert guard.back_to is None, metric


def test_the_first_finding_ends_the_run_and_is_what_is_told(tmp_path: Path) -> None:
    recipe = load_recipe({"model_name_or_path": "m", "learning_rate": 0.5, "guard": "stop"})
    mesh = SimpleNamespace(is_main=True, from_main=lambda value: value, on_main=lambda function: function())
    guard = RunGuard(recipe, tmp_path, mesh, Display(quiet=True), history=())
    with pytest.raises(StoppedByGuard, match=r"before the first step \(learning_rate\); --guard.learning_rate warn tr"):
        guard.begin({"a": (30, 50), "b": (0, 40)})
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "guard.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kinds == ["learning_rate", "sources"]


def test_what_can_be_seen_before_the_first_step() -> None:
    found = only(Guard(gamma=1.0).read_start(0.3, {"a": (0, 50), "b": (1, 40)}, 0.2))
    assert (found.check, found.step) == ("learning_rate", 0)
    found = only(Guard(gamma=1.0).read_start(5e-5, {"a": (1, 500), "b": (20, 40)}, 0.2))
    assert (found.check, found.source, found.saw) == ("sources", "b", "20 of 40 rows of b were dropped")


def answers(**changes: Any) -> list[dict[str, Any]]:
    plain = {"response": "A short answer.", "tokens": 40, "finished": True, "repeated_share": 0.1}
    return [{"row_id": str(row), **plain, **{k: v[row] for k, v in changes.items()}} for row in range(4)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"repeated_share": [0.9, 0.1, 0.8, 0.1]}, "2 of 4 held-out answers repeat themselves; 0 did at the start"),
        ({"finished": [False, False, True, True]}, "2 of 4 held-out answers run to the limit; 0 did at the start"),
        ({"tokens": [90, 90, 90, 10]}, "held-out answers are 2.2 times as long as at the start (median)"),
        ({"tokens": [12, 13, 10, 40]}, "held-out answers are 0.31 times as long as at the start (median)"),
    ],
)
def test_answers_that_are_ruined(changes: dict[str, Any], says: str) -> None:
    guard = Guard(gamma=1.0)
    assert guard.read_answers(0, answers()) == []
    assert guard.read_answers(5, answers(tokens=[60, 30, 25, 50], finished=[True, True, True, False])) == []
    found = only(guard.read_answers(10, answers(**changes)))
    assert (found.check, found.step, found.saw) == ("answers", 10, says)
    assert guard.read_answers(15, answers(**changes)) == []  # once


def test_answers_that_come_to_their_end_now_are_no_shorter_ones() -> None:
    guard, at_limit = Guard(gamma=1.0), {"tokens": [160, 160, 160, 70], "finished": [False, False, False, True]}
    assert guard.read_answers(0, answers(**at_limit)) == []
    assert guard.read_answers(4, answers(tokens=[24, 36, 14, 20])) == []


def test_answers_in_another_language() -> None:
    pytest.importorskip("py3langid")
    english = "The weather is lovely today, and we should go for a walk in the park before it starts to rain again."
    german = (
        "Das Wetter ist heute sehr schön, und wir sollten im Park spazieren gehen, bevor es wieder zu regnen beginnt."
    )
    guard = Guard(gamma=1.0)
    assert guard.read_answers(0, answers(response=[english] * 4)) == []
    assert guard.read_answers(1, answers(response=[english] * 3 + [german])) == []
    assert "another language" in only(guard.read_answers(2, answers(response=[english] * 2 + [german] * 2))).saw


def test_levels_by_check() -> None:
    def guard(value: Any) -> dict[str, str]:
        return load_recipe({"model_name_or_path": "m", "guard": value}).guard

    assert guard("stop") == {"all": "stop"}
    assert guard(False) == {"all": "off"}  # a bare `off` in YAML
    assert guard({"answers": "stop"}) == {"all": "warn", "answers": "stop"}
    for wrong, says in (("loud", "'loud' is not a level"), ({"answer": "stop"}, "'answer' is not a check")):
        with pytest.raises(ValueError, match=says):
            guard(wrong)
    with pytest.raises(ValueError, match="guard: back: eval_strategy"):
        guard("back")
    assert KEYS["guard"].default == "warn"


def test_the_page_shows_every_check_as_the_code_has_it() -> None:
    assert tuple(CHECKS) == GUARD_CHECKS
    page = DOC.read_text(encoding="utf-8")
    for name, check in CHECKS.items():
        assert f"| `{name}` | {check.when} | {check.source} | {check.advice} |" in page
