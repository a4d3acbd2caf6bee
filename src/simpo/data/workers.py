"""Owns spreading work over fresh Python processes.

Not multiprocessing: its "spawn" runs the user's script again in each child, and its "fork" copies a process that may
hold torch threads and locks. Here each child is a plain interpreter that builds one object of this package and answers
jobs over pipes, one pickle after another.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from simpo.environment import num_cores

_START = "import sys; sys.path[:] = {path!r}; from simpo.data.workers import serve; serve()"
CHUNK_ROWS = 256
ROWS_PER_PROCESS = 2000
"""Fewer rows than this do not pay for starting one more process."""


class WorkersFailed(RuntimeError):
    """The processes could not be started, or one ended early. Says nothing about the data."""


def map_rows(
    build: Callable[[], Callable[[list[Any]], Any]], rows: Iterable[Any], num_rows: int, wanted: int | None
) -> Iterator[Any]:
    """`build()(some rows)` for all rows, a chunk at a time, in order: over several processes where that pays.

    Args:
        wanted: processes at most; None = one for each core, and no more than 8.
    """
    rest = iter(rows)
    pieces = iter(lambda: list(islice(rest, CHUNK_ROWS)), [])
    given: deque[list[Any]] = deque()  # to processes that have not answered yet

    def give() -> Iterator[list[Any]]:
        for piece in pieces:
            given.append(piece)
            yield piece

    num_processes = _num_processes(num_rows, wanted)
    if num_processes > 1:
        try:
            for result in map_in_processes(build, give(), num_processes):
                given.popleft()
                yield result
        except WorkersFailed as error:
            Console(stderr=True).print(f"tokenising in this process alone: {error}", markup=False, highlight=False)
    rest_of_pieces = chain(given, pieces)
    if first := next(rest_of_pieces, None):
        yield from map(build(), chain([first], rest_of_pieces))


def _num_processes(num_rows: int, wanted: int | None) -> int:
    """1 stands for this process. At most one for `ROWS_PER_PROCESS` rows; by default at most 8 and the cores."""
    wanted = min(num_cores(), 8) if wanted is None else wanted
    return max(1, min(wanted, num_rows // ROWS_PER_PROCESS))


def map_in_processes(
    build: Callable[[], Callable[[Any], Any]],
    jobs: Iterable[Any],
    num_processes: int,
    *,
    environments: Sequence[Mapping[str, str]] = (),
    in_order: bool = True,
) -> Iterator[Any]:
    """`build()(job)` for each job, in order or as soon as they are there; built once in each process.

    Everything must be picklable. Jobs are taken as processes become free, and a few in advance.
    Args:
        environments: of the processes, on top of this one's.
    Raises:
        ValueError: raised by a job; it is raised here again with the same message.
        WorkersFailed: anything else. What was yielded before is good.
    """
    try:
        setup = pickle.dumps(build)
    except Exception as error:  # pickle lets any exception of a class through
        raise WorkersFailed(f"the tokenizer cannot be sent to other processes ({error})") from error
    processes: list[subprocess.Popen] = []
    idle: queue.SimpleQueue[tuple[IO[bytes], IO[bytes]]] = queue.SimpleQueue()

    def answer(job: Any) -> Any:
        jobs_in, answers_out = pipes = idle.get()
        try:
            pickle.dump(job, jobs_in)
            jobs_in.flush()
            return pickle.load(answers_out)
        except Exception as error:  # a closed pipe, or an answer that cannot be read
            raise WorkersFailed(f"a process ended early ({type(error).__name__})") from error
        finally:
            idle.put(pipes)  # a dead one's too: the next job shall fail, not wait

    try:
        with ThreadPoolExecutor(num_processes) as threads:  # each waits for one process
            try:
                try:
                    for number in range(num_processes):
                        process = _start(environments[number] if environments else {})
                        processes.append(process)
                        assert process.stdin is not None
                        assert process.stdout is not None
                        process.stdin.write(setup)
                        idle.put((process.stdin, process.stdout))
                except OSError as error:
                    raise WorkersFailed(f"no further process could be started ({error})") from error
                for result in _results(threads, answer, jobs, 3 * num_processes, in_order=in_order):
                    if isinstance(result, ValueError):
                        raise result
                    yield result
            finally:
                for process in processes:
                    process.kill()
                threads.shutdown(cancel_futures=True)
    finally:
        for process in processes:
            with contextlib.suppress(OSError), process:  # closes its pipes
                pass


def _results(
    threads: ThreadPoolExecutor, function: Callable, jobs: Iterable[Any], num_ahead: int, *, in_order: bool
) -> Iterator[Any]:
    """`function(job)` for each job, with at most `num_ahead` of them taken or done that nobody asked for."""
    ahead: deque[Future] = deque()

    def take() -> Any:
        if not in_order:
            wait(ahead, return_when=FIRST_COMPLETED)
            ahead.rotate(-next(place for place, each in enumerate(ahead) if each.done()))
        return ahead.popleft().result()

    for job in jobs:
        ahead.append(threads.submit(function, job))
        if len(ahead) >= num_ahead:
            yield take()
    while ahead:
        yield take()


def _start(environment: Mapping[str, str]) -> subprocess.Popen:
    path = [*sys.path, str(Path(__file__).resolve().parents[2])]  # the last: where this very package lies
    # One core for each process: no thread pools on top.
    one_core = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _START.format(path=path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **one_core, **environment},
    )


def serve() -> None:
    """The child's side: build once, then answer jobs until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it ends
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to stderr, not between the answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        work = pickle.load(sys.stdin.buffer)()
        while True:
            job = pickle.load(sys.stdin.buffer)
            try:
                result = work(job)
            except ValueError as error:
                result = ValueError(str(error))
            pickle.dump(result, answers)
            answers.flush()
