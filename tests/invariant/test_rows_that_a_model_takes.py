"""An architecture that cannot be packed trains padded, and says so in one line; on every host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from simpo.display import Display
from simpo.hosts.hf import SimPOConfig, SimPOTrainer
from simpo.model.load import load_model
from simpo.model.settle import notes_of
from simpo.recipe import load_recipe
from simpo.trainer import Trainer

FAMILIES: dict[str, Any] = {
    "its state runs over the ends of texts": transformers.MambaConfig(
        vocab_size=420, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0
    ),
    "its attention is its own": transformers.BloomConfig(vocab_size=420, hidden_size=32, n_layer=2, n_head=4),
    "its attention has sinks": transformers.GptOssConfig(
        vocab_size=420,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
WHY = {
    "its state runs over the ends of texts": "MambaForCausalLM does not take packed ones (packed log-probs differ",
    "its attention is its own": "BloomForCausalLM does not take packed ones (its attention is not transformers'",
    "its attention has sinks": "GptOssForCausalLM does not take packed ones (attention sinks",
}


def build(family: str, saved_model: Any) -> str:
    torch.manual_seed(0)
    return saved_model(transformers.AutoModelForCausalLM.from_config(FAMILIES[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_padded_and_says_so(
    family: str, tiny_recipe: dict[str, Any], saved_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**tiny_recipe, "model_name_or_path": build(family, saved_model), "max_steps": 2}
    trainer = Trainer(load_recipe(settings), display=Display())
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"rows are padded, which is slower: {WHY[family]}") == 1
    assert not trainer.recipe.pack
    trainer.run()
    saved = load_recipe(str(trainer.output_dir / "recipe.yaml"))
    assert (saved.pack, saved.share_prompt) == (False, False)
    resumed = Trainer(load_recipe({**settings, "resume_from_checkpoint": True}), display=Display(quiet=True))
    assert resumed.progress.step == 2


def test_the_hugging_face_host_does_alike(pair_files: Path, tiny_model: Path, tmp_path: Path, saved_model: Any) -> None:
    folder = build("its state runs over the ends of texts", saved_model)
    args = SimPOConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, bf16=False, max_length=96, report_to=[], save_strategy="no"
    )
    rows = [json.loads(line) for line in (pair_files / "train.jsonl").read_text().splitlines()]
    trainer = SimPOTrainer(folder, args, train_dataset=rows)
    assert not trainer.recipe.pack
    assert trainer.train().metrics["train_loss"] > 0


def test_what_needs_packed_rows_is_named(saved_model: Any) -> None:
    settings = {"model_name_or_path": build("its attention is its own", saved_model), "bf16": False}
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch needs packed rows, which BloomForCausalLM"):
        load_model(load_recipe({**settings, "max_tokens_per_micro_batch": 64}), device=torch.device("cpu"))


def test_a_model_that_packs_has_nothing_to_say(tiny_model: Path) -> None:
    recipe = load_recipe({"model_name_or_path": str(tiny_model), "bf16": False})
    assert notes_of(load_model(recipe, device=torch.device("cpu"))) == []
