"""The start-up check on models that are spread over processes: the same verdict on all, by the layout that trains."""

from __future__ import annotations

import pytest
import torch
from faults import FAULTS
from mesh_runs import Settings

from simpo.model.load import load_model
from simpo.model.probe import probe_layout
from simpo.parallel.mesh import join_world
from simpo.recipe import load_recipe

SHAPE = {"vocab_size": 509, "initializer_range": 0.2}
FOUND = ("none", "scale in the head 2% high", "rejected one position late", "one token leaks")


def verdicts(settings: Settings) -> dict[str, tuple[bool, float, float]]:
    """Of each fault: whether the layout passes, by how much it differs, and what rounding makes."""
    recipe = load_recipe(settings)
    mesh = join_world(recipe, torch.device("cpu"))
    model = load_model(recipe, device=mesh.device, mesh=mesh, check=False)
    found = {}
    for name in FOUND:
        with FAULTS[name]():
            agreement = probe_layout(model, pack=True, share_prompt=True, bf16=True, mesh=mesh)
        found[name] = (agreement.is_good, agreement.rms, agreement.noise)
    mesh.barrier()
    return found


@pytest.mark.parametrize("mesh", ["dp2", "fsdp2", "tp2", "cp2"])
def test_a_fault_is_found_on_every_mesh_in_bf16(mesh, on_mesh, settings_of):
    first, second = on_mesh(mesh, verdicts, settings_of(mesh, SHAPE, bf16=True))
    assert first == second
    assert {name: passes for name, (passes, _, _) in first.items()} == {name: name == "none" for name in FOUND}
