"""Held-out evaluation: run a model over preference pairs and say what it prefers, and how sure that is.

    evaluation = simpo.evaluate("runs/first", "pairs.jsonl")
    evaluation.render()

Owns finding the pairs and running the model; the numbers are `results.py`'s, the `simpo eval` command is `command.py`.
The forward pass is training's own: packed rows with a shared prompt, bf16 autocast unless told otherwise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from simpo.display import progress_bar
from simpo.evaluation.generate import generate_greedy
from simpo.evaluation.results import (
    Evaluation,
    Generation,
    PairRecord,
    build_evaluation,
)
from simpo.evaluation.statistics import repeated_share
from simpo.model.attention import PACKED, is_packed, unwrap
from simpo.model.head import compute_pair_logps, install_head
from simpo.model.load import load_model, load_tokenizer, pick_device, set_precision
from simpo.model.probe import check_forward, probe_layout
from simpo.parallel.mesh import Mesh, MeshSizes
from simpo.recipe import Recipe, load_recipe
from simpo.run.reference import pair_sums

HELD_OUT = "test"  # the name that stands for "the held-out pairs", whatever the data calls them


def evaluate(
    model: str | Path | nn.Module,
    data: Any = None,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    tokenizer: Any = None,
    split: str = HELD_OUT,
    max_pairs: int | None = None,
    batch_pairs: int = 8,
    num_generations: int = 0,
    max_new_tokens: int = 128,
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
        batch_pairs: pairs in one forward pass.
        num_generations: prompts, the first ones, that are answered greedily.
        max_new_tokens: longest answer.
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
    settings, data = resolve_settings(model, data, recipe, bf16=bf16, device=device)
    if tokenizer is None and (num_generations or not _is_tokenised(data)):
        tokenizer = find_tokenizer(settings, model)
    return evaluate_pairs(
        model,
        load_pairs(data, settings, tokenizer, split=split, max_pairs=max_pairs, progress=progress),
        settings,
        tokenizer,
        batch_pairs=batch_pairs,
        num_generations=num_generations,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )


# --- what to evaluate ------------------------------------------------------------------------------------------------


def resolve_settings(
    model: str | Path | nn.Module, data: Any, recipe: Any, *, bf16: bool | None = None, device: str | None = None
) -> tuple[Recipe, Any]:
    """The recipe to compute by, with the model's folder in it; and the data, None when they are the recipe's."""
    if isinstance(data, Recipe | Mapping) or (isinstance(data, str | Path) and is_recipe_file(data)):
        if recipe is not None:
            raise ValueError("data is a recipe already; give either data or recipe as one, not both")
        data, recipe = None, data
    if data is None and recipe is None:
        raise ValueError("no pairs to evaluate on: give data (a file, a folder, a dataset) or a recipe")
    name = getattr(getattr(unwrap(model), "config", None), "name_or_path", "") if _is_loaded(model) else str(model)
    changes: dict[str, Any] = {"model_name_or_path": _model_folder(name) if name else "a loaded model"}
    changes |= {key: value for key, value in (("bf16", bf16), ("device", device)) if value is not None}
    return load_recipe({} if recipe is None else recipe, changes), data


def _is_loaded(model: Any) -> bool:
    return isinstance(model, nn.Module)


def is_recipe_file(data: str | Path) -> bool:
    return Path(data).suffix.lower() in (".yaml", ".yml")


def _is_tokenised(data: Any) -> bool:
    return isinstance(data, PreparedData) or hasattr(data, "column_names")


def _model_folder(name: str) -> str:
    """A run directory stands for the model in it."""
    holds_model = [(Path(name) / inner / "config.json").is_file() for inner in (".", "model")]
    holds_adapter = [(Path(name) / inner / "adapter_config.json").is_file() for inner in (".", "model")]
    inside = not (holds_model[0] or holds_adapter[0]) and (holds_model[1] or holds_adapter[1])
    return str(Path(name) / "model") if inside else name


def find_tokenizer(settings: Recipe, model: str | Path | nn.Module) -> Any:
    """The recipe's tokenizer, else the model's; of an adapter without one, its base model's."""
    if settings.tokenizer_name_or_path is not None:
        return load_tokenizer(settings)
    name = settings.model_name_or_path if _is_loaded(model) else _model_folder(str(model))
    if name == "a loaded model":
        raise ValueError("tokenizer: this loaded model has no name to load one from; pass its tokenizer")
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file() and not (Path(name) / "tokenizer_config.json").is_file():
        name = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return load_tokenizer(load_recipe(settings, {"model_name_or_path": name}))


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
    pairs = _find_pairs(data, settings, tokenizer, split=split, progress=progress)
    count = len(pairs.store)
    if count == 0:
        raise ValueError(f"{pairs.name}: no pairs to evaluate on")
    if max_pairs is None or max_pairs >= count:
        return pairs
    chosen = sorted(random.Random(f"{settings.seed} evaluate").sample(range(count), max_pairs))
    note = f"{max_pairs} of {count} pairs, chosen by seed {settings.seed}"
    return replace(pairs, store=_store(pairs.store.dataset.select(chosen)), notes=(note, *pairs.notes))


