"""core.low_memory and model.low_memory: the same values and gradients as autograd's own, from less that is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from simpo.core.batch import build_batch
from simpo.core.low_memory import gated_silu, rms_norm
from simpo.model.head import compute_token_logps
from simpo.model.load import checkpoint_activations
from simpo.model.low_memory import install_low_memory_blocks


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def written_out(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as its paper has it."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


def test_rms_norm_equals_its_formula_in_values_and_gradients():
    x, weight, direction = randn(2, 7, 12), randn(12, seed=1), randn(2, 7, 12, seed=2).detach()
    actual, expected = rms_norm(x, weight, eps=0.1), written_out(x, weight, 0.1)
    assert relative_difference(actual, expected) < 1e-14
    for a, e in zip(
        torch.autograd.grad(actual, (x, weight), direction),
        torch.autograd.grad(expected, (x, weight), direction),
        strict=True,
    ):
        assert relative_difference(a, e) < 1e-13


def test_rms_norm_and_gated_silu_pass_gradcheck():
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=1e-3), (randn(3, 5), randn(5, seed=1)))
    assert torch.autograd.gradcheck(gated_silu, (randn(3, 5), randn(3, 5, seed=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_transformers_in_their_dtype(dtype: torch.dtype):
    norm = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    x = (3 * randn(9, 64, dtype=torch.float32).detach()).to(dtype)
    actual = rms_norm(x, norm.weight, eps=1e-5)
    assert actual.dtype == norm(x).dtype
    assert relative_difference(actual.float(), norm(x).float()) <= (1e-6 if dtype == torch.float32 else 2**-8)


def test_rms_norm_hands_over_the_dtype_that_was_asked_for():
    x, weight = randn(4, 8, dtype=torch.float32), randn(8, dtype=torch.float32, seed=1)
    half = rms_norm(x, weight, eps=1e-6, out_dtype=torch.bfloat16)
    assert torch.equal(half, rms_norm(x, weight, eps=1e-6).to(torch.bfloat16))
    half.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen: int):
    inputs = [randn(4, 8), randn(8, seed=1)]
    inputs[frozen] = inputs[frozen].detach()
    rms_norm(*inputs, eps=1e-6).square().sum().backward()
    assert inputs[frozen].grad is None
    assert inputs[1 - frozen].grad is not None


def test_gated_silu_equals_torch_and_rounds_no_more_in_bf16():
    gate, up = randn(50, 30, dtype=torch.float32), randn(50, 30, dtype=torch.float32, seed=1)
    assert torch.equal(gated_silu(gate, up), F.silu(gate) * up)
    half = gated_silu(gate.bfloat16(), up.bfloat16())
    assert torch.equal(half, F.silu(gate.bfloat16()) * up.bfloat16())


def gradients(model: nn.Module, batch: Any) -> list[Tensor]:
    model.zero_grad()
    logps = compute_token_logps(model, batch)
    logps.square().mean().backward()
    return [logps.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", [{}, {"pack": False}, {"share_prompt": False}])
def test_low_memory_blocks_change_no_log_prob_and_no_gradient(
    random_model, ragged_pairs, architecture, checkpointing, layout
):
    model, pairs = random_model(architecture), ragged_pairs(4)
    batch = build_batch(pairs, **layout)
    names = [name for name, _ in model.named_parameters()]
    expected = gradients(model, batch)
    assert install_low_memory_blocks(model) == 2
    assert [name for name, _ in model.named_parameters()] == names
    if checkpointing:
        checkpoint_activations(model)
    largest = max(float(e.abs().max()) for e in expected[1:])
    for name, a, e in zip(["logps", *names], gradients(model, batch), expected, strict=True):
        assert float((a - e).abs().max()) <= 2e-6 * largest + 2e-5 * float(e.abs().max()), name


def test_other_architectures_are_left_alone(random_model):
    assert install_low_memory_blocks(random_model("Gemma2")) == 0


class _RowsOf(nn.Module):
    """Counts the rows that pass through a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.rows = 0
        layer.register_forward_hook(self.count)

    def count(self, layer: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        self.rows += args[0].shape[:-1].numel()


def test_the_last_mlp_computes_the_rows_that_are_read_and_no_others(random_model, ragged_pairs):
    model, batch = random_model("Llama"), build_batch(ragged_pairs(4))
    install_low_memory_blocks(model)
    first, last = (_RowsOf(model.model.layers[i].mlp.up_proj) for i in (0, 1))
    compute_token_logps(model, batch)
    assert first.rows == batch.num_tokens
    assert last.rows == len(set(batch.source_rows.tolist())) < batch.num_tokens


def test_an_ordinary_forward_after_a_packed_one_computes_every_row(random_model, ragged_pairs):
    model = random_model("Llama")
    model.set_attn_implementation("sdpa")
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    model.set_attn_implementation("simpo_packed")
    install_low_memory_blocks(model)
    compute_token_logps(model, build_batch(ragged_pairs(2)))
    model.set_attn_implementation("sdpa")
    assert float((model(ids).logits - expected).detach().abs().max()) < 1e-5


def test_low_memory_blocks_keep_less(random_model, ragged_pairs):
    def kept_bytes(model: nn.Module) -> int:
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with keeping, torch.autocast("cpu", dtype=torch.bfloat16):
            compute_token_logps(model, build_batch(ragged_pairs(40)))
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    plain, low_memory = random_model("Llama", num_hidden_layers=6), random_model("Llama", num_hidden_layers=6)
    install_low_memory_blocks(low_memory)
    assert kept_bytes(low_memory) < 0.75 * kept_bytes(plain)
