"""How this process uses the host's memory. Must not import data, train or evaluate."""

from __future__ import annotations

import ctypes
import os
import sys

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
