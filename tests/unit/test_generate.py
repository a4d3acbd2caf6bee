"""`simpo generate`: prompts to responses, whatever the batch and the interruption."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from miniature import sampling_recipe
from typer.testing import CliRunner

from simpo.cli import app
from simpo.data.columns import RowError
from simpo.data.prepare import prepare_pairs
from simpo.evaluation.run import find_tokenizer
from simpo.onpolicy import generate, sampler
from simpo.onpolicy.generate import run_generate
from simpo.onpolicy.journal import read_about, read_rows
from simpo.onpolicy.prompts import read_prompts
from simpo.onpolicy.sampler import PromptTokenizer
from simpo.recipe import load_recipe


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """A recipe of twelve prompts of several lengths."""
    rng = random.Random(1)
    prompts: list[Any] = [" ".join(rng.choices(["water", "stone", "light"], k=1 + 2 * n)) for n in range(12)]
    prompts[3] = [{"role": "system", "content": "short"}, {"role": "user", "content": "river?"}]
    return sampling_recipe(tmp_path, tiny_model, prompts, batch_size=12)


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


@pytest.mark.parametrize(
    "keys",
    [{}, {"auto_insert_empty_system_msg": True}, {"system_prompt": "Be short."}, {"chat_template": "chatml"}],
    ids=lambda keys: next(iter(keys), "as it is"),
)
def test_prompts_have_the_tokens_that_training_has_in_front_of_an_answer(settings, tmp_path, keys):
    """Of rows that training reads, as training reads them."""
    path, rows = tmp_path / "pairs.jsonl", [{"prompt": "river?"}, {"prompt": "two\nlines", "system": "Hush."}]
    path.write_text("".join(json.dumps({**row, "chosen": "yes", "rejected": "no"}) + "\n" for row in rows))
    recipe = load_recipe({**settings, "dataset_mixer": {str(path): 1.0}, "validation_fraction": 0.0, **keys})
    tokenizer = find_tokenizer(recipe, recipe.model_name_or_path)
    found = PromptTokenizer(recipe, tokenizer)(read_prompts(recipe).prompts)
    trained = prepare_pairs(recipe, tokenizer, progress=False).train
    assert found == [row["chosen_ids"][: row["chosen_start"]] for row in trained]


def test_an_entry_that_is_rendered_otherwise_is_refused(settings):
    (path,) = settings["dataset_mixer"]
    mixed = {**settings, "dataset_mixer": {path: {"fraction": 1.0, "chat_template": "chatml"}}}
    with pytest.raises(ValueError, match=r"dataset_mixer: .* has its own chat_template, and all prompts are answered"):
        run_generate(load_recipe(mixed))


def test_columns_that_are_kept_later_go_along_and_a_lost_prompt_is_said_before_sampling(settings, monkeypatch):
    (path,) = settings["dataset_mixer"]
    recipe = load_recipe(settings)
    output = run_generate(recipe)
    before = list(read_rows(output))
    rows = [{**json.loads(line), "answer": f"{n}"} for n, line in enumerate(Path(path).read_text().splitlines())]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(generate, "_fill", lambda journal, *_: None)  # nothing is sampled
    run_generate(load_recipe(changed(settings, keep_columns=["answer"])))
    after = list(read_rows(output))
    assert [row.pop("columns") for row in after] == [{"answer": f"{n}"} for n in range(12)]
    assert after == before
    Path(path).write_text(Path(path).read_text().replace("river?", "brook?"))
    monkeypatch.setattr(generate, "_fill", None)
    with pytest.raises(ValueError, match=r"holds 1 rows, such as .*, that the input no longer has"):
        run_generate(recipe)


def test_a_template_file_counts_by_its_text(settings, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}A{{ m['content'] }}{{ eos_token }}{% endfor %}")
    recipe = load_recipe({**settings, "chat_template": str(template)})
    about = run_generate(recipe).with_suffix(".json")
    template.write_text(template.read_text().replace("A", "B"))
    with pytest.raises(ValueError, match=r"begun with other settings \(generate\.chat_template_digest was "):
        run_generate(recipe)
    older = json.loads(about.read_text())
    del older["settings"]["generate"]["chat_template_digest"]
    about.write_text(json.dumps(older))
    run_generate(recipe)  # begun before the file's text was looked at


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
    assert result.output.count("timeout, as prompts.jsonl/train#1: 30 s") == 1
    account = read_about(tmp_path / "run" / "responses.jsonl")
    assert {reason: entry["count"] for reason, entry in account["left_out"].items()} == {
        "timeout": 1,
        "fewer responses": 1,
    }
    assert account["rows"] == 10
    assert account["left_out"]["timeout"]["examples"][0] == {"row_id": "prompts.jsonl/train#1", "detail": "30 s"}


def texts(path: Path) -> list[list[str]]:
    return [[response["text"] for response in row["responses"]] for row in read_rows(path)]


def test_there_are_no_more_processes_than_memory_has_room_for(settings, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sampler, "num_cores", lambda: 4)
    started = []

    def start(self, batches, places, build):
        started.append(len(places))
        yield []

    monkeypatch.setattr(sampler.LocalBackend, "_by_processes", start)
    for free, expected in ((2**40, 4), (1_250_000, 2)):
        monkeypatch.setattr(sampler, "free_memory", lambda device, free=free: free)
        keys = changed(settings, processes=None, batch_size=3)
        run_generate(load_recipe(keys), output=tmp_path / f"{free}.jsonl")
        assert started.pop() == expected
    assert "note: 2 of 4 processes: each takes about 0.0 GiB" in capsys.readouterr().err


@pytest.mark.long
def test_two_processes_give_the_same_responses(settings, tmp_path):
    one = run_generate(load_recipe(settings))
    two = run_generate(load_recipe(changed(settings, processes=2, batch_size=9)), output=tmp_path / "two.jsonl")
    assert texts(one) == texts(two)


def test_the_way_by_plain_generate_gives_the_same_responses_and_is_said(settings, tmp_path, monkeypatch, capsys):
    shared = run_generate(load_recipe(settings))
    monkeypatch.setattr(sampler, "why_not_shared", lambda model: "as the test wants it")
    plain = run_generate(load_recipe(settings), output=tmp_path / "plain.jsonl")
    assert texts(plain) == texts(shared)
    assert "note: sampled one prompt at a time, which is slower: as the test wants it" in capsys.readouterr().err


def test_stop_texts_end_a_response_and_are_left_out_of_it(settings, tmp_path):
    free = responses(run_generate(load_recipe(settings)))
    stopped = responses(run_generate(load_recipe(changed(settings, stop=["o", "e"])), output=tmp_path / "s.jsonl"))
    cut = 0
    for row_id, each in free.items():
        for before, after in zip(each, stopped[row_id], strict=True):
            places = [place for place, letter in enumerate(before["text"]) if letter in "oe"]
            assert after["text"] == (before["text"][: places[0]] if places else before["text"])
            assert after["finished"] or not places
            cut += bool(places)
    assert cut > 3


def test_adapters_and_run_directories_are_models_too(settings, tmp_path, tiny_model):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from simpo.model.load import add_adapters

    plain = responses(run_generate(load_recipe(settings)))
    run = tmp_path / "trained"
    shutil.copytree(tiny_model, run / "model")
    moved = load_recipe({**settings, "model_name_or_path": str(run)})
    assert responses(run_generate(moved, output=tmp_path / "moved.jsonl")) == plain
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = add_adapters(AutoModelForCausalLM.from_pretrained(tiny_model), config, seed=0)
    model.save_pretrained(tmp_path / "adapter")
    adapted = load_recipe({**settings, "model_name_or_path": str(tmp_path / "adapter")})
    assert responses(run_generate(adapted, output=tmp_path / "adapted.jsonl")) != plain


def test_a_prompt_that_is_too_long_is_left_out_with_the_reason(settings, tmp_path):
    prompts = tmp_path / "long.jsonl"
    prompts.write_text(json.dumps({"prompt": "water"}) + "\n" + json.dumps({"prompt": "stone " * 600}) + "\n")
    recipe = load_recipe({**settings, "dataset_mixer": {str(prompts): 1.0}})
    path = run_generate(recipe)
    assert [row["row_id"] for row in read_rows(path)] == ["long.jsonl/train#0"]
    (example,) = read_about(path)["left_out"]["too long"]["examples"]
    assert example["row_id"] == "long.jsonl/train#1"
    assert "generate.max_new_tokens 12 in 512 positions" in example["detail"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": 0}, "temperature 0 gives 3 equal responses; set generate.num_samples to 1"),
        ({"max_new_tokens": 512}, "max_new_tokens = 512: .* has 512 positions"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, keys, message):
    with pytest.raises(ValueError, match=message):
        run_generate(load_recipe(changed(settings, **keys)))


def test_a_file_begun_by_another_model_is_not_gone_on_with(settings, model_folder):
    run_generate(load_recipe(settings))
    with pytest.raises(ValueError, match=r"begun with other settings \(model was .* and is "):
        run_generate(load_recipe({**settings, "model_name_or_path": model_folder()}))


def test_nor_one_begun_with_another_tokenizer(settings, tmp_path, tiny_model):
    shutil.copytree(tiny_model, other := tmp_path / "another")
    path = run_generate(load_recipe(settings))
    with pytest.raises(ValueError, match=r"tokenizer_digest was (null|None) and is .*another"):
        run_generate(load_recipe({**settings, "tokenizer_name_or_path": str(other)}))
    about = json.loads(path.with_suffix(".json").read_text())
    del about["settings"]["tokenizer_digest"]  # as an earlier version of simpo left it
    path.with_suffix(".json").write_text(json.dumps(about))
    run_generate(load_recipe({**settings, "tokenizer_name_or_path": str(other)}))


NO_END = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"


def test_a_template_without_an_end_of_turn_is_refused_where_nothing_else_ends_one(settings, tmp_path, tiny_model):
    folder = tmp_path / "endless"
    shutil.copytree(tiny_model, folder)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("eos_token", None)
        content.pop("eos_token_id", None)
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(NO_END)
    endless = {**settings, "model_name_or_path": str(folder)}
    with pytest.raises(ValueError, match=r"no end of turn: .* set generate.stop to the text that ends a turn"):
        run_generate(load_recipe(endless))
    assert len(responses(run_generate(load_recipe(changed(endless, stop=["water"]))))) == 12
