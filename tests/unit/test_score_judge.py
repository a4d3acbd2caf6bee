"""A judge behind OpenAI's protocol: grades, comparisons in both orders, ties, and answers that say nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, completion

from simpo.onpolicy.journal import read_about, read_rows
from simpo.onpolicy.score import run_score
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
