"""eval_pairs.jsonl: the held-out pairs one by one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpo.core.losses import PairLogps
from simpo.recipe import load_recipe
from simpo.run.eval_pairs import EvalPairs
from simpo.trainer import Trainer


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_first_the_best_and_the_latest_evaluation_are_kept_each_pair_once(tmp_path: Path) -> None:
    recipe = load_recipe({"model_name_or_path": "m"})
    twice = SimpleNamespace(
        is_main=True, gather=lambda value: [value, dict(value)]
    )  # two processes with the same pairs
    pairs = EvalPairs(tmp_path)
    for step in (0, 5, 10, 15):
        for index in (1, 0):
            batch = SimpleNamespace(indices=(index,), pairs=SimpleNamespace(row_ids=[f"s/test#{index}"]))
            sums = torch.tensor([-6.0 - index]), torch.tensor([-9.0 - step])
            pairs.add(PairLogps(*sums, torch.tensor([3]), torch.tensor([4])), batch, recipe)
        pairs.save(step, twice, keep={5})
    kept = lines(tmp_path / "eval_pairs.jsonl")
    assert [line["step"] for line in kept] == [0, 5, 15]
    assert kept[0]["row_ids"] == ["s/test#0", "s/test#1"]
    assert kept[0]["logps/chosen"] == pytest.approx([-2.0, -7 / 3])
    assert kept[0]["tokens/rejected"] == [4.0, 4.0]
    assert kept[0]["margin"] == pytest.approx([recipe.beta * (m + 2.25) for m in (-2.0, -7 / 3)], rel=1e-5)


def test_a_run_writes_the_pairs_whose_means_it_logs(tiny_recipe: dict[str, Any]) -> None:
    Trainer(load_recipe({**tiny_recipe, "eval_on_start": True})).run()
    folder = Path(tiny_recipe["output_dir"])
    logged = {line["step"]: line for line in lines(folder / "metrics.jsonl") if "eval_loss" in line}
    found = lines(folder / "eval_pairs.jsonl")
    assert [line["step"] for line in found] in ([0, 10], [0, 5, 10])
    for line in found:
        for column, metric in (("margin", "rewards/margins"), ("logps/chosen", "logps/chosen")):
            mean = sum(line[column]) / len(line[column])
            assert mean == pytest.approx(logged[line["step"]][f"eval_{metric}"], rel=1e-5)
