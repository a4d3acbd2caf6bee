"""Checkpoints: everything a resumed run needs, written so that a kill at any moment loses nothing that was whole.

A checkpoint is a folder `step-N`. It is written under another name, synced to disk, and renamed;
a folder that has its final name is therefore complete. Model and optimizer go through torch.distributed.checkpoint:
every process writes its own shards, and a run may be resumed from them on another mesh. Must not import data, the
trainer or evaluation.

A checkpoint of any older simpo has to be resumable: `load_state` gives its state in the present format. Raise `FORMAT`
when an older simpo would read a new checkpoint wrongly, and teach `load_state` what the format before it had. Recipe
keys, fields of the progress and metrics may come and go without that: what is missing gets its default.
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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_map

from simpo.errors import first_line
from simpo.parallel.mesh import Mesh
from simpo.parallel.sharding import local_part
from simpo.run.cpu_memory import empty_on_cpu
from simpo.run.digest import digest_tensors

FORMAT = 1
"""0: no number is written; sums of metrics in a list; the data is known by a hash of source files. 1: sums by name; the
data is known by its tokens."""
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


def checkpoint_at(folder: Path, step: int) -> Checkpoint | None:
    """The complete checkpoint of a step; None where there is none."""
    return next((checkpoint for checkpoint in list_checkpoints(folder) if checkpoint.step == step), None)


class CheckpointSaver:
    """Writes the checkpoints of a run, one at a time, and deletes those beyond the limit. Every process calls it alike.

    Args:
        folder: the run's `checkpoints/`, which all processes see; made if missing.
        mesh: the run's processes.
        in_background: save() returns once the tensors are copied to CPU memory, and a thread writes them: the
            checkpoint is complete after a later finish().
        keep: how many of the newest are kept; None = all.
    """

    def __init__(self, folder: Path, mesh: Mesh, *, in_background: bool = False, keep: int | None = None) -> None:
        self.folder, self._mesh, self._keep = folder, mesh, keep
        self._copies = HostCopies() if in_background else None
        self._pending: tuple[Checkpoint, Path, Future[Any] | None, int | None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        *,
        protect: int | None = None,
    ) -> Checkpoint:
        """Write `folder/step-N` atomically, unless there is one already.

        Args:
            step: optimizer steps done.
            model: only its trainable parameters and its buffers are kept (a LoRA run does not store its base).
            optimizer: its moments and step counts.
            state: JSON-able trainer state.
            protect: a step whose checkpoint is not deleted, however old.
        Raises:
            RuntimeError: some process could not write; on every process.
        """
        self.finish()
        existing = self._mesh.on_main(lambda: checkpoint_at(self.folder, step))
        if existing is not None:
            return existing
        checkpoint, aside = Checkpoint(self.folder / f"step-{step}", step), self.folder / f".step-{step}.writing"
        tensors = _in_one_piece(_tensor_state(model, optimizer))
        digest = digest_tensors(tensors, self._mesh)
        record = {**stamp(), **state, "step": step, "mesh": str(self._mesh.sizes), "digest": digest}
        self._begin(aside, record)
        written = None
        if self._copies is not None:
            written = _write_in_background(self._copies.of(tensors), aside / "tensors", self._mesh.cpu_group)
        else:
            try:
                with _quiet_dcp():
                    dcp.save(tensors, checkpoint_id=aside / "tensors")
            except CheckpointException as cause:
                raise _not_written(checkpoint.folder, cause) from cause
        self._pending = (checkpoint, aside, written, protect)
        self.finish(wait=written is None)
        return checkpoint

    def _begin(self, aside: Path, record: dict[str, Any]) -> None:
        """A folder with everything but the tensors."""

        def make_folder() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()

        self._mesh.on_main(make_folder)
        error = None
        try:
            torch.save(_rng_state(), aside / RNG_FILE.format(rank=self._mesh.rank))
            if self._mesh.is_main:
                (aside / STATE_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        except Exception as cause:
            error = cause
        self._mesh.raise_together(error)

    def finish(self, *, wait: bool = True) -> None:
        """Give the checkpoint on its way, if there is one, its name once every process has written its part.

        Args:
            wait: for the writers; otherwise nothing happens before they are done.
        Raises:
            RuntimeError: some process could not write; on every process.
        """
        if self._pending is None:
            return
        checkpoint, aside, written, protect = self._pending
        if not wait and not self._mesh.least(written is None or written.done()):
            return
        self._pending, error = None, None
        if written is not None:
            try:
                written.result()
            except (Exception, CheckpointException) as cause:
                error = _not_written(checkpoint.folder, cause)
        self._mesh.raise_together(error)

        def give_name() -> None:
            sync_tree(aside)
            replace_folder(aside, checkpoint.folder)

        self._mesh.on_main(give_name)
        if self._keep is not None and self._mesh.is_main:
            prune_checkpoints(self.folder, keep=self._keep, protect=protect)


class HostCopies:
    """Where tensors wait for the disk: CPU memory, pinned next to a GPU, that is kept from one save to the next."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}

    def of(self, tensors: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The same state in CPU memory, good until the next call; what is not a tensor as it is.

        All copies are under way before the first is waited for.
        """
        copies = {part: {name: self._copy((part, name), v) for name, v in of.items()} for part, of in tensors.items()}
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copies

    def _copy(self, key: tuple[str, str], value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value, kept = value.detach(), self._kept.get(key)
        if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
            kept = self._kept[key] = empty_on_cpu(value)
        local_part(kept).copy_(local_part(value), non_blocking=True)
        return kept


def _write_in_background(copies: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> Future[Any]:
    """Write copies, which do not change meanwhile, in a thread; the processes' threads talk through `group`.

    (torch 2.13's own `dcp.async_save` cannot copy what FSDP2 shards.)
    """
    if group is None:  # see _quiet_dcp, which would end before the thread's warning
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", module=r"torch\.distributed.*")
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    written = thread.submit(dcp.save, copies, checkpoint_id=folder, process_group=group)
    thread.shutdown(wait=False)
    return written


def _not_written(folder: Path, cause: BaseException) -> RuntimeError:
    error = RuntimeError(f"checkpoint {folder} could not be written: {_reason(cause)}")
    error.__cause__ = cause
    return error


def load_checkpoint(
    checkpoint: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh
) -> dict[str, Any]:
    """Restore weights, moments and random-number states in place; return the trainer state. Every process calls it.

    The checkpoint may come from another mesh. Random-number states are restored on the mesh they were saved on;
    otherwise they stay as the seed left them.

    Raises:
        ValueError: a file is missing or broken, the tensors are not those that were saved, or the model does not fit;
            on every process.
    """
    state = mesh.on_main(lambda: read_state(checkpoint))
    live = _tensor_state(model, optimizer)
    tensors = _in_one_piece(live)
    same_mesh = state["mesh"] == str(mesh.sizes)
    rng = _load_tensors(checkpoint, tensors, mesh, digest=state["digest"], with_rng=same_mesh)
    tensors = _sharded_like(tensors, live)
    set_model_state_dict(model, tensors["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=_OPTIMIZER_OPTIONS)
    if rng is not None:
        _set_rng_state(rng)
    return state


def load_weights(checkpoint: Checkpoint, *, model: nn.Module, mesh: Mesh) -> None:
    """Restore the weights alone, as for the best checkpoint at the end of a run. Every process calls it.

    Raises:
        ValueError: as `load_checkpoint`.
    """
    live = _model_state(model)
    tensors = {"model": _in_one_piece(live)}
    digest = mesh.on_main(lambda: read_state(checkpoint))["digest"]
    _load_tensors(checkpoint, tensors, mesh, digest={"model": digest["model"]})
    set_model_state_dict(model, _sharded_like(tensors["model"], live), options=StateDictOptions(strict=False))


def _load_tensors(
    checkpoint: Checkpoint, tensors: dict[str, Any], mesh: Mesh, *, digest: dict[str, str], with_rng: bool = False
) -> dict[str, Any] | None:
    """Fill the tensors in place and check them; returns this process's random-number states if wanted."""
    rng, error = None, None
    try:
        with _quiet_dcp():
            dcp.load(tensors, checkpoint_id=checkpoint.folder / "tensors")
        if with_rng:
            rng = torch.load(checkpoint.folder / RNG_FILE.format(rank=mesh.rank), weights_only=False)
    except (Exception, CheckpointException) as cause:  # dcp's own wrapper is a BaseException
        error = ValueError(
            f"checkpoint {checkpoint.folder} cannot be loaded into this model: {_reason(cause)}; "
            "resume from an earlier one with resume_from_checkpoint: PATH"
        )
        error.__cause__ = cause
    mesh.raise_together(error)
    if digest_tensors(tensors, mesh) != digest:
        raise ValueError(
            f"checkpoint {checkpoint.folder} is damaged: its tensors are not the ones that were saved; "
            "resume from an earlier one with resume_from_checkpoint: PATH"
        )
    return rng


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The trainer state of a checkpoint; as `load_state`."""
    return load_state(checkpoint.folder / STATE_FILE)


def stamp() -> dict[str, Any]:
    """What every checkpoint says of its writer."""
    return {"format": FORMAT, "simpo": version("simpo")}


def load_state(path: Path) -> dict[str, Any]:
    """The state that a host left in its checkpoint, as one of this version would have left it.

    "format" stays what it was.

    Raises:
        ValueError: the file is missing, damaged, or of a newer format.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        state["format"] = int(state.get("format", 0))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.parent} is not a complete checkpoint: {_reason(error)}") from error
    if state["format"] > FORMAT:
        raise ValueError(
            f"{path.parent} was written by simpo {state.get('simpo', '(unknown)')} in checkpoint format "
            f"{state['format']}; this is simpo {version('simpo')}, which reads formats up to {FORMAT}: update simpo"
        )
    if state["format"] == 0 and "window" in state:
        sums, num_pairs = state["window"]["sums"] or [], state["window"]["num_pairs"]
        named = dict(zip(_METRICS_OF_FORMAT_0, sums, strict=False))
        state["window"] = {"sums": named, "pairs": dict.fromkeys(named, num_pairs)}
    return state


_METRICS_OF_FORMAT_0 = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "sft_loss"),
)


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


def _reason(error: BaseException) -> str:
    """What went wrong, in one line; of the processes' errors that dcp collects, the first rank's."""
    where = ""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        where, error = f"rank {rank}: " if rank or len(error.failures) > 1 else "", inner
    return where + first_line(error)
