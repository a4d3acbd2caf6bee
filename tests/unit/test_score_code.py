"""Code against its tests: what passes, and what the code of a response cannot do to the machine or to its score."""

from __future__ import annotations

import doctest
import functools
import gzip
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from simpo.data.columns import RowError
from simpo.onpolicy.scorers import build_rater
from simpo.onpolicy.scorers import code as scorer
from simpo.onpolicy.scorers.code import find_blocks, run_tests
from simpo.recipe import load_recipe
from simpo.recipe.scorers import read_scorer

TESTS = "assert f(1) == 2"


def options(**more: Any):
    return read_scorer({"kind": "code", "timeout_s": 1, "memory_mib": 256, **more})[1]


def passes(code: str, **more: Any) -> bool:
    return run_tests([[code]], TESTS, options(**more))[0][0]


def test_code_passes_when_its_tests_come_to_their_end():
    assert passes("def f(x): return x + 1")
    assert not passes("def f(x): return x")
    assert not passes("def f(x): return x +")


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import atexit; atexit.register(print, 'ok'); raise SystemExit",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed')\n    except OSError: pass",
        "print('1 passed'); 1 / 0",
    ],
)
def test_a_faked_success_is_none(code: str):
    assert not passes(code)


@pytest.mark.parametrize(
    "code",
    [
        "import time; time.sleep(60)",
        "while True: pass",
        "while True: print('x' * 10**6)",
        "x = [bytearray(10**7) for _ in range(10**4)]",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "import os\nwhile True:\n    os.write(os.memfd_create('a'), b'x' * 10**6)",
    ],
    ids=["sleeper", "spinner", "writer", "eater", "fork bomb", "thread bomb", "files in memory"],
)
def test_what_would_not_end_ends(code: str):
    began = time.monotonic()
    assert not passes(code)
    assert time.monotonic() - began < 5


def test_a_sleeper_that_sets_its_timer_aside_ends_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("simpo.onpolicy.scorers.code._STARTING_S", 0.5)
    assert not passes("import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(60)")


@pytest.mark.parametrize(
    "deed",
    [
        "os.fork()",
        "subprocess.run(['true'])",
        "os.execv('/bin/true', ['true'])",
        "socket.socket()",
        "socket.create_connection(('127.0.0.1', 80), timeout=1)",
        "os.kill(os.getppid(), 0)",
        "open('/proc/%d/environ' % os.getppid())",
        "os.listdir(HOME)",
        "open(HOME + '/secret')",
        "open(HOME + '/secret', 'a')",
        "open('here', 'w')",
        "os.unlink(HOME + '/secret')",
        "os.chmod(HOME, 0o777)",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "os.setuid(1)",
    ],
)
def test_it_can_do_nothing_to_the_machine(deed: str, tmp_path: Path):
    (tmp_path / "secret").touch()
    code = f"import os, resource, socket, subprocess\nHOME = {str(tmp_path)!r}\n"
    code += f"try: {deed}\nexcept (OSError, ValueError): f = lambda x: 2"
    assert passes(code)
    assert (tmp_path / "secret").exists()


def test_threads_and_libraries_work_and_nothing_of_the_environment_is_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKEN", "secret")
    assert passes(
        "import asyncio, os, threading\nfrom dataclasses import dataclass\nfrom decimal import Decimal\n"
        "@dataclass\nclass Number:\n    value: 'int'\n"
        "async def one(): return 1\n"
        "found = []\nthread = threading.Thread(target=lambda: found.append(1)); thread.start(); thread.join()\n"
        "def f(x): return Number(asyncio.run(one()) + found[0] - len({*os.environ} - {'LC_CTYPE'})).value"
    )


def test_no_process_stays_behind():
    passes("import os\nos.setsid() if os.getpid() != os.getsid(0) else None\nimport time; time.sleep(60)")
    mine = scorer._JAIL.name
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not [command for command in commands if mine.encode() in command and b"-I" in command]


def test_a_machine_that_cannot_lock_code_up_is_refused_unless_the_recipe_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = scorer._JAIL.read_text()
    (tmp_path / "jail.py").write_text(source.replace("platform.machine()", "'pdp11'"))
    monkeypatch.setattr(scorer, "_JAIL", tmp_path / "jail.py")
    recipe = load_recipe({"model_name_or_path": "any"})
    with pytest.raises(ValueError, match=r"there is no isolation for linux on pdp11.*or set unsafe: true"):
        build_rater("code", options(), recipe)
    build_rater("code", options(unsafe=True), recipe)
    assert passes("def f(x): return 2", unsafe=True)


