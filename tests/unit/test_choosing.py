"""Which rows are taken: what is chosen by place and key, reading anew, is what lists of all rows gave.

The slow reference holds every row.
"""

from __future__ import annotations

import gzip
import json
import random
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simpo.data.columns import RowError, scored_answer
from simpo.data.preferences import pair_from_row
from simpo.data.sources import load_splits

# --- the reference ---------------------------------------------------------------------------------------------------


def read(path):
    """[(row id, row or why there is none)] of one file of JSON Lines."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    content = []
    for line in text.decode().splitlines():
        try:
            content.append(json.loads(line))
        except ValueError:
            content.append(None)
    return [(f"{path.parent.name}/{path.name.partition('.')[0]}#{place}", row) for place, row in enumerate(content)]


def group(rows):
    groups = {}
    for place, (_, row) in enumerate(rows):
        if found := scored_answer(row, None):
            groups.setdefault((found, row.get("prompt")), []).append(place)
    for ((answer, score), _), places in groups.items():
        row_id, first = rows[places[0]]
        lists = {
            name: [rows[place][1][column] for place in places]
            for name, column in (("responses", answer), ("scores", score))
        }
        rows[places[0]] = row_id, "alone" if len(places) == 1 else {**first, answer: None, **lists}
        for place in places[1:]:
            rows[place] = None
    return [row for row in rows if row is not None]


def prompt_of(row_id, row):
    try:
        return pair_from_row(row).key() if isinstance(row, dict) else row_id
    except RowError:
        return row_id


def sample(rows, count, rng):
    return [rows[place] for place in sorted(rng.sample(range(len(rows)), count))]


def choose(folders, recipe):
    """The rows to train and to evaluate on, from lists of all of them."""
    base, evaluation = [], []
    for folder in folders:
        files = {path.name.partition(".")[0]: path for path in folder.iterdir()}
        base.append(group(read(files["train"])))
        evaluation += group(read(files["test"])) if "test" in files else []
    if not evaluation and recipe.validation_fraction:
        sizes = Counter(prompt_of(*row) for rows in base for row in rows)
        order, held = list(sizes), set()
        random.Random(f"{recipe.seed} hold out").shuffle(order)
        for prompt in order[:-1]:
            if sum(sizes[each] for each in held) >= recipe.validation_fraction * sizes.total():
                break
            held.add(prompt)
        evaluation = [row for rows in base for row in rows if prompt_of(*row) in held]
        base = [[row for row in rows if prompt_of(*row) not in held] for rows in base]
    train = []
    for folder, rows in zip(folders, base):
        fraction = recipe.dataset_mixer[str(folder)]
        rest = sample(
            rows, round((fraction - int(fraction)) * len(rows)), random.Random(f"{recipe.seed} {folder.name}")
        )
        for number, some in enumerate([rows] * int(fraction) + [rest]):
            train += [(f"{row_id}~{number + 1}" if number else row_id, row) for row_id, row in some]
    chosen = []
    for rows, limit in ((train, recipe.max_train_samples), (evaluation, recipe.max_eval_samples)):
        is_cut = limit is not None and limit < len(rows)
        chosen.append(sample(rows, limit, random.Random(f"{recipe.seed} limit")) if is_cut else rows)
    return chosen


# --- the claims ------------------------------------------------------------------------------------------------------

PROMPTS = st.sampled_from(["a", "b", "c", "d"])
LINES = st.one_of(
    st.fixed_dictionaries({"prompt": PROMPTS, "chosen": st.sampled_from(["x", "y"]), "rejected": st.just("z")}),
    st.fixed_dictionaries({"prompt": PROMPTS, "response": st.text(max_size=3), "score": st.integers(0, 3)}),
    st.sampled_from([{"prompt": "a"}, {"other": 1}, "{broken", '"text"', "[]"]),
)
FILES = st.lists(LINES.map(lambda line: line if isinstance(line, str) else json.dumps(line)), min_size=1, max_size=12)
SOURCES = st.lists(
    st.tuples(FILES, st.none() | FILES, st.sampled_from([0.3, 0.5, 1.0, 1.4, 2.0, 2.7])), min_size=1, max_size=3
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    sources=SOURCES,
    keys=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 3),
            "validation_fraction": st.sampled_from([0.0, 0.1, 0.5]),
            "max_train_samples": st.none() | st.integers(1, 20),
            "max_eval_samples": st.none() | st.integers(1, 5),
        }
    ),
    gzipped=st.booleans(),
)
def test_rows_chosen_by_place_are_those_of_lists(sources, keys, gzipped, data_recipe):
    with tempfile.TemporaryDirectory() as below:
        folders = []
        for number, (train, test, _) in enumerate(sources):
            folder = Path(below, f"set{number}")
            folder.mkdir()
            folders.append(folder)
            for name, lines in (("train", train), ("test", test)):
                if lines is not None:
                    text = "\n".join(lines).encode()
                    Path(folder, f"{name}.jsonl" + ".gz" * gzipped).write_bytes(
                        gzip.compress(text) if gzipped else text
                    )
        recipe = data_recipe({str(folder): each[2] for folder, each in zip(folders, sources)}, **keys)
        splits = load_splits(recipe)
        for rows, expected in zip((splits.train, splits.eval), choose(folders, recipe)):
            assert len(rows) == len(expected)
            for _ in range(2):  # a second time the same
                assert [(row_id, plain(row)) for row_id, row in rows] == expected


def plain(row):
    """A row as the reference has it."""
    return {"one answer": "alone", "malformed": None}[row.reason] if isinstance(row, RowError) else row


def test_file_that_changes_while_it_is_read_is_an_error(tmp_path, data_recipe):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n' * 3)
    splits = load_splits(data_recipe(path, validation_fraction=0))
    path.write_text('{"prompt": "a"}\n' * 2)
    with pytest.raises(ValueError, match=r"a.jsonl' had 3 rows in its split 'train', and now has 2: it was changed"):
        list(splits.train)


def test_rows_are_read_and_not_held(tmp_path, data_recipe):
    """What is alive at once of 1,500 rows is what one chunk needs."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} " * 999, "chosen": "a", "rejected": "b"}) + "\n" for i in range(1500))
    )
    recipe = data_recipe({str(path): 1.5}, validation_fraction=0.1, preprocessing_num_workers=1)
    tracemalloc.start()
    try:
        assert sum(1 for _ in load_splits(recipe).train) == 2025
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 2
    finally:
        tracemalloc.stop()
