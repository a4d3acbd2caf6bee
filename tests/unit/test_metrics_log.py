"""metrics.jsonl and the trackers."""

from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
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


@pytest.mark.parametrize(("name", "run_name"), [("wandb", "name"), ("trackio", "name"), ("swanlab", "experiment_name")])
def test_trackers_get_name_config_and_every_finite_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, run_name: str
) -> None:
    calls: list[tuple[str, Any]] = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda values, step: calls.append(("log", (step, values))),
        finish=lambda: calls.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    MetricsLog(tmp_path / "metrics.jsonl", recipe(report_to=[name], output_dir=str(tmp_path / "folder"))).close()
    assert calls[0][1][run_name] == "folder"
    calls.clear()
    log = MetricsLog(tmp_path / "metrics.jsonl", recipe(report_to=[name], run_name="first"))
    log.write({"loss": 1.5, "rewards/margins": math.nan}, step=7)
    log.close()
    assert [kind for kind, _ in calls] == ["init", "log", "finish"]
    assert calls[0][1][run_name] == "first"
    assert calls[0][1]["config"]["loss_type"] == "sigmoid"
    assert calls[1][1] == (7, {"loss": 1.5})


def test_mlflow_gets_the_same_through_transformers_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    fake = ModuleType("mlflow")
    fake.__spec__, fake.__version__ = ModuleSpec("mlflow", None), "3.0.0"
    for name in ("start_run", "log_params", "log_metrics", "end_run"):
        setattr(fake, name, lambda *values, _name=name, **options: calls.append((_name, values or options)))
    fake.is_tracking_uri_set = lambda: False
    fake.active_run = lambda: SimpleNamespace(info=SimpleNamespace(run_id="1")) if calls else None
    fake.utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=1000))
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    log = MetricsLog(tmp_path / "metrics.jsonl", recipe(report_to=["mlflow"], run_name="first"))
    log.write({"loss": 1.5, "rewards/margins": math.nan}, step=7)
    log.close()
    found = dict(calls)
    assert found["start_run"]["run_name"] == "first"
    assert found["log_params"][0]["loss_type"] == "sigmoid"
    assert found["log_metrics"] == {"metrics": {"loss": 1.5}, "step": 7, "synchronous": False}
    assert calls[-1][0] == "end_run"


def test_a_tracker_that_is_not_installed_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"report_to: no_such_tracker is not installed: pip install"):
        check_trackers(["no_such_tracker"])
