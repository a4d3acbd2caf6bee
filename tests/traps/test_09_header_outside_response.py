"""Trap 9: template headers or a default system prompt land inside the response and count in its length."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import tokenize_pair

from simpo.data.preferences import Pair

PAIR = Pair("r", "Which river?", "answer green one.", "No river.")


@pytest.mark.parametrize(
    ("kind", "response"),
    [
        ("chatml", "answer green one.<|im_end|>"),
        ("smollm", "answer green one.<|im_end|>"),
        ("llama3", "answer green one.<|eot_id|>"),
        ("gemma", "answer green one.<end_of_turn>"),
        ("mistral", " answer green one.</s>"),
        ("words", " answer green one.<|end|>"),  # the header's last blank is one token with "answer"
        ("empty_thinking", "answer green one.<|im_end|>"),
        ("plain", "answer green one.<|end|>"),
        ("plain_bos", "answer green one.</s>"),
        ("no_eos", "answer green one."),
    ],
)
def test_trained_text_is_the_response_and_its_end_alone(kind, response, build_tokenizer):
    tokenizer = build_tokenizer(kind)
    tokens = tokenize_pair(PAIR, tokenizer, max_length=200)
    assert tokenizer.decode(tokens.chosen_ids[tokens.chosen_start :]) == response


def test_default_system_prompt_is_in_the_prompt_once(build_tokenizer):
    tokenizer = build_tokenizer("smollm")
    tokens = tokenize_pair(PAIR, tokenizer, max_length=200)
    text = tokenizer.decode(tokens.chosen_ids)
    assert text.count("You are a helpful assistant") == 1
    assert tokenizer.decode(tokens.chosen_ids[: tokens.chosen_start]).endswith("<|im_start|>assistant\n")


def test_thinking_that_the_data_brings_is_trained_and_no_other(build_tokenizer):
    tokenizer = build_tokenizer("empty_thinking")
    tokens = tokenize_pair(Pair("r", "Why?", "<think>\nhm</think>\n\nyes", "no"), tokenizer, max_length=200)
    trained = [tokens.chosen_ids[tokens.chosen_start :], tokens.rejected_ids[tokens.rejected_start :]]
    texts = ["<think>\nhm</think>\n\nyes<|im_end|>", "no<|im_end|>"]
    assert [tokenizer.decode(ids) for ids in trained] == texts


def test_finished_answer_behind_another_header_than_the_one_asked_for(build_tokenizer):
    tokenizer = build_tokenizer("thinking")
    tokens = tokenize_pair(PAIR, tokenizer, max_length=200)
    assert tokenizer.decode(tokens.chosen_ids) == "<s><|user|>Which river?<|assistant|>answer green one.</s>"
    assert tokenizer.decode(tokens.chosen_ids[tokens.chosen_start :]) == "answer green one.</s>"


def test_template_that_rewrites_the_prompt_is_refused(build_tokenizer):
    from simpo.data.preferences import RowError

    tokenizer = build_tokenizer("counting")
    tokens = tokenize_pair(PAIR, tokenizer, max_length=200)  # rewritten the same way for every answer: its own header
    assert tokenizer.decode(tokens.chosen_ids[tokens.chosen_start :]) == "answer green one.<|im_end|>"
    template = "{{ messages[-1]['content'] | length }}" + tokenizer.chat_template
    with pytest.raises(RowError) as caught:
        tokenize_pair(PAIR, tokenizer, max_length=200, chat_template=template)
    assert caught.value.reason == "template"


@pytest.mark.long
def test_every_real_response_decodes_to_itself_and_one_end_of_turn(held_out_files, smol_model):
    from tokenizers_for_tests import tokenize_pairs
    from transformers import AutoTokenizer

    from simpo.data.files import read_file
    from simpo.data.preferences import pair_from_row

    tokenizer = AutoTokenizer.from_pretrained(smol_model)
    for file in held_out_files:
        pairs = [pair_from_row(row, row_id=str(i)) for i, row in enumerate(read_file(file))]
        for pair, tokens in zip(pairs, tokenize_pairs(pairs, tokenizer, max_length=100_000)):
            for side in ("chosen", "rejected"):
                ids, start = getattr(tokens, f"{side}_ids"), getattr(tokens, f"{side}_start")
                assert tokenizer.decode(ids[start:]) == getattr(pair, side) + "<|im_end|>", (file.parent.name, pair)
                messages = [*pair.prompt, {"role": "assistant", "content": getattr(pair, side)}]
                whole = tokenizer.apply_chat_template(messages)["input_ids"]
                assert whole[:-1] == ids  # all but the line end behind the last <|im_end|>
