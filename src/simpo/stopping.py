"""How a run stops before its end: because it was asked to, or because a number is no number.

Must not import data, train or evaluate.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


class NonFiniteError(RuntimeError):
    """A loss or gradient is not a number; nothing was updated. The message names the step and its rows."""


class Interrupted(RuntimeError):
    """The run was asked to stop, has saved itself, and says how to go on."""


class StopRequest(threading.Event):
    """Set by the first Ctrl-C or SIGTERM while `listening`: stop after this step. A second Ctrl-C stops at once.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the signals of this process come here; other threads than the main one cannot have them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.set()
        self._say("stopping after this step; once more to stop at once without saving")
