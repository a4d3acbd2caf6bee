"""Planned moments beside counted ones: the trainer's whole step with the sizes of 1B and 8B, on tensors without memory.

The tensors say that they are on the CPU, for which torch has autograd everywhere, and count as a GPU's. What
bitsandbytes would do on a GPU is stood in for: 4-bit weights by `plan.sizes.FourBitLinear`, 8-bit moments below.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
import weakref
from typing import Any

import pytest
import torch
from cases import rarely
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpo.core.batch import build_batch
from simpo.core.device import every_tensor_counts_as_cuda
from simpo.core.packing import TokenPair
from simpo.model.attention import unwrap
from simpo.model.head import compute_pair_logps, install_head
from simpo.model.load import checkpoint_activations
from simpo.model.low_memory import install_low_memory_blocks
from simpo.parallel.mesh import MeshSizes
from simpo.plan.footprint import RUNTIME_BYTES, compute_footprint
from simpo.plan.shapes import load_config
from simpo.plan.sizes import FourBitLinear, build_on_meta, describe_model
from simpo.plan.trace import _workspace
from simpo.recipe import load_recipe
from simpo.run import adamw
from simpo.run.optim import build_optimizer, clip_gradients

TOKENS = 1024


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still exist; numbers read off a tensor are 1."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._elsewhere: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.add(value)
        self.peak = max(self.peak, self.now + int(_workspace(func, args)))
        return out

    def add(self, tensor: torch.Tensor, *, size: float | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-int(storage.nbytes() if size is None else size) // 512) * 512  # torch's allocator on CUDA

        def drop(_: Any) -> None:
            self._known.pop(key)
            self.now -= size

        if key not in self._known and key not in self._elsewhere:
            self._known[key] = weakref.ref(storage, drop)
            self.now += size
            self.peak = max(self.peak, self.now)

    def empty_on_cpu(self, like: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
        """In place of `run.cpu_memory.empty_on_cpu`: CPU memory, which does not count."""
        before = self.now, self.peak
        host = torch.empty_like(like, dtype=dtype)
        self._elsewhere.add(host.untyped_storage()._cdata)
        self._known.pop(host.untyped_storage()._cdata)
        self.now, self.peak = before
        return host


class EightBitMoments(torch.optim.Optimizer):
    """The memory of bitsandbytes' AdamW8bit: a byte a number and moment, an fp32 scale for 256; fp32 below 4096."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self) -> None:
        for weight in itertools.chain(*(group["params"] for group in self.param_groups)):
            if not self.state[weight]:
                small = weight.numel() < 4096
                for moment in "12":
                    dtype = torch.float32 if small else torch.uint8
                    self.state[weight][f"state{moment}"] = torch.zeros_like(weight, dtype=dtype)
                    if not small:
                        self.state[weight][f"absmax{moment}"] = torch.zeros(-(-weight.numel() // 256))
            weight.add_(weight.grad)


def build_fake(config: Any, recipe: Any, fakes: FakeTensorMode) -> nn.Module:
    """The model as `load_model` sets it up, from its configuration."""
    model = build_on_meta(config, recipe)
    install_head(model)
    install_low_memory_blocks(model)
    if recipe.gradient_checkpointing:
        checkpoint_activations(unwrap(model))
    done: dict[torch.Tensor, Any] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value not in done:
                fake = FakeTensor(fakes, value.detach(), torch.device("cpu"))
                done[value] = nn.Parameter(fake, requires_grad=value.requires_grad)
            module._parameters[name] = done.get(value)
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else FakeTensor(fakes, value, torch.device("cpu"))
    return model


def counted_peaks(config: Any, recipe: Any, monkeypatch: Any) -> dict[str, int]:
    """The most that each part of a step holds, all blocks counted; gradients of an earlier micro-batch are there."""
    chosen = (TOKENS - 1) // 2
    ids = [0] + [1] * chosen, [0] + [2] * (TOKENS - 1 - chosen)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(every_tensor_counts_as_cuda())
        fakes = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = build_fake(config, recipe, fakes)
        held, peaks = Held(), {}
        monkeypatch.setattr(adamw, "empty_on_cpu", held.empty_on_cpu)
        stack.enter_context(held)
        for module in model.modules():
            if isinstance(module, FourBitLinear):  # 4 bits, and for 64 of them an fp32 scale quantised to 8 bits
                held.add(module.weight, size=module.weight.numel() * (0.5 + (1 + 4 / 256) / 64))
        for tensor in (*model.parameters(), *model.buffers()):
            held.add(tensor)
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        if recipe.optim == "adamw_8bit":
            optimizer: Any = EightBitMoments([weight for weight in model.parameters() if weight.requires_grad])
        else:
            optimizer = build_optimizer(model, recipe)
        optimizer.step()  # makes the moments
        batch = build_batch([TokenPair("counted", ids[0], 1, ids[1], 1)])

        def passes() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logps = compute_pair_logps(model, batch)
            (logps.chosen_sum / logps.chosen_length - logps.rejected_sum).sum().backward()

        parts = {"passes": passes, "clip": lambda: clip_gradients(model, 0.1), "update": optimizer.step}
        for name, part in parts.items():
            held.peak = held.now
            part()
            peaks[name] = held.peak
    return peaks


@pytest.fixture
def pieces_of_a_gpu(monkeypatch):
    monkeypatch.setitem(adamw.PIECE, "cpu", adamw.PIECE["cuda"])
    pieces = adamw._pieces
    monkeypatch.setattr(adamw, "_pieces", lambda *of: itertools.islice(pieces(*of), 3))  # of up to 960 alike


BF16 = {"master_dtype": "bfloat16", "optim": "adamw_bf16"}
CASES = {
    "fp32 masters": {},
    "plain AdamW": {"optim": "adamw_torch"},
    "8-bit AdamW": {"optim": "adamw_8bit"},
    "bf16": BF16,
    "bf16, optimizer_offload": BF16 | {"optimizer_offload": True},
    "LoRA in bf16": {"master_dtype": "bfloat16", "use_peft": True},
    "QLoRA": {"use_peft": True, "load_in_4bit": True},
}


@pytest.mark.parametrize(
    ("shape", "numbers", "checkpointing"),
    [
        rarely("llama-1b", "fp32 masters", False),
        rarely("llama-1b", "fp32 masters", True),
        rarely("llama-1b", "plain AdamW", True),
        ("llama-1b", "8-bit AdamW", True),
        rarely("llama-1b", "bf16", False),
        rarely("llama-1b", "LoRA in bf16", False),
        rarely("llama-8b", "fp32 masters", False),
        rarely("llama-8b", "8-bit AdamW", True),
        rarely("llama-8b", "bf16", True),
        rarely("llama-8b", "bf16, optimizer_offload", True),
        rarely("llama-8b", "LoRA in bf16", True),
        ("llama-8b", "QLoRA", True),
    ],
)
def test_planned_moments_are_counted_ones(shape, numbers, checkpointing, pieces_of_a_gpu, monkeypatch):
    """Within a twentieth, and within a tenth of what comes and goes; without the runtime, which no tensor shows.

    All 16 blocks of 1B are counted once, and four otherwise: they are alike.
    """
    keys = CASES[numbers] | {"gradient_checkpointing": checkpointing}
    recipe = load_recipe({"model_name_or_path": shape, **keys})
    config = load_config(shape)
    if (shape, numbers, checkpointing) != ("llama-1b", "fp32 masters", False):
        config.num_hidden_layers = 4
    counted = counted_peaks(config, recipe, monkeypatch)
    model = describe_model(config, recipe)
    totals = compute_footprint(model, recipe, MeshSizes(), tokens=TOKENS).totals
    planned = {"passes": max(totals[moment] for moment in ("forward", "head", "backward"))}
    planned |= {moment: totals[moment] for moment in ("clip", "update")}
    planned = {moment: size - RUNTIME_BYTES for moment, size in planned.items()}
    assert planned == pytest.approx(counted, rel=0.05)
    state = planned["clip"]
    # 4-bit layers are stood in for, and cautiously: that part is 14% too large, 3% of the whole.
    assert planned["passes"] - state == pytest.approx(
        counted["passes"] - state, rel=0.15 if recipe.load_in_4bit else 0.1
    )
