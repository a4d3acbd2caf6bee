"""`gpu.py memory`: the peak of one training step as micro-batches grow, and what was predicted for it.

Predicted twice: by `run.memory`, which measures small rows of the model at hand before a run (with it training picks
its micro-batches), and by `simpo plan`, which has never seen the model (`plan.footprint`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from peers.flops import pair_work
from peers.machine import available_gib

from gpu.device import GIB, CpuMeter, Deadline, Meter, TimeUp, attempt, stop_at
from gpu.report import Column, Report, digits, gib
from gpu.workload import (
    CHECKPOINTS_RUNG,
    DEFAULT_RUNG,
    PADDED_RUNG,
    Batch,
    LengthCase,
    Rung,
    StagedModel,
    WeightPlan,
    build_config,
    build_model,
    build_optimizer,
    lay_out,
)
from simpo.core.batch import PackedPairs
from simpo.core.packing import PairShape, TokenPair
from simpo.parallel.mesh import MeshSizes
from simpo.plan.footprint import RUNTIME_BYTES, compute_footprint
from simpo.plan.sizes import describe_model
from simpo.run.memory import ActivationBytes, measure_activations, step_bytes

HOST_SHARE = 0.8
"""Of the host's free memory that offloaded activations may take."""
PINNED_OVERHEAD = 2.0
"""Pinned blocks are rounded up to powers of two: at most twice what they hold."""


@dataclass(frozen=True)
class Mode:
    """How a step keeps what its backward pass needs."""

    name: str
    rung: Rung
    offload: bool = False
    optimizer_offload: bool = False


MODES = (
    Mode("packed", DEFAULT_RUNG),
    Mode("checkpoints", CHECKPOINTS_RUNG),
    Mode("padded", PADDED_RUNG),
    Mode("padded-checkpoints", dataclasses.replace(PADDED_RUNG, checkpointing=True)),
    # Last: pinning tens of GiB takes its time.
    Mode("offload", DEFAULT_RUNG, offload=True),
    Mode("optimizer-offload", CHECKPOINTS_RUNG, optimizer_offload=True),
)


def run_memory(
    report: Report,
    meter: Meter,
    deadline: Deadline,
    *,
    model: str,
    plan: WeightPlan,
    case: LengthCase,
    tokens: Sequence[int],
    modes: Sequence[Mode] = MODES,
) -> bool:
    """Every mode with growing micro-batches until memory runs out; True (what runs out is a result, no failure).

    Args:
        case: its pairs fill the micro-batches.
        tokens: packed tokens of the micro-batches, ascending; each is rounded down to whole pairs, at least one.
    """
    config = build_config(model)
    network = build_model(config, device=meter.device, dtype=plan.dtype)
    staged = StagedModel(network, device=meter.device, autocast=plan.weights == "fp32")
    weights_bytes = meter.allocated_bytes()
    report.conditions["weights_gib"] = weights_bytes / GIB
    batches = micro_batches_of(case, tokens, vocab_size=config.vocab_size)
    expected = [(mode.name, len(batch)) for mode in modes for batch in batches]

    def planned(mode: Mode, pairs: Sequence[TokenPair]) -> float | None:
        if plan.optimizer == "none" or find_spec("pydantic_core") is None:  # no recipe has it; none can be read
            return None
        return plan_bytes(config, plan, mode, pairs, on_cpu=meter.device.type == "cpu")

    with contextlib.suppress(TimeUp), stop_at(deadline):
        activations = {mode: measure_mode(staged, mode) for mode in modes if mode.rung.layout != "padded"}
        optimizer = None
        for mode in modes:
            if optimizer is None or mode.optimizer_offload:
                optimizer = None  # its moments must be gone before there are others
                meter.release()
                optimizer = build_optimizer(network, plan.optimizer, offload=mode.optimizer_offload)
                _first_step(staged, batches[0][:1], optimizer, meter)
                optim = "offloaded" if mode.optimizer_offload else plan.recipe_optim
                before = weights_bytes + state_bytes(network, plan, optim)
            with staged.on(mode.rung):
                _grow(report, meter, deadline, staged, mode, batches, optimizer, activations, before, planned)
    done = {(row["mode"], row["pairs"]) for row in report.results["rows"]}
    missing = list(dict.fromkeys(name for name, pairs in expected if (name, pairs) not in done))
    if missing:
        report.note(f"no time was left for all of {'; '.join(missing)}: run them alone with --modes")
    report.finish(complete=not missing)
    return True


