"""simpo score killed at random moments: the same command, given again, ends with what an undisturbed one writes."""

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

from simpo.onpolicy.score import run_score
from simpo.recipe import load_recipe

RULE = """
import time

def rate(prompt, response, row):
    time.sleep(0.003)
    with open("calls", "a") as calls:
        calls.write(f"{row['id']}\\n")
    return len(response)
"""
SCORERS = {
    "rule": {"kind": "function", "function": "slow_rule:rate"},
    "clean": {"kind": "repetition", "weight": 5},
    "brief": {"kind": "length", "max": 4},
}


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.parametrize("moments", [5, pytest.param(KILLS, marks=pytest.mark.long)])
def test_nothing_is_lost_and_nothing_is_there_twice(moments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = random.Random(moments)
    texts = [" ".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 9))) for _ in range(10 * moments)]
    rows = [
        {
            "id": f"p{i:03}",
            "prompt": [{"role": "user", "content": "?"}],
            "responses": [{"text": text}, {"text": text + "!"}],
        }
        for i, text in enumerate(texts)
    ]
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for folder in (killed, undisturbed):
        folder.mkdir()
        (folder / "slow_rule.py").write_text(RULE)
        (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"model_name_or_path": "any", "output_dir": str(folder), "score": {"scorers": SCORERS}}
        load_recipe(given | {"score": {"scorers": SCORERS, "standardize": True}}).save(folder / "recipe.yaml")
    command, calls, amid = ["-m", "simpo", "score", "recipe.yaml"], killed / "calls", 0
    for _ in range(moments):
        before = size_of(calls)
        process = forks.Program(command, cwd=killed)
        while size_of(calls) == before and process.poll() is None:  # while it starts there is nothing to lose
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 0.12))
        process.kill()
        process.wait()
        amid += before < size_of(calls) < 2 * len(rows) * len("p000\n")
    assert forks.run(*command, cwd=killed).returncode == 0
    monkeypatch.chdir(undisturbed)
    run_score(load_recipe("recipe.yaml"))
    assert (killed / "scored.jsonl").read_bytes() == (undisturbed / "scored.jsonl").read_bytes()
    for path in (undisturbed / "scores").glob("*.jsonl"):
        assert (killed / "scores" / path.name).read_bytes() == path.read_bytes()
    assert amid > moments / 2
    # A kill loses at most the row in hand.
    assert 2 * len(rows) <= len(calls.read_text().splitlines()) <= 2 * len(rows) + 2 * moments
