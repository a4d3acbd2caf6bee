"""stdout and stderr while something works: nothing that becomes of them ends it.

The reader of a pipe may go, a terminal may be closed, the disk behind a redirection may be full, and an encoding may
lack a letter. What is said from then on goes nowhere, and the work goes on to what it writes to its files. Must not
import anything heavy.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import Any

_LATER_S = 2.0


class _Lasting(io.FileIO):
    """A descriptor to which every write succeeds; after the first that did not, nothing is written, by children either.

    `lost` is what was wrong then.
    """

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # whoever made it non-blocking may be slower
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            self.lost = error
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            self.tell_of_loss()
            return memoryview(data).nbytes

    def tell_of_loss(self) -> None:
        """Of stdout, on stderr. Where a pipe was closed only if the work lasts, for `simpo keys | head` meant it."""
        if self.fileno() != 1 or self.lost is None:
            return
        line = f"stdout: {self.lost.strerror}; the work goes on, and what it would print there is lost"
        if self.lost.errno != errno.EPIPE:
            print(line, file=sys.stderr, flush=True)
            return
        later = threading.Timer(_LATER_S, print, (line,), {"file": sys.stderr, "flush": True})
        later.daemon = True
        later.start()


@contextlib.contextmanager
def lasting_streams() -> Iterator[list[OSError]]:
    """Inside, printing never fails. Gives what was lost of stdout, empty so far; of a closed pipe nothing is.

    A notebook's streams, and others that are no files, stay as they are.
    """
    lost: list[OSError] = []
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_last, before)
    try:
        yield lost
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        found = getattr(_raw(sys.stdout), "lost", None)
        lost += [found] if found is not None and found.errno != errno.EPIPE else []
        sys.stdout, sys.stderr = before


def is_stdout_lost() -> bool:
    """Whether what is printed goes nowhere by now; for work that has no other result."""
    return getattr(_raw(sys.stdout), "lost", None) is not None


def _raw(stream: Any) -> Any:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _last(stream: Any) -> Any:
    raw = _raw(stream)
    if not isinstance(stream, io.TextIOWrapper) or type(raw) is not io.FileIO:
        return stream
    lasting = _Lasting(stream.fileno(), "wb", closefd=False)
    lasting.name = stream.name
    is_buffered = stream.buffer is not raw
    return io.TextIOWrapper(
        io.BufferedWriter(lasting) if is_buffered else lasting,  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def open_standard_descriptors() -> None:
    """Have 0, 1 and 2 lead nowhere where they are closed: no file of the run must get one of these numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
