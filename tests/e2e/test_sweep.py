"""A sweep and a calibration of a tiny model, with all their processes; Ray Tune; a kill."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import forks
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
    assert [line.split()[1] for line in comments[1:5]] == ["gamma_beta_ratio", "beta", "learning_rate", "budget:"]
    recipe = load_recipe(written)
    found = read_sweep(Path(tiny_recipe["output_dir"]) / "calibration" / "probes" / "sweep.json")
    assert f"{recipe.learning_rate:g}" == f"{float(found.best.settings['learning_rate']):g}"
    assert 0.1 <= recipe.gamma_beta_ratio <= 1.2
    assert CliRunner().invoke(app, ["train", str(written), "--max_steps", "2"]).exit_code == 0


def words_of(recipe: dict[str, Any], folder: Path) -> list[str]:
    path = save({**recipe, "output_dir": str(folder)}, folder.parent / "recipe.yaml")
    return ["sweep", str(path), "--learning_rate", "1e-3,4e-3", "--max_steps", "4", "--generations", "0"]


@pytest.fixture(scope="module")
def whole(sweeps_in_process, tiny_recipe_in, tmp_path_factory) -> Path:
    """sweep.json of an undisturbed one."""
    folder = tmp_path_factory.mktemp("whole")
    result = CliRunner().invoke(app, words_of(tiny_recipe_in(folder), folder / "sweep"))
    assert result.exit_code == 0, result.output
    return folder / "sweep" / "sweep.json"


def test_a_killed_sweep_goes_on_and_comes_to_the_same(whole, tiny_recipe, tmp_path):
    """Its commands, forks like itself, go with it."""
    start = "import forks, simpo.cli, simpo.tuning.jobs as jobs; forks.start_forks(jobs); simpo.cli.main()"
    words, found = ["-c", start, *words_of(tiny_recipe, tmp_path / "sweep")], tmp_path / "sweep" / "sweep.json"
    for _ in range(2):
        child = forks.Program(words)
        before = found.stat().st_mtime_ns if found.exists() else 0
        while not found.exists() or found.stat().st_mtime_ns == before:
            assert child.poll() is None
            time.sleep(0.05)
        child.kill()
        child.wait()
        time.sleep(1)  # its child goes with it
    done = forks.run(*words)
    assert done.returncode == 0, done.stdout
    contents = [json.loads(path.read_text()) for path in (whole, found)]
    for content in contents:
        for each in [content["untrained"], *(r for t in content["trials"] for r in t["results"])]:
            del each["time_s"]
    assert contents[0] == contents[1]


def test_ray_tune_runs_trials_and_comes_to_the_same(whole, tiny_recipe, tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.tune")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        recipe = load_recipe(tiny_recipe, {"max_steps": 4})
        path = run_sweep(recipe, {"learning_rate": ("1e-3", "4e-3")}, generations=0, ray=True)
    finally:
        ray.shutdown()
    expected, found = read_sweep(whole).best, read_sweep(path).best
    assert (found.settings, found.last.accuracy, found.last.margin) == (
        *(expected.settings, expected.last.accuracy, expected.last.margin),
    )
