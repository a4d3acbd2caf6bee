"""The folder of `simpo rounds`: its models' measures, the runs of its rounds, and answers of the first and the last."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from simpo.report.charts import SERIES, Chart, Line, number
from simpo.report.held_out import as_interval
from simpo.report.page import Answer, Page, Table, answers_side_by_side
from simpo.report.read import Curve, is_run, read_run
from simpo.report.several import page_of_runs

_SHARES = ("accuracy", "repetition", "finished")
_UNITS = {"tokens": "per answer", "margin": "nats per token"}


def is_rounds(folder: Path) -> bool:
    """Whether `simpo rounds` worked in the folder."""
    return (folder / "rounds.json").is_file() or any(folder.glob("round-*/provenance.json"))


def runs_of_rounds(folder: Path) -> list[Path]:
    """The runs of its rounds, in order."""
    places = [each for each in folder.glob("round-*") if re.fullmatch(r"round-\d+", each.name)]
    return [each / "run" for each in sorted(places, key=lambda each: int(each.name[6:])) if is_run(each / "run")]


def page_of_rounds(folder: Path, home: Path) -> Page:
    """What the rounds came to, above what the runs of theirs are compared."""
    page = page_of_runs([read_run(run) for run in runs_of_rounds(folder)], home, title=folder.resolve().name)
    path = folder / "rounds.json"
    models = json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else []
    page.kind = f"rounds: {max(len(models) - 1, len(page.runs))}"
    page.commands = [("make this page again", f"simpo report {shlex.quote(str(folder))}")]
    if models:
        names = [name for name in models[0] if name not in ("round", "model", "gain", "prompts")]
        page.rounds_table = _table(models, names)
        page.rounds_charts = [_chart(models, name) for name in names]
        page.pictures = {"rounds": page.rounds_charts[:6], **page.pictures}
        best = max(models, key=lambda model: model["score"]["value"])["round"]
        page.facts.insert(0, ("highest held-out score", f"round {best}: {number(models[best]['score']['value'])}"))
        page.answers = answers_side_by_side(list(_answers(folder, 0, best)))
    return page


def _table(models: list[dict[str, Any]], names: list[str]) -> Table:
    rows = []
    for name in ("gain", *names):
        unit = "%" if name in _SHARES else ""
        rows.append((name, [(as_interval(model.get(name)), unit) for model in models]))
    return Table(["", *(f"round {model['round']}" for model in models)], rows)


def _chart(models: list[dict[str, Any]], name: str) -> Chart:
    found = [(model["round"], interval) for model in models if (interval := as_interval(model.get(name)))]
    rounds, intervals = zip(*found, strict=True)
    curve = Curve(np.array(rounds), np.array([each.value for each in intervals]))
    title = name.capitalize().replace("Score: ", "Score by ")
    unit = "%" if name in _SHARES else _UNITS.get(name, "")
    share = {"accuracy": "of pairs", "repetition": "of 4-word runs"}.get(name, "of answers")
    key = re.sub(r"\W+", "-", name)
    return Chart(f"rounds-{key}", title, unit, [Line(name, curve, SERIES[0], dots=True)], of="round", share=share,
                 intervals={name: intervals})  # fmt: skip


def _answers(folder: Path, first: int, last: int) -> Iterator[Answer]:
    """The first answer to each held-out prompt, before and after."""
    texts = [_responses(folder / f"round-{number_}" / "evaluation") for number_ in (first, last)]
    for key, (prompt, before) in texts[0].items():
        if key in texts[1]:
            labels = ("before any round", f"after round {last}")
            yield Answer(prompt, prompt, [(labels[0], before), (labels[1], texts[1][key][1])])


def _responses(place: Path) -> dict[str, tuple[str, str]]:
    path = next((each for each in (place / "scored.jsonl", place / "responses.jsonl") if each.is_file()), None)
    found: dict[str, tuple[str, str]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path else ():
        try:
            row = json.loads(line)
            turns = row["prompt"]
            prompt = turns if isinstance(turns, str) else turns[-1]["content"]
            found[row["id"]] = (str(prompt), str(row["responses"][0]["text"]))
        except (ValueError, LookupError, TypeError):
            continue  # a torn line
    return found
