"""core.logprobs: the chunked log-probs against the dense definition, in values, gradients and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from simpo.core import logprobs
from simpo.core.logprobs import at_most_mean, reference_token_logps, response_logps, token_logps

N, D, V = 23, 16, 509  # an odd vocabulary: no kernel gets a round shape

TRANSFORMS = [
    {},
    {"scale": 0.25},
    {"softcap": 2.0},
    {"scale": 3.0, "softcap": 2.0},
]


def make_inputs(
    *, dtype: torch.dtype, bias: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """hidden, weight, bias and labels; the labels include both ends of the vocabulary, and repeats."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype, requires_grad=True)
    weight = (0.5 * torch.randn(V, D, generator=generator, dtype=dtype)).requires_grad_()
    offset = torch.randn(V, generator=generator, dtype=dtype, requires_grad=True) if bias else None
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[[0, 7]], labels[[1, N - 1]] = 0, V - 1
    return hidden, weight, offset, labels


def values_and_gradients(function, hidden, weight, bias, labels, **options) -> list[Tensor]:
    logps = function(hidden, weight, labels, bias=bias, **options)
    direction = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(logps.dtype)
    inputs = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return [logps.detach(), *torch.autograd.grad(logps, inputs, direction)]


def assert_close(actual: list[Tensor], expected: list[Tensor], *, tolerance: float) -> None:
    """Within tolerance of the largest entry of each expected tensor."""
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype
        assert float((a - e).abs().max()) <= tolerance * float(e.abs().max()), index


def test_reference_equals_torch_cross_entropy():
    hidden, weight, bias, labels = make_inputs(dtype=torch.float64, bias=True)
    expected = -F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none")
    actual = reference_token_logps(hidden, weight, labels, bias=bias)
    assert torch.allclose(actual, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_logps_equal_the_reference_in_values_and_gradients(dtype, tolerance, options, bias):
    inputs = make_inputs(dtype=dtype, bias=bias)
    expected = values_and_gradients(reference_token_logps, *inputs, **options)
    for chunk_size in (5, None):
        actual = values_and_gradients(token_logps, *inputs, **options, chunk_size=chunk_size)
        assert_close(actual, expected, tolerance=tolerance)


@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_gradients_pass_torch_gradcheck(options):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, 3, 3, 1])

    def logps(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return token_logps(h, w, labels, bias=b, chunk_size=2, **options)

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias))


def test_every_chunk_size_gives_the_same():
    inputs = make_inputs(dtype=torch.float64, bias=True)
    whole = values_and_gradients(token_logps, *inputs, softcap=2.0, chunk_size=N)
    for chunk_size in [*range(1, N), N + 1, 10 * N]:
        chunked = values_and_gradients(token_logps, *inputs, softcap=2.0, chunk_size=chunk_size)
        assert_close(chunked, whole, tolerance=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and bias"])
def test_frozen_inputs_leave_the_other_gradients_unchanged(frozen):
    inputs = dict(zip(("hidden", "weight", "bias", "labels"), make_inputs(dtype=torch.float64, bias=True), strict=True))
    for name in frozen.split(" and "):
        inputs[name].requires_grad_(False)
    expected = values_and_gradients(reference_token_logps, *inputs.values())
    assert_close(values_and_gradients(token_logps, *inputs.values(), chunk_size=4), expected, tolerance=1e-10)


def test_tied_weight_gets_the_sum_of_both_gradients():
    _, weight, _, labels = make_inputs(dtype=torch.float64)
    tokens = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))

    def loss(function) -> Tensor:
        return function(torch.tanh(F.embedding(tokens, weight)), weight, labels).square().sum()

    assert_close(
        torch.autograd.grad(loss(token_logps), weight),
        torch.autograd.grad(loss(reference_token_logps), weight),
        tolerance=1e-10,
    )


def test_bf16_compute_stays_near_fp32_and_returns_fp32():
    """bf16 rounds inputs and logits to 8 bits: within 0.03 nats for logits up to 12, gradients within 1%."""
    inputs = make_inputs(dtype=torch.float32, bias=True)
    expected = values_and_gradients(reference_token_logps, *inputs)
    for chunk_size in (1, 5, N):
        actual = values_and_gradients(token_logps, *inputs, compute_dtype=torch.bfloat16, chunk_size=chunk_size)
        assert float((actual[0] - expected[0]).abs().max()) < 0.03
        assert_close(actual[1:], expected[1:], tolerance=1e-2)


