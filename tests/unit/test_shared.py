"""run.shared: a run directory that is not one folder on all nodes is noticed at the start."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpo.run import shared

Settings = dict[str, Any]


def refusals_in(folder: Path, settings: Settings) -> list[str]:
    """What both hosts say of a run directory that each rank has of its own."""
    import torch.distributed as dist

    from simpo.display import Display
    from simpo.hosts.hf import run_recipe
    from simpo.recipe import load_recipe
    from simpo.trainer import Trainer

    found, before = [], (shared.WAIT_S, shared.socket.gethostname)
    shared.WAIT_S, shared.socket.gethostname = 0.1, lambda: f"node{dist.get_rank()}"
    try:
        with contextlib.chdir(folder / f"rank{dist.get_rank()}"):
            recipe = load_recipe({**settings, "output_dir": "run"})
            for start in (lambda: Trainer(recipe, display=Display(quiet=True)), lambda: run_recipe(recipe)):
                with pytest.raises(ValueError) as error:
                    start()
                found.append(str(error.value))
            assert not Path("run").exists()
    finally:
        shared.WAIT_S, shared.socket.gethostname = before
    return found


def test_a_run_directory_of_each_nodes_own_is_refused_at_the_start(
    two_ranks: Any, tiny_recipe: Settings, tmp_path: Path
) -> None:
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
    for found in two_ranks.run(refusals_in, tmp_path, {**tiny_recipe, "gradient_accumulation_steps": 1}):
        for line in found:
            assert line.startswith("output_dir: ")
            assert "what node0 writes there is not seen on node1; choose one on a file system that all" in line


def test_a_file_that_is_seen_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Any] = []

    def on_main(work: Any) -> None:
        late.append(work)

    mesh = SimpleNamespace(
        sizes=SimpleNamespace(world=2), from_main=lambda value: value, gather=lambda value: [value], on_main=on_main
    )
    waits = iter((lambda: None, lambda: late[0]()))
    monkeypatch.setattr(shared.time, "sleep", lambda _: next(waits)())
    shared.check_shared(tmp_path, mesh)
    assert (tmp_path / shared.TOKEN_FILE).exists()
    late[1]()
    assert not any(tmp_path.iterdir())
