"""A run that was stopped, killed or cut off ends in the same bits as one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
import yaml
from mesh_runs import assert_same_run, metrics
from miniature import recipe_in
from safetensors.torch import load_file

from simpo.display import Display
from simpo.hosts.hf.run import RunDirectory, run_recipe
from simpo.recipe import load_recipe
from simpo.run.saved import list_checkpoints
from simpo.trainer import Interrupted, Trainer

Settings = dict[str, Any]


def build(settings: Settings, **changes: Any) -> Trainer:
    return Trainer(load_recipe({**settings, **changes}), display=Display(quiet=True))


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, pair_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = recipe_in(tmp_path_factory.mktemp("uninterrupted"), tiny_model, pair_files)
    return build(settings).run().output_dir


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, pair_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The recipe of a run that was stopped after its second step."""
    settings = recipe_in(tmp_path_factory.mktemp("stopped"), tiny_model, pair_files)
    trainer = build(settings)
    stop_after(trainer, 2)
    with pytest.raises(Interrupted):
        trainer.run()
    return settings


def stop_after(trainer: Trainer, step: int) -> None:
    """Let a run come to its end at `step` as Ctrl-C would."""
    original = trainer.train_step

    def train_step(plan: Any) -> dict[str, float]:
        values = original(plan)
        if trainer.progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return values

    trainer.train_step = train_step


@pytest.mark.parametrize("step", [1, 5, 7])
def test_stopped_and_resumed_run_equals_uninterrupted_bit_for_bit(
    tiny_recipe: Settings, uninterrupted: Path, step: int
) -> None:
    trainer = build(tiny_recipe)
    stop_after(trainer, step)
    with pytest.raises(Interrupted, match=rf"after step {step} of 10.*resume_from_checkpoint"):
        trainer.run()
    build(tiny_recipe, resume_from_checkpoint=True).run()
    assert_same_run(Path(tiny_recipe["output_dir"]), uninterrupted)


def test_dropout_and_logging_windows_survive_a_resume(tiny_recipe: Settings, tmp_path: Path) -> None:
    settings = {**tiny_recipe, "use_peft": True, "lora_dropout": 0.2, "disable_dropout": False, "logging_steps": 3}
    build(settings, output_dir=str(tmp_path / "whole")).run()
    trainer = build(settings)
    stop_after(trainer, 4)
    with pytest.raises(Interrupted):
        trainer.run()
    build(settings, resume_from_checkpoint=True).run()
    assert metrics(Path(settings["output_dir"])) == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    "method",
    [
        {"wpo_weights": True, "reward_calibration": True},
        {"loss_type": "confpo"},
        {"loss_type": "plackett_luce"},
        {"score_margin": 2.0},
    ],
    ids=str,
)
def test_methods_that_came_after_resume_to_the_same_bits(
    tiny_recipe: Settings, scored_lists: Path, tmp_path: Path, method: Settings
) -> None:
    settings = {**tiny_recipe, "dataset_mixer": {str(scored_lists): 1.0}, **method}
    whole = build(settings, output_dir=str(tmp_path / "whole")).run().output_dir
    trainer = build(settings)
    stop_after(trainer, 4)
    with pytest.raises(Interrupted):
        trainer.run()
    build(settings, resume_from_checkpoint=True).run()
    assert_same_run(Path(settings["output_dir"]), whole)


def test_resume_from_a_named_earlier_checkpoint_repeats_the_rest(tiny_recipe: Settings, uninterrupted: Path) -> None:
    build(tiny_recipe).run()
    folder = Path(tiny_recipe["output_dir"])
    build(tiny_recipe, resume_from_checkpoint=str(folder / "checkpoints" / "step-4")).run()
    assert_same_run(folder, uninterrupted)
    assert (folder / "checkpoints" / "_superseded-1" / "step-8").is_dir()


def test_the_card_shows_a_best_evaluation_that_was_made_up_for(tiny_recipe: Settings) -> None:
    best_first = {"load_best_model_at_end": True, "greater_is_better": True, "save_steps": 2, "eval_steps": 2}
    settings = {**tiny_recipe, **best_first, "max_steps": 4}
    trainer = build(settings)
    stop_after(trainer, 2)  # saved, but not evaluated any more
    with pytest.raises(Interrupted):
        trainer.run()
    result = build(settings, resume_from_checkpoint=True).run()
    (found,) = [line for line in metrics(result.output_dir) if "eval_loss" in line and line["step"] == 2]
    assert result.best_step == 2
    assert f"| eval_loss | {found['eval_loss']:.6g} |" in (result.model_dir / "README.md").read_text()


def test_generations_of_steps_done_again_are_not_kept_twice(tiny_recipe: Settings) -> None:
    settings = {**tiny_recipe, "num_eval_generations": 2, "eval_generation_max_new_tokens": 3}
    build(settings).run()
    folder = Path(settings["output_dir"])
    whole = (folder / "generations.jsonl").read_text()
    build(settings, resume_from_checkpoint=str(folder / "checkpoints" / "step-4")).run()
    assert (folder / "generations.jsonl").read_text() == whole


def test_random_numbers_continue_where_the_checkpoint_left_them(tiny_recipe: Settings) -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    trainer = build(tiny_recipe)
    trainer.train_step(next(trainer.loader.plans(0, 1)))
    draw()
    trainer.save()
    expected = draw()
    build(tiny_recipe, resume_from_checkpoint=True)
    assert draw() == expected


