"""Owns the ledger: every input row kept, cut or dropped, and why; lengths; examples of what is trained.

Plain numbers and texts, saved as JSON and printed with rich. Knows nothing of tokenizers, files of rows or recipes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, computed_field
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from simpo.data.files import write_whole
from simpo.data.rows import source_of
from simpo.display import say, visible

PERCENTILES = (5, 25, 50, 75, 95, 99)
EXAMPLES_PER_REASON = 5
MARKS = ("⟦", "⟧")
"""Around trained text in a printed example, so that it shows without colour."""

_CUTS = {"prompt_left": "prompt, from the left", "chosen_right": "chosen, end", "rejected_right": "rejected, end"}


class Dropped(NamedTuple):
    """One row that is not trained on, or of which there is something to say, and why."""

    row_id: str
    reason: str
    detail: str


def count_rows(entries: dict[str, dict[str, Any]], rows: Iterable[Dropped]) -> None:
    """Add rows to reason -> their count and the first few as examples."""
    for row in rows:
        entry = entries.setdefault(row.reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES_PER_REASON:
            entry["examples"].append({"row_id": row.row_id, "detail": row.detail})


class SplitLedger(BaseModel):
    """The account of one split.

    `input` == `kept` + all `dropped` counts, always. `dropped` maps a reason to its count and some example rows, and
    `noticed` what was done to rows that are kept; `cut` maps a place to the pairs cut there and the tokens removed.
    `duplicates` counts rows equal to an earlier one in prompt, chosen and rejected, dropped or not; `same_prompt`
    counts kept rows whose prompt an earlier one has. `sources` maps each source to its rows `kept`, and those `dropped`
    by reason.
    `lengths` are in tokens: prompt, and trained tokens of chosen and rejected. `shared_prefix_share` is the share of
    all tokens (both sides) that lie in the common prefix of their pair.
    """

    input: int = 0
    kept: int = 0
    dropped: dict[str, dict[str, Any]] = {}
    cut: dict[str, dict[str, int]] = {}
    noticed: dict[str, dict[str, Any]] = {}
    sources: dict[str, dict[str, Any]] = {}
    duplicates: int = 0
    same_prompt: int = 0
    seam_shifted: int = 0
    shared_prefix_share: float = 0.0
    tokens: int = 0
    lengths: dict[str, dict[str, Any]] = {}
    examples: list[dict[str, str]] = []

    @property
    def num_dropped(self) -> int:
        """Rows dropped for any reason."""
        return sum(entry["count"] for entry in self.dropped.values())

    @computed_field
    @property
    def seam_shifted_share(self) -> float:
        """Share of kept pairs that tokenising prompt and response apart would have changed."""
        return self.seam_shifted / self.kept if self.kept else 0.0

    def add_dropped(self, rows: Iterable[Dropped]) -> None:
        """Count rows as dropped, keeping the first few of each reason as examples."""
        for row in rows:
            count_rows(self.dropped, [row])
            dropped = self._of(source_of(row.row_id))["dropped"]
            dropped[row.reason] = dropped.get(row.reason, 0) + 1

    def add_kept(self, row_ids: Iterable[str]) -> None:
        """Count rows as kept."""
        for source, count in Counter(map(source_of, row_ids)).items():
            self._of(source)["kept"] += count

    def _of(self, source: str) -> dict[str, Any]:
        return self.sources.setdefault(source, {"kept": 0, "dropped": {}})

    def add_noticed(self, rows: Iterable[Dropped]) -> None:
        """Count what was done to kept rows in the same way."""
        count_rows(self.noticed, rows)

    @property
    def notices(self) -> list[str]:
        """What was done to kept rows, as lines with an example."""
        return [
            f"{entry['count']} rows: {what} ({entry['examples'][0]['row_id']}: {entry['examples'][0]['detail']})"
            for what, entry in self.noticed.items()
        ]

    def check(self) -> None:
        """Raise if a row is unaccounted for: a bug here, never the user's fault."""
        if self.input != self.kept + self.num_dropped:
            raise AssertionError(f"ledger: {self.input} rows in, {self.kept} kept, {self.num_dropped} dropped")

    def top_reasons(self, count: int | None = 3) -> str:
        """The most frequent reasons with example rows, as lines."""
        lines = []
        for reason, entry in sorted(self.dropped.items(), key=lambda item: -item[1]["count"])[:count]:
            lines.append(f"  {entry['count']} {reason}")
            lines += [f"    {example['row_id']}: {example['detail']}" for example in entry["examples"][:2]]
        return "\n".join(lines)


