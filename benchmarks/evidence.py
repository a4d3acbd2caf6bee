"""The method's claims in small: trains, measures, and writes docs/evidence.md with its figures. Nothing is typed in.

    make evidence                     everything, 6 times as many trainings as quick
    EVIDENCE=quick make evidence      the first sections
    python benchmarks/evidence.py [--model MODEL] [--data FOLDER] [--size quick] [--only SECTION ...] [--at-once N]
    python benchmarks/evidence.py --paper simpo=MODEL dpo=MODEL ... --pairs PAIRS    the paper's numbers, by its models

An arm is a recipe on some pairs. It is trained once for each seed, which chooses its pairs and their order, and is
measured on held-out pairs, on greedy answers to their prompts and on text that has nothing to do with them. What was
measured lies in --output, a file for each way to train and seed, and is not measured again. FOLDER holds the sets of
real pairs, each a folder with train.jsonl(.gz) and test.jsonl(.gz); a section whose set is not there says so. The
numbers of a run lie beside the page's figures, by the day it began: the page says how far those of other days agree
with it. Give another --output to measure everything again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]
os.environ.setdefault("SIMPO_REPORT", "0")

import torch  # noqa: E402
from transformers import get_scheduler  # noqa: E402

import simpo  # noqa: E402
from examples.demo import readable, rule  # noqa: E402
from examples.demo.get_model import get_model  # noqa: E402
from simpo.core.losses import softplus  # noqa: E402
from simpo.data.files import read_file, write_whole  # noqa: E402
from simpo.data.prepare import prepare_rows  # noqa: E402
from simpo.display import Display  # noqa: E402
from simpo.model.load import has_bf16, load_tokenizer, pick_device  # noqa: E402
from simpo.onpolicy.generate import run_generate  # noqa: E402
from simpo.onpolicy.pair import run_pair  # noqa: E402
from simpo.onpolicy.rounds import run_rounds  # noqa: E402
from simpo.onpolicy.score import run_score  # noqa: E402
from simpo.recipe.checks import warmup_steps  # noqa: E402
from simpo.run.optim import learning_rate_at  # noqa: E402

Row = dict[str, Any]
Interval = tuple[float, float, float]
Claim = Callable[[dict[str, Row]], float]


@dataclass(frozen=True)
class Size:
    """How much of everything: seeds, training pairs, held-out pairs, answers and their longest, in tokens; sections."""

    seeds: int
    train: int
    test: int
    answers: int
    tokens: int
    sections: tuple[str, ...] = ()

    @property
    def amounts(self) -> dict[str, int]:
        """Without the sections."""
        return {name: value for name, value in asdict(self).items() if name != "sections"}

    @property
    def prompts(self) -> int:
        """That are answered to train on, several times each."""
        return 3 * self.train // 2


SIZES = {
    "full": Size(3, 32, 24, 12, 64),
    "tiny": Size(2, 12, 4, 2, 4),
}
# A part of full, which goes on from it.
SIZES["quick"] = replace(SIZES["full"], sections=("methods-rule", "length-rule", "gamma"))
DRAWING, DRAWN = 2, ("drawing", "first_seed")
"""How pairs are drawn: 2 = none with a prompt that is held out."""
SHOWN = ("learning_rate", "lr_scheduler_type", "warmup_ratio", "max_length", "max_prompt_length")
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Number of seeds -> 97.5% of Student's t with one degree of freedom less."""

SETS = {
    "rule": "the demo's on-policy pairs",
    "en_hh_helpful": "human chat, noisy labels",
    "zh_oasst1": "Chinese, ranked by people",
    "code_humanevalpack": "functions and the same with one bug",
    "lists": "the untrained model's own answers, four a prompt, scored by the demo's rule",
}
LONGEST = {"rule": 1000, "en_hh_helpful": 700, "zh_oasst1": 300, "code_humanevalpack": 900, "lists": 3000}
"""Characters of a prompt and both answers; what is longer is not drawn."""

