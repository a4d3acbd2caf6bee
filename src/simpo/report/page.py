"""A report's content, and its HTML by the template."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup, escape

from simpo.evaluation.plain import Interval, repeated_share
from simpo.report.charts import Chart, number, to_svg
from simpo.report.differences import mark_differences

Cell = tuple[Interval | None, str] | str
"""A value with its unit, or text."""


class Table(NamedTuple):
    """Heads of its columns, and rows of a label and cells."""

    heads: list[str]
    rows: list[tuple[str, list[Any]]]


class Card(NamedTuple):
    """A number to see first; `kind` is "", good or bad."""

    label: str
    value: str
    note: str
    kind: str = ""


class Answer(NamedTuple):
    """Answers to one prompt, each with what gave it."""

    title: str
    prompt: str
    texts: list[tuple[str, str]]


@dataclass
class Page:
    """The content of a report; an empty part is left out."""

    title: str
    kind: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    rounds_table: Table | None = None
    rounds_charts: list[Chart] = field(default_factory=list)
    guard: list[dict[str, Any]] | None = None
    charts: list[Chart] = field(default_factory=list)
    chart_note: str = ""
    values: Table | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    eval_advice: str = ""
    answers: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, Any] | None = None
    far: list[str] = field(default_factory=list)
    settings: Table | None = None
    recipe_text: str = ""
    commands: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, list[Chart]] = field(default_factory=dict)


# --- values in words ---


def measure(value: float, unit: str = "") -> str:
    """A measure of a table: below 100 with three decimals, so that columns line up.

    Args:
        unit: "%" = a share; "points" or "change" = what two shares, or two other values, differ by.
    """
    if unit in ("points", "change") and math.isfinite(value):
        return (f"{100 * value:+.1f}" if unit == "points" else f"{value:+.3f}").replace("-", "\u2212")
    if unit == "%" or not math.isfinite(value) or abs(value) >= 100:
        return number(value, unit)
    return f"{value:.3f}".replace("-", "\u2212")


def span(interval: Interval | None, unit: str) -> str:
    if interval is None or math.isnan(interval.low):
        return ""
    return f"{measure(interval.low, unit)} to {measure(interval.high, unit)}"


# --- answers ---


def last_turn(prompt: str) -> str:
    """The last thing asked in a rendered prompt, as well as that can be told without its template."""
    parts = [
        part.strip()
        for part in re.split(r"<[|\uff5c][^<>]*[|\uff5c]>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>", prompt)
    ]
    roles = r"(?:user|assistant|system|model|human|gpt)\s*:?"
    parts = [re.sub(rf"^{roles}\s*\n", "", part).strip() for part in parts if not re.fullmatch(roles, part)]
    parts = [part for part in parts if part]
    return parts[-1] if parts else ""


def answers_side_by_side(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The first 100 answers with their differences marked where there are two."""
    shown = []
    for answer in answers[:100]:
        texts: list[Any] = [text for _, text in answer.texts]
        word = ""
        if len(texts) == 2:
            *texts, word = mark_differences(*texts)
        sides = [
            {"label": label, "text": text, "about": _about(plain)}
            for (label, plain), text in zip(answer.texts, texts, strict=True)
        ]
        title = " ".join(answer.title.split())
        prompt = "" if answer.prompt.strip() == answer.title.strip() and len(title) <= 160 else answer.prompt
        shown.append({"title": title[:160] + "…" * (len(title) > 160), "prompt": prompt, "word": word, "sides": sides})
    return shown


def _about(text: str) -> str:
    words = f"{len(text):,} characters"
    repeated = repeated_share(text.split())
    return words + (f", {repeated:.0%} repeated" if repeated >= 0.01 else "")


# --- HTML ------------------------------------------------------------------------------------------------------------


def render(page: Page, *, reload_s: int | None, pictures: str) -> str:
    """The page as HTML that asks for nothing else.

    Args:
        reload_s: loads itself again after so many seconds; None = does not.
        pictures: the folder beside the page that has its charts as PNG.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("simpo", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": to_svg, "value": _value, "span": _span, "breakable": _breakable}
    return environment.get_template("page.html").render(
        page=page,
        reload_s=reload_s,
        pictures=quote(pictures),
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=version("simpo"),
    )


def _value(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    interval, unit = cell
    return "\u2013" if interval is None else measure(interval.value, unit)


def _span(cell: Cell) -> str:
    return "" if isinstance(cell, str) else span(*cell)


def _breakable(text: str) -> Markup:
    """A line may break after the low lines of a key."""
    return Markup("_<wbr>").join(escape(part) for part in text.split("_"))
