"""Activations kept in CPU memory between the forward and the backward pass.

`torch.autograd.graph.save_on_cpu` would move every saved tensor, the weights with them and a tensor that three layers
save three times. This moves activations only, each once out and once back, and lets the copies run during the
computation: those back start before they are needed, in the reverse order of those out.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.reductions import StorageWeakRef

from simpo.parallel.sharding import local_part

MOST_AHEAD = 2**29
"""Bytes that may wait on the GPU before the backward pass asks for them."""


@dataclass(eq=False)
class _CpuCopy:
    """A saved tensor's copy in CPU memory, and on the device again from its first use to its last.

    Every operation that saved the tensor holds this object and lets go of it once its own backward is done: with the
    last of them both copies are free.
    """

    values: Tensor
    device: torch.device
    place: int  # in the order of copies out
    copied: torch.cuda.Event | None  # reached when a CUDA copy out is whole; None off CUDA
    back: Tensor | None = None  # the copy that came back
    arrived: torch.cuda.Event | None = None  # reached when a CUDA copy back is whole


@dataclass(eq=False)
class Offload:
    """What one forward pass left in CPU memory.

    Attributes:
        num_tensors, num_bytes: copied out, each tensor counted once however many operations saved it.
        num_bytes_back: copied back so far.
    """

    num_tensors: int = 0
    num_bytes: int = 0
    num_bytes_back: int = 0
    _copies: dict[tuple[object, ...], tuple[StorageWeakRef, _CpuCopy]] = field(default_factory=dict, repr=False)
    _order: list[weakref.ref[_CpuCopy]] = field(default_factory=list, repr=False)
    _reached: int = 0  # copies at this place and after it were fetched or are not needed
    _ahead: list[weakref.ref[_CpuCopy]] = field(default_factory=list, repr=False)  # fetched, not asked for yet

    def keep(self, tensor: Tensor) -> _CpuCopy:
        """The tensor's copy in CPU memory: a new one, or that of the same memory, unchanged since."""
        # While the weak reference stands, no other storage can have its address: a hit is the same memory.
        reference = StorageWeakRef(tensor.untyped_storage())
        view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor._version)
        key = (reference.cdata, *view)
        known = self._copies.get(key)
        if known is not None:
            return known[1]
        values, copied = _copy_to_cpu(tensor.detach())
        kept = _CpuCopy(values, tensor.device, len(self._order), copied)
        self._copies[key] = (reference, kept)
        self._order.append(weakref.ref(kept))
        self._reached = len(self._order)
        self.num_tensors += 1
        self.num_bytes += values.nbytes
        return kept

    def restore(self, kept: _CpuCopy) -> Tensor:
        """The tensor on its device, and those that will be asked for next on their way there."""
        if kept.back is None:
            self._fetch(kept)
        self._reached = min(self._reached, kept.place)
        self._ahead = [each for each in self._ahead if each() not in (None, kept)]
        waiting = sum(each().values.nbytes for each in self._ahead)
        most = min(MOST_AHEAD, self.num_bytes // 8)
        while self._reached > 0:
            following = self._order[self._reached - 1]()
            if following is not None and following.back is None:
                if waiting and waiting + following.values.nbytes > most:
                    break
                self._fetch(following)
                self._ahead.append(weakref.ref(following))
                waiting += following.values.nbytes
            self._reached -= 1
        if kept.arrived is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.arrived)
        return kept.back

    def _fetch(self, kept: _CpuCopy) -> None:
        self.num_bytes_back += kept.values.nbytes
        if kept.copied is None:
            kept.back = kept.values.to(kept.device, copy=True)
            return
        # The memory belongs to the computation's stream, which may still use it for something else: the copy waits.
        stream = _stream(kept.device, "back")
        kept.back = torch.empty_like(kept.values, device=kept.device)
        stream.wait_stream(torch.cuda.current_stream(kept.device))
        stream.wait_event(kept.copied)
        with torch.cuda.stream(stream):
            kept.back.copy_(kept.values, non_blocking=True)
            kept.arrived = stream.record_event()
        kept.back.record_stream(stream)  # if nobody asks for it, its memory is free only when the copy is done


