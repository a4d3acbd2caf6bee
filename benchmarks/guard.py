"""Planted collapses and ordinary runs on a real model: when the guard speaks, and when the answers are ruined.

    python benchmarks/guard.py --model MODEL [--pairs examples/demo/pairs] [--only NAME] [--keep FOLDER]
    python benchmarks/guard.py --model MODEL --hh DIR_OF_PAIRS      ordinary runs on noisy human labels as well

Each row is one `simpo train` in bf16 on the CPU, 4 pairs a step, evaluated with 6 greedy answers of 96 tokens every few
steps. "Ruined" is the first evaluation at which half of the answers run to the limit or repeat themselves more than the
untrained model's do. A planted row must be caught before that; an ordinary one must leave no guard.jsonl. Exits 1
otherwise. A row takes one to five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One run: what is done to the pairs, recipe keys, and whether it is a collapse."""

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    planted: bool = True
    data: str = "demo"


PLANTED = (
    Row("learning rate 1e-4", {"learning_rate": 1e-4}),
    Row("learning rate 0.3", {"learning_rate": 0.3}),
    Row("swapped labels", data="swapped"),
    Row("one poisoned source", data="poisoned"),
)
ORDINARY = (
    Row("demo's recipe", planted=False),
    *(
        Row(
            f"demo's recipe, seed {seed}",
            {"seed": seed, "max_steps": 10, "per_device_train_batch_size": 2, "num_eval_generations": 0},
            planted=False,
        )
        for seed in range(20)
    ),
)


def make_pairs(folder: Path, pairs: Path, data: str, count: int) -> dict[str, float]:
    """The row's mixture: the demo's pairs, all of them swapped, or with a second source of garbage answers."""
    read = {split: [json.loads(line) for line in (pairs / f"{split}.jsonl").open()] for split in ("train", "test")}
    read = {"train": shortest(read["train"], count), "test": shortest(read["test"], 12)}

    def write(name: str, rows: dict[str, list[Any]]) -> str:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, lines in rows.items():
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(folder / name)

    if data == "demo":
        return {write("pairs", read): 1.0}
    if data == "swapped":
        swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in read["train"]]
        return {write("swapped", {**read, "train": swapped}): 1.0}
    half = len(read["train"]) // 2
    poison = [
        row | {"id": f"poison-{row['id']}", "chosen": garbage(row["chosen"]), "rejected": row["chosen"]}
        for row in read["train"][half:]
    ]
    good, bad = write("good", {**read, "train": read["train"][:half]}), write("poison", {"train": poison})
    return {good: 1.0, bad: 1.0}


def shortest(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """As many rows with the shortest answers, in their order: a run of them takes a fraction of the time."""
    size = {id(row): sum(len(row[side][-1]["content"]) for side in ("chosen", "rejected")) for row in rows}
    kept = {id(row) for row in sorted(rows, key=lambda row: size[id(row)])[:count]}
    return [row for row in rows if id(row) in kept]


def garbage(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The answer with its words in reverse order."""
    return [{**turn, "content": " ".join(reversed(turn["content"].split()))} for turn in turns]


def train(row: Row, folder: Path, args: argparse.Namespace) -> None:
    from simpo.cli import main

    recipe = {
        "model_name_or_path": str(args.model.expanduser().resolve()),
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder.parent / "cache"),
        **{"max_length": 512, "max_prompt_length": 256, "learning_rate": 5e-5, "per_device_train_batch_size": 4},
        **{"save_strategy": "no", "eval_on_start": True, "eval_strategy": "steps", "eval_steps": args.eval_steps},
        **{"num_eval_generations": 6, "eval_generation_max_new_tokens": 96, "max_eval_samples": 12},
        **{"device": "cpu", "num_threads": args.threads},
        **row.keys,
    }
    recipe["dataset_mixer"] = make_pairs(folder, args.pairs, row.data, args.count)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    sys.argv = ["simpo", "train", str(path)]
    try:
        main()
    except SystemExit as done:
        print(row.name, "exit", done.code, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pairs", type=Path, default=REPO / "examples/demo/pairs")
    parser.add_argument("--only", default="")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--eval-steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for row in (*PLANTED, *ORDINARY):
        if row.name in args.only.split(";"):
            train(row, args.keep / row.name.replace(" ", "-").replace("'", "").replace(",", ""), args)
