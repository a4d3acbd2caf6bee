"""Held-out evaluation: run a model over preference pairs and say what it prefers, and how sure that is.

    evaluation = simpo.evaluate("runs/first", "pairs.jsonl")
    evaluation.render()

Owns finding the pairs and running the model; the numbers are `results.py`'s, the `simpo eval` command is `command.py`.
The forward pass is training's own: packed rows with a shared prompt, bf16 autocast unless told otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from simpo.core.batch import PackedPairs
from simpo.core.losses import PairLogps
from simpo.core.packing import PAIR_FIELDS, TokenPair
from simpo.data.cache import fingerprint_tokens
from simpo.data.ledger import SplitLedger
from simpo.data.loader import PairStore
from simpo.data.prepare import PreparedData, prepare_pairs
from simpo.data.sources import EVAL_NAMES, find_sources
from simpo.display import counter, say
from simpo.evaluation.generate import generate_greedy
from simpo.evaluation.results import Evaluation, Generation, PairRecord, build_evaluation
from simpo.evaluation.statistics import repeated_share
from simpo.model.attention import plain_implementation, unwrap
from simpo.model.head import compute_pair_logps, install_head
from simpo.model.kernels import choose_kernel
from simpo.model.load import load_model, load_tokenizer, pick_device, set_precision
from simpo.model.probe import check_forward
from simpo.model.settle import why_not_packed
from simpo.parallel.mesh import Mesh, MeshSizes
from simpo.recipe import KEYS, Recipe, load_recipe
from simpo.run.optim import set_threads
from simpo.run.reference import pair_sums

READ_KEYS = frozenset(
    {name for name, key in KEYS.items() if key.section in ("model", "data") and name != "ref_model_name_or_path"}
    | {"pack", "share_prompt", "logits_chunk_size", "per_device_eval_batch_size", "eval_generation_max_new_tokens"}
    | {"seed", "device", "num_threads"}
    | {"use_peft", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}
)
"""The keys of a recipe that an evaluation reads. What only training needs cannot stand in its way."""

HELD_OUT = "test"  # the name that stands for "the held-out pairs", whatever the data calls them


def evaluate(
    model: str | Path | nn.Module,
    data: Any = None,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    tokenizer: Any = None,
    split: str = HELD_OUT,
    max_pairs: int | None = None,
    batch_pairs: int | None = None,
    num_generations: int = 0,
    max_new_tokens: int | None = None,
    bf16: bool | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure a model on held-out preference pairs.

    Args:
        model: a folder, a run directory, a LoRA adapter's folder, a hub name, or a loaded causal language model. A
            loaded one is used where it is, and left as it was.
        data: what to evaluate on: a recipe (file, mapping or Recipe), a file or folder of pairs, `PreparedData`, or a
            dataset with the columns row_id, chosen_ids, chosen_start, rejected_ids, rejected_start. None = the
            recipe's.
        recipe: how text becomes tokens, and how to compute; None = the defaults.
        tokenizer: for text, and for generations; None = the recipe's, else the model's own.
        split: "test" is the held-out pairs, whatever the data calls them; else a split's name. A single file has no
            splits and is taken whole.
        max_pairs: at most this many pairs, a seeded choice (the recipe's seed).
        batch_pairs: pairs in one forward pass; None = the recipe's per_device_eval_batch_size.
        num_generations: prompts, the first ones, that are answered greedily.
        max_new_tokens: longest answer; None = the recipe's eval_generation_max_new_tokens.
        bf16: compute in bfloat16; None = as the recipe says (true by default).
        device: "auto", "cpu" or "cuda"; None = as the recipe says (auto by default).
        progress: show a progress bar on a terminal.
    Raises:
        ValueError: no such model or data, no held-out pairs, wrong columns, or log-probs that are not finite.
    """
    for name, value, least in (
        ("max_pairs", max_pairs, 1),
        ("batch_pairs", batch_pairs, 1),
        ("num_generations", num_generations, 0),
        ("max_new_tokens", max_new_tokens, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} = {value}: must be at least {least}")
    if isinstance(data, Recipe | Mapping) or (isinstance(data, str | Path) and is_recipe_file(data)):
        if recipe is not None:
            raise ValueError("data is a recipe already; give either data or recipe as one, not both")
        data, recipe = None, data
    if data is None and recipe is None:
        raise ValueError("no pairs to evaluate on: give data (a file, a folder, a dataset) or a recipe")
    wanted = {"model_name_or_path": _name_of(model), "bf16": bf16, "device": device}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    first = {} if recipe is None else recipe
    settings = load_recipe(first, wanted, only=READ_KEYS)
    with contextlib.suppress(ValueError):  # it names no model
        settings = settings_for(settings, load_recipe(first, only=READ_KEYS).model_name_or_path)
    if settings.num_threads is not None:
        set_threads(settings.num_threads)
    if tokenizer is None and (num_generations or not _is_tokenised(data)):
        tokenizer = find_tokenizer(settings, settings.model_name_or_path)
    return evaluate_pairs(
        model,
        load_pairs(data, settings, tokenizer, split=split, max_pairs=max_pairs, progress=progress),
        settings,
        tokenizer,
        batch_pairs=batch_pairs or settings.per_device_eval_batch_size,
        num_generations=num_generations,
        max_new_tokens=max_new_tokens or settings.eval_generation_max_new_tokens,
        progress=progress,
    )


def settings_for(settings: Recipe, own: str, name: str | None = None) -> Recipe:
    """The settings to load a model by: a revision is that of the model `own`, also as the base of an adapter.

    So is the tokenizer, but for the model that the settings name.

    Args:
        name: of the model to load; None = the settings'.
    """
    named = model_folder(settings.model_name_or_path)
    name = named if name is None else model_folder(name)
    if base_model(name) in (own, base_model(model_folder(own))):
        return settings
    changes = {"model_revision": None} | ({} if name == named else {"tokenizer_name_or_path": None})
    return settings.model_copy(update=changes)


# --- what to evaluate ------------------------------------------------------------------------------------------------

_NAMELESS = "a loaded model"


def is_recipe_file(data: str | Path) -> bool:
    return Path(data).suffix.lower() in (".yaml", ".yml")


def _is_tokenised(data: Any) -> bool:
    return isinstance(data, PreparedData) or hasattr(data, "column_names")


def _name_of(model: str | Path | nn.Module) -> str:
    """The folder or hub name of a model, loaded or not."""
    if isinstance(model, nn.Module):
        model = getattr(getattr(unwrap(model), "config", None), "name_or_path", "") or _NAMELESS
    return model_folder(str(model))


def model_folder(name: str) -> str:
    """A run directory stands for the model in it."""
    holds_model = [
        any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))
        for folder in (Path(name), Path(name) / "model")
    ]
    return str(Path(name) / "model") if holds_model == [False, True] else name


