"""Micro-batches that follow free memory: ample memory changes nothing, little memory splits a step and not its update,
and a resumed run keeps the plan it began with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run import checkpoint as checkpoints
from simpo.run import memory
from simpo.trainer import Interrupted, Trainer

Settings = dict[str, Any]
MIB = 2**20


class Spoken(Display):
    """A quiet display that remembers."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def build(settings: Settings, **changes: Any) -> Trainer:
    return Trainer(load_recipe({**settings, **changes}), display=Spoken())


def have_free(monkeypatch: pytest.MonkeyPatch, num_bytes: float | None) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: None if num_bytes is None else int(num_bytes))


def free_for(trainer: Trainer, tokens: int) -> float:
    """Free bytes of which the planned share holds a micro-batch of so many tokens and no 64 more."""
    budget = trainer.budget
    return (budget.fixed_bytes + (tokens + 1) * budget.bytes_per_token) / memory.SHARE_OF_FREE["cpu"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def open_recipe(tiny_recipe: Settings) -> Settings:
    """Eight pairs a step, nothing said about micro-batches: how many there are is left to the memory."""
    settings = {**tiny_recipe, "per_device_train_batch_size": 8, "eval_strategy": "no", "learning_rate": 1e-4}
    del settings["gradient_accumulation_steps"], settings["eval_steps"]
    return settings


def test_ample_memory_plans_what_no_limit_plans(tiny_recipe: Settings, tmp_path: Path, monkeypatch) -> None:
    """Also with accumulation given: its number of micro-batches is the least there are."""
    plans = []
    for index, free in enumerate((8 * 2**30, 64 * 2**30, None)):
        have_free(monkeypatch, free)
        trainer = build(tiny_recipe, output_dir=str(tmp_path / str(index)))
        assert (trainer.budget is None) == (free is None)
        plans.append(list(trainer.loader.plans(0, trainer.total_steps)))
        assert {len(plan.micro_batches) for plan in plans[-1]} == {2}
    assert plans[0] == plans[1] == plans[2]


def test_little_memory_splits_a_step_and_not_its_update(open_recipe: Settings, tmp_path: Path, monkeypatch) -> None:
    whole = build(open_recipe, output_dir=str(tmp_path / "whole"), max_steps=1)
    assert {len(plan.micro_batches) for plan in whole.loader.plans(0, 5)} == {1}
    longest = int(whole.loader.store.tokens.max())
    have_free(monkeypatch, free_for(whole, 192))
    split = build(open_recipe, output_dir=str(tmp_path / "split"), max_steps=1)
    assert split.loader.max_tokens == 192 >= longest
    plans = list(split.loader.plans(0, 5))
    tokens = split.loader.store.tokens
    assert all(tokens[list(items)].sum() <= 192 for plan in plans for items in plan.micro_batches)
    assert all(len(plan.micro_batches) >= 2 for plan in plans)
    gradients = []
    for trainer in (whole, split):
        trainer.recipe.__dict__["max_grad_norm"] = 0.0
        kept: dict[str, torch.Tensor] = {}
        trainer.optimizer.step = lambda t=trainer, k=kept: k.update(
            {n: p.grad.clone() for n, p in t.model.named_parameters()}
        )
        trainer.train_step(next(trainer.loader.plans(0, 1)))
        gradients.append(kept)
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert float((gradients[1][name] - gradient).abs().max()) <= 2e-6 * largest, name


def test_the_start_table_says_what_was_picked(open_recipe: Settings, monkeypatch) -> None:
    have_free(monkeypatch, 8 * 2**30)
    trainer = build(open_recipe)
    text = trainer._describe()["micro-batches"]
    assert text.startswith(f"up to {trainer.loader.max_tokens:,} tokens, 1 in the first step; ")
    assert text.endswith("of 8.0 GiB free")
    limited = build(open_recipe, max_tokens_per_micro_batch=200)
    assert limited._describe()["micro-batches"].startswith("up to 200 tokens")
    unpacked = build(open_recipe, pack=False)
    assert unpacked.budget is None
    assert unpacked._describe()["micro-batches"] == "1 in the first step"


def test_a_given_budget_is_taken_as_it_is(open_recipe: Settings, monkeypatch) -> None:
    have_free(monkeypatch, 1)  # would stop any run that looked
    trainer = build(open_recipe, max_tokens_per_micro_batch=150)
    assert (trainer.loader.max_tokens, trainer.budget) == (150, None)


def test_resume_under_other_free_memory_is_bit_identical(open_recipe: Settings, tmp_path: Path, monkeypatch) -> None:
    ample = build(open_recipe, output_dir=str(tmp_path / "ample"))
    little, other = free_for(ample, 192), 8 * 2**30
    have_free(monkeypatch, little)
    whole = tmp_path / "whole"
    build(open_recipe, output_dir=str(whole)).run()

    trainer = build(open_recipe)
    inner = trainer.train_step

    def train_step(plan: Any) -> dict[str, float]:
        values = inner(plan)
        if trainer.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return values

    trainer.train_step = train_step
    with pytest.raises(Interrupted):
        trainer.run()
    have_free(monkeypatch, other)
    resumed = build(open_recipe, resume_from_checkpoint=True)
    assert resumed.loader.max_tokens == 192
    resumed.run()
    folder = Path(open_recipe["output_dir"])
    assert losses(folder) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(folder)[name], tensor), name


