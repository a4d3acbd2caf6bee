"""Checkpoints: everything a resumed run needs, written so that a kill at any moment loses nothing that was whole.

A checkpoint is a folder `step-N`. It is written beside its place under another name, synced to disk, and renamed;
a folder that has its final name is therefore complete. Model and optimizer go through torch.distributed.checkpoint:
every process writes its own shards, and a run may go on from them on another mesh. Must not import data, train or
evaluate.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_map

from simpo.engine.mesh import Mesh

if TYPE_CHECKING:
    from concurrent.futures import Future

STATE_FILE = "trainer_state.json"
RNG_FILE = "rng-{rank}.pt"
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


class CheckpointSave:
    """A checkpoint on its way to disk: `finish()` gives it its name once every process has written its part.

    Attributes:
        checkpoint: what it will be; its folder exists once `is_complete`.
    """

    def __init__(self, checkpoint: Checkpoint, aside: Path, written: Future[Any] | None, *, is_main: bool) -> None:
        self.checkpoint = checkpoint
        self._aside, self._written, self._is_main = aside, written, is_main
        self.is_complete = False

    @property
    def is_written(self) -> bool:
        """Whether `finish()` would not have to wait. On rank 0 that means all processes' parts."""
        return self._written is None or self._written.done()

    def finish(self) -> Checkpoint:
        """Wait for the writers and complete the checkpoint. Processes need not call it at the same time.

        Raises:
            RuntimeError: some process could not write.
        """
        if self._written is not None:
            try:
                self._written.result()
            except (Exception, CheckpointException) as error:
                message = f"checkpoint {self.checkpoint.folder} could not be written: {_first_line(error)}"
                raise RuntimeError(message) from error
        if self._is_main and not self.is_complete:
            sync_tree(self._aside)
            replace_folder(self._aside, self.checkpoint.folder)
        self.is_complete = True
        return self.checkpoint


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    mesh: Mesh,
    in_background: dist.ProcessGroup | bool = False,
) -> CheckpointSave:
    """Write `folder/step-N` atomically; every process calls it.

    Args:
        folder: a run's `checkpoints/`, which all processes see; made if missing.
        step: optimizer steps done.
        model: only its trainable parameters and its buffers are kept (a LoRA run does not store its base).
        optimizer: its moments and step counts.
        state: JSON-able trainer state.
        mesh: the run's processes.
        in_background: return once the tensors are copied to host memory and write them in a thread. With several
            processes, the gloo group those threads talk through.
    Returns:
        The save; without in_background it is complete.
    """
    aside = folder / f".step-{step}.writing"

    def make_folder() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()

    mesh.on_main(make_folder)
    tensors = _in_one_piece(_tensor_state(model, optimizer))
    torch.save(_rng_state(), aside / RNG_FILE.format(rank=mesh.rank))
    record = {**state, "step": step, "world": mesh.sizes.world, "digest": _digest(tensors, mesh)}
    if mesh.is_main:
        (aside / STATE_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    written = None
    with _quiet_dcp():
        if in_background:
            group = None if in_background is True else in_background
            written = dcp.async_save(tensors, checkpoint_id=aside / "tensors", process_group=group)
        else:
            dcp.save(tensors, checkpoint_id=aside / "tensors")
            mesh.barrier()  # random-number states are no part of what dcp waits for
    save = CheckpointSave(Checkpoint(folder / f"step-{step}", step), aside, written, is_main=mesh.is_main)
    if written is None:
        save.finish()
        mesh.barrier()
    return save


def load_checkpoint(
    checkpoint: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh
) -> dict[str, Any]:
    """Restore weights, moments and random-number states in place; return the trainer state. Every process calls it.

    The checkpoint may come from another mesh. Random-number states are restored where the number of processes is the
    same; otherwise they stay as the seed left them.

    Raises:
        ValueError: a file is missing or broken, the tensors are not those that were saved, or the model does not fit.
    """
    state = read_state(checkpoint)
    live = _tensor_state(model, optimizer)
    tensors, rng = _in_one_piece(live), None
    try:
        with _quiet_dcp():
            dcp.load(tensors, checkpoint_id=checkpoint.folder / "tensors")
        if state.get("world", 1) == mesh.sizes.world:
            rng = torch.load(checkpoint.folder / RNG_FILE.format(rank=mesh.rank), weights_only=False)
    except (Exception, CheckpointException) as error:  # dcp's own wrapper is a BaseException
        raise ValueError(
            f"checkpoint {checkpoint.folder} cannot be loaded into this model: {_first_line(error)}; "
            "resume from an earlier one with resume_from_checkpoint: PATH"
        ) from error
    if _digest(tensors, mesh) != state["digest"]:
        raise ValueError(f"checkpoint {checkpoint.folder} is damaged: its tensors are not the ones that were saved")
    tensors = _sharded_like(tensors, live)
    set_model_state_dict(model, tensors["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=_OPTIMIZER_OPTIONS)
    if rng is not None:
        _set_rng_state(rng)
    return state


def load_weights(checkpoint: Checkpoint, *, model: nn.Module) -> None:
    """Restore the weights alone, as for the best checkpoint at the end of a run. Every process calls it."""
    live = _model_state(model)
    weights = {"model": _in_one_piece(live)}
    with _quiet_dcp():
        dcp.load(weights, checkpoint_id=checkpoint.folder / "tensors")
    set_model_state_dict(model, _sharded_like(weights["model"], live), options=StateDictOptions(strict=False))


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


def _in_one_piece(state: Any) -> Any:
    """Strided shards (tensor parallel and FSDP2 on one dimension) as contiguous ones, all that dcp can write."""

    def contiguous(value: Any) -> Any:
        if not isinstance(value, DTensor) or not any(isinstance(p, _StridedShard) for p in value.placements):
            return value
        return value.redistribute(
            placements=[Shard(p.dim) if isinstance(p, _StridedShard) else p for p in value.placements]
        )

    return tree_map(contiguous, state)


def _sharded_like(state: Any, live: Any) -> Any:
    """Undo `_in_one_piece`."""

    def as_live(value: Any, wanted: Any) -> Any:
        if not isinstance(value, DTensor) or value.placements == wanted.placements:
            return value
        return value.redistribute(placements=wanted.placements)

    return tree_map(as_live, state, live)


_DIGEST_CHUNK = 2**22  # elements at a time, so that the check needs little memory
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _digest(tensors: dict[str, Any], mesh: Mesh) -> str:
    """A checksum of every bit of the whole tensors: of their elements, not of files, and the same on every mesh."""
    total = 0
    for part in ("model", "optimizer"):
        for name, value in sorted(tensors[part].items()):
            if isinstance(value, Tensor) and value.numel():
                key = int.from_bytes(hashlib.blake2b(f"{part} {name}".encode(), digest_size=8).digest(), "little") | 1
                total += key * _tensor_digest(value.detach(), is_main=mesh.is_main)
    return f"{sum(mesh.gather(total % 2**64)) % 2**64:016x}"


def _tensor_digest(tensor: Tensor, *, is_main: bool) -> int:
    """This process's share of the sum of elements, as whole numbers, times odd weights by place, modulo 2**64."""
    offsets, shape = [0] * tensor.ndim, tensor.shape
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
        copies = [dim for dim, placement in enumerate(placements) if not placement.is_shard()]
        counts = all(mesh.get_local_rank(dim) == 0 for dim in copies)
        tensor = tensor.to_local()
    else:
        counts = is_main
    if not counts or not tensor.numel():
        return 0
    words = tensor.contiguous().view(_WORDS[tensor.element_size()])
    if words.ndim == 0:
        words, shape, offsets = words[None], (1,), [0]
    total, stride = 0, 1
    place = torch.zeros((), dtype=torch.int64, device=words.device)  # of each element of one leading index
    for dim in range(words.ndim - 1, 0, -1):
        steps = (torch.arange(words.shape[dim], device=words.device) + offsets[dim]) * stride
        place = steps.view(-1, *[1] * (words.ndim - 1 - dim)) + place
        stride *= shape[dim]
    many = max(1, _DIGEST_CHUNK // max(1, words[0].numel()))
    for start in range(0, len(words), many):
        chunk = words[start : start + many].to(torch.int64)
        leading = (torch.arange(len(chunk), device=words.device) + start + offsets[0]) * stride
        weights = (leading.view(-1, *[1] * (words.ndim - 1)) + place) * 2 + 1
        total += int((chunk * weights).sum())
    return total % 2**64


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
