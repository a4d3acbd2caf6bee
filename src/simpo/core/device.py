"""Whether tensors count as a GPU's where paths and sizes of chunks are chosen, and how they get to one.

`simpo plan` runs a GPU's training step on tensors without memory. torch differentiates them only where they say that
they are on the CPU (its autograd wants streams of a device that exists), so they say that and count as a GPU's. Torch
only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_all_count = False


def move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. A GPU fetches it from pinned memory without anybody waiting."""
    pin = torch.device(device).type == "cuda" and torch.cuda.is_available() and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True)


def counts_as_cuda(tensor: Tensor) -> bool:
    """Whether a tensor is on a CUDA device, or stands for one that will be."""
    return _all_count or tensor.is_cuda


@contextlib.contextmanager
def every_tensor_counts_as_cuda() -> Iterator[None]:
    """Inside, every tensor of this process stands for one on a CUDA device of today."""
    global _all_count
    before, _all_count = _all_count, True
    try:
        yield
    finally:
        _all_count = before
