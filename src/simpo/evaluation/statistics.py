"""What the log-probs of held-out pairs say about a model, with how sure one can be.

Pure functions of fp64 tensors with one value a pair, [P] with P >= 1, to Python floats; every interval is at 95%. Torch
only. Pairs are taken as independent draws. Pairs that share a prompt are less than that, and real intervals are then
wider.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from simpo.evaluation.plain import SIMILAR_LENGTH, Interval, Z, wilson_interval
from simpo.evaluation.plain import repeated_share as repeated_share

_NUM_FLIPS = 10_000  # sign patterns that are drawn; their number bounds the smallest p-value
_EXACT_FLIPS = 12  # up to 2^12 sign patterns are all looked at
_FLIPS_PER_CHUNK = 2**22  # signs held at one time


class LengthBucket(NamedTuple):
    """Pairs whose chosen response is shorter, similar or longer; `accuracy` is None when there are none."""

    name: str
    num_pairs: int
    accuracy: Interval | None


class AccuracyTest(NamedTuple):
    """Two models on the same pairs: in how many each did better than the other, and how likely that is by chance."""

    a_better: int
    b_better: int
    p_value: float


class PairedDifference(NamedTuple):
    """Mean of a - b over pairs with its interval, and the p-value of "the difference is symmetric around 0"."""

    value: float
    low: float
    high: float
    p_value: float


# --- one model -------------------------------------------------------------------------------------------------------


def preference_scores(margins: Tensor) -> Tensor:
    """[P]: 1 where chosen is preferred (a positive margin, in any unit), 0 where rejected is, 0.5 at a tie."""
    return 0.5 * (torch.sign(margins) + 1)


def preference_accuracy(margins: Tensor) -> Interval:
    """Share of pairs whose margin is positive, ties half, with Wilson's interval."""
    return wilson_interval(float(preference_scores(margins).sum()), len(margins))


