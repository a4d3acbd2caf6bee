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

from simpo.onpolicy.scorers.rating import Rater, Row, Scores, column, guarded, windows

_JAIL = Path(__file__).with_name("jail.py")
_STARTING_S = 5.0  # for the process itself, which stops the code in time unless the code prevents it
_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)


def build(options: Any) -> Rater:
    """The scorer.

    Raises:
        ValueError: code cannot be locked up here.
    """
    works, said = run_tests("", "", options)
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
                jobs = [[threads.submit(_rate, row, each, options) for each in row["responses"]] for row in some]
                for row, futures in zip(some, jobs, strict=True):
                    yield row["id"], guarded(lambda futures=futures: [future.result() for future in futures])
        finally:
            threads.shutdown(cancel_futures=True)

    return Rater(rate_rows)


def _rate(row: Row, response: Any, options: Any) -> float:
    before = f"{column(row, options.prelude)}\n" if options.prelude else ""
    tests = column(row, options.tests)
    code = before + find_code(response["text"])
    return float(run_tests(code, "\n".join(tests) if isinstance(tests, list) else str(tests), options)[0])


def find_code(text: str) -> str:
    """The Python in a response: all its blocks of Python, or of no language, in order; the whole text without any."""
    blocks = _BLOCK.findall(text)
    python = [code for name, code in blocks if name.lower() in ("", "python", "python3", "py")]
    return "\n".join(python) if blocks else text


def run_tests(code: str, tests: str, options: Any) -> tuple[bool, str]:
    """Whether the tests came to their end within the limits, and what was written about them where they did not."""
    secret = secrets.token_hex(16).encode()
    job = {"code": code, "tests": tests, "memory_mib": options.memory_mib, "unsafe": options.unsafe}
    line = json.dumps({**job, "time_s": options.timeout_s}).encode() + b"\n"
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
    return written == secret, written.decode(errors="replace")