RECIPE: dict[str, Any] = {
    **{"max_length": 512, "max_prompt_length": 256, "learning_rate": 1e-4, "per_device_train_batch_size": 2},
    **{"warmup_ratio": 0.1, "lr_scheduler_type": "cosine"},
    **{"save_strategy": "no", "eval_strategy": "no", "validation_fraction": 0.0, "save_dtype": "float32"},
    **{"logging_steps": 1, "guard": "off", "bf16": has_bf16(pick_device("auto"))},
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: in tables.
        pairs: the set it learns from, and is measured on.
        keys: recipe keys that differ from RECIPE.
        noise: share of training pairs whose labels are swapped.
        asked: the set whose held-out pairs and prompts it is measured on instead; "" = its own.
        trains: False = the model as it was given.
        rounds: of `simpo rounds`, which make its pairs by the rule; 0 = it learns from pairs that are there.
    """

    name: str
    pairs: str = "rule"
    keys: Row = field(default_factory=dict)
    noise: float = 0.0
    asked: str = ""
    trains: bool = True
    rounds: int = 0

    @property
    def sets(self) -> set[str]:
        return {self.pairs, self.asked or self.pairs}


class Lab:
    """Trains and measures arms, each once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.size = args, SIZES[args.size]
        self.measured: dict[str, dict[str, list[Row]]] = {}  # section -> arm -> a row for each seed
        self.folders = {"rule": REPO / "examples/demo/pairs"}
        if args.data:
            self.folders |= {name: args.data / name for name in SETS if (args.data / name).is_dir()}

    @property
    def seeds(self) -> range:
        return range(self.args.first_seed, self.args.first_seed + self.size.seeds)

    def lacks(self, arms: Sequence[Arm]) -> set[str]:
        return {name for arm in arms for name in arm.sets} - self.folders.keys() - {"lists"}

    def results(self, arm: Arm) -> list[Row]:
        """What was measured, a row for each seed, with the accuracy of the arm's own reward and its gain."""
        before = self._result(Arm("", arm.asked or arm.pairs, trains=False), 0)
        rows = [dict(self._result(arm, seed)) for seed in self.seeds]
        for row in rows if not recipe_of(arm).loss.extras else ():  # ConfPO's reward is not of all tokens
            row["own accuracy"] = own_accuracy(arm, row, before)
            row["gain"] = row["own accuracy"] - own_accuracy(arm, before, before)
        return rows

    def measure(self, sections: Sequence[Section]) -> None:
        """Train and measure what the sections lack, --at-once of it in processes that share the cores.

        Of two runs of one thread each, two cores make more than of one run of two threads.
        """
        arms = [arm for section in sections if not self.lacks(section.arms) for arm in section.arms]
        wanted: dict[Path, tuple[Arm, int]] = {}
        for arm in arms:
            for seed in self.seeds:
                wanted.setdefault(self._path(arm, seed), (arm, seed))
        missing = [each for path, each in wanted.items() if not self._is_measured(path)]
        missing.sort(key=lambda each: -each[0].rounds)  # in processes of their own: before others fill the memory
        if any("lists" in arm.sets for arm, _ in missing):
            self.draw("lists", "train", 0, seed=0)  # made once, not by each process
        threads = max(1, torch.get_num_threads() // self.args.at_once)
        pool = ProcessPoolExecutor(self.args.at_once, get_context("spawn"), torch.set_num_threads, (threads,))
        with pool:
            list(pool.map(self._result, *([each[i] for each in missing] for i in (0, 1))))

    def _path(self, arm: Arm, seed: int) -> Path:
        """Of what is measured, the same for every way to say the same."""
        if not arm.trains:
            seed = 0  # the same whatever the seed: the held-out pairs are
        way = {**way_of(asdict(arm)), "keys": recipe_of(arm, str(self.args.model)).to_dict()}
        amount = {**asdict(self.size), "seeds": 0, "sections": ()}
        words = json.dumps([way, amount, seed], sort_keys=True)
        return self.args.output / f"{hashlib.sha256(words.encode()).hexdigest()[:12]}-{seed}.json"

    @staticmethod
    def _is_measured(path: Path) -> bool:
        """Whether there are all measures; what earlier versions wrote had no sums."""
        return path.exists() and "pairs' sums" in path.read_text(encoding="utf-8")

    def _result(self, arm: Arm, seed: int) -> Row:
        path = self._path(arm, seed)
        if not self._is_measured(path):
            began = time.perf_counter()
            found = {"threads": torch.get_num_threads(), **self._measure(arm, *self._train(arm, seed))}
            shutil.rmtree(self.place, ignore_errors=True)
            write_whole(path, json.dumps({"arm": asdict(arm), "seed": seed, **found}, indent=1) + "\n")
            took = f"{time.perf_counter() - began:.0f} s"
            print(f"{time.strftime('%H:%M:%S')} {arm.pairs} {arm.name}, seed {seed}: {took}", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))

    @property
    def place(self) -> Path:
        """Where this process trains."""
        return self.args.output / "run" / str(os.getpid())

    def _train(self, arm: Arm, seed: int) -> tuple[Path, Row]:
        """The model's folder; its pairs, and the seconds of its steps, a reference model's pass or rounds included."""
        if not arm.trains:
            return Path(self.args.model), {"pairs": 0, "seconds": 0.0}
        place = self.place
        shutil.rmtree(place, ignore_errors=True)
        began = time.perf_counter()
        if arm.rounds:
            each = {"rounds.rounds": arm.rounds, "rounds.prompts_per_round": self.size.prompts // arm.rounds}
            if self.args.at_once > 1:  # as many threads as this process has
                each |= {"num_threads": torch.get_num_threads(), "generate.processes": 1}
            run_rounds(self.on_policy(place, {**each, "rounds.eval_prompts": 1, "seed": seed, **arm.keys}))
            made = [row for each in place.glob("round-[1-9]") for row in read_file(each / "pairs" / "train.jsonl")]
            found = {"pairs": len(made), "seconds": time.perf_counter() - began}
            return place / f"round-{arm.rounds}" / "run" / "model", found
        rows = self.draw(arm.pairs, "train", self.size.train, seed)
        swapped = set(random.Random(f"{seed} noise").sample(range(len(rows)), round(arm.noise * len(rows))))
        rows = [
            {**r, "chosen": r["rejected"], "rejected": r["chosen"]} if i in swapped else r for i, r in enumerate(rows)
        ]
        write_rows(place / "pairs" / "train.jsonl", rows)
        keys = {"dataset_mixer": {str(place / "pairs"): 1.0}, "dataset_splits": ["train"], "seed": seed}
        keys |= {
            "model_name_or_path": str(self.args.model),
            "output_dir": str(place),
            "cache_dir": str(place / "cache"),
        }
        simpo.Trainer(simpo.load_recipe({**RECIPE, **keys, **arm.keys}), display=Display(quiet=True)).run()
        return place / "model", {"pairs": len(rows), "seconds": time.perf_counter() - began}

    def _measure(self, arm: Arm, model: Path, about: Row) -> Row:
        rows = self.draw(arm.asked or arm.pairs, "test", self.size.test, seed=0)
        held_out = write_rows(self.args.output / "held-out" / f"{arm.asked or arm.pairs}.jsonl", rows)
        keys = ("max_length", "max_prompt_length", "bf16")
        options: Row = {"recipe": {key: RECIPE[key] for key in keys}, "progress": False, "batch_pairs": 8}
        count = min(self.size.answers, len({str(row["prompt"]) for row in rows}))
        found = simpo.evaluate(model, held_out, num_generations=count, max_new_tokens=self.size.tokens, **options)
        other = simpo.evaluate(model, write_rows(self.args.output / "unrelated.jsonl", unrelated_text()), **options)
        if found.num_pairs < len(rows):
            raise ValueError(f"{len(rows) - found.num_pairs} held-out pairs of {held_out} were left out: {found.notes}")
        answers = [(row["prompt"], answer) for row, answer in zip(rows, found.generations)]
        mean = statistics.fmean
        return {
            "accuracy": found.accuracy.value,
            "margin": found.margin.value,
            "chosen": found.chosen_mean,
            "rejected": found.rejected_mean,
            "length correlation": found.length_correlation,
            "rule": mean(rule.rate(prompt, answer.response, {}) for prompt, answer in answers),
            "readable": mean(readable.rate(prompt, answer.response, {}) for prompt, answer in answers),
            "tokens": mean(answer.num_tokens for _, answer in answers),
            "repeated": mean(answer.repeated_share for _, answer in answers),
            "unrelated": other.chosen_mean,
            "pairs' sums": [[pair.chosen_sum, pair.rejected_sum] for pair in found.pairs],
            "pairs' lengths": [[pair.chosen_length, pair.rejected_length] for pair in found.pairs],
            **about,
        }

    def on_policy(self, folder: Path, keys: Row) -> simpo.Recipe:
        """The demo's recipe for the model's own answers, four a prompt, with this model, size and its prompts.

        Those of the held-out pairs are left out. The longest answer is the demo's, 160 tokens.
        """
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        own: Row = {"generate.num_samples": 4, "generate.max_new_tokens": 5 * self.size.tokens // 2}
        asked = {row["id"] for row in read_file(self.folders["rule"] / "test.jsonl")}
        prompts = [row for row in read_file(REPO / "examples/demo/prompts.jsonl") if row["id"] not in asked]
        chosen = write_rows(folder / "prompts.jsonl", prompts)
        own |= {"generate.prompts": {str(chosen): 1.0}, "output_dir": str(folder)}
        own |= {"model_name_or_path": str(self.args.model), "cache_dir": str(folder / "cache")}
        return simpo.load_recipe(REPO / "recipes/demo.yaml", {**RECIPE, **own, **keys})

    def make_lists(self) -> Path:
        """The folder of the set `lists`, made once."""
        folder = self.args.output / f"lists-{self.size.prompts}-{self.size.tokens}"
        if not (folder / "lists" / "train.jsonl").exists():
            recipe = self.on_policy(folder, {"pair.lists": True, "pair.test_fraction": 0.0, "pair.min_score": None})
            prompts = list(read_file(folder / "prompts.jsonl"))
            write_rows(folder / "prompts.jsonl", random.Random(0).sample(prompts, self.size.prompts))
            for stage in (run_generate, run_score, run_pair):
                stage(recipe)
        return folder / "lists"

    def draw(self, name: str, split: str, count: int, seed: int) -> list[Row]:
        """A seeded choice of a set's pairs; those of a prompt that came before stand at the end.

        None to train on has a prompt that is held out.
        """
        if name == "lists" and name not in self.folders:
            self.folders[name] = self.make_lists()
        files = {path.name.split(".")[0]: path for path in self.folders[name].iterdir() if ".jsonl" in path.name}
        rows = [row for row in read_file(files[split]) if num_characters(row) <= LONGEST[name]]
        if split == "train" and "test" in files:
            held_out = {str(row["prompt"]) for row in read_file(files["test"])}
            rows = [row for row in rows if str(row["prompt"]) not in held_out]
        random.Random(f"{seed} {split}").shuffle(rows)
        seen: dict[str, int] = {}
        for row in rows:
            row["turn"] = seen[str(row["prompt"])] = seen.get(str(row["prompt"]), 0) + 1
        return sorted(rows, key=lambda row: row["turn"])[:count]


def recipe_of(arm: Arm, model: str = "model") -> simpo.Recipe:
    return simpo.load_recipe({**RECIPE, "model_name_or_path": model, **arm.keys})


def own_accuracy(arm: Arm, row: Row, before: Row) -> float:
    """Share of held-out pairs that the reward which the arm's loss trains ranks right, ties half.

    That is the mean log-prob of a token for most, summed log-probs for CPO and DPO; for DPO less the reference's.
    """
    loss, gaps = recipe_of(arm).loss, []
    for sums, lengths, reference in zip(row["pairs' sums"], row["pairs' lengths"], before["pairs' sums"]):
        if loss.needs_reference:
            sums = [sum_ - other for sum_, other in zip(sums, reference)]
        if loss.name not in ("cpo", "dpo", "r_dpo"):
            sums = [sum_ / length for sum_, length in zip(sums, lengths)]
        gaps.append(sums[0] - sums[1])
    return statistics.fmean((gap > 0) + (gap == 0) / 2 for gap in gaps)


def num_characters(row: Row) -> int:
    turns = [turn["content"] for side in ("prompt", "chosen", "rejected") for turn in row.get(side, [])]
    return sum(map(len, [*turns, *row.get("responses", [])]))


def unrelated_text() -> list[Row]:
    """The paragraphs of the licence, each as an answer, to be measured only; the rejected side is of no account."""
    parts = [" ".join(part.split()) for part in (REPO / "LICENSE").read_text(encoding="utf-8").split("\n\n")]
    parts = [part for part in parts if len(part) > 200][:16]
    return [{"prompt": "Quote a paragraph.", "chosen": part, "rejected": "No."} for part in parts]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


# --- the claims ------------------------------------------------------------------------------------------------------

NONE = Arm("untrained", trains=False)
SIMPO = Arm("SimPO")
DPO = Arm("DPO", keys={"loss_type": "dpo", "beta": 0.1})
ORPO = Arm("ORPO", keys={"loss_type": "orpo"})
CPO = Arm("CPO", keys={"loss_type": "cpo", "beta": 0.1})
SUMS = Arm("SimPO without length normalisation", keys={"loss_type": "cpo", "beta": 0.1, "sft_weight": 0.0})


def on(name: str, *arms: Arm) -> list[Arm]:
    """The arms on another set; the on-policy pairs' own where it is that."""
    return [Arm(arm.name, name, arm.keys, arm.noise, trains=arm.trains) for arm in arms]


def varied(label: str, key: str, values: Sequence[Any], pairs: str = "rule", **keys: Any) -> list[Arm]:
    return [Arm(f"{label} {value:g}", pairs, {**keys, key: value}) for value in values]


@dataclass(frozen=True)
class Section:
    """A claim: its arms, what is shown of them, and what would have to hold.

    Attributes:
        claim: as its source says it.
        holds: what is claimed, each with (a seed's rows, by arm) -> a difference that is above 0 where it holds; empty:
            it is only shown.
        chart: measures that are drawn over the arms, in their order.
        axis: the key that the arms differ in; of two, with a comma, a map is drawn.
    """

    name: str
    title: str
    claim: str
    arms: Sequence[Arm]
    shown: Sequence[str] = ("accuracy", "margin", "chosen", "rule", "readable", "tokens", "repeated", "unrelated")
    holds: dict[str, Claim] = field(default_factory=dict)
    chart: Sequence[str] = ()
    axis: str = ""


def less(one: Arm | str, measure: str, other: Arm | str) -> Claim:
    """That an arm has less of a measure than another."""
    names = [arm if isinstance(arm, str) else arm.name for arm in (one, other)]
    return lambda by: by[names[1]][measure] - by[names[0]][measure]


def gained(arm: Arm) -> Claim:
    return lambda by: by[arm.name]["gain"]


METHODS = (NONE, SIMPO, DPO, ORPO, CPO)
GAMMAS = [Arm(f"gamma {g:g}", keys={"gamma_beta_ratio": g / 2}) for g in (0.0, 0.4, 1.0, 1.6)]
RATES, BETAS = (1e-5, 1e-4, 4e-4), (2.0, 5.0, 10.0)
MAP = [Arm(f"beta {b:g}, rate {r:g}", keys={"beta": b, "learning_rate": r}) for b in BETAS for r in RATES]


def gains(one: float, other: float, measure: str, least: float = 0.0) -> Claim:
    """That a measure is larger by more than so much at the other rate, with each beta."""
    at = "beta {:g}, rate {:g}".format
    return lambda by: min(by[at(b, other)][measure] - by[at(b, one)][measure] - least for b in BETAS)


NOISE = [
    Arm(f"{n:.0%} swapped" + (f", smoothing {s:g}" if s else ""), keys={"label_smoothing": s} if s else {}, noise=n)
    for s in (0.0, 0.2)
    for n in (0.0, 0.2, 0.4)
]
REMEDIES: dict[str, Row] = {
    "SFT weight 1": {"sft_weight": 1.0},
    "AlphaPO": {"loss_type": "alphapo"},
    "a tenth of the rate": {"learning_rate": RECIPE["learning_rate"] / 10},
    "RC": {"reward_calibration": True},
}
OF_LISTS: dict[str, Row] = {
    "SimPO, best and worst": {},
    "Plackett-Luce": {"loss_type": "plackett_luce"},
    "InfoNCA": {"loss_type": "infonca", "infonca_tau": 0.1},
    "SWEPO": {"loss_type": "swepo", "swepo_alpha": 5.0},
}
SECTIONS = [
    *(
        Section(
            f"methods-{name}",
            f"Methods on {SETS[name]}",
            "At equal pairs, steps and learning rate, training raises the share of held-out pairs that a method's own "
            "reward ranks right. Which method is best is not claimed at this size."
            + " The rules of the demo count words between spaces, so they mark no Chinese."
            * (name == "zh_oasst1"),
            on(name, *METHODS),
            (
                *("own accuracy", "gain", "accuracy", "margin", "chosen", "rejected"),
                *(() if name == "zh_oasst1" else ("rule", "readable")),
                *("tokens", "repeated", "unrelated", "seconds"),
            ),
            {f"{arm.name} ranks more pairs right than before": gained(arm) for arm in METHODS[1:]},
        )
        for name in ("rule", "en_hh_helpful", "zh_oasst1")
    ),
    *(
        Section(
            f"length-{name}",
            f"Length and log-prob on {SETS[name]}",
            "Spearman's correlation of a response's length with its mean log-prob: SimPO 0.34, DPO 0.59, SimPO without "
            "length normalisation 0.82 (arXiv:2405.14734, figures 2 and 4). The last is CPO's preference term here: "
            "summed log-probs, with them another beta and no target margin.",
            on(name, NONE, SIMPO, DPO, SUMS),
            ("length correlation", "accuracy", "tokens"),
            {
                "SimPO is below DPO": less(SIMPO, "length correlation", DPO),
                "DPO is below SimPO without length normalisation": less(DPO, "length correlation", SUMS),
                "SimPO is below itself without length normalisation": less(SIMPO, "length correlation", SUMS),
            },
            ("length correlation",),
        )
        for name in ("rule", "en_hh_helpful")
    ),
    Section(
        "gamma",
        "The target margin",
        "A larger gamma raises held-out accuracy; past a point answers get worse (arXiv:2405.14734, figure 3).",
        GAMMAS,
        holds={
            "1.6 is more accurate than 0": less("gamma 0", "accuracy", "gamma 1.6"),
            "answers are worse, by the rule, at 1.6 than at 1": less("gamma 1.6", "rule", "gamma 1"),
        },
        chart=("accuracy", "rule", "chosen"),
        axis="gamma",
    ),
    Section(
        "map",
        "Where beta and the learning rate work",
        "The learning rate is the critical setting.",
        MAP,
        ("accuracy", "rule", "chosen", "repeated"),
        {
            "the rate moves the rule's marks more than beta does": lambda by: (
                spread(by, "rule", "rate") - spread(by, "rule", "beta")
            ),
            "the marks are better at 0.0001 than at 1e-05, whatever beta": gains(RATES[0], RATES[1], "rule"),
            "the chosen log-prob at 0.0004 is more than half a nat lower, whatever beta": gains(
                RATES[2], RATES[1], "chosen", 0.5
            ),
        },
        ("accuracy", "rule", "chosen"),
        "beta, rate",
    ),
    Section(
        "sft",
        "The SFT term",
        "It holds the chosen answers' log-prob up and forgets less of other text; it costs margin and accuracy.",
        [SIMPO, *varied("SFT weight", "sft_weight", (0.1, 1.0))],
        holds={
            "the chosen log-prob is higher at 1 than at 0": less(SIMPO, "chosen", "SFT weight 1"),
            "the margin is smaller": less("SFT weight 1", "margin", SIMPO),
            "accuracy is lower": less("SFT weight 1", "accuracy", SIMPO),
            "unrelated text is forgotten less": less(SIMPO, "unrelated", "SFT weight 1"),
        },
        chart=("chosen", "accuracy", "rule"),
        axis="sft_weight",
    ),
    Section(
        "displacement",
        "Near-identical pairs",
        "Where the answers of a pair differ in a token or two, the chosen log-prob falls while the margin grows "
        "(arXiv:2410.08847); a remedy keeps it up.",
        [
            *on("code_humanevalpack", NONE, SIMPO, DPO),
            *(Arm(name, "code_humanevalpack", keys) for name, keys in REMEDIES.items()),
        ],
        ("accuracy", "margin", "chosen", "rejected", "unrelated"),
        {
            "SimPO lowers the chosen log-prob": less(SIMPO, "chosen", NONE),
            "while its margin grows": less(NONE, "margin", SIMPO),
            **{f"{each} keeps it above SimPO's": less(SIMPO, "chosen", each) for each in REMEDIES},
        },
        ("chosen", "margin"),
    ),
    Section(
        "later",
        "Methods that came after",
        "Nothing is claimed of their rank; each row shows what its change does to the same pairs.",
        [
            NONE,
            SIMPO,
            Arm("WPO", keys={"wpo_weights": True}),
            Arm("ConfPO", keys={"loss_type": "confpo"}),
            Arm("score margins", keys={"score_margin": 2.0}),
            Arm("RC", keys={"reward_calibration": True}),
            Arm("R-DPO", keys={"loss_type": "r_dpo"}),
            Arm("DPO, mean log-probs", keys={"loss_type": "dpo_norm"}),
        ],
    ),
    Section(
        "policy",
        "Whose answers the pairs are made of",
        "Pairs of the model's own answers to such prompts, ranked by the rule, teach the rule more than as many of "
        "human chat. Who answered is one of three differences, the prompts and the ranking being others; "
        "`benchmarks/results/on_policy.md` has them apart, on the same prompts and by the same rule.",
        [NONE, SIMPO, Arm("SimPO on human chat", "en_hh_helpful", asked="rule")],
        ("rule", "readable", "tokens", "repeated"),
        {"by the rule, the model's own teach more": less("SimPO on human chat", "rule", SIMPO)},
    ),
    Section(
        "rounds",
        "One round and two",
        "With as many prompts, the second half answered by the model that the first half taught: more is learnt "
        "(arXiv:2405.14734 makes its pairs once; this is what `simpo rounds` is for).",
        [NONE, *(Arm(f"{n} round{'s' * (n > 1)}", rounds=n) for n in (1, 2))],
        ("pairs", "rule", "readable", "tokens", "repeated", "chosen", "seconds"),
        {"by the rule, two teach more than one": less("1 round", "rule", "2 rounds")},
        ("rule", "chosen"),
    ),
    Section(
        "lists",
        "Lists",
        "Nothing is claimed of their rank: four answers to a prompt, as the best against the worst, or as a list. The "
        "answers were sampled once: seeds are other orders of the same lists, and intervals are of no more than that.",
        [NONE, *(Arm(name, "lists", keys, asked="rule") for name, keys in OF_LISTS.items())],
    ),
    Section(
        "noise",
        "Swapped labels",
        "Accuracy falls with the share of swapped labels; smoothing by that share makes up for some of it.",
        NOISE,
        ("accuracy", "margin", "rule"),
        {
            "40% are less accurate than none": less("40% swapped", "accuracy", "0% swapped"),
            "smoothing makes up for some of 20%": less("20% swapped", "accuracy", "20% swapped, smoothing 0.2"),
        },
        ("accuracy", "rule"),
        "share of swapped labels",
    ),
]


def spread(by: dict[str, Row], measure: str, word: str) -> float:
    """Mean over the settings of the other key of the range that one key's values make."""
    groups: dict[str, list[float]] = {}
    for name, row in by.items():
        other = next(part for part in name.split(", ") if not part.startswith(word))
        groups.setdefault(other, []).append(row[measure])
    return statistics.fmean(max(each) - min(each) for each in groups.values())


# --- the page --------------------------------------------------------------------------------------------------------

SHARES = ("accuracy", "own accuracy", "gain", "repeated")


PAPER = [
    "## The pairs",
    "",
    "`--data FOLDER` holds a folder for each set that is not in the repository, with `train.jsonl.gz` and "
    "`test.jsonl.gz`, in rows of `id`, `prompt`, `chosen` and `rejected` (messages):",
    "",
    "- `en_hh_helpful`: the test split of Anthropic's HH-RLHF, its three helpful tranches, as DaehanKim/EasyRLHF "
    "(45eccb72) has it; rows whose transcripts do not share their prompt are left out. 5,313 and 590 pairs.",
    "- `zh_oasst1`: 775 Chinese prompts of OASST1 with ranked replies, from hiyouga/LLaMA-Factory's history (blob "
    "ed432cfe), as ordered pairs. 691, less 17 whose prompt is held out, and 76.",
    "- `code_humanevalpack`: bigcode-project/octopack (e17a8f64), six languages, a canonical solution over the one "
    "with a bug. 888 and 96.",
    "",
    "## The paper's own models",
    "",
    "Given its checkpoints and held-out pairs, a script prints accuracy, margin and the correlation of length beside "
    "the paper's numbers. It was not run on them: no hub could be reached where this page was written. On one H100, "
    "within the hour (a forward pass of each 8B model over 2,000 pairs):",
    "",
    "`python benchmarks/evidence.py --pairs princeton-nlp/llama3-ultrafeedback --paper "
    "simpo=princeton-nlp/Llama-3-Instruct-8B-SimPO dpo=princeton-nlp/Llama-3-Instruct-8B-DPO`",
    "",
]


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% interval over seeds by Student's t; nan ends where there is one measurement."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, math.nan, math.nan
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def per_training(rows: Sequence[Row], measure: str) -> list[float]:
    """A value for each training: one where there was none, whatever the seeds."""
    return list({row["seed"]: row[measure] for row in rows}.values())


def cell(measure: str, rows: Sequence[Row]) -> str:
    if measure not in rows[0]:  # of another run
        return ""
    form = "{:z.1%}" if measure in SHARES else "{:.0f}" if measure in ("pairs", "tokens", "seconds") else "{:z.3f}"
    mean, low, _ = interval(per_training(rows, measure))
    return form.format(mean) + ("" if math.isnan(low) else f" ± {form.format(mean - low)}")


def write_section(lab: Lab, section: Section, pictures: Path, other: Row | None = None) -> list[str]:
    """The Markdown of a section, of another run where there is one; its figure lies in `pictures`."""
    lines = [f"## {section.title}", "", f"*Claim:* {section.claim}", ""]
    if lacking := lab.lacks(section.arms):
        return [*lines, f"Not measured: {', '.join(sorted(lacking))} was not given (--data).", ""]
    if other is None:
        found = lab.measured[section.name] = {arm.name: lab.results(arm) for arm in section.arms}
    else:
        found = other["measured"][section.name]
        lines += [f"Measured in the run of {describe_run(other)}, not in this page's.", ""]
    lines += [f"| | {' | '.join(section.shown)} |", "|---" * (len(section.shown) + 1) + "|"]
    for name, rows in found.items():
        cells = (cell(measure, rows) for measure in section.shown)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for words, differences in held({section.name: found}, section).items():
        mean, low, high = interval(differences)
        right = sum(difference > 0 for difference in differences)
        lines.append(f"- {words}: {mean:+.3f} ({low:+.3f} to {high:+.3f}); with {right} of {len(differences)} seeds")
    lines += [""] * lines[-1].startswith("- ")
    if section.chart:
        draw(section, found, pictures / f"{section.name}.svg")
        where = f"{pictures.name}/{section.name}.svg"
        lines += [f"![{section.title}: {', '.join(section.chart)}]({where})", ""]
    lines += [conditions(lab, section, found), ""]
    data = " --data FOLDER" if {name for arm in section.arms for name in arm.sets} - {"lists"} != {"rule"} else ""
    first = lab.args.first_seed if other is None else other.get("first_seed", 0)
    return [*lines, f"`{command(lab, data, first)} --only {section.name}`", ""]


def command(lab: Lab, data: str, first_seed: int) -> str:
    """That measures this page's size; which pairs a seed draws follows from its number."""
    size = "" if lab.args.size == "full" else f" --size {lab.args.size}"
    return f"python benchmarks/evidence.py --model MODEL{data}{size}" + f" --first-seed {first_seed}" * bool(first_seed)


def held(measured: dict[str, dict[str, list[Row]]], section: Section) -> dict[str, list[float]]:
    """The difference of each claim of a section, by seed; nothing of what was not measured."""
    found, of = measured.get(section.name, {}), {}
    for words, difference in section.holds.items():
        with contextlib.suppress(KeyError):  # an arm or a measure that another run had not
            of[words] = [difference(dict(zip(found, rows))) for rows in zip(*found.values())]
    return {words: differences for words, differences in of.items() if differences}


def verdict(differences: Sequence[float]) -> str:
    mean, low, high = interval(differences)
    if low == high and abs(mean) < 0.1:  # a pair or two of 24, the same with each seed
        return "open"
    return "shown" if low > 0 else "refuted" if high < 0 else "open"


def summary(lab: Lab, sections: Sequence[Section]) -> list[str]:
    """All that is claimed, and what held, in one table."""
    lines, verdicts = [], []
    for section in sections:
        if found := held(lab.measured, section):
            by: dict[str, list[str]] = {"shown": [], "refuted": [], "open": []}
            for words, differences in found.items():
                right = sum(difference > 0 for difference in differences)
                by[verdict(differences)].append(f"{words} ({right} of {len(differences)})")
            verdicts += map(verdict, found.values())
            place = re.sub("[^a-z0-9 -]", "", section.title.lower()).replace(" ", "-")
            lines.append(f"| [{section.title}](#{place}) | {' | '.join('; '.join(cell) for cell in by.values())} |")
    return bool(verdicts) * [
        "## What held",
        "",
        f"{verdicts.count('shown')} of {len(verdicts)} statements are shown: the 95% interval of the difference over "
        "the seeds lies above 0. One in 40 would be if no two ways differed. In brackets: the seeds with which the "
        "difference is above 0; where no two ways differed, it would be with all of them one time in "
        f"{2**lab.size.seeds}.",
        "",
        "| section | shown | refuted: below 0 | open: the interval holds 0 |",
        "|---|---|---|---|",
        *lines,
        "",
    ]


def conditions(lab: Lab, section: Section, found: dict[str, list[Row]]) -> str:
    made = "its own answers, as it goes"
    size, trained = lab.size, {made if arm.rounds else SETS[arm.pairs] for arm in section.arms if arm.trains}
    counts = sorted({row["pairs"] for rows in found.values() for row in rows if row["pairs"]})
    threads = sorted({row["threads"] for rows in found.values() for row in rows if row["pairs"]})
    timed = f" Threads of a timed run: {' or '.join(map(str, threads))}." if "seconds" in section.shown else ""
    trained_arms = [arm for arm in section.arms if arm.trains]
    settings = "; ".join(f"{arm.name}: {json.dumps(arm.keys)[1:-1]}" for arm in trained_arms if arm.keys)
    sets = {name for arm in section.arms for name in arm.sets}
    longest = ", ".join(f"{LONGEST[name]:,} ({SETS[name]})" for name in SETS if name in sets)
    asked = {arm.asked or arm.pairs for arm in section.arms}
    held_out = sorted({len(lab.draw(name, "test", size.test, seed=0)) for name in asked})
    pairs, held_out = (f"{each[0]}" + f" to {each[-1]}" * (len(each) > 1) for each in (counts, held_out))
    return (
        f"{pairs} training pairs ({', '.join(sorted(trained))}), "
        f"{RECIPE['per_device_train_batch_size']} a step, one epoch; "
        f"{held_out} held-out pairs, greedy answers of up to {size.tokens} tokens to {size.answers} of their prompts; "
        f"{size.seeds} seeds, means with 95% intervals over them (Student's t).{timed} Characters of a pair at most: "
        f"{longest}. All arms: {json.dumps({k: RECIPE[k] for k in SHOWN})[1:-1]}, else the recipe's defaults"
        f"{'; ' * bool(settings)}{settings}.".replace('"', "")
    )


def draw(section: Section, found: dict[str, list[Row]], path: Path) -> None:
    """A panel for each measure: the arms in their order, each seed a dot, the mean with its interval."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = section.name  # the same figure has the same bytes
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(section.chart), figsize=(4.6 * len(section.chart), 3.4), squeeze=False)
    for panel, measure in zip(panels[0], section.chart):
        panel.set_title(measure)
        if ", " in section.axis:
            draw_map(panel, {name: statistics.fmean(row[measure] for row in rows) for name, rows in found.items()})
            continue
        for place, rows in enumerate(found.values()):
            values = per_training(rows, measure)
            mean, low, high = interval(values)
            panel.plot([place] * len(values), values, "o", color="0.6", markersize=4)
            bars = None if math.isnan(low) else [[mean - low], [high - mean]]
            panel.errorbar([place], [mean], yerr=bars, fmt="D", color="tab:blue", capsize=4)
        names = [name.removeprefix(f"{section.axis} ") for name in found]
        names = [textwrap.fill(name, 60 // len(names), break_long_words=False) for name in names]
        panel.set_xticks(range(len(names)), names, fontsize=10 if len(names) < 5 else 8 if len(names) < 7 else 7)
        panel.set_xlim(-0.5, len(names) - 0.5)
        panel.grid(axis="y", alpha=0.3)
        panel.set_xlabel(section.axis)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_map(panel: Any, means: dict[str, float]) -> None:
    """The means of arms named "down 1, across 2" as a map, its numbers in it."""
    downs, acrosses = (list(dict.fromkeys(words)) for words in zip(*(name.split(", ") for name in means)))
    panel.imshow([[means[f"{down}, {across}"] for across in acrosses] for down in downs], cmap="Blues", alpha=0.6)
    for name, mean in means.items():
        down, across = name.split(", ")
        panel.text(acrosses.index(across), downs.index(down), f"{mean:.3f}", ha="center", va="center")
    panel.set_xticks(range(len(acrosses)), acrosses)
    panel.set_yticks(range(len(downs)), downs)


def write_page(lab: Lab, sections: Sequence[Section], page: Path) -> None:
    from peers.machine import describe_machine, git_commit

    began, machine, beside = time.perf_counter(), describe_machine(), page.with_suffix("")
    about = {
        "drawing": DRAWING,
        "first_seed": lab.seeds.start,
        "seeds": [*lab.seeds],
        "model": Path(lab.args.model).name,
        "commit": git_commit(),
    }
    first = min((path.stat().st_mtime for path in lab.args.output.glob("*.json")), default=time.time())
    where = {"date": time.strftime("%Y-%m-%d", time.localtime(first)), "cpu": machine["cpu"], "bf16": RECIPE["bf16"]}
    run = {**where, **about, "size": lab.size.amounts, "measured": lab.measured}
    own = beside / f"{lab.args.size}-{where['date']}-seed{lab.args.first_seed}.json"
    others = other_runs(run, beside, own)
    asked = [each for each in SECTIONS if each.name in (lab.size.sections or [each.name])]
    asked += [each for each in sections if each not in asked]
    measured_by = {each.name: run for each in sections} | {
        each.name: other for each in asked if each not in sections for other in others if each.name in other["measured"]
    }
    left = [f"{each.title.lower()} ({each.name})" for each in asked if each.name not in measured_by]
    parts = []
    for section in (each for each in asked if each.name in measured_by):
        by = measured_by[section.name]
        parts += write_section(lab, section, beside, None if by is run else by)
    text = json.dumps(run, indent=1)
    write_whole(own, re.sub(r"\[\s+(-?[\d.e-]+),\s+(-?[\d.e-]+)\s+\]", r"[\1, \2]", text) + "\n")
    head = [
        "# Evidence",
        "",
        f"Written by `{command(lab, ' --data FOLDER' * bool(lab.args.data), lab.args.first_seed)}`"
        f"{' (`make evidence` begins with seed 0)' * bool(lab.args.first_seed)}, "
        f"size {lab.args.size}{', in part' * bool(left)}: {Path(lab.args.model).name} in "
        f"{'bfloat16' if RECIPE['bf16'] else 'float32'} on {machine['cpu']}, {machine['cores_allowed']} cores, "
        f"torch {torch.__version__}, seeds {lab.seeds.start} to {lab.seeds.stop - 1}. Numbers and figures are as they "
        "came out, also where they contradict a claim.",
        "",
        *([f"Not measured yet: {'; '.join(left)}.", ""] if left else []),
        "A model of 135 million parameters shows mechanics: what a loss does to log-probs, lengths and answers. It "
        "ranks no methods for models of 8 billion: the largest independent study (arXiv:2603.19335, 240 runs) finds "
        "SimPO worst of twenty at 1.5 billion and best at 7, and the loss worth one point where scale is worth fifty.",
        "",
        "`accuracy` is the share of held-out pairs whose chosen answer has the higher mean log-prob of a token, which "
        "is SimPO's reward, whatever was trained; `margin` is the mean of that difference. `own accuracy` is the same "
        "by the reward that the method trains (summed log-probs for CPO; those less the untrained model's for DPO), "
        "and `gain` how much that is above the untrained model's (50% for DPO).",
        "",
        "`rule` is the demo's scoring rule on greedy answers to held-out prompts (the on-policy pairs were made by "
        f"it), `readable` a second one that made no pair. Answers are cut at {lab.size.tokens} tokens, which costs "
        "marks for their end. `unrelated` is the mean log-prob, in nats a token, of the "
        "licence's paragraphs: a fall is forgetting. `chosen` and `rejected` are nats a token, `repeated` is the share "
        "of 4-token sequences that came before in an answer, `seconds` the training with a reference model's pass. In "
        "figures a dot is a seed, a diamond their mean, with its 95% interval.",
        "",
        "Intervals are over seeds, each of which draws its pairs (all there are of lists, in another order); all are "
        "measured on the same held-out ones. "
        f"Other {lab.size.test} of these would move a table's accuracies, by up to {98 / math.sqrt(lab.size.test):.0f} "
        "points (95%), much of it together.",
        "",
        *summary(lab, sections),
    ]
    tail = [*agreement(run, sections, others), *published(), *formats(lab.args.model), *PAPER]
    write_whole(page, "\n".join([*head, *parts, *tail]).rstrip() + "\n")
    print(f"{page}: {(time.perf_counter() - began) / 60:.0f} minutes")


def other_runs(run: Row, folder: Path, own: Path) -> list[Row]:
    """Of as many pairs and this model, whose numbers lie in the folder."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json")) if path != own]
    alike = [other for other in found if all(other.get(each, run[each]) == run[each] for each in ("size", "model"))]
    begun = ("date", "cpu", "first_seed")  # where all are the same, it is this one, in part
    return [other for other in alike if any(other.get(each, 0) != run[each] for each in begun)]


