"""Packed attention from batched matrix products, forward and backward written out: for CPUs, and for soft-caps.

On a CPU the forward pass is torch's flash attention, tile by tile; its backward pass is slower than this one.

Per block and per tile of its queries, with K and V the keys and values that the tile can see:

    S = scale Q K^T           P = softmax(S)            O = P V
    dV += P^T dO              dP = dO V^T               dS = P (dP - rowsum(P dP))
    dQ = scale dS K           dK += scale dS^T Q

A tile multiplies only the keys up to its last query, so about half the square is never computed; P is computed again in
the backward pass, so memory is one tile's scores. The heads that share a key head are stacked as more queries of it.
Products of bf16 come out in fp32, as in flash attention: their operands are widened (in the backward pass once for all
tiles), and oneDNN is told that it may multiply them as bf16. Torch only.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simpo.core.blocks import AttentionBlocks, Block, ScoreOptions, bottom_right_mask
from simpo.core.device import counts_as_cuda

TILE_ROWS = 256  # most queries of one tile: fewer skip more of the masked half, more make larger products
TILE_BYTES = 4 * 2**20  # of a tile's fp32 scores: what a core's caches still hold
TILE_BYTES_CUDA = 256 * 2**20  # few large products
FLASH_ROWS = 256  # most queries of a call with a mask: what a mask hides is computed all the same


def matmul_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: AttentionBlocks, options: ScoreOptions
) -> Tensor:
    """Attention over the blocks of one row; shapes and meaning as in `core.attention.packed_attention`.

    All three in one dtype, which autocast does not change.
    """
    with torch.autocast(query.device.type, enabled=False):
        return _MatmulAttention.apply(query, key, value, blocks.ranges, options)


class _Tile(NamedTuple):
    """Queries start..end of the row, which see the first num_keys keys of their block."""

    start: int
    end: int
    num_keys: int


def _tiles(block: Block, query: Tensor, rows: int | None = None) -> list[_Tile]:
    """Tiles of a block, all of about the same number of queries, `rows` at most; None = as many as suit products."""
    prefix_start, prefix_end, start, end = block
    prefix = prefix_end - prefix_start
    if rows is None:
        tile_bytes, most = (TILE_BYTES_CUDA, end - start) if counts_as_cuda(query) else (TILE_BYTES, TILE_ROWS)
        rows = max(32, min(most, tile_bytes // (4 * query.shape[1] * (prefix + end - start))))
    count = -(-(end - start) // rows)
    edges = [start + (end - start) * index // count for index in range(count + 1)]
    return [_Tile(low, high, prefix + high - start) for low, high in itertools.pairwise(edges)]


class _MatmulAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, ranges: tuple[Block, ...], options: ScoreOptions
    ) -> Tensor:
        # Memory as [T, Hq, D], so that the model's next view of it, [T, Hq * D], copies nothing.
        out = query.new_zeros(query.shape[2], query.shape[1], value.shape[3])
        flash = query.is_cpu and options.softcap is None and query.shape[3] == value.shape[3]
        attend = _flash_forward if flash else _tiled_forward
        for block in ranges:
            attend(out, query, _rows_of(key, block), _rows_of(value, block), block, options)
        ctx.save_for_backward(query, key, value)
        ctx.ranges, ctx.options = ranges, options
        return out.transpose(0, 1)[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_out.device.type, enabled=False):  # a backward pass inside it would round S and dP
            query, key, value = ctx.saved_tensors
            return *_gradients(query, key, value, grad_out, ctx.ranges, ctx.options), None, None


def _flash_forward(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, block: Block, options: ScoreOptions
) -> None:
    """Fill in a block's rows of out [T, Hq, D] by torch's flash attention for CPUs, which is the fastest there."""
    plain = keys.shape[1] == block[3] - block[2] and options.sliding_window is None  # no prefix, no window
    for tile in [_Tile(*block[2:], keys.shape[1])] if plain else _tiles(block, query, rows=FLASH_ROWS):
        seen = slice(tile.num_keys)
        mask = None if plain else _hidden(tile, options.sliding_window, query.dtype)
        mixed, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, :, tile.start : tile.end],
            keys[None, :, seen],
            values[None, :, seen],
            is_causal=plain,
            attn_mask=mask,
            scale=options.scale,
        )
        out[tile.start : tile.end] = mixed[0].transpose(0, 1)


def _tiled_forward(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, block: Block, options: ScoreOptions
) -> None:
    """The same from products: for soft-caps, and on accelerators."""
    heads, key_heads = query.shape[1], keys.shape[0]
    wide_keys = keys.to(_precise(keys))
    for tile in _tiles(block, query):
        queries = _stack_heads(query[:, :, tile.start : tile.end], key_heads)
        with _products_in_bf16(query.dtype):
            weights, _ = _weights(queries, wide_keys[:, : tile.num_keys], tile, options)
        mixed = torch.bmm(weights.to(values.dtype), values[:, : tile.num_keys])
        out[tile.start : tile.end] = _unstack_heads(mixed, heads).transpose(0, 1)


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, ranges: tuple[Block, ...], options: ScoreOptions
) -> tuple[Tensor, Tensor, Tensor]:
    heads, key_heads = query.shape[1], key.shape[1]
    group = heads // key_heads
    all_queries, all_grads = _stack_heads(query, key_heads), _stack_heads(grad_out, key_heads)
    wide_key, wide_value = key.to(_precise(key)), value.to(_precise(value))
    d_queries, d_key, d_value = (torch.zeros_like(x) for x in (all_queries, wide_key, wide_value))
    with _products_in_bf16(query.dtype):
        for block in ranges:
            keys, values = _rows_of(wide_key, block), _rows_of(wide_value, block)
            d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
            for tile in _tiles(block, query):
                rows, seen = slice(tile.start * group, tile.end * group), slice(tile.num_keys)
                queries, grads = all_queries[:, rows], all_grads[:, rows]
                weights, tanh = _weights(queries, keys[:, seen], tile, options)
                d_values[:, seen].baddbmm_(weights.transpose(1, 2), grads)
                d_scores = torch.bmm(grads, values[:, seen].transpose(1, 2))
                torch.ops.aten._softmax_backward_data.out(d_scores, weights, -1, d_scores.dtype, grad_input=d_scores)
                if tanh is not None:
                    d_scores *= 1 - tanh * tanh
                d_keys[:, seen].baddbmm_(d_scores.transpose(1, 2), queries, alpha=options.scale)
                d_queries[:, rows] = _scaled_product(d_scores, keys[:, seen], options.scale)
            _add_rows(d_key, d_keys, block)
            _add_rows(d_value, d_values, block)
    return _unstack_heads(d_queries, heads)[None].to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _rows_of(tensor: Tensor, block: Block) -> Tensor:
    """[1, Hkv, T, D] -> [Hkv, prefix + own, D]: what the block's last query sees, in order."""
    prefix_start, prefix_end, start, end = block
    own = tensor[0, :, start:end]
    return torch.cat([tensor[0, :, prefix_start:prefix_end], own], dim=1) if prefix_end > prefix_start else own


