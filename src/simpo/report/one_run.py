"""The report of one run."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simpo.display import format_duration
from simpo.evaluation.plain import repeated_share
from simpo.recipe import KEYS, STAGES, load_recipe
from simpo.recipe.checks import far_from_published
from simpo.report.charts import SERIES, Chart, Level, Line, number, smooth, to_bars, to_whiskers
from simpo.report.held_out import HeldOut, Row, of_command, of_run
from simpo.report.page import Answer, Card, Page, Table, answers_side_by_side, last_turn, measure, span
from simpo.report.read import Curve, Run
from simpo.run.next_commands import next_commands


class Spec(NamedTuple):
    """One chart of every run: metrics -> what their lines are called; those of held-out pairs have eval_ in front."""

    name: str
    title: str
    unit: str
    metrics: dict[str, str]
    main: bool = False


SPECS = (
    Spec("loss", "Loss", "nats per pair", {"loss": "training"}, main=True),
    Spec("accuracy", "Preference accuracy", "%", {"rewards/accuracies": "training"}, main=True),
    Spec("margin", "Reward margin", "chosen \u2212 rejected", {"rewards/margins": "training"}, main=True),
    Spec("logps", "Log-probability", "nats per token", {"logps/chosen": "chosen", "logps/rejected": "rejected"}, True),
    Spec("grad-norm", "Gradient norm", "before clipping", {"grad_norm": "training"}),
    Spec("learning-rate", "Learning rate", "", {"learning_rate": "training"}),
    Spec("speed", "Speed", "pairs per second", {"pairs_per_s": "training"}),
    Spec("memory", "Peak memory", "GiB", {"memory_gib": "training"}),
)


# --- one run ---------------------------------------------------------------------------------------------------------


def page_of_run(run: Run) -> Page:
    """Everything about one run."""
    held_out = of_run(run)
    marks = sorted({int(row["since_step"]) for row in run.guard if isinstance(row.get("since_step"), int)})
    charts = [chart for spec in SPECS if (chart := _chart(run, spec, marks))] + _more_charts(run, marks)
    evaluations = [_evaluation("Held-out pairs", "held-out", held_out)] if held_out else []
    for name, content in run.compared.items():
        evaluations.append(_evaluation(f"simpo eval: {name}", re.sub(r"\W+", "-", name), of_command(content)))
    mains = [chart for spec in SPECS if spec.main for chart in charts if chart.name == spec.name]
    smoothed = "Faint: single logged steps. Bold: their mean over a twelfth of the run. "
    page = Page(
        title=run.name,
        kind=describe_status(run),
        facts=_facts(run),
        cards=_cards(run, held_out),
        guard=run.guard if run.guard or (run.folder / "guard.jsonl").exists() else None,
        charts=charts,
        chart_note=smoothed * (smooth(run.curve("loss")) is not None) + "Dots: held-out pairs.",
        values=_values(run),
        evaluations=evaluations,
        eval_advice=_eval_advice(run, held_out),
        answers=answers_side_by_side(_answers(run)),
        ledger=_ledger(run),
        far=far_from_published(run.recipe, run.pairs_per_step or run.recipe.pairs_per_step()) if run.recipe else [],
        settings=_settings(run),
        recipe_text=_text_of(run.folder / "recipe.yaml"),
        commands=_commands(run),
        notes=run.notes,
    )
    if mains:
        page.pictures = {"curves": mains}
    return page


def describe_status(run: Run) -> str:
    of = f" of {run.total_steps}" if run.total_steps else ""
    if run.is_finished:
        return f"finished: {run.steps_done} steps"
    if run.is_running:
        return f"running: step {run.steps_done}{of}"
    return f"not finished: {run.steps_done}{of} steps done"


def _facts(run: Run) -> list[tuple[str, str]]:
    train = run.ledger.get("splits", {}).get("train", {})
    held_out = sum(split.get("kept", 0) for name, split in run.ledger.get("splits", {}).items() if name != "train")
    tokens, speed, memory = (run.curve(name) for name in ("tokens_seen", "pairs_per_s", "memory_gib"))
    facts = [
        ("model", str(run.settings.get("model_name_or_path", ""))),
        ("pairs", f"{train['kept']:,} to train, {held_out:,} held out" if "kept" in train else ""),
        ("step", f"{run.pairs_per_step} pairs" if run.pairs_per_step else ""),
        ("training", format_duration(run.training_time_s) if math.isfinite(run.training_time_s) else ""),
        ("tokens", f"{tokens.last:,.0f}" if len(tokens) else ""),
        ("speed", f"{np.nanmedian(speed.values):.3g} pairs/s" if len(speed) else ""),
        ("peak memory", f"{np.nanmax(memory.values):.3g} GiB" if len(memory) else ""),
        ("folder", str(run.folder)),
    ]
    return [(name, value) for name, value in facts if value]


def _cards(run: Run, held_out: HeldOut | None) -> list[Card]:
    cards = []
    if held_out:
        cards.append(_change_card("held-out accuracy", held_out.accuracy[0], "%", better=1))
        cards.append(_change_card("held-out margin", held_out.margin[0], "", better=1))
        if held_out.sides:
            cards.append(_change_card("chosen log-prob, nats per token", held_out.sides[0], "", better=0))
    else:
        for name, label, unit in (("rewards/accuracies", "training accuracy", "%"), ("rewards/margins", "margin", "")):
            curve = run.curve(name)
            if len(curve):
                tail = curve.values[-max(1, len(curve) // 5) :]
                mean = float(np.nanmean(tail)) if np.isfinite(tail).any() else math.nan
                cards.append(Card(label, number(mean, unit), "mean of the last fifth of the run"))
    loss = run.curve("loss")
    if len(loss):
        cards.append(Card("training loss", number(loss.last), f"{number(float(loss.values[0]))} at the first step"))
    return cards


def _change_card(label: str, row: Row, unit: str, *, better: int) -> Card:
    value = measure(row.after.value, unit) if row.after else "\u2013"
    change = row.change
    if change is None or row.before is None or not math.isfinite(change.value):
        note = span(row.after, unit)
        return Card(label, value, note and f"95%: {note}")
    kind_of = "points" if unit == "%" else "change"
    note = measure(change.value, kind_of) + (" points" if unit == "%" else "")
    if within := span(change, kind_of):
        note += f" (95%: {within})"
    sure = 1 if change.low > 0 else -1 if change.high < 0 else 0
    return Card(label, value, note, {1: "good", -1: "bad"}.get(sure * better, ""))


# --- charts ----------------------------------------------------------------------------------------------------------


def _chart(run: Run, spec: Spec, marks: Sequence[int]) -> Chart | None:
    lines = []
    several = len(spec.metrics) > 1
    for place, (metric, label) in enumerate(spec.metrics.items()):
        curve, held_out = run.curve(metric), run.curve(f"eval_{metric}")
        if len(curve):
            lines.append(Line(label, curve, SERIES[place]))
        if len(held_out):
            name = f"{label}, held out" if several else "held out"
            lines.append(Line(name, held_out, SERIES[place if several else 1], dots=True))
    if not lines:
        return None
    return Chart(spec.name, spec.title, spec.unit, lines, _levels(run, spec.name), marks)


def _levels(run: Run, name: str) -> list[Level]:
    recipe = run.recipe
    if recipe is None:
        return []
    if name == "loss" and recipe.loss_type == "sigmoid" and not recipe.sft_weight:
        return [Level("the loss at a margin of 0", recipe.loss_at_zero_margin())]
    if name == "margin" and recipe.loss_type == "sigmoid" and recipe.gamma_beta_ratio and recipe.beta:
        return [Level("gamma, the margin asked for", recipe.beta * recipe.gamma_beta_ratio)]
    if name == "accuracy":
        return [Level("chance", 0.5)]
    norms = run.curve("grad_norm").values
    if name == "grad-norm" and recipe.max_grad_norm and (norms < 5 * recipe.max_grad_norm).any():
        return [Level("max_grad_norm", recipe.max_grad_norm)]
    return []


def _more_charts(run: Run, marks: Sequence[int]) -> list[Chart]:
    """Accuracy of each source, and what the answers to held-out prompts are like."""
    charts = []
    prefix = "eval_rewards/accuracies/"
    sources = [name.removeprefix(prefix) for name in run.curves if name.startswith(prefix)][: len(SERIES)]
    if sources:
        lines = [Line(s, run.curve(prefix + s), SERIES[i], dots=True) for i, s in enumerate(sources)]
        charts.append(Chart("sources", "Held-out accuracy by source", "%", lines, [Level("chance", 0.5)], marks))
    steps = sorted({step for answers in run.generations.values() for step in answers})
    if steps:
        texts = [[answers[step] for answers in run.generations.values() if step in answers] for step in steps]
        counted = steps == sorted(run.answer_tokens)
        sizes = [run.answer_tokens[step] for step in steps] if counted else [[len(t) for t in each] for each in texts]
        lengths = Curve(np.array(steps), np.array([np.mean(each) for each in sizes]))
        repeated = [np.mean([repeated_share(text.split()) for text in each]) for each in texts]
        line = Line("held-out prompts", lengths, SERIES[1], dots=True)
        charts.append(Chart("answers", "Length of answers", "tokens" if counted else "characters", [line], (), marks))
        line = Line("held-out prompts", Curve(np.array(steps), np.array(repeated)), SERIES[1], dots=True)
        charts.append(Chart("repetition", "Repeated 4-word runs in answers", "%", [line], (), marks, share="of runs"))
    return charts


def _values(run: Run) -> Table | None:
    """The main numbers at up to 12 logged steps."""
    steps = run.curve("loss").steps
    if not len(steps):
        return None
    steps = steps[np.unique(np.linspace(0, len(steps) - 1, min(12, len(steps))).round().astype(int))]
    rows = []
    for spec in SPECS:
        for metric, label in spec.metrics.items():
            at = dict(zip(run.curve(metric).steps.tolist(), run.curve(metric).values.tolist()))
            if at:
                name = spec.title + (f", {label}" if len(spec.metrics) > 1 else "")
                rows.append((name, [number(at.get(step, math.nan), spec.unit) for step in steps.tolist()]))
    return Table(["step", *(f"{step:,}" for step in steps.tolist())], rows)


# --- evaluation ------------------------------------------------------------------------------------------------------


def _evaluation(title: str, name: str, held_out: HeldOut) -> dict[str, Any]:
    moments = [label for label in (held_out.before, held_out.after) if label]
    heads = ["", *moments, *(["change"] if held_out.has_change else [])]

    def table(rows: Sequence[Row], unit: str, *, counted: bool = False) -> Table:
        cells = []
        for row in rows:
            values: list[Any] = [
                (each, unit) for each in ((row.before, row.after) if held_out.before else (row.after,))
            ]
            values += [(row.change, "points" if unit == "%" else "change")] if held_out.has_change else []
            cells.append((f"{row.label} ({row.num_pairs:,})" if counted and row.num_pairs else row.label, values))
        return Table(heads, cells)

    groups = [(row.label, [each for each in (row.before, row.after) if each]) for row in held_out.accuracy]
    return {
        "title": title,
        "accuracy": table(held_out.accuracy, "%", counted=True),
        "margin": table(held_out.margin, ""),
        "sides": table(held_out.sides, ""),
        "moments": list(zip(moments, SERIES)),
        "svg": to_whiskers(f"whiskers-{name}", "Accuracy with 95% intervals", groups) if len(groups) > 1 else "",
    }


def _eval_advice(run: Run, held_out: HeldOut | None) -> str:
    if held_out is None:
        return "No held-out pairs were evaluated. A test split, or validation_fraction: 0.1, holds some out."
    if held_out.after == "before training":
        return "So far the model before training is all that was evaluated."
    if not held_out.before:
        return "There is no evaluation of the model before training to compare with: eval_on_start: true makes one."
    return ""


def _answers(run: Run) -> list[Answer]:
    found = []
    for row_id, by_step in run.generations.items():
        steps = sorted({min(by_step), max(by_step)})
        texts = [("before training" if step == 0 else f"after step {step}", by_step[step]) for step in steps]
        found.append(Answer(last_turn(run.prompts[row_id]) or row_id, run.prompts[row_id], texts))
    return found


# --- data and recipe -------------------------------------------------------------------------------------------------

_CUTS = {
    "prompt_left": "prompt cut on the left",
    "chosen_right": "chosen cut at its end",
    "rejected_right": "rejected cut at its end",
}


def _ledger(run: Run) -> dict[str, Any] | None:
    splits = {name: split for name, split in run.ledger.get("splits", {}).items() if split}
    if not splits:
        return None
    reasons = dict.fromkeys(reason for split in splits.values() for reason in split.get("dropped", {}))

    def count(label: str, *path: str) -> tuple[str, list[str]]:
        found: list[Any] = list(splits.values())
        for name in path:
            found = [each.get(name, {}) for each in found]
        return label, [f"{each or 0:,}" for each in found]

    rows = [count("rows in", "input"), count("kept", "kept")]
    rows += [count(f"dropped: {reason}", "dropped", reason, "count") for reason in reasons]
    cuts = [count(words, "cut", place, "pairs") for place, words in _CUTS.items()]
    rows += [row for row in cuts if set(row[1]) != {"0"}]
    rows += [count("duplicates", "duplicates"), count("prompt seen before", "same_prompt"), count("tokens", "tokens")]
    sources = list(dict.fromkeys(source for split in splits.values() for source in split.get("sources", {})))
    if len(sources) > 1:
        rows += [count(f"from {source}", "sources", source, "kept") for source in sources]
    examples = [
        {"split": name, "reason": reason, **example}
        for name, split in splits.items()
        for kind in ("dropped", "noticed")
        for reason, entry in split.get(kind, {}).items()
        for example in entry.get("examples", ())[:2]
    ]
    advice = [*run.ledger.get("advice", ()), *run.ledger.get("notes", ())]
    return {"table": Table(["", *splits], rows), "examples": examples, "advice": advice, "svg": _length_bars(splits)}


def _length_bars(splits: Mapping[str, Any]) -> str:
    lengths = splits.get("train", {}).get("lengths", {})
    found = {side: lengths[side]["histogram"] for side in ("chosen", "rejected") if lengths.get(side)}
    if len(found) < 2:
        return ""
    edges = max((each["edges"] for each in found.values()), key=len)
    counts = {side: [*each["counts"], *[0] * (len(edges) - 1 - len(each["counts"]))] for side, each in found.items()}
    return to_bars("lengths", "Trained tokens of the answers", edges, counts)


_GIVEN = ("model_name_or_path", "dataset_mixer")
OF_THE_PLACE = {"output_dir", "run_name", "logging_dir", "cache_dir", "report_to", "hub_model_id"}


def _settings(run: Run) -> Table | None:
    """What the recipe sets otherwise than by default."""
    if not run.settings:
        return None
    settings = run.settings
    try:
        plain = load_recipe({"model_name_or_path": "m", "loss_type": settings.get("loss_type", "sigmoid")}).to_dict()
    except ValueError:  # a loss of one's own that is not here
        plain = load_recipe({"model_name_or_path": "m"}).to_dict()
    rows = []
    for key, value in settings.items():
        default = plain.get(key)
        if value != default and key not in OF_THE_PLACE and key not in STAGES:
            known = "" if key in _GIVEN else say(default)
            rows.append((key, [say(value), known if key in KEYS else "not a key of this version"]))
    return Table(["key", "here", "default"], rows)


def say(value: Any) -> str:
    """A value of a recipe as it is written there."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _commands(run: Run) -> list[tuple[str, str]]:
    """What to type next."""
    folder, recipe = shlex.quote(str(run.folder)), shlex.quote(str(run.folder / "recipe.yaml"))
    if not run.is_finished:
        again = ("make this page again, after anything was added", f"simpo report {folder}")
        host = any(name.startswith("checkpoint-") for name in run.checkpoints)
        train = "accelerate launch -m simpo train" if host else "simpo train"
        if run.is_running:
            return [("watch it: the page follows the run", f"simpo report {folder} --watch")]
        if run.checkpoints:
            return [(f"go on from {run.checkpoints[-1]}", f"{train} {recipe} --resume_from_checkpoint true"), again]
        return [("start over: there is no checkpoint", f"simpo train {recipe} --resume_from_checkpoint true"), again]
    held_out = any(split.get("kept") for name, split in run.ledger.get("splits", {}).items() if name != "train")
    base, adapters = str(run.settings.get("model_name_or_path")), bool(run.settings.get("use_peft"))
    return next_commands(run.folder, base, held_out=held_out, adapters=adapters)
