"""The part of the statistics that needs no torch: intervals of proportions, repetition in an answer.

Plain Python; what reads finished runs loads nothing heavy for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SIMILAR_LENGTH = 0.1
"""Two lengths are similar when they differ by at most this share of the longer one."""

Z = 1.959963984540054  # 97.5% of a normal distribution lie below


class Interval(NamedTuple):
    """An estimate and its confidence interval; `low` and `high` are nan where one observation gives none."""

    value: float
    low: float
    high: float


def wilson_interval(successes: float, trials: float) -> Interval:
    """A proportion with Wilson's score interval; stays inside [0, 1] and is sensible at 0 and 1.

        (k + z^2/2 +- z * sqrt(k * (n - k) / n + z^2/4)) / (n + z^2)

    Args:
        successes: k, in 0..n; a tie counts half, so it need not be whole.
        trials: n > 0; pairs that count in part need not make it whole.
    Source: E. B. Wilson, JASA 22 (1927), p. 209.
    """
    middle = successes + Z * Z / 2
    spread = Z * math.sqrt(successes * (trials - successes) / trials + Z * Z / 4)
    scale = trials + Z * Z
    return Interval(successes / trials, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale))


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of the 4-grams of a response's tokens that have occurred in it before: 1 - distinct / all.

    0 for text without repetition or shorter than 4; a response stuck in a loop approaches 1.

    Source: "seq-rep-n" of Welleck et al., arXiv:1908.04319.
    """
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
