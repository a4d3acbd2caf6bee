"""Attention over packed rows in which responses share a prefix: a dense reference, and the paths that are fast.

On CUDA in half precision all blocks go through one `varlen_attn`; on a CPU, and wherever scores are soft-capped,
through `core.matmul_attention`; otherwise block by block through torch's own attention.

A packed row is a list of *blocks*. Block (prefix_start, prefix_end, start, end) says: rows start..end attend to the
rows prefix_start..prefix_end and, causally, to themselves. A chosen sequence is a block with an empty prefix; the
rejected response that shares its first P tokens is a block whose prefix is those P rows. Any number of responses may
share one prefix. Nothing else is visible to anything, so packed pairs cannot see each other.

The row may be spread over ranks (context parallelism, `core.context`): blocks with a `group` say that each rank brings
a slice of it.

Tensors in, tensors out; torch only. Registration with transformers is in `engine.model`.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from simpo.core.context import heads_to_rows, rows_to_heads
from simpo.core.matmul_attention import ScoreOptions, matmul_attention

Block = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class AttentionBlocks:
    """The blocks of a flattened row, ascending and without overlap; an object, so that it passes through wrappers.

    Attributes:
        ranges: (prefix_start, prefix_end, start, end) each, with prefix_end <= start < end.
        group: the ranks that hold the row's slices, equal in size and in the group's order; None = all of it is here.
    """

    ranges: tuple[Block, ...]
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        previous_end = 0
        for prefix_start, prefix_end, start, end in self.ranges:
            if not (0 <= prefix_start <= prefix_end <= start < end and previous_end <= start):
                raise ValueError(f"attention block {(prefix_start, prefix_end, start, end)} overlaps or is empty")
            previous_end = end


def dense_mask(blocks: AttentionBlocks, num_tokens: int, *, sliding_window: int | None = None) -> Tensor:
    """What may attend to what, written out: [T, T] bool, True = visible. The definition the fast paths must meet."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for prefix_start, prefix_end, start, end in blocks.ranges:
        visible = [*range(prefix_start, prefix_end), *range(start, end)]
        for row in range(start, end):
            upto = (prefix_end - prefix_start) + (row - start) + 1
            first = 0 if sliding_window is None else max(0, upto - sliding_window)
            mask[row, visible[first:upto]] = True
    return mask


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: AttentionBlocks,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Masked softmax attention in full, O(T^2) memory: slow, and plain enough to be read as the specification.

    Shapes as in `packed_attention`. Rows outside every block (padding) give zeros.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = dense_mask(blocks, query.shape[2], sliding_window=sliding_window).to(query.device)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return weights @ value


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: AttentionBlocks,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Shared-prefix attention over one flattened row.

    Args:
        query: [1, Hq, T, D]; key, value: [1, Hkv, T, D] with Hq a multiple of Hkv. Where the blocks have a group, T
            is this rank's slice of the row, and Hq a multiple of the group's size.
        blocks: see `AttentionBlocks`.
        scale: score multiplier; None = D ** -0.5.
        sliding_window: a token sees itself and the sliding_window - 1 tokens before it; None = all.
        softcap: scores become softcap * tanh(scores / softcap) before the softmax (Gemma-2); None = off.
        dropout: probability of dropping an attention weight.
    Under autocast the tensors are cast first.
    Returns:
        [1, Hq, T, D]; zeros in rows outside every block.
    Raises:
        ValueError: query heads that do not divide over the group.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as torch's own attention does; rotary embedding leaves fp32 behind
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap, "dropout": dropout}
    if blocks.group is None:
        return _attend(query, key, value, blocks, **options)
    out = _attend(*rows_to_heads(query, key, value, group=blocks.group), blocks, **options)
    return heads_to_rows(out, group=blocks.group)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: AttentionBlocks,
    *,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """`packed_attention` with the whole row here, by the path that suits it."""
    path = attention_path(query, value, softcap=softcap, dropout=dropout)
    if path == "varlen":
        return _varlen_attention(query, key, value, blocks, scale=scale, sliding_window=sliding_window)
    if path == "matmul":
        options = ScoreOptions(query.shape[-1] ** -0.5 if scale is None else scale, sliding_window, softcap)
        return matmul_attention(query, key, value, blocks.ranges, options)
    return _block_by_block(
        query, key, value, blocks, scale=scale, sliding_window=sliding_window, softcap=softcap, dropout=dropout
    )


def _block_by_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: AttentionBlocks,
    **options: Any,
) -> Tensor:
    """torch's own attention on each block: where there is dropout, and for fp32 on an accelerator.

    options: of `_block_attention`.
    """
    outputs: list[Tensor] = []
    reached = 0
    for prefix_start, prefix_end, start, end in blocks.ranges:
        if start > reached:  # padding between blocks of different rows
            outputs.append(torch.zeros_like(query[:, :, reached:start]))
        block_key, block_value = key[:, :, start:end], value[:, :, start:end]
        if prefix_end > prefix_start:
            block_key = torch.cat([key[:, :, prefix_start:prefix_end], block_key], dim=2)
            block_value = torch.cat([value[:, :, prefix_start:prefix_end], block_value], dim=2)
        outputs.append(_block_attention(query[:, :, start:end], block_key, block_value, **options))
        reached = end
    if reached < query.shape[2]:
        outputs.append(torch.zeros_like(query[:, :, reached:]))
    return torch.cat(outputs, dim=2)