def describe_run(run: Row) -> str:
    return f"{run['date']}, {run['cpu']}, {'bfloat16' if run['bf16'] else 'float32'}"


def agreement(run: Row, sections: Sequence[Section], others: Sequence[Row]) -> list[str]:
    """How far other runs agree with this one."""
    lines, run = ["## Other runs", ""], json.loads(json.dumps(run))
    here = numbers(run, sections)
    for other in others:
        there, same = numbers(other, sections), [other.get(each, 0) for each in DRAWN] == [run[each] for each in DRAWN]
        apart = [name for key, (name, values) in here.items() if key in there and not meet(values, there[key][1])]
        of = len(here.keys() & there.keys())
        claims = [
            (verdict(mine), verdict(theirs), statistics.fmean(mine) * statistics.fmean(theirs) > 0)
            for section in sections
            if same_ways(*(each["measured"].get(section.name, {}) for each in (run, other)))
            for words, mine in held(run["measured"], section).items()
            if (theirs := held(other["measured"], section).get(words)) is not None
        ]
        shown = [theirs for mine, theirs, _ in claims if mine == "shown"]
        lines += [
            f"{describe_run(other)}, "
            f"{'the same pairs' if same else 'other pairs'}: {of - len(apart)} of {of} intervals meet this page's"
            f"{''.join(f'; not: {each}' for each in apart)}. "
            f"{len(here) - of} were not measured then. "
            f"Of {len(claims)} statements that both measured, {sum(sign for *_, sign in claims)} have a mean "
            f"difference of the same sign; of {len(shown)} shown here, {shown.count('shown')} were shown then, "
            f"{shown.count('refuted')} refuted.",
            "",
        ]
    if len(lines) == 2:
        return [*lines, "No other run of as many pairs lies beside this page.", ""]
    pairs = [
        meet(one, other)
        for section in sections
        for measure in section.shown
        for (one, other) in itertools.combinations(
            [per_training(rows, measure) for rows in rows_of(run, section) if rows[0]["arm"]["trains"]], 2
        )
        if measure != "seconds"
    ]
    return [
        *lines,
        "A run on the same pairs shows that numbers can be repeated, one on other pairs that they stand for more than "
        f"the pairs they were drawn from. With {len(run['seeds'])} seeds intervals are wide: of *different* ways to "
        f"train in a section, {statistics.fmean(pairs or [1]):.0%} meet as well. Where there was one measurement, 1% "
        "around it stands for its interval.",
        "",
    ]


