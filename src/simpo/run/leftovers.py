"""What a checkpoint holds and the class that trains does not load: vision towers, further prediction heads, and the
configuration and processors that belong to them. It goes into the final model as it is. Must not import data, the
trainer or evaluation.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from simpo.model.attention import unwrap
from simpo.parallel.sharding import original_class

_OF_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class Leftovers:
    """Parts of a checkpoint that a model does not hold."""

    tensors: dict[str, Path]  # name -> the safetensors file that it is in
    files: tuple[Path, ...]  # the checkpoint's configuration, and those of its processors
    loaded_as: str  # the class that does not load them
    parts: tuple[str, ...]  # what the tensors belong to, for people

    def __str__(self) -> str:
        shown = ", ".join(self.parts[:4]) + ", ..." * (len(self.parts) > 4)
        held = f"{len(self.tensors)} tensors ({shown})" if self.tensors else "a configuration"
        return (
            f"the checkpoint holds {held} that {self.loaded_as} does not have; not trained, they will be in the final "
            "model as they are"
        )

    def add_to(self, folder: Path) -> None:
        """Complete a model's folder, written by `save_pretrained`: all tensors, and the checkpoint's configuration."""
        for file in self.files:
            shutil.copyfile(file, folder / file.name)
        if not self.tensors:
            return
        written = sorted(folder.glob("model*.safetensors"))
        shards = [folder / f"model-{n:05d}-of-{len(written) + 1:05d}.safetensors" for n in range(1, len(written) + 2)]
        for file, shard in zip(written, shards, strict=False):
            file.replace(shard)
        tensors: dict[str, torch.Tensor] = {}
        for file in set(self.tensors.values()):
            with safe_open(file, framework="pt") as source:
                tensors |= {name: source.get_tensor(name) for name, place in self.tensors.items() if place == file}
        save_file(tensors, shards[-1], metadata={"format": "pt"})
        headers = {shard.name: _header(shard) for shard in shards}
        places = {name: shard for shard, header in headers.items() for name in header}
        size = sum(end - start for header in headers.values() for start, end in header.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def find_leftovers(model: nn.Module, name: str, *, revision: str | None = None) -> Leftovers | None:
    """What the checkpoint that a model was loaded from holds beside it; None = nothing, or it is not in safetensors.

    Args:
        model: as it was loaded; one with adapters leaves its base as it is, and nothing is missing.
        name, revision: of the checkpoint, a folder or on the hub.
    Raises:
        ValueError: its names do not tell what the model holds of it.
    """
    if hasattr(model, "peft_config"):
        return None
    base, own = unwrap(model), original_class(unwrap(model)).__name__
    source = _source_tensors(name, revision)
    held = _held_names(base)
    prefix = f"{base.base_model_prefix}."
    known = {short for each in held for short in (each, each.removeprefix(prefix))}
    tensors = {each: file for each, file in source.items() if each not in known}
    config = _find(name, "config.json", revision)
    kind = None if config is None else json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if not source or (not tensors and kind in (None, base.config.model_type)):
        return None
    tied = set(base.all_tied_weights_keys)
    unmatched = [each for each in held if each not in tied and not {each, each.removeprefix(prefix)} & source.keys()]
    if unmatched:
        raise ValueError(
            f"{name}: the checkpoint has {next(iter(tensors), 'a configuration')} and {own} has "
            f"{unmatched[0]}, each without the other; what the final model would lose of it cannot be told"
        )
    files = [config, *(_find(name, file, revision) for file in _OF_PROCESSORS)]
    return Leftovers(tensors, tuple(file for file in files if file is not None), own, _parts(tensors, known))


def _parts(tensors: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The largest modules that hold some of the tensors and none of the known ones, numbers left out."""
    shared = {name[:end] for name in known for end, letter in enumerate(name) if letter == "."}
    found = {}
    for name in tensors:
        ends = (end for end, letter in enumerate(f"{name}.") if letter == ".")
        part = next((name[:end] for end in ends if name[:end] not in shared), name)
        found[re.sub(r"\d+", "*", part)] = None
    return tuple(found)


def _held_names(base: Any) -> set[str]:
    """The names that the model's tensors have in its checkpoint."""
    state = {
        name: torch.empty(getattr(value, "ds_shape", value.shape), device="meta")
        for name, value in base.state_dict(keep_vars=True).items()
    }
    return set(revert_weight_conversion(base, state))


def _source_tensors(name: str, revision: str | None) -> dict[str, Path]:
    """Every tensor of a checkpoint, and the safetensors file that it is in; none where there are no such files."""
    index = _find(name, "model.safetensors.index.json", revision)
    if index is None:
        file = _find(name, "model.safetensors", revision)
        return {} if file is None else dict.fromkeys(_header(file), file)
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    files = {place: _find(name, place, revision) for place in set(places.values())}
    return {tensor: file for tensor, place in places.items() if (file := files[place]) is not None}


def _find(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a checkpoint that was loaded before: in its folder, or in the hub's cache."""
    quietly = {
        f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    found = cached_file(name, file, revision=revision or "main", **quietly)
    return None if found is None else Path(found)


def _header(file: Path) -> dict[str, tuple[int, int]]:
    """The tensors of a safetensors file and where their bytes are."""
    with file.open("rb") as source:
        entries: dict[str, Any] = json.loads(source.read(int.from_bytes(source.read(8), "little")))
    return {name: tuple(entry["data_offsets"]) for name, entry in entries.items() if name != "__metadata__"}
