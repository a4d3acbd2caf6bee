"""Trap 4: an empty or fully cut response gives 0/0, or a reward of 0, the best there is."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import tokenize_pair, tokenize_pairs

from simpo.data.preferences import Pair, RowError
from simpo.data.prepare import prepare_pairs


def _write(path, rows):
    import json

    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("blank", ["", "   ", "\n\t", None])
def test_blank_response_never_reaches_the_loss_and_the_ledger_says_why(blank, tmp_path, build_tokenizer, data_recipe):
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(9)]
    rows.append({"prompt": "q", "chosen": "yes", "rejected": blank})
    recipe = data_recipe(_write(tmp_path / "pairs.jsonl", rows), validation_fraction=0)
    prepared = prepare_pairs(recipe, build_tokenizer("chatml"), progress=False)
    assert len(prepared.train) == 9
    dropped = prepared.ledger.splits["train"].dropped
    assert dropped["empty"]["count"] == 1
    assert dropped["empty"]["examples"][0]["row_id"] == "pairs.jsonl/train#9"


@pytest.mark.parametrize("kind", ["chatml", "llama3", "plain"])
@pytest.mark.parametrize("max_length", [2, 3, 5, 8, 13, 21, 40])
def test_each_side_keeps_a_trained_token_or_the_pair_is_dropped(kind, max_length, build_tokenizer):
    pairs = [Pair("r", "word " * n, "yes " * c, "no " * r) for n in (1, 9, 30) for c in (1, 20) for r in (1, 20)]
    for result in tokenize_pairs(pairs, build_tokenizer(kind), max_length=max_length, max_prompt_length=1):
        if not isinstance(result, RowError):
            assert 1 <= result.chosen_start < len(result.chosen_ids) <= max_length
            assert 1 <= result.rejected_start < len(result.rejected_ids) <= max_length


def test_response_that_the_template_would_swallow_is_trained_whole(build_tokenizer):
    tokenizer = build_tokenizer("thinking")
    tokens = tokenize_pair(Pair("r", "q", "<think>all of it</think>", "no"), tokenizer, max_length=100)
    assert tokenizer.decode(tokens.chosen_ids[tokens.chosen_start :]) == "<think>all of it</think></s>"
