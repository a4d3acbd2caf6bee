"""A sweep and a calibration of a tiny model, with all their processes; Ray Tune; a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simpo.cli import app
from simpo.recipe import load_recipe
from simpo.tuning.sweep import read_sweep, run_sweep

pytestmark = pytest.mark.long


def save(recipe: dict[str, Any], path: Path) -> Path:
    load_recipe(recipe).save(path)
    return path


@pytest.mark.usefixtures("sweeps_in_process")
def test_calibrate_writes_a_recipe_that_trains_with_the_reasons_in_front(tiny_recipe, tmp_path):
    path = save(tiny_recipe, tmp_path / "recipe.yaml")
    result = CliRunner().invoke(app, ["calibrate", str(path), "--max_steps", "24"])
    assert result.exit_code == 0, result.output
    written = Path(tiny_recipe["output_dir"]) / "calibrated.yaml"
    text = written.read_text()
    comments = [line for line in text.split("\n") if line.startswith("# ")]
    assert [line.split()[1] for line in comments[:4]] == ["gamma_beta_ratio", "beta", "learning_rate", "budget:"]
    recipe = load_recipe(written)
    found = read_sweep(Path(tiny_recipe["output_dir"]) / "calibration" / "probes" / "sweep.json")
    assert f"{recipe.learning_rate:g}" == f"{float(found.best.settings['learning_rate']):g}"
    assert 0.1 <= recipe.gamma_beta_ratio <= 1.2
    assert CliRunner().invoke(app, ["train", str(written), "--max_steps", "2"]).exit_code == 0


def test_a_killed_sweep_goes_on_and_comes_to_the_same(tiny_recipe, tmp_path):
    words = [sys.executable, "-m", "simpo", "sweep", str(save(tiny_recipe, tmp_path / "recipe.yaml"))]
    words += ["--learning_rate", "1e-3,4e-3", "--max_steps", "4", "--generations", "0"]
    found = []
    for name, kills in (("whole", 0), ("killed", 2)):
        folder = tmp_path / name
        for _ in range(kills):
            child = subprocess.Popen([*words, "--output_dir", str(folder)], start_new_session=True)
            before = (folder / "sweep.json").stat().st_mtime_ns if (folder / "sweep.json").exists() else 0
            while not (folder / "sweep.json").exists() or (folder / "sweep.json").stat().st_mtime_ns == before:
                assert child.poll() is None
                time.sleep(0.05)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            time.sleep(1)  # its child goes with it
        subprocess.run([*words, "--output_dir", str(folder)], check=True)
        content = json.loads((folder / "sweep.json").read_text())
        for each in [content["untrained"], *(r for t in content["trials"] for r in t["results"])]:
            del each["time_s"]
        found.append(content)
    assert found[0] == found[1]


def test_ray_tune_runs_trials_and_comes_to_the_same(tiny_recipe, tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.tune")
    space = {"learning_rate": ("1e-3", "4e-3")}
    results = []
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        for name in ("here", "ray"):
            recipe = load_recipe(tiny_recipe, {"output_dir": str(tmp_path / name), "max_steps": 4})
            found = read_sweep(run_sweep(recipe, space, generations=0, ray=name == "ray"))
            results.append((found.best.settings, found.best.last.accuracy, found.best.last.margin))
    finally:
        ray.shutdown()
    assert results[0] == results[1]
