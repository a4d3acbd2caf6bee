"""A recipe chosen by what the pairs, the model and this machine are: `simpo init`, and `simpo train DATA`.

Every choice has its reason, which stands beside it in the recipe. Where a key is given it is taken as it is, and the
others are chosen around it. Where a number is published it is taken from there (see docs/recipes.md).
"""

from __future__ import annotations

import functools
import math
import os
import shlex
import tempfile
import textwrap
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simpo.data.language import MIN_CONFIDENCE, identify_language
from simpo.data.loader import PairStore
from simpo.data.prepare import prepare_pairs
from simpo.data.sources import find_sources, load_splits
from simpo.data.templates import CHATML
from simpo.environment import num_cores
from simpo.model.load import SLOW_BF16, has_bf16, load_tokenizer, pick_device
from simpo.plan.report import launch_line
from simpo.plan.search import Machines, Plan, gib, plan_recipe
from simpo.plan.shapes import load_config
from simpo.recipe import KEYS, Recipe, load_recipe
from simpo.recipe.yaml import dump_yaml
from simpo.run.memory import free_memory

_SAMPLE = 1000  # pairs that are tokenised to know their lengths
_READ = 200  # of them, whose language is told
_LENGTHS_TO = 64  # max_length is a multiple of it
_PUBLISHED_LENGTH, _PUBLISHED_PAIRS = 2048, 128
_FEWEST_STEPS, _FEWEST_PAIRS = 30, 8
# Billions of parameters from which a learning rate of all weights is a place to start.
_RATES = (
    (30.0, 1e-7, "for a model above 30B; advised 5e-8 to 3e-7"),
    (12.0, 3e-7, "for 13B to 30B; advised 1e-7 to 3e-7"),
    (6.0, 5e-7, "for 7B to 9B; published 3e-7 to 1e-6"),
    (0.9, 1e-6, "for 1B to 3B; advised 5e-7 to 1e-6"),
    (0.3, 5e-6, "below 1B more is needed than at 7B (published: 3e-7 to 1e-6)"),
    (0.0, 2e-5, "a model this small needs far more than one of 7B (published: 3e-7 to 1e-6)"),
)
_ADAPTERS = 10  # times the rate of all weights, and at most
_MOST_OF_ADAPTERS = 1e-4
# What may be trained, from the most to the least memory.
_LADDER: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "all weights, in float32"),
    ({"master_dtype": "bfloat16", "optim": "adamw_bf16"}, "all weights, in bfloat16 with stochastic rounding"),
    ({"use_peft": True}, "LoRA adapters"),
    ({"use_peft": True, "master_dtype": "bfloat16"}, "LoRA adapters over weights in bfloat16"),
    ({"use_peft": True, "load_in_4bit": True}, "LoRA adapters over weights in 4 bits (QLoRA)"),
)


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Attributes:
        values: key -> value, model and data among them.
        reasons: key -> why; "" where it was given.
        facts: what was looked at: name -> sentence, or several.
        launch: the command that trains on all that was planned with.
    """

    values: dict[str, Any]
    reasons: dict[str, str]
    facts: dict[str, Any]
    launch: str

    def to_yaml(self) -> str:
        """A recipe with the reasons as comments."""
        wrap = functools.partial(textwrap.wrap, width=118, initial_indent="# ", subsequent_indent="#   ")
        facts = [
            (name, text) for name, each in self.facts.items() for text in ([each] if isinstance(each, str) else each)
        ]
        lines = [line for name, sentence in facts for line in wrap(f"{name}: {sentence}")]
        lines += ["# The numbers are places to start: tune learning_rate first, then gamma_beta_ratio, then beta.", ""]
        for key, value in self.values.items():
            line = dump_yaml({key: value}).rstrip("\n")
            lines.append(f"{line:<45} # {self.reasons[key]}" if self.reasons[key] and "\n" not in line else line)
        return "\n".join(lines) + "\n"


def choose_recipe(data: str, words: Sequence[str], *, recipe_name: str, gpus: int | None = None) -> Chosen:
    """Choose for one data set and the keys that `words` give, the model among them.

    Args:
        data: a file, folder or hub name of pairs.
        words: as on the command line; they win over every choice.
        recipe_name: how `launch` calls the recipe.
        gpus: to plan with; None = those of this machine, or of the processes that a launcher started.
    Raises:
        ValueError: as reading data and model does, and where no model is given.
    """
    # What others depend on stands for what will be chosen, so that a key which needs it is not refused.
    later = {"eval_steps": 1, "learning_rate": 1.0}
    given = load_recipe({"dataset_name": data, **later}, words)
    own = given.model_fields_set - {key for key, value in later.items() if getattr(given, key) in (value, None)}
    tokenizer = load_tokenizer(given)
    found: dict[str, tuple[Any, str]] = {}

    def resolved(**more: Any) -> Recipe:
        base = {"dataset_name": data, **later, **{key: value for key, (value, _) in found.items()}, **more}
        return load_recipe(base, words, processes=1)

    def choose(key: str, value: Any, why: str) -> None:
        if key not in own:
            found[key] = (value, why)

    if not getattr(tokenizer, "chat_template", None):
        choose("chat_template", CHATML, "the model has no chat template of its own")
    look = _look_at(resolved(), tokenizer)
    share = given.validation_fraction if "validation_fraction" in own else look.share_to_hold_out
    share *= not look.held_out  # where the data has no split for it
    _choose_lengths(look, share, given, own, choose)
    machines, where = _machine(gpus)
    plan, trained = _fit(resolved, machines, choose)
    size = plan.model.num_parameters / 1e9
    recipe = resolved()
    _choose_rate(size, recipe, choose)
    _choose_steps(look, share, plan, given, own, choose)
    name = f"{Path(given.model_name_or_path).name}-{Path(data).name.split('.')[0]}"
    choose("output_dir", str(Path("runs", name)), "the run: checkpoints, metrics, the model")

    facts: dict[str, Any] = {
        "data": look.sentence,
        "language": look.languages,
        "machine": where,
        "model": f"{given.model_name_or_path}, {_in_words(size)} parameters; {trained}",
    }
    facts |= {"worth knowing": look.advice} if look.advice else {}
    values = {"model_name_or_path": given.model_name_or_path, **_data_keys(given)}
    reasons = dict.fromkeys(values, "") | {key: why for key, (_, why) in found.items()}
    final = resolved()
    plain = final.to_dict()  # without secrets
    values |= {key: plain.get(key, value) for key, (value, _) in found.items()}
    for key in sorted((own & plain.keys()) - {*values, "dataset_mixer"}, key=list(KEYS).index):
        value = plain[key]
        if key == "gradient_accumulation_steps" and final.global_batch_size:  # the same on any number of processes
            key, value = "global_batch_size", final.global_batch_size
        values[key], reasons[key] = value, "as given"
    launch = f"simpo train {shlex.quote(recipe_name)}"
    if machines.gpus > 1:
        launch = launch_line(plan, recipe, recipe_name=recipe_name)
    return Chosen(values, reasons, facts, launch)


def _data_keys(given: Recipe) -> dict[str, Any]:
    """The data as a recipe names it, shortly where there is one set of it."""
    (name, entry), *others = given.dataset_mixer.items()
    return {"dataset_mixer": dict(given.dataset_mixer)} if others or entry != 1.0 else {"dataset_name": name}


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """What a sample of the pairs shows: lengths [pairs], in tokens, of the longer side."""

    pairs: int
    held_out: int
    lengths: np.ndarray
    responses: np.ndarray
    languages: str
    dropped: str
    advice: list[str]

    @property
    def share_to_hold_out(self) -> float:
        """Of the training prompts."""
        return min(0.1, max(0.01, round(200 / self.pairs, 2)))

    @property
    def sentence(self) -> str:
        chosen, rejected = np.median(self.responses, axis=0)
        return (
            f"{self.pairs:,} pair{'s' * (self.pairs != 1)} to train, {self.held_out:,} held out; tokens of a median "
            f"answer: {chosen:.0f} chosen, {rejected:.0f} rejected; 99% of pairs within "
            f"{np.quantile(self.lengths, 0.99):.0f} tokens{self.dropped}"
        )


def _look_at(recipe: Recipe, tokenizer: Any) -> _Look:
    """Count all rows, and tokenise a sample of them."""
    splits = load_splits(recipe.model_copy(update={"validation_fraction": 0.0}), find_sources(recipe))
    # TemporaryDirectory could not be removed on Windows while the pairs are mapped; so it is tried alone.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sample = {"max_length": 10**6, "max_train_samples": min(_SAMPLE, len(splits.train))}
        sample["max_eval_samples"] = min(_SAMPLE, max(1, len(splits.eval)))
        sample |= {"validation_fraction": 0.0, "max_prompt_length": None, "cache_dir": folder}
        whole = recipe.model_copy(update=sample)
        prepared = prepare_pairs(whole, tokenizer, progress=False)
        store, account = PairStore(prepared.train), prepared.ledger.splits["train"]
        lengths, responses = store.sequence_lengths.max(axis=1), np.array(store.response_lengths)
        languages = _languages(store)
    dropped = f"; {account.num_dropped} of {account.input} rows unusable" if account.num_dropped else ""
    return _Look(len(splits.train), len(splits.eval), lengths, responses, languages, dropped, prepared.ledger.advice)


def _languages(store: PairStore) -> str:
    """Those of some of the chosen answers, the most frequent first."""
    if find_spec("py3langid") is None:
        return "not looked at: pip install 'simpo[clean]'"
    found: Counter[str] = Counter()
    for index in range(0, len(store), math.ceil(len(store) / _READ)):
        language, confidence = identify_language(store.texts(index)["chosen_text"]) or ("", 0.0)
        found[language if confidence >= MIN_CONFIDENCE else "too short or unclear"] += 1
    shares = (f"{language} {count / found.total():.0%}" for language, count in found.most_common(4))
    return f"{', '.join(shares)} (of {found.total()} chosen answers)"


def _choose_lengths(look: _Look, share: float, given: Recipe, own: Collection[str], choose: Any) -> None:
    config = load_config(given.model_name_or_path, revision=given.model_revision or "main").get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 2**30
    longest = math.ceil(np.quantile(look.lengths, 0.99) / _LENGTHS_TO) * _LENGTHS_TO
    if longest > _PUBLISHED_LENGTH and np.quantile(look.lengths, 0.9) <= _PUBLISHED_LENGTH:
        longest = _PUBLISHED_LENGTH
    if "max_prompt_length" in own and given.max_prompt_length is not None:  # some room for an answer behind it
        longest = max(longest, (given.max_prompt_length // _LENGTHS_TO + 1) * _LENGTHS_TO)
    longest = min(longest, positions)
    cut = float((look.lengths > longest).mean())
    choose("max_length", int(longest), f"prompt + answer; {cut:.1%} of pairs are longer, and are cut")
    if share:
        choose("validation_fraction", share, f"{share * look.pairs:.0f} pairs are held out: there is no test split")
    held_out = look.held_out or round(share * look.pairs)
    if held_out > _SAMPLE:
        choose("max_eval_samples", _SAMPLE, f"of {held_out:,}: enough to know accuracy to 3%")


# --- machine ---------------------------------------------------------------------------------------------------------


def _machine(gpus: int | None) -> tuple[Machines, str]:
    """What a run is planned for, and in words. Without a GPU a process has the machine's free memory."""
    cores = num_cores()
    launched = int(os.environ.get("WORLD_SIZE", "0"))
    if not torch.cuda.is_available():
        free = (free_memory(torch.device("cpu")) or 2**33) / 2**30 / max(1, launched)
        return Machines.of(gpus=1, nodes=None, gpus_per_node=None, gpu_gib=free), (
            f"no GPU; {cores} cores, {free:.1f} GiB of memory free"
        )
    card = torch.cuda.get_device_properties(0)
    count = gpus or launched or torch.cuda.device_count()
    near = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or min(count, torch.cuda.device_count())
    memory = card.total_memory / 2**30
    return Machines.of(gpus=count, nodes=None, gpus_per_node=near, gpu_gib=memory), (
        f"{count} x {card.name} of {memory:.0f} GiB; {cores} cores"
    )