@functools.cache
def _stream(device: torch.device, name: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _copy_to_cpu(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not tensor.is_cuda:
        return torch.empty_like(tensor, device="cpu").copy_(tensor), None
    stream = _stream(tensor.device, "out")
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        values = torch.empty_like(tensor, device="cpu", pin_memory=True)
        values.copy_(tensor, non_blocking=True)
        copied = stream.record_event()
    tensor.record_stream(stream)  # its memory may be given away only when the copy is done
    return values, copied


@contextlib.contextmanager
def offload_activations(
    model: nn.Module, *, eligible: Callable[[Tensor], bool] = attrgetter("is_cuda"), min_bytes: int = 2**20
) -> Iterator[Offload]:
    """Around a forward pass: what its backward needs waits in (pinned) CPU memory. Gradients are bit for bit the same.

    Weights stay where they are, and so does whatever looks like one: a tensor with a weight's shape, either way round,
    is its copy in autocast's precision, or put together from its shards. (An activation that happens to have such a
    shape stays too.) The backward pass belongs outside, or what it recomputes under gradient checkpointing would be
    moved for nothing.

    Args:
        model: its parameters are not moved; as they are when the block is entered.
        eligible: which tensors may be moved at all.
        min_bytes: smaller tensors are not worth a copy.
    """
    storages, shapes = _weights(model)
    offload = Offload()

    def pack(tensor: Tensor) -> Tensor | tuple[_CpuCopy, Callable[[Tensor], Tensor] | None]:
        with torch.no_grad():
            part = local_part(tensor)
        is_plain = type(part) in (Tensor, nn.Parameter) and part.layout == torch.strided
        if not is_plain or part.nbytes < min_bytes or not eligible(part):
            return tensor
        if part.untyped_storage().data_ptr() in storages or tuple(part.shape) in shapes:
            return tensor
        if not isinstance(tensor, DTensor):
            return offload.keep(part), None
        like_it = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
        wrap = functools.partial(
            DTensor.from_local, device_mesh=tensor.device_mesh, placements=tensor.placements, **like_it
        )
        return offload.keep(part), wrap

    def unpack(packed: Tensor | tuple[_CpuCopy, Callable[[Tensor], Tensor] | None]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        kept, wrap = packed
        part = offload.restore(kept)
        return part if wrap is None else wrap(part)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield offload
    finally:
        offload._copies.clear()  # from here on only the graph keeps them


def _weights(model: nn.Module) -> tuple[set[int], set[tuple[int, ...]]]:
    """Where the model's own weights lie in memory, and the shapes in which one may be met elsewhere.

    FSDP2 gathers a weight over the mesh dimension that it shards, into memory that comes and goes; tensor parallelism
    never does: a weight is met whole, as this process's part of it, or in between.
    """
    storages: set[int] = set()
    shapes: set[tuple[int, ...]] = set()
    for weight in model.parameters():
        own = local_part(weight.detach())
        storages.add(own.untyped_storage().data_ptr())
        for shape in {weight.shape, own.shape, _gathered_shape(weight)}:
            shapes |= {tuple(shape), tuple(shape[:-2] + shape[-1:] + shape[-2:-1])}
    return storages, shapes


def _gathered_shape(weight: Tensor) -> torch.Size:
    """A weight's shape in its layer's forward pass: whole, except for dimensions that tensor parallelism shards."""
    if not isinstance(weight, DTensor) or "tp" not in (weight.device_mesh.mesh_dim_names or ()):
        return weight.shape
    mesh, shape = weight.device_mesh, list(weight.shape)
    at = mesh.mesh_dim_names.index("tp")
    placement = weight.placements[at]
    if isinstance(placement, Shard):
        dim = placement.dim
        shape[dim], _ = Shard.local_shard_size_and_offset(shape[dim], mesh.size(at), mesh.get_local_rank(at))
    return torch.Size(shape)
