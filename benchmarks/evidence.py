"""The method's claims in small: trains, measures, and writes docs/evidence.md with its figures. Nothing is typed in.

    make evidence                     everything, 5 times as many trainings as quick
    EVIDENCE=quick make evidence      the first sections; 108 minutes on two cores with AVX2, in float32, one at a time
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
import hashlib
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
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
from simpo.display import Display  # noqa: E402
from simpo.model.load import has_bf16, pick_device  # noqa: E402
from simpo.onpolicy.generate import run_generate  # noqa: E402
from simpo.onpolicy.pair import run_pair  # noqa: E402
from simpo.onpolicy.rounds import run_rounds  # noqa: E402
from simpo.onpolicy.score import run_score  # noqa: E402
from simpo.recipe.checks import warmup_steps  # noqa: E402
from simpo.run.optim import learning_rate_at  # noqa: E402

Row = dict[str, Any]
Interval = tuple[float, float, float]


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
SIZES["quick"] = replace(SIZES["full"], sections=("methods-rule", "length-rule", "gamma", "sft"))
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
        """What was measured, a row for each seed."""
        return [self._result(arm, seed) for seed in self.seeds]

    def measure(self, sections: Sequence[Section]) -> None:
        """Train and measure what the sections lack, --at-once of it in processes that share the cores.

        Of two runs of one thread each, two cores make more than of one run of two threads.
        """
        arms = [arm for section in sections if not self.lacks(section.arms) for arm in section.arms]
        wanted: dict[Path, tuple[Arm, int]] = {}
        for arm in arms:
            for seed in self.seeds:
                wanted.setdefault(self._path(arm, seed), (arm, seed))
        missing = [each for path, each in wanted.items() if not path.exists()]
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
        keys = simpo.load_recipe({**RECIPE, "model_name_or_path": str(self.args.model), **arm.keys}).to_dict()
        way = {**asdict(arm), "keys": keys, "name": "", "asked": arm.asked or arm.pairs}
        amount = {**asdict(self.size), "seeds": 0, "sections": ()}
        words = json.dumps([way, amount, seed], sort_keys=True)
        return self.args.output / f"{hashlib.sha256(words.encode()).hexdigest()[:12]}-{seed}.json"

    def _result(self, arm: Arm, seed: int) -> Row:
        path = self._path(arm, seed)
        if not path.exists():
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
        holds: what is claimed, each with (a seed's rows, by arm) -> whether it holds with that seed; empty: it is only
            shown.
        chart: measures that are drawn over the arms, in their order.
        axis: the key that the arms differ in; of two, with a comma, a map is drawn.
    """

    name: str
    title: str
    claim: str
    arms: Sequence[Arm]
    shown: Sequence[str] = ("accuracy", "margin", "chosen", "rule", "readable", "tokens", "repeated", "unrelated")
    holds: dict[str, Callable[[dict[str, Row]], bool]] = field(default_factory=dict)
    chart: Sequence[str] = ()
    axis: str = ""


def less(one: Arm | str, measure: str, other: Arm | str) -> Callable[[dict[str, Row]], bool]:
    """Whether an arm has less of a measure than another."""
    names = [arm if isinstance(arm, str) else arm.name for arm in (one, other)]
    return lambda by: by[names[0]][measure] < by[names[1]][measure]


METHODS = (NONE, SIMPO, DPO, ORPO, CPO)
GAMMAS = [Arm(f"gamma {g:g}", keys={"gamma_beta_ratio": g / 2}) for g in (0.0, 0.4, 1.0, 1.6)]
RATES, BETAS = (1e-5, 1e-4, 4e-4), (2.0, 5.0, 10.0)
MAP = [Arm(f"beta {b:g}, rate {r:g}", keys={"beta": b, "learning_rate": r}) for b in BETAS for r in RATES]


