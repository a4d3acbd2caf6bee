"""Every supported family through the CUDA path on fake tensors: devices, dtypes and shapes, without a card.

Forward on fake CUDA tensors, the log-prob head included. Backward on fake CPU tensors that take the paths of a GPU,
since autograd's engine wants a device that is there. FlexAttention is compiled, so soft-capped models take the products
in tiles here, as they do on a GPU without triton.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from cases import rarely
from fake_card import HostWaits, cuda_autocast, pretend_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, masking_utils

from simpo.core import attention, logprobs
from simpo.core.batch import build_batch
from simpo.model.attention import PACKED
from simpo.model.head import compute_pair_logps, compute_token_logps, install_head
from simpo.model.low_memory import install_low_memory_blocks

SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 8, **SOFTCAPS},
    "Gemma3Text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "Phi3": {"sliding_window": 8},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.5},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25, "sliding_window": 8},
    "Olmo2": {},
    "SmolLM3": {},
    "Phi": {"num_key_value_heads": 4},
}
ALL = pytest.mark.parametrize(
    ("family", "precision"),
    [
        (family, precision) if precision == "autocast" or family in ("Llama", "Gemma2") else rarely(family, precision)
        for family in FAMILIES
        for precision in ("fp32", "bf16", "autocast")
    ],
)


@pytest.fixture(scope="module", autouse=True)
def card(tmp_path_factory: pytest.TempPathFactory) -> None:
    pretend_cuda(tmp_path_factory.mktemp("guard"))


def build(family: str, precision: str, device: str):
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 131,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{family}Config")(**(settings | FAMILIES[family]))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=dtype).train()
    if device == "cuda":
        to_cuda(model)
    install_head(model)
    install_low_memory_blocks(model)
    return model


def to_cuda(model: nn.Module) -> None:
    """model.to("cuda"), which cannot exchange fake parameters; what is tied stays tied."""
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in moved:
                    there = tensor.detach().to("cuda")
                    moved[tensor] = nn.Parameter(there) if isinstance(tensor, nn.Parameter) else there
                tensors[name] = moved.get(tensor)


@ALL
def test_forward_on_cuda_has_the_right_devices_and_never_waits(
    ragged_pairs, monkeypatch: pytest.MonkeyPatch, family: str, precision: str
) -> None:
    def looked_for(position_ids):
        pytest.fail("transformers looks for packed rows, for which the host waits on a GPU")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked_for)
    pairs = ragged_pairs(3, seed=1)
    with FakeTensorMode(), cuda_autocast(precision == "autocast"):
        model = build(family, precision, "cuda")
        taken = []
        path = attention.attention_path
        monkeypatch.setattr(attention, "attention_path", lambda *a, **k: taken.append(path(*a, **k)) or taken[-1])
        for layout in ({}, {"pack": False}):
            batch = build_batch(pairs, **layout).to("cuda")
            with HostWaits() as waits:
                logps = compute_token_logps(model, batch)
            assert waits.found == []
            assert (logps.shape, logps.dtype, logps.device.type) == (batch.labels.shape, torch.float32, "cuda")
    expected = "matmul" if "attn_logit_softcapping" in FAMILIES[family] else "varlen"
    assert set(taken) == {"blocks" if precision == "fp32" and expected == "varlen" else expected}


@ALL
def test_backward_through_the_paths_of_a_gpu_has_the_right_dtypes(
    ragged_pairs, monkeypatch: pytest.MonkeyPatch, family: str, precision: str
) -> None:
    monkeypatch.setattr(logprobs, "_check_inputs", lambda *given: None)  # on a CPU it looks at the labels
    path = "blocks" if precision == "fp32" else "varlen"
    if "attn_logit_softcapping" not in FAMILIES[family]:
        monkeypatch.setattr(attention, "attention_path", lambda *tensors, **options: path)
    pairs = ragged_pairs(3, seed=1)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        model = build(family, precision, "cpu")
        logps = compute_pair_logps(model, build_batch(pairs))
        (logps.chosen_sum - logps.rejected_sum).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, parameter.dtype), name
