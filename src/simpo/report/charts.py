"""Charts by matplotlib: SVG for the page, whose colours are its style sheet's, and PNG to paste elsewhere.

An SVG has no title and no legend: the page says both in its own type. matplotlib is imported when a chart is drawn.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import escape

from simpo.evaluation.plain import Interval
from simpo.report.read import Curve

POINTS = 400
"""At most this many points of a line are drawn; each stretch of a longer one keeps its lowest and its highest."""

COLOURS = {  # of the style sheet -> in a PNG
    "ink": "#57606a",
    "grid": "#d8dee4",
    "warn": "#9a6700",
    "c1": "#1f6feb",
    "c2": "#bc4c00",
    "c3": "#1a7f37",
    "c4": "#8250df",
    "c5": "#bf3989",
    "c6": "#6e7781",
}
SERIES = [name for name in COLOURS if name.startswith("c")]
# What stands for a colour until the SVG is put into the page.
_STANDS_FOR = {name: f"#0{number:x}c0de" for number, name in enumerate(COLOURS)}


class Line(NamedTuple):
    """One series of a chart; `colour` is a name in COLOURS. Held-out values are `dots`; `raw` shows single steps."""

    label: str
    curve: Curve
    colour: str = "c1"
    dots: bool = False
    raw: bool = True


class Level(NamedTuple):
    """A horizontal line that says what a value means."""

    label: str
    value: float


@dataclass(frozen=True)
class Chart:
    """One chart over steps, or over rounds.

    Attributes:
        name: of its files, and unique in a page.
        unit: of the values; "%" = they are shares.
        share: what they are shares of.
        marks: steps to point out.
    """

    name: str
    title: str
    unit: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    marks: Sequence[int] = ()
    of: str = "step"
    share: str = "of pairs"
    intervals: Mapping[str, Sequence[Interval]] = field(default_factory=dict)

    @property
    def measure(self) -> str:
        """The unit in words."""
        return f"% {self.share}" if self.unit == "%" else self.unit

    @property
    def text(self) -> str:
        """What the chart shows, in words."""
        parts = [f"{line.label}: {_describe(line.curve, self)}" for line in self.lines]
        parts += [f"line at {level.label}" for level in self.levels]
        return f"{self.title}, {self.measure}. " + "; ".join(parts) + "."

    @property
    def gaps(self) -> str:
        """Steps whose values are no numbers, in words; "" without any."""
        bad = sorted({int(s) for line in self.lines for s in line.curve.steps[~np.isfinite(line.curve.values)]})
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        return f"not finite at {self.of} {', '.join(map(str, bad[:4]))}{more}" if bad else ""


def number(value: float, unit: str = "") -> str:
    """A value for people: shares in percent, four digits elsewhere."""
    if not math.isfinite(value):
        return "\u2013"
    if unit == "%":
        return f"{value:.1%}"
    text = f"{value:.3g}" if abs(value) < 1e-3 and value else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return re.sub(r"e([-+])0", r"e\1", text).replace("e+", "e").replace("-", "\u2212", 1 if value < 0 else 0)


def _describe(curve: Curve, chart: Chart) -> str:
    finite = np.isfinite(curve.values)
    if not finite.any():
        return "no finite value"
    steps, values = curve.steps[finite], curve.values[finite]
    if len(values) == 1:
        return f"{number(values[0], chart.unit)} at {chart.of} {steps[0]:.0f}"
    ends = [f"{number(values[i], chart.unit)} at {chart.of} {steps[i]:.0f}" for i in (0, -1)]
    lowest, highest = number(values.min(), chart.unit), number(values.max(), chart.unit)
    return f"from {ends[0]} to {ends[1]}, lowest {lowest}, highest {highest}"


# --- fewer points ----------------------------------------------------------------------------------------------------


def thin(curve: Curve, most: int = POINTS) -> Curve:
    """At most `most` points: of each stretch the lowest and the highest, in their order, and one that is no number."""
    if len(curve) <= most:
        return curve
    kept = [0, len(curve) - 1]
    for part in np.array_split(np.arange(len(curve)), most // 3):
        values = curve.values[part]
        finite = np.isfinite(values)
        if finite.any():
            kept += [part[np.where(finite, values, np.inf).argmin()], part[np.where(finite, values, -np.inf).argmax()]]
        if not finite.all():
            kept.append(part[finite.argmin()])
    places = np.unique(kept)
    return Curve(curve.steps[places], curve.values[places])


def smooth(curve: Curve) -> Curve | None:
    """The mean over a window of a twelfth of the run around each step; None where there are too few to smooth."""
    if len(curve) < 24:
        return None
    half = max(2, len(curve) // 24)
    finite = np.isfinite(curve.values)
    totals = np.cumsum(np.concatenate([[0.0], np.where(finite, curve.values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    places = np.arange(len(curve))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(curve))
    number_in = counts[high] - counts[low]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(number_in > 0, (totals[high] - totals[low]) / number_in, np.nan)
    return thin(Curve(curve.steps, means), 150)


# --- drawing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Text as it is, whatever signs are in it, and not a word about fonts that lack some of them."""
    from matplotlib import rc_context

    settings = {"svg.fonttype": "none", "svg.hashsalt": "simpo", "font.family": ["sans-serif"]}
    with rc_context({**settings, "text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@_plainly()
def to_svg(chart: Chart) -> str:
    """The chart as an <svg> element that fits its column and takes the page's colours."""
    figure, axes = _of_page()
    _draw(axes, chart, _STANDS_FOR)
    return _inline(figure, chart.name, chart.text)


_CELL = 500, 310  # units of one chart in a picture, with its title


@_plainly()
def to_png(name: str, charts: Sequence[Chart], folder: Path) -> None:
    """Charts as NAME.png, two in a row with their titles and legends, on white, and each cut out as a picture too."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    columns, rows, (width, height) = min(2, len(charts)), math.ceil(len(charts) / 2), _CELL
    figure = _figure(width * columns, height * rows)
    figure.set_facecolor("white")
    for place, chart in enumerate(charts):
        row, column = divmod(place, columns)
        left, bottom = (column * width + 56) / (width * columns), ((rows - 1 - row) * height + 40) / (height * rows)
        axes = figure.add_axes((left, bottom, (width - 80) / (width * columns), (height - 84) / (height * rows)))
        _draw(axes, chart, COLOURS)
        title = chart.title + (f" ({chart.measure})" if chart.unit else "")
        axes.set_title(title, loc="left", fontsize=13, color="#1f2328", pad=10)
        if len(chart.lines) > 1:
            axes.legend(fontsize=10, frameon=False, labelcolor="#1f2328")
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(144)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{name}.png")
    wide, high = picture.width // columns, picture.height // rows
    for place, chart in enumerate(charts):
        row, column = divmod(place, columns)
        part = picture.crop((column * wide, row * high, (column + 1) * wide, (row + 1) * high))
        part.save(folder / f"{chart.name}.png")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def _of_page(height: float = 210, *, left: float = 46, right: float = 12, bottom: float = 34) -> tuple[Any, Any]:
    """An SVG's figure and axes; its units are about a pixel each on a telephone."""
    width = 380
    figure = _figure(width, height)
    frame = left / width, bottom / height, (width - left - right) / width, (height - bottom - 8) / height
    return figure, figure.add_axes(frame)


def _draw(axes: Any, chart: Chart, colours: Mapping[str, str]) -> None:
    for step in chart.marks:
        axes.axvline(step, color=colours["warn"], linewidth=1.2, linestyle=(0, (2, 2)), zorder=1)
    for level in chart.levels:
        axes.axhline(level.value, color=colours["ink"], linewidth=1, linestyle=(0, (5, 3)), zorder=1)
    for line in chart.lines:
        colour = colours[line.colour]
        if line.dots:
            curve = thin(line.curve, 60)
            axes.plot(curve.steps, curve.values, color=colour, linewidth=1.4, zorder=4)
            axes.plot(curve.steps, curve.values, "o", color=colour, markersize=5, zorder=5, label=line.label)
        else:
            curve, mean = thin(line.curve), smooth(line.curve)
            faint = {"linewidth": 1, "alpha": 0.45} if mean is not None else {"linewidth": 2, "label": line.label}
            if len(curve) == 1:
                faint |= {"marker": "o", "markersize": 4}
            if line.raw or mean is None:
                axes.plot(curve.steps, curve.values, color=colour, zorder=2, **faint)
            if mean is not None:
                axes.plot(mean.steps, mean.values, color=colour, linewidth=2.2, zorder=3, label=line.label)
        _whiskers(axes, line, chart.intervals.get(line.label, ()), colour)
    _style(axes, chart, colours)


def _whiskers(axes: Any, line: Line, intervals: Sequence[Interval], colour: str) -> None:
    known = [(step, each) for step, each in zip(line.curve.steps, intervals) if not math.isnan(each.low)]
    if known:
        steps, each = zip(*known, strict=True)
        axes.vlines(steps, [i.low for i in each], [i.high for i in each], color=colour, linewidth=1.6, alpha=0.6)


def _style(axes: Any, chart: Chart, colours: Mapping[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter

    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours["ink"])
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colours["ink"], labelsize=11, length=0, pad=5)
    axes.tick_params(axis="x", length=3)
    axes.set_xlabel(chart.of, fontsize=11, color=colours["ink"], loc="right", labelpad=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 10_000 else f"{x:g}"))
    steps = np.concatenate([line.curve.steps for line in chart.lines])
    if len(np.unique(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    values = np.concatenate([line.curve.values for line in chart.lines])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 30 * np.median(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)
    elif chart.unit == "%" and len(values) and values.max() - values.min() > 0.3:
        axes.yaxis.set_major_locator(MultipleLocator(0.25))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        if len(values) and values.min() >= 0 and values.min() <= 0.4 * values.max():
            axes.set_ylim(bottom=0)
    tick = (lambda y: f"{100 * y:.3g}%") if chart.unit == "%" else (lambda y: number(0.0 if abs(y) < 1e-12 else y))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: tick(y)))


@_plainly()
def to_bars(name: str, title: str, edges: Sequence[int], counts: Mapping[str, Sequence[int]]) -> str:
    """Counts side by side in bins, as an <svg> element; bins [edges[i], edges[i + 1])."""
    figure, axes = _of_page()
    width, places = 0.8 / len(counts), np.arange(len(edges) - 1)
    for place, (colour, values) in enumerate(zip(SERIES, counts.values())):
        axes.bar(places - 0.4 + width * (place + 0.5), values, width * 0.92, color=_STANDS_FOR[colour])
    nothing = Line("", Curve(places, np.array([float(max(map(max, counts.values())))])))
    _style(axes, Chart(name, title, "pairs", [nothing], of="tokens"), _STANDS_FOR)
    axes.set_xticks([place - 0.5 for place in range(len(edges))], [f"{edge:,}" for edge in edges])
    axes.set_ylim(bottom=0)
    bins = [f"{low} to {high - 1} tokens" for low, high in itertools.pairwise(edges)]
    told = (", ".join(f"{count} pairs of {each}" for each, count in zip(bins, values)) for values in counts.values())
    text = "; ".join(f"{side}: {words}" for side, words in zip(counts, told))
    return _inline(figure, name, f"{title}. {text}.")


@_plainly()
def to_whiskers(name: str, title: str, groups: Sequence[tuple[str, Sequence[Interval | None]]]) -> str:
    """Shares with their intervals, a row for each group and a colour for each moment, as an <svg> element."""
    height = 46 + (14 + 10 * max(len(moments) for _, moments in groups)) * len(groups)
    figure, axes = _of_page(height, left=150, right=16, bottom=30)
    told = []
    for row, (label, moments) in enumerate(groups):
        for place, each in enumerate(moments):
            if each is None or math.isnan(each.value):
                continue
            y = row + 0.5 * ((place + 0.5) / len(moments) - 0.5)
            colour = _STANDS_FOR[SERIES[place % len(SERIES)]]
            if not math.isnan(each.low):
                axes.hlines(y, each.low, each.high, color=colour, linewidth=2.2, alpha=0.55)
            axes.plot([each.value], [y], "o" if place else "D", color=colour, markersize=6 if place else 5, zorder=3)
            told.append(f"{label} {number(each.value, '%')}")
    axes.axvline(0.5, color=_STANDS_FOR["ink"], linewidth=1, linestyle=(0, (5, 3)), zorder=0)
    nothing = Line("", Curve(np.zeros(1), np.zeros(1)))
    _style(axes, Chart(name, title, "%", [nothing], of=""), _STANDS_FOR)
    axes.grid(visible=False)
    axes.grid(axis="x", color=_STANDS_FOR["grid"], linewidth=0.8)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_yticks(range(len(groups)), [_cut(label, 22) for label, _ in groups])
    return _inline(figure, name, f"{title}. {'; '.join(told)}.")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - most // 2 + 1 :]}"


def _inline(figure: Any, name: str, label: str) -> str:
    """The figure as an element of the page: its colours by name, its ids its own, nothing that a reader cannot see."""
    page = io.StringIO()
    figure.savefig(page, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = page.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = text.replace("xlink:href", "href")
    for colour, stand_in in _STANDS_FOR.items():
        text = text.replace(stand_in, f"var(--{colour})")
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0]), text)  # and no label
    text = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", text)
    box = re.search(r'viewBox="[^"]+"', text)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}" focusable="false">'
    return re.sub(r"\s*\n\s*", "\n", head + text[text.index(">") + 1 :])
