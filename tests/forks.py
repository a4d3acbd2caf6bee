"""Python programs in forks of one process that has imported torch, transformers and simpo, and has computed nothing.

That process is a fork of pytest's, made when all tests are collected (conftest.py).

    done = forks.run("-m", "simpo", "train", "recipe.yaml")

A program started so costs what it does, without the seconds of processor time that its imports take; so do the
processes of a launcher (torchrun, accelerate) that is started so. What a test claims of starting Python itself needs
`subprocess`, and so does what Python or a library reads from the environment while it loads.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import thread
from multiprocessing import connection, forkserver, reduction, resource_tracker
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

PRELOADED = ["simpo.cli", "simpo.trainer", "transformers.trainer", "torch.distributed.launcher.api", "frozen"]
TIMEOUT_S = 600
KILLS = int(os.environ.get("SIMPO_KILLS", "30"))
"""How often the long tests of kills kill a command."""
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def process(function: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """A process that will call a module's function, forked from the one with the imports, or from a fork of it."""
    return _context(multiprocessing.parent_process() is not None).Process(target=function, args=args)


@functools.cache
def _context(in_fork: bool) -> Any:
    context = multiprocessing.get_context("fork" if in_fork else "forkserver")
    if not in_fork:
        context.set_forkserver_preload(PRELOADED)
    return context


def serve() -> None:
    """Let programs be forks of a fork of this process, which has imported most already.

    A server that multiprocessing starts would import it all again, for ten seconds of processor time.
    """
    if sys.version_info >= (3, 14):  # whose server wants a key
        return
    resource_tracker.ensure_running()
    listener, address = socket.socket(socket.AF_UNIX), connection.arbitrary_address("AF_UNIX")
    listener.bind(address)
    os.chmod(address, 0o600)
    listener.listen()
    alive, keep_alive = os.pipe()
    sys.stdout.flush()
    number = os.fork()
    if number == 0:
        os.close(keep_alive)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nowhere, stream)
        try:
            ready, _, _ = select.select([alive, listener], [], [])
            if alive not in ready:
                warnings.resetwarnings()  # pytest's: a program has Python's own
                for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                    warnings.simplefilter("ignore", kind)
                forkserver.main(listener.detach(), alive, PRELOADED)
        finally:
            os._exit(0)
    listener.close()
    os.close(alive)
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, keep_alive, number


class Program:
    """`subprocess.Popen` of a command that starts Python, as far as tests and launchers use it."""

    def __init__(
        self,
        args: Sequence[Any],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        start_new_session: bool = False,
        process_group: int | None = None,
    ) -> None:
        stderr = stdout if stderr == subprocess.STDOUT else stderr
        streams = [_Stream(file.fileno()) if file else None for file in (stdout, stderr)]
        self._process = process(
            _become, [str(word) for word in args], dict(os.environ if env is None else env), cwd, streams
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # a fork has its launcher's handlers at first
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    *words: Any, env: Mapping[str, str] | None = None, cwd: Path | str | None = None
) -> subprocess.CompletedProcess[str]:
    """`python *words` until its end, with what it and its children say, both streams together."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        program = Program(words, env=env, cwd=cwd, stdout=said, stderr=said)
        try:
            code = program.wait(TIMEOUT_S)
        finally:
            program.kill()
        said.seek(0)
        return subprocess.CompletedProcess(words, code, said.read(), "")


def start_forks(module: ModuleType) -> None:
    """In a forked program: the commands that this module starts are forks of it, and go with it as they would."""
    module.subprocess = SimpleNamespace(Popen=Program, STDOUT=subprocess.STDOUT, DEVNULL=subprocess.DEVNULL)
    os.execvp = lambda _, words: _run(words)  # where a command says that it goes with its parent


def num_tracebacks(output: str) -> int:
    """Of a launcher's processes; torchrun's own report that one has failed ends in another."""
    return output.count("Traceback (most recent call last)") - ("ChildFailedError" in output)


class _Stream:
    """A file descriptor that reaches the process which it is an argument of."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _receive, (reduction.DupFd(self.number),)


def _receive(sent: Any) -> _Stream:
    return _Stream(sent.detach())


def _become(words: list[str], env: dict[str, str], cwd: Any, streams: list[_Stream | None]) -> None:
    """Be the process that this command would have started; of a launcher, its children are forks too."""
    import torch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    os.setsid()
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd or ".")
    for number, stream in enumerate(streams, start=1):
        if stream is not None:
            os.dup2(stream.number, number)
    for file in (sys.stdout, sys.stderr):
        file.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    thread._threads_queues.clear()  # or a fork that a thread of a pool has made would wait for itself in the end
    subprocess_handler.Popen = Program
    _run(words)


def _run(words: list[str]) -> None:
    while words[0] in (sys.executable, "-u"):
        words = words[1:]
    match words:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
        case [script, *rest]:
            sys.argv = [script, *rest]
            runpy.run_path(script, run_name="__main__")
