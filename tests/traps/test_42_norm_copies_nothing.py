"""Trap 42: the norm of bf16 gradients copies all of them to fp32 first, 30 GiB at 8B. Here nothing is copied."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpo.recipe import load_recipe
from simpo.run.optim import build_optimizer, clip_gradients, gradient_norm

# Weights of one block of Llama-3-8B, and how many blocks, embeddings and norms there are.
BLOCK = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336), (4096,)]
SHAPES = [(128256, 4096), *BLOCK * 32, (4096,), (128256, 4096)]


class NewBytes(TorchDispatchMode):
    """Bytes of every new storage that operations return: in total, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.total += tensor.untyped_storage().nbytes()
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def holding(gradients: list[Tensor]) -> nn.Module:
    """A module whose parameters have these gradients."""
    module = nn.Module()
    for number, gradient in enumerate(gradients):
        parameter = nn.Parameter(torch.empty_like(gradient))
        parameter.grad = gradient
        module.register_parameter(f"p{number}", parameter)
    return module


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_on_an_accelerator_the_norm_of_8b_gradients_takes_bytes_per_tensor_not_per_number(device: str) -> None:
    with FakeTensorMode():
        model = holding([torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in SHAPES])
        with NewBytes() as new:
            norm = gradient_norm(model)
    assert norm.dtype == torch.float64
    assert norm.device.type == device
    assert sum(math.prod(shape) for shape in SHAPES) > 7.9e9
    assert new.total <= 64 * len(SHAPES)


def test_on_a_cpu_a_piece_at_a_time_is_widened() -> None:
    generator = torch.Generator().manual_seed(0)
    model = holding([torch.randn(size, generator=generator).bfloat16() for size in [(3000, 4001), (5,), (4096, 1024)]])
    exact = float(torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm())
    with NewBytes() as new:
        norm = clip_gradients(model, 1.0)
    assert new.largest <= 2**24
    assert norm == pytest.approx(exact, rel=1e-7)
    clipped = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    assert float(clipped.norm()) == pytest.approx(1.0, rel=2**-8)


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.bfloat16, torch.float32, torch.float64]])
def test_the_accelerators_way_of_adding_is_the_norm(dtypes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls on a CPU, which takes them too; widths and odd strides mixed."""
    from simpo.parallel import sharding

    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(40, 30, generator=generator).to(dtypes[i % len(dtypes)]) for i in range(7)]
    parts.append(torch.randn(30, 40, generator=generator).to(dtypes[0]).T)
    parts.append(torch.empty(0, 4, dtype=dtypes[0]))  # a shard without a row
    exact = float(torch.cat([part.double().flatten() for part in parts]).norm())

    class Elsewhere:
        type = "an accelerator"

    class Part(Tensor):
        device = Elsewhere()

    first = parts[0].as_subclass(Part)
    total = float(sharding._sum_of_squares([first, *parts[1:]])) ** 0.5
    assert total == pytest.approx(exact, rel=1e-6)
    assert float(sharding._sum_of_squares(parts)) ** 0.5 == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_bf16"])
def test_no_optimizer_takes_temporaries_of_all_weights_at_once(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own choice on CUDA does: the roots of every second moment stand in memory together."""
    torchs = importlib.import_module("torch.optim.optimizer")  # `torch.optim.optimizer` itself is not there
    monkeypatch.setattr(torchs, "_get_foreach_kernels_supported_devices", lambda: ["cpu", "cuda"])
    model = holding([torch.randn(64, 64) for _ in range(20)])
    recipe = load_recipe({"model_name_or_path": "none", "optim": optim})

    def largest_list(optimizer: torch.optim.Optimizer) -> int:
        with ListLengths() as lists:
            optimizer.step()
        return lists.longest

    assert largest_list(build_optimizer(model, recipe)) == 0
    assert largest_list(torch.optim.AdamW(model.parameters())) == 20


class ListLengths(TorchDispatchMode):
    """The longest list of new tensors that one operation returns."""

    longest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, list | tuple) and "foreach" in str(func):
            self.longest = max(self.longest, len(out))
        return out