def _find_pairs(data: Any, settings: Recipe, tokenizer: Any, *, split: str, progress: bool) -> EvalPairs:
    if data is None:
        settings.require("dataset_mixer")
        if split not in (HELD_OUT, "train"):
            settings = load_recipe(settings, {"dataset_splits": [settings.dataset_splits[0], split]})
        prepared, name = prepare_pairs(settings, tokenizer, progress=progress), ", ".join(settings.dataset_mixer)
    elif isinstance(data, PreparedData):
        prepared, name = data, "prepared pairs"
    elif hasattr(data, "column_names"):
        return EvalPairs(_store(data), "tokenised pairs", None)
    elif isinstance(data, str | Path):
        return _load_folder(str(data), settings, tokenizer, split=split, progress=progress)
    else:
        raise ValueError(
            f"data: a recipe, a file or folder of pairs, PreparedData or a dataset is needed, not {type(data).__name__}"
        )
    key = "train" if split == "train" else "eval"
    dataset = prepared.train if key == "train" else prepared.eval
    if dataset is None:
        raise ValueError(
            f"{name}: no held-out pairs; add an evaluation split, set validation_fraction above 0, "
            "or evaluate on the training pairs with split train"
        )
    return EvalPairs(_store(dataset), name, split, _account_notes(prepared.ledger.splits.get(key)))


def _load_folder(data: str, settings: Recipe, tokenizer: Any, *, split: str, progress: bool) -> EvalPairs:
    """A file whole, or one split of a folder; nothing else is read or tokenised."""
    if not data.strip():
        raise ValueError("data: the name of a file or folder of pairs is empty")
    changes: dict[str, Any] = {"dataset_mixer": {data: 1.0}, "validation_fraction": 0.0, "max_train_samples": None}
    settings = load_recipe(settings, changes)
    (source,) = find_sources(settings)
    found: str | None = None
    if not source.is_plain_file:
        usual = (split, *EVAL_NAMES) if split == HELD_OUT else (split,)
        found = next((name for name in usual if name in source.splits), None)
        if found is None:
            there = ", ".join(sorted(source.splits))
            raise ValueError(f"{data} has no split {split!r}; name one of its own with split: {there}")
        # The wanted split in the place of the training split: the others are not looked at.
        settings = load_recipe(settings, {"dataset_splits": [found]})
    prepared = prepare_pairs(settings, tokenizer, progress=progress)
    return EvalPairs(_store(prepared.train), data, found, _account_notes(prepared.ledger.splits.get("train")))


def _store(dataset: Any) -> PairStore:
    missing = [name for name in PAIR_FIELDS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"data: the dataset lacks the columns {', '.join(missing)}; give tokenised pairs, or the path of a file "
            "with prompt, chosen and rejected"
        )
    return PairStore(dataset)


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
    console = Console(stderr=True, highlight=False, quiet=not progress)
    stored = [pairs.store[i] for i in range(len(pairs.store))]
    name = settings.model_name_or_path if _is_loaded(model) else str(model)
    with _ready_model(model, settings) as (network, packed, notes):
        for note in notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
        device = unwrap(network).get_input_embeddings().weight.device
        records = _run_pairs(network, pairs.store, stored, settings, packed, batch_pairs, device, console)
        generations = _generate(
            network, tokenizer, pairs.store, stored[:num_generations], max_new_tokens, batch_pairs, console
        )
    return build_evaluation(
        records,
        model=name,
        data=pairs.name,
        split=pairs.split,
        data_fingerprint=fingerprint_tokens(pairs.store.dataset)[:12],
        generations=generations,
        settings={
            "device": str(device),
            "compute": "bfloat16" if settings.bf16 else "float32",
            "weights": str(next(network.parameters()).dtype).removeprefix("torch."),
            "rows": "packed, shared prompt" if packed else "padded",
            "batch_pairs": batch_pairs,
        },
        versions={package: version(package) for package in ("simpo", "torch", "transformers")},
        notes=(*pairs.notes, *notes),
    )


