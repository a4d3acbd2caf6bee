"""examples/minimal.py: SimPO on `simpo.core` alone learns, and computes what `simpo train` computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mesh_runs import build
from scripts import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

import simpo


@pytest.fixture(scope="module")
def minimal():
    return load_script("examples", "minimal.py")


def load(minimal: Any, folder: Path, pairs: Path, *, max_length: int) -> tuple[Any, list[Any]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="minimal")
    return model, minimal.read_pairs(pairs, AutoTokenizer.from_pretrained(folder), max_length=max_length)


def test_the_loss_falls_and_chosen_answers_win(minimal, tiny_model, pair_files):
    model, pairs = load(minimal, tiny_model, pair_files / "train.jsonl", max_length=96)
    assert len(pairs) == 40
    steps = list(minimal.train(model, pairs, epochs=3, learning_rate=2e-3))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert (steps[-1]["accuracy"], steps[-1]["margin"] > 0.5) == (1.0, True)


def test_its_steps_are_those_of_simpo_train(minimal, tiny_recipe, tiny_model, pair_files):
    """Without warm-up and decay, which the example leaves out."""
    keys = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "lr_scheduler_type": "constant"}
    result = simpo.train({**tiny_recipe, **keys, "eval_strategy": "no", "save_strategy": "no"})
    lines = (result.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    model, pairs = load(minimal, tiny_model, pair_files / "train.jsonl", max_length=96)
    losses = [values["loss"] for values in minimal.train(model, pairs, learning_rate=2e-3)]
    assert losses[0] == pytest.approx(logged[0], abs=1e-6)
    assert losses == pytest.approx(logged, abs=1e-3)


@pytest.mark.long
@pytest.mark.real_model
def test_its_first_loss_on_real_weights_is_that_of_simpo_train(minimal, smol_model, tmp_path):
    demo = Path(__file__).resolve().parents[2] / "examples" / "demo" / "pairs"
    rows = sorted((demo / "train.jsonl").read_text(encoding="utf-8").splitlines(), key=len)[:2]
    (tmp_path / "two.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    model, pairs = load(minimal, smol_model, tmp_path / "two.jsonl", max_length=512)
    first = next(minimal.train(model, pairs, learning_rate=0.0))
    trainer = build(
        {
            "model_name_or_path": str(smol_model),
            "dataset_name": str(tmp_path / "two.jsonl"),
            "validation_fraction": 0,
            "per_device_train_batch_size": 2,
            "max_tokens_per_micro_batch": 512,
            "bf16": False,
            "max_steps": 1,
            "output_dir": str(tmp_path / "run"),
            "cache_dir": str(tmp_path / "cache"),
        }
    )
    line = trainer.train_step(next(trainer.loader.plans(0, 1)))
    assert first["loss"] == pytest.approx(line["loss"], abs=1e-5)
