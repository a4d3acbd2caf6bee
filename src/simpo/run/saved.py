"""What lies on the disk: which checkpoints there are, their states in any format, and whether they are whole.

Every file that a resumed run reads is checked first: it has a digest, and what it holds the right type. Where something
is wrong, the newest checkpoint that is whole to its last bit is named. Must not import the trainer or evaluation.

A checkpoint of any older simpo has to be resumable: `load_state` gives its state in the present format. Raise `FORMAT`
when an older simpo would read a new checkpoint wrongly, and teach `load_state` what the format before it had. Recipe
keys, fields of the progress and metrics may come and go without that: what is missing gets its default.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ValidationError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from simpo.data.files import digest_file, sync, sync_tree, write_whole
from simpo.errors import first_line
from simpo.parallel.mesh import Mesh, MeshSizes
from simpo.run.digest import FILES_FILE, check_files, digest_tensors, digest_values
from simpo.run.plain import NotData, only_data, read_index

FORMAT = 2
"""0: no number is written; sums of metrics in a list; the data is known by a hash of source files. 1: sums by name; the
data is known by its tokens. 2: random-number states in JSON, not pickled; digests of all files."""
STATE_FILE = "trainer_state.json"
RNG_FILE = "rng-{rank}.json"
AT_ONCE = 2**28
"""Bytes of tensors that are read together where a checkpoint is only looked through."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int


@dataclass(frozen=True)
class CheckpointKind:
    """How a host's checkpoints are known."""

    command: str  # that writes and resumes them
    prefix: str  # of their folders' names, which the number of steps follows
    state_file: str  # where `stamp` and the run's identity are
    marker: str = ""  # a file that only whole ones have; "" where the folder's name says so


NATIVE = CheckpointKind("simpo train or torchrun -m simpo train", "step", STATE_FILE)
TRAINERS = CheckpointKind("accelerate launch -m simpo train", "checkpoint", "simpo.json", "simpo.json")


def list_checkpoints(folder: Path, kind: CheckpointKind = NATIVE) -> list[Checkpoint]:
    """Complete checkpoints of a kind below a run's `checkpoints/`, oldest first."""
    if not folder.is_dir():
        return []
    names = [(path, re.fullmatch(rf"{kind.prefix}-(\d+)", path.name)) for path in folder.iterdir() if path.is_dir()]
    found = [Checkpoint(path, int(name[1])) for path, name in names if name and (path / kind.marker).exists()]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def checkpoint_at(folder: Path, step: int) -> Checkpoint | None:
    """The complete checkpoint of a step; None where there is none."""
    return next((checkpoint for checkpoint in list_checkpoints(folder) if checkpoint.step == step), None)


def check_digests(
    state: dict[str, Any], found: dict[str, str], tensors: dict[str, Any], checkpoint: Checkpoint
) -> None:
    """Raise ValueError unless tensors and what is beside them are what was saved; `found` are the tensors' digests."""
    values = digest_values(tensors)
    for part, saved in state.get("values", {}).items():  # older ones have none
        changed = [name for name, digest in values.get(part, {}).items() if saved.get(name, digest) != digest]
        if changed:
            raise ValueError(f"checkpoint {checkpoint.folder} is damaged: {part}: {changed[0]} is not as it was saved")
    if found != {part: state["digest"].get(part) for part in found}:
        raise ValueError(f"checkpoint {checkpoint.folder} is damaged: its tensors are not the ones that were saved")


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The trainer state of a checkpoint; as `load_state`.

    Raises:
        ValueError: also for another file that is missing or not as it was saved.
    """
    with with_advice(checkpoint):
        return _read_state(checkpoint)


def _read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    state = load_state(checkpoint.folder / STATE_FILE)
    if state["format"] >= 2 or (checkpoint.folder / FILES_FILE).exists():
        try:
            check_files(checkpoint.folder)
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"checkpoint {checkpoint.folder} is damaged: {reason_of(error)}") from error
    _check_types(_NativeState, state, checkpoint.folder)
    return state


def _check_types(kind: type[BaseModel], state: dict[str, Any], folder: Path) -> None:
    try:
        kind.model_validate(state, strict=True)
    except ValidationError as error:
        raise ValueError(f"checkpoint {folder} is damaged: {wrong_type(error)}") from error


def wrong_type(error: ValidationError) -> str:
    """The first thing that is wrong with a state, in a line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or STATE_FILE}: {first['msg']}"


class _TooNew(ValueError):
    """A checkpoint of a later simpo, as all of its run may be."""


