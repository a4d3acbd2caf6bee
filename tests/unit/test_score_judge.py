"""A judge behind OpenAI's protocol: grades, comparisons in both orders, ties, and answers that say nothing."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, completion

from simpo.data.columns import RowError
from simpo.onpolicy.client import Choice
from simpo.onpolicy.journal import read_about, read_rows
from simpo.onpolicy.score import run_score
from simpo.onpolicy.scorers import judge
from simpo.recipe import load_recipe

pytest.importorskip("openai")

TEXTS = {"a": ["good", "fine", "fine too"], "b": ["{first} good", "bad"], "c": ["bad", "good $5 \\1"]}
WORTH = {"good": 3, "fine": 2, "bad": 1}


def rate(folder: Path, server: ChatServer, **options: Any) -> Path:
    rows = [
        {
            "id": name,
            "prompt": [{"role": "user", "content": f"Question {name}?"}],
            "columns": {"answer": "fine"},
            "responses": [{"text": text} for text in texts],
        }
        for name, texts in TEXTS.items()
    ]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"kind": "judge", "url": server.url, "model": "small", **options}
    recipe = {"model_name_or_path": "any", "output_dir": str(folder), "score": {"scorers": {"judge": spec}}}
    return run_score(load_recipe(recipe))


def scores(path: Path) -> dict[str, list[float]]:
    return {row["id"]: [each["score"] for each in row["responses"]] for row in read_rows(path)}


def answers_in(body: dict[str, Any]) -> list[str]:
    return re.findall(r"<answer(?:-\d)?>\n(.*?)\n</answer", body["messages"][0]["content"], re.DOTALL)


def worth(text: str) -> int:
    return next(worth for word, worth in WORTH.items() if word in text)


def fair(body: dict[str, Any]) -> Any:
    found = answers_in(body)
    if not found:  # the client tries the server out
        return completion("Hello.")
    if len(found) == 1:
        return completion(f"Grade: 9 is what I thought first.\n**Grade: {worth(found[0])}**")
    first, second = map(worth, found)
    return completion(f"Verdict: {'tie' if first == second else 1 if first > second else 2}")


def test_comparisons_run_in_both_orders_and_keep_ties(tmp_path: Path):
    with ChatServer(fair) as server:
        found = scores(rate(tmp_path, server))
        assert found == {"a": [1.0, 0.25, 0.25], "b": [1.0, 0.0], "c": [0.0, 1.0]}
        asked = [answers_in(body) for body in server.asked if answers_in(body)]
        assert len(asked) == 6 + 2 + 2
        assert ["good", "fine"] in asked
        assert ["fine", "good"] in asked
        assert ["{first} good", "bad"] in asked  # what is filled in is not filled in again
        assert any("\nQuestion c?\n" in body["messages"][0]["content"] for body in server.asked)
        count = len(server.asked)
        rate(tmp_path, server)
        assert len(server.asked) == count  # all is there: the server is not even tried out


def test_a_judge_that_prefers_what_comes_first_tells_nothing(tmp_path: Path):
    with ChatServer(lambda body: completion("Verdict: 1")) as server:
        assert scores(rate(tmp_path, server)) == {"a": [0.5] * 3, "b": [0.5] * 2, "c": [0.5] * 2}


def test_against_a_reference_in_both_orders(tmp_path: Path):
    with ChatServer(fair) as server:
        found = scores(rate(tmp_path, server, form="reference"))
    assert found == {"a": [1.0, 0.5, 0.5], "b": [1.0, 0.0], "c": [0.0, 1.0]}


def test_the_last_grade_counts(tmp_path: Path):
    with ChatServer(fair) as server:
        assert scores(rate(tmp_path, server, form="grade")) == {"a": [3, 2, 2], "b": [3, 1], "c": [1, 3]}


def test_an_answer_that_says_nothing_leaves_its_row_out_and_is_shown(tmp_path: Path):
    def answer(body: dict[str, Any]) -> Any:
        found = answers_in(body)
        if found == ["fine too"]:
            return completion("Both have their merits.")
        return completion("Grade: 11") if found == ["{first} good"] else fair(body)

    with ChatServer(answer) as server:
        path = rate(tmp_path, server, form="grade")
        assert scores(path) == {"c": [1, 3]}
        left_out = read_about(path)["left_out"]["judge: unreadable"]
        assert left_out["count"] == 2
        said = " ".join(each["detail"] for each in left_out["examples"])
        assert "'Both have their merits.'" in said
        assert "the judge's grade is 11, not 1 to 10" in said
    with ChatServer(fair) as server:  # given again, with another server of the same model
        assert scores(rate(tmp_path, server, form="grade")) == {"a": [3, 2, 2], "b": [3, 1], "c": [1, 3]}
        assert len([body for body in server.asked if answers_in(body)]) == 5


def read(text: str, form: str, *, finished: bool = True) -> float | None:
    """The points of the answer that comes first, or the grade; None where the judge's answer is unreadable."""
    row = {"id": "a", "prompt": [], "responses": [{"text": "x"}, {"text": "y"}]}
    state = judge._Open(row, 1, [[], []])
    try:
        judge._note(state, [0, 1], [Choice(text, finished)], form)
    except RowError as error:
        return None if error.reason == "unreadable" else math.nan
    return state.points[0][0]


