"""Prompts of `simpo generate`: from rows with or without answers, each once, known by what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpo.data.preferences import with_empty_system
from simpo.data.sources import load_splits
from simpo.onpolicy.prompts import read_prompts
from simpo.recipe import load_recipe

ASKED = [{"role": "user", "content": "Why?"}]
DIALOGUE = [*ASKED, {"role": "assistant", "content": "So."}]
SHAPES: list[dict[str, Any]] = [
    {"prompt": "Why?"},
    {"prompt": ASKED},
    {"messages": DIALOGUE},
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {"chosen": DIALOGUE, "rejected": [*ASKED, {"role": "assistant", "content": "No."}]},
    {"instruction": "Why?", "output": "So."},
    {"question": "Why?", "response": "So.", "score": 3},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
]


def write(folder: Path, rows: list[Any]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, **generate: Any):
    return read_prompts(load_recipe({"model_name_or_path": "any", "generate": {"prompts": {str(path): 1}, **generate}}))


@pytest.mark.parametrize("row", SHAPES, ids=lambda row: "+".join(row))
def test_every_shape_gives_the_same_prompt(row: dict[str, Any], tmp_path: Path):
    found = read(write(tmp_path, [row]))
    assert [(prompt.turns, prompt.id) for prompt in found.prompts] == [(ASKED, "069159bd0a77eac7")]


def test_rows_are_accounted_for_and_columns_go_along(tmp_path: Path):
    rows = [
        {"prompt": "2+2?", "answer": "4"},
        {"prompt": " "},
        {"prompt": "2+2?"},
        {"text": "x"},
        "x",
        {"prompt": "3?"},
    ]
    found = read(write(tmp_path, rows), keep_columns=["answer"])
    assert [(prompt.row_id, prompt.columns) for prompt in found.prompts] == [
        ("prompts.jsonl/train#0", {"answer": "4"}),
        ("prompts.jsonl/train#5", {}),
    ]
    assert (found.rows, found.repeated) == (6, 1)
    assert {reason: entry["count"] for reason, entry in found.left_out.items()} == {
        "empty": 1,
        "missing column": 1,
        "malformed": 1,
    }


def test_a_kept_column_is_that_of_the_first_row_that_has_it(tmp_path: Path):
    rows = [{"prompt": "x", "answer": None}, {"prompt": "x", "answer": "2"}, {"prompt": "x", "answer": "3"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "x", "answer": NaN}\n')
    found = read(path, keep_columns=["answer"])
    assert [prompt.columns for prompt in found.prompts] == [{"answer": "2"}]
    assert "1 rows repeat a prompt with other values" in found.notes[-1]


def test_a_limit_is_a_seeded_choice_in_order(tmp_path: Path):
    path = write(tmp_path, [{"prompt": f"{number}?"} for number in range(50)])
    places = [int(prompt.row_id.rpartition("#")[2]) for prompt in read(path, max_prompts=10).prompts]
    assert places == sorted(places) != list(range(10))
    assert len(places) == 10


def test_what_gives_no_prompt_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none of 1 rows has a prompt \(1 missing column: no prompt column"):
        read(write(tmp_path, [{"text": "x"}]))
    with pytest.raises(ValueError, match="no row has a column 'answer'"):
        read(write(tmp_path, [{"prompt": "x"}]), keep_columns="answer")
    with pytest.raises(ValueError, match="no prompts; name a dataset"):
        read_prompts(load_recipe({"model_name_or_path": "any"}))


def test_an_empty_system_turn_is_rendered_and_names_no_other_prompt(tmp_path: Path):
    """An id is of what is asked: files of answers and runs that were begun go by it."""
    recipe = {"model_name_or_path": "any", "generate": {"prompts": {str(write(tmp_path, SHAPES[:1])): 1}}}
    found = read_prompts(load_recipe({**recipe, "auto_insert_empty_system_msg": True}))
    assert [(prompt.turns, prompt.id) for prompt in found.prompts] == [(ASKED, "069159bd0a77eac7")]


def test_the_held_out_prompts_are_those_of_training_where_a_row_has_one_answer(tmp_path: Path):
    rows = [{"prompt": f"{n}?", "response": f"{n}.{k}", "score": k} for n in range(60) for k in range(2 + n % 2)]
    path = write(tmp_path, [*rows, {"prompt": "alone?", "response": "Yes.", "score": 1}])
    recipe = load_recipe({"model_name_or_path": "any", "dataset_mixer": {str(path): 1}, "validation_fraction": 0.2})
    trained = {row["prompt"] for _, row in load_splits(recipe).train if isinstance(row, dict)}
    asked = {prompt.turns[0]["content"] for prompt in read_prompts(recipe, held_out=True).prompts}
    assert len(asked) >= 11
    assert not asked & trained


def test_an_empty_system_turn_is_put_before_a_prompt_without_one():
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "Why?"}]
    assert with_empty_system("Why?") == with_empty_system(turns[1:]) == with_empty_system(turns) == turns
