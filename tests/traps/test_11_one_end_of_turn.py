"""Trap 11: end-of-turn twice when the template ends "<eos>\\n"; or written onto a cut response's last token."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import tokenize_pair

from simpo.data.preferences import Pair, RowError

ENDS = {
    "chatml": "<|im_end|>",
    "smollm": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "thinking": "</s>",
    "words": "<|end|>",
    "plain": "<|end|>",
    "plain_bos": "</s>",
}


@pytest.mark.parametrize(("kind", "end"), ENDS.items())
@pytest.mark.parametrize("tail", ["", "{end}", "{end}\n", " {end} {end}\n"])
def test_complete_responses_end_with_exactly_one(kind, end, tail, build_tokenizer):
    tokenizer = build_tokenizer(kind)
    end_id = tokenizer.convert_tokens_to_ids(end)
    pair = Pair("r", "Which river?", "The green one." + tail.format(end=end), "No river.")
    tokens = tokenize_pair(pair, tokenizer, max_length=200)
    for side in ("chosen", "rejected"):
        response = getattr(tokens, f"{side}_ids")[getattr(tokens, f"{side}_start") :]
        assert response[-1] == end_id
        assert response.count(end_id) == 1


@pytest.mark.parametrize(("kind", "end"), ENDS.items())
def test_none_is_faked_on_a_cut_response(kind, end, build_tokenizer):
    tokenizer = build_tokenizer(kind)
    end_id = tokenizer.convert_tokens_to_ids(end)
    pair = Pair("r", "Which river?", "water " * 80, "No river.")
    whole = tokenize_pair(pair, tokenizer, max_length=1000)
    cut = tokenize_pair(pair, tokenizer, max_length=len(whole.chosen_ids) - 7, max_prompt_length=60)
    assert cut.chosen_cut == 7
    assert cut.chosen_ids == whole.chosen_ids[:-7]
    assert end_id not in cut.chosen_ids[cut.chosen_start :]
    assert cut.rejected_ids == whole.rejected_ids


def test_end_of_turn_in_the_middle_of_a_response_is_refused(build_tokenizer):
    pair = Pair("r", "q", "One.<|im_end|> Two.", "No.")
    with pytest.raises(RowError) as caught:
        tokenize_pair(pair, build_tokenizer("chatml"), max_length=100)
    assert caught.value.reason == "malformed"
    assert "<|im_end|>" in caught.value.detail
