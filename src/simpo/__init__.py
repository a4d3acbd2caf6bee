"""Align language models with preference pairs by SimPO.

    import simpo

    simpo.train("recipe.yaml", output_dir="runs/first")
    simpo.evaluate("runs/first", "pairs.jsonl").render()

Importing this package imports nothing heavy: each name below is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo import environment  # noqa: F401  first of all: torch reads these settings when it loads

if TYPE_CHECKING:
    from simpo.core.losses import simpo_loss as simpo_loss
    from simpo.evaluation.results import Comparison as Comparison
    from simpo.evaluation.results import Evaluation as Evaluation
    from simpo.evaluation.results import compare as compare
    from simpo.evaluation.run import evaluate as evaluate
    from simpo.recipe import Recipe as Recipe
    from simpo.recipe import load_recipe as load_recipe
    from simpo.run.stopping import Interrupted as Interrupted
    from simpo.run.stopping import NonFiniteError as NonFiniteError
    from simpo.trainer import Trainer as Trainer
    from simpo.trainer import TrainResult as TrainResult

_HOMES = {
    "Comparison": "simpo.evaluation.results",
    "Evaluation": "simpo.evaluation.results",
    "Interrupted": "simpo.run.stopping",
    "NonFiniteError": "simpo.run.stopping",
    "Recipe": "simpo.recipe",
    "TrainResult": "simpo.trainer",
    "Trainer": "simpo.trainer",
    "compare": "simpo.evaluation.results",
    "evaluate": "simpo.evaluation.run",
    "load_recipe": "simpo.recipe",
    "simpo_loss": "simpo.core.losses",
}
__all__ = ["__version__", "train", *_HOMES]


def train(recipe: str | Path | Mapping[str, Any] | Recipe, **overrides: Any) -> TrainResult:
    """Train as a recipe says.

    Args:
        recipe: a YAML file, a mapping with its keys, or a `Recipe`.
        overrides: keys that win over the recipe's, under any of their names.
    Returns:
        Where the run and its model are, and the last evaluation's metrics.
    Raises:
        ValueError: recipe, data, model or run directory do not fit together.
        OSError: a file of the run cannot be written any more; says where it can be resumed from.
        simpo.Interrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint was saved first.
        simpo.NonFiniteError: a loss or gradient is not finite.
    """
    from simpo.recipe import load_recipe
    from simpo.streams import lasting_streams
    from simpo.trainer import Trainer

    with lasting_streams():
        return Trainer(load_recipe(recipe, overrides)).run()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value = version("simpo")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'simpo' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