class _State(BaseModel):
    """What `check_same_run` reads of any host's checkpoint."""

    recipe: dict[str, Any]
    data_fingerprint: str
    pairs_per_step: int
    total_steps: int


class _Window(BaseModel):
    sums: dict[str, float]
    pairs: dict[str, int]


class _NativeState(_State):
    """What a run of the native trainer goes on from; what else is there may come and go."""

    format: int
    step: int
    mesh: str
    digest: dict[str, str]
    values: dict[str, dict[str, str]] = {}
    progress: dict[str, Any]
    window: _Window
    max_tokens_per_micro_batch: int | None = None
    max_tokens_asked_for: int | None = None


# --- a damaged checkpoint, and what to do then -----------------------------------------------------------------------


@contextlib.contextmanager
def with_advice(checkpoint: Checkpoint, kind: CheckpointKind = NATIVE, mesh: Mesh | None = None) -> Iterator[None]:
    """What is wrong with a checkpoint is said with the command that goes on from the newest whole one."""
    mesh = mesh or _alone()
    try:
        yield
    except ValueError as error:
        if mesh.from_main(isinstance(error, NotData | _TooNew)):
            raise
        raise ValueError(f"{error}; {advise_whole(checkpoint, kind, mesh)}") from error


def advise_whole(damaged: Checkpoint, kind: CheckpointKind, mesh: Mesh) -> str:
    """The newest checkpoint beside a damaged one that is whole to its last bit, with the command to go on from it."""
    folder = damaged.folder.parent
    for other in reversed(mesh.on_main(lambda: list_checkpoints(folder, kind))):
        if other.step != damaged.step and _is_whole(other, kind, mesh):
            recipe, command = folder.parent / "recipe.yaml", "the same command with"
            if "WORLD_SIZE" not in os.environ:  # a launcher's options are in no recipe
                named = shlex.quote(str(recipe)) if recipe.is_file() else "RECIPE"
                command = f"{kind.command.split(' or ')[0]} {named}"
            words = f"{command} --resume_from_checkpoint {shlex.quote(str(other.folder))}"
            return f"{other.folder.name} is the newest whole one; go on from it: {words}"
    return f"no other one in {folder} is whole: start anew in another output_dir"


def _is_whole(checkpoint: Checkpoint, kind: CheckpointKind, mesh: Mesh) -> bool:
    try:
        if kind == TRAINERS:
            check_sealed(checkpoint.folder, mesh)
        else:
            mesh.on_main(lambda: _check_tensors(checkpoint, _read_state(checkpoint)))
    except (Exception, CheckpointException):  # whatever a damaged file raises
        return False
    return True


