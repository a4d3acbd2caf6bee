"""The final model as others load it: Hugging Face safetensors, tokenizer, generation config and a model card; and what
writing it in a narrower number format does to it.

Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from simpo.model.attention import plain_attention, unwrap
from simpo.model.load import source_dtype
from simpo.parallel.sharding import local_part, on_one_process
from simpo.run.checkpoint import replace_folder, sync_tree

if TYPE_CHECKING:
    from simpo.display import Display
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe


# --- number formats --------------------------------------------------------------------------------------------------


def export_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype that the final model is written in: `save_dtype`, or that of the base model's own checkpoint."""
    return source_dtype(recipe) if recipe.save_dtype == "auto" else getattr(torch, recipe.save_dtype)


def saved_tensors(model: nn.Module) -> list[Tensor]:
    """This process's part of every floating-point tensor that the final model's files hold, each storage once.

    For a PEFT model these are the trained parameters; the base is not saved. ZeRO-3's partitions are among them.
    """
    if hasattr(model, "peft_config"):
        found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    else:
        found = list({id(value): value for value in model.state_dict(keep_vars=True).values()}.values())
    found += [tensor.ds_tensor for tensor in found if hasattr(tensor, "ds_tensor")]
    return [local_part(tensor.detach()) for tensor in found if tensor.numel() and tensor.is_floating_point()]


@contextlib.contextmanager
def as_saved(tensors: Iterable[Tensor], dtype: torch.dtype) -> Iterator[bool]:
    """Inside, tensors have the values that `dtype` leaves of them; afterwards their own again, bit for bit.

    Yields whether a value changed. What changes is kept meanwhile: as much memory as gradients take, so there should be
    none.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for tensor in tensors:
                rounded = tensor.to(dtype).to(tensor.dtype)
                if not torch.equal(rounded, tensor):
                    kept.append((tensor, tensor.clone()))
                    tensor.copy_(rounded)
        yield bool(kept)
    finally:
        with torch.no_grad():
            for tensor, own in kept:
                tensor.copy_(own)


def overflows(tensors: Iterable[Tensor], dtype: torch.dtype) -> bool:
    """Whether a value of this process is too large for `dtype`."""
    largest = torch.finfo(dtype).max
    return any(
        bool((tensor.abs() > largest).any()) for tensor in tensors if torch.finfo(tensor.dtype).max > largest * 2
    )


_SAMPLE = 4096  # values of each weight: with 200 weights a share is known to 0.1%


class WeightSample:
    """Some values of each trained weight before training, to tell how much of the training the files will show.

    Args:
        named: (name, tensor) of trained weights, before the first step.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._before = {name: _sample(tensor) for name, tensor in named}

    def count_moved(self, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Tensor:
        """How many weights training moved, and of how many `dtype` shows nothing of it: [2], fp64, on the CPU.

        Args:
            named: the same tensors after training, not rounded.
        """
        counts = torch.zeros(2, dtype=torch.float64)
        for name, tensor in named:
            before = self._before.get(name)
            if before is None or not before.numel():
                continue
            after = _sample(tensor)
            moved = after != before
            lost = moved & (after.to(dtype) == before.to(dtype))
            counts += torch.stack([moved.sum(), lost.sum()]).double() * (tensor.numel() / before.numel())
        return counts


def _sample(tensor: Tensor) -> Tensor:
    flat = local_part(tensor.detach()).reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].float().cpu().clone()


def describe_loss_by_rounding(counts: Tensor, dtype: torch.dtype) -> str | None:
    """A line for people where most of what training changed does not reach the files; None elsewhere."""
    moved, lost = counts.tolist()
    if not moved or lost / moved < 0.5:
        return None
    return (
        f"written in {dtype_name(dtype)}, {lost / moved:.1%} of the weights that training moved are as they were "
        "before it: it moved them by less than this format tells apart; save_dtype: float32 keeps them"
    )


def _settle_dtype(
    asked: torch.dtype,
    held: Iterable[Tensor],
    untrained: WeightSample | None,
    trained: Iterable[tuple[str, Tensor]],
    mesh: Mesh,
    display: Display,
) -> torch.dtype:
    """In which dtype to write; says what that costs the trained weights, or why it is not the one asked for."""
    if mesh.largest(overflows(held, asked)):
        display.say(f"save_dtype: a weight is too large for {dtype_name(asked)}; the model is written in float32")
        return torch.float32
    if untrained is not None:
        counts = untrained.count_moved(trained, asked)
        line = describe_loss_by_rounding(mesh.sum_over_all(counts.to(mesh.device)), asked)
        if line is not None:
            display.say(line)
    return asked


