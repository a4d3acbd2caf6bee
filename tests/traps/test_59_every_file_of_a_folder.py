"""Trap 59: a folder's other files (part2.jsonl, train_en.jsonl, a linked train/, what is compressed) unread, unsaid."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from simpo.data.sources import find_sources, load_splits


def rows(*names: str) -> str:
    each = ({"prompt": f"{name}?", "chosen": "yes", "rejected": "no"} for name in names)
    return "".join(json.dumps(row) + "\n" for row in each)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@pytest.fixture
def load(data_recipe: Any, folder: Path):
    """What is read of the folder, as prompts, and the notes of the ledger."""

    def read(**keys: Any) -> tuple[list[str], list[str]]:
        recipe = data_recipe(folder, validation_fraction=0, **keys)
        splits = load_splits(recipe, find_sources(recipe))
        found = [row.row["prompt"].rstrip("?") for part in (splits.train, splits.eval) for row in part]
        return found, [note.removeprefix(f"{folder}: ") for note in splits.notes]

    return read


def test_each_file_is_read_or_named_with_its_reason(load: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "train.jsonl").write_text(rows("train"))
    (folder / "part2.jsonl").write_text(rows("part2"))
    (folder / "train_en.jsonl").write_text(rows("train_en"))
    (folder / "test.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\ntest?,yes,no\n"))
    (folder / "extra.jsonl.zst").write_bytes(b"...")
    (folder / "more.zip").write_bytes(b"PK")
    (folder / "notes.txt").write_text("by hand")
    (folder / ".train.jsonl").write_text(rows("hidden"))
    (folder / "_old").mkdir()
    (folder / "_old" / "train.jsonl").write_text(rows("old"))
    os.mkfifo(folder / "pipe.jsonl")
    for name in ("README.md", "LICENSE", ".gitattributes", "dataset_infos.json", "_SUCCESS"):
        (folder / name).write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").touch()
    found, notes = load()
    assert found == ["train", "test"]
    assert sorted(notes) == [
        "not read, a pipe or a device: pipe.jsonl",
        "not read, compressed in a way that is not read here (.gz is): unpack it: extra.jsonl.zst, more.zip",
        "not read, hidden: .train.jsonl, _old/train.jsonl",
        "not read, since dataset_splits does not name it: part2, train_en",
        "not read, unknown kind of file: notes.txt",
    ]


def test_parts_without_a_splits_name_are_read_together(load: Any, folder: Path) -> None:
    (folder / "part1.jsonl").write_text(rows("one"))
    (folder / "part2.tsv").write_text("prompt\tchosen\trejected\ntwo?\tyes\tno\n")
    (folder / "part3.jsonl.gz").write_bytes(gzip.compress(rows("three").encode()))
    assert load() == (["one", "two", "three"], [])


def test_linked_files_and_folders_are_read_once(load: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jsonl").write_text(rows("linked folder"))
    (tmp_path / "b.jsonl").write_text(rows("linked file"))
    (folder / "train").symlink_to(tmp_path / "elsewhere")
    (folder / "test.jsonl").symlink_to(tmp_path / "b.jsonl")
    (folder / "train-again").symlink_to(tmp_path / "elsewhere")
    (folder / "up").symlink_to(folder)
    found, notes = load()
    assert found == ["linked folder", "linked file"]
    assert notes == ["not read, a link to a folder that is read already: train-again, up"]


def test_a_link_to_nothing_is_an_error(load: Any, folder: Path) -> None:
    (folder / "train.jsonl").symlink_to(folder / "gone")
    with pytest.raises(ValueError, match=r"train\.jsonl: cannot be read \(FileNotFoundError"):
        load()


def test_a_folder_that_may_not_be_looked_into_is_an_error(load: Any, folder: Path, monkeypatch: Any) -> None:
    (folder / "train.jsonl").write_text(rows("train"))
    (folder / "more").mkdir()
    scan = os.scandir

    def deny(path: Any) -> Any:
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(PermissionError, match=r"Permission denied: .*more"):
        load()


def test_a_folder_of_files_that_are_not_read_says_why(load: Any, folder: Path) -> None:
    (folder / "train.jsonl.zst").write_bytes(b"...")
    with pytest.raises(ValueError, match=r"holds no file with rows .*; train\.jsonl\.zst: compressed in a way that"):
        load()


def test_only_unusual_names_ask_for_the_split(load: Any, folder: Path) -> None:
    (folder / "train_en.jsonl").write_text(rows("en"))
    (folder / "train_fr.jsonl").write_text(rows("fr"))
    with pytest.raises(ValueError, match=re.escape("has no split 'train'; its splits: train_en, train_fr")):
        load()
    assert load(dataset_splits=["train_en", "train_fr"])[0] == ["en", "fr"]


def test_a_new_file_that_is_not_read_is_in_the_next_ledger(load: Any, folder: Path, data_recipe: Any) -> None:
    (folder / "train.jsonl").write_text(rows("train"))
    recipe = data_recipe(folder)
    before = find_sources(recipe)[0].content()
    (folder / "README.md").write_text("about")
    assert find_sources(recipe)[0].content() == before
    (folder / "notes.txt").write_text("by hand")
    assert find_sources(recipe)[0].content() != before
