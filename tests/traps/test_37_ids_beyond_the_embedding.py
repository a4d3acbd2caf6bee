"""Trap 37: a tokenizer that is larger than the embedding: checks pass, and training ends in an IndexError.

Refused by `simpo check`, by the audit and at start, with both numbers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from simpo.cli import app
from simpo.data.loader import PairStore
from simpo.data.prepare import prepare_pairs
from simpo.display import Display
from simpo.hosts.hf import SimPOConfig, SimPOTrainer
from simpo.model.load import load_tokenizer
from simpo.recipe import load_recipe
from simpo.trainer import Trainer


@pytest.fixture
def larger_tokenizer(tiny_model: Path, tmp_path: Path):
    """build(rows missing): the tiny model with a smaller embedding; its last tokens are the template's own words."""

    def build(missing: int) -> str:
        folder = tmp_path / f"without-{missing}"
        shutil.copytree(tiny_model, folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
        model.resize_token_embeddings(model.config.vocab_size - missing)
        model.save_pretrained(folder)
        return str(folder)

    return build


def write_recipe(settings: dict[str, Any], tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**settings, **changes}))
    return str(path)


def test_data_with_ids_beyond_the_embedding_is_refused_by_audit_and_start(
    tiny_recipe: dict[str, Any], larger_tokenizer: Any, tmp_path: Path
) -> None:
    settings = {**tiny_recipe, "model_name_or_path": larger_tokenizer(60), "max_steps": 1}
    refusal = r"pair .* holds token \d+, and the model's embedding has \d+ rows, 0 to \d+"
    recipe = load_recipe(settings)
    with pytest.raises(ValueError, match=refusal):
        Trainer(recipe, display=Display(quiet=True))
    said = CliRunner().invoke(app, ["audit", write_recipe(settings, tmp_path)])
    assert said.exit_code == 2
    assert "embedding has" in said.stderr
    tokenizer = load_tokenizer(recipe)
    data = prepare_pairs(recipe, tokenizer, progress=False)
    args = SimPOConfig(output_dir=str(tmp_path / "hf"), max_steps=1, bf16=False, max_length=96, report_to=[])
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"])
    trainer = SimPOTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    with pytest.raises(ValueError, match=refusal):
        trainer.train()


def test_the_middle_responses_of_lists_are_looked_at_too(tiny_recipe: dict[str, Any], scored_lists: Path) -> None:
    recipe = load_recipe({**tiny_recipe, "dataset_mixer": {str(scored_lists): 1.0}, "loss_type": "plackett_luce"})
    data = prepare_pairs(recipe, load_tokenizer(recipe), progress=False).train
    PairStore(data).check_ids(999)
    PairStore(data).check_lengths(500)
    one = {"more_starts": [5], "more_scores": [1.5]}
    other = data.map(lambda row: {"more_ids": [[*row["chosen_ids"], *[999] * 500]], **one})
    with pytest.raises(ValueError, match=r"pair .* holds token 999, and the model's embedding has 999 rows"):
        PairStore(other).check_ids(999)
    with pytest.raises(ValueError, match=r"has a sequence of 5\d\d tokens, but this model takes 500"):
        PairStore(other).check_lengths(500)


def test_check_refuses_a_template_whose_tokens_have_no_embedding(
    tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "extended"
    shutil.copytree(tiny_model, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(folder)
    recipe = write_recipe(tiny_recipe, tmp_path, model_name_or_path=str(folder))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    said = CliRunner().invoke(app, ["check", recipe])
    assert said.exit_code == 0
    assert f"the tokenizer has ids up to {rows}, and the model's embedding {rows} rows; data that holds" in said.stdout
    template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    refused = CliRunner().invoke(app, ["check", recipe, "--chat_template", template])
    assert refused.exit_code == 2
    assert f"ids up to {rows}, and the model's embedding {rows} rows: there is none for '<|turn|>'" in refused.stderr


def test_check_is_quiet_about_a_tokenizer_that_fits(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["check", write_recipe(tiny_recipe, tmp_path)])
    assert said.exit_code == 0
    assert "vocabulary" not in said.stdout
