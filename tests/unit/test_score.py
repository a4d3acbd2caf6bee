"""`simpo score`: numbers of one scorer or several for each response, kept by name, weighted, resumable."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simpo.cli import app
from simpo.onpolicy.journal import read_about, read_rows
from simpo.onpolicy.score import run_score
from simpo.onpolicy.scorers import build_rater, rules
from simpo.recipe import load_recipe
from simpo.recipe.scorers import read_scorer
from simpo.run.stopping import OutOfMemory

NAMES = (f"own_scorers_{number}" for number in itertools.count())
BRIEF = {"kind": "length", "min": 2, "max": 4}


def row(row_id: str, *texts: str, prompt: str = "Why?", **more: Any) -> dict[str, Any]:
    responses = [{"text": text, "num_tokens": 5, "finished": True, "logprob": -2.5} for text in texts]
    return {"id": row_id, "prompt": [{"role": "user", "content": prompt}], "responses": responses, **more}


ROWS = [row("a", "one", "one two three"), row("b", "1 2 3 4 5 6 7 8", ""), row("c", "Yes it is.")]


def write(folder: Path, rows: list[Any] = ROWS) -> Path:
    path = folder / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(folder: Path, scorers: Any, **score: Any):
    return load_recipe({"model_name_or_path": "any", "output_dir": str(folder), "score": {"scorers": scorers, **score}})


def scores(path: Path) -> dict[str, list[float]]:
    return {row["id"]: [response["score"] for response in row["responses"]] for row in read_rows(path)}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module into the working directory and gives its name, one that no other test has imported."""
    monkeypatch.chdir(tmp_path)

    def write_module(source: str) -> str:
        name = next(NAMES)
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write_module


def test_each_score_is_kept_by_name_and_the_weighted_sum_is_the_score(tmp_path: Path):
    write(tmp_path)
    scorers = {"brief": BRIEF, "long": {"kind": "length", "weight": -0.5}}
    path = run_score(recipe(tmp_path, scorers))
    assert path == tmp_path / "scored.jsonl"
    found = list(read_rows(path))
    assert [each["id"] for each in found] == ["a", "b", "c"]
    assert found[0]["responses"][0] == {
        **ROWS[0]["responses"][0],
        "scores": {"brief": 0.5, "long": 1.0},
        "score": 0.0,
    }
    assert scores(path) == {"a": [0.0, -0.5], "b": [0.5 - 4, 0.0], "c": [1 - 1.5]}
    about = read_about(path)
    assert about["left_out"] == {}
    assert about["scores"]["long"] == {"mean": 3.0, "sd": pytest.approx(7.6**0.5), "min": 0.0, "max": 8.0}


def test_standardized_scorers_count_by_their_weights_alone(tmp_path: Path):
    write(tmp_path)
    scorers = {"long": {"kind": "length"}, "never": {"kind": "regex", "pattern": "xyz"}}
    found = scores(run_score(recipe(tmp_path, scorers, standardize=True)))
    spread = 7.6**0.5
    assert found["a"] == pytest.approx([(1 - 3) / spread, 0.0])
    assert sum(itertools.chain(*found.values())) == pytest.approx(0)


def test_one_bad_response_leaves_its_row_out_and_the_rest_goes_on(own, tmp_path: Path):
    module = own(
        "def rate(prompt, response, row, *, bad):\n"
        "    if response == bad: raise KeyError('no such word')\n"
        "    return float('nan') if not response else len(response)\n"
    )
    write(tmp_path, [*ROWS, {"id": "d", "prompt": [], "responses": "none"}])
    given = {"rule": {"kind": "function", "function": f"{module}:rate", "options": {"bad": "one"}}, "brief": BRIEF}
    recipe(tmp_path, given).save(tmp_path / "recipe.yaml")
    said = CliRunner().invoke(app, ["score", str(tmp_path / "recipe.yaml")])
    assert said.exit_code == 3
    assert said.stderr.splitlines()[-4:] == [
        "rule: raised, as a: KeyError: 'no such word'",
        "rule: no finite number, as b: response 2 of 2 got 'nan'",
        "malformed, as d: responses is not a list of objects with a text",
        "left out: 1 rule: raised, 1 rule: no finite number, 1 malformed; which and why is in "
        f"{tmp_path / 'scored.json'}",
    ]
    assert f"scored: {tmp_path / 'scored.jsonl'}  (1 of 4 prompts)" in said.stderr
    assert scores(tmp_path / "scored.jsonl") == {"c": [10 + 1.0]}