def find_tokenizer(settings: Recipe, name: str) -> Any:
    """The recipe's tokenizer, else the one of a model's folder or hub name, or of an adapter's base model."""
    if settings.tokenizer_name_or_path is not None:
        return load_tokenizer(settings)
    if name == _NAMELESS:
        raise ValueError("tokenizer: this loaded model has no name to load one from; pass its tokenizer")
    if not (Path(name) / "tokenizer_config.json").is_file():
        name = base_model(name)
    return load_tokenizer(load_recipe(settings, {"model_name_or_path": name}))


def base_model(name: str) -> str:
    """The model that an adapter's folder belongs to; another name as it is. Raises ValueError where it names none."""
    adapter = Path(name) / "adapter_config.json"
    if not adapter.is_file():
        return name
    try:
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{adapter} is damaged: it is no JSON object") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"{adapter}: base_model_name_or_path, the model that the adapter belongs to, is missing")
    return base


@dataclass(frozen=True)
class EvalPairs:
    """The pairs to evaluate, and what they are called."""

    store: PairStore
    name: str
    split: str | None
    notes: tuple[str, ...] = ()


def load_pairs(
    data: Any, settings: Recipe, tokenizer: Any, *, split: str, max_pairs: int | None, progress: bool = True
) -> EvalPairs:
    """The pairs that `evaluate` measures, as tokens; arguments as there. A seeded choice where max_pairs is fewer."""
    if isinstance(data, str | Path):
        name, dataset, found, notes = _read_folder(str(data), settings, tokenizer, split=split, progress=progress)
    elif data is None or isinstance(data, PreparedData):
        name, dataset, found, notes = _held_out(data, settings, tokenizer, split=split, progress=progress)
    elif _is_tokenised(data):
        name, dataset, found, notes = "tokenised pairs", data, None, ()
    else:
        raise ValueError(
            f"data: a recipe, a file or folder of pairs, PreparedData or a dataset is needed, not {type(data).__name__}"
        )
    if missing := [name for name in PAIR_FIELDS if name not in dataset.column_names]:
        raise ValueError(
            f"data: the dataset lacks the columns {', '.join(missing)}; give tokenised pairs, or the path of a file "
            "with prompt, chosen and rejected"
        )
    count = len(dataset)
    if count == 0:
        raise ValueError(f"{name}: no pairs to evaluate on")
    chosen, said = _choose(range(count), max_pairs, settings.seed)
    if said:
        dataset = dataset.select(sorted(chosen))
    return EvalPairs(PairStore(dataset), name, found, (*said, *notes))


