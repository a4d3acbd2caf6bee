"""`simpo judge`: two sides' answers, who judges them, and what is written for other tools."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
from chat_server import ChatServer, completion
from typer.testing import CliRunner

from simpo.cli import app
from simpo.judging.alpaca import alpaca_eval_win_rate
from simpo.judging.answers import label_sides, read_answers
from simpo.judging.command import run_judge
from simpo.judging.winrate import fit_logistic, length_controlled_win_rate, win_rate
from simpo.onpolicy.prompts import read_prompts
from simpo.recipe import load_recipe

ANSWERS = {
    "Name a river.": ("The Rhine.", "Rhine"),
    "Name a stone.": ("Granite is one, and so is marble.", "Granite, which is hard."),
    "Name a light.": ("The moon.", "The moon."),
    "Name a tree.": ("Oak", "The mighty oak, as everybody knows."),
}


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    """A recipe of four prompts that two files answer; the longer answer wins."""
    rows = [{"uid": f"q{place}", "category": "hard_prompt", "prompt": text} for place, text in enumerate(ANSWERS)]
    write_lines(tmp_path / "prompts.jsonl", rows)
    for place, name in enumerate(("ours", "theirs")):
        outputs = [
            {"instruction": prompt, "output": both[place], "generator": f"lab/{name}-7b"}
            for prompt, both in ANSWERS.items()
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(outputs))
    return {
        "model_name_or_path": "any",
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        "judge": {
            "model": str(tmp_path / "ours.json"),
            "against": str(tmp_path / "theirs.json"),
            "prompts": {str(tmp_path / "prompts.jsonl"): 1.0},
            "scorers": {"long": {"kind": "length"}},
        },
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def changed(keys: dict[str, Any], **judge: Any) -> dict[str, Any]:
    return {**keys, "judge": {**keys["judge"], **judge}}


def judgement(keys: dict[str, Any]) -> dict[str, Any]:
    return json.loads(run_judge(load_recipe(keys)).read_text())


def places_in(body: dict[str, Any]) -> list[str]:
    return re.findall(r"<answer-\d>\n(.*?)\n</answer", body["messages"][0]["content"], re.DOTALL)


def likes_the_longer(body: dict[str, Any]) -> Any:
    found = places_in(body)
    return completion(f"So it is.\nVerdict: {1 if len(found[0]) > len(found[1]) else 2}" if found else "Hello.")


# --- who wins --------------------------------------------------------------------------------------------------------


def test_the_higher_score_wins_and_equal_ones_are_a_tie(keys):
    found = judgement(keys)
    assert (found["wins"], found["ties"], found["losses"], found["identical"]) == (2, 1, 1, 1)
    assert found["win_rate"]["value"] == 0.625
    assert found["win_rate"]["low"] < 0.625 < found["win_rate"]["high"]
    assert found["characters"]["model"] == np.mean([len(ours) for ours, _ in ANSWERS.values()])
    assert found["both_orders_agree"] is None


def test_a_judge_is_asked_in_both_orders_and_what_it_says_is_kept(keys):
    pytest.importorskip("openai")
    with ChatServer(likes_the_longer) as server:
        spec = {"kind": "judge", "url": server.url, "model": "small"}
        found = judgement(changed(keys, scorers={"gpt": spec}))
        assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
        assert found["both_orders_agree"] == 1.0
        assert found["first_preferred"] == 0.5
        asked = [tuple(places_in(body)) for body in server.asked if places_in(body)]
        assert len(asked) == 6  # equal answers are nobody's to judge
        assert {tuple(reversed(pair)) for pair in asked} == set(asked)
        games = read_lines(Path(keys["output_dir"], "judged/arena_hard/model_judgment/gpt/ours-7b.jsonl"))[1]["games"]
        assert [game["score"] for game in games] == ["B>A", "A>B"]
        assert games[0]["judgment"] == "So it is.\nVerdict: 2"


def test_a_judge_of_what_comes_first_finds_nothing_and_is_found_out(keys):
    pytest.importorskip("openai")
    with ChatServer(lambda body: completion("Verdict: 1")) as server:
        spec = {"kind": "judge", "url": server.url, "model": "small"}
        found = judgement(changed(keys, scorers={"gpt": spec}))
    assert (found["win_rate"]["value"], found["ties"]) == (0.5, 4)
    assert (found["both_orders_agree"], found["first_preferred"]) == (0.0, 1.0)


def test_killed_at_any_byte_nothing_is_judged_twice(keys):
    pytest.importorskip("openai")
    with ChatServer(likes_the_longer) as server:
        spec = {"kind": "judge", "url": server.url, "model": "small", "concurrency": 1}
        keys = changed(keys, scorers={"gpt": spec})
        whole = judgement(keys)
        (journal,) = Path(keys["output_dir"], "judged/scores").glob("gpt-*.jsonl")
        content, rng = journal.read_bytes(), random.Random(0)
        for cut in rng.sample(range(1, len(content)), 4):
            journal.write_bytes(content[:cut])
            before = len([body for body in server.asked if places_in(body)])
            assert judgement(keys) == whole
            again = len([body for body in server.asked if places_in(body)]) - before
            assert again == 2 * (3 - content[:cut].count(b"\n"))
            assert journal.read_bytes() == content
        # Two prompts more: those that are judged stay so.
        prompts = Path(next(iter(keys["judge"]["prompts"])))
        for name in ("ours", "theirs"):
            path = Path(keys["output_dir"]).parent / f"{name}.json"
            path.write_text(json.dumps([*json.loads(path.read_text()), {"instruction": "More?", "output": name}]))
        prompts.write_text(prompts.read_text() + json.dumps({"prompt": "More?"}) + "\n")
        before = len([body for body in server.asked if places_in(body)])
        assert judgement(keys)["compared"] == 5
        assert len([body for body in server.asked if places_in(body)]) == before + 2


def test_killed_while_the_judge_is_asked_it_goes_on_and_asks_nothing_twice_but_what_was_in_hand(keys, tmp_path):
    pytest.importorskip("openai")
    program: forks.Program | None = None
    kills = [3, 6]  # asked in the middle of a row, and at its beginning

    def kills_now_and_then(body: dict[str, Any]) -> Any:
        if places_in(body) and kills and len([each for each in server.asked if places_in(each)]) == kills[0]:
            kills.pop(0)
            program.kill()
            program.wait()
        return likes_the_longer(body)

    with ChatServer(kills_now_and_then) as server:
        spec = {"kind": "judge", "url": server.url, "model": "small", "concurrency": 1}
        (tmp_path / "recipe.yaml").write_text(json.dumps(changed(keys, scorers={"gpt": spec})))
        codes = []
        while not codes or codes[-1] < 0:
            program = forks.Program(["-m", "simpo", "judge", "recipe.yaml"], cwd=tmp_path)
            codes.append(program.wait(60))
        assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
        asked = [tuple(places_in(body)) for body in server.asked if places_in(body)]
        assert len(asked) == 6 + 2  # a row in hand is asked about again, one that was judged is not
        folder = Path(keys["output_dir"], "judged")
        whole = run_judge(load_recipe(changed(keys, scorers={"gpt": spec})), output=tmp_path / "undisturbed")
    for path in whole.parent.rglob("*.json*"):
        assert (folder / path.relative_to(whole.parent)).read_bytes() == path.read_bytes(), path


def test_answers_are_judged_again_by_references_that_were_corrected(keys, tmp_path):
    keys = {**changed(keys, scorers={"sums": {"kind": "math"}}), "generate": {"keep_columns": ["answer"]}}
    (tmp_path / "ours.json").write_text(
        json.dumps([{"instruction": p, "output": f"It is {n}.", "generator": "a"} for n, p in enumerate(ANSWERS)])
    )
    for answers, expected in (([9, 9, 9, 9], (0, 4)), ([0, 1, 2, 3], (4, 0)), ([0, 1, 2, 9], (3, 1))):
        rows = [{"prompt": text, "answer": str(n)} for text, n in zip(ANSWERS, answers, strict=True)]
        write_lines(tmp_path / "prompts.jsonl", rows)
        found = judgement(keys)
        assert (found["wins"], found["ties"]) == expected


def test_names_of_prompts_judge_nothing_again(keys, tmp_path):
    """Nor does an upgrade: rows had the names of their texts alone."""
    judgement(keys)
    (compared,) = (tmp_path / "run").rglob("compared.jsonl")
    for row in read_lines(compared):
        assert row["columns"].keys() == {"uid", "category"}
        texts = json.dumps([response["text"] for response in row["responses"]])
        assert row["id"].endswith("-" + hashlib.blake2b(texts.encode(), digest_size=6).hexdigest())


def test_another_judge_of_the_same_answers_may_follow(keys):
    assert judgement(keys)["wins"] == 2
    found = judgement(changed(keys, scorers={"brief": {"kind": "length", "weight": -1}}))
    assert (found["wins"], found["losses"]) == (1, 2)


def test_another_model_may_be_judged_in_the_same_folder_and_the_first_one_again(keys, tmp_path):
    before = judgement(keys)
    third = [{"instruction": prompt, "output": f"{ours} And so on and so on."} for prompt, (ours, _) in ANSWERS.items()]
    (tmp_path / "third.json").write_text(json.dumps(third))
    assert judgement(changed(keys, model=str(tmp_path / "third.json")))["wins"] == 4
    assert judgement(keys)["win_rate"] == before["win_rate"]
    fewer = judgement(changed(keys, max_prompts=2))
    assert fewer["wins"] + fewer["ties"] + fewer["losses"] == 2


def test_prompts_that_one_side_does_not_answer_are_left_out_and_named(keys, tmp_path):
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    write_recipe = tmp_path / "recipe.yaml"
    write_recipe.write_text(json.dumps(keys))
    result = CliRunner().invoke(app, ["judge", str(write_recipe), "--json"])
    assert result.exit_code == 3
    assert json.loads(result.stdout)["compared"] == 3
    assert f"no answer ({path})" in result.stderr
    table = CliRunner(env={"COLUMNS": "60"}).invoke(app, ["judge", str(write_recipe)])
    assert re.search(r"win rate +50\.0% ", table.stdout)
    assert all(len(line) <= 60 for line in table.stdout.splitlines()[3:-1])


# --- models ----------------------------------------------------------------------------------------------------------


def test_two_models_answer_the_held_out_prompts(tmp_path, tiny_model):
    rng = random.Random(0)
    rows = [
        {"prompt": f"{n} {rng.choice(['water', 'stone'])}?", "chosen": "a river", "rejected": "stone"}
        for n in range(20)
    ]
    write_lines(tmp_path / "pairs.jsonl", rows)
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny_model.iterdir():
        (other / path.name).symlink_to(path)
    keys = {
        "model_name_or_path": str(tiny_model),
        "output_dir": str(other),
        "cache_dir": str(tmp_path / "cache"),
        "dataset_mixer": {str(tmp_path / "pairs.jsonl"): 1.0},
        "validation_fraction": 0.2,
        "bf16": False,
        "num_threads": 1,
        "generate": {"num_samples": 4, "temperature": 0.7, "max_new_tokens": 6, "processes": 1},
        "judge": {"scorers": {"long": {"kind": "length"}}},
    }
    found = judgement(keys)
    assert found["compared"] == found["identical"] == 4  # greedy, and the same weights
    assert found["win_rate"]["value"] == 0.5
    for most in (3, 2, 4):
        assert judgement(changed(keys, max_prompts=most))["compared"] == most
    assert len(read_lines(next((other / "judged").rglob("other.jsonl")))) == 4
    keys["judge"]["temperature"] = 1.0
    keys["generate"]["keep_columns"] = ["answer"]
    with pytest.raises(ValueError, match=r"generate\.temperature was 0\.0 and is 1\.0"):
        judgement(keys)
    with pytest.raises(ValueError, match="dataset_mixer has no held-out rows"):
        judgement({**keys, "validation_fraction": 0.0})


def test_what_cannot_be_judged_is_said_in_one_line(keys, tmp_path):
    for judge, words in (
        ({"scorers": None}, "judge.scorers: nothing to judge with"),
        ({"scorers": {"own": {"kind": "function", "function": "nowhere:rate"}}}, "judge.scorers.own: function = "),
        ({"prompts": None}, "judge.prompts: no prompts to answer"),
        ({"prompts": {str(tmp_path / "nowhere.jsonl"): 1.0}}, "nowhere.jsonl"),
        ({"against": str(tmp_path / "none.json")}, "none.json: no such file of answers"),
        ({"against": str(tmp_path / "ours.json")}, "there is nothing to compare"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            judgement(changed(keys, **judge))


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ("runs/a", "org/Model-0.5B", ("a", "Model-0.5B")),
        ("demo/round-1/run", "demo/round-2/run", ("round-1-run", "round-2-run")),
        ("a/x", "b/c/x", ("a-x", "c-x")),
        ("x", "/x", ("x-1", "x-2")),
    ],
)
def test_sides_are_named_by_what_tells_them_apart(first, second, labels):
    assert label_sides(first, second) == labels


# --- files -----------------------------------------------------------------------------------------------------------


def test_answers_are_read_from_every_shape_that_is_written(keys, tmp_path):
    judgement(keys)
    folder, recipe = Path(keys["output_dir"], "judged"), load_recipe(keys)
    asked = {"generate.prompts": {str(folder / "prompts.jsonl"): 1.0}, "generate.keep_columns": ["uid"]}
    prompts = read_prompts(load_recipe(recipe, asked)).prompts
    arena = read_lines(folder / "arena_hard/model_answer/ours-7b.jsonl")
    shapes = {
        "alpaca.json": json.loads((folder / "alpaca_eval/model_outputs.json").read_text()),
        "arena_2.jsonl": [{key: row[key] for key in ("model", "messages")} for row in arena],
        "arena_1.jsonl": [{key: row[key] for key in ("question_id", "model_id", "choices")} for row in arena],
        "plain.jsonl": [{"prompt": prompt, "response": ours} for prompt, (ours, _) in ANSWERS.items()],
        "simpo.jsonl": [{"id": p.id, "responses": [{"text": ANSWERS[p.turns[0]["content"]][0]}]} for p in prompts],
    }
    for name, rows in shapes.items():
        path = tmp_path / name
        path.write_text(json.dumps(rows)) if path.suffix == ".json" else write_lines(path, rows)
        found, generator = read_answers(path, prompts, recipe)
        assert [found[p.id].text for p in prompts] == [ours for ours, _ in ANSWERS.values()], name
        assert generator == (None if name in ("plain.jsonl", "simpo.jsonl") else "ours-7b"), name


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Name a river."}, "row 1: no single answer in"),
        ({"prompt": "Name a river.", "responses": [{"text": "a"}, {"text": "b"}]}, "row 1: no single answer in"),
        ({"prompt": "Who?", "output": "I"}, "none of its 1 rows answers one of the 4 prompts"),
        ("text", "row 1 is not an object"),
    ],
)
def test_a_file_that_is_no_file_of_answers_is_refused(keys, tmp_path, row, words):
    write_lines(tmp_path / "wrong.jsonl", [row])
    with pytest.raises(ValueError, match=words):
        judgement(changed(keys, model=str(tmp_path / "wrong.jsonl")))


def test_arena_hard_reads_its_fields_in_both_versions(keys):
    """Every field that show_result.py and gen_judgment.py of v0.1 and v2.0 take from a row."""
    judgement(keys)
    folder = Path(keys["output_dir"], "judged/arena_hard")
    for label, place in (("ours-7b", 0), ("theirs-7b", 1)):
        for row, both in zip(read_lines(folder / f"model_answer/{label}.jsonl"), ANSWERS.values(), strict=True):
            assert row["messages"][-1]["content"]["answer"] == row["choices"][0]["turns"][0]["content"] == both[place]
            assert row["model"] == row["model_id"] == label
            for style in (row["metadata"], row["conv_metadata"]):
                assert list(style) == ["token_len", "header_count", "list_count", "bold_count"]
                assert all(isinstance(each, int) or sum(each.values()) >= 0 for each in style.values())
    judged = read_lines(folder / "model_judgment/long/ours-7b.jsonl")
    assert [row["uid"] for row in judged] == [row["question_id"] for row in judged] == ["q0", "q1", "q2", "q3"]
    assert {(row["category"], row["model"], row["baseline"]) for row in judged} == {
        ("hard_prompt", "ours-7b", "theirs-7b")
    }
    # Of the first game A is the baseline, of the second the model.
    assert [[game["score"] for game in row["games"]] for row in judged] == [
        ["B>A", "A>B"],
        ["B>A", "A>B"],
        ["A=B", "A=B"],
        ["A>B", "B>A"],
    ]


def test_arena_hards_reading_of_judgements_comes_to_our_win_rate(keys):
    """v2.0 reads with pandas: the second game as it stands, the first turned; style from both models' metadata."""
    pandas = pytest.importorskip("pandas")
    found, folder = judgement(keys), Path(keys["output_dir"], "judged/arena_hard")
    judged = pandas.read_json(folder / "model_judgment/long/ours-7b.jsonl", lines=True)
    wins = {"A>B": 1.0, "A=B": 0.5, "B>A": 0.0}
    points = [[wins[games[1]["score"]], 1 - wins[games[0]["score"]]] for games in judged["games"]]
    assert np.mean(points) == found["win_rate"]["value"]
    style = {}
    for label in ("ours-7b", "theirs-7b"):
        answers = pandas.read_json(folder / f"model_answer/{label}.jsonl", lines=True)
        style[answers.iloc[0]["model"]] = answers.set_index("uid")["metadata"].to_dict()
    for _, row in judged.iterrows():
        ours, theirs = style[row["model"]][row["uid"]], style[row["baseline"]][row["uid"]]
        assert all(
            np.isfinite(sum(each.values()) / known["token_len"])
            for known in (ours, theirs)
            for name, each in known.items()
            if name != "token_len"
        )