@contextlib.contextmanager
def _ready_model(model: str | Path | nn.Module, settings: Recipe) -> Iterator[tuple[nn.Module, bool, tuple[str, ...]]]:
    """The model in eval mode, whether it takes packed rows, and notes; a loaded model is put back as it was."""
    if not _is_loaded(model):
        # Loaded for ordinary attention first: whether packed rows fit is found out below, with a way back.
        name = _model_folder(str(model))
        adapter = (Path(name) / "adapter_config.json").is_file()
        if adapter and importlib.util.find_spec("peft") is None:
            raise ValueError(f"{name} is a LoRA adapter, which needs peft: pip install 'simpo[peft]'")
        plain = load_recipe(settings, {"pack": False, "share_prompt": False})
        device = pick_device(settings.device)
        set_precision(settings, device)
        model = load_model(plain, device=device, name=name, trainable=False, check=False)
    base, was_training = unwrap(model), model.training
    implementation, head = base.config._attn_implementation, base.get_output_embeddings()
    head_class = type(head)
    model.eval()
    try:
        install_head(model)
        yield model, *_choose_rows(model, settings)
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
        before = base.config._attn_implementation
        try:
            if not is_packed(before):
                base.set_attn_implementation(PACKED)
            found = probe_layout(model, pack=True, share_prompt=True, bf16=bool(settings.bf16))
            if found.is_good:
                return True, ()
            reason = f"packed log-probs {found}"
        except ValueError as error:
            reason = str(error)
        base.set_attn_implementation("sdpa" if is_packed(before) else before)
        notes = (f"padded rows, which are slower, because packed ones do not work here: {reason}",)
    check_forward(model, pack=False, share_prompt=False, bf16=bool(settings.bf16))
    return False, notes


def _run_pairs(
    model: nn.Module,
    store: PairStore,
    stored: Sequence[TokenPair],
    settings: Recipe,
    packed: bool,
    batch_pairs: int,
    device: torch.device,
    console: Console,
) -> list[PairRecord]:
    """Log-probs of every pair, in the order of the store."""

    def forward(batch: PackedPairs) -> PairLogps:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bf16):
            return compute_pair_logps(model, batch, chunk_size=settings.logits_chunk_size)

    layout = {"pairs_per_batch": batch_pairs, "pack": packed, "share_prompt": packed}
    with progress_bar(console, "evaluating", len(stored)) as advance:
        alone = Mesh(MeshSizes(), device=device)
        sums = pair_sums(forward, store, **layout, mesh=alone, advance=advance).tolist()
    lengths = store.response_lengths.tolist()
    return [PairRecord(pair.row_id, *sums[i], *lengths[i]) for i, pair in enumerate(stored)]


def _generate(
    model: nn.Module,
    tokenizer: Any,
    store: PairStore,
    stored: Sequence[TokenPair],
    max_new_tokens: int,
    batch_size: int,
    console: Console,
) -> tuple[Generation, ...]:
    """Greedy answers to the prompts of some pairs, the store's first ones."""
    generations = []
    with progress_bar(console, "answering", len(stored)) as advance:
        for start in range(0, len(stored), batch_size):
            part = stored[start : start + batch_size]
            prompts = [pair.prompt_ids for pair in part]
            responses = generate_greedy(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
            for index, (pair, response) in enumerate(zip(part, responses, strict=True), start=start):
                has_text = "prompt_text" in store.dataset.column_names
                prompt = store.dataset[index]["prompt_text"] if has_text else tokenizer.decode(pair.prompt_ids)
                tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
                generations.append(Generation(pair.row_id, prompt, response, len(tokens), repeated_share(tokens)))
            advance(len(part))
    return tuple(generations)
