"""Held-out pairs before and after training, with intervals: all of them, by length, by source.

Intervals are at 95% and take pairs as independent draws: Wilson's for accuracies, normal ones for means and changes; a
change is that of the same pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from simpo.data.rows import name_sources
from simpo.evaluation.plain import SIMILAR_LENGTH, Interval, Z, wilson_interval
from simpo.report.read import Curve, Run

_LENGTHS = {
    "shorter": "chosen is shorter",
    "similar": f"lengths within {SIMILAR_LENGTH:.0%}",
    "longer": "chosen is longer",
}


class Row(NamedTuple):
    """One measure of some pairs. `change`: after minus before, on the same pairs; None where it is not known."""

    label: str
    num_pairs: int
    before: Interval | None
    after: Interval | None
    change: Interval | None = None


@dataclass(frozen=True)
class HeldOut:
    """An evaluation before and one after.

    Attributes:
        before, after: what they are of; `before` is "" where there is only one.
        accuracy: rows of all pairs, by length, by source.
        margin: the same for reward margins (for margins of mean log-probs where `simpo eval` made them).
        sides: mean log-probs per token of both responses.
    """

    before: str
    after: str
    accuracy: list[Row]
    margin: list[Row]
    sides: list[Row]

    @property
    def has_change(self) -> bool:
        return any(row.change is not None for row in self.accuracy)


def of_run(run: Run) -> HeldOut | None:
    """From the first evaluation to that of the final weights; None without any."""
    last = final_line(run)
    if last is None:
        return _from_means(run)
    first = run.evaluations[0]
    return between(None if first is last else first, last, before=_moment(first), after=_moment(last))


def final_line(run: Run) -> dict[str, Any] | None:
    """The evaluation of the weights that the run is to be judged by: what its guard went back to, the best where it
    keeps that, else the last."""
    if not run.evaluations:
        return None
    if (known := run.step_of_model) is not None:
        return next((line for line in run.evaluations if line["step"] == known), None)  # none was kept here
    last = run.evaluations[-1]
    best = next((row["back_to"] for row in run.guard if "back_to" in row), None)
    metric = run.curve(str(run.settings.get("metric_for_best_model")))
    values = np.where(metric.steps > 0, metric.values, math.nan)  # the model before training is none of the run's
    if best is None and run.settings.get("load_best_model_at_end") and np.isfinite(values).any():
        pick = np.nanargmax if run.settings.get("greater_is_better") else np.nanargmin
        best = int(metric.steps[pick(values)])
    return next((line for line in run.evaluations if run.is_finished and line["step"] == best), last)


def between(first: Mapping[str, Any] | None, last: Mapping[str, Any], *, before: str, after: str) -> HeldOut:
    """Two lines of eval_pairs.jsonl, which may be two runs'; changes where they are of the same pairs."""
    then, now = None if first is None else _columns(first), _columns(last)
    same = first is not None and first["row_ids"] == last["row_ids"]
    accuracy, margin, sides = [], [], []
    for label, mask in _groups(last["row_ids"], now):
        earlier = then if label == "all pairs" or same else None
        accuracy.append(_row(label, mask, earlier, now, "right", _share, same))
        margin.append(_row(label, mask, earlier, now, "margin", _mean, same))
    everything = np.ones(len(last["row_ids"]), dtype=bool)
    for side in ("chosen", "rejected"):
        sides.append(_row(side, everything, then, now, f"logps/{side}", _mean, same))
    return HeldOut("" if then is None else before, after, accuracy, margin, sides)


def _moment(line: Mapping[str, Any]) -> str:
    return "before training" if line["step"] == 0 else f"after step {line['step']}"


def _columns(line: Mapping[str, Any]) -> dict[str, np.ndarray]:
    columns = {name: np.array(values, dtype=float) for name, values in line.items() if name not in ("step", "row_ids")}
    columns["right"] = 0.5 * (np.sign(columns["margin"]) + 1)  # a tie counts half
    return columns


