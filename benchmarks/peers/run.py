"""The benchmark: plans the cases, runs every side in a process of its own, in alternation, and keeps the results.

This process stays small, since the memory of the machine belongs to the sides: it imports neither torch nor data.
Results are written after every process, so that an interrupted benchmark keeps what it measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from peers.cases import Case, find_cases
from peers.machine import available_gib, describe_machine, git_commit, package_versions, peak_tflops
from peers.models import SHAPES, check_model
from peers.report import render, save_report
from peers.summary import summarise, timed
from simpo.environment import SETTINGS

PEERS = ("trl", "liger", "padded")
DEFAULT_CASES = "chat,hh,longprompt"
BYTES_PER_WEIGHT = {"fp32": 16, "bf16": 18}
"""fp32 weights, gradients and AdamW's two moments, and bf16 copies for autocast: no run fits in less."""
RESERVE_GIB = 0.75
"""A process is stopped when less of the machine's memory is left, before the system kills one of its own choice."""
FORMAT = 1
FOLDERS = [str(Path(__file__).resolve().parents[2] / name) for name in ("benchmarks", "src")]
"""Where a worker finds this code: nothing needs to be installed."""


@dataclass(frozen=True)
class BenchOptions:
    """What the benchmark was asked for.

    Attributes:
        model: a folder, or one of `models.SHAPES`.
        cases: names, as `cases.find_cases` takes them.
        peers: of PEERS, comma-separated; "none" runs this trainer alone.
        data: folder of the named sets.
        pairs_per_micro_batch: None = each case's own.
        accumulation: micro-batches of a step.
        steps: timed steps of a process.
        warm_up_steps: steps before them, which are not timed: the first pay for memory that grows.
        rounds: processes of each side.
        device: "auto", "cpu" or "cuda".
        dtype: "bf16" computes in bf16 under autocast on fp32 weights, "fp32" in fp32; "auto" in fp32 on a CPU that has
            no instructions for bf16.
        output: folder for results.json, table.md and charts.png.
        flops_only: count operations, run nothing.
    """

    model: str
    cases: str = DEFAULT_CASES
    peers: str = "trl"
    data: str | None = None
    pairs_per_micro_batch: int | None = None
    accumulation: int = 1
    steps: int = 2
    warm_up_steps: int = 3
    rounds: int = 2
    device: str = "auto"
    dtype: str = "auto"
    output: str = "runs/bench"
    flops_only: bool = False

    def check(self) -> None:
        """Raise ValueError for a value that is not allowed, naming those that are."""
        for name, value, allowed in (
            ("device", self.device, ("auto", "cpu", "cuda")),
            ("dtype", self.dtype, ("auto", "bf16", "fp32")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} must be one of {', '.join(allowed)}")
        for name in ("pairs_per_micro_batch", "accumulation", "steps", "warm_up_steps", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} must be at least 1")
        check_model(self.model)
        find_cases(self.cases)
        self.sides()

    def sides(self) -> list[str]:
        """This trainer, then the peers in the order given."""
        names = [name.strip() for name in self.peers.split(",") if name.strip() not in ("", "none")]
        for name in names:
            if name not in PEERS:
                raise ValueError(f"peers: {name!r} must be one of {', '.join(PEERS)}, or none")
        return ["simpo", *dict.fromkeys(names)]


def run_benchmark(options: BenchOptions, *, command: str, console: Console) -> Path:
    """Run it all; returns the path of results.json, beside which lie table.md and charts.png.

    Raises:
        ValueError: an option that does not fit, or a device that is not there.
    """
    options.check()
    if options.dtype == "auto":
        options = dataclasses.replace(options, dtype="bf16" if options.flops_only or _has_bf16(options) else "fp32")
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="simpo-bench-") as scratch:
        bench = _Benchmark(options, command, console, output, Path(scratch))
        bench.prepare()
        if not options.flops_only:
            bench.run_all()
    _report(bench.results, output, console)
    return bench.path


