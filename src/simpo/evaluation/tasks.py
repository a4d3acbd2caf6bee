"""Benchmarks by lm-evaluation-harness, before against after: what a model has forgotten, by a paired test per task.

lm_eval is an extra, imported where it works. The model is loaded as every evaluation loads it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from simpo.display import say
from simpo.errors import one_line
from simpo.evaluation.run import find_tokenizer, load_to_evaluate, model_folder
from simpo.evaluation.statistics import (
    Interval,
    PairedDifference,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    wilson_interval,
)
from simpo.recipe import Recipe


class Measure(NamedTuple):
    """One metric of a task: a name as lm-eval has it, and a value for each document (fp64 [documents])."""

    task: str
    metric: str
    values: Tensor


@dataclass(frozen=True)
class TaskResults:
    """One model on some tasks.

    Attributes:
        model: as it was named.
        measures: of each task, and of each group the documents of its tasks together.
        inner: tasks that a group has; the table shows the group.
        others: "task metric" -> value, of metrics that are no mean over documents, such as perplexities.
    """

    model: str
    measures: tuple[Measure, ...]
    inner: frozenset[str]
    others: Mapping[str, float]


def measure_tasks(name: str, tasks: Sequence[str], settings: Recipe, *, max_documents: int | None) -> TaskResults:
    """Run a model on tasks.

    Args:
        name: folder or hub name.
        tasks: names that lm-eval has, or YAML files of tasks.
        settings: device, precision, batch size, seed.
        max_documents: the first so many of each task; None = all.
    Raises:
        ValueError: lm-eval is not installed, or there is no such task.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install 'simpo[tasks]'")
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = str  # git would print an error where a run's folder is no repository
    files = [Path(task).suffix in (".yaml", ".yml") for task in tasks]
    for task in (task for task, is_file in zip(tasks, files) if is_file and not Path(task).is_file()):
        raise ValueError(f"--tasks: {task}: no such file")
    manager = TaskManager(include_defaults=not all(files))
    unknown = [task for task, is_file in zip(tasks, files) if not is_file and task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"--tasks: lm-eval has no task {unknown[0]!r} (lm-eval ls tasks lists them)")
    folder = model_folder(name)
    model, slow = load_to_evaluate(folder, settings)
    if slow is not None:
        say(f"note: {slow}", Console(stderr=True, highlight=False))
    lm = HFLM(
        pretrained=model,
        tokenizer=find_tokenizer(settings, folder),
        batch_size=settings.per_device_eval_batch_size,
        mixed_precision_dtype="bfloat16" if settings.bf16 else None,
    )
    seeds = dict.fromkeys(
        ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), settings.seed
    )
    try:
        found: Any = evaluator.simple_evaluate(
            lm, tasks=list(tasks), task_manager=manager, limit=max_documents, bootstrap_iters=0, **seeds
        )
    except (KeyError, TypeError) as error:  # what a task file that is none makes it raise
        raise ValueError(f"--tasks: lm-eval could not run {', '.join(tasks)}: {one_line(error)}") from error
    return _read_results(name, found)


def _read_results(name: str, found: Mapping[str, Any]) -> TaskResults:
    values = {task: _by_metric(samples, found["results"][task]) for task, samples in found["samples"].items()}
    groups = {group: list(names) for group, names in found.get("group_subtasks", {}).items() if names}
    measures = [Measure(task, metric, own) for task, of_task in values.items() for metric, own in of_task.items()]
    for group in groups:
        inside = [values[task] for task in _tasks_of(group, groups) if task in values]
        shared = [metric for metric in (inside[0] if inside else ()) if all(metric in each for each in inside)]
        measures += [Measure(group, metric, torch.cat([each[metric] for each in inside])) for metric in shared]
    others = {
        f"{task} {key.removesuffix(',none')}": value
        for task, of_task in found["results"].items()
        for key, value in of_task.items()
        if task in values
        and isinstance(value, float)
        and key.removesuffix(",none") not in values[task]
        and "_stderr" not in key
    }
    inner = frozenset(task for group in groups for task in groups[group])
    return TaskResults(name, tuple(measures), inner, others)


