"""`gpu.py ladder`: the same training steps on every rung, in alternation, from padded rows to compiled blocks.

A rung whose micro-batch does not fit takes the step's pairs in twice as many micro-batches, as its user would have to;
one that cannot run leaves the others. Compiling comes last: it may take all the time that is left.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peers import flops
from peers.summary import spread

from gpu.device import Deadline, Meter, TimeUp, attempt, first_line, measure_ceiling, stop_at
from gpu.profile import PROFILE_S, profile_step
from gpu.report import Column, Report, digits
from gpu.workload import (
    DEFAULT_RUNG,
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
from simpo.core.packing import TokenPair

DEFAULT_CASES = "ragged-200/350/350,1000/300/300,4096/256/256"
CANNOT_RUN = "cannot run: "
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest accepted difference of a rung's loss from the padded rung's on the same pairs: with fp32 compute rounding
alone; in bf16 the rungs round at different places (`parity` compares them with fp32)."""


@dataclass
class Track:
    """One rung over one case's steps, and what came of them.

    Attributes:
        steps: the pairs of each.
        micro_batches: that the pairs of a step are spread over.
    """

    rung: Rung
    steps: Sequence[Sequence[TokenPair]]
    micro_batches: int = 1
    failed: str | None = None
    losses: dict[int, float] = field(default_factory=dict)
    times: list[tuple[int, int, float]] = field(default_factory=list)  # round, step, seconds
    peak_bytes: int = 0
    batches: list[list[Batch]] = field(init=False)

    def __post_init__(self) -> None:
        size = -(-len(self.steps[0]) // self.micro_batches)
        self.batches = [
            [lay_out(self.rung, pairs[at : at + size]) for at in range(0, len(pairs), size)] for pairs in self.steps
        ]

    def halve(self) -> bool:
        """Spread steps over twice as many micro-batches, forgetting what was measured; False at one pair each."""
        if self.micro_batches >= len(self.steps[0]):
            return False
        self.micro_batches *= 2
        self.times.clear()
        self.__post_init__()
        return True

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
    steps: int,
    rounds: int,
    ceiling_size: int = 8192,
) -> bool:
    """Measure every case; whether the losses of all rungs agree.

    Args:
        compute: "bf16" or "fp32"; bf16 is under autocast where weights are fp32.
        pairs, steps: pairs of a step, and how many different steps there are.
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
            share_s = (deadline.left_s - PROFILE_S[meter.device.type]) / (len(cases) - index)
            end_s = max(0.0, deadline.left_s - share_s)  # what has to be left for the other cases
            tracks = [Track(rung, case.micro_batches(steps, pairs, vocab_size=config.vocab_size)) for rung in rungs]
            plain = [track for track in tracks if not track.rung.compiled]
            compiling = len(plain) < len(tracks)
            keep = functools.partial(_keep, report, list(report.results["rows"]), case.name, tracks, shape)
            step = functools.partial(_visit, staged, optimizer, meter)
            half = (rounds + 1) // 2 if compiling else rounds
            go_round(step, plain, range(half), deadline, end_s + share_s / 2 * compiling, keep)
            running = [track for track in plain if track.times]
            if index == 0 and running:
                track = next((track for track in running if track.rung is DEFAULT_RUNG), running[-1])
                with staged.on(track.rung):
                    work = functools.partial(staged.step, track.rung, track.batches[0], optimizer)
                    profile_step(report, meter, track.rung.name, work)
            if compiling:
                go_round(step, tracks, range(half, rounds), deadline, end_s, keep)
            keep(say=report.say)
    agree = check_losses(report, compute)
    measured = [row["case"] for row in report.results["rows"] if row["rounds"] or row["failed"]]
    missing = [case.name for case in cases if measured.count(case.name) < len(rungs)]
    if missing:
        report.note(f"no time was left for all of {', '.join(missing)}: run them alone with --cases")
    report.finish(complete=not missing)
    return agree and not any(str(row["failed"]).startswith(CANNOT_RUN) for row in report.results["rows"])


def go_round(
    visit: Callable[[Track, int, int | None], None],
    tracks: Sequence[Track],
    rounds: Sequence[int],
    deadline: Deadline,
    end_s: float,
    keep: Callable[[], None],
) -> None:
    """Warm up what was not yet, then visit all in turn, the order turning with every round, until `end_s` are left.

    keep: called whenever there is something new.
    """
    for track in tracks:
        for index in range(len(track.steps)):
            if index not in track.losses:
                visit(track, index, None)
        keep()
    for number in rounds:
        one_round_s = sum(track.longest_step_s() for track in tracks)
        if number > rounds[0] and not deadline.allows(end_s + 2 * one_round_s):
            return
        for track in tracks if number % 2 == 0 else reversed(tracks):
            visit(track, number % len(track.steps), number)
        keep()


def _keep(
    report: Report,
    before: Sequence[dict[str, Any]],
    case: str,
    tracks: Sequence[Track],
    shape: flops.ModelShape,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """The case's rows so far, behind those of the cases before it."""
    rows = summarise_case(case, tracks, shape, report.conditions)
    report.results["rows"] = [*before, *rows]
    report.save()
    for row in rows:
        say(f"{case:<22}{row['rung']:<13}{row['outcome']}")


