"""One run at a time in a run directory.

The lock is the operating system's, on a file in the directory: it goes with the process that holds it, however that
ends, so that what a dead process leaves keeps nobody out. Over a network file system it holds as far as that passes
locks on (NFS and GPFS do; Lustre mounted with `localflock` and NFS with `nolock` know their own machine's alone).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from simpo.data.files import named_if_refused

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
msvcrt = importlib.import_module("msvcrt") if os.name == "nt" else None

LOCK_FILE = "_lock"  # transformers' Trainer uploads nothing that begins with "_"


@dataclass
class _Held:
    descriptor: int
    made: list[Path]  # folders that were not there before
    users: int = 0


_held: dict[tuple[int, Path], _Held] = {}  # (process, directory): one process may open a directory several times


class OutputLock(contextlib.AbstractContextManager):
    """Keeps other processes out of a run directory. As a context: released at its end.

    Args:
        folder: made if missing; gone again if it is empty at the end.
    """

    def __init__(self, folder: Path) -> None:
        self._key: tuple[int, Path] | None = None
        self.folder = folder.resolve()

    def acquire(self) -> str | None:
        """Take it; of several processes of one run the first does. A line to show where there are no locks.

        Raises:
            ValueError: another process has it, or nothing can be written there.
        """
        key = (os.getpid(), self.folder)
        if key not in _held:
            with named_if_refused("output_dir", self.folder):
                made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
                descriptor = _open_locked(self.folder)
            if descriptor is None:
                return f"output_dir: {self.folder} is on a system without file locks: start no second run in it"
            _held[key] = _Held(descriptor, made)
        _held[key].users += 1
        self._key = key
        return None

    def release(self) -> None:
        """Let others in, unless this process has opened the directory again; does nothing the second time."""
        key, self._key = self._key, None
        if key is None or key[0] != os.getpid():  # a forked child
            return
        held = _held[key]
        held.users -= 1
        if held.users:
            return
        del _held[key]
        if fcntl is None:  # Windows removes no file that is open
            os.close(held.descriptor)
        with contextlib.suppress(PermissionError):  # there: another process has opened it meanwhile
            (self.folder / LOCK_FILE).unlink(missing_ok=True)
        if fcntl is not None:
            os.close(held.descriptor)
        for path in held.made:
            try:
                path.rmdir()
            except OSError:  # in use by now
                break

    def __exit__(self, *error: Any) -> None:
        self.release()


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes out meanwhile; ValueError where one is in."""
    with OutputLock(folder) as lock:
        if (line := lock.acquire()) is not None:
            say(line)
        yield


def is_at_work(folder: Path) -> bool:
    """Whether a process has a run directory, as far as its lock's words tell: one that was killed here has not."""
    try:
        words = (folder / LOCK_FILE).read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    if len(words) > 3 and words[1].isdigit() and words[3] == socket.gethostname() and os.name == "posix":
        try:
            os.kill(int(words[1]), 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
    return True


_FAR = 2**30  # Windows lets nobody read what is locked, and the owner's name is to be read
_TRIES = 1000


def _lock(descriptor: int) -> None:
    """Raises OSError: EACCES or EAGAIN where another process has it, another number where there are no locks."""
    if fcntl is not None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        raise OSError(errno.ENOSYS, "no locks")


def _open_locked(folder: Path) -> int | None:
    """A descriptor of the lock file, locked; None where the system has no locks."""
    path = folder / LOCK_FILE
    tries = 0
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its owner has just removed the folder
            tries += 1
            if tries == _TRIES:
                raise
            continue
        try:
            _lock(descriptor)
            is_there = os.path.samestat(os.fstat(descriptor), path.stat())
        except FileNotFoundError:
            is_there = False
        except OSError as error:
            os.lseek(descriptor, 0, os.SEEK_SET)
            owner = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            from simpo.run.resume import is_begun_by_this_launch  # loads torch, which taking a lock need not wait for

            if error.errno not in (errno.EACCES, errno.EAGAIN):
                path.unlink(missing_ok=True)
                return None
            if not is_begun_by_this_launch(folder):
                raise ValueError(
                    f"output_dir: {folder} is in use by {owner}; wait for it, stop it, or choose another output_dir "
                    f"(if its machine is gone for good, delete {path})"
                ) from None
            path.unlink(missing_ok=True)  # of an attempt that is over, on a machine that was lost
            continue
        if is_there:
            try:
                os.ftruncate(descriptor, 0)
                owner = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}"
                os.write(descriptor, owner.encode())
            except OSError:
                path.unlink(missing_ok=True)
                os.close(descriptor)
                raise
            return descriptor
        os.close(descriptor)  # its owner removed it before it was locked here
