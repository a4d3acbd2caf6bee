"""Owns spreading work over fresh Python processes.

Not multiprocessing: its "spawn" runs the user's script again in each child, and its "fork" copies a process that may
hold torch threads and locks. Here each child is a plain interpreter that builds one object of this package and answers
jobs over pipes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

_START = "import sys; sys.path[:] = {path!r}; from simpo.data.workers import serve; serve()"


class WorkersFailed(RuntimeError):
    """The processes could not be started, or one ended early. Says nothing about the data."""


def map_in_processes(
    build: Callable[[], Callable[[Any], Any]], jobs: Sequence[Any], num_processes: int
) -> Iterator[tuple[int, Any]]:
    """`build()(job)` for each job, built once in each process; yields (index, result) as they come.

    Everything must be picklable.
    Raises:
        ValueError: raised by a job; it is raised here again with the same message.
        WorkersFailed: anything else. What was yielded before is good.
    """
    try:
        setup = pickle.dumps(build)
    except Exception as error:  # pickle lets any exception of a class through
        raise WorkersFailed(f"the tokenizer cannot be sent to other processes ({error})") from error
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    processes = _start(min(num_processes, len(jobs)))
    try:
        for process in processes:
            threading.Thread(target=_drive, args=(process, setup, jobs, waiting, results), daemon=True).start()
        for _ in range(len(jobs)):
            index, result = results.get()
            if isinstance(result, Exception):
                raise result
            yield index, result
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in filter(None, (process.stdin, process.stdout)):
                with contextlib.suppress(OSError):
                    stream.close()


def _start(count: int) -> list[subprocess.Popen]:
    path = [*sys.path, str(Path(__file__).resolve().parents[2])]  # the last: where this very package lies
    environment = {
        **os.environ,
        # One core for each process: no thread pools on top.
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    processes: list[subprocess.Popen] = []
    try:
        for _ in range(count):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", _START.format(path=path)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                )
            )
    except OSError as error:
        for process in processes:
            process.kill()
            process.wait()
        raise WorkersFailed(f"no further process could be started ({error})") from error
    return processes


def _drive(
    process: subprocess.Popen,
    setup: bytes,
    jobs: Sequence[Any],
    waiting: queue.SimpleQueue,
    results: queue.SimpleQueue,
) -> None:
    """Feed one process until no job waits; runs in a thread."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _send(process.stdin, setup)
        while True:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            _send(process.stdin, pickle.dumps(jobs[index]))
            results.put((index, pickle.loads(_receive(process.stdout))))
    except ValueError as error:
        results.put((-1, WorkersFailed(f"a process answered with something else ({error})")))
    except (OSError, EOFError, pickle.PickleError, AttributeError, ImportError) as error:
        results.put((-1, WorkersFailed(f"a process ended early ({type(error).__name__})")))


def serve() -> None:
    """The child's side: build once, then answer jobs until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to stderr, not between the answers
    try:
        work = pickle.loads(_receive(sys.stdin.buffer))()
        while True:
            job = pickle.loads(_receive(sys.stdin.buffer))
            try:
                result: Any = work(job)
            except ValueError as error:
                result = ValueError(str(error))
            _send(answers, pickle.dumps(result))
    except (EOFError, BrokenPipeError):
        return


def _send(stream: IO[bytes], message: bytes) -> None:
    stream.write(len(message).to_bytes(8, "little"))
    stream.write(message)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError
    message = stream.read(int.from_bytes(size, "little"))
    if len(message) < int.from_bytes(size, "little"):
        raise EOFError
    return message
