"""The settings of a run: every key, what other programs call it, and how a recipe is loaded and checked."""

from simpo.recipe.checks import METRICS
from simpo.recipe.declare import Key
from simpo.recipe.keys import KEYS, Recipe
from simpo.recipe.load import load_recipe, nearest_key
from simpo.recipe.stages import STAGE_KEYS, STAGES

__all__ = ["KEYS", "METRICS", "STAGES", "STAGE_KEYS", "Key", "Recipe", "load_recipe", "nearest_key"]
