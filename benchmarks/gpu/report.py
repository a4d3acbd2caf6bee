"""A command's results: one JSON file, written again after every row, and a plain table on the terminal.

The file also holds its tables as they are shown, so that whoever puts several together needs neither torch nor this.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peers.machine import describe_machine, git_commit, package_versions, peak_tflops

from gpu.device import Meter
from gpu.parts import show_conditions, write_whole

FORMAT = 1

Column = tuple[str, Callable[[dict[str, Any]], str]]
"""A column's title, and its cell from a row."""


class Report:
    """Results so far; the file on disk is never older than the last row.

    Args:
        name: of the file, without .json.
        folder: where it goes; made when it is not there.
        columns: of the table of rows.
        shown: which rows the table shows; the file has all of them.
        command: as typed.
        conditions: what every number depends on.
        say: prints a line.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        columns: Sequence[Column] = (),
        shown: Callable[[dict[str, Any]], bool] = lambda row: True,
        command: str,
        meter: Meter,
        conditions: dict[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        self.path = folder / f"{name}.json"
        self.say = say
        self._columns, self._shown = columns, shown
        machine = describe_machine() | meter.describe()
        self.results: dict[str, Any] = {
            "format": FORMAT,
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "complete": False,
            "versions": package_versions() | {"commit": git_commit()},
            "machine": machine,
            "conditions": {"memory": meter.memory, **conditions},
            "notes": [],
            "tables": [{"title": "", "head": [title for title, _ in columns], "cells": []}],
            "rows": [],
        }
        if machine["gpu"]:
            self.results["conditions"]["peak_tflops"] = peak_tflops(machine["gpu"])
        folder.mkdir(parents=True, exist_ok=True)
        self.save()

    @property
    def conditions(self) -> dict[str, Any]:
        return self.results["conditions"]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a row, on disk too."""
        self.results["rows"].append(row)
        self.save()
        return row

    def note(self, text: str) -> None:
        """Say and keep a remark: what was skipped, failed or cut short."""
        self.results["notes"].append(text)
        self.say(text)
        self.save()

    def add_table(self, title: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        """One more table below that of the rows."""
        self.results["tables"].append({"title": title, "head": list(head), "cells": [list(row) for row in cells]})
        self.save()

    def save(self) -> None:
        """Write the file; whoever reads it meanwhile, or after the machine is gone, sees the old or the new one."""
        rows = filter(self._shown, self.results["rows"])
        self.results["tables"][0]["cells"] = [[cell(row) for _, cell in self._columns] for row in rows]
        write_whole(self.path, json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")

    def finish(self, *, complete: bool) -> None:
        """The tables, the conditions and the notes again, and where the file is."""
        self.results["complete"] = complete
        self.save()
        for table in self.results["tables"]:
            if table["cells"]:
                self.say("")
                for line in [table["title"]] * bool(table["title"]) + table_lines(table["head"], table["cells"]):
                    self.say(line)
        self.say("")
        for line in self.describe():
            self.say(line)
        if not complete:
            self.say("NOT COMPLETE: the time was over; what is missing is named above")
        self.say(f"written: {self.path}")

    def describe(self) -> list[str]:
        """Machine, versions and conditions, in a few lines."""
        machine, versions = self.results["machine"], self.results["versions"]
        place = machine["cpu"]
        if machine["gpu"]:
            place = (
                f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, driver {machine['driver']}, CUDA {machine['cuda']}"
            )
        shown = ("simpo", "commit", "python", "torch", "transformers", "triton")
        return [
            place + "; " + ", ".join(f"{name} {versions[name]}" for name in shown if versions.get(name)),
            show_conditions(self.conditions),
            *self.results["notes"],
            self.results["command"],
        ]


def table_lines(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A table of plain text: the first column to the left, the others to the right."""
    lines = [list(head), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(_pad(text, width, i) for i, (text, width) in enumerate(zip(row, widths))) for row in lines]
    shown = [line.rstrip() for line in shown]
    return [shown[0], "-" * max(map(len, shown)), *shown[1:]]


def _pad(text: str, width: int, index: int) -> str:
    return text.ljust(width) if index == 0 else text.rjust(width)


def shown_command(arguments: Sequence[str]) -> str:
    """The command without where its results go, and with files by their names alone: it says what was measured."""
    words: list[str] = []
    for word in itertools.chain.from_iterable(word.split("=", 1) for word in arguments):
        if words and words[-1] in ("--output", "--name"):
            words.pop()
        else:
            words.append(os.path.basename(word) if os.path.isabs(word) else word)
    return " ".join(["python benchmarks/gpu.py", *map(shlex.quote, words)])


def digits(value: float | None) -> str:
    """Three significant digits; empty for None."""
    return "" if value is None else f"{value:#.3g}".rstrip(".")


def gib(value: float | None) -> str:
    """Bytes as GiB with two decimals; empty for None."""
    return "" if value is None else f"{value / 2**30:.2f}"
