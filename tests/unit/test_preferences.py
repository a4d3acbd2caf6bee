"""Every accepted row shape gives the same canonical pair; every other row says why it gives none."""

from __future__ import annotations

import functools
import json

import pytest

from simpo.data.columns import between, decode_list
from simpo.data.preferences import RowError, pair_from_row, prompt_from_row

USER = {"role": "user", "content": "Why?"}
TURNS = [USER, {"role": "assistant", "content": "Because."}, {"role": "user", "content": "Really?"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def say(content):
    return {"role": "assistant", "content": content}


def gpt(value, who="gpt"):
    return {"from": who, "value": value}


HH = "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Really?\n\nAssistant:"

SHAPES = {
    "strings": ({"prompt": "Why?", "chosen": "Yes.", "rejected": "No."}, "Why?"),
    "message lists": ({"prompt": [USER], "chosen": [say("Yes.")], "rejected": [say("No.")]}, [USER]),
    "one message, not a list": ({"prompt": [USER], "chosen": say("Yes."), "rejected": say("No.")}, [USER]),
    "text parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]}],
            "chosen": "Yes.",
            "rejected": "No.",
        },
        [USER],
    ),
    "messages": ({"messages": TURNS, "chosen": "Yes.", "rejected": "No."}, TURNS),
    "implicit prompt": ({"chosen": [*TURNS, say("Yes.")], "rejected": [*TURNS, say("No.")]}, TURNS),
    "implicit prompt beside a null prompt": (
        {"prompt": None, "chosen": [*TURNS, say("Yes.")], "rejected": [*TURNS, say("No.")]},
        TURNS,
    ),
    "prompt and whole dialogues": (
        {"prompt": "Why?", "chosen": [USER, say("Yes.")], "rejected": [USER, say("No.")]},
        "Why?",
    ),
    "prompt and whole dialogues with a system turn": (
        {"prompt": "Why?", "chosen": [SYSTEM, USER, say("Yes.")], "rejected": [SYSTEM, USER, say("No.")]},
        [SYSTEM, USER],
    ),
    "transcripts": ({"chosen": HH + " Yes.", "rejected": HH + " No."}, TURNS),
    "transcript prompt, plain responses": ({"prompt": HH, "chosen": "Yes.", "rejected": "No."}, TURNS),
    "transcript prompt and transcripts": ({"prompt": HH, "chosen": HH + " Yes.", "rejected": HH + " No."}, TURNS),
    "Alpaca pair": ({"instruction": "Why?", "input": "", "output": ["Yes.", "No."]}, "Why?"),
    "Alpaca pair with input": ({"instruction": "Why?", "input": "It is.", "output": ["Yes.", "No."]}, "Why?\nIt is."),
    "Alpaca columns": ({"instruction": "Why?", "input": "It is.", "chosen": "Yes.", "rejected": "No."}, "Why?\nIt is."),
    "Alpaca history": (
        {"instruction": "Really?", "history": [["Why?", "Because."]], "chosen": "Yes.", "rejected": "No."},
        TURNS,
    ),
    "a prompt beside somebody's history": (
        {"prompt": "Why?", "history": [["Really?", "No."]], "chosen": "Yes.", "rejected": "No."},
        "Why?",
    ),
    "ShareGPT": (
        {
            "conversations": [gpt("Why?", "human"), gpt("Because."), gpt("Really?", "human")],
            "chosen": gpt("Yes."),
            "rejected": gpt("No."),
        },
        TURNS,
    ),
    "ShareGPT with system": (
        {"conversations": [gpt("Be brief.", "system"), gpt("Why?", "human")], "chosen": "Yes.", "rejected": "No."},
        [SYSTEM, USER],
    ),
    "scored list": (
        {"prompt": "Why?", "all_generated_responses": ["Hm.", "Yes.", "No."], "all_rm_scores": [0.5, 2, -1.0]},
        "Why?",
    ),
    "question, response_*": ({"question": "Why?", "response_chosen": "Yes.", "response_rejected": "No."}, "Why?"),
    "input, winner, loser": ({"input": "Why?", "winner": "Yes.", "loser": "No."}, "Why?"),
    "query, preferred": ({"query": "Why?", "preferred": "Yes.", "rejected_response": "No."}, "Why?"),
    "*_response": ({"prompt": "Why?", "chosen_response": "Yes.", "rejected_response": "No."}, "Why?"),
    "ms-swift, messages": ({"messages": [*TURNS, say("Yes.")], "rejected_response": "No."}, TURNS),
    "ms-swift, both dialogues": (
        {"messages": [*TURNS, say("Yes.")], "rejected_messages": [*TURNS, say("No.")], "rejected_response": None},
        TURNS,
    ),
    "ms-swift, query": (
        {"query": "Really?", "response": "Yes.", "rejected_response": "No.", "history": [["Why?", "Because."]]},
        TURNS,
    ),
    "ms-swift, system": (
        {"system": "Be brief.", "query": "Why?", "response": "Yes.", "rejected_response": "No.", "history": []},
        [SYSTEM, USER],
    ),
    "HelpSteer3": (
        {"context": TURNS, "response1": "Yes.", "response2": "No.", "overall_preference": -2, "domain": "general"},
        TURNS,
    ),
    "HelpSteer2, preference": (
        {"prompt": "Why?", "response_1": "No.", "response_2": "Yes.", "preference_strength": 1},
        "Why?",
    ),
    "messages as text": ({"messages": json.dumps(TURNS), "chosen": "Yes.", "rejected": "No."}, TURNS),
    "JSON in Alpaca cells": ({"instruction": "Why?", "input": None, "output": '["Yes.", "No."]'}, "Why?"),
}


