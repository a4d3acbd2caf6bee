"""The pairs shipped with the demo are what their README says: well-formed, split by prompt, ordered by the rule."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import load_script

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


def rows_of(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def rule() -> ModuleType:
    return load_script("examples", "demo", "rule.py")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, Any]]]:
    return {name: rows_of(DEMO / "pairs" / f"{name}.jsonl") for name in ("train", "test")}


def text_of(row: dict[str, Any], side: str, role: str) -> str:
    (message,) = row[side]
    assert set(message) == {"role", "content"}
    assert message["role"] == role
    assert message["content"] == message["content"].strip() != ""
    return message["content"]


def test_prompts_are_many_unique_and_complete():
    prompts = rows_of(DEMO / "prompts.jsonl")
    assert len(prompts) >= 640
    assert all(set(row) == {"id", "topic", "prompt"} for row in prompts)
    assert len({row["id"] for row in prompts}) == len(prompts)
    assert len({row["prompt"].lower().strip(" .?!") for row in prompts}) == len(prompts)


def test_there_are_enough_pairs(splits):
    assert len(splits["train"]) >= 400
    assert len(splits["test"]) >= 80


def test_pairs_are_well_formed(splits):
    for row in splits["train"] + splits["test"]:
        assert set(row) == {"id", "prompt", "chosen", "rejected", "score_chosen", "score_rejected", "source"}
        text_of(row, "prompt", "user")
        assert text_of(row, "chosen", "assistant") != text_of(row, "rejected", "assistant")


def test_every_pair_answers_a_prompt_of_the_list(splits):
    prompts = {row["id"]: row["prompt"] for row in rows_of(DEMO / "prompts.jsonl")}
    for row in splits["train"] + splits["test"]:
        assert text_of(row, "prompt", "user") == prompts[row["id"]]


def test_ids_are_unique_and_no_prompt_is_in_both_splits(splits):
    ids = [row["id"] for row in splits["train"] + splits["test"]]
    assert len(set(ids)) == len(ids)
    train, test = ({text_of(row, "prompt", "user") for row in splits[name]} for name in ("train", "test"))
    assert len(train) + len(test) == len(ids)
    assert not train & test


def test_recorded_scores_are_those_of_the_rule_and_chosen_is_clearly_higher(splits, rule):
    for row in splits["train"] + splits["test"]:
        prompt = text_of(row, "prompt", "user")
        chosen = rule.score(prompt, text_of(row, "chosen", "assistant")).total
        rejected = rule.score(prompt, text_of(row, "rejected", "assistant")).total
        assert chosen == pytest.approx(row["score_chosen"], abs=1e-4), row["id"]
        assert rejected == pytest.approx(row["score_rejected"], abs=1e-4), row["id"]
        assert chosen - rejected >= 0.25, row["id"]


def test_shipped_files_are_small():
    size = sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert size < 2_000_000