def way_of(arm: Row) -> Row:
    """What an arm does, whatever it is called."""
    return {**arm, "name": "", "asked": arm["asked"] or arm["pairs"]}


def same_ways(here: dict[str, list[Row]], there: dict[str, list[Row]]) -> bool:
    shared = [(here[name][0]["arm"], there[name][0]["arm"]) for name in here.keys() & there.keys()]
    return all(way_of(one) == way_of(other) for one, other in shared)


def rows_of(run: Row, section: Section) -> list[list[Row]]:
    return list(run["measured"].get(section.name, {}).values())


def numbers(run: Row, sections: Sequence[Section]) -> dict[tuple[str, str], tuple[str, list[float]]]:
    """What the sections show of a run: (the way to train, measure) -> its name; a value for each training."""
    found: dict[tuple[str, str], tuple[str, list[float]]] = {}
    for section in sections:
        for rows in rows_of(run, section):
            way = json.dumps(way_of(rows[0]["arm"]), sort_keys=True)
            for measure in section.shown:
                if measure != "seconds" and measure in rows[0]:
                    name = f"{section.name}, {rows[0]['arm']['name']}, {measure}"
                    found.setdefault((way, measure), (name, per_training(rows, measure)))
    return found


def meet(here: Sequence[float], there: Sequence[float]) -> bool:
    """Whether two intervals have a point in common; one measurement stands for 1% around it."""
    bounds = [
        (mean - abs(mean) / 100, mean + abs(mean) / 100) if math.isnan(low) else (low, high)
        for mean, low, high in map(interval, (here, there))
    ]
    return max(low for low, _ in bounds) <= min(high for _, high in bounds)


