"""Checkpoints: everything a resumed run needs, written so that a kill at any moment loses nothing that was whole.

A checkpoint is a folder `step-N`. It is written under another name, synced to disk, and renamed;
a folder that has its final name is therefore complete. Model and optimizer go through torch.distributed.checkpoint:
every process writes its own shards, and a run may be resumed from them on another mesh. Must not import the
trainer or evaluation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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

from simpo.data.files import sync, sync_tree
from simpo.errors import is_disk_full
from simpo.parallel.mesh import Mesh
from simpo.parallel.sharding import local_part
from simpo.run.cpu_memory import empty_on_cpu
from simpo.run.digest import digest_tensors, digest_values, record_files
from simpo.run.optim import pack_rng, rng_state, set_rng_state
from simpo.run.plain import NotData, only_data
from simpo.run.saved import (
    NATIVE,
    RNG_FILE,
    STATE_FILE,
    Checkpoint,
    CheckpointKind,
    check_digests,
    checkpoint_at,
    ignore_single_process_warning,
    list_checkpoints,
    read_state,
    reason_of,
    stamp,
    with_advice,
)


class NotSaved(OSError):
    """A checkpoint could not be written; what there was of it is gone."""


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
        # The threads that write talk to each other during the training step.
        self._group = dist.new_group(backend="gloo") if in_background and mesh.sizes.world > 1 else None
        self._pending: tuple[Checkpoint, Path, Future[Any], Collection[int | None]] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        *,
        protect: Collection[int | None] = (),
    ) -> Checkpoint:
        """Write `folder/step-N` atomically, unless there is one already.

        Args:
            step: optimizer steps done.
            model: only its trainable parameters and its buffers are kept (a LoRA run does not store its base).
            optimizer: its moments and step counts.
            state: JSON-able trainer state.
            protect: steps whose checkpoints are not deleted, however old.
        Raises:
            OSError: some process could not write; on every process.
        """
        self.finish()
        existing = self._mesh.on_main(lambda: checkpoint_at(self.folder, step))
        if existing is not None:
            return existing
        checkpoint, aside = Checkpoint(self.folder / f"step-{step}", step), self.folder / f".step-{step}.writing"
        tensors = _in_one_piece(_tensor_state(model, optimizer))
        digest = digest_tensors(tensors, self._mesh)
        sums = {"digest": digest, "values": digest_values(tensors)}
        record = {**stamp(), **state, "step": step, "mesh": str(self._mesh.sizes), **sums}
        self._begin(aside, record)
        self._pending = (checkpoint, aside, self._write(tensors, aside / "tensors"), protect)
        self.finish(wait=self._copies is None)
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
            random = json.dumps(rng_state(self._mesh.device))
            (aside / RNG_FILE.format(rank=self._mesh.rank)).write_text(random, encoding="utf-8")
            if self._mesh.is_main:
                (aside / STATE_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        except Exception as cause:
            error = cause
        self._mesh.raise_together(error)

    def _write(self, tensors: dict[str, Any], folder: Path) -> Future[Any]:
        """Write the tensors; in the background a thread writes copies, which do not change meanwhile.

        (torch 2.13's own `dcp.async_save` cannot copy what FSDP2 shards.)
        """
        ignore_single_process_warning()
        if self._copies is not None:
            thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
            copies = self._copies.of(tensors)
            # Nothing to copy ahead of: torch would look for it on the first GPU, whichever this process has.
            writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
            written = thread.submit(dcp.save, copies, storage_writer=writer, process_group=self._group)
            thread.shutdown(wait=False)
            return written
        written = Future()
        try:
            written.set_result(dcp.save(tensors, checkpoint_id=folder))
        except (OSError, CheckpointException) as cause:
            written.set_exception(cause)
        return written

    def finish(self, *, wait: bool = True) -> None:
        """Give the checkpoint on its way, if there is one, its name once every process has written its part.

        Args:
            wait: for the writers; otherwise nothing happens before they are done.
        Raises:
            OSError: some process could not write; on every process.
        """
        if self._pending is None:
            return
        checkpoint, aside, written, protect = self._pending
        if not wait and not all(self._mesh.gather(written.done())):
            return
        self._pending, error = None, None
        try:
            written.result()
        except (Exception, CheckpointException) as cause:  # dcp's own wrapper is a BaseException
            if any(isinstance(inner, KeyboardInterrupt) for inner, _ in getattr(cause, "failures", {}).values()):
                raise KeyboardInterrupt from None
            reason = f"the disk is full ({reason_of(cause)})" if is_disk_full(cause) else reason_of(cause)
            error = NotSaved(f"checkpoint {checkpoint.folder} could not be written: {reason}")
            error.__cause__ = cause
        try:
            self._mesh.raise_together(error)
        except OSError:
            if self._mesh.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise

        def give_name() -> None:
            record_files(aside)
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


def load_checkpoint(
    checkpoint: Checkpoint, *, model: nn.Module, mesh: Mesh, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Restore weights, moments and random-number states in place; return the trainer state. Every process calls it.

    The checkpoint may come from another mesh. Random-number states are restored on the mesh they were saved on;
    otherwise they stay as the seed left them.

    Args:
        optimizer: None = the weights alone.
    Raises:
        ValueError: a file is missing or broken, the tensors are not those that were saved, or the model does not fit;
            on every process.
    """
    state = mesh.on_main(lambda: read_state(checkpoint))
    live = _tensor_state(model, optimizer)
    tensors = _in_one_piece(live)
    rng, error = [], None
    ignore_single_process_warning()
    try:
        with only_data(checkpoint.folder):
            dcp.load(tensors, checkpoint_id=checkpoint.folder / "tensors")
            if optimizer is not None and state["mesh"] == str(mesh.sizes):
                rng.append(_read_rng(checkpoint.folder / RNG_FILE.format(rank=mesh.rank), state["format"]))
    except NotData as cause:
        error = cause
    except (Exception, CheckpointException) as cause:
        error = ValueError(f"checkpoint {checkpoint.folder} cannot be loaded into this model: {reason_of(cause)}")
        error.__cause__ = cause
    with with_advice(checkpoint, mesh=mesh):
        mesh.raise_together(error)
        check_digests(state, digest_tensors(tensors, mesh), tensors, checkpoint)
    tensors = _sharded_like(tensors, live)
    set_model_state_dict(model, tensors["model"], options=StateDictOptions(strict=False))
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=_OPTIMIZER_OPTIONS)
    if rng:
        try:
            set_rng_state(rng[0], mesh.device, rank=mesh.rank)
        except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as cause:
            raise ValueError(
                f"checkpoint {checkpoint.folder} is damaged: its random-number states are none ({reason_of(cause)})"
            ) from cause
    return state


