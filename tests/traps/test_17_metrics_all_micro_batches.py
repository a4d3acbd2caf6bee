"""Trap 17: metrics of the last micro-batch (or of rank 0) only. Here sums and counts over all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from simpo.core.losses import LOSSES, PairLogps
from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run.metrics import PAIR_METRICS, Totals, pair_metric_sums
from simpo.trainer import Trainer


def sums_of(chosen: list[float], rejected: list[float]) -> tuple[torch.Tensor, int]:
    ones = torch.ones(len(chosen), dtype=torch.long)
    logps = PairLogps(torch.tensor(chosen), torch.tensor(rejected), ones, ones)
    loss = LOSSES["sigmoid"](logps, beta=2.0, gamma_beta_ratio=0.5)
    return pair_metric_sums(logps, loss, loss.losses), len(chosen)


def test_means_are_over_the_pairs_of_all_micro_batches() -> None:
    chosen, rejected = [-1.0, -2.0, -0.5, -3.0, -1.5], [-2.0, -1.0, -0.7, -4.0, -1.6]
    whole, parts = Totals(), Totals()
    whole.add(*sums_of(chosen, rejected))
    parts.add(*sums_of(chosen[:4], rejected[:4]))
    parts.add(*sums_of(chosen[4:], rejected[4:]))  # one pair alone must not weigh as much as four
    assert parts.means() == pytest.approx(whole.means(), rel=1e-6)
    assert parts.means()["logps/chosen"] == pytest.approx(sum(chosen) / 5)
    assert parts.means()["rewards/accuracies"] == pytest.approx(4 / 5)
    mean_of_means = (sum(chosen[:4]) / 4 + chosen[4]) / 2
    assert parts.means()["logps/chosen"] != pytest.approx(mean_of_means)


def test_a_tie_counts_half_in_the_accuracy() -> None:
    meter = Totals()
    meter.add(*sums_of([-1.0, -1.0, -2.0], [-1.0, -2.0, -1.0]))
    assert meter.means()["rewards/accuracies"] == 0.5
    meter.add(*sums_of([-1.0], [-1.0]))
    assert meter.means()["rewards/accuracies"] == 0.5


def test_empty_totals_have_no_means_and_state_survives() -> None:
    meter = Totals()
    assert meter.means() == {}
    meter.add(*sums_of([-1.0, -1.25], [-2.0, -0.125]))
    restored = Totals.from_json(json.loads(json.dumps(meter.to_json())))
    assert restored.means() == meter.means()
    restored.add(*sums_of([-3.0], [-4.0]))
    meter.add(*sums_of([-3.0], [-4.0]))
    assert restored.means() == meter.means()


def test_logged_metrics_cover_every_step_and_micro_batch_since_the_last_line(tiny_recipe: dict[str, Any]) -> None:
    """Three steps of four micro-batches, logged once, at a learning rate so small that the model stays what it was:

    the line equals the mean over those twelve pairs, each computed alone.
    """
    recipe = load_recipe(
        {
            **tiny_recipe,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "max_steps": 3,
            "logging_steps": 3,
            "learning_rate": 1e-12,
            "save_strategy": "no",
            "eval_strategy": "no",
        }
    )
    trainer = Trainer(recipe, display=Display(quiet=True))
    meter = Totals()
    with torch.no_grad():
        for plan in trainer.loader.plans(0, 3):
            for index in [i for items in plan.micro_batches for i in items]:
                _, sums = trainer.forward(trainer.loader.build([index]), plan)
                meter.add(sums, 1)
    assert set(meter.pairs.values()) == {12}
    trainer.run()
    lines = [json.loads(line) for line in Path(recipe.output_dir, "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "loss" in line]
    assert {name: line[name] for name in PAIR_METRICS} == pytest.approx(meter.means(), rel=1e-5, abs=1e-6)
