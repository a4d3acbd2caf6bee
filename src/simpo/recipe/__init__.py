"""The settings of a run: every key, what other programs call it, and how a recipe is loaded and checked."""

from simpo.recipe.checks import METRICS
from simpo.recipe.keys import KEYS, Key, Recipe
from simpo.recipe.load import load_recipe, nearest_key

__all__ = ["KEYS", "METRICS", "Key", "Recipe", "load_recipe", "nearest_key"]
