"""Owns near-duplicates: what counts as a word, MinHash signatures (rensa's), and which of many rows are close.

Signatures are made where texts are, in the processes that tokenise, one byte for each of `NUM_HASHES` hashes; what is
close is found among the signatures alone, 128 bytes a row. rensa is imported where it is used: simpo[clean].
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

NUM_HASHES = 128
BAND = 4
"""Hashes that two rows must share next to each other to be compared: one in 32 bands is enough. Of rows with similarity
0.7 one pair in 6,000 is never compared, of those with 0.5 one in 8."""
_CHANCE = 1 / 256  # that bytes of different hashes agree
_CHUNK_ROWS = 1 << 16

# Scripts that put no blanks between words: each letter is one. The others: letters and digits in a row.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


@functools.cache
def has_minhash() -> bool:
    """Whether signatures can be made here."""
    return importlib.util.find_spec("rensa") is not None


def sign_words(words: Sequence[str]) -> bytes | None:
    """The signature of a text: of all its pairs of neighbouring words, its two ends included; None without words.

    Raises:
        ValueError: simpo[clean] is not installed.
    """
    if not words:
        return None
    sketch = load_minhash()(num_perm=NUM_HASHES, seed=1)
    sketch.update([f"{first} {second}" for first, second in pairwise(("^", *words, "$"))])
    return np.array(sketch.digest(), np.uint32).astype(np.uint8).tobytes()


@functools.cache
def load_minhash() -> Any:
    """rensa's sketch of a set. ValueError: simpo[clean] is not installed."""
    if not has_minhash():
        raise ValueError("near-duplicates are found by rensa: pip install 'simpo[clean]'")
    return importlib.import_module("rensa").RMinHash


def find_near(
    signatures: np.ndarray, similarity: float, *, num_others: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """For each row an earlier one that is near; with `num_others`, one of that many rows at the front.

    Rows that agree in a whole band are candidates: in each band the first of them and the nearest before, so that time
    and memory grow with the number of rows however many are alike.

    Args:
        signatures: [rows, NUM_HASHES] uint8.
        similarity: from which rows are near, as an estimate of the Jaccard similarity (its standard error is 0.04).
    Returns:
        [rows] the index of the most similar candidate, -1 where none is near; and [rows] how similar it is.
    """
    rows = np.arange(len(signatures), dtype=np.int32)
    nearest, best = np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.float32)
    bands = np.ascontiguousarray(signatures).view(f"u{BAND}")
    for band in range(bands.shape[1]):
        keys = bands[:, band].copy()
        order = np.argsort(keys, kind="stable").astype(np.int32)
        keys = keys[order]
        starts = np.r_[True, keys[1:] != keys[:-1]] if len(rows) else rows
        first_of_run = np.maximum.accumulate(np.where(starts, rows, 0), dtype=np.int32)
        for before in (first_of_run, np.maximum(rows - 1, first_of_run)):
            candidates = np.empty_like(rows)
            candidates[order] = order[before]
            allowed = candidates < (rows if num_others is None else np.minimum(rows, num_others))
            allowed &= rows >= (num_others or 0)
            _compare(signatures, rows[allowed], candidates[allowed], nearest, best)
    near = best >= similarity
    return np.where(near, nearest, -1), best


def _compare(
    signatures: np.ndarray, rows: np.ndarray, candidates: np.ndarray, nearest: np.ndarray, best: np.ndarray
) -> None:
    """Put candidates that are nearer than what was found before into `nearest` and `best`."""
    fresh = nearest[rows] != candidates
    rows, candidates = rows[fresh], candidates[fresh]
    for at in range(0, len(rows), _CHUNK_ROWS):
        these, those = rows[at : at + _CHUNK_ROWS], candidates[at : at + _CHUNK_ROWS]
        agree = (signatures[these] == signatures[those]).mean(axis=1, dtype=np.float32)
        found = (agree - _CHANCE) / (1 - _CHANCE)
        nearer = found > best[these]
        nearest[these[nearer]], best[these[nearer]] = those[nearer], found[nearer]