def _choose(every: Sequence[Any], max_pairs: int | None, seed: int) -> tuple[Sequence[Any], tuple[str, ...]]:
    """At most so many of them, a seeded choice, and what to say of it."""
    if max_pairs is None or max_pairs >= len(every):
        return every, ()
    chosen = random.Random(f"{seed} evaluate").sample(every, max_pairs)
    return chosen, (f"{max_pairs} of {len(every)} pairs, chosen by seed {seed}",)


def on_both(first: EvalPairs, other: EvalPairs, *, max_pairs: int | None, seed: int) -> tuple[EvalPairs, EvalPairs]:
    """The same pairs in the tokens of two models: those that neither lacks, at most `max_pairs`, a seeded choice."""
    ids = [list(each.store.dataset["row_id"]) for each in (first, other)]
    known = {*ids[1]}
    both = [row_id for row_id in ids[0] if row_id in known]
    if not both:
        raise ValueError(f"{first.name}: no pair is left in the tokens of both models")
    notes = ()
    if apart := len({*ids[0]} ^ known):
        notes = (f"{apart} pairs are left out, which one of the two models cannot take as its template or length is",)
    chosen, said = _choose(both, max_pairs, seed)
    notes, wanted = (*said, *notes), {*chosen}
    taken = ([place for place, row_id in enumerate(each) if row_id in wanted] for each in ids)
    found = [
        dataclasses.replace(each, store=PairStore(each.store.dataset.select(places)), notes=(*notes, *each.notes))
        for each, places in zip((first, other), taken, strict=True)
    ]
    return found[0], found[1]


_Found = tuple[str, Any, str | None, tuple[str, ...]]  # name, dataset, split and notes of some pairs


def _held_out(data: PreparedData | None, settings: Recipe, tokenizer: Any, *, split: str, progress: bool) -> _Found:
    """Of prepared pairs, or those of a recipe."""
    name = "prepared pairs"
    if data is None:
        settings.require("dataset_mixer")
        name = ", ".join(settings.dataset_mixer)
        if split not in (HELD_OUT, "train"):
            settings = load_recipe(settings, {"dataset_splits": [settings.dataset_splits[0], split]})
        data = prepare_pairs(settings, tokenizer, progress=progress)
    dataset = data.train if split == "train" else data.eval
    if dataset is None:
        raise ValueError(
            f"{name}: no held-out pairs; add an evaluation split, set validation_fraction above 0, "
            "or evaluate on the training pairs with split train"
        )
    account = data.ledger.splits.get("train" if split == "train" else "eval")
    return name, dataset, split, _account_notes(account)


