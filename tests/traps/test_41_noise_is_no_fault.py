"""Trap 41: a start-up limit below a model's own noise refuses every real model in half precision.

The check measures that noise. What is planted here is found all the same, in fp32 and in bf16, on logits as large as a
trained model's.
"""

from __future__ import annotations

import dataclasses
import re
from unittest import mock

import pytest
import torch
from faults import FAULTS, change_logits
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from simpo.model import attention, probe
from simpo.model.attention import PACKED, plain_attention
from simpo.model.head import install_head
from simpo.model.probe import check_forward, probe_layout

PRECISIONS = ["float32", "float32 under autocast", "bfloat16"]


def build_model(precision: str, *, layers: int = 4, largest: float = 20.0) -> PreTrainedModel:
    """A random Llama whose logits reach ±`largest`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=509,
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=PACKED)
    with torch.no_grad(), plain_attention(model):
        logits = model(input_ids=torch.randint(0, 509, (4, 48)), use_cache=False).logits
        model.lm_head.weight.mul_(largest / logits.abs().max())
    install_head(model)
    return model.to(getattr(torch, precision.split()[0]))


def agreement(model: PreTrainedModel, precision: str, *, packed: bool = True) -> probe.Agreement:
    return probe_layout(model, pack=packed, share_prompt=packed, bf16="autocast" in precision)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {precision: build_model(precision) for precision in PRECISIONS}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_planted_fault_is_found_in_every_precision(
    models: dict[str, PreTrainedModel], precision: str, fault: str
) -> None:
    with FAULTS[fault]():
        assert agreement(models[precision], precision).is_good == (fault == "none")


@pytest.mark.parametrize("layers", [1, 8])
@pytest.mark.parametrize("largest", [0.5, 40.0])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_check_passes_however_deep_the_model_and_large_its_logits(
    precision: str, largest: float, layers: int
) -> None:
    model = build_model(precision, layers=layers, largest=largest)
    assert agreement(model, precision).is_good
    assert agreement(model, precision, packed=False).is_good


@pytest.fixture
def another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary rows attend by a kernel that rounds elsewhere: on a CPU short packed rows have the very bits of sdpa."""
    monkeypatch.setattr(attention, "plain_implementation", lambda model: "eager")


def test_what_is_compared_in_half_precision_would_not_pass_as_fp32(another_kernel: None) -> None:
    """Noise is what makes the limit: the same differences in fp32 are refused."""
    found = agreement(build_model("bfloat16"), "bfloat16")
    assert found.is_good
    assert found.rms > 0.01
    assert found.noise is not None
    assert not dataclasses.replace(found, noise=None).is_good


def test_logits_that_are_not_numbers_are_refused(models: dict[str, PreTrainedModel]) -> None:
    with change_logits(lambda logits: logits * float("nan")):
        for precision in PRECISIONS:
            assert not agreement(models[precision], precision).is_good


def test_the_refusal_says_whether_the_padded_layout_would_work(models: dict[str, PreTrainedModel]) -> None:
    with FAULTS["one token leaks"](), pytest.raises(ValueError, match="set pack and share_prompt to false") as refusal:
        check_forward(models["bfloat16"])
    assert re.search(r"packed log-probs differ .* by [\d.]+ nats \(rms, in bfloat16; rounding", str(refusal.value))
    assert str(refusal.value).endswith("that layout agrees")
    said = r"as if logits were scaled by 1\.0.* it cannot be trained"
    with FAULTS["scale in the head 2% high"](), pytest.raises(ValueError, match=said):
        check_forward(models["bfloat16"])


def test_a_fault_at_few_tokens_is_found(models: dict[str, PreTrainedModel], another_kernel: None) -> None:
    """A tenth of the labels may differ more than the others, and not without limit."""
    found = agreement(models["bfloat16"], "bfloat16")
    assert found.rms_of_all < 2.5 * found.noise
    assert not dataclasses.replace(found, rms_of_all=5 * found.noise).is_good


def test_one_unlucky_draw_of_tokens_refuses_no_model(models: dict[str, PreTrainedModel], another_kernel: None) -> None:
    """Only where nothing but the tightest limit speaks against it, and by little."""
    found = agreement(models["bfloat16"], "bfloat16")
    assert dataclasses.replace(found, rms=1.9 * found.limit).is_close
    assert not dataclasses.replace(found, rms=2.1 * found.limit).is_close
    assert not dataclasses.replace(found, rms_of_all=5 * found.noise).is_close
    assert not dataclasses.replace(found, rms=float("nan")).is_close
    close = dataclasses.replace(found, rms=1.9 * found.limit)
    with mock.patch.object(probe._Probe, "_compare_draw", side_effect=[close, close, found]) as draws:
        assert agreement(models["bfloat16"], "bfloat16").is_good
    assert draws.call_count == 3
    with mock.patch.object(probe._Probe, "_compare_draw", side_effect=[close, close, close]):
        assert not agreement(models["bfloat16"], "bfloat16").is_good


def test_positions_that_a_model_does_not_have_are_not_asked_for(models: dict[str, PreTrainedModel]) -> None:
    pairs = probe._probe_pairs(509, 16)
    assert max(len(ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)) == 16
    assert all(1 <= p.chosen_start < len(p.rejected_ids) for p in pairs)
