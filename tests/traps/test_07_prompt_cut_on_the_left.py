"""Trap 7: a prompt cut on the right loses the last question and the assistant header first."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import tokenize_pair

from simpo.data.preferences import Pair

FIRST = "old words " * 60
PROMPT = [
    {"role": "user", "content": FIRST},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Which river is green?"},
]


@pytest.mark.parametrize(
    ("kind", "start", "end"),
    [
        ("chatml", "", "Which river is green?<|im_end|>\n<|im_start|>assistant\n"),
        ("smollm", "<|im_start|>", "Which river is green?<|im_end|>\n<|im_start|>assistant\n"),
        (
            "llama3",
            "<|begin_of_text|>",
            "Which river is green?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("gemma", "<bos>", "Which river is green?<end_of_turn>\n<start_of_turn>model\n"),
        ("mistral", "<s>", "[INST] Which river is green? [/INST]"),
    ],
)
def test_the_last_question_and_the_header_stay_and_so_does_bos(kind, start, end, build_tokenizer):
    tokenizer = build_tokenizer(kind)
    pair = Pair("r", PROMPT, "The slow one.", "The quick one.")
    whole = tokenize_pair(pair, tokenizer, max_length=10_000)
    cut = tokenize_pair(pair, tokenizer, max_length=150, max_prompt_length=110)
    prompt = tokenizer.decode(cut.chosen_ids[: cut.chosen_start])
    assert prompt.startswith(start)
    assert prompt.endswith(end)
    assert cut.prompt_cut == len(whole.chosen_ids) - len(cut.chosen_ids) > 0
    assert cut.chosen_cut == cut.rejected_cut == 0
    kept_start = int(bool(start))
    assert cut.chosen_ids[kept_start:] == whole.chosen_ids[kept_start + cut.prompt_cut :]


def test_the_prompt_gives_way_no_further_than_needed(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    pair = Pair("r", PROMPT, "The slow one.", "The quick one.")
    cut = tokenize_pair(pair, tokenizer, max_length=150, max_prompt_length=20)
    assert max(len(cut.chosen_ids), len(cut.rejected_ids)) == 150
    assert cut.chosen_cut == cut.rejected_cut == 0


def test_a_special_token_that_recurs_is_no_start_token(build_tokenizer):
    """Every turn begins with <|im_start|>: kept in front of a cut prompt it would open a turn that is not there."""
    tokenizer = build_tokenizer("chatml")
    pair = Pair("r", "old words " * 60, "The slow one.", "The quick one.")
    whole = tokenize_pair(pair, tokenizer, max_length=10_000)
    assert whole.chosen_ids.count(whole.chosen_ids[0]) == 2
    cut = tokenize_pair(pair, tokenizer, max_length=60, max_prompt_length=40)
    assert cut.chosen_ids == whole.chosen_ids[-len(cut.chosen_ids) :]
