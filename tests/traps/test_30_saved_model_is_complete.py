"""Trap 30: a saved model lacks its chat template, generation config or tied weights; LoRA without its base's name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run.export import build_model_card
from simpo.trainer import Trainer

MESSAGES = [{"role": "user", "content": "the water and the stone?"}]


def train(settings: dict[str, Any], **changes: Any) -> Trainer:
    trainer = Trainer(load_recipe({**settings, "max_steps": 2, **changes}), display=Display(quiet=True))
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def whole(tiny_recipe_in, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """After a run that trained all weights."""
    return train(tiny_recipe_in(tmp_path_factory.mktemp("whole")), run_name="my-run")


@pytest.fixture(scope="module")
def adapters(tiny_recipe_in, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """After a run that trained LoRA's."""
    pytest.importorskip("peft")
    recipe = tiny_recipe_in(tmp_path_factory.mktemp("adapters"))
    return train(recipe, use_peft=True, lora_r=4, learning_rate=1e-2)


def test_final_model_loads_with_plain_transformers_and_answers(whole: Trainer) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = whole
    folder = trainer.output_dir / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == trainer.tokenizer.chat_template
    assert (folder / "generation_config.json").is_file()
    assert model.config._attn_implementation == "sdpa"
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    for name, value in model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_final_model_has_its_base_models_dtype(tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(half)
    trainer = train(tiny_recipe, model_name_or_path=str(half))
    assert next(trainer.model.parameters()).dtype == torch.float32  # masters
    config = json.loads((trainer.output_dir / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    saved = AutoModelForCausalLM.from_pretrained(trainer.output_dir / "model")
    assert saved.dtype == torch.bfloat16


def test_lora_is_saved_with_its_bases_name_and_loads(adapters: Trainer, tiny_model: Path) -> None:
    import peft

    trainer = adapters
    folder = trainer.output_dir / "model"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert (folder / "chat_template.jinja").is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads an attribute that transformers 5.23 renamed
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    from simpo.model.attention import plain_attention

    with torch.no_grad(), plain_attention(trainer.model):
        trainer.model.eval()
        expected = trainer.model(input_ids=ids).logits
        assert torch.allclose(loaded.eval()(input_ids=ids).logits, expected, atol=1e-6)
        base = loaded.unload()(input_ids=ids).logits
    assert not torch.allclose(base, expected, atol=1e-4)  # the adapters matter


def test_lora_checkpoint_holds_the_adapters_alone(whole: Trainer, adapters: Trainer) -> None:
    def num_elements(trainer: Trainer) -> int:
        metadata = FileSystemReader(trainer.checkpoint_dir / "step-2" / "tensors").read_metadata()
        return sum(m.size.numel() for m in metadata.state_dict_metadata.values() if hasattr(m, "size"))

    trainable = sum(p.numel() for p in adapters.model.parameters() if p.requires_grad)
    steps = 2 * 7 * 2  # AdamW keeps one step count for each of two matrices of seven layers in two blocks
    assert num_elements(adapters) == 3 * trainable + steps  # weights and two moments
    assert num_elements(whole) > 10 * num_elements(adapters)


def test_model_card_records_recipe_data_and_results(whole: Trainer) -> None:
    card = (whole.output_dir / "model" / "README.md").read_text()
    assert "base_model:" not in card.split("---")[1]  # a folder here is nothing to the hub, which refuses it
    of_the_hub = load_recipe(whole.recipe, {"model_name_or_path": "org/base"})
    assert build_model_card(of_the_hub, data={}, results={}).startswith("---\nbase_model: org/base\n")
    at_hand = load_recipe(whole.recipe, {"run_name": None, "output_dir": "."})
    assert f"# {Path.cwd().name}\n" in build_model_card(at_hand, data={}, results={})
    assert "# moved\n" in build_model_card(at_hand, data={}, results={}, folder=Path("elsewhere/moved"))
    for part in ("# my-run", whole.data.fingerprint, "eval_rewards/accuracies", "learning_rate: 0.002", "beta: 2.0"):
        assert part in card, part
