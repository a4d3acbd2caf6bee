"""Where metrics are written: `metrics.jsonl` always; trackers on request.

Must not import the trainer or evaluation.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from simpo.data.files import sync, write_whole
from simpo.errors import first_line
from simpo.run.eval_pairs import EVAL_PAIRS_FILE
from simpo.run.logs import read_log

if TYPE_CHECKING:
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe


GENERATIONS_FILE = "generations.jsonl"
TRACKERS_FILE = "trackers.json"
LOGS = ("metrics.jsonl", GENERATIONS_FILE, EVAL_PAIRS_FILE, "guard.jsonl")
"""What a run directory holds of each step."""


class MetricsLog:
    """`metrics.jsonl`, one JSON object a line, and the trackers named in `report_to`.

    Every line has "step"; lines of evaluations have keys that begin with "eval_". A tracker that fails does not end
    the run: that is said once, by `say`, and it gets no more.

    Raises:
        ValueError: a tracker could not be started, of a run that is not resumed.
    """

    def __init__(self, path: Path, recipe: Recipe, say: Callable[[str], None] = print, *, resume_step: int = 0) -> None:
        self.path, self._say = path, say
        forget_lines_after(path, resume_step)
        self._trackers = _start_trackers(recipe, path.parent, resume_step, say)
        self._file = path.open("ab", buffering=0)

    def write(self, values: Mapping[str, Any], *, step: int) -> None:
        """Write one line, in full or not at all as far as a reader can tell (one write)."""
        line, begin = json.dumps({"step": step, **values}, allow_nan=True).encode() + b"\n", self._file.tell()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(begin)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._give_trackers(lambda tracker: tracker.log(numbers, step))

    def close(self) -> None:
        self._file.close()
        self._give_trackers(lambda tracker: tracker.close())

    def _give_trackers(self, give: Callable[[Any], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            try:
                give(tracker)
            except Exception as error:
                del self._trackers[name]
                self._say(f"report_to: {_failed(name, error)}; it gets no more of this run. {self.path.name} has all")


@contextlib.contextmanager
def open_log(
    folder: Path, recipe: Recipe, say: Callable[[str], None], *, done: int, mesh: Mesh
) -> Iterator[MetricsLog | None]:
    """The log of a run directory, on the first process; None on the others.

    What a run that is resumed after `done` steps will do again is dropped first, from it and from what lies beside it.
    """
    if not mesh.is_main:
        yield None
        return
    for name in (GENERATIONS_FILE, EVAL_PAIRS_FILE):
        forget_lines_after(folder / name, done)
    with contextlib.closing(MetricsLog(folder / "metrics.jsonl", recipe, say, resume_step=done)) as log:
        yield log


def sync_logs(folder: Path) -> None:
    """Make what the logs of a run directory hold survive a power cut, before a checkpoint that refers to it."""
    for path in (*(folder / name for name in LOGS), folder):
        if path.exists():
            sync(path)


def forget_lines_after(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run will do again, and a last line that a kill cut short.

    Args:
        path: a file of JSON lines; may be missing.
        step: the last step that is kept.
    """
    if not path.exists():
        return
    *lines, _ = path.read_bytes().split(b"\n")  # which may have been cut within a character
    write_whole(path, b"".join(line + b"\n" for line in lines if not _is_done_again(line, step)))


def read_evaluation(path: Path, step: int) -> dict[str, float] | None:
    """What a metrics.jsonl has of the evaluation after a step; None without one."""
    found = [line for line in read_log(path) if "eval_loss" in line and line["step"] == step]
    return {name: value for name, value in found[-1].items() if name.startswith("eval_")} if found else None


def _is_done_again(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
        return record["step"] > step or "eval_saved_loss" in record  # the end of a run is evaluated anew
    except (ValueError, TypeError, LookupError):
        return False  # no line of ours


def name_of(recipe: Recipe, folder: Path | None = None) -> str:
    """The run's name: `run_name`, or that of its folder; `folder` is where that is by now, if not where it was."""
    return recipe.run_name or Path(folder or recipe.output_dir or "model").resolve().name


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that is not installed, before a run spends time on anything else."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to: {name} is not installed: pip install 'simpo[{name}]'")