def test_which_text_is_code():
    assert find_blocks("x = 1") == ["x = 1"]
    assert find_blocks("So:\n```python\nx = 1\n```\nthen\n```py\ny = 2\n```\n```bash\nls\n```") == [
        "x = 1\n",
        "y = 2\n",
    ]
    assert find_blocks("```\nx = 1\n```\nthen\n```\ny = 2\n```\nand\n```bash\nls\n```") == ["x = 1\n", "y = 2\n"]
    assert find_blocks("```py\nx = 1\n") == ["x = 1\n"]
    assert find_blocks("```java\nx\n```") == []


@pytest.mark.parametrize(
    "text",
    [
        "```python\nCODE\n```\nIt prints:\n```\nHello, World!\n```",
        "```\nCODE\n```\nIt prints:\n```\n>>> add(2, 3)\n5\n```",
        "```python\ndef add(a, b:\n```\nNo:\n```python\nCODE\n```\n```python\n>>> add(2, 3)\n5\n```",
        "1. This:\n\n   ```python\n   CODE\n   ```\n2. Done",
        "- ```python\n  CODE\n  ```\n- Done",
        "<think>\n```python\ndef add(a, b:\n```\n</think>\n\n```python\nCODE\n```",
        "<think>\nSum them.\n</think>\nCODE",
        "~~~python\nCODE\n~~~\nIt adds.",
        "````python\nDOC = '''\n```\n'''\nCODE\n````\nIt adds.",
        "``` {.python title=x}\nCODE\n```\nIt adds.",
        "Call ```add``` so:\n```add(1, 2)```\n```python\nCODE\n```\nIt adds.",
        "```python\r\nCODE\r\n```\r\nIt adds.",
        "```python\nEND = '</think>'\nCODE\n```\nIt adds.",
    ],
    ids=str,
)
def test_code_is_found_in_any_markdown(text: str):
    found = find_blocks(text.replace("CODE", "def add(a, b): return a + b"))
    assert run_tests([found], "assert add(2, 3) == 5", options())[0][0]


def test_a_block_keeps_the_indent_that_continues_the_prelude():
    found = find_blocks("```python\n    return a + b\n```\nIt adds.")
    assert run_tests([found], "assert add(2, 3) == 5", options(), prelude="def add(a, b):")[0][0]


RIGHT, WRONG = (f"```python\ndef add(a, b):\n    return a {sign} b\n```" for sign in "+-")
CHECK = "METADATA = dict(a=1)\ndef check(candidate):\n    assert candidate(2, 3) == 5\n"
UNITTEST = "import unittest\nclass Adding(unittest.TestCase):\n    def test_one(self): self.assertEqual(add(2, 3), 5)\n"


@functools.cache
def rater(**more: Any):
    return build_rater("code", options(timeout_s=5, **more), load_recipe({"model_name_or_path": "any"}))


def rate(tests: Any, **columns: Any) -> Any:
    """What a right and a wrong response get, or the reason that none gets anything."""
    row = {"id": "a", "responses": [{"text": RIGHT}, {"text": WRONG}], "columns": {"tests": tests, **columns}}
    [(_, scores)] = rater(prelude="prelude" if "prelude" in columns else None).rate([row])
    return scores


@pytest.mark.parametrize(
    ("tests", "columns"),
    [
        ("assert add(2, 3) == 5", {}),
        (["assert add(0, 0) == 0", "assert add(2, 3) == 5"], {}),
        (["def one():", "    assert add(2, 3) == 5", "one()"], {}),
        ("from solution import add\ndef test_add(): assert add(2, 3) == 5", {}),
        (["def test(): assert add(2, 3) == 5", "def test(): assert add(0, 0) == 0"], {}),
        ("def same(a, b): assert a == b\ndef test_add(): same(add(2, 3), 5)", {}),
        ("async def test_add(): assert add(2, 3) == 5", {}),
        ("def test_add(): assert add(2, 3) == 5\nif __name__ == '__main__': test_add()", {}),
        (
            "class TestAdd:\n    def setup_method(self): self.x = 5\n    def test_it(self): assert add(2, 3) == self.x",
            {},
        ),
        (UNITTEST, {}),
        (UNITTEST + "unittest.main()", {}),
        (UNITTEST + "unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(Adding))", {}),
        (CHECK + "check(add)", {}),
        (CHECK + "check(add)", {"entry_point": "add"}),
        (CHECK, {"entry_point": "add"}),
        ("equal(add(2, 3), 5)", {"prelude": ["import math", "def equal(a, b):", "    assert math.isclose(a, b)"]}),
        ("x: int = 5\ny = 0\ndel y\nassert [add(2, 3) for _ in range(x)] == [x] * x and 'x' in globals()", {}),
    ],
    ids=str,
)
def test_whatever_tests_there_are_are_run(tests: Any, columns: dict[str, Any]):
    assert rate(tests, **columns) == [1, 0]


