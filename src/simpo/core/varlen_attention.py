"""Packed attention by sequences: all in one `varlen_attn` call, or one by one through torch's own attention.

A block becomes a sequence. Its queries stand in the row one after another already, so they are not copied; its keys
and values are its prefix's rows and then its own, put together by one gather. The gather's backward writes each row
once and then adds what the sharers of a prefix send back, so that bytes grow with the tokens, not with their product
with the blocks, and no sum depends on the order of atomics. Nothing here waits for the device. Torch only.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from simpo.core.blocks import AttentionBlocks, Block, ScoreOptions, bottom_right_mask, to_device
from simpo.core.device import counts_as_cuda

MAX_HEAD_SIZE = 256  # of flash attention's kernels
_HEAD_SIZE_STEP = 8  # and they take multiples of this


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, options: ScoreOptions
) -> Tensor:
    """Attention over the blocks of one row; shapes and meaning as in `core.attention.packed_attention`.

    Flash attention's kernels, for CUDA in half precision. Heads whose size is not a multiple of 8, or differs between
    values and keys, are padded with zeros, which changes neither scores nor results. Soft-caps are not supported.
    """
    from torch.nn.attention.varlen import varlen_attn

    value_size = value.shape[3]
    size = -(-max(query.shape[3], value_size) // _HEAD_SIZE_STEP) * _HEAD_SIZE_STEP
    # torch 2.11 has no such flag, and its kernels take fewer key heads than query heads without one.
    flags: dict[str, Any] = (
        {"enable_gqa": True} if query.shape[1] > key.shape[1] and _takes_gqa_flag(varlen_attn) else {}
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: _Layout) -> Tensor:
        window, longest = options.sliding_window, max(layout.k_lengths)
        left = -1 if window is None or window >= longest else window - 1
        lengths = (layout.cu_seq_q, layout.cu_seq_k, max(layout.q_lengths), longest)
        # Right 0 = causal. Without aux results varlen_attn returns the output alone.
        out = cast(Tensor, varlen_attn(q, k, v, *lengths, scale=options.scale, window_size=(left, 0), **flags))
        return out if out.shape[2] == value_size else out[:, :, :value_size]

    return _by_sequences(query, key, value, blocks, attend, head_size=size)


@functools.cache
def _takes_gqa_flag(varlen_attn: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, options: ScoreOptions, *, dropout: float = 0.0
) -> Tensor:
    """The same by torch's own attention, block by block: with dropout, fp32 on an accelerator, and very large heads."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: _Layout) -> Tensor:
        splits = q.split(layout.q_lengths), k.split(layout.k_lengths), v.split(layout.k_lengths)
        outs = [
            _attend_alone(*(rows.transpose(0, 1)[None] for rows in sequence), options=options, dropout=dropout)
            for sequence in zip(*splits, strict=True)
        ]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    return _by_sequences(query, key, value, blocks, attend)


def _attend_alone(query: Tensor, key: Tensor, value: Tensor, *, options: ScoreOptions, dropout: float) -> Tensor:
    """Causal attention of Tq queries that end where the Tk >= Tq keys end (diagonal at the bottom right)."""
    num_queries, num_keys, softcap = query.shape[2], key.shape[2], options.softcap
    window = options.sliding_window
    window = None if window is None or window >= num_keys else window
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and (softcap is not None or counts_as_cuda(query)):
        # On CUDA only flash attention takes fewer key heads, and it takes neither fp32 nor a mask: without this torch
        # would write the scores out.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1
    if softcap is None:
        simple = num_queries == num_keys and window is None
        mask = None if simple else bottom_right_mask(num_queries, num_keys, window, query.device)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=simple,
            scale=options.scale,
            enable_gqa=groups > 1,
        )
    mask = bottom_right_mask(num_queries, num_keys, window, query.device)
    scores = softcap * torch.tanh((query @ key.transpose(-1, -2)) * options.scale / softcap)
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=precise).to(query.dtype)
    return F.dropout(weights, dropout) @ value