def published() -> list[str]:
    """What a run with each published setting starts from and how its rate goes, to be held beside a public curve."""
    steps, at = 480, (24, 48, 264, 456)  # 128 pairs a step, of some 61,000
    lines = [
        "## The published settings",
        "",
        "The loss of the first step is the mean of -log sigmoid(beta M - gamma) over pairs, as in the table where all "
        "pairs have the margin M of the model that the run begins with. A spread of margins makes it larger, so the "
        "mean margin that a public curve's first value seems to tell is too low: by the column `read low`, where "
        "margins are normal with mean 0 and deviation 0.4. "
        f"The rates are those of a run of {steps} steps; the last column is the largest difference from transformers' "
        "own schedule, relative. deepseek-math-7b-simpo is a third party's, not the paper's.",
        "",
        "| recipe | beta | gamma | loss at M = -0.2 | 0 | 0.2 | read low "
        f"| {' | '.join(f'rate at {k}' for k in at)} | off by |",
        "|---" * (8 + len(at)) + "|",
    ]
    normal = [statistics.NormalDist(0, 0.4).inv_cdf((k + 0.5) / 1000) for k in range(1000)]
    for path in sorted(set((REPO / "recipes").glob("*-simpo*.yaml")) - set((REPO / "recipes").glob("*-1x*.yaml"))):
        recipe = simpo.load_recipe(path, processes=1)
        losses = [softplus(recipe.gamma - recipe.beta * margin) for margin in (-0.2, 0.0, 0.2)]
        ours = [learning_rate_at(step, steps, recipe) for step in range(steps)]
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=recipe.learning_rate)
        theirs = get_scheduler(recipe.lr_scheduler_type, stand_in, warmup_steps(steps, recipe), steps)
        off = 0.0
        for rate in ours:
            off = max(off, abs(rate - stand_in.param_groups[0]["lr"]) / recipe.learning_rate)
            stand_in.step()
            theirs.step()
        first = statistics.fmean(softplus(recipe.gamma - recipe.beta * margin) for margin in normal)
        low = (math.log(math.expm1(first)) - recipe.gamma) / recipe.beta  # the margin of which all pairs lose as much
        cells = [f"{recipe.beta:g}", f"{recipe.gamma:.3g}", *(f"{loss:.4f}" for loss in losses), f"{low:.3f}"]
        cells += [*(f"{ours[step]:.2e}" for step in at), f"{off:.0e}"]
        lines.append(f"| {path.stem} | {' | '.join(cells)} |")
    return [*lines, ""]


