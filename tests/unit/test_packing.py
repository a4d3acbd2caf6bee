"""core.packing: shared prefixes, bins, the batch plan. Properties are checked on random lengths."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3nTextConfig, LlamaConfig

from simpo.core.packing import (
    CostWeights,
    PairShape,
    TokenPair,
    epoch_order,
    fill_to_budget,
    iterate_steps,
    num_steps_per_epoch,
    pair_cost,
    plan_micro_batches,
    shared_prefix_length,
    spread_evenly,
)
from simpo.model.costs import cost_weights, decoder_sizes

reproducible = settings(deadline=None, derandomize=True, max_examples=200)

few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)  # a small alphabet, so that prefixes are shared
shapes = st.builds(PairShape, st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
costs = st.lists(st.integers(0, 100).map(float), max_size=40)
WEIGHTS = CostWeights(attention=0.01, head=0.1)


def plan_shapes(pairs: list[PairShape], *, weights: CostWeights = WEIGHTS, **options) -> list[list[list[int]]]:
    """The plan of a step from shapes; every response token is a label."""
    costs = [pair_cost(shape, weights, num_labels=shape.chosen + shape.rejected) for shape in pairs]
    return plan_micro_batches([shape.tokens for shape in pairs], costs, **options)


def chat_like(num_pairs: int, *, seed: int) -> list[PairShape]:
    """Log-normal lengths: prompts around 150 tokens, responses around 250, none of more than 3848 in all."""
    rng = random.Random(seed)

    def draw(median: int, sigma: float, low: int, high: int) -> int:
        return int(min(max(rng.lognormvariate(math.log(median), sigma), low), high))

    return [
        PairShape(draw(150, 0.8, 4, 1800), draw(250, 0.7, 2, 1024), draw(250, 0.7, 2, 1024)) for _ in range(num_pairs)
    ]


@reproducible
@given(few_tokens, few_tokens, few_tokens)
def test_shared_prefix_is_the_longest_that_leaves_each_side_a_token(common, left, right):
    chosen, rejected = common + left, common + right
    found = shared_prefix_length(chosen, rejected)

    def is_shared(length: int) -> bool:
        return chosen[:length] == rejected[:length] and length < min(len(chosen), len(rejected))

    assert found == max(length for length in range(len(chosen)) if is_shared(length))


@reproducible
@given(few_tokens, st.lists(few_tokens, min_size=1, max_size=5))
def test_shared_prefix_of_many_is_the_longest_that_leaves_each_a_token(common, rests):
    sequences = [common + rest for rest in rests]
    limit = min(map(len, sequences))
    expected = max(n for n in range(limit) if all(s[:n] == sequences[0][:n] for s in sequences))
    assert shared_prefix_length(*sequences) == expected


# 2 N_l cost, three times for forward and backward, is the floor of compute: 7-8B and 135M shapes, TFLOP per pair.
LLAMA_8B = LlamaConfig(
    num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
SMOLLM = LlamaConfig(
    num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "block_weights", "shape", "teraflops"),
    [
        (LLAMA_8B, 6_979_321_856, PairShape(200, 350, 350), 40.3),
        (LLAMA_8B, 6_979_321_856, PairShape(1000, 300, 300), 70.8),
        (LLAMA_8B, 6_979_321_856, PairShape(4096, 256, 256), 211),
        (SMOLLM, 106_168_320, PairShape(200, 350, 350), 0.751),
        (SMOLLM, 106_168_320, PairShape(4096, 256, 256), 5.21),
    ],
)
def test_cost_of_a_pair_is_its_share_of_the_floor_of_compute(model, block_weights, shape, teraflops):
    """The weights in the blocks are counted by hand: layers * (2 H Hq D + 2 H Hkv D + 3 H I), Hq D = H in both."""
    cost = pair_cost(shape, cost_weights(model), num_labels=shape.chosen + shape.rejected)
    assert 3 * 2 * block_weights * cost / 1e12 == pytest.approx(teraflops, rel=3e-3)


def test_sizes_that_differ_between_layers_count_as_the_largest():
    config = Gemma3nTextConfig(num_hidden_layers=3, intermediate_size=[64, 96, 64], hidden_size=32)
    assert decoder_sizes(config)["intermediate_size"] == 96


def test_cost_of_tokens_alone_counts_tokens():
    assert pair_cost(PairShape(2, 3, 4), num_labels=7) == 9
    assert pair_cost(PairShape(2, 3, 4), CostWeights(attention=0.5), num_labels=7) == 9 + 0.5 * (3 + 6 + 10 + 2 * 7)


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


@pytest.mark.parametrize(
    ("pair", "length"),
    [
        (TokenPair("one turn", [1, 2, 3, 4, 5], 3, [1, 2, 3, 9], 3), 3),
        (TokenPair("seams apart", [1, 2, 3, 4, 5], 3, [1, 2, 3, 9], 2), 2),
        (TokenPair("differ in the last", [*range(9)], 2, [*range(6), 0, 0], 2, [4, 6], [4, 6]), 6),
        (TokenPair("differ in the first", [1, 2, 3, 4, 5, 6], 2, [1, 2, 9, 4, 5, 6], 2, [3, 4], [3, 4]), 2),
    ],
    ids=lambda value: getattr(value, "row_id", ""),
)
def test_the_prompt_to_answer_ends_where_the_first_differing_turn_begins(pair, length):
    assert pair.prompt_ids == pair.chosen_ids[:length]


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


def quadratic_best_fit(tokens: list[int], budget: int) -> list[list[int]]:
    """The definition: largest item first, into the bin with the least room that is enough, the first of those."""
    bins: list[list[int]] = []
    for item in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        room = [budget - sum(tokens[i] for i in items) for items in bins]
        fitting = [b for b in range(len(bins)) if room[b] >= tokens[item]]
        if fitting:
            bins[min(fitting, key=lambda b: (room[b], b))].append(item)
        else:
            bins.append([item])
    return [sorted(items) for items in bins]


@reproducible
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_fill_to_budget_is_best_fit_bin_by_bin(tokens, budget):
    assert fill_to_budget(tokens, budget) == quadratic_best_fit(tokens, budget)


def partitions(items: list[int]):
    """Every way to put items into any number of bins."""
    if not items:
        yield []
        return
    for smaller in partitions(items[1:]):
        yield [[items[0]], *smaller]
        for index, group in enumerate(smaller):
            yield [*smaller[:index], [items[0], *group], *smaller[index + 1 :]]


@settings(reproducible, max_examples=60)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(20, 40))
def test_fill_to_budget_is_within_its_proven_bound_of_the_fewest_bins_there_are(tokens, budget):
    """11/9 of the optimum and 6/9, as for first fit largest first (the same proof holds for best fit)."""
    fits = (p for p in partitions(list(range(len(tokens)))) if all(sum(tokens[i] for i in b) <= budget for b in p))
    assert len(fill_to_budget(tokens, budget)) <= 11 / 9 * min(map(len, fits)) + 6 / 9


@pytest.mark.parametrize("budget", [4096, 8192, 16384])
def test_best_fit_fills_97_percent_of_rows_of_many_chat_like_pairs(budget):
    tokens = [shape.tokens for shape in chat_like(20_000, seed=0)]
    bins = fill_to_budget(tokens, budget)
    assert sum(tokens) / (len(bins) * budget) >= 0.97


@reproducible
@given(
    st.lists(shapes, max_size=24),
    st.integers(1, 4),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(120, 400)),
    st.sampled_from([CostWeights(), WEIGHTS]),
)
def test_plan_holds_each_pair_once_within_the_budget_on_every_rank(pairs, ranks, micro_batches, budget, weights):
    options = {"num_ranks": ranks, "num_micro_batches": micro_batches, "max_tokens": budget, "weights": weights}
    plan = plan_shapes(pairs, **options)
    assert len(plan) == ranks
    assert len({len(share) for share in plan}) == 1, "ranks with unequal numbers of micro-batches would wait forever"
    assert len(plan[0]) >= micro_batches
    placed = [i for share in plan for items in share for i in items]
    assert sorted(placed) == list(range(len(pairs)))
    if budget is None:
        assert len(plan[0]) == micro_batches
    else:
        assert all(sum(pairs[i].tokens for i in items) <= budget for share in plan for items in share)
        best_fit = len(fill_to_budget([shape.tokens for shape in pairs], budget))
        assert len(plan[0]) <= max(micro_batches, math.ceil(best_fit / ranks)), "more micro-batches than it takes"
    assert plan == plan_shapes(list(pairs), **options), "every rank must work out the same plan"


@reproducible
@given(st.lists(shapes, max_size=24), st.integers(1, 4), st.integers(1, 4))
def test_a_budget_that_everything_fits_into_changes_nothing(pairs, ranks, micro_batches):
    options = {"num_ranks": ranks, "num_micro_batches": micro_batches}
    ample = max(1, sum(shape.tokens for shape in pairs))
    assert plan_shapes(pairs, max_tokens=ample, **options) == plan_shapes(pairs, **options)


def loads_of(plan: list[list[list[int]]], pairs: list[PairShape]) -> list[list[float]]:
    """loads[rank][micro_batch]: its cost."""
    costs = [pair_cost(shape, WEIGHTS, num_labels=shape.chosen + shape.rejected) for shape in pairs]
    return [[sum(costs[i] for i in items) for items in share] for share in plan]


@reproducible
@given(st.lists(shapes, min_size=1, max_size=24), st.integers(1, 4), st.integers(1, 4))
def test_plan_without_a_budget_is_balanced(pairs, ranks, micro_batches):
    loads = loads_of(plan_shapes(pairs, num_ranks=ranks, num_micro_batches=micro_batches), pairs)
    flat = [load for share in loads for load in share]
    costliest_pair = max(pair_cost(shape, WEIGHTS, num_labels=shape.chosen + shape.rejected) for shape in pairs)
    assert max(flat) <= sum(flat) / len(flat) + costliest_pair + 1e-9
    for share in loads:
        assert share == sorted(share, reverse=True), "the costliest micro-batch comes first"
    totals = [sum(share) for share in loads]
    assert max(totals) - min(totals) <= max(share[0] for share in loads) + 1e-9


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("budget", [4096, 8192])
def test_micro_batches_within_a_budget_are_even_over_ranks(ranks, budget):
    """128 chat-like pairs: ranks wait for each other after every micro-batch, and lose less than 3% by it."""
    pairs = chat_like(128, seed=ranks)
    loads = loads_of(plan_shapes(pairs, num_ranks=ranks, num_micro_batches=1, max_tokens=budget), pairs)
    waited_for = sum(max(column) for column in zip(*loads, strict=True))
    assert waited_for <= 1.03 * sum(sum(share) for share in loads) / ranks


def test_the_spread_within_a_budget_is_near_the_most_even_there_is():
    """Against every assignment of 7 pairs to the plan's number of micro-batches that keeps the budget."""
    rng = random.Random(0)
    ratios = []
    for _ in range(60):
        pairs = [PairShape(rng.randint(0, 20), rng.randint(1, 30), rng.randint(1, 30)) for _ in range(7)]
        budget = max(shape.tokens for shape in pairs) + rng.randint(0, 60)
        (loads,) = loads_of(plan_shapes(pairs, num_ranks=1, num_micro_batches=1, max_tokens=budget), pairs)
        costs = [pair_cost(shape, WEIGHTS, num_labels=shape.chosen + shape.rejected) for shape in pairs]
        best = math.inf
        for bins in itertools.product(range(len(loads)), repeat=7):
            if bins[0] == 0:  # micro-batches have no names
                sizes, sums = [0] * len(loads), [0.0] * len(loads)
                for index, bin_index in enumerate(bins):
                    sizes[bin_index] += pairs[index].tokens
                    sums[bin_index] += costs[index]
                if max(sizes) <= budget:
                    best = min(best, max(sums))
        ratios.append(max(loads) / best)
    assert min(ratios) >= 1 - 1e-9
    assert statistics.mean(ratios) < 1.03
    assert max(ratios) < 1.2


