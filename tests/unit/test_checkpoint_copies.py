"""Checkpoints on their way to CPU memory: no wait per tensor, and the same memory for every save."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simpo.parallel.mesh import Mesh, MeshSizes
from simpo.run.checkpoint import HostCopies
from simpo.run.digest import digest_tensors


def state(seed: int) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    model = {f"weight {i}": torch.randn(300, 5000, generator=generator).bfloat16() for i in range(3)}
    moment = torch.randn(7, generator=generator)
    return {"model": model, "optimizer": {"step": torch.tensor(3.0), "lr": 1e-3, "moment": moment}}


class Fetches(TorchDispatchMode):
    """Counts what looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_digest_waits_for_nothing_but_its_sums() -> None:
    mesh = Mesh(MeshSizes(), device=torch.device("cpu"))
    with Fetches() as fetches:
        digest = digest_tensors(state(0), mesh)
    assert fetches.count == 0
    assert digest == digest_tensors(state(0), mesh)
    assert digest["model"] == "5aa246f6fd870226"  # of simpo 0.1, whose checkpoints are to be read
    changed = state(0)
    changed["model"]["weight 1"].view(torch.int16)[299, 4999] ^= 1
    assert digest_tensors(changed, mesh)["model"] != digest["model"]


def test_the_digest_leaves_what_it_reads_as_it_is() -> None:
    """Whole numbers of 64 bits in several dimensions were multiplied where they lay."""
    places = torch.arange(12).reshape(3, 4)
    digest_tensors({"model": {"places": places, "doubles": places.double()}}, Mesh(MeshSizes(), device=places.device))
    assert places.equal(torch.arange(12).reshape(3, 4))


def test_a_second_save_is_copied_to_the_memory_of_the_first() -> None:
    copies = HostCopies()
    first = copies.of(state(0))
    places = {name: value.data_ptr() for name, value in first["model"].items()}
    second = copies.of(state(1))
    for name, value in state(1)["model"].items():
        assert torch.equal(second["model"][name], value)
        assert second["model"][name].data_ptr() == places[name]
    assert second["optimizer"]["lr"] == 1e-3
    live = state(1)
    third = copies.of(live)
    live["optimizer"]["step"] += 1
    assert float(third["optimizer"]["step"]) == 3.0


def test_a_tensor_of_another_shape_gets_memory_of_its_own() -> None:
    copies = HostCopies()
    copies.of({"model": {"w": torch.ones(3)}})
    assert torch.equal(copies.of({"model": {"w": torch.zeros(5)}})["model"]["w"], torch.zeros(5))
