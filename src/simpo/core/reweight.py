"""What is done to any preference loss from outside: weights of pairs, and scales of the gradients of their two sides.

Pure, and of each pair for itself, so that an update does not depend on how pairs are batched. Torch only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from simpo.core.losses import Loss, PairLogps, PairLoss


def wpo_weights(logps: PairLogps) -> Tensor:
    """w_w * w_r of each pair, at most 1, detached [P]: how likely the model is to answer so itself.

    w = exp(mean_t[log pi(y_t) - log sum_v pi(v)^2]). Multiply a preference loss by them. Needs the extra "squares".
    Source: WPO, arXiv:2406.11827; the limit of 1 is its authors' code's.
    """
    chosen, rejected = logps.extra("log_squares")
    log_weights = (logps.chosen_sum - chosen) / logps.chosen_length
    log_weights = log_weights + (logps.rejected_sum - rejected) / logps.rejected_length
    return log_weights.detach().clamp(max=0.0).exp()


CALIBRATION_LIMIT = 10.0
"""By how much `calibrated` scales a gradient at most: a response of which the model is certain has none to scale."""


def calibrated(loss: Loss, logps: PairLogps, **options: Any) -> PairLoss:
    """The same losses with the gradients of the two sides in balance, so that chosen responses need not fall (RC).

    With d the size of a loss's gradient with respect to l and |s| that of l's own gradient, of each side: l_w rises and
    l_r falls in a small step where d_w/d_r lies in a band around |s_r|/|s_w|, the wider the less alike the sides are.
    The chosen side's gradient is multiplied by delta and the rejected side's divided by it, which brings d_w/d_r to the
    middle: delta^2 = (d_r |s_r|) / (d_w |s_w|). |s| is the norm with respect to the logits, of each pair for itself.

    Args:
        logps: with the extra "squares".
        options: of the loss.
    Source: RC, arXiv:2604.18239, whose code has |s| with respect to the head's weights, as a moving average over steps:
        that would depend on how pairs are batched.
    """
    with torch.enable_grad():
        leaves = {name: getattr(logps, name).detach().requires_grad_() for name in ("chosen_sum", "rejected_sum")}
        sizes = torch.autograd.grad(loss(replace(logps, **leaves), **options).losses.sum(), tuple(leaves.values()))
    chosen, rejected = (d.abs() * pull.sqrt() for d, pull in zip(sizes, logps.extra("pull"), strict=True))
    delta = (rejected / chosen).sqrt().clamp(1 / CALIBRATION_LIMIT, CALIBRATION_LIMIT)
    delta = torch.where((chosen > 0) & (rejected > 0), delta, 1.0)
    sums = {"chosen_sum": _scale_gradient(logps.chosen_sum, delta)}
    sums["rejected_sum"] = _scale_gradient(logps.rejected_sum, 1 / delta)
    return loss(replace(logps, **sums), **options)


def _scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x to the bit, with its gradient multiplied by a factor."""
    return x.detach() + factor * (x - x.detach())