def gains(one: float, other: float, measure: str, least: float = 0.0) -> Callable[[dict[str, Row]], bool]:
    """Whether a measure is larger by more than so much at the other rate, with each beta."""
    at = "beta {:g}, rate {:g}".format
    return lambda by: all(by[at(b, other)][measure] - by[at(b, one)][measure] > least for b in BETAS)


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
            "At equal pairs, steps and learning rate, training raises held-out accuracy. Which method is best is not "
            "claimed at this size.",
            on(name, *METHODS),
            (
                "accuracy",
                "margin",
                "chosen",
                "rejected",
                "rule",
                "readable",
                "tokens",
                "repeated",
                "unrelated",
                "seconds",
            ),
            {f"{arm.name} is more accurate than no training": less(NONE, "accuracy", arm) for arm in METHODS[1:]},
        )
        for name in ("rule", "en_hh_helpful", "zh_oasst1")
    ),
    *(
        Section(
            f"length-{name}",
            f"Length and log-prob on {SETS[name]}",
            "Spearman's correlation of a response's length with its mean log-prob: SimPO 0.34, DPO 0.59, SimPO without "
            "length normalisation 0.82 (arXiv:2405.14734, figure 2).",
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
                spread(by, "rule", "rate") > spread(by, "rule", "beta")
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
        "It holds the chosen answers' log-prob up, and costs margin and accuracy.",
        [SIMPO, *varied("SFT weight", "sft_weight", (0.1, 1.0))],
        holds={
            "the chosen log-prob is higher at 1 than at 0": less(SIMPO, "chosen", "SFT weight 1"),
            "the margin is smaller": less("SFT weight 1", "margin", SIMPO),
            "accuracy is lower": less("SFT weight 1", "accuracy", SIMPO),
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
        ],
    ),
    Section(
        "policy",
        "Whose answers the pairs are made of",
        "Pairs of the model's own answers teach more than as many of other people's (measured on the same prompts).",
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
        "Nothing is claimed of their rank: four answers to a prompt, as the best against the worst, or as a list.",
        [NONE, *(Arm(name, "lists", keys, asked="rule") for name, keys in OF_LISTS.items())],
    ),
    Section(
        "noise",
        "Swapped labels",
        "Accuracy falls with the share of swapped labels; smoothing by about that share makes up for some of it.",
        NOISE,
        ("accuracy", "margin", "rule"),
        {
            "40% are less accurate than none": less("40% swapped", "accuracy", "0% swapped"),
            "smoothing makes up for some of 40%": less("40% swapped", "accuracy", "40% swapped, smoothing 0.2"),
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

SHARES = ("accuracy", "repeated")


PAPER = [
    "## The paper's own models",
    "",
    "Given its checkpoints and held-out pairs, a script prints accuracy, margin and the correlation of length beside "
    "the paper's numbers. It was not run on them: no hub could be reached where this page was written. On one H100, "
    "within the hour (three forward passes of an 8B model over 2,000 pairs):",
    "",
    "`python benchmarks/evidence.py --pairs princeton-nlp/llama3-ultrafeedback --paper "
    "simpo=princeton-nlp/Llama-3-Instruct-8B-SimPO dpo=princeton-nlp/Llama-3-Instruct-8B-DPO`",
    "",
]


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% interval over seeds by Student's t; nan ends where all are one measurement."""
    mean = statistics.fmean(values)
    if len(set(values)) == 1:
        return mean, math.nan, math.nan
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def cell(measure: str, values: Sequence[float]) -> str:
    form = "{:.1%}" if measure in SHARES else "{:.0f}" if measure in ("pairs", "tokens", "seconds") else "{:.3f}"
    mean, low, _ = interval(values)
    return form.format(mean) + ("" if math.isnan(low) else f" ± {form.format(mean - low)}")


def write_section(lab: Lab, section: Section, pictures: Path) -> list[str]:
    """The Markdown of a section; its figure lies in `pictures`."""
    lines = [f"## {section.title}", "", f"*Claim:* {section.claim}", ""]
    if lacking := lab.lacks(section.arms):
        return [*lines, f"Not measured: {', '.join(sorted(lacking))} was not given (--data).", ""]
    found = lab.measured[section.name] = {arm.name: lab.results(arm) for arm in section.arms}
    lines += [f"| | {' | '.join(section.shown)} |", "|---" * (len(section.shown) + 1) + "|"]
    for name, rows in found.items():
        cells = (cell(measure, [row[measure] for row in rows]) for measure in section.shown)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for words, seeds in held(lab, section).items():
        lines.append(f"- {words}: with {seeds} of {lab.size.seeds} seeds")
    lines += [""] * bool(section.holds)
    if section.chart:
        draw(section, found, pictures / f"{section.name}.svg")
        where = f"{pictures.name}/{section.name}.svg"
        lines += [f"![{section.title}: {', '.join(section.chart)}]({where})", ""]
    lines += [conditions(lab, section, found), ""]
    data = " --data FOLDER" if {name for arm in section.arms for name in arm.sets} - {"lists"} != {"rule"} else ""
    size = "" if lab.args.size == "full" else f" --size {lab.args.size}"
    return [*lines, f"`python benchmarks/evidence.py --model MODEL{data}{size} --only {section.name}`", ""]


def held(lab: Lab, section: Section) -> dict[str, int]:
    """With how many seeds each of what a section claims holds; nothing where it was not measured."""
    found = lab.measured.get(section.name)
    if found is None:
        return {}
    seeds = [{name: rows[seed] for name, rows in found.items()} for seed in range(lab.size.seeds)]
    return {words: sum(map(holds, seeds)) for words, holds in section.holds.items()}


def summary(lab: Lab, sections: Sequence[Section]) -> list[str]:
    """All that is claimed, and what held, in one table."""
    of, lines, counts = lab.size.seeds, [], []
    for section in sections:
        if found := held(lab, section):
            counts += found.values()
            every = "; ".join(words for words, n in found.items() if n == of)
            some = "; ".join(f"{words} ({n})" for words, n in found.items() if 0 < n < of)
            none = "; ".join(words for words, n in found.items() if n == 0)
            place = re.sub("[^a-z0-9 -]", "", section.title.lower()).replace(" ", "-")
            lines.append(f"| [{section.title}](#{place}) | {every} | {some} | {none} |")
    return bool(counts) * [
        "## What held",
        "",
        f"{counts.count(of)} of {len(counts)} statements hold with every seed. Where two ways do not differ at all, "
        f"the first is still ahead with {of} of {of} seeds one time in {2**of}.",
        "",
        f"| section | with {of} of {of} seeds | with some | with none |",
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
    asked = {arm.asked or arm.pairs for arm in section.arms}
    held_out = sorted({len(lab.draw(name, "test", size.test, seed=0)) for name in asked})
    pairs, held_out = (f"{each[0]}" + f" to {each[-1]}" * (len(each) > 1) for each in (counts, held_out))
    return (
        f"{pairs} training pairs ({', '.join(sorted(trained))}), "
        f"{RECIPE['per_device_train_batch_size']} a step, one epoch; "
        f"{held_out} held-out pairs, greedy answers of up to {size.tokens} tokens to {size.answers} of their prompts; "
        f"{size.seeds} seeds, means with 95% intervals over them (Student's t).{timed}"
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
            values = [row[measure] for row in rows]
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
    from peers.machine import describe_machine

    began, machine, beside = time.perf_counter(), describe_machine(), page.with_suffix("")
    parts = [line for section in sections for line in write_section(lab, section, beside)]
    first = min((path.stat().st_mtime for path in lab.args.output.glob("*.json")), default=time.time())
    where = {"date": time.strftime("%Y-%m-%d", time.localtime(first)), "cpu": machine["cpu"], "bf16": RECIPE["bf16"]}
    run = {**where, "size": lab.size.amounts, "measured": lab.measured}
    write_whole(beside / f"{lab.args.size}-{where['date']}.json", json.dumps(run, indent=1) + "\n")
    asked = [each for each in SECTIONS if not lab.size.sections or each.name in lab.size.sections]
    left = [f"{each.title.lower()} ({each.name})" for each in asked if each not in sections]
    head = [
        "# Evidence",
        "",
        f"Written by `make evidence`, size {lab.args.size}{', in part' * bool(left)}: {Path(lab.args.model).name} in "
        f"{'bfloat16' if RECIPE['bf16'] else 'float32'} on {machine['cpu']}, {machine['cores_allowed']} cores, "
        f"torch {torch.__version__}. Numbers and figures are as they came out, also "
        "where they contradict a claim.",
        "",
        *([f"Not measured yet: {'; '.join(left)}.", ""] if left else []),
        "A model of 135 million parameters shows mechanics: what a loss does to log-probs, lengths and answers. It "
        "ranks no methods for models of 8 billion: the largest independent study (arXiv:2603.19335, 240 runs) finds "
        "SimPO worst of twenty at 1.5 billion and best at 7, and the loss worth one point where scale is worth fifty.",
        "",
        "`rule` is the demo's scoring rule on greedy answers to held-out prompts (the on-policy pairs were made by "
        "it), `readable` a second one that made no pair. `unrelated` is the mean log-prob, in nats a token, of the "
        "licence's paragraphs: a fall is forgetting. `chosen` and `rejected` are nats a token, `repeated` is the share "
        "of 4-token sequences that came before in an answer, `seconds` the training with a reference model's pass.",
        "",
        "Intervals are over seeds, each of which trains on other pairs; all are measured on the same held-out ones. "
        f"Other {lab.size.test} of these would move a table's accuracies, by up to {98 / math.sqrt(lab.size.test):.0f} "
        "points (95%), much of it together.",
        "",
        *summary(lab, sections),
    ]
    tail = [*agreement(run, sections, beside), *published(), *PAPER]
    write_whole(page, "\n".join([*head, *parts, *tail]).rstrip() + "\n")
    print(f"{page}: {(time.perf_counter() - began) / 60:.0f} minutes")


def agreement(run: Row, sections: Sequence[Section], folder: Path) -> list[str]:
    """How far the runs that began on other days, whose numbers lie in the folder, agree with this one."""
    lines, run = ["## Other days", ""], json.loads(json.dumps(run))
    for path in sorted(folder.glob("*.json")):
        other = json.loads(path.read_text(encoding="utf-8"))
        if other["date"] == run["date"] or other["size"] != run["size"]:
            continue
        met, apart, alone = 0, [], 0
        for section in sections:
            here, there = (each["measured"].get(section.name, {}) for each in (run, other))
            for arm in here:
                for measure in (measure for measure in section.shown if measure != "seconds"):
                    if arm not in there:
                        alone += 1
                    elif meet(*([row[measure] for row in rows[arm]] for rows in (here, there))):
                        met += 1
                    else:
                        apart.append(f"{section.name}, {arm}, {measure}")
        precision = "bfloat16" if other["bf16"] else "float32"
        found = f"{met} of {met + len(apart)} intervals meet this page's" + "".join(f"; not: {each}" for each in apart)
        found += f"; {alone} were not measured then" * bool(alone)
        lines += [f"{other['date']}, {other['cpu']}, {precision}: {found}.", ""]
    return lines if len(lines) > 2 else [*lines, "No other day's run of as many pairs lies beside this page.", ""]


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
        "The loss of the first step is the mean of -log sigmoid(beta M - gamma) over pairs, so a public curve's first "
        "value tells the margin M of the model that it began with. The rates are those of a run of "
        f"{steps} steps; the last column is the largest difference from transformers' own schedule, relative.",
        "",
        f"| recipe | beta | gamma | loss at M = -0.2 | 0 | 0.2 | {' | '.join(f'rate at {k}' for k in at)} | off by |",
        "|---" * (7 + len(at)) + "|",
    ]
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
        cells = [f"{recipe.beta:g}", f"{recipe.gamma:.3g}", *(f"{loss:.4f}" for loss in losses)]
        cells += [*(f"{ours[step]:.2e}" for step in at), f"{off:.0e}"]
        lines.append(f"| {path.stem} | {' | '.join(cells)} |")
    return [*lines, ""]


def paper(models: Sequence[str], pairs: str) -> None:
    """The paper's figure 2 for given checkpoints and held-out pairs, beside its numbers."""
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
    parser.add_argument("--size", choices=SIZES, default=os.environ.get("EVIDENCE") or "full")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], metavar="SECTION")
    parser.add_argument("--first-seed", type=int, default=0, help="another gives the same trainings on other pairs")
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"), help="what was measured")
    at_once = min(2, torch.get_num_threads()) if pick_device("auto").type == "cpu" else 1
    parser.add_argument("--at-once", type=int, default=at_once, help="runs that share the cores [%(default)s]")
    parser.add_argument("--page", type=Path, help="[default: docs/evidence.md; nothing with --only]")
    parser.add_argument("--paper", nargs="+", metavar="NAME=MODEL", help="simpo, dpo or sums, and its checkpoint")
    parser.add_argument("--pairs", help="held-out pairs for --paper")
    args = parser.parse_args()
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
