"""Code against its tests: Python from responses, each run in a process that `jail.py` locks up.

That keeps the machine from the code, not the score: code that lives in one process with its tests can deceive them,
with results that claim to be equal to anything, for one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from simpo.data.columns import RowError, kind_of
from simpo.environment import num_cores
from simpo.onpolicy.scorers.rating import Rater, Row, Scores, column, guarded, windows

_JAIL = Path(__file__).with_name("jail.py")
_STARTING_S = 5.0  # for a code's process itself, which stops it in time unless the code prevents that
_READING = 2  # raised where what is taken for code, or how its tests are run, changes
_BLOCK = re.compile(
    r"^([ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)"  # as deep as the item of a list that it is in
    r"(`{3,}|~{3,})[ \t]*\{?\.?(\w*)[^\n`]*\n(.*?)(?:^[ \t]*\2[`~]*[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
_THOUGHT = re.compile(r".*</think(?:ing)?>(?![\"'\\])", re.DOTALL)  # in quotes it is code
_ALLOWED = (
    "tests are Python, a text or a list of texts, that raises where the code is wrong: statements such as assert, "
    "functions test*() without arguments, classes of tests, or check(candidate) with a column entry_point"
)


def build(options: Any) -> Rater:
    """The scorer.

    Raises:
        ValueError: code cannot be locked up here.
    """
    try:
        [(works, said)] = run_tests([[]], "", options)
    except RowError as error:
        works, said = False, error.detail
    if not works:
        raise ValueError(
            f"nothing keeps the code of responses from the network and from your files here ({said or 'no process'}); "
            "run it on Linux from 5.13 on with Landlock and seccomp, or set unsafe: true"
        )

    def rate_rows(rows: Iterable[Row]) -> Iterator[tuple[str, Scores]]:
        threads, running, futures = ThreadPoolExecutor(num_cores()), set(), []  # each thread waits for one process
        try:
            for some in windows(rows):
                futures = [threads.submit(_rate, row, options, running) for row in some]
                for row, future in zip(some, futures, strict=True):
                    yield row["id"], guarded(future.result)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):  # one may be about to start its process
                for process in [*running]:
                    _kill(process)
                time.sleep(0.01)

    return Rater(rate_rows, {"reading": _READING})


def _rate(row: Row, options: Any, running: set[subprocess.Popen[bytes]]) -> list[float]:
    """The responses' numbers. The tests are tried before: RowError where they pass whatever the code does."""
    prelude, tests = (_python(row, name) if name else "" for name in (options.prelude, options.tests))
    if not tests.strip():
        raise RowError("no tests", f"{options.tests!r} is blank; {_ALLOWED}")
    codes = [None, *(find_blocks(response["text"]) for response in row["responses"])]
    entry_point = row["columns"].get("entry_point")
    tried, *found = run_tests(codes, tests, options, prelude=prelude, entry_point=entry_point, running=running)
    if tried[0]:
        raise RowError("no tests", f"{options.tests!r} passes whatever the code does; {_ALLOWED}")
    return [float(passed) for passed, _ in found]


def _python(row: Row, name: str) -> str:
    value = column(row, name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise RowError("not Python", f"{name!r} is {kind_of(value)}, not a text or a list of texts")
    return "\n".join(texts)


def find_blocks(text: str) -> list[str]:
    """The Python in a response: the blocks that say so, else those of no language, or the text if it has no blocks.

    What was thought before the answer does not count.
    """
    text = text.replace("\r\n", "\n")
    if thought := _THOUGHT.match(text):
        text = text[thought.end() :]
    blocks: dict[str, list[str]] = {}
    for indent, _, name, code in _BLOCK.findall(text):
        code = re.sub(rf"^[ \t]{{1,{len(indent)}}}", "", code, flags=re.MULTILINE) if indent else code
        name = "python" if name.lower() in ("python3", "py") else name.lower()
        blocks.setdefault(name, []).append(code)
    return blocks.get("python", blocks.get("", [])) if blocks else [text]


def run_tests(
    codes: Sequence[list[str] | None],
    tests: str,
    options: Any,
    *,
    prelude: str = "",
    entry_point: str | None = None,
    running: set[subprocess.Popen[bytes]] | None = None,
) -> list[tuple[bool, str]]:
    """Of each code whether the tests came to their end within the limits, and what was written where they did not.

    Args:
        codes: the blocks of each; None tries the tests with a code of which nothing is known, and where they pass so it
            is the last that is run.
        running: holds the process that runs them as long as it is there.

    Raises:
        RowError: tests that cannot run, or of which something is left that nothing calls.
    """
    most_s = options.timeout_s + _STARTING_S
    job = {"prelude": prelude, "codes": codes, "tests": tests, "entry_point": entry_point}
    job |= {"memory_mib": options.memory_mib, "time_s": options.timeout_s, "most_s": most_s, "unsafe": options.unsafe}
    job["parent"] = os.getpid()
    running = set() if running is None else running
    with tempfile.TemporaryDirectory(prefix="simpo-code-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ},  # without it no Windows
            start_new_session=True,
        )
        running.add(process)
        try:
            written, _ = process.communicate(json.dumps(job).encode(), timeout=most_s * len(codes) + 60)
        except subprocess.TimeoutExpired:
            written = b""
        finally:
            _kill(process)
            process.wait()
            running.discard(process)
    if not written:
        raise RowError("not run", "the process that runs codes gave no answer")
    found = json.loads(written)
    if wrong := [said for passed, said in found if passed is None]:
        raise RowError("no tests", f"{wrong[0]}; {_ALLOWED}")
    return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # the latter is macOS's for one that has ended
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
