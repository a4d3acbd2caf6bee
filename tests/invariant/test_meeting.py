"""How the processes of a run meet, and how long they wait for each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mesh_runs import MESHES, build
from ranks import Ranks

from simpo.parallel import mesh
from simpo.run.resume import is_begun_by_this_launch, record_launch

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