def test_bf16_weights_give_fp32_logps_and_bf16_gradients():
    inputs = [t.detach() if t is not None else None for t in make_inputs(dtype=torch.float32, bias=True)]
    exact = [t.to(torch.bfloat16).float().requires_grad_() for t in inputs[:3]]
    half = [t.detach().to(torch.bfloat16).requires_grad_() for t in exact]
    expected = values_and_gradients(reference_token_logps, *exact, inputs[3])
    actual = values_and_gradients(token_logps, *half, inputs[3], chunk_size=5)
    assert actual[0].dtype == torch.float32
    assert {t.dtype for t in actual[1:]} == {torch.bfloat16}
    assert_close([t.float() for t in actual], expected, tolerance=2e-2)


def test_sums_over_the_vocabulary_are_fp32_under_bf16_compute():
    """With equal logits the log-prob is -log V exactly; a bf16 logsumexp would be off by up to 0.016 nats."""
    hidden, weight = torch.ones(4, 8), torch.full((V, 8), 0.125)
    logps = token_logps(hidden, weight, torch.arange(4), compute_dtype=torch.bfloat16)
    assert torch.allclose(logps, torch.full((4,), -torch.log(torch.tensor(float(V)))), rtol=0, atol=1e-6)


def test_gradients_of_bf16_weights_add_up_over_chunks_in_fp32():
    """1024 equal contributions of 7/8, one chunk each; a bf16 sum would stop growing at 256."""
    weight = torch.zeros(8, 1, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    hidden, labels = torch.ones(1024, 1, dtype=torch.bfloat16), torch.zeros(1024, dtype=torch.long)
    token_logps(hidden, weight, labels, bias=bias, chunk_size=1).sum().backward()
    assert weight.grad[0].item() == bias.grad[0].item() == 1024 * 7 / 8


def test_autocast_around_the_head_and_its_backward_changes_nothing():
    inputs = make_inputs(dtype=torch.float32, bias=True)
    expected = values_and_gradients(token_logps, *inputs, chunk_size=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = values_and_gradients(token_logps, *inputs, chunk_size=5)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("label", "logit"), [(0, 60.0), (0, -60.0), (V - 1, 60.0), (V - 1, -60.0)])
def test_saturated_labels_at_both_ends_of_the_vocabulary(label, logit):
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.zeros(V, 1)
    weight[label] = logit
    logps = token_logps(hidden, weight.requires_grad_(), torch.tensor([label]))
    expected = reference_token_logps(hidden, weight, torch.tensor([label]))
    assert torch.equal(logps, expected)
    gradients = torch.autograd.grad(logps, (hidden, weight))
    assert_close(list(gradients), list(torch.autograd.grad(expected, (hidden, weight))), tolerance=2e-6)


def test_no_labels_give_no_logps_and_zero_gradients():
    hidden, weight, bias, _ = make_inputs(dtype=torch.float32, bias=True)
    logps = token_logps(hidden[:0], weight, torch.empty(0, dtype=torch.long), bias=bias)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert torch.count_nonzero(weight.grad) == torch.count_nonzero(bias.grad) == 0


class _LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result of any operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_no_tensor_of_all_logits_ever_exists(options, compute_dtype):
    num_labels, chunk_size = 64, 8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_labels, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, requires_grad=True)
    labels = torch.randint(0, V, (num_labels,), generator=generator)
    with _LargestTensor() as chunked:
        logps = token_logps(hidden, weight, labels, compute_dtype=compute_dtype, chunk_size=chunk_size, **options)
        logps.sum().backward()
    assert chunked.elements == max(chunk_size, D) * V  # one chunk of logits, or the weight itself
    with _LargestTensor() as dense:
        reference_token_logps(hidden, weight, labels, **options).sum().backward()
    assert dense.elements == num_labels * V  # the watcher sees what it is meant to see


