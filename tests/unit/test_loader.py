"""data.loader: plans are core.packing's on the lengths of stored pairs; lengths that a model cannot take."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from simpo.core.packing import TOKENS_ALONE, CostWeights, PairShape, epoch_order, pair_cost, plan_micro_batches
from simpo.data.loader import PairStore, StepLoader, evaluation_batches

WEIGHTS = CostWeights(attention=0.01, head=0.3)


def make_store(num_pairs: int = 30, *, seed: int = 0, share_prompt: bool = True, columns: bool = False) -> PairStore:
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(num_pairs):
        prompt, chosen, rejected = (int(n) for n in rng.integers(1, 40, 3))
        prefix = [3] * prompt
        row = {"row_id": f"row-{index}", "chosen_start": prompt, "rejected_start": prompt}
        rows.append({**row, "chosen_ids": prefix + [4] * chosen, "rejected_ids": prefix + [5] * rejected})
        if columns:
            rows[-1]["shared_prefix"] = prompt
    return PairStore(datasets.Dataset.from_list(rows), share_prompt=share_prompt)


@pytest.mark.parametrize("columns", [True, False], ids=["prefix stored", "prefix worked out"])
@pytest.mark.parametrize("share", [True, False])
def test_shapes_of_a_store_are_those_of_its_pairs(share, columns):
    store = make_store(share_prompt=share, columns=columns)
    loader = StepLoader(store, pairs_per_step=4, num_micro_batches=1, weights=WEIGHTS)
    for index in range(len(store)):
        pair = store[index]
        prefix = pair.chosen_start if share else 0
        shape = PairShape(prefix, len(pair.chosen_ids) - prefix, len(pair.rejected_ids) - prefix)
        labels = len(pair.chosen_ids) + len(pair.rejected_ids) - 2 * pair.chosen_start
        assert store.tokens[index] == shape.tokens == loader.build([index]).pairs.num_tokens
        assert store.shapes.attended[index] == shape.attended
        assert loader.costs[index] == pytest.approx(pair_cost(shape, WEIGHTS, num_labels=labels))


def test_a_store_with_gaps_counts_the_labels_that_its_batches_hold():
    rows = [{"row_id": "a", "chosen_ids": [1] * 9, "chosen_start": 2, "rejected_ids": [1, 2, 3], "rejected_start": 1}]
    rows.append({"row_id": "b", "chosen_ids": [1] * 6, "chosen_start": 2, "rejected_ids": [2] * 8, "rejected_start": 1})
    gaps = [{"chosen_gaps": [3, 5, 6, 8], "rejected_gaps": []}, {"chosen_gaps": [], "rejected_gaps": [2, 3]}]
    dataset = datasets.Dataset.from_list([{**row, **more} for row, more in zip(rows, gaps)])
    store = PairStore(dataset)
    assert store.response_lengths.tolist() == [[3, 2], [4, 6]]
    batch = StepLoader(store, pairs_per_step=2, num_micro_batches=1).build([0, 1]).pairs
    assert batch.response_lengths.tolist() == store.response_lengths.flatten().tolist()
    backwards = PairStore(dataset.select([1, 0]))
    assert backwards.response_lengths.tolist() == [[4, 6], [3, 2]]


def of_lists(middle: float = 0.5) -> PairStore:
    """A list of four responses and one of two; `middle` is what the first one's second response scored."""
    row = {"row_id": "four", "chosen_ids": [1, 2, 3, 3], "chosen_start": 2, "rejected_ids": [1, 2, 4]}
    row |= {"rejected_start": 2, "more_ids": [[1, 2, 5, 5, 5], [1, 2, 6, 6, 6, 6]], "more_starts": [2, 2]}
    row |= {"score_chosen": 1.0, "more_scores": [middle, 0.25], "score_rejected": 0.0}
    two = {**row, "row_id": "two", "more_ids": [], "more_starts": [], "more_scores": []}
    return PairStore(datasets.Dataset.from_list([row, two]))


