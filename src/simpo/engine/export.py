"""The final model as others load it: Hugging Face safetensors, tokenizer, generation config and a model card.

Must not import data, train or evaluate.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from simpo.engine.checkpoint import replace_folder, sync_tree
from simpo.engine.model import plain_attention, unwrap
from simpo.engine.sharding import on_one_process, whole_state_dict

if TYPE_CHECKING:
    from simpo.engine.mesh import Mesh
    from simpo.recipe import Recipe


def save_model(
    model: nn.Module,
    tokenizer: Any,
    recipe: Recipe,
    folder: Path,
    *,
    dtype: torch.dtype,
    data: Mapping[str, Any],
    results: Mapping[str, float],
    mesh: Mesh,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; whole or not at all. Every process calls it.

    Args:
        model: full weights, or a PEFT model, of which the adapters are saved with their base's name.
        tokenizer: saved with its chat template.
        recipe: recorded in the model card.
        folder: replaced if it exists.
        dtype: of the saved weights; usually the one the base model came in.
        data: what it was trained on, for the card.
        results: evaluation metrics, for the card.
        mesh: the run's processes; the first one puts the shards together and writes.
    """
    state = whole_state_dict(model, keep=mesh.is_main, dtype=dtype)
    mesh.on_main(lambda: write_model(model, state, tokenizer, recipe, folder, dtype=dtype, data=data, results=results))


def write_model(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    recipe: Recipe,
    folder: Path,
    *,
    dtype: torch.dtype,
    data: Mapping[str, Any],
    results: Mapping[str, float],
) -> None:
    """As `save_model`, by one process alone, with weights that were put together already.

    Args:
        state: the model's whole state dict, in the dtype to save.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    base = unwrap(model)
    with plain_attention(model), on_one_process(base), _no_bars():
        model.save_pretrained(aside, state_dict=state)
    _record_dtype(aside / "config.json", dtype)
    tokenizer.save_pretrained(aside)
    if base.generation_config is not None:
        base.generation_config.save_pretrained(aside)
    (aside / "README.md").write_text(build_model_card(recipe, data=data, results=results), encoding="utf-8")
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


def _record_dtype(path: Path, dtype: torch.dtype) -> None:
    """save_pretrained writes the dtype of the model in memory; the files hold another. Adapters have no config.json."""
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
