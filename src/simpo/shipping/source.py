"""What a name given to `simpo chat`, `merge`, `export` or `push` stands for, and its weights and tokenizer.

A run directory, a checkpoint of either host, a folder with a model or an adapter, or a name on the hub. Must not import
the trainer or the hosts.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from simpo.data.templates import NO_TEMPLATE, install_chat_template
from simpo.evaluation.run import READ_KEYS, base_model, find_tokenizer, model_folder
from simpo.model.load import (
    add_adapters,
    load_pretrained,
    load_tokenizer,
    lora_config,
    naming_what_is_loaded,
    quantization_options,
    quiet_peft,
)
from simpo.parallel.mesh import Mesh, MeshSizes
from simpo.recipe import KEYS, Recipe, load_recipe
from simpo.run.checkpoint import load_checkpoint
from simpo.run.saved import NATIVE, STATE_FILE, TRAINERS, Checkpoint, list_checkpoints

_OF_ADAPTERS = frozenset(name for name, key in KEYS.items() if key.section == "lora")


@dataclass(frozen=True)
class Source:
    """A model by any of its names.

    Attributes:
        name: as it was given.
        folder: what `from_pretrained` takes; None for a checkpoint of the native trainer.
        checkpoint: the checkpoint that it is, of either host; None for any other folder or name.
        run: the run directory that it belongs to, if any.
        base: the model that it was trained from; its own name where that is not known.
        recipe: the run's, or the defaults, with overrides; `model_name_or_path` is `base`.
        base_tokenizer: where training took the tokenizer from, if not from `base`.
    """

    name: str
    folder: str | None
    checkpoint: Checkpoint | None
    run: Path | None
    base: str
    recipe: Recipe
    base_tokenizer: str | None = None

    @property
    def is_training_state(self) -> bool:
        """Whether its folder, whatever it is called, holds what only a trainer reads: an optimizer's state, say."""
        return self.folder is None or self.training_file is not None

    @property
    def training_file(self) -> Path | None:
        """One of those files, by its path in the folder; None where there is none."""
        folder, pattern = Path(self.folder or ""), rf"optimizer[._].*|.*optim_states\.pt|{TRAINERS.state_file}"
        found = (path for path in sorted(folder.rglob("*")) if re.fullmatch(pattern, path.name))
        return next((path.relative_to(folder) for path in found), None)

    @property
    def is_final(self) -> bool:
        """Whether it is the model that a run ended with."""
        return self.run is not None and self.place.resolve().name == "model"

    @property
    def is_adapter(self) -> bool:
        if self.folder is None:
            return self.recipe.use_peft
        return base_model(self.folder) != self.folder

    @property
    def origin(self) -> str:
        """The whole model that its weights are stored like: its own folder, or the base of adapters and checkpoints."""
        return self.base if self.folder is None or self.is_training_state or self.is_adapter else self.folder

    @property
    def place(self) -> Path:
        """The folder, for names of what is made of it."""
        if self.folder is None and self.checkpoint is not None:
            return self.checkpoint.folder
        return Path(self.folder or "")

    @property
    def title(self) -> str:
        """What is made of it is called so: its run, for the model that ended one, or its folder."""
        place = self.run if self.run is not None and self.is_final else self.place
        return place.resolve().name

    @property
    def home(self) -> Path:
        """Where what is made of it goes by default: to its run, or next to its folder."""
        return self.run or (self.place.parent if self.place.is_dir() else Path())


def find_source(name: str, overrides: Sequence[str] = (), *, keys: Collection[str] = ()) -> Source:
    """What `name` stands for.

    Args:
        overrides: words of a command line, `--key value`.
        keys: of the recipe that the command reads besides those of model, data and adapters.
    Raises:
        ValueError: no such folder, or nothing in it that could be loaded.
    """
    folder, checkpoint, run = _find(name)
    own = run / "recipe.yaml" if run is not None else None
    if own is None or not own.is_file():
        if folder is None:
            raise ValueError(f"{name}: the checkpoint's run has no recipe.yaml, which says what model it is of")
        own = {"model_name_or_path": base_model(folder or name)}
    recipe = load_recipe(own, only=READ_KEYS | _OF_ADAPTERS | set(keys), processes=1)
    trained_with = recipe.tokenizer_name_or_path
    if folder is not None:  # they were saved with the model
        saved = ["chat_template"] if recipe.chat_template != NO_TEMPLATE else []
        saved += ["tokenizer_name_or_path"] if (Path(folder) / "tokenizer_config.json").is_file() else []
        recipe = load_recipe(recipe, dict.fromkeys(saved))
    recipe = load_recipe(recipe, overrides, only=READ_KEYS | _OF_ADAPTERS | set(keys), processes=1)
    return Source(name, folder, checkpoint, run, recipe.model_name_or_path, recipe, trained_with)


