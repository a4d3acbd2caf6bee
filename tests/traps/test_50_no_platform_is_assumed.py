"""Trap 50: `import resource` at the top of a module: nothing could be imported on Windows."""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest

import simpo
from simpo.data import files
from simpo.data.files import sync_tree
from simpo.hosts.hf.launch import join_launched_world
from simpo.recipe import load_recipe
from simpo.run import lock
from simpo.run.lock import LOCK_FILE, OutputLock

POSIX_ALONE = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "curses", "readline", "posix"}
MISSING = {
    os: ("fork", "forkpty", "killpg", "getuid", "geteuid", "getpgid", "setsid", "sched_getaffinity", "uname"),
    signal: ("SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "setitimer", "pthread_sigmask"),
}


def import_as_on_windows() -> None:
    """Every module of the package once more, without what Windows lacks; what other packages import stays."""
    names = [each.name for each in pkgutil.walk_packages(simpo.__path__, "simpo.")]
    known = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:  # of an extra that is not installed
            continue
        known.append(name)
    for name in [name for name in sys.modules if name.split(".")[0] == "simpo"]:
        del sys.modules[name]
    inner = builtins.__import__

    def refusing(name: str, scope: Any = None, *others: Any) -> Any:
        if name in POSIX_ALONE and str((scope or {}).get("__name__")).startswith("simpo"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return inner(name, scope, *others)

    builtins.__import__ = refusing
    for module, missing in MISSING.items():
        for name in missing:
            delattr(module, name)
    for name in known:
        importlib.import_module(name)
    os._exit(0 if len(known) > 100 else 1)


def imported_at_once(node: ast.AST) -> Iterator[str]:
    """What a module imports as it is imported; not what it tries to, and does without."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Try) and any("ImportError" in ast.unparse(each) for each in child.handlers):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or ""
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported_at_once(child)


def test_no_module_begins_with_an_import_that_windows_lacks() -> None:
    for path in Path(simpo.__path__[0]).rglob("*.py"):
        found = set(imported_at_once(ast.parse(path.read_text(encoding="utf-8"))))
        assert not found & POSIX_ALONE, path


@pytest.mark.long
def test_every_module_is_imported_without_what_windows_lacks() -> None:
    process = forks.process(import_as_on_windows)
    process.start()
    process.join(forks.TIMEOUT_S)
    assert process.exitcode == 0


class Msvcrt:
    """As Windows locks: a byte at the place of the descriptor, for one descriptor at a time."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.owner: tuple[int, int] | None = None

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (self.LK_NBLCK, 1)
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        assert place > os.fstat(descriptor).st_size  # the owner's name stays readable
        if self.owner is not None:
            raise PermissionError(13, "Permission denied")
        self.owner = (descriptor, place)


def test_a_run_directory_is_locked_by_windows_own_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = Msvcrt()
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", windows)
    first = OutputLock(tmp_path / "run")
    assert first.acquire() is None
    monkeypatch.setattr(lock, "_held", {})  # as in another process
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"):
        OutputLock(tmp_path / "run").acquire()
    monkeypatch.undo()
    monkeypatch.setattr(lock, "fcntl", None)
    first.release()
    assert not (tmp_path / "run").exists()


def test_without_any_locks_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    with OutputLock(tmp_path) as own:
        assert "is on a system without file locks: start no second run in it" in own.acquire()
        assert not (tmp_path / LOCK_FILE).exists()


def test_folders_are_not_opened_where_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Path, int]] = []

    def note(path: Path, flags: int) -> int:
        opened.append((path, flags))
        return os.open(path, flags)

    (tmp_path / "file").touch()
    windows = SimpleNamespace(name="nt", open=note, fsync=os.fsync, close=os.close, O_RDWR=os.O_RDWR)
    monkeypatch.setattr(files, "os", windows)
    sync_tree(tmp_path)
    assert opened == [(tmp_path / "file", os.O_RDWR)]


@pytest.mark.parametrize("where", ["recipe", "transformers"])
def test_apples_gpus_are_refused_by_name(where: str, tiny_recipe: dict[str, Any]) -> None:
    def ask() -> None:
        if where == "recipe":
            load_recipe({**tiny_recipe, "device": "mps"})
        join_launched_world(SimpleNamespace(device=SimpleNamespace(type="mps"), world_size=1, n_gpu=1))

    with pytest.raises(ValueError, match=r"device.*mps.*cpu") as caught:
        ask()
    assert "\n" not in str(caught.value)
