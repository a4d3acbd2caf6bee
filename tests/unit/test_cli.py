"""The command line: fast, light, and clear when something is wrong."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from simpo.cli import app
from simpo.cli.app import name_stage
from simpo.core.losses import LOSSES
from simpo.recipe import KEYS, Recipe, load_recipe
from simpo.run.stopping import Interrupted, NonFiniteError, OutOfMemory

REPO = Path(__file__).resolve().parents[2]
WILD = Path(__file__).parent / "recipes_in_the_wild"
HEAVY = ("torch", "transformers", "datasets", "numpy")


@pytest.fixture
def recipe_file(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model_name_or_path: m\ndataset_name: pairs.jsonl\noutput_dir: {tmp_path / 'run'}\n")
    return path


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def fails(*words: object) -> str:
    """The one line on stderr of a command that exits with 2."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def stand_in(monkeypatch, name: str, **contents: object) -> None:
    """A module `name` that holds only `contents`, for as long as the test runs."""
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)


# --- light -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["keys"], ["losses"], ["check", "RECIPE"]])
def test_commands_that_compute_nothing_load_no_framework_and_are_fast(words, recipe_file):
    words = [str(recipe_file) if word == "RECIPE" else word for word in words]
    code = (
        "import sys, time, contextlib, io\n"
        "from simpo.cli import main\n"
        f"sys.argv = ['simpo', *{words!r}]\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main()\n"
        f"print(time.process_time(), *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout
    # Seconds of processor, which a busy machine makes more of too; one framework takes over two.
    assert float(done.stdout) < 1.2


def test_python_m_simpo_is_the_command():
    done = subprocess.run([sys.executable, "-m", "simpo", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("simpo ")


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_shows_effective_values_and_the_loss_they_predict(recipe_file):
    result = run(
        "check", recipe_file, "--gamma", "1.6", "--global-batch-size=128", "--processes", "4", "--log_level", "info"
    )
    assert result.exit_code == 0, result.output
    assert "beta 2, gamma/beta 0.8, gamma 1.6, 1.7839 nats at zero margin" in result.output
    assert "128 pairs an optimizer step" in result.output
    assert result.output.count("notice: ") == 1
    assert "log_level" in result.output
    assert "this recipe can be trained" in result.output


def test_check_full_is_a_recipe_again(recipe_file, tmp_path):
    result = run("check", recipe_file, "--full", "--beta", "3", "--max_steps", "-1")
    again = tmp_path / "again.yaml"
    again.write_text(result.output)
    assert load_recipe(again) == load_recipe(recipe_file, {"beta": 3})


def test_check_says_what_is_still_needed_to_train(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: m\n")
    assert "to train, still give: dataset_mixer, output_dir" in run("check", path).output


def test_check_passes_every_recipe_in_the_wild_and_here():
    for path in [*WILD.glob("*.yaml"), *(REPO / "recipes").glob("*.yaml")]:
        assert run("check", path).exit_code == 0, path
    words = [
        w for line in (WILD / "megatron-options.txt").read_text().splitlines() if line[0] != "#" for w in line.split()
    ]
    result = run("check", REPO / "recipes" / "demo.yaml", *words)
    assert result.exit_code == 0, result.output
    assert "gamma/beta 1.4" in result.output


def test_short_values_that_begin_with_a_dash_are_values(recipe_file):
    assert run("check", recipe_file, "--alphapo_alpha", "-1e-3", "--loss_type", "alphapo").exit_code == 0


# --- errors ----------------------------------------------------------------------------------------------------------


def test_wrong_recipes_exit_with_2_and_one_line(recipe_file, tmp_path):
    assert "no such recipe file" in fails("check", tmp_path / "none.yaml")
    assert "nearest known key is 'beta'" in fails("check", recipe_file, "--bta", "3")
    assert "beta = -1" in fails("train", recipe_file, "--beta", "-1")
    assert "the recipe comes before" in fails("check", "--beta", "3", recipe_file)
    assert "nearest known key is 'beta'" in fails("keys", "betta")


def test_train_needs_data_and_a_folder_before_anything_is_loaded(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: m\n")
    assert "dataset_mixer and output_dir must be set" in fails("train", path)


def test_a_traceback_is_shown_when_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMPO_TRACEBACK", "1")
    assert isinstance(run("check", tmp_path / "none.yaml").exception, ValueError)


# --- train, audit, eval: what they hand on ---------------------------------------------------------------------------


def trainer_that(behaviour):
    class Trainer:
        def __init__(self, recipe: Recipe) -> None:
            self.recipe = recipe

        def run(self) -> None:
            behaviour(self.recipe)

    return {"Trainer": Trainer}


def test_train_runs_the_trainer_with_the_overridden_recipe(monkeypatch, recipe_file):
    seen = []
    stand_in(monkeypatch, "simpo.trainer", **trainer_that(seen.append))
    result = run("train", recipe_file, "--lr", "5e-7", "--use_peft")
    assert result.exit_code == 0, result.output
    assert (seen[0].learning_rate, seen[0].use_peft) == (5e-7, True)


@pytest.mark.parametrize(
    ("raised", "exit_code"),
    [
        (Interrupted("saved"), 130),
        (KeyboardInterrupt(), 130),
        (NonFiniteError("row 3"), 1),
        (OutOfMemory("step 4"), 1),
        (torch.OutOfMemoryError("out of memory"), 1),
        (ValueError("bad"), 2),
    ],
)
def test_how_a_run_ends_is_its_exit_code(monkeypatch, recipe_file, raised, exit_code):
    def behaviour(recipe):
        raise raised

    stand_in(monkeypatch, "simpo.trainer", **trainer_that(behaviour))
    result = run("train", recipe_file)
    assert result.exit_code == exit_code
    assert str(raised) in result.stderr
    assert "Traceback" not in result.output


class Rows(list):
    def select(self, indices):
        return [self[i] for i in indices]


class Ledger:
    def render(self, console, *, examples) -> None:
        console.print(f"1 row kept, {examples} examples")

    def save(self, path) -> None:
        Path(path).write_text(json.dumps({"kept": 1}))


@pytest.fixture
def prepared(monkeypatch):
    row = {
        "row_id": "pairs#0",
        "prompt_text": "Hi",
        "chosen_text": "Hello.",
        "rejected_text": "No.",
        "chosen_ids": [1] * 9,
    }
    row |= {"chosen_start": 4, "rejected_ids": [1] * 6, "rejected_start": 4}
    ledger = Ledger()
    parts = {"train": Rows([row]), "eval": None, "ledger": ledger, "fingerprint": "f", "save_ledger": ledger.save}
    found = types.SimpleNamespace(**parts)
    importlib.import_module("simpo.run.session")  # which needs what the next lines replace
    of_data = {"prepare_pairs": lambda recipe, tokenizer, checks: found, "check_dropped": lambda ledger, most: None}
    stand_in(monkeypatch, "simpo.data.prepare", **of_data)
    stand_in(monkeypatch, "simpo.model.load", load_tokenizer=lambda recipe: None)


@pytest.mark.usefixtures("prepared")
def test_audit_prints_the_ledger_and_saves_it_with_the_run(recipe_file, tmp_path):
    result = run("audit", recipe_file, "--examples", "3")
    assert result.exit_code == 0, result.output
    assert "1 row kept, 3 examples" in result.output
    assert json.loads((tmp_path / "run" / "audit.json").read_text()) == {"kept": 1}


def test_audit_of_bad_data_names_every_row_before_it_fails(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    good, bad = ({"prompt": f"{n}?", "chosen": f"{n}.", "rejected": text} for n, text in ((1, "No."), (2, "")))
    rows.write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good | {"prompt": "3?"})), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_name_or_path": str(tiny_model), "dataset_mixer": {str(rows): 1.0}}))
    ledger = tmp_path / "ledger.json"
    result = run("audit", recipe, "--output", ledger, "--cache_dir", tmp_path / "cache", "--validation_fraction", "0")
    assert result.exit_code == 2
    assert "1 of 3 train rows are dropped" in result.output
    dropped = (tmp_path / "ledger.dropped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row_id"] for line in dropped] == ["rows.jsonl/train#1"]
    assert json.loads(ledger.read_text())["splits"]["train"]["kept"] == 2


@pytest.mark.usefixtures("prepared")
def test_home_is_found_where_no_shell_looks(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = load_recipe({"model_name_or_path": "~/m", "output_dir": "~/runs/x", "chat_template": "~/t.jinja"})
    found = (keys.model_name_or_path, keys.output_dir, keys.chat_template)
    assert found == tuple(str(tmp_path / name) for name in ("m", "runs/x", "t.jinja"))
    assert (
        load_recipe({"model_name_or_path": "m~/x", "pair": {"input": "~/s.jsonl"}}).pair.input == f"{tmp_path}/s.jsonl"
    )
    assert run("audit", "~/recipe.yaml", "--output=~/ledger.json").exit_code == 0
    assert (tmp_path / "ledger.json").is_file()


@pytest.mark.parametrize("words", [["--seed", "7"], ["--seed=7"]])
def test_the_seed_on_the_command_line_is_that_of_the_samples(words):
    named = name_stage([*words, "--temperature", "0"], "generate")
    recipe = load_recipe({"model_name_or_path": "m", "generate": {"seed": 13}}, named)
    assert (recipe.seed, recipe.generate.seed, recipe.generate.temperature) == (7, 7, 0)


def test_the_key_rounds_of_its_own_command_is_their_number():
    """The mapping of the same name took its place."""
    assert load_recipe({"model_name_or_path": "m"}, name_stage(["--rounds", "3"], "rounds")).rounds.rounds == 3


@pytest.mark.parametrize("name", ["score.math", "fp16", "use_dora_quant", "beta"])
def test_what_is_explained_is_explained_to_programs_too(name):
    (found,) = json.loads(run("keys", name, "--json").stdout)
    assert found["name"] == name
    assert found["meaning"]


def test_help_names_where_things_are_written():
    """rich took [default: ...] for markup."""
    words = [
        getattr(each, "help", None) or "" for command in get_command(app).commands.values() for each in command.params
    ]
    assert any("\\[default: " in each for each in words)
    assert not [each for each in words if re.search(r"(?<!\\)\[default", each)]
    assert "[default: judged in output_dir]" in run("judge", "--help").output


def test_an_option_may_be_written_as_a_key_is():
    for word in ("--max_pairs=none", "--max-pairs=none"):
        assert "Invalid value for '--max-pairs'" in run("eval", "model", "pairs", word).output


@pytest.mark.parametrize("words", [["--beta", ""], ["--beta="], ["--bf16="]])
def test_an_empty_value_is_a_missing_one(words):
    with pytest.raises(ValueError, match=f"^{words[0].strip('-=')}: a value is missing"):
        load_recipe({"model_name_or_path": "m"}, words)


@pytest.mark.parametrize("count", [0, 1, 3, 10])
def test_audit_prints_as_many_marked_examples_as_asked_for(tiny_model, pair_files, tmp_path, count):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_name_or_path": str(tiny_model), "dataset_mixer": {str(pair_files): 1.0}}))
    result = run("audit", recipe, "--examples", count, "--cache_dir", tmp_path / "cache")
    assert result.exit_code == 0, result.output
    assert result.output.count("trained text in") == 2 * count  # chosen and rejected
    assert result.output.count("<|im_end|>\u27e7") == 2 * count


@pytest.mark.usefixtures("prepared")
def test_audit_saves_where_it_is_told(recipe_file, tmp_path):
    assert run("audit", recipe_file, "--output", tmp_path / "deep" / "ledger.json", "--max_length", "64").exit_code == 0
    assert (tmp_path / "deep" / "ledger.json").is_file()
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("prepared")
def test_a_file_that_cannot_be_written_is_one_line(recipe_file):
    assert str(recipe_file) in fails("audit", recipe_file, "--output", recipe_file / "ledger.json")


def test_eval_hands_its_options_on(monkeypatch):
    seen = {}
    stand_in(monkeypatch, "simpo.evaluation.command", run_eval_command=lambda **options: seen.update(options))
    result = run("eval", "pairs.jsonl", "--model", "m", "--compare", "n", "--max-pairs", "5", "--max_length", "64")
    assert result.exit_code == 0, result.output
    assert seen == {
        "recipe_or_data": "pairs.jsonl",
        "model": "m",
        "baseline": "n",
        "output": None,
        "generations": 0,
        "max_pairs": 5,
        "split": "test",
        "tasks": (),
        "overrides": ["--max_length", "64"],
    }


# --- keys, losses ----------------------------------------------------------------------------------------------------


def test_keys_explains_every_key_and_each_by_any_name():
    listed = run("keys").output
    assert all(f"\n  {name}\n" in listed for name in KEYS)
    assert "learning_rate" in run("keys", "lr").output
    assert "gamma / beta" in run("keys", "--gamma").output
    assert "not used here" in run("keys", "log-level").output


def test_losses_lists_every_loss_with_its_source():
    output = run("losses").output
    for name, loss in LOSSES.items():
        assert f"{name:<10} {loss.equation}" in output
        assert loss.source in output
