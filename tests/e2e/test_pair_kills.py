"""simpo pair killed at random moments: what lies there is whole at any time, and the same command finishes it."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import time
from pathlib import Path

import forks
import pytest
from forks import KILLS

from simpo.onpolicy.pair import run_pair
from simpo.recipe import load_recipe

COMMAND = ["-m", "simpo", "pair", "recipe.yaml"]
FILES = ["pairs/train.jsonl", "pairs/test.jsonl", "lists/train.jsonl", "lists/test.jsonl", "pairs.json"]


@pytest.mark.parametrize("moments", [3, pytest.param(KILLS, marks=pytest.mark.long)])
def test_files_are_whole_whenever_it_is_killed(moments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(moments)
    with (tmp_path / "scored.jsonl").open("w") as file:
        for number in range(4000):
            responses = [{"text": f"answer {place} " * 9, "score": rng.random(), "num_tokens": 9} for place in range(4)]
            prompt = [{"role": "user", "content": f"Ask {number}"}]
            file.write(json.dumps({"id": f"p{number}", "prompt": prompt, "responses": responses}) + "\n")
    keys = {"model_name_or_path": "any", "output_dir": ".", "pair": {"method": "all", "lists": True}}
    load_recipe(keys).save(tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    run_pair(load_recipe("recipe.yaml"))
    longest = time.monotonic() - began
    whole = {name: Path(name).read_bytes() for name in FILES}
    amid = 0
    for _ in range(moments):
        process = forks.Program(COMMAND, cwd=tmp_path)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, longest))
        process.kill()
        amid += process.wait() != 0
        for name in FILES:
            assert not Path(name).exists() or Path(name).read_bytes() == whole[name], name
        for name in rng.sample(FILES, 3):
            Path(name).unlink(missing_ok=True)  # so that what comes next is seen to be written anew
    assert amid
    assert forks.run(*COMMAND, cwd=tmp_path).returncode == 0
    assert {name: Path(name).read_bytes() for name in FILES} == whole
    assert not list(tmp_path.rglob(".*")), "what a killed process had begun to write is gone"
