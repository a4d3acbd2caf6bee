"""`simpo sweep`: train with several settings, measure each model on the same held-out pairs, name the best.

    run_sweep("recipe.yaml", {"learning_rate": ("3e-7", "1e-6"), "beta": ("2", "10")})  # -> sweep.json in output_dir

Each setting is a folder of its own, trained and evaluated by the package's commands in processes of their own. The
data is prepared once, the untrained model evaluated once. With rungs (successive halving) every setting is trained for
the first, short number of steps, and only the best go on to the next: each rung trains anew, with a schedule of its
own, so that what is compared has always come to the end of its schedule. What is finished is written down, and the same
command goes on from there.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from simpo.data.cache import PreparedData
from simpo.data.files import check_own, write_whole
from simpo.data.prepare import prepare_pairs
from simpo.data.sources import load_splits
from simpo.display import Display, format_duration
from simpo.evaluation.run import model_folder
from simpo.evaluation.statistics import Interval
from simpo.model.load import load_tokenizer
from simpo.onpolicy.journal import changed_settings
from simpo.onpolicy.rounds import fingerprint_model, what_decides
from simpo.recipe import KEYS, Recipe, load_recipe
from simpo.report import report_path, try_report
from simpo.report.read import check_no_run, is_run
from simpo.run.lock import locked
from simpo.tuning.jobs import Job, Result, Trial, Workers, compare_folders, run_here, run_on_ray
from simpo.tuning.space import Settings, Space, foresee, propose_all, propose_next

_ONCE = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "num_eval_generations": 0,
    "load_best_model_at_end": False,
    "early_stopping_patience": None,
    "early_stopping_threshold": 0.0,
}
"""What a sweep sets itself, since it measures trials once they are trained."""

_IN_VAIN = {*_ONCE, "output_dir", "eval_steps", "metric_for_best_model", "greater_is_better"}

_HOLDS_OUT = {
    *("seed", "validation_fraction", "dataset_mixer", "dataset_splits", "dataset_configs"),
    *("prompt_column", "chosen_column", "rejected_column", "score_column"),
}
"""Keys that decide which pairs are held out where there is no test split."""

COLLAPSED = 0.2
"""A model whose answers repeat this much more of themselves than the untrained model's has collapsed."""


def run_sweep(
    recipe: str | Path | Recipe,
    space: Space,
    *,
    method: str = "grid",
    trials: int | None = None,
    rungs: Sequence[int] = (),
    generations: int = 8,
    ray: bool = False,
    keep_models: bool = False,
    display: Display | None = None,
) -> Path:
    """Run a sweep, or what is left of it.

    Args:
        recipe: what all trials have in common; its output_dir is the sweep's folder, and it has held-out pairs.
        space: recipe key -> the texts of its values, or a `Range`.
        method: grid, random or optuna.
        trials: settings to try, for random and optuna.
        rungs: ascending numbers of steps. Of n settings the best n * rungs[0] / rungs[1] go on to the second, so that
            each rung takes about as many steps as the first. Empty = every setting trains as the recipe says.
        generations: held-out prompts that each model answers greedily, to see that it has not collapsed; 0 = none.
        ray: run trials by Ray Tune over its cluster, instead of one on each GPU of this machine.
        keep_models: keep every model, not only the best.
    Returns:
        sweep.json: everything that was tried and measured; a table is in sweep.md beside it, the best setting's recipe
        in best.yaml.
    Raises:
        ValueError: settings that cannot be, nothing held out, other settings than the sweep was begun with, or nothing
            that could be trained.
    """
    base = load_recipe(recipe)
    check_base(base)
    _check_varied(base, space, rungs)
    for settings in foresee(space, method=method, trials=trials, seed=base.seed):
        load_recipe(base, _words(settings))
    if any(b <= a for a, b in zip((0, *rungs), rungs)):
        raise ValueError(f"--rungs {','.join(map(str, rungs))}: ascending numbers of steps are needed, as 10,40,160")
    folder = Path(base.output_dir or "")
    display = display or Display()
    with locked(folder, display.say):
        sweep = _Sweep(base, folder, display, generations=generations, keep_models=keep_models)
        sweep.begin(space, method=method, trials=trials, rungs=rungs)
        workers = run_on_ray if ray else functools.partial(run_here, launcher=bool(base.rounds.launcher))
        return sweep.run(space, workers, method=method, trials=trials, rungs=list(rungs) or [None])


def check_base(base: Recipe) -> None:
    """Raise ValueError for a recipe without data or folder, or with what no trial does."""
    base.require("dataset_mixer", "output_dir")
    if base.push_to_hub:
        raise ValueError("push_to_hub: not in a sweep; upload the model that you choose")
    if base.resume_from_checkpoint:
        raise ValueError("resume_from_checkpoint: a sweep goes on by itself; remove the key")


