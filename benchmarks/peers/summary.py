"""From the raw numbers of every process to those of the table: pure functions on the results' plain values."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def summarise(results: dict[str, Any]) -> None:
    """Fill in each side's `summary` and `beside_simpo`, from its `rounds` and `work`; in place."""
    for case in results["cases"]:
        if case["skipped"]:
            continue
        ours = case["sides"]["simpo"]
        for name, side in case["sides"].items():
            side["summary"] = _work_summary(case, side["work"]) if side["work"] else {}
            if side["rounds"]:
                side["summary"] |= _run_summary(case, side, results)
            if name != "simpo":
                side["beside_simpo"] = compare_sides(ours, side, warm_up=results["conditions"]["warm_up_steps"])


def _work_summary(case: dict[str, Any], work: dict[str, Any]) -> dict[str, float]:
    return {
        "executed_over_floor": work["executed_flops"] / case["floor_flops"],
        "tokens_over_needed": work["tokens_computed"] / case["tokens_needed"],
        "row_fill": work["tokens_unpadded"] / work["tokens_computed"],
        "executed_tflop_per_pair": work["executed_flops"] / case["timed_pairs"] / 1e12,
    }


def _run_summary(case: dict[str, Any], side: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    conditions, machine = results["conditions"], results["machine"]
    times = [seconds for one in side["rounds"] for seconds in timed(one, conditions["warm_up_steps"])]
    useful = case["floor_flops"] * len(side["rounds"]) / sum(times)
    summary: dict[str, Any] = {
        "pairs_per_s": case["pairs_per_step"] * len(times) / sum(times),
        "step_time_s": spread(times),
        "first_step_s": statistics.median(one["step_times_s"][0] for one in side["rounds"]),
        "peak_gib": max(one["peak_gib"] for one in side["rounds"]),
        "loaded_gib": statistics.median(one["loaded_gib"] for one in side["rounds"]),
        "useful_tflops": useful / 1e12,
    }
    if conditions.get("peak_tflops"):
        summary["mfu"] = useful / 1e12 / conditions["peak_tflops"]
    if machine.get("matmul_tflops"):
        summary["mfu_of_measured_ceiling"] = useful / 1e12 / machine["matmul_tflops"]
    counted = [one["warm_up_matmul_flops"] for one in side["rounds"] if one["warm_up_matmul_flops"] is not None]
    if counted and side["work"]:  # the same step, counted while it really ran
        summary["count_confirmed"] = all(value == side["work"]["warm_up_matmul_flops"] for value in counted)
    return summary


def compare_sides(ours: dict[str, Any], theirs: dict[str, Any], *, warm_up: int) -> dict[str, Any]:
    """A peer beside this trainer: each step beside the same step of the same round, after `warm_up` steps.

    Returns:
        `step_time_ratio`: theirs / ours over all steps and rounds; `whole_time_ratio`: of the sums of their times;
        `memory_share`: ours / theirs at the peak; `executed_ratio`: theirs / ours; `largest_loss_difference` over all
        steps, those of the warm-up included. What needs a run of both is left out where one did not run.
    """
    found: dict[str, Any] = {}
    if theirs["work"]:
        found["executed_ratio"] = theirs["work"]["executed_flops"] / ours["work"]["executed_flops"]
    by_round = {one["round"]: one for one in ours["rounds"]}
    both = [(by_round[one["round"]], one) for one in theirs["rounds"] if one["round"] in by_round]
    if not both:
        return found
    times = [[seconds for pair in both for seconds in timed(pair[side], warm_up)] for side in (0, 1)]
    ratios = [b / a for a, b in zip(*times, strict=True)]
    differences = [abs(a - b) for one, other in both for a, b in zip(one["losses"], other["losses"], strict=True)]
    return found | {
        "step_time_ratio": spread(ratios),
        "whole_time_ratio": sum(times[1]) / sum(times[0]),
        "memory_share": max(one["peak_gib"] for one, _ in both) / max(other["peak_gib"] for _, other in both),
        "largest_loss_difference": max(differences),
    }


def timed(one: dict[str, Any], warm_up: int) -> list[float]:
    """Step times of one process without its warm-up steps."""
    return one["step_times_s"][warm_up:]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
