"""Owns the reading of one local file of rows: JSON Lines, JSON, CSV, TSV, Parquet, gzipped or not; saved datasets.

Returns plain rows; a line that cannot be read among others becomes a `RowError` for the ledger to count. A file that
cannot be read at all raises ValueError with its name.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from simpo.data.columns import RowError, message_columns, type_cells
from simpo.errors import explain, is_disk_full, one_line, short

FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")


def file_format(path: Path) -> str | None:
    """The format a file name stands for, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def read_file(path: Path, otherwise: str | None = None) -> Iterator[Any]:
    """The rows of one file, or of one saved dataset: mappings, or a `RowError` for each line that cannot be read.

    They are read as they are asked for: a line, a batch, an item of a list at a time; only a JSON object as a whole.

    Args:
        otherwise: the format where the name does not say it.
    Raises:
        ValueError: the file has no rows or cannot be read, once the rows before the damage are out.
    """
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    rows = (_read_saved if path.is_dir() else readers[file_format(path) or otherwise or ""])(path)
    is_empty = True
    for row in rows:
        is_empty = False
        yield row
    if is_empty:
        raise ValueError(f"{path}: the file has no rows")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The bytes of a file, gzipped or not, behind a byte order mark, as a stream."""
    try:
        with open(path, "rb") as file, contextlib.ExitStack() as stack:
            is_gzipped = file.peek(2)[:2] == b"\x1f\x8b"
            stream: Any = stack.enter_context(gzip.GzipFile(fileobj=file)) if is_gzipped else file
            if stream.peek(3)[:3] == b"\xef\xbb\xbf":
                stream.read(3)
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from error


def _read_jsonl(path: Path) -> Iterator[Any]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _json_line(line.removesuffix(b"\n"), f"{path.name} line {number}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):  # json would take the last and say nothing
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in {short(held)}")
    return held


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _json_line(line: bytes, where: str) -> Any:
    try:
        return _JSON.decode(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return RowError("malformed", f"{where}: not JSON ({error.msg} at column {error.colno})")
    except UnicodeDecodeError as error:
        at = f"byte 0x{error.object[error.start]:02x} at place {error.start}"
        return RowError("malformed", f"{where}: not UTF-8 ({at}); save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        return RowError("malformed", f"{where}: cannot be read ({one_line(error)})")


def _read_json(path: Path) -> Iterator[Any]:
    kind, count = json_kind(path), 0
    if kind == "lines":
        yield from _read_jsonl(path)
        return
    if kind == "list":
        try:
            for row in _items(path):
                yield row
                count += 1
            return
        except (ValueError, RecursionError):
            pass  # read as a whole it says what is wrong, and where
    yield from json_rows(load_json(path), path)[count:]


_BLOCK = 1 << 20


def json_kind(path: Path) -> str:
    """What a .json file holds: "lines" (JSON Lines under another name), a "list", or another "value"."""
    line = b""
    with _open(path) as stream:
        while not line.strip() and (line := stream.readline(_BLOCK)):
            pass
        is_list = line.lstrip().startswith(b"[")
        if len(line) == _BLOCK and is_list:
            return "list"  # on one line: what follows it shows when it is read
        if not line.endswith(b"\n"):
            line += stream.readline()
        if not isinstance(_json_line(line, ""), RowError) and any(more.strip() for more in stream):
            return "lines"
    return "list" if is_list else "value"


def _items(path: Path) -> Iterator[Any]:
    """The items of a JSON list one by one. Raises ValueError where it cannot tell how they go on."""
    decode, blank = _JSON.raw_decode, re.compile(r"[ \t\n\r]*")

    def skip(text: str, at: int) -> int:
        return blank.match(text, at).end()  # type: ignore[union-attr]

    with _open(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        held = text.read(_BLOCK)
        at, mark = held.index("[") + 1, ","
        while mark == ",":
            try:
                item, end = decode(held, skip(held, at))
                end = skip(held, end)
                mark = held[end]
            except (json.JSONDecodeError, IndexError):
                more = text.read(len(held) - at + _BLOCK)
                if not more:
                    raise ValueError("the list does not end") from None
                held, at = held[at:] + more, 0
                continue
            yield item
            at = end + 1
        if mark != "]" or (held[at:] + text.read()).strip():
            raise ValueError("more than a list")


def load_json(path: Path) -> Any:
    """The parsed file."""
    with _open(path) as stream:
        data = stream.read()
    if not data.strip():
        raise ValueError(f"{path}: the file has no rows")
    try:
        return _JSON.decode(data.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({one_line(error)})") from error


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


def _read_csv(path: Path) -> Iterator[Any]:
    messages = message_columns(row for row in _cells(path) if not isinstance(row, RowError))
    for row in _cells(path):
        yield row if isinstance(row, RowError) else type_cells(row, messages)


_END = "\x1e end of the file"
"""A line behind the last: what reads it as part of a cell has met a quote that is never closed."""


def _cells(path: Path) -> Iterator[dict[str, str | None] | RowError]:
    """The rows of a CSV file as they are written."""
    with _open(path) as stream:
        begin, text = stream.tell(), io.TextIOWrapper(stream, encoding="utf-8", newline="")
        reader = csv.reader(chain(text, ["\n", _END]), delimiter="\t" if file_format(path) == ".tsv" else ",")
        try:
            yield from _rows_of_cells(_numbered(reader), path)
        except UnicodeDecodeError as error:
            at = stream.tell() - begin - len(error.object) + error.start
            raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {at})") from error


def _numbered(reader: Any) -> Iterator[tuple[list[str], int]]:
    """The rows of a `csv.reader`, however long their cells, each with the number of its last line."""
    rows = [([], 0)]
    while rows:
        # Of the whole process: set while it is needed. The most that a C long of Windows holds.
        before = csv.field_size_limit(2**31 - 1)
        try:
            rows = [(cells, reader.line_num) for cells in islice(reader, 1000)]
        finally:
            csv.field_size_limit(before)
        yield from rows


def _rows_of_cells(lines: Iterator[tuple[list[str], int]], path: Path) -> Iterator[dict[str, str | None] | RowError]:
    header, begins = next(lines)
    _check_columns(header, path)
    for cells, line in lines:
        if cells == [_END]:
            return
        if len(cells) > len(header):
            yield RowError("malformed", f"{path.name} line {line}: more cells than the header has columns")
        elif cells and any(_END in cell for cell in cells):
            break
        elif cells:
            yield {**dict.fromkeys(header), **dict(zip(header, cells))}
        begins = line
    raise ValueError(f"{path}: the row that begins at line {begins + 1} has a quote that is never closed")


def _check_columns(names: list[str], path: Path) -> None:
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"{path}: several columns are called {', '.join(map(repr, twice))}; rename or remove them")


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open(path, "rb") as stream:
            # Read in parts of a column: neither the file nor a row group has to fit in memory.
            file = pyarrow.parquet.ParquetFile(stream, buffer_size=_BLOCK, pre_buffer=False)
            _check_columns(file.schema_arrow.names, path)
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({one_line(error)})") from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder: one dataset, not several by split."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _read_saved(folder: Path) -> Iterator[Any]:
    from datasets import load_from_disk

    try:
        yield from load_from_disk(str(folder))
    except Exception as error:  # whatever the library raises, the user needs the folder's name
        raise ValueError(f"{folder}: cannot be read as a saved dataset ({one_line(error)})") from error


_PIECE = 1 << 24


def digest_file(path: Path) -> str:
    """32 hex digits of the bytes of a file: of its pieces' digests, which several threads make of a large one."""

    def digest(begin: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(begin)
            return hashlib.sha256(file.read(_PIECE)).digest()

    places = range(0, path.stat().st_size, _PIECE)
    if len(places) > 1:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            digests = b"".join(threads.map(digest, places))
    else:
        digests = b"".join(map(digest, places))
    return hashlib.sha256(digests).hexdigest()[:32]


def hash_files(parts: list[Path]) -> str:
    """Hash of the bytes of files, and of those in folders; what datasets caches there aside."""
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        files = [part]
        if part.is_dir():
            files = [each for each in sorted(part.rglob("*")) if each.is_file() and not each.name.startswith("cache-")]
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with open(file, "rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
    return digest.hexdigest()


def check_own(path: str | Path, *keys: str) -> dict[str, Any]:
    """What a JSON file holds that a command is about to write anew; empty where there is none.

    Raises:
        ValueError: it is no object with these keys, so that it is somebody else's.
    """
    path = Path(path)
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not {*keys} <= content.keys():
        raise not_own(path)
    return content


def not_own(path: Path) -> ValueError:
    return ValueError(
        f"{path}: is there already, is not this command's, and is not overwritten; choose another place (--output)"
    )


def supersede(folder: Path, paths: Iterable[Path], *, copied: Iterable[Path] = ()) -> Path | None:
    """Move what there is of these into a new folder next to them, copy some there, and return it."""
    there, copied = [path for path in paths if path.exists()], [path for path in copied if path.exists()]
    if not there and not copied:
        return None
    # transformers' Trainer neither deletes nor uploads what begins with "_".
    aside = next(path for n in count(1) if not (path := folder / f"_superseded-{n}").exists())
    aside.mkdir()
    for path in copied:
        shutil.copy(path, aside / path.name)
    for path in there:
        path.rename(aside / path.name)
    return aside


@contextlib.contextmanager
def named_if_refused(key: str, path: Path) -> Iterator[None]:
    """Inside, what the system refuses to write at a path is a ValueError of one line that begins with a key's name."""
    try:
        yield
    except OSError as error:
        there = next((each for each in (path, *path.parents) if os.path.lexists(each)), path)
        why = explain(error) if there.is_dir() or there == path else f"{there} is a file, not a folder"
        why = why.removeprefix(f"{path}: ")
        advice = "make room, or choose another place" if is_disk_full(error) else "choose another place"
        raise ValueError(f"{key}: {path} cannot be written ({why}); {advice}") from error


def check_writable(path: str | Path, key: str, *, is_folder: bool = False) -> None:
    """Raise ValueError where no file, or nothing in a folder, could be written, before work is done for it.

    Nothing is left behind.

    Args:
        key: that says where; named in the error.
    """
    path, made = Path(path), []
    with named_if_refused(key, path):
        try:
            made = [each for each in path.parents if not each.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() != is_folder and path.exists():
                raise OSError(f"it is a {'file' if is_folder else 'folder'}")
            with contextlib.suppress(FileNotFoundError):
                path.lstat()  # a name that is too long
            if is_folder and not path.exists():
                made.insert(0, path)
                path.mkdir()
            elif path.is_dir() or path.is_file() or not path.exists():  # a pipe or a device is written as it is
                # Never under its own name: were it killed here, its file would stand in the way of the next start.
                probe = (path if is_folder else path.parent) / f".probe-{secrets.token_hex(4)}"
                with open(probe, "xb"):
                    pass
                probe.unlink()
        finally:
            for each in made:
                with contextlib.suppress(OSError):  # another process may have begun to use it
                    each.rmdir()


_LITTER_S = 600.0
"""What was to become a file, and has not grown for so long, is written by nobody any more."""


def write_whole(path: str | Path, content: str | bytes | Iterable[str]) -> None:
    """Write a text, its parts, or bytes, so that the file is there whole or not at all: aside, synced, then renamed.

    What is no regular file, such as /dev/stdout, is written to as it is.
    """
    path = Path(path)
    parts: Iterable[Any] = [content] if isinstance(content, str | bytes) else content
    encoded = (part if isinstance(part, bytes) else part.encode() for part in parts)
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            file.writelines(encoded)
        return
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    try:
        with open(aside, "xb") as file:  # by the umask, which tempfile ignores
            file.writelines(encoded)
            file.flush()
            os.fsync(file.fileno())
        for other in path.parent.glob(f".{glob.escape(aside.name[1:-9])}.{'[0-9a-f]' * 8}"):  # of killed processes
            with contextlib.suppress(FileNotFoundError):  # done by now
                if aside.stat().st_mtime - other.stat().st_mtime > _LITTER_S:
                    other.unlink()
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def follow_umask(folder: Path) -> None:
    """Give weights that safetensors wrote, for their owner's eyes alone, the mode of any new file in their folder."""
    probe = folder / f".probe-{secrets.token_hex(4)}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def sync_tree(folder: Path) -> None:
    """Make every file below a folder survive a power cut."""
    for path in [folder, *folder.rglob("*")]:
        sync(path)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    if os.name != "posix" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
