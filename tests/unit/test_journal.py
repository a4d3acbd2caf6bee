"""Journals: rows that are written once, whatever interrupts the command that writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpo.data.columns import RowError
from simpo.onpolicy.journal import Journal, read_about, read_rows


def ids(path: Path) -> list[str]:
    return [row["id"] for row in read_rows(path)]


def test_a_torn_line_goes_and_the_rest_stays(tmp_path: Path):
    path = tmp_path / "run" / "rows.jsonl"
    with Journal(path, {"seed": 1}) as journal:
        for row_id in ("a", "b"):
            journal.add({"id": row_id, "text": "line\u2028separator"})
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path, {"seed": 1}) as journal:
            for row_id in ("a", "b"):
                if row_id not in journal:
                    journal.add({"id": row_id, "text": "line\u2028separator"})
        assert path.read_bytes() == whole


def test_rows_are_brought_into_the_order_of_their_inputs(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    with Journal(path, {}) as journal:
        for row_id in ("c", "a"):
            journal.add({"id": row_id})
        journal.leave_out("b", RowError("refused", "as planned"))
        journal.finish(["a", "b", "c"], {"tokens": 3})
    assert ids(path) == ["a", "c"]
    about = read_about(path)
    assert about["left_out"] == {"refused": {"count": 1, "examples": [{"row_id": "b", "detail": "as planned"}]}}
    assert (about["complete"], about["rows"], about["tokens"]) == (True, 2, 3)
    with Journal(path, {}) as journal:
        journal.add({"id": "b"})  # tried again, with success
        assert read_about(path)["complete"] is False
        journal.finish(["a", "b", "c"], {})
    assert ids(path) == ["a", "b", "c"]
    assert read_about(path)["left_out"] == {}


def test_what_cannot_go_on_is_said(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    with Journal(path, {"generate": {"temperature": 0.7, "seed": 1}}) as journal:
        journal.add({"id": "a"})
        journal.add({"id": "b"})
        with pytest.raises(ValueError, match="holds 1 rows, such as b, that the input no longer has"):
            journal.finish(["a"], {})
    with pytest.raises(ValueError, match="not complete yet"):
        next(read_rows(path))
    with (
        pytest.raises(ValueError, match=r"other settings \(generate\.temperature was 0\.7 and is 0\.9\)"),
        Journal(path, {"generate": {"temperature": 0.9, "seed": 1}}),
    ):
        pass
    path.write_bytes(b'{"id": "a"}\n{"id": \n{"id": "b"}\n')
    with (
        pytest.raises(ValueError, match="line 2 is damaged"),
        Journal(path, {"generate": {"temperature": 0.7, "seed": 1}}),
    ):
        pass
    about = path.with_suffix(".json")
    about.write_text(json.dumps({**read_about(path), "format": 9}))
    with (
        pytest.raises(ValueError, match="reads up to format 1"),
        Journal(path, {"generate": {"temperature": 0.7, "seed": 1}}),
    ):
        pass
    about.unlink()
    with (
        pytest.raises(ValueError, match=r"is there already, without rows\.json"),
        Journal(path, {"generate": {"temperature": 0.7, "seed": 1}}),
    ):
        pass
    with pytest.raises(ValueError, match=r"a name that ends with \.jsonl"):
        Journal(tmp_path / "rows.json", {})


def test_text_that_is_not_unicode_is_refused_and_the_file_goes_on(tmp_path: Path):
    with Journal(tmp_path / "rows.jsonl", {}) as journal:
        with pytest.raises(RowError, match="not valid Unicode"):
            journal.add({"id": "a", "text": "half \ud800"})
        journal.add({"id": "b", "text": "\u2028 \x00 \U0001f600"})
        journal.finish(["a", "b"], {})
    assert [row["text"] for row in journal.rows()] == ["\u2028 \x00 \U0001f600"]


def test_a_missing_input_says_where_it_comes_from(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file; the step before writes it"):
        ids(tmp_path / "scored.jsonl")


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "rows.jsonl"
    with Journal(path, {}) as journal:
        journal.add({"id": "a"})

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.write", full)
            with pytest.raises(OSError, match=r"rows\.jsonl: .*the disk is full.*1 rows"):
                journal.add({"id": "b"})
    with Journal(path, {}) as journal:
        assert list(journal.done) == ["a"]
