"""Trap 53: multi-turn chosen and rejected beside a string prompt: all rows were dropped."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import tokenize_pair, trained_texts

from simpo.data.preferences import RowError, pair_from_row


def user(text):
    return {"role": "user", "content": text}


def say(text):
    return {"role": "assistant", "content": text}


LAKE = [user("Which lake is deepest?"), say("Lake Baikal."), user("How deep?")]
CHOSEN, REJECTED = [*LAKE, say("1,642 m.")], [*LAKE, say("Very.")]


@pytest.mark.parametrize(
    "prompt",
    ["Which lake is deepest?", LAKE[:1], LAKE[:2], LAKE, None],
    ids=["text", "first turn", "two turns", "all turns", "none"],
)
def test_what_dialogues_share_is_the_prompt_however_much_of_it_stands_beside_them(prompt):
    pair = pair_from_row({"prompt": prompt, "chosen": CHOSEN, "rejected": REJECTED})
    assert (pair.prompt, pair.chosen, pair.rejected) == (LAKE, "1,642 m.", "Very.")


def test_dialogues_that_part_earlier_are_answers_of_several_turns(build_tokenizer):
    row = {"prompt": "Which lake is deepest?", "chosen": CHOSEN, "rejected": [LAKE[0], say("No idea.")]}
    pair = pair_from_row(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt"], CHOSEN[1:], "No idea.")
    for kind in ("chatml", "llama3", "gemma", "mistral", "words"):
        tokenizer = build_tokenizer(kind)
        tokens = tokenize_pair(pair, tokenizer, max_length=500)
        chosen, (rejected,) = trained_texts(tokens, tokenizer)
        first, last = (text.strip().removesuffix("<end_of_turn>").removesuffix(tokenizer.eos_token) for text in chosen)
        assert (first.strip(), last.strip()) == ("Lake Baikal.", "1,642 m.")
        assert "No idea." in rejected
        if kind in ("chatml", "llama3", "mistral"):  # each turn trains its own end, once
            assert [text.count(tokenizer.eos_token) for text in (*chosen, rejected)] == [1, 1, 1]
        assert "How deep?" in tokenizer.decode(tokens.chosen_ids)


def test_every_turn_of_the_assistant_is_trained_on_request(build_tokenizer):
    tokenizer, pair = build_tokenizer("chatml"), pair_from_row({"chosen": CHOSEN, "rejected": REJECTED})
    tokens = tokenize_pair(pair, tokenizer, max_length=500, train_on="all_assistant_turns")
    assert trained_texts(tokens, tokenizer) == [
        ["Lake Baikal.<|im_end|>", "1,642 m.<|im_end|>"],
        ["Lake Baikal.<|im_end|>", "Very.<|im_end|>"],
    ]
    alone = tokenize_pair(pair, tokenizer, max_length=500)
    assert (alone.chosen_ids, alone.rejected_ids) == (tokens.chosen_ids, tokens.rejected_ids)
    assert trained_texts(alone, tokenizer) == [["1,642 m.<|im_end|>"], ["Very.<|im_end|>"]]
    assert tokens.num_shared == alone.num_shared == alone.chosen_start


def test_cutting_keeps_what_is_trained_in_step_with_its_tokens(build_tokenizer):
    tokenizer = build_tokenizer("chatml")
    turns = [turn for n in range(6) for turn in (user(f"Question {n}?"), say(f"Answer {n}."))]
    pair = pair_from_row(
        {"chosen": [*turns, user("Last?"), say("Yes " * 30)], "rejected": [*turns, user("Last?"), say("No.")]}
    )
    whole = tokenize_pair(pair, tokenizer, max_length=1000, train_on="all_assistant_turns")
    long = len(whole.chosen_ids)
    for max_length in range(30, long, 7):
        cut = tokenize_pair(
            pair, tokenizer, max_length=max_length, max_prompt_length=20, train_on="all_assistant_turns"
        )
        chosen, rejected = trained_texts(cut, tokenizer)
        assert max(len(cut.chosen_ids), len(cut.rejected_ids)) <= max_length
        assert cut.prompt_cut > 0
        assert chosen[-1].startswith("Yes Yes")
        assert rejected[-1] == "No.<|im_end|>"
        assert [text for text in rejected[1:-1] if text not in {f"Answer {n}.<|im_end|>" for n in range(6)}] == []


def test_other_dialogues_are_refused_with_what_is_wrong():
    for prompt, chosen, detail in (
        ("Who?", CHOSEN, "chosen has 4 turns that do not begin with the prompt"),
        (None, [user("Who?"), say("I.")], "share no prompt"),
        ([{"role": "system", "content": "A"}, *LAKE], [{"role": "system", "content": "B"}, *CHOSEN], "another system"),
    ):
        with pytest.raises(RowError, match=detail):
            pair_from_row({"prompt": prompt, "chosen": chosen, "rejected": REJECTED})


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is "),
        ("Q: Why?\nA: So.", "Q: Why?\nA: Sorry.", "Q: Why?\nA: "),
        ("One two", "One two three", "One "),
    ],
)
def test_texts_that_begin_alike_hold_their_prompt(chosen, rejected, prompt):
    pair = pair_from_row({"chosen": chosen, "rejected": rejected, "score": 3})
    assert (pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (prompt, chosen, rejected)
    assert list(pair.notes) == ["prompt taken from the common beginning of chosen and rejected"]


@pytest.mark.parametrize("more", [{}, {"chosen": "The sea.", "rejected": "The sky.", "frage": "What is blue?"}])
def test_texts_without_a_common_beginning_or_beside_other_text_have_no_prompt(more):
    with pytest.raises(RowError, match="missing column: no prompt column"):
        pair_from_row({"chosen": "Blue.", "rejected": "Green.", **more})


def test_a_turn_behind_the_cut_leaves_no_gap(build_tokenizer):
    chosen = [user("Which?"), say("Yes " * 30), user("And?"), say("So.")]
    pair = pair_from_row({"chosen": chosen, "rejected": [user("Which?"), say("No.")]})
    tokenizer = build_tokenizer("chatml")
    whole = tokenize_pair(pair, tokenizer, max_length=1000)
    assert len(whole.chosen_gaps) == 2
    cut = tokenize_pair(pair, tokenizer, max_length=whole.chosen_start + 10, max_prompt_length=whole.chosen_start)
    assert (cut.chosen_ids, list(cut.chosen_gaps)) == (whole.chosen_ids[: whole.chosen_start + 10], [])
