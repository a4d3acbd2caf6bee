"""The demo: align SmolLM2-135M-Instruct with SimPO on pairs sampled from itself, and show what changed.

    make demo        (or: python examples/demo/run.py [--key value ...], any recipe key)
    python examples/demo/run.py --bf16 false         training, evaluations and answers in fp32 (slower)

Answers held-out prompts with the model as it is, trains it, answers the same prompts again, and compares both sets by
the rule that made the pairs (rule.py). The rule looks at fresh answers only: nothing here is read off the loss.
Everything computes in one precision, bf16 unless --bf16 false; the model is saved in fp32, as it was trained.
Everything is written into the run directory; results are in demo.json and demo.md.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from get_model import get_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rule import count_words, repetition, score  # noqa: E402

MAX_NEW_TOKENS = 160
TEMPERATURE = 0.7
SHOWN = 4
CAVEAT = "The rule sees manners (brief, direct, complete, no repeats), not facts: a model of this size is often wrong."


def main(overrides: Sequence[str]) -> int:
    console, started = Console(highlight=False), time.perf_counter()
    from simpo.recipe import load_recipe
    from simpo.trainer import Interrupted, NonFiniteError, Trainer

    try:
        model = get_model()
        settings = {
            "model_name_or_path": str(model),
            "dataset_mixer": {str(HERE / "pairs"): 1.0},
            "output_dir": str(free_folder(Path("runs/demo"))),
        }
        recipe = load_recipe(HERE.parents[1] / "recipes" / "demo.yaml", settings)
        recipe = load_recipe(recipe, overrides)
        prompts = held_out_prompts()
        console.print(f"\n[bold]1/3[/] {len(prompts)} held-out prompts answered by the model as it is")
        before = answer(model, prompts, bf16=recipe.bf16)
        console.print("\n[bold]2/3[/] training with SimPO")
        result = Trainer(recipe).run()
        console.print("\n[bold]3/3[/] the same prompts answered by the trained model")
        after = answer(result.model_dir, prompts, bf16=recipe.bf16)
    except (ValueError, Interrupted, NonFiniteError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        return 1
    summary = summarise(prompts, before, after, read_evaluations(result.output_dir))
    summary["computed_in"] = "bf16" if recipe.bf16 else "fp32"
    summary["minutes"] = (time.perf_counter() - started) / 60
    save(result.output_dir, summary, prompts, before, after)
    show(console, summary, prompts, before, after)
    console.print(f"model       {result.model_dir}")
    console.print(f"everything  {result.output_dir} (demo.md: this page, all answers side by side)")
    console.print(f"took        {summary['minutes']:.1f} minutes")
    return 0


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist: no run is overwritten."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def held_out_prompts() -> list[str]:
    """The prompts of the held-out pairs; none of them is trained on."""
    return [row["prompt"][-1]["content"] for row in read_lines(HERE / "pairs" / "test.jsonl")]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines. (str.splitlines also splits at characters that JSON strings may hold, such as U+2028.)"""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def answer(model: Path, prompts: Sequence[str], *, bf16: bool) -> list[str]:
    """One sampled answer to each prompt, the same seed each time."""
    import torch
    from sample import sample_responses

    samples = sample_responses(
        model,
        prompts,
        num_samples=1,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=TEMPERATURE,
        seed=1,
        batch_size=64,
        dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    return [responses[0].text for responses in samples]


def read_evaluations(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last evaluation on held-out pairs."""
    evaluations = [line for line in read_lines(folder / "metrics.jsonl") if "eval_loss" in line]
    return evaluations[0], evaluations[-1]


def summarise(
    prompts: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    evaluations: tuple[Mapping[str, float], Mapping[str, float]],
) -> dict[str, Any]:
    """Means before and after, and the paired difference of the rule's score with its 95% interval."""
    measures = {
        "rule score (0 to 1)": lambda p, r: score(p, r).total,
        "words per answer": lambda p, r: count_words(r),
        "answers that come to their end": lambda p, r: float(score(p, r).parts["complete"] == 1.0),
        "repeated 4-word runs": lambda p, r: repetition(r),
    }
    rows = {
        name: [statistics.fmean(measure(p, r) for p, r in zip(prompts, side)) for side in (before, after)]
        for name, measure in measures.items()
    }
    rows["held-out preference accuracy"] = [e["eval_rewards/accuracies"] for e in evaluations]
    rows["held-out margin, nats per token"] = [e["eval_logps/chosen"] - e["eval_logps/rejected"] for e in evaluations]
    rows["chosen log-prob, nats per token"] = [e["eval_logps/chosen"] for e in evaluations]
    gains = [score(p, b).total - score(p, a).total for p, a, b in zip(prompts, before, after)]
    half = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains))
    mean = statistics.fmean(gains)
    wins = sum(g > 0 for g in gains)
    losses = sum(g < 0 for g in gains)
    return {
        "rows": rows,
        "score_gain": {"mean": mean, "low": mean - half, "high": mean + half},
        "better": wins,
        "worse": losses,
        "prompts": len(prompts),
    }


def show(
    console: Console, summary: Mapping[str, Any], prompts: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> None:
    """The table of means, and a few answers side by side."""
    console.print()
    for index in typical(prompts, before, after):
        table = Table(title=f"“{prompts[index]}”", title_justify="left", expand=True)
        table.add_column("before", ratio=1)
        table.add_column("after", ratio=1)
        table.add_row(before[index], after[index])
        console.print(table)
    table = Table(title=f"fresh answers to held-out prompts, and held-out pairs ({summary['computed_in']})")
    table.title_justify = "left"
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, (old, new) in summary["rows"].items():
        table.add_row(name, f"{old:.3f}", f"{new:.3f}")
    console.print(table)
    console.print(gain_line(summary))
    console.print(CAVEAT)


def gain_line(summary: Mapping[str, Any]) -> str:
    gain = summary["score_gain"]
    return (
        f"rule score {gain['mean']:+.3f} (95% interval {gain['low']:+.3f} to {gain['high']:+.3f}) on "
        f"{summary['prompts']} prompts: better on {summary['better']}, worse on {summary['worse']}"
    )


def typical(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> list[int]:
    """Prompts whose gain is nearest the mean gain: neither the best nor the worst is picked for show."""
    gains = [score(p, b).total - score(p, a).total for p, a, b in zip(prompts, before, after)]
    mean = statistics.fmean(gains)
    return sorted(range(len(prompts)), key=lambda i: abs(gains[i] - mean))[:SHOWN]


def save(
    folder: Path, summary: Mapping[str, Any], prompts: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> None:
    """demo.json with everything, demo.md to read."""
    answers = [
        {"prompt": p, "before": a, "after": b, "score_before": score(p, a).total, "score_after": score(p, b).total}
        for p, a, b in zip(prompts, before, after)
    ]
    (folder / "demo.json").write_text(
        json.dumps({**summary, "answers": answers}, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    lines = ["# What the demo changed", "", gain_line(summary), "", CAVEAT, "", "| | before | after |", "|---|---|---|"]
    lines += [f"| {name} | {old:.3f} | {new:.3f} |" for name, (old, new) in summary["rows"].items()]
    for row in answers:
        lines += ["", f"## {row['prompt']}", "", f"Before ({row['score_before']:.2f}):", ""]
        lines += [f"> {line}" for line in row["before"].splitlines()]
        lines += ["", f"After ({row['score_after']:.2f}):", ""]
        lines += [f"> {line}" for line in row["after"].splitlines()]
    (folder / "demo.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