def test_arena_hard_of_the_papers_time_finds_an_answers_length_in_its_turn(keys, tmp_path):
    """v0.1 as it was in May 2024; later conv_metadata has it. An answer without words is no division by zero."""
    path = tmp_path / "ours.json"
    outputs = json.loads(path.read_text())
    outputs[0]["output"] = ""
    path.write_text(json.dumps(outputs))
    judgement(keys)
    rows = read_lines(Path(keys["output_dir"], "judged/arena_hard/model_answer/ours-7b.jsonl"))
    lengths = [row["choices"][0]["turns"][0]["token_len"] for row in rows]
    assert lengths == [row["conv_metadata"]["token_len"] for row in rows] == [1, 7, 2, 1]


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_win_rate_is_the_mean_with_the_interval_of_its_bootstrap():
    points = np.array([1.0] * 60 + [0.5] * 20 + [0.0] * 20)
    value, low, high = win_rate(points)
    error = points.std() / 10
    assert value == 0.7
    assert (low, high) == (pytest.approx(0.7 - 1.96 * error, abs=0.01), pytest.approx(0.7 + 1.96 * error, abs=0.01))
    assert win_rate(np.ones(10)) == pytest.approx((1.0, 0.722, 1.0), abs=0.001)  # Wilson's


def made_up(rng: np.random.Generator, *, theta: float, bought: float, prompts: int) -> tuple[np.ndarray, ...]:
    """Judgements whose log-odds are theta at equal length, and what `bought` times the difference adds; ours longer."""
    ours, theirs = rng.integers(400, 1600, prompts), rng.integers(300, 900, prompts)
    difference = ours - theirs
    chance = 1 / (1 + np.exp(-(theta + bought * np.tanh(difference / difference.std()))))
    return (rng.random(prompts) < chance).astype(float), ours, theirs