def prepare(base: Recipe) -> PreparedData:
    """The pairs that every trial then finds prepared. Raises ValueError where none are held out to choose by."""
    data = prepare_pairs(base, load_tokenizer(base), progress=True)
    if not len(data.eval or ()):
        raise ValueError(
            "no held-out pairs to choose by: add a test split to dataset_splits, or give validation_fraction 0.1"
        )
    return data


def _key_of(name: str) -> str:
    """The key of the recipe that a name sets."""
    return next((key for key, each in KEYS.items() if name in (key, *each.aliases)), name.partition(".")[0])


def _check_varied(base: Recipe, space: Space, rungs: Sequence[int]) -> None:
    """Raise ValueError for keys that all trials would have alike, or by which one would train on what measures it."""
    mixed = {f"dataset_mixer.{name}" for name in base.dataset_mixer}  # their fractions are of what is not held out
    moving = [name for name in space if _key_of(name) in _HOLDS_OUT and name not in mixed]
    if moving and not load_splits(base.model_copy(update={"validation_fraction": 0.0})).eval:
        raise ValueError(
            f"{moving[0]}: cannot be varied without a test split: it decides which pairs are held out, and a trial "
            "would train on some that measure it; put held-out pairs into a split of their own (dataset_splits)"
        )
    for name, values in space.items():
        key = _key_of(name)
        if key in _IN_VAIN or (key == "guard" and "back" in _plain(values)):
            raise ValueError(
                f"{name}: cannot be varied: trials train to their end, each in its own folder, and are measured then; "
                "give one value, or remove it"
            )
        if rungs and key in ("max_steps", "num_train_epochs"):
            raise ValueError(f"{name}: cannot be varied with --rungs, which say how many steps a trial has; remove one")