def test_a_checkpoint_without_a_stored_budget_goes_on_without_one(tiny_recipe: Settings, monkeypatch) -> None:
    """As written before budgets were picked."""
    trainer = build(tiny_recipe)
    trainer.train_step(next(trainer.loader.plans(0, 1)))
    trainer.save()
    read = checkpoints.read_state

    def without_budget(checkpoint: Any) -> dict[str, Any]:
        return {k: v for k, v in read(checkpoint).items() if k != "max_tokens_per_micro_batch"}

    monkeypatch.setattr(checkpoints, "read_state", without_budget)
    assert build(tiny_recipe, resume_from_checkpoint=True).loader.max_tokens is None


def test_memory_that_is_too_small_by_far_is_one_clear_line(open_recipe: Settings, monkeypatch) -> None:
    have_free(monkeypatch, 20 * MIB)  # the head's chunk of logits alone is larger
    with pytest.raises(ValueError, match=r"^memory: one optimizer step needs about .* with pair .* alone") as error:
        build(open_recipe)
    assert "\n" not in str(error.value)
    assert not Path(open_recipe["output_dir"]).exists()


def test_memory_that_is_a_little_too_small_is_said_and_the_run_goes_on(open_recipe: Settings, monkeypatch) -> None:
    ample = build(open_recipe)
    longest = int(ample.loader.store.tokens.max())
    have_free(monkeypatch, free_for(ample, longest // 2))
    trainer = build(open_recipe)
    assert trainer.loader.max_tokens == longest
    (line,) = [line for line in trainer.display.said if line.startswith("memory:")]
    assert "little or no reserve" in line
    trainer.train_step(next(trainer.loader.plans(0, 1)))


def test_loss_with_a_reference_is_measured_too(open_recipe: Settings) -> None:
    assert build(open_recipe, loss_type="dpo").budget is not None


def test_sequences_longer_than_the_model_takes_are_one_clear_line(tiny_recipe: Settings, tmp_path: Path) -> None:
    rows = [{"prompt": "water " * 20, "chosen": "stone " * 700, "rejected": "light"}] * 4
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {**tiny_recipe, "dataset_mixer": {str(tmp_path / "train.jsonl"): 1.0}, "validation_fraction": 0.0}
    settings |= {"max_length": 1024, "eval_strategy": "no", "max_prompt_length": 128}
    del settings["eval_steps"]
    with pytest.raises(ValueError, match=r"max_length: pair .* this model takes 512 \(max_position_embeddings\)"):
        build(settings)
    build(settings, max_length=512)


def test_an_unknown_device_is_one_clear_line(tiny_recipe: Settings) -> None:
    with pytest.raises(ValueError, match=r"device.*auto.*cpu.*cuda"):
        load_recipe({**tiny_recipe, "device": "tpu"})


# One step of SmolLM2-135M in a process of its own, whose resident memory nothing else has touched.
REAL_STEP = """
import json, sys
import torch
from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.trainer import Trainer

def resident(name):
    for line in open("/proc/self/status", encoding="ascii"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

trainer = Trainer(load_recipe(json.loads(sys.argv[1])), display=Display(quiet=True))
plan = next(trainer.loader.plans(0, 1))
trainer.optimizer.step = lambda: None  # the peak of forward and backward, before there are moments
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the most from here on
trainer.train_step(plan)
print(json.dumps({
    "tokens": max(int(trainer.loader.store.tokens[list(items)].sum()) for items in plan.micro_batches),
    "fixed": trainer.budget.fixed_bytes - 8 * sum(p.numel() for p in trainer.model.parameters()),
    "per_token": trainer.budget.bytes_per_token,
    "taken": resident("VmHWM") - before,
}))
"""


@pytest.mark.long
@pytest.mark.real_model
@pytest.mark.usefixtures("needs_bf16")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
def test_predicted_memory_is_what_a_real_step_takes(smol_model: Path, tmp_path: Path) -> None:
    """SmolLM2-135M, bf16 compute, two micro-batches: resident memory grows by 0.6 to 1.4 times the prediction.

    Two, because the second's activations stand beside the first's gradients, as the prediction has it. (Measured with
    two steps of 1,900 tokens and moments: 0.87 to 0.95 times, with checkpointing too; with LoRA 1.2 to 1.3.)
    """
    rows = [
        {"prompt": f"{k} water " * 30, "chosen": "stone light " * (20 + 9 * k), "rejected": "river " * (40 - 9 * k)}
        for k in range(4)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model_name_or_path": str(smol_model),
        "dataset_mixer": {str(tmp_path / "train.jsonl"): 1.0},
        "validation_fraction": 0.0,
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "preprocessing_num_workers": 1,
    }
    command = [sys.executable, "-c", REAL_STEP, json.dumps(recipe)]  # a fork's memory does not start empty
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(result.stdout.splitlines()[-1])
    predicted = found["fixed"] + found["per_token"] * found["tokens"]
    assert 0.6 <= found["taken"] / predicted <= 1.4, found
