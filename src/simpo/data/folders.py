"""Owns what a folder of data holds: which files have rows, and of each other one why it is not read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from simpo.data.files import file_format, is_saved_dataset

_COMPRESSED = (".zst", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar", ".tgz", ".gz")
_EXPECTED = re.compile(r"(?i)(readme|licen[cs]e|notice|citation|dataset_(info|dict)).*|.*\.md|state\.json|[._].*")
"""Files that lie beside rows and are none: nobody needs to hear of them."""


def find_parts(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Files of rows and folders that `save_to_disk` wrote, behind links too; the rest by path, and why it is not read.

    Raises:
        OSError: a folder cannot be looked into.
    """
    found, unread, seen = [], {}, set()
    for name, below, files in os.walk(folder, followlinks=True, onerror=_raise):
        here = Path(name)
        if here.resolve() in seen:  # a link to a folder above would never end
            below.clear()
            unread[str(here.relative_to(folder))] = "a link to a folder that is read already"
            continue
        seen.add(here.resolve())
        if is_saved_dataset(here):
            below.clear()
            found.append(here)
            continue
        hidden = [each for each in below if each.startswith((".", "_"))]
        paths = [here / each for each in files]
        paths += [path for each in hidden for path in (here / each).iterdir() if file_format(path)]
        below[:] = sorted({*below} - {*hidden})
        for path in paths:
            if why := _why_not(path, is_hidden=path.parent != here or _hidden(path.name)):
                unread[str(path.relative_to(folder))] = why
            elif file_format(path) and not _hidden(path.name):
                found.append(path)
    return sorted(found), dict(sorted(unread.items()))


def _raise(error: OSError) -> None:
    raise error


def _why_not(path: Path, *, is_hidden: bool) -> str | None:
    """Why a file of a folder is not read; None for one that is, or that nobody takes for rows."""
    is_rows = file_format(path) is not None
    if is_rows and is_hidden and not path.name.startswith("dataset_"):
        return "hidden"
    if _EXPECTED.fullmatch(path.name):
        return None
    if path.exists() and not path.is_file():
        return "a pipe or a device"
    if is_rows:
        return None
    if path.suffix.lower() in _COMPRESSED:
        return "compressed in a way that is not read here (.gz is): unpack it"
    return "unknown kind of file"


def _hidden(file: str) -> bool:
    return file.startswith((".", "_", "dataset_info", "dataset_dict.json"))
