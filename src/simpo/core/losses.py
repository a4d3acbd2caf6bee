"""Preference losses: pure, unreduced, one function each, with everything that is said of a loss in its declaration.

Every loss takes the log-probs of P pairs (`PairLogps`) and returns P losses and detached rewards (`PairLoss`).
Notation as in the papers: l = sum of log pi(y_t | x, y_<t) over the response, m = l / |y|, w = chosen, r = rejected,
M = m_w - m_r, p = exp(m), z = beta * (M - gamma_beta_ratio); D is l_w - l_r minus the same under the reference model. A
loss never averages: the trainer divides the sum by the number of pairs in the global batch.

To add a loss, write its function here under `@declare(...)`. Its keyword-only arguments are recipe keys and their
defaults the loss's own; a key that no other loss has is described there too. Nothing else is to be edited: recipe,
command line, documentation and every host read the declaration. They do so without torch, which is imported only where
a loss is computed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class PairLoss(NamedTuple):
    """losses: [P] nats (or the loss's own unit), differentiable; rewards: [P] each, detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class ListLogps(NamedTuple):
    """Sums and lengths [S] of all responses of P lists: chosen, others, rejected, chosen, ...; and how many each."""

    sums: Tensor
    lengths: Tensor
    sizes: tuple[int, ...]


class NeedsReference(ValueError):
    """Log-probs of a reference model were asked for and had not been computed."""


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of P pairs under the policy, and under a frozen reference where a loss needs one.

    Attributes:
        chosen_sum, rejected_sum: [P] fp32, nats, summed over trained tokens.
        chosen_length, rejected_length: [P], trained tokens, >= 1; from the mask, never from values.
        ref_chosen_sum, ref_rejected_sum: [P] or None, the same sums under the reference model.
        router_loss: [P] or None, what is added to each pair's loss for its use of experts.
        chosen_extras, rejected_extras: [P] by name, those of `EXTRAS` that were asked for.
        lists, scores: all responses, of which chosen is the best and rejected the worst, and [S] what they scored; for
            losses of lists.
    """

    chosen_sum: Tensor
    rejected_sum: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    ref_chosen_sum: Tensor | None = None
    ref_rejected_sum: Tensor | None = None
    router_loss: Tensor | None = None
    chosen_extras: Mapping[str, Tensor] = field(default_factory=dict)
    rejected_extras: Mapping[str, Tensor] = field(default_factory=dict)
    lists: ListLogps | None = None
    scores: Tensor | None = None

    @property
    def chosen_mean(self) -> Tensor:
        """m_w [P], nats per token."""
        return self.chosen_sum / self.chosen_length

    @property
    def rejected_mean(self) -> Tensor:
        """m_r [P], nats per token."""
        return self.rejected_sum / self.rejected_length

    def reference(self) -> tuple[Tensor, Tensor]:
        """Reference sums, or NeedsReference, a ValueError, when they were not computed."""
        if self.ref_chosen_sum is None or self.ref_rejected_sum is None:
            raise NeedsReference("this loss needs the reference model's log-probs: ref_chosen_sum and ref_rejected_sum")
        return self.ref_chosen_sum, self.ref_rejected_sum

    def listed(self) -> tuple[Tensor, Tensor, Tensor]:
        """m and scores of all responses, and which are there, [P, most]; ValueError where a score is missing."""
        if self.lists is None or self.scores is None:
            raise ValueError("this loss needs all responses of each list and their scores")
        from torch.nn.utils.rnn import pad_sequence

        sums, lengths, sizes = self.lists
        columns = (sums / lengths, self.scores, lengths > 0)
        means, scores, there = (pad_sequence(list(each.split(sizes)), batch_first=True) for each in columns)
        return means, scores, there

    def extra(self, name: str) -> tuple[Tensor, Tensor]:
        """One of `EXTRAS`, of chosen and rejected; ValueError where it was not computed."""
        if name not in self.chosen_extras:
            raise ValueError(f"this needs {name!r} of each response; compute log-probs with extras {EXTRAS[name]!r}")
        return self.chosen_extras[name], self.rejected_extras[name]


EXTRAS = {"low_sum": "low", "low_length": "low", "log_squares": "squares", "pull": "squares"}
"""What is known of a response besides its log-prob, where it is asked for, and what is to be asked for.

Over its tokens at most as probable as its tokens are on average: low_sum, the sum of their log-probs, and low_length,
their number. Over all its trained tokens, without a gradient: log_squares, the sum of log sum_v pi(v)^2, and pull, that
of |onehot(y_t) - pi|^2, which is the squared norm of the gradient of l with respect to the logits.
"""

GENERAL_KEYS = ("beta", "gamma_beta_ratio", "label_smoothing")
"""Loss keys that several losses read; `recipe.keys` describes them."""


@dataclass(frozen=True)
class LossKey:
    """A recipe key that one loss alone reads; its default and type are the argument's.

    Attributes:
        meaning: a sentence, for `simpo keys`.
        ge, gt, le, lt: bounds of a number.
    """

    meaning: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        return {name: bound for name in ("ge", "gt", "le", "lt") if (bound := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Loss:
    """One loss, and all that the recipe, the command line and the trainers know of it.

    Attributes:
        name: its `loss_type`.
        function: PairLogps and keyword arguments -> PairLoss.
        defaults: each keyword argument and its default. These are the recipe keys that the loss reads; sft_weight and
            sft_reduction act on every loss.
        equation, source: one line of text each; the source is an arXiv id, or where the loss was published.
        at_zero_margin: the same keyword arguments -> pair loss in nats when both responses have the same log-prob (per
            token; summed for cpo, cpo_hinge and slic).
        zero_margin_note: what that number leaves out, or "".
        sft_weight: default weight of the added term -m_w.
        needs_reference: whether log-probs of a reference model enter it.
        extras: what is to be asked for of `EXTRAS`.
        is_of_lists: whether it reads all responses to a prompt, with their scores.
        own_keys: those of its keys that no other loss has.
    """

    name: str
    function: Callable[..., PairLoss]
    defaults: Mapping[str, Any]
    equation: str
    source: str
    at_zero_margin: Callable[..., float]
    zero_margin_note: str = ""
    sft_weight: float = 0.0
    needs_reference: bool = False
    extras: frozenset[str] = frozenset()
    is_of_lists: bool = False
    own_keys: Mapping[str, LossKey] = field(default_factory=dict)

    def __call__(self, logps: PairLogps, **options: Any) -> PairLoss:
        """The loss of each pair. Raises ValueError for a beta that is not positive."""
        if not options.get("beta", 1.0) > 0:
            raise ValueError(f"beta must be > 0, not {options['beta']}")
        return self.function(logps, **options)


LOSSES: dict[str, Loss] = {}
"""Every `loss_type` that has a name, in the order the documentation lists them."""


def declare(
    equation: str, source: str, *, name: str = "", own_keys: Mapping[str, LossKey] | None = None, **rest: Any
) -> Callable[[Callable[..., PairLoss]], Callable[..., PairLoss]]:
    """Enter a function into LOSSES, under its own name or `name`; the rest as in `Loss`.

    Raises:
        TypeError: the declaration and the function do not say the same.
    """

    def enter(function: Callable[..., PairLoss]) -> Callable[..., PairLoss]:
        defaults = keyword_defaults(function)
        own = dict(own_keys or {})
        loss = Loss(name or function.__name__, function, defaults, equation, source, own_keys=own, **rest)
        undeclared = [key for key in defaults if key not in (*GENERAL_KEYS, *own)]
        without = [key for key, default in defaults.items() if default is inspect.Parameter.empty]
        taken = [key for key in own for other in LOSSES.values() if key in other.own_keys]
        for wrong, problem in (
            (undeclared, f"not in own_keys, and not one of {', '.join(GENERAL_KEYS)}"),
            (without, "no default"),
            ([key for key in own if key not in defaults], "in own_keys, but not a keyword-only argument"),
            (taken, "the key of another loss already"),
            ([loss.name] * (loss.name in LOSSES), "the name of another loss already"),
        ):
            if wrong:
                raise TypeError(f"loss {loss.name}: {', '.join(wrong)}: {problem}")
        loss.at_zero_margin(**defaults)  # takes the same arguments
        LOSSES[loss.name] = loss
        return function

    return enter


def loss_keys() -> tuple[str, ...]:
    """Keys that some losses read and others do not; sft_weight and sft_reduction act on every loss."""
    return (*GENERAL_KEYS, *(name for loss in LOSSES.values() for name in loss.own_keys))


def losses_reading(key: str) -> list[str]:
    """The losses that read a key."""
    return [name for name, loss in LOSSES.items() if key in loss.defaults]


def keyword_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only arguments of a function and their defaults (`inspect.Parameter.empty` for none)."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def softplus(x: float) -> float:
    """log(1 + exp(x)), without overflow; x in nats."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _simpo_at_zero(beta: float, gamma_beta_ratio: float, label_smoothing: float) -> float:
    gamma = beta * gamma_beta_ratio
    return (1 - label_smoothing) * softplus(gamma) + label_smoothing * softplus(-gamma)


def _log_2(**options: float) -> float:
    return math.log(2.0)


@declare("-log sigmoid(z)", "SimPO, arXiv:2405.14734", at_zero_margin=_simpo_at_zero)
def sigmoid(
    logps: PairLogps, *, beta: float = 2.0, gamma_beta_ratio: float = 0.5, label_smoothing: float = 0.0
) -> PairLoss:
    """SimPO: -log sigmoid(beta*M - gamma). Source: arXiv:2405.14734, eq. 6."""
    chosen, rejected = logps.chosen_mean, logps.rejected_mean
    scores = beta * (chosen - rejected - gamma_beta_ratio)
    return _with_rewards(_smoothed_logsigmoid(scores, label_smoothing), beta * chosen, beta * rejected)


@declare(
    "relu(1 - z)",
    "SimPO trainer, arXiv:2405.14734",
    at_zero_margin=lambda beta, gamma_beta_ratio: 1.0 + beta * gamma_beta_ratio,
)
def hinge(logps: PairLogps, *, beta: float = 2.0, gamma_beta_ratio: float = 0.5) -> PairLoss:
    """SimPO's score in a hinge: relu(1 - z), z = beta*M - gamma."""
    chosen, rejected = logps.chosen_mean, logps.rejected_mean
    scores = beta * (chosen - rejected - gamma_beta_ratio)
    return _with_rewards((1 - scores).relu(), beta * chosen, beta * rejected)


@declare(
    "(M - gamma_beta_ratio - 1/(2 beta))^2",
    "IPO, arXiv:2310.12036, on SimPO's margin",
    at_zero_margin=lambda beta, gamma_beta_ratio: (gamma_beta_ratio + 1 / (2 * beta)) ** 2,
)
def ipo(logps: PairLogps, *, beta: float = 2.0, gamma_beta_ratio: float = 0.5) -> PairLoss:
    """Squared distance of the margin from its target: (M - ratio - 1/(2*beta))^2. Source: arXiv:2310.12036, eq. 17."""
    chosen, rejected = logps.chosen_mean, logps.rejected_mean
    losses = (chosen - rejected - gamma_beta_ratio - 1 / (2 * beta)) ** 2
    return _with_rewards(losses, beta * chosen, beta * rejected)


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
    if not gamma_beta_ratio >= 0:
        raise ValueError(f"gamma_beta_ratio must be >= 0, not {gamma_beta_ratio}")
    if loss_type not in ("sigmoid", "hinge", "ipo"):
        raise ValueError(f"loss_type must be 'sigmoid', 'hinge' or 'ipo', not {loss_type!r}")
    options = {"beta": beta, "gamma_beta_ratio": gamma_beta_ratio}
    if loss_type == "sigmoid":
        options["label_smoothing"] = label_smoothing
    elif label_smoothing != 0.0:
        raise ValueError(f"label_smoothing is not defined for {loss_type!r}; set it to 0 or use 'sigmoid'")
    one = chosen_mean_logps.new_ones(())  # a sum over one token is its mean
    return LOSSES[loss_type](PairLogps(chosen_mean_logps, rejected_mean_logps, one, one), **options)


@declare("-log sigmoid(beta (l_w - l_r)) + sft", "CPO, arXiv:2401.08417", at_zero_margin=_log_2, sft_weight=1.0)
def cpo(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> PairLoss:
    """-log sigmoid(beta*(l_w - l_r)), not length-normalised. Source: CPO, arXiv:2401.08417 (its preference term)."""
    losses = _smoothed_logsigmoid(beta * (logps.chosen_sum - logps.rejected_sum), label_smoothing)
    return _with_rewards(losses, beta * logps.chosen_sum, beta * logps.rejected_sum)


@declare(
    "relu(1 - beta (l_w - l_r)) + sft",
    "TRL's CPOTrainer; with beta 1, SLiC-HF, arXiv:2305.10425",
    at_zero_margin=lambda beta: 1.0,
    sft_weight=1.0,
)
def cpo_hinge(logps: PairLogps, *, beta: float = 0.1) -> PairLoss:
    """relu(1 - beta*(l_w - l_r)), not length-normalised: cpo's score in a hinge, as TRL's CPOTrainer has it."""
    losses = (1 - beta * (logps.chosen_sum - logps.rejected_sum)).relu()
    return _with_rewards(losses, beta * logps.chosen_sum, beta * logps.rejected_sum)


# SimPO whose SFT term is on by default; the term itself is added by the trainer.
declare(
    "-log sigmoid(z) + sft",
    "github: fe1ixxu/CPO_SIMPO",
    name="cpo_simpo",
    at_zero_margin=_simpo_at_zero,
    sft_weight=1.0,
)(sigmoid)


@declare(
    "-m_w - orpo_lambda log sigmoid(log(p_w/(1-p_w)) - log(p_r/(1-p_r)))",
    "ORPO, arXiv:2403.07691",
    own_keys={"orpo_lambda": LossKey("Weight of the odds-ratio term of orpo.", ge=0)},
    at_zero_margin=lambda orpo_lambda: orpo_lambda * math.log(2.0),
    zero_margin_note="pair term only; its own term -m_w depends on the model",
)
def orpo(logps: PairLogps, *, orpo_lambda: float = 0.1) -> PairLoss:
    """-m_w - lambda*log sigmoid(log odds_w - log odds_r), odds = p/(1-p). Source: arXiv:2403.07691, eq. 6-7.

    log(1-p) through log1mexp, so that probabilities near 1 keep their digits.
    """
    chosen, rejected = logps.chosen_mean, logps.rejected_mean
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    losses = -chosen - orpo_lambda * _logsigmoid(log_odds)
    return _with_rewards(losses, orpo_lambda * chosen, orpo_lambda * rejected)


@declare(
    "-log sigmoid(R_w - R_r - gamma), R = beta (1 - p^(-alpha))/alpha",
    "AlphaPO, arXiv:2501.03884",
    own_keys={"alphapo_alpha": LossKey("Shape of the reward of alphapo; 0 is SimPO.")},
    at_zero_margin=lambda beta, gamma_beta_ratio, alphapo_alpha: softplus(beta * gamma_beta_ratio),
)
def alphapo(
    logps: PairLogps, *, beta: float = 2.0, gamma_beta_ratio: float = 0.5, alphapo_alpha: float = 0.25
) -> PairLoss:
    """Reward R = beta*(1 - p^-alpha)/alpha, loss -log sigmoid(R_w - R_r - gamma). Source: arXiv:2501.03884.

    alpha -> 0 gives SimPO; alpha = 0 is taken as that limit.
    """

    def reward(mean_logps: Tensor) -> Tensor:
        if alphapo_alpha == 0.0:
            return beta * mean_logps
        return -beta * (-alphapo_alpha * mean_logps).expm1() / alphapo_alpha

    chosen, rejected = reward(logps.chosen_mean), reward(logps.rejected_mean)
    return _with_rewards(-_logsigmoid(chosen - rejected - beta * gamma_beta_ratio), chosen, rejected)


@declare(
    "relu(gamma_beta_ratio - M)",
    "RePO, arXiv:2503.07426",
    at_zero_margin=lambda gamma_beta_ratio: gamma_beta_ratio,
)
def repo(logps: PairLogps, *, gamma_beta_ratio: float = 0.5) -> PairLoss:
    """relu(gamma' - M): SimPO divided by beta as beta -> infinity at fixed ratio. Source: arXiv:2503.07426."""
    losses = (gamma_beta_ratio - (logps.chosen_mean - logps.rejected_mean)).relu()
    return _with_rewards(losses, logps.chosen_mean, logps.rejected_mean)


@declare("p_r - p_w", "SimPER, arXiv:2502.00883", at_zero_margin=lambda: 0.0)
def simper(logps: PairLogps) -> PairLoss:
    """-p_w + p_r, inverse perplexities; no hyperparameters. Source: SimPER, arXiv:2502.00883."""
    chosen, rejected = logps.chosen_mean.exp(), logps.rejected_mean.exp()
    return _with_rewards(rejected - chosen, chosen, rejected)


@declare(
    "relu(slic_delta - l_w + l_r) + sft",
    "SLiC-HF, arXiv:2305.10425",
    own_keys={"slic_delta": LossKey("Margin of slic, in nats per response.", ge=0)},
    at_zero_margin=lambda slic_delta: slic_delta,
    sft_weight=1.0,
)
def slic(logps: PairLogps, *, slic_delta: float = 1.0) -> PairLoss:
    """relu(delta - l_w + l_r). Source: SLiC-HF, arXiv:2305.10425 (its calibration term)."""
    losses = (slic_delta - logps.chosen_sum + logps.rejected_sum).relu()
    return _with_rewards(losses, logps.chosen_sum, logps.rejected_sum)


@declare("relu(-M) + sft", "RRHF, arXiv:2304.05302", at_zero_margin=lambda: 0.0, sft_weight=1.0)
def rrhf(logps: PairLogps) -> PairLoss:
    """relu(-M). Source: RRHF, arXiv:2304.05302 (its ranking term, two responses)."""
    losses = (logps.rejected_mean - logps.chosen_mean).relu()
    return _with_rewards(losses, logps.chosen_mean, logps.rejected_mean)


@declare(
    "-log sigmoid(z), m over the tokens at most as probable as their response's mean",
    "ConfPO, arXiv:2506.08712",
    at_zero_margin=_simpo_at_zero,
    zero_margin_note="margin of those tokens",
    extras=frozenset({"low"}),
)
def confpo(
    logps: PairLogps, *, beta: float = 2.0, gamma_beta_ratio: float = 0.5, label_smoothing: float = 0.0
) -> PairLoss:
    """SimPO on the tokens that the model is less sure of than of the response's average token.

    Which these are has no gradient; they are one of each response at least. Source: ConfPO, arXiv:2506.08712.
    """
    (chosen, rejected), (chosen_length, rejected_length) = logps.extra("low_sum"), logps.extra("low_length")
    chosen, rejected = chosen / chosen_length, rejected / rejected_length
    scores = beta * (chosen - rejected - gamma_beta_ratio)
    return _with_rewards(_smoothed_logsigmoid(scores, label_smoothing), beta * chosen, beta * rejected)


@declare("-log sigmoid(beta D)", "DPO, arXiv:2305.18290", at_zero_margin=_log_2, needs_reference=True)
def dpo(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> PairLoss:
    """-log sigmoid(beta*D), D = (l_w - l_w^ref) - (l_r - l_r^ref). Source: DPO, arXiv:2305.18290, eq. 7."""
    ref_chosen, ref_rejected = logps.reference()
    chosen, rejected = beta * (logps.chosen_sum - ref_chosen), beta * (logps.rejected_sum - ref_rejected)
    return _with_rewards(_smoothed_logsigmoid(chosen - rejected, label_smoothing), chosen, rejected)


@declare(
    "-log sigmoid(beta D), each side of D divided by its |y|",
    "SimPO, arXiv:2405.14734 (length-normalised DPO)",
    at_zero_margin=_log_2,
    needs_reference=True,
)
def dpo_norm(logps: PairLogps, *, beta: float = 2.0, label_smoothing: float = 0.0) -> PairLoss:
    """DPO with each side's log-ratio divided by its length. Source: arXiv:2405.14734 (length-normalised DPO)."""
    ref_chosen, ref_rejected = logps.reference()
    chosen = beta * (logps.chosen_sum - ref_chosen) / logps.chosen_length
    rejected = beta * (logps.rejected_sum - ref_rejected) / logps.rejected_length
    return _with_rewards(_smoothed_logsigmoid(chosen - rejected, label_smoothing), chosen, rejected)


@declare(
    "-log sigmoid(beta D + r_dpo_alpha (|y_w| - |y_r|))",
    "R-DPO, arXiv:2403.19159",
    own_keys={"r_dpo_alpha": LossKey("Price of a token of r_dpo, in rewards: what a longer response costs.", ge=0)},
    at_zero_margin=lambda beta, r_dpo_alpha, label_smoothing: math.log(2.0),
    zero_margin_note="of equally long responses",
    needs_reference=True,
)
def r_dpo(logps: PairLogps, *, beta: float = 0.1, r_dpo_alpha: float = 0.01, label_smoothing: float = 0.0) -> PairLoss:
    """-log sigmoid(beta*D + alpha*(|y_w| - |y_r|)): DPO with a price on tokens. Source: R-DPO, arXiv:2403.19159.

    A length that is paid for already leaves less to be learnt from a longer chosen response, more from a shorter one.
    """
    ref_chosen, ref_rejected = logps.reference()
    chosen, rejected = beta * (logps.chosen_sum - ref_chosen), beta * (logps.rejected_sum - ref_rejected)
    longer = (logps.chosen_length - logps.rejected_length).to(chosen.dtype)
    scores = chosen - rejected + r_dpo_alpha * longer
    return _with_rewards(_smoothed_logsigmoid(scores, label_smoothing), chosen, rejected)


@declare(
    "-sum_k log(e^(beta m_k) / sum_j e^(beta m_j)), j = k and all that score lower",
    "Plackett-Luce; PRO, arXiv:2306.17492, DPO's appendix, arXiv:2305.18290",
    at_zero_margin=_log_2,
    zero_margin_note="a list of two",
    is_of_lists=True,
)
def plackett_luce(logps: PairLogps, *, beta: float = 2.0) -> PairLoss:
    """The likelihood of the scores' order: each response against those below it. Equal scores do not compete.

    A list of two is SimPO without a target margin.
    """
    import torch

    means, scores, there = logps.listed()
    rewards = beta * means
    itself = torch.eye(means.shape[1], dtype=torch.bool, device=means.device)
    competes = (scores[:, None, :] < scores[:, :, None]) & there[:, None, :] | itself
    against = torch.where(competes, rewards[:, None, :], -math.inf).logsumexp(dim=-1)
    losses = torch.where(there, against - rewards, 0.0).sum(dim=-1)
    return _with_rewards(losses, beta * logps.chosen_mean, beta * logps.rejected_mean)


@declare(
    "-sum_i q_i log softmax(beta m)_i, q = softmax(s / infonca_tau)",
    "InfoNCA, arXiv:2402.05369, on SimPO's reward",
    own_keys={"infonca_tau": LossKey("Temperature of infonca, in scores: at 0 only the best would count.", gt=0)},
    at_zero_margin=lambda beta, infonca_tau: math.log(2.0),
    zero_margin_note="a list of two",
    is_of_lists=True,
)
def infonca(logps: PairLogps, *, beta: float = 2.0, infonca_tau: float = 1.0) -> PairLoss:
    """Cross-entropy of softmax(beta*m) over a list to softmax(s/tau). Source: arXiv:2402.05369."""
    import torch

    means, scores, there = logps.listed()
    wanted = torch.where(there, scores / infonca_tau, -math.inf).softmax(dim=-1)
    found = torch.where(there, beta * means, -math.inf)
    found = found - found.logsumexp(dim=-1, keepdim=True)
    losses = -torch.where(there, wanted * torch.where(there, found, 0.0), 0.0).sum(dim=-1)
    return _with_rewards(losses, beta * logps.chosen_mean, beta * logps.rejected_mean)


@declare(
    "-log(sum_good w e^(beta m) / sum_all w e^(beta m)), good: s > mean s, w = e^(swepo_alpha |s - mean s|)",
    "SWEPO, arXiv:2412.04628, and with swepo_alpha 0 AMPO, arXiv:2502.18293, on SimPO's reward",
    own_keys={"swepo_alpha": LossKey("Weight of the distance to the mean score, per unit of score; 0 = none.", ge=0)},
    at_zero_margin=lambda beta, swepo_alpha: math.log(2.0),
    zero_margin_note="a list of two",
    is_of_lists=True,
)
def swepo(logps: PairLogps, *, beta: float = 2.0, swepo_alpha: float = 1.0) -> PairLoss:
    """Responses that score above their list's mean, as one set, against all of them. Equal scores teach nothing.

    A list of two is SimPO without a target margin.
    """
    import torch

    means, scores, there = logps.listed()
    away = scores - torch.where(there, scores, 0.0).sum(dim=-1, keepdim=True) / there.sum(dim=-1, keepdim=True)
    best = torch.where(there, scores, -math.inf).amax(dim=-1, keepdim=True)
    good = (away > 0) | (scores == best)  # the best always is, also where the mean is rounded up to it
    weighted = torch.where(there, beta * means + swepo_alpha * away.abs(), -math.inf)
    losses = weighted.logsumexp(dim=-1) - torch.where(good, weighted, -math.inf).logsumexp(dim=-1)
    return _with_rewards(losses, beta * logps.chosen_mean, beta * logps.rejected_mean)


def sft_losses(logps: PairLogps) -> Tensor:
    """-m_w per pair [P], nats per token: the chosen response's mean negative log-likelihood.

    Multiply by the SFT weight and add to a preference loss. Its mean over pairs does not depend on batching.
    """
    return -logps.chosen_mean


def _logsigmoid(x: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def _smoothed_logsigmoid(scores: Tensor, label_smoothing: float) -> Tensor:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z): a label is wrong with probability e."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    losses = -(1 - label_smoothing) * _logsigmoid(scores)
    if label_smoothing:
        losses = losses - label_smoothing * _logsigmoid(-scores)
    return losses


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, accurate at both ends (Maechler 2012); x = 0 is nudged below 0 to stay finite."""
    import torch

    x = torch.clamp(x, max=-torch.finfo(x.dtype).tiny)
    near_zero = x > -0.6931471805599453
    # Each branch sees only arguments it is accurate for, so that neither leaks a NaN into the other's gradient.
    small = torch.log(-torch.expm1(torch.where(near_zero, x, torch.full_like(x, -0.5))))
    large = torch.log1p(-torch.exp(torch.where(near_zero, torch.full_like(x, -1.0), x)))
    return torch.where(near_zero, small, large)


def _with_rewards(losses: Tensor, chosen: Tensor, rejected: Tensor) -> PairLoss:
    return PairLoss(losses, chosen.detach(), rejected.detach())
