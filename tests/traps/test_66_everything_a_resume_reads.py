"""Trap 66: what a resume reads outside the digest (progress, random numbers, an optimizer's settings) is taken as it
is, states of the wrong type end in a traceback, and a damaged newest checkpoint leaves its user without the next step.
"""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from typer.testing import CliRunner

from simpo.cli import app
from simpo.display import Display
from simpo.hosts.hf import run_recipe
from simpo.recipe import load_recipe
from simpo.run.digest import record_files
from simpo.run.saved import TRAINERS, Checkpoint, list_checkpoints
from simpo.trainer import Trainer

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def run(tiny_recipe: Settings, kept: Path) -> Path:
    """A run of ten steps with checkpoints after 4, 8 and 10."""
    return _finished(tiny_recipe, kept / "native", lambda recipe: Trainer(recipe, display=Display(quiet=True)).run())


@pytest.fixture
def hosted(tiny_recipe: Settings, kept: Path) -> Path:
    """The same by transformers' Trainer."""
    return _finished(tiny_recipe, kept / "hosted", run_recipe)


def _finished(settings: Settings, original: Path, start: Callable[[Any], Any]) -> Path:
    folder = Path(settings["output_dir"])
    if not original.exists():
        start(load_recipe(settings))
        shutil.copytree(folder, original)
    else:
        shutil.copytree(original, folder)
        load_recipe(settings).save(folder / "recipe.yaml")
    return folder


def resume(settings: Settings) -> str:
    """The error of resuming."""
    with pytest.raises(ValueError, match=r"\S") as caught:
        Trainer(load_recipe({**settings, "resume_from_checkpoint": True}), display=Display(quiet=True))
    message = str(caught.value)
    assert "\n" not in message
    return message


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def advice(run: Path, step: int) -> str:
    recipe, folder = run / "recipe.yaml", run / "checkpoints" / f"step-{step}"
    return f"step-{step} is the newest whole one; go on from it: simpo train {recipe} --resume_from_checkpoint {folder}"


@pytest.mark.parametrize("place", [0.2, 0.9])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "rng-0.json", "files.json", "tensors/.metadata", "tensors/__0_0.distcp"]
)
def test_a_flipped_bit_is_found_and_the_newest_whole_checkpoint_is_named(
    tiny_recipe: Settings, run: Path, name: str, place: float
) -> None:
    flip(run / "checkpoints" / "step-10" / name, place)
    message = resume(tiny_recipe)
    assert message.startswith((f"checkpoint {run}/checkpoints/step-10 ", f"{run}/checkpoints/step-10 is not"))
    assert message.endswith(advice(run, 8))


def test_the_command_that_is_named_goes_on(tiny_recipe: Settings, run: Path) -> None:
    flip(run / "checkpoints" / "step-10" / "tensors" / "__0_0.distcp")
    (run / "checkpoints" / "step-8" / "rng-0.json").unlink()
    weights = (run / "model" / "model.safetensors").read_bytes()
    message = resume(tiny_recipe)
    assert message.endswith(advice(run, 4))
    words = shlex.split(message.partition("go on from it: simpo ")[2])
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_a_checkpoint_that_is_named_is_whole_to_its_last_tensor(tiny_recipe: Settings, run: Path) -> None:
    for step in (4, 8, 10):
        flip(run / "checkpoints" / f"step-{step}" / "tensors" / "__0_0.distcp")
    assert resume(tiny_recipe).endswith(f"no other one in {run}/checkpoints is whole: start anew in another output_dir")


def test_settings_of_the_optimizer_are_digested(tiny_recipe: Settings, run: Path) -> None:
    """They lie among the tensors, and are no tensors: here the second beta is another one."""
    checkpoint = run / "checkpoints" / "step-10"
    whole = checkpoint / "whole"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(checkpoint / "tensors", whole)
        state = torch.load(whole)
        betas = {name: (0.9, 0.5) for name in state["optimizer"] if name.endswith(".betas")}
        assert betas
        state["optimizer"].update(betas)
        shutil.rmtree(checkpoint / "tensors")
        torch.distributed.checkpoint.save(state, checkpoint_id=checkpoint / "tensors")
    whole.unlink()
    record_files(checkpoint)
    message = resume(tiny_recipe)
    assert "step-10 is damaged: optimizer: betas is not as it was saved; " in message
    assert message.endswith(advice(run, 8))


