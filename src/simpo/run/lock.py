"""One run at a time in a run directory.

The lock is the operating system's, on a file in the directory: it goes with the process that holds it, however that
ends, so that what a dead process leaves keeps nobody out. Over a network file system it holds as far as that passes
locks on (NFS and GPFS do; Lustre mounted with `localflock` and NFS with `nolock` know their own machine's alone).
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = "_lock"  # transformers' Trainer uploads nothing that begins with "_"


@dataclass
class _Held:
    descriptor: int
    made: list[Path]  # folders that were not there before
    users: int = 0


_held: dict[tuple[int, Path], _Held] = {}  # (process, directory): one process may open a directory several times


class OutputLock:
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
            ValueError: another process has it.
        """
        key = (os.getpid(), self.folder)
        if key not in _held:
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
        (self.folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(held.descriptor)
        for path in held.made:
            try:
                path.rmdir()
            except OSError:  # in use by now
                break

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()


def _open_locked(folder: Path) -> int | None:
    """A descriptor of the lock file, locked; None where the system has no locks."""
    path = folder / LOCK_FILE
    if fcntl is None:
        return None
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its owner has just removed the folder
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(descriptor), path.stat())
        except FileNotFoundError:
            is_there = False
        except OSError as error:
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
            os.ftruncate(descriptor, 0)
            os.write(
                descriptor, f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}".encode()
            )
            return descriptor
        os.close(descriptor)  # its owner removed it before it was locked here
