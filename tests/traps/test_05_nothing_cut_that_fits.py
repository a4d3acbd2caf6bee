"""Trap 5: responses cut to `max_length - max_prompt_length` even when the prompt is short."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import tokenize_pair

from simpo.data.preferences import Pair
from simpo.data.tokenize import Cut, plan_cut


def test_the_published_example_is_left_alone():
    assert plan_cut(100, 1948, 400, max_length=2048, max_prompt_length=1800) == Cut()


def test_only_the_long_side_is_cut_and_only_as_far_as_needed():
    assert plan_cut(100, 2000, 400, max_length=2048, max_prompt_length=1800) == Cut(chosen=52)


@pytest.mark.parametrize("kind", ["chatml", "smollm", "llama3", "gemma", "mistral", "plain_bos"])
def test_short_prompt_with_long_responses_keeps_its_end_of_turn(kind, build_tokenizer):
    tokenizer = build_tokenizer(kind)
    pair = Pair("r", "Which river?", "water " * 60, "slow " * 9)
    whole = tokenize_pair(pair, tokenizer, max_length=10_000)
    exact = tokenize_pair(
        pair, tokenizer, max_length=len(whole.chosen_ids), max_prompt_length=len(whole.chosen_ids) - 5
    )
    assert exact == whole
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    assert exact.chosen_ids[-1] in ends
    assert exact.rejected_ids[-1] in ends
