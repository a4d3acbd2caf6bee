"""`gpu.py ladder`: the same training steps on every rung, in alternation, from padded rows to compiled blocks."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu.device import Deadline, Meter, TimeUp, attempt, measure_ceiling, stop_at
from gpu.report import Column, Report, digits
from gpu.workload import (
    RUNGS,
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
from simpo.bench import flops
from simpo.bench.summary import spread
from simpo.data.loader import StoredPair

DEFAULT_CASES = "ragged-200/350/350,1000/300/300,4096/256/256"
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest accepted difference of a rung's loss from the padded rung's on the same pairs: with fp32 compute rounding
alone; in bf16 the rungs round at different places (`parity` compares them with fp32)."""


@dataclass
class Track:
    """One rung over one case's micro-batches: its batches, and what came of them."""

    rung: Rung
    batches: list[Batch]
    failed: str | None = None
    losses: dict[int, float] = field(default_factory=dict)
    times: list[tuple[int, int, float]] = field(default_factory=list)  # round, micro-batch, seconds
    peak_bytes: int = 0

    def longest_step_s(self) -> float:
        return max((seconds for _, _, seconds in self.times), default=0.0)


def find_rungs(names: str) -> list[Rung]:
    """The rungs of `--rungs`, in the ladder's order.

    Raises:
        ValueError: a name that is none.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    known = [rung.name for rung in RUNGS]
    for name in asked:
        if name != "all" and name not in known:
            raise ValueError(f"rungs: {name!r} must be one of {', '.join(known)}, or all")
    return [rung for rung in RUNGS if "all" in asked or rung.name in asked]


def run_ladder(
    report: Report,
    meter: Meter,
    deadline: Deadline,
    *,
    model: str,
    plan: WeightPlan,
    compute: str,
    rungs: Sequence[Rung],
    cases: Sequence[LengthCase],
    pairs: int,
    micro_batches: int,
    rounds: int,
    ceiling_size: int = 8192,
) -> bool:
    """Measure every case; whether the losses of all rungs agree.

    Args:
        compute: "bf16" or "fp32"; bf16 is under autocast where weights are fp32.
        pairs, micro_batches: pairs in one micro-batch, and how many different ones there are.
        rounds: visits of every rung to every case, at most.
        ceiling_size: of the matrix product that gives the measured ceiling.
    """
    report.conditions["measured_ceiling_tflops"] = measure_ceiling(meter, size=ceiling_size)
    if compute == "fp32":
        report.conditions["peak_tflops"] = None  # the stated peak is that of bf16
    config = build_config(model)
    network = build_model(config, device=meter.device, dtype=plan.dtype)
    autocast = compute == "bf16" and plan.weights == "fp32"
    staged = StagedModel(network, device=meter.device, autocast=autocast)
    optimizer = build_optimizer(network, plan.optimizer)
    shape = flops.model_shape(config)
    with contextlib.suppress(TimeUp), stop_at(deadline):
        for index, case in enumerate(cases):
            share_s = deadline.left_s / (len(cases) - index)
            batches = case.micro_batches(micro_batches, pairs, vocab_size=config.vocab_size)
            tracks = [Track(rung, [lay_out(rung, batch) for batch in batches]) for rung in rungs]
            try:
                run_case(staged, optimizer, meter, tracks, rounds=rounds, deadline=deadline, share_s=share_s)
            finally:
                for row in summarise_case(case.name, tracks, batches, shape, report.conditions):
                    report.add(row)
                    report.say(f"{row['case']:<22}{row['rung']:<10}{row['outcome']}")
    agree = check_losses(report, compute)
    measured = [row["case"] for row in report.results["rows"] if row["rounds"] or row["failed"]]
    missing = [case.name for case in cases if measured.count(case.name) < len(rungs)]
    if missing:
        report.note(f"no time was left for all of {', '.join(missing)}: run them alone with --cases")
    report.finish(COLUMNS, complete=not missing)
    return agree


def run_case(
    staged: StagedModel,
    optimizer: torch.optim.Optimizer | None,
    meter: Meter,
    tracks: Sequence[Track],
    *,
    rounds: int,
    deadline: Deadline,
    share_s: float,
) -> None:
    """Warm up every rung on every micro-batch, then go round; the order of the rungs turns with every round."""
    end_s = max(0.0, deadline.left_s - share_s)  # what has to be left for the other cases
    for track in tracks:
        try:
            with staged.on(track.rung):
                for index in range(len(track.batches)):
                    _visit(staged, optimizer, meter, track, index, warm_up=True)
        except Exception as error:  # what is raised where torch cannot compile a block differs; the other rungs go on
            if not track.rung.compiled:
                raise
            track.failed = f"cannot be compiled: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
    for number in range(rounds):
        one_round_s = sum(track.longest_step_s() for track in tracks)
        if number and not deadline.allows(end_s + 2 * one_round_s):
            return
        running = [track for track in tracks if not track.failed]
        for track in running if number % 2 == 0 else reversed(running):
            with staged.on(track.rung):
                _visit(staged, optimizer, meter, track, number % len(track.batches), round_number=number)


def _visit(
    staged: StagedModel,
    optimizer: torch.optim.Optimizer | None,
    meter: Meter,
    track: Track,
    index: int,
    *,
    warm_up: bool = False,
    round_number: int = 0,
) -> None:
    """One step, unless the rung ran out of memory on an earlier micro-batch."""
    if track.failed:
        return
    kept: list[torch.Tensor] = []

    def work() -> None:
        kept.append(staged.step(track.rung, track.batches[index], optimizer)[0])

    measured, reason = attempt(lambda: meter.measure(work), meter)
    if measured is None:
        track.failed = f"out of memory: {reason}"
        return
    loss = float(kept[0])
    if warm_up:
        track.losses[index] = loss
    else:
        track.times.append((round_number, index, measured.seconds))
        track.peak_bytes = max(track.peak_bytes, measured.peak_bytes)


# --- numbers ---------------------------------------------------------------------------------------------------------


def summarise_case(
    name: str,
    tracks: Sequence[Track],
    batches: Sequence[Sequence[StoredPair]],
    shape: flops.ModelShape,
    conditions: dict[str, Any],
) -> list[dict[str, Any]]:
    """One row a rung."""
    floors = [flops.floor_flops(shape, [flops.pair_work(pair) for pair in batch]) for batch in batches]
    needed = sum(flops.pair_work(pair).shape.tokens for batch in batches for pair in batch)
    first = tracks[0]
    rows = []
    for track in tracks:
        computed = sum(batch.input_ids.numel() for batch in track.batches)
        row: dict[str, Any] = {
            "case": name,
            "rung": track.rung.name,
            "failed": track.failed,
            "rounds": len(track.times),
            "pairs_per_step": len(batches[0]),
            "tokens_computed": computed,
            "tokens_needed": needed,
            "losses": [track.losses.get(index) for index in range(len(batches))],
        }
        if track.times:
            row |= speed_of(track, floors, conditions) | {"peak_bytes": track.peak_bytes}
            row["speedup"] = speedup_of(first, track)
        row["outcome"] = track.failed or (f"{row['step_s']['median']:.4g} s" if track.times else "no time left")
        rows.append(row)
    return rows


def speed_of(track: Track, floors: Sequence[float], conditions: dict[str, Any]) -> dict[str, Any]:
    """Time of a step and the useful operations over it: 3F of the floor, whatever the rung executes."""
    seconds = [time for _, _, time in track.times]
    useful = sum(floors[index] for _, index, _ in track.times) / sum(seconds) / 1e12
    peak, ceiling = conditions.get("peak_tflops"), conditions.get("measured_ceiling_tflops")
    # Micro-batches differ in length: the median of each, then their mean.
    medians = [
        statistics.median(time for _, at, time in track.times if at == index)
        for index in sorted({index for _, index, _ in track.times})
    ]
    return {
        "times_s": seconds,
        "step_s": {**spread(seconds), "median": statistics.mean(medians)},
        "useful_tflops": useful,
        "mfu": useful / peak if peak else None,
        "mfu_of_ceiling": useful / ceiling if ceiling else None,
    }


def speedup_of(first: Track, track: Track) -> dict[str, float] | None:
    """The first rung's time over this one's, step by step of the same round and micro-batch."""
    before = {number: time for number, _, time in first.times}
    ratios = [before[number] / time for number, _, time in track.times if number in before]
    return spread(ratios) if ratios else None


def check_losses(report: Report, compute: str) -> bool:
    """Whether every rung's losses are those of the case's first rung, which is padded unless that was left out."""
    agree = True
    reference: dict[str, list[float | None]] = {}
    for row in report.results["rows"]:
        expected = reference.setdefault(row["case"], row["losses"])
        differences = [abs(a - b) for a, b in zip(row["losses"], expected) if a is not None and b is not None]
        row["largest_loss_difference"] = max(differences, default=None)
        # NaN differs from everything.
        if differences and not max(differences) <= LOSS_TOLERANCE[compute]:
            report.note(f"{row['case']}, {row['rung']}: the loss differs by {max(differences):.2g}")
            agree = False
    report.save()
    return agree


def _mean_loss(row: dict[str, Any]) -> str:
    known = [loss for loss in row["losses"] if loss is not None]
    return f"{statistics.mean(known):.5f}" if known else ""


COLUMNS: tuple[Column, ...] = (
    ("case", lambda row: row["case"]),
    ("rung", lambda row: row["rung"]),
    ("step ms", lambda row: digits(row["step_s"]["median"] * 1e3) if "step_s" in row else row["outcome"][:28]),
    (
        "min-max",
        lambda row: "-".join(digits(row["step_s"][k] * 1e3) for k in ("min", "max")) if "step_s" in row else "",
    ),
    ("first/this", lambda row: digits(row["speedup"]["median"]) if row.get("speedup") else ""),
    ("min-max", lambda row: "-".join(digits(row["speedup"][k]) for k in ("min", "max")) if row.get("speedup") else ""),
    ("peak GiB", lambda row: f"{row['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in row else ""),
    ("tokens/needed", lambda row: f"{row['tokens_computed'] / row['tokens_needed']:.2f}"),
    ("useful TFLOP/s", lambda row: digits(row.get("useful_tflops"))),
    ("MFU", lambda row: f"{row['mfu']:.1%}" if row.get("mfu") else ""),
    ("of ceiling", lambda row: f"{row['mfu_of_ceiling']:.1%}" if row.get("mfu_of_ceiling") else ""),
    ("loss", _mean_loss),
)
