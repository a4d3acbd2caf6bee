"""Transparent rules: each by cases that were worked out by hand, or against a slow second definition."""

from __future__ import annotations

import gzip
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from simpo.data.columns import RowError
from simpo.onpolicy.scorers import build_rater
from simpo.onpolicy.scorers.rules import RULES
from simpo.recipe import load_recipe
from simpo.recipe.scorers import SCORER_KEYS, SCORERS, read_scorer

ENGLISH = "Water boils at one hundred degrees, and the lid of the pot begins to rattle."
GERMAN = "Wasser kocht bei hundert Grad, und dann beginnt der Deckel des Topfes zu klappern."


def rate(kind: str, text: str, *, prompt: str = "Why?", columns: Any = (), num_tokens: Any = 3, **options: Any) -> Any:
    rater = build_rater(*read_scorer({"kind": kind, **options}), load_recipe({"model_name_or_path": "any"}))
    response = {"text": text, "num_tokens": num_tokens}
    row = {"id": "a", "prompt": [{"role": "user", "content": prompt}], "responses": [response]}
    ((_, scores),) = rater.rate([{**row, "columns": dict(columns)}])
    return scores if isinstance(scores, RowError) else scores[0]


def test_every_kind_is_declared_computed_and_explained():
    assert RULES.keys() <= SCORERS.keys()
    for kind, keys in SCORER_KEYS.items():
        assert SCORERS[kind].__doc__
        assert all(key.meaning and key.allowed for key in keys)
        assert keys[-1].name == "score.scorers.NAME.weight"
        columns = [key for key in keys if key.allowed.startswith("name of a column")]
        assert all("generate.keep_columns" in key.meaning for key in columns), kind
    (tests,) = (key for key in SCORER_KEYS["code"] if key.name.endswith(".tests"))
    assert "a list of texts" in tests.meaning
    assert "entry_point" in tests.meaning


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("one two  three\nfour", {}, 4),
        ("It's well-known: 3.5 %", {}, 6),  # It, s, well, known, 3, 5
        ("水煮开了 OK", {}, 5),
        ("abc d", {"unit": "characters"}, 5),
        ("whatever", {"unit": "tokens"}, 3),
        ("one two", {"min": 4}, 0.5),
        ("one two three four", {"min": 4, "max": 4}, 1),
        ("1 2 3 4 5 6 7 8", {"max": 2}, 0.25),
        ("1 2 3", {"min": 2, "max": 4}, 1),
        ("", {"min": 2}, 0),
        ("", {"max": 2}, 1),
    ],
)
def test_length(text: str, options: dict[str, Any], expected: float):
    assert rate("length", text, **options) == expected


def test_tokens_that_nobody_counted_leave_the_row_out():
    assert rate("length", "x", unit="tokens", num_tokens=None).reason == "no num_tokens"


def test_repetition_is_the_share_of_runs_that_came_before():
    def slowly(items: list[str]) -> float:
        runs = [items[i : i + 4] for i in range(len(items) - 3)]
        return 1 - sum(run in runs[:i] for i, run in enumerate(runs)) / len(runs) if runs else 1.0

    rng = random.Random(0)
    for length in (0, 1, 3, 4, 5, 20, 60):
        words = [rng.choice(["a", "b", "C"]) for _ in range(length)]
        assert rate("repetition", " ".join(words)) == pytest.approx(slowly([word.lower() for word in words]))
        text = "".join(rng.choice("水石火") for _ in range(length))
        assert rate("repetition", text) == pytest.approx(slowly(list(text)))
    assert rate("repetition", "so it goes on and on. So it goes on and on.") == pytest.approx(1 - 3 / 9)


