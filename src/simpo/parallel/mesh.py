"""The processes of a run: how many, which of them this one is, and how they agree.

One mesh of four sizes, outermost first:

    dp_replicate   copies of the model; different pairs
    dp_shard       weights, gradients and moments sharded (FSDP2); different pairs
    cp             one row's tokens shared out (context parallel); the same pairs
    tp             one weight shared out (tensor parallel); the same pairs

Neighbouring ranks share the innermost size, so tp talks most and travels least. Started by torchrun, or by anything
else that sets its environment variables; a run of one process needs none of this and starts no process group. Must not
import data, train or evaluate.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from simpo.core.context import split_rows
from simpo.errors import explain
from simpo.parallel.agreement import check_agreement, recipe_facts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from simpo.core.batch import PackedPairs
    from simpo.recipe import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class MeshSizes:
    """The mesh of a run; every size at least 1."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        """All processes."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data(self) -> int:
        """Processes (or groups of them) that each see different pairs."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard(self) -> int:
        """Processes that a weight's shards are spread over, apart from tp: context parallel ranks hold shards too."""
        return self.dp_shard * self.cp

    @property
    def gradient(self) -> int:
        """Processes whose gradients add up to one tp rank's; torch's wrappers average over them."""
        return self.data * self.cp

    @property
    def is_sharded(self) -> bool:
        """Whether transformers shards the model (FSDP2, HSDP, TP); otherwise it is whole on every process."""
        return self.shard > 1 or self.tp > 1

    def __str__(self) -> str:
        if self.world == 1:
            return "1 process"
        parts = [f"{name} {size}" for name, size in asdict(self).items() if size != 1]
        return f"{self.world} processes: {' x '.join(parts)}"


def mesh_sizes(recipe: Recipe, world: int) -> MeshSizes:
    """The recipe's mesh over `world` processes.

    Raises:
        ValueError: the sizes do not multiply to the world.
    """
    given = recipe.dp_replicate * recipe.cp * recipe.tp
    shard = recipe.dp_shard
    if shard is None and world % given == 0:
        shard = world // given
    if shard is None or given * shard != world:
        sizes = f"dp_replicate {recipe.dp_replicate}, cp {recipe.cp}, tp {recipe.tp}"
        sizes += "" if recipe.dp_shard is None else f", dp_shard {recipe.dp_shard}"
        need = f"a multiple of {given}" if recipe.dp_shard is None else str(given * recipe.dp_shard)
        raise ValueError(
            f"the mesh ({sizes}) needs {need} processes, but {world} {'was' if world == 1 else 'were'} started; "
            "change the sizes, or the number of processes (torchrun --nproc-per-node)"
        )
    return MeshSizes(recipe.dp_replicate, shard, recipe.cp, recipe.tp)


