"""Owns the files of the commands between prompts and pairs: rows that are written once and survive any interruption.

A journal is JSON Lines, a row for each input with its `id`, and FILE.json beside it: the settings it was begun with,
and at the end its account. A process that is killed leaves whole rows and at most one torn line, which goes when the
same command goes on. Knows nothing of models.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from simpo.data.columns import RowError
from simpo.data.files import check_own, write_whole
from simpo.data.ledger import Dropped, count_rows
from simpo.errors import explain, short
from simpo.run.lock import OutputLock

FORMAT = 1
SYNC_EVERY_S = 2.0
_APPENDS = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)  # Windows would write other line ends


class Journal:
    """The rows of one output file. As a context: in it no other process can write to the folder.

    Args:
        path: FILE.jsonl.
        settings: all that decides a row besides its input, in plain values. A file that was begun with others is
            refused.
    Attributes:
        done: ids of the rows that are there.
        left_out: reason -> its count and some examples, of inputs that gave no row; they are tried again next time.
    Raises:
        ValueError: on entering: another process is at work here, or the file was begun with other settings, is damaged
            in the middle, or is no journal.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise ValueError(f"{self.path}: the output is JSON Lines; give it a name that ends with .jsonl")
        self.about = self.path.with_suffix(".json")
        self.settings = json.loads(json.dumps(settings))
        self.done: dict[str, int] = {}  # id -> where its line begins
        self.left_out: dict[str, dict[str, Any]] = {}
        self._lock = OutputLock(self.path.parent)
        self._synced = 0.0

    def __enter__(self) -> Journal:
        self._lock.acquire()
        try:
            self._check_settings()
            end = self._read_done()
            self._descriptor = os.open(self.path, _APPENDS | os.O_CREAT, 0o666)
            os.ftruncate(self._descriptor, end)  # what a killed process left of a line
            self._end = end
            self._is_complete = read_about(self.path).get("complete")
            if self._is_complete is None or not self.done:
                self._write_about({"complete": False})
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        if error[0] is not None and not self.done:  # it came to nothing
            self.path.unlink(missing_ok=True)
            self.about.unlink(missing_ok=True)
        self._lock.release()

    def __contains__(self, row_id: str) -> bool:
        return row_id in self.done

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row; its `id` must be new. Raises RowError as `as_line`."""
        if row["id"] in self.done:
            raise AssertionError(f"journal: {row['id']} twice")
        line = as_line(row)
        if self._is_complete:
            self._write_about({"complete": False})
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise OSError(
                f"{self.path}: cannot be written ({explain(error)}); the {len(self.done)} rows that are there "
                "stay, and the same command goes on from them"
            ) from error
        self.done[row["id"]] = self._end
        self._end += len(line)
        if time.monotonic() - self._synced > SYNC_EVERY_S:
            os.fsync(self._descriptor)
            self._synced = time.monotonic()

    def leave_out(self, row_id: str, error: RowError) -> None:
        """Count an input that gives no row, and why."""
        count_rows(self.left_out, [Dropped(row_id, error.reason, error.detail)])

    def check_inputs(self, order: Collection[str]) -> None:
        """Raise ValueError where there is a row whose input is not there any more."""
        if unknown := self.done.keys() - set(order):
            raise ValueError(
                f"{self.path}: holds {len(unknown)} rows, such as {min(unknown)}, that the input no longer has; write "
                "into another file, or delete this one"
            )

    def renew(self, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        """Write every row as `change` makes it, with the same id; nothing where nothing changes."""
        if any(change(row) != row for row in self.rows()):
            self._rewrite(list(self.done), change)

    def finish(self, order: Sequence[str], summary: Mapping[str, Any], *, keeps_others: bool = False) -> None:
        """Bring the rows into the order of the inputs, whatever order they came in, and write the account.

        Args:
            keeps_others: rows of other inputs stay, behind these; otherwise there may be none.
        Raises:
            ValueError: as `check_inputs`.
        """
        if keeps_others:
            own = {*order}
            order = [*order, *(row_id for row_id in self.done if row_id not in own)]
        self.check_inputs(order)
        ordered = [row_id for row_id in order if row_id in self.done]
        if ordered != list(self.done):
            self._rewrite(ordered)
        self._write_about({"complete": True, "rows": len(self.done), "left_out": self.left_out, **summary})

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that are there, in the order of the file."""
        return read_rows_of(self.path)

    def _rewrite(
        self, ordered: Sequence[str], change: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None
    ) -> None:
        aside, begins = self.path.with_name(f".{self.path.name}.sorting"), {}
        with open(self.path, "rb") as source, open(aside, "wb") as target:
            for row_id in ordered:
                source.seek(self.done[row_id])
                begins[row_id] = target.tell()
                line = source.readline()
                target.write(as_line(change(json.loads(line))) if change else line)
            self._end = target.tell()
            target.flush()
            os.fsync(target.fileno())
        os.close(self._descriptor)  # first: Windows replaces no file that is open
        try:
            os.replace(aside, self.path)
            self.done = begins
        finally:
            self._descriptor = os.open(self.path, _APPENDS)

    def _check_settings(self) -> None:
        about = read_about(self.path)
        if self.about.exists():
            check_own(self.about, "format", "settings")
        if about.get("format", 0) > FORMAT:
            raise ValueError(
                f"{self.about}: written by simpo {about.get('simpo')}, in format {about['format']}; this is simpo "
                f"{version('simpo')}, which reads up to format {FORMAT}"
            )
        check_settings(self.path, self.settings)

    def _read_done(self) -> int:
        """Fill in `done`; returns where the last whole line ends."""
        end = 0
        if not self.path.exists():
            return end
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row_id = json.loads(line)["id"] if line.endswith(b"\n") else None
                except (ValueError, TypeError, KeyError):
                    row_id = None
                if row_id is None:
                    if file.read(1):
                        raise ValueError(
                            f"{self.path}: line {number} is damaged; delete it (its input is then done again)"
                        )
                    break
                self.done[row_id] = end
                end += len(line)
        return end

    def _write_about(self, content: Mapping[str, Any]) -> None:
        head = {"simpo": version("simpo"), "format": FORMAT, "settings": self.settings}
        write_whole(self.about, json.dumps({**head, **content}, indent=1, ensure_ascii=False) + "\n")
        self._is_complete = content["complete"]