ASK = "Why is the sky blue?"


def dialogue(answer: str) -> list[Row]:
    return [{"role": "user", "content": ASK}, {"role": "assistant", "content": answer}]


FORMATS: dict[str, Callable[[str, str, float, float], Row]] = {
    "HuggingFaceH4/ultrafeedback_binarized": lambda better, worse, high, low: {
        **{"prompt": ASK, "prompt_id": "1", "messages": dialogue(better)},
        **{"chosen": dialogue(better), "rejected": dialogue(worse), "score_chosen": high, "score_rejected": low},
    },
    "princeton-nlp/*-ultrafeedback, *-armorm": lambda better, worse, high, low: {
        **{"prompt": ASK, "prompt_id": "1", "chosen": dialogue(better), "rejected": dialogue(worse)},
        **{"all_generated_responses": [worse, "I do not know.", better], "all_rm_scores": [low, low - 1, high]},
    },
    "argilla/ultrafeedback-binarized-preferences-cleaned": lambda better, worse, high, low: {
        **{"source": "s", "prompt": ASK, "chosen": dialogue(better), "rejected": dialogue(worse)},
        **{"chosen-rating": high, "chosen-model": "m", "rejected-rating": low, "rejected-model": "n"},
    },
    "argilla/distilabel-math-preference-dpo": lambda better, worse, high, low: {
        **{"metadata": "{}", "instruction": ASK, "chosen_response": better, "rejected_response": worse},
        **{"chosen_rating": high, "rejected_rating": low},
    },
    "Anthropic/hh-rlhf": lambda better, worse, high, low: {
        "chosen": f"\n\nHuman: {ASK}\n\nAssistant: {better}",
        "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {worse}",
    },
}
"""Data set -> a row of its format of (chosen, rejected, their scores)."""
GOOD, BAD = "Air scatters blue light most.", "It mirrors the sea."
CASES = {
    "a pair": (GOOD, BAD, 8.0, 5.0),
    "both answers the same": (GOOD, GOOD, 8.0, 5.0),
    "an empty answer": (GOOD, "", 8.0, 5.0),
    "equal scores": (GOOD, BAD, 5.0, 5.0),
    "scores against the order": (GOOD, BAD, 5.0, 8.0),
}


