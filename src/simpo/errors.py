"""Values and other programs' exceptions, cut to be part of a message of one line."""

from __future__ import annotations

from typing import Any


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
