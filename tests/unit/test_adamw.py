"""run.adamw: the rounding is unbiased, the update is AdamW's, small steps add up where plain bfloat16 drops them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from simpo.run.adamw import AdamWBf16, stochastic_round


def random_bits(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(0, 2**16, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.1, -0.1, 1 + 2**-12, -3.14159, 6e-7, -1e-30, 1.17e38, 1 - 2**-11])
def test_the_mean_of_many_roundings_is_the_value(value):
    draws = 200_000
    values = torch.full((draws,), value)
    rounded = stochastic_round(values, random_bits((draws,))).double()
    below, above = sorted({float(x) for x in rounded.unique()})
    exact = float(values[0])
    assert below < exact < above
    # One draw is `above` with probability q, so its standard deviation is gap * sqrt(q (1 - q)); five of the mean's.
    gap, q = above - below, (exact - below) / (above - below)
    assert abs(float(rounded.mean()) - exact) <= 5 * gap * math.sqrt(q * (1 - q) / draws)


def test_all_sixteen_bit_draws_together_round_up_exactly_as_often_as_they_should():
    """Not statistics: over every possible draw, the share of roundings up is the lower half over 2**16."""
    bits = torch.arange(2**16, dtype=torch.int32)
    for lower in (0, 1, 1000, 2**15, 2**16 - 1):
        value = torch.tensor(0x3F80_0000 + lower, dtype=torch.int32).view(torch.float32)
        up = stochastic_round(value.expand(2**16).contiguous(), bits) > 1.0
        assert int(up.sum()) == lower


def test_what_bfloat16_can_hold_is_never_changed():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = every[~every.isnan()]  # infinities, both zeros and denormals included
    for bits in (torch.zeros_like(numbers, dtype=torch.int32), torch.full_like(numbers, 2**16 - 1, dtype=torch.int32)):
        rounded = stochastic_round(numbers.float(), bits)
        assert torch.equal(rounded.view(torch.int16), numbers.view(torch.int16))


def test_nan_stays_nan_and_infinity_infinity_whatever_is_drawn():
    raw = torch.tensor([0x7F80_0001, 0x7FFF_FFFF, -1, 0x7FC0_0000], dtype=torch.int32).view(torch.float32)
    for bits in (0, 1, 2**16 - 1):
        drawn = torch.full((4,), bits, dtype=torch.int32)
        assert stochastic_round(raw, drawn).isnan().all()
        limits = torch.tensor([math.inf, -math.inf])
        assert torch.equal(stochastic_round(limits, drawn[:2]).float(), limits)


# --- the update ------------------------------------------------------------------------------------------------------


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(300, 40), (7,), (1,), (40, 11), (3, 5, 2)]
    return [nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in shapes]


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_the_first_step_is_torchs_adamw_and_later_ones_differ_by_the_moments_rounding():
    ours, theirs = make_parameters(), make_parameters()
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    mine, torchs = AdamWBf16(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(10):
        before = [p.detach().clone() for p in theirs]
        for parameters in (ours, theirs):
            set_gradients(parameters, step)
        mine.step()
        torchs.step()
        for a, b, start in zip(ours, theirs, before, strict=True):
            if step == 0:
                assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)
            else:  # moments with 8 bits of precision: a step is off by a few times 2**-8 of lr
                assert float((a - b).detach().abs().max()) <= 10 * 2**-8 * options["lr"] * step
            a.data.copy_(b.data)
            assert not torch.equal(b, start)


def test_how_the_work_is_cut_into_pieces_decides_only_the_random_bits():
    """At the first step, fp32 weights do not depend on the bits; the moments are one of two neighbours."""
    reference = None
    for piece_numel in (1, 7, 1000, 2**20):
        parameters = make_parameters()
        optimizer = AdamWBf16(parameters, lr=1e-2, piece_numel=piece_numel)
        set_gradients(parameters, 0)
        if piece_numel == 1:
            parameters[0].grad = None  # 12,000 pieces take a while
        optimizer.step()
        values = [(p.detach(), optimizer.state.get(p, {})) for p in parameters]
        if piece_numel == 1:
            assert not values[0][1]
        reference = reference or values[1:]
        for (p, state), (expected, expected_state) in zip(values[1:], reference, strict=True):
            assert torch.allclose(p, expected, rtol=1e-6, atol=0)
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.allclose(state[name].float(), expected_state[name].float(), rtol=2**-7, atol=0)


def test_moments_are_bfloat16_and_no_more_than_a_piece_is_ever_fp32():
    p = nn.Parameter(torch.zeros(1000, 1000, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = AdamWBf16([p], lr=1e-3, piece_numel=1000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype in (torch.float32, torch.int32, torch.int64):
                largest = max(largest, out.numel())
            return out

    with Watch():
        optimizer.step()
    assert largest <= 4 * 1000
    assert {s.dtype for name, s in optimizer.state[p].items() if name != "step"} == {torch.bfloat16}


def test_parameters_without_gradient_and_strided_gradients():
    parameters = make_parameters()
    set_gradients(parameters, 0)
    expected = AdamWBf16(twin := copy.deepcopy(parameters), lr=1e-2)
    for a, b in zip(twin, parameters, strict=True):
        a.grad = b.grad.clone()
    parameters[0].grad = parameters[0].grad.t().contiguous().t()
    optimizer = AdamWBf16(parameters, lr=1e-2)
    optimizer.step()
    expected.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, twin, strict=True))
    before = parameters[1].detach().clone()
    parameters[1].grad = None
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert [int(optimizer.state[p]["step"]) for p in parameters[:3]] == [2, 1, 2]


def test_half_precision_other_than_bfloat16_is_refused():
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        AdamWBf16([nn.Parameter(torch.zeros(3, dtype=torch.float16))])


# --- what it is for --------------------------------------------------------------------------------------------------


def test_the_second_moment_follows_a_change_that_nearest_rounding_never_sees():
    """beta2 = 0.999 and gradients that grow from 1 to 1.5: v should go from 1 to 2.25, in steps below half a unit."""
    nearest, values = torch.ones(4096, dtype=torch.bfloat16), torch.zeros(4096)
    p = nn.Parameter(values)
    optimizer = AdamWBf16([p], lr=0.0)
    optimizer.state[p] = {
        "step": torch.tensor(1e4),
        "exp_avg": torch.zeros(4096, dtype=torch.bfloat16),
        "exp_avg_sq": torch.ones(4096, dtype=torch.bfloat16),
    }
    exact = 1.0
    for _ in range(2000):
        p.grad = torch.full_like(p, 1.5)
        optimizer.step()
        nearest = (nearest.float() * 0.999 + 0.001 * 1.5**2).to(torch.bfloat16)
        exact = exact * 0.999 + 0.001 * 1.5**2
    ours = optimizer.state[p]["exp_avg_sq"].float()
    assert exact > 2.0
    assert torch.equal(nearest.float(), torch.ones(4096))  # stalled at the start
    assert float(ours.mean()) == pytest.approx(exact, rel=0.01)
    assert float(ours.std()) < 0.1 * exact


def displacement(weights: str, learning_rate: float, steps: int) -> Tensor:
    """How far a small network's weights go in `steps` steps of mini-batches, [number of weights] fp64.

    weights: "fp32" (torch's AdamW), "moments" (AdamWBf16 on fp32), "stochastic" (AdamWBf16 on bfloat16), "plain"
    (torch's AdamW on bfloat16, moments and all).
    """
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 16, bias=False))
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
        p.data = p.data.to(torch.bfloat16).float()  # the same start for all
    teacher = torch.randn(64, 16, generator=torch.Generator().manual_seed(2))
    dtype = torch.bfloat16 if weights in ("stochastic", "plain") else torch.float32
    model.to(dtype)
    start = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    make = AdamWBf16 if weights in ("moments", "stochastic") else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=learning_rate, weight_decay=0.0)
    data = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(8, 64, generator=data)
        hidden = (x @ model[0].weight.float().t()).tanh()
        (hidden @ model[2].weight.float().t() - x @ teacher).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().double().flatten() for p in model.parameters()]) - start


STEPS = 400


@pytest.mark.parametrize("learning_rate", [3e-7, 1e-6])
def test_weights_go_where_fp32_adamw_takes_them_and_plain_bfloat16_leaves_them(learning_rate):
    """The displacement after 400 steps: its part along fp32's, as a share of fp32's, and the cosine between them.

    Moments in bfloat16: each is off by about 2**-9 of itself at random, the second a few percent at beta2 = 0.999, so
    the cosine must be 0.999 and the length within 1%.

    Weights in bfloat16 cannot be where fp32's are: a weight of 0.02 has neighbours u = 1.2e-4 away, and 400 steps of
    1e-6 are 4e-4. Each step adds noise of variance about u * |step|, which is unbiased. So the part along fp32's path
    must be 1 within five standard errors, and what is left over no more than that noise: cosine >= 1 / sqrt(1 + u /
    distance). Plain bfloat16 must fail both, or this test checks nothing.
    """
    exact = displacement("fp32", learning_rate, STEPS)

    def along(other: Tensor) -> float:
        return float(other @ exact / (exact @ exact))

    def cosine(other: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(other, exact, dim=0))

    moments = displacement("moments", learning_rate, STEPS)
    assert cosine(moments) >= 0.999
    assert float(moments.norm() / exact.norm()) == pytest.approx(1.0, abs=0.01)

    travelled = float(exact.norm() / exact.numel() ** 0.5)
    noise = (1.2e-4 / travelled) ** 0.5  # standard deviation of one weight's noise, in distances travelled
    tolerance = 5 * noise / exact.numel() ** 0.5
    stochastic = displacement("stochastic", learning_rate, STEPS)
    plain = displacement("plain", learning_rate, STEPS)
    assert along(stochastic) == pytest.approx(1.0, abs=tolerance)
    assert cosine(stochastic) >= (1 + noise**2) ** -0.5

    assert abs(along(plain) - 1.0) > 10 * tolerance
    assert cosine(plain) < (1 + noise**2) ** -0.5


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_bit_for_bit(dtype):
    parameters = make_parameters(dtype)
    optimizer = AdamWBf16(parameters, lr=1e-4, weight_decay=0.1, seed=5)
    for step in range(3):
        set_gradients(parameters, step)
        optimizer.step()
    twins = copy.deepcopy(parameters)
    restored = AdamWBf16(twins, lr=1.0, seed=77)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {s[name].dtype for s in restored.state.values() for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    torch.manual_seed(99)  # of no consequence
    for step in range(3, 6):
        for some, one in ((parameters, optimizer), (twins, restored)):
            set_gradients(some, step)
            one.step()
    for a, b in zip(parameters, twins, strict=True):
        assert torch.equal(a, b)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][name], restored.state[b][name])


def test_the_seed_decides_the_rounding_and_global_generators_are_left_alone():
    results = []
    for seed in (0, 0, 1):
        parameters = make_parameters(torch.bfloat16)
        optimizer = AdamWBf16(parameters, lr=1e-6, seed=seed)
        set_gradients(parameters, 0)
        before = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        results.append(parameters[0].detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_the_first_step_is_the_one_on_cpu_and_states_stay_on_the_device():
    ours, theirs = make_parameters(), [nn.Parameter(p.detach().cuda()) for p in make_parameters()]
    for parameters in (ours, theirs):
        set_gradients(ours, 0)
        for p, source in zip(parameters, ours, strict=True):
            p.grad = source.grad.to(p.device)
    here, there = AdamWBf16(ours, lr=1e-2), AdamWBf16(theirs, lr=1e-2)
    here.step()
    there.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b.cpu(), rtol=1e-5, atol=1e-8)
        assert there.state[b]["exp_avg"].is_cuda