class Mesh:
    """This process's place in the mesh, and what the processes say to each other.

    With one process every method is the identity and `cp_group` is None.

    Args:
        sizes: of the mesh; their product is the number of processes in torch's default group.
        device: where this process computes.
    Attributes:
        rank: 0..world - 1.
        data_rank: which share of the pairs this process computes, 0..sizes.data - 1.
        cp_rank, cp_group: among the processes that share its rows; None where there is one.
        gradient_group: the processes whose gradients belong together; None where there is one.
    """

    def __init__(self, sizes: MeshSizes, *, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.rank = self.data_rank = self.cp_rank = 0
        self.data_group: ProcessGroup | None = None
        self.cp_group: ProcessGroup | None = None
        self.gradient_group: ProcessGroup | None = None
        if sizes.world == 1:
            return
        self.rank = dist.get_rank()
        mesh = dist.init_device_mesh(device.type, (sizes.data, sizes.cp, sizes.tp), mesh_dim_names=("data", "cp", "tp"))
        self.data_rank, self.cp_rank = mesh.get_local_rank("data"), mesh.get_local_rank("cp")
        if sizes.data > 1:
            self.data_group = mesh.get_group("data")
        if sizes.cp > 1:
            self.cp_group = mesh.get_group("cp")
        if sizes.gradient > 1:
            flat = dist.init_device_mesh(device.type, (sizes.gradient, sizes.tp), mesh_dim_names=("gradient", "tp"))
            self.gradient_group = flat.get_group("gradient")

    def own_rows(self, batch: PackedPairs) -> PackedPairs:
        """This process's slice of a batch's tokens; without context parallelism the batch itself."""
        return batch if self.cp_group is None else split_rows(batch, self.cp_group)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def sum_over_data(self, values: Tensor) -> Tensor:
        """The sum over all pairs' processes of a tensor that is equal within cp and tp, in place where it has to be."""
        if self.data_group is not None:
            dist.all_reduce(values, group=self.data_group)
        return values

    def sum_over_all(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place where it has to be."""
        if self.sizes.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks, on every process; anything that pickles."""
        if self.sizes.world == 1:
            return [value]
        found: list[Any] = [None] * self.sizes.world
        dist.all_gather_object(found, value)
        return found

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every process."""
        if self.sizes.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast(self, values: Tensor) -> Tensor:
        """Rank 0's values, on every process, in place where it has to be."""
        if self.sizes.world > 1:
            dist.broadcast(values, src=0)
        return values

    def limit_waits(self, seconds: int) -> None:
        """Let each process group, whoever made it, wait as long for a process; new ones wait torch's half an hour."""
        if self.sizes.world > 1:
            for group in dist.distributed_c10d._pg_map:
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def barrier(self) -> None:
        """Wait for all."""
        if self.sizes.world > 1:
            dist.barrier()

    def on_main(self, function: Callable[[], T]) -> T:
        """function() on rank 0 alone; its result on every process, or the exception it raised."""
        return self.from_main(self._attempt(function, is_my_turn=self.is_main))

    def on_each_node(self, function: Callable[[], T]) -> T | None:
        """function() on one process of each node, whose folders may differ; None on the others. What one raises, all
        raise."""
        return self._attempt(function, is_my_turn=local_rank() == 0)

    def main_first(self, function: Callable[[], T]) -> T:
        """function() on every process: on rank 0 first, then on one of each node, then on the rest.

        For what the first to come writes to a cache and the others read. What one raises, all raise.
        """
        turn = 0 if self.is_main else 1 if local_rank() == 0 else 2
        return [self._attempt(function, is_my_turn=now == turn) for now in range(3)][turn]

    def _attempt(self, function: Callable[[], T], *, is_my_turn: bool) -> T | None:
        result, error = None, None
        with _others_waiting(is_at_work=is_my_turn) if self.sizes.world > 1 else contextlib.nullcontext():
            try:
                result = function() if is_my_turn else None
            except Exception as caught:
                error = caught
        self.raise_together(error)
        return result

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every process if any of them has an error: its own where it has one, else the first rank's."""
        errors = self.gather(_portable(error)) if self.sizes.world > 1 else [error]
        if error is not None:
            raise error
        first = next((found for found in errors if found is not None), None)
        if first is not None:
            raise first


_turns = itertools.count()


@contextlib.contextmanager
def _others_waiting(*, is_at_work: bool) -> Iterator[None]:
    """Around what some processes do while the others wait: left together, however long it takes.

    An upload, or tokenising much data, takes longer than a collective may wait. Those at work say now and then that
    they still are; the group's timeout is how long nothing may be heard.
    """
    store, turn, over = dist.distributed_c10d._get_default_store(), f"simpo turn {next(_turns)}", threading.Event()
    patience_s = store.timeout.total_seconds()

    def beat() -> None:
        with contextlib.suppress(dist.DistError):  # the store is gone, and with it whoever waits
            while not over.wait(min(30.0, patience_s / 4)):
                store.add(f"{turn}, beats", 1)

    if is_at_work:
        threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        over.set()
    store.add(turn, 1)
    heard, since, pause_s = (0, 0), time.monotonic(), 1e-3
    while (now := (store.add(turn, 0), store.add(f"{turn}, beats", 0)))[0] < dist.get_world_size():
        if now != heard:
            heard, since = now, time.monotonic()
        elif time.monotonic() - since > patience_s:
            raise RuntimeError(f"nothing was heard for {patience_s:g} s of the processes that the others wait for")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)


def _portable(error: Exception | None) -> Exception | None:
    """The exception as another process can raise it: kinds with arguments of their own do not always pickle."""
    if error is None or type(error) in (ValueError, RuntimeError):
        return error and type(error)(str(error))
    if isinstance(error, OSError):
        return OSError(explain(error))
    kind = ValueError if isinstance(error, ValueError) else RuntimeError
    return kind(f"{type(error).__name__}: {error}")


def local_rank() -> int:
    """Which process of its machine this one is."""
    return _number("LOCAL_RANK", dist.get_rank() if dist.is_initialized() else 0)


def join_world(recipe: Recipe, device: torch.device) -> Mesh:
    """Meet the other processes and check that all are there; a single process has none to meet.

    A process group that exists already (Ray, a notebook, a test) is used as it is. Of several GPUs a process takes the
    one of its local rank.

    Raises:
        ValueError: the mesh does not fit the number of processes, recipes differ, a GPU is missing, or srun started
            several runs.
    """
    if not dist.is_initialized() and "WORLD_SIZE" not in os.environ:
        _refuse_tasks_without_launcher()
    sizes = mesh_sizes(recipe, dist.get_world_size() if dist.is_initialized() else _number("WORLD_SIZE", 1))
    if sizes.world == 1:
        return Mesh(sizes, device=device)
    if device.type == "cuda":
        device = _own_gpu()
    elif torch.cuda.is_available():
        raise ValueError("device: cpu with several processes: hide the GPUs with CUDA_VISIBLE_DEVICES= (empty)")
    if not dist.is_initialized():
        _init_process_group(sizes.world, device, timeout=timedelta(seconds=recipe.ddp_timeout))
    if device.type == "cuda":
        _check_own_gpu(device)
    backend = str(dist.get_backend_config())
    wanted = "nccl" if device.type == "cuda" else "gloo"
    if wanted not in backend:
        raise ValueError(f"the process group uses {backend}; processes that compute on {device.type} need {wanted}")
    check_agreement(recipe_facts(recipe))  # before groups are made from it
    return Mesh(sizes, device=device)


def _refuse_tasks_without_launcher() -> None:
    """Raise ValueError where srun started this very command several times, without a launcher to make them one run."""
    tasks, task = _number("SLURM_STEP_NUM_TASKS", 1), _number("SLURM_TASK_PID", 0)
    if tasks > 1 and task in (os.getpid(), os.getppid()):  # or of a shell; Ray's and a sweep's runs are further down
        raise ValueError(
            f"srun started {tasks} tasks, and each would be a run of its own: start one torchrun a node, as the Slurm "
            "script in docs/scaling.md does (WORLD_SIZE=1 if they are to be runs of their own)"
        )


def _own_gpu() -> torch.device:
    """The GPU of this process's local rank; the only one it sees, where a launcher shows each process its own."""
    number, count = local_rank(), torch.cuda.device_count()
    if number >= count > 1:
        raise ValueError(
            f"process {number} of this machine has no GPU of its own: torch sees {count}; "
            f"start {count} processes a machine (torchrun --nproc-per-node {count})"
        )
    device = torch.device("cuda", number if count > 1 else 0)
    torch.cuda.set_device(device)
    return device


def _check_own_gpu(device: torch.device) -> None:
    """Raise ValueError, on every process, where two compute on one GPU."""
    mine = str(getattr(torch.cuda.get_device_properties(device), "uuid", dist.get_rank()))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for rank, gpu in enumerate(found):
        if found.index(gpu) < rank:
            raise ValueError(
                f"processes {found.index(gpu)} and {rank} compute on the same GPU ({gpu}); start as many processes a "
                "machine as it has GPUs (torchrun --nproc-per-node), or let the launcher give each process its own "
                "(srun --gpus-per-task=1)"
            )


@contextlib.contextmanager
def local_rank_of(device: torch.device) -> Iterator[None]:
    """Inside, LOCAL_RANK is the number of this process's GPU, since transformers computes on the GPU of that number."""
    before = os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and (before is not None or dist.is_initialized()):
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        os.environ.pop("LOCAL_RANK", None)
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def _init_process_group(world: int, device: torch.device, *, timeout: timedelta) -> None:
    # Tensors on GPUs go through NCCL; what lies in CPU memory (offloaded shards, checkpoints, texts) through gloo.
    options: dict[str, Any] = {
        "backend": "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        "timeout": timeout,
        "rank": _number("RANK", 0),
        "world_size": world,
    }
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps one store over its restarts, in which the addresses of processes that died would be found.
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Its timeout, 300 s if none is given, is also NCCL's for the first collective of a group.
        agent = dist.TCPStore(*place, is_master=False, timeout=timeout)
        attempt = _count_attempt(agent, options["rank"], world, timeout=timeout)
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt - 1)  # torchrun's own differs between nodes
        options["store"] = dist.PrefixStore(f"simpo attempt {attempt}", agent)
    dist.init_process_group(**options)