def formats(model: str) -> list[str]:
    """What becomes of stand-ins for rows of the data sets that the authors and their guides name."""
    lines = [
        "## The formats of the authors' data",
        "",
        "Rows of our own, laid out as these data sets are, through what `simpo train` does with rows: a pair is "
        "trained on, or the reason for which the row is dropped and counted. `simpo audit` also counts scores that are "
        "against the order. HH-RLHF has no scores.",
        "",
        f"| | {' | '.join(CASES)} |",
        "|---" * (1 + len(CASES)) + "|",
    ]
    keys = {"dataset_name": "rows", "validation_fraction": 0.0, "max_dropped_fraction": 1.0}
    with tempfile.TemporaryDirectory() as cache:
        recipe = simpo.load_recipe({"model_name_or_path": model, **keys, "cache_dir": cache})
        tokenizer = load_tokenizer(recipe)
        for name, row in FORMATS.items():
            prepared = prepare_rows(recipe, tokenizer, [row(*case) for case in CASES.values()], progress=False)
            dropped = prepared.ledger.splits["train"].dropped
            became = {each["row_id"]: why for why, entry in dropped.items() for each in entry["examples"]}
            cells = (became.get(f"dataset/train#{at}", "trained") for at in range(len(CASES)))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def paper(models: Sequence[str], pairs: str) -> None:
    """The paper's correlations of length, for given checkpoints and held-out pairs, beside its numbers."""
    print("| model | accuracy | margin | Spearman of length and mean log-prob | the paper's |\n|---|---|---|---|---|")
    known = {"simpo": "0.34", "dpo": "0.59", "sums": "0.82"}
    for each in models:
        name, _, model = each.partition("=")
        found = simpo.evaluate(model, pairs, recipe={"max_length": 2048, "max_prompt_length": 1800})
        print(
            f"| {name} | {found.accuracy.value:.1%} | {found.margin.value:.3f} | {found.length_correlation:.2f} "
            f"| {known.get(name, '')} |",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="[default: SmolLM2-135M-Instruct, fetched once]")
    parser.add_argument("--data", type=Path, help="folder of the sets of real pairs")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], metavar="SECTION")
    parser.add_argument("--first-seed", type=int, default=0, help="another gives the same trainings on other pairs")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"), help="what was measured")
    at_once = min(2, torch.get_num_threads()) if pick_device("auto").type == "cpu" else 1
    parser.add_argument("--at-once", type=int, default=at_once, help="runs that share the cores [%(default)s]")
    parser.add_argument("--page", type=Path, help="[default: docs/evidence.md; nothing with --only]")
    parser.add_argument("--paper", nargs="+", metavar="NAME=MODEL", help="simpo, dpo or sums, and its checkpoint")
    parser.add_argument("--pairs", help="held-out pairs for --paper")
    size = os.environ.get("EVIDENCE")
    args = parser.parse_args([*(["--size", size] if size else []), *sys.argv[1:]])
    if bool(args.paper) != bool(args.pairs):
        parser.error("--paper and --pairs belong together: models, and the held-out pairs to measure them on")
    if args.paper:
        paper(args.paper, args.pairs)
        return 0
    args.model = args.model or str(get_model())
    lab = Lab(args)
    wanted = args.only or SIZES[args.size].sections
    sections = [each for each in SECTIONS if not wanted or each.name in wanted]
    lab.measure(sections)
    if args.page is None and args.only:
        for section in sections:
            print("\n".join(write_section(lab, section, args.output / "figures")))
    else:
        write_page(lab, sections, args.page or REPO / "docs" / "evidence.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