def test_a_function_may_take_all_responses_of_a_prompt(own, tmp_path: Path):
    module = own(
        "def rank(prompt, responses, row): return [responses.index(max(responses)) == i for i in range(len(responses))]"
    )
    write(tmp_path)
    path = run_score(recipe(tmp_path, {"best": {"kind": "function", "function": f"{module}:rank"}}))
    assert scores(path) == {"a": [0.0, 1.0], "b": [1.0, 0.0], "c": [1.0]}


def test_what_failed_is_tried_again_and_what_is_rated_is_not(own, tmp_path: Path):
    module = own(
        "import pathlib\n"
        "def rate(prompt, response, row):\n"
        "    with open('calls', 'a') as calls: calls.write(row['id'])\n"
        "    return len(response) / pathlib.Path('good').is_file()\n"
    )
    write(tmp_path)
    asked = recipe(tmp_path, {"rule": {"kind": "function", "function": f"{module}:rate"}})
    with pytest.raises(ValueError, match=r"none of 3 rows could be scored \(3 rule: raised: ZeroDivisionError"):
        run_score(asked)
    (tmp_path / "good").touch()
    (tmp_path / "calls").unlink()
    first = run_score(asked).read_bytes()
    assert (tmp_path / "calls").read_text() == "aabbc"
    assert run_score(asked).read_bytes() == first
    assert (tmp_path / "calls").read_text() == "aabbc"


def test_rows_that_come_in_later_are_rated_and_those_before_are_not_rated_again(own, tmp_path: Path):
    """A judge is paid: an input that has grown costs what is new, and one that has changed is refused beforehand."""
    module = own(
        "def rate(prompt, response, row):\n"
        "    with open('calls', 'a') as calls: calls.write(row['id'])\n"
        "    return len(response)\n"
    )
    asked = recipe(tmp_path, {"rule": {"kind": "function", "function": f"{module}:rate"}})
    write(tmp_path, ROWS[:2])
    run_score(asked)
    write(tmp_path, [row("n", "new"), *ROWS])
    for journal in (tmp_path / "scores").glob("*.jsonl"):  # as an earlier version wrote it
        rows = [json.loads(line) for line in journal.read_text().splitlines()]
        journal.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "of"}) + "\n" for row in rows))
    assert list(scores(run_score(asked))) == ["n", "a", "b", "c"]
    assert (tmp_path / "calls").read_text() == "aabb" + "nc"
    write(tmp_path, [row("n", "another"), *ROWS])
    with pytest.raises(ValueError, match=r"scored.jsonl: was begun with other settings \(input was"):
        run_score(asked)
    assert (tmp_path / "calls").read_text() == "aabbnc"
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"id": "a", "note": 1}\n')
    with pytest.raises(ValueError, match=r"mine.jsonl: is there already, without mine.json that would say how"):
        run_score(asked, output=mine)
    assert scores(run_score(asked, output=tmp_path / "other.jsonl"))["n"] == [len("another")]
    assert (tmp_path / "calls").read_text() == "aabbnc" + "n"


