"""The traces that `simpo plan` computes with, each made once for all of pytest's processes.

One takes a second, and tests of several files ask for the same: pytestmark = pytest.mark.usefixtures("shared_traces").
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class _Shared(dict[Any, Any]):
    """A dict that looks into a folder for what it lacks, and leaves there what it is given."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def _file(self, key: Any) -> Path:
        return self._folder / hashlib.sha256(repr(key).encode()).hexdigest()

    def __contains__(self, key: Any) -> bool:
        if not super().__contains__(key) and (file := self._file(key)).is_file():
            super().__setitem__(key, pickle.loads(file.read_bytes()))
        return super().__contains__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        part = self._file(key).with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps(value))
        part.replace(self._file(key))


@pytest.fixture(scope="session")
def shared_traces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Share traces with pytest's other processes until the session ends."""
    from simpo.plan import trace

    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent
    (folder / "traces").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_traces", _Shared(folder / "traces"))
        yield
