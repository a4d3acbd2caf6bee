"""`use_liger_kernel`: the right modules get Liger's kernels, the head and the last block's rows stay ours.

Liger's kernels are Triton's. Where Triton is installed they run here in its interpreter; elsewhere functions that
compute the same formulas stand in for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from simpo.core.batch import PackedPairs, build_batch
from simpo.core.packing import TokenPair
from simpo.model.attention import PACKED
from simpo.model.head import LogprobHead, compute_token_logps, install_head
from simpo.model.load import checkpoint_activations
from simpo.model.low_memory import install_liger_kernels, install_low_memory_blocks, why_no_liger
from simpo.model.probe import check_forward

CUDA = torch.device("cuda")
WITH_TRITON = importlib.util.find_spec("triton") is not None


def make_model(architecture: str = "Llama") -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=PACKED,
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).train()
    install_head(model)
    return model


def make_batch() -> PackedPairs:
    tokens = torch.randint(1, 97, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    return build_batch(
        [
            TokenPair("a", tokens[:9], 5, tokens[:5] + tokens[20:27], 5),
            TokenPair("b", tokens[30:42], 4, tokens[30:34] + tokens[50:53], 4),
        ]
    )


def gradients(model: nn.Module, *, autocast: bool = False) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = compute_token_logps(model, make_batch())
    logps.square().mean().backward()
    return [logps.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_close(found: list[Tensor], expected: list[Tensor], *, tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) <= tolerance


# --- with a stand-in -------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A `liger_kernel` that binds forwards to instances as Liger does; says what it was asked for and what it ran."""
    seen: dict[str, Any] = {"norms": 0, "mlps": 0, "rotary": 0, "rows": []}

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        seen["norms"] += 1
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(x)

    def mlp(self: nn.Module, x: Tensor) -> Tensor:
        seen["mlps"] += 1
        seen["rows"].append(x.shape[-2])
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    theirs = modeling_llama.apply_rotary_pos_emb

    def rotary(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen["rotary"] += 1
        return theirs(*args, **kwargs)

    def apply(model: nn.Module, **options: bool) -> None:
        seen["options"] = options
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)
        for module in model.modules():
            if type(module) is modeling_llama.LlamaRMSNorm:
                module.__dict__["forward"] = norm.__get__(module)
            if type(module) is modeling_llama.LlamaMLP:
                module.__dict__["forward"] = mlp.__get__(module)

    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    patch._apply_liger_kernel_to_instance = apply
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    return seen


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_blocks_run_the_kernels_and_make_the_same_update(stand_in, autocast, checkpointing):
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    forward = model.forward
    install_low_memory_blocks(model)
    expected = gradients(model, autocast=autocast)
    model = make_model()
    install_liger_kernels(model)
    install_low_memory_blocks(model)
    if checkpointing:
        checkpoint_activations(model)
    found = gradients(model, autocast=autocast)
    assert_close(found, expected, tolerance=2e-2 if autocast else 1e-5)
    again = 2 if checkpointing else 1
    assert (stand_in["norms"], stand_in["mlps"], stand_in["rotary"]) == (4 * again + 1, 2 * again, 2 * again)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model.lm_head) is LogprobHead
    assert model.forward.__func__ is forward.__func__
    assert stand_in["options"] == {"cross_entropy": False, "fused_linear_cross_entropy": False}


def test_the_last_block_still_computes_only_the_rows_that_are_read(stand_in):
    model, batch = make_model(), make_batch()
    install_liger_kernels(model)
    install_low_memory_blocks(model)
    check_forward(model)
    stand_in["rows"].clear()
    compute_token_logps(model, batch)
    assert stand_in["rows"] == [batch.num_tokens, len(set(batch.source_rows.tolist()))]


def test_what_keeps_liger_from_running_is_said(stand_in, monkeypatch):
    model = make_model()
    assert why_no_liger(model, CUDA) is None
    assert "need a CUDA GPU, and this run computes on cpu" in why_no_liger(model, torch.device("cpu"))
    other = SimpleNamespace(config=SimpleNamespace(model_type="phi"))
    assert why_no_liger(other, CUDA) == "Liger has no kernels for phi"
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    assert "is not installed (pip install 'simpo[liger]')" in why_no_liger(model, CUDA)


def test_a_run_without_a_gpu_says_that_it_goes_on_without_them(tiny_recipe, monkeypatch):
    from simpo.display import Display
    from simpo.recipe import load_recipe
    from simpo.trainer import Trainer

    said: list[str] = []
    monkeypatch.setattr(Display, "say", lambda self, line: said.append(line))
    Trainer(load_recipe({**tiny_recipe, "use_liger_kernel": True, "device": "cpu"}), display=Display(quiet=True))
    (line,) = [line for line in said if "liger" in line.lower()]
    assert line == (
        "use_liger_kernel: without effect here: Liger's kernels need a CUDA GPU, and this run computes on cpu"
    )


# --- Liger's own -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not WITH_TRITON, reason="Liger's kernels need triton")
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
def test_ligers_own_kernels_make_the_same_update_in_tritons_interpreter():
    """In a process of its own: the interpreter is chosen before triton is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == len(INTERPRETED)


INTERPRETED = ("Llama", "Mistral", "Qwen2", "Qwen3")


def help_the_interpreter() -> None:
    """It hands a kernel Python's floats as they are, without the methods of Triton's scalars; and has no libdevice."""
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = convert_floats_too
    norms = importlib.import_module("liger_kernel.ops.rms_norm")
    norms.rsqrt = lambda x: tl.rsqrt(x)  # as the interpreter has it when the kernel runs


if __name__ == "__main__":
    help_the_interpreter()
    for architecture in INTERPRETED:
        plain, fused = make_model(architecture), make_model(architecture)
        install_low_memory_blocks(plain)
        expected = gradients(plain)
        install_liger_kernels(fused)
        install_low_memory_blocks(fused)
        assert fused.model.norm._get_name() == "LigerRMSNorm"
        assert_close(gradients(fused), expected, tolerance=1e-4)
        print(architecture, "equal")
