"""The native trainer under the real launcher: processes that are killed or told to stop, and bad input.

The launcher and its processes are forks, but in one long test, which starts them as people do; what needs no launcher
is in tests/invariant.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import forks
import pytest
import yaml
from cases import rarely
from forks import num_tracebacks
from mesh_runs import assert_same_run, metrics, run
from miniature import recipe_in
from ranks import Ranks, free_port

from simpo.recipe import load_recipe
from simpo.run.resume import find_checkpoint, record_launch
from simpo.run.saved import list_checkpoints

Settings = dict[str, Any]

TESTS = Path(__file__).resolve().parents[1]
KEYS = {
    **{"dp_shard": 2, "gradient_accumulation_steps": 1, "save_steps": 4, "eval_steps": 5, "async_save": True},
    **{"num_eval_generations": 2, "eval_generation_max_new_tokens": 3},
}


def launch(
    recipe: Settings,
    *command: str | Path,
    restarts: int = 0,
    folder: Path,
    forked: bool = True,
    where: Sequence[str] = ("--standalone", "--nproc-per-node", "2"),
) -> subprocess.CompletedProcess[str]:
    """torchrun with two processes of a command that gets the recipe's file; its output, both streams together."""
    path = folder / "recipe-to-launch.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    words = ["-m", "torch.distributed.run", *where, "--max-restarts", str(restarts)]
    words += [str(path) if word == "RECIPE" else str(word) for word in command]
    sources = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": sources}
    if forked:
        return forks.run(*words, env=env)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([sys.executable, *words], env=env, timeout=600, check=False, **pipes)


@pytest.fixture
def recipe(tiny_recipe: Settings) -> Settings:
    return {**tiny_recipe, **KEYS}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, pair_files: Path, two_ranks: Ranks, tmp_path_factory) -> Path:
    """The run directory of the same two processes left alone."""
    recipe = recipe_in(tmp_path_factory.mktemp("uninterrupted"), tiny_model, pair_files) | KEYS
    assert two_ranks.run(run, recipe) == ["finished", "finished"]
    return Path(recipe["output_dir"])


@pytest.mark.parametrize("forked", [True, rarely(False)])
def test_a_launch_leaves_the_run_directory_of_one_process(
    forked: bool, recipe: Settings, uninterrupted: Path, tmp_path: Path
):
    done = launch(recipe, "-m", "simpo", "train", "RECIPE", folder=tmp_path, forked=forked)
    assert done.returncode == 0, done.stdout
    assert num_tracebacks(done.stdout) == 0, done.stdout
    folder = Path(recipe["output_dir"])
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    logs = {"audit.json", "eval_pairs.jsonl", "generations.jsonl", "metrics.jsonl"}
    assert names == {*logs, "checkpoints", "model", "recipe.yaml"}
    lines = [line for line in metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in metrics(folder) if "eval_loss" in line] == [5, 10]
    generated = [json.loads(line) for line in (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in generated] == [5, 5, 10, 10]
    assert load_recipe(folder / "recipe.yaml").to_dict() == load_recipe(recipe).to_dict()
    assert [done.stdout.splitlines().count(title) for title in ("training", "done")] == [1, 1]
    assert_same_run(folder, uninterrupted)


@pytest.mark.long
def test_processes_killed_twice_are_started_again_and_end_in_the_same_bits(
    recipe: Settings, uninterrupted: Path, tmp_path: Path
):
    rng = random.Random(11)
    plan = [[1, rng.randint(2, 4), "SIGKILL"], [0, rng.randint(6, 10), "SIGKILL"]]  # before and after a checkpoint
    done = launch(recipe, TESTS / "signalled_worker.py", "RECIPE", json.dumps(plan), restarts=2, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "resumed from" in done.stdout
    folder = Path(recipe["output_dir"])
    assert_same_run(folder, uninterrupted)
    generations = "generations.jsonl"
    assert (folder / generations).read_text() == (uninterrupted / generations).read_text()
    assert [c.step for c in list_checkpoints(folder / "checkpoints")] == [4, 8, 10]
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.long
def test_two_nodes_go_on_together_though_one_of_them_counts_no_restart(
    recipe: Settings, uninterrupted: Path, tmp_path: Path
):
    endpoint = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "job 7")
    options = {"where": ("--nnodes", "2", "--nproc-per-node", "1", *endpoint), "folder": tmp_path, "forked": False}
    words = recipe, TESTS / "signalled_worker.py", "RECIPE", json.dumps([[1, 6, "SIGKILL"]])
    with ThreadPoolExecutor(2) as pool:
        nodes = [pool.submit(launch, *words, restarts=1, **options) for _ in range(2)]
    outputs = [node.result().stdout for node in nodes]
    assert [node.result().returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert "resumed from" in "".join(outputs)
    assert_same_run(Path(recipe["output_dir"]), uninterrupted)


@pytest.mark.long
def test_sigterm_to_one_process_stops_all_after_the_same_step(
    recipe: Settings, uninterrupted: Path, two_ranks: Ranks, tmp_path: Path
):
    done = launch(recipe, TESTS / "signalled_worker.py", "RECIPE", json.dumps([[1, 6, "SIGTERM"]]), folder=tmp_path)
    assert done.returncode != 0
    assert done.stdout.count("stopped after step 6 of 10 and saved") == 1, done.stdout
    assert num_tracebacks(done.stdout) == 0, done.stdout
    folder = Path(recipe["output_dir"])
    assert [c.step for c in list_checkpoints(folder / "checkpoints")] == [4, 6]
    assert not list((folder / "checkpoints").glob(".*"))
    two_ranks.run(run, {**recipe, "resume_from_checkpoint": True})
    assert_same_run(folder, uninterrupted)


@pytest.mark.long
def test_the_guard_ends_both_processes_with_its_exit_code(recipe: Settings, tmp_path: Path):
    collapse = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    stop = {"guard": {"displacement": "stop", "learning_rate": "off"}}
    done = launch({**recipe, **collapse, **stop}, "-m", "simpo", "train", "RECIPE", folder=tmp_path)
    assert done.returncode != 0
    assert done.stdout.count("stopped by the guard after step") == 1, done.stdout
    assert re.findall(r"exitcode +: (\d+)", done.stdout)[:1] == ["4"], done.stdout
    assert num_tracebacks(done.stdout) == 0, done.stdout


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        # The first two without a launcher: invariant/test_mesh.py.
        rarely({"dp_shard": None, "tp": 3}, "the mesh (dp_replicate 1, cp 1, tp 3) needs a multiple of 3 processes"),
        rarely({"dp_shard": None, "tp": 2}, "tp = 2: does not divide this model's num_attention_heads = 9"),
        ({"learning_rte": 1.0}, "learning_rte"),
        rarely({"dataset_mixer": {"no/such/folder": 1.0}}, "no/such/folder"),
    ],
    ids=["mesh", "heads", "key", "data"],
)
def test_bad_input_is_one_line_of_one_process(keys: Settings, said: str, recipe: Settings, tmp_path: Path):
    done = launch({**recipe, **keys}, "-m", "simpo", "train", "RECIPE", folder=tmp_path)
    assert done.returncode != 0
    lines = [line for line in done.stdout.splitlines() if "error: " in line]
    assert len(lines) == 1, done.stdout
    assert said in lines[0]
    assert num_tracebacks(done.stdout) == 0, done.stdout
    assert not Path(recipe["output_dir"]).exists()