def test_what_ends_the_command_is_said_in_one_line(own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = own("def rate(prompt, response, row): raise KeyboardInterrupt")
    write(tmp_path)
    recipe(tmp_path, {"rule": {"kind": "function", "function": f"{module}:rate"}}).save(tmp_path / "recipe.yaml")
    result = CliRunner().invoke(app, ["score", str(tmp_path / "recipe.yaml")])
    assert (result.exit_code, result.stderr) == (
        130,
        "interrupted; what has been scored is kept; the same command goes on\n",
    )

    def want_memory(*_: Any, **__: Any):
        raise OutOfMemory("the reward model: out of memory; choose a smaller one")

    monkeypatch.setattr("simpo.onpolicy.score.run_score", want_memory)
    result = CliRunner().invoke(app, ["score", str(tmp_path / "recipe.yaml")])
    assert (result.exit_code, result.stderr) == (1, "error: the reward model: out of memory; choose a smaller one\n")


def test_standardized_scores_follow_from_all_rows_whenever_they_came(own, tmp_path: Path):
    rule = (
        "import pathlib\n"
        "def rate(prompt, response, row):\n"
        "    return len(response) / (row['id'] != 'b' or pathlib.Path('good').is_file())"
    )
    write(tmp_path)
    asked = recipe(tmp_path, {"rule": {"kind": "function", "function": f"{own(rule)}:rate"}}, standardize=True)
    assert scores(run_score(asked)).keys() == {"a", "c"}
    (tmp_path / "good").touch()
    found = scores(run_score(asked))
    assert list(found) == ["a", "b", "c"]
    assert sum(itertools.chain(*found.values())) == pytest.approx(0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"responses": None}, "malformed"),
        ({"responses": []}, "no responses"),
        ({"responses": [{"txt": "a"}]}, "malformed"),
        ({"prompt": "Why?"}, "malformed"),
        ({"prompt": []}, "malformed"),
        ({"prompt": [{"content": "Why?"}]}, "malformed"),
        ({"columns": "answer"}, "malformed"),
    ],
)
def test_a_row_that_is_none_is_left_out(change: dict[str, Any], reason: str, tmp_path: Path):
    write(tmp_path, [*ROWS, row("d", "x") | change])
    path = run_score(recipe(tmp_path, {"brief": BRIEF}))
    assert scores(path).keys() == {"a", "b", "c"}
    assert {name: each["count"] for name, each in read_about(path)["left_out"].items()} == {reason: 1}


def test_scores_of_two_versions_never_mix(own, tmp_path: Path):
    module = own("def rate(prompt, response, row): return 1")
    write(tmp_path)
    asked = recipe(tmp_path, {"rule": {"kind": "function", "function": f"{module}:rate"}})
    run_score(asked)
    (tmp_path / f"{module}.py").write_text("def rate(prompt, response, row): return 2")
    del sys.modules[module]
    with pytest.raises(ValueError, match="begun with other settings"):
        run_score(asked)
    write(tmp_path, ROWS[:1])
    with pytest.raises(ValueError, match=r"begun with other settings \(input was"):
        run_score(asked)


@pytest.mark.parametrize("standardize", [False, True])
def test_scores_of_an_earlier_reading_are_not_taken(
    standardize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path, [row("a", "5 million", "5", columns={"answer": "5000000"}), row("b", "6", columns={"answer": "6"})])
    asked = recipe(tmp_path, {"sums": {"kind": "math"}}, standardize=standardize)
    with monkeypatch.context() as earlier:  # the version that did not write it down, and read this otherwise
        earlier.setattr(rules, "_READING", {})
        earlier.setitem(rules.RULES, "math", lambda *_: 0.5)
        before = run_score(asked).read_bytes()
        assert run_score(asked).read_bytes() == before
    assert "rated anew" not in capsys.readouterr().err
    found = [each["scores"]["sums"] for row in read_rows(run_score(asked)) for each in row["responses"]]
    assert found == [1, 0, 1]
    assert capsys.readouterr().err.count("note: sums: rated anew, as this version reads responses otherwise") == 1
    run_score(asked)
    assert "rated anew" not in capsys.readouterr().err
    assert len([*(tmp_path / "scores").glob("sums-*.jsonl")]) == 2


