"""core.packing: shared prefixes, bins, the batch plan. Properties are checked on random lengths."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo.core.packing import (
    PairShape,
    epoch_order,
    fill_to_budget,
    iterate_steps,
    num_steps_per_epoch,
    pair_cost,
    plan_micro_batches,
    shared_prefix_length,
    spread_evenly,
)

reproducible = settings(deadline=None, derandomize=True, max_examples=200)

few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)  # a small alphabet, so that prefixes are shared
shapes = st.builds(PairShape, st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
costs = st.lists(st.integers(0, 100).map(float), max_size=40)


@reproducible
@given(few_tokens, few_tokens, few_tokens)
def test_shared_prefix_is_the_longest_that_leaves_each_side_a_token(common, left, right):
    chosen, rejected = common + left, common + right
    found = shared_prefix_length(chosen, rejected)

    def is_shared(length: int) -> bool:
        return chosen[:length] == rejected[:length] and length < min(len(chosen), len(rejected))

    assert found == max(length for length in range(len(chosen)) if is_shared(length))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2, 3], [1, 2, 3], 2),  # identical: the last token stays apart
        ([1, 2], [1, 2, 3], 1),  # chosen is the start of rejected
        ([1, 2, 3], [1, 2], 1),
        ([5], [5, 6], 0),
        ([1, 2], [3, 2], 0),
    ],
)
def test_shared_prefix_of_known_pairs(chosen, rejected, expected):
    assert shared_prefix_length(chosen, rejected) == expected


@reproducible
@given(costs, st.integers(1, 8))
def test_spread_evenly_places_each_item_once_and_no_bin_above_mean_plus_largest(costs, num_bins):
    bins = spread_evenly(costs, num_bins)
    assert len(bins) == num_bins
    assert sorted(i for items in bins for i in items) == list(range(len(costs)))
    assert all(items == sorted(items) for items in bins)
    heaviest = max(sum(costs[i] for i in items) for items in bins)
    assert heaviest <= sum(costs) / num_bins + max(costs, default=0.0) + 1e-9


@settings(reproducible, max_examples=60)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(2, 3))
def test_spread_evenly_is_within_four_thirds_of_the_best_there_is(costs, num_bins):
    """Graham's bound for longest-first; filling in the order given only promises twice the best."""
    heaviest = max(sum(costs[i] for i in items) for items in spread_evenly(costs, num_bins))
    best = min(
        max(sum(c for c, b in zip(costs, bins, strict=True) if b == k) for k in range(num_bins))
        for bins in itertools.product(range(num_bins), repeat=len(costs))
    )
    assert heaviest <= best * (4 / 3 - 1 / (3 * num_bins)) + 1e-9


def test_spread_evenly_gives_every_bin_an_item_when_there_are_enough():
    assert all(spread_evenly([0.0] * 8, 8))  # equal (here zero) costs must not pile up in the first bin
    assert sorted(len(items) for items in spread_evenly([1.0] * 7, 3)) == [2, 2, 3]


def test_spread_evenly_refuses_no_bins():
    with pytest.raises(ValueError, match="num_bins must be at least 1, not 0"):
        spread_evenly([1.0], 0)


@reproducible
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 120))
def test_fill_to_budget_keeps_the_budget_and_places_each_item_once(tokens, budget):
    bins = fill_to_budget(tokens, budget)
    assert sorted(i for items in bins for i in items) == list(range(len(tokens)))
    assert all(items and sum(tokens[i] for i in items) <= budget for items in bins)
    # Best fit never leaves two bins that would fit into one, so it needs less than twice the least possible number.
    assert len(bins) <= max(1, 2 * math.ceil(sum(tokens) / budget)) or not tokens


def test_fill_to_budget_names_an_item_that_cannot_fit():
    with pytest.raises(ValueError, match="51 tokens does not fit in a micro-batch of 50"):
        fill_to_budget([3, 51], 50)


