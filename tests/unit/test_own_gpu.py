"""parallel.mesh: which GPU a process takes, with a stand-in for torch.cuda where there is none."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from simpo.parallel import mesh


def see(gpus: list[str]) -> list[torch.device]:
    """Let torch.cuda show GPUs of these UUIDs, and no more; returns the devices that will be set."""
    devices: list[torch.device] = []
    torch.cuda.device_count = lambda: len(gpus)
    torch.cuda.set_device = devices.append
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=gpus[device.index])
    return devices


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch):
    for name in ("device_count", "set_device", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))  # put back after the test
    return see


@pytest.mark.parametrize(
    ("local_rank", "gpus", "index"), [(0, "ab", 0), (1, "ab", 1), (0, "a", 0), (1, "a", 0), (7, "h", 0)]
)
def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_it_sees(monkeypatch, seen, local_rank, gpus, index):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    set_devices = seen(list(gpus))
    assert mesh._own_gpu() == torch.device("cuda", index)
    assert set_devices == [torch.device("cuda", index)]


def test_more_processes_than_visible_gpus_are_refused(monkeypatch, seen):
    monkeypatch.setenv("LOCAL_RANK", "2")
    seen(["a", "b"])
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own: torch sees 2; start 2"):
        mesh._own_gpu()


def take_gpu(shown: list[list[str]]) -> torch.device:
    kept = {name: getattr(torch.cuda, name) for name in ("device_count", "set_device", "get_device_properties")}
    try:
        see(shown[dist.get_rank()])
        device = mesh._own_gpu()
        mesh._check_own_gpu(device)
        return device
    finally:
        for name, function in kept.items():
            setattr(torch.cuda, name, function)


def test_a_launcher_that_shows_each_process_its_own_gpu_is_served(two_ranks: Ranks):
    assert two_ranks.run(take_gpu, [["GPU-a"], ["GPU-b"]]) == [torch.device("cuda", 0)] * 2


def test_two_processes_on_one_gpu_are_refused_on_both(two_ranks: Ranks):
    for outcome in two_ranks.outcomes(take_gpu, [["GPU-a"], ["GPU-a"]]):
        assert isinstance(outcome, ValueError)
        assert "processes 0 and 1 compute on the same GPU (GPU-a); start as many" in str(outcome)


def test_transformers_is_told_the_number_of_the_gpu_while_it_loads(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    with mesh.local_rank_of(torch.device("cuda", 0)):
        assert os.environ["LOCAL_RANK"] == "0"
    assert os.environ["LOCAL_RANK"] == "3"
    with mesh.local_rank_of(torch.device("cpu")):
        assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(mesh.dist, "is_initialized", lambda: True)
    with mesh.local_rank_of(torch.device("cuda", 1)):  # in a group that somebody else made
        assert os.environ["LOCAL_RANK"] == "1"
    assert "LOCAL_RANK" not in os.environ
