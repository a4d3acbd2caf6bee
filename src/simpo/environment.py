"""A process's cores, and the settings that OpenMP and torch's allocators read once, when they load.

`import simpo` sets them first, so the command, `python -m simpo`, a launcher's children and every process they start
have them. Where torch was imported before simpo, only those children do. Must not import anything heavy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# How many pauses a thread of GNU's OpenMP, which torch brings on Linux, spins for the next piece of work before it
# sleeps: about a millisecond. By default it is longer than the system lets a thread run: when another process has the
# core of one thread, the others burn their own waiting for it. LLVM's runtime yields its core while it waits.
_SPINNING = "GOMP_SPINCOUNT"
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # for large tensors on a CPU: spares most page faults of a step
# torch 2.11 to 2.13 read the first of these that is set.
_GPU_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
SETTINGS = (_SPINNING, _HUGE_PAGES, *_GPU_ALLOCATOR)


def num_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_defaults(environment: MutableMapping[str, str], *, platform: str) -> None:
    """Fill in what nobody has set, under any of a setting's names.

    Args:
        environment: changed in place.
        platform: as `sys.platform`: only Linux has the GPU allocator's expandable segments, others warn.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault(_SPINNING, "20000")
    environment.setdefault(_HUGE_PAGES, "1")
    if platform == "linux" and not environment.keys() & set(_GPU_ALLOCATOR):
        # Rows of ever new lengths would otherwise leave memory in pieces too small for the next.
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


set_defaults(os.environ, platform=sys.platform)
