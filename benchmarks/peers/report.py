"""What a benchmark shows: a table on the terminal and as Markdown, and charts, all from the results' values alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

SPEED = (
    "case",
    "side",
    "pairs/s",
    "step s\n(min-max)",
    "first\nstep s",
    "time/simpo's\n(whole run)",
    "peak GiB\n(loaded)",
    "simpo's\n/ its",
    "loss\ndiffers",
)
WORK = ("case", "side", "FLOPs\n/ floor", "TFLOP\n/ pair", "tokens\n/ needed", "row fill", "MFU", "MFU of\nceiling")
TITLES = {"simpo": "simpo", "trl": "TRL CPOTrainer", "liger": "HF + Liger loss", "padded": "padded reference"}
SHORT = {"simpo": "simpo", "trl": "TRL", "liger": "Liger", "padded": "padded"}
WIDTH = 120
"""Columns of a terminal that the wider table needs; a file or pipe gets them too."""


def render(results: dict[str, Any], console: Console) -> None:
    """Print the tables, what was skipped or failed, and the conditions."""
    width = console.width
    console.width = max(WIDTH, width)  # a cell that is cut says nothing; a long line at least wraps
    rows = table_rows(results)
    for title, columns in (("the same pairs, the same steps", SPEED), ("what is computed for them", WORK)):
        shown = _shown(columns, rows)
        if len(shown) == 2:
            continue  # nothing was run
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for index, name in enumerate(shown):
            table.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
        for index, row in enumerate(rows):
            last = index + 1 == len(rows) or rows[index + 1]["case"] != ""
            table.add_row(*(row[name] for name in shown), end_section=last)
        console.print(table)
    console.width = width
    for line in [*remarks(results), *describe_conditions(results)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def save_report(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write table.md and, with matplotlib, charts.png; returns what was written."""
    rows = table_rows(results)
    shown = _shown((*SPEED, *WORK[2:]), rows)
    lines = [f"| {' | '.join(shown)} |".replace("\n", " "), f"|{'---|' * len(shown)}"]
    lines += [f"| {' | '.join(row[name] for name in shown)} |" for row in rows]
    text = [*lines, "", *(f"- {line}" for line in [*remarks(results), *describe_conditions(results)])]
    written = [folder / "table.md"]
    written[0].write_text("\n".join(text) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        from peers.charts import save_charts

        written += save_charts(results, folder / "charts.png")
    return written


def table_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """One row a case and side, cells by the columns' names; the case is named in its first row."""
    rows = []
    for case in results["cases"]:
        if case["skipped"]:
            continue
        for index, (name, side) in enumerate(case["sides"].items()):
            rows.append(_cells(side) | {"case": case["name"] if index == 0 else "", "side": SHORT[name]})
    return rows


def _cells(side: dict[str, Any]) -> dict[str, str]:
    summary, beside = side["summary"], side.get("beside_simpo", {})
    cells = dict.fromkeys((*SPEED, *WORK), "")
    if "executed_over_floor" in summary:
        cells["FLOPs\n/ floor"] = f"{summary['executed_over_floor']:.2f}"
        cells["TFLOP\n/ pair"] = _digits(summary["executed_tflop_per_pair"])
        cells["tokens\n/ needed"] = f"{summary['tokens_over_needed']:.2f}"
        cells["row fill"] = f"{summary['row_fill']:.0%}"
    if side["status"] == "failed":
        cells["pairs/s"] = "failed"
    if "step_time_s" in summary:
        step = summary["step_time_s"]
        cells["pairs/s"] = _digits(summary["pairs_per_s"])
        cells["step s\n(min-max)"] = f"{_digits(step['median'])} ({_digits(step['min'])}-{_digits(step['max'])})"
        if "first_step_s" in summary:  # files of earlier versions have none
            cells["first\nstep s"] = _digits(summary["first_step_s"])
        cells["peak GiB\n(loaded)"] = f"{summary['peak_gib']:.2f} ({summary['loaded_gib']:.2f})"
    if "step_time_ratio" in beside:
        ratio = f"{beside['step_time_ratio']['median']:.2f} ({beside['whole_time_ratio']:.2f})"
        cells["time/simpo's\n(whole run)"] = ratio
        cells["simpo's\n/ its"] = f"{beside['memory_share']:.2f}"
        cells["loss\ndiffers"] = f"{beside['largest_loss_difference']:.1e}"
    for name, key in (("MFU", "mfu"), ("MFU of\nceiling", "mfu_of_measured_ceiling")):
        if key in summary:
            cells[name] = f"{summary[key]:.1%}"
    return cells


def _shown(columns: Sequence[str], rows: Sequence[dict[str, str]]) -> list[str]:
    """The columns in which any row has something."""
    return [name for name in columns if name in ("case", "side") or any(row[name] for row in rows)]


def remarks(results: dict[str, Any]) -> list[str]:
    """What was skipped, did not run or failed, and why; a count that a real step did not confirm."""
    lines = [f"{case['name']}: skipped: {case['skipped']}" for case in results["cases"] if case["skipped"]]
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for case in results["cases"]:
        for name, side in ({} if case["skipped"] else case["sides"]).items():
            if side["status"] != "ok" and side["reason"]:
                sides = reasons.setdefault((side["status"], side["reason"]), {})
                sides.setdefault(TITLES[name], []).append(case["name"])
            if side["summary"].get("count_confirmed") is False:
                lines.append(f"{case['name']}, {TITLES[name]}: a real step executed other operations than were counted")
    for (status, reason), sides in reasons.items():
        cases = dict.fromkeys(case for names in sides.values() for case in names)
        lines.append(f"{', '.join(sides)} {status} ({', '.join(cases)}): {reason}")
    return lines


def describe_conditions(results: dict[str, Any]) -> list[str]:
    """What every number depends on, in a few lines."""
    machine, conditions, versions = results["machine"], results["conditions"], results["versions"]
    flags = f" ({', '.join(machine['cpu_flags'])})" if machine["cpu_flags"] else ""
    place = f"{machine['cpu']}{flags}, {_count(conditions['threads'], 'thread')}, {machine['memory_gib']:.0f} GiB"
    if machine.get("gpu"):
        place = f"{machine['gpu']}, {machine['gpu_memory_gib']:.0f} GiB; {place}"
    sizes = sorted({case["pairs_per_micro_batch"] for case in results["cases"]})
    batch = " or ".join(map(str, sizes)) + (" pair" if sizes == [1] else " pairs")
    shown = ("simpo", "commit", "python", "torch", "transformers", "trl", "liger-kernel")
    steps = conditions["timed_steps"]
    runs = (
        f"{_count(conditions['rounds'], 'round')} of {_count(steps, 'timed step')} after "
        f"{conditions['warm_up_steps']} to warm up"
    )
    if conditions["flops_only"]:
        runs = f"operations counted over {_count(steps, 'step')}, nothing run"
    lines = [
        place,
        f"{conditions['model']} ({conditions['num_parameters'] / 1e6:,.4g} M parameters, weights "
        f"{conditions['weights']}), {conditions['dtype']} compute on fp32 weights, {batch} a micro-batch, "
        f"{conditions['accumulation']} accumulated",
        f"{runs}; {results['date'][:10]}; "
        + ", ".join(f"{name} {versions[name]}" for name in shown if versions.get(name)),
    ]
    if conditions.get("peak_tflops"):
        lines.append(f"MFU against {conditions['peak_tflops']:.0f} TFLOP/s, the dense bf16 peak its maker states")
    if machine.get("matmul_tflops"):
        lines.append(f"a bf16 product of 8192 x 8192 matrices reaches {machine['matmul_tflops']:.0f} TFLOP/s here")
    return [*lines, results["command"]]


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")


def _digits(value: float) -> str:
    """Three significant digits, zeros at the end kept."""
    return f"{value:#.3g}".rstrip(".")
