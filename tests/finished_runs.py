"""Folders of runs as training leaves them, written by hand: for tests of what reads them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpo.data.ledger import Dropped, Ledger, SplitLedger, describe_lengths
from simpo.recipe import load_recipe

HOSTILE = "<script>alert('x')</script> <img src=x onerror=alert(1)> & $\\frac{1}{0}$ 日本"


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    total: int | None = None,
    evaluations: Sequence[int] = (0, 20, 40),
    sources: Sequence[str] = ("water", "stone"),
    finished: bool = True,
    seed: int = 0,
    **keys: Any,
) -> Path:
    """A run of `steps` steps of 4 pairs, evaluated after some of them on 24 pairs, with two answers at each."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(
        {
            "model_name_or_path": "models/small",
            "dataset_mixer": {source: 1.0 for source in sources},
            "output_dir": str(folder),
            "learning_rate": 2e-5,
            "max_steps": total or steps,
            "logging_steps": 1,
            **keys,
        }
    )
    recipe.save(folder / "recipe.yaml")
    write_ledger(folder / "audit.json", sources)
    lines, pairs, answers = [], [], []
    for step in range(steps + 1):
        if step:
            lines.append(training_line(step, rng))
        if step in evaluations:
            pairs.append(pairs_line(step, sources, rng))
            lines.append({"step": step, **{f"eval_{n}": v for n, v in means_of(pairs[-1]).items()}})
            for row in range(2):
                text = f"The answer {HOSTILE if row else 'to it'} after {step} steps is water, and water it is."
                prompt = f"<|im_start|>user\nWhat is question {row}? {HOSTILE}<|im_end|>\n<|im_start|>assistant\n"
                answers.append({"step": step, "row_id": f"{sources[0]}/test#{row}", "prompt": prompt, "response": text})
    write_lines(folder / "metrics.jsonl", lines)
    if pairs:
        write_lines(folder / "eval_pairs.jsonl", pairs[:1] + pairs[1:][-1:])
        write_lines(folder / "generations.jsonl", answers)
    if finished:
        (folder / "model").mkdir(exist_ok=True)
    return folder


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def training_line(step: int, rng: random.Random) -> dict[str, Any]:
    chosen, rejected = -1.0 + rng.gauss(0, 0.1), -1.2 - step / 100 + rng.gauss(0, 0.1)
    return {
        "step": step,
        "loss": 1.0 / (1 + step / 50) + rng.gauss(0, 0.1),
        "rewards/margins": 2 * (chosen - rejected),
        "rewards/accuracies": rng.choice([0.5, 0.75, 1.0]),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "grad_norm": math.exp(rng.gauss(1, 0.3)),
        "learning_rate": 2e-5 / step,
        "epoch": step / 40,
        "pairs_seen": 4 * step,
        "tokens_seen": 900 * step,
        "step_time_s": 0.5,
        "pairs_per_s": 8.0,
        "memory_gib": 3.0,
    }


def pairs_line(step: int, sources: Sequence[str], rng: random.Random, count: int = 24) -> dict[str, Any]:
    margins = [rng.gauss(0.2 + step / 40, 1.0) for _ in range(count)]
    return {
        "step": step,
        "row_ids": [f"{sources[i % len(sources)]}/test#{i}" for i in range(count)],
        "margin": margins,
        "logps/chosen": [-1.0 + m / 8 - step / 400 for m in margins],
        "logps/rejected": [-1.0 - m / 8 - step / 400 for m in margins],
        "tokens/chosen": [10.0 + i for i in range(count)],
        "tokens/rejected": [20.0] * count,
    }


def means_of(line: dict[str, Any]) -> dict[str, float]:
    margins = line["margin"]
    values = {
        "loss": 1.0 - line["step"] / 100,
        "rewards/margins": sum(margins) / len(margins),
        "rewards/accuracies": sum(m > 0 for m in margins) / len(margins),
        "logps/chosen": sum(line["logps/chosen"]) / len(margins),
        "logps/rejected": sum(line["logps/rejected"]) / len(margins),
        "pairs": float(len(margins)),
    }
    for source in dict.fromkeys(row_id.partition("/")[0] for row_id in line["row_ids"]):
        own = [m for m, row_id in zip(margins, line["row_ids"], strict=True) if row_id.startswith(f"{source}/")]
        values |= {f"rewards/accuracies/{source}": sum(m > 0 for m in own) / len(own), f"pairs/{source}": len(own)}
    return values


def write_ledger(path: Path, sources: Sequence[str]) -> None:
    import numpy as np

    train = SplitLedger(input=42, kept=40, tokens=9000, duplicates=1)
    train.add_kept([f"{sources[i % len(sources)]}/train#{i}" for i in range(40)])
    train.add_dropped(Dropped(f"{sources[0]}/train#{i}", "chosen equals rejected", HOSTILE) for i in (40, 41))
    lengths = {"chosen": np.arange(5, 45), "rejected": np.arange(10, 50)}
    train.lengths = {side: describe_lengths(values) for side, values in lengths.items()}
    test = SplitLedger(input=24, kept=24, tokens=3000)
    Ledger(splits={"train": train, "test": test}, advice=["worth a look: " + HOSTILE]).save(path)
