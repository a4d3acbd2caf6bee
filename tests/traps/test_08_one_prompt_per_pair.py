"""Trap 8: the prompt cut differently for chosen and rejected."""

from __future__ import annotations

import random

import pytest
from tokenizers_for_tests import tokenize_pairs

from simpo.data.preferences import Pair, RowError


@pytest.mark.parametrize("kind", ["chatml", "smollm", "llama3", "gemma", "mistral", "words", "plain", "plain_bos"])
def test_chosen_and_rejected_keep_the_same_prompt(kind, build_tokenizer):
    rng = random.Random(8)
    words = ["the", "river", "runs", "slow", "and", "water", "is", "green\n"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 80))) for _ in range(150)]
    pairs = [Pair(f"r{i}", texts[i], texts[i + 1], texts[i + 2]) for i in range(0, 148)]
    results = tokenize_pairs(pairs, build_tokenizer(kind), max_length=70, max_prompt_length=40)
    tokens = [result for result in results if not isinstance(result, RowError)]
    assert sum(result.prompt_cut > 0 for result in tokens) > 20
    for result in tokens:
        # A token that straddles the seam belongs to its response, so the two may start one token apart at most.
        start = min(result.chosen_start, result.rejected_start)
        assert result.chosen_ids[:start] == result.rejected_ids[:start]
        assert abs(result.chosen_start - result.rejected_start) <= 1
