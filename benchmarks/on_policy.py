"""Pairs of the model's own responses against pairs that others wrote, as many, by the demo's rule and a second one.

    python benchmarks/on_policy.py --model MODEL [--foreign hh/train.jsonl.gz] [--output DIR] [--write FILE.md]

Every arm trains the same model on the same number of pairs with the same recipe (recipes/demo.yaml); the pairs of each
are ordered by examples/demo/rule.py. Each trained model then answers the same held-out prompts of the demo anew; its
answers are scored by that rule and by examples/demo/readable.py, which no pair depends on. The arms:

    own, worst    the model's own responses to --prompts prompts: best against worst
    own, sigma    the same responses: best against the one nearest to mean - 2 deviations
    other system  the same prompts, answered by the model under a system prompt and at temperature 1: off-policy
    foreign       pairs of --foreign (other prompts, answers of another model)

Each step is a command of the package; what is finished is not done again. About half an hour on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from examples.demo.rule import rate  # noqa: E402
from simpo.data.files import read_file, write_whole  # noqa: E402
from simpo.data.preferences import pair_from_row  # noqa: E402
from simpo.evaluation.statistics import Interval  # noqa: E402
from simpo.onpolicy.pair import is_held_out, run_pair  # noqa: E402
from simpo.onpolicy.prompts import read_prompts  # noqa: E402
from simpo.onpolicy.rounds import run_command  # noqa: E402
from simpo.onpolicy.table import compare_models, measure_model  # noqa: E402
from simpo.recipe import Recipe, load_recipe  # noqa: E402

SHARE = 0.2  # of the demo's prompts, held out
SYSTEM = "You are a thorough lecturer. Explain the background at length before you come to the answer."
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--foreign", type=Path, help="a file of pairs that another model wrote")
    parser.add_argument("--output", type=Path, default=Path("runs/on-policy"))
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--eval-prompts", type=int, default=100)
    parser.add_argument("--eval-samples", type=int, default=2)
    parser.add_argument("keys", nargs="*", help="recipe keys, as key=value")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    base = load_recipe(
        load_recipe(REPO / "recipes" / "demo.yaml", {"model_name_or_path": args.model, "pair.test_fraction": 0.0}),
        args.keys,
    )
    asked, held_out = write_prompts(base, args)
    pairs = {"own, worst": sample(base, args, "own", asked)}
    pairs["own, sigma"] = pair(base, args.output / "own", "sigma", **{"pair.method": "best_sigma"})
    system = {"system_prompt": SYSTEM, "generate.temperature": 1.0}
    pairs["other system"] = without_system(sample(base, args, "other", asked, **system))
    if args.foreign:
        pairs["foreign"] = foreign_pairs(base, args.foreign, args.output / "foreign" / "pairs", args.prompts)
    count = min(len(list(read_file(folder / "train.jsonl"))) for folder in pairs.values())
    models = {"untrained": args.model}
    for name, folder in pairs.items():
        models[name] = train(base, args.output / "trained" / folder_of(name), folder, count)
    measures = {name: evaluate(base, args, name, model, held_out) for name, model in models.items()}
    lines = table(measures, count, args)
    print("\n".join(lines))
    if args.write:
        write_whole(args.write, "\n".join([*lines, ""]))
    return 0


def write_prompts(base: Recipe, args: argparse.Namespace) -> tuple[Path, Path]:
    """A seeded choice of prompts to train on, and of held-out ones."""
    found = sorted(
        read_prompts(load_recipe(base, {"generate.prompts": {str(REPO / "examples/demo/prompts.jsonl"): 1.0}})).prompts,
        key=lambda prompt: prompt.id,
    )
    sides: dict[bool, list[Any]] = {True: [], False: []}
    for prompt in found:
        sides[is_held_out(prompt.id, SHARE)].append(prompt)
    paths = []
    for is_out, count, name in ((False, args.prompts, "asked"), (True, args.eval_prompts, "held-out")):
        chosen = random.Random(f"{base.seed} {name}").sample(sides[is_out], min(count, len(sides[is_out])))
        paths.append(args.output / f"{name}.jsonl")
        write_whole(paths[-1], "".join(json.dumps({"prompt": prompt.turns}) + "\n" for prompt in chosen))
    return paths[0], paths[1]


def command(name: str, base: Recipe, place: Path, **changes: Any) -> Recipe:
    """Write the recipe of a folder and run a command on it."""
    recipe = load_recipe(base, {"output_dir": str(place), **changes})
    path = place / f"{name}.yaml"
    write_whole(path, recipe.to_yaml())
    code = run_command([sys.executable, "-m", "simpo", name, str(path)])
    if code not in (0, 3):
        raise SystemExit(code)
    return recipe


def sample(base: Recipe, args: argparse.Namespace, name: str, asked: Path, **changes: Any) -> Path:
    place = args.output / name
    changes |= {"generate.prompts": {str(asked): 1.0}, "generate.num_samples": args.num_samples}
    command("generate", base, place, **changes)
    command("score", base, place, **changes)
    return pair(base, place, "pairs")


def pair(base: Recipe, place: Path, name: str, **changes: Any) -> Path:
    return run_pair(load_recipe(base, {"output_dir": str(place), **changes}), output=place / name)


def without_system(folder: Path) -> Path:
    """The pairs as they are trained: as answers to the bare prompts."""
    target = folder.with_name("bare")
    rows = read_file(folder / "train.jsonl")
    bare = ({**row, "prompt": [turn for turn in row["prompt"] if turn["role"] != "system"]} for row in rows)
    write_whole(target / "train.jsonl", "".join(json.dumps(row) + "\n" for row in bare))
    return target


def foreign_pairs(base: Recipe, source: Path, target: Path, count: int) -> Path:
    """Of single questions: the two answers in the order of the rule, under the limits of the recipe's pairs."""

    def ordered() -> Iterator[Row]:
        for row in read_file(source):
            found = pair_from_row(row)
            if len(found.turns) > 1 or not (isinstance(found.chosen, str) and isinstance(found.rejected, str)):
                continue
            answers = sorted((found.chosen, found.rejected), key=lambda text: -rate(found.turns, text, {}))
            best, worst = (rate(found.turns, text, {}) for text in answers)
            if best >= (base.pair.min_score or 0) and best - worst >= max(base.pair.min_gap, 1e-9):
                yield {"prompt": found.turns, "chosen": answers[0], "rejected": answers[1]}

    rows = list(ordered())
    rows = random.Random(f"{base.seed} foreign").sample(rows, min(count, len(rows)))
    write_whole(target / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return target


def train(base: Recipe, place: Path, pairs: Path, count: int) -> str:
    model = place / "model"
    if not model.is_dir():
        data = {"dataset_mixer": {str(pairs): 1.0}, "dataset_splits": ["train"], "validation_fraction": 0.0}
        command("train", base, place, **data, max_train_samples=count, resume_from_checkpoint=True)
    return str(model)


def evaluate(base: Recipe, args: argparse.Namespace, name: str, model: str, held_out: Path) -> Any:
    place = args.output / "evaluations" / folder_of(name)
    changes = {
        "model_name_or_path": model,
        "generate.prompts": {str(held_out): 1.0},
        "generate.num_samples": args.eval_samples,
        "generate.seed": 1,
    }
    command("generate", base, place, **changes)
    command("score", base, place, **changes)
    return measure_model(0, model, place / "scored.jsonl", None)


def table(measures: dict[str, Any], count: int, args: argparse.Namespace) -> list[str]:
    """Means over held-out prompts with 95% intervals; differences paired by prompt."""

    def cells(interval: Interval) -> str:
        return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"

    shown = ("score: rule", "score: readable", "tokens", "finished")
    lines = [f"| {count} pairs of | rule | readable | tokens | finished | words |", "|---|---|---|---|---|---|"]
    for name, found in measures.items():
        words = word_count(args.output / "evaluations" / folder_of(name))
        lines.append("| " + " | ".join([name, *(cells(found.numbers[key]) for key in shown), f"{words:.0f}"]) + " |")
    lines += ["", "| paired by prompt | rule | readable |", "|---|---|---|"]
    differences = [(name, "untrained") for name in measures if name != "untrained"]
    differences += [("own, worst", name) for name in measures if name not in ("untrained", "own, worst")]
    for first, second in differences:
        each = (cells(compare_models(measures[first], measures[second], key)) for key in shown[:2])
        lines.append("| " + " | ".join([f"{first} less {second}", *each]) + " |")
    return lines


def folder_of(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def word_count(place: Path) -> float:
    return statistics.fmean(
        len(response["text"].split()) for row in read_file(place / "scored.jsonl") for response in row["responses"]
    )


if __name__ == "__main__":
    sys.exit(main())
