"""Intervals, ranks and paired tests: against values worked out by hand, and against scipy where it is installed."""

from __future__ import annotations

import itertools
import math
import operator

import pytest
import torch

from simpo.evaluation.statistics import (
    accuracy_by_length,
    average_ranks,
    compare_accuracies,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    preference_accuracy,
    repeated_share,
    spearman_correlation,
    wilson_interval,
)

Z = 1.959963984540054  # the 97.5% quantile of the normal distribution


def random_values(count: int, *, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- one model -------------------------------------------------------------------------------------------------------


def test_a_tie_counts_half():
    assert preference_accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])).value == 2.5 / 4


def test_wilson_interval_by_hand():
    # 8 of 10: z^2 = 3.8415, middle 9.9207, spread 1.96 * sqrt(1.6 + 0.9604) = 3.1362, over 13.8415.
    value, low, high = wilson_interval(8, 10)
    assert value == 0.8
    assert (low, high) == (pytest.approx(0.49016, abs=1e-5), pytest.approx(0.94332, abs=1e-5))


def test_wilson_interval_is_sensible_at_the_ends():
    none, all_of_them = wilson_interval(0, 20), wilson_interval(20, 20)
    assert none.low == 0.0
    assert none.high == pytest.approx(Z**2 / (20 + Z**2))  # the formula at k = 0
    assert (all_of_them.low, all_of_them.high) == (pytest.approx(1 - none.high), 1.0)


def test_mean_interval_by_hand():
    # 1, 2, 3, 4: mean 2.5, sample variance 5/3, standard error sqrt(5/12).
    value, low, high = mean_interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert value == 2.5
    assert (low, high) == (pytest.approx(2.5 - Z * math.sqrt(5 / 12)), pytest.approx(2.5 + Z * math.sqrt(5 / 12)))


def test_the_mean_of_one_value_has_no_interval():
    value, low, high = mean_interval(torch.tensor([3.0]))
    assert value == 3.0
    assert math.isnan(low)
    assert math.isnan(high)


def test_equal_values_share_their_ranks():
    assert average_ranks(torch.tensor([10, 20, 20, 5, 20])).tolist() == [2.0, 4.0, 4.0, 1.0, 4.0]


def test_spearman_by_hand():
    # Without ties 1 - 6 sum d^2 / (n (n^2 - 1)): ranks of y are 1 3 2 4, d^2 sums to 2, so 1 - 12/60.
    assert spearman_correlation(torch.tensor([1, 2, 3, 4]), torch.tensor([0.1, 0.9, 0.2, 7.0])) == pytest.approx(0.8)
    assert spearman_correlation(torch.tensor([1, 2, 3]), torch.tensor([-1.0, -8.0, -9.0])) == pytest.approx(-1.0)


def test_spearman_of_a_constant_is_undefined():
    assert math.isnan(spearman_correlation(torch.tensor([1, 1, 1]), torch.tensor([1.0, 2.0, 3.0])))


def test_accuracy_by_length_puts_every_pair_in_one_bucket():
    margins = torch.tensor([1.0, -1.0, 1.0, 0.0, 1.0])
    chosen = torch.tensor([10, 100, 20, 30, 50])
    rejected = torch.tensor([20, 110, 18, 20, 50])  # 10 of 110 and 2 of 20 are at most a tenth of the longer
    shorter, similar, longer = accuracy_by_length(margins, chosen, rejected)
    assert [(b.name, b.num_pairs) for b in (shorter, similar, longer)] == [
        ("shorter", 1),
        ("similar", 3),
        ("longer", 1),
    ]
    assert shorter.accuracy.value == 1.0
    assert similar.accuracy == wilson_interval(2, 3)
    assert longer.accuracy.value == 0.5


def test_an_empty_length_bucket_has_no_accuracy():
    shorter, similar, _ = accuracy_by_length(torch.tensor([1.0]), torch.tensor([5]), torch.tensor([5]))
    assert shorter.accuracy is None
    assert similar.num_pairs == 1


