"""`simpo generate`: prompts to responses, whatever the batch and the interruption."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simpo.cli import app
from simpo.data.columns import RowError
from simpo.data.preferences import Pair
from simpo.data.tokenize import PairTokenizer
from simpo.evaluation.run import find_tokenizer
from simpo.onpolicy import generate
from simpo.onpolicy.generate import run_generate
from simpo.onpolicy.journal import read_about, read_rows
from simpo.onpolicy.prompts import read_prompts
from simpo.onpolicy.sampler import PromptTokenizer
from simpo.recipe import load_recipe


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """A recipe of twelve prompts of several lengths."""
    rng = random.Random(1)
    rows = [{"prompt": " ".join(rng.choice(["water", "stone", "light"]) for _ in range(1 + 2 * n))} for n in range(12)]
    rows[3] = {"prompt": [{"role": "system", "content": "short"}, {"role": "user", "content": "river?"}]}
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(tiny_model),
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        "dataset_mixer": {str(path): 1.0},
        "bf16": False,
        "num_threads": 1,
        "generate": {"num_samples": 3, "max_new_tokens": 12, "batch_size": 12, "processes": 1},
    }


def changed(settings: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {**settings, "generate": {**settings["generate"], **keys}}


def responses(path: Path) -> dict[str, Any]:
    return {row["id"]: row["responses"] for row in read_rows(path)}


def test_samples_follow_from_seed_and_prompt_alone(settings, tmp_path):
    recipe = load_recipe(settings)
    found = responses(run_generate(recipe))
    assert len(found) == 12
    assert all(len(each) == 3 and len({response["text"] for response in each}) > 1 for each in found.values())
    backwards = tmp_path / "backwards.jsonl"
    lines = Path(next(iter(settings["dataset_mixer"]))).read_text().splitlines()
    backwards.write_text("\n".join(reversed(lines)) + "\n")
    other = {**changed(settings, batch_size=100), "dataset_mixer": {str(backwards): 1.0}}
    again = responses(run_generate(load_recipe(other), output=tmp_path / "again.jsonl"))
    for row_id, expected in found.items():
        for one, two in zip(expected, again[row_id], strict=True):
            assert {**one, "logprob": 0} == {**two, "logprob": 0}
            assert one["logprob"] == pytest.approx(two["logprob"], abs=1e-4)
    reseeded = responses(run_generate(load_recipe(changed(settings, seed=7)), output=tmp_path / "other.jsonl"))
    assert all(reseeded[row_id] != expected for row_id, expected in found.items())


def test_an_interrupted_file_is_finished_as_if_nothing_had_happened(settings):
    recipe = load_recipe(settings)
    path = run_generate(recipe)
    whole, account = path.read_bytes(), read_about(path)
    for cut in random.Random(0).sample(range(1, len(whole)), 5):
        path.write_bytes(whole[:cut])
        run_generate(recipe)
        assert path.read_bytes() == whole
        assert read_about(path) == account


def test_prompts_have_the_tokens_that_training_has_in_front_of_an_answer(settings):
    recipe = load_recipe(settings)
    tokenizer = find_tokenizer(recipe, recipe.model_name_or_path)
    prompts = read_prompts(recipe).prompts
    found = PromptTokenizer(recipe, tokenizer)(prompts)
    pairs = [Pair(prompt.row_id, prompt.turns, "water", "a stone") for prompt in prompts]
    for ids, pair in zip(found, PairTokenizer(tokenizer, max_length=1000)(pairs), strict=True):
        assert not isinstance(pair, RowError)
        assert ids == pair.chosen_ids[: pair.chosen_start]


class Failing:
    """A backend that answers one prompt with too few responses and one with an error."""

    settings, notes = {"model": "none"}, ()

    def generate(self, prompts, done):
        for number, prompt in enumerate(prompts):
            if number == 1:
                yield [(prompt.id, RowError("timeout", "30 s"))]
            elif prompt.id not in done:
                yield [(prompt.id, [generate.Response("water", 2, True)] * (3 - (number == 2)))]


def test_what_is_left_out_is_said_and_the_rest_goes_on(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "_build_backend", lambda recipe: Failing())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    result = CliRunner().invoke(app, ["generate", str(recipe)])
    assert result.exit_code == 3, result.output
    account = read_about(tmp_path / "run" / "responses.jsonl")
    assert {reason: entry["count"] for reason, entry in account["left_out"].items()} == {
        "timeout": 1,
        "fewer responses": 1,
    }
    assert account["rows"] == 10
    assert account["left_out"]["timeout"]["examples"][0] == {"row_id": "prompts.jsonl/train#1", "detail": "30 s"}
