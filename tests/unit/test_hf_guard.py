"""The guard under transformers' Trainer: it stops, goes back and is resumed as in the native trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_hosts import read_rows, settings

from simpo.hosts.hf import SimPOConfig, SimPOTrainer
from simpo.run.stopping import StoppedByGuard

RISING = {"learning_rate": 1.0, "lr_scheduler_type": "linear", "warmup_steps": 1000, "max_steps": 40}
OFTEN = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def trainer_of(model: Path, pairs: Path, folder: Path, **changes: Any) -> SimPOTrainer:
    args = SimPOConfig(**{"report_to": [], "disable_tqdm": True, **settings(folder, **changes)})
    rows = {split: read_rows(pairs / f"{split}.jsonl") for split in ("train", "test")}
    return SimPOTrainer(str(model), args, train_dataset=rows["train"], eval_dataset=rows["test"])


def findings(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder / "guard.jsonl")


def test_stop_saves_a_checkpoint_and_resuming_says_nothing_twice(
    tiny_model: Path, pair_files: Path, tmp_path: Path
) -> None:
    fast = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 8}
    run = {**fast, "save_strategy": "no", "guard": {"displacement": "stop", "learning_rate": "off"}}
    trainer = trainer_of(tiny_model, pair_files, tmp_path / "run", **run)
    with pytest.raises(StoppedByGuard, match="stopped by the guard after step"):
        trainer.train()
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    before = findings(tmp_path / "run")
    assert before[-1]["kind"] == "displacement"
    assert saved.name == f"checkpoint-{before[-1]['step']}"
    resumed = trainer_of(tiny_model, pair_files, tmp_path / "run", **run)
    resumed.train(resume_from_checkpoint=str(saved))
    assert resumed.state.global_step == 8
    assert [row["kind"] for row in findings(tmp_path / "run")].count("displacement") == 1


def test_back_chooses_by_the_metric_and_from_before_the_logged_window() -> None:
    keys = {"metric_for_best_model": "eval_rewards/margins", "greater_is_better": True, "logging_steps": 5}
    found = SimPOConfig("run", guard="back", **OFTEN, **keys).to_recipe()
    assert {name: getattr(found, name) for name in keys} == keys


@pytest.mark.parametrize("keys", [{}, {"save_total_limit": 1}], ids=lambda keys: next(iter(keys), ""))
def test_back_leaves_the_weights_of_the_best_checkpoint_from_before(
    tiny_model: Path, pair_files: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    from safetensors.torch import load_file

    guard = {"guard": '{"all": "back", "learning_rate": "off"}'}  # as on a command line
    trainer = trainer_of(tiny_model, pair_files, tmp_path / "run", **RISING, **OFTEN, **guard, **keys)
    trainer.train()
    found, gone = findings(tmp_path / "run")[-2:]
    assert found["level"] == "back"
    assert trainer.state.global_step == found["step"] < 40
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    earlier = {line["step"]: line["eval_loss"] for line in lines if line["step"] <= found["since_step"] - 2}
    best = gone["back_to"]
    assert best == min(earlier, key=lambda step: earlier[step])
    kept = load_file(tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors")
    now = {name: p for name, p in trainer.model.named_parameters() if name in kept}
    assert now
    assert all(torch.equal(p, kept[name]) for name, p in now.items())
    # The same where it is found in the last line of all.
    last = {**RISING, **OFTEN, **guard, "max_steps": found["step"]}
    trainer = trainer_of(tiny_model, pair_files, tmp_path / "last", **last)
    trainer.train()
    assert findings(tmp_path / "last") == findings(tmp_path / "run")
    assert all(torch.equal(p, kept[name]) for name, p in trainer.model.named_parameters() if name in kept)
