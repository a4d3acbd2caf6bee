"""Trap 56: a start on a folder that holds something (resumed with its checkpoints gone, above all) erases it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hf_hosts import read_rows, settings

from simpo.display import Display
from simpo.hosts.hf import SimPOConfig, SimPOTrainer, run_recipe
from simpo.recipe import load_recipe
from simpo.run.resume import find_checkpoint, record_launch
from simpo.run.saved import TRAINERS
from simpo.trainer import Trainer

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(tiny_recipe: Settings, kept: Path) -> Settings:
    """Settings of a run of ten steps that is finished; checkpoints after 4, 8 and 10."""
    if not (kept / "run").exists():
        build(tiny_recipe).run()
        shutil.copytree(tiny_recipe["output_dir"], kept / "run")
    else:
        shutil.copytree(kept / "run", tiny_recipe["output_dir"])
    return tiny_recipe


def build(settings: Settings, **changes: Any) -> Trainer:
    return Trainer(load_recipe({**settings, **changes}), display=Display(quiet=True))


def hosted(settings: Settings, **changes: Any) -> None:
    run_recipe(load_recipe({**settings, **changes}))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forget(settings: Settings, *steps: int) -> None:
    """Delete checkpoints by hand."""
    for step in steps:
        shutil.rmtree(Path(settings["output_dir"], "checkpoints", f"step-{step}"))


@pytest.mark.parametrize("start", [build, hosted])
@pytest.mark.parametrize(
    ("gone", "keys", "said"),
    [
        ((4, 8, 10), {"resume_from_checkpoint": True}, "already holds a finished run (no checkpoint)"),
        ((4, 8, 10), {}, "already holds a finished run (no checkpoint)"),
        ((10,), {"resume_from_checkpoint": True}, "(checkpoint at step 8)"),
        ((), {}, "already holds a finished run"),
        ((), {"overwrite_output_dir": True}, "already holds a finished run"),
        ((), {"resume_from_checkpoint": "another's"}, "already holds a finished run"),
    ],
    ids=["no checkpoints", "no checkpoints, afresh", "the last one gone", "afresh", "overwrite", "of another run"],
)
def test_a_finished_run_is_refused_and_left_as_it_is(
    finished: Settings, kept: Path, start: Any, gone: tuple[int, ...], keys: Settings, said: str
) -> None:
    if keys.get("resume_from_checkpoint") == "another's":
        name = "step-4" if start is build else "checkpoint-4"
        other = kept / "another" / "checkpoints" / name
        other.mkdir(parents=True)
        (other / "simpo.json").touch()
        keys = {"resume_from_checkpoint": str(other)}
    forget(finished, *gone)
    folder = Path(finished["output_dir"])
    before = content(folder)
    with pytest.raises(ValueError, match=r"output_dir: ") as caught:
        start(finished, **keys)
    message = str(caught.value)
    assert "\n" not in message
    assert said in message or (start is hosted and len(gone) < 3 and "resume them with simpo train" in message)
    assert content(folder) == before


def test_a_run_killed_before_its_first_checkpoint_starts_over_and_keeps_its_log(finished: Settings) -> None:
    forget(finished, 4, 8, 10)
    folder = Path(finished["output_dir"])
    shutil.rmtree(folder / "model")
    (folder / "recipe.yaml").write_text("# by hand\n")
    logs = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "eval_pairs.jsonl")}
    trainer = build(finished, resume_from_checkpoint=True)
    assert trainer.progress.step == 0
    aside = folder / "_superseded-1"
    assert content(aside) == {**logs, "recipe.yaml": b"# by hand\n"}


def test_what_is_done_again_on_purpose_is_kept_until_its_owner_deletes_it(finished: Settings) -> None:
    folder = Path(finished["output_dir"])
    of_model = {"evaluation.json", "trackers.json"}  # what was measured of it, and the curves that it has elsewhere
    for name in of_model:
        (folder / name).write_text("{}")
    before = content(folder)
    step_4 = str(folder / "checkpoints" / "step-4")
    build(finished, resume_from_checkpoint=step_4).run()
    logs_and_model = {name for name in before if name.startswith("model/")}
    logs_and_model |= {"metrics.jsonl", "eval_pairs.jsonl", *of_model}
    assert content(folder / "_superseded-1") == {name: before[name] for name in logs_and_model}
    later = content(folder / "checkpoints" / "_superseded-1")
    assert later == {
        name.removeprefix("checkpoints/"): value
        for name, value in before.items()
        if name.startswith(("checkpoints/step-8", "checkpoints/step-10"))
    }
    build(finished, resume_from_checkpoint=step_4)
    assert content(folder / "checkpoints" / "_superseded-1") == later
    assert (folder / "checkpoints" / "_superseded-2" / "step-8").is_dir()


def test_a_checkpoint_that_cannot_be_resumed_moves_nothing(finished: Settings) -> None:
    folder = Path(finished["output_dir"])
    damaged = folder / "checkpoints" / "step-4"
    (damaged / "rng-0.json").unlink()
    before = content(folder)
    with pytest.raises(ValueError, match=r"step-4 is damaged: rng-0\.json is missing"):
        build(finished, resume_from_checkpoint=str(damaged))
    assert content(folder) == before


def test_a_kill_while_things_are_put_aside_leaves_the_logs(finished: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(finished["output_dir"])
    before = (folder / "metrics.jsonl").read_text()

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        build(finished, resume_from_checkpoint=str(folder / "checkpoints" / "step-4"))
    assert (folder / "metrics.jsonl").read_text() == before


def test_the_last_checkpoint_of_a_finished_run_still_gives_its_model_again(finished: Settings) -> None:
    folder = Path(finished["output_dir"])
    before = content(folder)
    build(finished, resume_from_checkpoint=True).run()
    after = content(folder)
    assert after["model/model.safetensors"] == before["model/model.safetensors"]
    assert after.keys() == before.keys()


@pytest.mark.parametrize("name", ["rounds", "sweep"])
def test_the_folder_of_rounds_or_a_sweep_is_no_run_s(name: str, tiny_recipe: Settings) -> None:
    folder = Path(tiny_recipe["output_dir"])
    folder.mkdir(parents=True)
    (folder / f"{name}.json").write_text("{}")
    with pytest.raises(ValueError, match=f"^output_dir: .* is that of `simpo {name}`; choose another output_dir"):
        find_checkpoint(load_recipe(tiny_recipe))


def test_a_launch_named_as_an_earlier_one_is_refused_however_often_it_is_started(
    finished: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun starts a failed command again, with the same --rdzv-id, or in a container the same process number."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    record_launch(Path(finished["output_dir"]))
    for attempt in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with pytest.raises(ValueError, match="already holds a finished run"):
            find_checkpoint(load_recipe(finished))


# --- the Hugging Face host's checkpoints -----------------------------------------------------------------------------


def test_the_trainers_runs_are_kept_by_the_same_rules(tiny_recipe: Settings) -> None:
    hosted(tiny_recipe)
    folder = Path(tiny_recipe["output_dir"])
    before = content(folder)
    recipe = load_recipe(tiny_recipe)
    resume = recipe.model_copy(update={"resume_from_checkpoint": True})
    assert find_checkpoint(resume, TRAINERS).folder.name == "checkpoint-10"
    with pytest.raises(ValueError, match="already holds a finished run"):
        find_checkpoint(recipe, TRAINERS)
    with pytest.raises(ValueError, match="resume them with accelerate launch"):
        build(tiny_recipe, resume_from_checkpoint=True)
    hosted(tiny_recipe, resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-4"))
    aside = content(folder / "_superseded-1")
    assert aside["metrics.jsonl"] == before["metrics.jsonl"]
    assert aside["model/model.safetensors"] == before["model/model.safetensors"]
    later = content(folder / "checkpoints" / "_superseded-1")
    assert later["checkpoint-8/model.safetensors"] == before["checkpoints/checkpoint-8/model.safetensors"]
    assert (folder / "checkpoints" / "checkpoint-8").is_dir()  # the new one
    for number in (4, 8, 10):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{number}")
    with pytest.raises(ValueError, match="already holds a finished run"):
        find_checkpoint(resume, TRAINERS)


def test_a_trainer_without_a_recipe_keeps_the_checkpoints_it_finds(
    tiny_model: Path, pair_files: Path, tmp_path: Path
) -> None:
    saving = settings(tmp_path / "run", save_strategy="steps", save_steps=1, max_steps=2, save_total_limit=1)
    rows = read_rows(pair_files / "train.jsonl")[:8]
    for _ in range(2):
        args = SimPOConfig(report_to=[], disable_tqdm=True, **saving)
        SimPOTrainer(str(tiny_model), args, train_dataset=rows).train()
    folder = tmp_path / "run"
    assert (folder / "_superseded-1" / "checkpoint-2" / "model.safetensors").is_file()
    assert (folder / "checkpoint-2" / "model.safetensors").is_file()
