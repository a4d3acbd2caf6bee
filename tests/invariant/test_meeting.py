"""How the processes of a run meet, and how long they wait for each other."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import rarely
from mesh_runs import MESHES, assert_same_run, build, metrics, run
from ranks import Ranks

from simpo.parallel import mesh
from simpo.recipe import load_recipe
from simpo.run.resume import is_begun_by_this_launch, record_launch
from simpo.run.saved import list_checkpoints

Settings = dict[str, Any]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store that torchrun keeps over its restarts, and the environment that names it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place["TORCHELASTIC_RESTART_COUNT"] = "0"
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    return store


def timeouts(settings: Settings) -> list[timedelta]:
    """Of all process groups once a trainer is ready."""
    trainer = build(settings)
    found = [group._get_backend(torch.device("cpu")).options._timeout for group in dist.distributed_c10d._pg_map]
    trainer.mesh.limit_waits(1800)  # as other tests expect it
    return found


def test_every_group_waits_as_long_as_the_recipe_says(two_ranks: Ranks, tiny_recipe: Settings):
    keys = {**MESHES["fsdp2"], "async_save": True, "ddp_timeout": 77}
    found = two_ranks.run(timeouts, {**tiny_recipe, **keys})
    assert found[0] == found[1]
    assert len(found[0]) > 1
    assert set(found[0]) == {timedelta(seconds=77)}


def test_nccl_waits_as_long_for_the_others_address(agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch):
    joined: Settings = {}
    monkeypatch.setattr(dist, "init_process_group", lambda **options: joined.update(options))
    mesh._init_process_group(1, torch.device("cpu"), timeout=timedelta(seconds=7200))
    assert joined["store"].timeout == joined["timeout"] == timedelta(seconds=7200)


def meet(agent: dist.TCPStore, ranks: list[int], world: int, wait_s: float = 60) -> list[Any]:
    """The attempt that each of these ranks finds itself in, or what it raises."""

    def count(rank: int) -> Any:
        wait = timedelta(seconds=wait_s)
        store = dist.TCPStore("127.0.0.1", agent.port, is_master=False, timeout=wait)
        try:
            return mesh._count_attempt(store, rank, world, timeout=wait)
        except dist.DistError as error:
            return type(error)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(count, ranks))


def test_processes_of_all_nodes_know_which_attempt_it_is(agent: dist.TCPStore):
    assert meet(agent, [0, 1, 2], 3) == [1, 1, 1]
    assert meet(agent, [0, 2], 3, wait_s=1) == [dist.DistStoreError, 2]  # rank 1 never came
    meet(agent, [1, 2], 3, wait_s=0.2)  # and here rank 0 did not
    assert meet(agent, [2, 1, 0], 3) == [3, 3, 3]


def test_a_node_that_counted_no_restart_is_in_the_same_attempt(agent: dist.TCPStore, monkeypatch, tmp_path: Path):
    """Of two nodes, that of rank 0 started again only because the other one did."""
    joined: Settings = {}
    monkeypatch.setattr(dist, "init_process_group", lambda **options: joined.update(options))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    for restarted in (False, True):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        with ThreadPoolExecutor(1) as other:
            there = other.submit(meet, agent, [1], 2)
            mesh._init_process_group(2, torch.device("cpu"), timeout=timedelta(seconds=60))
        joined["store"].set("address", "mine")
        assert agent.get(f"simpo attempt {there.result()[0]}/address") == b"mine"
        assert is_begun_by_this_launch(tmp_path) == restarted
        record_launch(tmp_path)


def be_patient(seconds: float) -> mesh.Mesh:
    """Two processes of a group that waits so long, and its store."""
    ours = mesh.Mesh(mesh.MeshSizes(dp_replicate=2), device=torch.device("cpu"))
    dist.distributed_c10d._get_default_store().set_timeout(timedelta(seconds=seconds))
    ours.limit_waits(seconds)
    return ours


def work_alone(seconds: float, *, patience_s: float) -> list[str]:
    """What comes of long work on rank 0, and on each in turn."""
    ours = be_patient(patience_s)
    try:
        return [share(lambda: time.sleep(seconds) or f"of {ours.rank}") for share in (ours.on_main, ours.main_first)]
    finally:
        be_patient(1800)


def wait_for_one_that_is_gone() -> str:
    """What the last process hears of the first."""
    be_patient(1)
    if dist.get_rank() == 0:
        return ""
    with pytest.raises(RuntimeError) as error, mesh._others_waiting(is_at_work=False):
        pass
    return str(error.value)


@pytest.mark.long
def test_work_of_one_process_may_take_longer_than_a_collective(two_ranks: Ranks):
    assert two_ranks.run(work_alone, 5, patience_s=2) == [["of 0", "of 0"], ["of 0", "of 1"]]


def test_a_process_that_is_gone_is_not_waited_for_longer(two_ranks: Ranks):
    heard = two_ranks.run(wait_for_one_that_is_gone)
    two_ranks.stop()  # whose members do not agree any more
    assert heard == ["", "nothing was heard for 1 s of the processes that the others wait for"]


def test_tasks_of_srun_that_would_each_be_a_run_are_refused(monkeypatch: pytest.MonkeyPatch, tiny_recipe: Settings):
    recipe, device = load_recipe(tiny_recipe), torch.device("cpu")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getppid()))
    with pytest.raises(ValueError, match=r"^srun started 16 tasks, .*one torchrun a node.*docs/scaling.md"):
        mesh.join_world(recipe, device)
    for name, value in (("WORLD_SIZE", "1"), ("SLURM_TASK_PID", "1"), ("SLURM_STEP_NUM_TASKS", "1")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert mesh.join_world(recipe, device).sizes.world == 1


@pytest.mark.parametrize("evaluating", [rarely(False), True], ids=["before", "meanwhile"])
def test_an_evaluation_does_not_put_off_a_stop(evaluating: bool, two_ranks: Ranks, tiny_recipe: Settings, tmp_path):
    """Asked before it, the run is saved at once, and the evaluation made up for; meanwhile, right after it."""
    recipe = {**tiny_recipe, **MESHES["dp2"], "gradient_accumulation_steps": 1, "max_steps": 4, "eval_steps": 2}
    recipe |= {"load_best_model_at_end": True, "greater_is_better": True, "save_steps": 2}  # the first one is best
    undisturbed = {**recipe, "output_dir": str(tmp_path / "undisturbed")}
    assert two_ranks.run(run, undisturbed) == ["finished"] * 2
    folder = Path(recipe["output_dir"])
    assert two_ranks.run(run, recipe, stop_after=2, evaluating=evaluating) == ["interrupted"] * 2
    assert [c.step for c in list_checkpoints(folder / "checkpoints")] == [2]
    assert [line["step"] for line in metrics(folder) if "eval_loss" in line] == [2] * evaluating
    on = {**recipe, "resume_from_checkpoint": True}
    assert two_ranks.run(run, on, stop_after=3) == ["interrupted"] * 2
    if not evaluating:
        shutil.rmtree(folder / "checkpoints" / "step-3")  # as if it had been killed: the made-up evaluation is logged
    assert two_ranks.run(run, on) == ["finished"] * 2
    assert_same_run(folder, Path(undisturbed["output_dir"]))
    assert "2 of 4" in (folder / "model" / "README.md").read_text(encoding="utf-8")
