"""Fifty hostile values for every recipe key, ten thousand hostile rows: understood, refused in a line, or counted."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from chaos.harness import Table

from simpo.data.prepare import prepare_pairs
from simpo.recipe import KEYS, STAGE_KEYS, Recipe, load_recipe
from simpo.recipe.yaml import parse_yaml

pytestmark = pytest.mark.long

IS_SAMPLE = not os.environ.get("SIMPO_CHAOS")
VALUES = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, -(10**400), 0.0, -0.0, 0.5, 5e-324, 1e308),
    *(math.inf, -math.inf, math.nan, "", " ", "\0", "\n", "null", "no", "1e-6", "1_000", "0x10", "-1", "nan", "auto"),
    *("../../etc/passwd", "/", "~", "a" * 10_000, "😀", "\ud800", "{{ 7 * 7 }}", "${HOME}", "a: b", "[1, 2]"),
    *([], [[]], [None], [1, "a", None], {}, {"": None}, {1: {2: 3}}, {"a": [None]}, b"bytes", object()),
]


def test_every_key_takes_any_value_or_refuses_it_in_a_line() -> None:
    assert len(VALUES) == 50
    table, names = Table("hostile value of a key", "recipe"), [*KEYS, *STAGE_KEYS]
    for place, name in enumerate(names):
        stage, _, key = name.rpartition(".")
        for value in VALUES[place % 10 :: 10] if IS_SAMPLE else VALUES:
            given = {stage: {key: value}} if stage else {key: value}
            table.add(f"{name}: {value!r:.40}", fault_of_recipe({"model_name_or_path": "m", **given}, key))
    table.check()


def fault_of_recipe(content: dict[str, Any], key: str) -> str | None:
    try:
        recipe = load_recipe(content)
        is_same = load_recipe(parse_yaml(recipe.to_yaml(), where="saved")) == recipe
    except ValueError as error:
        message = str(error)
        if len(message.splitlines()) != 1 or len(message) > 3000:
            return f"refused in {len(message.splitlines())} lines of {len(message)} characters"
        return None if key in message else f"refused without the key's name: {message:.200}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"
    return None if isinstance(recipe, Recipe) and is_same else "what is saved reads back otherwise"


# --- rows ------------------------------------------------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "\0",
    "a",
    "é😀",
    "\u2028",
    "\r\n",
    '"',
    "\\",
    "<|im_end|>",
    "x" * 3000,
    "{{ 7 * 7 }}",
    "null",
    "‮",
    "1",
]
ODD = [
    None,
    True,
    0,
    -1.5,
    [],
    {},
    [[]],
    [None],
    {"role": "user"},
    [{"role": "user", "content": None}],
    "[{'role': 1}]",
]
COLUMNS = ["prompt", "chosen", "rejected", "score_chosen", "messages", "label", "response", "\0", ""]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "latin-1", "gzip"]
FILES = [(ending, encoding) for ending in ("jsonl", "json", "csv", "tsv") for encoding in ENCODINGS]
FILES += [("parquet", "utf-8"), ("saved", "utf-8")]
NUM_ROWS = 30 if IS_SAMPLE else math.ceil(10_000 / len(FILES))


def hostile_row(rng: random.Random) -> Any:
    def anything() -> Any:
        return rng.choice(ODD) if rng.random() < 0.3 else rng.choice(TEXTS) + rng.choice(TEXTS)

    row = {"prompt": "sound", "chosen": f"yes {rng.random()}", "rejected": "no"}
    for name in rng.sample(list(row), rng.randint(0, 3)):
        row[name] = anything()
    if rng.random() < 0.2:
        row.pop(rng.choice(list(row)))
    if rng.random() < 0.2:
        row[rng.choice(COLUMNS)] = anything()
    return anything() if rng.random() < 0.05 else row


def write_rows(folder: Path, ending: str, encoding: str, rows: list[Any]) -> Path:
    path = folder / f"rows.{ending}"
    if ending in ("parquet", "saved"):
        texts = [{n: as_cell(r.get(n)) if isinstance(r, dict) else None for n in COLUMNS[:3]} for r in rows]
        if ending == "saved":
            datasets.Dataset.from_list(texts).save_to_disk(path)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), path)
        return path
    if ending == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=encoding == "latin-1") + "\n" for row in rows)
    elif ending == "json":
        text = json.dumps(rows, ensure_ascii=False)
    else:
        with open(folder / "cells", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if ending == "tsv" else ",")
            writer.writerows([COLUMNS[:3], *([as_cell(row.get(n)) for n in COLUMNS[:3]] for row in rows)])
        text = (folder / "cells").read_bytes().decode()
    code = "utf-8" if encoding == "gzip" else encoding
    content = text.encode(code, errors="replace")
    path.write_bytes(gzip.compress(content) if encoding == "gzip" else content)
    return path


def as_cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\0", "0")


@pytest.mark.parametrize(("ending", "encoding"), FILES)
def test_every_row_is_trained_on_or_counted(ending: str, encoding: str, tmp_path, build_tokenizer, data_recipe) -> None:
    table, rng = Table("hostile rows", f"{ending} {encoding}"), random.Random(f"{ending} {encoding}")
    rows = [hostile_row(rng) for _ in range(NUM_ROWS)]
    if ending in ("csv", "tsv"):
        rows = [row if isinstance(row, dict) else {} for row in rows]
    rows += [{"prompt": "sound", "chosen": "yes", "rejected": "no"}]
    datasets.disable_progress_bars()
    path = write_rows(tmp_path, ending, encoding, rows)
    keys = {"max_dropped_fraction": 1.0, "validation_fraction": 0, "max_length": 400, "max_prompt_length": 200}
    try:
        account = prepare_pairs(data_recipe(path, **keys), build_tokenizer("chatml"), progress=False).ledger
    except ValueError as error:
        message = str(error)
        is_fine = len(message.splitlines()) == 1 or "train rows gives a pair" in message  # which counts the reasons
        table.add(message[:200], None if is_fine else f"refused in lines: {message}")
        table.outcomes[f"refused: {message.replace(str(tmp_path), '').splitlines()[0][:120]}"] = 1
        assert encoding in ("utf-16", "latin-1"), message
        table.check()
        return
    split = account.splits["train"]
    for number in range(len(rows)):
        table.add(str(number), None)
    if not split.input == split.kept + split.num_dropped == len(rows):
        table.add("ledger", f"{len(rows)} rows, {split.input} read, {split.kept} kept, {split.num_dropped} dropped")
    table.check()