def test_language():
    pytest.importorskip("py3langid")
    assert rate("language", ENGLISH, languages=["en"]) > 0.9
    assert rate("language", GERMAN, languages=["en"]) == 0
    assert rate("language", GERMAN, languages=["en", "de"]) > 0.9
    assert rate("language", GERMAN, prompt="Was passiert, wenn Wasser kocht und der Topf zu ist?") > 0.9
    assert rate("language", GERMAN, prompt=ENGLISH) == 0
    assert rate("language", "OK", languages=["de"]) == 0.5
    assert rate("language", GERMAN, prompt="Was?") == 0.5
    with pytest.raises(ValueError, match=r"languages: 'english' is not among .*, en, "):
        rate("language", "x", languages=["english"])


BLOCK = "```json\n{}\n```"
TABLE = "| a | b |\n|---|:-:|\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("json", ['{"a": [1]}', " [1, 2]\n", BLOCK, "```\n[]\n```"], ["{'a': 1}", "So: {}", "3", "", f"So:\n{BLOCK}"]),
        ("code_block", [BLOCK, f"So:\n\n{BLOCK}\nThere."], ["`x`", "```\nx", "x"]),
        ("heading", ["# A\nb", "a\n\n### B"], ["#a", "a # b", "```\n# a\n```", "####### a"]),
        (
            "list",
            ["- a\n- b", "So:\n1. a\n2) b", "* a\n  + b"],
            ["- a", "a - b\nc - d", "```\n- a\n- b\n```", "-a\n-b"],
        ),
        ("table", [TABLE, f"So:\n{TABLE}"], ["a | b", "---", "a\n---"]),
        ("plain", ["Just words.", "a - b", "# a".replace(" ", "")], [BLOCK, "# a", "- a\n- b", TABLE]),
        ("ends", ["So.", "Paris", ENGLISH, BLOCK], ["", "```\nx", ENGLISH[:-9]]),
    ],
)
def test_format(form: str, good: list[str], bad: list[str]):
    assert [rate("format", text, has=[form]) for text in good] == [1.0] * len(good)
    assert [rate("format", text, has=[form]) for text in bad] == [0.0] * len(bad)


def test_of_several_formats_the_share_counts():
    assert rate("format", f"# A\n{BLOCK}", has=["heading", "code_block", "list", "json"]) == 0.5


def test_regular_expressions():
    assert rate("regex", "So it is.", pattern=r"(?i)^so\b.*\.$") == 1
    assert rate("regex", "Is it so?", pattern="^so") == 0
    assert rate("regex", "日本", pattern=r"\p{Han}{2}") == 1


def test_a_pattern_that_would_not_end_leaves_its_row_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("simpo.onpolicy.scorers.rules._REGEX_S", 0.05)
    assert rate("regex", "a" * 60 + "!", pattern=r"^(?:a|aa)+$").reason == "slow pattern"


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        (
            "18",
            [r"So \boxed{18}.", "#### 18", "The answer is 18.", "**Answer:** 18", "9 + 9 = 18", "$18", "18.0"],
            ["81"],
        ),
        (
            "She has 9 + 9 = 18.\n#### 18",
            [r"\boxed{ 18 }", "Answer: 18 eggs", "answer is: $18"],
            ["18, no, 19", "#### 19"],
        ),
        ("1234.5", ["1,234.50", r"\boxed{1{,}234.5}".replace("{,}", ","), "2469/2"], ["1,234", "12345"]),
        (r"\frac{1}{2}", ["0.5", r"\boxed{\dfrac{1}{2}}", r"\boxed{\frac12}", "Answer: 1/2", ".5"], ["2", "1/3"]),
        ("-3", [r"\boxed{-3}", "Answer: -3.0", "#### -3"], ["3", r"\boxed{3}"]),
        ("x+1", [r"\boxed{x + 1}", r"The answer is $x+1$.", "x+1", r"\boxed{\text{x}+1}"], [r"\boxed{x}", "1", ""]),
        ("B", [r"\boxed{B}", "Answer: B", "the answer is **B**", "B"], ["Answer: A", "A or B"]),
        ("50%", ["50", r"\boxed{50\%}"], ["0.5"]),
        (r"\left( 3, \frac{\pi}{2} \right)", [r"\boxed{(3,\frac{\pi}{2})}"], [r"\boxed{(3,\pi)}"]),
        ("12", [r"\boxed{7} is not it, \boxed{12} is"], [r"\boxed{12} no, \boxed{7}", "5 and 12, or 7"]),
    ],
)
def test_answers_of_maths(reference: str, right: list[str], wrong: list[str]):
    columns = {"answer": reference}
    assert {text: rate("math", text, columns=columns) for text in right} == dict.fromkeys(right, 1.0)
    assert {text: rate("math", text, columns=columns) for text in wrong} == dict.fromkeys(wrong, 0.0)


