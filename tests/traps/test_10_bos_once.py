"""Trap 10: BOS twice, or inside the response; `startswith(None)` on tokenizers without BOS."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import tokenize_pair

from simpo.data.preferences import Pair

PAIR = Pair("r", "Which river?", "The green one.", "No river.")


@pytest.mark.parametrize("kind", ["llama3", "gemma", "mistral", "thinking", "plain_bos"])
@pytest.mark.parametrize("max_length", [200, 12])
def test_bos_exactly_once_at_the_front(kind, max_length, build_tokenizer):
    tokenizer = build_tokenizer(kind)
    tokens = tokenize_pair(PAIR, tokenizer, max_length=max_length, max_prompt_length=6)
    for ids in (tokens.chosen_ids, tokens.rejected_ids):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", ["chatml", "words", "plain", "no_eos"])
def test_none_where_the_tokenizer_has_none(kind, build_tokenizer):
    tokenizer = build_tokenizer(kind)
    assert tokenizer.bos_token is None
    tokens = tokenize_pair(PAIR, tokenizer, max_length=200)
    assert tokenizer.decode(tokens.chosen_ids).count("Which river?") == 1


def test_template_without_bos_gets_none_though_the_tokenizer_would_add_one(build_tokenizer):
    tokenizer = build_tokenizer("llama3")
    template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    tokens = tokenize_pair(PAIR, tokenizer, max_length=200, chat_template=template)
    assert tokenizer.bos_token_id not in tokens.chosen_ids


def test_plain_prompt_that_already_begins_with_bos(build_tokenizer):
    tokenizer = build_tokenizer("plain_bos")
    tokens = tokenize_pair(Pair("r", "<s>Which river?", "one", "two"), tokenizer, max_length=200)
    assert tokens.chosen_ids.count(tokenizer.bos_token_id) == 1
