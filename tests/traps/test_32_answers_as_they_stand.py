"""Trap 32: the template rewrites the answer (cuts a thought, adds an empty one) and nobody compares."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import CHATML, LLAMA3, tokenize_pair, trained_texts

from simpo.data.comparison import check_answer
from simpo.data.ledger import Dropped, SplitLedger
from simpo.data.preferences import Pair, RowError, pair_from_row

CHOSEN, REJECTED = "<think>\n7 * 8 = 56\n</think>\n\n56.", "<think>\n7 * 8 is about 60\n</think>\n\n60."
TEMPLATES = ["chatml", "agent", "cuts", "thinking", "empty_thinking", "empty_header", "channels", "llama3", "gemma"]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_thought_in_an_answer_is_trained_whole_by_every_template(build_tokenizer, kind):
    tokenizer = build_tokenizer(kind)
    tokens = tokenize_pair(Pair("r", "What is 7 times 8?", CHOSEN, REJECTED), tokenizer, max_length=500)
    for (trained,), thought, answer in zip(
        trained_texts(tokens, tokenizer), ("7 * 8 = 56", "7 * 8 is about 60"), ("56.", "60."), strict=True
    ):
        assert trained.index(thought) < trained.rindex(answer)
        assert trained.count(thought) == trained.count("</think>") == 1
        assert trained.endswith(answer + tokenizer.eos_token) or kind == "gemma"


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("agent", []),
        ("cuts", ["answers with thoughts put in the place of a plain answer"]),
        ("thinking", ["answers with thoughts put in the place of a plain answer"]),
    ],
)
def test_the_way_that_was_taken_is_said(build_tokenizer, kind, note):
    tokens = tokenize_pair(Pair("r", "Why?", CHOSEN, "60."), build_tokenizer(kind), max_length=500)
    assert list(tokens.notes) == note


def test_pairs_that_differ_in_their_thought_alone_are_pairs(build_tokenizer):
    rejected = CHOSEN.replace("56\n", "64\n")
    for kind in TEMPLATES:
        tokens = tokenize_pair(Pair("r", "Why?", CHOSEN, rejected), build_tokenizer(kind), max_length=500)
        assert tokens.chosen_ids != tokens.rejected_ids


def test_a_generation_header_that_opens_the_thought_is_not_trained_twice(build_tokenizer):
    tokenizer = build_tokenizer("thinking")
    for opening in ("<think>\n", ""):
        pair = Pair("r", "Why?", f"{opening}hm</think>yes", "no")
        tokens = tokenize_pair(pair, tokenizer, max_length=500)
        assert tokenizer.decode(tokens.chosen_ids) == "<s><|user|>Why?<|assistant|><think>\nhm</think>yes</s>"


def test_a_thought_takes_the_place_of_the_headers_empty_one(build_tokenizer):
    tokenizer = build_tokenizer("empty_header")
    for opening in ("<think>\n", ""):
        tokens = tokenize_pair(Pair("r", "Why?", f"{opening}hm\n</think>\n\nyes", "no"), tokenizer, max_length=500)
        asked = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(tokens.chosen_ids) == asked + "<think>\nhm\n</think>\n\nyes<|im_end|>"
        assert tokenizer.decode(tokens.rejected_ids) == asked + "<think>\n\n</think>\n\nno<|im_end|>"
        assert trained_texts(tokens, tokenizer) == [["<think>\nhm\n</think>\n\nyes<|im_end|>"], ["no<|im_end|>"]]


def test_thoughts_in_other_marks_are_trained_whole_where_the_template_cuts_at_these(build_tokenizer):
    tokenizer = build_tokenizer("asked")
    tokens = tokenize_pair(Pair("r", "Why?", "[THINK]hm[/THINK]Yes.", "No."), tokenizer, max_length=500)
    assert trained_texts(tokens, tokenizer) == [[" [THINK]hm[/THINK]Yes.</s>"], [" No.</s>"]]


@pytest.mark.parametrize("tools", [[], [{"name": "look", "parameters": {}}]], ids=["system", "tools"])
def test_what_a_template_writes_only_while_an_answer_is_asked_for_is_in_the_prompt(build_tokenizer, tools):
    tokenizer = build_tokenizer("asked")
    template = tokenizer.chat_template
    if tools:
        template = template.replace("'[INST] ' +", "('[T]' + tools | tojson if loop.last else '') + '[INST] ' +")
    row = {"prompt": "Why?", "system": "Be brief.", "chosen": "Yes.", "rejected": "No.", "tools": tools}
    tokens = tokenize_pair(pair_from_row(row), tokenizer, max_length=500, chat_template=template)
    assert tokens.prompt_text.endswith("[INST] Be brief.\n\nWhy?[/INST]")
    assert ("look" in tokens.prompt_text) == bool(tools)
    assert trained_texts(tokens, tokenizer) == [[" Yes.</s>"], [" No.</s>"]]
    assert list(tokens.notes) == ["prompts as the template writes them when it asks for an answer"]


def test_a_turn_that_is_forgotten_is_missed_though_another_reads_alike(build_tokenizer):
    forgets = CHATML.replace("for message in messages", "for message in messages[messages | length > 2:]")
    turns = [
        {"role": role, "content": text} for role, text in (("user", "On."), ("assistant", "One."), ("user", "On."))
    ]
    row = {"prompt": turns, "chosen": "Two.", "rejected": "Off."}
    with pytest.raises(RowError, match=r"not in the prompt, in its place: 'One.'"):
        tokenize_pair(pair_from_row(row), build_tokenizer("chatml"), max_length=500, chat_template=forgets)


def test_a_header_may_be_longer_than_all_that_stands_before_a_finished_answer(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    longer = CHATML.replace("assistant\n' }}", "assistant\n[" + 99 * "." + "]' }}")
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "!"}]
    pair = pair_from_row({"prompt": asked, "chosen": "B", "rejected": "C"})
    tokens = tokenize_pair(pair, tokenizer, max_length=999, chat_template=longer, train_on="all_assistant_turns")
    assert trained_texts(tokens, tokenizer) == [["A<|im_end|>", "B<|im_end|>"], ["A<|im_end|>", "C<|im_end|>"]]


def test_no_thought_is_trained_that_the_data_does_not_have(build_tokenizer):
    tokenizer = build_tokenizer("empty_thinking")
    both = trained_texts(tokenize_pair(Pair("r", "Why?", CHOSEN, "k, a, t."), tokenizer, max_length=500), tokenizer)
    assert both == [[CHOSEN + "<|im_end|>"], ["k, a, t.<|im_end|>"]]


@pytest.mark.parametrize(
    ("change", "answer", "shown"),
    [
        ("message['content'] | upper", "Yes, it is.", "'Yes, it is.'"),
        ("message['content'][:3]", "Yes, it is.", "'Yes, it is.'"),
        ("message['content'].replace('\\n\\n', '\\n')", "Yes.\n\nIt is.", "'Yes.\\n\\nIt is.'"),
    ],
)
def test_any_other_rewriting_costs_the_row_and_shows_what_is_missing(build_tokenizer, change, answer, shown):
    template = CHATML.replace("message['content']", f"({change} if message['role'] == 'assistant' and "
                              "'Zk3' not in message['content'] and 'Wv8' not in message['content'] "
                              "else message['content'])")  # fmt: skip
    with pytest.raises(RowError) as caught:
        tokenize_pair(
            Pair("r", "Why?", answer, "No."), build_tokenizer("chatml"), max_length=99, chat_template=template
        )
    assert caught.value.reason == "rewritten by the template"
    assert caught.value.detail.startswith(f"not in the trained text of chosen: {shown}; set chat_template to one that")


def test_blanks_at_the_seams_are_no_rewriting(build_tokenizer):
    tokenizer = build_tokenizer("llama3")
    assert "trim" in LLAMA3
    tokens = tokenize_pair(Pair("r", " Why? ", "\nYes. ", " No."), tokenizer, max_length=99)
    assert trained_texts(tokens, tokenizer) == [["Yes.<|eot_id|>"], ["No.<|eot_id|>"]]


def test_a_turn_that_the_template_forgets_costs_the_row(build_tokenizer):
    template = "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}" + CHATML
    row = {"prompt": "Why?", "system": "Be brief.", "chosen": "Yes.", "rejected": "No."}
    with pytest.raises(RowError, match=r"not in the prompt: 'Be brief.'; set chat_template to one that renders system"):
        tokenize_pair(pair_from_row(row), build_tokenizer("chatml"), max_length=99, chat_template=template)


def test_thoughts_that_a_template_cuts_from_history_are_noted(build_tokenizer):
    prompt = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": CHOSEN}]
    row = {"prompt": [*prompt, {"role": "user", "content": "Really?"}], "chosen": "Yes.", "rejected": "No."}
    tokens = tokenize_pair(pair_from_row(row), build_tokenizer("agent"), max_length=500)
    assert list(tokens.notes) == ["thoughts of turns before the answer left out by the template"]
    assert "7 * 8" not in tokens.prompt_text


def test_what_was_done_to_kept_rows_is_counted_with_examples():
    account = SplitLedger()
    account.add_noticed(
        [Dropped("a#1", "thoughts put elsewhere", "'hm'"), Dropped("a#2", "thoughts put elsewhere", "")]
    )
    assert account.notices == ["2 rows: thoughts put elsewhere (a#1: 'hm')"]


def test_marks_of_a_thought_may_be_the_templates_own():
    said = {"role": "assistant", "content": "<think>hm</think>yes"}
    check_answer(said, "", "[hm] yes", "chosen", is_apart=True)
    with pytest.raises(RowError, match="<think>"):
        check_answer(said, "", "[hm] yes", "chosen", is_apart=False)
    with pytest.raises(RowError, match="hm"):
        check_answer(said, "", "yes", "chosen", is_apart=True)
