"""Trap 31: what the template would render (reasoning, calls, tools, results, parts) was dropped before it."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import tokenize_pair, trained_texts

from simpo.data.preferences import RowError, pair_from_row

ASK = [{"role": "user", "content": "Weather in Oslo?"}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def say(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(city):
    return {"function": {"name": "weather", "arguments": {"city": city}}}


def texts_of(row, tokenizer, **options):
    tokens = tokenize_pair(pair_from_row(row), tokenizer, max_length=1000, **options)
    return tokens.prompt_text, *trained_texts(tokens, tokenizer)


def test_reasoning_is_trained(build_tokenizer):
    row = {
        "prompt": [{"role": "user", "content": "Add 2 and 3."}],
        "chosen": [say("5", reasoning_content="2 + 3 = 5")],
        "rejected": [say("5", thinking="2 + 3 = 6, no, 5")],
    }
    _, chosen, rejected = texts_of(row, build_tokenizer("agent"))
    assert chosen == ["<think>\n2 + 3 = 5\n</think>\n\n5<|im_end|>"]
    assert rejected == ["<think>\n2 + 3 = 6, no, 5\n</think>\n\n5<|im_end|>"]
    _, chosen, _ = texts_of(row, build_tokenizer("channels"))  # calls it thinking
    assert chosen == [" to itself\n2 + 3 = 5<|end|>\n5<|im_end|>"]


@pytest.mark.parametrize("spelled", [[call("Oslo")], '[{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}]'])
def test_calls_and_tools_are_rendered(build_tokenizer, spelled):
    row = {"prompt": ASK, "tools": [TOOL], "rejected": [say("Let me look.", tool_calls=[call("Rome")])]}
    row["chosen"] = [say("Let me look.", tool_calls=spelled)]
    prompt, chosen, rejected = texts_of(row, build_tokenizer("agent"))
    assert '{"type": "function", "function": {"name": "weather"' in prompt
    assert chosen == ['Let me look.\n<call>weather {"city": "Oslo"}</call><|im_end|>']
    assert rejected == ['Let me look.\n<call>weather {"city": "Rome"}</call><|im_end|>']


def test_a_template_that_joins_arguments_as_text_gets_text(build_tokenizer):
    row = {"prompt": ASK, "chosen": [say("", tool_calls=[call("Oslo")])], "rejected": "I know."}
    tokenizer = build_tokenizer("channels")
    tokens = tokenize_pair(pair_from_row(row), tokenizer, max_length=1000)
    assert trained_texts(tokens, tokenizer)[0] == ['\n\nweather {"city": "Oslo"}<|im_end|>']
    assert list(tokens.notes) == ["arguments of tool calls given to the template as JSON text"]


def test_calls_and_results_in_the_history_are_rendered(build_tokenizer):
    result = {"role": "tool", "name": "weather", "tool_call_id": "1", "content": "-3 C, snow"}
    row = {"prompt": [*ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, result]}
    prompt, chosen, _ = texts_of({**row, "chosen": "It snows.", "rejected": "Sun."}, build_tokenizer("agent"))
    assert '<call>weather {"city": "Oslo"}</call>' in prompt
    assert "<|im_start|>tool\n-3 C, snow<|im_end|>" in prompt
    assert chosen == ["It snows.<|im_end|>"]


def test_an_answer_of_several_turns_trains_those_of_the_assistant(build_tokenizer):
    result = {"role": "tool", "content": "-3 C"}
    row = {"prompt": ASK, "rejected": "Sun."}
    row["chosen"] = [say("", reasoning="Look.", tool_calls=[CALL]), result, say("Snow.", reasoning="Cold.")]
    _, chosen, rejected = texts_of(row, build_tokenizer("agent"))
    assert chosen == [
        '<think>\nLook.\n</think>\n\n\n<call>weather {"city": "Oslo"}</call><|im_end|>',
        "<think>\nCold.\n</think>\n\nSnow.<|im_end|>",
    ]
    assert rejected == ["Sun.<|im_end|>"]


def test_a_turn_of_calls_may_end_in_a_mark_of_its_own(build_tokenizer):
    row = {"prompt": ASK, "rejected": [say("", tool_calls=[call("Rome")])]}
    row["chosen"] = [say("", tool_calls=[CALL]), {"role": "tool", "content": "-3 C"}, say("Snow.")]
    _, chosen, rejected = texts_of(row, build_tokenizer("wait"))
    assert chosen == ['<call>weather {"city": "Oslo"}</call><|wait|>', "Snow.<|im_end|>"]
    assert rejected == ['<call>weather {"city": "Rome"}</call><|wait|>']


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"chosen": [say("Yes.", reasoning_content="First of August.")]}, "'First of August.'"),
        ({"chosen": [say("Let me look.", tool_calls=[CALL])]}, "'weather'"),
        ({"chosen": "Yes.", "tools": [TOOL]}, "'weather'; set chat_template to one that renders tools"),
        ({"chosen": "Yes.", "prompt": [*ASK, say("", tool_calls=[CALL]), *ASK]}, "'weather'"),
    ],
    ids=["reasoning", "call", "tools", "call in the history"],
)
def test_what_the_template_leaves_out_costs_the_row_and_is_shown(build_tokenizer, row, missing):
    with pytest.raises(RowError) as caught:
        texts_of({"prompt": ASK, "rejected": "No.", **row}, build_tokenizer("chatml"))
    assert caught.value.reason == "rewritten by the template"
    assert missing in caught.value.detail
    assert "set chat_template to one that" in caught.value.detail


def test_text_parts_are_text_and_other_parts_cost_the_row():
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "Aare.", "image": None}]
    row = {"prompt": ASK, "chosen": [say(parts)], "rejected": "Blue."}
    assert pair_from_row(row).chosen == "The Aare."
    with pytest.raises(RowError, match="not text: chosen has a message whose content has a part of type 'image_url'"):
        pair_from_row({**row, "chosen": [say([*parts, {"type": "image_url", "image_url": {"url": "x"}}])]})


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "It is cold.", "signature": "x"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "It is "}, {"type": "text", "text": "cold."}]},
        {"type": "reasoning", "text": "It is cold."},
    ],
    ids=["text", "parts", "reasoning"],
)
def test_parts_of_a_thought_are_reasoning(part):
    said = {"type": "output_text", "text": "Snow."}
    asked = [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}]
    row = {"prompt": asked, "chosen": [say([part, said])], "rejected": "Sun."}
    assert pair_from_row(row).chosen == [say("Snow.", reasoning_content="It is cold.")]
    with pytest.raises(RowError, match="not text"):  # between texts it would lose its place
        pair_from_row({**row, "chosen": [say([said, part, said])]})


@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
def test_calls_that_are_messages_of_their_own_are_one_turn(role, content):
    turns = [
        ("assistant", "Look."),
        *(("tool_call", f'{{"name": "weather", "arguments": {{"city": "{c}"}}}}') for c in "AB"),
    ]
    turns = [("user", "Weather?"), *turns, ("tool_response", "-3"), ("tool_response", "3"), ("assistant", "Snow.")]
    row = {"messages": [{role: who, content: text} for who, text in turns], "rejected_response": "Sun."}
    asked, called, *results = pair_from_row(row).turns
    assert [each["role"] for each in (asked, called, *results)] == ["user", "assistant", "tool", "tool"]
    assert called["content"] == "Look."
    assert [each["function"]["arguments"]["city"] for each in called["tool_calls"]] == ["A", "B"]


def test_keys_of_a_message_that_nobody_reads_are_counted():
    row = {"prompt": ASK, "chosen": [say("Yes.", weight=0.5, audio=None)], "rejected": "No."}
    assert pair_from_row(row).notes == {"key 'weight' of a message left out": "chosen: '0.5'"}


def test_rows_that_differ_in_a_call_or_a_thought_alone_are_no_twins():
    row = {
        "prompt": ASK,
        "chosen": [say("", tool_calls=[call("Oslo")])],
        "rejected": [say("", tool_calls=[call("Rome")])],
    }
    pair_from_row(row)
    pair_from_row({**row, "chosen": [say("x", reasoning="a")], "rejected": [say("x", reasoning="b")]})
    with pytest.raises(RowError, match="identical"):
        pair_from_row({**row, "rejected": row["chosen"]})
