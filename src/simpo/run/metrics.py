"""Metrics as sums and counts, and where they are written.

A mean is formed once, from sums over every pair of every micro-batch: never a mean of means. `metrics.jsonl` is always
written; TensorBoard, wandb and trackio on request. Must not import data, train or evaluate.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpo.core.losses import PairLogps, PairLoss

if TYPE_CHECKING:
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe

PAIR_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "sft_loss",
)


def pair_metric_sums(logps: PairLogps, loss: PairLoss, total_losses: Tensor) -> Tensor:
    """Sums over one micro-batch's pairs, in the order of PAIR_METRICS.

    Args:
        logps: the pairs' log-probs; `logps/*` are means per token.
        loss: the preference loss's rewards.
        total_losses: [P], the loss that is trained, the SFT term included.
    Returns:
        [len(PAIR_METRICS)] fp64, detached. A tie counts half in the accuracy.
    """
    margins = loss.chosen_rewards - loss.rejected_rewards
    columns = (
        total_losses,
        loss.chosen_rewards,
        loss.rejected_rewards,
        margins,
        0.5 * (torch.sign(margins) + 1),
        logps.chosen_mean,
        logps.rejected_mean,
        -logps.chosen_mean,
    )
    return torch.stack([column.detach().double().sum() for column in columns])


def means(sums: Tensor, num_pairs: int) -> dict[str, float]:
    """Means by their names, of sums over so many pairs; empty for none."""
    return dict(zip(PAIR_METRICS, (sums / num_pairs).tolist(), strict=True)) if num_pairs else {}


@dataclass(frozen=True)
class StepTotal:
    """What one optimizer step, or one evaluation, came to over all processes.

    Attributes:
        metric_sums: [len(PAIR_METRICS)] fp64, over every pair; in host memory.
        num_tokens: computed, padding included.
        num_not_finite: losses that are no finite number.
        stop: whether some process was asked to stop.
        grad_norm: as it was handed over.
    """

    metric_sums: Tensor
    num_tokens: int
    num_not_finite: int
    stop: bool
    grad_norm: float | None = None


class StepTotals:
    """Adds up micro-batches without stalling an accelerator, then everything over the processes in one reduction."""

    def __init__(self) -> None:
        self._sums: Tensor | float = 0.0
        self._not_finite: Tensor | float = 0.0
        self._num_tokens = 0

    def add(self, metric_sums: Tensor, losses: Tensor, *, num_tokens: int) -> None:
        """One micro-batch's sums of metrics, its pairs' losses, and the tokens it computed."""
        self._sums = self._sums + metric_sums
        self._not_finite = self._not_finite + (~torch.isfinite(losses.detach())).sum()
        self._num_tokens += num_tokens

    def over(self, mesh: Mesh, *, stop: bool = False, grad_norm: Tensor | None = None) -> StepTotal:
        """The totals over all processes; each calls it, having added as many micro-batches as the others.

        Here, and nowhere else in a step, the host waits for an accelerator: for everything at once.

        Args:
            stop: whether this process was asked to stop.
            grad_norm: a scalar that is the same on every process, to be fetched along with the totals.
        """

        def scalar(value: Tensor | float) -> Tensor:
            if not isinstance(value, Tensor):  # filled on the device: a copy from here would wait for it
                return torch.full((), float(value), dtype=torch.float64, device=mesh.device)
            return value.to(mesh.device, torch.float64, non_blocking=True)

        counts = torch.stack([scalar(value) for value in (self._num_tokens, self._not_finite, stop)])
        sums = scalar(self._sums).expand(len(PAIR_METRICS))
        both = mesh.sum_over_all(torch.cat([sums, counts]))
        if grad_norm is not None:
            both = torch.cat([both, scalar(grad_norm)[None]])
        both = both.cpu()
        sums, (num_tokens, not_finite, stops, *norm) = both[: len(PAIR_METRICS)], both[len(PAIR_METRICS) :].tolist()
        # Processes that share pairs (cp, tp) have each counted the same ones.
        copies = mesh.sizes.world // mesh.sizes.data
        return StepTotal(sums / copies, round(num_tokens / copies), math.ceil(not_finite / copies), stops > 0, *norm)


class PairMeter:
    """Running sums over pairs; `means()` divides once."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.num_pairs = 0

    def add(self, sums: Tensor, num_pairs: int) -> None:
        """Add one micro-batch's sums."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.num_pairs += num_pairs

    def means(self) -> dict[str, float]:
        """Means over every pair added so far; empty when there was none."""
        return {} if self.sums is None else means(self.sums, self.num_pairs)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": None if self.sums is None else self.sums.tolist(), "num_pairs": self.num_pairs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = None if state["sums"] is None else torch.tensor(state["sums"], dtype=torch.float64)
        self.num_pairs = state["num_pairs"]


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or the process's resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsLog:
    """`metrics.jsonl`, one JSON object a line, and the trackers named in `report_to`.

    Every line has "step"; lines of evaluations have keys that begin with "eval_".
    """

    def __init__(self, path: Path, recipe: Recipe, *, resume_step: int | None = None) -> None:
        self.path = path
        forget_lines_after(path, resume_step)
        self._trackers = [_TRACKERS[name](recipe, path.parent) for name in recipe.report_to]
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any], *, step: int) -> None:
        """Write one line, in full or not at all as far as a reader can tell (one write, flushed)."""
        record = {"step": step, **values}
        self._file.write(json.dumps(record, allow_nan=True) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        for tracker in self._trackers:
            tracker.log(numbers, step)

    def sync(self) -> None:
        """Make what was written survive a power cut; called before a checkpoint that refers to it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def forget_lines_after(path: Path, step: int | None) -> None:
    """Drop lines of steps that a resumed run will do again, and a last line that a kill cut short.

    Args:
        path: a file of JSON lines that have "step"; may be missing.
        step: the last step that is kept; None starts over.
    """
    if not path.exists():
        return
    if step is None:
        path.unlink()
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step and "eval_saved_loss" not in record:  # the end of a run is evaluated anew
            kept.append(line + "\n")
    aside = path.with_suffix(".jsonl.tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that is not installed, before a run spends time on anything else."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to: {name} is not installed: pip install 'simpo[{name}]'")


class _TensorBoard:
    def __init__(self, recipe: Recipe, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(recipe.logging_dir or str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            # TensorBoard groups by the part before the slash.
            prefix, bare = ("eval/", name[5:]) if name.startswith("eval_") else ("train/", name)
            self._writer.add_scalar(prefix + bare, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _RunTracker:
    """wandb and trackio share one interface: init, log, finish."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        module = importlib.import_module(name)
        self._module = module
        module.init(
            project=os.environ.get(f"{name.upper()}_PROJECT", "simpo"), name=recipe.run_name, config=recipe.to_dict()
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


_TRACKERS = {
    "tensorboard": _TensorBoard,
    "wandb": lambda recipe, folder: _RunTracker("wandb", recipe),
    "trackio": lambda recipe, folder: _RunTracker("trackio", recipe),
}
