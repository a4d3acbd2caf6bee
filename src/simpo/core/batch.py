"""PackedPairs: one micro-batch of preference pairs, or of longer lists, as tensors, and the ways to lay it out.

Owns the layout: which token sits where, what it attends to, which row predicts which label. A pair is a list of two
responses; lists of any length go the same way. Labels are shifted once, here, and never again. Torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simpo.core.blocks import AttentionBlocks
from simpo.core.packing import TokenPair, shared_prefix_length


@dataclass(frozen=True)
class TokenList:
    """A prompt and its responses, one or more: full sequences, and where in each the response begins (>= 1)."""

    row_id: str
    sequences: Sequence[Sequence[int]]
    starts: Sequence[int]


@dataclass(frozen=True)
class PackedPairs:
    """One micro-batch. T tokens a row, R rows (1 when packed), P pairs, N response tokens.

    Response 2i is the chosen one of pair i, 2i+1 the rejected one. In a batch of lists the responses stand list by list
    in the order given, and every 2P below is the sum of `group_sizes`.

    Attributes:
        input_ids: [R, T] int64.
        position_ids: [R, T] int64; a rejected response restarts at the length of the shared prefix.
        attention_mask: [R, T] int64, 1 on real tokens, for ordinary attention; None when `blocks` is set.
        blocks: what attends to what, in flattened row coordinates; None for the ordinary padded layout.
        source_rows: [N] int64 into the flattened [R*T] rows: the row whose hidden state predicts label n. Rows of a
            shared prefix can appear twice, once for each response.
        read_rows: int64, ascending: the distinct source rows. Nobody reads the last layer's results in other rows.
        labels: [N] int64 token ids, grouped by response.
        response_lengths: [2P] int64, trained tokens of each response, each >= 1.
        row_ids: the pairs' (lists') names, for error messages.
        group_sizes: responses of each pair (always 2) or list; `sums.split(batch.group_sizes)` takes lists apart.
        local_lengths: [2P] int64, or None where the whole row is here. On a rank that holds a slice of the row
            (`core.context.split_rows`): how many of each response's labels are in it, >= 0. N, labels, source_rows and
            read_rows are then the slice's; blocks, response_lengths and names are the whole row's.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    blocks: AttentionBlocks | None
    source_rows: Tensor
    read_rows: Tensor
    labels: Tensor
    response_lengths: Tensor
    row_ids: tuple[str, ...]
    group_sizes: tuple[int, ...]
    local_lengths: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        """P; for lists, their number."""
        return len(self.row_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed here, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> PackedPairs:
        """The same batch on another device. A GPU fetches it from pinned memory without anybody waiting."""
        pin = torch.device(device).type == "cuda" and torch.cuda.is_available()

        def move(value: Tensor) -> Tensor:
            return (value.pin_memory() if pin and value.device.type == "cpu" else value).to(device, non_blocking=True)

        return replace(self, **{name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)})


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
    groups = [
        TokenList(pair.row_id, (pair.chosen_ids, pair.rejected_ids), (pair.chosen_start, pair.rejected_start))
        for pair in pairs
    ]
    for group in groups:
        for side, ids, start in zip(("chosen", "rejected"), group.sequences, group.starts, strict=True):
            _check_response(ids, start, what=f"pair {group.row_id}: the {side} response")
    return _lay_out(groups, pack=pack, share_prompt=share_prompt, pad_token_id=pad_token_id)


def build_list_batch(
    lists: Sequence[TokenList], *, pack: bool = True, share_prompt: bool = True, pad_token_id: int = 0
) -> PackedPairs:
    """Lay out lists of responses as one micro-batch: `build_batch` for any number of responses to a prompt.

    Args:
        lists: at least one, each of one response or more; lengths may differ. What a list shares is the longest token
            prefix that *all* its sequences have in common.
        pack, share_prompt, pad_token_id: as in `build_batch`.
    Raises:
        ValueError: no lists, a list without responses or whose sequences and starts differ in number, a response that
            has no trained token or starts at token 0.
    """
    if not lists:
        raise ValueError("a micro-batch needs at least one list of responses")
    for each in lists:
        count = len(each.sequences)
        if count == 0 or len(each.starts) != count:
            raise ValueError(
                f"list {each.row_id}: {count} responses and {len(each.starts)} starts; it needs at least one "
                "response, and one start for each"
            )
        for index, (ids, start) in enumerate(zip(each.sequences, each.starts, strict=True), 1):
            _check_response(ids, start, what=f"list {each.row_id}: response {index} of {count}")
    return _lay_out(lists, pack=pack, share_prompt=share_prompt, pad_token_id=pad_token_id)


def _check_response(ids: Sequence[int], start: int, *, what: str) -> None:
    if not 1 <= start < len(ids):
        raise ValueError(
            f"{what} starts at token {start} of {len(ids)}; it needs at least one token before it and one of its own"
        )


def _lay_out(groups: Sequence[TokenList], *, pack: bool, share_prompt: bool, pad_token_id: int) -> PackedPairs:
    rows: list[_Row] = []
    plain = not pack and not share_prompt
    for group in groups:
        prefix = shared_prefix_length(*group.sequences) if share_prompt else 0
        if not pack or not rows:
            rows.append(_Row())
        start = len(rows[-1].ids)
        for index, (ids, response_start) in enumerate(zip(group.sequences, group.starts, strict=True)):
            if plain and index:
                rows.append(_Row())
            # The first sequence stands whole; its first tokens are what the others share.
            rows[-1].add_sequence(ids, response_start, prefix_start=start, prefix=prefix if index else 0)
    return _assemble(rows, groups, plain=plain, pad_token_id=pad_token_id)


class _Row:
    """Accumulates sequences into one row; offsets are relative to the row's first token."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.blocks: list[tuple[int, int, int, int]] = []
        self.sources: list[list[int]] = []  # one list per response
        self.labels: list[list[int]] = []

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


def _assemble(rows: list[_Row], groups: Sequence[TokenList], *, plain: bool, pad_token_id: int) -> PackedPairs:
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
        read_rows=torch.tensor(sorted(set(sources)), dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        response_lengths=torch.tensor(lengths, dtype=torch.long),
        row_ids=tuple(group.row_id for group in groups),
        group_sizes=tuple(len(group.sequences) for group in groups),
    )
