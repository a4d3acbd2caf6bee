"""Trap 70: LoRA on the embedding of a tied model: adapter and merged model differed by 8.7 in logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from simpo.hosts.hf import SimPOConfig, SimPOTrainer
from simpo.model.attention import plain_attention
from simpo.model.load import load_model
from simpo.recipe import load_recipe

KEYS = {"use_peft": True, "bf16": False, "lora_dropout": 0.0}


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_target_modules": ["q_proj", "embed_tokens"]},
        {"lora_modules_to_save": ["embed_tokens"]},
    ],
)
def test_adapters_that_the_head_does_not_have_are_refused(keys: dict[str, Any], tiny_model: Path):
    recipe = load_recipe({"model_name_or_path": str(tiny_model), **KEYS, **keys})
    with pytest.raises(ValueError, match="embed_tokens shares its weight with the output head"):
        load_model(recipe, device=torch.device("cpu"))


def test_an_adapted_model_that_is_handed_over_is_refused_too(tiny_model: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    rows = [{"prompt": "one?", "chosen": "water", "rejected": "stone"}] * 2
    args = SimPOConfig(output_dir=str(tmp_path), report_to=[], bf16=False)
    with pytest.raises(ValueError, match="embed_tokens shares its weight with the output head"):
        SimPOTrainer(str(tiny_model), args, train_dataset=rows, peft_config=adapters)


def test_on_an_untied_model_they_train_and_merge_to_the_same_logits(model_folder):
    recipe = load_recipe(
        {"model_name_or_path": model_folder(), **KEYS, "lora_target_modules": ["q_proj", "embed_tokens"]}
    )
    model = load_model(recipe, device=torch.device("cpu")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), plain_attention(model):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        ids = torch.randint(5, 400, (1, 16), generator=generator)
        adapted = model(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path)(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
