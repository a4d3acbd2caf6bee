"""Whether all processes are about to do their parts of the same run. Asked as early as something is known, before
collectives whose shapes follow from it. Must not import the mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from simpo.recipe import Recipe


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """What `check_agreement` compares once there is a recipe: package versions first, which decide the keys."""
    versions = {f"version of {name}": version(name) for name in ("simpo", "torch", "transformers")}
    return versions | {f"recipe key {name}": value for name, value in recipe.to_dict().items()}


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise ValueError, on every process, unless all of them have the same facts. All of them call it.

    Args:
        facts: by name; anything that pickles.
    """
    if not dist.is_initialized():
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(facts))
    for name in {name: None for theirs in everyone for name in theirs}:
        value = everyone[0].get(name)
        others = [rank for rank, theirs in enumerate(everyone) if theirs.get(name) != value]
        if others:
            raise ValueError(
                f"{name}: rank {others[0]} has {everyone[others[0]].get(name)}, rank 0 has {value}"
                + (f" ({len(others)} ranks differ from it)" if len(others) > 1 else "")
                + "; every process needs the same recipe, data, model files and package versions"
            )
