"""simpo generate stopped at random moments: the same command, given again, ends with what an undisturbed one writes."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import forks
import pytest
from cases import rarely
from forks import KILLS
from miniature import sampling_recipe

from simpo.onpolicy.generate import run_generate
from simpo.recipe import load_recipe

COMMAND = ["-m", "simpo", "generate", "recipe.yaml"]


@pytest.fixture
def moments(request: pytest.FixtureRequest) -> int:
    return getattr(request, "param", 1)


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, moments: int) -> dict[str, Any]:
    """Prompts in batches of four, in bfloat16, where rounding would tell a batch that was cut from a whole one."""
    rng = random.Random(1)
    words = ["water", "stone", "light", "bread"]
    prompts = [" ".join(rng.choices(words, k=rng.randint(3, 20))) for _ in range(8 * moments + 8)]
    (tmp_path / "killed").mkdir()
    keys = sampling_recipe(tmp_path, tiny_model, prompts, max_new_tokens=24, batch_size=12)
    settings = {**keys, "bf16": True, "output_dir": "."}
    load_recipe(settings).save(tmp_path / "killed" / "recipe.yaml")
    return settings


@pytest.mark.parametrize("moments", [2, rarely(KILLS)], indirect=True)
def test_nothing_is_lost_and_nothing_is_there_twice(moments, recipe, tmp_path):
    whole = run_generate(load_recipe(recipe), output=tmp_path / "whole" / "responses.jsonl")
    killed, rng, kills = tmp_path / "killed" / "responses.jsonl", random.Random(moments), 0
    for _ in range(moments):
        process, rows = forks.Program(COMMAND, cwd=killed.parent), count(killed)
        wait_until(lambda process=process, rows=rows: count(killed) > rows or process.poll() is not None)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert forks.run(*COMMAND, cwd=killed.parent).returncode == 0
    for path in (killed, killed.with_suffix(".json")):
        assert path.read_bytes() == whole.with_name(path.name).read_bytes()
    assert kills > moments / 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_and_says_how_it_goes_on(number, recipe, tmp_path):
    killed = tmp_path / "killed" / "responses.jsonl"
    with (tmp_path / "said").open("w+") as said:
        process = forks.Program(COMMAND, cwd=killed.parent, stderr=said)
        wait_until(lambda: count(killed) > 0)
        process.send_signal(number)
        assert process.wait(60) == 130
        said.seek(0)
        assert "of 16 prompts are there; the same command goes on" in said.read()


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(is_so: Any) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)
