"""The demo: SmolLM2-135M-Instruct taught by its own answers, in two rounds of `simpo rounds`, and what changed.

    make demo        (or: python examples/demo/run.py [--key value ...], any recipe key)
    python examples/demo/run.py --bf16 false         everything in fp32 (as it is where a CPU has no bfloat16)

The recipe is recipes/demo.yaml: it has the numbers of prompts, samples and rounds. rule.py makes the pairs; readable.py
is a second opinion that no pair depends on. Neither is read off the loss: both look at fresh answers to prompts that
were never trained on. Given again after an interruption, with the same --output_dir, it goes on.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
sys.path.insert(0, str(HERE))

from get_model import get_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

SHOWN = 4
CAVEAT = "The rule sees manners (brief, direct, complete, no repeats), not facts: a model of this size is often wrong."


def main(overrides: Sequence[str]) -> int:
    console, started = Console(highlight=False, soft_wrap=True), time.perf_counter()
    from simpo.model.load import SLOW_BF16, has_bf16, pick_device
    from simpo.onpolicy.rounds import StageFailed, run_rounds
    from simpo.recipe import load_recipe

    try:
        settings = {
            "model_name_or_path": str(get_model()),
            "output_dir": str(free_folder(Path("runs/demo"))),
            "generate.prompts": {str(HERE / "prompts.jsonl"): 1.0},
        }
        device = pick_device("auto")
        if device.type == "cpu" and not has_bf16(device):
            console.print(f"{SLOW_BF16}: computing in float32", style="yellow")
            settings["bf16"] = False
        recipe = load_recipe(load_recipe(TOP / "recipes" / "demo.yaml", settings), overrides)
        # The recipe's scorers are modules of this repository, and its commands run as processes of their own.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])])
        folder = run_rounds(recipe).parent
    except (ValueError, StageFailed) as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; to go on, give the same command with --output_dir", style="yellow")
        return 130
    answers = pair_answers(folder)
    line = describe_gain(answers)
    show(console, answers)
    console.print(f"{line}\n{CAVEAT}\n")
    (folder / "demo.md").write_text(page(folder, answers, line), encoding="utf-8")
    console.print(f"everything  {folder} (demo.md: all answers side by side)")
    console.print(f"took        {(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist: no run is overwritten."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def pair_answers(folder: Path) -> list[dict[str, Any]]:
    """Of each held-out prompt the first answers before and after, with mean scores over all its answers."""
    last = len(json.loads((folder / "rounds.json").read_text(encoding="utf-8"))["models"]) - 1
    before, after = (
        {row["id"]: row for row in read_lines(folder / f"round-{number}" / "evaluation" / "scored.jsonl")}
        for number in (0, last)
    )
    return [
        {
            "prompt": row["prompt"][-1]["content"],
            **{name: each["responses"][0]["text"] for name, each in sides.items()},
            **{
                f"score_{name}": statistics.fmean(r["score"] for r in each["responses"]) for name, each in sides.items()
            },
        }
        for row_id, row in before.items()
        if row_id in after
        for sides in [{"before": row, "after": after[row_id]}]
    ]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines. (str.splitlines also splits at characters that JSON strings may hold, such as U+2028.)"""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def gains(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    return [each["score_after"] - each["score_before"] for each in answers]


def describe_gain(answers: Sequence[Mapping[str, Any]]) -> str:
    """The mean gain with its 95% interval, paired by prompt."""
    found = gains(answers)
    mean, half = statistics.fmean(found), 1.96 * statistics.stdev(found) / math.sqrt(len(found))
    return (
        f"rule score {mean:+.3f} (95% interval {mean - half:+.3f} to {mean + half:+.3f}) from the first model to the "
        f"last on {len(found)} held-out prompts: better on {sum(g > 0 for g in found)}, worse on "
        f"{sum(g < 0 for g in found)}"
    )


def show(console: Console, answers: Sequence[Mapping[str, Any]]) -> None:
    """The prompts whose gain is nearest the mean gain: neither the best nor the worst is picked for show."""
    found = gains(answers)
    mean = statistics.fmean(found)
    for index in sorted(range(len(answers)), key=lambda index: abs(found[index] - mean))[:SHOWN]:
        each = answers[index]
        table = Table(title=f"“{each['prompt']}”", title_justify="left", expand=True)
        table.add_column("before", ratio=1)
        table.add_column("after", ratio=1)
        table.add_row(each["before"], each["after"])
        console.print(table)


def page(folder: Path, answers: Sequence[Mapping[str, Any]], line: str) -> str:
    """demo.md: the table of the rounds, the gain, every prompt with an answer before and after."""
    lines = ["# What the demo changed", "", line, "", CAVEAT, "", (folder / "rounds.md").read_text(encoding="utf-8")]
    for row in answers:
        lines += ["", f"## {row['prompt']}"]
        for side in ("before", "after"):
            lines += ["", f"{side.capitalize()} ({row[f'score_{side}']:.2f}):", ""]
            lines += [f"> {each}" for each in row[side].splitlines()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
