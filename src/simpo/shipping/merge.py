"""`simpo merge`: adapters merged into their base, or any checkpoint, as one ordinary model folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from simpo.data.files import check_writable
from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run.export import dtype_name, export_dtype, overflows, tie, write_model
from simpo.run.leftovers import find_leftovers
from simpo.shipping.card import card_of
from simpo.shipping.source import Source, find_source, load_source, load_source_tokenizer

_APART = 1e-3  # nats; rounding in fp32 makes about 0.00001


def run_merge(name: str, overrides: Sequence[str] = (), *, output: str | None = None) -> Path:
    """Write the model that `name` stands for as an ordinary folder, and return that.

    Args:
        name: a run, a checkpoint or an adapter.
        overrides: recipe keys, such as `--save_dtype float32`.
        output: the folder; None = next to the model, with `-merged` behind its name.
    Raises:
        ValueError: there is nothing to merge, something would be overwritten, or the merged model would be another one.
    """
    source, display = find_source(name, overrides, keys={"save_dtype"}), Display()
    recipe = source.recipe
    if not source.is_adapter and not source.is_training_state and recipe.save_dtype == "auto":
        raise ValueError(
            f"{source.folder} is an ordinary model already: there is nothing to merge (with --save_dtype bfloat16, "
            "say, it is written again in that number format)"
        )
    own_name = "merged" if source.is_final else f"{source.place.name or source.title}-merged"
    folder = Path(output) if output is not None else source.home / own_name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already, and nothing is overwritten; choose another --output")
    check_writable(folder, "--output", is_folder=True)
    dtype = stored_dtype(source)
    tokenizer = load_source_tokenizer(source)
    model = load_source(source, device=torch.device("cpu"))
    if source.is_adapter:
        model, apart = merge_adapters(model)
        display.say(f"merged: log-probs differ from the adapters' own by {apart:.1g} nats at most")
    lost = write_folder(model, tokenizer, source, folder, dtype)
    display.say(f"{folder}: an ordinary model in {dtype_name(dtype)}, with its tokenizer")
    if not lost <= _APART:
        display.say(f"{_describe_rounding(lost, dtype)}; --save_dtype float32 keeps all of it", style="yellow")
    return folder


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype to write it in: `save_dtype`, or that of the files that its weights come from."""
    return export_dtype(load_recipe(source.recipe, {"model_name_or_path": source.origin}))


def merge_adapters(model: nn.Module) -> tuple[nn.Module, float]:
    """Adapters merged into their base, and how far its log-probs are from before, in nats.

    Raises:
        ValueError: farther than rounding explains.
    """
    before = _probe(model)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Input and output embeddings are no longer tied", category=UserWarning
        )
        merged: nn.Module = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    apart = (_probe(merged) - before).abs().max().item()
    if not apart <= _APART:
        raise ValueError(
            f"the merged model is another one: its log-probs differ by {apart:.3g} nats. Adapters on an embedding that "
            "the output head shares do that; use the adapters as they are"
        )
    return merged, apart


@torch.no_grad()
def _probe(model: nn.Module) -> Tensor:
    """Log-probs of some tokens after others."""
    size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = (torch.arange(1, 25) * 7919 % size)[None]
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def write_folder(model: nn.Module, tokenizer: object, source: Source, folder: Path, dtype: torch.dtype) -> float:
    """Write a whole model that has no adapters any more; it has the rounded values afterwards.

    Returns:
        How far rounding moves its log-probs, in nats.
    """
    leftovers = find_leftovers(model, source.origin, revision=source.recipe.model_revision)
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    if overflows(state.values(), dtype):
        raise ValueError(f"save_dtype: a weight is too large for {dtype_name(dtype)}; choose bfloat16 or float32")
    lost = 0.0
    if any(value.dtype != dtype for value in state.values()):
        before = _probe(model)
        for value in state.values():
            value.copy_(value.to(dtype))
        lost = (_probe(model) - before).abs().max().item()
    note = "" if lost <= _APART else f"Its weights were {_describe_rounding(lost, dtype)}; numbers are of those before."
    state = {**model.state_dict(), **{name: value.to(dtype) for name, value in state.items()}}
    tie(state, model)
    write_model(model, state, tokenizer, folder, leftovers=leftovers, dtype=dtype, card=card_of(source, note))
    return lost


def _describe_rounding(lost: float, dtype: torch.dtype) -> str:
    return f"written in {dtype_name(dtype)}, which changes log-probs by up to {lost:.2g} nats"
