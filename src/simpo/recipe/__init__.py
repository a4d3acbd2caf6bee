"""The settings of a run: every key, what other programs call it, and how a recipe is loaded and checked.

Each name is fetched when it is first used: the table of optimizers is read where no pydantic is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simpo.recipe.checks import METRICS
    from simpo.recipe.keys import KEYS, Key, Recipe
    from simpo.recipe.load import load_recipe, nearest_key
    from simpo.recipe.optimizers import OPTIMIZERS

__all__ = [
    "KEYS",
    "METRICS",
    "OPTIMIZERS",
    "Key",
    "Recipe",
    "load_recipe",
    "nearest_key",
]

_HOMES = {
    "KEYS": "simpo.recipe.keys",
    "Key": "simpo.recipe.keys",
    "METRICS": "simpo.recipe.checks",
    "OPTIMIZERS": "simpo.recipe.optimizers",
    "Recipe": "simpo.recipe.keys",
    "load_recipe": "simpo.recipe.load",
    "nearest_key": "simpo.recipe.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'simpo.recipe' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value
