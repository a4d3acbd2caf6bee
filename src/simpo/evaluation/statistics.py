"""What the log-probs of held-out pairs say about a model, with how sure one can be.

Pure functions over per-pair tensors: shares and means with intervals, dependence on length, two models on the same
pairs, repetition. Everything is computed in fp64 and returned as Python floats. Torch only.

Pairs are taken as independent draws. Pairs that share a prompt are less than that, and real intervals are then wider.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SIMILAR_LENGTH = 0.1
"""Two lengths are similar when they differ by at most this share of the longer one."""

_EXACT_FLIPS = 12  # up to 2^12 sign patterns are all looked at; beyond that they are sampled
_FLIPS_PER_CHUNK = 2**22  # signs held at one time


class Interval(NamedTuple):
    """An estimate and its confidence interval; `low` and `high` are nan where one observation gives none."""

    value: float
    low: float
    high: float


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
    """1 where chosen is preferred, 0 where rejected is, 0.5 at a tie.

    Args:
        margins: [P], chosen minus rejected, in any unit.
    Returns:
        [P] fp64.
    """
    return 0.5 * (torch.sign(_column(margins)) + 1)


def wilson_interval(successes: float, trials: int, *, confidence: float = 0.95) -> Interval:
    """A proportion with Wilson's score interval; stays inside [0, 1] and is sensible at 0 and 1.

        (k + z^2/2 +- z * sqrt(k * (n - k) / n + z^2/4)) / (n + z^2)

    Args:
        successes: k, in 0..n; a tie counts half, so it need not be whole.
        trials: n >= 1.
        confidence: in (0, 1).
    Raises:
        ValueError: a value out of range.
    Source: E. B. Wilson, JASA 22 (1927), p. 209.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"a proportion needs trials >= 1 and 0 <= successes <= trials, not {successes} of {trials}")
    z = _normal_quantile(confidence)
    middle = successes + z * z / 2
    spread = z * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    scale = trials + z * z
    return Interval(successes / trials, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale))


def preference_accuracy(margins: Tensor, *, confidence: float = 0.95) -> Interval:
    """Share of pairs whose margin is positive, ties half, with Wilson's interval. margins: [P], P >= 1."""
    scores = preference_scores(margins)
    return wilson_interval(float(scores.sum()), len(scores), confidence=confidence)


