"""A second opinion on the demo's answers, which no pair depends on: is the text easy to read?

Its four traits share nothing with `rule.py`, and are means of what can be counted, each between 0 and 1: words that
stand in sentences of 4 to 25 words, short words, no hedging, and no loose ends (brackets and marks that are not closed,
placeholders, capitals). A model that had learnt to please the rule alone would not score better here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

_HEDGES = re.compile(
    r"""\b( may | might | could | perhaps | possibly | probably | typically | generally | usually | often | somewhat
      | various | certain | tends?\ to )\b""",
    re.IGNORECASE | re.VERBOSE,
)


def rate(prompt: Sequence[Mapping[str, Any]], response: str, row: Mapping[str, Any]) -> float:
    """The mean of the four traits, for `simpo score`; 0 for a response without words."""
    words = re.findall(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*", response)
    if not words:
        return 0.0
    return fmean((_in_sentences(response), _short(words), _frank(response, words), _tidy(response, words)))


def _in_sentences(response: str) -> float:
    sizes = [len(part.split()) for part in re.split(r"(?<=[.!?:])\s+|\n+", response) if part.strip()]
    return sum(size for size in sizes if 4 <= size <= 25) / sum(sizes)


def _short(words: Sequence[str]) -> float:
    """Words of more than nine letters: 1 with none, 0 where they are a fifth."""
    return max(0.0, 1 - 5 * sum(len(word) > 9 for word in words) / len(words))


def _frank(response: str, words: Sequence[str]) -> float:
    """Hedges: 1 with none, 0 where they are a tenth of the words."""
    return max(0.0, 1 - 10 * len(_HEDGES.findall(response)) / len(words))


def _tidy(response: str, words: Sequence[str]) -> float:
    """A third is lost to each of: something left open, a placeholder in brackets, a word in capitals."""
    is_open = any(response.count(a) != response.count(b) for a, b in ("()", "[]", "\u201c\u201d"))
    is_open |= any(response.count(mark) % 2 for mark in ("**", '"'))
    is_template = re.search(r"\[[A-Z][^\]]*\]", response) is not None
    is_loud = any(word.isupper() and len(word) > 4 for word in words)
    return 1 - (is_open + is_template + is_loud) / 3