def _read_folder(data: str, settings: Recipe, tokenizer: Any, *, split: str, progress: bool) -> _Found:
    """A file whole, or one split of a folder; nothing else is read or tokenised."""
    if not data.strip():
        raise ValueError("data: the name of a file or folder of pairs is empty")
    changes: dict[str, Any] = {"dataset_mixer": {data: 1.0}, "validation_fraction": 0.0, "max_train_samples": None}
    changes["dataset_configs"] = None  # those of the recipe's own datasets
    settings = load_recipe(settings, changes)
    (source,) = find_sources(settings)
    found: str | None = None
    if source.is_plain_file and split != HELD_OUT:
        raise ValueError(f"split: {data} is one file, which is read whole; leave {split!r} out")
    if not source.is_plain_file:
        usual = (split, *EVAL_NAMES) if split == HELD_OUT else (split,)
        found = next((name for name in usual if name in source.splits), None)
        if found is None:
            there = ", ".join(sorted(source.splits))
            raise ValueError(f"{data} has no split {split!r}; name one of its own with split: {there}")
        # The wanted split in the place of the training split: the others are not looked at.
        settings = load_recipe(settings, {"dataset_splits": [found]})
    prepared = prepare_pairs(settings, tokenizer, progress=progress)
    return data, prepared.train, found, _account_notes(prepared.ledger.splits.get("train"))


def _account_notes(account: SplitLedger | None) -> tuple[str, ...]:
    """What the ledger says that a reader of the numbers must know."""
    if account is None:
        return ()
    notes = []
    if account.num_dropped:
        reasons = ", ".join(f"{entry['count']} {reason}" for reason, entry in account.dropped.items())
        notes.append(f"{account.num_dropped} of {account.input} rows dropped: {reasons}")
    cut = sum(entry.get("pairs", 0) for entry in account.cut.values())
    if cut:
        notes.append(f"max_length cuts {cut} prompts or responses of {account.kept} pairs")
    return tuple(notes)


# --- running the model -----------------------------------------------------------------------------------------------


def evaluate_pairs(
    model: str | Path | nn.Module,
    pairs: EvalPairs,
    settings: Recipe,
    tokenizer: Any,
    *,
    batch_pairs: int,
    num_generations: int,
    max_new_tokens: int,
    progress: bool = True,
) -> Evaluation:
    """Run a model on pairs that `load_pairs` found; arguments as in `evaluate`."""
    console, store = Console(stderr=True, highlight=False, quiet=not progress), pairs.store
    stored = [store[i] for i in range(len(store))]
    with ready_model(model, settings) as (network, packed, notes):
        for note in notes:
            say(f"note: {note}", console)
        device = unwrap(network).get_input_embeddings().weight.device

        def forward(batch: PackedPairs) -> PairLogps:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bf16):
                return compute_pair_logps(network, batch, chunk_size=settings.logits_chunk_size)

        layout = {"pairs_per_batch": batch_pairs, "pack": packed and settings.pack}
        layout |= {"share_prompt": packed and settings.share_prompt}
        with counter(console, "evaluating", len(stored)) as advance:
            sums = pair_sums(forward, store, **layout, mesh=Mesh(MeshSizes(), device=device), advance=advance).tolist()
        answered = stored[:num_generations]
        prompts, responses = [pair.prompt_ids for pair in answered], []
        if prompts:  # else there may be no tokenizer
            size = {"max_new_tokens": max_new_tokens, "batch_size": batch_pairs}
            with counter(console, "answering", len(prompts)) as advance:
                answers = generate_greedy(network, tokenizer, prompts, **size, advance=advance)
                responses = [answer.text for answer in answers]
    lengths = store.response_lengths.tolist()
    return build_evaluation(
        [PairRecord(pair.row_id, *sums[i], *lengths[i]) for i, pair in enumerate(stored)],
        model=settings.model_name_or_path if isinstance(model, nn.Module) else str(model),
        data=pairs.name,
        split=pairs.split,
        data_fingerprint=fingerprint_tokens(store.dataset)[:12],
        generations=tuple(_describe_answers(store, answered, responses, tokenizer)),
        settings={
            "device": str(device),
            "compute": "bfloat16" if settings.computes_in_bf16 else "float32",
            "weights": _kind_of_weights(network),
            "rows": "packed, shared prompt" if packed else "padded",
            "batch_pairs": batch_pairs,
        },
        versions={package: version(package) for package in ("simpo", "torch", "transformers")},
        notes=(*pairs.notes, *notes),
    )


