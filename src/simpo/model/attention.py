"""Packed attention as an attention implementation of transformers, and the way back to transformers' own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from simpo.core.attention import ATTENTION_PATHS, AttentionPath, packed_attention

PACKED = "simpo_packed"  # the attention implementation's name in transformers; see also `packed_by`


class OrdinaryRows(RuntimeError):
    """Packed attention was called without the blocks that say what attends to what."""


def packed_by(path: AttentionPath | None) -> str:
    """The implementation's name in transformers where a path of `core.attention` is preferred; None = no preference."""
    return PACKED if path is None else f"{PACKED}_{path}"


def is_packed(implementation: str | None) -> bool:
    """Whether an implementation's name in transformers is that of packed attention, whichever path it prefers."""
    return implementation is not None and (implementation == PACKED or implementation.startswith(f"{PACKED}_"))


@torch.compiler.disable(reason="it loops over ranges that are data")
def _packed_attention_for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_blocks: Any = None,
    prefer: AttentionPath | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [B, H, T, D] -> [B, T, H, D]. B rows are taken as one flattened row."""
    if packed_blocks is None:
        raise OrdinaryRows(
            f"attention {PACKED!r} was called on ordinary rows; use model.attention.plain_attention(model) around "
            "generate() and other ordinary forward passes"
        )
    if others.get("s_aux") is not None:
        raise ValueError("attention sinks (s_aux) are not supported by packed attention")
    if attention_mask is not None and sliding_window is None:
        _check_local_mask(module, packed_blocks, attention_mask)
    batch, _, width, _ = query.shape

    def flatten(x: Tensor) -> Tensor:
        return x if batch == 1 else x.transpose(0, 1).flatten(1, 2)[None]

    out = packed_attention(
        flatten(query),
        flatten(key),
        flatten(value),
        packed_blocks,
        scale=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        dropout=dropout,
        prefer=prefer,
    )
    return out.squeeze(0).transpose(0, 1).unflatten(0, (batch, width)), None


def _packed_mask(*, q_length: int, local_size: int | None = None, **others: Any) -> Tensor | None:
    """In place of a mask: None, or how far a layer may look where that can be less than the row is long."""
    slices = dist.get_world_size() if dist.is_initialized() else 1  # as many as there can be
    return None if local_size is None or local_size >= slices * q_length else torch.tensor(local_size)


def _check_local_mask(module: nn.Module, blocks: Any, mask: Tensor) -> None:
    """Refuse a layer whose window exists in its mask alone (Llama4's chunks, Qwen2-MoE's windows): it would be lost."""
    if mask.ndim == 2:  # the ones that `compute_token_logps` passes, handed on by a model that builds no mask
        return
    if mask.ndim != 0:
        raise ValueError(
            f"{type(module).__name__} builds an attention mask of its own, which packed attention does not read; set "
            "pack and share_prompt to false"
        )
    local_size = int(mask)
    longest = max(prefix_end - prefix_start + end - start for prefix_start, prefix_end, start, end in blocks.ranges)
    if longest > local_size:
        raise ValueError(
            f"{type(module).__name__} attends to {local_size} tokens at a time through its mask alone, which packed "
            f"attention does not read, and a sequence here has {longest} tokens; lower max_length to {local_size}, or "
            "set pack and share_prompt to false"
        )


for _name, _path in {PACKED: None, **{packed_by(path): path for path in ATTENTION_PATHS}}.items():
    AttentionInterface.register(_name, functools.partial(_packed_attention_for_transformers, prefer=_path))
    # Without a mask function of that name transformers would pass no mask and say nothing.
    AttentionMaskInterface.register(_name, _packed_mask)


def plain_implementation(model: PreTrainedModel) -> str:
    """transformers' own attention for this model: sdpa, or eager where sdpa cannot do what it needs (soft-caps)."""
    softcapped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "sdpa" if model._supports_sdpa and not softcapped else "eager"


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Inside, the model attends as transformers does: for generate() and padded batches."""
    base = unwrap(model)
    before = base.config._attn_implementation
    if is_packed(before):
        base.set_attn_implementation(plain_implementation(base))
    try:
        yield
    finally:
        if is_packed(before):
            base.set_attn_implementation(before)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an engine's wrapper (DDP, DeepSpeed) and a PEFT wrapper, or the model itself."""
    while isinstance(inner := model._modules.get("module"), nn.Module):
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model
