"""core.losses: each loss against its formula in plain Python, numeric gradients, limits, and the papers' examples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simpo.core.losses import LOSSES, ListLogps, Loss, LossKey, PairLogps, declare, sft_losses, simpo_loss

OPTIONS = {
    "beta": 1.7,
    "gamma_beta_ratio": 0.4,
    "label_smoothing": 0.1,
    "orpo_lambda": 0.6,
    "alphapo_alpha": 0.25,
    "slic_delta": 1.3,
    "r_dpo_alpha": 0.03,
    "infonca_tau": 0.7,
    "swepo_alpha": 0.6,
}


def options_of(name: str, **changes: float) -> dict[str, float]:
    return {key: value for key, value in (OPTIONS | changes).items() if key in LOSSES[name].defaults}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def smoothed(z: float, e: float = OPTIONS["label_smoothing"]) -> float:
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def alphapo_reward(m: float) -> float:
    return OPTIONS["beta"] * (1 - math.exp(m) ** -OPTIONS["alphapo_alpha"]) / OPTIONS["alphapo_alpha"]


def log_odds(m: float) -> float:
    return math.log(math.exp(m) / (1 - math.exp(m)))


# name -> (loss, chosen reward, rejected reward) of one pair, from summed log-probs l, lengths n and reference sums f.
Formula = Callable[[float, float, int, int, float, float], tuple[float, float, float]]
B, R, LAMBDA, DELTA = OPTIONS["beta"], OPTIONS["gamma_beta_ratio"], OPTIONS["orpo_lambda"], OPTIONS["slic_delta"]


def simpo_formula(shape: Callable[[float], float]) -> Formula:
    return lambda lw, lr, nw, nr, fw, fr: (shape(lw / nw - lr / nr), B * lw / nw, B * lr / nr)


def dpo_formula(lw: float, lr: float, nw: int, nr: int, fw: float, fr: float) -> tuple[float, float, float]:
    return smoothed(B * ((lw - fw) - (lr - fr))), B * (lw - fw), B * (lr - fr)


def orpo_formula(lw: float, lr: float, nw: int, nr: int, fw: float, fr: float) -> tuple[float, float, float]:
    mw, mr = lw / nw, lr / nr
    return -mw - LAMBDA * log_sigmoid(log_odds(mw) - log_odds(mr)), LAMBDA * mw, LAMBDA * mr


def alphapo_formula(lw: float, lr: float, nw: int, nr: int, fw: float, fr: float) -> tuple[float, float, float]:
    rw, rr = alphapo_reward(lw / nw), alphapo_reward(lr / nr)
    return -log_sigmoid(rw - rr - B * R), rw, rr


def r_dpo_formula(lw: float, lr: float, nw: int, nr: int, fw: float, fr: float) -> tuple[float, float, float]:
    z = B * ((lw - fw) - (lr - fr)) + OPTIONS["r_dpo_alpha"] * nw - OPTIONS["r_dpo_alpha"] * nr
    return smoothed(z), B * (lw - fw), B * (lr - fr)


def low_formula(lw: float, lr: float, nw: int, nr: int, fw: float, fr: float) -> tuple[float, float, float]:
    """SimPO on what `low_extras` says: 0.7 of the sum, over half of the tokens."""
    mw, mr = 0.7 * lw / math.ceil(nw / 2), 0.7 * lr / math.ceil(nr / 2)
    return smoothed(B * (mw - mr) - B * R), B * mw, B * mr


def infonca_formula(lw: float, lr: float, nw: int, nr: int, fw: float, fr: float) -> tuple[float, float, float]:
    """Of a list of two that scored 1 and 0."""
    mw, mr = lw / nw, lr / nr
    likely = 1 / (1 + math.exp(-1 / OPTIONS["infonca_tau"]))
    return -likely * log_sigmoid(B * (mw - mr)) - (1 - likely) * log_sigmoid(B * (mr - mw)), B * mw, B * mr


FORMULAS: dict[str, Formula] = {
    "sigmoid": simpo_formula(lambda margin: smoothed(B * margin - B * R)),
    "cpo_simpo": simpo_formula(lambda margin: smoothed(B * margin - B * R)),
    "hinge": simpo_formula(lambda margin: max(0.0, 1 - (B * margin - B * R))),
    "ipo": simpo_formula(lambda margin: (margin - R - 1 / (2 * B)) ** 2),
    "cpo": lambda lw, lr, nw, nr, fw, fr: (smoothed(B * (lw - lr)), B * lw, B * lr),
    "cpo_hinge": lambda lw, lr, nw, nr, fw, fr: (max(0.0, 1 - B * (lw - lr)), B * lw, B * lr),
    "orpo": orpo_formula,
    "alphapo": alphapo_formula,
    "repo": lambda lw, lr, nw, nr, fw, fr: (max(0.0, R - (lw / nw - lr / nr)), lw / nw, lr / nr),
    "simper": lambda lw, lr, nw, nr, fw, fr: (
        -math.exp(lw / nw) + math.exp(lr / nr),
        math.exp(lw / nw),
        math.exp(lr / nr),
    ),
    "slic": lambda lw, lr, nw, nr, fw, fr: (max(0.0, DELTA - lw + lr), lw, lr),
    "rrhf": lambda lw, lr, nw, nr, fw, fr: (max(0.0, -(lw / nw - lr / nr)), lw / nw, lr / nr),
    "confpo": low_formula,
    "plackett_luce": simpo_formula(lambda margin: -log_sigmoid(B * margin)),
    "infonca": infonca_formula,
    "swepo": simpo_formula(lambda margin: -log_sigmoid(B * margin)),
    "dpo": dpo_formula,
    "r_dpo": r_dpo_formula,
    "dpo_norm": lambda lw, lr, nw, nr, fw, fr: dpo_formula(lw / nw, lr / nr, nw, nr, fw / nw, fr / nr),
}


def random_logps(num_pairs: int = 40, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (2, num_pairs), generator=generator)
    means = -3 * torch.rand(4, num_pairs, generator=generator, dtype=torch.float64) - 0.01
    sums = (means * lengths.repeat(2, 1)).to(dtype)
    return with_extras(sums[0].requires_grad_(), sums[1].requires_grad_(), lengths[0], lengths[1], sums[2], sums[3])


def low_extras(sums: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    return {"low_sum": 0.7 * sums, "low_length": (lengths / 2).ceil().to(sums.dtype)}


def with_extras(*columns: Tensor) -> PairLogps:
    chosen, rejected, chosen_length, rejected_length, *_ = columns
    extras = low_extras(chosen, chosen_length), low_extras(rejected, rejected_length)
    both = (torch.stack(each, dim=1).flatten() for each in ((chosen, rejected), (chosen_length, rejected_length)))
    lists = ListLogps(*both, (2,) * len(chosen))
    scores = torch.tensor([1.0, 0.0], dtype=chosen.dtype).repeat(len(chosen))
    return PairLogps(*columns, chosen_extras=extras[0], rejected_extras=extras[1], lists=lists, scores=scores)


def mean_logps(chosen: list[float] | Tensor, rejected: list[float] | Tensor, dtype=torch.float64) -> PairLogps:
    """Pairs of one-token responses: sums are means."""
    chosen, rejected = (torch.as_tensor(x, dtype=dtype).requires_grad_() for x in (chosen, rejected))
    ones = torch.ones(len(chosen), dtype=torch.long)
    return with_extras(chosen, rejected, ones, ones, torch.zeros_like(chosen), torch.zeros_like(rejected))


def test_every_loss_has_a_formula_here():
    assert FORMULAS.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_rewards_equal_the_formula_in_plain_python(name):
    logps = random_logps()
    result = LOSSES[name](logps, **options_of(name))
    columns = (
        logps.chosen_sum,
        logps.rejected_sum,
        logps.chosen_length,
        logps.rejected_length,
        logps.ref_chosen_sum,
        logps.ref_rejected_sum,
    )
    expected = torch.tensor(
        [FORMULAS[name](*row) for row in zip(*(c.tolist() for c in columns), strict=True)], dtype=torch.float64
    )
    for actual, wanted in zip(result, expected.T, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_numeric_ones(name):
    logps = random_logps(12, seed=3)

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        changed = with_extras(
            chosen,
            rejected,
            logps.chosen_length,
            logps.rejected_length,
            logps.ref_chosen_sum,
            logps.ref_rejected_sum,
        )
        return LOSSES[name](changed, **options_of(name)).losses

    assert torch.autograd.gradcheck(losses, (logps.chosen_sum, logps.rejected_sum))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_unreduced_and_rewards_detached(name):
    result = LOSSES[name](random_logps(5), **options_of(name))
    assert [x.shape for x in result] == [(5,)] * 3
    assert result.losses.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_each_pair_depends_on_itself_alone(name):
    logps = random_logps(6)
    losses = LOSSES[name](logps, **options_of(name)).losses
    for pair in range(6):
        gradients = torch.autograd.grad(losses[pair], (logps.chosen_sum, logps.rejected_sum), retain_graph=True)
        for gradient in gradients:
            assert torch.count_nonzero(gradient[torch.arange(6) != pair]) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_declared_value_at_zero_margin_is_what_the_loss_computes(name):
    logps = mean_logps([-0.8], [-0.8])
    (loss,) = LOSSES[name](logps, **options_of(name)).losses.tolist()
    if name == "orpo":  # its declaration leaves out -m_w, and says so
        loss -= 0.8
    assert loss == pytest.approx(LOSSES[name].at_zero_margin(**options_of(name)), abs=1e-12)


def test_a_price_on_tokens_leaves_less_to_learn_from_a_longer_chosen_response():
    """R-DPO, derived: the optimum of E[r - alpha |y|] - beta KL has r = beta log-ratio + alpha |y|, so it is added."""
    chosen, rejected = (torch.tensor([-5.0, -5.0], dtype=torch.float64).requires_grad_() for _ in range(2))
    lengths = torch.tensor([30, 10]), torch.tensor([10, 30])
    zeros = torch.zeros(2, dtype=torch.float64)
    losses = LOSSES["r_dpo"](PairLogps(chosen, rejected, *lengths, zeros, zeros), beta=0.1, r_dpo_alpha=0.05).losses
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(1.0))], rel=1e-12)
    longer, shorter = torch.autograd.grad(losses.sum(), chosen)[0].abs().tolist()
    assert longer < shorter


LISTS = {"one of each": [3.0, 1.0, 2.0, -1.0], "ties": [2.0, 1.0, 1.0, 0.0], "of two": [1.0, 0.0], "long": [*range(7)]}


@pytest.mark.parametrize("name", ["plackett_luce", "infonca", "swepo"])
def test_losses_of_lists_equal_their_formulas_in_plain_python_and_numeric_gradients(name):
    """Lists of 4, 4, 2 and 7 responses at once; equal scores do not compete in Plackett-Luce."""
    generator = torch.Generator().manual_seed(5)
    sizes = tuple(map(len, LISTS.values()))
    scores = torch.tensor([score for each in LISTS.values() for score in each], dtype=torch.float64)
    lengths = torch.randint(1, 9, (sum(sizes),), generator=generator)
    sums = (-3 * torch.rand(sum(sizes), generator=generator, dtype=torch.float64) * lengths).requires_grad_()
    one = torch.ones(4, dtype=torch.float64)

    def losses(values: Tensor) -> Tensor:
        lists = ListLogps(values, lengths, sizes)
        return LOSSES[name](PairLogps(-one, -one, one, one, lists=lists, scores=scores), **options_of(name)).losses

    expected = []
    for s, m in zip(scores.split(sizes), (sums.detach() / lengths).split(sizes), strict=True):
        s, e = s.tolist(), [math.exp(B * mean) for mean in m.tolist()]
        if name == "plackett_luce":
            below = [e[k] + sum(e[j] for j in range(len(s)) if s[j] < s[k]) for k in range(len(s))]
            expected.append(sum(math.log(total / own) for total, own in zip(below, e, strict=True)))
        elif name == "swepo":
            away = [score - sum(s) / len(s) for score in s]
            w = [own * math.exp(OPTIONS["swepo_alpha"] * abs(a)) for own, a in zip(e, away, strict=True)]
            expected.append(-math.log(sum(own for own, a in zip(w, away, strict=True) if a > 0) / sum(w)))
        else:
            q = [math.exp(score / OPTIONS["infonca_tau"]) for score in s]
            expected.append(-sum(a / sum(q) * math.log(b / sum(e)) for a, b in zip(q, e, strict=True)))
    assert losses(sums).tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(losses, (sums,))
    with pytest.raises(ValueError, match="needs all responses of each list and their scores"):
        LOSSES[name](PairLogps(-one, -one, one, one))


@pytest.mark.parametrize("name", ["plackett_luce", "swepo"])
def test_a_list_of_equal_scores_teaches_nothing(name):
    """Whose mean may be off by a rounding, so that all of them, or none, lie above it."""
    sums = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    one, scores = torch.ones(1), torch.full((3,), 0.1)
    lists = ListLogps(sums, torch.ones(3), (3,))
    loss = LOSSES[name](PairLogps(-one, -one, one, one, lists=lists, scores=scores)).losses
    assert loss.item() == 0
    assert torch.autograd.grad(loss.sum(), sums)[0].tolist() == [0, 0, 0]


def test_scores_that_hardly_differ_have_a_best_one_in_swepo():
    """In float32 the mean of these is one of them."""
    sums, one = torch.tensor([-1.0, -2.0]), torch.ones(1)
    for scores in (torch.tensor([1.0, 1.0 + 2**-23]), torch.tensor([1.0 + 2**-22, 1.0 + 2**-23])):
        logps = PairLogps(-one, -one, one, one, lists=ListLogps(sums, torch.ones(2), (2,)), scores=scores)
        assert math.isfinite(LOSSES["swepo"](logps).losses.item())


def test_a_loss_that_needs_more_of_responses_says_what_to_ask_for():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="'low_sum' of each response; compute log-probs with extras 'low'"):
        LOSSES["confpo"](PairLogps(-one, -one, one, one))


# --- worked examples and limits --------------------------------------------------------------------------------------


def test_worked_example_with_sums_and_lengths():
    """beta 2, gamma 1, -6 over 12 tokens against -5.6 over 8: rewards -1.0 and -1.4, z = -0.6, log(1 + e^0.6)."""
    logps = PairLogps(torch.tensor([-6.0]), torch.tensor([-5.6]), torch.tensor([12]), torch.tensor([8]))
    result = LOSSES["sigmoid"](logps, beta=2.0, gamma_beta_ratio=0.5)
    assert result.losses.item() == pytest.approx(1.0374880, abs=5e-7)
    assert (result.chosen_rewards.item(), result.rejected_rewards.item()) == pytest.approx((-1.0, -1.4), abs=1e-6)


def test_worked_example_with_means():
    """beta 2, ratio 0.5, means -1.2 and -2.5: z = 1.6, log(1 + e^-1.6)."""
    result = simpo_loss(torch.tensor([-1.2]), torch.tensor([-2.5]), beta=2.0, gamma_beta_ratio=0.5)
    assert result.losses.item() == pytest.approx(0.1839, abs=5e-5)


def test_a_ratio_of_zero_is_no_target_margin():
    loss = simpo_loss(torch.tensor([-1.0]), torch.tensor([-1.5]), beta=2.0, gamma_beta_ratio=0.0)
    assert float(loss.losses) == pytest.approx(math.log1p(math.exp(-2.0 * 0.5)))


def test_simpo_gradient_equals_the_papers_formula():
    """-beta * s * (1/|y_w|, -1/|y_r|) with s = sigmoid(beta*m_r - beta*m_w + gamma)."""
    logps = random_logps()
    losses = LOSSES["sigmoid"](logps, beta=2.5, gamma_beta_ratio=0.3).losses
    chosen, rejected = torch.autograd.grad(losses.sum(), (logps.chosen_sum, logps.rejected_sum))
    s = torch.sigmoid(2.5 * logps.rejected_mean - 2.5 * logps.chosen_mean + 2.5 * 0.3).detach()
    assert torch.allclose(chosen, -2.5 * s / logps.chosen_length, rtol=1e-12, atol=0)
    assert torch.allclose(rejected, 2.5 * s / logps.rejected_length, rtol=1e-12, atol=0)


def test_label_smoothing_is_the_loss_of_swapped_labels_with_that_probability():
    logps = random_logps()
    plain = simpo_loss(logps.chosen_mean, logps.rejected_mean, beta=2.0, gamma_beta_ratio=0.5).losses
    z = 2.0 * (logps.chosen_mean - logps.rejected_mean - 0.5)
    swapped = plain + z  # -log sigmoid(-z) = -log sigmoid(z) + z
    smooth = LOSSES["sigmoid"](logps, beta=2.0, gamma_beta_ratio=0.5, label_smoothing=0.2).losses
    assert torch.allclose(smooth, 0.8 * plain + 0.2 * swapped, rtol=1e-12, atol=1e-12)


def test_alphapo_becomes_simpo_as_alpha_goes_to_zero():
    logps = random_logps()
    simpo = LOSSES["sigmoid"](logps, beta=2.0, gamma_beta_ratio=0.5)
    for alpha, tolerance in ((0.0, 1e-14), (1e-9, 1e-7), (-1e-9, 1e-7), (1e-3, 0.02)):
        limit = LOSSES["alphapo"](logps, beta=2.0, gamma_beta_ratio=0.5, alphapo_alpha=alpha)
        for actual, expected in zip(limit, simpo, strict=True):
            assert torch.allclose(actual, expected, rtol=0, atol=tolerance)


def test_alphapo_near_the_limit_keeps_its_digits_in_fp32():
    """(1 - p^-alpha)/alpha computed as written loses half its digits at alpha = 1e-4 in fp32."""
    means = torch.tensor([-0.7, -1.3, -2.9])
    logps = mean_logps(means, means - 0.5, torch.float32)
    reward = LOSSES["alphapo"](logps, beta=1.0, gamma_beta_ratio=0.0, alphapo_alpha=1e-4).chosen_rewards.double()
    exact = -torch.expm1(-1e-4 * means.double()) / 1e-4
    assert torch.allclose(reward, exact, rtol=1e-6, atol=0)
    naive = (1 - means.exp() ** -1e-4) / 1e-4
    assert not torch.allclose(naive.double(), exact, rtol=1e-4, atol=0)


def test_repo_is_simpo_over_beta_for_large_beta():
    logps = random_logps()
    repo = LOSSES["repo"](logps, gamma_beta_ratio=0.5).losses
    for beta in (1e2, 1e4, 1e6):
        simpo = LOSSES["sigmoid"](logps, beta=beta, gamma_beta_ratio=0.5).losses / beta
        assert float((simpo - repo).detach().abs().max()) <= math.log(2) / beta


def test_dpo_equals_cpo_when_the_reference_is_indifferent():
    logps = random_logps()
    indifferent = PairLogps(
        logps.chosen_sum,
        logps.rejected_sum,
        logps.chosen_length,
        logps.rejected_length,
        torch.full((40,), -7.0, dtype=torch.float64),
        torch.full((40,), -7.0, dtype=torch.float64),
    )
    dpo = LOSSES["dpo"](indifferent, beta=0.3).losses
    assert torch.allclose(dpo, LOSSES["cpo"](logps, beta=0.3).losses, rtol=1e-12, atol=1e-12)


def test_sft_term_is_the_mean_negative_log_likelihood_of_chosen():
    logps = random_logps()
    assert torch.equal(sft_losses(logps), -logps.chosen_sum / logps.chosen_length)


# --- numbers at the edge ---------------------------------------------------------------------------------------------

EXTREMES = [-1e4, -100.0, -1.0, -1e-4, -1e-8, 0.0]


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "alphapo"])
def test_extreme_log_probs_give_finite_losses_and_gradients(name):
    pairs = [(w, r) for w in EXTREMES for r in EXTREMES]
    logps = mean_logps([w for w, _ in pairs], [r for _, r in pairs], torch.float32)
    result = LOSSES[name](logps, **options_of(name))
    gradients = torch.autograd.grad(result.losses.sum(), (logps.chosen_sum, logps.rejected_sum))
    for tensor in (*result, *gradients):
        assert torch.isfinite(tensor).all()


def test_extreme_log_probs_of_alphapo_are_finite_as_far_as_its_reward_is():
    """p^-alpha itself overflows fp32 below m = -88/alpha; at alpha 0.25 that is 352 nats per token."""
    means = [-300.0, -100.0, -1.0, -1e-4, -1e-8, 0.0]
    logps = mean_logps([w for w in means for _ in means], means * len(means), torch.float32)
    result = LOSSES["alphapo"](logps, **options_of("alphapo"))
    gradients = torch.autograd.grad(result.losses.sum(), (logps.chosen_sum, logps.rejected_sum))
    for tensor in (*result, *gradients):
        assert torch.isfinite(tensor).all()


def test_orpo_keeps_its_digits_for_probabilities_near_one():
    """Against fp64 with log1p and expm1; the odds as written, p/(1-p), are infinite in fp32 from m = -1e-8 up."""
    chosen = [-1e-8, -1e-6, -1e-3, -0.5, -0.6931, -0.6932, -5.0, -40.0]
    rejected = [-1e-3, -1e-8, -1e-6, -0.7, -0.1, -3.0, -1e-7, -39.0]
    result = LOSSES["orpo"](mean_logps(chosen, rejected, torch.float32), orpo_lambda=0.6)
    # The fp32 inputs themselves are the exact values to start from.
    chosen, rejected = (torch.tensor(x).tolist() for x in (chosen, rejected))

    def exact_log_odds(m: float) -> float:
        return m - math.log(-math.expm1(m))

    expected = [
        -w - 0.6 * log_sigmoid(exact_log_odds(w) - exact_log_odds(r)) for w, r in zip(chosen, rejected, strict=True)
    ]
    assert torch.allclose(result.losses.double(), torch.tensor(expected).double(), rtol=2e-6, atol=1e-9)
    naive = torch.log(torch.tensor(-1e-8).exp() / (1 - torch.tensor(-1e-8).exp()))
    assert torch.isinf(naive)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_label_smoothing_without_a_meaning_is_an_error(loss_type):
    with pytest.raises(ValueError, match=f"label_smoothing is not defined for '{loss_type}'"):
        simpo_loss(
            torch.zeros(1), torch.zeros(1), beta=2.0, gamma_beta_ratio=0.5, loss_type=loss_type, label_smoothing=0.1
        )
    with pytest.raises(TypeError):
        LOSSES[loss_type](random_logps(), beta=2.0, gamma_beta_ratio=0.5, label_smoothing=0.1)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.needs_reference])
def test_a_loss_with_a_reference_refuses_to_run_without(name):
    logps = random_logps()
    bare = PairLogps(logps.chosen_sum, logps.rejected_sum, logps.chosen_length, logps.rejected_length)
    with pytest.raises(ValueError, match="needs the reference model's log-probs"):
        LOSSES[name](bare, **options_of(name))


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.needs_reference])
def test_a_reference_free_loss_runs_without_a_reference(name):
    logps = random_logps()
    bare = with_extras(logps.chosen_sum, logps.rejected_sum, logps.chosen_length, logps.rejected_length)
    with_reference = LOSSES[name](logps, **options_of(name)).losses
    assert torch.equal(LOSSES[name](bare, **options_of(name)).losses, with_reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_mean_logps": torch.zeros(3)}, "one rejected for each chosen"),
        ({"beta": 0.0}, "beta must be > 0, not 0.0"),
        ({"beta": float("nan")}, "beta must be > 0"),
        ({"gamma_beta_ratio": -0.1}, "gamma_beta_ratio must be >= 0, not -0.1"),
        ({"gamma_beta_ratio": float("nan")}, "gamma_beta_ratio must be >= 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), not 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
        ({"loss_type": "dpo"}, "loss_type must be 'sigmoid', 'hinge' or 'ipo', not 'dpo'"),
    ],
)
def test_wrong_options_are_refused(change, message):
    good = {
        "chosen_mean_logps": torch.zeros(2),
        "rejected_mean_logps": torch.zeros(2),
        "beta": 2.0,
        "gamma_beta_ratio": 0.5,
    }
    simpo_loss(**good)
    with pytest.raises(ValueError, match=message):
        simpo_loss(**(good | change))


@pytest.mark.parametrize("name", [name for name in LOSSES if "beta" in LOSSES[name].defaults])
def test_beta_must_be_positive_in_every_loss(name):
    with pytest.raises(ValueError, match="beta must be > 0, not -1"):
        LOSSES[name](random_logps(), **options_of(name, beta=-1.0))


# --- declarations ----------------------------------------------------------------------------------------------------


SIMPO = {"beta": 2.0, "gamma_beta_ratio": 0.5}
DEFAULTS = {
    "sigmoid": SIMPO | {"label_smoothing": 0.0},
    "cpo_simpo": SIMPO | {"label_smoothing": 0.0},
    "hinge": SIMPO,
    "ipo": SIMPO,
    "cpo": {"beta": 0.1, "label_smoothing": 0.0},
    "cpo_hinge": {"beta": 0.1},
    "orpo": {"orpo_lambda": 0.1},
    "alphapo": SIMPO | {"alphapo_alpha": 0.25},
    "repo": {"gamma_beta_ratio": 0.5},
    "simper": {},
    "slic": {"slic_delta": 1.0},
    "rrhf": {},
    "confpo": SIMPO | {"label_smoothing": 0.0},
    "plackett_luce": {"beta": 2.0},
    "infonca": {"beta": 2.0, "infonca_tau": 1.0},
    "swepo": {"beta": 2.0, "swepo_alpha": 1.0},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "r_dpo": {"beta": 0.1, "r_dpo_alpha": 0.01, "label_smoothing": 0.0},
    "dpo_norm": {"beta": 2.0, "label_smoothing": 0.0},
}


def test_a_recipe_that_names_a_loss_alone_trains_with_these_values():
    assert {name: dict(loss.defaults) for name, loss in LOSSES.items()} == DEFAULTS


def test_every_default_is_inside_its_range():
    for loss in LOSSES.values():
        assert isinstance(loss, Loss)
        for name, key in loss.own_keys.items():
            assert not [bound for bound in key.bounds.values() if (loss.defaults[name] - bound) < 0 and key.ge == bound]
            assert key.meaning.endswith(".")


@pytest.mark.parametrize(
    ("function", "declaration", "message"),
    [
        (lambda logps, *, tau=1.0: None, {}, "tau: not in own_keys, and not one of beta"),
        (lambda logps, *, beta: None, {}, "beta: no default"),
        (lambda logps: None, {"own_keys": {"tau": LossKey("A key.")}}, "tau: in own_keys, but not a keyword-only"),
        (
            lambda logps, *, orpo_lambda=1.0: None,
            {"own_keys": {"orpo_lambda": LossKey("A key.")}},
            "orpo_lambda: the key of another loss already",
        ),
        (lambda logps: None, {"name": "repo"}, "repo: the name of another loss already"),
        (lambda logps, *, beta=1.0: None, {"at_zero_margin": lambda: 0.0}, "unexpected keyword argument 'beta'"),
    ],
)
def test_a_declaration_that_does_not_fit_its_function_is_refused_when_it_is_read(function, declaration, message):
    before = dict(LOSSES)
    with pytest.raises(TypeError, match=message):
        declare("x", "y", **{"name": "new", "at_zero_margin": lambda **values: 0.0, **declaration})(function)
    assert before == LOSSES
