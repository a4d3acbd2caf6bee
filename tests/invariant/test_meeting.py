"""How the processes of a run meet, and how long they wait for each other."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mesh_runs import MESHES, build
from ranks import Ranks

from simpo.parallel import mesh

Settings = dict[str, Any]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store that torchrun keeps over its restarts, and the environment that names it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
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
