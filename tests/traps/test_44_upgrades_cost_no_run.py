"""Trap 44: a checkpoint is refused after an upgrade of this package, over source bytes, a new key, field or metric."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

from simpo.data import cache
from simpo.data.cache import fingerprint_tokens
from simpo.display import Display
from simpo.onpolicy.journal import changed_settings
from simpo.recipe import load_recipe
from simpo.run.digest import record_files
from simpo.run.metrics import PAIR_METRICS
from simpo.run.saved import FORMAT
from simpo.trainer import Trainer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
RUNS = sorted(FIXTURES.glob("*/*.tar.xz"))  # see tests/fixtures/write_checkpoints.py
TIMES = {"step_time_s", "pairs_per_s", "memory_gib", "eval_time_s"}
OF_TRANSFORMERS = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def lines_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES | OF_TRANSFORMERS} for line in lines]


# --- checkpoints that earlier versions wrote ------------------------------------------------------------------------


def resume(folder: Path) -> str:
    """Resume the run in a folder from its checkpoint, on this process or with the others; what it said at the start."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        recipe = load_recipe(yaml.safe_load(Path("recipe.yaml").read_text()) | {"resume_from_checkpoint": True})
        if folder.name.startswith("hf"):
            from simpo.hosts.hf import run_recipe

            run_recipe(recipe)
            return ""
        display = Display(quiet=True)
        with display.console.capture() as said:
            display.console.quiet = False
            Trainer(recipe, display=display).run()
        return said.get()
    finally:
        os.chdir(before)


