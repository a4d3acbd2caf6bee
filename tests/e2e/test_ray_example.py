"""examples/ray: two CPU workers make the steps of one process, and go on when one of them is killed."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import yaml
from mesh_runs import losses

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run.saved import list_checkpoints
from simpo.trainer import Trainer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (simpo[ray])")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "ray" / "train.py"
# A cluster of this machine alone, small and silent, around the script.
RUN = """
import runpy, sys
import ray
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=sys.argv.pop(1))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PATIENCE_S = 600  # Ray takes 40 seconds on two idle cores, and minutes on busy ones


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its sockets, whose paths must be short."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def settings(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """Forty steps of four pairs, whatever the number of workers."""
    settings = {
        key: value for key, value in tiny_recipe.items() if key not in ("gradient_accumulation_steps", "eval_steps")
    }
    return settings | {"global_batch_size": 4, "learning_rate": 1e-4, "max_steps": 40, "save_steps": 4}


def command(settings: dict[str, Any], folder: Path) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return [str(SCRIPT), str(recipe), "--workers", "2", "--storage", str(folder / "storage"), "--max-failures", "1"]


def launch(words: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def kill_a_worker(process: subprocess.Popen[str], checkpoints: Path) -> None:
    """Once there is a checkpoint, one of the two workers below the script gets SIGKILL."""
    psutil = pytest.importorskip("psutil")
    until = time.monotonic() + PATIENCE_S
    while not list_checkpoints(checkpoints) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    ours = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in ours if "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2, [child.cmdline() for child in ours]
    workers[1].send_signal(signal.SIGKILL)


@pytest.mark.long
def test_two_workers_make_the_steps_of_one_process_though_one_of_them_is_killed(settings, ray_folder, tmp_path):
    process = launch(["-c", RUN, str(ray_folder), *command(settings, ray_folder)], ray_folder)
    kill_a_worker(process, Path(settings["output_dir"], "checkpoints"))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output[-4000:]
    assert "resumed from" in output
    assert Path(settings["output_dir"], "model", "config.json").is_file()

    Trainer(load_recipe(settings | {"output_dir": str(tmp_path / "one")}), display=Display(quiet=True)).run()
    found, expected = losses(Path(settings["output_dir"])), losses(tmp_path / "one")
    assert sorted(found) == list(range(1, 41))
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_stop_by_the_guard_ends_the_script_without_another_try(settings, tmp_path, monkeypatch):
    class OneWorker:  # in this process, in place of Ray's
        def __init__(self, work: Any, train_loop_config: dict[str, Any], **others: Any) -> None:
            self.fit = lambda: work(train_loop_config)

    stop = {"guard": "stop", "learning_rate": 0.3, "device": "cpu"}
    words = ["1" if word == "2" else word for word in command(settings | stop, tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr("ray.train.torch.TorchTrainer", OneWorker)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 4


def test_a_folder_that_holds_a_run_is_refused_before_ray_starts(settings, tmp_path):
    Path(settings["output_dir"]).mkdir()
    Path(settings["output_dir"], "metrics.jsonl").write_text("")
    done = forks.run(*command(settings, tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert "error: output_dir:" in done.stdout
    assert "Traceback" not in done.stdout
