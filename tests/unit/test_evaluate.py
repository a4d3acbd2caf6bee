"""Evaluation on a tiny random model: the numbers against ordinary logits, the ways to name data and models, the
command, and what goes wrong clearly."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import simpo
from simpo.cli import app
from simpo.data.prepare import prepare_pairs
from simpo.evaluation import command as evaluation_command
from simpo.evaluation import run as evaluation_run
from simpo.evaluation.command import run_eval_command
from simpo.evaluation.generate import generate_greedy
from simpo.evaluation.results import Evaluation, PairRecord, build_evaluation, compare
from simpo.evaluation.run import READ_KEYS, evaluate, ready_model, settings_for
from simpo.model import settle
from simpo.model.attention import PACKED, packed_by
from simpo.model.load import load_tokenizer
from simpo.recipe import load_recipe

DATASET_COLUMNS = ("row_id", "chosen_ids", "chosen_start", "rejected_ids", "rejected_start")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Recipe keys that every evaluation here shares."""
    return {
        "cache_dir": str(tmp_path_factory.mktemp("cache")),
        "preprocessing_num_workers": 1,
        "bf16": False,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def evaluation(tiny_model: Path, pair_files: Path, settings: dict[str, Any]) -> Evaluation:
    return evaluate(str(tiny_model), pair_files, recipe=settings, batch_pairs=3)


@pytest.fixture(scope="module")
def changed_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with noise on its weights, in a run directory's `model/`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = tmp_path_factory.mktemp("run")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(run / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(run / "model")
    return run


def tokenised(tiny_model: Path, pair_files: Path, settings: dict[str, Any]) -> Any:
    recipe = load_recipe(settings, {"model_name_or_path": str(tiny_model), "dataset_mixer": {str(pair_files): 1.0}})
    return prepare_pairs(recipe, load_tokenizer(recipe))


@torch.no_grad()
def dense_logps(model: Any, ids: list[int], start: int) -> torch.Tensor:
    """Log-probs of ids[start:] from the logits of one unpadded sequence."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
    return torch.log_softmax(logits.double(), dim=-1)[range(len(ids) - start), ids[start:]]


def rendered(thing: Any) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        thing.render(console)
        return console.export_text()


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_numbers_equal_a_dense_computation(tiny_model, pair_files, settings, evaluation):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    rows = list(tokenised(tiny_model, pair_files, settings).eval)
    chosen = [dense_logps(model, row["chosen_ids"], row["chosen_start"]) for row in rows]
    rejected = [dense_logps(model, row["rejected_ids"], row["rejected_start"]) for row in rows]
    assert evaluation.num_pairs == len(rows) == 10
    assert [pair.row_id for pair in evaluation.pairs] == [row["row_id"] for row in rows]
    for pair, w, r in zip(evaluation.pairs, chosen, rejected, strict=True):
        assert (pair.chosen_length, pair.rejected_length) == (len(w), len(r))
        assert pair.chosen_sum == pytest.approx(float(w.sum()), abs=1e-3)
        assert pair.rejected_mean == pytest.approx(float(r.mean()), abs=1e-4)
    margins = torch.stack([w.mean() - r.mean() for w, r in zip(chosen, rejected)])
    assert evaluation.accuracy.value == float((margins > 0).double().mean())
    assert evaluation.margin.value == pytest.approx(float(margins.mean()), abs=1e-4)
    sums = torch.stack([w.sum() - r.sum() for w, r in zip(chosen, rejected)])
    assert evaluation.accuracy_sum.value == float((sums > 0).double().mean())
    assert evaluation.chosen_mean == pytest.approx(sum(float(w.mean()) for w in chosen) / 10, abs=1e-4)
    assert evaluation.rejected_sum == pytest.approx(sum(float(r.sum()) for r in rejected) / 10, abs=1e-3)
    assert sum(bucket.num_pairs for bucket in evaluation.accuracy_by_length) == 10
    assert evaluation.settings["rows"] == "packed, shared prompt"


def test_summary_of_known_records():
    pairs = [
        PairRecord("a", -4.0, -9.0, 4, 3),  # means -1, -3: right, right under sums
        PairRecord("b", -20.0, -6.0, 10, 2),  # -2, -3: right, wrong under sums
        PairRecord("c", -8.0, -4.0, 2, 2),  # -4, -2: wrong, wrong
        PairRecord("d", -5.0, -5.0, 5, 5),  # a tie
    ]
    found = build_evaluation(pairs, **identity())
    assert found.accuracy.value == 2.5 / 4
    assert found.accuracy_sum.value == 1.5 / 4
    assert found.margin.value == pytest.approx((2 + 1 - 2 + 0) / 4)
    assert (found.chosen_mean, found.rejected_sum) == (-2.0, -6.0)
    assert [(b.name, b.num_pairs) for b in found.accuracy_by_length] == [("shorter", 0), ("similar", 2), ("longer", 2)]


def test_batches_and_layout_do_not_change_the_numbers(tiny_model, pair_files, settings, evaluation):
    padded = {**settings, "pack": False, "share_prompt": False}
    for found in (
        evaluate(tiny_model, pair_files, recipe=settings, batch_pairs=10),
        evaluate(tiny_model, pair_files, recipe=padded, batch_pairs=4),
    ):
        assert found.data_fingerprint == evaluation.data_fingerprint
        for a, b in zip(found.pairs, evaluation.pairs, strict=True):
            assert a.chosen_sum == pytest.approx(b.chosen_sum, abs=1e-3)
    assert found.settings["rows"] == "padded"


def test_bfloat16_is_the_default_and_close(tiny_model, pair_files, settings, evaluation):
    recipe = {key: value for key, value in settings.items() if key != "bf16"}
    found = evaluate(tiny_model, pair_files, recipe=recipe)
    assert found.settings["compute"] == "bfloat16"
    assert found.chosen_mean != evaluation.chosen_mean
    assert found.chosen_mean == pytest.approx(evaluation.chosen_mean, abs=0.03)


# --- ways to name the data and the model -----------------------------------------------------------------------------


def test_every_way_to_name_the_data_gives_the_same_pairs(tiny_model, pair_files, settings, evaluation, tmp_path):
    prepared = tokenised(tiny_model, pair_files, settings)
    recipe = load_recipe({**settings, "model_name_or_path": "m", "dataset_mixer": {str(pair_files): 1.0}})
    recipe.save(tmp_path / "recipe.yaml")
    columns = prepared.eval.select_columns(list(DATASET_COLUMNS))
    for data, options in (
        (recipe, {}),
        (None, {"recipe": recipe}),
        (tmp_path / "recipe.yaml", {}),
        (prepared, {"recipe": settings}),
        (columns, {"recipe": settings}),
    ):
        found = evaluate(tiny_model, data, **options)
        assert found.data_fingerprint == evaluation.data_fingerprint
        assert found.accuracy == evaluation.accuracy


def test_a_file_is_taken_whole_and_splits_by_name(tiny_model, pair_files, settings):
    assert evaluate(tiny_model, pair_files / "train.jsonl", recipe=settings).num_pairs == 40
    assert evaluate(tiny_model, pair_files, recipe=settings, split="train").num_pairs == 40


def test_a_folder_may_call_its_held_out_pairs_validation(tiny_model, pair_files, settings, tmp_path):
    (tmp_path / "validation.jsonl").write_bytes((pair_files / "test.jsonl").read_bytes())
    (tmp_path / "train.jsonl").write_bytes((pair_files / "train.jsonl").read_bytes())
    found = evaluate(tiny_model, tmp_path, recipe=settings)
    assert (found.num_pairs, found.split) == (10, "validation")


def test_max_pairs_is_a_seeded_choice(tiny_model, pair_files, settings, evaluation):
    found = evaluate(tiny_model, pair_files, recipe=settings, max_pairs=4)
    again = evaluate(tiny_model, pair_files, recipe=settings, max_pairs=4)
    assert found.num_pairs == 4
    assert [p.row_id for p in found.pairs] == [p.row_id for p in again.pairs]
    assert {p.row_id for p in found.pairs} < {p.row_id for p in evaluation.pairs}
    assert any("4 of 10 pairs" in note for note in found.notes)


def test_a_loaded_model_is_left_as_it_was(tiny_model, pair_files, settings, evaluation):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    before = model.config._attn_implementation
    found = evaluate(model, pair_files, recipe=settings, num_generations=1, max_new_tokens=4)
    assert found.accuracy == evaluation.accuracy
    assert found.model == str(tiny_model)
    assert model.training
    assert model.config._attn_implementation == before != PACKED
    assert type(model.lm_head) is torch.nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, model.config.vocab_size)


def test_a_model_whose_packed_rows_do_not_fit_is_evaluated_on_padded_ones(
    tiny_model, pair_files, settings, evaluation, monkeypatch
):
    real = settle.probe_layout

    def disagree(model, **how):
        found = real(model, **how)
        return dataclasses.replace(found, rms_of_all=1.0) if how["pack"] else found

    monkeypatch.setattr(settle, "probe_layout", disagree)
    found = evaluate(tiny_model, pair_files, recipe=settings)
    assert found.settings["rows"] == "padded"
    assert any("packed log-probs differ from the model's ordinary ones by 1 nats" in note for note in found.notes)
    assert found.margin.value == pytest.approx(evaluation.margin.value, abs=1e-4)


@pytest.mark.parametrize(
    ("kernel", "taken", "said"),
    [("auto", None, ()), ("matmul", "matmul", ()), ("varlen", None, ("attention_kernel: varlen cannot be used here",))],
)
def test_the_recipes_kernel_computes_packed_rows_where_it_can(tiny_model, settings, kernel, taken, said):
    own = load_recipe({**settings, "model_name_or_path": str(tiny_model), "attention_kernel": kernel}, only=READ_KEYS)
    with ready_model(str(tiny_model), own) as (model, packed, notes):
        assert (packed, model.config._attn_implementation) == (True, packed_by(taken))
        assert tuple(note.partition(": it needs")[0] for note in notes) == said


# peft 0.21 asks transformers 5.23 for a property it has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_is_evaluated_with_its_base_and_its_tokenizer(
    tiny_model, pair_files, settings, evaluation, tmp_path
):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    found = evaluate(tmp_path / "adapter", pair_files, recipe=settings)
    assert found.data_fingerprint == evaluation.data_fingerprint
    pair, row = found.pairs[0], tokenised(tiny_model, pair_files, settings).eval[0]
    expected = dense_logps(adapted.eval(), row["chosen_ids"], row["chosen_start"]).sum()
    assert pair.chosen_sum == pytest.approx(float(expected), abs=1e-3)
    assert pair.chosen_sum != pytest.approx(evaluation.pairs[0].chosen_sum, abs=1e-2)


# --- generations, files, rendering -----------------------------------------------------------------------------------


def test_generations_come_with_their_prompt_and_repetition(tiny_model, pair_files, settings):
    found = evaluate(tiny_model, pair_files, recipe=settings, num_generations=3, max_new_tokens=12, batch_pairs=2)
    assert [g.row_id for g in found.generations] == [p.row_id for p in found.pairs[:3]]
    for generation in found.generations:
        assert generation.prompt.startswith("<|im_start|>user")
        assert 0 <= generation.repeated_share < 1
    assert found.to_dict()["repeated_share"] == pytest.approx(sum(g.repeated_share for g in found.generations) / 3)
    assert found.generations[0].row_id in rendered(found)


def test_saved_json_and_pairs_say_the_same(evaluation, tmp_path):
    evaluation.save(tmp_path / "deep" / "result.json")
    evaluation.save_pairs(tmp_path / "pairs.jsonl")
    result = json.loads((tmp_path / "deep" / "result.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert result["accuracy"]["value"] == evaluation.accuracy.value
    assert result["versions"]["torch"] == version("torch")
    assert "pairs" not in result
    assert len(records) == result["num_pairs"]
    assert sum(r["margin"] for r in records) / len(records) == pytest.approx(result["margin"]["value"])
    assert list(tmp_path.glob(".*")) == []


def test_results_are_there_once_all_of_them_are(evaluation, tmp_path, monkeypatch):
    """A sweep goes on from them."""
    monkeypatch.setattr(type(evaluation), "save_pairs", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        evaluation_command._save(evaluation.to_dict(), evaluation, str(tmp_path / "result.json"))
    assert not (tmp_path / "result.json").exists()


def test_what_is_undefined_is_null_in_json_and_a_dash_on_screen():
    found = build_evaluation([PairRecord("a", -4.0, -9.0, 3, 3)], **identity())
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["length_correlation"] is None
    assert content["margin"]["low"] is None
    assert math.isnan(found.margin.low)
    text = rendered(found) + rendered(compare(found, found))
    assert "preference accuracy" in text
    assert not re.search(r"\b1 pairs", text)


def test_the_table_shows_the_numbers(evaluation):
    text = rendered(evaluation)
    assert f"{evaluation.accuracy.value:.1%}" in text
    assert f"{evaluation.chosen_mean:.4f}" in text
    assert evaluation.data_fingerprint in text


# --- two models ------------------------------------------------------------------------------------------------------


def test_comparison_pairs_rows_by_id(tiny_model, changed_model, pair_files, settings, evaluation):
    other = evaluate(str(changed_model), pair_files, recipe=settings)  # a run directory
    found = compare(evaluation, other)
    margins = torch.tensor([[p.margin for p in e.pairs] for e in (evaluation, other)], dtype=torch.float64)
    right = margins > 0
    assert found.num_pairs == 10
    assert found.accuracy_test[:2] == (int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum()))
    assert found.margin.value == pytest.approx(float((margins[0] - margins[1]).mean()))
    fell = [a.chosen_mean < b.chosen_mean for a, b in zip(evaluation.pairs, other.pairs)]
    assert found.chosen_fell.value == sum(fell) / 10
    assert found.notes == ()
    turned = simpo.compare(other, evaluation)
    assert turned.margin.value == pytest.approx(-found.margin.value)
    assert turned.accuracy_test.p_value == found.accuracy_test.p_value
    shuffled = build_evaluation(other.pairs[::-1], **identity())
    assert compare(evaluation, shuffled).margin == found.margin
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["margin"]["p_value"] == found.margin.p_value
    assert str(tiny_model) in rendered(found)


def test_a_model_equals_itself(evaluation):
    found = compare(evaluation, evaluation)
    assert found.accuracy_test == (0, 0, 1.0)
    assert found.margin[0] == 0.0
    assert found.margin.p_value == 1.0
    assert found.chosen_fell.value == 0.5


def test_other_pairs_do_not_compare():
    one, two = (build_evaluation([PairRecord(name, -1.0, -2.0, 1, 1)], **identity()) for name in "ab")
    with pytest.raises(ValueError, match="2 of 2 pairs were evaluated for one model alone, for example a"):
        compare(one, two)
    twice = build_evaluation([PairRecord("a", -1.0, -2.0, 1, 1)] * 2, **identity())
    with pytest.raises(ValueError, match="same row_id"):
        compare(twice, twice)


def test_other_tokens_are_noted():
    one = build_evaluation([PairRecord("a", -1.0, -2.0, 1, 1)], **identity())
    two = build_evaluation([PairRecord("a", -1.0, -2.0, 2, 1)], **identity())
    assert "nats per token do not compare" in compare(one, two).notes[0]


def identity() -> dict[str, Any]:
    fixed = {"model": "m", "data": "d", "split": None, "data_fingerprint": "f"}
    return fixed | {"generations": (), "settings": {}, "versions": {}, "notes": ()}


# --- the command -----------------------------------------------------------------------------------------------------


def run_command(*words: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, words)])


def test_command_writes_results_comparison_and_pairs(
    tiny_model, changed_model, pair_files, settings, evaluation, tmp_path
):
    output = tmp_path / "out" / "result.json"
    keys = [f"--{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in settings.items()]
    result = run_command(
        pair_files, "--model", tiny_model, "--compare", changed_model, "--output", output, "--generations", 1, *keys,
        "--eval_generation_max_new_tokens", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "preference accuracy" in result.output
    assert "a - b on 10 pairs" in result.output
    content = json.loads(output.read_text())
    assert content["accuracy"]["value"] == evaluation.accuracy.value
    assert content["baseline"]["data_fingerprint"] == content["data_fingerprint"] == evaluation.data_fingerprint
    assert content["comparison"]["num_pairs"] == 10
    assert len(content["generations"]) == 1
    assert len((tmp_path / "out" / "result.pairs.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize("most", [None, 4])
def test_pairs_that_the_other_models_template_refuses_are_left_out_of_both(tiny_model, settings, tmp_path, most):
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, other := tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    system, rows = [{"role": "system", "content": "short"}], []
    for n in range(8):
        prompt = system * (n == 1) + [{"role": "user", "content": f"water {n}?"}]
        rows.append(json.dumps({"prompt": prompt, "chosen": "a river", "rejected": "a stone"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    found = run_eval_command(
        recipe_or_data=str(tmp_path / "pairs.jsonl"),
        model=str(tiny_model),
        baseline=str(other),
        output=str(tmp_path / "found.json"),
        generations=0,
        max_pairs=most,
        split="test",
        overrides=["--bf16", "false", "--cache_dir", str(settings["cache_dir"])],
    )
    assert found["comparison"]["num_pairs"] == found["num_pairs"] == found["baseline"]["num_pairs"] == (most or 7)
    assert any(note.startswith("1 pairs are left out") for note in found["notes"])


def test_command_takes_a_recipe_and_its_model(tiny_model, changed_model, pair_files, settings, tmp_path):
    recipe = {**settings, "model_name_or_path": str(tiny_model), "dataset_mixer": {str(pair_files): 1.0}}
    load_recipe(recipe).save(tmp_path / "recipe.yaml")
    result = run_command(tmp_path / "recipe.yaml", "--max-pairs", 3, "--output", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "a.json").read_text())["model"] == str(tiny_model)
    run_command(tmp_path / "recipe.yaml", "--model", changed_model, "--max-pairs", 3, "--output", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["model"] == str(changed_model / "model")


def test_a_revision_is_that_of_the_recipes_model_and_of_no_other(tmp_path, pair_files, monkeypatch):
    asked = {}

    def refuse(settings, name):
        asked[name] = settings.model_revision
        raise ValueError("enough")

    monkeypatch.setattr(evaluation_command, "find_tokenizer", refuse)
    recipe = {"model_name_or_path": "a/own", "model_revision": "abc", "dataset_mixer": {str(pair_files): 1.0}}
    load_recipe(recipe).save(tmp_path / "recipe.yaml")
    for words in ([], ["--model", "a/other"], ["--model", "a/third", "--model-revision", "xyz"]):
        run_command(tmp_path / "recipe.yaml", *words)
    monkeypatch.setattr(evaluation_run, "find_tokenizer", refuse)
    for name in ("a/own", "a/fourth"):
        with pytest.raises(ValueError, match="enough"):
            evaluate(name, pair_files, recipe=recipe)
    assert asked == {"a/own": "abc", "a/other": None, "a/third": "xyz", "a/fourth": None}


def test_answers_end_with_learned_positions_each_by_itself():
    """Beyond them there is nothing to look up; computed ones go further."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1))
    words = SimpleNamespace(
        eos_token_id=None, batch_decode=lambda ids, skip_special_tokens: [str(each) for each in ids]
    )
    prompts = [[3] * 12, [4, 5], [6] * 16]
    found = generate_greedy(model, words, prompts, max_new_tokens=6)
    assert [len(answer.ids) for answer in found] == [4, 6, 0]
    assert found[1].ids == generate_greedy(model, words, prompts[1:2], max_new_tokens=6)[0].ids


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{data}"], "say with --model"),
        (["{data}", "--model", "./nowhere"], "folder './nowhere' does not exist"),
        (["{data}", "--model", "{model}", "--split", "final"], "no split 'final'"),
        (["{data}/train.jsonl", "--model", "{model}", "--split", "tset"], "is one file, which is read whole"),
        (["{data}", "--model", "{model}", "--compare", "./nowhere"], "folder './nowhere' does not exist"),
        (["{empty}", "--model", "{model}"], "no rows"),
        (["./nowhere.jsonl", "--model", "{model}"], "no such file or folder"),
        (["{data}", "--model", "{model}", "--max_lenght", "64"], "'max_length'"),
        (["./nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_command_explains_bad_input_in_one_line(tiny_model, pair_files, tmp_path, words, message):
    (tmp_path / "empty.jsonl").write_text("")
    places = {"data": pair_files, "model": tiny_model, "empty": tmp_path / "empty.jsonl"}
    result = run_command(*[word.format(**places) for word in words], "--cache_dir", tmp_path / "cache")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert message in line


def test_a_recipe_without_held_out_pairs_says_so(tiny_model, pair_files, settings):
    recipe = {**settings, "validation_fraction": 0, "dataset_mixer": {str(pair_files / "train.jsonl"): 1.0}}
    with pytest.raises(ValueError, match="no held-out pairs"):
        evaluate(tiny_model, load_recipe({**recipe, "model_name_or_path": "m"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "no pairs to evaluate on"),
        ({"data": 3}, "not int"),
        ({"data": "", "recipe": {}}, "is empty"),
        ({"max_pairs": 0}, "max_pairs = 0"),
        ({"batch_pairs": 0}, "batch_pairs = 0"),
        ({"data": {"beta": 2.0}, "recipe": {"beta": 2.0}}, "not both"),
    ],
)
def test_wrong_arguments_are_named(tiny_model, pair_files, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model, **{"data": pair_files, **options})


def test_a_dataset_without_token_columns_or_rows_is_refused(tiny_model, pair_files, settings):
    from datasets import Dataset

    with pytest.raises(ValueError, match="lacks the columns row_id"):
        evaluate(tiny_model, Dataset.from_dict({"prompt": ["a"]}))
    nothing = tokenised(tiny_model, pair_files, settings).eval.select([])
    with pytest.raises(ValueError, match="no pairs to evaluate on"):
        evaluate(tiny_model, nothing)


def test_a_loaded_model_without_a_name_needs_its_tokenizer(pair_files, settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=420, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="pass its tokenizer"):
        evaluate(LlamaForCausalLM(config), pair_files, recipe=settings)


def test_log_probs_that_are_not_finite_stop():
    pairs = [PairRecord("good", -1.0, -2.0, 1, 1), PairRecord("bad", math.nan, -2.0, 1, 1)]
    with pytest.raises(ValueError, match="not finite on 1 of 2 pairs: bad"):
        build_evaluation(pairs, **identity())


def test_another_model_has_a_revision_and_a_tokenizer_of_its_own(tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "own"}')
    keys = {"model_revision": "v2", "tokenizer_name_or_path": "its/tokenizer"}
    settings = load_recipe({"model_name_or_path": "own", **keys})

    def of(name: str, settings: Any = settings) -> tuple[str | None, str | None]:
        found = settings_for(settings, "own", name)
        return found.model_revision, found.tokenizer_name_or_path

    assert of("own") == of(str(adapter)) == ("v2", "its/tokenizer")
    assert of("other") == (None, None)
    assert of("other", load_recipe(settings, {"model_name_or_path": "other"})) == (None, "its/tokenizer")


def test_the_recipe_says_how_many_pairs_go_through_at_once(
    tiny_model: Path, pair_files: Path, settings: dict[str, Any]
):
    asked = {**settings, "per_device_eval_batch_size": 3}
    assert evaluate(str(tiny_model), pair_files, recipe=asked, max_pairs=3).settings["batch_pairs"] == 3
