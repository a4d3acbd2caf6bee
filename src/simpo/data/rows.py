"""Owns which rows are taken: parts of sources, passes, limits, the hold-out by prompt, answers grouped by prompt.

Choosing is seeded and by row: the rows kept stay in the order of their files; the loader shuffles. It works on places
and 64-bit keys, a few bytes for each row; the rows themselves are read anew whenever somebody iterates over them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import random
import re
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any, NamedTuple, Protocol

import numpy as np

from simpo.data.columns import PROMPT_COLUMNS, SYSTEM_COLUMNS, RowError, scored_answer
from simpo.data.preferences import Pair
from simpo.data.workers import map_rows

_ROW_ID = re.compile(r"(.*)/[^/]*#\d+(?:~\d+)?", re.DOTALL)  # LABEL/SPLIT#ROW~PASS


class RawRow(NamedTuple):
    """One row: a mapping of columns, or a `RowError`."""

    row_id: str
    row: Any


def source_of(row_id: str) -> str:
    """The label of the source that a row comes from; "" for an id of another make."""
    found = _ROW_ID.fullmatch(row_id)
    return found[1] if found else ""


class NamedSources(NamedTuple):
    """Labels in order of appearance, and for each row [rows] an index into them."""

    names: tuple[str, ...]
    numbers: np.ndarray


def name_sources(row_ids: Iterable[str]) -> NamedSources:
    """The sources that rows come from; no names where there is only one, or a row whose id names none."""
    labels: dict[str, int] = {}
    numbers = np.fromiter((labels.setdefault(source_of(row_id), len(labels)) for row_id in row_ids), dtype=np.int64)
    return NamedSources(tuple(labels) if len(labels) > 1 and "" not in labels else (), numbers)


class Readable(Protocol):
    """Rows of one split: their number, and the rows from the first on at each iteration."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[RawRow]: ...


class Part(NamedTuple):
    """Rows that are chosen of a split: a mask over it, and in which pass over the split they come (from 0)."""

    split: Readable
    mask: np.ndarray
    number: int = 0


_LATER_PASS = re.compile(r"#\d+~(\d+)\Z")


