"""Trap 60: a closed pipe, a closed terminal, a full disk behind stdout or below the run ended it without saving."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
from torch.distributed import checkpoint as dcp

import simpo
from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.recipe.yaml import dump_yaml
from simpo.run import session, tracking
from simpo.run.stopping import Interrupted, interruptible, on_stop_signal
from simpo.streams import lasting_streams
from simpo.trainer import Trainer

Settings = dict[str, Any]


def disk_is_full(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def build(settings: Settings, **changes: Any) -> Trainer:
    return Trainer(load_recipe({**settings, **changes}), display=Display(quiet=True))


def steps_of(settings: Settings) -> list[int]:
    lines = Path(settings["output_dir"], "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


def has_model(settings: Settings) -> bool:
    return Path(settings["output_dir"], "model", "model.safetensors").is_file()


# --- what is printed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["pipe", "disk"])
def test_a_run_whose_stdout_is_lost_goes_on(tiny_recipe: Settings, tmp_path: Path, lost: str) -> None:
    recipe, said = tmp_path / "recipe.yaml", tmp_path / "stderr"
    recipe.write_text(dump_yaml({**tiny_recipe, "save_strategy": "no"}), encoding="utf-8")
    number = os.open("/dev/full", os.O_WRONLY)
    if lost == "pipe":
        reader, number = os.pipe()
        os.close(reader)
    with os.fdopen(number, "w") as stdout, said.open("w") as stderr:
        program = forks.Program(["-m", "simpo", "train", recipe], stdout=stdout, stderr=stderr)
        code = program.wait(forks.TIMEOUT_S)
    assert steps_of(tiny_recipe) == list(range(1, 11))
    assert has_model(tiny_recipe)
    told = "stdout: No space left on device; the work goes on, and what it would print there is lost\n"
    assert (code, said.read_text()) == (3, told) if lost == "disk" else code == 0
    assert "Traceback" not in said.read_text()


def test_no_encoding_ends_what_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("ascii", "utf-8"):
        file = (tmp_path / encoding).open("w", encoding=encoding)
        with file, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            with lasting_streams():
                print("Läufe … \ud83d")
        assert (tmp_path / encoding).read_bytes().endswith(b"\\ud83d\n")


def test_a_notebook_trains(tiny_recipe: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its streams are no files, and an event loop is running."""
    said: list[str] = []
    stream = type("Stream", (), {"write": lambda self, text: said.append(text), "flush": lambda self: None})()
    monkeypatch.setattr(sys, "stdout", stream)

    async def cell() -> Any:
        return simpo.train({**tiny_recipe, "max_steps": 2, "save_strategy": "no"})

    assert asyncio.run(cell()).steps == 2
    assert sys.stdout is stream
    assert any("step 2/2" in text for text in said)


# --- signals ---------------------------------------------------------------------------------------------------------


