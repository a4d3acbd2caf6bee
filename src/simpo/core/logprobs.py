"""Log-probabilities of given tokens: a dense reference and a chunked path that never holds [N, V].

    logits   = transform(hidden @ weight.T + bias)
    log p(y) = logits[y] - logsumexp(logits)

`transform` is what some architectures do after their head: multiply by a scale (Cohere, Granite), then soft-cap
(Gemma). Matrix products run in the compute dtype (bf16 under autocast); everything after them, the sums over the
vocabulary and the gradients' accumulators included, is fp32 (fp64 when the inputs are fp64).

The vocabulary may be spread over ranks (`VocabShard`). Logits then never leave their rank: with L_r the logsumexp over
rank r's part and L the largest of them, logsumexp = L + log sum_r exp(L_r - L), and the label's logit comes from the
one rank that has it. log sum_v p(v)^2, where it is asked for, comes from the same logits, and over ranks in the same
reduction. Torch only.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from simpo.core.device import counts_as_cuda

CHUNK_BYTES = 128 * 2**20  # default size of one chunk's logits, in the compute dtype
CHUNK_BYTES_CUDA = 512 * 2**20  # large products hide what reading and writing the weight's gradient costs
SLICE_BYTES = 4 * 2**20  # a chunk's fp32 values at one time: what a CPU's caches hold
SLICE_BYTES_CUDA = 128 * 2**20  # enough to keep a GPU busy, and little compared with the chunk


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the whole output embedding this rank holds: start..start + V_local of them, V_local >= 0.

    Attributes:
        group: the ranks that hold the others; each row is held by exactly one. All of them pass the same hidden states
            and labels, and the same gradients come back to all of them.
        start: the global id of the first row held here.
        vocab_size: rows of the whole embedding.
    """

    group: dist.ProcessGroup
    start: int
    vocab_size: int


