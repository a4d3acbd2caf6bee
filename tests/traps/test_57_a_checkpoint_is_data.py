"""Trap 57: a checkpoint is code: a pickle in it runs before anything is checked. Here it is refused, unrun."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mesh_runs import error_of, train_and_save
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from simpo.display import Display
from simpo.hosts.hf import run_recipe
from simpo.recipe import load_recipe
from simpo.run import reference
from simpo.run.checkpoint import load_checkpoint
from simpo.run.digest import record_files
from simpo.run.plain import NotData, only_data
from simpo.run.saved import list_checkpoints, seal
from simpo.trainer import Trainer

Settings = dict[str, Any]
REPO = Path(__file__).resolve().parents[2]
SAID = r"checkpoint \S+ names \S+ where only data belongs; nothing of it was run\. Resume from another one"


class Harm:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def harm(tmp_path: Path):
    """Something to put into files; the test fails if it was ever run."""
    yield Harm(tmp_path / "harmed")
    assert not (tmp_path / "harmed").exists()


def test_what_the_tests_put_into_files_does_run_where_pickles_are_trusted(tmp_path: Path) -> None:
    torch.save(Harm(tmp_path / "harmed"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "harmed").exists()


# --- the native trainer ----------------------------------------------------------------------------------------------


def in_the_index(checkpoint: Path, harm: Harm) -> None:
    (checkpoint / "tensors" / ".metadata").write_bytes(pickle.dumps(harm))


def beside_the_tensors(checkpoint: Path, harm: Harm) -> None:
    _rewrite(checkpoint, lambda state: state["optimizer"].update(dict.fromkeys(_plain_values(state), harm)))


def instead_of_a_tensor(checkpoint: Path, harm: Harm) -> None:
    _rewrite(checkpoint, lambda state: state["model"].update(dict.fromkeys(state["model"], harm)))


def _plain_values(state: dict[str, Any]) -> list[str]:
    found = [name for name, value in state["optimizer"].items() if not isinstance(value, torch.Tensor)]
    assert found
    return found


def _rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    whole = checkpoint / "whole"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(checkpoint / "tensors", whole)
        state = torch.load(whole, weights_only=False)
        change(state)
        shutil.rmtree(checkpoint / "tensors")
        torch.distributed.checkpoint.save(state, checkpoint_id=checkpoint / "tensors")
    whole.unlink()


@pytest.fixture
def saved(tiny_recipe: Settings) -> Path:
    """A checkpoint after a step."""
    return Path(train_and_save(tiny_recipe, 1)["folder"])


@pytest.mark.parametrize("place", [in_the_index, beside_the_tensors, instead_of_a_tensor])
def test_code_in_a_checkpoint_is_refused_though_its_digests_are_right(
    tiny_recipe: Settings, saved: Path, harm: Harm, two_ranks: Any, place: Callable[[Path, Harm], None]
) -> None:
    place(saved, harm)
    record_files(saved)
    settings = {**tiny_recipe, "output_dir": f"{tiny_recipe['output_dir']}-resumed"}
    with pytest.raises(NotData, match=SAID):
        Trainer(load_recipe({**settings, "resume_from_checkpoint": str(saved)}), display=Display(quiet=True))
    if place is not instead_of_a_tensor:
        for kind, text in two_ranks.run(error_of, {**settings, "gradient_accumulation_steps": 1}, str(saved)):
            assert kind in ("NotData", "ValueError"), text
            assert "where only data belongs; nothing of it was run" in text


def test_the_weights_of_the_best_checkpoint_are_data_too(tiny_recipe: Settings, saved: Path, harm: Harm) -> None:
    settings = {**tiny_recipe, "output_dir": f"{tiny_recipe['output_dir']}-other"}
    trainer = Trainer(load_recipe(settings), display=Display(quiet=True))
    (checkpoint,) = list_checkpoints(saved.parent)
    load_checkpoint(checkpoint, model=trainer.model, mesh=trainer.mesh)
    instead_of_a_tensor(saved, harm)
    record_files(saved)
    with pytest.raises(NotData, match=SAID):
        load_checkpoint(checkpoint, model=trainer.model, mesh=trainer.mesh)


def test_digests_come_first(tiny_recipe: Settings, saved: Path, harm: Harm) -> None:
    in_the_index(saved, harm)
    with pytest.raises(ValueError, match=r"is damaged: tensors/\.metadata is not as it was saved"):
        Trainer(load_recipe({**tiny_recipe, "resume_from_checkpoint": True}), display=Display(quiet=True))


def test_no_pickle_is_ours(saved: Path) -> None:
    """All but torch.distributed.checkpoint's own files is JSON."""
    for path in saved.iterdir():
        if path.is_file():
            json.loads(path.read_text(encoding="utf-8"))
    assert {path.name for path in (saved / "tensors").iterdir()} == {".metadata", "__0_0.distcp"}