def mean_interval(values: Tensor) -> Interval:
    """Mean +- z * s / sqrt(P), s the sample standard deviation: the normal interval of a mean; nan with P = 1."""
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    half = Z * float(values.std(correction=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1..n of values [n]; equal values share the mean of the ranks they take up."""
    _, which, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[which]


def spearman_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of x and y, [n] each: Pearson's of the average ranks; nan where one side is constant.

    Source: C. Spearman, Am. J. Psychology 15 (1904), p. 72; of length and mean log-prob: arXiv:2405.14734.
    """
    return float(torch.corrcoef(torch.stack([average_ranks(x), average_ranks(y)]))[0, 1])


def accuracy_by_length(margins: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> tuple[LengthBucket, ...]:
    """Accuracy where chosen is shorter, of similar length (see `SIMILAR_LENGTH`), and longer than rejected.

    A model that has learnt "longer is better" is right in the last bucket and wrong in the first.

    Returns:
        Buckets "shorter", "similar", "longer"; every pair is in exactly one.
    """
    difference = chosen_lengths - rejected_lengths
    alike = difference.abs() <= SIMILAR_LENGTH * torch.maximum(chosen_lengths, rejected_lengths)
    shorter, longer = ~alike & (difference < 0), ~alike & (difference > 0)
    return tuple(
        LengthBucket(name, int(mask.sum()), preference_accuracy(margins[mask]) if mask.any() else None)
        for name, mask in (("shorter", shorter), ("similar", alike), ("longer", longer))
    )


def length_balanced(values: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
    """Values of pairs [P] weighted so that their mean counts pairs with a longer and with a shorter chosen side alike.

    Of preference scores that mean is an accuracy that length cannot buy: whoever prefers the longer response, or the
    shorter, has 0.5 of it. A pair of equal lengths counts half on either side. Where one side has no pair, all count
    alike.
    """
    longer = 0.5 * (torch.sign(chosen_lengths - rejected_lengths).double() + 1)
    shorter = 1 - longer
    if not longer.sum() or not shorter.sum():
        return values.double()
    return values * len(values) / 2 * (longer / longer.sum() + shorter / shorter.sum())


def length_balanced_accuracy(margins: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Interval:
    """The accuracy of `length_balanced`: the mean of two accuracies, its interval made of their Wilson intervals.

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998), p. 873, method 10, of a sum in place of a difference.
    """
    scores = preference_scores(margins).double()
    longer = 0.5 * (torch.sign(chosen_lengths - rejected_lengths).double() + 1)
    sides = [weights for weights in (longer, 1 - longer) if weights.sum()]
    parts = [wilson_interval(float((scores * weights).sum()), float(weights.sum())) for weights in sides]
    value = sum(part.value for part in parts) / len(parts)
    below, above = (math.hypot(*(part.value - part[end] for part in parts)) / len(parts) for end in (1, 2))
    return Interval(value, value - below, value + above)


# --- two models on the same pairs ------------------------------------------------------------------------------------


def mcnemar_exact(a_better: int, b_better: int) -> float:
    """Two-sided exact McNemar test: were the pairs on which two models differ split by a fair coin?

        min(1, 2 * sum_{i <= min(a, b)} C(a + b, i) / 2^(a + b))

    Args:
        a_better, b_better: pairs that only one of them gets right; pairs on which they agree carry no information.
    Source: Q. McNemar, Psychometrika 12 (1947), p. 153, with the binomial in place of its normal approximation.
    """
    i = torch.arange(min(a_better, b_better) + 1, dtype=torch.float64)
    n = torch.tensor(a_better + b_better, dtype=torch.float64)
    log_terms = torch.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1) - n * math.log(2)
    return min(1.0, 2 * math.exp(float(torch.logsumexp(log_terms, dim=0))))


def compare_accuracies(margins_a: Tensor, margins_b: Tensor) -> AccuracyTest:
    """Exact McNemar test of two models' preference accuracies on the same pairs.

    A tie counts half, so "better" also means right against a tie and a tie against wrong; without ties this is
    McNemar's test, with them the sign test.
    """
    gained = preference_scores(margins_a) - preference_scores(margins_b)
    a_better, b_better = int((gained > 0).sum()), int((gained < 0).sum())
    return AccuracyTest(a_better, b_better, mcnemar_exact(a_better, b_better))


def paired_difference(a: Tensor, b: Tensor) -> PairedDifference:
    """Mean of a - b with its normal interval, and a two-sided sign-flip permutation test.

    If nothing distinguishes the models, each pair's difference could as well have the other sign. The p-value is the
    share of sign patterns whose mean is at least as far from 0 as the observed one: over all 2^P patterns for P <= 12,
    else (1 + hits) / (1 + n) over n = 10,000 seeded ones.

    Source: R. A. Fisher, The Design of Experiments (1935), section 21; the +1: B. Phipson and G. K. Smyth (2010).
    """
    differences = (a - b).double()
    return PairedDifference(*mean_interval(differences), _sign_flip_p(differences))


def _sign_flip_p(differences: Tensor) -> float:
    count = len(differences)
    bound = differences.sum().abs() - 1e-9 * differences.abs().sum()  # round-off must not turn "equal" into "less"

    def hits(patterns: Tensor) -> int:
        """Of patterns [n, P] of 0 and 1."""
        return int((((2.0 * patterns.double() - 1) @ differences).abs() >= bound).sum())

    if count <= _EXACT_FLIPS:
        return hits(torch.arange(2**count)[:, None].bitwise_right_shift(torch.arange(count)).bitwise_and(1)) / 2**count
    generator = torch.Generator().manual_seed(0)
    found, chunk = 0, max(1, _FLIPS_PER_CHUNK // count)
    for done in range(0, _NUM_FLIPS, chunk):
        size = min(chunk, _NUM_FLIPS - done)
        found += hits(torch.randint(0, 2, (size, count), generator=generator, dtype=torch.int8))
    return (1 + found) / (1 + _NUM_FLIPS)
