"""core.batch: every layout says the same thing about every label. Checked by decoding batches back to sequences."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo.core.attention import dense_mask
from simpo.core.batch import PackedPairs, build_batch
from simpo.core.packing import PairShape, shared_prefix_length

reproducible = settings(deadline=None, derandomize=True, max_examples=150)

LAYOUTS = [(True, True), (True, False), (False, True), (False, False)]


class Pair(NamedTuple):
    row_id: str
    chosen_ids: list[int]
    chosen_start: int
    rejected_ids: list[int]
    rejected_start: int


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


def assert_labels_are_predicted_from_their_own_history(batch: PackedPairs, some_pairs) -> None:
    """For each label: the source row sees exactly the tokens before the label, in order, at positions 0, 1, 2, ..."""
    visible = visible_rows(batch)
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    reached = 0
    for (sequence, start), length in zip(sequences(some_pairs), batch.response_lengths.tolist(), strict=True):
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
    assert_labels_are_predicted_from_their_own_history(batch, some_pairs)


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
    assert_labels_are_predicted_from_their_own_history(batch, some_pairs)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("start", [0, 3, 4])
def test_a_response_without_tokens_or_without_anything_before_it_is_refused(side, start):
    pair = Pair("row-8", [1, 2, 3], 1, [1, 2, 4], 1)._replace(**{f"{side}_start": start})
    with pytest.raises(ValueError, match=f"pair row-8: the {side} response starts at token {start} of 3"):
        build_batch([PAIR, pair])


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