def _read_rng(path: Path, written_in: int) -> dict[str, Any]:
    if written_in < 2:
        return pack_rng(**torch.load(path.with_suffix(".pt"), weights_only=True))
    return json.loads(path.read_text(encoding="utf-8"))


def clear_leftovers(folder: Path, kind: CheckpointKind = NATIVE) -> None:
    """Delete what a kill left half-written or half-deleted."""
    for leftover in folder.glob(f".{kind.prefix}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune_checkpoints(
    folder: Path, *, keep: int, protect: Collection[int | None], kind: CheckpointKind = NATIVE
) -> None:
    """Delete the oldest checkpoints beyond `keep`, never the newest nor those to protect; clear half-written ones."""
    clear_leftovers(folder, kind)
    checkpoints = list_checkpoints(folder, kind)
    surplus = len(checkpoints) - keep
    for checkpoint in checkpoints[:-1]:
        if surplus <= 0:
            return
        if checkpoint.step not in protect:
            doomed = folder / f".{checkpoint.folder.name}.deleting"
            checkpoint.folder.rename(doomed)  # a folder with its final name is always whole, also while it goes
            shutil.rmtree(doomed, ignore_errors=True)  # what stays goes with the next one
            surplus -= 1


_OPTIMIZER_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def _tensor_state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, Any]]:
    """Trainable parameters, tied ones once, and persistent buffers; the optimizer's moments and groups."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = get_model_state_dict(model)
    tensors = {"model": {name: value for name, value in state.items() if name in wanted or name not in every}}
    if optimizer is not None:
        tensors["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_OPTIMIZER_OPTIONS)
    return tensors


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


def replace_folder(aside: Path, final: Path) -> None:
    """Give a finished folder its final name; one that is there already steps aside first, and goes afterwards."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():  # otherwise `old` may be all that a kill between these two renames left
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    sync(final.parent)
