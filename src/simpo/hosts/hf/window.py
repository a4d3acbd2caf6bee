"""What a Trainer's training lines say: means over every pair, and speed, since the line before."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from simpo.run.metrics import StepTotals, peak_memory_gib

if TYPE_CHECKING:
    from simpo.data.loader import StepLoader
    from simpo.parallel.mesh import Mesh


class Window:
    """The steps since the last training line.

    Args:
        loader: the plan of the training pairs.
    Attributes:
        sums: of this process's pairs, to be added to.
        step: of the last line.
    """

    def __init__(self, loader: StepLoader, mesh: Mesh) -> None:
        self._loader, self._mesh = loader, mesh
        self.begin(0)

    def begin(self, step: int) -> None:
        """Anew, after `step`."""
        self.sums = StepTotals(self._loader.store.sources.names)
        self.step, self._started = step, time.perf_counter()

    def leave_out(self, time_s: float) -> None:
        """Seconds that were none of training."""
        self._started += time_s

    def close(self, step: int, history: Sequence[Mapping[str, Any]], device: torch.device) -> dict[str, float]:
        """The line after `step`, and begin anew; every process calls it.

        Args:
            history: the lines before.
        """
        pairs_seen, time_s = self._loader.pairs_before(step), time.perf_counter() - self._started
        pairs = pairs_seen - self._loader.pairs_before(self.step)
        total, steps = self.sums.over(self._mesh, pairs), step - self.step
        earlier = next((line["tokens_seen"] for line in reversed(history) if "tokens_seen" in line), 0)
        self.begin(step)
        return total.means() | {
            "pairs_seen": pairs_seen,
            "tokens_seen": earlier + total.num_tokens,
            "step_time_s": time_s / steps,
            "pairs_per_s": pairs / time_s,
            "memory_gib": max(self._mesh.gather(peak_memory_gib(device))),
        }