def _groups(row_ids: list[str], columns: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    yield "all pairs", np.ones(len(row_ids), dtype=bool)
    chosen, rejected = columns["tokens/chosen"], columns["tokens/rejected"]
    alike = np.abs(chosen - rejected) <= SIMILAR_LENGTH * np.maximum(chosen, rejected)
    for name, mask in (
        ("shorter", ~alike & (chosen < rejected)),
        ("similar", alike),
        ("longer", ~alike & (chosen > rejected)),
    ):
        if mask.any():
            yield _LENGTHS[name], mask
    names, numbers = name_sources(row_ids)
    for number, name in enumerate(names):
        yield name, numbers == number


def _row(
    label: str,
    mask: np.ndarray,
    before: Mapping[str, np.ndarray] | None,
    after: Mapping[str, np.ndarray],
    name: str,
    of: Callable[[np.ndarray], Interval],
    same: bool,
) -> Row:
    now = after[name][mask]
    if before is None:
        return Row(label, len(now), None, of(now))
    then = before[name][mask] if same else before[name]
    return Row(label, len(now), of(then), of(now), _mean(now - then) if same else None)


def _share(values: np.ndarray) -> Interval:
    return wilson_interval(float(values.sum()), len(values)) if np.isfinite(values).all() else _UNKNOWN


def _mean(values: np.ndarray) -> Interval:
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = Z * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def _from_means(run: Run) -> HeldOut | None:
    """Of a run without eval_pairs.jsonl: metrics.jsonl has the means, so only accuracies have intervals."""
    known = run.step_of_model

    def curve(name: str) -> Curve:
        """Up to the step whose weights the model has, where that is known."""
        whole = run.curve(name)
        upto = whole.steps <= (math.inf if known is None else known)
        return Curve(whole.steps[upto], whole.values[upto])

    loss = curve("eval_loss")
    if not len(loss) or known not in (None, loss.steps[-1]):
        return None
    several = len(loss) > 1
    sources = [name.removeprefix("eval_pairs/") for name in run.curves if name.startswith("eval_pairs/")]

    def rows(metric: str, labels: Mapping[str, str], share: bool) -> list[Row]:
        found = []
        for label, of in labels.items():
            values, pairs = curve(f"eval_{metric}{of}").values, curve(f"eval_pairs{of}").values
            if not len(values):
                continue
            count = int(pairs[-1]) if len(pairs) else 0
            known = share and count
            ends = [
                wilson_interval(x * count, count) if known and 0 <= x <= 1 else Interval(float(x), math.nan, math.nan)
                for x in (values[0], values[-1])
            ]
            change = Interval(float(values[-1] - values[0]), math.nan, math.nan) if several else None
            found.append(Row(label, count, ends[0] if several else None, ends[1], change))
        return found

    groups = {"all pairs": "", **{source: f"/{source}" for source in sources}}
    return HeldOut(
        before=_moment({"step": int(loss.steps[0])}) if several else "",
        after=_moment({"step": int(loss.steps[-1])}),
        accuracy=rows("rewards/accuracies", groups, True),
        margin=rows("rewards/margins", groups, False),
        sides=[*rows("logps/chosen", {"chosen": ""}, False), *rows("logps/rejected", {"rejected": ""}, False)],
    )


def as_interval(found: Mapping[str, Any] | None) -> Interval | None:
    """Of a result in JSON, where None stands for nan."""
    if found is None:
        return None
    return Interval(*(math.nan if found.get(name) is None else float(found[name]) for name in Interval._fields))


def of_command(content: Mapping[str, Any]) -> HeldOut:
    """What `simpo eval --output` wrote: a model, and with --compare the one it is compared with, which is "before"."""
    base, comparison = content.get("baseline"), content.get("comparison", {})

    def row(label: str, of: Callable[[Mapping[str, Any]], Any], change: Any, count: int) -> Row:
        return Row(label, count, as_interval(of(base)) if base else None, as_interval(of(content)), as_interval(change))

    def entry(entries: Any, name: str) -> Mapping[str, Any]:
        return next((each for each in entries or () if each["name"] == name), {})

    accuracy = [row("all pairs", lambda m: m["accuracy"], comparison.get("accuracy_difference"), content["num_pairs"])]
    margin = [row("all pairs", lambda m: m["margin"], comparison.get("margin"), content["num_pairs"])]
    for bucket in content["accuracy_by_length"]:
        name = bucket["name"]
        if bucket["accuracy"]:
            of = lambda m, name=name: entry(m["accuracy_by_length"], name).get("accuracy")  # noqa: E731
            accuracy.append(row(_LENGTHS.get(name, name), of, None, bucket["num_pairs"]))
    for source in content.get("by_source", ()):
        name, changes = source["name"], entry(comparison.get("by_source"), source["name"])
        for rows, key, change in ((accuracy, "accuracy", "accuracy_difference"), (margin, "margin", "margin")):
            of = lambda m, name=name, key=key: entry(m.get("by_source"), name).get(key)  # noqa: E731
            rows.append(row(name, of, changes.get(change), source["num_pairs"]))
    sides = [
        row(side, lambda m, key=f"{side}_mean": {"value": m[key]}, comparison.get(f"{side}_mean"), content["num_pairs"])
        for side in ("chosen", "rejected")
    ]
    return HeldOut(str(base["model"]) if base else "", str(content["model"]), accuracy, margin, sides)
