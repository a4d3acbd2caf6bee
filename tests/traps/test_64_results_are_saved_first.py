"""Trap 64: results were printed before they were saved: a terminal that could not show them lost them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from simpo.cli import app
from simpo.recipe.yaml import dump_yaml


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (("eval",), ("result.json", "result.pairs.jsonl")),
        (("eval", "--compare", "MODEL", "--max-pairs", "3"), ("result.json", "result.pairs.jsonl")),
        (("audit",), ("result.json",)),
        (("plan",), ("result.json",)),
    ],
    ids=["eval", "compare", "audit", "plan"],
)
def test_what_was_computed_is_in_its_file_before_anything_is_shown(
    words: tuple[str, ...],
    files: tuple[str, ...],
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []

    def show(*args: Any, **options: Any) -> None:
        seen.append(all((tmp_path / name).is_file() for name in files))

    recipe, result = tmp_path / "recipe.yaml", tmp_path / "result.json"
    recipe.write_text(dump_yaml(tiny_recipe), encoding="utf-8")
    command, *options = [word.replace("MODEL", tiny_recipe["model_name_or_path"]) for word in words]
    monkeypatch.setattr(Console, "print", show)
    monkeypatch.setattr("typer.echo", show)
    done = CliRunner().invoke(app, [command, str(recipe), "--output", str(result), *options])
    assert done.exit_code == 0, done.exception
    assert seen
    assert all(seen)
