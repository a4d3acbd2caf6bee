"""Owns decontamination: the runs of words of given benchmarks, and whether a text has one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from simpo.data.columns import RowError
from simpo.data.near import split_words
from simpo.data.sources import Source, find_sources
from simpo.recipe import load_recipe

SHORTEST = 8
"""Words of which a benchmark's short text must have this many to be looked for (arXiv:2005.14165, appendix C)."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: powers of it keep all bits of the words' hashes


class Ngrams:
    """Runs of words as 64-bit hashes: `n` words, or all of a shorter text that has at least `SHORTEST`.

    Args:
        texts: of the benchmarks.
    """

    def __init__(self, texts: Iterable[str], n: int):
        found: dict[int, list[np.ndarray]] = {}
        for text in texts:
            words = split_words(text)
            size = min(n, len(words))
            if size >= SHORTEST:
                found.setdefault(size, []).append(hash_runs(words, size))
        self.by_size = {size: np.unique(np.concatenate(hashes)) for size, hashes in found.items()}

    def find(self, words: Sequence[str]) -> str | None:
        """The first run of words that is in a benchmark, for people; None without one."""
        for size, known in self.by_size.items():
            runs = hash_runs(words, size)
            if len(runs):
                places = np.minimum(np.searchsorted(known, runs), len(known) - 1)
                hits = np.flatnonzero(known[places] == runs)
                if len(hits):
                    return f"{size} words of a benchmark: {' '.join(words[hits[0] : hits[0] + size])!r}"
        return None


def hash_runs(words: Sequence[str], size: int) -> np.ndarray:
    """[runs] 64-bit hashes of all runs of `size` words; none in a shorter text."""
    count = len(words) - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(_hash_word, words), np.uint64, len(words))
    runs = np.zeros(count, np.uint64)
    for offset in range(size):
        runs = runs * _FACTOR + hashes[offset : offset + count]
    return runs


@lru_cache(1 << 16)
def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a row: of its cells, messages and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for held in value.values() if isinstance(value, Mapping) else value:
            yield from texts_of(held)


def benchmark_sources(recipe: Any) -> list[Source]:
    """The data sets that `clean.benchmarks` names, found but not read. ValueError as `find_sources`."""
    if not recipe.clean.benchmarks:
        return []
    try:
        return find_sources(load_recipe(recipe, {"dataset_mixer": recipe.clean.benchmarks, "dataset_configs": None}))
    except ValueError as error:
        raise ValueError(str(error).replace("dataset_mixer:", "clean.benchmarks:")) from None


def read_benchmarks(recipe: Any) -> Ngrams | None:
    """All splits of the benchmarks, or those that an entry names; None where there are none.

    Raises:
        ValueError: a split or a column that is not there, a row that cannot be read, or no text that is long enough.
    """
    sources = benchmark_sources(recipe)
    if not sources:
        return None
    found = Ngrams((text for source in sources for text in _texts(source)), recipe.clean.benchmark_ngram)
    if not found.by_size:
        raise ValueError(
            f"clean.benchmarks: no text of {SHORTEST} words or more in {', '.join(recipe.clean.benchmarks)}"
        )
    return found


def _texts(source: Source) -> Iterator[str]:
    missing: set[str] = set(source.columns or ())
    present: dict[str, None] = {}
    for name in source.wanted or source.splits:
        if name not in source.splits:
            raise ValueError(
                f"clean.benchmarks: {source.name!r} has no split {name!r}; its splits: {', '.join(source.splits)}"
            )
        for number, row in enumerate(source.splits[name]()):
            if isinstance(row, RowError):
                raise ValueError(f"clean.benchmarks: {source.name!r}, {name}: row {number} cannot be read: {row}")
            if isinstance(row, Mapping) and source.columns is not None:
                missing -= row.keys()
                present |= dict.fromkeys(map(str, row))
                row = {column: row.get(column) for column in source.columns}
            yield from texts_of(row)
    if missing:
        raise ValueError(
            f"clean.benchmarks: {source.name!r} has no column {min(missing)!r}; its columns: {', '.join(present)}"
        )
