"""Packed attention in one `varlen_attn` call: flash attention's kernels, for CUDA in half precision.

A block becomes a sequence. Its queries stand in the row one after another already, so they are not copied; its keys
and values are its prefix's rows and then its own, put together by one gather. The gather's backward writes each row
once and then adds what the sharers of a prefix send back, so that bytes grow with the tokens, not with their product
with the blocks, and no sum depends on the order of atomics. Nothing here waits for the device. Torch only.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from simpo.core.blocks import AttentionBlocks, Block, ScoreOptions, to_device

MAX_HEAD_SIZE = 256  # of flash attention's kernels
_HEAD_SIZE_STEP = 8  # and they take multiples of this


@functools.cache
def varlen_options() -> frozenset[str]:
    """Keyword arguments that this torch's varlen_attn takes; empty when there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, options: ScoreOptions
) -> Tensor:
    """Attention over the blocks of one row; shapes and meaning as in `core.attention.packed_attention`.

    Heads whose size is not a multiple of 8, or differs between values and keys, are padded with zeros, which changes
    neither scores nor results. Soft-caps are not supported.
    """
    from torch.nn.attention.varlen import varlen_attn

    layout = _layout(blocks, query.shape[2], query.device)
    groups, value_size = query.shape[1] // key.shape[1], value.shape[3]
    size = -(-max(query.shape[3], value_size) // _HEAD_SIZE_STEP) * _HEAD_SIZE_STEP
    q, k, v = (_padded(tensor.squeeze(0).transpose(0, 1), size) for tensor in (query, key, value))  # [T, H, size]
    if layout.query_rows is not None:
        q = q.index_select(0, layout.query_rows)
    if layout.keys is not None:
        k, v = _TakeKeys.apply(k, layout.keys), _TakeKeys.apply(v, layout.keys)
    elif layout.query_rows is not None:
        k, v = k.index_select(0, layout.query_rows), v.index_select(0, layout.query_rows)
    # torch 2.11 has no such flag, and its kernels take fewer key heads than query heads without one.
    flags: dict[str, Any] = {"enable_gqa": True} if groups > 1 and "enable_gqa" in varlen_options() else {}
    window = options.sliding_window
    left = -1 if window is None or window >= layout.max_k else window - 1
    lengths = (layout.cu_seq_q, layout.cu_seq_k, layout.max_q, layout.max_k)
    # Right 0 = causal. Without aux results varlen_attn returns the output alone.
    out = cast(Tensor, varlen_attn(q, k, v, *lengths, scale=options.scale, window_size=(left, 0), **flags))
    if out.shape[2] != value_size:
        out = out[:, :, :value_size]
    if layout.query_rows is not None:
        out = out.new_zeros(query.shape[2], *out.shape[1:]).index_copy(0, layout.query_rows, out)
    return out.transpose(0, 1)[None]


def _padded(tensor: Tensor, size: int) -> Tensor:
    return tensor if tensor.shape[2] == size else F.pad(tensor, (0, size - tensor.shape[2]))


class _TakeKeys(torch.autograd.Function):
    """rows [T, H, D] -> the rows that the sequences see, sequence by sequence, [K, H, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: _Keys) -> Tensor:
        ctx.keys, ctx.num_rows = keys, rows.shape[0]
        return rows[keys.rows]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        keys: _Keys = ctx.keys
        total = grad[keys.own_places]
        if keys.own_rows is not None:
            total = grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, keys.own_rows, total)
        for rows, places in keys.shared:  # no row twice in one of them
            total.index_add_(0, rows, grad[places])
        return total, None


@dataclass(frozen=True)
class _Keys:
    """Which rows the sequences see, and the way back.

    Attributes:
        rows: [K] of the row, sequence by sequence.
        own_places: where in those K the blocks' own rows are, ascending.
        own_rows: the blocks' own rows; None = all rows.
        shared: (rows, places) of prefixes; no row twice in one pair, and as many pairs as most blocks share a row.
    """

    rows: Tensor
    own_places: Tensor
    own_rows: Tensor | None
    shared: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class _Layout:
    """query_rows: rows that are queries, None = all; keys: None = no block has a prefix, and they are the same rows."""

    query_rows: Tensor | None
    keys: _Keys | None
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int


@functools.lru_cache(maxsize=8)  # every layer of a forward pass asks for the same one
def _layout(blocks: AttentionBlocks, num_tokens: int, device: torch.device) -> _Layout:
    ranges = blocks.ranges
    q_lengths = [end - start for _, _, start, end in ranges]
    k_lengths = [prefix_end - prefix_start + end - start for prefix_start, prefix_end, start, end in ranges]
    q_edges, k_edges = ([0, *itertools.accumulate(lengths)] for lengths in (q_lengths, k_lengths))
    parts = [torch.tensor(q_edges), torch.tensor(k_edges), torch.cat([torch.arange(*block[2:]) for block in ranges])]
    if k_lengths != q_lengths:
        rows, own_places = [], []
        for (prefix_start, prefix_end, start, end), k_end in zip(ranges, k_edges[1:], strict=True):
            rows += [torch.arange(prefix_start, prefix_end), torch.arange(start, end)]
            own_places.append(torch.arange(k_end - end + start, k_end))
        parts += [torch.cat(rows), torch.cat(own_places)]
        for sharers in _without_overlap(ranges):
            parts.append(torch.cat([torch.arange(*ranges[index][:2]) for index in sharers]))
            lengths = [ranges[index][1] - ranges[index][0] for index in sharers]
            places = zip((k_edges[index] for index in sharers), lengths, strict=True)
            parts.append(torch.cat([torch.arange(place, place + length) for place, length in places]))
    cu_seq_q, cu_seq_k, own_rows, *rest = to_device(parts, device, torch.int64)
    own_rows = own_rows if len(own_rows) < num_tokens else None
    keys = None
    if rest:
        rows, own_places, *shared = rest
        keys = _Keys(rows, own_places, own_rows, tuple(zip(shared[::2], shared[1::2], strict=True)))
    return _Layout(own_rows, keys, cu_seq_q.int(), cu_seq_k.int(), max(q_lengths), max(k_lengths))


def _without_overlap(ranges: tuple[Block, ...]) -> list[list[int]]:
    """Blocks that share a prefix, by index, in sets within which no two prefixes overlap."""
    sets: list[list[int]] = []
    for index in sorted(range(len(ranges)), key=lambda index: ranges[index][:2]):
        prefix_start, prefix_end = ranges[index][:2]
        if prefix_end == prefix_start:
            continue
        for members in sets:
            if ranges[members[-1]][1] <= prefix_start:
                members.append(index)
                break
        else:
            sets.append([index])
    return sets
