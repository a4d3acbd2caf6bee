"""Trap 62: two processes train into one folder, and lines of both are lost. Here the second is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
from hf_hosts import read_rows, settings
from mesh_runs import error_of

from simpo.display import Display
from simpo.hosts.hf import SimPOConfig, SimPOTrainer, run_recipe
from simpo.judging.command import run_judge
from simpo.onpolicy.pair import run_pair
from simpo.onpolicy.rounds import run_rounds
from simpo.onpolicy.score import run_score
from simpo.recipe import load_recipe
from simpo.run import lock
from simpo.run.lock import LOCK_FILE, OutputLock
from simpo.run.resume import record_launch
from simpo.trainer import Trainer
from simpo.tuning.sweep import run_sweep

Settings = dict[str, Any]

HOLDS = """
import sys
from pathlib import Path
from simpo.run.lock import OutputLock
OutputLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path):
    """hold(folder): another process takes the lock; returns it. Killed in the end."""
    started: list[subprocess.Popen[str]] = []

    def hold(folder: Path) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], **pipes)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def build(settings: Settings, **changes: Any) -> Trainer:
    return Trainer(load_recipe({**settings, **changes}), display=Display(quiet=True))


def test_the_second_process_is_refused_by_name_on_every_host(
    tiny_recipe: Settings, tiny_model: Path, pair_files: Path, tmp_path: Path, two_ranks: Any, other: Any
) -> None:
    folder = Path(tiny_recipe["output_dir"])
    process = other(folder)
    line = rf"output_dir: {folder} is in use by process {process.pid} on \S+ since \S+ \S+; wait for it, stop it, or"
    with pytest.raises(ValueError, match=line):
        build(tiny_recipe, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=line):
        run_recipe(load_recipe(tiny_recipe))
    args = SimPOConfig(report_to=[], disable_tqdm=True, **settings(folder, max_steps=1))
    with pytest.raises(ValueError, match=line):
        SimPOTrainer(str(tiny_model), args, train_dataset=read_rows(pair_files / "train.jsonl")).train()
    answers = two_ranks.run(error_of, {**tiny_recipe, "gradient_accumulation_steps": 1}, True)
    assert {kind for kind, _ in answers} == {"ValueError"}
    assert all("is in use by process" in text for _, text in answers)
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


def test_every_command_that_writes_a_folder_keeps_to_itself_there(tmp_path: Path, other: Any) -> None:
    scored = (("Short.", 0.1), ("Much longer.", 0.9))
    answers = [{"text": text, "score": score, "num_tokens": 2, "finished": True} for text, score in scored]
    row = {"id": "a", "prompt": "Why?", "responses": answers}
    for name in ("responses", "scored"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    scorers = {"length": {"kind": "length", "max": 10}}
    keys = {"model_name_or_path": "any", "output_dir": str(tmp_path), "dataset_mixer": {"any": 1.0}}
    recipe = load_recipe({**keys, "score.scorers": scorers, "judge.scorers": scorers, "judge.model": "one"})
    process = other(tmp_path)
    for command in (
        lambda: run_score(recipe),
        lambda: run_pair(recipe),
        lambda: run_judge(load_recipe(recipe, {"judge.against": "two"}), output=str(tmp_path)),
        lambda: run_rounds(recipe),
        lambda: run_sweep(recipe, {"beta": ("1", "2")}, display=Display(quiet=True)),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by process {process.pid}"):
            command()
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE, "responses.jsonl", "scored.jsonl"}


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGTERM, None], ids=["killed", "terminated", "ended"])
def test_what_a_dead_process_leaves_keeps_nobody_out(tmp_path: Path, other: Any, ends: int | None) -> None:
    process = other(tmp_path / "run")
    process.send_signal(ends) if ends else process.stdin.close()
    process.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with OutputLock(tmp_path / "run") as own:
        assert own.acquire() is None
        assert f"process {os.getpid()} on" in (tmp_path / "run" / LOCK_FILE).read_text()


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    with OutputLock(tmp_path / "runs" / "first") as own:
        own.acquire()
    assert not list(tmp_path.iterdir())
    with OutputLock(tmp_path / "runs" / "first") as own:
        own.acquire()
        (tmp_path / "runs" / "first" / "metrics.jsonl").touch()
    assert [path.name for path in tmp_path.rglob("*.*")] == ["metrics.jsonl"]


def test_a_refused_start_leaves_no_folder_and_lets_the_next_one_in(tiny_recipe: Settings) -> None:
    with pytest.raises(ValueError, match="no/such"):
        build(tiny_recipe, dataset_mixer={"no/such/folder": 1.0})
    assert build(tiny_recipe).run().steps == 10
    assert not list(Path(tiny_recipe["output_dir"]).glob("_*"))


def test_one_process_may_open_its_own_folder_again(tmp_path: Path, other: Any) -> None:
    first, second = OutputLock(tmp_path), OutputLock(tmp_path)
    first.acquire()
    second.acquire()
    first.release()
    first.release()
    assert (tmp_path / LOCK_FILE).exists()  # still the second's
    second.release()
    other(tmp_path)
    with pytest.raises(ValueError, match="is in use by process"):
        first.acquire()


def test_many_processes_at_once_are_one_owner_after_the_other(tmp_path: Path) -> None:
    """Taken, given back and removed again by processes that meet at every moment of it."""
    code = (
        "import sys, pathlib, time\nfrom simpo.run.lock import OutputLock\n"
        "folder = pathlib.Path(sys.argv[1])\ndone = 0\n"
        "while done < 20:\n"
        "    lock = OutputLock(folder)\n"
        "    try:\n        lock.acquire()\n"
        "    except ValueError:\n        time.sleep(0.001)\n        continue\n"
        "    (folder / 'alone').mkdir()\n    (folder / 'alone').rmdir()\n"
        "    lock.release()\n    done += 1\n"
    )
    with (tmp_path / "errors").open("w+") as errors:
        processes = [forks.Program(["-c", code, tmp_path / "run"], stderr=errors) for _ in range(3)]
        try:
            codes = [process.wait(120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        errors.seek(0)
        assert (codes, errors.read()) == ([0, 0, 0], "")


def test_an_attempt_on_a_lost_machine_does_not_keep_its_own_restart_out(
    tmp_path: Path, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may hold on to the locks of a machine that is gone; torchrun starts the run again elsewhere."""
    other(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    record_launch(tmp_path)
    with pytest.raises(ValueError, match="is in use by process"):
        OutputLock(tmp_path).acquire()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with OutputLock(tmp_path) as own:
        assert own.acquire() is None


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "lockf", unsupported)
    with OutputLock(tmp_path) as own:
        assert "is on a system without file locks: start no second run in it" in own.acquire()
    assert not list(tmp_path.iterdir())
