"""Trap 35: rotary factors that follow the longest row of a micro-batch: a pair's loss depends on its neighbours.

They are fixed for the run: those of max_length tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from simpo.core.batch import build_batch
from simpo.core.packing import TokenPair
from simpo.model.head import compute_token_logps
from simpo.model.load import load_model
from simpo.model.settle import notes_of
from simpo.recipe import load_recipe
from simpo.run.reference import _cache_path
from simpo.shipping.source import find_source, load_source

SIZES = {
    **{"vocab_size": 420, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
ROPES = {
    "longrope": {**LONGROPE, "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHORT = TokenPair("short", [*range(20, 32), 50, 51, 52], 12, [*range(20, 32), 60, 61], 12)
LONG = TokenPair("long", [*range(100, 196), 50], 90, [*range(100, 190), 61, 62], 90)


def build(saved_model: Any, rope: str) -> str:
    torch.manual_seed(0)
    settings = {**SIZES, "rope_parameters": ROPES[rope], "initializer_range": 0.3}
    if rope == "longrope":
        config = transformers.Phi3Config(
            **settings, max_position_embeddings=256, original_max_position_embeddings=64, eos_token_id=2
        )
    else:
        config = transformers.LlamaConfig(**settings, max_position_embeddings=64)
    return saved_model(transformers.AutoModelForCausalLM.from_config(config))


def load(folder: str, **keys: Any) -> Any:
    recipe = load_recipe({"model_name_or_path": folder, "bf16": False, "max_prompt_length": 40, **keys})
    return load_model(recipe, device=torch.device("cpu"))


def of_the_short_pair(model: Any, *, alone: bool, **layout: bool) -> torch.Tensor:
    pairs = [SHORT] if alone else [SHORT, LONG]
    with torch.no_grad():
        return compute_token_logps(model, build_batch(pairs, **layout))[:5]


@pytest.mark.parametrize("layout", [{}, {"pack": False, "share_prompt": False}], ids=["packed", "padded"])
@pytest.mark.parametrize("rope", ROPES)
def test_a_long_neighbour_changes_nothing(rope: str, layout: dict[str, bool], saved_model: Any) -> None:
    folder = build(saved_model, rope)
    as_published = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    rows = build_batch([SHORT, LONG], pack=False, share_prompt=False)
    with torch.no_grad():
        alone = as_published(input_ids=rows.input_ids[:1, :15]).logits
        beside = as_published(input_ids=rows.input_ids).logits[:1, :15]
    assert (alone - beside).abs().max() > 0.01  # the trap
    model = load(folder, max_length=128)
    alone, beside = (of_the_short_pair(model, alone=alone, **layout) for alone in (True, False))
    assert torch.allclose(alone, beside, rtol=0, atol=1e-5)


def test_short_runs_keep_the_factors_of_short_texts(saved_model: Any) -> None:
    folder = build(saved_model, "longrope")
    model = load(folder, max_length=64)
    assert notes_of(model) == []
    as_published = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = as_published(input_ids=torch.tensor([SHORT.chosen_ids])).logits[0, 11:-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(SHORT.chosen_ids[12:])[:, None])[:, 0]
    assert torch.allclose(of_the_short_pair(model, alone=True)[:3], expected, rtol=0, atol=1e-5)


def test_long_runs_say_that_short_rows_get_the_factors_of_long_ones(saved_model: Any) -> None:
    (note,) = notes_of(load(build(saved_model, "longrope"), max_length=128))
    assert note.startswith("rotary factors (longrope): those of 128 tokens (max_length) for every row")


@pytest.mark.parametrize("rope", [*ROPES, None])
def test_cached_log_probs_of_a_reference_are_of_its_own_factors(rope: str | None, saved_model: Any) -> None:
    config = transformers.LlamaConfig(**SIZES)
    folder = build(saved_model, rope) if rope else saved_model(transformers.AutoModelForCausalLM.from_config(config))
    recipes = [load_recipe({"model_name_or_path": folder, "max_length": length}) for length in (1024, 2048)]
    paths = {_cache_path(recipe, folder, "data", "train") for recipe in recipes}
    assert len(paths) == (2 if rope else 1)


def test_another_number_format_keeps_the_frequencies(saved_model: Any) -> None:
    config = transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3, dtype="bfloat16")
    folder = saved_model(transformers.AutoModelForCausalLM.from_config(config).bfloat16())
    source = find_source(folder)
    model = load_source(source, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    expected = transformers.LlamaForCausalLM(config).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
