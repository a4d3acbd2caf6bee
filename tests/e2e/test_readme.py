"""The README's first lines do what they say, on a tiny model instead of the one they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from miniature import rounds_recipe
from typer.testing import CliRunner

from simpo.cli import app
from simpo.recipe import load_recipe

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_first_lines_of_python_and_yaml_train_and_evaluate(
    tiny_model: Path, pair_files: Path, tmp_path: Path, monkeypatch, capsys
):
    text = README.read_text(encoding="utf-8")
    python, recipe = (
        re.search(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1] for kind in ("python", "yaml")
    )
    assert len(python.splitlines()) == len(recipe.splitlines()) == 3
    for theirs, tiny in (("HuggingFaceTB/SmolLM2-135M-Instruct", tiny_model), ("examples/demo/pairs", pair_files)):
        assert theirs in text
        python, recipe = python.replace(theirs, str(tiny)), recipe.replace(theirs, str(tiny))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "first.yaml").write_text(recipe, encoding="utf-8")
    exec(python, {})
    assert (tmp_path / "runs" / "first" / "model" / "model.safetensors").is_file()
    assert "preference accuracy" in capsys.readouterr().out


def test_the_first_commands_run_as_printed(tiny_model: Path, pair_files: Path, tmp_path: Path, monkeypatch):
    text = README.read_text(encoding="utf-8")
    tour = re.search(r"^```\n(simpo init .*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    for theirs, tiny in (("HuggingFaceTB/SmolLM2-135M-Instruct", tiny_model), ("examples/demo/pairs", pair_files)):
        tour = tour.replace(theirs, str(tiny))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for line in tour.splitlines():
        done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert done.exit_code == 0, (line, done.output)
    assert "preference accuracy" in done.output
    assert (tmp_path / "runs" / "second" / "model" / "model.safetensors").is_file()


LOCAL_TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["water", "stone"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def commands(block: str, stands_for: dict[str, str]) -> Iterator[list[str]]:
    """The words of each line behind `simpo`; a|b stands for a line with a and one with b."""
    for line in block.splitlines():
        for theirs, ours in stands_for.items():
            line = line.replace(theirs, ours)
        first, *rest = shlex.split(line, comments=True)[1:]
        yield from ([each, *rest] for each in first.split("|"))


@pytest.mark.long
@pytest.mark.usefixtures("rounds_in_process", "sweeps_in_process")
@pytest.mark.filterwarnings("ignore")  # lm-eval's, and of what it imports
def test_every_command_of_the_list_runs_as_printed(tiny_model: Path, pair_files: Path, tmp_path: Path, monkeypatch):
    """With one recipe for all of them, as the README says; the hub's benchmark is a task file."""
    block = re.search(r"^```\n(simpo check .*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[1]
    monkeypatch.chdir(tmp_path)
    keys = rounds_recipe(tmp_path, tiny_model, [f"water and stone, {number}?" for number in range(40)])
    keys["generate"]["prompts"] = keys.pop("dataset_mixer")
    pairs = {"dataset_mixer": {str(pair_files): 1.0}, "output_dir": "runs/first", "use_peft": True, "max_steps": 4}
    more = {"rounds": {"rounds": 1, "prompts_per_round": 12, "eval_prompts": 4}, "judge": {"model": "runs/llama"}}
    load_recipe({**keys, **pairs, **more, "save_strategy": "no"}).save(tmp_path / "recipe.yaml")
    (tmp_path / "task.yaml").write_text(LOCAL_TASK.format(data=pair_files / "test.jsonl"))
    stands_for = {
        "meta-llama/Meta-Llama-3-8B-Instruct": str(tiny_model),
        "RECIPE": "recipe.yaml",
        "[RUN ...]": "",
        "RUN": "runs/llama",
        "arc_easy --model A --compare B": f"task.yaml --model runs/llama --compare {tiny_model}",
    }
    done: dict[str, Any] = {}
    for words in commands(block, stands_for):
        if words[0] == "eval" and "--tasks" in words:
            pytest.importorskip("lm_eval", reason="no lm-evaluation-harness (simpo[tasks])")
        own = ["--output_dir", "runs/rounds"] if words[0] == "rounds" else []  # a folder that a run has is refused
        result = done[" ".join(words)] = CliRunner().invoke(app, [*words, *own], input="water\n")
        assert result.exit_code in (0, 3), (words, result.output)  # 3: prompts of equal scores make no pair
    assert {command.split()[0] for command in done} == {*typer.main.get_command(app).commands} - {"init"}