def _add_rows(total: Tensor, rows: Tensor, block: Block) -> None:
    """The transpose of `_rows_of`: total [1, Hkv, T, D] += rows [Hkv, prefix + own, D]."""
    prefix_start, prefix_end, start, end = block
    prefix = prefix_end - prefix_start
    total[0, :, prefix_start:prefix_end] += rows[:, :prefix]
    total[0, :, start:end] += rows[:, prefix:]


def _stack_heads(tensor: Tensor, key_heads: int) -> Tensor:
    """[1, Hq, m, D] -> [Hkv, m * G, D], widened: each row's G heads of a key head one after the other."""
    rows = tensor[0].unflatten(0, (key_heads, -1)).transpose(1, 2).reshape(key_heads, -1, tensor.shape[3])
    return rows.to(_precise(tensor))


def _unstack_heads(rows: Tensor, heads: int) -> Tensor:
    """[Hkv, m * G, D] -> [Hq, m, D]."""
    return rows.unflatten(1, (-1, heads // rows.shape[0])).transpose(1, 2).reshape(heads, -1, rows.shape[2])


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _weights(queries: Tensor, keys: Tensor, tile: _Tile, options: ScoreOptions) -> tuple[Tensor, Tensor | None]:
    """Softmax weights [Hkv, m * G, n] of a tile, and tanh of the soft-cap where there is one."""
    scores = _scaled_product(queries, keys.transpose(1, 2), options.scale)
    tanh = None
    if options.softcap is not None:
        tanh = torch.tanh(scores / options.softcap)
        scores = tanh * options.softcap
    _hide(scores, tile, options.sliding_window)
    return torch.softmax(scores, dim=-1, out=scores), tanh


def _hide(scores: Tensor, tile: _Tile, sliding_window: int | None) -> None:
    """Scores [Hkv, m * G, n] of a tile: what lies ahead of a query or before its window becomes -inf, in place."""
    rows = tile.end - tile.start
    by_row = scores.unflatten(1, (rows, -1))
    if sliding_window is not None and tile.num_keys > sliding_window:
        by_row += _hidden(tile, sliding_window, scores.dtype, scores.device)[:, None]
    else:  # all that is hidden is in the last square
        square = _Tile(tile.start, tile.end, rows)
        by_row[..., tile.num_keys - rows :] += _hidden(square, None, scores.dtype, scores.device)[:, None]


def _hidden(tile: _Tile, sliding_window: int | None, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """[m, n] of the last m of n positions: 0 where a query sees a key, -inf where not."""
    visible = bottom_right_mask(tile.end - tile.start, tile.num_keys, sliding_window, device)
    return torch.zeros((), dtype=dtype, device=device).where(visible, float("-inf"))


@contextlib.contextmanager
def _products_in_bf16(dtype: torch.dtype) -> Iterator[None]:
    """Inside, if `dtype` is bf16, fp32 products may be computed from operands rounded to bf16, with fp32 results.

    For operands that were bf16 before they were widened nothing is lost.
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009  torch does not declare it
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
