"""Whole runs on a tiny model: what is written, what is learned, what the options do."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from simpo.core.losses import LOSSES, sigmoid
from simpo.display import Display
from simpo.model.head import compute_pair_logps
from simpo.recipe import load_recipe
from simpo.run.saved import list_checkpoints
from simpo.trainer import Trainer, TrainResult

Settings = dict[str, Any]


def run(settings: Settings, **changes: Any) -> TrainResult:
    return build(settings, **changes).run()


def build(settings: Settings, **changes: Any) -> Trainer:
    return Trainer(load_recipe({**settings, **changes}), display=Display(quiet=True))


def read_metrics(output_dir: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [m["loss"] for m in metrics if "loss" in m]


def weights(model_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model_dir / "model.safetensors")


def checkpoint_of(result: TrainResult, step: int) -> Path:
    return result.output_dir / "checkpoints" / f"step-{step}"


def test_run_learns_and_leaves_a_complete_run_directory(tiny_recipe: Settings) -> None:
    result = run(tiny_recipe, eval_on_start=True, num_train_epochs=3)
    folder = result.output_dir
    for name in ("recipe.yaml", "metrics.jsonl", "audit.json", "model/model.safetensors", "model/README.md"):
        assert (folder / name).is_file(), name
    evaluations = [m for m in read_metrics(folder) if "eval_loss" in m]
    assert evaluations[0]["step"] == 0
    assert evaluations[-1]["step"] == result.steps == 30
    assert evaluations[-1]["eval_rewards/accuracies"] > 0.9 > evaluations[0]["eval_rewards/accuracies"]
    assert evaluations[-1]["eval_loss"] < 0.5 * evaluations[0]["eval_loss"]


def test_metrics_have_the_names_that_users_of_other_trainers_know(tiny_recipe: Settings) -> None:
    run(tiny_recipe, max_steps=2)
    first = read_metrics(tiny_recipe["output_dir"])[0]
    expected = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    expected |= {"logps/chosen", "logps/rejected", "sft_loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert expected <= set(first)
    assert first["rewards/margins"] == pytest.approx(first["rewards/chosen"] - first["rewards/rejected"], rel=1e-6)
    assert first["rewards/chosen"] == pytest.approx(2.0 * first["logps/chosen"], rel=1e-6)


def test_resolved_recipe_in_the_run_directory_reads_back_equal(tiny_recipe: Settings) -> None:
    trainer = build(tiny_recipe, max_steps=1)
    assert load_recipe(trainer.output_dir / "recipe.yaml") == trainer.recipe


def test_every_micro_batching_gives_the_same_curve(tiny_recipe: Settings, tmp_path: Path) -> None:
    curves = []
    for index, (size, accumulation) in enumerate([(8, 1), (4, 2), (2, 4), (1, 8)]):
        folder = str(tmp_path / f"run-{index}")
        run(
            tiny_recipe,
            output_dir=folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-4,
            eval_strategy="no",
        )
        curves.append([m["loss"] for m in read_metrics(folder)])
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=2e-5)


@pytest.mark.parametrize(("pack", "share"), [(True, False), (False, True), (False, False)])
def test_every_layout_gives_the_same_curve(tiny_recipe: Settings, tmp_path: Path, pack: bool, share: bool) -> None:
    common = {"learning_rate": 1e-4, "max_steps": 5}
    run(tiny_recipe, **common)
    other = str(tmp_path / "other")
    run(tiny_recipe, **common, output_dir=other, pack=pack, share_prompt=share)
    for ours, theirs in zip(read_metrics(tiny_recipe["output_dir"]), read_metrics(other), strict=True):
        name = "loss" if "loss" in ours else "eval_loss"
        assert ours[name] == pytest.approx(theirs[name], rel=2e-5)


def test_token_budget_splits_a_step_without_changing_it(tiny_recipe: Settings, tmp_path: Path) -> None:
    common = {"learning_rate": 1e-4, "eval_strategy": "no"}
    run(tiny_recipe, **common)
    other = str(tmp_path / "other")
    trainer = build(tiny_recipe, **common, output_dir=other, max_tokens_per_micro_batch=90)
    plans = list(trainer.loader.plans(0, trainer.total_steps))
    tokens = [sum(trainer.loader.store.tokens[i] for i in items) for plan in plans for items in plan.micro_batches]
    assert max(tokens) <= 90
    assert any(len(plan.micro_batches) > 2 for plan in plans)
    trainer.run()
    ours, theirs = read_metrics(tiny_recipe["output_dir"]), read_metrics(other)
    assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in theirs], rel=2e-5)


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
def test_every_loss_trains(tiny_recipe: Settings, scored_lists: Path, loss_type: str) -> None:
    data = {"dataset_mixer": {str(scored_lists): 1.0}} if LOSSES[loss_type].is_of_lists else {}
    result = run(tiny_recipe, loss_type=loss_type, max_steps=3, eval_steps=3, **data)
    values = [value for m in read_metrics(result.output_dir) for value in m.values()]
    assert all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("loss_type", ["dpo", "dpo_norm", "in 4 bits"])
def test_reference_losses_start_at_log_2_and_cache_their_reference(
    tiny_recipe: Settings, loss_type: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if loss_type == "in 4 bits":
        pytest.importorskip("bitsandbytes")
        loss_type, tiny_recipe = "dpo", {**tiny_recipe, "use_peft": True, "load_in_4bit": True}
    run(tiny_recipe, loss_type=loss_type, max_steps=2, eval_strategy="no")
    first = read_metrics(tiny_recipe["output_dir"])[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the policy is the reference
    untrained = build(tiny_recipe, loss_type=loss_type, output_dir=str(tmp_path / "eval")).evaluate()
    assert untrained["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)  # each pair its own
    import simpo.run.reference

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference was computed again")

    monkeypatch.setattr(simpo.run.reference, "load_model", refuse)
    again = run(tiny_recipe, loss_type=loss_type, max_steps=2, eval_strategy="no", output_dir=str(tmp_path / "again"))
    assert read_metrics(again.output_dir)[0]["loss"] == first["loss"]


def test_sft_term_adds_its_weighted_loss(tiny_recipe: Settings, tmp_path: Path) -> None:
    run(tiny_recipe, max_steps=1, eval_strategy="no")
    plain = read_metrics(tiny_recipe["output_dir"])[0]
    other = run(tiny_recipe, max_steps=1, eval_strategy="no", sft_weight=0.3, output_dir=str(tmp_path / "sft"))
    with_sft = read_metrics(other.output_dir)[0]
    assert with_sft["loss"] == pytest.approx(plain["loss"] + 0.3 * plain["sft_loss"], rel=1e-6)


def test_sft_token_mean_is_the_mean_over_all_chosen_tokens_of_the_step(tiny_recipe: Settings) -> None:
    trainer = build(tiny_recipe, sft_weight=0.3, sft_reduction="tokens")
    plan = next(trainer.loader.plans(0, 1))
    with torch.no_grad():
        totals, plain, tokens, nll = 0.0, 0.0, 0, 0.0
        for micro_batch in trainer.loader.micro_batches(plan):
            losses, _ = trainer.forward(micro_batch, plan)
            totals += float(losses.sum())
            logps = compute_pair_logps(trainer.model, micro_batch.pairs)
            plain += float(sigmoid(logps, beta=2.0, gamma_beta_ratio=0.5).losses.sum())
            nll -= float(logps.chosen_sum.sum())
            tokens += int(logps.chosen_length.sum())
    assert totals / plan.num_pairs == pytest.approx(plain / plan.num_pairs + 0.3 * nll / tokens, rel=1e-5)


def test_sft_token_mean_is_evaluated_over_all_held_out_tokens(tiny_recipe: Settings) -> None:
    trainer = build(tiny_recipe, sft_weight=0.3, sft_reduction="tokens", per_device_eval_batch_size=3)
    by_tokens = trainer.evaluate()
    whole = trainer.eval_loader.plan_everything()
    assert whole.num_pairs == 10
    assert len(whole.micro_batches) == 4
    nll = 0.0
    with torch.no_grad():
        for indices in whole.micro_batches:
            nll -= float(compute_pair_logps(trainer.model, trainer.eval_loader.build(indices).pairs).chosen_sum.sum())
    plain = build(tiny_recipe, output_dir=tiny_recipe["output_dir"] + "-plain").evaluate()
    expected = plain["eval_loss"] + 0.3 * nll / whole.num_chosen_tokens
    assert by_tokens["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_gradient_checkpointing_changes_nothing(tiny_recipe: Settings, tmp_path: Path) -> None:
    run(tiny_recipe, max_steps=4)
    other = run(tiny_recipe, max_steps=4, gradient_checkpointing=True, output_dir=str(tmp_path / "other"))
    ours, theirs = read_metrics(tiny_recipe["output_dir"]), read_metrics(other.output_dir)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)


def test_bf16_compute_keeps_fp32_master_weights(tiny_recipe: Settings) -> None:
    trainer = build(tiny_recipe, bf16=True, max_steps=2)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.run().steps == 2


@pytest.mark.parametrize("load_best", [True, False])
def test_save_total_limit_keeps_the_newest_and_the_best(tiny_recipe: Settings, load_best: bool) -> None:
    result = run(
        tiny_recipe,
        save_steps=2,
        eval_steps=2,
        save_total_limit=2,
        load_best_model_at_end=load_best,
        metric_for_best_model="eval_rewards/chosen",
        greater_is_better=False,
    )
    steps = [c.step for c in list_checkpoints(result.output_dir / "checkpoints")]
    assert 10 in steps
    lines = [line for line in read_metrics(result.output_dir) if "eval_loss" in line]
    assert min(lines, key=lambda line: line["eval_rewards/chosen"])["step"] in steps
    assert len(steps) <= 3


@pytest.mark.parametrize("save_steps", [2, 4])
def test_best_checkpoint_becomes_the_final_model(tiny_recipe: Settings, tmp_path: Path, save_steps: int) -> None:
    """Also where the best evaluation is not at a step that a checkpoint is due at."""
    settings = {**tiny_recipe, "save_steps": save_steps, "eval_steps": 2, "metric_for_best_model": "eval_logps/chosen"}
    # A rising learning rate wrecks the likelihood, so the best evaluation is an early one.
    wrecked = {"learning_rate": 0.2, "lr_scheduler_type": "constant", "greater_is_better": True}
    best = run(settings, **wrecked, load_best_model_at_end=True)
    assert best.best_step == 2
    stopped = run(settings, **wrecked, output_dir=str(tmp_path / "last"))
    assert not torch.equal(
        weights(best.model_dir)["model.norm.weight"], weights(stopped.model_dir)["model.norm.weight"]
    )
    trainer = build(settings, **wrecked, output_dir=str(tmp_path / "short"), max_steps=10)
    for plan in trainer.loader.plans(0, best.best_step):
        trainer.train_step(plan)
    for name, value in weights(best.model_dir).items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


@pytest.mark.long
def test_a_best_checkpoint_in_another_run_directory_is_found_again(tiny_recipe: Settings, tmp_path: Path) -> None:
    settings = {**tiny_recipe, "save_steps": 2, "eval_steps": 2, "learning_rate": 0.2, "lr_scheduler_type": "constant"}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "logps/chosen", "greater_is_better": True}
    whole = run(settings)
    assert whole.best_step == 2  # each step makes the model worse
    moved = run(settings, output_dir=str(tmp_path / "moved"), resume_from_checkpoint=str(checkpoint_of(whole, 6)))
    again = run(settings, output_dir=str(tmp_path / "again"), resume_from_checkpoint=str(checkpoint_of(moved, 8)))
    for result in (moved, again):
        assert result.best_step == 2
        assert torch.equal(*(weights(r.model_dir)["model.norm.weight"] for r in (whole, result)))
    newest = run(settings, output_dir=str(tmp_path / "newest"), resume_from_checkpoint=str(checkpoint_of(whole, 2)))
    assert newest.best_step == 2  # the one that was resumed


def test_a_best_checkpoint_that_was_deleted_is_said_and_replaced(tiny_recipe: Settings, tmp_path: Path, capsys) -> None:
    settings = {**tiny_recipe, "save_steps": 2, "eval_steps": 2, "learning_rate": 0.2, "lr_scheduler_type": "constant"}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "logps/chosen", "greater_is_better": True}
    whole = run(settings)
    shutil.rmtree(checkpoint_of(whole, 2))
    settings |= {"output_dir": str(tmp_path / "moved"), "resume_from_checkpoint": str(checkpoint_of(whole, 6))}
    resumed = Trainer(load_recipe(settings)).run()
    assert resumed.best_step == 6
    said = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint of the best evaluation, step 2, is not in" in said
    assert "the best is chosen among step 6 and those after it" in said


def test_sample_generations_are_written_at_each_evaluation(tiny_recipe: Settings) -> None:
    result = run(tiny_recipe, num_eval_generations=2, eval_generation_max_new_tokens=4)
    lines = [json.loads(line) for line in (result.output_dir / "generations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 5, 10, 10]
    assert all(line["prompt"] and "row_id" in line for line in lines)


def test_eval_steps_may_be_a_share_of_the_run(tiny_recipe: Settings) -> None:
    run(tiny_recipe, eval_steps=0.3)
    assert [m["step"] for m in read_metrics(tiny_recipe["output_dir"]) if "eval_loss" in m] == [3, 6, 9, 10]


def test_logged_means_cover_every_step_since_the_last_line(tiny_recipe: Settings, tmp_path: Path) -> None:
    run(tiny_recipe, eval_strategy="no")
    each = [m["loss"] for m in read_metrics(tiny_recipe["output_dir"])]
    run(tiny_recipe, eval_strategy="no", logging_steps=4, output_dir=str(tmp_path / "other"))
    windows = [m["loss"] for m in read_metrics(tmp_path / "other")]
    expected = [sum(each[0:4]) / 4, sum(each[4:8]) / 4, sum(each[8:10]) / 2]
    assert windows == pytest.approx(expected, rel=1e-6)


def test_tensorboard_gets_the_metrics(tiny_recipe: Settings) -> None:
    pytest.importorskip("tensorboard")
    result = run(tiny_recipe, max_steps=2, report_to=["tensorboard"])
    assert list((result.output_dir / "tensorboard").glob("events.*"))


def test_run_directory_that_holds_a_run_is_not_overwritten(tiny_recipe: Settings) -> None:
    run(tiny_recipe, max_steps=4)
    with pytest.raises(ValueError, match=r"already holds a finished run.*resume_from_checkpoint"):
        build(tiny_recipe, max_steps=4)


def test_missing_model_folder_is_one_clear_line(tiny_recipe: Settings) -> None:
    with pytest.raises(ValueError, match=r"folder './nowhere' does not exist"):
        build(tiny_recipe, model_name_or_path="./nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_one_clear_line(tiny_recipe: Settings) -> None:
    with pytest.raises(ValueError, match=r"device: cuda"):
        build(tiny_recipe, device="cuda")
