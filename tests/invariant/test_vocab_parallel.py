"""The head spread over ranks by vocabulary: log-probs and gradients of the whole head on one process.

Every case runs on all ranks of a gloo group; the reference is the dense fp64 definition, on each rank by itself.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

from simpo.core.logprobs import VocabShard, reference_token_logps, token_logps

N, D = 23, 16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}  # relative to the largest entry of each tensor

OPTIONS: list[dict[str, Any]] = [{}, {"scale": 0.25}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 2.0}]

# Rows held by each rank: as even as can be, ragged, and with nothing at either end or in the middle.
SHARDS = {
    2: [[255, 254], [7, 502], [1, 508], [0, 509], [509, 0], [3, 2], [1, 0]],
    4: [[128, 128, 128, 125], [1, 500, 0, 8], [0, 0, 509, 0], [2, 2, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
}


def make_inputs(vocabulary: int, dtype: torch.dtype, *, bias: bool, labels: Tensor | None = None) -> list[Any]:
    """hidden, weight, bias, labels of the whole head, the same on every rank; all ids of a small vocabulary occur."""
    generator = torch.Generator().manual_seed(0)
    count = N if labels is None else len(labels)
    hidden = torch.randn(count, D, generator=generator, dtype=torch.float64)
    weight = 0.5 * torch.randn(vocabulary, D, generator=generator, dtype=torch.float64)
    offset = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    if labels is None:
        labels = torch.randint(0, vocabulary, (N,), generator=generator)
        labels[: min(N, vocabulary)] = torch.arange(min(N, vocabulary))
        labels[-1] = vocabulary - 1
    return [hidden.to(dtype), weight.to(dtype), offset.to(dtype) if bias else None, labels]


def direction(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def gradients(function, hidden, weight, bias, labels, *, frozen: tuple[str, ...] = (), **options) -> dict[str, Tensor]:
    """The values and the gradients of what is not frozen."""
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {
        name: tensor.detach().clone().requires_grad_(name not in frozen)
        for name, tensor in named.items()
        if tensor is not None
    }
    logps = function(leaves["hidden"], leaves["weight"], labels, bias=leaves.get("bias"), **options)
    logps.backward(direction(len(labels)).to(logps.dtype))
    return {"logps": logps.detach()} | {name: leaf.grad for name, leaf in leaves.items() if name not in frozen}


def dense(inputs: list[Any], **options) -> dict[str, Tensor]:
    return gradients(
        reference_token_logps, *(t if t is None or t.dtype == torch.long else t.double() for t in inputs), **options
    )


def own_rows(sizes: list[int]) -> slice:
    edges = [0, *accumulate(sizes)]
    return slice(edges[dist.get_rank()], edges[dist.get_rank() + 1])


def sharded(inputs: list[Any], sizes: list[int], **options) -> dict[str, Tensor]:
    hidden, weight, bias, labels = inputs
    rows = own_rows(sizes)
    shard = VocabShard(dist.group.WORLD, rows.start, sum(sizes))
    held = [hidden, weight[rows], None if bias is None else bias[rows], labels]
    return gradients(token_logps, *held, shard=shard, **options)


def worst(actual: dict[str, Tensor], whole: dict[str, Tensor], sizes: list[int]) -> float:
    """The largest difference from this rank's part of the whole, relative to each tensor's largest entry."""
    assert actual.keys() == whole.keys()
    rows, found = own_rows(sizes), 0.0
    for name, value in actual.items():
        expected = whole[name][rows] if name in ("weight", "bias") else whole[name]
        assert value.shape == expected.shape, (name, value.shape, expected.shape)
        assert value.isfinite().all(), name
        if value.numel():
            difference = float((value - expected).abs().max())
            found = max(found, difference / float(whole[name].abs().max()) if difference else 0.0)
    return found


def compare_all_shards(dtype: torch.dtype) -> dict[str, float]:
    """Every way to cut, every transform, with and without a bias, in chunks and whole."""
    errors = {}
    for sizes in SHARDS[dist.get_world_size()]:
        for bias in (False, True):
            inputs = make_inputs(sum(sizes), dtype, bias=bias)
            for options in OPTIONS:
                whole = dense(inputs, **options)
                for chunk_size in (5, None):
                    actual = sharded(inputs, sizes, chunk_size=chunk_size, **options)
                    errors[f"{sizes} bias={bias} {options} chunk={chunk_size}"] = worst(actual, whole, sizes)
    return errors


def compare_special_cases() -> dict[str, float]:
    """What a trainer may do besides: nothing to predict, frozen parts, certainty on one shard."""
    size = dist.get_world_size()
    sizes, errors = SHARDS[size][0], {}
    inputs = make_inputs(509, torch.float64, bias=True)
    for frozen in (("hidden",), ("weight", "bias"), ("hidden", "bias")):
        errors[f"frozen {frozen}"] = worst(sharded(inputs, sizes, frozen=frozen), dense(inputs, frozen=frozen), sizes)
    for uneven in SHARDS[size][:4]:
        none = make_inputs(sum(uneven), torch.float64, bias=True, labels=torch.empty(0, dtype=torch.long))
        errors[f"no labels {uneven}"] = worst(sharded(none, uneven), dense(none), uneven)
    for label in (0, sizes[0] - 1, sizes[0], 508):
        for logit in (60.0, -60.0):
            weight = torch.zeros(509, D, dtype=torch.float64)
            weight[label] = logit / D
            sure = [torch.ones(3, D, dtype=torch.float64), weight, None, torch.tensor([label, (label + 1) % 509, 0])]
            errors[f"certain {label} {logit}"] = worst(sharded(sure, sizes), dense(sure), sizes)
    return errors


def compare_bf16() -> dict[str, tuple[float, float]]:
    """(difference in nats, relative difference of gradients) of bf16 products, sharded, from the exact ones."""
    found = {}
    for sizes in SHARDS[dist.get_world_size()][:3]:
        inputs = make_inputs(509, torch.float32, bias=True)
        whole = dense(inputs)
        actual = sharded(inputs, sizes, compute_dtype=torch.bfloat16, chunk_size=5)
        assert {value.dtype for value in actual.values()} == {torch.float32}
        nats = float((actual.pop("logps") - whole.pop("logps")).abs().max())
        found[str(sizes)] = (nats, worst(actual, whole, sizes))
    return found


def count_collectives(chunk_size: int | None) -> tuple[int, int]:
    """All-reduces of the forward pass, and of both passes."""
    inputs = make_inputs(509, torch.float32, bias=True)
    rows = own_rows(SHARDS[dist.get_world_size()][0])
    shard = VocabShard(dist.group.WORLD, rows.start, 509)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as calls:
        hidden, weight = inputs[0].requires_grad_(), inputs[1][rows].requires_grad_()
        logps = token_logps(hidden, weight, inputs[3], chunk_size=chunk_size, shard=shard)
        forward = calls.call_count
        logps.sum().backward()
        return forward, calls.call_count


def backward_twice() -> float:
    inputs, sizes = make_inputs(509, torch.float64, bias=False), SHARDS[dist.get_world_size()][0]
    rows = own_rows(sizes)
    hidden, weight = inputs[0].requires_grad_(), inputs[1][rows].requires_grad_()
    logps = token_logps(hidden, weight, inputs[3], chunk_size=10, shard=VocabShard(dist.group.WORLD, rows.start, 509))
    first = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logps.sum(), (hidden, weight))
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def compare_squares() -> dict[str, float]:
    """log sum_v p(v)^2 of every way to cut, beside the dense one; the log-probs keep their bits."""
    errors = {}
    for sizes in SHARDS[dist.get_world_size()]:
        hidden, weight, bias, labels = make_inputs(sum(sizes), torch.float64, bias=True)
        whole = reference_token_logps(hidden, weight, labels, bias=bias, squares=True)
        rows, shard = own_rows(sizes), VocabShard(dist.group.WORLD, own_rows(sizes).start, sum(sizes))
        held = {"bias": bias[rows], "shard": shard, "chunk_size": 5}
        actual = token_logps(hidden, weight[rows], labels, squares=True, **held)
        errors[str(sizes)] = float((actual - whole).abs().max())
        assert torch.equal(actual[0], token_logps(hidden, weight[rows], labels, **held))
    return errors


def assert_all_within(per_rank: list[dict[str, float]], tolerance: float) -> None:
    for rank, errors in enumerate(per_rank):
        wrong = {case: error for case, error in errors.items() if not error <= tolerance}
        assert not wrong, (rank, wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sharded_logps_equal_the_dense_head_in_values_and_gradients(two_ranks: Ranks, dtype):
    assert_all_within(two_ranks.run(compare_all_shards, dtype), TOLERANCE[dtype])


def test_sums_of_squares_over_shards_equal_the_dense_ones(two_ranks: Ranks):
    assert_all_within(two_ranks.run(compare_squares), 1e-11)


def test_frozen_parts_no_labels_and_certain_labels(two_ranks: Ranks):
    assert_all_within(two_ranks.run(compare_special_cases), 1e-12)


def test_bf16_products_stay_near_the_exact_ones(two_ranks: Ranks):
    """As for the head on one process: 0.03 nats, gradients within 1%."""
    for found in two_ranks.run(compare_bf16):
        assert all(nats < 0.03 and gradient < 1e-2 for nats, gradient in found.values()), found


def test_the_number_of_collectives_does_not_grow_with_chunks(two_ranks: Ranks):
    assert two_ranks.run(count_collectives, None) == [(2, 3)] * 2
    assert two_ranks.run(count_collectives, 2) == [(2, 3)] * 2


def test_a_second_backward_pass_gives_the_same_gradients(two_ranks: Ranks):
    assert max(two_ranks.run(backward_twice)) < 1e-12


@pytest.mark.four_processes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_four_shards_equal_the_dense_head_in_values_and_gradients(four_ranks: Ranks, dtype):
    assert_all_within(four_ranks.run(compare_all_shards, dtype), TOLERANCE[dtype])


@pytest.mark.four_processes
def test_four_shards_with_frozen_parts_no_labels_and_certain_labels(four_ranks: Ranks):
    assert_all_within(four_ranks.run(compare_special_cases), 1e-12)


@pytest.mark.parametrize(
    ("start", "labels", "message"),
    [
        (0, [0, 509], r"labels must lie in 0\.\.508 .* not 0\.\.509"),
        (255, [-1, 3], r"labels must lie in 0\.\.508 .* not -1\.\.3"),
        (256, [0, 1], "254 rows from row 256 on reaches outside a vocabulary of 509"),
        (-1, [0, 1], "254 rows from row -1 on"),
    ],
)
def test_labels_and_shards_outside_the_whole_vocabulary_are_refused(start, labels, message):
    with pytest.raises(ValueError, match=message):  # before anything is said to the other ranks, so no group is needed
        token_logps(torch.zeros(2, D), torch.zeros(254, D), torch.tensor(labels), shard=VocabShard(None, start, 509))
