"""Packed attention by FlexAttention: for soft-capped scores on CUDA, which no flash kernel of torch's takes.

Which rows of a prefix and which own rows a query sees are two intervals; three numbers a row say both, with the window
already in them. The same blocks give, on the CPU, the tiles of the score matrix in which anything is visible and those
in which everything is, so no [T, T] mask is ever made. Both are made once for a batch and a window. Torch only.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simpo.core.blocks import AttentionBlocks, ScoreOptions, to_device

TILE = 128  # rows and columns; the kernel's own tiles must divide it


def flex_attention(query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, options: ScoreOptions) -> Tensor:
    """Attention over the blocks of one row; shapes and meaning as in `core.attention.packed_attention`.

    On CUDA it is compiled at the first call: once for each dtype, and once with and once without gradients; rows of
    other lengths use the same kernels.
    """
    mask = _block_mask(blocks, query.shape[2], query.device, options.sliding_window)
    return _compiled(query.is_cuda)(
        query,
        key,
        value,
        score_mod=None if options.softcap is None else _capped(options.softcap),
        block_mask=mask,
        scale=options.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        # The other kernel, for few queries, does not take every number of heads that share a key head.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )


@functools.cache
def has_compiler() -> bool:
    """Whether FlexAttention can be compiled for a GPU here; uncompiled it writes the whole score matrix out."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


@functools.cache
def _compiled(cuda: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention as plain

    # A whole graph or an error: what falls back to eager would take memory with the square of the tokens.
    return for_all_lengths(torch.compile(plain, fullgraph=True, dynamic=True)) if cuda else plain


def for_all_lengths(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Lengths become variables of the compiled code; scale and soft-cap stay constants of it."""

    def call(*tensors: Tensor, **options: Any) -> Tensor:
        with torch._dynamo.config.patch(specialize_float=True):
            return compiled(*tensors, **options)

    return call


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@functools.lru_cache(maxsize=16)  # every layer of a forward pass asks for the same one, or one of two windows
def _block_mask(blocks: AttentionBlocks, num_tokens: int, device: torch.device, sliding_window: int | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    intervals = _intervals(blocks, num_tokens, sliding_window)
    touched, full = _tiles(blocks, num_tokens, sliding_window)
    partial = touched & ~full
    matrices = [*_ordered(partial), *_ordered(full), *_ordered(partial.T), *_ordered(full.T)]
    prefix_first, prefix_end, own_first, *tiles = to_device([*intervals, *matrices], device, torch.int32)
    count = touched.shape[0]
    tiles = [t.view(1, 1, count) if index % 2 == 0 else t.view(1, 1, count, count) for index, t in enumerate(tiles)]

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        in_prefix = (column >= prefix_first[row]) & (column < prefix_end[row])
        return in_prefix | ((column >= own_first[row]) & (column <= row))

    return BlockMask((num_tokens, num_tokens), *tiles, BLOCK_SIZE=(TILE, TILE), mask_mod=mask_mod)


def _intervals(blocks: AttentionBlocks, num_tokens: int, sliding_window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """For each row, [T] each: the first row of its prefix that it sees, its prefix's end, its own first visible row."""
    prefix_first, prefix_end = torch.zeros(num_tokens, dtype=torch.long), torch.zeros(num_tokens, dtype=torch.long)
    own_first = torch.full((num_tokens,), num_tokens)  # padding sees nothing
    for low, high, start, end in blocks.ranges:
        rows = torch.arange(start, end)
        first = torch.full_like(rows, low), torch.full_like(rows, start)
        if sliding_window is not None:
            own = rows - sliding_window + 1
            first = torch.clamp(own - start + high, min=low), torch.clamp(own, min=start)
        prefix_first[start:end], own_first[start:end] = first
        prefix_end[start:end] = high
    return prefix_first, prefix_end, own_first


def _tiles(blocks: AttentionBlocks, num_tokens: int, sliding_window: int | None) -> tuple[Tensor, Tensor]:
    """[n, n] bool each: the tiles in which some row sees some column, and those in which all rows see all."""
    count = -(-num_tokens // TILE)
    touched, full = torch.zeros(count, count, dtype=torch.bool), torch.zeros(count, count, dtype=torch.bool)
    window = num_tokens if sliding_window is None else sliding_window
    for prefix_start, prefix_end, start, end in blocks.ranges:

        def first_visible(
            row: int, low: int = prefix_start, high: int = prefix_end, start: int = start
        ) -> tuple[int, int]:
            return max(low, row - window + 1 - start + high), max(start, row - window + 1)

        for tile in range(start // TILE, -(-end // TILE)):
            first, last = max(start, tile * TILE), min(end, (tile + 1) * TILE) - 1
            # What is visible begins later from row to row, and ends with the prefix, or with the row itself.
            for low, high in zip(first_visible(first), (prefix_end, last + 1), strict=True):
                if low < high:
                    touched[tile, low // TILE : -(-high // TILE)] = True
            if last - first + 1 == TILE:
                for low, high in zip(first_visible(last), (prefix_end, first + 1), strict=True):
                    full[tile, -(-low // TILE) : max(low, high) // TILE] = True
    return touched, full


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are set, and their columns first: what `BlockMask` keeps."""
    return tiles.sum(1), tiles.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