def as_line(row: Mapping[str, Any]) -> bytes:
    """A row as it is written. Raises RowError where its text is not Unicode: half of a surrogate pair."""
    try:
        return f"{json.dumps(row, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError as error:
        wrong = ascii(error.object[error.start])
        raise RowError("malformed", f"not valid Unicode: {error.reason} ({wrong})") from None


def _flat(settings: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their whole names: "generate.temperature"."""
    if not isinstance(settings, Mapping):
        return {name: settings}
    parts = [_flat(value, f"{name}.{key}".lstrip(".")) for key, value in settings.items()]
    return {key: value for part in parts for key, value in part.items()}


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two settings, in words; empty where nothing does.

    A name that only the later ones have is a key that another version of simpo added: while it is off, nothing differs;
    nor does a digest of what a file says, which ends with `_digest`.
    """
    before, now = _flat(before), _flat(now)
    return "; ".join(
        f"{name} was {short(before.get(name))} and is {short(now.get(name))}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name) and (name in before or (now[name] and not name.endswith("_digest")))
    )


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a journal with rows was begun with other settings."""
    if not path.exists() or not path.stat().st_size:  # it came to nothing before
        return
    about = path.with_suffix(".json")
    if not about.exists():
        raise ValueError(
            f"{path}: is there already, without {about.name} that would say how it was made; write into another file"
        )
    if changed := changed_settings(read_about(path).get("settings", {}), settings):
        raise ValueError(
            f"{path}: was begun with other settings ({changed}); give the same ones to go on, or write into another "
            "file (--output)"
        )


def read_about(path: str | Path) -> dict[str, Any]:
    """What FILE.json says of FILE.jsonl; empty where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    about = Path(path).with_suffix(".json")
    if not about.exists():
        return {}
    try:
        content = json.loads(about.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{about}: damaged ({error}); delete it and its .jsonl to begin anew") from None
    return content if isinstance(content, dict) else {}


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a journal that is complete, or of any JSON Lines file with objects that have an `id`.

    Raises:
        ValueError: no such file, one whose command has not come to its end, or a line that is no such row.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file; its rows are read several times, so save them to one first")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the step before writes it, or name another one (`input`)")
    if read_about(path).get("complete") is False:
        raise ValueError(f"{path}: not complete yet; the command that writes it goes on when it is given again")
    yield from read_rows_of(path)


def read_rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, complete or not."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error})") from None
            if not isinstance(row, dict) or not isinstance(row.get("id"), str):
                raise ValueError(f"{path}: line {number} is not an object with an id")
            yield row
