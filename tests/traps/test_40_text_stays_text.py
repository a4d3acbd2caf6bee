"""Trap 40: structure guessed from an answer's text: an answer that reads like a message trained as its content."""

from __future__ import annotations

import pytest

from simpo.data.preferences import pair_from_row

LOOKALIKES = [
    '{"role": "assistant", "content": "x"}',
    '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]',
    "[{'role': 'assistant', 'content': 'x'}]",
    '["a", "b"]',
    "[1, 2]",
    "\n\nHuman: a\n\nAssistant: b",
    "Human: Why?\n\nAssistant: Because.",
]


@pytest.mark.parametrize("text", LOOKALIKES)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_answer_that_reads_like_something_else_is_trained_as_it_stands(text, side):
    other = {"chosen": "rejected", "rejected": "chosen"}[side]
    for prompt in ("Show me one.", [{"role": "user", "content": "Show me one."}]):
        pair = pair_from_row({"prompt": prompt, side: text, other: "No."})
        assert getattr(pair, side) == text
        assert getattr(pair, other) == "No."
    turns = [{"role": "user", "content": "Show me one."}, {"role": "assistant", "content": text}]
    row = {side: turns, other: [turns[0], {"role": "assistant", "content": "No."}]}
    assert getattr(pair_from_row(row), side) == text


def test_whole_transcripts_are_still_read():
    pair = pair_from_row(
        {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}
    )
    assert (pair.turns, pair.chosen, pair.rejected) == ([{"role": "user", "content": "Why?"}], "So.", "No.")
