"""Planted collapses and ordinary runs on a real model: when the guard speaks, and when the answers are ruined.

    python benchmarks/guard.py --model MODEL [--pairs examples/demo/pairs] [--only WORD] [--keep FOLDER] [--seeds 20]
    python benchmarks/guard.py --model MODEL --only human --human FOLDER    noisy human labels, en_hh_helpful for one
    python benchmarks/guard.py --replay RUN [RUN ...]                       what it would have said of finished runs

Each row is a run on the CPU, in bf16 where it has that, 4 pairs a step, with 6 greedy answers to held-out prompts every
few steps. Answers are ruined where half of them, and at least 2 more than at the start, repeat themselves or run to
their limit. A planted row has to be caught by then, and an ordinary one to leave no guard.jsonl: exits 1 otherwise. A
row takes one to five minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One run: which pairs, recipe keys, and whether it is a collapse."""

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    data: str = "demo"
    planted: bool = True


PLANTED = (
    Row("learning rate 1e-4", {"learning_rate": 1e-4, "num_train_epochs": 3}),
    Row("learning rate 0.3", {"learning_rate": 0.3, "max_steps": 8, "eval_steps": 1}),
    Row("swapped labels", {"num_train_epochs": 3}, "swapped"),
    Row("one poisoned source", {}, "poisoned"),
)
ORDINARY = Row("demo's recipe", {"eval_generation_max_new_tokens": 160}, "whole", planted=False)
HUMAN = Row("human labels", {"learning_rate": 1e-5}, "human", planted=False)
SHORT: dict[str, Any] = {"max_steps": 12, "eval_steps": 6, "num_eval_generations": 0}


