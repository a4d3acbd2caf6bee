"""The demo's pair builder: best against worst, complete, clearly apart, split by prompt."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
PROMPT = "How do I keep bread fresh?"
GOOD = "Keep bread in a paper bag at room temperature, and freeze in slices what you won't eat soon to have it fresh."
ALSO_GOOD = "Fresh bread likes a paper bag at room temperature; slice and freeze whatever is left after three days."
POOR = "Certainly! Bread is good and bread is good and bread is good and bread is good and bread is good and"


@pytest.fixture(scope="module")
def make_pairs() -> ModuleType:
    names = ("make_pairs", "rule", "get_model")  # the demo's scripts import each other by plain name
    sys.path.insert(0, str(DEMO))
    try:
        yield importlib.import_module("make_pairs")
    finally:
        sys.path.remove(str(DEMO))
        for name in names:
            sys.modules.pop(name, None)


def row(*samples: tuple[str, bool], row_id: str = "a") -> dict[str, Any]:
    texts = [{"text": text, "num_tokens": len(text.split()), "finished": finished} for text, finished in samples]
    return {"id": row_id, "prompt": PROMPT, "samples": texts}


def build(module: ModuleType, *samples: tuple[str, bool], min_gap: float = 0.3) -> dict[str, Any] | None:
    return module.build_pair(row(*samples), min_gap=min_gap, min_chosen=0.6, source="m")


def test_best_finished_sample_against_worst(make_pairs):
    pair = build(make_pairs, (POOR, False), (GOOD, True), ("Bread.", True))
    assert pair["prompt"] == [{"role": "user", "content": PROMPT}]
    assert pair["chosen"] == [{"role": "assistant", "content": GOOD}]
    assert pair["rejected"][0]["content"] == POOR
    assert pair["score_chosen"] > pair["score_rejected"] + 0.3
    assert (pair["id"], pair["source"]) == ("a", "m")


def test_equal_scores_keep_the_earlier_sample(make_pairs):
    assert build(make_pairs, (GOOD, True), (ALSO_GOOD, True), (POOR, False))["chosen"][0]["content"] == GOOD
    assert build(make_pairs, (ALSO_GOOD, True), (GOOD, True), (POOR, False))["chosen"][0]["content"] == ALSO_GOOD


def test_no_pair_without_a_finished_good_clearly_better_sample(make_pairs):
    assert build(make_pairs, (GOOD, False), (POOR, False)) is None
    assert build(make_pairs, (GOOD, True), (ALSO_GOOD, True)) is None
    assert build(make_pairs, ("Bread.", True), (POOR, True), min_gap=0.0) is None
    assert build(make_pairs, (GOOD, True), ("", True)) is None


def test_samples_of_several_rounds_are_merged_by_id(make_pairs):
    first, second = row((POOR, True)), row((GOOD, True))
    (merged,) = make_pairs.merge_samples([first, second])
    assert [s["text"] for s in merged["samples"]] == [POOR, GOOD]
    assert len(first["samples"]) == 1
    with pytest.raises(ValueError, match="answer two prompts"):
        make_pairs.merge_samples([first, {**second, "prompt": "Other?"}])


def test_split_is_seeded_and_disjoint(make_pairs):
    pairs = [{"id": i} for i in range(50)]
    train, test = make_pairs.split_pairs(pairs, num_train=30, num_test=10, seed=0)
    assert (train, test) == make_pairs.split_pairs(pairs, num_train=30, num_test=10, seed=0)
    assert (train, test) != make_pairs.split_pairs(pairs, num_train=30, num_test=10, seed=1)
    assert (len(train), len(test)) == (30, 10)
    assert not {p["id"] for p in train} & {p["id"] for p in test}
    with pytest.raises(ValueError, match="50 pairs are fewer than 45 \\+ 10"):
        make_pairs.split_pairs(pairs, num_train=45, num_test=10, seed=0)


def test_bad_line_of_a_samples_file_is_named(make_pairs, tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_text('{"id": "a\u2028b"}\n{"id": \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2"):
        make_pairs.load_rows(file)
