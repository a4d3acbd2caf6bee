"""Trap 67: files were made 644 or 700 whatever the umask: a group could not share a cache, or all could read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.report import write_report
from simpo.trainer import Trainer


@pytest.fixture
def private() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_every_file_and_folder_of_a_run_and_of_the_cache_has_the_modes_of_the_umask(
    tiny_recipe: dict[str, Any], tmp_path: Path, private: None
) -> None:
    home = tmp_path / "new"
    keys = {"output_dir": str(home / "run"), "cache_dir": str(home / "cache"), "max_steps": 2, "save_steps": 1}
    Trainer(load_recipe({**tiny_recipe, **keys}), display=Display(quiet=True)).run()
    write_report([home / "run"])
    made = [home, *home.rglob("*")]
    modes = {str(path.relative_to(home)): oct(path.stat().st_mode & 0o777) for path in made}
    assert {"cache", "run/metrics.jsonl", "run/report.html", "run/model/model.safetensors"} <= modes.keys()
    wrong = {name: mode for name, mode in modes.items() if mode != ("0o750" if (home / name).is_dir() else "0o640")}
    assert not wrong