def _visit(
    staged: StagedModel,
    optimizer: torch.optim.Optimizer | None,
    meter: Meter,
    track: Track,
    index: int,
    round_number: int | None,
) -> None:
    """One step, unless the rung failed before; None = to warm up."""
    kept: list[torch.Tensor] = []

    def work() -> None:
        kept.append(staged.step(track.rung, track.batches[index], optimizer)[0])

    measured, reason = None, None
    while measured is None and not track.failed:
        try:
            with staged.on(track.rung):
                measured, reason = attempt(lambda: meter.measure(work), meter)
        except Exception as error:  # what is raised where torch cannot compile, or has no kernel, differs
            reason = first_line(error)
            track.failed = ("cannot be compiled: " if track.rung.compiled else CANNOT_RUN) + reason
        else:
            if measured is None and not track.halve():
                track.failed = f"out of memory: {reason}"
    if measured is None:
        return
    if round_number is None:
        track.losses[index] = float(kept[-1])
    else:
        track.times.append((round_number, index, measured.seconds))
        track.peak_bytes = max(track.peak_bytes, measured.peak_bytes)


# --- numbers ---------------------------------------------------------------------------------------------------------


def summarise_case(
    name: str, tracks: Sequence[Track], shape: flops.ModelShape, conditions: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row a rung."""
    first = tracks[0]
    floors = [flops.floor_flops(shape, [flops.pair_work(pair) for pair in pairs]) for pairs in first.steps]
    needed = sum(flops.pair_work(pair).shape.tokens for pairs in first.steps for pair in pairs)
    rows = []
    for track in tracks:
        computed = sum(batch.input_ids.numel() for batches in track.batches for batch in batches)
        row: dict[str, Any] = {
            "case": name,
            "rung": track.rung.name,
            "failed": track.failed,
            "rounds": len(track.times),
            "pairs_per_step": len(first.steps[0]),
            "micro_batches": track.micro_batches,
            "tokens_computed": computed,
            "tokens_needed": needed,
            "losses": [track.losses.get(index) for index in range(len(first.steps))],
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
    ("micro-batches", lambda row: str(row["micro_batches"])),
    ("tokens/needed", lambda row: f"{row['tokens_computed'] / row['tokens_needed']:.2f}"),
    ("useful TFLOP/s", lambda row: digits(row.get("useful_tflops"))),
    ("MFU", lambda row: f"{row['mfu']:.1%}" if row.get("mfu") else ""),
    ("of ceiling", lambda row: f"{row['mfu_of_ceiling']:.1%}" if row.get("mfu_of_ceiling") else ""),
    ("loss", _mean_loss),
)