def _find(name: str) -> tuple[str | None, Checkpoint | None, Path | None]:
    """A model's folder or hub name, None for a native checkpoint; the checkpoint that it is; the run it belongs to."""
    path = Path(name)
    if not path.is_dir():
        if path.exists():
            raise ValueError(f"{name} is a file; give a run, a checkpoint, or a folder with a model or an adapter")
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(f"{name}: there is no such folder; give a run, a checkpoint, a model's folder or hub name")
        return name, None, None
    if (path / STATE_FILE).is_file() and (path / "tensors").is_dir():
        known = list_checkpoints(path.parent, NATIVE)
        checkpoint = next((each for each in known if each.folder.name == path.name), None)
        if checkpoint is None:
            raise ValueError(f"{name} is a checkpoint whose folder was renamed; a complete one is called step-N")
        return None, checkpoint, path.resolve().parent.parent
    folder = model_folder(name)
    if folder != name:
        return folder, None, path
    if any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        above, own = path.resolve().parent, path.resolve().name
        runs = [above] if own == "model" else [above.parent] if above.name == "checkpoints" else []
        step = _step_of(path.resolve())
        checkpoint = None if step is None else Checkpoint(path, step)
        return name, checkpoint, next((run for run in runs if (run / "recipe.yaml").is_file()), None)
    for kind in (NATIVE, TRAINERS):
        if found := list_checkpoints(path / "checkpoints", kind):
            return _find(str(found[-1].folder))
    raise ValueError(f"{name} holds no model, no adapter and no run with a model or a complete checkpoint")


def _step_of(folder: Path) -> int | None:
    """Of a Trainer's checkpoint: as its name says, or where it was renamed as its state does."""
    if named := re.fullmatch(rf"{TRAINERS.prefix}-(\d+)", folder.name):
        return int(named[1])
    if (folder / TRAINERS.state_file).is_file():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
            return step if isinstance(step, int) else None
    return None


def load_source_tokenizer(source: Source) -> Any:
    """Its tokenizer, with the chat template that it was trained with, or that is asked for."""
    asked = source.recipe.chat_template
    if source.folder is None:
        tokenizer = load_tokenizer(source.recipe)
        install_chat_template(tokenizer, asked)
        return tokenizer
    tokenizer = find_tokenizer(source.recipe, source.folder)
    if asked not in (None, NO_TEMPLATE):
        install_chat_template(tokenizer, asked)
    return tokenizer


def load_source(source: Source, *, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Its model in eval mode with plain attention, a PEFT model where it is adapters; never quantised.

    Raises:
        ValueError: it cannot be loaded, or a file of the checkpoint is not as it was saved.
    """
    if source.folder is not None:
        base = _load_base(source, base_model(source.folder), dtype=dtype)
        model: nn.Module = _with_adapter(base, source.folder) if source.is_adapter else base
    else:
        assert source.checkpoint is not None
        model = _load_native(source, source.checkpoint)
    return cast(model, device=device, dtype=dtype).eval()


def cast(model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with what is saved of it in another format; what it computes at its start, as rotary frequencies, stays
    fp32, as where it is loaded in that format."""
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None
    ]
    model.to(device=device, dtype=dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer.to(device)
    return model


def _load_base(source: Source, name: str, **options: Any) -> Any:
    dtype = {"dtype": getattr(torch, source.recipe.master_dtype)} | options
    return load_pretrained(AutoModelForCausalLM, name, source.recipe, what="model", **dtype)


def _with_adapter(base: nn.Module, folder: str) -> nn.Module:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(f"{folder} is an adapter, which needs peft: pip install 'simpo[peft]'") from error
    with quiet_peft(), naming_what_is_loaded("adapter", folder):
        return PeftModel.from_pretrained(base, folder)


def _load_native(source: Source, checkpoint: Checkpoint) -> nn.Module:
    """A checkpoint of the native trainer, from whatever mesh, in a model as it was trained."""
    recipe, cpu = source.recipe, torch.device("cpu")
    options = quantization_options(recipe, cpu) if recipe.load_in_4bit else {}
    model: nn.Module = _load_base(source, recipe.model_name_or_path, **options)
    if recipe.use_peft:
        model = add_adapters(model, lora_config(recipe), seed=recipe.seed)
    load_checkpoint(checkpoint, model=model, mesh=Mesh(MeshSizes(), device=cpu))
    if not recipe.load_in_4bit:
        return model
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    trained = get_peft_model_state_dict(model)
    model = add_adapters(_load_base(source, recipe.model_name_or_path), lora_config(recipe), seed=recipe.seed)
    set_peft_model_state_dict(model, trained)
    return model
