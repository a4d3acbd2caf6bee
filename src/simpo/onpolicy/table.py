"""What the models of `simpo rounds` are measured by: fresh responses to held-out prompts, and held-out pairs.

A prompt is what is drawn at random, so the mean of its samples counts as one value. Every interval is at 95%.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from simpo.display import say
from simpo.evaluation.plain import Z
from simpo.evaluation.results import plain
from simpo.evaluation.statistics import Interval, mean_interval, repeated_share
from simpo.onpolicy.journal import read_rows


@dataclass
class Measures:
    """One model, by its own responses to the held-out prompts.

    Attributes:
        round: 0 for the first model, before any training.
        numbers: name -> mean over prompts: "score" (what pairs are made by), "score: NAME" for each scorer where there
            are several, "tokens", "repetition" (share of 4-grams of words that came before), "finished"; and over
            held-out pairs "accuracy" and "margin" (nats per token), where there are some.
        by_prompt: prompt id -> the same means of its samples.
        gain: of the score on the round before, over the prompts of both.
    """

    round: int
    model: str
    numbers: dict[str, Interval]
    by_prompt: dict[str, dict[str, float]] = field(repr=False)
    gain: Interval | None = None

    @property
    def score(self) -> Interval:
        return self.numbers["score"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those of single prompts; what is not a number is None."""
        head = {"round": self.round, "model": self.model, "gain": self.gain, "prompts": len(self.by_prompt)}
        return plain({**head, **self.numbers})


Scales = Mapping[str, tuple[float, float]]
"""Scorer -> mean, and factor of what is above it."""


def measure_model(
    number: int, model: str, scored: Path, pairs: Path | None, *, scales: Scales | None = None
) -> Measures:
    """The measures of one model.

    Args:
        scored: what `simpo score` wrote of its responses to held-out prompts.
        pairs: what `simpo eval` wrote of held-out pairs.
        scales: make the score anew from each scorer's numbers, where the file's is standardised over itself.
    """
    of_prompts: dict[str, dict[str, float]] = {}
    for row in read_rows(scored):
        of_prompts[row["id"]] = _of_prompt(row["responses"], scales)
    names = list(next(iter(of_prompts.values())))
    numbers = {name: _interval([each[name] for each in of_prompts.values()]) for name in names}
    if pairs is not None:
        content = json.loads(pairs.read_text(encoding="utf-8"))
        for name in ("accuracy", "margin"):  # null: of one pair there is no interval
            numbers[name] = Interval(**{key: math.nan if x is None else x for key, x in content[name].items()})
    return Measures(number, model, numbers, of_prompts)


def _of_prompt(responses: Sequence[dict[str, Any]], scales: Scales | None) -> dict[str, float]:
    """Means over the responses to one prompt."""
    values: dict[str, list[float]] = {"score": [each["score"] for each in responses]}
    if scales is not None:
        values["score"] = [
            math.fsum(factor * (each["scores"][name] - mean) for name, (mean, factor) in scales.items())
            for each in responses
        ]
    scorers = responses[0].get("scores", {})
    if len(scorers) > 1:
        values |= {f"score: {name}": [each["scores"][name] for each in responses] for name in scorers}
    if all(each.get("num_tokens") is not None for each in responses):
        values["tokens"] = [each["num_tokens"] for each in responses]
    values["repetition"] = [repeated_share(each["text"].split()) for each in responses]
    values["finished"] = [float(each.get("finished") is not False) for each in responses]
    return {name: fmean(each) for name, each in values.items()}


def compare_models(model: Measures, before: Measures, name: str = "score") -> Interval:
    """The mean difference of two models' scores, or another of their `numbers`, prompt by prompt."""
    common = sorted(model.by_prompt.keys() & before.by_prompt.keys())
    return _interval([model.by_prompt[each][name] - before.by_prompt[each][name] for each in common])


def standard_error(interval: Interval) -> float:
    """That of a mean, from its interval; nan where one observation gives none."""
    return (interval.high - interval.low) / (2 * Z)


def table_lines(models: Sequence[Measures]) -> list[str]:
    """The measures in Markdown, a row for each model."""
    head, rows = _cells(models)
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Means over {len(models[0].by_prompt)} held-out prompts, answered anew by each model, and over held-out pairs;"
        " 95% intervals. gain: of the score on the round before.",
    ]


def show_table(console: Console, models: Sequence[Measures], notes: Sequence[str]) -> None:
    """Print the measures, turned: a column for each model."""
    head, rows = _cells(models)
    table = Table(title="fresh responses to held-out prompts, and held-out pairs", title_justify="left")
    for index, cell in enumerate(("", *(row[0] for row in rows))):
        table.add_column(cell if not index else f"round {cell}", justify="right" if index else "left")
    for index, name in enumerate(head[1:], start=1):
        table.add_row(name, *(row[index].replace(" (", "\n(") for row in rows))
    console.print()
    console.print(table)
    for note in notes:
        say(note, console)


_SHARES = ("accuracy", "repetition", "finished")


def _cells(models: Sequence[Measures]) -> tuple[list[str], list[list[str]]]:
    names = list(dict.fromkeys(name for model in models for name in model.numbers))
    head = ["round", names[0], "gain", *names[1:]]
    rows = []
    for model in models:
        found = {**model.numbers, "gain": model.gain}
        rows.append([str(model.round), *(_cell(name, found.get(name)) for name in head[1:])])
    return head, rows


def _cell(name: str, interval: Interval | None) -> str:
    if interval is None:
        return "-"
    form = "{:.1%}" if name in _SHARES else "{:.1f}" if name == "tokens" else "{:+.4f}"
    if name.startswith("score"):
        form = "{:.4f}"
    if math.isnan(interval.low):
        return form.format(interval.value)
    ends = (min(1.0, max(0.0, end)) if name in _SHARES else end for end in interval[1:])
    return "{} ({} to {})".format(*(form.format(number) for number in (interval.value, *ends)))


def _interval(values: Sequence[float]) -> Interval:
    return mean_interval(torch.tensor(values, dtype=torch.float64))