def test_what_reads_responses_says_which_reading_it_is():
    one = load_recipe({"model_name_or_path": "any"})
    judge = {"kind": "judge", "url": "http://any/v1", "model": "any"}  # would have to be paid again
    readings = [
        build_rater(spec["kind"], read_scorer(spec)[1], one).identity.get("reading")
        for spec in ({"kind": "math"}, {"kind": "code"}, judge)
    ]
    assert readings == [2, 2, None]


def test_new_weights_need_no_new_rating(own, tmp_path: Path):
    module = own(
        "def rate(prompt, response, row):\n    with open('calls', 'a') as calls: calls.write('x')\n    return 1"
    )
    write(tmp_path)
    for weight in (1, 3):
        rule = {"kind": "function", "function": f"{module}:rate", "weight": weight}
        path = run_score(recipe(tmp_path, {"rule": rule}), output=tmp_path / f"weight{weight}.jsonl")
        assert scores(path)["c"] == [weight]
    assert (tmp_path / "calls").read_text() == "x" * 5


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "rule: kind is missing; it is one of function, "),
        ({"kind": "lenght"}, "rule: kind = 'lenght': there are .* the nearest is length"),
        ({"kind": "wibble"}, "rule: kind = 'wibble': there are [a-z_, ]*.allowed"),
        ({"kind": "length", "minimum": 3}, "rule: 'minimum' is not an option of kind length, which has unit, min, max"),
        (
            {"kind": "length", "min": 0},
            "rule: min = 0: input should be greater than or equal to 1 .allowed: whole, >= 1",
        ),
        ({"kind": "length", "min": 9, "max": 2}, "rule: min = 9 is more than max = 2"),
        ({"kind": "length", "weight": "2"}, "rule: weight = '2': a number is needed, without quotes"),
        ({"kind": "regex"}, "rule: pattern is missing: In the syntax of"),
        ({"kind": "regex", "pattern": "(a"}, "rule: pattern = '.a': missing .* at position 2"),
        ({"kind": "format", "has": ["yaml"]}, "rule: has = .*: 'yaml' is not among json, code_block"),
        ({"kind": "function", "function": "rule.py"}, "rule: function = 'rule.py': the form is module:function"),
        ("length", "rule: 'length' is not a mapping with its kind"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_with_what_is_allowed(spec: Any, said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"score.scorers = .*{said}"):
        recipe(tmp_path, {"rule": spec})


def test_what_cannot_be_scored_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to rate with"):
        run_score(recipe(tmp_path, None))
    with pytest.raises(ValueError, match=r"responses\.jsonl: no such file"):
        run_score(recipe(tmp_path, {"brief": BRIEF}))
    write(tmp_path)
    with pytest.raises(ValueError, match=r"score.scorers.rule: function = 'nowhere:f': there is no module 'nowhere'"):
        run_score(recipe(tmp_path, {"rule": {"kind": "function", "function": "nowhere:f"}}))
    write(tmp_path, [ROWS[0], ROWS[0]])
    with pytest.raises(ValueError, match="two rows have the id 'a'"):
        run_score(recipe(tmp_path, {"brief": BRIEF}))


def test_keys_explain_every_kind_and_option():
    said = CliRunner().invoke(app, ["keys", "score.length"]).stdout
    assert "a scorer of kind length" in said
    assert "score.scorers.NAME.unit" in said
    assert "allowed: words, characters or tokens" in said


def test_a_row_whose_text_is_not_unicode_is_left_out_alone(tmp_path: Path):
    write(tmp_path, [row("a", "half \ud800", "one"), row("b", "one", "one two"), row("c", "one", prompt="\udc00?")])
    about = read_about(run_score(recipe(tmp_path, {"brief": BRIEF})))
    assert about["rows"] == 1
    assert about["left_out"]["malformed"]["count"] == 2
    assert "not valid Unicode" in about["left_out"]["malformed"]["examples"][0]["detail"]
