"""Planned peaks beside counted ones: the trainer's whole step at 1B and 8B, on tensors with sizes and no memory.

The tensors say that they are on the CPU, for which torch has autograd everywhere; what the trainer chooses by device
is told that they are on a GPU.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from simpo.core import attention, logprobs
from simpo.core.batch import build_batch
from simpo.core.packing import TokenPair
from simpo.model.attention import PACKED, unwrap
from simpo.model.head import compute_pair_logps, install_head
from simpo.model.load import add_adapters, lora_config
from simpo.model.low_memory import install_low_memory_blocks
from simpo.parallel.mesh import MeshSizes
from simpo.plan.footprint import RUNTIME_BYTES, compute_footprint, step_options
from simpo.plan.shapes import build_config
from simpo.plan.sizes import describe_model
from simpo.recipe import load_recipe
from simpo.run import adamw
from simpo.run.optim import build_optimizer, clip_gradients

ON_A_GPU = {"device": torch.device("cuda", 0), "is_cuda": True}
TOKENS = 4096


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still exist; numbers read off a tensor are 1."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512  # torch's allocator on CUDA

        def drop(_: Any) -> None:
            del self._known[key]
            self.now -= size

        if key not in self._known:
            self._known[key] = weakref.ref(storage, drop)
            self.now += size
            self.peak = max(self.peak, self.now)


def build_fake(shape: str, recipe: Any, fakes: FakeTensorMode) -> nn.Module:
    """The model as `load_model` sets it up, from its configuration."""
    with torch.device("meta"):
        dtype = getattr(torch, recipe.master_dtype)
        model = AutoModelForCausalLM.from_config(build_config(shape), attn_implementation=PACKED, dtype=dtype).train()
        if recipe.use_peft:
            model = add_adapters(model, lora_config(recipe), seed=0)
    install_head(model)
    install_low_memory_blocks(model)
    if recipe.gradient_checkpointing:
        base = unwrap(model)  # transformers 5.17 has the older name alone
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
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


def counted_peaks(shape: str, recipe: Any) -> dict[str, int]:
    """The most that each part of a step holds, all blocks counted; gradients of an earlier micro-batch are there."""
    chosen = (TOKENS - 1) // 2
    ids = [0] + [1] * chosen, [0] + [2] * (TOKENS - 1 - chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
            model = build_fake(shape, recipe, fakes)
            held, peaks = Held(), {}
            with held:
                for tensor in (*model.parameters(), *model.buffers()):
                    held.add(tensor)
                for weight in model.parameters():
                    weight.grad = torch.empty_like(weight) if weight.requires_grad else None
                optimizer = build_optimizer(model, recipe)
                optimizer.step()  # makes the moments
                batch = build_batch([TokenPair("counted", ids[0], 1, ids[1], 1)])

                def forward_and_backward() -> None:
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        logps = compute_pair_logps(model, batch)
                    (logps.chosen_sum / logps.chosen_length - logps.rejected_sum).sum().backward()

                parts = {"passes": forward_and_backward, "clip": lambda: clip_gradients(model, 0.1)}
                for name, part in (parts | {"update": optimizer.step}).items():
                    held.peak = held.now
                    part()
                    peaks[name] = held.peak
    return peaks


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    path = attention.attention_path

    def on_a_gpu(query: torch.Tensor, value: torch.Tensor, **options: Any) -> str:
        pretended = (SimpleNamespace(dtype=t.dtype, shape=t.shape, **ON_A_GPU) for t in (query, value))
        return path(*pretended, **options)

    monkeypatch.setattr(attention, "attention_path", on_a_gpu)
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", logprobs.CHUNK_BYTES_CUDA)
    monkeypatch.setattr(logprobs, "SLICE_BYTES", logprobs.SLICE_BYTES_CUDA)
    monkeypatch.setitem(adamw.PIECE, "cpu", adamw.PIECE["cuda"])
    pieces = adamw._pieces
    monkeypatch.setattr(adamw, "_pieces", lambda *of: itertools.islice(pieces(*of), 3))  # of up to 960 alike


CASES = {
    "fp32 masters": {},
    "fp32 masters, plain AdamW": {"optim": "adamw_torch"},
    "bf16": {"master_dtype": "bfloat16", "optim": "adamw_bf16"},
    "LoRA in bf16": {"master_dtype": "bfloat16", "use_peft": True, "lora_dropout": 0.0},
}


@pytest.mark.parametrize(
    ("shape", "numbers", "checkpointing"),
    [
        ("llama-1b", "fp32 masters", False),
        ("llama-1b", "fp32 masters", True),
        ("llama-1b", "fp32 masters, plain AdamW", True),
        ("llama-1b", "bf16", False),
        ("llama-1b", "LoRA in bf16", True),
        ("llama-8b", "fp32 masters", False),
        ("llama-8b", "bf16", True),
    ],
)
def test_the_planned_peak_is_within_a_tenth_of_the_counted_one(shape, numbers, checkpointing, as_on_a_gpu):
    """But for what no count of tensors sees: the runtime's memory and the workspace inside attention's kernel."""
    keys = CASES[numbers] | {"gradient_checkpointing": checkpointing}
    recipe = load_recipe({"model_name_or_path": shape, **keys})
    counted = counted_peaks(shape, recipe)
    planned = compute_footprint(describe_model(build_config(shape)), step_options(recipe), MeshSizes(), tokens=TOKENS)
    size = planned.total - RUNTIME_BYTES - planned.parts.get("attention's workspace", 0)
    assert 0.9 <= size / max(counted.values()) <= 1.1
    assert counted["clip"] < 1.001 * min(counted.values()), "clipping copies nothing"
