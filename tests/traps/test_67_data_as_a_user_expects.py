"""Trap 67: the last of two equal columns or keys wins, unsaid; a pipe "does not exist"; `[null]` and `{}` trace back; a
chat template may take all time and memory there is.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from simpo.cli import app
from simpo.data import limits, templates
from simpo.data.preferences import Pair
from simpo.data.prepare import prepare_pairs
from simpo.data.sources import find_sources, load_splits
from simpo.data.tokenize import PairTokenizer
from simpo.onpolicy.journal import read_rows
from simpo.recipe import KEYS, load_recipe

ROW = {"prompt": "question?", "chosen": "yes.", "rejected": "no."}


@pytest.fixture
def load(data_recipe: Callable[..., Any]) -> Callable[[Path], Any]:
    """A file or folder's splits."""

    def read(path: Path) -> Any:
        recipe = data_recipe(path)
        return load_splits(recipe, find_sources(recipe))

    return read


# --- what stands twice -----------------------------------------------------------------------------------------------


def test_a_column_that_stands_twice_is_an_error(load: Callable[[Path], Any], tmp_path: Path) -> None:
    said = r"several columns are called 'chosen'; rename or remove them"
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,chosen\nq,a,b,c\n")
    (tmp_path / "a.tsv").write_text("prompt\tchosen\trejected\tchosen\nq\ta\tb\tc\n")
    table = pa.Table.from_arrays([pa.array([each]) for each in "qabc"], ["prompt", "chosen", "rejected", "chosen"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.tsv", "a.parquet"):
        with pytest.raises(ValueError, match=rf"{name}: {said}"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("twice", "key"),
    [
        ('{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}', "chosen"),
        (
            '{"prompt": "q", "chosen": [{"role": "assistant", "content": "a", "content": "b"}], "rejected": "c"}',
            "content",
        ),
    ],
    ids=["row", "message"],
)
def test_a_row_with_a_key_that_stands_twice_is_dropped_by_name(
    data_recipe: Callable[..., Any], build_tokenizer: Any, tmp_path: Path, twice: str, key: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{twice}\n{json.dumps(ROW)}\n")
    recipe = data_recipe(tmp_path / "rows.jsonl", max_dropped_fraction=0.5, validation_fraction=0)
    account = prepare_pairs(recipe, build_tokenizer("chatml"), progress=False).ledger.splits["train"]
    assert account.kept == 1
    (dropped,) = account.dropped["malformed"]["examples"]
    assert f"line 1: cannot be read (ValueError: the key '{key}' stands twice in " in dropped["detail"]


def test_a_key_that_stands_twice_in_a_list_or_object_is_an_error(load: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(f'[{json.dumps(ROW)},\n {{"prompt": "q", "prompt": "r"}}]')
    (tmp_path / "object.json").write_text('{"train": [], "train": [{"prompt": "q"}]}')
    for name, key in (("list", "prompt"), ("object", "train")):
        with pytest.raises(ValueError, match=rf"{name}\.json: cannot be read .*the key '{key}' stands twice in"):
            load(tmp_path / f"{name}.json")


# --- what is no file -------------------------------------------------------------------------------------------------


def test_a_pipe_is_called_one(load: Callable[[Path], Any], data_recipe: Callable[..., Any], tmp_path: Path) -> None:
    said = "is a pipe or a device, from which rows come once; they are read several times, so save them to a file first"
    os.mkfifo(tmp_path / "rows.jsonl")
    for name in (str(tmp_path / "rows.jsonl"), "/dev/null"):
        with pytest.raises(ValueError, match=f"dataset_mixer: {name} {said}"):
            find_sources(data_recipe(name))
        with pytest.raises(ValueError, match=f"dataset_mixer: {name} {said}"):
            find_sources(data_recipe({"json": {"data_files": name}}))
    with pytest.raises(ValueError, match=r"rows\.jsonl: not a file; its rows are read several times"):
        list(read_rows(tmp_path / "rows.jsonl"))


def test_the_shells_own_pipes_are_called_so_too(data_recipe: Callable[..., Any]) -> None:
    """`<(zcat rows.jsonl.gz)` is /dev/fd/N."""
    reading, writing = os.pipe()
    with open(reading), open(writing, "w"), pytest.raises(ValueError, match="is a pipe or a device"):
        find_sources(data_recipe(f"/dev/fd/{reading}"))


def test_an_empty_dataset_dict_is_a_folder_without_rows(load: Callable[[Path], Any], tmp_path: Path) -> None:
    for content in ("{}", "[]", "null", '{"splits": null}', ""):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / "dataset_dict.json").write_text(content)
        with pytest.raises(ValueError, match="set holds no file with rows"):
            load(tmp_path / "set")


@pytest.mark.parametrize("value", [[None], [[]], {"a": [None]}, {"a": None}, {"a": {}}], ids=str)
def test_null_inside_lists_of_a_recipe_is_refused_or_read(value: Any) -> None:
    base = {"model_name_or_path": "none", "dataset_mixer": {"rows.jsonl": 1.0}}
    for key in KEYS:
        try:
            load_recipe({**base, key: value})
        except ValueError as error:
            assert key.partition(".")[0] in str(error) or "unknown" in str(error), key  # noqa: PT017


# --- templates -------------------------------------------------------------------------------------------------------

PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
HEADER = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
HOSTILE = {
    "endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "long text": "{{ 'a' * 10 ** 9 }}",
    "long number": "{% set x = 10 ** (10 ** 8) %}",
    "doubling": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "long output": "{{ 'a' * 17 * 10 ** 6 }}",
    "width": "{{ '%0999999999d' | format(1) }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "many calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}",
    "deep text": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.fixture
def little_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(limits, "SECONDS", 0.1)
    gc.disable()  # what a timer raises in hypothesis' callback of the collector is lost, and pytest says so
    yield
    gc.enable()


@pytest.mark.usefixtures("little_time")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_beyond_the_limits_is_an_error(build_tokenizer: Any, name: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match="chat_template: it cannot render a user turn and an answer") as caught:
        PairTokenizer(build_tokenizer("chatml"), max_length=64, chat_template=HOSTILE[name] + PLAIN + HEADER)
    assert time.process_time() - started < 5
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("little_time")
@pytest.mark.parametrize("name", ["endless loop", "doubling", "recursion", "repeated text", "long output"])
def test_a_row_that_brings_a_template_beyond_them_is_dropped_and_the_next_one_is_not(
    build_tokenizer: Any, name: str
) -> None:
    hostile = {
        "repeated text": "{{ messages[0].content * 10 ** 9 }}",
        "long output": "{{ messages[0].content * 5000000 }}",
    }
    on_demand = "{% if messages[0].content == 'boom' %}" + (HOSTILE | hostile)[name] + "{% endif %}"
    tokenizer = PairTokenizer(build_tokenizer("chatml"), max_length=64, chat_template=on_demand + PLAIN + HEADER)
    boom, plain = Pair("a/train#0", "boom", "yes.", "no."), Pair("a/train#1", "question?", "yes.", "no.")
    before = limits.resource.getrlimit(limits.resource.RLIMIT_DATA)
    refused, tokens = tokenizer([boom, plain])
    assert refused.reason == ("template" if name == "recursion" else "too much")
    assert tokens == PairTokenizer(build_tokenizer("chatml"), max_length=64, chat_template=PLAIN + HEADER)([plain])[0]
    assert limits.resource.getrlimit(limits.resource.RLIMIT_DATA) == before
    assert limits.signal.getitimer(limits.signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_what_is_held_already_does_not_count(build_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk's long texts, one after the other, are more than one row may take."""
    monkeypatch.setattr(limits, "MEMORY", 48 << 20)
    tokenizer = PairTokenizer(build_tokenizer("chatml"), max_length=64, chat_template=PLAIN + HEADER)
    monkeypatch.setattr(tokenizer, "encode", lambda rendered: [None] * len(rendered))
    monkeypatch.setattr(tokenizer, "_finish", lambda tokens: tokens)
    pairs = [Pair(f"a/train#{i}", f"{i} " * 1_000_000, "yes.", "no.") for i in range(12)]
    assert tokenizer(pairs) == [None] * 12


def test_ordinary_long_rows_are_within_them() -> None:
    assert limits.SECONDS >= 5
    assert limits.MEMORY > 8 * 4 * templates.MOST_CHARACTERS - 1


@pytest.mark.usefixtures("little_time")
def test_a_hostile_template_is_one_line_of_a_command(tmp_path: Path, tiny_model: Path) -> None:
    """jinja works out what is constant when it reads a template: also in a branch that is never taken."""
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n")
    recipe = {"model_name_or_path": str(tiny_model), "dataset_mixer": {str(tmp_path / "rows.jsonl"): 1.0}}
    path = tmp_path / "recipe.yaml"
    load_recipe({**recipe, "chat_template": HOSTILE["endless loop"], "cache_dir": str(tmp_path / "cache")}).save(path)
    result = CliRunner().invoke(app, ["audit", str(path)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "rendering it takes more than 0.1 s" in result.stderr
