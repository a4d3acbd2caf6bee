"""A first recipe: what `simpo init` writes can be checked and trained as it stands, and every choice has its reason."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import rarely
from typer.testing import CliRunner

from simpo import starting
from simpo.cli import app
from simpo.plan.search import Machines
from simpo.recipe import load_recipe


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_init_writes_a_recipe_that_checks_and_trains_as_it_stands(tiny_model: Path, pair_files: Path):
    done = run("init", "--model", tiny_model, "--data", pair_files, "--num_threads", 1)
    assert done.exit_code == 0, done.output
    assert "40 pairs to train, 10 held out" in done.stderr
    assert done.stdout.splitlines()[-1] == "  simpo train recipe.yaml"
    text = Path("recipe.yaml").read_text()
    keys = [line for line in text.splitlines() if line and line[0] != "#"]
    assert all("  # " in line or line.startswith(("model_name_or_path", "dataset_name", "output_dir")) for line in keys)
    recipe = load_recipe("recipe.yaml", processes=1)
    assert (recipe.max_length, recipe.pairs_per_step(1), recipe.num_threads) == (64, 8, 1)
    assert "this recipe can be trained" in run("check", "recipe.yaml").output
    assert run("train", "recipe.yaml", "--max_steps", 1).exit_code == 0
    assert (Path(recipe.output_dir) / "model" / "model.safetensors").is_file()
    assert "not overwritten" in run("init", "--model", tiny_model, "--data", pair_files).stderr
    assert Path("recipe.yaml").read_text() == text


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("--per_device_train_batch_size 1", {"global_batch_size": 8, "eval_steps": 2}),
        ("--global_batch_size 20", {"global_batch_size": 20, "eval_steps": 1}),
        ("--gradient_accumulation_steps 20", {"gradient_accumulation_steps": 20, "eval_steps": 1}),
        (
            "--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {min_lr_rate:\\ 0.1}",
            {"learning_rate": 2e-5, "min_lr": pytest.approx(2e-6)},
        ),
        ("--lr_scheduler_type cosine_with_min_lr --min_lr 2e-6", {"min_lr": 2e-6}),
        ("--early_stopping_patience 3 --load_best_model_at_end true", {"early_stopping_patience": 3, "save_steps": 50}),
        ("--load_best_model_at_end true --eval_steps 20", {"eval_steps": 20, "save_steps": 60}),
        ("--load_best_model_at_end true --save_steps 50", {"eval_steps": 50, "save_steps": 50}),
        ("--guard back --eval_steps 20", {"eval_steps": 20, "save_steps": 60}),
        (
            "--eval_strategy epoch --save_strategy epoch --load_best_model_at_end true",
            {"eval_strategy": "epoch", "eval_steps": None},
        ),
        ("--max_prompt_length 100", {"max_prompt_length": 100, "max_length": 128}),
        ("--eval_steps 1 --learning_rate 1.0", {"eval_steps": 1, "learning_rate": 1.0}),
        ("--clean.contradictions true --guard stop", {"guard": {"all": "stop"}}),
        ("--push_to_hub true --hub_token hf_SECRET", {"push_to_hub": True}),
    ],
)
def test_what_is_given_is_kept_and_the_rest_is_chosen_around_it(
    words: str, written: dict[str, Any], tiny_model: Path, pair_files: Path
):
    """Batches of other sizes, numbers of the default learning rate, a token in clear text, refusals and a traceback."""
    done = run("init", "--model", tiny_model, "--data", pair_files, *shlex.split(words))
    assert done.exit_code == 0, done.output
    text = Path("recipe.yaml").read_text()
    keys = yaml.safe_load(text)
    assert {key: keys.get(key) for key in written} == written
    assert "hf_SECRET" not in text
    assert run("check", "recipe.yaml").exit_code == 0
    assert load_recipe("recipe.yaml").clean.contradictions is ("contradictions" in words)


def test_train_needs_no_recipe_and_what_is_given_wins(tiny_model: Path, pair_files: Path):
    words = ("--model", tiny_model, "--max_steps=1", "--gradient_accumulation_steps=1", "--validation_fraction=0.2")
    done = run("train", pair_files / "train.jsonl", *words, "--output_dir", "run", "--learning_rate", "3e-4")
    assert done.exit_code == 0, done.output
    saved = load_recipe("run/recipe.yaml")
    assert (saved.learning_rate, saved.max_length, saved.validation_fraction) == (3e-4, 64, 0.2)
    assert (saved.per_device_train_batch_size, saved.gradient_accumulation_steps) == (2, 1)
    assert json.loads(Path("run/audit.json").read_text())["splits"]["eval"]["kept"] == 8


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_is_looked_at_like_lines(suffix: str, tiny_model: Path, pair_files: Path):
    import pandas

    rows = pandas.read_json(pair_files / "train.jsonl", lines=True)
    path = Path(f"pairs{suffix}")
    rows.to_csv(path, index=False) if suffix == ".csv" else rows.to_parquet(path)
    done = run("init", "--model", tiny_model, "--data", path)
    assert done.exit_code == 0, done.output
    assert "40 pairs to train, 0 held out" in done.stderr
    assert load_recipe("recipe.yaml").validation_fraction == 0.1


def test_the_languages_of_the_answers_are_said(tiny_model: Path):
    pytest.importorskip("py3langid")
    rows = [
        {"prompt": f"{place}?", "chosen": text, "rejected": "no"}
        for place, text in enumerate(
            ["The river runs down to the sea, where the water is deep and cold."] * 6
            + ["Der Fluss fließt hinunter zum Meer, wo das Wasser tief und kalt ist."] * 3
            + ["Yes."]
        )
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("init", "--model", tiny_model, "--data", "pairs.jsonl").exit_code == 0
    line = r"^# language: en \d\d%, de \d\d%.* \(of \d+ chosen answers\)$"
    assert re.search(line, Path("recipe.yaml").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("init", "--model", "MODEL", "--data", "."), "no "),
        (("init", "--model", "MODEL", "--data", "org/pairs"), "org/pairs"),
        (("init", "--model", "org/model", "--data", "none.jsonl"), "org/model"),
        (("init",), "at a terminal only; give --model NAME and --data FILE"),
        (("init", "pairs.jsonl"), "a recipe's name ends in .yaml"),
        (("train", "."), "say with --model which model to train"),
        (("train", "none.jsonl", "--model", "MODEL"), "none.jsonl"),
        (("train", "nothing"), "no such recipe file"),
    ],
)
def test_what_is_missing_is_one_line(words: tuple[str, ...], said: str, tiny_model: Path):
    done = run(*(word.replace("MODEL", str(tiny_model)) for word in words))
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "gib", "gpus", "chosen"),
    [
        rarely("llama-8b", 200.0, 1, {"learning_rate": 5e-7}),
        rarely("llama-8b", 80.0, 8, {"learning_rate": 5e-7}),
        rarely("llama-8b", 80.0, 1, {"optim": "adamw_bf16", "master_dtype": "bfloat16"}),
        rarely("llama-8b", 24.0, 1, {"use_peft": True, "master_dtype": "bfloat16", "learning_rate": 5e-6}),
        rarely("llama-8b", 16.0, 1, {"use_peft": True, "load_in_4bit": True, "learning_rate": 5e-6}),
        ("llama-1b", 80.0, 1, {"learning_rate": 1e-6}),
    ],
)
def test_memory_and_size_decide(model: str, gib: float, gpus: int, chosen: dict[str, Any], choose_for):
    found = choose_for(model, gib, gpus)
    keys = {*chosen, "use_peft", "load_in_4bit", "optim", "master_dtype"}
    assert {key: found.values[key] for key in keys if key in found.values} == chosen
    assert found.launch.startswith("torchrun --nproc-per-node 8" if gpus == 8 else "simpo train r.yaml")


@pytest.mark.long
def test_bfloat16_is_not_chosen_where_there_are_no_instructions_for_it(choose_for, monkeypatch):
    monkeypatch.setattr(starting, "has_bf16", lambda device: False)
    values = choose_for("llama-1b", 16.0, 1).values  # all weights would fit in bfloat16
    assert values["bf16"] is False
    assert values["use_peft"] is True
    assert "master_dtype" not in values


@pytest.fixture
def choose_for(tiny_model: Path, pair_files: Path, monkeypatch):
    """choose_for(model, GiB of each GPU, GPUs): what is chosen on a machine with bfloat16."""
    monkeypatch.setattr(starting, "has_bf16", lambda device: True)

    def call(model: str, gib: float, gpus: int) -> starting.Chosen:
        config = starting.load_config(model)
        machines = Machines.of(gpus=gpus, nodes=None, gpus_per_node=None, gpu_gib=gib)
        monkeypatch.setattr(starting, "_machine", lambda gpus: (machines, "a machine"))
        monkeypatch.setattr(starting, "load_config", lambda name, **options: config)
        monkeypatch.setattr("simpo.plan.search.load_config", lambda name, **options: config)
        words = ["--model_name_or_path", str(tiny_model), "--max_length", "1024"]
        return starting.choose_recipe(str(pair_files), words, recipe_name="r.yaml")

    return call


def test_a_rate_and_a_batch_have_a_place_to_start():
    assert [rate for _, rate, _ in starting._RATES] == sorted(rate for _, rate, _ in starting._RATES)
    assert not torch.cuda.is_available() or starting._machine(None)[0].gpus == torch.cuda.device_count()


def test_the_shell_completes_commands_options_and_keys():
    def completed(words: str) -> list[str]:
        place = str(len(words.split(" ")) - 1)
        env = {"_SIMPO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": place}
        return CliRunner().invoke(app, [], env=env, prog_name="simpo").stdout.split()

    assert completed("simpo tr") == ["train"]
    assert completed("simpo train r.yaml --learn") == ["--learning_rate"]
    assert completed("simpo generate r.yaml --num-s") == ["--num_samples"]
    assert completed("simpo audit r.yaml --exa") == ["--examples"]
    assert completed("simpo train rec") == []  # the shell's own: files
