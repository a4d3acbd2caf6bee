"""Align language models with preference pairs by SimPO.

    import simpo

    simpo.train("recipe.yaml", output_dir="runs/first")
    simpo.evaluate("runs/first", "pairs.jsonl").render()

Importing this package imports nothing heavy: each name below is fetched when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from simpo import environment  # noqa: F401  first of all: torch reads these settings when it loads

if TYPE_CHECKING:
    from simpo.core.losses import simpo_loss
    from simpo.evaluate import evaluate
    from simpo.recipe import Recipe, load_recipe
    from simpo.results import Comparison, Evaluation, compare
    from simpo.train import TrainResult

__all__ = [
    "Comparison",
    "Evaluation",
    "Recipe",
    "TrainResult",
    "__version__",
    "compare",
    "evaluate",
    "load_recipe",
    "simpo_loss",
    "train",
]

_HOMES = {
    "Comparison": "simpo.results",
    "Evaluation": "simpo.results",
    "Recipe": "simpo.recipe",
    "TrainResult": "simpo.train",
    "compare": "simpo.results",
    "evaluate": "simpo.evaluate",
    "load_recipe": "simpo.recipe",
    "simpo_loss": "simpo.core.losses",
}


def train(recipe: str | Path | Mapping[str, Any] | Recipe, **overrides: Any) -> TrainResult:
    """Train as a recipe says.

    Args:
        recipe: a YAML file, a mapping with its keys, or a `Recipe`.
        overrides: keys that win over the recipe's, under any of their names.
    Returns:
        Where the run and its model are, and the last evaluation's metrics.
    Raises:
        ValueError: recipe, data, model or run directory do not fit together.
        simpo.train.Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved first.
        simpo.train.NonFiniteError: a loss or gradient is not finite.
    """
    from simpo.recipe import load_recipe
    from simpo.train import Trainer

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


class _Package(ModuleType):
    """Keeps `simpo.train` and `simpo.evaluate` functions, though the modules of these names exist too.

    Python binds an imported submodule as an attribute of its package; for these two that is left out. Their modules
    are reached as `from simpo.train import Trainer`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in ("train", "evaluate"):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
