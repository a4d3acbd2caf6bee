"""Trap 36: what a checkpoint holds and the class that trains does not load is missing from the final model.

It is named at start and carried over as it is, with the checkpoint's own configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run.leftovers import find_leftovers
from simpo.trainer import Trainer

TEXT = {
    **{"vocab_size": 420, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
    return found


def train(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    changes = {"max_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 0.01, "save_dtype": "float32"}
    recipe = load_recipe({**settings, **changes})
    trainer = Trainer(recipe, display=Display())
    trainer.run()
    return trainer.output_dir / "model", " ".join(capsys.readouterr().out.split())


def test_a_vision_tower_is_carried_over(
    tiny_recipe: dict[str, Any], saved_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3_5Config(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False)
    folder = Path(saved_model(transformers.Qwen3_5ForConditionalGeneration(config)))
    (folder / "preprocessor_config.json").write_text("{}")
    model_dir, said = train({**tiny_recipe, "model_name_or_path": str(folder)}, capsys)
    assert "tensors (model.visual) that Qwen3_5ForCausalLM does not have" in said
    before, after = tensors_of(folder), tensors_of(model_dir)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("visual" in name), name
    config = json.loads((model_dir / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3_5", ["Qwen3_5ForConditionalGeneration"])
    assert (model_dir / "preprocessor_config.json").is_file()
    whole = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(model_dir)
    text = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    assert torch.equal(whole.lm_head.weight, text.lm_head.weight)


def test_a_prediction_head_is_carried_over(
    tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also beside a tied output embedding, which is in no file."""
    folder = tmp_path / "with-mtp"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    further = {"mtp.layers.0.proj.weight": torch.full((3, 5), 7.0), "mtp.norm.weight": torch.ones(3)}
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file({**weights, **further, **tied}, folder / "model.safetensors", metadata={"format": "pt"})
    model_dir, said = train({**tiny_recipe, "model_name_or_path": str(folder)}, capsys)
    assert "2 tensors (mtp) that LlamaForCausalLM does not have" in said
    after = tensors_of(model_dir)
    assert {name: value.tolist() for name, value in after.items() if "mtp" in name} == {
        name: value.tolist() for name, value in further.items()
    }
    again = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    assert torch.equal(again.lm_head.weight, after["model.embed_tokens.weight"])
    assert not torch.equal(again.lm_head.weight, tied["lm_head.weight"])


def test_names_that_do_not_tell_what_is_held_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    weights["mtp.norm.weight"] = torch.ones(3)
    weights["model.final_norm.weight"] = weights.pop("model.norm.weight")
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoint has .* and LlamaForCausalLM has model\.norm\.weight"):
        find_leftovers(model, str(tmp_path))


def test_a_checkpoint_that_is_loaded_whole_has_no_leftovers(tiny_model: Path) -> None:
    assert find_leftovers(transformers.AutoModelForCausalLM.from_pretrained(tiny_model), str(tiny_model)) is None
