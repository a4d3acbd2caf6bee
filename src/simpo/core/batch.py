"""PackedPairs: one micro-batch of preference pairs as tensors, and the two ways to lay it out.

Owns the layout: which token sits where, what it attends to, which row predicts which label. Labels are shifted once,
here, and never again. Imports torch and `core.packing` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from simpo.core.attention import AttentionBlocks
from simpo.core.packing import shared_prefix_length


class TokenPair(Protocol):
    """A tokenised pair: full sequences (prompt + response) and where each response begins (>= 1)."""

    row_id: str
    chosen_ids: Sequence[int]
    chosen_start: int
    rejected_ids: Sequence[int]
    rejected_start: int


@dataclass(frozen=True)
class PackedPairs:
    """One micro-batch. T tokens a row, R rows (1 when packed), P pairs, N response tokens.

    Response 2i is the chosen one of pair i, 2i+1 the rejected one.

    Attributes:
        input_ids: [R, T] int64.
        position_ids: [R, T] int64; a rejected response restarts at the length of the shared prefix.
        attention_mask: [R, T] int64, 1 on real tokens, for ordinary attention; None when `blocks` is set.
        blocks: what attends to what, in flattened row coordinates; None for the ordinary padded layout.
        source_rows: [N] int64 into the flattened [R*T] rows: the row whose hidden state predicts label n. Rows of a
            shared prefix can appear twice, once for each response.
        labels: [N] int64 token ids, grouped by response.
        response_lengths: [2P] int64, trained tokens of each response, each >= 1.
        row_ids: the pairs' names, for error messages.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    blocks: AttentionBlocks | None
    source_rows: Tensor
    labels: Tensor
    response_lengths: Tensor
    row_ids: tuple[str, ...]

    @property
    def num_pairs(self) -> int:
        return len(self.row_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PackedPairs:
        """The same batch on another device."""
        moved = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name in (
                "input_ids",
                "position_ids",
                "attention_mask",
                "source_rows",
                "labels",
                "response_lengths",
            )
            for value in (getattr(self, name),)
        }
        return replace(self, **moved)


def build_batch(
    pairs: Sequence[TokenPair], *, pack: bool = True, share_prompt: bool = True, pad_token_id: int = 0
) -> PackedPairs:
    """Lay out pairs as one micro-batch.

    Args:
        pairs: at least one.
        pack: all pairs end to end in one row without padding; otherwise one row per pair (shared) or per response,
            right-padded to the longest.
        share_prompt: compute the longest common token prefix of a pair once. With `pack=False` and
            `share_prompt=False` the batch is the ordinary padded one that any attention implementation understands.
        pad_token_id: fills padded rows; never trained, never attended to.
    Raises:
        ValueError: no pairs, a response without a trained token, or a response that starts at token 0 (nothing
            predicts its first token).
    """
    if not pairs:
        raise ValueError("a micro-batch needs at least one pair")
    for pair in pairs:
        _check_pair(pair)
    rows: list[_Row] = []
    if pack:
        row = _Row()
        for pair in pairs:
            row.add_pair(pair, share_prompt=share_prompt)
        rows.append(row)
    else:
        for pair in pairs:
            if share_prompt:
                rows.append(_Row())
                rows[-1].add_pair(pair, share_prompt=True)
            else:
                rows += [_Row(), _Row()]
                rows[-2].add_sequence(pair.chosen_ids, pair.chosen_start, prefix_start=0, prefix=0)
                rows[-1].add_sequence(pair.rejected_ids, pair.rejected_start, prefix_start=0, prefix=0)
    plain = not pack and not share_prompt
    return _assemble(rows, row_ids=tuple(p.row_id for p in pairs), plain=plain, pad_token_id=pad_token_id)


def _check_pair(pair: TokenPair) -> None:
    for side in ("chosen", "rejected"):
        ids, start = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_start")
        if not 1 <= start < len(ids):
            raise ValueError(
                f"pair {pair.row_id}: the {side} response starts at token {start} of {len(ids)}; "
                "it needs at least one token before it and one of its own"
            )


class _Row:
    """Accumulates sequences into one row; offsets are relative to the row's first token."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.blocks: list[tuple[int, int, int, int]] = []
        self.sources: list[list[int]] = []  # one list per response
        self.labels: list[list[int]] = []

    def add_pair(self, pair: TokenPair, *, share_prompt: bool) -> None:
        start = len(self.ids)
        prefix = shared_prefix_length(pair.chosen_ids, pair.rejected_ids) if share_prompt else 0
        self.add_sequence(pair.chosen_ids, pair.chosen_start, prefix_start=start, prefix=0)
        self.add_sequence(pair.rejected_ids, pair.rejected_start, prefix_start=start, prefix=prefix)

    def add_sequence(self, ids: Sequence[int], response_start: int, *, prefix_start: int, prefix: int) -> None:
        """Append ids[prefix:], whose first `prefix` tokens already stand at prefix_start in this row."""
        begin = len(self.ids)
        self.ids += ids[prefix:]
        self.positions += range(prefix, len(ids))
        # A sequence without a shared prefix is a block whose prefix is empty.
        self.blocks.append((prefix_start, prefix_start + prefix, begin, begin + len(ids) - prefix))
        # Label t is predicted by token t-1, which stands either in the shared prefix or in this block.
        predictors = range(response_start - 1, len(ids) - 1)
        self.sources.append([prefix_start + t if t < prefix else begin + t - prefix for t in predictors])
        self.labels.append(list(ids[response_start:]))


def _assemble(rows: list[_Row], *, row_ids: tuple[str, ...], plain: bool, pad_token_id: int) -> PackedPairs:
    width = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    position_ids = torch.zeros((len(rows), width), dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    blocks, sources, labels, lengths = [], [], [], []
    for index, row in enumerate(rows):
        size, offset = len(row.ids), index * width
        input_ids[index, :size] = torch.tensor(row.ids, dtype=torch.long)
        position_ids[index, :size] = torch.tensor(row.positions, dtype=torch.long)
        attention_mask[index, :size] = 1
        blocks += [tuple(edge + offset for edge in block) for block in row.blocks]
        for response_sources, response_labels in zip(row.sources, row.labels, strict=True):
            sources += [source + offset for source in response_sources]
            labels += response_labels
            lengths.append(len(response_labels))
    return PackedPairs(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask if plain else None,
        blocks=None if plain else AttentionBlocks(tuple(blocks)),
        source_rows=torch.tensor(sources, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        response_lengths=torch.tensor(lengths, dtype=torch.long),
        row_ids=row_ids,
    )