@pytest.mark.parametrize(("theta", "bought"), [(0.4, 0.0), (0.0, 1.5), (-0.8, 1.5)])
def test_the_length_controlled_win_rate_finds_the_true_one_where_length_buys_wins(theta, bought, monkeypatch):
    monkeypatch.setattr("simpo.judging.winrate._REFITS", 200)
    rng, true = np.random.default_rng(0), 1 / (1 + np.exp(-theta))
    drawn = [made_up(rng, theta=theta, bought=bought, prompts=2000) for _ in range(12)]
    found = [length_controlled_win_rate(*each) for each in drawn]
    assert np.mean([each.value for each in found]) == pytest.approx(true, abs=0.02)
    assert sum(each.low <= true <= each.high for each in found) >= 10
    raw = np.mean([points.mean() for points, _, _ in drawn])
    assert raw == pytest.approx(true, abs=0.02) if not bought else raw > true + 0.1


def test_the_fit_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    points, feature = rng.choice([0, 0.25, 0.5, 1], 80), np.tanh(rng.standard_normal(80))
    features = np.stack([np.ones(80), feature])
    weights = rng.multinomial(80, np.full(80, 1 / 80), size=5)
    reference = linear_model.LogisticRegression(C=100, fit_intercept=False, tol=1e-10)
    for found, own in zip(fit_logistic(points, features, weights), weights, strict=True):
        shares = np.concatenate([own * points, own * (1 - points)])
        reference.fit(np.tile(features, 2).T, np.repeat([1, 0], 80), sample_weight=shares)
        assert found == pytest.approx(reference.coef_[0], abs=1e-6)


