"""Context parallelism for packed rows: every rank of a group computes one slice of the row.

Outside attention a transformer treats each token alone, so a rank works on its slice as if it were the row. For
attention the ranks exchange: from all heads of a slice to some heads of the whole row, and back (DeepSpeed-Ulysses,
arXiv:2309.14509). Shared prompts, windows and soft-caps are then what they are on one process. A response's labels may
lie on several ranks; their sums are added up with `sum_over`.

Gradients: every rank computes the same loss and holds a *part* of each parameter's gradient; the parts are to be summed
over the group. Torch only.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from simpo.core.batch import PackedPairs


def split_rows(batch: PackedPairs, group: dist.ProcessGroup) -> PackedPairs:
    """This rank's slice of a batch's tokens, with those labels whose predictors lie in it: one of equally long ones.

    Several rows are taken end to end as one, which is padded at the end to a multiple of the group's size. Labels were
    shifted when the batch was laid out, so none is lost at a cut. Call it before the batch goes to a GPU, which it
    would stall.

    Args:
        batch: with `blocks`, of the whole row.
        group: the ranks that have the slices, in order; attention then goes over all of them.
    Returns:
        The slice, with `local_lengths`; see `PackedPairs`.
    Raises:
        ValueError: an ordinary padded batch (its attention is transformers'), or a batch that is already a slice.
    """
    if batch.blocks is None:
        raise ValueError("context parallelism needs packed attention; set pack or share_prompt to true, or cp: 1")
    if batch.local_lengths is not None:
        raise ValueError("this batch is already a slice; split the whole row's batch instead")
    rank, size = group.rank(), group.size()
    length = -(-batch.num_tokens // size)
    start = rank * length

    def cut(tokens: Tensor) -> Tensor:
        return F.pad(tokens.flatten(), (0, length * size - batch.num_tokens))[None, start : start + length]

    def here(rows: Tensor) -> Tensor:
        return (rows >= start) & (rows < start + length)

    kept = here(batch.source_rows)
    count = len(batch.response_lengths)
    response = torch.arange(count, device=kept.device).repeat_interleave(batch.response_lengths)
    return replace(
        batch,
        input_ids=cut(batch.input_ids),
        position_ids=cut(batch.position_ids),
        blocks=replace(batch.blocks, group=group),
        source_rows=batch.source_rows[kept] - start,
        read_rows=batch.read_rows[here(batch.read_rows)] - start,
        labels=batch.labels[kept],
        local_lengths=torch.bincount(response[kept], minlength=count),
    )


def rows_to_heads(query: Tensor, key: Tensor, value: Tensor, *, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """From every head of this rank's slice to this rank's heads of the whole row, in one exchange.

    Args:
        query: [1, H, t, D] with H a multiple of the group's size P; key, value: [1, K, t, .], H a multiple of K. A rank
            gets the key heads that its query heads attend with; where P does not divide K, some go to several ranks.
    Returns:
        query [1, H/P, P*t, D]; key, value [1, K', P*t, .] with H/P a multiple of K'.
    Raises:
        ValueError: P does not divide H.
    """
    ranks, heads, key_heads = group.size(), query.shape[1], key.shape[1]
    if heads % ranks:
        raise ValueError(
            f"cp: {ranks} does not divide the {heads} query heads of an attention layer (with tp: of one rank's part); "
            "choose a cp that does"
        )
    # Copies stay next to each other, and so with their own query heads. ranks / gcd divides H / K, since ranks
    # divides H: no query head is left between two copies.
    copies = ranks // math.gcd(key_heads, ranks)
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    parts = [tensor.squeeze(0).unflatten(0, (ranks, -1)) for tensor in (query, key, value)]  # [P, h, t, .]
    received = _AllToAll.apply(torch.cat([part.flatten(1) for part in parts], dim=1), group)
    pieces = received.split([part[0].numel() for part in parts], dim=1)
    return tuple(
        piece.view(part.shape).transpose(0, 1).flatten(1, 2)[None] for piece, part in zip(pieces, parts, strict=True)
    )


def heads_to_rows(out: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """The way back: [1, H/P, P*t, D] of this rank's heads -> [1, H, t, D] of this rank's slice."""
    parts = out.squeeze(0).unflatten(1, (group.size(), -1)).transpose(0, 1)  # [P, h, t, D]
    return _AllToAll.apply(parts.contiguous(), group).flatten(0, 1)[None]


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every rank's x, on every rank; backward, each rank's x gets the gradient of its own sum.

    Right where all ranks compute the same from the sum: the gradient is then the same on all, and must not be summed
    again.
    """
    return _SumOver.apply(x, group)


class _AllToAll(torch.autograd.Function):
    """x [P, ...] -> what rank r of the group had in its place for this rank, in place r. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
