"""Owns the ledger: every input row kept, cut or dropped, and why; lengths; examples of what is trained.

Plain numbers and texts, saved as JSON and printed with rich. Knows nothing of tokenizers, files of rows or recipes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simpo.data.files import write_whole

PERCENTILES = (5, 25, 50, 75, 95, 99)
EXAMPLES_PER_REASON = 5
MARKS = ("⟦", "⟧")
"""Around trained text in a printed example, so that it shows without colour."""

_CUTS = {"prompt_left": "prompt, from the left", "chosen_right": "chosen, end", "rejected_right": "rejected, end"}


class Dropped(NamedTuple):
    """One row that is not trained on."""

    row_id: str
    reason: str
    detail: str


@dataclass
class SplitLedger:
    """The account of one split.

    `input` == `kept` + all `dropped` counts, always. `dropped` maps a reason to its count and some example rows;
    `cut` maps a place to the pairs cut there and the tokens removed. `duplicates` counts rows equal to an earlier one
    in prompt, chosen and rejected, dropped or not; `same_prompt` counts kept rows whose prompt an earlier one has.
    `lengths` are in tokens: prompt, and trained tokens of chosen and rejected. `shared_prefix_share` is the share of
    all tokens (both sides) that lie in the common prefix of their pair.
    """

    input: int = 0
    kept: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    cut: dict[str, dict[str, int]] = field(default_factory=dict)
    duplicates: int = 0
    same_prompt: int = 0
    seam_shifted: int = 0
    shared_prefix_share: float = 0.0
    tokens: int = 0
    lengths: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)

    @property
    def num_dropped(self) -> int:
        """Rows dropped for any reason."""
        return sum(entry["count"] for entry in self.dropped.values())

    @property
    def seam_shifted_share(self) -> float:
        """Share of kept pairs that tokenising prompt and response apart would have changed."""
        return self.seam_shifted / self.kept if self.kept else 0.0

    def add_dropped(self, rows: Iterable[Dropped]) -> None:
        """Count rows as dropped, keeping the first few of each reason as examples."""
        for row in rows:
            entry = self.dropped.setdefault(row.reason, {"count": 0, "examples": []})
            entry["count"] += 1
            if len(entry["examples"]) < EXAMPLES_PER_REASON:
                entry["examples"].append({"row_id": row.row_id, "detail": row.detail})

    def check(self) -> None:
        """Raise if a row is unaccounted for: a bug here, never the user's fault."""
        if self.input != self.kept + self.num_dropped:
            raise AssertionError(f"ledger: {self.input} rows in, {self.kept} kept, {self.num_dropped} dropped")

    def top_reasons(self, count: int = 3) -> str:
        """The most frequent reasons with example rows, as lines."""
        entries = sorted(self.dropped.items(), key=lambda item: -item[1]["count"])[:count]
        lines = []
        for reason, entry in entries:
            lines.append(f"  {entry['count']} {reason}")
            lines += [f"    {example['row_id']}: {example['detail']}" for example in entry["examples"][:2]]
        return "\n".join(lines)


