"""Checkpoints written in the background are those of their step, complete or absent, and their errors are heard."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import rarely
from mesh_runs import (
    LORA,
    TIED,
    Settings,
    assert_equal_bits,
    assert_same_run,
    build,
    load_and_save_again,
    run,
    whole_state,
)
from torch.distributed.checkpoint import filesystem

from simpo.run.saved import list_checkpoints
from simpo.run.stopping import OutOfMemory

KEYS = {"max_steps": 8, "save_steps": 2, "eval_steps": 4, "async_save": True}
WAIT_S = 120


@contextlib.contextmanager
def writer(before: Any) -> Iterator[None]:
    """Inside, `before` is called by each thread that is about to write a process's part of a checkpoint."""
    from torch.distributed.checkpoint import FileSystemWriter

    write_data = FileSystemWriter.write_data

    def changed(self: Any, *args: Any) -> Any:
        before()
        return write_data(self, *args)

    FileSystemWriter.write_data = changed
    try:
        yield
    finally:
        FileSystemWriter.write_data = write_data


def train_while_it_is_written(settings: Settings) -> dict[str, Any]:
    """A checkpoint of step 2 whose writers wait until step 5 is done; the state of step 2 as it was then."""
    trainer, go_on = build(settings), threading.Event()
    plans = list(trainer.loader.plans(0, 5))

    def wait() -> None:
        assert go_on.wait(WAIT_S)

    with writer(wait):
        for plan in plans[:2]:
            trainer.train_step(plan)
        state = whole_state(trainer)
        saved = trainer.save()
        for plan in plans[2:]:
            trainer.train_step(plan)
            trainer.saver.finish(wait=False)
        complete_early = saved.folder.exists()
        trainer.mesh.barrier()
        go_on.set()
        trainer.saver.finish(wait=True)
    trainer.mesh.barrier()
    moved = whole_state(trainer)
    return {
        "state": state if trainer.mesh.is_main else None,
        "moved": any(not moved[name].equal(tensor) for name, tensor in state.items()),
        "complete early": complete_early,
        "folder": str(saved.folder),
    }


@pytest.mark.parametrize(
    ("mesh", "keys"),
    [
        pytest.param("1 process", {}, id="1 process"),
        pytest.param("fsdp2", {}, id="fsdp2"),
        rarely("tp2", {}, id="tp2"),
        rarely("dp2", {}, id="dp2"),
        rarely("fsdp2", LORA, id="fsdp2 LoRA"),
        rarely("fsdp2", {"optim": "adamw_bf16"}, id="fsdp2 bf16 moments"),
    ],
)
def test_a_checkpoint_written_during_later_steps_holds_its_own_step(mesh, keys, on_mesh, settings_of):
    answers = on_mesh(mesh, train_while_it_is_written, settings_of(mesh, TIED, **keys, async_save=True))
    for answer in answers:
        assert answer["moved"]
        assert not answer["complete early"]
    (loaded,) = load_and_save_again(settings_of("1 process", TIED, name="loaded", **keys), answers[0]["folder"])
    assert loaded["step"] == 2
    assert_equal_bits(loaded["state"], answers[0]["state"])


@pytest.mark.parametrize("mesh", ["1 process", rarely("fsdp2")])
def test_a_run_that_saves_in_the_background_ends_in_the_same_bits_stopped_or_not(mesh, on_mesh, settings_of, tmp_path):
    """And keeps no more checkpoints than asked for."""
    on_mesh(mesh, run, settings_of(mesh, TIED, name="plain", **{**KEYS, "async_save": False}))
    on_mesh(mesh, run, settings_of(mesh, TIED, name="background", **KEYS))
    assert_same_run(tmp_path / "background", tmp_path / "plain")
    ours, theirs = (list_checkpoints(tmp_path / name / "checkpoints") for name in ("background", "plain"))
    assert [c.step for c in ours] == [c.step for c in theirs] == [2, 4, 6, 8]
    settings = settings_of("1 process", TIED, name="loaded", **{**KEYS, "async_save": False})
    loaded = load_and_save_again(settings, *(str(checkpoint.folder) for checkpoint in (*ours, *theirs)))
    fingerprints = [answer["fingerprint"] for answer in loaded]
    assert fingerprints[:4] == fingerprints[4:]

    limited, checkpoints = {**KEYS, "save_total_limit": 2}, tmp_path / "cut" / "checkpoints"
    on_mesh(mesh, run, settings_of(mesh, TIED, name="cut", **limited), stop_after=3)
    assert [c.step for c in list_checkpoints(checkpoints)] == [2, 3]
    on_mesh(mesh, run, settings_of(mesh, TIED, name="cut", **limited, resume_from_checkpoint=True))
    assert_same_run(tmp_path / "cut", tmp_path / "plain")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-6", "step-8"]


# --- what goes wrong -------------------------------------------------------------------------------------------------


def error_of_a_run_that_cannot_write(settings: Settings) -> tuple[str, str]:
    """The last process's disk is full."""
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1

    def fail() -> None:
        if last:
            raise OSError(28, "No space left on device")

    with writer(fail):
        try:
            build(settings).run()
        except Exception as error:
            return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("in_background", [True, False], ids=["in the background", "at once"])
@pytest.mark.parametrize("mesh", ["1 process", "fsdp2"])
@pytest.mark.parametrize("step", [2, 8], ids=["early", "last"])
def test_a_full_disk_on_one_process_is_reported_by_all(step, mesh, in_background, on_mesh, settings_of, tmp_path):
    keys = {**KEYS, "save_steps": step, "async_save": in_background}
    answers = on_mesh(mesh, error_of_a_run_that_cannot_write, settings_of(mesh, TIED, name="run", **keys))
    assert len(set(answers)) == 1, answers
    kind, text = answers[0]
    assert kind == "OSError"
    assert f"step-{step} could not be written" in text
    assert "the disk is full" in text
    assert "No space left on device" in text
    assert "\n" not in text
    if mesh != "1 process":
        assert "rank 1: " in text
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_checkpoint_on_its_way_is_kept_where_memory_runs_out(settings_of, tmp_path):
    trainer, go_on = build(settings_of("1 process", TIED, name="run", **KEYS)), threading.Event()
    step = trainer.train_step

    def train_step(plan: Any) -> Any:
        if plan.step < 3:
            return step(plan)
        go_on.set()
        raise OutOfMemory("step 4")

    trainer.train_step = train_step
    with writer(lambda: go_on.wait(WAIT_S)), pytest.raises(OutOfMemory):
        trainer.run()
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2]


def test_the_thread_that_writes_looks_at_no_gpu(settings_of, monkeypatch, tmp_path):
    """Its own would be the first one, which another process computes on."""
    trainer = build(settings_of("1 process", TIED, name="run", **{**KEYS, "max_steps": 2}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: threading.current_thread() is not threading.main_thread())
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", None)
    trainer.run()
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2]