@pytest.mark.parametrize(("row", "prompt"), SHAPES.values(), ids=SHAPES.keys())
def test_shape_gives_the_canonical_pair(row, prompt):
    pair = pair_from_row(row, row_id="x/train#1")
    assert (pair.row_id, pair.prompt, pair.chosen, pair.rejected) == ("x/train#1", prompt, "Yes.", "No.")


REFUSED = {
    "unpaired": ({"prompt": "Why?", "completion": "Yes.", "label": True}, "unpaired", "two answers to one prompt"),
    "no preference": (
        {"context": [USER], "response1": "a", "response2": "b", "overall_preference": 0},
        "tie",
        "overall_preference is 0",
    ),
    "preference in words": (
        {"context": [USER], "response1": "a", "response2": "b", "overall_preference": "first"},
        "malformed",
        "overall_preference is text",
    ),
    "messages that end with the user": ({"messages": [*TURNS], "rejected_response": "b"}, "malformed", "user turn"),
    "rejected messages alone": ({"rejected_messages": [USER, say("b")]}, "empty", "chosen"),
    "unreadable line": (RowError("malformed", "a.jsonl line 3: not JSON"), "malformed", "line 3"),
    "not an object": ([1, 2], "malformed", "a list"),
    "no columns": ({}, "missing column", "no columns"),
    "no prompt": ({"chosen": "Yes.", "rejected": "No."}, "missing column", "no prompt column"),
    "no rejected": ({"prompt": "Why?", "chosen": "Yes."}, "missing column", "no rejected column"),
    "another separator": ({"prompt;chosen;rejected": "a;b;c"}, "missing column", "separate columns by a comma"),
    "null prompt": ({"prompt": None, "chosen": "Yes.", "rejected": "No."}, "empty", "prompt"),
    "null prompt, a common beginning": (
        {"prompt": None, "chosen": "The sea is blue.", "rejected": "The sea is red."},
        "empty",
        "prompt",
    ),
    "null chosen": ({"prompt": "Why?", "chosen": None, "rejected": "No."}, "empty", "chosen"),
    "blank prompt": ({"prompt": " ", "chosen": "Yes.", "rejected": "No."}, "empty", "prompt"),
    "no turns": ({"prompt": [], "chosen": "Yes.", "rejected": "No."}, "empty", "prompt"),
    "blank response": ({"prompt": "Why?", "chosen": "Yes.", "rejected": " \n"}, "empty", "rejected"),
    "same": ({"prompt": "Why?", "chosen": "Yes.", "rejected": "Yes. "}, "identical", "same"),
    "number": ({"prompt": "Why?", "chosen": 5, "rejected": "No."}, "malformed", "a number"),
    "label": ({"prompt": "Why?", "chosen": True, "rejected": False}, "malformed", "true/false"),
    "prompt ends with assistant": ({"prompt": [USER, say("x")], "chosen": "a", "rejected": "b"}, "malformed", "assist"),
    "prompt ends with system": ({"prompt": [SYSTEM], "chosen": "a", "rejected": "b"}, "malformed", "system turn"),
    "no turns beside a dialogue with a system turn": (
        {"prompt": [say("")], "chosen": [SYSTEM, say("a")], "rejected": "b"},
        "malformed",
        "share no prompt",
    ),
    "late system": ({"prompt": [USER, SYSTEM, USER], "chosen": "a", "rejected": "b"}, "malformed", "not the first"),
    "unknown role": (
        {"prompt": [{"role": "narrator", "content": "x"}], "chosen": "a", "rejected": "b"},
        "malformed",
        "narrator",
    ),
    "a tool's result alone": (
        {"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"},
        "malformed",
        "no user turn",
    ),
    "null content": ({"prompt": [USER], "chosen": [say(None)], "rejected": "b"}, "malformed", "content is null"),
    "image part": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"},
        "not text",
        "image",
    ),
    "response by the user": ({"prompt": "Why?", "chosen": [USER], "rejected": "b"}, "malformed", "user turn"),
    "other dialogue": ({"prompt": "Who?", "chosen": [USER, say("a")], "rejected": "b"}, "malformed", "begin with"),
    "forked dialogues": (
        {"chosen": [USER, say("a")], "rejected": [{"role": "user", "content": "How?"}, say("b")]},
        "malformed",
        "share no prompt",
    ),
    "three outputs": ({"instruction": "Why?", "output": ["a", "b", "c"]}, "malformed", "3 entries"),
    "all scores equal": (
        {"prompt": "Why?", "all_generated_responses": ["a", "b"], "all_rm_scores": [1, 1]},
        "tie",
        "1",
    ),
    "scores of the pair equal, in its list": (
        {"prompt": "Why?", "responses": ["a", "b", "c"], "scores": [1, 1, 2], "chosen": "a", "rejected": [say("b")]},
        "tie",
        "both score 1",
    ),
    "NaN": (
        {"prompt": "Why?", "all_generated_responses": ["a", "b"], "all_rm_scores": [1, float("nan")]},
        "malformed",
        "NaN",
    ),
    "too few scores": (
        {"prompt": "Why?", "all_generated_responses": ["a", "b"], "all_rm_scores": [1]},
        "malformed",
        "2 responses but 1 scores",
    ),
    "one response": (
        {"prompt": "Why?", "all_generated_responses": ["a"], "all_rm_scores": [1]},
        "malformed",
        "at least",
    ),
    "lone surrogate": ({"prompt": "Why?", "chosen": "a\ud800", "rejected": "b"}, "malformed", "Unicode"),
    "system is a number": ({"prompt": "Why?", "system": 3, "chosen": "a", "rejected": "b"}, "malformed", "system"),
}