@dataclass
class Ledger:
    """The accounts of all splits of one preparation. `eval_prompts_in_train` counts eval pairs whose prompt is also
    trained on."""

    splits: dict[str, SplitLedger] = field(default_factory=dict)
    eval_prompts_in_train: int = 0
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""

    def check(self) -> None:
        """Every row of every split is accounted for."""
        for split in self.splits.values():
            split.check()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as written to audit.json."""
        content = asdict(self)
        for name, split in self.splits.items():
            content["splits"][name]["seam_shifted_share"] = split.seam_shifted_share
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Ledger:
        """The inverse of `as_dict`."""
        known = SplitLedger.__dataclass_fields__
        splits = {
            name: SplitLedger(**{key: value for key, value in split.items() if key in known})
            for name, split in content["splits"].items()
        }
        return cls(splits, content["eval_prompts_in_train"], list(content["notes"]), content["fingerprint"])

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_whole(path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Read what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def render(self, console: Console | None = None, *, examples: int = 2) -> None:
        """Print the account, length histograms and a few examples with the trained text marked."""
        console = console or Console()
        console.print(self._table())
        for name, split in self.splits.items():
            if split.lengths:
                console.print(_histogram_table(name, split.lengths))
        for line in self._remarks():
            console.print(line, markup=False, highlight=False)
        for name, split in self.splits.items():
            for example in split.examples[: examples if name == "train" else 0]:
                _print_example(console, example)

    def _table(self) -> Table:
        table = Table(title="pairs")
        table.add_column("")
        for name in self.splits:
            table.add_column(name, justify="right")
        splits = list(self.splits.values())
        table.add_row("rows in", *(f"{split.input}" for split in splits))
        table.add_row("kept", *(f"{split.kept}" for split in splits))
        for reason in dict.fromkeys(reason for split in splits for reason in split.dropped):
            table.add_row(
                f"dropped: {reason}", *(f"{split.dropped.get(reason, {'count': 0})['count']}" for split in splits)
            )
        for place, words in _CUTS.items():
            if any(split.cut.get(place, {}).get("pairs") for split in splits):
                table.add_row(f"cut: {words}", *(_cut_cell(split.cut.get(place, {})) for split in splits))
        table.add_row("duplicates", *(f"{split.duplicates}" for split in splits))
        table.add_row("prompt seen before", *(f"{split.same_prompt}" for split in splits))
        table.add_row("seam shifted", *(f"{split.seam_shifted_share:.1%}" for split in splits))
        table.add_row("tokens in a common prefix", *(f"{split.shared_prefix_share:.1%}" for split in splits))
        return table

    def _remarks(self) -> list[str]:
        lines = list(self.notes)
        if self.eval_prompts_in_train:
            lines.append(f"{self.eval_prompts_in_train} eval pairs have a prompt that is also trained on")
        for name, split in self.splits.items():
            if split.dropped:
                lines.append(f"dropped from {name}:\n{split.top_reasons(count=len(split.dropped))}")
        return lines


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


def _cut_cell(entry: Mapping[str, int]) -> str:
    return f"{entry['pairs']} ({entry['tokens']} tokens)" if entry.get("pairs") else "0"


def _histogram_table(split: str, lengths: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=f"{split}: tokens")
    for column in ("", "mean", "p5", "p50", "p95", "max"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("pairs by length")
    for side, stats in lengths.items():
        if stats:
            cells = [f"{stats['mean']:.0f}", *(f"{stats[key]}" for key in ("p5", "p50", "p95", "max"))]
            table.add_row(side, *cells, _bars(stats["histogram"]))
    return table


def _bars(histogram: Mapping[str, list[int]]) -> str:
    """One line for each bin of a histogram: upper edge, bar, count."""
    top = max(histogram["counts"]) or 1
    lines = []
    for edge, count in zip(histogram["edges"][1:], histogram["counts"]):
        bar = "█" * round(20 * count / top) or ("▏" if count else "")
        lines.append(f"<{edge:>6} {bar} {count}")
    return "\n".join(lines)


def _print_example(console: Console, example: Mapping[str, str]) -> None:
    """Prompt and response as the model sees them; trained text in marks; line ends shown."""
    for side in ("chosen", "rejected"):
        text = Text()
        text.append(f"{example['row_id']} {side}, trained text in {MARKS[0]} {MARKS[1]}\n", style="bold")
        text.append(show_line_ends(example[f"{side}_prompt"]), style="dim")
        colour = "green" if side == "chosen" else "red"
        text.append(f"{MARKS[0]}{show_line_ends(example[side])}{MARKS[1]}", style=colour)
        console.print(text)
        console.print()


def show_line_ends(text: str) -> str:
    """The text with a visible sign in front of each line end."""
    return text.replace("\n", "↵\n")