@reproducible
@given(
    st.lists(shapes, max_size=24),
    st.integers(1, 4),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(120, 400)),
    st.sampled_from([0.0, 1 / 400]),
)
def test_plan_holds_each_pair_once_within_the_budget_on_every_rank(pairs, ranks, micro_batches, budget, weight):
    options = {
        "num_ranks": ranks,
        "num_micro_batches": micro_batches,
        "max_tokens": budget,
        "attention_weight": weight,
    }
    plan = plan_micro_batches(pairs, **options)
    assert len(plan) == ranks
    assert len({len(share) for share in plan}) == 1, "ranks with unequal numbers of micro-batches would wait forever"
    placed = [i for share in plan for items in share for i in items]
    assert sorted(placed) == list(range(len(pairs)))
    if budget is None:
        assert len(plan[0]) == micro_batches
    else:
        assert all(sum(pairs[i].tokens for i in items) <= budget for share in plan for items in share)
    assert plan == plan_micro_batches(list(pairs), **options), "every rank must work out the same plan"


@reproducible
@given(st.lists(shapes, min_size=1, max_size=24), st.integers(1, 4), st.integers(1, 4))
def test_plan_without_a_budget_is_balanced(pairs, ranks, micro_batches):
    plan = plan_micro_batches(pairs, num_ranks=ranks, num_micro_batches=micro_batches, attention_weight=0.01)
    costs = [pair_cost(shape, attention_weight=0.01) for shape in pairs]
    loads = [sum(costs[i] for i in items) for share in plan for items in share]
    assert max(loads) <= sum(loads) / len(loads) + max(costs) + 1e-9


def test_plan_keeps_the_budget_where_the_even_spread_would_break_it():
    """3+3 and 2+2+2 fill two micro-batches of 6; spread evenly, longest first, they would be 7 and 5."""
    pairs = [PairShape(0, 1, tokens - 1) for tokens in (3, 3, 2, 2, 2)]
    assert spread_evenly([3, 3, 2, 2, 2], 2) == [[0, 2, 4], [1, 3]]
    (share,) = plan_micro_batches(pairs, num_ranks=1, num_micro_batches=1, max_tokens=6)
    assert sorted(share) == [[0, 1], [2, 3, 4]]


def test_plan_refuses_a_pair_above_the_budget():
    with pytest.raises(ValueError, match="raise max_tokens_per_micro_batch"):
        plan_micro_batches([PairShape(5, 5, 5)], num_ranks=1, num_micro_batches=1, max_tokens=14)


@reproducible
@given(st.integers(0, 60), st.integers(0, 5), st.integers(0, 3))
def test_epoch_order_is_a_permutation_that_repeats(num_pairs, seed, epoch):
    order = epoch_order(num_pairs, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(num_pairs))
    assert order == epoch_order(num_pairs, seed=seed, epoch=epoch)


def test_epoch_order_changes_with_the_seed_and_the_epoch():
    first = epoch_order(50, seed=1, epoch=0)
    assert first != epoch_order(50, seed=1, epoch=1)
    assert first != epoch_order(50, seed=2, epoch=0)
    assert epoch_order(50, seed=1, epoch=11) != epoch_order(50, seed=11, epoch=1)


@reproducible
@given(st.integers(0, 60), st.integers(1, 9))
def test_steps_of_an_epoch_drop_nothing_and_only_the_last_is_ragged(num_pairs, per_step):
    order = epoch_order(num_pairs, seed=0, epoch=0)
    steps = list(iterate_steps(order, pairs_per_step=per_step))
    assert [i for step in steps for i in step] == order
    assert len(steps) == num_steps_per_epoch(num_pairs, pairs_per_step=per_step)
    assert all(len(step) == per_step for step in steps[:-1])


def test_steps_refuse_zero_pairs():
    with pytest.raises(ValueError, match="pairs_per_step must be at least 1, not 0"):
        list(iterate_steps([1], pairs_per_step=0))