@pytest.mark.parametrize(("row", "reason", "detail"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_row_says_why(row, reason, detail):
    with pytest.raises(RowError) as caught:
        pair_from_row(row)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_named_columns_are_the_only_ones_looked_at():
    row = {"prompt": "wrong", "q": "Why?", "chosen": "wrong", "good": "Yes.", "bad": "No."}
    pair = pair_from_row(row, prompt_column="q", chosen_column="good", rejected_column="bad")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Why?", "Yes.", "No.")
    with pytest.raises(RowError, match=r"missing column.*nope.*the row has prompt, q, chosen"):
        pair_from_row(row, prompt_column="nope", chosen_column="good", rejected_column="bad")


@pytest.mark.parametrize(
    ("row", "arguments", "prompt"),
    [
        ({"prompt": "Why?"}, {"system_prompt": "Be brief."}, [SYSTEM, USER]),
        ({"prompt": [USER]}, {"system_prompt": "Be brief."}, [SYSTEM, USER]),
        ({"prompt": "Why?", "system": "Be brief."}, {"system_prompt": "unused"}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER], "system": "unused"}, {"system_prompt": "unused"}, [SYSTEM, USER]),
        ({"prompt": "Why?"}, {"empty_system": True}, [{"role": "system", "content": ""}, USER]),
        ({"prompt": [SYSTEM, USER]}, {"empty_system": True}, [SYSTEM, USER]),
        ({"prompt": "Why?", "system": ""}, {}, "Why?"),
    ],
)
def test_system_turn_comes_from_the_row_then_the_recipe(row, arguments, prompt):
    assert pair_from_row({**row, "chosen": "a", "rejected": "b"}, **arguments).prompt == prompt


def test_a_transcript_with_the_line_ends_of_windows_is_one():
    expected = pair_from_row({"prompt": HH, "chosen": " One\r\n\r\nmore.", "rejected": "No."})
    pair = pair_from_row({"prompt": HH.replace("\n", "\r\n"), "chosen": " One\r\n\r\nmore.", "rejected": "No."})
    assert pair == expected
    assert [message["content"] for message in pair.turns] == ["Why?", "Because.", "Really?"]


