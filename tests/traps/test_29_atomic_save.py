"""Trap 29: a save overwrites the previous checkpoint before the new one is whole. Here it is written aside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from simpo.display import Display
from simpo.hosts.hf import SimPOTrainer, run_recipe
from simpo.recipe import load_recipe
from simpo.run import checkpoint as checkpoints
from simpo.run.saved import TRAINERS, list_checkpoints
from simpo.trainer import Trainer


class PowerCut(Exception):
    """What the tests raise where the machine would have died."""


SAVING = [(checkpoints, name) for name in ("rng_state", "record_files", "sync_tree")]
DEATHS = [(checkpoints.dcp, "save"), *SAVING, (Path, "rename")]


def test_a_save_that_dies_anywhere_leaves_the_previous_checkpoint_whole(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(load_recipe(tiny_recipe), display=Display(quiet=True))
    plans = list(trainer.loader.plans(0, 2))
    trainer.train_step(plans[0])
    good = trainer.save()
    trainer.train_step(plans[1])

    def die(*args: Any, **kwargs: Any) -> None:
        raise PowerCut

    for owner, name in DEATHS:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, die)
            with pytest.raises((PowerCut, OSError)) as died:  # what goes wrong inside dcp is reported as the latter
                trainer.save()
        assert [c.step for c in list_checkpoints(trainer.checkpoint_dir)] == [1], name
        assert any(trainer.checkpoint_dir.glob(".step-*")) == (died.type is PowerCut), name
        again = Trainer(load_recipe({**tiny_recipe, "resume_from_checkpoint": True}), display=Display(quiet=True))
        assert again.progress.step == 1, name
        assert [path.name for path in trainer.checkpoint_dir.iterdir()] == [good.folder.name]  # no half-written ones
    assert again.run().steps == 10


def test_files_are_synced_before_the_rename(tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(load_recipe(tiny_recipe), display=Display(quiet=True))
    trainer.train_step(next(trainer.loader.plans(0, 1)))
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)

    def record(path: Path, target: Path) -> Path:
        if Path(target).name == "step-1":
            events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", record)
    trainer.save()
    first_rename = events.index("rename")
    files = {"__0_0.distcp", ".metadata", "rng-0.json", "trainer_state.json", "files.json"}
    assert {*files, ".step-1.writing"} <= {*events[:first_rename]}
    assert events[first_rename + 1 :] == ["checkpoints"]  # the folder that holds the new name


def test_the_trainer_deletes_no_checkpoint_before_the_next_one_is_whole(
    tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = SimPOTrainer._identity

    def die_at_the_second(trainer: SimPOTrainer) -> dict[str, Any]:
        if trainer.state.global_step == 2:
            raise PowerCut
        return identity(trainer)

    monkeypatch.setattr(SimPOTrainer, "_identity", die_at_the_second)
    keys = {"max_steps": 2, "save_steps": 1, "save_total_limit": 1}
    with pytest.raises(PowerCut):
        run_recipe(load_recipe({**tiny_recipe, **keys}))
    monkeypatch.undo()
    folder = Path(tiny_recipe["output_dir"], "checkpoints")
    assert [c.step for c in list_checkpoints(folder, TRAINERS)] == [1]
    run_recipe(load_recipe({**tiny_recipe, **keys, "resume_from_checkpoint": True}))
    assert [c.step for c in list_checkpoints(folder, TRAINERS)] == [2]
