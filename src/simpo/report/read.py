"""What the folder of a run holds: reads whatever is there, of runs that are half done, damaged or of older versions.

Plain values and numbers. Nothing here raises for what a file lacks: it is said in `Run.notes`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from simpo.errors import first_line
from simpo.recipe import Recipe, load_recipe
from simpo.recipe.yaml import read_recipe_file
from simpo.run.lock import LOCK_FILE, is_at_work
from simpo.run.logs import read_log, steps_of_model

_OF_A_PROCESS = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Curve:
    """One number over a run: `steps` and `values`, [n] each; what was not a number is nan."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        """The last finite value; nan without one."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if len(finite) else math.nan


NOTHING = Curve(np.zeros(0), np.zeros(0))


@dataclass(frozen=True)
class Run:
    """One run as its folder shows it.

    Attributes:
        curves: name in metrics.jsonl -> its curve; those of evaluations begin with eval_.
        evaluations: lines of eval_pairs.jsonl, in the order of their steps.
        generations: row id -> step -> the answer; `prompts`: row id -> the prompt.
        answer_tokens: step -> the tokens of each answer, where they were counted.
        ledger: audit.json, {} without one.
        settings: recipe.yaml as plain values, {} without one.
        recipe: the same, checked; None where this version does not know a key of it.
        guard: lines of guard.jsonl.
        compared: files that `simpo eval --output` left there, by name.
        notes: what could not be read.
    """

    folder: Path
    curves: Mapping[str, Curve]
    evaluations: list[dict[str, Any]]
    generations: dict[str, dict[int, str]]
    prompts: dict[str, str]
    answer_tokens: dict[int, list[int]]
    ledger: dict[str, Any]
    settings: dict[str, Any]
    recipe: Recipe | None
    guard: list[dict[str, Any]]
    compared: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The recipe's run_name, or the last parts of the folder that tell it apart."""
        named = self.settings.get("run_name")
        path = Path(os.path.abspath(self.folder))
        return str(named) if named else f"{path.parent.name}/run" if path.name == "run" else path.name

    def curve(self, name: str) -> Curve:
        return self.curves.get(name, NOTHING)

    @cached_property
    def steps_done(self) -> int:
        """The last step that was logged."""
        return max((int(curve.steps[-1]) for curve in self.curves.values() if len(curve)), default=0)

    @cached_property
    def pairs_per_step(self) -> int | None:
        seen = self.curve("pairs_seen")
        if not (len(seen) and seen.steps[0] and seen.values[0] > 0):
            return None
        mean = seen.values[0] / seen.steps[0]  # the last step of an epoch may have had fewer
        if isinstance(asked := self.settings.get("global_batch_size"), int):
            return asked
        of_one = [self.settings.get(name) for name in _OF_A_PROCESS]
        if not all(isinstance(each, int) for each in of_one):
            return round(mean)
        return math.ceil(round(mean / math.prod(of_one), 6)) * math.prod(of_one)

    @cached_property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None where that cannot be told."""
        if self.is_finished:
            return self.steps_done
        kept = self.ledger.get("splits", {}).get("train", {}).get("kept")
        most, epochs = self.settings.get("max_steps", -1), self.settings.get("num_train_epochs")
        if isinstance(most, int) and most > 0:
            return most
        if not kept or not epochs or not self.pairs_per_step:
            return None
        return math.ceil(epochs * math.ceil(kept / self.pairs_per_step))

    @cached_property
    def step_of_model(self) -> int | None:
        """Whose weights the final model has; None without one, or where its card does not say."""
        known = steps_of_model(self.folder)
        return known and known[0]

    @property
    def is_finished(self) -> bool:
        """Its final model is there."""
        return (self.folder / "model").is_dir()

    @cached_property
    def is_running(self) -> bool:
        """Whether another process works in the folder, as far as this machine can tell; this one is at its end."""
        own = f"process {os.getpid()} on {socket.gethostname()} "
        with contextlib.suppress(FileNotFoundError):
            return is_at_work(self.folder) and not (self.folder / LOCK_FILE).read_text(errors="replace").startswith(own)
        return False

    @cached_property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints, the newest last."""
        folders = (self.folder / "checkpoints").glob("*-*") if (self.folder / "checkpoints").is_dir() else ()
        found = ((re.fullmatch(r"(?:step|checkpoint)-(\d+)", each.name), each.name) for each in folders)
        return [name for _, name in sorted((int(match[1]), name) for match, name in found if match)]

    @property
    def training_time_s(self) -> float:
        """Seconds of training steps, evaluation and saving left out."""
        each = self.curve("step_time_s")
        return float(np.nansum(each.values * np.diff(each.steps, prepend=0))) if len(each) else math.nan


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, begun at least."""
    metrics, recipe, ledger = ((folder / name).is_file() for name in ("metrics.jsonl", "recipe.yaml", "audit.json"))
    return metrics or (recipe and ledger)


def check_no_run(folder: Path) -> None:
    """Raise ValueError where a folder that is to hold several runs is one itself, whose report would be replaced."""
    if (folder / "metrics.jsonl").is_file():
        raise ValueError(f"output_dir: {folder} already holds a run; choose another output_dir")


def read_run(folder: str | Path) -> Run:
    """What a run's folder holds; see `is_run`."""
    folder = Path(folder)
    notes: list[str] = []
    prompts: dict[str, str] = {}
    generations: dict[str, dict[int, str]] = {}
    answer_tokens: dict[int, list[int]] = {}
    for line in _lines(folder / "generations.jsonl", notes):
        row_id = str(line.get("row_id", len(prompts)))
        prompts[row_id] = str(line.get("prompt", ""))
        generations.setdefault(row_id, {})[line["step"]] = str(line.get("response", ""))
        if isinstance(line.get("tokens"), int):
            answer_tokens.setdefault(line["step"], []).append(line["tokens"])
    settings, recipe = _recipe(folder / "recipe.yaml", notes)
    pairs = [line for line in _lines(folder / "eval_pairs.jsonl", notes) if line.get("row_ids")]
    return Run(
        folder=folder,
        curves=_curves(_lines(folder / "metrics.jsonl", notes)),
        evaluations=sorted(pairs, key=lambda line: line["step"]),
        generations=generations,
        prompts=prompts,
        answer_tokens=answer_tokens,
        ledger=_json(folder / "audit.json", notes),
        settings=settings,
        recipe=recipe,
        guard=[line for line in _lines(folder / "guard.jsonl", notes) if "saw" in line],
        compared=_compared(folder),
        notes=notes,
    )


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a log; those that are broken are counted."""
    broken: list[int] = []
    yield from read_log(path, broken.append)
    if broken:
        notes.append(f"{path.name}: {len(broken)} lines could not be read and are left out")


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        step = line["step"]
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return {name: _in_order(np.array(steps), np.array(values, dtype=float)) for name, (steps, values) in found.items()}


def _in_order(steps: np.ndarray, values: np.ndarray) -> Curve:
    """By step; of several lines of one step the last."""
    if (np.diff(steps) > 0).all():
        return Curve(steps, values)
    unique, places = np.unique(steps[::-1], return_index=True)
    return Curve(unique, values[::-1][places])


def _recipe(path: Path, notes: list[str]) -> tuple[dict[str, Any], Recipe | None]:
    if not path.is_file():
        return {}, None
    try:
        settings = read_recipe_file(path)
    except ValueError as error:
        notes.append(f"the recipe cannot be read: {first_line(error)}")
        return {}, None
    try:
        recipe = load_recipe(str(path))
    except ValueError as error:
        notes.append(f"the recipe is of another version and is shown unchecked: {first_line(error)}")
        return settings, None
    return recipe.to_dict(), recipe


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{path.name} cannot be read: {first_line(error)}")
        return {}
    return content if isinstance(content, dict) else {}


def _compared(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of `simpo eval`, the older first; a trial of `simpo sweep` has its own beside it."""
    beside = [path for path in [folder.parent / "result.json"] if folder.name == "run" and path.is_file()]
    paths = beside + [path for path in folder.glob("*.json") if path.name != "audit.json"]
    found = {path.name: _json(path, []) for path in sorted(paths, key=lambda path: path.stat().st_mtime)}
    return {name: content for name, content in found.items() if "accuracy_by_length" in content}