def _tasks_of(group: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [task for name in groups[group] for task in (_tasks_of(name, groups) if name in groups else [name])]


def _by_metric(samples: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> dict[str, Tensor]:
    """Metric (with its filter, where that is not the only one) -> a number for each document, in their order.

    Only of metrics that are the mean over documents by lm-eval's own result: a perplexity is not.
    """
    found: dict[str, dict[int, float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value, own = sample[metric], sample.get("filter", "none")
            if isinstance(value, bool | int | float) or getattr(value, "ndim", None) == 0:
                key = metric if own == "none" else f"{metric},{own}"
                found.setdefault(key, {})[sample["doc_id"]] = float(value)
    numbers = {
        key: torch.tensor([values[doc] for doc in sorted(values)], dtype=torch.float64) for key, values in found.items()
    }
    whole = {key: result.get(key if "," in key else f"{key},none") for key in numbers}
    return {
        key: values
        for key, values in numbers.items()
        if whole[key] is not None and math.isclose(float(values.mean()), whole[key], rel_tol=1e-6, abs_tol=1e-9)
    }


# --- comparing and showing -------------------------------------------------------------------------------------------


def _interval(values: Tensor) -> Interval:
    is_share = bool(((values == 0) | (values == 1)).all())
    return wilson_interval(float(values.sum()), len(values)) if is_share else mean_interval(values)


def compare_measures(a: Measure, b: Measure) -> PairedDifference:
    """Mean of a - b over documents, its interval and p-value: McNemar's where all are right or wrong, else by signs.

    Raises:
        ValueError: the two have not the same documents.
    """
    if len(a.values) != len(b.values):
        raise ValueError(f"{a.task}: {len(a.values)} documents of one model and {len(b.values)} of the other")
    difference = a.values - b.values
    if not bool(((a.values == 0) | (a.values == 1)).all() and ((b.values == 0) | (b.values == 1)).all()):
        return paired_difference(a.values, b.values)
    p_value = mcnemar_exact(int((difference > 0).sum()), int((difference < 0).sum()))
    return PairedDifference(*mean_interval(difference), p_value)


def compare_tasks(after: TaskResults, before: TaskResults | None = None) -> dict[str, Any]:
    """Plain values of one model, or of two and their differences."""
    known = {} if before is None else {(each.task, each.metric): each for each in before.measures}
    rows = []
    for each in after.measures:
        row = {"task": each.task, "metric": each.metric, "documents": len(each.values)}
        row["value"] = _interval(each.values)._asdict()
        if other := known.get((each.task, each.metric)):
            row["baseline"] = _interval(other.values)._asdict()
            row["difference"] = compare_measures(each, other)._asdict()
        rows.append(row)
    versions = {package: version(package) for package in ("simpo", "lm_eval", "torch", "transformers")}
    return {
        "model": after.model,
        "baseline": before and before.model,
        "tasks": rows,
        "inner": sorted(after.inner),
        "others": dict(after.others),
        "others_of_baseline": dict(before.others) if before else {},
        "versions": versions,
    }


def show_tasks(content: Mapping[str, Any], console: Console) -> None:
    """Print what `compare_tasks` gives as a table: a row for each task or group, and each of its metrics."""
    say(f"model     {content['model']}", console)
    if content["baseline"]:
        say(f"baseline  {content['baseline']}", console)
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    columns = ("baseline", "change", "95% interval", "p") if content["baseline"] else ("95% interval",)
    for place, column in enumerate(("task, metric", "value", *columns)):
        table.add_column(
            column,
            justify="right" if place else "left",
            header_style="dim",
            no_wrap=bool(place),
            min_width=12 * (not place),
        )
    for row in content["tasks"]:
        if row["task"] in content["inner"]:
            continue
        value, name = Interval(**row["value"]), Text(f"{row['task']}, {row['metric']} ({row['documents']})")
        if "difference" not in row:
            table.add_row(name, f"{value.value:.1%}", f"{value.low:.1%} .. {value.high:.1%}")
            continue
        change = PairedDifference(**row["difference"])
        points = f"{100 * change.low:+.1f} .. {100 * change.high:+.1f}"
        p_value = f"{change.p_value:.3f}" if change.p_value >= 0.001 else f"{change.p_value:.0e}"
        before = f"{row['baseline']['value']:.1%}"
        table.add_row(name, f"{value.value:.1%}", before, f"{100 * change.value:+.1f}", points, p_value)
    console.print(table)
    for name, value in content["others"].items():
        other = content["others_of_baseline"].get(name)
        say(f"{name}: {value:.4g}" + (f" (baseline {other:.4g})" if other is not None else ""), console)
