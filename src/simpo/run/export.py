"""The final model as others load it: Hugging Face safetensors, tokenizer, generation config and a model card; and what
writing it in a narrower number format does to it.

Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate.utils.other as unwrapping
import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from simpo.data.files import follow_umask, sync_tree
from simpo.errors import first_line
from simpo.model.attention import plain_attention, unwrap
from simpo.model.load import source_dtype
from simpo.model.settle import as_configured
from simpo.parallel.sharding import local_part, on_one_process
from simpo.run.checkpoint import replace_folder
from simpo.run.tracking import name_of

if TYPE_CHECKING:
    from simpo.display import Display
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe
    from simpo.run.leftovers import Leftovers


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
    parts = [local_part(tensor.detach()) for tensor in found]
    parts += [tensor.ds_tensor for tensor in found if hasattr(tensor, "ds_tensor")]  # ZeRO-3's share
    return [part for part in parts if part.is_floating_point()]


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
        weights: gives (name, tensor) of the trained weights, as they are when it is called.
    """

    def __init__(self, weights: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        self._weights = weights
        self._before = {name: _sample(tensor) for name, tensor in weights()}

    def count_moved(self, dtype: torch.dtype) -> Tensor:
        """How many weights training moved, and of how many `dtype` shows nothing of it: [2], fp64, on the CPU."""
        counts = torch.zeros(2, dtype=torch.float64)
        for name, tensor in self._weights():
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


def dtype_name(dtype: torch.dtype) -> str:
    """As recipes and config.json write it."""
    return str(dtype).removeprefix("torch.")


# --- writing ---------------------------------------------------------------------------------------------------------


def publish_model(
    model: nn.Module,
    weights: Iterable[tuple[str, Tensor | None]],
    tokenizer: Any,
    recipe: Recipe,
    folder: Path,
    *,
    leftovers: Leftovers | None,
    dtype: torch.dtype,
    untrained: WeightSample | None,
    data: Mapping[str, Any],
    results: Mapping[str, float],
    evaluate: Callable[[], Mapping[str, float]],
    mesh: Mesh,
    display: Display,
) -> dict[str, float]:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; whole or not at all. Every process calls it.

    Args:
        model: full weights, or a PEFT model, of which the adapters are saved with their base's name.
        weights: (name, whole tensor) of all that is saved, on the first process, read once; None on the others.
        tokenizer: saved with its chat template.
        recipe: recorded in the model card.
        folder: replaced if it exists.
        leftovers: what else belongs into it.
        dtype: of the saved weights, unless one is too large for it; see `export_dtype`.
        untrained: the trained weights as they were before; None = no longer known.
        data: what it was trained on, for the card.
        results: of the last evaluation, for the card.
        evaluate: that evaluation again; gives metrics that begin with "eval_saved_", perhaps among others.
    Returns:
        Metrics of the weights as they are written; empty where those are the ones that were evaluated.
    """
    held = saved_tensors(model)
    if any(mesh.gather(overflows(held, dtype))):
        display.say(f"save_dtype: a weight is too large for {dtype_name(dtype)}; the model is written in float32")
        dtype = torch.float32
    elif untrained is not None:
        counts = mesh.sum_over_all(untrained.count_moved(dtype).to(mesh.device))
        if (line := describe_loss_by_rounding(counts, dtype)) is not None:
            display.say(line)
    state = {}
    for name, value in weights:  # narrowed one by one, so that no whole model is there in fp32
        if mesh.is_main and value is not None:
            narrow = value.detach().to(dtype) if value.is_floating_point() else value
            state[name] = narrow if narrow.dtype == value.dtype else narrow.cpu()
    tie(state, model)
    card = build_model_card(recipe, data=data, results=results)
    mesh.on_main(lambda: write_model(model, state, tokenizer, folder, leftovers=leftovers, dtype=dtype, card=card))
    state.clear()
    if not results:
        return {}
    with as_saved(held, dtype) as changed:  # once the model is safe
        if not any(mesh.gather(changed)):
            return {}
        found = evaluate()
    found = {name: value for name, value in found.items() if name.startswith("eval_saved_")}
    display.say_evaluation(f"as written in {dtype_name(dtype)}", found, prefix="eval_saved")
    card = build_model_card(recipe, data=data, results={**results, **found})
    mesh.on_main(lambda: (folder / "README.md").write_text(card, encoding="utf-8"))
    return found


def create_repository(recipe: Recipe) -> str | None:
    """The hub's name of the repository that the model will be uploaded to, made if it is not there; None without one.

    Raises:
        ValueError: it cannot be made: found before training, rather than after it.
    """
    if not recipe.push_to_hub:
        return None
    name = recipe.hub_model_id or Path(recipe.output_dir or "model").resolve().name
    try:
        hub = HfApi(token=recipe.hub_token)
        return hub.create_repo(name, private=recipe.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:  # of the network, the hub, its login or the name: they have no class in common
        raise ValueError(f"push_to_hub: the repository {name!r} cannot be created: {first_line(error)}") from error


def upload_model(
    folder: Path, repository: str | None, recipe: Recipe, display: Display, *, card: str | None = None
) -> None:
    """Upload a complete model's folder, if there is a repository for it. One process calls it.

    Args:
        card: in place of the folder's README.md.
    Raises:
        OSError: it failed; says where the model is, and how to upload it.
    """
    if repository is None:
        return
    hub = HfApi(token=recipe.hub_token)
    try:
        message = f"Trained with simpo {version('simpo')}"
        own_card = None if card is None else ["README.md"]
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=own_card)
        if card is not None:
            name = {"path_in_repo": "README.md", "repo_id": repository}
            hub.upload_file(path_or_fileobj=card.encode(), commit_message=f"{message}: card", **name)
    except Exception as error:
        raise OSError(
            f"push_to_hub: the run is complete and its model is in {folder}, but uploading it to {repository} failed: "
            f"{first_line(error)}. To try again: hf upload {repository} {shlex.quote(str(folder))}"
        ) from error
    display.say(f"uploaded to {hub.endpoint}/{repository}")


def tie(state: dict[str, Tensor], model: nn.Module) -> None:
    """Give all names of a tied weight the tensor that its first name has: it is written once."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied_to = first.setdefault(id(parameter), name)
        if tied_to in state:
            state[name] = state[tied_to]


def write_model(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    tokenizer: Any,
    folder: Path,
    *,
    leftovers: Leftovers | None,
    dtype: torch.dtype,
    card: str,
) -> None:
    """Write a model's folder, whole or not at all; one process calls it.

    Args:
        state: its tensors by name, in `dtype`.
        leftovers, dtype: as in `publish_model`.
        card: its README.md.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    base = unwrap(model)
    with plain_attention(model), as_configured(model), on_one_process(base), saving_quietly():
        model.save_pretrained(aside, state_dict=state)
    if leftovers is not None:
        leftovers.add_to(aside)
    record_dtype(aside, dtype)
    tokenizer.save_pretrained(aside)
    if base.generation_config is not None:
        base.generation_config.save_pretrained(aside)
    (aside / "README.md").write_text(card, encoding="utf-8")
    follow_umask(aside)
    sync_tree(aside)
    replace_folder(aside, folder)


@contextlib.contextmanager
def saving_quietly() -> Iterator[None]:
    """Inside, `save_pretrained` shows no bar of its own, which would cut through the run's output, and leaves DeepSpeed
    alone: wherever it is installed, accelerate imports it to see whether the model is one of its engines, which takes
    seconds and prints warnings; without it in the process there is none."""
    transformers_logging.disable_progress_bar()
    is_available = unwrapping.is_deepspeed_available
    unwrapping.is_deepspeed_available = lambda: "deepspeed" in sys.modules and is_available()
    try:
        yield
    finally:
        unwrapping.is_deepspeed_available = is_available


def record_dtype(folder: Path, dtype: torch.dtype) -> None:
    """save_pretrained writes the dtype of the model in memory; the files hold another. Adapters have no config.json."""
    path = folder / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = dtype_name(dtype)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build_model_card(
    recipe: Recipe,
    *,
    data: Mapping[str, Any],
    results: Mapping[str, float] | Sequence[str],
    folder: Path | None = None,
) -> str:
    """Markdown with the metadata block that model hubs read: what was trained, on what, how, and what came out.

    Args:
        results: metrics, or lines that say them.
        folder: the run directory, where it may have been moved since.
    """
    base = recipe.model_name_or_path
    if isinstance(results, Mapping):
        rows = [f"| {key} | {value:.6g} |" for key, value in results.items()]
        results = ["| metric | value |", "|---|---|", *rows] if rows else ["No evaluation was run."]
    lines = [
        "---",
        *([] if Path(base).is_dir() else [f"base_model: {base}"]),  # the hub refuses a folder
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [simpo, preference-optimization]",
        "---",
        f"# {name_of(recipe, folder)}",
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
        *results,
        "",
        "## Recipe",
        "",
        "```yaml",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in recipe.to_dict().items()),
        "```",
        "",
        f"Trained with simpo {version('simpo')}.",
        "",
    ]
    return sign_card("\n".join(lines))


def sign_card(card: str) -> str:
    """With a comment by which `is_own_card` tells it from one that somebody has changed."""
    return f"{card}<!-- simpo's, as long as this is its digest: {_digest_of_card(card)} -->\n"


def is_own_card(card: str) -> bool:
    """Whether it is as simpo wrote it; versions before the comment ended, or began, always alike."""
    if found := re.search(r"<!-- simpo's, as long as this is its digest: (\w+) -->\n", card):
        return card.endswith(found[0]) and found[1] == _digest_of_card(card.removesuffix(found[0]))
    return bool(re.search(r"\nTrained with simpo \S+\.\s*\Z", card)) or card.startswith(PLAIN_CARD)


PLAIN_CARD = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [simpo]\n---\n"


def _digest_of_card(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()[:16]