def test_a_list_costs_what_all_its_responses_do():
    store = of_lists()
    loader = StepLoader(store, pairs_per_step=2, num_micro_batches=1, weights=WEIGHTS)
    built = loader.build([0, 1]).pairs
    assert store.num_labels.tolist() == [2 + 1 + 3 + 4, 2 + 1]
    assert built.response_lengths.tolist() == [2, 3, 4, 1, 2, 1]
    assert store.tokens.tolist() == [2 + 2 + 1 + 3 + 4, 2 + 2 + 1]
    for index, own in enumerate(([2, 1, 3, 4], [2, 1])):  # tokens behind the shared two
        attended = 3 + sum(length * 2 + length * (length + 1) // 2 for length in own)
        assert store.shapes.attended[index] == attended
        assert loader.costs[index] == pytest.approx(store.tokens[index] + 0.01 * attended + 0.3 * sum(own))


def test_scores_of_every_response_are_told_apart():
    def fingerprint(store: PairStore, **options) -> str | None:
        return StepLoader(store, pairs_per_step=2, num_micro_batches=1, **options).scores_fingerprint

    assert fingerprint(of_lists()) is None
    assert fingerprint(of_lists(), with_scores=True) == fingerprint(of_lists(), with_scores=True)
    assert fingerprint(of_lists(), with_scores=True) != fingerprint(of_lists(0.75), with_scores=True)


@pytest.mark.parametrize("max_tokens", [None, 150, 400])
def test_a_ranks_plans_are_its_share_of_the_plan_of_each_step(max_tokens):
    store, ranks = make_store(), 3
    loaders = [
        StepLoader(
            store, pairs_per_step=8, num_micro_batches=2, max_tokens=max_tokens, seed=5, weights=WEIGHTS, rank=rank,
            num_ranks=ranks,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for step in range(2 * loaders[0].steps_per_epoch):
        epoch, within = divmod(step, loaders[0].steps_per_epoch)
        pairs = epoch_order(len(store), seed=5, epoch=epoch)[8 * within : 8 * within + 8]
        expected = plan_micro_batches(
            [int(store.tokens[i]) for i in pairs],
            [float(loaders[0].costs[i]) for i in pairs],
            num_ranks=ranks,
            num_micro_batches=2,
            max_tokens=max_tokens,
        )
        for loader, share in zip(loaders, expected, strict=True):
            (plan,) = loader.plans(step, step + 1)
            assert plan.micro_batches == tuple(tuple(pairs[i] for i in items) for items in share)
            assert (plan.step, plan.epoch, plan.num_pairs) == (step, epoch, len(pairs))
            assert plan.num_chosen_tokens == sum(len(store[i].chosen_ids) - store[i].chosen_start for i in pairs)
            assert all(type(i) is int for items in plan.micro_batches for i in items)


def test_a_limit_set_later_gives_the_plans_of_one_set_at_once():
    store = make_store()
    later = StepLoader(store, pairs_per_step=8, num_micro_batches=1, seed=5)
    whole = list(later.plans(0, 4))
    later.limit_tokens(150)
    assert list(later.plans(0, 4)) == list(
        StepLoader(store, pairs_per_step=8, num_micro_batches=1, seed=5, max_tokens=150).plans(0, 4)
    )
    later.limit_tokens(None)
    assert list(later.plans(0, 4)) == whole


def test_the_fingerprint_of_a_plan_tells_labels_and_costs_apart():
    """Three stores of as many tokens a pair: one as it is, one with other labels, and one with other weights."""

    def fingerprint(prompt: int, response: int, weights: CostWeights = TOKENS_ALONE, **options) -> str:
        ids = {f"{side}_ids": [3] * prompt + [token] * response for side, token in (("chosen", 4), ("rejected", 5))}
        row = {"row_id": "row", "chosen_start": prompt, "rejected_start": prompt, **ids}
        store = PairStore(datasets.Dataset.from_list([row] * 3))
        return StepLoader(
            store, **{"pairs_per_step": 2, "num_micro_batches": 1, "weights": weights, **options}
        ).fingerprint

    found = [fingerprint(4, 3), fingerprint(2, 4), fingerprint(4, 3, WEIGHTS)]
    found += [fingerprint(4, 3, **{name: 7}) for name in ("pairs_per_step", "num_micro_batches", "num_ranks", "seed")]
    found += [fingerprint(4, 3, max_tokens=20), fingerprint(4, 3, pack=False)]
    assert len(set(found)) == len(found)
    assert fingerprint(4, 3) == found[0]


def test_a_limit_below_the_longest_pair_names_it():
    store = make_store()
    longest = max(range(len(store)), key=lambda i: store.tokens[i])
    tokens = store.tokens[longest]
    with pytest.raises(ValueError, match=rf"max_tokens_per_micro_batch: 20 .*row-{longest}, which takes {tokens} tok"):
        StepLoader(store, pairs_per_step=8, num_micro_batches=1, max_tokens=20)


def test_a_stand_in_counts_for_no_tokens():
    loader = StepLoader(make_store(3), pairs_per_step=2, num_micro_batches=1)
    assert loader.build([0, 1]).num_tokens == loader.store.tokens[:2].sum()
    assert (loader.stand_in().num_tokens, loader.stand_in().indices) == (0, ())


@pytest.mark.parametrize("num_pairs", [1, 9, 30])
def test_evaluation_gives_every_rank_as_many_batches_and_each_pair_to_one(num_pairs):
    store = make_store(num_pairs)
    shares = [evaluation_batches(store, pairs_per_batch=4, rank=rank, num_ranks=3) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for items in share for i in items) == list(range(num_pairs))


def test_evaluation_takes_every_pair_once_from_short_to_long():
    store = make_store()
    batches = evaluation_batches(store, pairs_per_batch=4)
    order = [i for items in batches for i in items]
    assert order == sorted(range(len(store)), key=lambda i: (store.tokens[i], i))
    assert all(type(i) is int for i in order)


def test_a_sequence_longer_than_the_model_takes_is_named():
    store = make_store()
    lengths = [max(len(store[i].chosen_ids), len(store[i].rejected_ids)) for i in range(len(store))]
    longest = max(range(len(store)), key=lengths.__getitem__)
    store.check_lengths(lengths[longest])
    store.check_lengths(None)
    with pytest.raises(ValueError, match=rf"max_length: pair row-{longest} .* {lengths[longest]} tokens.*takes 30 "):
        store.check_lengths(30)


def with_scores(store: PairStore, chosen: list[float | None], rejected: list[float | None]) -> PairStore:
    dataset = store.dataset.add_column("score_chosen", chosen).add_column("score_rejected", rejected)
    return PairStore(dataset)


def test_margins_are_score_gaps_over_their_mean_within_limits():
    """Gaps 1, 3, 0, -1 and 2 have the mean 1; the batches hold those of their pairs, and a resume would notice others.

    An order that the scores contradict has no margin, and no pair has more than the limit.
    """
    scored = with_scores(make_store(5), [1.0, 3.0, 0.5, -1.0, 2.0], [0.0, 0.0, 0.5, 0.0, 0.0])
    assert scored.score_margins(9).tolist() == [1.0, 3.0, 0.0, 0.0, 2.0]
    margins = scored.score_margins(1.5)
    assert margins.tolist() == [1.0, 1.5, 0.0, 0.0, 1.5]
    loader = StepLoader(scored, pairs_per_step=2, num_micro_batches=1, margins=margins)
    assert loader.build([4, 0]).margins.tolist() == [1.5, 1.0]
    plain = StepLoader(scored, pairs_per_step=2, num_micro_batches=1)
    assert plain.build([4, 0]).margins is None
    assert len({loader.fingerprint, plain.fingerprint}) == 2


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (
            [1.0, None, 2.0],
            [0.0, 0.0, None],
            "score_margin: 2 of 3 pairs have no score of chosen .*row-1;",
        ),
        ([1.0, 0.0, 0.0], [0.0, 1.0, 0.5], r"score_margin: chosen responses score no higher .* on average \(-0.16"),
    ],
)
def test_pairs_whose_scores_give_no_margin_are_refused_by_name(chosen, rejected, message):
    with pytest.raises(ValueError, match=message):
        with_scores(make_store(3), chosen, rejected).score_margins(2)
    with pytest.raises(ValueError, match="3 of 3 pairs have no score"):
        make_store(3).score_margins(2)