def test_plan_keeps_the_budget_where_the_even_spread_would_break_it():
    """3+3 and 2+2+2 fill two micro-batches of 6; spread evenly, longest first, they would be 7 and 5."""
    pairs = [PairShape(0, 1, tokens - 1) for tokens in (3, 3, 2, 2, 2)]
    assert spread_evenly([3, 3, 2, 2, 2], 2) == [[0, 2, 4], [1, 3]]
    (share,) = plan_shapes(pairs, weights=CostWeights(), num_ranks=1, num_micro_batches=1, max_tokens=6)
    assert sorted(share) == [[0, 1], [2, 3, 4]]


def test_plan_passes_over_a_cheap_but_full_micro_batch():
    """Tokens and cost do not run in step: the last pair belongs to the cheaper micro-batch, which has no room."""
    tokens, costs = [3, 6, 3], [10.0, 9.0, 5.0]
    assert plan_micro_batches(tokens, costs, num_ranks=1, num_micro_batches=2) == [[[1, 2], [0]]]
    assert plan_micro_batches(tokens, costs, num_ranks=1, num_micro_batches=1, max_tokens=6) == [[[0, 2], [1]]]


def test_an_item_without_room_in_the_cheapest_bin_goes_to_the_next_cheapest():
    assert plan_micro_batches([1, 9, 5], [10.0, 5.0, 3.0], num_ranks=1, num_micro_batches=2, max_tokens=10) == [
        [[0, 2], [1]]
    ]