@pytest.mark.parametrize(("compute_dtype", "most"), [(torch.float32, 20), (torch.bfloat16, 40)])
def test_the_default_chunk_keeps_logits_within_its_bytes_in_chunks_of_even_size(monkeypatch, compute_dtype, most):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 20 * V * 4 + 3)
    hidden, weight = torch.zeros(64, D), torch.zeros(V, D)
    with _LargestTensor() as largest:
        token_logps(hidden, weight, torch.zeros(64, dtype=torch.long), compute_dtype=compute_dtype)
    assert largest.elements == -(-64 // -(-64 // most)) * V


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("chunk_size", "products"), [(64, 3), (100, 3), (32, 7), (22, 11)])
def test_the_last_chunk_computes_its_logits_once(chunk_size, products, compute_dtype):
    """Products per chunk: logits, d hidden, d weight; and logits once more for every chunk but the last."""
    hidden, weight = torch.randn(64, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        labels = torch.zeros(64, dtype=torch.long)
        token_logps(hidden, weight, labels, compute_dtype=compute_dtype, chunk_size=chunk_size).sum().backward()
    num_chunks = -(-64 // chunk_size)
    assert products == 4 * num_chunks - 1
    assert counter.get_total_flops() == pytest.approx(2 * D * V * 64 * products / num_chunks, rel=0.05)


def test_logits_are_sliced_for_the_caches_without_a_trace(monkeypatch):
    inputs = make_inputs(dtype=torch.float64, bias=True)
    whole = values_and_gradients(token_logps, *inputs, softcap=2.0)
    monkeypatch.setattr(logprobs, "SLICE_BYTES", 1)  # at least 16 rows: two slices
    assert_close(values_and_gradients(token_logps, *inputs, softcap=2.0), whole, tolerance=1e-12)


def test_a_second_backward_pass_gives_the_same_gradients():
    """The first one overwrites the logits that the forward pass left."""
    hidden, weight, _, labels = make_inputs(dtype=torch.float64)
    logps = token_logps(hidden, weight, labels, chunk_size=10)
    first = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    assert_close(list(torch.autograd.grad(logps.sum(), (hidden, weight))), list(first), tolerance=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3)}, "do not fit"),
        ({"hidden": torch.zeros(1, 2, 4)}, "do not fit"),
        ({"weight": torch.zeros(4)}, "do not fit"),
        ({"labels": torch.tensor([1])}, "one label per hidden state"),
        ({"labels": torch.tensor([0, 5])}, r"labels must lie in 0\.\.4 .* not 0\.\.5"),
        ({"labels": torch.tensor([-100, 1])}, r"not -100\.\.1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, not 0"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    good = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "labels": torch.tensor([0, 4])}
    token_logps(**good)
    with pytest.raises(ValueError, match=message):
        token_logps(**(good | change))


@pytest.mark.parametrize("lengths", [[1], [3, 1], [1, 1, 1, 1], [5, 2, 9, 4], [2, 0, 3, 1]])
def test_response_logps_equal_a_python_loop_in_values_and_gradients(lengths):
    generator = torch.Generator().manual_seed(0)
    logps = torch.randn(sum(lengths), generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    sums = response_logps(logps, torch.tensor(lengths))
    (gradient,) = torch.autograd.grad(sums, logps, weights)
    at = 0
    for response, length in enumerate(lengths):
        assert sums[response].tolist() == pytest.approx(sum(logps[at : at + length].tolist()), abs=1e-14)
        assert gradient[at : at + length].tolist() == [float(weights[response])] * length
        at += length


@pytest.mark.parametrize("options", [{}, {"scale": 3.0}, {"softcap": 2.0}])
def test_sums_of_squares_are_those_of_the_dense_softmax_and_change_nothing_else(options):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(37, 16, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(509, 16, generator=generator, dtype=torch.float64), torch.randn(509, generator=generator)
    labels, bias = torch.randint(0, 509, (37,), generator=generator), bias.double()
    found = {}
    for squares in (False, True):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        values = token_logps(*leaves, labels, bias=bias, chunk_size=5, squares=squares, **options)
        logps = values[0] if squares else values
        found[squares] = [logps, *torch.autograd.grad(logps.square().sum(), leaves)]
    assert all(torch.equal(a, b) for a, b in zip(found[False], found[True], strict=True))
    dense = reference_token_logps(hidden, weight, labels, bias=bias, squares=True, **options)
    assert torch.allclose(values, dense, rtol=1e-12, atol=1e-12)


def test_sums_of_squares_of_bf16_products_and_certain_tokens_are_finite():
    weight = torch.zeros(509, 16)
    weight[7] = 100.0
    values = token_logps(torch.ones(3, 16), weight, torch.tensor([7, 8, 7]), compute_dtype=torch.bfloat16, squares=True)
    assert values[1].tolist() == [0.0, 0.0, 0.0]
    assert values[0].isfinite().all()


def test_a_mean_that_is_rounded_below_equal_probabilities_keeps_every_token():
    equal = torch.full((10,), 0.1, dtype=torch.float64)
    rounded = torch.nextafter(equal, torch.zeros_like(equal))
    assert at_most_mean(equal, rounded).all()
    assert not at_most_mean(equal * (1 + 1e-7), equal).any()
