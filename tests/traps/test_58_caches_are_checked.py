"""Trap 58: a cache without a checksum: one flipped bit trains on other tokens, unsaid, or fails in every run."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from simpo.data import cache, files
from simpo.data.prepare import PreparedData, prepare_pairs
from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run import reference
from simpo.run.reference import ReferenceLogps
from simpo.trainer import Trainer

STORE = ("train.arrow", "eval.arrow", "ledger.json", "dropped.jsonl", "digests.json")


def flip(path: Path, place: float) -> None:
    """One bit of a file, in a new file: the old one may be mapped."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.unlink()
    path.write_bytes(content)


@pytest.fixture
def prepared(data_recipe: Any, build_tokenizer: Any, tmp_path: Path) -> Callable[[], PreparedData]:
    rows = [{"prompt": f"question {i}?", "chosen": f"yes {i}.", "rejected": "no."} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "lost"}\n')
    recipe, tokenizer = data_recipe(data, validation_fraction=0.2, max_dropped_fraction=0.5), build_tokenizer("chatml")
    return lambda: prepare_pairs(recipe, tokenizer, progress=False)


@pytest.fixture
def store(prepared: Callable[[], PreparedData], tmp_path: Path) -> Path:
    prepared()
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted(STORE)
    return folder


@pytest.mark.parametrize("name", STORE)
@pytest.mark.parametrize("place", [0.0, 0.4, 0.7, 0.99, None], ids=str)
def test_one_flipped_bit_in_prepared_data_is_found_said_and_rebuilt(
    prepared: Callable[[], PreparedData],
    store: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    place: float | None,
) -> None:
    whole = {path.name: path.read_bytes() for path in store.iterdir()}
    if place is None:
        (store / name).unlink()
    else:
        flip(store / name, place)
    capsys.readouterr()
    again = prepared()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"data cache {store} is broken (")
    assert said.endswith("building it again\n")
    assert {path.name: path.read_bytes() for path in store.iterdir()} == whole
    assert len(again.train) + len(again.eval) == 40
    prepared()
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.arrow", "ledger.json", "dropped.jsonl", "eval.arrow", "digests.json"])
def test_files_are_on_the_disk_before_they_have_their_name(
    prepared: Callable[[], PreparedData], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    done: list[str] = []
    sync, rename = files.os.fsync, cache.os.rename

    def noted_sync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def noted_rename(*names: Any) -> None:
        done.append("named")
        rename(*names)

    monkeypatch.setattr(files.os, "fsync", noted_sync)
    monkeypatch.setattr(cache.os, "rename", noted_rename)
    prepared()
    before, after = done[: done.index("named")], done[done.index("named") :]
    assert name in {Path(path).name for path in before}
    assert Path(before[-1]).parent.parent.name == "cache" or Path(before[-1]).parent.name == "cache"
    assert after[1].endswith("/cache")  # the new name


def test_a_store_with_right_digests_that_is_no_dataset_is_not_read(
    prepared: Callable[[], PreparedData], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offsets that point behind the values: Arrow reads whatever lies there."""
    table = pa.ipc.open_stream((store / "train.arrow").read_bytes()).read_all()
    at, column = table.schema.get_field_index("chosen_ids"), table["chosen_ids"].combine_chunks()
    places = column.offsets.to_numpy().copy()
    places[5] = 2**30
    buffers = [None, pa.array(places, pa.int32()).buffers()[1]]
    wrong = pa.ListArray.from_buffers(column.type, len(column), buffers, children=[column.values])
    (store / "train.arrow").unlink()
    with pa.OSFile(str(store / "train.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.set_column(at, table.field(at), wrong))
    digests = json.loads((store / "digests.json").read_text())
    digests["train.arrow"] = files.digest_file(store / "train.arrow")
    (store / "digests.json").write_text(json.dumps(digests))
    capsys.readouterr()
    prepared()
    assert "is broken" in capsys.readouterr().err


@pytest.mark.parametrize("name", STORE[:3])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
def test_a_store_that_the_system_does_not_let_be_read_is_left_alone(
    prepared: Callable[[], PreparedData], store: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Other runs have it mapped."""
    files_before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in store.iterdir()}

    def refused(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path) == store / name:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **kwargs)

    opened = open
    monkeypatch.setattr(files, "open", refused, raising=False)
    expected = f"cache_dir: {store} cannot be read ({store / name}: {os.strerror(number)}), and is left as it is; "
    with pytest.raises(ValueError, match=re.escape(expected)):
        prepared()
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in store.iterdir()} == files_before


def test_a_broken_store_stays_for_those_that_have_it_mapped_until_it_is_a_day_old(
    prepared: Callable[[], PreparedData], store: Path
) -> None:
    for path in store.iterdir():  # long written
        os.utime(path, (0, 0))
    flip(store / "train.arrow", 0.4)
    mapped = (store / "train.arrow").stat().st_ino
    prepared()
    (aside,) = (path for path in store.parent.iterdir() if path != store)
    assert (aside / "train.arrow").stat().st_ino == mapped
    cache._clear_leftovers(store.parent)
    assert aside.exists()
    for path in (*aside.iterdir(), aside):
        os.utime(path, (0, 0))
    cache._clear_leftovers(store.parent)
    assert not aside.exists()


# --- log-probs of the reference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_one_flipped_bit_in_cached_log_probs_is_found_said_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: float
) -> None:
    logps = ReferenceLogps(np.arange(8, dtype=np.float32).reshape(4, 2))
    path = tmp_path / "a.logps"
    reference._write(path, logps)
    assert np.array_equal(reference._read(path, 4).sums, logps.sums)
    assert not capsys.readouterr().err
    flip(path, place)
    assert reference._read(path, 4) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{path} are broken (it is not as it was written)" in said
    assert not path.exists()
    assert reference._read(path, 4) is None
    assert not capsys.readouterr().err


def test_a_run_computes_broken_log_probs_again(tiny_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe({**tiny_recipe, "loss_type": "dpo"})
    first = Trainer(recipe, display=Display(quiet=True)).reference
    (*_, file) = entries = sorted(Path(tiny_recipe["cache_dir"], "reference").iterdir())
    whole = file.read_bytes()
    flip(file, 0.8)
    capsys.readouterr()
    again = Trainer(recipe, display=Display(quiet=True)).reference
    assert "are broken" in capsys.readouterr().err
    assert all(np.array_equal(again[name].sums, first[name].sums) for name in first)
    assert file.read_bytes() == whole
    assert len(entries) == 2


def test_cached_log_probs_are_known_by_data_split_precision_and_weights(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_recipe["model_name_or_path"], tmp_path / "model"))

    def at(data: str = "a", split: str = "train", **keys: Any) -> Path:
        return reference._cache_path(load_recipe({**tiny_recipe, "loss_type": "dpo", **keys}), str(model), data, split)

    found = [at(), at("b"), at(split="eval"), at(bf16=True), at(master_dtype="bfloat16")]
    os.utime(model / "model.safetensors", (0, 0))
    assert len({*found, at()}) == 6