def place(run: Path, folder: Path) -> Path:
    """The run as it was when it was killed after its checkpoint, but for the lines of the log, which are all there."""
    folder = folder / run.name.partition(".")[0]
    shutil.copytree(FIXTURES / "inputs", folder)
    with tarfile.open(run) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_there_are_checkpoints_of_both_hosts_on_one_process_and_two() -> None:
    names = {f"{run.parent.name}/{run.name}" for run in RUNS}
    assert {f"format-0/{name}.tar.xz" for name in ("native-1", "native-2", "hf-1", "hf-2")} <= names


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name} {run.name}".partition(".")[0])
def test_a_checkpoint_of_an_earlier_version_goes_on_with_the_losses_it_had(
    run: Path, tmp_path: Path, two_ranks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place(run, tmp_path)
    before = lines_of(folder / "run" / "metrics.jsonl")
    said = two_ranks.run(resume, folder)[0] if folder.name.endswith("2") else resume(folder) + capsys.readouterr().out
    if run.parent.name == "format-0" and folder.name != "hf-2":  # whose ranks print where nothing listens
        assert "comes from an older simpo, which did not record the tokens of its data" in said.replace("\n", " ")
    after = lines_of(folder / "run" / "metrics.jsonl")
    if not any("eval_loss" in line for line in before):  # held-out pairs were not evaluated then
        after = [line for line in after if not any(name.startswith("eval_") for name in line)]
    assert len(after) == len(before)
    for ours, theirs in zip(after, before, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=2e-6)


def test_an_old_checkpoint_of_other_keys_or_another_number_of_pairs_is_refused(tmp_path: Path) -> None:
    folder = place(FIXTURES / "format-0" / "native-1.tar.xz", tmp_path)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "max_length": 47}))
    with pytest.raises(ValueError, match=r"other settings: max_length \(was 48, is 47\)"):
        resume(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    pairs = folder / "pairs" / "train.jsonl"
    pairs.write_text(pairs.read_text().partition("\n")[2])  # 12 pairs instead of 13
    with pytest.raises(ValueError, match=r"other settings: the training data"):
        resume(folder)


# --- what a later version adds --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_recipe_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a whole run that logs every third step."""
    settings = {**tiny_recipe_in(tmp_path_factory.mktemp("whole")), "logging_steps": 3}
    build(settings).run()
    return Path(settings["output_dir"])


@pytest.fixture
def saved(tiny_recipe: dict[str, Any], whole: Path) -> dict[str, Any]:
    """Settings of a copy of it, to be resumed from step 4."""
    settings = {**tiny_recipe, "logging_steps": 3}
    shutil.copytree(whole, settings["output_dir"])
    return {**settings, "resume_from_checkpoint": str(Path(settings["output_dir"], "checkpoints", "step-4"))}


def build(settings: dict[str, Any], **changes: Any) -> Trainer:
    return Trainer(load_recipe({**settings, **changes}), display=Display(quiet=True))


def edit(settings: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> None:
    path = Path(settings["resume_from_checkpoint"], "trainer_state.json")
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    record_files(path.parent)


def goes_on_as_before(settings: dict[str, Any]) -> None:
    """Resume; every logged number is the uninterrupted run's."""
    log = Path(settings["output_dir"], "metrics.jsonl")
    before = lines_of(log)
    build(settings).run()
    for ours, theirs in zip(lines_of(log), before, strict=True):
        assert {name: ours[name] for name in theirs} == theirs


def test_a_key_that_a_later_version_adds_has_its_default_in_older_checkpoints(saved: dict[str, Any]) -> None:
    edit(saved, lambda state: [state["recipe"].pop(key) for key in ("label_smoothing", "beta", "max_grad_norm")])
    with pytest.raises(ValueError, match=r"other settings: label_smoothing \(was 0.0, is 0.1\)"):
        build(saved, label_smoothing=0.1)
    goes_on_as_before(saved)


def test_a_field_of_the_progress_that_a_later_version_adds_has_its_default(
    saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import simpo.trainer

    later = [("answered", int, dataclasses.field(default=7))]
    progress = dataclasses.make_dataclass("Progress", later, bases=(simpo.trainer.Progress,))
    monkeypatch.setattr(simpo.trainer, "Progress", progress)
    assert build(saved).progress.answered == 7
    goes_on_as_before(saved)


def test_a_metric_that_a_later_version_adds_is_a_mean_over_the_pairs_since_then(
    saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 is saved and step 6 logged: the window is of steps 4 to 6, and the new metric of 5 and 6."""
    monkeypatch.setitem(PAIR_METRICS, "ones", lambda logps, loss, trained: torch.ones_like(trained))
    goes_on_as_before(saved)
    logged = [line for line in lines_of(Path(saved["output_dir"], "metrics.jsonl")) if "loss" in line]
    assert [line.get("ones") for line in logged] == [None, 1.0, 1.0, 1.0]


def test_what_a_later_version_drops_is_ignored_and_a_key_of_it_is_named(
    saved: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def add(state: dict[str, Any]) -> None:
        state["recipe"]["warmth"] = 3
        state["progress"]["answered"] = 7
        state["window"]["sums"]["ones"] = state["window"]["pairs"]["ones"] = 4

    edit(saved, add)
    goes_on_as_before(saved)
    Trainer(load_recipe(saved))
    assert "has recipe keys that this simpo lacks, which are ignored: warmth = 3" in capsys.readouterr().out


def test_a_checkpoint_of_a_newer_format_is_refused_by_one_line_with_both_versions(saved: dict[str, Any]) -> None:
    edit(saved, lambda state: state.update(format=FORMAT + 1, simpo="99.1"))
    line = rf"^\S+step-4 was written by simpo 99\.1 in checkpoint format {FORMAT + 1}; this is simpo \d\S+, which reads"
    with pytest.raises(ValueError, match=line):
        build(saved)


def test_a_newer_checkpoint_of_the_hugging_face_host_is_refused_too(tmp_path: Path) -> None:
    folder = place(FIXTURES / "format-0" / "hf-1.tar.xz", tmp_path)
    (identity,) = (folder / "run" / "checkpoints").glob("*/simpo.json")
    state = json.loads(identity.read_text())
    identity.write_text(json.dumps({**state, "format": FORMAT + 1, "simpo": "99.1"}))
    with pytest.raises(ValueError, match=rf"was written by simpo 99\.1 in checkpoint format {FORMAT + 1}"):
        resume(folder)


# --- the data is its tokens -----------------------------------------------------------------------------------------


def test_another_source_of_the_data_layer_or_another_folder_does_not_make_other_data(
    saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a comment had been added to data/ledger.py; and the files were moved."""
    monkeypatch.setattr(cache, "_fingerprint_code", lambda: "another version's")
    (folder,) = saved["dataset_mixer"]
    shutil.copytree(folder, tmp_path / "moved")
    goes_on_as_before({**saved, "dataset_mixer": {str(tmp_path / "moved"): 1.0}})


def test_other_tokens_are_other_data_and_the_key_that_makes_them_is_named(saved: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"system_prompt \(was None, is 'slow water'\); the training data"):
        build(saved, system_prompt="slow water")


PAIR = {"row_id": "a", "chosen_ids": [1, 2, 3], "chosen_start": 1, "rejected_ids": [1, 4], "rejected_start": 1}
OTHER = {**PAIR, "chosen_ids": [1, 5]}


def print_of(*pairs: dict[str, Any]) -> str:
    return fingerprint_tokens(datasets.Dataset.from_list(list(pairs)))


def test_the_fingerprint_is_of_tokens_boundaries_and_order_alone() -> None:
    first = print_of(PAIR, OTHER)
    assert (
        print_of({**PAIR, "row_id": "b", "prompt_text": "text"}, {**OTHER, "row_id": "c", "prompt_text": ""}) == first
    )
    parts = [datasets.Dataset.from_list([pair]) for pair in (PAIR, OTHER)]
    assert fingerprint_tokens(datasets.concatenate_datasets(parts)) == first  # however Arrow cuts them
    assert fingerprint_tokens(datasets.Dataset.from_list([OTHER, PAIR]).select([1, 0])) == first
    token, start = {**PAIR, "chosen_ids": [1, 2, 4]}, {**PAIR, "rejected_start": 2}
    boundary = ({**PAIR, "chosen_ids": [1, 2]}, {**OTHER, "chosen_ids": [3, 1, 5]})
    prints = [first, print_of(OTHER, PAIR), print_of(PAIR), print_of(token, OTHER), print_of(start, OTHER)]
    assert len({*prints, print_of(*boundary)}) == len(prints) + 1
    none, some = {"chosen_gaps": [], "rejected_gaps": []}, {"chosen_gaps": [2, 3], "rejected_gaps": []}
    without = [datasets.Dataset.from_list([{**PAIR, **none}, {**OTHER, **none}]), [{**PAIR, **some}, {**OTHER, **none}]]
    types = without[0].cast_column("chosen_gaps", datasets.List(datasets.Value("int32")))
    types = types.cast_column("rejected_gaps", datasets.List(datasets.Value("int32")))
    assert fingerprint_tokens(types) == first
    assert print_of(*without[1]) != first


def test_a_key_that_a_later_version_adds_changes_nothing_while_it_is_off() -> None:
    """Of what generate, score, rounds, judge and sweep have begun."""
    before = {"recipe": {"beta": 2.0}, "generate": {"seed": 1}}
    for off in (None, False, 0, "", []):
        now = {"recipe": {"beta": 2.0, "wpo_weights": off}, "generate": {"seed": 1, "new": off}}
        assert changed_settings(before, now) == ""
    assert changed_settings(before, {**before, "recipe": {"beta": 2.0, "new": 3}}) == "recipe.new was None and is 3"
    assert changed_settings(before, {"generate": {"seed": 1}}) == "recipe.beta was 2.0 and is None"
