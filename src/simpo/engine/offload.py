"""Activations kept in host memory between the forward and the backward pass.

`torch.autograd.graph.save_on_cpu` would move every saved tensor, the weights with them and a tensor that three layers
save three times. This moves activations only, each once, and lets the copies run beside the computation.

Must not import data, train or evaluate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(eq=False)
class _OnHost:
    """A saved tensor's copy; `copied` is reached when a CUDA copy is whole."""

    values: Tensor
    device: torch.device
    copied: torch.cuda.Event | None

    def restore(self) -> Tensor:
        if self.copied is None:
            return self.values.to(self.device, copy=True)
        torch.cuda.current_stream(self.device).wait_event(self.copied)
        return self.values.to(self.device, non_blocking=True)


@dataclass(eq=False)
class Offload:
    """What one forward pass left in host memory.

    Attributes:
        num_tensors, num_bytes: copied, each tensor counted once however many operations saved it.
    """

    num_tensors: int = 0
    num_bytes: int = 0
    _copies: dict[tuple[object, ...], tuple[StorageWeakRef, _OnHost]] = field(default_factory=dict, repr=False)


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


@contextlib.contextmanager
def offload_activations(
    model: nn.Module, *, eligible: Callable[[Tensor], bool] = _is_on_gpu, min_bytes: int = 2**20
) -> Iterator[Offload]:
    """Around a forward pass: what its backward needs waits in (pinned) host memory. Gradients are bit for bit the same.

    Weights stay where they are, and so does whatever looks like one: a tensor with a weight's shape, either way round,
    is its copy in autocast's precision. (An activation that happens to have such a shape stays too.) The backward pass
    belongs outside, or what it recomputes under gradient checkpointing would make the journey for nothing.

    Args:
        model: its parameters are not moved; as they are when the block is entered.
        eligible: which tensors may be moved at all.
        min_bytes: smaller tensors are not worth a copy.
    """
    weights = list(model.parameters())
    storages = {p.untyped_storage().data_ptr() for p in weights}
    shapes = {tuple(shape) for p in weights if p.ndim > 1 for shape in (p.shape, p.mT.shape)}
    streams: dict[torch.device, torch.cuda.Stream] = {}
    offload = Offload()

    def pack(tensor: Tensor) -> Tensor | _OnHost:
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes < min_bytes or not eligible(tensor) or tensor.layout != torch.strided:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or tuple(tensor.shape) in shapes:
            return tensor
        # While the weak reference stands, no other storage can have its address: a hit is the same memory.
        reference = StorageWeakRef(storage)
        view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor._version)
        key = (reference.cdata, *view)
        known = offload._copies.get(key)
        if known is not None:
            return known[1]
        on_host = _copy_to_host(tensor, streams)
        offload._copies[key] = (reference, on_host)
        offload.num_tensors += 1
        offload.num_bytes += num_bytes
        return on_host

    def unpack(packed: Tensor | _OnHost) -> Tensor:
        return packed.restore() if isinstance(packed, _OnHost) else packed

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield offload
    finally:
        offload._copies.clear()  # from here on only the graph keeps them


def _copy_to_host(tensor: Tensor, streams: dict[torch.device, torch.cuda.Stream]) -> _OnHost:
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return _OnHost(torch.empty_like(tensor, device="cpu").copy_(tensor), tensor.device, None)
    side = streams.get(tensor.device)
    if side is None:
        side = streams[tensor.device] = torch.cuda.Stream(tensor.device)
    side.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(side):
        values = torch.empty_like(tensor, device="cpu", pin_memory=True)
        values.copy_(tensor, non_blocking=True)
        copied = side.record_event()
    tensor.record_stream(side)  # its memory may be given away only when the copy is done
    return _OnHost(values, tensor.device, copied)
