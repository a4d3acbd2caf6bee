"""What a list of n responses costs beside the n/2 pairs that they would make: training steps in turns, as a ratio.

    python benchmarks/lists.py [--model MODEL] [--responses 2 4 8] [--prompt 200] [--words 100] [--rounds 5]

One process; nothing else should run. Both sides train all weights on the same prompts and responses.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO)]

import simpo  # noqa: E402
from examples.demo.get_model import get_model  # noqa: E402
from simpo.data.loader import StepPlan  # noqa: E402
from simpo.display import Display  # noqa: E402
from simpo.model.load import has_bf16, pick_device  # noqa: E402
from simpo.trainer import Trainer  # noqa: E402

WORDS = sorted(set((REPO / "LICENSE").read_text(encoding="utf-8").lower().split()))


def rows(prompts: int, args: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """Prompts of common words, each with so many responses and their scores."""
    words = random.Random(0)
    return [
        {
            "prompt": " ".join(words.choices(WORDS, k=args.prompt)),
            "responses": [" ".join(words.choices(WORDS, k=args.words)) for _ in range(count)],
            "scores": [float(place) for place in range(count)],
        }
        for _ in range(prompts)
    ]


def in_pairs(row: dict[str, Any]) -> list[dict[str, str]]:
    """The responses of a list, two and two."""
    both = zip(row["responses"][1::2], row["responses"][::2], strict=True)
    return [{"prompt": row["prompt"], "chosen": better, "rejected": worse} for better, worse in both]


def build(model: str, data: list[dict[str, Any]], loss: str, folder: Path) -> tuple[Trainer, StepPlan]:
    """A trainer, and its step of all the data."""
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    keys = {"loss_type": loss, "per_device_train_batch_size": len(data), "gradient_accumulation_steps": 1}
    keys |= {"max_length": 2048, "max_prompt_length": 1024, "validation_fraction": 0.0, "max_steps": 1}
    keys |= {"save_strategy": "no", "eval_strategy": "no", "guard": "off", "bf16": has_bf16(pick_device("auto"))}
    paths = {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache")}
    recipe = simpo.load_recipe(
        {"model_name_or_path": model, "dataset_mixer": {str(folder / "train.jsonl"): 1.0}, **keys, **paths}
    )
    trainer = Trainer(recipe, display=Display(quiet=True))
    return trainer, next(iter(trainer.loader.plans(0, 1)))


def measure(model: str, count: int, args: argparse.Namespace) -> str:
    """A row of the table."""
    data = rows(8 // count, args, count)
    with tempfile.TemporaryDirectory() as scratch:
        sides = [
            build(model, data, "plackett_luce", Path(scratch, "lists")),
            build(model, [pair for row in data for pair in in_pairs(row)], "sigmoid", Path(scratch, "pairs")),
        ]
        taken: list[list[float]] = [[], []]
        for turn in range(args.rounds + 1):
            for (trainer, plan), seconds in zip(sides, taken, strict=True):
                began = time.perf_counter()
                trainer.train_step(plan)
                seconds += [time.perf_counter() - began] * (turn > 0)  # the first warms up
    ratios = [one / other for one, other in zip(*taken, strict=True)]
    of_list, of_pairs = (statistics.median(seconds) for seconds in taken)
    return (
        f"| {count} | {8 // count} | {of_list:.2f} | {of_pairs:.2f} | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="[default: SmolLM2-135M-Instruct, fetched once]")
    parser.add_argument("--responses", nargs="+", type=int, choices=(2, 4, 8), default=[2, 4, 8], help="of a list")
    parser.add_argument("--prompt", type=int, default=200, help="words of a prompt")
    parser.add_argument("--words", type=int, default=100, help="of a response")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = args.model or str(get_model())
    print("| responses of a list | lists a step | s a step | the same in pairs | ratio |\n|---|---|---|---|---|")
    for count in args.responses:
        print(measure(model, count, args), flush=True)


if __name__ == "__main__":
    main()
