"""Trap 34: chance in train mode beyond nn.Dropout: residual dropout, jitter, layer dropout, rates in the configuration.

Two passes in train mode are compared at start. Rates are set to 0; what draws without a rate is kept in eval mode.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from simpo.core.batch import build_batch
from simpo.core.packing import TokenPair
from simpo.display import Display
from simpo.model.head import compute_token_logps, install_head
from simpo.model.load import load_model
from simpo.model.settle import check_rows, notes_of
from simpo.recipe import load_recipe
from simpo.trainer import Trainer

SIZES = {
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, Any] = {
    "residual dropout of a default configuration": transformers.Starcoder2Config(**SIZES, residual_dropout=0.1),
    "jitter of a router": transformers.MixtralConfig(**SIZES, num_local_experts=4, router_jitter_noise=0.2),
    "rates that are read from the configuration": transformers.FalconConfig(
        vocab_size=420, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.3
    ),
    "layer dropout": transformers.OPTConfig(
        vocab_size=420,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
        layerdrop=0.5,
    ),
}
PAIR = TokenPair("a", [*range(20, 32), 50, 51, 52], 12, [*range(20, 32), 60, 61], 12)


def two_passes(model: nn.Module, *, packed: bool) -> list[torch.Tensor]:
    batch = build_batch([PAIR], pack=packed, share_prompt=packed)
    model.train()
    with torch.no_grad():
        return [compute_token_logps(model, batch) for _ in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_passes_in_train_mode_are_the_same(family: str, saved_model) -> None:
    torch.manual_seed(0)
    folder = saved_model(transformers.AutoModelForCausalLM.from_config(FAMILIES[family]))
    packed = FAMILIES[family].model_type != "falcon"
    by_chance = load_model(
        load_recipe({"model_name_or_path": folder, "bf16": False, "disable_dropout": False}), device=torch.device("cpu")
    )
    assert not torch.equal(*two_passes(by_chance, packed=packed))  # the trap
    model = load_model(load_recipe({"model_name_or_path": folder, "bf16": False}), device=torch.device("cpu"))
    assert torch.equal(*two_passes(model, packed=packed))


def test_the_exported_configuration_has_the_rates_of_the_checkpoint(tiny_recipe: dict[str, Any], saved_model) -> None:
    folder = saved_model(
        transformers.AutoModelForCausalLM.from_config(FAMILIES["rates that are read from the configuration"])
    )
    recipe = load_recipe({**tiny_recipe, "model_name_or_path": folder, "max_steps": 1, "eval_strategy": "no"})
    trainer = Trainer(recipe, display=Display(quiet=True))
    trainer.run()
    config = json.loads((trainer.output_dir / "model" / "config.json").read_text())
    assert config["hidden_dropout"] == 0.3


class Noisy(nn.Module):
    """Draws without a rate."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(hidden)
        return hidden * (1 + 0.1 * torch.randn_like(hidden)) if self.training else hidden


def test_what_draws_without_a_rate_is_kept_in_eval_mode_and_named(tiny_model: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="simpo_packed")
    for layer in model.model.layers:
        layer.mlp = Noisy(layer.mlp)
    install_head(model)
    assert not torch.equal(*two_passes(model, packed=True))
    check_rows(model, load_recipe({"model_name_or_path": str(tiny_model)}), bf16=False)
    assert torch.equal(*two_passes(model, packed=True))
    (note,) = notes_of(model)
    assert "Noisy draws at random in train mode" in note
    assert model.model.layers[0].training  # its neighbours train
