"""Preference losses: pure, unreduced, one function each.

Every loss takes the log-probs of P pairs (`PairLogps`) and returns P losses and detached rewards (`PairLoss`).
Notation as in the papers: l = sum of log pi(y_t | x, y_<t) over the response, m = l / |y|, w = chosen, r = rejected,
M = m_w - m_r, p = exp(m). A loss never averages: the trainer divides the sum by the number of pairs in the global
batch. To add one, write the function and put it in `LOSSES`; its keyword arguments become recipe keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLoss(NamedTuple):
    """losses: [P] nats (or the loss's own unit), differentiable; rewards: [P] each, detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of P pairs under the policy, and under a frozen reference where a loss needs one.

    Attributes:
        chosen_sum, rejected_sum: [P] fp32, nats, summed over trained tokens.
        chosen_length, rejected_length: [P], trained tokens, >= 1; from the mask, never from values.
        ref_chosen_sum, ref_rejected_sum: [P] or None, the same sums under the reference model.
    """

    chosen_sum: Tensor
    rejected_sum: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    ref_chosen_sum: Tensor | None = None
    ref_rejected_sum: Tensor | None = None

    @property
    def chosen_mean(self) -> Tensor:
        """m_w [P], nats per token."""
        return self.chosen_sum / self.chosen_length

    @property
    def rejected_mean(self) -> Tensor:
        """m_r [P], nats per token."""
        return self.rejected_sum / self.rejected_length

    def reference(self) -> tuple[Tensor, Tensor]:
        """Reference sums, or a ValueError when they were not computed."""
        if self.ref_chosen_sum is None or self.ref_rejected_sum is None:
            raise ValueError("this loss needs the reference model's log-probs: ref_chosen_sum and ref_rejected_sum")
        return self.ref_chosen_sum, self.ref_rejected_sum


def simpo_loss(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    *,
    beta: float,
    gamma_beta_ratio: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> PairLoss:
    """Length-normalised preference loss, unreduced, for people with their own loop.

    Args:
        chosen_mean_logps, rejected_mean_logps: [P], nats per token.
        beta: reward scale, > 0.
        gamma_beta_ratio: target margin in nats per token, >= 0; the paper's gamma is beta * gamma_beta_ratio.
        loss_type: "sigmoid" (SimPO), "hinge" or "ipo".
        label_smoothing: in [0, 0.5); sigmoid only.
    Returns:
        PairLoss: losses [P]; rewards beta * m [P], detached.
    Raises:
        ValueError: shapes differ, an unknown loss_type, or a value out of range.
    Source: SimPO, arXiv:2405.14734, eq. 6.
    """
    if chosen_mean_logps.shape != rejected_mean_logps.shape:
        raise ValueError(
            f"one rejected for each chosen: {tuple(chosen_mean_logps.shape)} and {tuple(rejected_mean_logps.shape)}"
        )
    _check_beta(beta)
    if not gamma_beta_ratio >= 0:
        raise ValueError(f"gamma_beta_ratio must be >= 0, not {gamma_beta_ratio}")
    margin = chosen_mean_logps - rejected_mean_logps
    scores = beta * (margin - gamma_beta_ratio)
    if loss_type == "sigmoid":
        losses = _smoothed_logsigmoid(scores, label_smoothing)
    elif label_smoothing != 0.0:
        raise ValueError(f"label_smoothing is not defined for {loss_type!r}; set it to 0 or use 'sigmoid'")
    elif loss_type == "hinge":
        losses = torch.relu(1 - scores)
    elif loss_type == "ipo":
        losses = (margin - gamma_beta_ratio - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"loss_type must be 'sigmoid', 'hinge' or 'ipo', not {loss_type!r}")
    return _with_rewards(losses, beta * chosen_mean_logps, beta * rejected_mean_logps)


def sigmoid(logps: PairLogps, *, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0) -> PairLoss:
    """SimPO: -log sigmoid(beta*M - gamma). Source: arXiv:2405.14734, eq. 6."""
    return simpo_loss(
        logps.chosen_mean,
        logps.rejected_mean,
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        label_smoothing=label_smoothing,
    )


def hinge(logps: PairLogps, *, beta: float, gamma_beta_ratio: float) -> PairLoss:
    """SimPO's score in a hinge: relu(1 - z), z = beta*M - gamma."""
    return simpo_loss(
        logps.chosen_mean,
        logps.rejected_mean,
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        loss_type="hinge",
    )


def ipo(logps: PairLogps, *, beta: float, gamma_beta_ratio: float) -> PairLoss:
    """Squared distance of the margin from its target: (M - ratio - 1/(2*beta))^2. Source: arXiv:2310.12036, eq. 17."""
    return simpo_loss(
        logps.chosen_mean, logps.rejected_mean, beta=beta, gamma_beta_ratio=gamma_beta_ratio, loss_type="ipo"
    )


def cpo(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> PairLoss:
    """-log sigmoid(beta*(l_w - l_r)), not length-normalised. Source: CPO, arXiv:2401.08417 (its preference term)."""
    _check_beta(beta)
    losses = _smoothed_logsigmoid(beta * (logps.chosen_sum - logps.rejected_sum), label_smoothing)
    return _with_rewards(losses, beta * logps.chosen_sum, beta * logps.rejected_sum)


def orpo(logps: PairLogps, *, orpo_lambda: float) -> PairLoss:
    """-m_w - lambda*log sigmoid(log odds_w - log odds_r), odds = p/(1-p). Source: arXiv:2403.07691, eq. 6-7.

    log(1-p) through log1mexp, so that probabilities near 1 keep their digits.
    """
    chosen, rejected = logps.chosen_mean, logps.rejected_mean
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    losses = -chosen - orpo_lambda * F.logsigmoid(log_odds)
    return _with_rewards(losses, orpo_lambda * chosen, orpo_lambda * rejected)


def alphapo(logps: PairLogps, *, beta: float, gamma_beta_ratio: float, alphapo_alpha: float) -> PairLoss:
    """Reward R = beta*(1 - p^-alpha)/alpha, loss -log sigmoid(R_w - R_r - gamma). Source: arXiv:2501.03884.

    alpha -> 0 gives SimPO; alpha = 0 is taken as that limit.
    """
    _check_beta(beta)

    def reward(mean_logps: Tensor) -> Tensor:
        if alphapo_alpha == 0.0:
            return beta * mean_logps
        return -beta * torch.expm1(-alphapo_alpha * mean_logps) / alphapo_alpha

    chosen, rejected = reward(logps.chosen_mean), reward(logps.rejected_mean)
    return _with_rewards(-F.logsigmoid(chosen - rejected - beta * gamma_beta_ratio), chosen, rejected)


def repo(logps: PairLogps, *, gamma_beta_ratio: float) -> PairLoss:
    """relu(gamma' - M): SimPO divided by beta as beta -> infinity at fixed ratio. Source: arXiv:2503.07426."""
    losses = torch.relu(gamma_beta_ratio - (logps.chosen_mean - logps.rejected_mean))
    return _with_rewards(losses, logps.chosen_mean, logps.rejected_mean)


def simper(logps: PairLogps) -> PairLoss:
    """-p_w + p_r, inverse perplexities; no hyperparameters. Source: SimPER, arXiv:2502.00883."""
    chosen, rejected = logps.chosen_mean.exp(), logps.rejected_mean.exp()
    return _with_rewards(rejected - chosen, chosen, rejected)


def slic(logps: PairLogps, *, slic_delta: float) -> PairLoss:
    """relu(delta - l_w + l_r). Source: SLiC-HF, arXiv:2305.10425 (its calibration term)."""
    losses = torch.relu(slic_delta - logps.chosen_sum + logps.rejected_sum)
    return _with_rewards(losses, logps.chosen_sum, logps.rejected_sum)


def rrhf(logps: PairLogps) -> PairLoss:
    """relu(-M). Source: RRHF, arXiv:2304.05302 (its ranking term, two responses)."""
    losses = torch.relu(logps.rejected_mean - logps.chosen_mean)
    return _with_rewards(losses, logps.chosen_mean, logps.rejected_mean)


def dpo(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> PairLoss:
    """-log sigmoid(beta*D), D = (l_w - l_w^ref) - (l_r - l_r^ref). Source: DPO, arXiv:2305.18290, eq. 7."""
    _check_beta(beta)
    ref_chosen, ref_rejected = logps.reference()
    chosen, rejected = beta * (logps.chosen_sum - ref_chosen), beta * (logps.rejected_sum - ref_rejected)
    return _with_rewards(_smoothed_logsigmoid(chosen - rejected, label_smoothing), chosen, rejected)


def dpo_norm(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> PairLoss:
    """DPO with each side's log-ratio divided by its length. Source: arXiv:2405.14734 (length-normalised DPO)."""
    _check_beta(beta)
    ref_chosen, ref_rejected = logps.reference()
    chosen = beta * (logps.chosen_sum - ref_chosen) / logps.chosen_length
    rejected = beta * (logps.rejected_sum - ref_rejected) / logps.rejected_length
    return _with_rewards(_smoothed_logsigmoid(chosen - rejected, label_smoothing), chosen, rejected)


LOSSES: dict[str, Callable[..., PairLoss]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "cpo": cpo,
    "cpo_simpo": sigmoid,  # SimPO whose SFT term is on by default; the term itself is added by the trainer
    "orpo": orpo,
    "alphapo": alphapo,
    "repo": repo,
    "simper": simper,
    "slic": slic,
    "rrhf": rrhf,
    "dpo": dpo,
    "dpo_norm": dpo_norm,
}


def loss_options(loss_type: str) -> tuple[str, ...]:
    """Names of the keyword arguments that a loss takes."""
    parameters = inspect.signature(LOSSES[loss_type]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def sft_losses(logps: PairLogps) -> Tensor:
    """-m_w per pair [P], nats per token: the chosen response's mean negative log-likelihood.

    Multiply by the SFT weight and add to a preference loss. Its mean over pairs does not depend on batching.
    """
    return -logps.chosen_mean


def _smoothed_logsigmoid(scores: Tensor, label_smoothing: float) -> Tensor:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z): a label is wrong with probability e."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    losses = -(1 - label_smoothing) * F.logsigmoid(scores)
    if label_smoothing:
        losses = losses - label_smoothing * F.logsigmoid(-scores)
    return losses


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, accurate at both ends (Maechler 2012); x = 0 is nudged below 0 to stay finite."""
    x = torch.clamp(x, max=-torch.finfo(x.dtype).tiny)
    near_zero = x > -0.6931471805599453
    # Each branch sees only arguments it is accurate for, so that neither leaks a NaN into the other's gradient.
    small = torch.log(-torch.expm1(torch.where(near_zero, x, torch.full_like(x, -0.5))))
    large = torch.log1p(-torch.exp(torch.where(near_zero, torch.full_like(x, -1.0), x)))
    return torch.where(near_zero, small, large)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be > 0, not {beta}")


def _with_rewards(losses: Tensor, chosen: Tensor, rejected: Tensor) -> PairLoss:
    return PairLoss(losses, chosen.detach(), rejected.detach())
