"""metrics.jsonl and the trackers."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpo.recipe import Recipe, load_recipe
from simpo.run.tracking import MetricsLog, check_trackers, forget_lines_after


def recipe(**changes: Any) -> Recipe:
    return load_recipe({"model_name_or_path": "m", "dataset_mixer": {"d": 1.0}, "output_dir": "o", **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_fresh_run_starts_a_fresh_file_and_a_resumed_one_keeps_what_it_will_not_do_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9}\n')
    log = MetricsLog(path, recipe())
    for step in (1, 2, 3):
        log.write({"loss": 1.0 / step}, step=step)
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    log = MetricsLog(path, recipe(), resume_step=2)
    log.write({"loss": 0.5}, step=3)
    log.sync()
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    assert lines(path)[-1]["loss"] == 0.5


def test_a_line_separator_inside_a_response_does_not_end_its_line(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    line = json.dumps({"step": 1, "response": "one\u2028two"}, ensure_ascii=False) + "\n"
    path.write_text(line, encoding="utf-8")
    forget_lines_after(path, 1)
    assert path.read_text(encoding="utf-8") == line


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_name_config_and_every_finite_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls: list[tuple[str, Any]] = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda values, step: calls.append(("log", (step, values))),
        finish=lambda: calls.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    log = MetricsLog(tmp_path / "metrics.jsonl", recipe(report_to=[name], run_name="first"))
    log.write({"loss": 1.5, "rewards/margins": math.nan}, step=7)
    log.close()
    assert [kind for kind, _ in calls] == ["init", "log", "finish"]
    assert calls[0][1]["name"] == "first"
    assert calls[0][1]["config"]["loss_type"] == "sigmoid"
    assert calls[1][1] == (7, {"loss": 1.5})


def test_a_tracker_that_is_not_installed_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"report_to: no_such_tracker is not installed: pip install"):
        check_trackers(["no_such_tracker"])
