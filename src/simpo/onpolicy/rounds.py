"""`simpo rounds`: generate, score, pair, train, evaluate, k times, each round from the last one's model.

    run_rounds(load_recipe("recipe.yaml"))  # -> runs/first/rounds.json

Each step is one of the package's commands in a process of its own, on a recipe that lies in its round's folder: no
model stays in memory beside another, and each can be given by hand. What is finished is written down in the folder's
provenance.json, so that a loop that is killed at any moment goes on where it was.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from simpo.data.files import check_own, follow_umask, hash_files, sync_tree, write_whole
from simpo.display import Display, format_duration
from simpo.errors import LEFT_OUT
from simpo.onpolicy.journal import changed_settings, read_about
from simpo.onpolicy.pair import is_held_out, run_pair
from simpo.onpolicy.prompts import Prompt, check_rendered_alike, read_prompts
from simpo.onpolicy.score import build_scorer
from simpo.onpolicy.table import Measures, compare_models, measure_model, show_table, standard_error, table_lines
from simpo.recipe import KEYS, Recipe, load_recipe
from simpo.recipe.scorers import SCORER_KEYS
from simpo.recipe.stages import SERVER_KEYS, STAGES, Generate
from simpo.report import leave_report
from simpo.report.read import check_no_run
from simpo.run.lock import locked
from simpo.run.stopping import killed_by, on_stop_signal

_CHANGE_NOTHING = {
    "generate": {"batch_size", "processes", "tensor_parallel", *SERVER_KEYS},
    "rounds": {"min_gain", "launcher"},
    "judge": set(STAGES["judge"].model_fields),
}
"""Keys of the stages that may be others when a loop goes on."""


class StageFailed(Exception):
    """A command of a round ended with an error, which it has printed; `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_rounds(recipe: Recipe) -> Path:
    """Run the loop, or what is left of it.

    Returns:
        rounds.json in the recipe's output_dir: the measures of each model, and why it ended where that was early.
    Raises:
        ValueError: settings or prompts that cannot be, or others than the loop was begun with.
        StageFailed: a command of a round could not do its work.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the command at work has been asked to stop.
    """
    identities = _check(recipe)
    folder = Path(recipe.output_dir or "")
    if not (folder / "settings.json").exists():
        check_no_run(folder)
    loop = _Loop(recipe, folder, identities)
    with locked(folder, loop.display.say), leave_report(folder, loop.display.say):
        return loop.run()


def _check(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Raises ValueError for settings that cannot be; scorer -> what decides its numbers besides its options."""
    recipe.require("output_dir")
    if not recipe.score.scorers:
        raise ValueError("score.scorers: nothing to rate with; name a scorer there (`simpo keys score` has the kinds)")
    # Before anything is answered, and not when all has been.
    raters = {name: build_scorer(name, spec, recipe)[2] for name, spec in recipe.score.scorers.items()}
    if not recipe.pair.test_fraction:
        raise ValueError("pair.test_fraction: 0 holds out no prompts, and rounds are judged by them; set it above 0")
    for stage in ("score", "pair"):
        if getattr(recipe, stage).input is not None:
            raise ValueError(f"{stage}.input: each step of a round reads the last one's file; remove the key")
    if recipe.push_to_hub:
        raise ValueError("push_to_hub: not in rounds; upload the round's model that you choose")
    if recipe.resume_from_checkpoint:
        raise ValueError("resume_from_checkpoint: rounds go on by themselves; remove the key")
    if recipe.generate.backend == "openai" and recipe.rounds.rounds > 1:
        raise ValueError(
            "generate.backend: a server has one model, and each round samples from the last one's; sample by local, "
            "vllm or ray, or set rounds.rounds to 1"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("simpo rounds is started once; rounds.launcher starts its training on several processes")
    return {name: dict(rater.identity) for name, rater in raters.items()}


class _Loop:
    """The loop in one folder."""

    def __init__(self, recipe: Recipe, folder: Path, identities: Mapping[str, dict[str, Any]]) -> None:
        self.recipe, self.folder, self.display = recipe, folder, Display()
        # How responses are read is put right where they are compared; another scale could not be.
        self.readings = {name: each.pop("reading", None) for name, each in identities.items()}
        self.identities = identities
        self.keys = recipe.rounds
        self.seed = recipe.seed if recipe.generate.seed is None else recipe.generate.seed
        self.models: list[Measures] = []
        self.texts: dict[Path, str] = {}  # of each folder's recipe
        self.stopped: str | None = None

    def run(self) -> Path:
        training, held_out = self._plan_prompts()
        model, path = str(self.recipe.model_name_or_path), self.folder / "rounds.json"
        self._evaluate(0, model, held_out)
        for number in range(1, self.keys.rounds + 1):
            model = self._round(number, model, training[number - 1])
            self._evaluate(number, model, held_out)
            self.stopped = self._why_stop(number)
            self._save(path)
            if self.stopped:
                break
        show_table(self.display.console, self.models, self._notes())
        self.display.say(f"model: {model}\nnumbers: {path}, {path.with_suffix('.md')}")
        return path

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _plan_prompts(self) -> tuple[list[list[Prompt]], list[Prompt]]:
        """The prompts of each round, and those that are held out; refuses to go on with others than before."""
        check_rendered_alike(self.recipe)
        found = read_prompts(self.recipe)
        for note in found.notes:
            self.display.say(f"note: {note}")
        for reason, entry in found.left_out.items():
            example = entry["examples"][0]
            self.display.say(f"left out: {entry['count']} rows, {reason} ({example['row_id']}: {example['detail']})")
        share = self.recipe.pair.test_fraction
        held_out = sorted((p for p in found.prompts if is_held_out(p.id, share)), key=lambda p: p.id)
        others = sorted((p for p in found.prompts if not is_held_out(p.id, share)), key=lambda p: p.id)
        if not held_out:
            raise ValueError(f"pair.test_fraction: {share} of {len(found.prompts)} prompts holds out none; raise it")
        held_out = held_out[: self.keys.eval_prompts]
        training = split_prompts(
            others,
            self.keys.rounds,
            each=self.keys.prompts_per_round,
            reuse=self.keys.reuse_prompts,
            seed=self.recipe.seed,
        )
        counts = ", ".join(str(len(part)) for part in training)
        self.display.say(f"prompts: {counts} to train on, by round; {len(held_out)} held out")
        self._check_unchanged(found.prompts)
        return training, held_out

    def _check_unchanged(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError where the folder belongs to a loop with other settings or prompts."""
        path = self.folder / "settings.json"
        ids = "\n".join(sorted(prompt.id for prompt in prompts))
        current = self._settings() | {"prompts": hashlib.blake2b(ids.encode(), digest_size=16).hexdigest()}
        if not path.exists() and (found := sorted(self.folder.glob("round-*"))):
            raise ValueError(
                f"{self.folder}: holds {found[0].name}, and no {path.name} that says of which loop; choose another "
                "output_dir"
            )
        if not path.exists():
            write_whole(path, json.dumps(current, indent=1, ensure_ascii=False) + "\n")
            return
        before = check_own(path, "prompts")
        before = {name: value for name, value in before.items() if name in current or name not in KEYS}  # free by now
        before["score.scorers"] = _what_rates(before.get("score.scorers") or {})
        if "pairs_per_step" not in before:  # begun by a version that did not write these down
            current = {name: value for name, value in current.items() if name not in what_decides(self.recipe)}
        if changed := changed_settings(before, json.loads(json.dumps(current))):
            raise ValueError(
                f"{self.folder}: was begun with other settings ({changed}); give the same ones to go on, or another "
                "output_dir"
            )

    def _settings(self) -> dict[str, Any]:
        """Every key that decides what a round does."""
        values = {name: value for name, value in self.recipe.to_dict().items() if not KEYS[name].may_change}
        for stage in STAGES:
            free = _CHANGE_NOTHING.get(stage, set())
            if stage == "rounds" and (self.keys.reuse_prompts or self.keys.prompts_per_round):
                free = {*free, "rounds"}  # further rounds leave the earlier ones their prompts
            of_stage = getattr(self.recipe, stage).model_dump()
            values |= {f"{stage}.{name}": value for name, value in of_stage.items() if name not in free}
        values["score.scorers"] = _what_rates(self.recipe.score.scorers or {})
        for name, identity in self.identities.items():
            known = [
                what for what in ("source", "weights", "template_text", "chat_template_digest") if what in identity
            ]
            values |= {f"score.{name}.{what.removesuffix('_digest')}_digest": identity[what] for what in known}
        return values | what_decides(self.recipe)

    # --- a round -----------------------------------------------------------------------------------------------------

    def _round(self, number: int, model: str, prompts: Sequence[Prompt]) -> str:
        """From prompts to the round's model; returns its folder."""
        place = self.folder / f"round-{number}"
        run = place / "run"
        recipe = self._write_recipe(place, model, prompts, seed=(self.seed + number) % 2**32)
        stage = functools.partial(self._stage, place, f"round {number}")
        stage("generate", lambda: self._command("generate", recipe))
        stage("score", lambda: self._command("score", recipe))
        stage("pair", lambda: self._pair(place, recipe))
        train = ("train", recipe, "--output_dir", str(run), "--resume_from_checkpoint", "true")
        stage("train", lambda: None if (run / "model").is_dir() else self._command(*train))
        if not self.recipe.use_peft:
            return str(run / "model")
        stage("merge", lambda: merge_adapter(run / "model", place / "merged", self.recipe))
        return str(place / "merged")

    def _pair(self, place: Path, recipe: str) -> None:
        """Pairs to train on, and beside them those of the first model on held-out prompts, the same in every round."""
        loaded = load_recipe(recipe)
        pairs = run_pair(loaded)
        held_out = self.folder / "round-0" / "pairs" / "test.jsonl"
        for folder in (pairs, *[pairs.with_name("lists")] * loaded.pair.lists):
            if held_out.exists():
                write_whole(folder / "test.jsonl", held_out.read_text(encoding="utf-8"))
            if not (folder / "train.jsonl").exists():
                raise ValueError(f"{place}: no pair to train on")

    def _evaluate(self, number: int, model: str, prompts: Sequence[Prompt]) -> None:
        """Fresh responses of a round's model to the held-out prompts, scored; its margins on held-out pairs."""
        place = self.folder / f"round-{number}" / "evaluation"
        samples = self.keys.eval_samples or self.recipe.generate.num_samples
        changes: dict[str, Any] = {"generate.num_samples": samples}
        if self.recipe.generate.backend == "openai":  # which has not this model
            others = {name: Generate.model_fields[name].default for name in (*SERVER_KEYS, "options")}
            changes |= {f"generate.{name}": value for name, value in {"backend": "local", **others}.items()}
        recipe = self._write_recipe(place, model, prompts, seed=self.seed, **changes)
        stage = functools.partial(self._stage, place, f"round {number}, evaluation")
        stage("generate", lambda: self._command("generate", recipe))
        # Models are compared with each other, also with those of a round that an earlier version has scored.
        scored = read_about(place / "scored.jsonl").get("settings", {}).get("scorers", self.readings)
        anew = scored is not self.readings and self.readings != {name: scored[name].get("reading") for name in scored}
        stage("score", lambda: self._command("score", recipe), anew=anew)
        if number == 0 and samples > 1:
            pairs = self.folder / "round-0" / "pairs"
            stage("pair", lambda: self._held_out_pairs(recipe, pairs))
        pairs, result = self.folder / "round-0" / "pairs" / "test.jsonl", place / "pairs.json"
        if pairs.exists():
            # The file of held-out pairs is all of this recipe's data.
            evaluate = ("eval", recipe, "--model", model, "--split", "train", "--output", str(result))
            stage("eval", lambda: self._command(*evaluate))
        on_pairs = result if pairs.exists() else None
        self.models.append(measure_model(number, model, place / "scored.jsonl", on_pairs, scales=self._scales()))
        if number:
            self.models[-1].gain = compare_models(self.models[-1], self.models[-2])

    def _scales(self) -> dict[str, tuple[float, float]] | None:
        """What standardises every model's score alike: each scorer's mean, and its weight by its deviation, of the
        first model's responses."""
        if not self.recipe.score.standardize:
            return None
        spreads = read_about(self.folder / "round-0" / "evaluation" / "scored.jsonl")["scores"]
        weights = {name: spec.get("weight", 1.0) for name, spec in (self.recipe.score.scorers or {}).items()}
        return {name: (each["mean"], weights[name] / (each["sd"] or 1.0)) for name, each in spreads.items()}

    def _held_out_pairs(self, recipe: str, folder: Path) -> None:
        try:
            run_pair(load_recipe(recipe), output=folder)
        except ValueError as error:
            self.display.say(f"no held-out pairs, so that no round has an accuracy: {error}")

    def _why_stop(self, number: int) -> str | None:
        """A sentence where the held-out score no longer rises by enough."""
        if self.keys.min_gain is None:
            return None
        gain = compare_models(self.models[-1], self.models[-2])
        error = standard_error(gain)
        if gain.value > self.keys.min_gain * error or number == self.keys.rounds:
            return None
        return (
            f"stopped after round {number} of {self.keys.rounds}: the held-out score changed by {gain.value:+.4f}, not "
            f"by more than rounds.min_gain = {self.keys.min_gain:g} standard errors (one is {error:.4f})"
        )

    # --- stages ------------------------------------------------------------------------------------------------------

    def _stage(self, place: Path, title: str, name: str, work: Callable[[], Any], *, anew: bool = False) -> None:
        """Do a step, on the recipe with the present values of what may change, unless it is written down as done (and
        not to be done `anew`); then write it down."""
        path, recipe = place / "provenance.json", place / "recipe.yaml"
        about = json.loads(path.read_text(encoding="utf-8"))
        if name in about["stages"] and not anew:
            return
        write_whole(recipe, self.texts[place])
        about["recipe_fingerprint"] = hash_files([recipe])
        self.display.say(f"\n{title}: {name}")
        started = time.perf_counter()
        work()
        spent = time.perf_counter() - started
        about["stages"][name] = {"time_s": round(spent, 1), "finished": time.strftime("%Y-%m-%d %H:%M:%S%z")}
        write_whole(path, json.dumps(about, indent=1) + "\n")
        self.display.say(f"{title}: {name} took {format_duration(spent)}")

    def _command(self, *words: str) -> None:
        """One of the package's commands, to its end."""
        launcher = shlex.split(" ".join(self.keys.launcher)) if words[0] == "train" else []
        code = run_command([*(launcher or [sys.executable]), "-m", "simpo", *words], is_launcher=bool(launcher))
        if code not in (0, LEFT_OUT):  # which was said
            killed = killed_by(code)
            raise StageFailed(
                f"`simpo {' '.join(words)}` ended with code {code}; "
                f"{f'{killed}: then' if killed else 'put right what it says above, and'} give the same command again",
                code,
            )

    def _write_recipe(self, place: Path, model: str, prompts: Sequence[Prompt], *, seed: int, **changes: Any) -> str:
        """The prompts of one folder's commands, and the record of what they work on; returns the path of their recipe,
        which each of them writes."""
        asked = place / "prompts.jsonl"
        of_lists = self.recipe.loss.is_of_lists
        pairs = place / ("lists" if of_lists else "pairs")
        changes["pair.lists"] = of_lists or self.recipe.pair.lists
        if place.name == "evaluation":
            pairs = self.folder / "round-0" / "pairs" / "test.jsonl"
            changes["max_train_samples"] = None
        changes |= {
            "model_name_or_path": model,
            "output_dir": str(place),
            "dataset_mixer": {str(pairs): 1.0},
            "dataset_splits": ["train", "test"],
            "dataset_configs": None,
            "validation_fraction": 0.0,
            **dict.fromkeys(("prompt_column", "chosen_column", "rejected_column", "score_column")),
            "generate.prompts": {str(asked): 1.0},
            "generate.max_prompts": None,
            "generate.seed": seed,
        }
        if model != self.recipe.model_name_or_path:
            changes["model_revision"] = None
        recipe = load_recipe(self.recipe, changes)
        self.texts[place] = recipe.to_yaml(for_any_processes=True)
        if not (place / "provenance.json").exists():
            write_whole(asked, (json.dumps(prompt.to_row(), ensure_ascii=False) + "\n" for prompt in prompts))
            about = {
                **{package: version(package) for package in ("simpo", "torch", "transformers")},
                "model": model,
                "model_fingerprint": fingerprint_model(model),
                "prompts": len(prompts),
                "prompts_fingerprint": hash_files([asked]),
                "stages": {},
            }
            write_whole(place / "provenance.json", json.dumps(about, indent=1) + "\n")
        return str(place / "recipe.yaml")

    # --- what it leaves ----------------------------------------------------------------------------------------------

    def _notes(self) -> list[str]:
        best = max(self.models, key=lambda model: model.score.value)
        lines = [self.stopped] if self.stopped else []
        return [*lines, f"the highest held-out score is that of round {best.round}: {best.model}"]

    def _save(self, path: Path) -> None:
        content = {
            "simpo": version("simpo"),
            "models": [model.to_dict() for model in self.models],
            "stopped": self.stopped,
            "left_out": self._left_out(),
        }
        write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        write_whole(path.with_suffix(".md"), "\n".join([*table_lines(self.models), "", *self._notes(), ""]))

    def _left_out(self) -> dict[str, Any]:
        """What the accounts of all steps say, each reason with its place."""
        found = {}
        for number in range(len(self.models)):
            place = Path(f"round-{number}")
            for file in (place / "evaluation", place):
                for name in ("responses", "scored", "pairs"):
                    left_out = read_about(self.folder / file / f"{name}.json").get("left_out", {})
                    found |= {f"{reason} ({file / name})": entry for reason, entry in left_out.items()}
        return found


def _what_rates(scorers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Scorers without what says only where and how fast they compute. A judge's template is its question."""
    free = {
        kind: {key.name.rpartition(".")[2] for key in keys if key.may_change} - {"weight", "template"}
        for kind, keys in SCORER_KEYS.items()
    }
    return {
        name: {key: value for key, value in spec.items() if key not in free.get(spec["kind"], ())}
        for name, spec in scorers.items()
    }


_BY_EVALUATIONS = (
    "load_best_model_at_end",
    "early_stopping_patience",
    "early_stopping_threshold",
    "eval_strategy",
    "eval_steps",
)


def what_decides(recipe: Recipe) -> dict[str, Any]:
    """What a run may change and still decides its model, so that a loop or sweep may not: None where it is off."""
    guard = {check: level for check, level in recipe.guard.items() if level in ("stop", "back")}
    acts = guard or recipe.load_best_model_at_end or recipe.early_stopping_patience is not None
    of_evaluations = {name: getattr(recipe, name) if acts else None for name in _BY_EVALUATIONS}
    world = count_ranks(recipe)
    unknown = f"{recipe.pairs_per_step()} x {' '.join(recipe.rounds.launcher)}"
    pairs = recipe.global_batch_size or (unknown if world is None else recipe.pairs_per_step(world))
    return {"pairs_per_step": pairs, "save_dtype": recipe.save_dtype, "guard": guard, **of_evaluations}


def count_ranks(recipe: Recipe) -> int | None:
    """Processes with pairs of their own that `rounds.launcher` starts; None where its words do not say."""
    words = " ".join(recipe.rounds.launcher)
    counts = re.findall(r"--(?:nproc[-_]per[-_]node|nnodes|num[-_]processes)[= ](\d+)\b", words)
    if words and not counts:
        return None
    return max(1, math.prod(map(int, counts)) // (recipe.cp * recipe.tp))


def split_prompts(
    prompts: Sequence[Prompt], rounds: int, *, each: int | None, reuse: bool, seed: int
) -> list[list[Prompt]]:
    """The prompts of each round: disjoint parts of a seeded order, or with `reuse` a draw from all for each.

    Args:
        prompts: in an order of their own.
        each: a round's number of prompts; None = all of them shared out, or with `reuse` all.
    Raises:
        ValueError: there are too few.
    """
    wanted = each or (len(prompts) if reuse else len(prompts) // rounds)
    needed = wanted if reuse else wanted * rounds
    if not wanted or needed > len(prompts):
        raise ValueError(
            f"rounds: {rounds} rounds of {max(wanted, 1)} prompts need {max(needed, rounds)}, and there are "
            f"{len(prompts)} to train on; lower rounds.prompts_per_round or rounds.rounds, or set "
            "rounds.reuse_prompts: true"
        )
    if reuse:
        return [
            sorted(random.Random(f"{seed} round {n}").sample(prompts, wanted), key=lambda p: p.id)
            for n in range(1, rounds + 1)
        ]
    order = random.Random(f"{seed} rounds").sample(prompts, len(prompts))
    if each is None:
        return [sorted(order[n::rounds], key=lambda p: p.id) for n in range(rounds)]
    return [sorted(order[n * each : (n + 1) * each], key=lambda p: p.id) for n in range(rounds)]


def fingerprint_model(name: str) -> str | None:
    """Of the files of a model's folder; None for a hub's, which its name and revision say."""
    return hash_files([Path(name)]) if Path(name).is_dir() else None


def merge_adapter(adapter: Path, target: Path, recipe: Recipe) -> None:
    """Write the model that an adapter and its base make together, whole or not at all.

    Args:
        recipe: its save_dtype is the number format in which they are added up and written; auto = float32, for the
            base's own may be too coarse for what a round adds.
    """
    if target.is_dir():
        return
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from simpo.run.export import saving_quietly

    aside = target.with_name(f".{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with saving_quietly():
        own = {"trust_remote_code": recipe.trust_remote_code}
        dtype = "float32" if recipe.save_dtype == "auto" else recipe.save_dtype
        model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype, **own)
        model.merge_and_unload().save_pretrained(aside)
    AutoTokenizer.from_pretrained(adapter, **own).save_pretrained(aside)
    follow_umask(aside)
    sync_tree(aside)
    aside.rename(target)


def going_with_this_process(words: Sequence[str], number: signal.Signals) -> Sequence[str]:
    """The command; on Linux it gets a signal, which survives exec, when this process ends, however that ends."""
    if sys.platform != "linux":
        return words
    start = (
        f"import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {int(number)}); os.getppid() == {os.getpid()} or "
        "os._exit(1); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-c", start, *words]


def run_command(words: Sequence[str], *, is_launcher: bool = False) -> int:
    """Run a program to its end and return its exit code.

    Ctrl-C, SIGTERM and SIGHUP here reach it once, as SIGINT, and it is waited for.
    """
    # A launcher gets the one that launchers pass on.
    words = going_with_this_process(words, signal.SIGTERM if is_launcher else signal.SIGKILL)
    with on_stop_signal():
        child = subprocess.Popen(words, process_group=0)  # not in the group that the terminal sends Ctrl-C to
        try:
            return child.wait()
        except KeyboardInterrupt:
            ask_to_stop(child)
            child.wait()
            raise


def ask_to_stop(child: subprocess.Popen[Any]) -> None:
    """As Ctrl-C does, which on Windows reaches the children of a terminal's process by itself."""
    if os.name == "posix" and child.poll() is None:
        inherits_deafness = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        child.send_signal(signal.SIGTERM if inherits_deafness else signal.SIGINT)
