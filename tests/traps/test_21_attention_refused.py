"""Trap 21: shared prompts on an attention that does not know them become separate documents without a word.

Here attention that is not ours is refused for packed rows, and ours is refused for ordinary ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from simpo.core.batch import build_batch
from simpo.core.packing import TokenPair
from simpo.model.attention import PACKED, plain_attention
from simpo.model.head import compute_token_logps
from simpo.model.load import load_model
from simpo.recipe import load_recipe

PAIRS = [
    TokenPair("a", [*range(20, 32), 50, 51, 52], 12, [*range(20, 32), 60, 61], 12),
    TokenPair("b", [*range(90, 97), 70], 7, [*range(90, 97), 71, 72, 73], 7),
]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("pack", "share"), [(True, True), (True, False), (False, True)])
def test_rows_that_need_our_attention_are_refused_by_any_other(
    tiny_model: Path, implementation: str, pack: bool, share: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=implementation)
    with pytest.raises(ValueError, match=f"need attention 'simpo_packed', not '{implementation}'"):
        compute_token_logps(model, build_batch(PAIRS, pack=pack, share_prompt=share))


def test_what_the_refusal_prevents_is_large_and_silent(tiny_model: Path) -> None:
    """The same packed row and positions through plain sdpa: no warning, and log-probs that are wrong."""
    batch = build_batch(PAIRS)
    ours = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=PACKED)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    with torch.no_grad():
        right = compute_token_logps(ours, batch)
        logits = theirs(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[0, batch.source_rows]
        wrong = torch.log_softmax(logits, -1).gather(1, batch.labels[:, None])[:, 0]
    assert (right - wrong).abs().max() > 0.1


def test_our_attention_refuses_ordinary_rows(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=PACKED)
    with pytest.raises(RuntimeError, match=r"use model\.attention\.plain_attention"):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    with plain_attention(model):
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape[:2] == (1, 3)
    assert model.config._attn_implementation == PACKED


def _config(**changes) -> dict:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes


def test_a_window_that_only_the_mask_knows_is_refused_where_it_matters() -> None:
    """transformers' Qwen2-MoE never tells its attention function of the window, which would be lost here."""
    config = transformers.Qwen2MoeConfig(
        **_config(moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4),
        use_sliding_window=True,
        sliding_window=12,
        max_window_layers=1,
    )
    assert "sliding_attention" in config.layer_types
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    short = [TokenPair("short", [5, 6, 7, 8], 2, [5, 6, 9], 2)] * 4
    assert build_batch(short).num_tokens > 12
    compute_token_logps(model, build_batch(short))  # every sequence fits in the window, though the row is longer
    with pytest.raises(ValueError, match=r"Qwen2MoeAttention attends to 12 tokens at a time .* has 15 tokens"):
        compute_token_logps(model, build_batch(PAIRS))


@pytest.mark.parametrize("packed", [True, False])
def test_soft_capped_attention_is_never_computed_without_its_cap(tmp_path: Path, packed: bool) -> None:
    """transformers' sdpa cannot soft-cap: models that need it get eager attention for their ordinary passes."""
    config = transformers.Gemma2Config(**_config(query_pre_attn_scalar=8, attn_logit_softcapping=0.5))
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path)
    recipe = load_recipe({"model_name_or_path": str(tmp_path), "pack": packed, "share_prompt": packed})
    model = load_model(recipe, device=torch.device("cpu"))
    ids, start = PAIRS[0].chosen_ids, PAIRS[0].chosen_start
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        for together in {packed, False}:
            batch = build_batch(PAIRS, pack=together, share_prompt=together)
            assert torch.allclose(compute_token_logps(model, batch)[: len(expected)], expected, rtol=0, atol=1e-5)
        reference.config.attn_logit_softcapping = None
        for layer in reference.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        without = reference(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        assert (torch.log_softmax(without, -1) - torch.log_softmax(logits, -1)).abs().max() > 1e-2
