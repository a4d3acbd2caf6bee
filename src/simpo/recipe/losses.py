"""What each loss reads from the recipe: one table, used by the recipe, the command line and the documentation.

Owns names, defaults, equations in text and the value at zero margin. The tensor code is in `core/losses.py`.
Imports nothing but the standard library.

Notation: l is a response's summed log-prob, m = l / |y| its mean per token, p = exp(m); w is chosen, r rejected;
M = m_w - m_r; D is (l_w - l_r) minus the same difference under the reference model; z = beta * (M - gamma_beta_ratio).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ZeroMargin:
    """The numbers a loss's value at zero margin may depend on; gamma = beta * gamma_beta_ratio."""

    beta: float
    gamma_beta_ratio: float
    label_smoothing: float
    orpo_lambda: float
    slic_delta: float

    @property
    def gamma(self) -> float:
        return self.beta * self.gamma_beta_ratio


@dataclass(frozen=True, slots=True)
class LossOptions:
    """One loss as the recipe sees it.

    Attributes:
        keys: the loss keys it reads, of LOSS_KEYS; `sft_weight` and `sft_reduction` are read by every loss.
        beta, gamma_beta_ratio: defaults; None where the loss does not read the key.
        sft_weight: default weight of the added term -m_w.
        needs_reference: True when log-probs of a reference model enter the loss.
        equation: one line of text.
        source: arXiv id, or where the loss was published.
        zero_margin: pair loss in nats when both responses have the same (mean, for cpo and slic summed) log-prob.
        zero_margin_note: what that number leaves out, or "".
    """

    keys: tuple[str, ...]
    beta: float | None
    gamma_beta_ratio: float | None
    sft_weight: float
    needs_reference: bool
    equation: str
    source: str
    zero_margin: Callable[[ZeroMargin], float]
    zero_margin_note: str = ""


LOSS_KEYS = ("beta", "gamma_beta_ratio", "label_smoothing", "orpo_lambda", "alphapo_alpha", "slic_delta")
"""Keys whose meaning depends on the loss."""


def softplus(x: float) -> float:
    """log(1 + exp(x)), without overflow; x in nats."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _smoothed_at(z: float, label_smoothing: float) -> float:
    return (1 - label_smoothing) * softplus(-z) + label_smoothing * softplus(z)


def _simpo_zero(at: ZeroMargin) -> float:
    return _smoothed_at(-at.gamma, at.label_smoothing)


def _hinge_zero(at: ZeroMargin) -> float:
    return 1.0 + at.gamma


def _ipo_zero(at: ZeroMargin) -> float:
    return (at.gamma_beta_ratio + 1 / (2 * at.beta)) ** 2


def _log2(at: ZeroMargin) -> float:
    return math.log(2.0)


_SIMPO_KEYS = ("beta", "gamma_beta_ratio", "label_smoothing")
_SIMPO_EQUATION = "-log sigmoid(z)"

LOSS_OPTIONS: dict[str, LossOptions] = {
    "sigmoid": LossOptions(_SIMPO_KEYS, 2.0, 0.5, 0.0, False, _SIMPO_EQUATION, "SimPO, arXiv:2405.14734", _simpo_zero),
    "hinge": LossOptions(
        _SIMPO_KEYS[:2], 2.0, 0.5, 0.0, False, "relu(1 - z)", "SimPO trainer, arXiv:2405.14734", _hinge_zero
    ),
    "ipo": LossOptions(
        _SIMPO_KEYS[:2],
        2.0,
        0.5,
        0.0,
        False,
        "(M - gamma_beta_ratio - 1/(2 beta))^2",
        "IPO, arXiv:2310.12036, on SimPO's margin",
        _ipo_zero,
    ),
    "cpo": LossOptions(
        ("beta", "label_smoothing"),
        0.1,
        None,
        1.0,
        False,
        "-log sigmoid(beta (l_w - l_r)) + sft",
        "CPO, arXiv:2401.08417",
        _log2,
    ),
    "cpo_simpo": LossOptions(
        _SIMPO_KEYS, 2.0, 0.5, 1.0, False, "-log sigmoid(z) + sft", "github: fe1ixxu/CPO_SIMPO", _simpo_zero
    ),
    "orpo": LossOptions(
        ("orpo_lambda",),
        None,
        None,
        0.0,
        False,
        "-m_w - orpo_lambda log sigmoid(log(p_w/(1-p_w)) - log(p_r/(1-p_r)))",
        "ORPO, arXiv:2403.07691",
        lambda at: at.orpo_lambda * math.log(2.0),
        "pair term only; its own term -m_w depends on the model",
    ),
    "alphapo": LossOptions(
        ("beta", "gamma_beta_ratio", "alphapo_alpha"),
        2.0,
        0.5,
        0.0,
        False,
        "-log sigmoid(R_w - R_r - gamma), R = beta (1 - p^(-alpha))/alpha",
        "AlphaPO, arXiv:2501.03884",
        lambda at: softplus(at.gamma),
    ),
    "repo": LossOptions(
        ("gamma_beta_ratio",),
        None,
        0.5,
        0.0,
        False,
        "relu(gamma_beta_ratio - M)",
        "RePO, arXiv:2503.07426",
        lambda at: at.gamma_beta_ratio,
    ),
    "simper": LossOptions((), None, None, 0.0, False, "p_r - p_w", "SimPER, arXiv:2502.00883", lambda at: 0.0),
    "slic": LossOptions(
        ("slic_delta",),
        None,
        None,
        1.0,
        False,
        "relu(slic_delta - l_w + l_r) + sft",
        "SLiC-HF, arXiv:2305.10425",
        lambda at: at.slic_delta,
    ),
    "rrhf": LossOptions((), None, None, 1.0, False, "relu(-M) + sft", "RRHF, arXiv:2304.05302", lambda at: 0.0),
    "dpo": LossOptions(
        ("beta", "label_smoothing"),
        0.1,
        None,
        0.0,
        True,
        "-log sigmoid(beta D)",
        "DPO, arXiv:2305.18290",
        _log2,
    ),
    "dpo_norm": LossOptions(
        ("beta", "label_smoothing"),
        2.0,
        None,
        0.0,
        True,
        "-log sigmoid(beta D), each side of D divided by its |y|",
        "SimPO, arXiv:2405.14734 (length-normalised DPO)",
        _log2,
    ),
}
"""Every `loss_type`, in the order the documentation lists them."""


def losses_reading(key: str) -> list[str]:
    """The losses that read `key`, for error messages."""
    return [name for name, options in LOSS_OPTIONS.items() if key in options.keys]
