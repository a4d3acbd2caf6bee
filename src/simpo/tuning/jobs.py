"""One trial: its training and its measures, by the package's commands in processes of their own; several at a time.

Must not import the sweep.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from simpo.evaluation.statistics import (
    Interval,
    length_balanced,
    length_balanced_accuracy,
    paired_difference,
    preference_scores,
)
from simpo.onpolicy.rounds import ask_to_stop, going_with_this_process
from simpo.recipe import load_recipe
from simpo.run.stopping import killed_by, on_stop_signal
from simpo.tuning.space import Settings


@dataclass
class Result:
    """What one training came to.

    Attributes:
        steps: optimizer steps it was given; None = as the recipe says.
        accuracy: on held-out pairs, those with a longer and with a shorter chosen response counting alike.
        margin, chosen: mean over pairs, nats per token.
        leaning: mean of sigmoid(margin / spread of the untrained model's margins): what a few steps have changed shows
            in it though no pair has changed sides. All pairs count alike, as few of one length would be noise here.
        repeated: share of 4-grams of its greedy answers that came before in them; None without answers.
        failed: why it counts for nothing.
        time_s: of training and measuring.
    """

    steps: int | None
    accuracy: Interval | None = None
    margin: Interval | None = None
    chosen: float | None = None
    leaning: float | None = None
    repeated: float | None = None
    failed: str | None = None
    time_s: float = 0.0

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Result:
        intervals = {name: content[name] and Interval(*content[name]) for name in ("accuracy", "margin")}
        return cls(**{**content, **intervals})


@dataclass
class Trial:
    """One setting, and what it came to on each rung it has reached."""

    name: str
    settings: Settings
    results: list[Result] = field(default_factory=list)

    @property
    def last(self) -> Result:
        return self.results[-1]

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Trial:
        return cls(content["name"], content["settings"], [Result.of_json(each) for each in content["results"]])

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.settings.items()) or self.name


@dataclass(frozen=True, slots=True)
class Job:
    """A folder with a recipe to train, and how to measure its model.

    Attributes:
        measured_by: the recipe that is evaluated, the same for all; None = this is the untrained model, by its own.
    """

    folder: Path
    measured_by: Path | None
    generations: int


Workers = Callable[[Sequence[Job], Callable[[Job, Result], None]], None]
"""Runs jobs; calls back, from one thread, as each is done."""


def run_job(
    job: Job, *, environment: Mapping[str, str] | None = None, started: Callable[..., Any] = lambda _: None
) -> Result:
    """Train and measure, in processes of their own; what they print goes to log.txt in the job's folder.

    Args:
        environment: variables on top of this process's, such as the GPU to use.
        started: is given each process as it starts.
    """
    began = time.perf_counter()
    recipe = job.folder / "recipe.yaml"
    launcher = load_recipe(recipe).rounds.launcher
    model, result = job.folder / "run" / "model", job.folder / "result.json"
    measure = ["eval", str(job.measured_by or recipe), "--generations", str(job.generations)]
    measure += ["--output", str(result), *(["--model", str(model)] if job.measured_by else [])]
    commands = [] if result.exists() else [measure]
    if job.measured_by and commands and not model.exists():
        commands.insert(0, ["train", str(recipe), "--resume_from_checkpoint", "true"])
    for words in commands:
        launched = shlex.split(" ".join(launcher)) if words[0] == "train" else []
        code, said = run_command_line(
            words, job.folder / "log.txt", launcher=launched, environment=environment, started=started
        )
        if code == 130 or (code < 0 and not killed_by(code)):
            raise KeyboardInterrupt
        if code:
            return Result(None, failed=f"simpo {words[0]} ended with {code}: {said}")
    return _measured(job, time.perf_counter() - began)


def run_command_line(
    words: Sequence[str],
    log: Path,
    *,
    launcher: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    started: Callable[..., Any] = lambda _: None,
) -> tuple[int, str]:
    """`simpo WORDS` in a process of its own, which writes to `log`: its exit code, and its error or last line."""
    words = [*(launcher or [sys.executable]), "-m", "simpo", *words]
    with open(log, "ab") as file:
        child = subprocess.Popen(
            going_with_this_process(words, signal.SIGTERM),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            process_group=0,
        )
        started(child)
        code = child.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return code, killed_by(code) or next(
        (line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else ""
    )


def _measured(job: Job, time_s: float) -> Result:
    content = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
    margins, *lengths = read_pairs(job.folder, "margin", "chosen_length", "rejected_length")
    (before,) = read_pairs(job.measured_by.parent if job.measured_by else job.folder, "margin")
    leaning = torch.sigmoid(margins / before.std(correction=0).clamp(min=1e-6))
    return Result(
        None,
        accuracy=length_balanced_accuracy(margins, *lengths),
        leaning=float(leaning.mean()),
        margin=Interval(**content["margin"]),
        chosen=content["chosen_mean"],
        repeated=content["repeated_share"],
        time_s=round(time_s, 1),
    )


def read_pairs(folder: Path, *names: str) -> list[torch.Tensor]:
    """What `simpo eval` wrote of each pair in a job's folder: [P] for each name, in order of row ids."""
    lines = (folder / "result.pairs.jsonl").read_text(encoding="utf-8").split("\n")
    records = sorted((json.loads(line) for line in lines if line), key=lambda record: record["row_id"])
    return [torch.tensor([record[name] for record in records], dtype=torch.float64) for name in names]


def compare_folders(a: Path, b: Path) -> Interval:
    """Of the accuracies of two folders' models, pair by pair, weighted so that length cannot buy the mean."""
    read = (read_pairs(folder, "margin", "chosen_length", "rejected_length") for folder in (a, b))
    scores = [length_balanced(preference_scores(margins), *lengths) for margins, *lengths in read]
    return Interval(*paired_difference(*scores)[:3])


def run_here(jobs: Sequence[Job], note: Callable[[Job, Result], None], *, launcher: bool) -> None:
    """One job at a time on each GPU of this machine; one at all on a CPU, or where a launcher takes all GPUs."""
    count = 1 if launcher or not torch.cuda.is_available() else torch.cuda.device_count()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if count > 1 else []
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for index in range(count):
        free.put({"CUDA_VISIBLE_DEVICES": seen[index] if len(seen) >= count else str(index)} if count > 1 else {})
    children: set[subprocess.Popen[bytes]] = set()
    stopped = threading.Event()

    def work(job: Job) -> Result:
        if stopped.is_set():
            raise KeyboardInterrupt
        device = free.get()
        try:
            return run_job(job, environment=device, started=children.add)
        except BaseException:
            stopped.set()
            raise
        finally:
            free.put(device)

    with on_stop_signal(), concurrent.futures.ThreadPoolExecutor(count) as pool:
        running = {pool.submit(work, job): job for job in jobs}
        try:
            for done in concurrent.futures.as_completed(running):
                note(running[done], done.result())
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                ask_to_stop(child)
            raise


def run_on_ray(jobs: Sequence[Job], note: Callable[[Job, Result], None]) -> None:
    """Ray Tune over its cluster: a GPU for each trial where there are any. Folders lie where all machines see them."""
    try:
        from ray import tune
    except ImportError:
        raise ValueError("--ray: Ray Tune is not installed; install simpo[ray]") from None
    import ray

    if not ray.is_initialized():
        ray.init(logging_level="ERROR")
    gpus = ray.cluster_resources().get("GPU", 0)

    def train(config: dict[str, Any]) -> dict[str, Any]:
        job = jobs[config["job"]]
        result = run_job(Job(job.folder.resolve(), job.measured_by and job.measured_by.resolve(), job.generations))
        return {"result": json.dumps(asdict(result)), "job": config["job"]}

    tuner = tune.Tuner(
        tune.with_resources(train, {"gpu": 1} if gpus else {"cpu": 1}),
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        run_config=tune.RunConfig(storage_path=str(jobs[0].folder.parent.parent.resolve() / "ray"), verbose=0),
    )
    for each in tuner.fit():
        if each.error is not None:
            raise ValueError(f"Ray could not run a trial: {each.error}")
        found = each.metrics or {}
        note(jobs[found["job"]], Result.of_json(json.loads(found["result"])))
