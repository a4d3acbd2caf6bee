"""The report of several runs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from simpo.evaluation.plain import Interval
from simpo.report.charts import SERIES, Chart, Line, to_whiskers
from simpo.report.held_out import between, final_line, of_command, of_run
from simpo.report.one_run import OF_THE_PLACE, SPECS, Spec, describe_status, say
from simpo.report.page import Answer, Page, Table, answers_side_by_side, last_turn
from simpo.report.read import Run


def page_of_runs(runs: Sequence[Run], home: Path, *, title: str) -> Page:
    """Runs compared: curves in one chart, evaluations side by side, and the keys in which they differ."""
    names = _tell_apart(runs)
    page = Page(
        title=title,
        kind=f"{len(runs)} runs compared",
        charts=[chart for spec in SPECS for chart in _charts_of(runs, names, spec)],
        chart_note="Lines: training, the mean over a twelfth of a run. Dots: held-out pairs.",
        answers=answers_side_by_side(_common_answers(runs, names)),
        settings=_different_settings(runs, names),
        notes=[f"{name}: {note}" for run, name in zip(runs, names) for note in run.notes],
    )
    for place, (run, name) in enumerate(zip(runs, names)):
        report = run.folder / "report.html"
        link = quote(Path(os.path.relpath(report, home)).as_posix()) if report.is_file() else ""
        page.runs.append(
            {"name": name, "status": describe_status(run), "link": link, "colour": SERIES[place % len(SERIES)]}
        )
    table = _side_by_side(runs, names)
    if table is not None:
        page.evaluations = [table]
    folders = " ".join(shlex.quote(str(run.folder)) for run in runs)
    page.commands = [("make this page again", f"simpo report {folders}")]
    mains = [chart for chart in page.charts if chart.name.split("_")[0] in {spec.name for spec in SPECS if spec.main}]
    if mains:
        page.pictures = {"curves": mains}
    return page


def _tell_apart(runs: Sequence[Run]) -> list[str]:
    """Short names that differ: run_name or the folder's, else the folders below what all share."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    paths = [Path(os.path.abspath(run.folder)) for run in runs]
    return [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]


def _charts_of(runs: Sequence[Run], names: Sequence[str], spec: Spec) -> list[Chart]:
    charts = []
    for metric, label in spec.metrics.items():
        lines = []
        for place, (run, name) in enumerate(zip(runs, names)):
            colour = SERIES[place % len(SERIES)]
            if len(run.curve(metric)):
                lines.append(Line(name, run.curve(metric), colour, raw=False))
            if len(run.curve(f"eval_{metric}")):
                lines.append(Line(f"{name}, held out", run.curve(f"eval_{metric}"), colour, dots=True))
        if lines:
            several = len(spec.metrics) > 1
            key = f"{spec.name}_{label}" if several else spec.name
            charts.append(Chart(key, spec.title + f", {label}" * several, spec.unit, lines))
    return charts


def _side_by_side(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any] | None:
    """The final evaluation of each run, and where pairs are the same the difference to the first run's."""
    commands = ([of_command(content) for content in run.compared.values()] for run in runs)
    each = ((of_run(run) or (last[-1] if last else None), run) for run, last in zip(runs, commands))
    found = [(name, held_out, final_line(run)) for (held_out, run), name in zip(each, names)]
    found = [(name, held_out, line) for name, held_out, line in found if held_out]
    if not found:
        return None

    def table(part: str, unit: str) -> Table:
        labels = list(dict.fromkeys(row.label for _, held_out, _ in found for row in getattr(held_out, part)))
        rows = []
        for label in labels:
            each = [next((r for r in getattr(h, part) if r.label == label), None) for _, h, _ in found]
            rows.append((label, [(row.after if row else None, unit) for row in each]))
            first = found[0][2]
            if label == labels[0] and first and len(found) > 1:
                differences: list[Any] = [""]
                for _, _, line in found[1:]:
                    same = line is not None and line["row_ids"] == first["row_ids"]
                    change = getattr(between(first, line, before="a", after="b"), part)[0].change if same else None
                    differences.append((change, "points" if unit == "%" else "change"))
                if any(each and each[0] is not None for each in differences):
                    rows.append((f"  minus {found[0][0]}", differences))
        return Table(["", *(name for name, _, _ in found)], rows)

    groups: dict[str, list[Interval | None]] = {}
    for place, (_, held_out, _) in enumerate(found):
        for row in held_out.accuracy:
            groups.setdefault(row.label, [None] * len(found))[place] = row.after
    return {
        "title": "Held-out pairs, at the end of each run",
        "accuracy": table("accuracy", "%"),
        "margin": table("margin", ""),
        "sides": table("sides", ""),
        "moments": [(name, SERIES[place % len(SERIES)]) for place, (name, _, _) in enumerate(found)],
        "svg": to_whiskers("whiskers-runs", "Held-out accuracy and 95% intervals", list(groups.items())),
    }


def _common_answers(runs: Sequence[Run], names: Sequence[str]) -> list[Answer]:
    found = []
    for row_id, prompt in (runs[0].prompts if runs else {}).items():
        texts = [
            (name, run.generations[row_id][max(run.generations[row_id])])
            for run, name in zip(runs, names)
            if run.prompts.get(row_id) == prompt
        ]
        if len(texts) > 1:
            found.append(Answer(last_turn(prompt) or row_id, prompt, texts))
    return found


def _different_settings(runs: Sequence[Run], names: Sequence[str]) -> Table | None:
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.settings) if key not in OF_THE_PLACE]
    rows = []
    for key in keys:
        values = [run.settings.get(key) for run in runs]
        if any(value != values[0] for value in values):
            rows.append((key, [say(value) for value in values]))
    return Table(["key", *names], rows) if len(runs) > 1 else None