@pytest.mark.long
def test_the_one_line_is_said_however_late_the_first_process_comes(recipe: Settings, tmp_path: Path):
    """The launcher ends all processes as soon as one has left."""
    late = "import os, time; time.sleep(2 * (os.environ['RANK'] == '0')); from simpo.cli import main; main()"
    wrong = {**recipe, "learning_rte": 1.0}
    done = launch(wrong, "--no-python", sys.executable, "-c", late, "train", "RECIPE", folder=tmp_path)
    lines = [line for line in done.stdout.splitlines() if "error: " in line]
    assert len(lines) == 1, done.stdout
    assert "learning_rte" in lines[0]


# --- what a restart goes on from; no launcher needed -----------------------------------------------------------------


@pytest.fixture
def restarted(monkeypatch: pytest.MonkeyPatch):
    """restarted(launch, count): this process is the count-th restart of that launch."""

    def become(run_id: str, count: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))

    return become


def _leave_checkpoints(folder: Path, *steps: int) -> Path:
    for step in steps:
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
    return folder


def test_a_refused_launch_that_is_started_again_is_refused_again(restarted, tiny_recipe: Settings):
    recipe = load_recipe(tiny_recipe)
    folder = _leave_checkpoints(Path(recipe.output_dir), 4)
    restarted("an older launch", 0)
    record_launch(folder)
    for attempt in (0, 1, 2):
        restarted("this launch", attempt)
        with pytest.raises(ValueError, match="already holds a run"):
            find_checkpoint(recipe)


@pytest.mark.parametrize("run_id", ["job 7", "none"], ids=["run id", "no run id"])
def test_a_restart_goes_on_from_the_newest_checkpoint_of_its_launch(restarted, run_id, tiny_recipe: Settings):
    recipe = load_recipe(tiny_recipe)
    restarted(run_id, 0)
    assert find_checkpoint(recipe) is None
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True)
    record_launch(folder)
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    restarted(run_id, 1)
    assert find_checkpoint(recipe) is None  # lost before the first checkpoint: from the start
    _leave_checkpoints(folder, 4, 8)
    assert find_checkpoint(recipe).step == 8


def test_a_restart_before_the_first_save_goes_on_from_the_checkpoint_that_was_named(
    restarted, tiny_recipe: Settings, tmp_path: Path
):
    named = _leave_checkpoints(tmp_path / "elsewhere", 6) / "checkpoints" / "step-6"
    recipe = load_recipe({**tiny_recipe, "resume_from_checkpoint": str(named)})
    folder = Path(recipe.output_dir)
    restarted("job 7", 0)
    assert find_checkpoint(recipe).folder == named
    folder.mkdir(parents=True)
    record_launch(folder)
    restarted("job 7", 1)
    assert find_checkpoint(recipe).folder == named
    _leave_checkpoints(folder, 8)
    assert find_checkpoint(recipe).step == 8
