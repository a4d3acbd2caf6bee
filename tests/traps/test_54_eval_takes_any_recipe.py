"""Trap 54: `simpo eval RECIPE` failed for a recipe whose training keys do not fit the padded rows it loads first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from simpo.cli import app
from simpo.display import Display
from simpo.evaluation.run import evaluate
from simpo.trainer import Trainer

TRAINING_ONLY: dict[str, dict[str, Any]] = {
    "limits tokens": {"max_tokens_per_micro_batch": 4096},
    "names a kernel": {"attention_kernel": "matmul"},
    "offloads": {"activation_offload": True, "optim": "adamw_bf16", "optimizer_offload": True},
    "is for QLoRA": {"use_peft": True, "load_in_4bit": True},
    "has a loss that cannot be imported here": {"loss_type": "not_there:loss", "loss_kwargs": {"tau": 1.0}},
    "keeps the best": {"load_best_model_at_end": True, "save_steps": 5, "eval_steps": 5},
}


@pytest.mark.parametrize("what", TRAINING_ONLY)
def test_a_recipe_that_trains_is_evaluated(what: str, tiny_recipe: dict[str, Any], tmp_path: Path):
    path, output = tmp_path / "recipe.yaml", tmp_path / "found.json"
    path.write_text(yaml.safe_dump({**tiny_recipe, **TRAINING_ONLY[what]}))
    result = CliRunner().invoke(app, ["eval", str(path), "--device", "cpu", "--max-pairs", "3", f"--output={output}"])
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text())["num_pairs"] == 3


def test_a_file_is_evaluated_with_a_recipe_of_two_datasets(tiny_recipe: dict[str, Any], pair_files: Path):
    recipe = {**tiny_recipe, "dataset_mixer": {"a": 1.0, "b": 1.0}, "dataset_configs": ["x", "y"], "device": "cpu"}
    found = evaluate(tiny_recipe["model_name_or_path"], pair_files / "test.jsonl", recipe=recipe, progress=False)
    assert found.to_dict()["num_pairs"] == 10


def test_a_misspelt_key_is_an_error_here_too(tiny_recipe: dict[str, Any]):
    with pytest.raises(ValueError, match="unknown key 'max_lenght'"):
        evaluate(tiny_recipe["model_name_or_path"], recipe={**tiny_recipe, "max_lenght": 64})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_adapters_over_four_bits_are_evaluated_over_them(tiny_recipe: dict[str, Any], model_folder: Any):
    """As training evaluated them: the whole base model may not fit the card that it was trained on."""
    pytest.importorskip("bitsandbytes")
    base = str(model_folder(hidden_size=64, intermediate_size=128))
    recipe = {**tiny_recipe, "model_name_or_path": base, "use_peft": True, "load_in_4bit": True, "learning_rate": 0.05}
    trainer = Trainer(recipe, display=Display(quiet=True))
    trainer.run()
    trained = trainer.evaluate()
    expected = trained["eval_logps/chosen"] - trained["eval_logps/rejected"]
    for four_bits, weights in ((True, "4 bits"), (False, "float32")):
        found = evaluate(trainer.output_dir, recipe={**recipe, "load_in_4bit": four_bits}, progress=False).to_dict()
        assert found["settings"]["weights"] == weights
        margin = found["margin"]["value"]
        assert (margin == pytest.approx(expected, abs=1e-4)) is four_bits, (margin, expected)