def micro_batches_of(case: LengthCase, tokens: Sequence[int], *, vocab_size: int) -> list[list[TokenPair]]:
    """The case's first pairs, as many as come closest to each number of packed tokens from below; at least one."""
    most = max(tokens)
    count, pairs = 1, case.pairs(1, vocab_size=vocab_size)
    while sum(pair_work(pair).shape.tokens for pair in pairs) <= most:
        count *= 2
        pairs = case.pairs(count, vocab_size=vocab_size)
    reached = np.cumsum([pair_work(pair).shape.tokens for pair in pairs])
    sizes = [max(1, int((reached <= budget).sum())) for budget in tokens]
    return [pairs[:size] for size in dict.fromkeys(sizes)]


# --- what run.memory predicts -------------------------------------------------------------------------------------


def measure_mode(staged: StagedModel, mode: Mode) -> ActivationBytes:
    """Activations by `run.memory`, measured on small rows as `simpo train` does."""

    def forward(batch: PackedPairs) -> torch.Tensor:
        return staged.losses(mode.rung, batch).mean()

    with staged.on(mode.rung):
        return measure_activations(staged.model, forward, device=staged.device, offloaded=mode.offload)


def state_bytes(network: torch.nn.Module, plan: WeightPlan, optim: str) -> int:
    """Gradients, moments and the head's work by `run.memory`; without moments where nothing is updated."""
    total = step_bytes(network, optim=optim, device=next(network.parameters()).device)
    if plan.optimizer == "none":
        total -= sum(2 * p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    return total


def predict_bytes(activations: ActivationBytes, pairs: Sequence[TokenPair], before: int) -> float:
    """The peak of a step over these pairs, everything included."""
    works = [pair_work(pair) for pair in pairs]
    columns = zip(*((w.shape.prefix, w.shape.chosen, w.shape.rejected, w.labels) for w in works))
    prefix, chosen, rejected, labels = (np.array(column) for column in columns)
    sizes = activations.of_pairs(PairShape(prefix, chosen, rejected), labels)
    return float(before + activations.fixed + sizes.sum())


def plan_bytes(config: Any, plan: WeightPlan, mode: Mode, pairs: Sequence[TokenPair], *, on_cpu: bool) -> float:
    """The same by `simpo plan`, without what CUDA itself takes, which the allocator does not see."""
    works = [pair_work(pair) for pair in pairs]
    from simpo.recipe import load_recipe  # it needs pydantic: bring its wheel (--wheels) where there is none

    recipe = load_recipe(
        {
            "model_name_or_path": "any",
            "optim": plan.recipe_optim,
            "master_dtype": str(plan.dtype).removeprefix("torch."),
            "gradient_checkpointing": mode.rung.checkpointing,
        }
    )
    # On a CPU the recipe would refuse them.
    offloads = {"activation_offload": mode.offload, "optimizer_offload": mode.optimizer_offload}
    recipe = recipe.model_copy(update={"device": "cpu" if on_cpu else "cuda", **offloads})
    tokens, labels = sum(work.shape.tokens for work in works), sum(work.labels for work in works)
    footprint = compute_footprint(describe_model(config, recipe), recipe, MeshSizes(), tokens=tokens, labels=labels)
    return footprint.total - (0 if on_cpu else RUNTIME_BYTES)


# --- what happens ----------------------------------------------------------------------------------------------------


def _first_step(staged: StagedModel, pairs: Sequence[TokenPair], optimizer: Any, meter: Meter) -> None:
    """One pair, so that moments and workspaces are there before anything is measured."""
    with staged.on(DEFAULT_RUNG):
        batch = lay_out(DEFAULT_RUNG, pairs)
        _, reason = attempt(lambda: staged.step(DEFAULT_RUNG, [batch], optimizer), meter)
    if reason:
        raise ValueError(f"model: one pair does not fit: {reason}; try --weights bf16, or --optimizer none")


def _grow(
    report: Report,
    meter: Meter,
    deadline: Deadline,
    staged: StagedModel,
    mode: Mode,
    batches: Sequence[Sequence[TokenPair]],
    optimizer: Any,
    activations: dict[Mode, ActivationBytes],
    before: int,
    planned: Callable[[Mode, Sequence[TokenPair]], float | None],
) -> None:
    """One mode, micro-batch by micro-batch; what follows one that does not fit is a row without numbers."""
    failed: str | None = None
    seconds, moved_per_token = 0.0, 0.0
    for pairs in batches:
        batch = lay_out(mode.rung, pairs)
        needed = sum(pair_work(pair).shape.tokens for pair in pairs)
        row: dict[str, Any] = {
            "mode": mode.name,
            "pairs": len(pairs),
            "packed_tokens": needed,
            "tokens_computed": batch.input_ids.numel(),
            "predicted_bytes": predict_bytes(activations[mode], pairs, before) if mode in activations else None,
            "planned_bytes": planned(mode, pairs) if mode in activations else None,
        }
        if failed is None:
            failed = host_shortage(moved_per_token * needed) if mode.offload else None
        if failed is None and not deadline.allows(4 * seconds):
            return
        if failed is None:
            found, failed = measure_step(staged, mode, batch, optimizer, meter)
            if found:
                row |= found
                seconds, moved_per_token = found["seconds"], found["offloaded_bytes"] / needed
        report.add(row | {"failed": failed})
        report.say(f"{mode.name:<24}{needed:>8} tokens  {failed or gib(row['peak_bytes']) + ' GiB'}")
        if not isinstance(meter, CpuMeter):
            meter.release()  # what the allocator keeps in odd sizes must not decide whether the next one fits


def measure_step(
    staged: StagedModel, mode: Mode, batch: Batch, optimizer: Any, meter: Meter
) -> tuple[dict[str, Any] | None, str | None]:
    """One step's time and memory, or the reason why there is none."""
    moved: list[int] = []

    def work() -> None:
        moved.append(staged.step(mode.rung, [batch], optimizer, offload=mode.offload)[1])

    measured, failed = attempt(lambda: meter.measure(work), meter)
    if measured is None:
        return None, failed
    return {
        "peak_bytes": measured.peak_bytes,
        "before_bytes": measured.before_bytes,
        "seconds": measured.seconds,
        "offloaded_bytes": moved[0],
    }, None


def host_shortage(wanted_bytes: float) -> str | None:
    """Why so many offloaded bytes do not fit into the host's memory, or None."""
    free = available_gib()
    if free is None or PINNED_OVERHEAD * wanted_bytes <= HOST_SHARE * free * GIB:
        return None
    return f"would pin up to {PINNED_OVERHEAD * wanted_bytes / GIB:.0f} GiB of the host's memory, {free:.0f} GiB free"


def _over_peak(row: dict[str, Any], key: str) -> str:
    if row.get(key) is None or "peak_bytes" not in row:
        return ""
    return f"{row[key] / row['peak_bytes']:.2f}"


COLUMNS: tuple[Column, ...] = (
    ("mode", lambda row: row["mode"]),
    ("pairs", lambda row: str(row["pairs"])),
    ("packed tokens", lambda row: str(row["packed_tokens"])),
    ("computed", lambda row: str(row["tokens_computed"])),
    ("peak GiB", lambda row: gib(row.get("peak_bytes")) or (row["failed"] or "")[:40]),
    ("predicted GiB", lambda row: gib(row["predicted_bytes"])),
    ("/ peak", lambda row: _over_peak(row, "predicted_bytes")),
    ("plan GiB", lambda row: gib(row["planned_bytes"])),
    ("/ peak", lambda row: _over_peak(row, "planned_bytes")),
    ("offloaded GiB", lambda row: gib(row.get("offloaded_bytes") or None)),
    ("step s", lambda row: digits(row.get("seconds"))),
)