def main() -> int:
    """Train the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the model")
    parser.add_argument("--pairs", type=Path, default=REPO / "examples/demo/pairs")
    parser.add_argument("--human", type=Path, help="folder of pairs with noisy labels")
    parser.add_argument("--only", default="", help="only rows with this in their names")
    parser.add_argument("--keep", type=Path, help="folder for the runs; those in it are not run again")
    parser.add_argument("--seeds", type=int, default=20, help="short ordinary runs, each with a seed of its own")
    parser.add_argument("--count", type=int, default=64, help="training pairs, those with the shortest answers")
    parser.add_argument("--replay", type=Path, nargs="+", help="finished runs, to be read instead of trained")
    args = parser.parse_args()
    if args.replay:
        return replay(args.replay)
    seeds = [Row(f"seed {seed}", {"seed": seed, **SHORT}, planted=False) for seed in range(args.seeds)]
    rows = [row for row in (*PLANTED, ORDINARY, *([HUMAN] * bool(args.human)), *seeds) if args.only in row.name]
    print("| run | steps | the guard | answers ruined | to the limit, repeated: first, last |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        failed = [row.name for row in rows if not measure(row, args.keep or Path(work), args)]
    print(f"missed, or said without a reason: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def measure(row: Row, work: Path, args: argparse.Namespace) -> bool:
    """Train one row and print its line; whether the guard was right."""
    run = work / row.name.replace(" ", "-") / "run"
    if not (run / "metrics.jsonl").exists():
        train(row, run, args)
    found, answers = read(run / "guard.jsonl"), read(run / "generations.jsonl")
    by_step: dict[int, list[dict[str, Any]]] = {}
    for answer in answers:
        by_step.setdefault(answer["step"], []).append(answer)
    counts = {step: (at_limit(some), loops(some), len(some)) for step, some in by_step.items()}
    first = next(iter(counts.values()), (0, 0, 0))
    ruined = [s for s, c in counts.items() if any(c[i] >= max(c[2] / 2, first[i] + 2) for i in (0, 1))]
    said = ", ".join(f"{each['kind']} at {each['step']} (since {each['since_step']})" for each in found) or "nothing"
    last = list(counts.values())[-1] if counts else first
    steps = max(line["step"] for line in read(run / "metrics.jsonl"))
    shown = f"{first[0]}, {first[1]}; {last[0]}, {last[1]} of {last[2]}" if counts else ""
    print(f"| {row.name} | {steps} | {said} | {f'at {ruined[0]}' if ruined else 'no'} | {shown} |", flush=True)
    if not row.planted:
        return not found
    return not ruined or any(each["step"] <= ruined[0] for each in found)


def at_limit(answers: list[dict[str, Any]]) -> int:
    return sum(not answer["finished"] for answer in answers)


def loops(answers: list[dict[str, Any]]) -> int:
    return sum(answer["repeated_share"] > 0.5 for answer in answers)


def train(row: Row, run: Path, args: argparse.Namespace) -> None:
    import torch

    from simpo import NonFiniteError
    from simpo.display import Display
    from simpo.model.load import has_bf16
    from simpo.recipe import load_recipe
    from simpo.trainer import Trainer

    recipe = {
        "model_name_or_path": str(args.model.expanduser().resolve()),
        "dataset_mixer": make_pairs(row.data, run.parent, args),
        **{"output_dir": str(run), "cache_dir": str(run.parent.parent / "cache")},
        **{"max_length": 512, "max_prompt_length": 256, "learning_rate": 5e-5, "per_device_train_batch_size": 4},
        **{"save_strategy": "no", "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 4},
        **{"num_eval_generations": 6, "eval_generation_max_new_tokens": 96, "device": "cpu"},
        "bf16": has_bf16(torch.device("cpu")),
        **row.keys,
    }
    try:
        Trainer(load_recipe(recipe), display=Display(quiet=True)).run()
    except NonFiniteError as error:
        print(f"{row.name}: {error}", file=sys.stderr)


def make_pairs(data: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """The row's mixture: the demo's pairs (the shortest, or as they come), all swapped, or half garbage answers."""
    if data == "human":
        return {str(args.human): 1.0}
    rows = {split: read(args.pairs / f"{split}.jsonl") for split in ("train", "test")}
    if data == "whole":  # the shortest alone teach shorter or longer answers than the rest
        rows = {"train": rows["train"][: args.count], "test": rows["test"][:12]}
    else:
        rows = {"train": shortest(rows["train"], args.count), "test": shortest(rows["test"], 12)}

    def write(name: str, **splits: list[dict[str, Any]]) -> str:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, lines in splits.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return str(folder / name)

    train, test, half = rows["train"], rows["test"], args.count // 2
    if data in ("demo", "whole"):
        return {write("pairs", train=train, test=test): 1.0}
    if data == "swapped":
        swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in train]
        return {write("swapped", train=swapped, test=test): 1.0}
    poison = [
        row | {"id": f"poison-{row['id']}", "chosen": garbage(row["chosen"]), "rejected": row["chosen"]}
        for row in train[half:]
    ]
    return {write("good", train=train[:half], test=test): 1.0, write("poison", train=poison): 1.0}


def shortest(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The rows with the shortest answers, in their order: a run of them takes a fraction of the time."""
    size = [sum(len(row[side][-1]["content"]) for side in ("chosen", "rejected")) for row in rows]
    kept = sorted(range(len(rows)), key=lambda i: size[i])[:count]
    return [rows[i] for i in sorted(kept)]


def garbage(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The answer with its words in reverse order."""
    return [{**turn, "content": " ".join(reversed(turn["content"].split()))} for turn in turns]


def replay(runs: list[Path]) -> int:
    """Print what the guard says to the logs of finished runs."""
    from simpo.recipe import load_recipe
    from simpo.run.guard import Guard

    total = 0
    for run in runs:
        recipe = load_recipe(str(run / "recipe.yaml"))
        guard = Guard(gamma=recipe.gamma if "gamma_beta_ratio" in recipe.loss.defaults else None)
        found = [each for line in read(run / "metrics.jsonl") for each in guard.read(line)]
        total += len(found)
        said = "; ".join(f"{each.check} at {each.step}: {each.saw}" for each in found)
        print(f"{run}: {said or 'nothing'}")
    print(f"{len(runs)} runs, {total} findings")
    return int(total > 0)


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    sys.exit(main())
