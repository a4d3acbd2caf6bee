"""Templates, cuts and batches: what `tests/traps` does not already hold."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken
from tokenizers_for_tests import tokenize_pair, tokenize_pairs

from simpo.data.preferences import Pair, RowError
from simpo.data.templates import load_chat_template, template_takes_system
from simpo.data.tokenize import Cut, _anchors, plan_cut

PAIR = Pair("r", "Which river?", "The green one.", "No river.")


@pytest.mark.parametrize(
    ("lengths", "limits", "expected"),
    [
        ((10, 5, 3), (15, 8), Cut()),  # fits exactly
        ((10, 6, 3), (15, 8), Cut(prompt=1)),  # the prompt gives way as far as needed
        ((10, 9, 3), (15, 8), Cut(prompt=2, chosen=2)),  # not below max_prompt_length; then the long response
        ((10, 9, 9), (15, 8), Cut(prompt=2, chosen=2, rejected=2)),
        ((5, 20, 3), (15, 8), Cut(chosen=10)),  # a prompt under max_prompt_length is not cut
        ((30, 1, 1), (15, 8), Cut(prompt=16)),  # nor further than the responses need
        ((30, 20, 20), (15, None), Cut(prompt=23, chosen=12, rejected=12)),  # None: half of max_length
        ((30, 20, 20), (15, 99), Cut(prompt=23, chosen=12, rejected=12)),  # a limit that is none: the same
    ],
)
def test_plan_cut(lengths, limits, expected):
    max_length, max_prompt_length = limits
    assert plan_cut(*lengths, max_length=max_length, max_prompt_length=max_prompt_length) == expected


def test_batch_gives_what_single_pairs_give_and_errors_stay_in_their_place(build_tokenizer):
    tokenizer = build_tokenizer("gemma")
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    pairs = [PAIR, Pair("s", system, "Yes.", "No."), Pair("t", "Why?", "One.", "Two. " * 30)]
    first, refused, last = tokenize_pairs(pairs, tokenizer, max_length=60)
    assert first == tokenize_pair(PAIR, tokenizer, max_length=60)
    assert last == tokenize_pair(pairs[2], tokenizer, max_length=60)
    assert isinstance(refused, RowError)
    assert refused.reason == "template"
    assert "System role not supported" in refused.detail
    assert tokenize_pairs([], tokenizer, max_length=60) == []


def test_texts_are_kept_beside_the_tokens(build_tokenizer):
    tokens = tokenize_pair(PAIR, build_tokenizer("chatml"), max_length=60)
    assert tokens.prompt_text == "<|im_start|>user\nWhich river?<|im_end|>\n<|im_start|>assistant\n"
    assert (tokens.chosen_text, tokens.rejected_text) == ("The green one.", "No river.")


def test_string_prompt_is_a_user_turn_where_there_is_a_template(build_tokenizer):
    tokenizer = build_tokenizer("llama3")
    as_turn = Pair("r", [{"role": "user", "content": "Which river?"}], PAIR.chosen, PAIR.rejected)
    assert tokenize_pair(as_turn, tokenizer, max_length=60) == tokenize_pair(PAIR, tokenizer, max_length=60)


@pytest.mark.parametrize("gap", ["\n", "\r\n"])
def test_a_transcript_without_blank_lines_is_one_turn_and_said_to_be(gap, build_tokenizer):
    """As HH-RLHF has them a blank line stands before each turn; what is pasted into a question may have none."""
    tokenizer = build_tokenizer("chatml")
    text = f"Human: Which?{gap}Assistant: This.{gap}Human: Why?{gap}Assistant:"
    for prompt in (text, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]):
        found = tokenize_pair(Pair("r", prompt, "Yes.", "No."), tokenizer, max_length=200)
        assert f"<|im_start|>user\n{text}<|im_end|>" in found.prompt_text
        (note,) = found.notes
        assert "a blank line before each turn" in note
    for prompt in ("Human: a species?", "What does this say?\nHuman: hello\nAssistant: hi"):
        assert not tokenize_pair(Pair("r", prompt, "Yes.", "No."), tokenizer, max_length=200).notes


def test_messages_without_a_template_name_the_key(build_tokenizer):
    pair = Pair("a/train#3", [{"role": "user", "content": "Why?"}], "Yes.", "No.")
    with pytest.raises(ValueError, match=r"row a/train#3: .*set chat_template"):
        tokenize_pairs([pair], build_tokenizer("plain"), max_length=60)


def test_template_from_text_file_or_name(tmp_path, build_tokenizer):
    tokenizer = build_tokenizer("plain")
    chatml = build_tokenizer("words").chat_template
    (tmp_path / "t.jinja").write_text(chatml)
    with pytest.raises(ValueError, match=r"chat_template: the tokenizer has none"):
        load_chat_template(tokenizer)
    assert load_chat_template(tokenizer, "none") is None
    assert load_chat_template(tokenizer, chatml) == chatml
    assert load_chat_template(tokenizer, str(tmp_path / "t.jinja")) == chatml
    with pytest.raises(ValueError, match=r"chat_template: 'nowhere\.jinja' is neither"):
        load_chat_template(tokenizer, "nowhere.jinja")
    with_template = tokenize_pair(PAIR, tokenizer, max_length=60, chat_template=chatml)
    assert tokenizer.decode(with_template.chosen_ids) == "user: Which river?\nassistant: The green one.<|end|>"


def test_a_template_file_that_is_no_text_names_key_and_file(tmp_path, build_tokenizer):
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"chat_template: .*t\.jinja cannot be read as text \(UnicodeDecodeError"):
        load_chat_template(build_tokenizer("plain"), str(tmp_path / "t.jinja"))


def test_one_of_several_templates_is_the_default_or_named(build_tokenizer):
    tokenizer = copy.deepcopy(build_tokenizer("plain"))
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}", "default": "{{ 'chat' }}"}
    assert load_chat_template(tokenizer) == "{{ 'chat' }}"
    assert load_chat_template(tokenizer, "tool_use") == "{{ 'tools' }}"
    del tokenizer.chat_template["default"]
    assert load_chat_template(tokenizer, "{{ 'mine' }}") == "{{ 'mine' }}"
    with pytest.raises(ValueError, match=r"several, none named default; name one of \['tool_use'\]"):
        load_chat_template(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{% for m in messages %}{{ m['role'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }",
    ],
)
def test_template_that_cannot_work_names_the_key(template, build_tokenizer):
    with pytest.raises(ValueError, match=r"^chat_template: "):
        tokenize_pairs([PAIR], build_tokenizer("plain"), max_length=60, chat_template=template)


@pytest.mark.parametrize(
    ("kind", "takes"), [("chatml", True), ("llama3", True), ("gemma", False), ("mistral", False), ("plain", False)]
)
def test_which_templates_take_a_system_turn(kind, takes, build_tokenizer):
    tokenizer = build_tokenizer(kind)
    assert template_takes_system(tokenizer, tokenizer.chat_template) is takes


def test_prompt_that_melts_into_the_response_is_dropped(build_tokenizer):
    with pytest.raises(RowError) as caught:
        tokenize_pair(Pair("r", " ans", "wer", "x"), build_tokenizer("plain"), max_length=60)
    assert caught.value.reason == "no prompt"


def test_prompt_is_never_cut_to_its_start_tokens_alone(build_tokenizer):
    with pytest.raises(RowError) as caught:
        tokenize_pair(
            Pair("r", "a b c d " * 5, "x " * 30, "y"), build_tokenizer("plain_bos"), max_length=8, max_prompt_length=1
        )
    assert caught.value.reason == "overlong"


def test_a_call_with_truncation_before_leaves_no_trace(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    expected = tokenize_pair(PAIR, tokenizer, max_length=60)
    tokenizer(["one", "two three four"], padding="max_length", max_length=3, truncation=True)
    assert tokenize_pair(PAIR, tokenizer, max_length=60) == expected


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_a_text_is_not_cut_at_a_token_that_takes_of_its_neighbours(flag):
    plain = AddedToken("<a>", special=True, normalized=False)
    greedy = AddedToken("<a>", special=True, **{"normalized": False, flag: True})
    tokenizers = [SimpleNamespace(added_tokens_decoder={0: token}) for token in (plain, greedy)]
    assert [_anchors(tokenizer, "x <a> y") for tokenizer in tokenizers] == [["<a>"], []]


def test_cutting_the_text_at_special_tokens_changes_no_token(held_out_files, smol_model):
    """The batch path encodes the prompt once, up to its last special token; the whole text gives the same tokens."""
    from transformers import AutoTokenizer

    from simpo.data.files import read_file
    from simpo.data.preferences import pair_from_row

    tokenizer = AutoTokenizer.from_pretrained(smol_model)
    for file in held_out_files:
        if file.parent.name not in ("pairs", "en_hh_helpful", "zh_oasst1"):
            continue
        pairs = [pair_from_row(row) for row in read_file(file)]
        for pair, tokens in zip(pairs, tokenize_pairs(pairs, tokenizer, max_length=10_000)):
            text = tokens.prompt_text + pair.rejected + "<|im_end|>"
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens.rejected_ids
