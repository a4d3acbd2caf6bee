"""Which of a prompt's responses make pairs, which prompts do not, and what length has to do with it."""

from __future__ import annotations

import json
import random
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simpo.cli import app
from simpo.data.columns import RowError
from simpo.onpolicy.pair import choose_pairs, is_held_out, length_slope, read_answers, run_pair
from simpo.recipe import load_recipe
from simpo.recipe.stages import Pair as PairKeys


def response(text: str, score: Any, *, finished: bool = True, tokens: int | None = None) -> dict[str, Any]:
    return {"text": text, "score": score, "num_tokens": tokens or len(text.split()), "finished": finished}


def row_of(*responses: dict[str, Any], row_id: str = "a") -> dict[str, Any]:
    return {"id": row_id, "prompt": [{"role": "user", "content": f"Ask {row_id}"}], "responses": list(responses)}


def pairs_of(row: dict[str, Any], **keys: Any) -> list[tuple[str, str]]:
    found = choose_pairs(row, read_answers(row), PairKeys(**keys), seed=1)
    return [(each.chosen.text, each.rejected.text) for each in found]


def reason_of(row: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(RowError) as caught:
        pairs_of(row, **keys)
    return caught.value.reason


SIX = row_of(*(response(f"answer {score}", score) for score in (1.0, 5.0, 2.0, 9.0, 3.0, 4.0)))


def test_best_against_worst():
    assert pairs_of(SIX) == [("answer 9.0", "answer 1.0")]


def test_rejected_is_nearest_to_the_mean_less_two_deviations():
    rng = random.Random(4)
    scores = [rng.gauss(0, 1) for _ in range(64)]
    row = row_of(*(response(f"answer {score}", score) for score in scores))
    target = statistics.fmean(scores) - 2 * statistics.pstdev(scores)
    nearest = min(scores, key=lambda score: abs(score - target))
    assert min(scores) < nearest < 0  # with so many samples the worst is further out
    assert pairs_of(row, method="best_sigma") == [(f"answer {max(scores)}", f"answer {nearest}")]
    assert pairs_of(row, method="best_sigma", sigmas=9.0) == pairs_of(row)


def test_the_deviation_is_that_of_the_scores_and_no_estimate():
    """Of 10, 4 and 0 the mean less 0.6 deviations is 2.2, nearer to 4; with n - 1 it would be 1.6, nearer to 0."""
    row = row_of(*(response(f"answer {score}", score) for score in (10, 4, 0)))
    assert pairs_of(row, method="best_sigma", sigmas=0.6) == [("answer 10", "answer 4")]


def test_equal_scores_prefer_no_length():
    rows = [row_of(response("a b c d e f", 2), response("g", 2), response("h i", 0), row_id=f"{n}") for n in range(200)]
    longer = sum(pairs_of(row)[0][0] == "a b c d e f" for row in rows)
    assert 70 < longer < 130


def test_best_against_random_is_drawn_by_prompt_and_not_by_order():
    drawn = {pairs_of({**SIX, "id": f"{i}"}, method="best_random")[0] for i in range(60)}
    assert {chosen for chosen, _ in drawn} == {"answer 9.0"}
    assert len(drawn) == 5
    turned = {**SIX, "responses": SIX["responses"][::-1]}
    assert pairs_of(turned, method="best_random") == pairs_of(SIX, method="best_random")
    assert pairs_of(SIX, method="best_random", min_gap=8.0) == [("answer 9.0", "answer 1.0")]


def test_every_two_over_a_gap_largest_first():
    found = pairs_of(SIX, method="all", min_gap=4.0)
    gaps = [float(chosen.split()[1]) - float(rejected.split()[1]) for chosen, rejected in found]
    assert gaps == sorted(gaps, reverse=True)
    assert len(found) == len(set(found)) == 6  # 9 against 1, 2, 3, 4, 5; 5 against 1
    assert min(gaps) == 4.0


def test_top_k_against_bottom_k_never_share_a_response():
    found = pairs_of(SIX, method="top_bottom", top_k=2)
    assert set(found) == {(f"answer {a}", f"answer {b}") for a in (9.0, 5.0) for b in (1.0, 2.0)}
    assert len(pairs_of(SIX, method="top_bottom", top_k=5)) == 9  # three against three


@pytest.mark.parametrize(
    ("responses", "keys", "reason"),
    [
        ([], {}, "one answer"),
        ([response("a", 1.0)], {}, "one answer"),
        ([response("a", 1.0), response(" ", 0.0)], {}, "one answer"),
        ([response("a", 1.0), response(" a\n", 0.0)], {}, "one answer"),
        ([response("a", 1.0), response("b", 1.0)], {}, "tie"),
        ([response("a", 1.0), response("b", 1.5)], {"min_gap": 0.6}, "min_gap"),
        ([response("a", 1.0), response("b", 1.5)], {"min_score": 2.0}, "min_score"),
        ([response("a", 1.0, finished=False), response("b", 2.0, finished=False)], {}, "unfinished"),
        ([response("a", 1.0), response("b", 2.0, finished=False)], {}, "unfinished"),
        ([response("a", None), response("b", float("nan"))], {}, "no score"),
        (["text"], {}, "malformed"),
    ],
)
def test_a_prompt_without_a_pair_has_a_reason(responses, keys, reason):
    assert reason_of(row_of(*responses), **keys) == reason


def test_limits_on_chosen_leave_the_next_best():
    row = row_of(response("long", 9.0, finished=False), response("good", 5.0), response("bad", 1.0, finished=False))
    assert pairs_of(row) == [("good", "bad")]
    assert pairs_of(row, finished_only=False) == [("long", "bad")]


def test_equal_texts_count_once_with_their_best_score():
    left_out: Counter[str] = Counter()
    row = row_of(response("a", 1.0), response("b", 2.0), response("a ", 3.0), response("", 4.0), response("c", True))
    assert [(each.text, each.score) for each in read_answers(row, left_out)] == [("a ", 3.0), ("b", 2.0)]
    assert left_out == {"equal text": 1, "empty": 1, "no score": 1}


# --- files ------------------------------------------------------------------------------------------------------------


def made_up_rows(count: int, *, slope: float = 0.0, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with five responses; each word adds `slope` to the score."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        lengths = [rng.randint(2, 40) for _ in range(5)]
        texts = [" ".join([f"w{number}", *(f"{rng.random():.6f}" for _ in range(n - 1))]) for n in lengths]
        scored = [response(text, slope * n + rng.gauss(0, 1)) for text, n in zip(texts, lengths, strict=True)]
        rows.append(row_of(*scored, row_id=f"{rng.getrandbits(64):016x}"))
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(tmp_path: Path, rows: list[dict[str, Any]], name: str = "pairs", **keys: Any) -> tuple[Path, dict[str, Any]]:
    recipe = load_recipe({"model_name_or_path": "none", "pair": keys})
    folder = run_pair(recipe, input=write(tmp_path / "scored.jsonl", rows), output=tmp_path / name)
    return folder, json.loads((tmp_path / f"{name}.json").read_text())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_is_accounted_for(tmp_path):
    rows = made_up_rows(40)
    rows[3]["responses"] = rows[3]["responses"][:1]
    for each in rows[4]["responses"]:
        each["score"] = 0.5
    for each in rows[5]["responses"]:
        each["finished"] = False
    rows[6]["responses"] = "none"
    folder, account = run(tmp_path, rows, min_gap=1.0, test_fraction=0.2)
    without = account["left_out"] | account["filtered"]
    assert {"one answer", "tie", "malformed"} == account["left_out"].keys()
    assert {"unfinished", "min_gap"} >= account["filtered"].keys() >= {"unfinished"}
    assert account["prompts"] == 40 == account["prompts_with_pairs"] + sum(each["count"] for each in without.values())
    assert without["tie"]["examples"][0]["row_id"] == rows[4]["id"]
    train, test = read(folder / "train.jsonl"), read(folder / "test.jsonl")
    assert (len(train), len(test)) == (account["pairs"]["train"], account["pairs"]["test"])
    assert all(is_held_out(row["id"], 0.2) for row in test)
    assert not any(is_held_out(row["id"], 0.2) for row in train)


def test_the_order_of_prompts_and_responses_changes_no_byte(tmp_path):
    rows = made_up_rows(60)
    turned = [{**row, "responses": row["responses"][::-1]} for row in reversed(rows)]
    for control in ("none", "balance", "drop"):
        keys = {"method": "all", "max_pairs": 3, "length_control": control, "lists": True}
        (tmp_path / control).mkdir()
        first, _ = run(tmp_path / control, rows, "one", **keys)
        lists = {name: (tmp_path / control / "lists" / name).read_bytes() for name in ("train.jsonl", "test.jsonl")}
        second, _ = run(tmp_path / control, turned, "two", **keys)
        for name in ("train.jsonl", "test.jsonl"):
            assert (first / name).read_bytes() == (second / name).read_bytes()
            assert (tmp_path / control / "lists" / name).read_bytes() == lists[name]


def test_a_larger_share_keeps_what_was_held_out():
    ids = [f"{number:016x}" for number in range(4000)]
    small, large = ({i for i in ids if is_held_out(i, share)} for share in (0.05, 0.2))
    assert small < large
    assert len(small) == pytest.approx(200, abs=60)
    assert not any(is_held_out(i, 0.0) for i in ids)


def test_the_slope_is_that_of_least_squares_within_prompts():
    prompts = [[(1.0, 10.0), (3.0, 14.0)], [(2.0, -7.0), (5.0, -1.0), (8.0, 5.0)]]  # 2 a unit, means far apart
    assert length_slope(prompts) == pytest.approx(2.0)
    assert length_slope([[(3.0, 1.0), (3.0, 2.0)]]) == 0


def test_balance_leaves_length_alone_right_half_the_time(tmp_path):
    _, account = run(tmp_path, made_up_rows(200, slope=0.1), length_control="balance", test_fraction=0.0)
    before, after = account["length"]["before"], account["length"]["after"]
    assert before["length_only_accuracy"] > 0.8
    assert after["length_only_accuracy"] == 0.5
    assert abs(after["spearman"]) < abs(before["spearman"])
    assert account["filtered"]["length_control"]["count"] == before["pairs"] - after["pairs"]


def test_balance_holds_for_training_and_for_held_out_pairs(tmp_path):
    folder, _ = run(tmp_path, made_up_rows(200, slope=0.1), length_control="balance", test_fraction=0.3)
    for name in ("train.jsonl", "test.jsonl"):
        sides = [
            [len(row[side][0]["content"].split()) for side in ("chosen", "rejected")] for row in read(folder / name)
        ]
        assert sum(chosen > rejected for chosen, rejected in sides) == sum(
            chosen < rejected for chosen, rejected in sides
        )


def test_drop_leaves_out_what_length_explains(tmp_path):
    rows = made_up_rows(200, slope=0.1)
    folder, account = run(tmp_path, rows, length_control="drop", method="all", test_fraction=0.0)
    slope = account["length"]["score_per_unit"]
    assert slope == pytest.approx(0.1, abs=0.02)
    assert account["length"]["unit"] == "tokens"
    pairs = read(folder / "train.jsonl")
    for row in pairs:
        words = [len(row[side][0]["content"].split()) for side in ("chosen", "rejected")]
        assert row["score_chosen"] - row["score_rejected"] > slope * (words[0] - words[1])
    assert len(pairs) == account["length"]["after"]["pairs"] < account["length"]["before"]["pairs"]


def test_pairs_and_lists_are_read_by_the_trainers_data(tmp_path, data_recipe, build_tokenizer):
    from simpo.data.prepare import prepare_pairs

    folder, account = run(tmp_path, made_up_rows(60), test_fraction=0.2, lists=True)
    for place in (folder, tmp_path / "lists"):
        prepared = prepare_pairs(data_recipe(place), build_tokenizer("chatml"), progress=False)
        assert len(prepared.train) == account["pairs"]["train"]
        assert len(prepared.eval) == account["pairs"]["test"]


def test_a_list_begins_with_the_best_that_may_be_chosen(tmp_path):
    """The best of a list is what losses of lists and of pairs teach first."""
    rows = [
        row_of(
            response("cut off in the", 0.9, finished=False), response("whole", 0.5), response("bad", 0.1), row_id=name
        )
        for name in "ab"
    ]
    folder, account = run(tmp_path, rows, test_fraction=0.0, lists=True)
    assert {row["chosen"][0]["content"] for row in read(folder / "train.jsonl")} == {"whole"}
    assert [row["responses"] for row in read(tmp_path / "lists" / "train.jsonl")] == [["whole", "bad"]] * 2
    assert account["responses"]["above the best that may be chosen (of lists)"] == 2


def command(*words: str) -> Any:
    return CliRunner().invoke(app, ["pair", *words])


def test_the_command_says_what_was_left_out_and_exits_with_3(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model_name_or_path: none\noutput_dir: {tmp_path}\n")
    rows = made_up_rows(30)
    write(tmp_path / "scored.jsonl", rows)
    done = command(str(recipe), "--method", "best_sigma")
    assert done.exit_code == 0, done.output
    assert "30 to train" in done.output or "held out" in done.output
    rows[0]["responses"] = rows[0]["responses"][:1]
    write(tmp_path / "scored.jsonl", rows)
    done = command(str(recipe))
    assert done.exit_code == 3
    assert rows[0]["id"] in done.output


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row_of(response("a", None), response("b", None))], "run `simpo score` on it first"),
        ([row_of(response("a", 1.0), response("b", 1.0))], "none of 1 prompts gives a pair (1 tie (a: all"),
        ([SIX, SIX], "a is there twice"),
        ([], "holds no rows"),
    ],
)
def test_input_that_gives_no_pair_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tmp_path, rows)
    assert not (tmp_path / "pairs").exists()


def test_a_row_whose_text_is_not_unicode_is_counted_and_the_rest_is_paired(tmp_path: Path):
    rows = [row_of(response("half \ud800", 1), response("b", 2), row_id="x"), SIX]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe({"model_name_or_path": "any", "pair": {"test_fraction": 0.0}})
    folder = run_pair(recipe, input=tmp_path / "scored.jsonl", output=tmp_path / "pairs")
    assert len((folder / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert json.loads((tmp_path / "pairs.json").read_text())["left_out"]["malformed"]["count"] == 1