def test_equal_lengths_and_lists_too_short_to_fit_keep_the_win_rate_in_reach():
    points, length = np.array([1.0, 0.5, 0.0, 1.0]), np.full(4, 9)
    assert length_controlled_win_rate(points, length, length).value == pytest.approx(0.625, abs=2e-3)
    assert length_controlled_win_rate(np.ones(3), np.arange(3), length[:3]) == win_rate(np.ones(3))
    decided = length_controlled_win_rate(np.array([0.0, 0, 1, 1]), np.array([1, 2, 17, 18]), length)
    assert 0.3 < decided.value < 0.7  # length explains all of it


# --- AlpacaEval ------------------------------------------------------------------------------------------------------


@pytest.fixture
def alpaca_eval():
    """The package, where it works: it needs setuptools below 81, whose pkg_resources it imports."""
    return pytest.importorskip("alpaca_eval", exc_type=ImportError)


@pytest.mark.filterwarnings("ignore")  # the package's, and of what it imports
def test_alpaca_eval_reads_outputs_and_judgements(keys, alpaca_eval):
    """Its `evaluate` on our files: nothing is annotated anew, and its win rate is ours."""
    found, folder = judgement(keys), Path(keys["output_dir"], "judged/alpaca_eval")
    config = folder / "annotator" / "configs.yaml"
    config.parent.mkdir()
    (config.parent / "question.txt").write_text("{instruction}{output_1}{output_2}")
    asks = {"prompt_template": "annotator/question.txt", "fn_completions": "openai_completions"}
    config.write_text(json.dumps({"long": asks}))  # would ask OpenAI about what it does not find
    leaderboard, annotations = alpaca_eval.evaluate(
        model_outputs=folder / "model_outputs.json",
        reference_outputs=folder / "reference_outputs.json",
        annotators_config=config,
        caching_path=folder / "annotations.json",
        fn_metric="get_winrate",
        sort_by="win_rate",
        precomputed_leaderboard=None,
        output_path=None,
        is_return_instead_of_print=True,
    )
    row = leaderboard.loc["ours-7b"]
    assert row["win_rate"] == pytest.approx(100 * found["win_rate"]["value"])
    assert (row["n_wins"], row["n_draws"], row["n_wins_base"]) == (found["wins"], found["ties"], found["losses"])
    assert [(each["output_2"], each["output_1"]) for each in annotations] == list(ANSWERS.values())


