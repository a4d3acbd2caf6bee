"""Log-probabilities of given tokens: a dense reference and a chunked path that never holds [N, V].

    logits   = transform(hidden @ weight.T + bias)
    log p(y) = logits[y] - logsumexp(logits)

`transform` is what some architectures do after their head: multiply by a scale (Cohere, Granite), then soft-cap
(Gemma). Matrix products run in the compute dtype (bf16 under autocast); everything after them, the sums over the
vocabulary and the gradients' accumulators included, is fp32 (fp64 when the inputs are fp64). Torch only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # default size of one chunk's fp32 logits


@dataclass(frozen=True)
class HeadOptions:
    """How hidden states become logits beyond the matrix product.

    Attributes:
        scale: logits are multiplied by this first.
        softcap: then softcap * tanh(logits / softcap); None = off.
        compute_dtype: dtype of the matrix products; None = the hidden states' own.
        chunk_size: rows whose logits exist at one time; None = as many as fit in CHUNK_BYTES.
    """

    scale: float = 1.0
    softcap: float | None = None
    compute_dtype: torch.dtype | None = None
    chunk_size: int | None = None


def reference_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The definition, in full: dense logits, log-softmax, gather. Arguments and result as in `token_logps`."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, dim=-1).gather(-1, labels[:, None])[:, 0]


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
) -> Tensor:
    """log p(label) for each hidden state, without ever holding the [N, V] logits.

    Args:
        hidden: [N, D] final hidden states of the rows that predict the labels.
        weight: [V, D] output embedding; may be frozen, or tied to the input embedding.
        labels: [N] int64 in 0..V-1.
        bias: [V], or None.
        scale, softcap, compute_dtype, chunk_size: see `HeadOptions`.
    Returns:
        [N] nats, fp32 (fp64 for fp64 inputs). Memory beyond inputs and gradients: O(chunk_size * V).
    Raises:
        ValueError: shapes do not fit, a chunk size below 1, or a label outside the vocabulary (CPU only: looking at
            labels on an accelerator would stall it).
    """
    _check_inputs(hidden, weight, labels, chunk_size)
    options = HeadOptions(scale=scale, softcap=softcap, compute_dtype=compute_dtype, chunk_size=chunk_size)
    return _ChunkedLogps.apply(hidden, weight, bias, labels, options)


def response_logps(token_logps: Tensor, response_lengths: Tensor) -> Tensor:
    """Sum token log-probs over each response.

    Args:
        token_logps: [N], grouped by response.
        response_lengths: [2P] int64, summing to N.
    Returns:
        [2P] nats. Summed in a fixed order, so the same batch gives the same bits on CUDA too (index_add does not).
    """
    return torch.segment_reduce(token_logps, "sum", lengths=response_lengths, unsafe=True, initial=0.0)


def _check_inputs(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N, D] and weight [V, D] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"one label per hidden state: {tuple(labels.shape)} labels, {hidden.shape[0]} rows")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    if (
        labels.device.type == "cpu"
        and labels.numel()
        and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]
    ):
        raise ValueError(
            f"labels must lie in 0..{weight.shape[0] - 1} (the head's vocabulary), not "
            f"{int(labels.min())}..{int(labels.max())}"
        )


class _ChunkedLogps(torch.autograd.Function):
    """Forward keeps one logsumexp per row; backward computes each chunk's logits again.

    d log p(y) / d logits = onehot(y) - softmax(logits), so with g the incoming gradient:
    d hidden = dlogits @ weight, d weight = dlogits.T @ hidden.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: HeadOptions
    ) -> Tensor:
        compute = options.compute_dtype or hidden.dtype
        h, w = hidden.to(compute), weight.to(compute)
        precise = torch.promote_types(compute, torch.float32)
        lse = torch.empty(hidden.shape[0], dtype=precise, device=hidden.device)
        target = torch.empty_like(lse)
        for rows in _chunks(hidden.shape[0], weight.shape[0], options.chunk_size):
            logits, _ = _logits(h[rows], w, bias, options)
            target[rows] = logits.gather(1, labels[rows, None])[:, 0]
            lse[rows] = logits.logsumexp(dim=1)
        # Leaves are saved, casts are made again: under autocast the weight's gradient stays in the weight's dtype.
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.options = options
        return target - lse

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        options: HeadOptions = ctx.options
        compute = options.compute_dtype or hidden.dtype
        h, w = hidden.to(compute), weight.to(compute)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty(hidden.shape, dtype=compute, device=hidden.device) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device) if need_weight else None
        d_bias = torch.zeros(weight.shape[0], dtype=lse.dtype, device=weight.device) if need_bias else None
        for rows in _chunks(hidden.shape[0], weight.shape[0], options.chunk_size):
            logits, tanh = _logits(h[rows], w, bias, options)
            d_logits = logits.sub_(lse[rows, None]).exp_().neg_()
            d_logits.scatter_add_(1, labels[rows, None], torch.ones_like(lse[rows, None]))
            d_logits *= grad_logps[rows, None]
            if tanh is not None:
                d_logits *= 1 - tanh * tanh
            if options.scale != 1.0:
                d_logits *= options.scale
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
            d_logits = d_logits.to(compute)
            # A backward pass inside an autocast region would otherwise round these products to bf16.
            with torch.autocast(h.device.type, enabled=False):
                if d_hidden is not None:
                    d_hidden[rows] = d_logits @ w
                if d_weight is not None:
                    _accumulate_product(d_weight, d_logits.T, h[rows])
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, the sum in total's precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, options: HeadOptions) -> tuple[Tensor, Tensor | None]:
    """Transformed logits of one chunk in fp32 (or fp64), and tanh of the soft-cap when there is one."""
    with torch.autocast(h.device.type, enabled=False):
        logits = h @ w.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits += bias
    if options.scale != 1.0:
        logits *= options.scale
    if options.softcap is None:
        return logits, None
    tanh = torch.tanh(logits / options.softcap)
    return tanh * options.softcap, tanh


def _chunks(num_rows: int, vocabulary: int, chunk_size: int | None) -> list[slice]:
    if chunk_size is None:
        chunk_size = max(16, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, start + chunk_size) for start in range(0, num_rows, chunk_size)]
