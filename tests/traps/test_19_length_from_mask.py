"""Trap 19: a response's length counted from non-zero log-probs, so that a saturated token vanishes."""

from __future__ import annotations

import torch

from simpo.core.batch import build_batch
from simpo.core.logprobs import response_logps, token_logps
from simpo.core.losses import PairLogps
from simpo.core.packing import TokenPair


def test_a_token_with_log_prob_exactly_zero_still_counts() -> None:
    batch = build_batch([TokenPair("saturated", [9, 1, 2, 3], 1, [9, 4, 5], 1)])
    # A head that is certain of token 2 (log-prob exactly 0.0 in fp32) and indifferent about the rest.
    hidden, weight = torch.zeros(batch.labels.numel(), 2), torch.zeros(11, 2)
    hidden[:, 0] = 1.0
    hidden[1] = torch.tensor([0.0, 1.0])
    weight[2, 1] = 200.0
    logps = token_logps(hidden, weight, batch.labels)
    assert logps[1].item() == 0.0
    sums, lengths = response_logps(logps, batch.response_lengths), batch.response_lengths
    pair = PairLogps(sums[0::2], sums[1::2], lengths[0::2], lengths[1::2])
    assert pair.chosen_length.tolist() == [3]
    log_11 = torch.log(torch.tensor(11.0))
    assert torch.allclose(pair.chosen_mean, -2 * log_11[None] / 3)
    assert torch.allclose(pair.rejected_mean, -log_11[None])
    counted = torch.count_nonzero(logps[:3])  # the bug: 2 tokens, and the saturated response looks no better
    assert torch.allclose(logps[:3].sum() / counted, -log_11)