def test_text_that_only_looks_like_a_list_stays_text():
    for prompt, chosen, rejected in (
        ("[1, 2, 3]", '{"answer": 6}', "[{'a': 1}]"),
        (json.dumps(TURNS), json.dumps(say("Yes.")), json.dumps([say("No.")])),
    ):
        pair = pair_from_row({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, chosen, rejected)


def test_every_real_row_gives_a_pair(held_out_files):
    from simpo.data.files import read_file

    for file in held_out_files:
        for row in read_file(file):
            assert pair_from_row(row).prompt == row["prompt"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Why?"}, "Why?"),
        ({"messages": [*TURNS, say("Yes.")], "tools": []}, TURNS),
        ({"chosen": [USER, say("Yes.")], "rejected": [USER, say("No.")]}, [USER]),
        (
            {"chosen": [USER, say("Yes.")], "rejected": [USER, say("No.")], "score_chosen": 1, "score_rejected": 1},
            [USER],
        ),
        (
            {"chosen": [USER, say("a")], "rejected": [USER, say("b")], "responses": ["a", "b"], "scores": [1, 1]},
            [USER],
        ),
    ],
)
def test_a_prompt_alone_is_read_without_its_answers(row, prompt):
    found = prompt_from_row(row, row_id="x/train#1")
    assert (found.row_id, found.prompt, found.chosen, found.rejected) == ("x/train#1", prompt, "", "")


def test_the_dialogues_that_hold_a_prompt_are_those_of_the_columns_named():
    row = {"better": [USER, say("Yes.")], "worse": [USER, say("No.")]}
    read_pair = functools.partial(pair_from_row, chosen_column="better", rejected_column="worse")
    assert prompt_from_row(row, read_pair=read_pair).prompt == [USER]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "\ud800"}, "malformed: not valid Unicode"),
        ({"prompt": "  "}, "empty: the prompt is blank"),
        ({"chosen": "Yes."}, "missing column: no prompt column"),
        ([], "malformed: the row is a list"),
    ],
)
def test_what_is_no_prompt_is_left_out_with_its_reason(row, words):
    with pytest.raises(RowError, match=words):
        prompt_from_row(row)


@pytest.mark.parametrize("text", ['1, {"a": 2}', '{"a": 1}, 2]', "[1, 2", "{}x", "", 5])
def test_a_cell_that_is_no_list_stays_as_it_is(text):
    assert decode_list(text) is text


def test_a_pair_beside_its_scored_list_has_its_scores_and_the_other_responses():
    """The layout of the SimPO authors' data sets: dialogues, and all responses with a reward model's scores."""
    answers, asked = ["fine", "bad", "good", "good "], {"role": "user", "content": "Why?"}
    sides = {
        side: [asked, {"role": "assistant", "content": text}]
        for side, text in (("chosen", "good"), ("rejected", "bad"))
    }
    row = {"prompt": "Why?", "all_generated_responses": answers, "all_rm_scores": [0.5, 0.1, 0.9, 0.2], **sides}
    assert pair_from_row(row).scores == (0.9, 0.1)
    others = [(pair_from_row(each), score) for each, score in between(row)[:1]]
    assert [(pair.turns, pair.chosen, pair.rejected, score) for pair, score in others] == [
        ([asked], "good", "fine", 0.5)
    ]
    with pytest.raises(RowError, match="identical"):  # counted, as a response that is left out
        pair_from_row(between(row)[1][0])
    for other in ({"all_rm_scores": [0.5, None, 0.9, 0.2]}, {"all_generated_responses": ["x"] * 4}):
        assert pair_from_row({**row, **other}).scores is None, "the pair stands, whatever lies beside it"
        assert between({**row, **other}) == []


@pytest.mark.parametrize("named", [{"chosen_column": "good"}, {"rejected_column": "bad"}, {"chosen_column": "scores"}])
def test_one_side_named_beside_a_scored_list_says_that_the_list_is_not_read(named):
    row = {"prompt": "Why?", "good": "a", "bad": "b", "responses": ["a", "b"], "scores": [0.9, 0.1]}
    with pytest.raises(RowError, match=r"the list \(responses, scores\) is not read .* name both, or neither"):
        pair_from_row(row, **named)


def test_a_list_beside_columns_that_are_named_is_no_part_of_the_pair():
    row = {
        "prompt": "Why?",
        "good": "fine",
        "bad": "worst",
        "responses": ["best", "fine", "worst"],
        "scores": [0.9, 0.7],
    }
    for scores in ([0.9, 0.7], [0.9, 0.7, 0.1]):  # the first of another length
        pair = pair_from_row({**row, "scores": scores}, chosen_column="good", rejected_column="bad")
        assert (pair.chosen, pair.rejected, pair.scores) == ("fine", "worst", None)
