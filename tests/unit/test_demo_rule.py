"""The demo's scoring rule agrees with a person on clear cases, and cannot be gamed."""

from __future__ import annotations

from types import ModuleType

import pytest
from scripts import load_script

PROMPT = "How do I keep bread fresh for longer?"
GOOD = (
    "Bread stays fresh in a paper bag inside a bin at room temperature, cut side down. "
    "Freeze what you won't eat within three days, in slices, and toast them straight from the freezer. "
    "Don't put it in the fridge: it goes stale faster there."
)


@pytest.fixture(scope="module")
def rule() -> ModuleType:
    return load_script("examples", "demo", "rule.py")


def test_good_answer_gets_full_marks(rule):
    assert rule.score(PROMPT, GOOD).total == pytest.approx(1.0)


@pytest.mark.parametrize("response", ["", " \n ", "...", "!?"])
def test_empty_answer_scores_zero(rule, response):
    assert rule.score(PROMPT, response).total == 0


@pytest.mark.parametrize("response", ["Bread.", "Yes.", "Fresh bread.", "Freeze it."])
def test_one_or_two_words_score_almost_nothing(rule, response):
    assert rule.score(PROMPT, response).total < 0.21


@pytest.mark.parametrize(
    ("worse", "part"),
    [
        ("Certainly! " + GOOD, "direct"),
        ("Great question! " + GOOD, "direct"),
        ("I'm happy to help. " + GOOD, "direct"),
        ("As a caring AI, I know this. " + GOOD, "direct"),
        ("The age-old question of bread. " + GOOD, "direct"),
        ("While I'm a bot, I can say this. " + GOOD, "direct"),
        ("I\u2019m happy to help. " + GOOD, "direct"),
        ("As an AI language model, I can say this. " + GOOD, "direct"),
        (GOOD + " I hope this helps!", "direct"),
        (GOOD[:-30], "complete"),
        (GOOD + "\n\n2.", "complete"),
        (GOOD + " " + GOOD, "fresh"),
        ("Bread is bread. Keep the bread in the bread bin, with bread on bread, since bread likes bread.", "fresh"),
        (PROMPT + " " + PROMPT, "own"),
        ("Paris is the capital of France, and it lies on the river Seine in the north of the country.", "topic"),
        (GOOD + " And another thing that came to mind while I was writing all this down" * 9 + ".", "length"),
    ],
)
def test_each_fault_costs_the_part_it_belongs_to(rule, worse, part):
    good, bad = rule.score(PROMPT, GOOD), rule.score(PROMPT, worse)
    assert bad.parts[part] < good.parts[part]
    assert bad.total <= 0.76 * good.total


@pytest.mark.parametrize("word", ["Ohio", "Ahead", "Surely", "Historically", "Well-kept", "Hiking", "Classic"])
def test_openers_are_whole_words(rule, word):
    assert rule.score(PROMPT, f"{word} bread stays fresh.").parts["direct"] == 1


def test_greetings_are_filler_in_an_answer_but_not_in_a_letter(rule):
    letter = "Hi Anna, I'm sorry, I have to cancel tonight. Let me know if Friday suits you instead."
    assert rule.score("Draft a text to a friend cancelling dinner.", letter).parts["direct"] == 1
    assert rule.score(PROMPT, letter).parts["direct"] == 0.5
    assert rule.score("Draft a text to a friend.", "Sure! " + letter).parts["direct"] == 0.5


@pytest.mark.parametrize(
    "ending",
    [
        'She said: "Keep it dry."',
        "(Freeze the rest.)",
        "**Keep it dry.**",
        "Best regards,\n[Your Name]",
        "Thank you,\n\nAnna",
        "```python\nprint(1)\n```",
        "Is it dry?",
    ],
)
def test_natural_endings_count_as_complete(rule, ending):
    assert rule.score(PROMPT, f"Some words first.\n{ending}").parts["complete"] == 1


@pytest.mark.parametrize("ending", ["and then", "as follows:", "one, two,", "2.", "- 3.", "```python\nprint(1)"])
def test_cut_endings_count_as_incomplete(rule, ending):
    assert rule.score(PROMPT, f"Some words first.\n{ending}").parts["complete"] == pytest.approx(0.4)


def test_repetition_is_the_share_of_repeated_four_word_runs(rule):
    assert rule.repetition("one two three four five six seven eight") == 0
    # 12 words make 9 runs; the last repeats of "a b c d" cycles leave 4 different ones.
    assert rule.repetition("a b c d a b c d a b c d") == pytest.approx(5 / 9)
    assert rule.repetition("") == rule.repetition("too short") == 0
    assert rule.repetition("word " * 1000) > 0.99


def test_length_is_flat_in_the_band_and_falls_smoothly_above(rule):
    def length(count: int) -> float:
        return rule.score(PROMPT, " ".join(f"w{i}" for i in range(count))).parts["length"]

    assert [length(n) for n in (10, 40, 90)] == [1, 1, 1]
    assert length(91) > 0.97
    assert length(180) == pytest.approx(0.25)
    assert all(length(n) > length(n + 10) for n in range(90, 400, 10))
    assert all(length(n) < length(n + 1) for n in range(10))


def test_total_is_the_product_of_parts_within_zero_and_one(rule):
    for response in ("", "Sure.", GOOD, GOOD * 20, "\ufffd", "日本語の答え。", "```", "1. 1. 1. 1."):
        result = rule.score(PROMPT, response)
        product = 1.0
        for value in result.parts.values():
            assert 0 <= value <= 1
            product *= value
        assert result.total == pytest.approx(product)
    assert rule.score("", GOOD).parts["topic"] == 1


def test_the_second_opinion_sees_none_of_the_rules_faults_and_each_of_its_own():
    rate = load_script("examples", "demo", "readable.py").rate
    own = "Keep the bread in a paper bag. Slice the rest and freeze it at once."
    assert rate([], own, {}) == 1
    assert rate([], f"{own} {own}", {}) == 1  # repeats are the rule's affair, as are openers
    assert rate([], f"Certainly! {own}", {}) >= 0.9
    for worse in (
        own.replace(". ", ", and then you should also ") * 2,  # one long sentence
        f"{own} Refrigeration accelerates crystallisation considerably.",
        f"{own} It may perhaps be better.",
        f'{own} They call it "fresh.',
        f"{own} Ask [Your Name] for it.",
    ):
        assert rate([], worse, {}) < 0.95
    assert rate([], " ... ", {}) == 0
