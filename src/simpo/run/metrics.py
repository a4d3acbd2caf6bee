"""The metrics of preference pairs: what each of them is, and their sums from micro-batches to means.

A mean is formed once, from sums over every pair of every micro-batch: never a mean of means. To add a metric, add it to
`PAIR_METRICS`. Where pairs come from several sources, those in `BY_SOURCE` are summed for each of them too, and their
means are called METRIC/SOURCE. Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpo.core.losses import PairLogps, PairLoss

if TYPE_CHECKING:
    from simpo.parallel.mesh import Mesh

PAIR_METRICS: dict[str, Callable[[PairLogps, PairLoss, Tensor], Tensor]] = {
    "loss": lambda logps, loss, trained: trained,
    "rewards/chosen": lambda logps, loss, trained: loss.chosen_rewards,
    "rewards/rejected": lambda logps, loss, trained: loss.rejected_rewards,
    "rewards/margins": lambda logps, loss, trained: loss.chosen_rewards - loss.rejected_rewards,
    "rewards/accuracies": lambda logps, loss, trained: (
        0.5 * (torch.sign(loss.chosen_rewards - loss.rejected_rewards) + 1)  # a tie counts half
    ),
    "logps/chosen": lambda logps, loss, trained: logps.chosen_mean,
    "logps/rejected": lambda logps, loss, trained: logps.rejected_mean,
    "sft_loss": lambda logps, loss, trained: -logps.chosen_mean,
}
"""Name -> the metric of each pair [P], from their log-probs, their preference loss with its rewards, and the losses
[P] that are trained, SFT term included. `logps/*` and `sft_loss` are means per token, in nats."""


BY_SOURCE = ("loss", "rewards/accuracies", "rewards/margins")


def pair_metric_sums(logps: PairLogps, loss: PairLoss, trained: Tensor, sources: Tensor | None = None) -> Tensor:
    """[num_sums(S)] fp64, detached: each metric's sum over the pairs of one micro-batch.

    Args:
        sources: [S, P] bool, which pairs come from each source: behind the sums over all pairs follow, for each source,
            the number of its pairs and the sums of `BY_SOURCE` over them. None = S is 0.
    """
    values = {name: of(logps, loss, trained).detach().double() for name, of in PAIR_METRICS.items()}
    sums = torch.stack([value.sum() for value in values.values()])
    if sources is None:
        return sums
    counted = torch.stack([torch.ones_like(values["loss"]), *(values[name] for name in BY_SOURCE)])
    # Not a product with zeros: a loss that is not finite is its own source's alone.
    return torch.cat([sums, torch.where(sources[:, None], counted, 0.0).sum(dim=-1).flatten()])


def num_sums(num_sources: int) -> int:
    """How many numbers `pair_metric_sums` gives."""
    return len(PAIR_METRICS) + num_sources * (1 + len(BY_SOURCE))


@dataclass
class Totals:
    """What the pairs of a step, of an evaluation, or since the last logged step came to, over all processes.

    Attributes:
        sums: metric, or METRIC/SOURCE -> its sum over pairs.
        pairs: the same -> how many pairs. In a resumed run a metric that the checkpoint does not have counts fewer.
        num_tokens: computed, padding included.
        num_not_finite: losses that are not finite.
        stop: whether some process was asked to stop.
        grad_norm: as it was handed over.
    """

    sums: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    num_not_finite: int = 0
    stop: bool = False
    grad_norm: float = math.nan

    def add(self, sums: Tensor, num_pairs: int, sources: Sequence[str] = ()) -> None:
        """Add further pairs: [num_sums(len(sources))], as `pair_metric_sums` gives them."""
        rest = iter(sums.tolist())
        of_all = {name: next(rest) for name in PAIR_METRICS}
        self.merge(Totals(of_all, dict.fromkeys(PAIR_METRICS, num_pairs)))
        for source in sources:
            names, count = [f"{name}/{source}" for name in BY_SOURCE], round(next(rest))
            self.merge(Totals({name: next(rest) for name in names}, dict.fromkeys(names, count)))

    def merge(self, others: Totals) -> None:
        """Add the sums of other pairs."""
        for name, value in others.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.pairs[name] = self.pairs.get(name, 0) + others.pairs[name]

    def means(self) -> dict[str, float]:
        """The metrics' means; empty without pairs."""
        return {name: value / self.pairs[name] for name, value in self.sums.items() if self.pairs[name]}

    def counts(self) -> dict[str, int]:
        """`pairs`, and `pairs/SOURCE` of each source."""
        return {f"pairs{name[4:]}": n for name, n in self.pairs.items() if name == "loss" or name.startswith("loss/")}

    def to_json(self) -> dict[str, Any]:
        """The sums by name, for a checkpoint."""
        return {"sums": self.sums, "pairs": self.pairs}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Totals:
        """What `to_json` gave, perhaps in another version of simpo: metrics that are gone by now are left out."""
        of_source = tuple(f"{name}/" for name in BY_SOURCE)
        sums, pairs = (
            {n: v for n, v in state[part].items() if n in PAIR_METRICS or n.startswith(of_source)}
            for part in ("sums", "pairs")
        )
        return cls(sums, pairs)


class StepTotals:
    """Adds up micro-batches without stalling an accelerator, then everything over the processes in one reduction.

    Args:
        sources: labels of the sources that pairs are told apart by.
    """

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self._sources = tuple(sources)
        self._sums: Tensor | float = 0.0
        self._not_finite: Tensor | float = 0.0
        self._num_tokens = 0

    def add(self, metric_sums: Tensor, losses: Tensor, *, num_tokens: int) -> None:
        """One micro-batch's sums of metrics, its pairs' losses, and the tokens it computed."""
        self._sums = self._sums + metric_sums
        self._not_finite = self._not_finite + (~torch.isfinite(losses.detach())).sum()
        self._num_tokens += num_tokens

    def over(self, mesh: Mesh, num_pairs: int, *, stop: bool = False, grad_norm: Tensor | float = math.nan) -> Totals:
        """The totals over all processes; each calls it, having added as many micro-batches as the others.

        Here, and nowhere else in a step, this process waits for an accelerator: for everything at once.

        Args:
            num_pairs: pairs that were added, over all processes.
            stop: whether this process was asked to stop.
            grad_norm: a scalar that is the same on every process, to be fetched along with the totals.
        """

        def scalar(value: Tensor | float) -> Tensor:
            if not isinstance(value, Tensor):  # filled on the device: a copy from here would wait for it
                return torch.full((), float(value), dtype=torch.float64, device=mesh.device)
            return value.to(mesh.device, torch.float64, non_blocking=True)

        width = num_sums(len(self._sources))
        counts = torch.stack([scalar(value) for value in (self._num_tokens, self._not_finite, stop)])
        sums = mesh.sum_over_all(torch.cat([scalar(self._sums).expand(width), counts]))
        everything = torch.cat([sums, scalar(grad_norm)[None]]).cpu()
        num_tokens, not_finite, stops, norm = everything[width:].tolist()
        # Processes that share pairs (cp, tp) have each counted the same ones.
        copies = mesh.sizes.world // mesh.sizes.data
        total = Totals({}, {}, round(num_tokens / copies), math.ceil(not_finite / copies), stops > 0, norm)
        total.add(everything[:width] / copies, num_pairs, self._sources)
        return total


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or the process's resident set on CPU; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