# --- checkpoints of earlier formats, which have pickles --------------------------------------------------------------


@pytest.mark.parametrize(("run", "file"), [("native-1", "rng-0.pt"), ("native-1", "tensors/.metadata")])
def test_code_in_an_old_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Harm, run: str, file: str
) -> None:
    fixtures = REPO / "tests" / "fixtures" / "checkpoints"
    shutil.copytree(fixtures / "inputs", tmp_path / "old")
    with tarfile.open(fixtures / "format-0" / f"{run}.tar.xz") as archive:
        archive.extractall(tmp_path / "old", filter="data")
    path = tmp_path / "old" / "run" / "checkpoints" / "step-5" / file
    path.write_bytes(pickle.dumps(harm)) if file.endswith("data") else torch.save({"python": harm}, path)
    monkeypatch.chdir(tmp_path / "old")
    recipe = yaml.safe_load(Path("recipe.yaml").read_text()) | {"resume_from_checkpoint": True}
    with pytest.raises(NotData, match=SAID):
        Trainer(load_recipe(recipe), display=Display(quiet=True))


# --- the Hugging Face host -------------------------------------------------------------------------------------------


@pytest.fixture
def of_the_trainer(tiny_recipe: Settings) -> Path:
    settings = {**tiny_recipe, "max_steps": 2, "save_steps": 1}
    run_recipe(load_recipe(settings))
    return Path(settings["output_dir"], "checkpoints", "checkpoint-1")


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_of_the_trainer_does_not_run(
    tiny_recipe: Settings, of_the_trainer: Path, harm: Harm, file: str
) -> None:
    torch.save({"state": harm, "python": harm}, of_the_trainer / file)
    state = json.loads((of_the_trainer / "simpo.json").read_text())
    seal(of_the_trainer, {name: value for name, value in state.items() if name not in ("files", "digest")})
    keys = {"max_steps": 2, "save_steps": 1, "resume_from_checkpoint": str(of_the_trainer)}
    with pytest.raises(ValueError, match=SAID):
        run_recipe(load_recipe({**tiny_recipe, **keys}))


def test_what_engines_read_with_trust_is_read_without_it(tmp_path: Path, harm: Harm) -> None:
    """DeepSpeed's `torch.load(weights_only=False)`, and the index of FSDP's shards."""
    torch.save({"module": harm}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(NotData, match=SAID), only_data(tmp_path):
        torch.load(tmp_path / "mp_rank_00_model_states.pt", weights_only=False)
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    in_file = tmp_path / "pytorch_model_fsdp_0" / ".metadata"
    in_file.write_bytes(pickle.dumps(harm))
    with pytest.raises(NotData, match=SAID), only_data(tmp_path):
        raise AssertionError("read")
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_user_who_has_switched_the_restriction_off_is_protected_here(
    tmp_path: Path, harm: Harm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(harm, tmp_path / "file.pt")
    with pytest.raises(NotData, match=SAID), only_data(tmp_path):
        torch.load(tmp_path / "file.pt")
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


# --- other files that are read ---------------------------------------------------------------------------------------


def test_cached_log_probs_are_numbers(tmp_path: Path, harm: Harm, capsys: pytest.CaptureFixture[str]) -> None:
    content = io.BytesIO()
    np.save(content, np.array([[harm, harm]], dtype=object), allow_pickle=True)
    digest = hashlib.blake2b(content.getvalue(), digest_size=16).digest()
    (tmp_path / "cached").write_bytes(content.getvalue() + digest)
    assert reference._read(tmp_path / "cached", 1) is None
    assert "allow_pickle" in capsys.readouterr().err


def test_every_reader_of_pickles_in_the_package_is_known() -> None:
    """A new one has to be looked at: is what it reads a file that somebody else may have written?"""
    found = set()
    for path in (REPO / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in READERS:
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert safe.get("allow_pickle", "False") == "False"
                assert safe.get("weights_only", "True") == "True"
                found.add((path.name, ast.unparse(node.func)))
    between_own_processes = {("workers.py", "pickle.load"), ("backends.py", "pickle.loads")}
    own_file_without_a_name = {("rows.py", "pickle.load")}
    under_only_data = {("checkpoint.py", "dcp.load"), ("checkpoint.py", "torch.load"), ("saved.py", "dcp.load")}
    arrays_alone = {("reference.py", "np.load")}
    assert found == between_own_processes | own_file_without_a_name | under_only_data | arrays_alone


READERS = {"pickle.load", "pickle.loads", "torch.load", "dcp.load", "np.load", "joblib.load", "pickle.Unpickler"}
