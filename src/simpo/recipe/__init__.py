"""The settings of a run: every key, what other programs call it, and how a recipe is loaded and checked."""

from simpo.recipe.keys import KEYS, METRICS, Key, Recipe
from simpo.recipe.load import load_recipe, nearest_key
from simpo.recipe.losses import LOSS_KEYS, LOSS_OPTIONS, LossOptions

__all__ = [
    "KEYS",
    "LOSS_KEYS",
    "LOSS_OPTIONS",
    "METRICS",
    "Key",
    "LossOptions",
    "Recipe",
    "load_recipe",
    "nearest_key",
]
