"""`simpo rounds` killed at random moments, with all its processes: nothing is lost, nothing is there twice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
from miniature import rounds_recipe

KILLS = int(os.environ.get("SIMPO_KILLS", "3"))
LOOP = "import forks, simpo.cli, simpo.onpolicy.rounds as r; forks.start_forks(r); simpo.cli.main()"


def write_recipe(folder: Path, model: Path) -> Path:
    rng = random.Random(5)
    words = ("water", "stone", "bread", "river", "glass")
    prompts = [f"{' '.join(rng.choices(words, k=4))} {number}?" for number in range(60)]
    keys = rounds_recipe(folder, model, prompts, max_new_tokens=16, batch_size=6)
    keys |= {"learning_rate": 1e-3, "save_steps": 2}
    keys["rounds"] = {"rounds": 1, "prompts_per_round": 12, "eval_prompts": 5}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(keys))
    return path


def start(recipe: Path, output: Path) -> forks.Program:
    command = ["-c", LOOP, "rounds", str(recipe), "--output_dir", str(output)]
    with output.with_suffix(".log").open("ab") as log:
        return forks.Program(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def children_of(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(each) for each in path.read_text().split()] if path.exists() else []


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def contents(output: Path) -> dict[str, bytes]:
    names = ("responses.jsonl", "scored.jsonl", "train.jsonl", "test.jsonl", "model.safetensors", "prompts.jsonl")
    found = (path for name in names for path in output.rglob(name) if not path.parts[-2].startswith("_"))
    return {str(path.relative_to(output)): path.read_bytes() for path in found}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a command may outlive the loop that started it")
def test_a_loop_killed_at_random_moments_ends_as_if_it_had_not_been(tiny_model: Path, tmp_path: Path) -> None:
    recipe, rng = write_recipe(tmp_path, tiny_model), random.Random(KILLS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert start(recipe, whole).wait() in (0, 3), whole.with_suffix(".log").read_text()  # 3: some scores are equal
    longest = (time.monotonic() - began) / 4  # a step takes less, so that there is progress between kills
    for _ in range(KILLS):
        process = start(recipe, killed)
        try:
            process.wait(timeout=rng.uniform(0.1, longest))
            break  # done before
        except subprocess.TimeoutExpired:
            children = children_of(process.pid)
            process.kill()
            process.wait()
            deadline = time.monotonic() + 5
            while any(map(is_alive, children)) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not any(map(is_alive, children)), "a command outlives its loop"
    assert start(recipe, killed).wait() in (0, 3), killed.with_suffix(".log").read_text()
    expected, found = contents(whole), contents(killed)
    assert expected.keys() == found.keys()
    for name, content in expected.items():
        assert found[name] == content, name
        if name.endswith(".jsonl") and "prompts" not in name:
            ids = [json.loads(line)["id"] for line in content.splitlines()]
            assert len(ids) == len(set(ids)), name
