"""Trap 55: folders written by `save_to_disk` are read as the one row of their state.json."""

from __future__ import annotations

import json

import datasets
import pytest

from simpo.data.files import read_file
from simpo.data.sources import find_sources, fingerprint_sources, load_splits


def rows(count, start=0):
    return [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(start, start + count)]


@pytest.fixture
def save():
    datasets.disable_progress_bars()
    yield lambda content, path: datasets.Dataset.from_list(content).save_to_disk(path)
    datasets.enable_progress_bars()


def read(recipe):
    splits = load_splits(recipe)
    return [row.row for row in splits.train], [row.row for row in splits.eval]


def test_a_folder_for_each_split(tmp_path, data_recipe, save):
    for name, content in (("train_prefs", rows(5)), ("test_prefs", rows(2, 50)), ("train_sft", rows(9))):
        save(content, tmp_path / "set" / name)
    recipe = data_recipe(tmp_path / "set", dataset_splits=["train_prefs", "test_prefs"])
    assert read(recipe) == (rows(5), rows(2, 50))
    assert load_splits(recipe).notes == [
        f"{tmp_path / 'set'}: not read, since dataset_splits does not name it: train_sft"
    ]
    (tmp_path / "set" / "train_prefs" / "cache-1.arrow").write_bytes(b"what datasets leaves there")
    before = fingerprint_sources(find_sources(recipe))
    assert fingerprint_sources(find_sources(recipe)) == before
    save(rows(6), tmp_path / "set" / "train_prefs")
    assert fingerprint_sources(find_sources(recipe)) != before


def test_one_split_of_a_saved_dict_by_its_path_or_by_name(tmp_path, data_recipe, save):
    for name, content in (("english", rows(4)), ("german", rows(3, 9))):
        save(content, tmp_path / "both" / name)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["english", "german"]}')
    assert read(data_recipe(tmp_path / "both" / "german", validation_fraction=0)) == (rows(3, 9), [])
    assert read(data_recipe(tmp_path / "both", dataset_splits=["english", "german"])) == (rows(4), rows(3, 9))
    with pytest.raises(ValueError, match="no split 'train'; its splits: english, german"):
        load_splits(data_recipe(tmp_path / "both"))


def test_saved_shards_beside_files_and_behind_links(tmp_path, data_recipe, save):
    save(rows(3), tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "round").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(2, 9)))
    assert read(data_recipe(tmp_path / "set", validation_fraction=0)) == ([*rows(2, 9), *rows(3)], [])


def test_damaged_folder_is_named(tmp_path, save):
    save(rows(3), tmp_path / "one")
    for file in (tmp_path / "one").glob("*.arrow"):
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"one: cannot be read as a saved dataset \("):
        list(read_file(tmp_path / "one"))