def _has_bf16(options: BenchOptions) -> bool:
    """Asked of another process, which imports torch; True also where it could not say, as without a device."""
    ask = "import sys; from simpo.model.load import has_bf16, pick_device; print(has_bf16(pick_device(sys.argv[1])))"
    return subprocess.run([sys.executable, "-c", ask, options.device], capture_output=True).stdout.strip() != b"False"


def show_results(path: str | Path, *, output: str | None, console: Console) -> Path:
    """Table and charts of an earlier run, from its results.json alone; returns the folder they were written to.

    Raises:
        ValueError: no such file, or not a file that this benchmark wrote.
    """
    path = Path(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"from: cannot read {path}: {error}") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT or "cases" not in results:
        raise ValueError(f"from: {path} is not a results.json that this version of the benchmark wrote")
    folder = Path(output) if output else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    _report(results, folder, console)
    return folder


def _report(results: dict[str, Any], folder: Path, console: Console) -> None:
    render(results, console)
    written = save_report(results, folder)
    if len(written) == 1:
        console.print("no charts: matplotlib is not installed: pip install matplotlib", soft_wrap=True)


class _Benchmark:
    """One run of the benchmark: its results so far, and the processes that add to them."""

    def __init__(self, options: BenchOptions, command: str, console: Console, output: Path, scratch: Path) -> None:
        self.options, self.console, self.output, self.scratch = options, console, output, scratch
        self.path = output / "results.json"
        self.sides = options.sides()
        self.threads = _num_threads()
        self.cases = [_with_micro_batch(case, options.pairs_per_micro_batch) for case in find_cases(options.cases)]
        self.results: dict[str, Any] = {
            "format": FORMAT,
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": package_versions() | {"commit": git_commit()},
            "machine": describe_machine(),
            "conditions": {
                "model": Path(options.model).name,
                "weights": "random" if options.model in SHAPES else "from the folder",
                "dtype": options.dtype,
                "master_weights": "fp32",
                "optimizer": "AdamW, constant learning rate 1e-6, gradients clipped to norm 1",
                "loss": "SimPO: beta 2, gamma_beta_ratio 0.5, no SFT term",
                "accumulation": options.accumulation,
                "flops_only": options.flops_only,
                "warm_up_steps": options.warm_up_steps,
                "timed_steps": options.steps,
                "rounds": options.rounds,
                "threads": self.threads,
                "environment": _environment(),
            },
            "cases": [],
        }
        self.pairs_files: dict[str, str] = {}
        self.model_folder = options.model

    # --- before anything is timed ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Pairs, floor and counted operations of every case, in one process."""
        options = self.options
        self._say(f"{len(self.cases)} cases: pairs, their floor, and what each side executes")
        done = self._process(
            {
                "task": "prepare",
                "model": options.model,
                "cases": [dataclasses.asdict(case) for case in self.cases],
                "sides": self.sides,
                "bf16": self.options.dtype == "bf16",
                "steps": options.steps,
                "warm_up_steps": 0 if options.flops_only else options.warm_up_steps,
                "accumulation": options.accumulation,
                "device": options.device,
                "data": options.data,
                "scratch": str(self.scratch),
            }
        )
        if done.reason is not None:
            raise ValueError(done.reason)
        prepared = done.result
        self.device = prepared["device"]
        self.results["machine"] |= {"device": self.device, **prepared["gpu"]}
        self.results["conditions"] |= {
            "num_parameters": prepared["num_parameters"],
            "tokenizer": prepared["tokenizer"],
            "peak_tflops": peak_tflops(prepared["gpu"]["gpu"]) if prepared["gpu"] else None,
        }
        for case, entry in zip(self.cases, prepared["cases"], strict=True):
            self.results["cases"].append(self._case_entry(case, entry))
            if entry["skipped"]:
                self._say(f"{case.name}: skipped: {entry['skipped']}")
        self._save()

    def _case_entry(self, case: Case, entry: dict[str, Any]) -> dict[str, Any]:
        fields = {
            "name": case.name,
            "about": case.about,
            "kind": case.kind,
            "pairs_per_micro_batch": case.pairs_per_micro_batch,
            "pairs_per_step": case.pairs_per_micro_batch * self.options.accumulation,
            "timed_pairs": case.pairs_per_micro_batch * self.options.accumulation * self.options.steps,
            "skipped": entry["skipped"],
        }
        if entry["skipped"]:
            return fields
        self.pairs_files[case.name] = entry["pairs_file"]
        sides = {}
        for side in self.sides:
            reason = "only operations were asked for" if self.options.flops_only else entry["missing"][side]
            sides[side] = {"status": "not run", "reason": reason, "work": entry["work"][side], "rounds": []}
        return fields | {
            "lengths": entry["lengths"],
            "tokens_needed": entry["tokens_needed"],
            "floor_flops": entry["floor_flops"],
            "sides": sides,
        }

    # --- the runs ----------------------------------------------------------------------------------------------------

    def run_all(self) -> None:
        """Every case, round and side that can run, in alternating order."""
        problem = self._does_not_fit()
        if problem is not None:
            self._say(problem)
            for entry in self._entries():
                for side in entry["sides"].values():
                    side["reason"] = problem
            self._save()
            return
        if self.device == "cuda":
            self._measure_ceiling()
        if self.options.model in SHAPES:
            self._write_random_model()
        schedule = list(self._schedule())
        for number, (case, entry, round_index, side) in enumerate(schedule, start=1):
            if entry["sides"][side]["status"] == "failed":
                continue  # it would fail again; what it said is kept
            self._run_one(case, entry, round_index, side, label=f"[{number}/{len(schedule)}] {case.name}")

    def _schedule(self) -> Iterator[tuple[Case, dict[str, Any], int, str]]:
        for case, entry in zip(self.cases, self.results["cases"], strict=True):
            if entry["skipped"]:
                continue
            runnable = [side for side in self.sides if entry["sides"][side]["reason"] is None]
            for round_index in range(self.options.rounds):
                for side in runnable if round_index % 2 == 0 else reversed(runnable):
                    yield case, entry, round_index, side

    def _run_one(self, case: Case, entry: dict[str, Any], round_index: int, side: str, *, label: str) -> None:
        options, kept = self.options, entry["sides"][side]
        spec = {
            "side": side,
            "model": str(self.model_folder),
            "pairs_per_micro_batch": case.pairs_per_micro_batch,
            "accumulation": options.accumulation,
            "steps": options.steps,
            "warm_up_steps": options.warm_up_steps,
            "device": self.device,
            "bf16": options.dtype == "bf16",
            "threads": self.threads,
            "scratch": str(self.scratch),
        }
        done = self._process({"task": "run", "side": spec, "pairs_file": self.pairs_files[case.name]})
        if done.reason is None:
            kept["status"], kept["reason"] = "ok", None
            kept["rounds"].append({"round": round_index, **done.result})
            median = statistics.median(timed(done.result, options.warm_up_steps))
            first = done.result["step_times_s"][0]
            outcome = f"{median:.2f} s a step, the first {first:.2f} s; peak {done.result['peak_gib']:.2f} GiB"
        else:
            kept["status"], kept["reason"] = "failed", done.reason
            outcome = f"failed: {done.reason}"
        self._say(f"{label}, round {round_index + 1}, {side}: {outcome}")
        self._save()

    def _does_not_fit(self) -> str | None:
        weights, machine = self.results["conditions"]["num_parameters"], self.results["machine"]
        need = weights * BYTES_PER_WEIGHT[self.options.dtype] / 2**30
        have = machine["gpu_memory_gib"] if self.device == "cuda" else available_gib() or machine["memory_gib"]
        if need < have:
            return None
        place = "the GPU has" if self.device == "cuda" else "free here are"
        return (
            f"weights, gradients and AdamW of {weights / 1e9:.2f} billion parameters take {need:.0f} GiB, and "
            f"{place} {have:.0f}: operations are counted, nothing runs"
        )

    def _measure_ceiling(self) -> None:
        done = self._process({"task": "ceiling"})
        if done.reason is not None:
            raise ValueError(f"the GPU could not be measured: {done.reason}")
        self.results["machine"] |= done.result

    def _write_random_model(self) -> None:
        self._say(f"{self.options.model}: writing random weights")
        self.model_folder = self.scratch / "model"
        done = self._process(
            {
                "task": "write_model",
                "model": self.options.model,
                "folder": str(self.model_folder),
                "device": self.device,
            }
        )
        if done.reason is not None:
            raise ValueError(f"random weights of {self.options.model} could not be written: {done.reason}")

    # --- processes ---------------------------------------------------------------------------------------------------

    def _process(self, spec: dict[str, Any]) -> _Done:
        path = self.scratch / "spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        return run_process([sys.executable, "-m", "peers.worker", str(path)], environment=_environment())

    def _entries(self) -> list[dict[str, Any]]:
        return [entry for entry in self.results["cases"] if not entry["skipped"]]

    def _save(self) -> None:
        summarise(self.results)
        aside = self.path.with_suffix(".json.tmp")
        aside.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, self.path)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Done:
    """How a process ended: its result, or the reason why there is none."""

    result: Any = None
    reason: str | None = None


