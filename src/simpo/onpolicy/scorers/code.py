"""Code against its tests: Python from responses, each run in a process that `jail.py` locks up.

That keeps the machine from the code, not the score: code that lives in one process with its tests can deceive them,
with results that claim to be equal to anything, for one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from simpo.data.columns import RowError, kind_of
from simpo.onpolicy.scorers.rating import Rater, Row, Scores, column, guarded, windows

_JAIL = Path(__file__).with_name("jail.py")
_STARTING_S = 5.0  # for the process itself, which stops the code in time unless the code prevents it
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
    works, said = run_tests([], "", options)
    if not works:
        raise ValueError(
            f"nothing keeps the code of responses from the network and from your files here ({said or 'no process'}); "
            "run it on Linux from 5.13 on with Landlock and seccomp, or set unsafe: true"
        )

    def rate_rows(rows: Iterable[Row]) -> Iterator[tuple[str, Scores]]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = ThreadPoolExecutor(cores)  # each waits for one process
        try:
            for some in windows(rows):
                jobs = [
                    [threads.submit(_rate, row, each, options) for each in (None, *row["responses"])] for row in some
                ]
                for row, futures in zip(some, jobs, strict=True):
                    yield row["id"], guarded(lambda futures=futures: [future.result() for future in futures][1:])
        finally:
            threads.shutdown(cancel_futures=True)

    return Rater(rate_rows)


def _rate(row: Row, response: Any, options: Any) -> float:
    """A response's number. Without a response the tests are tried: RowError where they pass whatever the code does."""
    prelude, tests = (_python(row, name) if name else "" for name in (options.prelude, options.tests))
    if not tests.strip():
        raise RowError("no tests", f"{options.tests!r} is blank; {_ALLOWED}")
    blocks = None if response is None else find_blocks(response["text"])
    entry_point = row["columns"].get("entry_point")
    passed, _ = run_tests(blocks, tests, options, prelude=prelude, entry_point=entry_point)
    if response is None and passed:
        raise RowError("no tests", f"{options.tests!r} passes whatever the code does; {_ALLOWED}")
    return float(passed)


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
    blocks: list[str] | None, tests: str, options: Any, *, prelude: str = "", entry_point: str | None = None
) -> tuple[bool, str]:
    """Whether the tests came to their end within the limits, and what was written about them where they did not.

    Args:
        blocks: the code; None tries the tests with a code of which nothing is known.

    Raises:
        RowError: tests that cannot run, or of which something is left that nothing calls.
    """
    secret = secrets.token_hex(16).encode()
    job = {"prelude": prelude, "blocks": blocks, "tests": tests, "entry_point": entry_point}
    limits = {"memory_mib": options.memory_mib, "time_s": options.timeout_s, "unsafe": options.unsafe}
    line = json.dumps({**job, **limits}).encode() + b"\n"
    with tempfile.TemporaryDirectory(prefix="simpo-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_JAIL), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ},  # without it no Windows
            start_new_session=True,
        )
        try:
            process.communicate(line + secret, timeout=options.timeout_s + _STARTING_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
            process.wait()
        result = Path(folder, "result")
        written = result.read_bytes() if result.exists() else b""
    if written.startswith(secret) and written != secret:
        raise RowError("no tests", f"{written[len(secret) :].decode(errors='replace')}; {_ALLOWED}")
    return written == secret, written.decode(errors="replace")
