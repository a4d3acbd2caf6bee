"""Reading the logs of a run directory, one JSON object a line. Must not import torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def read_log(path: Path, broken: Callable[[int], Any] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a log, each with its "step"; none where there is no file.

    A last line without its line break is one that is being written, or that a kill cut short: it is passed over.

    Args:
        broken: is given the number, from 1, of each other line that is no such object; None = raise.
    Raises:
        ValueError: names the file and the line.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row
            elif line.strip() and line.endswith("\n"):
                if broken is None:
                    raise ValueError(f"{path}: line {number} is no JSON object with a step")
                broken(number)


def read_card(run: Path) -> dict[str, str]:
    """What the card says that a run left with its final model, by name; empty without one."""
    card = run / "model" / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return dict(re.findall(r"^- ([a-z -]+): (.*)$", text, re.MULTILINE))


def steps_of_model(run: Path) -> tuple[int, int] | None:
    """The optimizer step whose weights a run's final model has, and of how many; None where its card does not say."""
    found = re.fullmatch(r"(\d+) of (\d+)", read_card(run).get("optimizer step of these weights", ""))
    return found and (int(found[1]), int(found[2]))
