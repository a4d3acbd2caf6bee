"""Values and other programs' exceptions, cut to be part of a message of one line."""

from __future__ import annotations

import errno
from typing import Any

LEFT_OUT = 3
"""Exit code of a command that is done, but for what it said it left out."""
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
# As Rust and C++ libraries pass it on; the last two are a short write's, of torch's files and of NumPy's arrays.
_FULL_IN_WORDS = ("no space left on device", "os error 28", "quota exceeded", "unexpected pos ", " requested and ")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its type where it says nothing."""
    cause = getattr(error, "inner_exception", error)  # dynamo wraps what its backend raises
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def one_line(error: BaseException, limit: int = 300) -> str:
    """Type and whole text of an exception, blanks and line breaks joined, cut at `limit` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


def short(value: Any, limit: int = 60) -> str:
    """repr of a value, cut, for messages; survives values whose repr fails."""
    try:
        text = repr(value[:limit] if isinstance(value, str) else value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit + 2 else text[:limit] + "..."


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what it came of, says that a disk is full."""
    while error is not None:
        said = str(error).lower()
        if getattr(error, "errno", None) in _FULL or any(words in said for words in _FULL_IN_WORDS):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def explain(error: BaseException) -> str:
    """What an exception says, for people; of the system's errors the file first, then what is wrong with it."""
    if not isinstance(error, OSError) or error.errno is None:
        full = "the disk is full: " if is_disk_full(error) and "the disk is full" not in str(error) else ""
        return full + (str(error) or type(error).__name__)
    places = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    said = "the disk is full" if is_disk_full(error) else error.strerror or str(error)
    return f"{places}: {said}" if places else said
