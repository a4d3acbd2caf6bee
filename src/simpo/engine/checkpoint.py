"""Checkpoints: everything a resumed run needs, written so that a kill at any moment loses nothing that was whole.

A checkpoint is a folder `step-N`. It is written beside its place under another name, synced to disk, and renamed;
a folder that has its final name is therefore complete. Model and optimizer go through torch.distributed.checkpoint,
which also knows sharded tensors. Must not import data, train or evaluate.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

STATE_FILE = "trainer_state.json"
RNG_FILE = "rng.pt"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints below a run's `checkpoints/`, oldest first."""
    if not folder.is_dir():
        return []
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir()]
    found = [Checkpoint(path, int(match.group(1))) for path, match in matches if match]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def save_checkpoint(
    folder: Path, *, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Checkpoint:
    """Write `folder/step-N` atomically.

    Args:
        folder: a run's `checkpoints/`; made if missing.
        step: optimizer steps done.
        model: only its trainable parameters and its buffers are kept (a LoRA run does not store its base).
        optimizer: its moments and step counts.
        state: JSON-able trainer state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step}"
    aside = folder / f".step-{step}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    tensors = _tensor_state(model, optimizer)
    with _quiet_dcp():
        dcp.save(tensors, checkpoint_id=aside / "tensors")
    torch.save(_rng_state(), aside / RNG_FILE)
    record = {**state, "step": step, "digest": _digest(tensors)}
    (aside / STATE_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    sync_tree(aside)
    replace_folder(aside, final)
    return Checkpoint(final, step)


def load_checkpoint(checkpoint: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore weights, moments and random-number states in place; return the trainer state.

    Raises:
        ValueError: a file is missing or broken, the tensors are not those that were saved, or the model does not fit.
    """
    state = read_state(checkpoint)
    tensors = _tensor_state(model, optimizer)
    try:
        with _quiet_dcp():
            dcp.load(tensors, checkpoint_id=checkpoint.folder / "tensors")
        rng = torch.load(checkpoint.folder / RNG_FILE, weights_only=False)
    except (Exception, CheckpointException) as error:  # dcp's own wrapper is a BaseException
        raise ValueError(
            f"checkpoint {checkpoint.folder} cannot be loaded into this model: {_first_line(error)}; "
            "resume from an earlier one with resume_from_checkpoint: PATH"
        ) from error
    if _digest(tensors) != state["digest"]:
        raise ValueError(f"checkpoint {checkpoint.folder} is damaged: its tensors are not the ones that were saved")
    set_model_state_dict(model, tensors["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=_OPTIMIZER_OPTIONS)
    _set_rng_state(rng)
    return state


def load_weights(checkpoint: Checkpoint, *, model: nn.Module) -> None:
    """Restore the weights alone, as for the best checkpoint at the end of a run."""
    weights = {"model": _model_state(model)}
    with _quiet_dcp():
        dcp.load(weights, checkpoint_id=checkpoint.folder / "tensors")
    set_model_state_dict(model, weights["model"], options=StateDictOptions(strict=False))


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The trainer state of a checkpoint.

    Raises:
        ValueError: it is missing or not JSON.
    """
    try:
        return json.loads((checkpoint.folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{checkpoint.folder} is not a complete checkpoint: {_first_line(error)}") from error


def clear_leftovers(folder: Path) -> None:
    """Delete what a kill left half-written or half-deleted."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune_checkpoints(folder: Path, *, keep: int, protect: int | None) -> None:
    """Delete the oldest checkpoints beyond `keep`, never the newest nor step `protect`; clear half-written ones."""
    clear_leftovers(folder)
    checkpoints = list_checkpoints(folder)
    surplus = len(checkpoints) - keep
    for checkpoint in checkpoints[:-1]:
        if surplus <= 0:
            return
        if checkpoint.step != protect:
            doomed = folder / f".{checkpoint.folder.name}.deleting"
            checkpoint.folder.rename(doomed)  # a folder with its final name is always whole, also while it goes
            shutil.rmtree(doomed)
            surplus -= 1


def forget_after(folder: Path, checkpoint: Checkpoint) -> None:
    """Set later checkpoints aside (`step-N.superseded`) when a run goes on from an earlier one on purpose."""
    for later in list_checkpoints(folder):
        if later.step > checkpoint.step:
            aside = later.folder.with_name(f"{later.folder.name}.superseded")
            shutil.rmtree(aside, ignore_errors=True)
            later.folder.rename(aside)


_OPTIMIZER_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def _model_state(model: nn.Module) -> dict[str, Any]:
    """Trainable parameters, tied ones once, and persistent buffers."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = get_model_state_dict(model)
    return {name: value for name, value in state.items() if name in wanted or name not in every}


def _tensor_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": _model_state(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_OPTIMIZER_OPTIONS),
    }


_DIGEST_CHUNK = 2**23  # 8-byte words at a time, so that the check needs little memory


def _digest(tensors: dict[str, Any]) -> str:
    """A checksum of every bit of the tensors (not of file bytes, which may differ for equal content)."""
    total = 0
    for part in ("model", "optimizer"):
        for name, value in sorted(tensors[part].items()):
            if isinstance(value, torch.Tensor) and value.numel():
                total = (total * 1000003 + _tensor_digest(value.detach()) + len(name)) % 2**64
    return f"{total:016x}"


def _tensor_digest(tensor: torch.Tensor) -> int:
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    words = nn.functional.pad(raw, (0, -raw.numel() % 8)).view(torch.int64)
    # Odd weights by position: swapped values are noticed, and no bit is multiplied away modulo 2**64.
    weights = torch.arange(min(len(words), _DIGEST_CHUNK), device=words.device) * 2 + 1
    sums = [int((chunk * weights[: len(chunk)]).sum()) for chunk in words.split(_DIGEST_CHUNK)]
    return sum((index + 1) * value for index, value in enumerate(sums))


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def sync_tree(folder: Path) -> None:
    """Make every file below a folder survive a power cut."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(aside: Path, final: Path) -> None:
    """Give a finished folder its final name; one that is there already steps aside first, and goes afterwards."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():  # otherwise `old` may be all that a kill between these two renames left
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _quiet_dcp() -> Iterator[None]:
    """Without a process group dcp says each time that it assumes a single process; here that is so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed.*")
        yield


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
