"""Owns what a row and its chat template may cost, both of which may be anybody's: processor time and memory.

Time is limited in the main thread of a process, where the system has timers (not Windows); memory on Linux. What a
rendering may be long is the renderer's to check, everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from simpo.data.columns import RowError

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS = 5.0
"""Of this process's computing, not of waiting."""
MEMORY = 1 << 29
"""Bytes on top of what is held already."""
REASON = "too much"


@contextlib.contextmanager
def limited() -> Iterator[Callable[[], None]]:
    """Inside, what is done between two calls of the function given gets a RowError, or MemoryError, beyond the limits.

    Not to be nested.
    """
    with contextlib.ExitStack() as at_end:
        limits = [limit for limit in (_limit_time(at_end), _limit_memory(at_end)) if limit is not None]

        def begin() -> None:
            for limit in limits:
                limit()

        begin()
        yield begin


def _limit_time(at_end: contextlib.ExitStack) -> Callable[[], Any] | None:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return None
    at_end.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, _stop))
    at_end.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
    # Again each second: what is tried next for the same row has no time left.
    return functools.partial(signal.setitimer, signal.ITIMER_VIRTUAL, SECONDS, 1.0)


def _stop(*_: Any) -> None:
    raise RowError(REASON, f"rendering it takes more than {SECONDS:g} s")


def _limit_memory(at_end: contextlib.ExitStack) -> Callable[[], Any] | None:
    if resource is None or not os.path.exists("/proc/self/statm"):
        return None
    known = os.open("/proc/self/statm", os.O_RDONLY)
    at_end.callback(os.close, known)
    which, put, page = resource.RLIMIT_DATA, resource.setrlimit, resource.getpagesize()
    before = resource.getrlimit(which)
    at_end.callback(put, which, before)
    most = min(limit if limit != resource.RLIM_INFINITY else math.inf for limit in before)

    def limit() -> None:
        held = int(os.pread(known, 200, 0).split()[5]) * page
        put(which, (int(min(held + MEMORY, most)), before[1]))

    return limit