# --- two models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [
        (0, 0, 1.0),
        (7, 7, 1.0),
        (0, 5, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 4, 1.0),  # twice the lower half of seven tosses
    ],
)
def test_mcnemar_by_hand(a, b, p):
    assert mcnemar_exact(a, b) == pytest.approx(p, rel=1e-12)


def test_mcnemar_holds_for_many_pairs():
    assert mcnemar_exact(40_000, 40_400) == pytest.approx(math.erfc(399 / math.sqrt(80_400) / math.sqrt(2)), rel=1e-3)


def test_agreement_and_ties_in_the_accuracy_test():
    a = torch.tensor([1.0, 1.0, 0.0, -1.0, 1.0])
    b = torch.tensor([1.0, -1.0, -1.0, -1.0, 0.0])
    assert compare_accuracies(a, b) == (3, 0, pytest.approx(0.25))


def test_sign_flips_of_few_pairs_are_all_looked_at():
    # Sums of +-1 +-2 +-4 at least 7 in size: 2 of 8 patterns.
    difference = paired_difference(torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3))
    assert difference.value == pytest.approx(7 / 3)
    assert difference.p_value == 2 / 8


def test_round_off_makes_no_pattern_less_than_the_observed_one():
    """Tenths are not exact in binary; counted in whole numbers they are."""
    for count in range(2, 9):
        tenths = [int(10 * value) for value in random_values(count, seed=count)]
        patterns = itertools.product((-1, 1), repeat=count)
        sums = [abs(sum(map(operator.mul, signs, tenths))) for signs in patterns]
        expected = sum(each >= abs(sum(tenths)) for each in sums) / len(sums)
        found = paired_difference(
            torch.tensor([value / 10 for value in tenths], dtype=torch.float64), torch.zeros(count)
        )
        assert found.p_value == expected


def test_equal_models_differ_by_nothing():
    values = random_values(40, seed=0)
    assert paired_difference(values, values) == (0.0, 0.0, 0.0, 1.0)


def test_sampled_sign_flips_agree_with_all_of_them():
    differences = 0.35 + random_values(12, seed=3)
    exact = paired_difference(differences, torch.zeros_like(differences)).p_value
    # A thirteenth pair that is equal in both models changes no sum, but has the patterns sampled.
    sampled = paired_difference(torch.cat([differences, torch.zeros(1)]), torch.zeros(13)).p_value
    assert 0.02 < exact < 0.9
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))


def test_the_permutation_test_is_seeded_and_never_zero():
    a = 5 + random_values(200, seed=1)
    assert paired_difference(a, torch.zeros(200)).p_value == 1 / 10_001
    b = 0.1 * a
    assert paired_difference(a, b) == paired_difference(a, b)


# --- generations -----------------------------------------------------------------------------------------------------


def test_repetition_by_hand():
    assert repeated_share([1, 2, 3, 4, 5]) == 0.0
    assert repeated_share([1, 2, 1, 2, 1, 2]) == 1 - 2 / 3  # 1212 2121 1212
    assert repeated_share([7] * 103) == 1 - 1 / 100
    assert repeated_share([]) == 0.0


# --- scipy as a second opinion ---------------------------------------------------------------------------------------


def test_scipy_agrees():
    stats = pytest.importorskip("scipy.stats")
    for successes, trials in [(0, 7), (3, 11), (158, 300), (300, 300)]:
        theirs = stats.binomtest(successes, trials).proportion_ci(method="wilson")
        assert wilson_interval(successes, trials)[1:] == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    for a, b in [(1, 9), (20, 35), (0, 12), (500, 431)]:
        assert mcnemar_exact(a, b) == pytest.approx(stats.binomtest(a, a + b).pvalue, rel=1e-9)
    x, y = random_values(200, seed=4).mul(3).round(), random_values(200, seed=5).mul(2).round()  # many ties
    assert spearman_correlation(x, y) == pytest.approx(stats.spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-12)
    assert average_ranks(x).tolist() == stats.rankdata(x.numpy()).tolist()