@pytest.mark.parametrize("compare", ["exact", "symbolic"])
@pytest.mark.parametrize(
    ("reference", "wrong"),
    [
        ("2", [r"\boxed{\sqrt{2}}", r"\boxed{2\pi}", r"\boxed{e^2}", r"\boxed{2ab}", r"\boxed{2 a}", r"\boxed{\pm 2}"]),
        ("2", ["It is √2.", "So it is 2π.", r"It is $2 \pi$.", r"\boxed{2\mathrm{i}}", r"\boxed{\frac{2}{x}}"]),
        (
            "2",
            [
                "The answer is not 2.",
                "The answer is 2 million.",
                "So 2 quadrillion",
                "Answer: 2²",
                "#### 2. Multiply\n6*7 = 42.",
            ],
        ),
        ("2", ["#### Step 2: Multiply\n6*7 = 42.\n\nThe answer is 42."]),
        ("3", [r"\boxed{3x}", r"\boxed{3 x}", r"\boxed{3!}", "The answer is $3!$."]),
        ("4", [r"\boxed{\log 4}", "the answer is log 4", r"\boxed{(4, 5)}"]),
        ("7", [r"\boxed{7i}", r"\boxed{-x+7}"]),
        ("5", [r"\boxed{x > 5}", r"\boxed{x \ge 5}", "The answer is more than 5", r"\boxed{5m}"]),
        ("5", ["the answer is \u22125.", "It is \u22125", r"\boxed{x = -5}"]),
        ("11/2", [r"\boxed{1\frac12}", "1 1/2"]),
        ("12", [r"\boxed{1 2}"]),
        ("1", ["Answer: 1½", "Answer:\n1. Take 9\n2. Twice that is 18"]),
        ("9", ["So the answer is 18. She sells 9 eggs."]),
        ("3!", ["3", r"\boxed{3}"]),
        ("5 km", ["5 m", "Answer: 5 miles", r"\boxed{5\text{ m}}"]),
        ("y = 5", [r"\boxed{x = 5}"]),
        ("Apollo 11", ["11"]),
    ],
)
def test_an_answer_that_only_holds_the_number_is_wrong(reference: str, wrong: list[str], compare: str):
    if compare == "symbolic":
        pytest.importorskip("math_verify")
    found = {text: rate("math", text, columns={"answer": reference}, compare=compare) for text in wrong}
    assert found == dict.fromkeys(wrong, 0.0)