def test_a_closed_terminal_is_a_reason_to_save(tiny_recipe: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = Trainer.train_step

    def signalled(self: Trainer, plan: Any) -> dict[str, float]:
        if plan.step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return train_step(self, plan)

    monkeypatch.setattr(Trainer, "train_step", signalled)
    with pytest.raises(Interrupted, match=r"stopped after step 3 of 10 and saved \S+/step-3; to resume"):
        build(tiny_recipe).run()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    line = "interrupted; 3 of 4; the same command goes on"
    with pytest.raises(Interrupted, match=line), interruptible(lambda: "3 of 4"):
        os.kill(os.getpid(), signal.SIGHUP)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_stop_signal():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


SECOND_WHILE_SAVING = """
import os, signal, sys
from torch.distributed.checkpoint import FileSystemWriter
from simpo.trainer import Trainer
train_step, write_data = Trainer.train_step, FileSystemWriter.write_data
def signalled(self, plan):
    os.kill(os.getpid(), signal.SIGINT)
    return train_step(self, plan)
def interrupted(self, *args):
    os.kill(os.getpid(), signal.SIGINT)
    return write_data(self, *args)
Trainer.train_step, FileSystemWriter.write_data = signalled, interrupted
sys.argv[0] = "simpo"
from simpo.cli import main
main()
"""


def test_a_second_ctrl_c_has_no_traceback_while_a_checkpoint_is_written_either(
    tiny_recipe: Settings, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(tiny_recipe), encoding="utf-8")
    done = forks.run("-c", SECOND_WHILE_SAVING, "train", recipe)
    assert done.returncode == 130, done.stdout
    assert "Traceback" not in done.stdout
    assert done.stdout.endswith("interrupted\n")


# --- a full disk -----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_once_what_can_be_saved_is_saved(
    tiny_recipe: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, write = build(tiny_recipe), tracking.MetricsLog.write

    def full_at_6(self: Any, values: Any, *, step: int) -> None:
        if step == 6:
            disk_is_full()
        write(self, values, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(tracking.MetricsLog, "write", full_at_6)
        resumed = r"the disk is full; \S+/step-6 is whole; the same command with --resume_from_checkpoint true goes on"
        with pytest.raises(OSError, match=resumed):
            trainer.run()
    build(tiny_recipe, resume_from_checkpoint=True).run()
    assert steps_of(tiny_recipe) == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    lines = Path(tiny_recipe["output_dir"], "metrics.jsonl").read_text().splitlines()
    seen = [line["pairs_seen"] for line in map(json.loads, lines) if "loss" in line]
    assert seen[-1] == 40


def test_a_checkpoint_for_which_there_is_no_room_leaves_nothing_and_the_last_whole_one_is_named(
    tiny_recipe: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, save = build(tiny_recipe), dcp.save

    def full_at_8(tensors: Any, *, checkpoint_id: Path, **options: Any) -> Any:
        found = save(tensors, checkpoint_id=checkpoint_id, **options)
        return disk_is_full() if ".step-8" in str(checkpoint_id) else found

    monkeypatch.setattr(dcp, "save", full_at_8)
    with pytest.raises(
        OSError, match=r"step-8 could not be written: the disk is full \(.*\); \S+/step-4 is whole; the same"
    ):
        trainer.run()
    assert [path.name for path in Path(tiny_recipe["output_dir"], "checkpoints").iterdir()] == ["step-4"]


def test_a_line_of_metrics_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe({"model_name_or_path": "m", "output_dir": str(tmp_path)})
    log = tracking.MetricsLog(tmp_path / "metrics.jsonl", recipe)
    log.write({"loss": 1.0}, step=1)
    file = log._file
    parts = iter([5, None])

    class Full:
        def write(self, data: bytes) -> int:
            return file.write(data[: next(parts) or disk_is_full()])

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    log._file = Full()
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        log.write({"loss": 2.0}, step=2)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_no_room_for_a_checkpoint_is_said_before_the_first_step(
    tiny_recipe: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(tiny_recipe, output_dir=f"{tiny_recipe['output_dir']}-0")
    model, usage = trainer.model, session.shutil.disk_usage("/")

    def with_room_for(copies: float, **changes: Any) -> str | None:
        """Of the weights, which are fp32 in memory and in the files."""
        free = copies * 4 * sum(p.numel() for p in model.parameters())
        monkeypatch.setattr(session.shutil, "disk_usage", lambda place: usage._replace(free=int(free)))
        recipe = load_recipe(trainer.recipe, changes)
        return session.check_room(recipe, model, trainer.export_dtype, total_steps=10, steps_per_epoch=10)

    assert with_room_for(10.1) is None
    assert "this run's 3 checkpoints and its model take" in with_room_for(9.9)
    assert with_room_for(7.1, save_total_limit=1) is None
    assert "this run's 2 checkpoints" in with_room_for(6.9, save_total_limit=1)
    assert with_room_for(4.1, save_steps=10) is None
    assert with_room_for(1.1, save_strategy="no") is None
    with pytest.raises(ValueError, match=r"output_dir: \S+ has room for 0\.0 GiB, and the final model take"):
        with_room_for(0.9, save_strategy="no")
    with pytest.raises(ValueError, match=r"and a checkpoint \(0\.0 GiB\) and the final model take"):
        with_room_for(3.9)
    with pytest.raises(ValueError, match="make room, or choose another output_dir"):
        build(tiny_recipe)
    assert not Path(tiny_recipe["output_dir"]).exists()
