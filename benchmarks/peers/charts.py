"""The charts of a benchmark: bars by case and side, drawn from the results' values; needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.report import TITLES, describe_conditions

COLOURS = {"simpo": "#0072B2", "trl": "#E69F00", "liger": "#009E73", "padded": "#999999"}
"""From Okabe and Ito's palette, which colour-blind readers can tell apart."""
BAR = 0.8
"""Width that the bars of one case share."""


def save_charts(results: dict[str, Any], path: Path) -> list[Path]:
    """One PNG with a panel a quantity that was measured; returns [path], or [] when there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [case for case in results["cases"] if not case["skipped"]]
    if not cases:
        return []
    names = list(cases[0]["sides"])
    peers = [name for name in names if name != "simpo"]
    panels = [
        ("step time, times simpo's: median, and smallest to largest of all steps", _time_ratio, peers, "{:.2f}"),
        ("peak memory of the process, GiB", _peak, names, "{:.1f}"),
        ("executed operations, times the floor", _over_floor, names, "{:.2f}"),
    ]
    if results["machine"].get("gpu"):
        panels[1] = ("peak memory allocated on the GPU, GiB", *panels[1][1:])
    panels = [panel for panel in panels if any(panel[1](case, name) for case in cases for name in panel[2])]
    bars = len(cases) * len(names)
    width = min(24.0, max(8.0, 0.55 * bars + 2.0))
    caption = [line for text in describe_conditions(results) for line in textwrap.wrap(text, int(width * 16))]
    below = 0.2 + 0.15 * len(caption)
    height = 2.7 * len(panels) + 0.7 + below
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, value, sides, form) in zip(axes, panels, strict=True):
        _draw_panel(axis, cases, sides, value, title, form)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", ncols=len(labels), frameon=False, fontsize=9)
    figure.text(0.01, 0.08 / height, "\n".join(caption), fontsize=7.5, va="bottom", color="#444444", linespacing=1.4)
    figure.tight_layout(rect=(0, below / height, 1, 1 - 0.35 / height))
    figure.savefig(path)
    return [path]


Value = Callable[[dict[str, Any], str], tuple[float, float, float] | None]
"""(value, smallest, largest) of a case's side, or None where there is none."""


def _draw_panel(axis: Any, cases: list[dict[str, Any]], sides: list[str], value: Value, title: str, form: str) -> None:
    width = BAR / len(sides)
    top = max(found[2] for case in cases for side in sides if (found := value(case, side)) is not None)
    for place, side in enumerate(sides):
        at = [index + (place - (len(sides) - 1) / 2) * width for index in range(len(cases))]
        found = [value(case, side) for case in cases]
        drawn = [(x, *numbers) for x, numbers in zip(at, found, strict=True) if numbers is not None]
        axis.bar([d[0] for d in drawn], [d[1] for d in drawn], width * 0.92, color=COLOURS[side], label=TITLES[side])
        for x, middle, low, high in drawn:
            if high > low:
                axis.plot([x, x], [low, high], color="#222222", linewidth=1)
            axis.text(x, high + 0.015 * top, form.format(middle), ha="center", va="bottom", fontsize=7.5)
        for x, case, numbers in zip(at, cases, found, strict=True):
            if numbers is None:
                axis.text(x, 0.02 * top, case["sides"][side]["status"], ha="center", rotation=90, fontsize=7)
    axis.axhline(1.0, color="#222222", linewidth=0.6, linestyle=":") if "times" in title else None
    axis.set_xticks(range(len(cases)), [_label(case) for case in cases], fontsize=8)
    axis.set_xlim(-0.6, len(cases) - 0.4)
    axis.set_ylim(0, top * 1.15)
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", labelsize=8)


def _label(case: dict[str, Any]) -> str:
    lengths = case["lengths"]
    means = f"{lengths['prompt']:.0f} + {lengths['chosen']:.0f} / {lengths['rejected']:.0f}"
    return f"{case['name']}\n{means}" if case["kind"] != "fixed" else case["name"]


def _time_ratio(case: dict[str, Any], side: str) -> tuple[float, float, float] | None:
    ratio = case["sides"][side].get("beside_simpo", {}).get("step_time_ratio")
    return None if ratio is None else (ratio["median"], ratio["min"], ratio["max"])


def _peak(case: dict[str, Any], side: str) -> tuple[float, float, float] | None:
    peak = case["sides"][side]["summary"].get("peak_gib")
    return None if peak is None else (peak, peak, peak)


def _over_floor(case: dict[str, Any], side: str) -> tuple[float, float, float] | None:
    ratio = case["sides"][side]["summary"].get("executed_over_floor")
    return None if ratio is None else (ratio, ratio, ratio)