def test_a_test_runs_once():
    tests = "from solution import *\nruns = []\ndef test_once():\n    runs.append(add(1, 1))\n    assert runs == [2]\n"
    assert (
        rate(tests + "test_once()")
        == rate(tests)
        == rate(tests + "def test_twice(): test_once()\ntest_twice()")
        == [1, 0]
    )


@pytest.mark.parametrize(
    ("tests", "says"),
    [
        ("", "blank"),
        ([], "blank"),
        (["", "\n"], "blank"),
        ({"inputs": ["2 3"], "outputs": ["5"]}, "an object"),
        ([["assert add(2, 3) == 5"]], "a list, not"),
        (5, "a number"),
        ('{"inputs": ["2 3"], "outputs": ["5"]}', "passes whatever"),
        ('["assert add(2, 3) == 5"]', "passes whatever"),
        ("# assert add(2, 3) == 5", "passes whatever"),
        ("print(add(2, 3))", "passes whatever"),
        ("try: assert add(2, 3) == 5\nexcept Exception: print('failed')", "passes whatever"),
        ("assert (add(2, 3) == 5, 'sum')", "passes whatever"),
        ("def test_add(): return add(2, 3) == 5", "passes whatever"),
        (CHECK, "nothing calls check;"),
        ("from solution import *\n" + CHECK, "nothing calls check;"),
        ("def test_add(a, b): assert add(a, b) == 5", "nothing calls test_add;"),
        ("def test_one(): assert add(2, 3) == 5\ndef test_add(a, b): assert add(a, b) == 5", "nothing calls test_add;"),
        ("class TestAdd:\n    def test_it(self, a): assert add(a, 3) == 5", r"nothing calls TestAdd\.test_it;"),
        (">>> add(2, 3)\n5", "cannot run here"),
        ("from no_such_module import add\nassert add(2, 3) == 5", "cannot run here.*no_such_module"),
    ],
    ids=str,
)
def test_tests_that_test_nothing_leave_their_row_out(tests: Any, says: str):
    error = rate(tests)
    assert isinstance(error, RowError)
    assert re.search(says, str(error))


def test_a_row_starts_one_process_and_nothing_of_one_code_reaches_the_next(monkeypatch: pytest.MonkeyPatch):
    own, started, start = rater(prelude=None), [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(args) or start(*args, **more))
    texts = ["import builtins\nbuiltins.add = lambda a, b: a + b", "x = 1", "import os; os._exit(0)", RIGHT]
    rows = [
        {"id": each, "responses": [{"text": text} for text in texts], "columns": {"tests": "assert add(2, 3) == 5"}}
        for each in "ab"
    ]
    assert dict(own.rate(rows)) == {"a": [1, 0, 0, 1], "b": [1, 0, 0, 1]}
    assert len(started) == 2


def test_a_scorer_that_is_left_leaves_at_once(monkeypatch: pytest.MonkeyPatch):
    rows = [{"id": "a", "responses": [{"text": RIGHT}], "columns": {"tests": "assert add(2, 3) == 5"}}]
    rows += [{"id": "b", "responses": [{"text": "while True: pass"}] * 8, "columns": {"tests": "assert add(2, 3)"}}]
    rated = rater(prelude=None).rate(rows)
    assert next(rated) == ("a", [1])
    began = time.monotonic()
    rated.close()
    assert time.monotonic() - began < 4


def test_real_solutions_pass_and_real_bugs_are_found(real_data: Path):
    """HumanEvalPack's Python: solutions and one-bug versions, against the examples in the prompts' docstrings."""
    rater = build_rater("code", options(timeout_s=5), load_recipe({"model_name_or_path": "any"}))
    rows = []
    with gzip.open(real_data / "code_humanevalpack" / "train.jsonl.gz", "rt") as lines:
        for pair in filter(lambda pair: pair["source"].endswith("/python"), map(json.loads, lines)):
            docstring = re.search(r'"""(.*?)"""', pair["prompt"][0]["content"], re.DOTALL)
            found = doctest.DocTestParser().get_examples(docstring[1]) if docstring else []
            tests = [f"assert {each.source.strip()} == ({each.want.strip()})" for each in found if each.want.strip()]
            if len(tests) > 1:
                texts = [{"text": pair[side][0]["content"]} for side in ("chosen", "rejected")]
                rows.append(
                    {"id": pair["id"], "prompt": pair["prompt"], "responses": texts, "columns": {"tests": tests}}
                )
    scores = [scores for _, scores in rater.rate(rows[:12])]
    # Of all 44 with examples 43 solutions pass (one docstring, among these, is wrong), and one bug that none shows.
    assert [sum(each[side] for each in scores) for side in (0, 1)] == [11, 0]
