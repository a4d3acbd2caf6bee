"""Trap 2: a context-parallel row is split before its labels are shifted, and the tokens at the cut are lost or matched
with the wrong predictor. Here the shift comes first, once, and a cut may fall anywhere.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from ranks import Place, Ranks
from torch import Tensor

from simpo.core.batch import PackedPairs, build_batch
from simpo.core.context import split_rows, sum_over
from simpo.core.logprobs import response_logps, token_logps
from simpo.core.packing import TokenPair

VOCABULARY, WIDTH = 20, 8

PAIRS = [
    TokenPair("a", [5, 6, 7, 8, 9, 10, 11], 3, [5, 6, 7, 8, 12, 13], 3),  # the rejected first label: from the prefix
    TokenPair("b", [1, 2, 3], 1, [1, 4, 15, 16, 17], 1),
]


def bigram_sums(batch: PackedPairs, lengths: Tensor) -> Tensor:
    """Sums per response from a model that looks at one token alone: what a row predicts does not move with the cut."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    hidden = embedding[batch.input_ids.flatten()[batch.source_rows]]
    return response_logps(token_logps(hidden, head, batch.labels), lengths)


@pytest.mark.parametrize(("pack", "share"), [(True, True), (True, False), (False, True)])
def test_sums_are_the_whole_row_s_wherever_it_is_cut(pack: bool, share: bool) -> None:
    whole = build_batch(PAIRS, pack=pack, share_prompt=share)
    expected = bigram_sums(whole, whole.response_lengths)
    for size in range(2, whole.num_tokens + 2):
        slices = [split_rows(whole, Place(rank, size)) for rank in range(size)]
        total = sum(bigram_sums(part, part.local_lengths) for part in slices)
        assert torch.allclose(total, expected, rtol=0, atol=1e-12)


def sums_over_ranks() -> list[float]:
    batch = build_batch(PAIRS)
    part = split_rows(batch, dist.group.WORLD)
    return sum_over(bigram_sums(part, part.local_lengths), dist.group.WORLD).tolist()


def test_every_rank_has_the_whole_row_s_sums(two_ranks: Ranks) -> None:
    whole = build_batch(PAIRS)
    expected = bigram_sums(whole, whole.response_lengths).tolist()
    assert two_ranks.run(sums_over_ranks) == [pytest.approx(expected, abs=1e-12)] * 2


def test_labels_shifted_after_the_split_would_show() -> None:
    """The mistake repeated by hand: each slice shifts for itself, so the label whose predictor ends a slice is lost."""
    whole = build_batch(PAIRS, share_prompt=False)  # every label stands right behind its predictor
    expected = bigram_sums(whole, whole.response_lengths)
    trained = set(whole.source_rows.tolist())
    for size in range(2, whole.num_tokens):
        slices = [split_rows(whole, Place(rank, size)) for rank in range(size)]
        length = slices[0].num_tokens
        last = [rank * length + length - 1 for rank in range(size)]
        kept = [part.source_rows != length - 1 for part in slices]
        lost = sum(int((~keep).sum()) for keep in kept)
        assert lost == len(trained & set(last))
        if lost:
            sums = sum(_without(part, keep) for part, keep in zip(slices, kept, strict=True))
            assert (sums - expected).max() > 0.1


def _without(part: PackedPairs, keep: Tensor) -> Tensor:
    """Sums of a slice that has lost some of its labels."""
    owners = torch.arange(len(part.local_lengths)).repeat_interleave(part.local_lengths)[keep]
    rest = dataclasses.replace(part, source_rows=part.source_rows[keep], labels=part.labels[keep])
    return bigram_sums(rest, torch.bincount(owners, minlength=len(part.local_lengths)))
