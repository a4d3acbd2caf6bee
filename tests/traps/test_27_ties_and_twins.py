"""Trap 27: chosen and rejected identical, or a pair made of equal scores, are trained on."""

from __future__ import annotations

import json

import pytest
from tokenizers_for_tests import tokenize_pair

from simpo.data.preferences import Pair, RowError
from simpo.data.prepare import prepare_pairs

GOOD = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(20)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "identical"),
        ({"prompt": "q", "chosen": "same", "rejected": "same \n"}, "identical"),
        ({"prompt": "q", "all_generated_responses": ["a", "b"], "all_rm_scores": [0.5, 0.5]}, "tie"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 7.0, "score_rejected": 7}, "tie"),
        ({"prompt": "q", "all_generated_responses": ["a", "a"], "all_rm_scores": [0.1, 0.9]}, "identical"),
    ],
)
def test_dropped_and_counted(row, reason, tmp_path, build_tokenizer, data_recipe):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*GOOD, row]))
    recipe = data_recipe(tmp_path / "p.jsonl", validation_fraction=0)
    prepared = prepare_pairs(recipe, build_tokenizer("chatml"), progress=False)
    account = prepared.ledger.splits["train"]
    assert (account.input, account.kept) == (21, 20)
    assert account.dropped[reason]["count"] == 1
    assert "p.jsonl/train#20" not in prepared.train["row_id"]


def test_answers_that_differ_in_an_end_of_turn_alone_are_equal(build_tokenizer):
    with pytest.raises(RowError) as caught:
        tokenize_pair(Pair("r", "q", "yes", "yes<|im_end|>"), build_tokenizer("chatml"), max_length=99)
    assert caught.value.reason == "identical"


def test_pair_that_cutting_makes_equal(build_tokenizer):
    pair = Pair("r", "q", "word " * 50 + "yes", "word " * 50 + "no")
    with pytest.raises(RowError) as caught:
        tokenize_pair(pair, build_tokenizer("chatml"), max_length=40, max_prompt_length=20)
    assert caught.value.reason == "identical after truncation"