def reference_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    squares: bool = False,
) -> Tensor:
    """The definition, in full: dense logits, log-softmax, gather. Arguments and result as in `token_logps`."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = torch.log_softmax(logits, dim=-1)
    logps = log_probs.gather(-1, labels[:, None])[:, 0]
    return torch.stack([logps, log_probs.detach().exp().square().sum(dim=-1).log()]) if squares else logps


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    compute_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    shard: VocabShard | None = None,
    squares: bool = False,
) -> Tensor:
    """log p(label) for each hidden state, without ever holding the [N, V] logits.

    Args:
        hidden: [N, D] final hidden states of the rows that predict the labels.
        weight: [V, D] output embedding; may be frozen, or tied to the input embedding. With `shard`, [V_local, D].
        labels: [N] int64 in 0..V-1, of the whole vocabulary.
        bias: [V] ([V_local]), or None.
        scale: logits are multiplied by this first.
        softcap: then softcap * tanh(logits / softcap); None = off.
        compute_dtype: dtype of the matrix products; None = the hidden states' own.
        chunk_size: rows whose logits exist at one time; None = as many as fit in CHUNK_BYTES (CHUNK_BYTES_CUDA).
        shard: the part of the vocabulary that this rank holds; None = all of it.
        squares: also give log sum_v p(v)^2, from the same logits while they are at hand; it has no gradient.
    With `shard` all ranks of its group must call this, and run its backward pass, together; rank-local gradients of
    weight and bias, and the whole gradient of hidden on every rank.
    Returns:
        [N] nats, fp32 (fp64 for fp64 inputs); with `squares` [2, N], log p(label) and log sum_v p(v)^2. Memory beyond
            inputs and gradients: O(chunk_size * V).
    Raises:
        ValueError: shapes do not fit, a chunk size below 1, or a label outside the vocabulary (CPU only: looking at
            labels on an accelerator would stall it).
    """
    _check_inputs(hidden, weight, labels, chunk_size, shard)
    options = _Options(scale, softcap, compute_dtype, chunk_size, shard, squares)
    logps, log_squares = _ChunkedLogps.apply(hidden, weight, bias, labels, options)
    return logps if log_squares is None else torch.stack([logps, log_squares])


def response_logps(token_logps: Tensor, response_lengths: Tensor) -> Tensor:
    """Sum token log-probs over each response.

    Args:
        token_logps: [N], grouped by response.
        response_lengths: [2P] int64, summing to N; 0 gives a sum of 0.
    Returns:
        [2P] nats. Summed in a fixed order, so the same batch gives the same bits on CUDA too (index_add does not).
    """
    return torch.segment_reduce(token_logps, "sum", lengths=response_lengths, unsafe=True, initial=0.0)


def at_most_mean(probabilities: Tensor, means: Tensor) -> Tensor:
    """Which tokens are at most as probable as their response's tokens are on average: bool, at least one a response.

    Args:
        probabilities: of tokens, fp64.
        means: fp64, broadcast to the tokens: the mean over each one's response. A mean of equal numbers may be rounded
            below them; 1e-9 is more than the rounding of a sum of a million, and less than fp32 tells apart.
    Source: ConfPO, arXiv:2506.08712.
    """
    return probabilities <= means * (1 + 1e-9)


def logit_gradient_squares(token_logps: Tensor, log_squares: Tensor) -> Tensor:
    """|d log p(y) / d logits|^2 of each token: |onehot(y) - p|^2 = (1 - p(y))^2 + sum over the others of p(v)^2."""
    return token_logps.expm1().square() + (log_squares.exp() - (2 * token_logps).exp()).clamp(min=0)


def _check_inputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int | None, shard: VocabShard | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N, D] and weight [V, D] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"one label per hidden state: {tuple(labels.shape)} labels, {hidden.shape[0]} rows")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    vocab_size = weight.shape[0] if shard is None else shard.vocab_size
    if shard is not None and not 0 <= shard.start <= shard.start + weight.shape[0] <= vocab_size:
        raise ValueError(
            f"a shard of {weight.shape[0]} rows from row {shard.start} on reaches outside a vocabulary of {vocab_size}"
        )
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
        raise ValueError(
            f"labels must lie in 0..{vocab_size - 1} (the head's vocabulary), not "
            f"{int(labels.min())}..{int(labels.max())}"
        )


class _Options(NamedTuple):
    """As in `token_logps`."""

    scale: float
    softcap: float | None
    compute_dtype: torch.dtype | None
    chunk_size: int | None
    shard: VocabShard | None
    squares: bool


class _ChunkedLogps(torch.autograd.Function):
    """Forward keeps one logsumexp per row, and the last chunk's logits; backward computes the other chunks' again.

    A batch that fits into one chunk therefore computes its logits once.

    d log p(y) / d logits = onehot(y) - softmax(logits), so with g the incoming gradient:
    d hidden = dlogits @ weight, d weight = dlogits.T @ hidden.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        compute = options.compute_dtype or hidden.dtype
        h, w = hidden.to(compute), weight.to(compute)
        precise = torch.promote_types(compute, torch.float32)
        lse = torch.full(hidden.shape[:1], float("-inf"), dtype=precise, device=hidden.device)
        target = torch.zeros_like(lse)
        squares = lse.clone() if options.squares else None  # log sum p^2, p the softmax over what is held here
        held = None
        if options.shard is not None:
            # Row numbers of the weight held here; the others' labels become row 0, which is a row like any other.
            labels = labels - options.shard.start
            held = (labels >= 0) & (labels < weight.shape[0])
            labels = labels.masked_fill(~held, 0)
        products = None
        for rows in chunk_rows(h, weight.shape[0], options.chunk_size):
            products = _product(h[rows], w.T)
            for part in _slices(products):
                at = _shift(part, rows)
                logits, _ = _transform(products[part], bias, options)
                target[at] = logits.gather(1, labels[at, None])[:, 0]
                lse[at] = logits.logsumexp(dim=1)
                if squares is not None:
                    squares[at] = logits.sub_(lse[at, None]).exp_().square_().sum(dim=1).log_()
        if options.shard is not None and held is not None:
            lse, target, squares = _reduce_over_shards(lse, target, squares, held, options.shard.group)
        # Leaves are saved, casts are made again: under autocast the weight's gradient stays in the weight's dtype.
        ctx.save_for_backward(hidden, weight, bias, labels, held, lse)
        ctx.options = options
        ctx.last_products = products if any(ctx.needs_input_grad) else None
        if squares is not None:
            ctx.mark_non_differentiable(squares)
        return target - lse, squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, held, lse = ctx.saved_tensors
        options: _Options = ctx.options
        compute = options.compute_dtype or hidden.dtype
        h, w = hidden.to(compute), weight.to(compute)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros(hidden.shape, dtype=compute, device=hidden.device) if need_hidden else None
        d_weight = None
        grad_targets = grad_logps if held is None else grad_logps * held  # 0 where another rank has the label's logit
        d_bias = torch.zeros(weight.shape[0], dtype=lse.dtype, device=weight.device) if need_bias else None
        products, ctx.last_products = ctx.last_products, None  # overwritten below: not for a second backward
        for rows in reversed(chunk_rows(h, weight.shape[0], options.chunk_size)):
            products = _product(h[rows], w.T) if products is None else products
            for part in _slices(products):
                at = _shift(part, rows)
                logits, tanh = _transform(products[part], bias, options)
                d_logits = logits.sub_(lse[at, None]).exp_().mul_(-grad_logps[at, None])
                d_logits.scatter_add_(1, labels[at, None], grad_targets[at, None])
                if tanh is not None:
                    d_logits *= 1 - tanh * tanh
                if options.scale != 1.0:
                    d_logits *= options.scale
                if d_bias is not None:
                    d_bias += d_logits.sum(dim=0)
                products[part] = d_logits  # with respect to hidden @ weight.T (+ bias)
                del logits, tanh, d_logits  # before the next slice's come
            d_products, products = products, None
            if d_hidden is not None:
                d_hidden[rows] = _product(d_products, w)
            if need_weight:
                d_weight = _add_product(d_weight, d_products.T, h[rows], lse.dtype)
            del d_products  # before the next chunk's logits come
        if need_weight and d_weight is None:  # nothing of the vocabulary is here
            d_weight = torch.zeros_like(weight)
        if d_hidden is not None and options.shard is not None:
            d_hidden = d_hidden.to(lse.dtype)  # a sum over the vocabulary too
            dist.all_reduce(d_hidden, group=options.shard.group)
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _reduce_over_shards(
    lse: Tensor, target: Tensor, squares: Tensor | None, held: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The whole vocabulary's logsumexp, the labels' logits and log sum p^2, [N] each, from those of every shard."""
    largest = lse.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    parts = [torch.exp(lse - largest), target.masked_fill(~held, 0.0)]
    if squares is not None:
        parts.append(torch.exp(squares + 2 * (lse - largest)))
    sums = torch.stack(parts)
    dist.all_reduce(sums, group=group)
    whole = sums[0].log()
    return largest + whole, sums[1], None if squares is None else sums[2].log() - 2 * whole


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in their own dtype, also where autocast would choose another."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, precise: torch.dtype) -> Tensor:
    """total + left @ right, the sum over chunks in the precise dtype; None = 0."""
    if total is None:
        return _product(left, right).to(precise)
    if left.dtype == precise:
        return torch.addmm(total, left, right, out=total)  # which torch's flop counter counts, unlike addmm_
    return total.add_(_product(left, right))


def _transform(products: Tensor, bias: Tensor | None, options: _Options) -> tuple[Tensor, Tensor | None]:
    """Logits of some rows in fp32 (or fp64), a new tensor, and tanh of the soft-cap when there is one."""
    logits = products.to(torch.promote_types(products.dtype, torch.float32), copy=True)
    if bias is not None:
        logits += bias
    if options.scale != 1.0:
        logits *= options.scale
    if options.softcap is None:
        return logits, None
    tanh = torch.tanh(logits / options.softcap)
    return tanh * options.softcap, tanh


def chunk_rows(hidden: Tensor, vocabulary: int, chunk_size: int | None) -> list[slice]:
    """Rows of `hidden` (in the compute dtype) whose logits are computed together; the sizes differ by at most one.

    An empty list where there is no vocabulary (an empty shard), so that nothing is multiplied by it.
    """
    if vocabulary == 0:
        return []
    if chunk_size is None:
        budget = CHUNK_BYTES_CUDA if counts_as_cuda(hidden) else CHUNK_BYTES
        chunk_size = max(16, budget // (hidden.element_size() * vocabulary))
    return _cut(hidden.shape[0], chunk_size)


def _slices(products: Tensor) -> list[slice]:
    """Rows of a chunk whose fp32 values exist at one time."""
    budget = SLICE_BYTES_CUDA if counts_as_cuda(products) else SLICE_BYTES
    return _cut(products.shape[0], max(16, budget // (4 * products.shape[1])))


def _cut(num_rows: int, most: int) -> list[slice]:
    """0..num_rows in as few pieces of at most `most` rows as there can be, of even size."""
    count = max(1, -(-num_rows // most))
    edges = [num_rows * index // count for index in range(count + 1)]
    return [slice(low, high) for low, high in itertools.pairwise(edges)]


def _shift(part: slice, rows: slice) -> slice:
    return slice(rows.start + part.start, rows.start + part.stop)
