"""Trap 1: with the vocabulary in shards, a mask `labels != 0` taken after the shift into the shard drops every token
whose local id is 0. Here every id counts, on every shard.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

from simpo.core.logprobs import VocabShard, reference_token_logps, response_logps, token_logps

VOCABULARY, WIDTH = 13, 8


def make_head() -> tuple[Tensor, Tensor]:
    """Hidden states that predict each id once, and the whole head."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    return hidden, torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)


def logps_of_every_id(cut: int) -> tuple[list[float], list[float], list[int]]:
    """Log-probs of ids 0..12 from a head cut before row `cut`, d hidden, and the ids whose local number is 0."""
    hidden, weight = make_head()
    start, end = [(0, cut), (cut, VOCABULARY)][dist.get_rank()]
    labels = torch.arange(VOCABULARY)
    hidden.requires_grad_()
    shard = VocabShard(dist.group.WORLD, start, VOCABULARY)
    logps = token_logps(hidden, weight[start:end], labels, shard=shard)
    logps.backward(torch.linspace(-1.0, 2.0, VOCABULARY, dtype=torch.float64))
    return logps.tolist(), hidden.grad.flatten().tolist(), labels[labels - start == 0].tolist()


def test_every_id_counts_wherever_the_vocabulary_is_cut(two_ranks: Ranks) -> None:
    hidden, weight = make_head()
    hidden.requires_grad_()
    expected = reference_token_logps(hidden, weight, torch.arange(VOCABULARY))
    expected.backward(torch.linspace(-1.0, 2.0, VOCABULARY, dtype=torch.float64))
    for cut in range(VOCABULARY + 1):
        for logps, d_hidden, first_ids in two_ranks.run(logps_of_every_id, cut):
            assert logps == pytest.approx(expected.tolist(), abs=1e-12)
            assert d_hidden == pytest.approx(hidden.grad.flatten().tolist(), abs=1e-12)
            assert first_ids in ([0], [cut], [])


def test_a_dropped_first_id_would_show(two_ranks: Ranks) -> None:
    """The mask's mistake repeated by hand: two responses lose the ids 0 and 5, and their sums move by nats."""
    outcomes = two_ranks.run(logps_of_every_id, 5)
    logps, lengths = torch.tensor(outcomes[0][0]), torch.tensor([5, 8])
    masked = logps.clone()
    for _, _, first_ids in outcomes:
        masked[first_ids] = 0.0
    right, wrong = response_logps(logps, lengths), response_logps(masked, lengths)
    assert (wrong - right).tolist() == pytest.approx([-float(logps[0]), -float(logps[5])])
    assert (wrong - right).min() > 0.5