def run_process(command: Sequence[str], *, environment: dict[str, str], reserve_gib: float = RESERVE_GIB) -> _Done:
    """Run a process that prints one JSON line, and watch the machine's memory meanwhile."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=out, stderr=errors, env=os.environ | environment)
        stopped = None
        try:
            while child.poll() is None:
                left = available_gib()
                if left is not None and left < reserve_gib:
                    stopped = f"out of memory: stopped when {left:.2f} GiB of the machine's memory were left"
                    child.kill()
                    child.wait()
                    break
                time.sleep(0.1)
        finally:
            if child.poll() is None:  # interrupted
                child.kill()
                child.wait()
        out.seek(0)
        errors.seek(0)
        return _outcome(child.returncode, stopped, out.read(), errors.read())


def _outcome(code: int, stopped: str | None, out: str, errors: str) -> _Done:
    if stopped is not None:
        return _Done(reason=stopped)
    if code < 0:
        return _Done(reason=f"killed by signal {-code}" + (", probably out of memory" if code == -9 else ""))
    try:
        result = json.loads(out.strip().rpartition("\n")[2])
    except ValueError:
        result = {}
    if code == 0 and result:
        return _Done(result=result)
    said = result.get("error") or next((line for line in reversed(errors.split("\n")) if line.strip()), "nothing said")
    return _Done(reason=said[:300])


def _environment() -> dict[str, str]:
    """The same for every side: also what `simpo` sets for itself. One GPU at most."""
    return {
        **{name: os.environ[name] for name in SETTINGS if name in os.environ},
        "PYTHONPATH": os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _num_threads() -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else describe_machine()["cores_allowed"]


def _with_micro_batch(case: Case, size: int | None) -> Case:
    return case if size is None else dataclasses.replace(case, pairs_per_micro_batch=size)


def describe_command(arguments: Sequence[str]) -> str:
    """The command as anyone could type it: paths relative to the working folder or to the home folder."""
    words = []
    for word in arguments:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if os.path.isabs(value):
            home, here = os.path.expanduser("~"), os.path.relpath(value)
            value = f"~/{os.path.relpath(value, home)}" if value.startswith(home + os.sep) else here
        words.append(flag + equals + value if equals else word if flag else value)
    return " ".join(
        ["python benchmarks/bench.py", *(word if word.startswith("~/") else shlex.quote(word) for word in words)]
    )
