"""Owns the reading of one local file of rows: JSON Lines, JSON, CSV, TSV, Parquet, gzipped or not; saved datasets.

Returns plain rows; a line that cannot be read among others becomes a `RowError` for the ledger to count. A file that
cannot be read at all raises ValueError with its name.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simpo.data.columns import RowError, type_cells
from simpo.errors import one_line

FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")


def file_format(path: Path) -> str | None:
    """The format a file name stands for, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def read_file(path: Path, otherwise: str | None = None) -> list[Any]:
    """The rows of one file, or of one saved dataset: mappings, or a `RowError` for each line that cannot be read.

    Args:
        otherwise: the format where the name does not say it.
    Raises:
        ValueError: the file as a whole cannot be read, or has no rows.
    """
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    rows = _read_saved(path) if path.is_dir() else list(readers[file_format(path) or otherwise or ""](path))
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return rows


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from error
    return data.removeprefix(b"\xef\xbb\xbf")


def _read_jsonl(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_bytes(path).split(b"\n"), start=1):
        if line.strip():
            yield _json_line(line, f"{path.name} line {number}")


def _json_line(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return RowError("malformed", f"{where}: not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return RowError("malformed", f"{where}: cannot be read ({one_line(error)})")


def load_json(path: Path) -> Any:
    """The parsed file, or a list of its lines' rows when it is JSON Lines under another name."""
    data = _bytes(path)
    if not data.strip():
        raise ValueError(f"{path}: the file has no rows")
    try:
        return json.loads(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        first = data.strip().split(b"\n", 1)[0]
        if error.msg == "Extra data" and not isinstance(_json_line(first, ""), RowError):
            return list(_read_jsonl(path))
        raise ValueError(f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from error


def _read_json(path: Path) -> list[Any]:
    return json_rows(load_json(path), path)


def json_rows(content: Any, path: Path) -> list[Any]:
    """The rows of a parsed list, {"data": rows}, {column: values}, or one row."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a list of rows, found {type(content).__name__}")
    values = list(content.values())
    if len(values) == 1 and isinstance(values[0], list) and all(isinstance(row, dict) for row in values[0]):
        return values[0]
    if values and all(isinstance(v, list) for v in values) and len({len(v) for v in values}) == 1:
        return [dict(zip(content, row)) for row in zip(*values)]
    return [content]


def _read_csv(path: Path) -> list[Any]:
    try:
        text = _bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    before = csv.field_size_limit(sys.maxsize)
    try:
        ended = io.StringIO(f"{text}\n{_END}", newline="")
        rows = _rows_of_cells(csv.reader(ended, delimiter="\t" if file_format(path) == ".tsv" else ","), path)
    finally:
        csv.field_size_limit(before)
    type_cells([row for row in rows if not isinstance(row, RowError)])
    return rows


_END = "\x1e end of the file"
"""A line behind the last: what reads it as part of a cell has met a quote that is never closed."""


def _rows_of_cells(reader: Any, path: Path) -> list[Any]:
    header, rows = next(reader), []
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise ValueError(f"{path}: several columns are called {', '.join(map(repr, twice))}; rename or remove them")
    begins = reader.line_num + 1
    for cells in reader:
        if cells == [_END]:
            return rows
        if len(cells) > len(header):
            where = f"{path.name} line {reader.line_num}"
            rows.append(RowError("malformed", f"{where}: more cells than the header has columns"))
        elif cells and any(_END in cell for cell in cells):
            break
        elif cells:
            rows.append({**dict.fromkeys(header), **dict(zip(header, cells))})
        begins = reader.line_num + 1
    raise ValueError(f"{path}: the row that begins at line {begins} has a quote that is never closed")


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open(path, "rb") as stream:
            yield from pyarrow.parquet.read_table(stream).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({one_line(error)})") from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder: one dataset, not several by split."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _read_saved(folder: Path) -> list[Any]:
    from datasets import load_from_disk

    try:
        return list(load_from_disk(str(folder)))
    except Exception as error:  # whatever the library raises, the user needs the folder's name
        raise ValueError(f"{folder}: cannot be read as a saved dataset ({one_line(error)})") from error


def hash_files(parts: list[Path]) -> str:
    """Hash of the bytes of files, and of those in folders; what datasets caches there aside."""
    digest = hashlib.blake2b(digest_size=32)
    below = [sorted(part.rglob("*")) if part.is_dir() else [part] for part in parts]
    for file in (file for files in below for file in files if file.is_file() and not file.name.startswith("cache-")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all: aside, synced, then renamed over `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
