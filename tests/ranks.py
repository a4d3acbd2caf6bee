"""Ranks for tests: N processes joined by gloo, kept between tests, that run functions of the test files.

    def work(scale):                      # module level in a test file; runs on every rank
        return scale * dist.get_rank()

    def test_it(two_ranks):
        assert two_ranks.run(work, 3) == [0, 3]

Arguments and results are pickled. An exception on any rank fails the test with that rank's traceback. Ranks are forks
(forks.py), so that starting them anew is cheap.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

import forks
import pytest

ANSWER_S = 240  # after which a call counts as hung
GRACE_S = 5  # what the other ranks get to answer once one has failed


class RankFailed(AssertionError):
    """A function failed on some rank, or a rank died or hung; the message has every traceback there is."""


class Place:
    """Stands for a process group where only its rank and size are looked at."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = (lambda: rank), (lambda: size)


class Ranks:
    """N worker processes in one gloo process group; started at the first call, anew after a failure.

    Attributes:
        size: their number.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """function(*args, **kwargs) on every rank; the results in the ranks' order.

        Raises:
            RankFailed: it raised on some rank, or a rank died or hung.
        """
        outcomes = self.outcomes(function, *args, **kwargs)
        failed = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)}
        if failed:
            texts = [f"--- rank {rank}\n{_describe(error)}" for rank, error in failed.items()]
            raise RankFailed("\n".join(["", *texts]))
        return outcomes

    def outcomes(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """As `run`, with the exception where a rank raised one, and RankFailed where it died or hung."""
        if not self._processes:
            self._start()
        code = function.__code__
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((code.co_filename, function.__qualname__, args, kwargs)))
        outcomes: list[Any] = [RankFailed("no answer: it hung, or another rank failed first")] * self.size
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        until, healthy = time.monotonic() + ANSWER_S, True
        while waiting and (left := until - time.monotonic()) > 0:
            for connection in wait(list(waiting), timeout=left):
                rank = waiting.pop(connection)
                try:
                    fine, outcome = pickle.loads(connection.recv_bytes())
                except EOFError:
                    fine, outcome = False, RankFailed("the process died")
                outcomes[rank] = outcome
                if not fine and healthy:
                    healthy, until = False, min(until, time.monotonic() + GRACE_S)
        if not healthy or waiting:
            self.stop()  # a group in which one rank left early is of no use to the next test
        return outcomes

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        port = free_port()
        with tempfile.TemporaryDirectory() as folder, Listener(str(Path(folder) / "ranks"), "AF_UNIX") as listener:
            for rank in range(self.size):
                self._processes.append(forks.process(_serve, listener.address, rank_environment(rank, self.size, port)))
                self._processes[-1].start()
            found = [listener.accept() for _ in range(self.size)]
        self._connections = [connection for _, connection in sorted((c.recv(), c) for c in found)]


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment that torchrun would give a rank of one machine, with one thread each."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _describe(error: BaseException) -> str:
    return getattr(error, "rank_traceback", None) or f"{type(error).__name__}: {error}"


def _load_function(path: str, name: str) -> Callable[..., Any]:
    """A function of a test file, which importlib mode keeps out of sys.modules' usual names."""
    module = sys.modules.get(path)
    if module is None:
        spec = importlib.util.spec_from_file_location(f"ranks_of_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path] = sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return getattr(module, name)


def _serve(address: str, environment: dict[str, str]) -> None:
    """A rank's life: join the group, then run what is asked for until the parent goes away."""
    import torch
    import torch.distributed as dist

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with Client(address, "AF_UNIX") as connection:
        connection.send(int(os.environ["RANK"]))
        dist.init_process_group("gloo")
        _keep_meshes()
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                path, name, args, kwargs = pickle.loads(connection.recv_bytes())
                _drop_groups()  # now that every rank has answered the call before
                connection.send_bytes(pickle.dumps(_outcome(path, name, args, kwargs)))  # tensors by value
    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way


def _keep_meshes() -> None:
    """Give the same device mesh to all that ask for the same sizes and names.

    DTensor's caches take two such meshes for one, and would hand the groups of an earlier test to a later one.
    """
    import torch.distributed as dist

    dist.init_device_mesh = dist.device_mesh.init_device_mesh = functools.cache(dist.device_mesh.init_device_mesh)


def _drop_groups() -> None:
    """End the process groups that belong to no mesh: each has threads of its own, and some tests make dozens."""
    import torch.distributed as dist

    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and not group.group_desc.startswith("mesh_"):
            dist.destroy_process_group(group)


def _outcome(path: str, name: str, args: Any, kwargs: Any) -> tuple[bool, Any]:
    try:
        result = _load_function(path, name)(*args, **kwargs)
        pickle.dumps(result)
        return True, result
    except BaseException as error:
        text = traceback.format_exc()
        try:
            error.rank_traceback = text
            error.__traceback__ = None
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RankFailed(text)
        return False, error


def _ranks(size: int) -> Iterator[Ranks]:
    ranks = Ranks(size)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two processes joined by gloo."""
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """Four processes joined by gloo; tests that use it carry the mark four_processes."""
    yield from _ranks(4)