class _Layout(NamedTuple):
    """The blocks as sequences. Rows and places are int64, on the rows' device.

    Attributes:
        q_lengths, k_lengths, cu_seq_q, cu_seq_k: of each sequence, and where each begins.
        own_rows: the blocks' own rows, which are queries; None = all rows.
        seen_rows: [K] the rows that the sequences see, sequence by sequence; None = all rows, each once.
        own_places: where in those K the blocks' own rows are, ascending.
        shared: (rows, places) of prefixes; no row twice in one pair, and as many pairs as most blocks share a row.
    """

    q_lengths: list[int]
    k_lengths: list[int]
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    own_rows: Tensor | None
    seen_rows: Tensor | None
    own_places: Tensor
    shared: tuple[tuple[Tensor, Tensor], ...]


def _by_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: AttentionBlocks,
    attend: Callable[[Tensor, Tensor, Tensor, _Layout], Tensor],
    *,
    head_size: int | None = None,
) -> Tensor:
    """From rows to sequences, whose heads may be padded to a size, to what `attend` makes of them, to rows again."""
    num_tokens = query.shape[2]
    layout = _layout(blocks, num_tokens, query.device)
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # [T, H, D]
    if head_size is not None:
        q, k, v = (x if x.shape[2] == head_size else F.pad(x, (0, head_size - x.shape[2])) for x in (q, k, v))
    if layout.own_rows is not None:
        q = q.index_select(0, layout.own_rows)
    if layout.seen_rows is not None:
        k, v = _TakeSeen.apply(k, layout), _TakeSeen.apply(v, layout)
    out = attend(q, k, v, layout)
    if layout.own_rows is not None:
        out = out.new_zeros(num_tokens, *out.shape[1:]).index_copy(0, layout.own_rows, out)
    return out.transpose(0, 1)[None]


class _TakeSeen(torch.autograd.Function):
    """rows [T, H, D] -> those that the sequences see, [K, H, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: _Layout) -> Tensor:
        ctx.layout, ctx.num_rows = layout, rows.shape[0]
        return rows[layout.seen_rows]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout: _Layout = ctx.layout
        total = grad[layout.own_places]
        if layout.own_rows is not None:
            total = grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, layout.own_rows, total)
        for rows, places in layout.shared:  # no row twice in one of them
            total.index_add_(0, rows, grad[places])
        return total, None


@functools.lru_cache(maxsize=8)  # every layer of a forward pass asks for the same one
def _layout(blocks: AttentionBlocks, num_tokens: int, device: torch.device) -> _Layout:
    prefixes = [torch.arange(prefix_start, prefix_end) for prefix_start, prefix_end, _, _ in blocks.ranges]
    own = [torch.arange(start, end) for _, _, start, end in blocks.ranges]
    parts = list(itertools.chain.from_iterable(zip(prefixes, own, strict=True)))  # in the order that is seen
    q_lengths, k_lengths = [len(rows) for rows in own], [len(a) + len(b) for a, b in zip(prefixes, own, strict=True)]
    edges = [torch.tensor([0, *itertools.accumulate(lengths)]) for lengths in (q_lengths, k_lengths)]
    places = torch.arange(sum(k_lengths)).split([len(rows) for rows in parts])
    indices = [torch.cat(own), torch.cat(parts), torch.cat(places[1::2])]
    for sharers in _without_overlap(blocks.ranges):
        indices += [torch.cat([prefixes[index] for index in sharers]), torch.cat([places[2 * i] for i in sharers])]
    cu_seq_q, cu_seq_k, own_rows, seen_rows, own_places, *shared = to_device([*edges, *indices], device, torch.int64)
    return _Layout(
        q_lengths,
        k_lengths,
        cu_seq_q.int(),
        cu_seq_k.int(),
        own_rows if len(own_rows) < num_tokens else None,
        seen_rows if shared or len(own_rows) < num_tokens else None,
        own_places,
        tuple(zip(shared[::2], shared[1::2], strict=True)),
    )


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