def _fit(resolved: Any, machines: Machines, choose: Any) -> tuple[Plan, str]:
    """The first of the ladder that the machine holds, chosen; the last where none is."""
    tried: list[str] = []
    device = pick_device("auto")
    if not (fits := has_bf16(device)):
        choose("bf16", False, SLOW_BF16 if device.type == "cpu" else "this GPU has no bfloat16")
    for more, what in (rung for rung in _LADDER if fits or "bfloat16" not in rung[0].values()):
        recipe = resolved(**more)
        plan = plan_recipe(recipe, machines)
        if plan.fits:
            break
        tried.append(f"{what}: {gib(plan.peak(plan.search.needed))}")
    why = f"{what}: " + (f"too much for {machines.gpu_gib:.0f} GiB: {'; '.join(tried)}" if tried else "they fit")
    if not plan.fits:
        why = f"{what}; planned not to fit ({'; '.join(tried)}): lower max_length"
    for key, value in more.items():
        choose(key, value, what)
    if plan.recipe.gradient_checkpointing and not recipe.gradient_checkpointing:
        choose("gradient_checkpointing", True, "does not fit without it; a third more time")
    return plan, why


# --- training --------------------------------------------------------------------------------------------------------


def _choose_rate(size: float, recipe: Recipe, choose: Any) -> None:
    rate, why = next((rate, why) for least, rate, why in _RATES if size >= least)
    if recipe.use_peft:
        rate = min(round(_ADAPTERS * rate, 9), _MOST_OF_ADAPTERS)
        why = f"{_ADAPTERS} times that of all weights, for adapters"
    choose("learning_rate", rate, why)
    choose("beta", recipe.beta, "published 2 to 10")
    choose("gamma_beta_ratio", recipe.gamma_beta_ratio, "target margin / beta; published 0.1 to 0.8")