def dtype_name(dtype: torch.dtype) -> str:
    """As recipes and config.json write it."""
    return str(dtype).removeprefix("torch.")


# --- writing ---------------------------------------------------------------------------------------------------------


def publish_model(
    model: nn.Module,
    state_in: Callable[[torch.dtype], dict[str, Tensor]],
    tokenizer: Any,
    recipe: Recipe,
    folder: Path,
    *,
    asked: torch.dtype,
    held: Sequence[Tensor],
    untrained: WeightSample | None,
    trained: Iterable[tuple[str, Tensor]],
    data: Mapping[str, Any],
    results: Mapping[str, float],
    evaluate: Callable[[], Mapping[str, float]],
    mesh: Mesh,
    display: Display,
) -> dict[str, float]:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; whole or not at all. Every process calls it.

    Args:
        model: full weights, or a PEFT model, of which the adapters are saved with their base's name.
        state_in: gives the whole state dict in a dtype to the first process; every process calls it.
        tokenizer: saved with its chat template.
        recipe: recorded in the model card.
        folder: replaced if it exists.
        asked: dtype of the saved weights, unless one is too large for it; see `export_dtype`.
        held: what this process computes the saved weights from.
        untrained, trained: the trained weights before and after; None = the former are no longer known.
        data: what it was trained on, for the card.
        results: of the last evaluation, for the card.
        evaluate: that evaluation again; gives metrics that begin with "eval_saved_", perhaps among others.
    Returns:
        Metrics of the weights as they are written; empty where those are the ones that were evaluated.
    """
    dtype = _settle_dtype(asked, held, untrained, trained, mesh, display)
    state = state_in(dtype)
    mesh.on_main(lambda: _write_model(model, state, tokenizer, recipe, folder, dtype, data, results))
    state.clear()
    if not results:
        return {}
    with as_saved(held, dtype) as changed:  # once the model is safe
        if not mesh.largest(changed):
            return {}
        found = evaluate()
    found = {name: value for name, value in found.items() if name.startswith("eval_saved_")}
    display.say_evaluation(f"as written in {dtype_name(dtype)}", found, prefix="eval_saved")
    mesh.on_main(lambda: _write_card(folder, recipe, data, {**results, **found}))
    return found


def _write_model(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    recipe: Recipe,
    folder: Path,
    dtype: torch.dtype,
    data: Mapping[str, Any],
    results: Mapping[str, float],
) -> None:
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    base = unwrap(model)
    with plain_attention(model), on_one_process(base), _no_bars():
        model.save_pretrained(aside, state_dict=state)
    record_dtype(aside, dtype)
    tokenizer.save_pretrained(aside)
    if base.generation_config is not None:
        base.generation_config.save_pretrained(aside)
    _write_card(aside, recipe, data, results)
    sync_tree(aside)
    replace_folder(aside, folder)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """transformers' bar for writing files, which would cut through the run's own output."""
    active = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if active:
            transformers_logging.enable_progress_bar()


def record_dtype(folder: Path, dtype: torch.dtype) -> None:
    """save_pretrained writes the dtype of the model in memory; the files hold another. Adapters have no config.json."""
    path = folder / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = dtype_name(dtype)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_card(folder: Path, recipe: Recipe, data: Mapping[str, Any], results: Mapping[str, float]) -> None:
    (folder / "README.md").write_text(build_model_card(recipe, data=data, results=results), encoding="utf-8")


def build_model_card(recipe: Recipe, *, data: Mapping[str, Any], results: Mapping[str, float]) -> str:
    """Markdown with the metadata block that model hubs read: what was trained, on what, how, and what came out."""
    base = recipe.model_name_or_path
    header = ["---", f"base_model: {base}", "library_name: transformers", "pipeline_tag: text-generation"]
    header += ["tags: [simpo, preference-optimization]", "---"]
    name = recipe.run_name or Path(recipe.output_dir or "model").name
    lines = [
        *header,
        f"# {name}",
        "",
        f"`{base}` trained on preference pairs with simpo, loss `{recipe.loss_type}`"
        " ([SimPO](https://arxiv.org/abs/2405.14734)).",
        "",
        "## Data",
        "",
        *(f"- {key}: {value}" for key, value in data.items()),
        "",
        "## Results",
        "",
    ]
    if results:
        lines += ["| metric | value |", "|---|---|"]
        lines += [f"| {key} | {value:.6g} |" for key, value in results.items()]
    else:
        lines.append("No evaluation was run.")
    lines += ["", "## Recipe", "", "```yaml"]
    lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in recipe.to_dict().items()]
    return "\n".join([*lines, "```", ""])
