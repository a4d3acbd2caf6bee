"""The README's first lines do what they say, on a tiny model instead of the one they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from simpo.cli import app

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
