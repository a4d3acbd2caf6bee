"""A real server of OpenAI's protocol on loopback, `transformers serve` with the demo's model: rows, seeds, prompts."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simpo.onpolicy.generate import run_generate
from simpo.onpolicy.journal import read_rows
from simpo.recipe import load_recipe

pytestmark = [
    pytest.mark.long,
    pytest.mark.real_model,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("openai", "fastapi", "uvicorn")),
        reason="no server (simpo[openai,serving])",
    ),
]
PATIENCE_S = 300
PROMPTS = ["Name a colour.", "What is a fjord?", "Say hello in French."]


@pytest.fixture
def sampling_model(smol_model: Path, tmp_path: Path) -> Path:
    """The model's files, with a generation config that says to sample: without, the server ignores a temperature."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in smol_model.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((smol_model / "generation_config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({**config, "do_sample": True}))
    return folder


@pytest.fixture
def server(sampling_model: Path, tmp_path: Path) -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = ["serve", str(sampling_model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *words, "--dtype", "float32"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )
        try:
            until = time.monotonic() + PATIENCE_S
            while not is_up(port):
                assert process.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
                assert time.monotonic() < until
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def test_a_real_servers_answers_are_those_of_the_model(server, sampling_model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    settings: dict[str, Any] = {
        "model_name_or_path": str(sampling_model),
        "dataset_mixer": {str(prompts): 1.0},
        "cache_dir": str(tmp_path / "cache"),
        "bf16": False,
    }
    of_server = {"backend": "openai", "url": server, "served_model": str(sampling_model), "concurrency": 1}

    def sample(name: str, **keys: Any) -> Path:
        recipe = load_recipe({**settings, "output_dir": str(tmp_path / name), "generate": keys})
        return run_generate(recipe)

    def texts(path: Path) -> list[list[str]]:
        return [[response["text"] for response in row["responses"]] for row in read_rows(path)]

    greedy = {"temperature": 0, "num_samples": 1, "max_new_tokens": 12}
    assert texts(sample("server", **greedy, **of_server)) == texts(sample("local", **greedy, processes=1))

    sampling = {"num_samples": 2, "max_new_tokens": 12, "temperature": 1.0, **of_server}
    path = sample("sampled", **sampling)
    rows = list(read_rows(path))
    assert [row["prompt"][-1]["content"] for row in rows] == PROMPTS
    assert all(len({response["text"] for response in row["responses"]}) == 2 for row in rows)
    assert all(0 < response["num_tokens"] <= 12 for row in rows for response in row["responses"])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert sample("sampled", **sampling).read_bytes() == whole
    with pytest.raises(ValueError, match="'nobody' gives no answer"):
        sample("wrong", **{**sampling, "served_model": "nobody"})