def _as_trained(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe that a trial is trained by."""
    guard = {check: "stop" if level == "back" else level for check, level in recipe.guard.items()}
    return load_recipe(recipe, {**_ONCE, "guard": guard, **changes})


@dataclass(frozen=True, slots=True)
class Found:
    """What a finished sweep came to.

    Attributes:
        as_good: trials of the last rung that are as good within the interval of their difference.
        gained: whether the best gained accuracy from one rung to the next, beyond a standard error.
    """

    best: Trial
    as_good: list[Trial]
    gained: bool


def read_sweep(path: Path) -> Found:
    """What a sweep.json says at its end."""
    content = json.loads(path.read_text(encoding="utf-8"))
    trials = {each["name"]: Trial.of_json(each) for each in content["trials"]}
    best = trials[content["best"]]
    gained = False
    if len(best.results) > 1:
        places = [path.parent / best.name / f"steps-{result.steps}" for result in best.results[-2:]]
        gain = compare_folders(places[1], places[0])
        gained = gain.value > (gain.high - gain.low) / 4
    return Found(best, [trials[name] for name in content["as_good"]], gained)


def digests(recipe: Recipe, data: PreparedData) -> dict[str, str | None]:
    """The pairs' tokens and the model's files, whatever their names; None for a model of the hub."""
    model = fingerprint_model(model_folder(recipe.model_name_or_path))
    return {"data_digest": data.fingerprint, "model_digest": model}


class _Sweep:
    """The sweep in one folder."""

    def __init__(self, base: Recipe, folder: Path, display: Display, *, generations: int, keep_models: bool) -> None:
        self.base, self.folder, self.display = base, folder, display
        self.generations, self.keep_models = generations, keep_models
        self.path = folder / "sweep.json"
        self.about: dict[str, Any] = {}
        self.untrained = Result(0)
        self.trials: list[Trial] = []

    # --- the whole ---------------------------------------------------------------------------------------------------

    def begin(self, space: Space, **how: Any) -> None:
        """Take up what was done before, and prepare the data."""
        later = what_decides(_as_trained(self.base))
        recipe = {name: value for name, value in self.base.to_dict().items() if not KEYS[name].may_change} | later
        asked = {"space": {key: _plain(values) for key, values in space.items()}, **how}
        asked = json.loads(json.dumps(asked | {"generations": self.generations, "recipe": recipe}))
        before = check_own(self.path, "asked", "untrained", "trials")
        was, now = before.get("asked"), asked
        if was is not None:
            was["recipe"] = {name: value for name, value in was["recipe"].items() if name in recipe}  # free by now
            if "pairs_per_step" not in was["recipe"]:  # begun by a version that did not write these down
                now = asked | {"recipe": {name: value for name, value in asked["recipe"].items() if name not in later}}
            self._check_same(was, {name: value for name, value in was.items() if name.endswith("_digest")} | now)
            self.untrained = Result.of_json(before["untrained"])
            self.trials = [Trial.of_json(each) for each in before["trials"]]
            self.keep_models |= "best" in before  # it was finished, and what it left is its owner's
        elif found := [each.name for each in (*self.folder.glob("untrained"), *self.folder.glob("trial-*"))]:
            raise ValueError(
                f"{self.folder}: holds {found[0]} of a sweep, and no {self.path.name} that says of which; choose "
                "another output_dir"
            )
        else:
            check_no_run(self.folder)
        data = prepare(self.base)
        files = digests(self.base, data)
        if was is not None:
            self._check_same(was, now | files)
        self.about = {"asked": asked | files}
        if not before:
            self._save()
        self.display.say(f"pairs: {len(data.train)} to train, {len(data.eval or ())} held out")

    def _check_same(self, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if changed := changed_settings(was, now):
            raise ValueError(
                f"{self.folder}: a sweep with other settings lies there ({changed}); give the same ones to go on, or "
                "another output_dir"
            )

    def run(
        self, space: Space, workers: Workers, *, method: str, trials: int | None, rungs: Sequence[int | None]
    ) -> Path:
        """Every rung; then the table."""
        place = self.folder / "untrained"
        write_whole(place / "recipe.yaml", self.base.to_yaml(for_any_processes=True))  # measures every trial
        if self.untrained.accuracy is None:
            workers([Job(place, None, self.generations)], lambda job, result: setattr(self, "untrained", result))
            if self.untrained.failed:
                raise ValueError(f"the untrained model could not be evaluated: {self.untrained.failed}")
            self._save()
        if method == "optuna":
            self._propose_one_by_one(space, workers, steps=rungs[0], count=trials or 0)
        else:
            proposed = propose_all(space, method=method, trials=trials, seed=self.base.seed)
            for settings in proposed[len(self.trials) :]:
                self._add(settings)
            self._train(self.trials, workers, rung=0, steps=rungs[0])
        remaining = self._alive(self.trials)
        for rung, (before, steps) in enumerate(itertools.pairwise(rungs), start=1):
            remaining = remaining[: max(1, round(len(remaining) * (before or 1) / (steps or 1)))]
            self._train(remaining, workers, rung=rung, steps=steps)
            remaining = self._alive(remaining)
        return self._finish(sorted(remaining, key=self._worth, reverse=True))

    def _propose_one_by_one(self, space: Space, workers: Workers, *, steps: int | None, count: int) -> None:
        self._train(self.trials, workers, rung=0, steps=steps)
        while len(self.trials) < count:
            firsts = [(t.settings, t.results[0]) for t in self.trials]
            tried = [(s, r.accuracy.value if r.accuracy and not r.failed else None) for s, r in firsts]
            self._train([self._add(propose_next(space, tried, seed=self.base.seed))], workers, rung=0, steps=steps)

    def _add(self, settings: Settings) -> Trial:
        """A new trial; its recipe is checked at once."""
        load_recipe(self.base, _words(settings))
        self.trials.append(Trial(f"trial-{len(self.trials) + 1:02}", settings))
        return self.trials[-1]

    def _train(self, trials: Sequence[Trial], workers: Workers, *, rung: int, steps: int | None) -> None:
        """Train and measure those that have not reached this rung."""
        jobs = {self._job(t, steps): t for t in trials if len(t.results) <= rung}
        if not jobs:
            return
        length = "" if steps is None else f" of {steps} steps"
        self.display.say(f"\n{len(jobs)} run{'s' * (len(jobs) > 1)}{length}; what they print is in their folders")

        def note(job: Job, result: Result) -> None:
            trial = jobs[job]
            result.steps = steps
            grown = (result.repeated or 0) - (self.untrained.repeated or 0)
            if result.failed is None and grown > COLLAPSED:
                result.failed = f"collapsed: {result.repeated:.0%} of its answers repeat themselves"
            trial.results.append(result)
            self._save()
            shutil.rmtree(job.folder / "run" / "checkpoints", ignore_errors=True)
            said = result.failed or f"accuracy {_percent(result.accuracy)}, margin {result.margin.value:+.4f}"
            self.display.say(f"{trial.name} ({trial}): {said}  [{format_duration(result.time_s)}]")

        workers(list(jobs), note)

    def _job(self, trial: Trial, steps: int | None) -> Job:
        place = self._place(trial, steps)
        length = {} if steps is None else {"max_steps": steps}
        recipe = _as_trained(load_recipe(self.base, _words(trial.settings)), output_dir=str(place / "run"), **length)
        write_whole(place / "recipe.yaml", recipe.to_yaml(for_any_processes=True))
        return Job(place, self.folder / "untrained" / "recipe.yaml", self.generations)

    # --- what came out -----------------------------------------------------------------------------------------------

    def _alive(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those that did not fail, first those that lean furthest to the chosen answers."""
        alive = [t for t in trials if t.results and not t.last.failed]
        return sorted(alive, key=lambda t: (t.last.leaning or 0.0, self._worth(t)), reverse=True)

    @staticmethod
    def _worth(trial: Trial) -> float:
        return trial.last.accuracy.value if trial.last.accuracy else -math.inf

    def _finish(self, best_first: Sequence[Trial]) -> Path:
        if not best_first:
            reasons = "; ".join(f"{t.name}: {t.last.failed}" for t in self.trials[:3] if t.results)
            raise ValueError(f"every run failed ({reasons}); their logs are in {self.folder}/trial-*/")
        best, places = best_first[0], {t.name: self._place(t, t.last.steps) for t in self.trials if t.results}
        place = places[best.name]
        alike = [t for t in best_first[1:] if compare_folders(place, places[t.name]).low <= 0]
        if not self.keep_models:
            for model in (each for t in self.trials for each in (self.folder / t.name).glob("*/run/model")):
                if model != place / "run" / "model":
                    shutil.rmtree(model)
        recipe = load_recipe(self.base, [*_words(best.settings), "--output_dir", str(self.folder / "best")])
        write_whole(self.folder / "best.yaml", recipe.to_yaml(for_any_processes=True))
        self.about |= {"best": best.name, "as_good": [t.name for t in alike]}
        self._save()
        lines = self._lines(best, alike, compare_folders(place, self.folder / "untrained"))
        head, rows = self._cells()
        write_whole(self.folder / "sweep.md", "\n".join([*_markdown(head, rows), "", *lines, ""]))
        table = Table(title="held-out pairs", title_justify="left", box=None, padding=(0, 1, 0, 0))
        for name in head:
            table.add_column(name.replace("_", "_\n"), justify="right", vertical="bottom", no_wrap=True)
        for row in rows:
            table.add_row(*(cell.replace(" (", "\n(") for cell in row))
        self.display.console.print(table)
        for line in lines:
            self.display.say(line)
        runs = [each / "run" for each in places.values() if is_run(each / "run")]
        try_report(runs, self.display.say, report_path(self.folder))
        self.display.say(f"recipe: {self.folder / 'best.yaml'}\nmodel: {place / 'run/model'}\nnumbers: {self.path}")
        return self.path

    def _place(self, trial: Trial, steps: int | None) -> Path:
        return self.folder / trial.name / ("run" if steps is None else f"steps-{steps}")

    def _lines(self, best: Trial, alike: Sequence[Trial], gain: Interval) -> list[str]:
        steps = sum(r.steps or 0 for t in self.trials for r in t.results)
        said = [
            f"best: {best}, accuracy {_percent(best.last.accuracy)}; {gain.value:+.1%} ({gain.low:+.1%} to "
            f"{gain.high:+.1%}) on the untrained model"
        ]
        said += [f"* {t.name} ({t}) counts for nothing: {t.last.failed}" for t in self.trials if t.last.failed]
        if alike:
            said.append(f"as good within the interval of their difference: {'; '.join(map(str, alike))}")
        if steps:
            said.append(f"{steps} optimizer steps in all")
        said.append(
            "accuracy: pairs whose chosen response is the longer one, and those where it is the shorter, count alike. "
            "It chose the best, so expect a little less of it on other pairs"
        )
        return said

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        varied = list(self.trials[0].settings)
        head = ["trial", *varied, "steps", "accuracy", "margin", "chosen", "repeated"]
        order = sorted(self.trials, key=lambda t: (len(t.results), not t.last.failed, self._worth(t)), reverse=True)
        rows = [["none", *("" for _ in varied), "0", *_measures(self.untrained)]]
        for trial in order:
            steps = "all" if trial.last.steps is None else str(trial.last.steps)
            values = [trial.settings[key] for key in varied]
            mark = "*" if trial.last.failed else ""
            rows.append([trial.name.removeprefix("trial-") + mark, *values, steps, *_measures(trial.last)])
        return head, rows

    def _save(self) -> None:
        trials = [
            {"name": t.name, "settings": t.settings, "results": list(map(asdict, t.results))} for t in self.trials
        ]
        content = {**self.about, "untrained": asdict(self.untrained), "trials": trials}
        write_whole(self.path, json.dumps(content, indent=1) + "\n")


# --- words -----------------------------------------------------------------------------------------------------------


def _words(settings: Settings) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def _plain(values: Any) -> Any:
    return list(values) if isinstance(values, tuple) else str(values)


def _percent(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.value:.1%} ({100 * interval.low:.0f}-{100 * interval.high:.0f})"


def _measures(result: Result) -> list[str]:
    if result.accuracy is None or result.margin is None:
        return [""] * 4
    return [
        _percent(result.accuracy),
        f"{result.margin.value:+.4f}",
        f"{result.chosen:.3f}",
        "" if result.repeated is None else f"{result.repeated:.1%}",
    ]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
