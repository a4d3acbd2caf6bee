"""Attention over packed rows in which responses share a prefix: a dense reference, and the choice of a fast path.

On CUDA in half precision all blocks go through one `varlen_attn` (`core.varlen_attention`), with soft-capped scores
through FlexAttention (`core.flex_attention`); on a CPU, and where those cannot be used, through products of matrices in
tiles (`core.matmul_attention`) or block by block through torch's own attention.

What attends to what is said by the row's blocks (`core.blocks`). The row may be spread over ranks (context parallelism,
`core.context`): blocks with a `group` say that each rank brings a slice of it.

Tensors in, tensors out; torch only. Registration with transformers is in `model.attention`.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import Tensor

from simpo.core.blocks import AttentionBlocks, ScoreOptions, dense_mask
from simpo.core.context import heads_to_rows, rows_to_heads
from simpo.core.device import counts_as_cuda
from simpo.core.flex_attention import flex_attention, has_compiler
from simpo.core.matmul_attention import matmul_attention
from simpo.core.varlen_attention import MAX_HEAD_SIZE, block_attention, varlen_attention

AttentionPath = Literal["varlen", "flex", "matmul", "blocks"]
ATTENTION_PATHS: tuple[AttentionPath, ...] = get_args(AttentionPath)


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
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * factor
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
    prefer: AttentionPath | None = None,
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
        prefer: the path to take where it can take these tensors; None = `attention_path` chooses.
    Under autocast the tensors are cast first.
    Returns:
        [1, Hq, T, D]; zeros in rows outside every block.
    Raises:
        ValueError: query heads that do not divide over the group.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as torch's own attention does; rotary embedding leaves fp32 behind
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    if blocks.group is not None:
        query, key, value = rows_to_heads(query, key, value, group=blocks.group)
    options = ScoreOptions(query.shape[-1] ** -0.5 if scale is None else scale, sliding_window, softcap)
    path = attention_path(query, value, softcap=softcap, dropout=dropout, prefer=prefer)
    if path == "blocks":
        out = block_attention(query, key, value, blocks, options, dropout=dropout)
    else:
        attend = {"varlen": varlen_attention, "flex": flex_attention, "matmul": matmul_attention}[path]
        out = attend(query, key, value, blocks, options)
    return out if blocks.group is None else heads_to_rows(out, group=blocks.group)


def attention_path(
    query: Tensor, value: Tensor, *, softcap: float | None, dropout: float, prefer: AttentionPath | None = None
) -> AttentionPath:
    """Which path `packed_attention` takes, outside autocast, for tensors like these: the preferred one if it can.

    varlen: one call of flash attention for all blocks. flex: soft-caps too. matmul: products of matrices, in tiles,
    anywhere. blocks: torch's own attention, block by block, the only one with dropout.
    """

    def can(path: AttentionPath) -> bool:
        return why_not(path, query, value, softcap=softcap, dropout=dropout) is None

    if prefer is not None and can(prefer):
        return prefer
    if counts_as_cuda(query):
        # torch's own attention keeps its memory small except for bf16 before Ampere, and for soft-caps, which it lacks.
        is_old = (_capability(query) or AMPERE) < AMPERE
        tiled = softcap is not None or (query.dtype == torch.bfloat16 and is_old)
    else:
        tiled = softcap is not None or query.device.type in ("cpu", "meta")
    order: tuple[AttentionPath, ...] = ("varlen", "flex", *(("matmul",) if tiled else ()), "blocks")
    return next(path for path in order if can(path))


def why_not(path: AttentionPath, query: Tensor, value: Tensor, *, softcap: float | None, dropout: float) -> str | None:
    """What keeps a path from taking tensors like these, for people; None = nothing."""
    if path == "blocks":
        return None
    if dropout > 0.0:
        return "the model has attention dropout"
    if path == "matmul":
        return None
    size = max(query.shape[-1], value.shape[-1])
    capability = _capability(query)
    if capability is None:
        return f"it needs a CUDA GPU, not {query.device.type}"
    if capability < AMPERE:
        return "it needs a GPU of compute capability 8.0 or more, this one has {}.{}".format(*capability)
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16 or fp16 compute, not {str(query.dtype).removeprefix('torch.')}"
    if size > MAX_HEAD_SIZE:
        return f"this model's heads of {size} are larger than {MAX_HEAD_SIZE}"
    if path == "flex":
        return None if has_compiler() else "it needs triton"
    return None if softcap is None else "this model soft-caps its scores"


AMPERE = (8, 0)


def _capability(tensor: Tensor) -> tuple[int, int] | None:
    """Compute capability of a tensor's CUDA device; None = another device. Without a card tensors are fake: 9.0."""
    if not counts_as_cuda(tensor):
        return None
    return _capability_of(tensor.device) if tensor.is_cuda and torch.cuda.is_available() else (9, 0)


_capability_of = functools.cache(torch.cuda.get_device_capability)