def test_optimizer_moments_are_restored(tiny_recipe: Settings) -> None:
    trainer = build(tiny_recipe)
    stop_after(trainer, 3)
    with pytest.raises(Interrupted):
        trainer.run()
    before = [state for state in trainer.optimizer.state.values()]
    after = [state for state in build(tiny_recipe, resume_from_checkpoint=True).optimizer.state.values()]
    assert len(before) == len(after) > 0
    for one, other in zip(before, after, strict=True):
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"beta": 3.0}, {"seed": 7}, {"max_steps": 12}])
def test_resume_under_other_settings_is_refused_by_name(stopped: Settings, change: Settings) -> None:
    name = "number of steps" if "max_steps" in change else next(iter(change))
    recipe = Path(stopped["output_dir"]) / "recipe.yaml"
    before = recipe.read_text()
    with pytest.raises(ValueError, match=rf"other settings.*{name}"):
        build(stopped, **change, resume_from_checkpoint=True)
    assert recipe.read_text() == before


def test_resume_on_other_data_is_refused(stopped: Settings, pair_files: Path, tmp_path: Path) -> None:
    other = tmp_path / pair_files.name
    other.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (other / name).write_text((pair_files / name).read_text().replace("water", "river"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"other settings"):
        build(stopped, dataset_mixer={str(other): 1.0}, resume_from_checkpoint=True)


def test_resume_with_other_scores_is_refused(tiny_recipe: Settings, tmp_path: Path) -> None:
    """They are trained on as much as the tokens are."""
    path = tmp_path / "scored.jsonl"

    def write(scale: float) -> None:
        rows = [{"prompt": "stone?", "chosen": f"water {n}", "rejected": "no"} for n in range(16)]
        scored = [{**row, "score_chosen": scale * n, "score_rejected": -1.0} for n, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in scored), encoding="utf-8")

    write(1.0)
    settings = {**tiny_recipe, "dataset_mixer": {str(path): 1.0}, "score_margin": 2.0, "eval_strategy": "no"}
    settings |= {"validation_fraction": 0.0, "max_steps": 2}
    del settings["eval_steps"]
    build(settings).save()
    build(settings, resume_from_checkpoint=True)
    write(2.0)
    with pytest.raises(ValueError, match="other settings: the scores of the training pairs"):
        build(settings, resume_from_checkpoint=True)


def test_damaged_checkpoint_is_noticed(tiny_recipe: Settings) -> None:
    build(tiny_recipe).run()
    newest = list_checkpoints(Path(tiny_recipe["output_dir"]) / "checkpoints")[-1]
    victim = max((newest.folder / "tensors").rglob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    victim.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"damaged|cannot be loaded"):
        build(tiny_recipe, resume_from_checkpoint=True)


def test_missing_checkpoint_is_one_clear_line(tiny_recipe: Settings) -> None:
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: no complete checkpoint at .*step-99"):
        build(tiny_recipe, resume_from_checkpoint=str(Path(tiny_recipe["output_dir"]) / "checkpoints" / "step-99"))


def start(recipe: Settings, said: Any) -> forks.Program:
    """`simpo train` in a process of its own, resumed where there is a checkpoint."""
    path = Path(recipe["output_dir"]).with_name("recipe.yaml")
    path.write_text(yaml.safe_dump({**recipe, "resume_from_checkpoint": True}), encoding="utf-8")
    return forks.Program(["-m", "simpo", "train", path], stdout=said, stderr=said)


def test_killed_at_random_moments_ends_in_the_same_bits(
    tiny_recipe: Settings, uninterrupted: Path, tmp_path: Path
) -> None:
    settings = {**tiny_recipe, "save_steps": 1, "save_total_limit": 3}
    folder, rng = Path(tiny_recipe["output_dir"]), random.Random(3)
    with open(tmp_path / "said.txt", "w+", encoding="utf-8") as said:
        for _ in range(3):
            seen, deadline = newest_step(folder), time.monotonic() + 120
            process = start(settings, said)
            while newest_step(folder) == seen and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(rng.random() * 0.1)
            process.kill()
            process.wait()
            assert newest_step(folder) > seen or seen == 10
        assert start(settings, said).wait() == 0, (tmp_path / "said.txt").read_text(encoding="utf-8")
    assert_same_run(folder, uninterrupted)


def newest_step(folder: Path) -> int:
    found = list_checkpoints(folder / "checkpoints")
    return found[-1].step if found else 0


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(tiny_recipe: Settings, tmp_path: Path) -> None:
    with open(tmp_path / "said.txt", "w+", encoding="utf-8") as said:
        process = start({**tiny_recipe, "num_train_epochs": 200}, said)
        deadline = time.monotonic() + 120
        while not newest_step(Path(tiny_recipe["output_dir"])) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    output = (tmp_path / "said.txt").read_text(encoding="utf-8")
    assert code == 130, output
    assert "--resume_from_checkpoint true" in output
    assert "Traceback" not in output


def test_a_trainers_run_that_is_asked_to_stop_saves_itself_and_goes_on(
    tiny_recipe: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**tiny_recipe, "device": "cpu", "max_steps": 5, "save_steps": 4, "eval_steps": 3, "logging_steps": 1}
    run_recipe(load_recipe({**settings, "output_dir": str(tmp_path / "whole")}))
    after_step = RunDirectory.on_step_end

    def ask(self: RunDirectory, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(self, args, state, control, **others)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "on_step_end", ask)
        with pytest.raises(Interrupted, match=r"^stopped after step 2 of 5 and saved .*checkpoint-2; to resume, run"):
            run_recipe(load_recipe(settings))
    folder = Path(settings["output_dir"])
    assert not (folder / "model").exists()
    run_recipe(load_recipe({**settings, "resume_from_checkpoint": True}))
    names = ("step", "loss", "eval_loss", "tokens_seen")
    ours, theirs = ([[line.get(n) for n in names] for line in metrics(each)] for each in (folder, tmp_path / "whole"))
    assert ours == theirs
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (folder, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