def _kind_of_weights(model: nn.Module) -> str:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4 bits"
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _describe_answers(
    store: PairStore, pairs: Sequence[TokenPair], responses: Sequence[str], tokenizer: Any
) -> Iterator[Generation]:
    has_text = "prompt_text" in store.dataset.column_names
    for index, (pair, response) in enumerate(zip(pairs, responses, strict=True)):
        prompt = store.dataset[index]["prompt_text"] if has_text else tokenizer.decode(pair.prompt_ids)
        tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
        yield Generation(pair.row_id, prompt, response, len(tokens), repeated_share(tokens))


def load_to_evaluate(name: str, settings: Recipe) -> tuple[nn.Module, str | None]:
    """A model of a folder, adapter or hub name, with ordinary attention; what to say of its precision.

    A QLoRA recipe holds it in 4 bits, as it was trained on a card that may have no room for more.
    """
    if (Path(name) / "adapter_config.json").is_file() and importlib.util.find_spec("peft") is None:
        raise ValueError(f"{name} is a LoRA adapter, which needs peft: pip install 'simpo[peft]'")
    plain = load_recipe(settings, {"pack": False, "share_prompt": False, "attention_kernel": "auto"})
    device = pick_device(settings.device)
    slow = set_precision(settings, device)
    how = {"trainable": False, "in_4bit": settings.load_in_4bit, "check": False}
    return load_model(plain, device=device, name=name, **how), slow


@contextlib.contextmanager
def ready_model(model: str | Path | nn.Module, settings: Recipe) -> Iterator[tuple[nn.Module, bool, tuple[str, ...]]]:
    """The model in eval mode, whether it takes packed rows, and notes; a loaded model is put back as it was."""
    slow: str | None = None
    if not isinstance(model, nn.Module):
        # Loaded for ordinary attention first: whether packed rows fit is found out below, with a way back.
        model, slow = load_to_evaluate(model_folder(str(model)), settings)
    base, was_training = unwrap(model), model.training
    implementation, head = base.config._attn_implementation, base.get_output_embeddings()
    head_class = type(head)
    model.eval()
    try:
        install_head(model)
        packed, notes = _choose_rows(model, settings)
        yield model, packed, (*filter(None, [slow]), *notes)
    finally:
        if base.config._attn_implementation != implementation:
            base.set_attn_implementation(implementation)
        if head is not None:
            head.__class__ = head_class
        model.train(was_training)


def _choose_rows(model: nn.Module, settings: Recipe) -> tuple[bool, tuple[str, ...]]:
    """Packed rows where the model's packed log-probs are its ordinary ones; padded rows, with a note, elsewhere."""
    base, notes = unwrap(model), ()
    if settings.pack or settings.share_prompt:
        half = bool(settings.bf16)
        reason = why_not_packed(model, settings, bf16=half)
        if reason is None and settings.attention_kernel != "auto":
            try:
                choose_kernel(model, settings.attention_kernel, device=next(base.parameters()).device, half=half)
                reason = why_not_packed(model, settings, bf16=half)
            except ValueError as error:  # of another machine than the recipe's, perhaps
                notes = (f"{error}, as it does here",)
        if reason is None:
            return True, notes
        base.set_attn_implementation(plain_implementation(base))
        notes = (f"padded rows, which are slower, because packed ones do not work here: {reason}",)
    check_forward(model, pack=False, share_prompt=False, bf16=bool(settings.bf16))
    return False, notes