def later_pass(row_id: str) -> int:
    """The pass over its split that a row's id names: 0 in the first, then 2, 3, ... A "~" of its source is no mark."""
    found = _LATER_PASS.search(row_id)
    return int(found[1]) if found else 0


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of several splits: their number is known, and each iteration reads them anew."""

    parts: Sequence[Part] = ()

    def __len__(self) -> int:
        return sum(int(part.mask.sum()) for part in self.parts)

    def __iter__(self) -> Iterator[RawRow]:
        for split, mask, number in self.parts:
            # Nothing is read behind the last row that is chosen.
            for row in compress(split, mask.tobytes().rstrip(b"\0")) if mask.any() else ():
                yield row._replace(row_id=f"{row.row_id}~{number + 1}") if number else row

    def __add__(self, other: Rows) -> Rows:
        return Rows([*self.parts, *other.parts])

    def take(self, places: np.ndarray) -> Rows:
        """Some of these rows. `places` [n], ascending."""
        parts, begin = [], 0
        for part in self.parts:
            there = np.flatnonzero(part.mask)
            first, last = np.searchsorted(places, (begin, begin + len(there)))
            mask = np.zeros_like(part.mask)
            mask[there[places[first:last] - begin]] = True
            parts.append(part._replace(mask=mask))
            begin += len(there)
        return Rows(parts)


def all_rows(splits: Iterable[Readable]) -> Rows:
    """All rows of some splits."""
    return Rows([Part(split, np.ones(len(split), dtype=bool)) for split in splits])


def take_fraction(rows: Rows, fraction: float, rng: random.Random) -> Rows:
    """`fraction` of `rows`, in their order; over 1, whole passes first."""
    passes = int(fraction)
    rest = rows.take(_sample(len(rows), round((fraction - passes) * len(rows)), rng))
    numbered = enumerate([*([rows] * passes), rest])
    return Rows([part._replace(number=number) for number, each in numbered for part in each.parts])


def take_limit(rows: Rows, limit: int | None, rng: random.Random) -> Rows:
    """A choice of at most `limit` rows, in their order."""
    return rows if limit is None or limit >= len(rows) else rows.take(_sample(len(rows), limit, rng))


def _sample(population: int, count: int, rng: random.Random) -> np.ndarray:
    """`count` of the numbers below `population`, ascending."""
    return np.sort(np.array(rng.sample(range(population), count), dtype=np.int64))


def hold_out(
    base: list[Rows],
    fraction: float,
    rng: random.Random,
    read_pair: Callable[..., Pair],
    num_workers: int | None = None,
) -> tuple[list[Rows], Rows]:
    """Move whole prompts from train to eval until `fraction` of the rows is there."""
    sizes = [len(rows) for rows in base]
    first = _first_of_prompt(sum(base, Rows()), read_pair, num_workers)
    counts = np.bincount(first)
    prompts = array("q", np.unique(first).tobytes())  # in the order in which they appear
    rng.shuffle(prompts)
    held, count = np.zeros(len(first), dtype=bool), 0
    for each in prompts[:-1]:  # at least one prompt is left to train on
        if count >= fraction * len(first):
            break
        held[each] = True
        count += int(counts[each])
    masks = np.split(held[first], np.cumsum(sizes)[:-1])
    train, evaluation = (
        [rows.take(np.flatnonzero(mask == side)) for rows, mask in zip(base, masks)] for side in (False, True)
    )
    return train, sum(evaluation, Rows())


def _first_of_prompt(rows: Rows, read_pair: Callable[..., Pair], num_workers: int | None) -> np.ndarray:
    """[rows] place of the first row with the same prompt; what gives no pair stands for itself."""
    keys = np.empty(len(rows), dtype=_KEY)
    at = 0
    for some in map_rows(partial(partial, _prompt_keys, read_pair), rows, len(rows), num_workers):
        keys[at : at + len(some)] = some
        at += len(some)
    first, pairs = np.arange(len(keys)), np.flatnonzero(keys["is_pair"])
    _, begins, prompt = np.unique(keys["key"][pairs], return_index=True, return_inverse=True)
    first[pairs] = pairs[begins][prompt]
    return first


_KEY = np.dtype([("key", np.int64), ("is_pair", np.bool_)])


def _prompt_keys(read_pair: Callable[..., Pair], rows: list[RawRow]) -> np.ndarray:
    """[rows] of `_KEY`."""
    keys = np.zeros(len(rows), dtype=_KEY)
    for place, row in enumerate(rows):
        with contextlib.suppress(RowError):
            keys[place] = read_pair(row.row, row_id=row.row_id).key(), True
    return keys


# --- rows of one scored answer ---------------------------------------------------------------------------------------


class Groups:
    """Where the rows of one scored answer stand, and which belong together.

    Args:
        recipe: reads score_column and the column keys.
    """

    def __init__(self, recipe: Any) -> None:
        self.score_column = recipe.score_column
        self._asked = (recipe.prompt_column, *PROMPT_COLUMNS, *SYSTEM_COLUMNS, "history", "tools")
        self._has_pairs = bool(recipe.chosen_column or recipe.rejected_column)
        self._places, self._keys = array("q"), array("q")

    def add(self, place: int, row: Any) -> None:
        """Look at the row that stands there."""
        if not self._has_pairs and (found := scored_answer(row, self.score_column)):
            text = json.dumps([found, [row.get(name) for name in self._asked]], default=str).encode()
            self._places.append(place)
            self._keys.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True))

    def bring_together(self, rows: Readable, name: str, notes: list[str]) -> Readable:
        """A scored list for each prompt, in the place of its first row; the other rows as they are."""
        if not self._places:
            return rows
        places = np.array(self._places)
        _, begins, prompt = np.unique(np.array(self._keys), return_index=True, return_inverse=True)
        notes.append(
            f"{name}: {len(places)} rows of one answer are {len(begins)} prompts, best against worst (score_column)"
        )
        return _Grouped(rows, places, places[begins][prompt], self.score_column)


@dataclass(frozen=True, eq=False)
class _Grouped:
    """Rows with those of one scored answer brought together.

    Attributes:
        places: [answers] where these stand among the rows, ascending.
        firsts: [answers] where the first with the same prompt stands.
    """

    rows: Readable
    places: np.ndarray
    firsts: np.ndarray
    score_column: str | None

    def __len__(self) -> int:
        return len(self.rows) - int((self.firsts != self.places).sum())

    def __iter__(self) -> Iterator[RawRow]:
        is_answer = np.zeros(len(self.rows), dtype=bool)
        is_answer[self.places] = True
        order, at = np.argsort(self.firsts, kind="stable"), 0
        begins = array("q")
        # The answers to one prompt may stand far apart: they go to a file from which each is read in its turn.
        with tempfile.TemporaryFile() as file:
            for row in compress(self.rows, is_answer.tobytes()):
                begins.append(file.tell())
                pickle.dump(row, file)
            for place, row in enumerate(self.rows):
                if not is_answer[place]:
                    yield row
                    continue
                group = []
                while at < len(order) and self.firsts[order[at]] == place:
                    file.seek(begins[order[at]])
                    group.append(pickle.load(file))
                    at += 1
                if group:
                    yield _scored_list(group, self.score_column)


def _scored_list(group: list[RawRow], score_column: str | None) -> RawRow:
    row_id, row = group[0]
    answer, score = scored_answer(row, score_column) or ("", "")
    if len(group) == 1:
        return RawRow(row_id, RowError("one answer", f"its prompt has one answer with a {score}; a pair needs two"))
    answers, scores = ([each.row[name] for each in group] for name in (answer, score))
    return RawRow(row_id, {**row, answer: None, "responses": answers, "scores": scores})