def _check_tensors(checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Read everything that a checkpoint holds, some of it at a time. Raises where it is not what was saved."""
    alone, place = _alone(), checkpoint.folder / "tensors"
    index, sums, values = read_index(place), dict.fromkeys(state["digest"], 0), {}
    ignore_single_process_warning()
    with only_data(checkpoint.folder):
        for held in _room_for(index):
            dcp.load(held, checkpoint_id=place, no_dist=True)
            for part, digest in digest_tensors(held, alone).items():
                sums[part] += int(digest, 16)
                others = {name: value for name, value in held[part].items() if not isinstance(value, torch.Tensor)}
                values.setdefault(part, {}).update(others)
    found = {part: f"{total % 2**64:016x}" for part, total in sums.items()}
    check_digests(state, found, values, checkpoint)


def _room_for(index: Metadata) -> Iterator[dict[str, dict[str, Any]]]:
    """By part and name, what is to be loaded, about `AT_ONCE` bytes at a time: each time the whole index is read."""
    held, size = defaultdict(dict), 0
    for key, about in index.state_dict_metadata.items():
        part, name = index.planner_data[key]
        held[part][name] = None
        if isinstance(about, TensorStorageMetadata):
            held[part][name] = torch.empty(about.size, dtype=about.properties.dtype)
            size += held[part][name].nbytes
        if size >= AT_ONCE:
            yield held
            held, size = defaultdict(dict), 0
    yield held


def seal(folder: Path, identity: dict[str, Any], mesh: Mesh | None = None) -> None:
    """Write a Trainer's state file, last and whole, with the digests of everything else in its checkpoint.

    Args:
        mesh: the processes that share the reading, all of which call this; None = this one alone.
    """
    mesh = mesh or _alone()
    files = _digest_files(folder, mesh.on_main(lambda: _files_to_seal(folder)), mesh)

    def write() -> None:
        content = {**stamp(), **identity, "files": files}
        write_whole(folder / TRAINERS.state_file, json.dumps({**content, "digest": _digest_of(content)}))
        sync(folder)

    mesh.on_main(write)


def _files_to_seal(folder: Path) -> list[str]:
    """Names of the files in a checkpoint, on the disk by now, the largest first: so they are dealt out evenly."""
    sync_tree(folder)
    found = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    names = (path.relative_to(folder).as_posix() for path in found)
    return [name for name in names if name != TRAINERS.state_file]


def _digest_files(folder: Path, names: list[str], mesh: Mesh) -> dict[str, str]:
    """By name, the digests of files, without those that are missing: each process reads its share."""
    mine = {}
    for name in names[mesh.rank :: mesh.sizes.world]:
        with contextlib.suppress(OSError):  # not seen here, or not yet: the first process looks for itself
            mine[name] = digest_file(folder / name)
    found = {name: digest for theirs in mesh.gather(mine) for name, digest in theirs.items()}
    left = [name for name in names if name not in found]
    found |= mesh.on_main(lambda: {name: digest_file(folder / name) for name in left if (folder / name).is_file()})
    return {name: found[name] for name in names if name in found}


def check_sealed(folder: Path, mesh: Mesh | None = None) -> dict[str, Any]:
    """The state that `seal` wrote, once every file is as it was then. Raises ValueError where one is not.

    Args:
        mesh: the processes that share the reading, all of which call this; None = this one alone.
    """
    mesh = mesh or _alone()
    state = mesh.on_main(lambda: _read_seal(folder))
    files = state.get("files", {})
    found = _digest_files(folder, list(files), mesh)
    for name, digest in files.items():
        if found.get(name) != digest:
            raise ValueError(f"checkpoint {folder} is damaged: {name} is not as it was saved")
    return state


def _read_seal(folder: Path) -> dict[str, Any]:
    state = load_state(folder / TRAINERS.state_file)
    if "files" in state or "digest" in state:  # older checkpoints have neither
        content = json.loads((folder / TRAINERS.state_file).read_text(encoding="utf-8"))
        if content.pop("digest", None) != _digest_of(content):
            raise ValueError(f"checkpoint {folder} is damaged: {TRAINERS.state_file} is not as it was saved")
    return state


def read_sealed(folder: Path, mesh: Mesh | None = None) -> dict[str, Any]:
    """As `check_sealed`; says how to go on where it is damaged."""
    step = folder.name.rpartition("-")[2]
    with with_advice(Checkpoint(folder, int(step) if step.isdecimal() else -1), TRAINERS, mesh):
        return check_sealed(folder, mesh)


def _alone() -> Mesh:
    return Mesh(MeshSizes(), device=torch.device("cpu"))


def _digest_of(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


# --- versions --------------------------------------------------------------------------------------------------------


def stamp() -> dict[str, Any]:
    """What every checkpoint says of its writer."""
    return {"format": FORMAT, "simpo": version("simpo")}


def load_state(path: Path) -> dict[str, Any]:
    """The state that a host left in its checkpoint, as one of this version would have left it.

    "format" stays what it was.

    Raises:
        ValueError: the file is missing, damaged, or of a newer format.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        state["format"] = int(state.get("format", 0))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.parent} is not a complete checkpoint: {reason_of(error)}") from error
    if state["format"] > FORMAT:
        raise _TooNew(
            f"{path.parent} was written by simpo {state.get('simpo', '(unknown)')} in checkpoint format "
            f"{state['format']}; this is simpo {version('simpo')}, which reads formats up to {FORMAT}: update simpo"
        )
    _check_types(_State, state, path.parent)
    if state["format"] == 0 and "window" in state:
        sums, num_pairs = state["window"]["sums"] or [], state["window"]["num_pairs"]
        named = dict(zip(_METRICS_OF_FORMAT_0, sums, strict=False))
        state["window"] = {"sums": named, "pairs": dict.fromkeys(named, num_pairs)}
    return state


_METRICS_OF_FORMAT_0 = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "sft_loss"),
)


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line; of the processes' errors that dcp collects, the first rank's."""
    where = ""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        where, error = f"rank {rank}: " if rank or len(error.failures) > 1 else "", inner
    return where + first_line(error)


def ignore_single_process_warning() -> None:
    """Without a process group dcp warns each time, in a thread too, that it assumes one process; here that is so."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
