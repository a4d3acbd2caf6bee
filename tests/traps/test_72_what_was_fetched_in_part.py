"""Trap 72: a model fetched in part, a pointer in place of a file, a folder without a tokenizer ended in a traceback, or
in a line that named neither the folder nor what was wrong with it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpo.model.load import load_model, load_tokenizer
from simpo.recipe import load_recipe


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put_a_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def lose_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))


def cut_the_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")


def leave_no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, r"cannot load the model '.*broken': a .safetensors file is damaged, or was fetched in part"),
        (put_a_pointer, r"cannot load the model '.*broken': a .safetensors file is damaged, or was fetched in part"),
        (
            lose_a_weight,
            r"'.*broken' lacks 1 of the weights of LlamaForCausalLM, such as model.norm.weight, which would",
        ),
        (widen, r"cannot load the model '.*broken': its weights have other shapes than its config.json says"),
        (cut_the_tokenizer, r"cannot load the tokenizer '.*broken': one of its .json files is damaged"),
        (leave_no_tokenizer, r"cannot load the tokenizer '.*broken': the folder has none; give tokenizer_name_or_path"),
    ],
)
def test_it_is_one_line_that_names_the_folder_and_the_fault(
    damage: Callable[[Path], None], says: str, tiny_model: Path, tmp_path: Path
):
    folder = shutil.copytree(tiny_model, tmp_path / "broken")
    damage(folder)
    recipe = load_recipe({"model_name_or_path": str(folder), "bf16": False})
    load = load_tokenizer if "tokenizer" in says else functools.partial(load_model, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=says) as error:
        load(recipe)
    assert "\n" not in str(error.value)