POINTS = {"1": 1.0, "2": 0.0, "tie": 0.5, None: None}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('Verdict: 2\n\n(Had the first been complete, I would have said "Verdict: 1".)', "2"),
        ("Verdict: 1\nOn reflection:\nVerdict: 2\n", "2"),
        ("Verdict: 2\nThe rubric knows three forms. Verdict: 1 is for a better first answer, which is not so.", "2"),
        ("Both are fine, but the second is whole. Verdict: 2", "2"),
        ("Verdict: Answer 2", "2"),
        ("Verdict: **Answer 1**", "1"),
        ("__Verdict: 2__", "2"),
        ("__Verdict__: _tie_", "tie"),
        ("Verdict is 2", "2"),
        ("So, my final verdict is: **2**.", "2"),
        (r"Verdict: \boxed{2}", "2"),
        (r"Verdict: $\boxed{\text{tie}}$", "tie"),
        ("3. **Final Verdict:** Tie", "tie"),
        ("> Verdict: [[1]]", "1"),
        ("| Verdict | 2 |", "2"),
        ("## Verdict\n\n2", "2"),
        ("## Verdict\n\n**Answer 2**\n\nIt is whole.", "2"),
        ("verdict 1", "1"),
        ("Verdict (1, 2 or tie): 2", "2"),
        ("Verdict: 2 - Answer 2 is better", "2"),
        ("Verdict: 1 (2 is worse)", "1"),
        ("Verdict: 1 > 2", "1"),
        ("Verdict: 2\n1 is worse.", "2"),
        ('{"verdict": "2"}', "2"),
        ('{"why": "It is whole.", "verdict": 1, "confidence": 2}', "1"),
        ('```json\n{\n  "verdict": "tie",\n  "confidence": 1\n}\n```', "tie"),
        ("It is whole, so <verdict>2</verdict>", "2"),
        ("<think>\nVerdict: 1? No.\n</think>\n\nVerdict: 2", "2"),
        ("Verdict: 1? No.\n</think>\n\nVerdict: tie", "tie"),  # the header began the thought
        ("<think>Should I say Verdict: 1? Let me check answer 2 first, which", None),
        ("<think>\nVerdict: 1\n", None),
        ("<think>\nVerdict: 1\n</think>\n\nBoth have their merits.", None),
        ("Verdict: 1 or 2? They are equal.", None),
        ("Verdict: tie or 1", None),
        ("Verdict: 1?", None),
        ("Verdict: 1/2", None),
        ("Verdict: [1|2|tie]", None),
        ("Verdict: 1, 2", None),
        ("Verdict: 1 and 2 are equal", None),
        ("Verdict: 1 = 2", None),
        ('"Verdict: 1" if the first answer is better, "Verdict: 2" if the second one is', None),
        ("## Verdict\n\n1. The first is good.\n2. The second as well.", None),
        ("Verdict 1 is what many would say", None),
        ("Verdict is not 1", None),
        ("Verdict: 12", None),
        ("Verdict: 1.5", None),
        ("Verdict: 1st", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_from_the_last_line_that_is_one(text: str, verdict: str | None):
    assert read(text, "pairs") == POINTS[verdict]


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Grade (1-10): 8", 8),
        ("**Grade** (1-10): 8", 8),
        ("**Grade (10 = could not be better):** 8", 8),
        ("Grade out of 10: 8", 8),
        ("Grade/10: 8", 8),
        ("Grade: 8/10", 8),
        ("Grade: **8** / 10", 8),
        ("Grade: 8.0/10.0", 8),
        (r"Grade: \boxed{8/10}", 8),
        ("Grade: 8 out of 10.", 8),
        ("Grade: 10/10", 10),
        ("Grade - 8.5, as it is short", 8.5),
        ("Overall grade: 7 \u2013 solid", 7),
        ("The grade is 7.", 7),
        ("Grade: 7\n\nA grade 10 would need more detail.", 7),
        ("Grade: 7\n\nGrade 10 would need more detail.", 7),
        ("Grade\n\n- 8", 8),
        ('{"why": "It is short.", "grade": 8.5, "confidence": 1}', 8.5),
        ("Grade: -3", None),
        ("Grade: \u22123", None),
        ("Grade: 0.8", None),
        ("Grade: 1-10", None),
        ("Grade: 8 - 9", None),
        ("Grade: 8 to 9", None),
        ("Grade: 7 or 8", None),
        ("Grade: 8,5", None),
        ("Grade: 4/5", None),
        ("Grade: 4 out of 5", None),
        ("Grade: 80/100", None),
        ("Grade: 85%", None),
        ("Grade: 8th", None),
        ("<think>\nGrade: 8", None),
    ],
)
def test_a_grade_is_read_from_the_last_line_that_is_one(text: str, grade: float | None):
    assert read(text, "grade") == grade