WRONG = [
    ("progress", [], "progress: Input should be a valid dictionary"),
    ("progress", {"step": "ten"}, "progress: step: Input should be a valid integer"),
    ("progress", {"step": 10, "last_eval": [1]}, "progress: last_eval: Input should be a valid dictionary"),
    ("window", {"sums": 3}, "window.sums: Input should be a valid dictionary"),
    ("window", {}, "window.sums: Field required"),
    ("recipe", None, "recipe: Input should be a valid dictionary"),
    ("step", "10", "step: Input should be a valid integer"),
    ("mesh", 7, "mesh: Input should be a valid string"),
    ("digest", [], "digest: Input should be a valid dictionary"),
    ("digest", {}, "its tensors are not the ones that were saved"),
    ("total_steps", None, "total_steps: Input should be a valid integer"),
    ("max_tokens_per_micro_batch", "many", "max_tokens_per_micro_batch: Input should be a valid integer"),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG, ids=lambda value: str(value)[:20])
def test_states_of_the_wrong_type_are_one_line(
    tiny_recipe: Settings, run: Path, key: str, value: Any, said: str
) -> None:
    checkpoint = run / "checkpoints" / "step-10"
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    record_files(checkpoint)
    assert f"step-10 is damaged: {said}" in resume(tiny_recipe)


@pytest.mark.parametrize("value", [{}, [], None, "python", {"python": 1, "numpy": 2, "torch": "x", "cuda": 0}], ids=str)
def test_random_number_states_of_the_wrong_type_are_one_line(tiny_recipe: Settings, run: Path, value: Any) -> None:
    checkpoint = run / "checkpoints" / "step-10"
    (checkpoint / "rng-0.json").write_text(json.dumps(value))
    record_files(checkpoint)
    assert "step-10 is damaged: its random-number states are none (" in resume(tiny_recipe)


def test_a_state_that_is_no_object_is_one_line(tiny_recipe: Settings, run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-10"
    (checkpoint / "trainer_state.json").write_text("[1]")
    record_files(checkpoint)
    assert "step-10 is not a complete checkpoint: " in resume(tiny_recipe)


def test_a_later_format_asks_for_an_update_and_for_nothing_else(tiny_recipe: Settings, run: Path) -> None:
    path = run / "checkpoints" / "step-10" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert resume(tiny_recipe).endswith("update simpo")


# --- the Hugging Face host -------------------------------------------------------------------------------------------


def test_every_file_of_the_trainers_checkpoints_is_digested(tiny_recipe: Settings, hosted: Path) -> None:
    (*_, newest) = list_checkpoints(hosted / "checkpoints", TRAINERS)
    names = sorted(path.relative_to(newest.folder) for path in newest.folder.rglob("*") if path.is_file())
    assert {"simpo.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(
        map(str, names)
    )
    for name in names:
        _is_refused(tiny_recipe, hosted, newest, name)


def _is_refused(settings: Settings, run: Path, newest: Checkpoint, name: Path) -> None:
    whole = (newest.folder / name).read_bytes()
    flip(newest.folder / name)
    with pytest.raises(ValueError, match="checkpoint-10") as caught:
        run_recipe(load_recipe({**settings, "resume_from_checkpoint": True}))
    (newest.folder / name).write_bytes(whole)
    words = (
        f"accelerate launch -m simpo train {run}/recipe.yaml --resume_from_checkpoint {run}/checkpoints/checkpoint-8"
    )
    assert str(caught.value).endswith(f"; checkpoint-8 is the newest whole one; go on from it: {words}"), name
    assert "\n" not in str(caught.value)


def test_the_trainers_checkpoints_from_before_are_resumed(tiny_recipe: Settings, hosted: Path) -> None:
    (*_, newest) = list_checkpoints(hosted / "checkpoints", TRAINERS)
    path = newest.folder / "simpo.json"
    state = json.loads(path.read_text())
    del state["files"], state["digest"]
    path.write_text(json.dumps(state))
    run_recipe(load_recipe({**tiny_recipe, "resume_from_checkpoint": True}))
