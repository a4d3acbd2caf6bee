"""Trap 16: a pair's loss multiplied by its tokens, so that long pairs dominate. Here each pair weighs one."""

from __future__ import annotations

import pytest
import torch

from simpo.core.losses import LOSSES, PairLogps
from simpo.run.metrics import PAIR_METRICS, Totals, pair_metric_sums


def two_pairs(factor: int) -> PairLogps:
    """Two pairs with the same means per token; the second has `factor` times the tokens of the first."""
    lengths = torch.tensor([5, 5 * factor])
    means = torch.tensor([[-1.0, -1.0], [-1.4, -1.4]])
    sums = (means * lengths).requires_grad_()
    return PairLogps(sums[0], sums[1], lengths, lengths)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "orpo", "alphapo", "repo", "simper", "rrhf"])
def test_a_pair_of_many_tokens_weighs_as_much_as_a_short_one(loss_type: str) -> None:
    values = {"beta": 2.0, "gamma_beta_ratio": 0.5, "orpo_lambda": 1.0, "alphapo_alpha": 0.25}
    options = {key: value for key, value in values.items() if key in LOSSES[loss_type].defaults}
    logps = two_pairs(40)
    loss = LOSSES[loss_type](logps, **options)
    short, long = loss.losses.tolist()
    assert long == pytest.approx(short, rel=1e-6)
    meter = Totals()
    meter.add(pair_metric_sums(logps, loss, loss.losses), 2)
    assert meter.means()["loss"] == pytest.approx(short, rel=1e-6)
    by_tokens = loss.losses.detach() * (logps.chosen_length + logps.rejected_length)
    assert by_tokens[1] / by_tokens[0] == pytest.approx(40) or short == pytest.approx(0)


def test_every_metric_is_a_mean_over_pairs_and_not_over_tokens() -> None:
    lengths = torch.tensor([1, 99])
    logps = PairLogps(torch.tensor([-4.0, -99.0]), torch.tensor([-2.0, -297.0]), lengths, lengths)
    loss = LOSSES["sigmoid"](logps, beta=2.0, gamma_beta_ratio=0.5)
    meter = Totals()
    meter.add(pair_metric_sums(logps, loss, loss.losses), 2)
    means = meter.means()
    assert list(means) == list(PAIR_METRICS)
    assert means["logps/chosen"] == pytest.approx((-4 - 1) / 2)  # over tokens it would be -1.03
    assert means["logps/rejected"] == pytest.approx((-2 - 3) / 2)
    assert means["rewards/margins"] == pytest.approx(2.0 * (-2 + 2) / 2)
    assert means["rewards/accuracies"] == 0.5
    assert means["sft_loss"] == pytest.approx(2.5)
