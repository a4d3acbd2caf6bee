"""What a scorer is: from rows as `simpo generate` writes them to a number for each response, or why there is none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from simpo.data.columns import RowError
from simpo.errors import one_line

T = TypeVar("T")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Explained:
    """Numbers with what they come from, for those who want to look: plain values."""

    scores: list[Any]
    because: list[dict[str, Any]]


Scores = list[Any] | Explained | RowError
"""A number for each response of a row, or why there is none."""


@dataclass(frozen=True)
class Rater:
    """One scorer, ready to work.

    Attributes:
        rate: from rows to (id of a row, its scores), in any order.
        identity: what decides its numbers besides its options: digests of source, weights, versions. `reading` is the
            version of the way in which it reads responses and answers: numbers of another one are not taken. A judge
            has none, since it would be asked, and paid, again.
        note: a line for the user, said before it begins.
    """

    rate: Callable[[Iterable[Row]], Iterator[tuple[str, Scores]]]
    identity: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None


def rate_rows(rate: Callable[[Row], list[Any]]) -> Callable[[Iterable[Row]], Iterator[tuple[str, Scores]]]:
    """A scorer of rows from a function of one."""
    return lambda rows: ((row["id"], guarded(functools.partial(rate, row))) for row in rows)


def rate_each(rate: Callable[[Row, Mapping[str, Any]], Any]) -> Callable[[Iterable[Row]], Iterator[tuple[str, Scores]]]:
    """A scorer of rows from a function of a row and one of its responses."""
    return rate_rows(lambda row: [rate(row, response) for response in row["responses"]])


def windows(rows: Iterable[T], size: int = 64) -> Iterator[list[T]]:
    """Some rows at a time: what is computed together, and is lost when the process is killed meanwhile."""
    rows = iter(rows)
    while some := list(islice(rows, size)):
        yield some


def guarded(rate: Callable[[], list[Any]]) -> Scores:
    """What `rate` returns, or what it raised as the reason of a row."""
    try:
        return rate()
    except RowError as error:
        return error
    except (Exception, SystemExit) as error:  # a user's function may raise anything; none ends the others' scoring
        return RowError("raised", one_line(error))


def column(row: Row, name: str) -> Any:
    """What a prompt brought along for scorers; a RowError where it is not there."""
    value = row.get("columns", {}).get(name)
    if value is None:
        raise RowError("missing column", f"no {name!r} among its columns; name it in generate.keep_columns")
    return value