def _block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of Tq queries that end where the Tk >= Tq keys end (diagonal at the bottom right)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if sliding_window is not None and sliding_window >= num_keys:
        sliding_window = None
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        simple = num_queries == num_keys and sliding_window is None
        mask = None if simple else _bottom_right_mask(num_queries, num_keys, sliding_window, query.device)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=simple,
            scale=scale,
            enable_gqa=grouped,
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    mask = _bottom_right_mask(num_queries, num_keys, sliding_window, query.device)
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=precise).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def _bottom_right_mask(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    query_at = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_at = torch.arange(num_keys, device=device)[None, :]
    mask = key_at <= query_at
    if sliding_window is not None:
        mask &= key_at > query_at - sliding_window
    return mask


@functools.cache
def _varlen_options() -> frozenset[str]:
    """Keyword arguments that this torch's varlen_attn takes; empty when there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def attention_path(
    query: Tensor, value: Tensor, *, softcap: float | None, dropout: float
) -> Literal["varlen", "matmul", "blocks"]:
    """Which path `packed_attention` takes, outside autocast, for tensors like these.

    varlen: flash attention's kernels take CUDA, half precision, one head size of at most 256, no soft-cap, no dropout.
    matmul: CPUs and soft-caps, without dropout. blocks: the rest.
    """
    if dropout == 0.0 and (softcap is not None or query.device.type in ("cpu", "meta")):
        return "matmul"
    half = query.dtype in (torch.bfloat16, torch.float16)
    fits = query.is_cuda and half and query.shape[-1] == value.shape[-1] <= 256 and dropout == 0.0
    return "varlen" if fits and "window_size" in _varlen_options() else "blocks"


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: AttentionBlocks,
    *,
    scale: float | None,
    sliding_window: int | None,
) -> Tensor:
    """All blocks in one `varlen_attn` call; the keys and values of a shared prefix are repeated for each block."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    options: dict[str, object] = {}
    if groups > 1:
        if "enable_gqa" in _varlen_options():
            options["enable_gqa"] = True
        else:  # torch 2.11 may lack it
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, H, D]
    layout = _varlen_layout(blocks, query.device)
    out = varlen_attn(
        torch.cat([q[start:end] for start, end in layout.query_slices]),
        torch.cat([k[start:end] for start, end in layout.key_slices]),
        torch.cat([v[start:end] for start, end in layout.key_slices]),
        layout.cu_seq_q,
        layout.cu_seq_k,
        layout.max_q,
        layout.max_k,
        scale=scale,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),  # right 0 = causal
        **options,
    )
    return _with_padding_rows(out, blocks, query.shape[2]).transpose(0, 1)[None]


@dataclass(frozen=True)
class _VarlenLayout:
    query_slices: list[tuple[int, int]]
    key_slices: list[tuple[int, int]]
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int


@functools.lru_cache(maxsize=8)  # every layer of a forward pass asks for the same one
def _varlen_layout(blocks: AttentionBlocks, device: torch.device) -> _VarlenLayout:
    query_slices = [(start, end) for _, _, start, end in blocks.ranges]
    key_slices: list[tuple[int, int]] = []
    q_lengths, k_lengths = [], []
    for prefix_start, prefix_end, start, end in blocks.ranges:
        if prefix_end > prefix_start:
            key_slices.append((prefix_start, prefix_end))
        key_slices.append((start, end))
        q_lengths.append(end - start)
        k_lengths.append(prefix_end - prefix_start + end - start)

    def cumulative(lengths: list[int]) -> Tensor:
        return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device=device, dtype=torch.int32)

    return _VarlenLayout(
        query_slices, key_slices, cumulative(q_lengths), cumulative(k_lengths), max(q_lengths), max(k_lengths)
    )


def _with_padding_rows(out: Tensor, blocks: AttentionBlocks, num_tokens: int) -> Tensor:
    """Put zeros back where padding stood; out: [sum of block lengths, H, D] -> [num_tokens, H, D]."""
    if out.shape[0] == num_tokens:
        return out
    pieces, reached, taken = [], 0, 0
    for _, _, start, end in blocks.ranges:
        if start > reached:
            pieces.append(out.new_zeros(start - reached, *out.shape[1:]))
        pieces.append(out[taken : taken + end - start])
        taken, reached = taken + end - start, end
    pieces.append(out.new_zeros(num_tokens - reached, *out.shape[1:]))
    return torch.cat(pieces)
