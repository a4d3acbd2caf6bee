"""`eval_pairs.jsonl`: the held-out pairs of a run's evaluations one by one, which intervals and comparisons need.

It has one line for each of the first evaluation, the best, the latest and those that the guard might go back to, so
that it stays small however long a run is. Must not import the trainer or evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpo.core.losses import PairLogps
from simpo.data.files import write_whole
from simpo.run.logs import read_log

if TYPE_CHECKING:
    from simpo.data.loader import MicroBatch
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe

EVAL_PAIRS_FILE = "eval_pairs.jsonl"
COLUMNS = ("margin", "logps/chosen", "logps/rejected", "tokens/chosen", "tokens/rejected")
"""Of each pair: reward margin; mean log-probs in nats per token; trained tokens."""


class EvalPairs:
    """Collects the pairs of an evaluation over its micro-batches and processes, and writes them down.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVAL_PAIRS_FILE
        self._parts: list[tuple[tuple[int, ...], list[str], Tensor]] = []

    def clear(self) -> None:
        """Forget what was added."""
        self._parts = []

    def add(self, logps: PairLogps, micro_batch: MicroBatch, recipe: Recipe) -> None:
        """The pairs of one micro-batch; they stay on their device until `save`."""
        loss = recipe.loss(logps, **recipe.loss_values)
        margins = loss.chosen_rewards - loss.rejected_rewards
        lengths = (logps.chosen_length, logps.rejected_length)
        values = torch.stack([each.double() for each in (margins, logps.chosen_mean, logps.rejected_mean, *lengths)])
        self._parts.append((micro_batch.indices, micro_batch.pairs.row_ids, values.detach()))

    def save(self, step: int, mesh: Mesh, *, keep: Collection[int | None]) -> None:
        """Write what was added as the evaluation after `step`; every process calls it. `keep`: earlier steps' too."""
        own = {
            index: (row_id, *column)
            for indices, row_ids, values in self._parts
            for index, row_id, column in zip(indices, row_ids, values.T.tolist(), strict=True)
        }
        self.clear()
        pairs: dict[int, tuple[Any, ...]] = {}
        for theirs in mesh.gather(own):  # processes that share pairs have each seen the same ones
            pairs |= theirs
        if not mesh.is_main or not pairs:
            return
        row_ids, *columns = zip(*(pairs[index] for index in sorted(pairs)), strict=True)
        numbers = {name: [float(f"{x:.7g}") for x in column] for name, column in zip(COLUMNS, columns, strict=True)}
        earlier = (row for row in read_log(self.path) if row["step"] < step)
        rows = [row for place, row in enumerate(earlier) if place == 0 or row["step"] in keep]
        rows.append({"step": step, "row_ids": row_ids, **numbers})
        write_whole(self.path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