def test_ranks_are_even_in_sum_where_their_micro_batches_are_not():
    """Of the second group the costlier micro-batch goes to the rank that had the cheaper one before."""
    plan = plan_micro_batches([1] * 4, [10.0, 6.0, 5.0, 1.0], num_ranks=2, num_micro_batches=2)
    assert plan == [[[0], [3]], [[1], [2]]]


def test_ranks_without_a_micro_batch_get_an_empty_one():
    """Three cheap items keep the long one out of every bin of the even spread; best fit then needs two of three."""
    plan = plan_micro_batches([1, 1, 1, 10], [5.0, 5.0, 5.0, 1.0], num_ranks=3, num_micro_batches=1, max_tokens=10)
    assert sorted(plan) == [[[]], [[0, 1, 2]], [[3]]]


def test_plan_refuses_a_pair_above_the_budget():
    with pytest.raises(ValueError, match="raise max_tokens_per_micro_batch"):
        plan_shapes([PairShape(5, 5, 5)], num_ranks=1, num_micro_batches=1, max_tokens=14)


@reproducible
@given(st.integers(0, 60), st.integers(0, 5), st.integers(0, 3))
def test_epoch_order_is_a_permutation_that_repeats(num_pairs, seed, epoch):
    order = epoch_order(num_pairs, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(num_pairs))
    assert order == epoch_order(num_pairs, seed=seed, epoch=epoch)


def test_epoch_order_of_a_seed_stays_what_it_was():
    """Drawn with Python 3.11's random.shuffle by version 0.1.0: another order would change every resumed run."""
    assert list(epoch_order(12, seed=42, epoch=0)) == [6, 10, 0, 2, 5, 11, 4, 9, 8, 7, 1, 3]
    assert list(epoch_order(12, seed=7, epoch=3)) == [5, 7, 9, 11, 1, 2, 4, 3, 6, 0, 10, 8]


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
    assert [i for step in steps for i in step] == list(order)
    assert len(steps) == num_steps_per_epoch(num_pairs, pairs_per_step=per_step)
    assert all(len(step) == per_step for step in steps[:-1])


def test_steps_refuse_zero_pairs():
    with pytest.raises(ValueError, match="pairs_per_step must be at least 1, not 0"):
        list(iterate_steps([1], pairs_per_step=0))