def _count_attempt(agent: dist.Store, rank: int, world: int, *, timeout: timedelta) -> int:
    """Which attempt of the launch this is, from 1, the same on every process.

    A node whose process died counts a restart, and one that starts again only because the others do counts none.
    Therefore rank 0 counts, and answers every ticket that another has drawn. Tickets of earlier attempts have nobody
    waiting for them: torchrun starts no process before those of all nodes have ended.
    """
    if rank > 0:
        ticket = agent.add("simpo tickets", 1)
        attempt = int(agent.get(f"simpo ticket {ticket}"))
        agent.add(f"simpo attempt {attempt}", 1)
        return attempt
    attempt, answered, until = agent.add("simpo attempts", 1), 0, time.monotonic() + timeout.total_seconds()
    while (met := agent.add(f"simpo attempt {attempt}", 0) + 1) < world:
        drawn = agent.add("simpo tickets", 0)
        for ticket in range(answered + 1, drawn + 1):
            agent.set(f"simpo ticket {ticket}", str(attempt))
        answered = drawn
        if time.monotonic() > until:
            raise dist.DistStoreError(f"{met} of {world} processes came within {timeout}")
        time.sleep(0.05)
    return attempt


def leave_world() -> None:
    """Leave the process group, if there is one, once all are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_said_by_main(line: str) -> bool:
    """Whether rank 0 says this very line too, so that this process need not; on rank 0: False, and the others learn.

    For processes in a group. Waits ten seconds for rank 0.
    """
    store = dist.distributed_c10d._get_default_store()
    key = f"said {hashlib.sha256(line.encode()).hexdigest()}"
    try:
        if dist.get_rank() == 0:
            store.set(key, "yes")
            return False
        store.wait([key], timedelta(seconds=10))
    except Exception:  # rank 0, or the machine it was on, is gone
        return False
    return True


def restart_count() -> int:
    """How often torchrun has started this run again; the same on every process once they have met."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
