"""Train a recipe in Ray Train: every worker is one process of the mesh, and a lost worker costs the steps since a save.

    pip install 'simpo[ray]'
    python examples/ray/train.py RECIPE --workers 8 --gpu --dp_shard 8

Ray starts the workers, joins them in a process group and starts them anew when one is lost; all else is
the trainer's. Checkpoints, metrics and the model are written by it into `output_dir`, which every node must
see under the same path, like the recipe's local data. Ray's own storage holds no more than its record of the run.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from simpo.recipe import Recipe, load_recipe
from simpo.run.resume import find_checkpoint, why_stopped
from simpo.run.saved import Checkpoint, list_checkpoints
from simpo.run.stopping import StoppedByGuard


def train_on_worker(config: dict[str, Any]) -> None:
    """What each worker runs, in the process group that Ray has made."""
    from simpo.trainer import Trainer

    os.chdir(config["folder"])  # the driver's: the recipe's relative paths mean the same here
    try:
        result = Trainer(go_on(**config["run"])).run()
    except StoppedByGuard:  # raised, it would be a failure to recover from; the driver reads why
        return
    ray.train.report({"steps": result.steps, **result.metrics})


def go_on(recipe: Recipe, found: list[Checkpoint]) -> Recipe:
    """The recipe of one attempt: from the newest checkpoint that an earlier one left, or as it was asked for.

    `found` are those that were there before any attempt.
    """
    if isinstance(recipe.resume_from_checkpoint, str) and list_checkpoints(checkpoints(recipe)) == found:
        return recipe
    return recipe.model_copy(update={"resume_from_checkpoint": True})


def checkpoints(recipe: Recipe) -> Path:
    return Path(recipe.output_dir) / "checkpoints"


def read_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and the recipe's keys among what follows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("--workers", type=int, required=True, help="processes; the mesh's sizes multiply to them")
    parser.add_argument("--gpu", action="store_true", help="one GPU a worker; without it one CPU")
    parser.add_argument("--storage", default="runs/ray", help="folder of Ray's record, seen by all nodes")
    parser.add_argument("--max-failures", type=int, default=3, help="lost workers to recover from")
    return parser.parse_known_args(arguments)


def main() -> None:
    options, overrides = read_arguments(sys.argv[1:])
    recipe = load_recipe(options.recipe, overrides, processes=options.workers)
    recipe.require("dataset_mixer", "output_dir")
    find_checkpoint(recipe)  # refuses a folder that holds another run before any worker starts
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={
            "run": {"recipe": recipe, "found": list_checkpoints(checkpoints(recipe))},
            "folder": os.getcwd(),
        },
        # Tensors on GPUs go through NCCL; what lies in CPU memory (checkpoints, texts) through gloo.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if options.gpu else "gloo", timeout_s=recipe.ddp_timeout),
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpu),
        run_config=RunConfig(
            name=Path(recipe.output_dir).name,
            storage_path=str(Path(options.storage).absolute()),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    )
    trainer.fit()
    if (why := why_stopped(Path(recipe.output_dir))) is not None:
        raise StoppedByGuard(why)
    print(f"the model is in {Path(recipe.output_dir, 'model')}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except StoppedByGuard as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