@pytest.mark.parametrize(
    ("reference", "right"),
    [
        ("18", ["So the answer is 18. She sells 9 eggs.", "The answer is 18!", "<answer>18</answer>", "18 个"]),
        ("18", ["The answer is **18 eggs**.", "x=18", r"\boxed{x = 18}", r"\boxed{9+9=18}", "$18/day", "18eggs"]),
        ("18", ["The answer is 18 more eggs than before.", "Answer:\n1. Take 9\n2. Twice that is 18"]),
        ("18", ["#### 18\n\nQ: And then?", "#### $18", "##### Step 4\nSo 18.", "#### Final Answer\n\n18"]),
        ("42", ["The answer is 42 because 6*7 = 42.", "#### Step 2: Multiply\n6*7 = 42.\n\nThe answer is 42."]),
        (
            "42",
            ["#### 1. Multiply\nThe answer is 42.", "The answer is 6*7 = 42.", r"\boxed{\approx 42}", "Answer: = 42"],
        ),
        ("10000", [r"\boxed{10{,}000}", r"\boxed{10\,000}", r"\boxed{10,\!000}"]),
        ("-5", ["\\boxed{\u22125}", "the answer is \u22125.", "The answer is minus 5", r"\boxed{- 5}"]),
        (r"\frac{3}{2}", [r"\boxed{1\frac{1}{2}}", r"\boxed{1\frac12}", "1 1/2", "Answer: 1 1/2 cups", "1½"]),
        ("3/2", ["1 1/2", "The answer is 1 1/2."]),
        (
            "5000000",
            ["The answer is 5 million.", r"\boxed{5\text{ million}}", "It has 5 million people.", "$5 Million"],
        ),
        ("2.5 billion", ["2,500,000,000", "2.5 billion dollars", "2500 million"]),
        ("18 dollars", ["#### 18", "$18", "18 dollars a day"]),
        ("5", [r"\boxed{5\text{ cm}^2}", r"\boxed{5^\circ}", r"\boxed{5\text{ m/s}^{2}}", "5 m", "5cm^2", "5 cm²"]),
        (r"5\text{ cm}^2", ["5", r"\boxed{5\text{ cm}^2}"]),
        ("3x", [r"\boxed{3 x}"]),
        ("A", ["The answer is (A).", "The answer is A because it is."]),
        ("Apollo 11", ["Answer: Apollo 11", "The answer is Apollo 11. It flew."]),
        ("x\u22121", [r"\boxed{x-1}"]),
    ],
)
def test_an_answer_may_have_words_and_units_beside_it(reference: str, right: list[str]):
    found = {text: rate("math", text, columns={"answer": reference}) for text in right}
    assert found == dict.fromkeys(right, 1.0)


def test_an_answer_that_runs_on_is_read_at_once():
    began = time.monotonic()
    for text in ("a" * 20_000 + " 5", "\n" * 10**4, " " * 10**4 + "x", "$\\(" * 10**4, "1" * 10**4, "1 " * 10**4):
        for begin in ("", "Answer:", "#### ", "\\boxed{"):
            rate("math", begin + text + "}", columns={"answer": "7"})
    assert time.monotonic() - began < 20


def test_equal_expressions_are_equal_where_that_is_asked_for():
    pytest.importorskip("math_verify")
    for reference, text, expected in (
        ("x^2+2x+1", r"\boxed{(x+1)^2}", 1.0),
        (r"\frac{\sqrt{2}}{2}", r"\boxed{\frac{1}{\sqrt{2}}}", 1.0),
        ("x^2+2x+1", r"\boxed{(x+2)^2}", 0.0),
        ("18", "The answer is 18.", 1.0),
    ):
        assert rate("math", text, columns={"answer": reference}, compare="symbolic") == expected
        if reference != "18":
            assert rate("math", text, columns={"answer": reference}) == 0


def test_a_prompt_without_its_reference_is_left_out():
    found = rate("math", "18", reference="gold")
    assert found.reason == "missing column"
    assert "'gold'" in found.detail


def test_real_solutions_are_told_from_wrong_ones(real_data: Path):
    """ZeroEval's 458 pairs: what was right by its numbers, and what was wrong, both end with "Answer: ..."."""
    _, options = read_scorer({"kind": "math"})
    with gzip.open(real_data / "en_math_zeroeval" / "test.jsonl.gz", "rt") as lines:
        pairs = [json.loads(line) for line in lines]
    for pair in pairs:
        chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        gold = re.findall(r"Answer: (.*)", chosen)[-1]
        row = {"columns": {"answer": gold}}
        assert [RULES["math"](options, row, {"text": text}) for text in (chosen, rejected)] == [1, 0], pair["id"]