class Ledger(BaseModel):
    """The accounts of all splits of one preparation. `eval_prompts_in_train` counts eval pairs whose prompt is also
    trained on; `advice` is what a careful person would want to know, with the key that deals with it."""

    splits: dict[str, SplitLedger] = {}
    eval_prompts_in_train: int = 0
    advice: list[str] = []
    notes: list[str] = []
    fingerprint: str = ""

    @property
    def notices(self) -> list[str]:
        """What was done to kept rows of any split, as lines."""
        return [f"{name}: {line}" for name, split in self.splits.items() for line in split.notices]

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_whole(path, self.model_dump_json(indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Read what `save` wrote. Raises ValueError for anything else."""
        return cls.model_validate_json(Path(path).read_bytes())

    def render(self, console: Console, *, examples: int = 2) -> None:
        """Print the account, length histograms and a few examples with the trained text marked."""
        console.print(self._table())
        names = dict.fromkeys(source for split in self.splits.values() for source in split.sources)
        if len(names) > 1:
            console.print(self._table_of(names))
        for name, split in self.splits.items():
            if split.lengths:
                console.print(_histogram_table(name, split.lengths, width=min(20, max(0, console.width - 63))))
        lines = [*self.notes, *self.notices]
        lines += [
            f"dropped from {name}:\n{each.top_reasons(None)}" for name, each in self.splits.items() if each.dropped
        ]
        if self.advice:
            lines += ["worth knowing:", *(f"  {line}" for line in self.advice)]
        for line in lines:
            say(line, console)
        for example in self.splits["train"].examples[:examples]:
            _print_example(console, example)

    def _empty_table(self, title: str) -> Table:
        return Table("", *(Column(name, justify="right") for name in self.splits), title=title)

    def _table(self) -> Table:
        table, splits = self._empty_table("pairs"), self.splits.values()
        table.add_row("rows in", *(f"{split.input}" for split in splits))
        table.add_row("kept", *(f"{split.kept}" for split in splits))
        for reason in dict.fromkeys(reason for split in splits for reason in split.dropped):
            counts = (split.dropped[reason]["count"] if reason in split.dropped else 0 for split in splits)
            table.add_row(f"dropped: {reason}", *map(str, counts))
        for place, words in _CUTS.items():
            cuts = [split.cut[place] for split in splits]
            if any(cut["pairs"] for cut in cuts):
                cells = (f"{cut['pairs']} ({cut['tokens']} tokens)" if cut["pairs"] else "0" for cut in cuts)
                table.add_row(f"cut: {words}", *cells)
        table.add_row("duplicates", *(f"{split.duplicates}" for split in splits))
        table.add_row("prompt seen before", *(f"{split.same_prompt}" for split in splits))
        table.add_row("seam shifted", *(f"{split.seam_shifted_share:.1%}" for split in splits))
        table.add_row("tokens in a common prefix", *(f"{split.shared_prefix_share:.1%}" for split in splits))
        return table

    def _table_of(self, sources: Iterable[str]) -> Table:
        """What each source gives: its pairs, their share of the split, and the share of its rows that is dropped."""
        table = self._empty_table("pairs by source")
        for source in sources:
            cells = []
            for split in self.splits.values():
                found = split.sources.get(source, {"kept": 0, "dropped": {}})
                kept, dropped = found["kept"], sum(found["dropped"].values())
                share = f" ({kept / split.kept:.1%})" if kept else ""
                cells.append(f"{kept}{share}" + (f", {dropped / (kept + dropped):.1%} dropped" if dropped else ""))
            table.add_row(Text(source), *cells)
        return table


def describe_lengths(lengths: np.ndarray) -> dict[str, Any]:
    """Mean, percentiles and a histogram over powers of two of token counts. `lengths` [pairs], ints."""
    if not len(lengths):
        return {}
    percentiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    edges = [0, 16]
    while edges[-1] <= lengths.max():
        edges.append(edges[-1] * 2)
    counts, _ = np.histogram(lengths, bins=edges)
    return {
        "mean": round(float(lengths.mean()), 2),
        "min": int(lengths.min()),
        **{f"p{p}": int(value) for p, value in zip(PERCENTILES, percentiles)},
        "max": int(lengths.max()),
        "histogram": {"edges": edges, "counts": counts.tolist()},
    }


def _histogram_table(split: str, lengths: Mapping[str, Mapping[str, Any]], *, width: int) -> Table:
    numbers = (Column(name, justify="right") for name in ("mean", "p5", "p50", "p95", "max"))
    table = Table("", *numbers, "pairs by length", title=f"{split}: tokens")
    for side, stats in lengths.items():
        if stats:
            cells = [f"{stats['mean']:.0f}", *(f"{stats[key]}" for key in ("p5", "p50", "p95", "max"))]
            table.add_row(side, *cells, _bars(stats["histogram"], width))
    return table


def _bars(histogram: Mapping[str, list[int]], width: int) -> str:
    """One line for each bin of a histogram: upper edge, bar, count."""
    top = max(histogram["counts"])
    lines = []
    for edge, count in zip(histogram["edges"][1:], histogram["counts"]):
        bar = "█" * round(width * count / top) or ("▏" if count and width else "")
        lines.append(" ".join(filter(None, (f"<{edge:>6}", bar, str(count)))))
    return "\n".join(lines)


def _print_example(console: Console, example: Mapping[str, str]) -> None:
    """Prompt and response as the model sees them; trained text in marks; a sign in front of each line end."""
    for side, colour in (("chosen", "green"), ("rejected", "red")):
        prompt, trained = (visible(example[key]).replace("\n", "↵\n") for key in (f"{side}_prompt", side))
        text = Text()
        text.append(f"{example['row_id']} {side}, trained text in {MARKS[0]} {MARKS[1]}\n", style="bold")
        text.append(prompt, style="dim")
        text.append(f"{MARKS[0]}{trained}{MARKS[1]}", style=colour)
        console.print(text)
        console.print()
