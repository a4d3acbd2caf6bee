"""Other programs' exceptions in one line, to be part of a message of ours. Imports nothing."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException, limit: int = 200) -> str:
    """Type and whole text of an exception, blanks and line breaks joined, cut at `limit` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]