def _choose_steps(look: _Look, share: float, plan: Plan, given: Recipe, own: Collection[str], choose: Any) -> None:
    pairs = max(1, round(look.pairs * (1 - share) * given.num_train_epochs))
    ranks = plan.mesh.data
    batch = _PUBLISHED_PAIRS
    while batch > _FEWEST_PAIRS and pairs / batch < _FEWEST_STEPS:
        batch //= 2
    fit = max(1, int(plan.tokens_that_fit / max(1, 2 * look.lengths.mean())))
    each = next(n for n in (8, 4, 2, 1) if (n <= fit and batch % (n * ranks) == 0) or n == 1)
    if "per_device_train_batch_size" in own:
        each = given.per_device_train_batch_size
    batch = math.ceil(batch / (each * ranks)) * each * ranks
    if "gradient_accumulation_steps" in own:
        batch = given.global_batch_size or given.pairs_per_step(ranks)
    steps = given.max_steps if given.max_steps > 0 else math.ceil(pairs / batch)
    if "gradient_accumulation_steps" not in own:
        why = "as published" if batch == _PUBLISHED_PAIRS else f"published 128; so that a run has {steps} steps"
        choose("global_batch_size", batch, f"pairs of an optimizer step; {why}")
        choose("per_device_train_batch_size", each, "pairs of a micro-batch; split further where memory is short")
    choose("num_train_epochs", 1, "as published")
    evaluated, saved = max(1, math.ceil(steps / 4)), max(50, math.ceil(steps / 10))
    in_steps = given.eval_strategy not in ("epoch", "no")
    if in_steps and (given.load_best_model_at_end or "back" in given.guard.values()):  # what is saved was evaluated
        evaluated = given.eval_steps if "eval_steps" in own else given.save_steps if "save_steps" in own else evaluated
        saved = math.ceil(saved / evaluated) * evaluated
    if in_steps:
        choose("eval_steps", evaluated, "optimizer steps from one evaluation to the next")
    choose("num_eval_generations", 4, "answers to look at, at each evaluation")
    choose("save_steps", saved, "and at the end; Ctrl-C saves one too")
    choose("save_total_limit", 2, "checkpoints kept")
    choose("logging_steps", max(1, steps // 200), "optimizer steps from one line to the next")


def _in_words(billions: float) -> str:
    return f"{billions:.1f} billion" if billions >= 1 else f"{1000 * billions:.0f} million"
