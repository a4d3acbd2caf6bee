"""metrics.jsonl and the trackers."""

from __future__ import annotations

import json
import math
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from simpo.recipe import Recipe, load_recipe
from simpo.run.logs import read_log
from simpo.run.tracking import MetricsLog, check_trackers, forget_lines_after, name_of, sync_logs


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
    sync_logs(tmp_path)
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    assert lines(path)[-1]["loss"] == 0.5


def test_a_half_written_last_line_is_told_from_a_broken_one(tmp_path: Path) -> None:
    path, broken = tmp_path / "metrics.jsonl", []
    assert [*read_log(path)] == []
    path.write_bytes(b'{"step": 1,\r"loss": 2}\n\n{"step": 2, "lo')
    assert [line["step"] for line in read_log(path)] == [1]
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n[3]\n{"loss": 4}\n{"step": 5, "text": "\xc3"}\n{"step": 6, "lo\n')
    assert [line["step"] for line in read_log(path, broken.append)] == [1, 5]
    assert broken == [2, 3, 4, 6]
    with pytest.raises(ValueError, match=rf"{path}: line 2 is no JSON object with a step"):
        [*read_log(path)]


def test_a_run_is_called_as_the_recipe_says_or_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = recipe(output_dir=".")
    assert (name_of(here), name_of(here, tmp_path / "moved")) == (tmp_path.name, "moved")
    assert name_of(recipe(output_dir=".", run_name="first"), tmp_path) == "first"


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
        init=lambda **options: calls.append(("init", options)) or SimpleNamespace(name="the name", id="the id"),
        log=lambda values, step: calls.append(("log", (step, values))),
        finish=lambda: calls.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    MetricsLog(tmp_path / "metrics.jsonl", recipe(report_to=[name], output_dir=str(tmp_path / "folder"))).close()
    assert re.fullmatch("folder-[0-9a-f]{6}" if name == "trackio" else "folder", calls[0][1][run_name])
    calls.clear()
    log = MetricsLog(tmp_path / "metrics.jsonl", recipe(report_to=[name], run_name="first"))
    log.write({"loss": 1.5, "rewards/margins": math.nan}, step=7)
    log.close()
    assert [kind for kind, _ in calls] == ["init", "log", "finish"]
    assert calls[0][1][run_name].startswith("first")
    assert calls[0][1]["config"]["loss_type"] == "sigmoid"
    assert calls[1][1] == (7, {"loss": 1.5})
    known = {"name": "the name"} if name == "trackio" else {"id": "the id", run_name: "first"}
    MetricsLog(tmp_path / "metrics.jsonl", recipe(report_to=[name], run_name="first"), resume_step=4).close()
    assert calls[3][1] == {**calls[0][1], **known, "resume": "allow"}, "a resumed run goes on in its own"
    monkeypatch.setenv(f"{name.upper()}_RUN_ID", "another")
    MetricsLog(tmp_path / "metrics.jsonl", recipe(report_to=[name]), resume_step=4).close()
    MetricsLog(tmp_path / "metrics.jsonl", recipe(report_to=[name])).close()
    assert not any("resume" in calls[index][1] for index in (5, 7)), "nor where the user says which, or from the start"


def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*values: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto host")

    said: list[str] = []
    fake = SimpleNamespace(init=lambda **options: SimpleNamespace(id="1"), log=fail, finish=fail)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    path, settings = tmp_path / "metrics.jsonl", recipe(report_to=["wandb"])
    log = MetricsLog(path, settings, said.append)
    for step in (1, 2):
        log.write({"loss": 1.0}, step=step)
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 2]
    assert len(said) == 1
    assert said[0].startswith("report_to: wandb failed (ConnectionError: no route); it gets no more of this run")
    fake.init = fail
    MetricsLog(path, settings, said.append, resume_step=2).close()
    assert "the run goes on without it" in said[1]
    with pytest.raises(ValueError, match=r"^report_to: wandb failed \(ConnectionError: no route\); without it"):
        MetricsLog(path, settings)
    (tmp_path / "trackers.json").write_text('{"wan')
    fake.init = lambda **options: said.append(str(options.get("id"))) or SimpleNamespace(id="2")
    MetricsLog(path, settings, said.append, resume_step=2).close()
    assert said[2] == "None", "a file that was cut short"
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "2"}
    MetricsLog(path, recipe()).close()
    assert json.loads((tmp_path / "trackers.json").read_text()) == {}, "another run in this folder"


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
    calls.clear()
    MetricsLog(tmp_path / "metrics.jsonl", recipe(report_to=["mlflow"], save_steps=7), resume_step=7).close()
    assert [name for name, _ in calls] == ["start_run", "end_run"], "parameters must not change"
    assert calls[0][1] == {"run_id": "1"}


def test_what_a_resumed_run_does_again_replaces_what_tensorboard_has(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, loss in ((0, 1.0), (2, 2.0)):
        log = MetricsLog(tmp_path / "metrics.jsonl", recipe(report_to=["tensorboard"]), resume_step=resume_step)
        for step in range(resume_step + 1, 5):
            log.write({"loss": loss}, step=step)
        log.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(line.step, line.value) for line in found] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_a_tracker_that_is_not_installed_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"report_to: no_such_tracker is not installed: pip install"):
        check_trackers(["no_such_tracker"])
