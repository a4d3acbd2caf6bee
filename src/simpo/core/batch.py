"""PackedPairs: one micro-batch of preference pairs, or of longer lists, as tensors, and the ways to lay it out.

Owns the layout: which token sits where, what it attends to, which row predicts which label. A pair is a list of two
responses; lists of any length go the same way. Labels are shifted once, here, and never again. Torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simpo.core.blocks import AttentionBlocks
from simpo.core.device import move
from simpo.core.packing import SIDES, TokenPair, shared_prefix_length, trained_ranges


@dataclass(frozen=True)
class TokenList:
    """A prompt and its responses, one or more: full sequences, and where in each the response begins (>= 1).

    `gaps` are the untrained stretches inside each response, as in `TokenPair`; () = none in any.
    """

    row_id: str
    sequences: Sequence[Sequence[int]]
    starts: Sequence[int]
    gaps: Sequence[Sequence[int]] = ()


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
        """The same batch on another device."""
        return replace(
            self, **{name: move(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        )


def build_batch(
    pairs: Sequence[TokenPair], *, pack: bool = True, share_prompt: bool = True, pad_token_id: int = 0
) -> PackedPairs:
    """Lay out pairs as one micro-batch.

    Args:
        pairs: at least one; a list of more responses is one with the prompt once for all of them.
        pack: all pairs end to end in one row without padding; otherwise one row per pair (shared) or per response,
            right-padded to the longest.
        share_prompt: compute the longest common token prefix of a pair once. With `pack=False` and
            `share_prompt=False` the batch is the ordinary padded one that any attention implementation understands.
        pad_token_id: fills padded rows; never trained, never attended to.
    Raises:
        ValueError: no pairs, a response without a trained token, one that starts at token 0 (nothing predicts its
            first token), or gaps that are not inside their response.
    """
    if not pairs:
        raise ValueError("a micro-batch needs at least one pair")
    lists = [_as_list(pair) for pair in pairs]
    for each in lists:
        names = [SIDES[0], *(f"{number}. other" for number in range(1, len(each.sequences) - 1)), SIDES[1]]
        for response, name in zip(_responses(each), names, strict=True):
            check_response(*response, what=f"pair {each.row_id}: the {name} response")
    return _lay_out(lists, pack=pack, share_prompt=share_prompt, pad_token_id=pad_token_id)


def _as_list(pair: TokenPair) -> TokenList:
    """Chosen first and rejected last; a pair of another class may have nothing else."""
    more = getattr(pair, "more_ids", ())
    return TokenList(
        pair.row_id,
        (pair.chosen_ids, *more, pair.rejected_ids),
        (pair.chosen_start, *getattr(pair, "more_starts", ()), pair.rejected_start),
        (getattr(pair, "chosen_gaps", ()), *[()] * len(more), getattr(pair, "rejected_gaps", ())),
    )


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
        gaps = getattr(each, "gaps", ())
        if count == 0 or len(each.starts) != count or len(gaps) not in (0, count):
            raise ValueError(
                f"list {each.row_id}: {count} responses and {len(each.starts)} starts; it needs at least one "
                "response, one start for each, and lists of gaps for each or for none"
            )
        for index, response in enumerate(_responses(each), 1):
            check_response(*response, what=f"list {each.row_id}: response {index} of {count}")
    return _lay_out(lists, pack=pack, share_prompt=share_prompt, pad_token_id=pad_token_id)


def _responses(each: TokenList) -> list[tuple[Sequence[int], int, Sequence[int]]]:
    """The sequence, start and gaps of each response; a list of another class may have no gaps."""
    gaps = getattr(each, "gaps", ()) or [()] * len(each.sequences)
    return list(zip(each.sequences, each.starts, gaps, strict=True))


def check_response(ids: Sequence[int], start: int, gaps: Sequence[int], *, what: str) -> None:
    """Raise ValueError for a response without a token before it or of its own, or with gaps that are not inside it."""
    if not 1 <= start < len(ids):
        raise ValueError(
            f"{what} starts at token {start} of {len(ids)}; it needs at least one token before it and one of its own"
        )
    edges = [start, *gaps, len(ids)]
    if len(gaps) % 2 or any(begin >= end for begin, end in pairwise(edges)):
        raise ValueError(
            f"{what} has gaps {list(gaps)}; they are begin, end, begin, end, ..., ascending, between tokens "
            f"{start} and {len(ids)}, with trained tokens before, between and after them"
        )


def _lay_out(lists: Sequence[TokenList], *, pack: bool, share_prompt: bool, pad_token_id: int) -> PackedPairs:
    plain = not pack and not share_prompt
    rows, positions = [], []  # of each row, without padding
    blocks, sources = [], []  # with the number of their row
    labels, lengths = [], []
    for each in lists:
        shared = shared_prefix_length(*each.sequences) if share_prompt else 0
        for index, (ids, start, gaps) in enumerate(_responses(each)):
            if not rows or plain or (not pack and index == 0):
                rows.append([])
                positions.append([])
            row, number, begin = rows[-1], len(rows) - 1, len(rows[-1])
            if index == 0:  # the first sequence stands whole; its first tokens are what the others share
                first, prefix = begin, 0
            else:
                prefix = shared
            row += ids[prefix:]
            positions[-1] += range(prefix, len(ids))
            blocks.append((number, (first, first + prefix, begin, len(row))))
            # Label t is predicted by token t-1, which stands either in the shared prefix or in this block.
            trained = trained_ranges(start, gaps, len(ids))
            predictors = [label - 1 for stretch in trained for label in stretch]
            sources += [(number, first + t if t < prefix else begin + t - prefix) for t in predictors]
            labels += [label for stretch in trained for label in ids[stretch.start : stretch.stop]]
            lengths.append(len(predictors))
    width = max(map(len, rows))
    flat_sources = [number * width + source for number, source in sources]
    flat_blocks = [tuple(number * width + edge for edge in block) for number, block in blocks]

    def padded(values: list[Sequence[int]], value: int = 0) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=value)

    return PackedPairs(
        input_ids=padded(rows, pad_token_id),
        position_ids=padded(positions),
        attention_mask=padded([[1] * len(row) for row in rows]) if plain else None,
        blocks=None if plain else AttentionBlocks(tuple(flat_blocks)),
        source_rows=torch.tensor(flat_sources),
        read_rows=torch.tensor(sorted(set(flat_sources))),
        labels=torch.tensor(labels),
        response_lengths=torch.tensor(lengths),
        row_ids=tuple(each.row_id for each in lists),
        group_sizes=tuple(len(each.sequences) for each in lists),
    )