def mean_interval(values: Tensor, *, confidence: float = 0.95) -> Interval:
    """Mean +- z * s / sqrt(P), s the sample standard deviation: the normal interval of a mean.

    Args:
        values: [P], P >= 1; with P = 1 the interval is nan.
        confidence: in (0, 1).
    Raises:
        ValueError: no values.
    """
    values = _column(values)
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    half = _normal_quantile(confidence) * float(values.std(correction=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1..n of values [n]; equal values share the mean of the ranks they take up."""
    _, which, counts = torch.unique(_column(values), sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[which]


def spearman_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation: Pearson's correlation of the average ranks, in [-1, 1].

    Args:
        x, y: [n] each.
    Returns:
        nan when fewer than two values, or when all of one side are equal.
    Raises:
        ValueError: shapes differ.
    Source: C. Spearman, Am. J. Psychology 15 (1904), p. 72; of length and mean log-prob: arXiv:2405.14734.
    """
    _check_same_shape(x, y)
    if len(x) < 2:
        return math.nan
    ranks = torch.stack([average_ranks(x), average_ranks(y)])
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    norms = ranks.norm(dim=1)
    if float(norms.min()) == 0.0:
        return math.nan
    return max(-1.0, min(1.0, float(ranks[0] @ ranks[1] / norms.prod())))


def accuracy_by_length(
    margins: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    similar: float = SIMILAR_LENGTH,
    confidence: float = 0.95,
) -> tuple[LengthBucket, LengthBucket, LengthBucket]:
    """Accuracy where chosen is shorter, of similar length, and longer than rejected.

    A model that has learnt "longer is better" is right in the last bucket and wrong in the first.

    Args:
        margins: [P].
        chosen_lengths, rejected_lengths: [P], tokens.
        similar: |chosen - rejected| <= similar * max(chosen, rejected) is the middle bucket, bound included.
    Returns:
        Buckets "shorter", "similar", "longer"; every pair is in exactly one.
    Raises:
        ValueError: shapes differ.
    """
    _check_same_shape(margins, chosen_lengths)
    _check_same_shape(margins, rejected_lengths)
    scores = preference_scores(margins)
    chosen, rejected = _column(chosen_lengths), _column(rejected_lengths)
    difference = chosen - rejected
    alike = difference.abs() <= similar * torch.maximum(chosen, rejected)
    shorter, longer = ~alike & (difference < 0), ~alike & (difference > 0)
    buckets = []
    for name, mask in (("shorter", shorter), ("similar", alike), ("longer", longer)):
        count = int(mask.sum())
        accuracy = wilson_interval(float(scores[mask].sum()), count, confidence=confidence) if count else None
        buckets.append(LengthBucket(name, count, accuracy))
    return tuple(buckets)


# --- two models on the same pairs ------------------------------------------------------------------------------------


def mcnemar_exact(a_better: int, b_better: int) -> float:
    """Two-sided exact McNemar test: were the pairs on which two models differ split by a fair coin?

        min(1, 2 * sum_{i <= min(a, b)} C(a + b, i) / 2^(a + b))

    Args:
        a_better, b_better: pairs that only one of them gets right; pairs on which they agree carry no information.
    Source: Q. McNemar, Psychometrika 12 (1947), p. 153, with the binomial in place of its normal approximation.
    """
    trials, fewer = a_better + b_better, min(a_better, b_better)
    if fewer < 0:
        raise ValueError(f"counts must be >= 0, not {a_better} and {b_better}")
    if a_better == b_better:
        return 1.0
    i = torch.arange(fewer + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    log_terms = torch.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1) - n * math.log(2)
    return min(1.0, 2 * math.exp(float(torch.logsumexp(log_terms, dim=0))))


def compare_accuracies(margins_a: Tensor, margins_b: Tensor) -> AccuracyTest:
    """Exact McNemar test of two models' preference accuracies on the same pairs.

    A tie counts half, so "better" also means right against a tie and a tie against wrong; without ties this is
    McNemar's test, with them the sign test.

    Args:
        margins_a, margins_b: [P] each, the same pairs in the same order.
    Raises:
        ValueError: shapes differ, or no pairs.
    """
    _check_same_shape(margins_a, margins_b)
    gained = preference_scores(margins_a) - preference_scores(margins_b)
    a_better, b_better = int((gained > 0).sum()), int((gained < 0).sum())
    return AccuracyTest(a_better, b_better, mcnemar_exact(a_better, b_better))


def paired_difference(
    a: Tensor, b: Tensor, *, confidence: float = 0.95, num_permutations: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Mean of a - b with its normal interval, and a two-sided sign-flip permutation test.

    If nothing distinguishes the models, each pair's difference could as well have the other sign. The p-value is the
    share of sign patterns whose mean is at least as far from 0 as the observed one: over all 2^P patterns for P <= 12,
    else (1 + hits) / (1 + num_permutations) over random ones.

    Args:
        a, b: [P] each, P >= 1, the same pairs in the same order.
        num_permutations: random patterns; bounds the smallest p-value.
        seed: of the patterns.
    Raises:
        ValueError: shapes differ, or no pairs.
    Source: R. A. Fisher, The Design of Experiments (1935), section 21; the +1: B. Phipson and G. K. Smyth (2010).
    """
    _check_same_shape(a, b)
    differences = _column(a) - _column(b)
    value, low, high = mean_interval(differences, confidence=confidence)
    return PairedDifference(value, low, high, _sign_flip_p(differences, num_permutations, seed))


def _sign_flip_p(differences: Tensor, num_permutations: int, seed: int) -> float:
    count = len(differences)
    observed = float(differences.sum().abs())
    bound = observed - 1e-9 * float(differences.abs().sum())  # round-off must not turn "equal" into "less"
    if count <= _EXACT_FLIPS:
        patterns = torch.arange(2**count)[:, None].bitwise_right_shift(torch.arange(count)).bitwise_and(1)
        return float((((2.0 * patterns.double() - 1) @ differences).abs() >= bound).double().mean())
    generator = torch.Generator().manual_seed(seed)
    hits, done, chunk = 0, 0, max(1, _FLIPS_PER_CHUNK // count)
    while done < num_permutations:
        size = min(chunk, num_permutations - done)
        patterns = torch.randint(0, 2, (size, count), generator=generator, dtype=torch.int8)
        hits += int((((2.0 * patterns.double() - 1) @ differences).abs() >= bound).sum())
        done += size
    return (1 + hits) / (1 + num_permutations)


def displaced_share(
    chosen_mean_logps: Tensor, before_chosen_mean_logps: Tensor, *, confidence: float = 0.95
) -> Interval:
    """Likelihood displacement: the share of pairs whose chosen mean log-prob fell against another model.

    A margin can grow while both responses become less likely.

    Args:
        chosen_mean_logps, before_chosen_mean_logps: [P] each, nats per token, the same pairs; equal counts half.
    Raises:
        ValueError: shapes differ, or no pairs.
    Source: arXiv:2410.08847.
    """
    _check_same_shape(chosen_mean_logps, before_chosen_mean_logps)
    return preference_accuracy(_column(before_chosen_mean_logps) - _column(chosen_mean_logps), confidence=confidence)


# --- generations -----------------------------------------------------------------------------------------------------


def repeated_share(tokens: Sequence[int], *, n: int = 4) -> float:
    """Share of the n-grams of a response that have occurred in it before: 1 - distinct / all.

    0 for text without repetition or shorter than n; a response stuck in a loop approaches 1.

    Args:
        tokens: ids of one response.
        n: >= 1.
    Source: "seq-rep-n" of Welleck et al., arXiv:1908.04319.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, not {n}")
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# --- parts -----------------------------------------------------------------------------------------------------------


def _column(values: Tensor) -> Tensor:
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"one value per pair and at least one pair are needed, not shape {tuple(values.shape)}")
    return values.detach().cpu().double()


def _check_same_shape(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"one value per pair on both sides: {tuple(x.shape)} and {tuple(y.shape)}")


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    return float(torch.special.ndtri(torch.tensor((1 + confidence) / 2, dtype=torch.float64)))
