"""Trap 3: the SFT term divided by length twice. Here once: the mean over pairs of per-token means."""

from __future__ import annotations

import pytest
import torch

from simpo.core.losses import PairLogps, sft_losses


def test_sft_term_is_divided_by_length_once() -> None:
    logps = PairLogps(
        chosen_sum=torch.tensor([-6.0, -30.0]),
        rejected_sum=torch.tensor([-1.0, -1.0]),
        chosen_length=torch.tensor([12, 10]),
        rejected_length=torch.tensor([1, 1]),
    )
    assert sft_losses(logps).tolist() == [0.5, 3.0]
    twice = -logps.chosen_mean / logps.chosen_length
    assert twice.tolist() == pytest.approx([0.5 / 12, 0.3])


def test_sft_term_does_not_shrink_when_every_token_is_repeated() -> None:
    """The same mean per token over ten times the tokens is the same term, with the same gradient in total."""
    for length in (1, 10, 100):
        token_logps = torch.full((length,), -2.0, requires_grad=True)
        total = token_logps.sum()[None]
        lengths = torch.tensor([length])
        term = sft_losses(PairLogps(total, total, lengths, lengths)).sum()
        assert term.detach().item() == 2.0
        (gradient,) = torch.autograd.grad(term, token_logps)
        assert gradient.sum().item() == pytest.approx(-1.0)