@pytest.mark.filterwarnings("ignore")
def test_alpaca_evals_own_regression_is_used_for_its_own_prompts(alpaca_eval, tmp_path, monkeypatch):
    """On its 805 prompts, with the file of difficulties that it reads from the hub made up here."""
    rng = random.Random(0)
    datasets = ["helpful_base", "koala", "oasst", "selfinstruct", "vicuna"]
    annotations = [
        {
            "dataset": datasets[place % 5],
            "instruction": f"Question {place}?",
            "output_1": "x" * rng.randrange(50, 500),
            "generator_1": "theirs",
            "output_2": "y" * rng.randrange(50, 900),
            "generator_2": "ours",
            "annotator": "gpt",
            "preference": rng.choice([1.0, 2.0, 2.0]),
        }
        for place in range(805)
    ]
    rows = [
        {
            "model": model,
            "index": place,
            "preference": rng.random(),
            "std_delta_len": rng.gauss(0, 1),
            "instruction_difficulty": rng.gauss(0, 1),
            "not_gamed_baseline": False,
        }
        for model in ("concise", "verbose")
        for place in range(805)
    ]
    (tmp_path / "df_gamed.csv").write_text(
        "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])
    )
    asked = []
    monkeypatch.setattr(
        "alpaca_eval.metrics.glm_winrate.hf_hub_download",
        lambda **what: asked.append(what["filename"]) or tmp_path / "df_gamed.csv",
    )
    found, note = alpaca_eval_win_rate(annotations)
    assert note is None
    assert asked == ["df_gamed.csv"]
    assert 0.5 < found["value"] < 0.8
    assert 0 <= found["standard_error"] < 0.1
    assert alpaca_eval_win_rate(annotations[:100]) == (None, None)
    monkeypatch.setattr("alpaca_eval.metrics.glm_winrate.hf_hub_download", None)
    found, note = alpaca_eval_win_rate(annotations)
    assert found is None
    assert note.startswith("alpaca-eval could not compute its own length-controlled win rate: TypeError")
