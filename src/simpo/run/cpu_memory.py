"""How this process uses CPU memory: malloc's settings, and tensors that a GPU copies to and from by itself.

Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names of glibc's mallopt(3)


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what a training step on the CPU frees, for the next step to use again.

    By default every large tensor is mapped anew, and the kernel zeroes its pages one fault at a time: 8% of a step
    where it was measured. What the process has freed goes back to the system when it ends; its peak grew by 3%.

    Returns:
        Whether it was set; not where the C library is another one, or its settings were given by the environment
        (MALLOC_..., GLIBC_TUNABLES) or by a preloaded allocator.
    """
    if not sys.platform.startswith("linux"):
        return False
    if any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))


_PAGES_OF_ITS_OWN = 2**25  # bytes from which malloc(3) shares no page between two blocks


def empty_on_cpu(like: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor in CPU memory, shaped as `like`; pinned if that is on a GPU, which then copies to and
    from it while both sides work on.

    torch's own pinned memory comes in powers of two: large tensors are pinned where they lie instead. Sharded
    tensors are pinned only where they are large.

    Args:
        like: a tensor on any device; of a sharded one, the same shards are made.
        dtype: None = `like`'s.
    """
    sharded = hasattr(like, "to_local")
    part = like.to_local() if sharded else like
    large = part.numel() * (dtype or like.dtype).itemsize >= _PAGES_OF_ITS_OWN
    if part.is_cuda and not large and not sharded:
        return torch.empty_like(like, dtype=dtype, device="cpu", pin_memory=True)
    copy = torch.empty_like(like, dtype=dtype, device="cpu")
    if part.is_cuda and large:
        from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

        pinned = copy._local_tensor if sharded else copy  # itself: to_local() may make a view that goes at once
        pin_memory(pinned.data_ptr(), pinned.nbytes)
        weakref.finalize(pinned, unpin_memory, pinned.data_ptr()).atexit = False  # the driver is gone by then
    return copy
