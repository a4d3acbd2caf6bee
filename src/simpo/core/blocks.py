"""What attends to what in a packed row, and how scores are made: the terms that all attention paths share.

A packed row is a list of *blocks*. Block (prefix_start, prefix_end, start, end) says: rows start..end attend to the
rows prefix_start..prefix_end and, causally, to themselves. A chosen sequence is a block with an empty prefix; the
rejected response that shares its first P tokens is a block whose prefix is those P rows. Any number of responses may
share one prefix. Nothing else is visible to anything, so packed pairs cannot see each other. Torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Block = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class AttentionBlocks:
    """The blocks of a flattened row, ascending and without overlap; an object, so that it passes through wrappers."""

    ranges: tuple[Block, ...]  # (prefix_start, prefix_end, start, end) each, with prefix_end <= start < end
    # the ranks that hold the row's slices, equal in size and in the group's order; None = all of it is here
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        previous_end = 0
        for prefix_start, prefix_end, start, end in self.ranges:
            if not (0 <= prefix_start <= prefix_end <= start < end and previous_end <= start):
                raise ValueError(f"attention block {(prefix_start, prefix_end, start, end)} overlaps or is empty")
            previous_end = end


@dataclass(frozen=True)
class ScoreOptions:
    """From products of queries and keys to scores, as in `core.attention.packed_attention`: scale, soft-cap, window."""

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None


def dense_mask(blocks: AttentionBlocks, num_tokens: int, *, sliding_window: int | None = None) -> Tensor:
    """What may attend to what, written out: [T, T] bool, True = visible. The definition the fast paths must meet."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for prefix_start, prefix_end, start, end in blocks.ranges:
        prefix = prefix_end - prefix_start
        visible = bottom_right_mask(end - start, prefix + end - start, sliding_window)
        mask[start:end, prefix_start:prefix_end], mask[start:end, start:end] = visible[:, :prefix], visible[:, prefix:]
    return mask


def bottom_right_mask(
    num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device | str = "cpu"
) -> Tensor:
    """[num_queries, num_keys] bool, True = visible: causal for the last num_queries of num_keys positions."""
    query_at = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_at = torch.arange(num_keys, device=device)[None, :]
    mask = key_at <= query_at
    if sliding_window is not None:
        mask &= key_at > query_at - sliding_window
    return mask


def to_device(parts: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The parts, flattened, in one copy that nobody waits for where CPU memory can be pinned."""
    parts = [part.flatten() for part in parts]
    together = torch.cat(parts).to(dtype)
    if device.type == "cuda" and torch.cuda.is_available():
        together = together.pin_memory()
    return list(together.to(device, non_blocking=True).split([len(part) for part in parts]))
