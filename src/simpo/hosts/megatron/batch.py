"""From this project's pairs to Megatron's batches: padded rows, chosen and rejected of a pair side by side.

Nothing is packed and no prompt is shared here: both need attention of this package, and Megatron brings its own, which
knows causal rows alone. Labels are shifted once, in `collate`, before any rank cuts the rows. Must not import megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simpo.core.batch import check_response
from simpo.core.packing import SIDES, TokenPair, epoch_order, num_steps_per_epoch, trained_ranges
from simpo.hosts.megatron.settings import MegatronSettings

if TYPE_CHECKING:
    from simpo.data.loader import PairStore

IGNORED = -100
"""Label of a position that predicts nothing trained. No token has it: 0 is a token like any other."""
PAD = 0
"""Token after a sequence's end: never trained, and behind all that is, so causal attention never sees it."""

ReferenceSums = Mapping[str, tuple[float, float]]
"""row_id -> summed reference log-probs of the chosen and the rejected response, nats."""


@dataclass(frozen=True)
class MegatronBatch:
    """One micro-batch of P pairs in R rows of S tokens; row 2i is the chosen response of pair i, 2i+1 the rejected.

    Rows after 2P are blank: they keep the shape that pipeline stages expect and count for nothing.

    Attributes:
        tokens: [R, S] int64; None on a pipeline stage that reads no tokens.
        position_ids: [R, S] int64, 0.. in every row; None like `tokens`.
        labels: [R, S] int64: the token that each position predicts where it is trained, else IGNORED; None on a stage
            that computes no loss.
        row_ids: the P pairs' names.
        mean_pairs: pairs of a micro-batch, averaged over all those of the optimizer step on all data-parallel ranks;
            None when the maker of the batch does not know.
        reference_sums: [P, 2] fp32, nats, chosen and rejected; None where the loss needs none.
    """

    tokens: Tensor | None
    position_ids: Tensor | None
    labels: Tensor | None
    row_ids: tuple[str, ...]
    mean_pairs: float | None = None
    reference_sums: Tensor | None = None


def collate(
    pairs: Sequence[TokenPair],
    settings: MegatronSettings,
    *,
    mean_pairs: float | None = None,
    reference: ReferenceSums | None = None,
) -> MegatronBatch:
    """Lay out pairs as one micro-batch on the CPU, before any rank takes its part.

    Args:
        pairs: at most `settings.micro_batch_size`; none is allowed, so that every rank can have the same number of
            micro-batches.
        mean_pairs: see `MegatronBatch`; needed for micro-batches that are not full unless Megatron's
            `calculate_per_token_loss` is on.
        reference: log-probs of a reference model, for the DPO twin.
    Raises:
        ValueError: too many pairs, a sequence longer than seq_length, a response without a trained token or that starts
            at token 0, or a pair without reference log-probs when there are any.
    """
    if len(pairs) > settings.micro_batch_size:
        raise ValueError(f"micro_batch_size: {len(pairs)} pairs in a micro-batch of {settings.micro_batch_size}")
    rows = []
    for pair in pairs:
        for side in SIDES:
            ids, start = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_start")
            gaps, what = getattr(pair, f"{side}_gaps", ()), f"pair {pair.row_id}: the {side}"
            check_response(ids, start, gaps, what=f"{what} response")
            if len(ids) > settings.seq_length:
                raise ValueError(
                    f"{what} sequence has {len(ids)} tokens; seq_length is {settings.seq_length}. Raise it, or prepare "
                    "the pairs with max_length of at most that"
                )
            rows.append((ids, trained_ranges(start, gaps, len(ids))))
    if settings.fixed_shapes:
        num_rows, width = settings.actual_micro_batch_size, settings.seq_length
    else:
        longest = max((len(ids) for ids, _ in rows), default=1)
        num_rows = max(len(rows), 2)
        width = -(-longest // settings.row_multiple) * settings.row_multiple
    tokens = torch.full((num_rows, width), PAD, dtype=torch.long)
    labels = torch.full((num_rows, width), IGNORED, dtype=torch.long)
    for row, (ids, trained) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        for stretch in trained:
            labels[row, stretch.start - 1 : stretch.stop - 1] = tokens[row, stretch.start : stretch.stop]
    return MegatronBatch(
        tokens=tokens,
        position_ids=torch.arange(width).repeat(num_rows, 1),
        labels=labels,
        row_ids=tuple(pair.row_id for pair in pairs),
        mean_pairs=mean_pairs,
        reference_sums=_look_up(pairs, reference) if reference else None,  # {} on stages that are not the last
    )


def iterate_batches(
    pairs: PairStore | Sequence[TokenPair],
    settings: MegatronSettings,
    *,
    num_microbatches: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    seed: int,
    start_step: int = 0,
    reference: ReferenceSums | None = None,
) -> Iterator[MegatronBatch]:
    """Micro-batches of one data-parallel rank, without end: `num_microbatches` for each optimizer step.

    The order is a function of seed and step alone. A step takes micro_batch_size * num_microbatches *
    data_parallel_size pairs; the last one of an epoch takes what is left, spread evenly: no pair is left out, and
    some micro-batches may hold fewer pairs, or none. Every rank of a model replica, and with virtual stages every
    stage, needs an iterator of its own with the same arguments.

    Args:
        start_step: the optimizer step to begin with, to resume a run.
        others: as in `collate`.
    """
    cells = num_microbatches * data_parallel_size
    pairs_per_step = settings.micro_batch_size * cells
    steps_per_epoch = num_steps_per_epoch(len(pairs), pairs_per_step=pairs_per_step)
    if steps_per_epoch == 0:
        raise ValueError("there are no pairs to train on")
    order: list[int] = []
    step, known_epoch = start_step, -1
    while True:
        epoch, within = divmod(step, steps_per_epoch)
        if epoch != known_epoch:
            order, known_epoch = epoch_order(len(pairs), seed=seed, epoch=epoch), epoch
        chosen = order[within * pairs_per_step : (within + 1) * pairs_per_step]
        for micro_batch in range(num_microbatches):
            cell = micro_batch * data_parallel_size + data_parallel_rank
            low, high = len(chosen) * cell // cells, len(chosen) * (cell + 1) // cells
            yield collate(
                [pairs[index] for index in chosen[low:high]],
                settings,
                mean_pairs=len(chosen) / cells,
                reference=reference,
            )
        step += 1


def _look_up(pairs: Sequence[TokenPair], reference: ReferenceSums) -> Tensor:
    missing = [pair.row_id for pair in pairs if pair.row_id not in reference]
    if missing:
        raise ValueError(f"pair(s) {', '.join(missing[:8])} have no reference log-probs; compute them first")
    return torch.tensor([reference[pair.row_id] for pair in pairs], dtype=torch.float32).reshape(-1, 2)
