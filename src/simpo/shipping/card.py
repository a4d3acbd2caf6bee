"""The model card of a run: what it was trained on and how, and what its evaluations say, with intervals. Read from the
files of the run directory alone.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simpo.evaluation.statistics import wilson_interval
from simpo.recipe import Recipe, load_recipe
from simpo.run.export import PLAIN_CARD, build_model_card, sign_card
from simpo.run.logs import read_card, read_log, steps_of_model
from simpo.run.saved import NATIVE, TRAINERS, Checkpoint
from simpo.shipping.source import Source

EVALUATION = "evaluation.json"
"""Where in a run `simpo eval --output` puts what the card shows first."""

_SHOWN = ("rewards/accuracies", "rewards/margins", "loss", "logps/chosen", "logps/rejected")


def card_of(source: Source, note: str = "") -> str:
    """Markdown for a model's README.md, with a note on its numbers."""
    if source.run is None or not (source.run / "recipe.yaml").is_file():
        what = f"`{source.name}` merged into `{source.base}`" if source.is_adapter else f"`{source.name}`"
        return sign_card(f"{PLAIN_CARD}\n{what}. {note}".rstrip() + "\n")
    recipe = load_recipe(source.run / "recipe.yaml", processes=1)
    rows = [*read_log(source.run / "metrics.jsonl")]
    step = source.checkpoint.step if source.checkpoint is not None else _step_of(rows, recipe, source.run)
    results = [*_results(evaluation_of(source), rows, step, base=source.base), *(["", note] if note else [])]
    data = dict(_data_lines(source, recipe, rows, step))
    return build_model_card(recipe, data=data, results=results, folder=source.run)


def evaluation_of(source: Source) -> dict[str, Any] | None:
    """What `simpo eval --output` wrote into the run of this very model on pairs; None without that."""
    path = None if source.run is None else source.run / EVALUATION
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON; write it again with simpo eval, or remove it") from error
    if not isinstance(found, dict) or not {"model", "num_pairs", "accuracy_by_length"} <= found.keys():
        return None  # of benchmarks
    named = Path(found["model"])
    moved = not named.exists() and named.name == source.place.name == "model"
    return found if moved or named.resolve() == source.place.resolve() else None


def _step_of(rows: list[dict[str, Any]], recipe: Recipe, run: Path) -> int:
    """The step whose weights a finished run's model has."""
    if known := steps_of_model(run):
        return known[0]
    for row in read_log(run / "guard.jsonl"):
        if "back_to" in row:
            return row["back_to"]
    name, best = recipe.metric_for_best_model, {}
    for row in rows if recipe.load_best_model_at_end else ():
        if row["step"] and row.get(name) is not None and not math.isnan(row[name]):
            ahead = row[name] - best.get(name, row[name])
            if not best or (ahead if recipe.greater_is_better else -ahead) > 0:
                best = row
    return best.get("step", max((row["step"] for row in rows), default=0))


def _data_lines(source: Source, recipe: Recipe, rows: list[dict[str, Any]], step: int) -> Iterator[tuple[str, str]]:
    run = source.run
    assert run is not None
    yield "data sets", ", ".join(f"`{name}`" for name in recipe.dataset_mixer)
    ledger = run / "audit.json"
    if ledger.is_file():
        account = json.loads(ledger.read_text(encoding="utf-8"))
        for split, title in (("train", "training pairs"), ("eval", "held-out pairs")):
            found = account.get("splits", {}).get(split)
            if found is not None:
                dropped = ", ".join(f"{entry['count']} {reason}" for reason, entry in found["dropped"].items())
                yield title, f"{found['kept']} of {found['input']}" + (f"; dropped: {dropped}" if dropped else "")
    said, known = read_card(run), steps_of_model(run)
    if "data fingerprint" in said:  # of the tokens; audit.json has that of files and settings
        yield "data fingerprint", said["data fingerprint"]
    total = known[1] if known else _total_of(source.checkpoint) or max((row["step"] for row in rows), default=step)
    yield "optimizer step of these weights", f"{step} of {total}"
    if source.checkpoint is None and "end of the run" in said:
        yield "end of the run", said["end of the run"]


def _total_of(checkpoint: Checkpoint | None) -> int | None:
    """The steps of the whole run, of either host, that a checkpoint is of."""
    for name in (NATIVE.state_file, TRAINERS.state_file) if checkpoint is not None else ():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return int(json.loads((checkpoint.folder / name).read_text(encoding="utf-8"))["total_steps"])
    return None


def _results(evaluation: Mapping[str, Any] | None, rows: list[dict[str, Any]], step: int, *, base: str) -> list[str]:
    """Tables for people; an evaluation by `simpo eval` first, for it has intervals of everything."""
    lines = _compared(evaluation, base) if evaluation is not None else []
    evaluated = [row for row in rows if "eval_loss" in row or "eval_saved_loss" in row]
    before = next((row for row in evaluated if row["step"] == 0), {})
    after: dict[str, Any] = {}
    for row in evaluated:
        if step and row.get("of_step", row["step"]) == step:
            after |= {key.replace("eval_saved_", "eval_"): value for key, value in row.items()}
    if not after:
        return lines or ["No evaluation was run."]
    lines += ["", "On the run's held-out pairs, with training's own loss:", ""] if lines else []
    lines += (
        ["| metric | before training | after |", "|---|---|---|"]
        if before
        else ["| metric | after training |", "|---|---|"]
    )
    for name in _SHOWN:
        if f"eval_{name}" in after:
            cells = [_cell(row, name) for row in ([before] if before else []) + [after]]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", f"{after.get('eval_pairs', 0):.0f} pairs; intervals at 95%."]


def _cell(row: Mapping[str, Any], name: str) -> str:
    value, pairs = row.get(f"eval_{name}"), row.get("eval_pairs")
    if value is None or not math.isfinite(value):
        return "-"
    if name != "rewards/accuracies" or not pairs:
        return f"{value:.4f}"
    _, low, high = wilson_interval(value * pairs, int(pairs))
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def _compared(evaluation: Mapping[str, Any], base: str) -> list[str]:
    """What `simpo eval --output` wrote, against the baseline where there is one: the model before, or another."""
    baseline = evaluation.get("baseline")
    models = [baseline, evaluation] if baseline else [evaluation]
    title = ["after"]
    if baseline:
        other = str(baseline.get("model", base))
        is_base = other == base or Path(other).resolve() == Path(base).resolve()
        name = "/".join(Path(other).parts[-2:])  # of a path no more, which a card need not show
        title = ["before", "after"] if is_base else [f"`{name}`", "this model"]
    lines = [f"| {evaluation['num_pairs']} held-out pairs | {' | '.join(title)} |", "|---" * (len(models) + 1) + "|"]
    for name, key, form in (("preference accuracy", "accuracy", ".1%"), ("margin, nats per token", "margin", "+.4f")):
        cells = [_interval(model[key], form) for model in models]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", f"Intervals at 95%; data {evaluation['data']}, tokens {evaluation['data_fingerprint']}."]


def _interval(found: Mapping[str, float | None], form: str) -> str:
    value, low, high = ("-" if found[name] is None else f"{found[name]:{form}}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
