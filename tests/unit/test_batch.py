"""core.batch: every layout says the same thing about every label. Checked by decoding batches back to sequences."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo.core.batch import PackedPairs, build_batch, build_list_batch
from simpo.core.blocks import dense_mask
from simpo.core.packing import PairShape, shared_prefix_length

reproducible = settings(deadline=None, derandomize=True, max_examples=60)

LAYOUTS = [(True, True), (True, False), (False, True), (False, False)]


class Pair(NamedTuple):
    row_id: str
    chosen_ids: list[int]
    chosen_start: int
    rejected_ids: list[int]
    rejected_start: int
    chosen_gaps: tuple[int, ...] = ()
    rejected_gaps: tuple[int, ...] = ()


class Responses(NamedTuple):
    row_id: str
    sequences: list[list[int]]
    starts: list[int]


@st.composite
def lists(draw, most: int = 5):
    """1 to 5 responses to a prompt over an alphabet of three tokens; what all begin with varies."""
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)
    prompt = draw(tokens)
    sequences = [prompt + response for response in draw(st.lists(tokens, min_size=1, max_size=most))]
    starts = [min(len(prompt) + draw(st.integers(0, 1)), len(ids) - 1) for ids in sequences]
    return Responses("row", sequences, starts)


@st.composite
def pairs(draw):
    """Pairs over an alphabet of three tokens, so that prefixes often reach into the responses."""
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)
    prompt = draw(tokens)
    chosen, rejected = prompt + draw(tokens), prompt + draw(tokens)
    seam = st.integers(0, 1)  # tokens at the seam may differ, and with them where each response starts
    starts = [min(len(prompt) + draw(seam), len(ids) - 1) for ids in (chosen, rejected)]
    return Pair("row", chosen, starts[0], rejected, starts[1])


def sequences(some_pairs) -> list[tuple[list[int], int]]:
    """(ids, start) of every response in the order of a batch."""
    return [s for p in some_pairs for s in ((p.chosen_ids, p.chosen_start), (p.rejected_ids, p.rejected_start))]


def visible_rows(batch: PackedPairs) -> torch.Tensor:
    """[R*T, R*T] bool: what each flattened row attends to."""
    if batch.blocks is not None:
        return dense_mask(batch.blocks, batch.num_tokens)
    width = batch.input_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    return torch.block_diag(*[causal & (mask[None, :] == 1) for mask in batch.attention_mask]).bool()


def assert_labels_are_predicted_from_their_own_history(
    batch: PackedPairs, responses: list[tuple[list[int], int]]
) -> None:
    """For each label: the source row sees exactly the tokens before the label, in order, at positions 0, 1, 2, ..."""
    visible = visible_rows(batch)
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    reached = 0
    for (sequence, start), length in zip(responses, batch.response_lengths.tolist(), strict=True):
        assert length == len(sequence) - start
        for offset in range(length):
            label, source = int(batch.labels[reached + offset]), int(batch.source_rows[reached + offset])
            at = start + offset  # the label's place in its sequence
            assert label == sequence[at]
            assert int(positions[source]) + 1 == at
            history = visible[source].nonzero()[:, 0]
            assert ids[history].tolist() == sequence[:at]
            assert positions[history].tolist() == list(range(at))
        reached += length
    assert reached == batch.labels.numel() == batch.source_rows.numel()


@pytest.mark.parametrize(("pack", "share"), LAYOUTS)
@reproducible
@given(some_pairs=st.lists(pairs(), min_size=1, max_size=4))
def test_every_label_is_predicted_by_a_row_that_sees_exactly_what_precedes_it(pack, share, some_pairs):
    batch = build_batch(some_pairs, pack=pack, share_prompt=share, pad_token_id=7)
    assert batch.num_pairs == len(some_pairs)
    assert_labels_are_predicted_from_their_own_history(batch, sequences(some_pairs))


@reproducible
@given(some_pairs=st.lists(pairs(), min_size=1, max_size=4))
def test_packed_rows_hold_no_padding_and_as_many_tokens_as_planned(some_pairs):
    shapes = []
    for p in some_pairs:
        prefix = shared_prefix_length(p.chosen_ids, p.rejected_ids)
        shapes.append(PairShape(prefix, len(p.chosen_ids) - prefix, len(p.rejected_ids) - prefix))
    batch = build_batch(some_pairs)
    assert batch.num_tokens == sum(shape.tokens for shape in shapes)
    assert dense_mask(batch.blocks, batch.num_tokens).sum() == sum(shape.attended for shape in shapes)
    unshared = build_batch(some_pairs, share_prompt=False)
    assert unshared.num_tokens == sum(len(ids) for ids, _ in sequences(some_pairs))


PAIR = Pair("row-3", [1, 2, 3, 4, 5], 2, [1, 2, 6], 2)


def test_shared_layout_of_a_known_pair():
    batch = build_batch([PAIR])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2]]
    assert batch.blocks.ranges == ((0, 0, 0, 5), (0, 2, 5, 6))
    assert batch.source_rows.tolist() == [1, 2, 3, 1]  # row 1, the last of the prompt, serves both responses
    assert batch.labels.tolist() == [3, 4, 5, 6]
    assert batch.response_lengths.tolist() == [3, 1]
    assert batch.attention_mask is None
    assert batch.row_ids == ("row-3",)


def test_plain_padded_layout_of_a_known_pair():
    batch = build_batch([PAIR], pack=False, share_prompt=False, pad_token_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 6, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.blocks is None
    assert batch.source_rows.tolist() == [1, 2, 3, 6]


@pytest.mark.parametrize(("pack", "share"), LAYOUTS)
@pytest.mark.parametrize(
    "pair",
    [
        Pair("one-token prompt", [1, 2, 3], 1, [1, 4], 1),
        Pair("one-token responses", [1, 2, 3], 2, [1, 2, 4], 2),
        Pair("both shortest", [1, 2], 1, [1, 3], 1),
        Pair("prefix reaches into the response", [1, 2, 3, 4, 5], 2, [1, 2, 3, 4, 6, 7], 2),
        Pair("chosen is the start of rejected", [1, 2, 3], 1, [1, 2, 3, 4, 5], 1),
        Pair("rejected is the start of chosen", [1, 2, 3, 4], 1, [1, 2, 3], 1),
        Pair("responses start apart, after a seam that differs", [1, 2, 3, 4], 3, [1, 5, 4], 2),
        Pair("nothing shared", [1, 2, 3], 1, [4, 5, 6], 2),
    ],
    ids=lambda pair: pair.row_id,
)
def test_edge_pairs_decode_in_every_layout(pair, pack, share):
    some_pairs = [PAIR, pair, PAIR]
    batch = build_batch(some_pairs, pack=pack, share_prompt=share)
    assert_labels_are_predicted_from_their_own_history(batch, sequences(some_pairs))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("start", [0, 3, 4])
def test_a_response_without_tokens_or_without_anything_before_it_is_refused(side, start):
    pair = Pair("row-8", [1, 2, 3], 1, [1, 2, 4], 1)._replace(**{f"{side}_start": start})
    with pytest.raises(ValueError, match=f"pair row-8: the {side} response starts at token {start} of 3"):
        build_batch([PAIR, pair])


@pytest.mark.parametrize("gaps", [(2, 3), (3,), (4, 3), (3, 3), (3, 5), (3, 4, 4, 5)])
def test_gaps_that_leave_nothing_before_between_or_after_them_are_refused(gaps):
    with pytest.raises(ValueError, match=r"pair row-3: the chosen response has gaps \[.*\]; they are begin, end"):
        build_batch([PAIR._replace(chosen_gaps=gaps)])


def test_labels_leave_out_gaps():
    batch = build_batch([PAIR._replace(chosen_gaps=(3, 4))])
    assert batch.labels.tolist() == [3, 5, 6]
    assert batch.source_rows.tolist() == [1, 3, 1]
    assert batch.response_lengths.tolist() == [2, 1]


def test_an_empty_micro_batch_is_refused():
    with pytest.raises(ValueError, match="at least one pair"):
        build_batch([])


def test_moving_a_batch_keeps_everything():
    for pack, share in LAYOUTS:
        batch = build_batch([PAIR, PAIR], pack=pack, share_prompt=share)
        moved = batch.to("cpu")
        assert (moved.blocks, moved.row_ids) == (batch.blocks, batch.row_ids)
        for name in ("input_ids", "position_ids", "attention_mask", "source_rows", "labels", "response_lengths"):
            before, after = getattr(batch, name), getattr(moved, name)
            assert (before is None and after is None) or torch.equal(before, after)


@pytest.mark.parametrize(("pack", "share"), LAYOUTS)
@reproducible
@given(some_lists=st.lists(lists(), min_size=1, max_size=4))
def test_every_label_of_a_list_is_predicted_by_a_row_that_sees_exactly_what_precedes_it(pack, share, some_lists):
    batch = build_list_batch(some_lists, pack=pack, share_prompt=share, pad_token_id=7)
    responses = [s for each in some_lists for s in zip(each.sequences, each.starts, strict=True)]
    assert_labels_are_predicted_from_their_own_history(batch, responses)
    assert batch.group_sizes == tuple(len(each.sequences) for each in some_lists)
    assert sum(batch.group_sizes) == len(batch.response_lengths)


@reproducible
@given(some_lists=st.lists(lists(), min_size=1, max_size=4))
def test_a_packed_list_holds_what_all_its_sequences_begin_with_once(some_lists):
    expected = 0
    for each in some_lists:
        shared = shared_prefix_length(*each.sequences)
        expected += shared + sum(len(ids) - shared for ids in each.sequences)
    assert build_list_batch(some_lists).num_tokens == expected


@pytest.mark.parametrize(("pack", "share"), LAYOUTS)
@reproducible
@given(some_pairs=st.lists(pairs(), min_size=1, max_size=4))
def test_a_pair_is_a_list_of_two(pack, share, some_pairs):
    as_lists = [
        Responses(p.row_id, [p.chosen_ids, p.rejected_ids], [p.chosen_start, p.rejected_start]) for p in some_pairs
    ]
    ours = build_batch(some_pairs, pack=pack, share_prompt=share)
    theirs = build_list_batch(as_lists, pack=pack, share_prompt=share)
    for name in ("input_ids", "position_ids", "source_rows", "labels", "response_lengths"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert (ours.row_ids, ours.group_sizes) == (theirs.row_ids, theirs.group_sizes)
    assert (ours.blocks is None) == (theirs.blocks is None)
    assert ours.blocks is None or ours.blocks.ranges == theirs.blocks.ranges


def test_shared_layout_of_a_known_list():
    batch = build_list_batch([Responses("row-4", [[1, 2, 3], [1, 2, 4, 5], [1, 2, 6]], [2, 2, 2])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 2]]
    assert batch.blocks.ranges == ((0, 0, 0, 3), (0, 2, 3, 5), (0, 2, 5, 6))
    assert batch.source_rows.tolist() == [1, 1, 3, 1]  # row 1 serves all three responses
    assert batch.labels.tolist() == [3, 4, 5, 6]
    assert batch.response_lengths.tolist() == [1, 2, 1]
    assert (batch.group_sizes, batch.num_pairs) == ((3,), 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Responses("row-9", [], []), "list row-9: 0 responses and 0 starts"),
        (Responses("row-9", [[1, 2]], [1, 1]), "list row-9: 1 responses and 2 starts"),
        (Responses("row-9", [[1, 2, 3], [1, 2]], [2, 2]), "list row-9: response 2 of 2 starts at token 2 of 2"),
        (Responses("row-9", [[1, 2, 3]], [0]), "list row-9: response 1 of 1 starts at token 0 of 3"),
    ],
)
def test_lists_without_responses_or_tokens_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        build_list_batch([Responses("row-1", [[1, 2]], [1]), wrong])


def test_a_micro_batch_of_no_lists_is_refused():
    with pytest.raises(ValueError, match="at least one list"):
        build_list_batch([])