@pytest.mark.parametrize(("text", "form"), [("Verdict: 1\nYet", "pairs"), ("Grade: 1", "grade"), ("", "pairs")])
def test_an_answer_that_was_cut_has_no_last_line(text: str, form: str):
    assert read(text, form, finished=False) is None


@pytest.mark.parametrize("text", ["-", "\n", "(", ". ", "the ", "verdict", "Verdict: -"])
def test_reading_does_not_take_long(text: str):
    begun = time.perf_counter()
    read(text * 10_000, "pairs")
    assert time.perf_counter() - begun < 5  # hundredths of a second; what looks ahead to the end each time takes more


def test_a_judge_that_is_cut_is_told_to_get_more_tokens(tmp_path: Path):
    """Some servers give no text at all while the model thinks."""

    def answer(body: dict[str, Any]) -> Any:
        found = answers_in(body)
        if not found or found == ["fine too"]:  # the trial, too
            message = {"role": "assistant", "content": None, "reasoning_content": "Okay, the"}
            return {"choices": [{"index": 0, "message": message, "finish_reason": "length"}]}
        return completion("Grade: 1", finish="length") if found == ["{first} good"] else fair(body)

    with ChatServer(answer) as server:
        path = rate(tmp_path, server, form="grade")
    assert scores(path) == {"c": [1, 3]}
    left_out = read_about(path)["left_out"]
    assert left_out.keys() == {"judge: unreadable", "judge: cut while thinking"}
    assert all("max_tokens" in entry["examples"][0]["detail"] for entry in left_out.values())


def test_a_template_of_ones_own(tmp_path: Path):
    template = tmp_path / "template.txt"
    template.write_text("{prompt}|{response}")
    with ChatServer(lambda body: completion(f"grade {body['messages'][0]['content'].count('|') + 1}")) as server:
        found = scores(rate(tmp_path, server, form="grade", template=str(template)))
        assert found["a"] == [2.0, 2.0, 2.0]
        with pytest.raises(ValueError, match=r"score.scorers.judge: template: .* has no \{first\}"):
            rate(tmp_path, server, template=str(template))
        template.write_text("{prompt} {response}")
        with pytest.raises(ValueError, match="begun with other settings"):
            rate(tmp_path, server, form="grade", template=str(template))
