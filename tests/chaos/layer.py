"""The layer before the disk (layer.c): what it shall do to a process, and what it has recorded of one."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NOTHING, KILL, KILL_AMID, FULL, FULL_ONCE, SHORT = range(6)
"""Modes: do nothing but count; kill the process before an operation, or in the middle of a write; the disk is full from
an operation on, or for that one alone; from it on every write is done by half."""
CREATE, WRITE, TRUNCATE, RENAME, UNLINK, MKDIR, RMDIR, LINK, SYNC = range(1, 10)
TAKES_ROOM = (CREATE, WRITE, MKDIR)
_PLAN = struct.Struct("4q1024s1024s")
_ENTRY = struct.Struct("4q")


class Operation(NamedTuple):
    """One of a recording: of a write its place and bytes, of a rename the new name, of a sync all that a file holds."""

    kind: int
    path: str
    offset: int
    more: bytes


def build_layer(folder: Path) -> Path:
    """The compiled layer. Skips the test where it cannot be."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or compiler is None:
        pytest.skip("the failing file layer needs Linux and a C compiler")
    library = folder / "layer.so"
    source = Path(__file__).with_name("layer.c")
    words = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl", "-lpthread"]
    subprocess.run(words, check=True)
    return library


class Plan:
    """What the layer does to the processes of a trial, which count their operations below `root` together."""

    def __init__(self, path: Path, root: Path, mode: int = NOTHING, at: int = 0, record: Path | None = None) -> None:
        self.path = path
        path.write_bytes(_PLAN.pack(0, at, mode, record is not None, str(root).encode(), str(record or "").encode()))

    @property
    def count(self) -> int:
        """How many operations there were."""
        return _PLAN.unpack(self.path.read_bytes())[0]


def arm(plan: str) -> None:
    """In a process that was started with the layer: begin as the plan says."""
    ctypes.CDLL(None).chaos_arm(plan.encode())


def read_recording(path: Path) -> list[Operation]:
    """What was done, in its order."""
    content, found, at = path.read_bytes() if path.exists() else b"", [], 0
    while at < len(content):
        kind, offset, path_size, more_size = _ENTRY.unpack_from(content, at)
        at += _ENTRY.size
        name = content[at : at + path_size].decode()
        at += path_size
        found.append(Operation(kind, name, offset, content[at : at + more_size]))
        at += more_size
    return found


class _File:
    """The bytes that a file had before, and what was written to it and synced since."""

    def __init__(self, before: bytes = b"") -> None:
        self.before, self.operations = before, list[Operation]()

    def content(self, unsynced: random.Random | None) -> bytes:
        synced = max((place for place, each in enumerate(self.operations, 1) if each.kind == SYNC), default=0)
        if unsynced is not None:
            synced = unsynced.randint(synced, len(self.operations))
        content = bytearray(self.before)
        for each in self.operations[:synced]:
            if each.kind == TRUNCATE:
                del content[each.offset :]
                content.extend(bytes(each.offset - len(content)))
            elif each.kind == SYNC:
                content[:] = each.more
            else:
                content.extend(bytes(max(0, each.offset - len(content))))
                content[each.offset : each.offset + len(each.more)] = each.more
        return bytes(content)


_Names = dict[str, Any]  # path -> _File, or None where it is a folder


def write_after_power_loss(
    before: Path,
    root: Path,
    operations: Sequence[Operation],
    *,
    all_names: bool,
    unsynced: random.Random | None = None,
) -> None:
    """Make a folder what the disk has of it once the power was lost after these operations.

    Names change on the disk in the order in which they were changed, and have up to the last sync of a folder.

    Args:
        before: a copy of it as it was before the first operation.
        root: the folder that the operations are of; replaced.
        all_names: whether the disk has all changes of names, as a journalling file system has them early.
        unsynced: says how much is there of what was written to each file since it was last synced; None = nothing.
    """
    live: _Names = {
        str(root / path.relative_to(before)): None if path.is_dir() else _File(path.read_bytes())
        for path in before.rglob("*")
    }
    kept = dict(live)
    folders = {path for path, file in live.items() if file is None} | {str(root)}
    folders |= {each.path for each in operations if each.kind == MKDIR}
    folders |= {each.more.decode() for each in operations if each.kind == RENAME and each.path in folders}
    syncs = [n for n, each in enumerate(operations) if each.kind == SYNC and each.path in folders]
    last = len(operations) if all_names else max(syncs, default=-1)
    for number, each in enumerate(operations):
        if each.path.endswith(" (deleted)"):
            continue
        if each.kind in (WRITE, TRUNCATE, SYNC):
            if each.path in folders:
                continue
            if each.path not in live:  # made by C's fopen, which passes by the layer
                live[each.path] = file = _File()
                if number <= last:
                    kept[each.path] = file
            live[each.path].operations.append(each)
            continue
        made = _File() if each.kind == CREATE else None
        for names in (live, kept) if number <= last else (live,):
            _change_names(names, each, made)
    shutil.rmtree(root)
    root.mkdir()
    for path, file in sorted(kept.items()):
        if file is None:
            Path(path).mkdir(parents=True, exist_ok=True)
        else:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(file.content(unsynced))


def _change_names(names: _Names, operation: Operation, made: _File | None) -> None:
    path, new = operation.path, operation.more.decode() if operation.kind in (RENAME, LINK) else ""
    if operation.kind in (CREATE, MKDIR):
        names[path] = made
    elif operation.kind in (UNLINK, RMDIR):
        del names[path]
    elif operation.kind == LINK:
        names[new] = names[path]
    else:
        names.pop(new, None)
        for old in [each for each in names if each == path or each.startswith(f"{path}/")]:
            names[new + old[len(path) :]] = names.pop(old)