def _start_trackers(
    recipe: Recipe, folder: Path, resume_step: int, say: Callable[[str], None]
) -> dict[str, _TensorBoard | _RunTracker | _MLflow]:
    """A run that is resumed goes on in the runs of its trackers, which trackers.json names."""
    path = folder / TRACKERS_FILE
    known: dict[str, str] = {}
    if resume_step and path.exists():
        with contextlib.suppress(ValueError):  # cut short, by a loss of power: new runs
            known = json.loads(path.read_bytes())
    trackers = {}
    for name in recipe.report_to:
        try:
            trackers[name] = _TRACKERS[name](name, recipe, folder, known.get(name), resume_step)
        except Exception as error:
            if not resume_step:
                raise ValueError(f"report_to: {_failed(name, error)}; without it: --report_to none") from error
            say(f"report_to: {_failed(name, error)}; the run goes on without it. metrics.jsonl has all")
    runs = {name: run for name, tracker in trackers.items() if (run := tracker.run)}
    if runs or path.exists():
        write_whole(path, [json.dumps({**known, **runs}) + "\n"])
    return trackers


def _failed(name: str, error: Exception) -> str:
    return f"{name} failed ({type(error).__name__}: {first_line(error)})"


class _TensorBoard:
    run = None  # its files are named by time; what comes again replaces what was there

    def __init__(self, name: str, recipe: Recipe, folder: Path, run: str | None, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        where = recipe.logging_dir or str(folder / "tensorboard")
        self._writer = SummaryWriter(where, purge_step=resume_step + 1 if resume_step else None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            # TensorBoard groups by the part before the slash.
            prefix, bare = ("eval/", name[5:]) if name.startswith("eval_") else ("train/", name)
            self._writer.add_scalar(prefix + bare, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _RunTracker:
    """wandb, trackio and swanlab share one interface: init, log, finish. Runs of trackio are known by their names."""

    def __init__(self, name: str, recipe: Recipe, folder: Path, run: str | None, resume_step: int) -> None:
        self._module = module = importlib.import_module(name)
        options = {"experiment_name" if name == "swanlab" else "name": name_of(recipe)}
        if name == "trackio":  # which has no ids, and takes the latest run of a name
            where = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=3).hexdigest()
            options = {"name": f"{options['name']}-{where}"}
        if run and f"{name.upper()}_RUN_ID" not in os.environ:
            options |= {"name" if name == "trackio" else "id": run, "resume": "allow"}
        project = os.environ.get(f"{name.upper()}_PROJECT", "simpo")
        started = module.init(project=project, config=recipe.to_dict(), **options)
        self.run: str | None = started.name if name == "trackio" else started.id

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


class _MLflow:
    """By transformers' callback, which reads MLflow's own variables and knows what a parameter may look like."""

    def __init__(self, name: str, recipe: Recipe, folder: Path, run: str | None, resume_step: int) -> None:
        import mlflow
        from transformers import TrainerControl, TrainerState
        from transformers.integrations import MLflowCallback

        goes_on = run is not None and "MLFLOW_RUN_ID" not in os.environ and mlflow.active_run() is None
        # A run that goes on has its parameters, which MLflow lets nobody change.
        args = SimpleNamespace(run_name=name_of(recipe), to_dict=dict if goes_on else recipe.to_dict)
        self._state, self._callback = TrainerState(), MLflowCallback()
        self._about = (args, self._state, TrainerControl())
        self._ends = mlflow.end_run if goes_on else lambda: None  # the callback ends what it started
        if goes_on:
            mlflow.start_run(run_id=run)
        self._callback.on_train_begin(*self._about)
        self.run: str | None = mlflow.active_run().info.run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._state.global_step = step
        self._callback.on_log(*self._about, logs=dict(values))

    def close(self) -> None:
        self._callback.on_train_end(*self._about)
        self._ends()


_TRACKERS = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    **dict.fromkeys(("wandb", "trackio", "swanlab"), _RunTracker),
}
