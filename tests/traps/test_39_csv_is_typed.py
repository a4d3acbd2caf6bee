"""Trap 39: CSV cells are text, so that equal scores are ties in JSONL and pairs in CSV."""

from __future__ import annotations

import csv
import json

import pytest
from row_outcomes import outcome

from simpo.data.columns import message_columns
from simpo.data.files import read_file


def say(text):
    return [{"role": "assistant", "content": text}]


TURNS = [{"role": "user", "content": 'He said "hm",\nthen?'}, *say("Nothing."), {"role": "user", "content": "Why?"}]
FILES = {
    "scores of both sides": [
        {"prompt": "a tree", "chosen": "An oak.", "rejected": "A stone.", "score_chosen": 5.0, "score_rejected": 5},
        {"prompt": "a bird", "chosen": "A robin.", "rejected": "A fish.", "score_chosen": 4.5, "score_rejected": 1.0},
        {"prompt": "a fish", "chosen": "A cod.", "rejected": "A cow.", "score_chosen": None, "score_rejected": None},
    ],
    "scored lists": [
        {"prompt": "q", "all_generated_responses": ["b", "a"], "all_rm_scores": [0.5, 2.0]},
        {"prompt": "q", "all_generated_responses": ["it's", 'a "b"'], "all_rm_scores": [1.0, 1.0]},
        {"prompt": "q", "all_generated_responses": None, "all_rm_scores": None},
    ],
    "messages": [{"prompt": TURNS, "chosen": say(text), "rejected": say("no")} for text in ("yes", "[1]", "no")],
    "dialogues": [{"chosen": [*TURNS, *say("it's so")], "rejected": [*TURNS, *say(text)]} for text in ("no", " ")],
    "columns that not each row has": [
        {"prompt": "q", "chosen": "yes", "rejected": "no", "messages": None},
        {"prompt": None, "chosen": "yes", "rejected": "no", "messages": TURNS},
        {"prompt": "q", "chosen": None, "rejected": "no", "messages": None},
    ],
    "answers that look like something else": [
        {"prompt": "[1, 2]", "chosen": text, "rejected": "5"}
        for text in ("[1, 2]", '{"role": "assistant", "content": "x"}', "5.0", "true", "null", "[{'role': 'user'}]")
    ],
}


def write(path, rows, as_text):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: as_text(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    return path


@pytest.mark.parametrize("rows", FILES.values(), ids=FILES.keys())
def test_same_rows_give_the_same_pairs_and_drops_in_every_format(rows, tmp_path):
    wanted = [outcome(row) for row in read_file(write(tmp_path / "a.jsonl", rows, json.dumps))]
    assert wanted == [outcome(row) for row in rows]
    for name, as_text in (("json.csv", json.dumps), ("pandas.csv", str), ("json.tsv", json.dumps)):
        assert [outcome(row) for row in read_file(write(tmp_path / name, rows, as_text))] == wanted, name


def test_one_answer_that_looks_like_messages_leaves_its_column_text(tmp_path):
    rows = [{"prompt": "q", "chosen": json.dumps(say("yes")), "rejected": "no"}]
    rows += [{"prompt": "q", "chosen": "plain", "rejected": json.dumps(say("no"))}]
    read = list(read_file(write(tmp_path / "a.csv", rows, json.dumps)))
    assert read == rows


def test_scores_are_numbers_however_a_table_holds_them():
    from decimal import Decimal

    import numpy as np

    for equal in (("4.0", 4), (np.float32(4), np.int64(4)), (Decimal("4.0"), "4")):
        row = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_rating": equal[0], "rejected_rating": equal[1]}
        assert outcome(row) == "tie"
    row["chosen_rating"] = "four"
    assert outcome(row) == ("q", "a", "b")


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,chosen\nq,a,b,c\n")
    with pytest.raises(ValueError, match=r"a\.csv: several columns are called 'chosen'; rename or remove them"):
        list(read_file(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ('[{"role": "user", "content": "a"}]', "[{'from': 'gpt', 'value': 'b'}]", ["chosen", "rejected"]),
        ('[{"role": "user", "content": "a"}]', "b", []),
        ('[{"role": "user", "content": "a"}]', '[{"content": "b"}]', []),
    ],
)
def test_columns_of_answers_are_messages_together_or_not_at_all(chosen, rejected, expected):
    assert message_columns([{"prompt": "q", "chosen": chosen, "rejected": rejected}]) == expected
