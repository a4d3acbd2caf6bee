"""The whole plan: every part in a process of its own with a time of its own, and a table of what they found.

A part writes its JSON file itself, row by row (`report.Report`); how it ended is added to that file here, and
`table.md` is made again from the files alone after each. A part that crashes, hangs or runs out of memory costs its
own results and no others. Must not import torch: the GPU's memory and the first seconds belong to the parts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRACE_S = 8.0
"""A part is told to end so much before it is killed: it has to finish a step and write."""
CLOSING_S = 4.0
"""What is kept of the whole time for the last table."""
OUTCOMES = {0: "done", 1: "WRONG", 2: "cannot run here", 3: "cut short", 4: "failed"}
"""By exit code of a part's command."""
PARITY = ("kernels", "parity")
"""The parts that say whether training is right here."""
TABLE = "table.md"


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: of the part and its JSON file.
        limit_s: seconds it may take, its start included, of a whole plan that has all its time.
        least_s: with less it is not begun.
        words: its command, as typed behind `gpu.py`.
        small: words added for a rehearsal on a CPU.
    """

    name: str
    limit_s: float
    least_s: float
    words: str
    small: str = ""


def run_parts(
    parts: Sequence[Part],
    folder: Path,
    *,
    minutes: float,
    command_of: Callable[[Part, float], list[str]],
    environment: Mapping[str, str] | None = None,
    remarks: Sequence[str] = (),
    say: Callable[[str], None] = print,
    began: float | None = None,
) -> int:
    """Run parts in turn within the time.

    Their limits are in proportion to the table's, and what a part leaves of its time is there for the next ones.

    Args:
        folder: for the results; files of parts of these names are replaced.
        minutes: for all of it.
        command_of: the command of a part that has so many seconds.
        remarks: lines for the table.
        began: reading of `time.monotonic` when the time began to run.
    Returns:
        0: all is done and right. 1: parity was checked and does not hold, or was not seen to the end; 2: the first
        part cannot run here; 3: parity holds, and something else is wrong, failed, or was cut short or skipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        folder.joinpath(f"{part.name}.json").unlink(missing_ok=True)
    began = time.monotonic() if began is None else began
    end = began + 60 * minutes - CLOSING_S
    share = (end - time.monotonic()) / sum(part.limit_s for part in parts)
    until, codes = time.monotonic(), {}
    with _interruptible():
        try:
            for part in parts:
                until += share * part.limit_s
                codes[part.name] = run_part(part, folder, until, command_of, environment, say)
                _write_table(folder, parts, remarks)
                if codes[part.name] == 2 and len(codes) == 1:
                    return 2
        finally:
            text = _write_table(folder, parts, remarks)
            say("")
            say(text)
            say(f"written: {folder}")
    checked = [code for name, code in codes.items() if name in PARITY]
    return 1 if any(checked) else 3 if any(codes.values()) else 0


def run_part(
    part: Part,
    folder: Path,
    until: float,
    command_of: Callable[[Part, float], list[str]],
    environment: Mapping[str, str] | None,
    say: Callable[[str], None],
) -> int:
    """One part; its exit code (as in `OUTCOMES`, 4 for whatever a signal ended), kept in its file with the reason."""
    began = time.monotonic()
    limit_s = until - began
    say(f"\n=== {part.name}: {part.words} ({limit_s:.0f} s)")
    if limit_s < part.least_s:
        reason = f"{limit_s:.0f} s were left, and it needs {part.least_s:.0f}"
        say(f"skipped: {reason}")
        _keep(folder, part, {"how": "skipped", "reason": reason, "seconds": 0.0, "limit_s": limit_s, "exit_code": 3})
        return 3
    outcome: dict[str, Any] = {"how": "interrupted", "reason": "the whole run was stopped", "exit_code": 4}
    log: deque[str] = deque(maxlen=40)
    try:
        code = _run(command_of(part, limit_s - GRACE_S), limit_s, log, environment, say)
        outcome = {"how": OUTCOMES.get(code or 0, "failed"), "reason": "", "exit_code": code}
        if code is None:
            outcome = {"how": "killed", "reason": f"not at its end after {limit_s:.0f} s", "exit_code": 4}
        elif code < 0 or code > 4:
            name = signal.Signals(-code).name if code < 0 else code
            outcome = {"how": "failed", "reason": f"ended by {name}", "exit_code": 4}
        if outcome["exit_code"] in (2, 4) and code is not None and log:
            outcome["reason"] = "; ".join(filter(None, (outcome["reason"], log[-1].strip()[:200])))
    finally:
        outcome |= {"seconds": time.monotonic() - began, "limit_s": limit_s}
        _keep(folder, part, outcome | ({} if outcome["how"] == "done" else {"last_lines": list(log)}))
    say(f"=== {part.name}: {outcome['how']} after {outcome['seconds']:.0f} s {outcome['reason']}")
    return outcome["exit_code"]


def _run(
    command: Sequence[str],
    limit_s: float,
    log: deque[str],
    environment: Mapping[str, str] | None,
    say: Callable[[str], None],
) -> int | None:
    """Run a command, passing on what it says; its exit code, None = killed when the time was over."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=dict(os.environ) | dict(environment or {}),
        process_group=0,  # what it starts itself ends with it
    )

    def read() -> None:
        for line in process.stdout:
            log.append(line.rstrip("\n"))
            say(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver may not even die
            process.wait(timeout=10)
        reader.join(timeout=2)
        if not reader.is_alive():
            process.stdout.close()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, SIGTERM is an exception, so that the results so far are written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep(folder: Path, part: Part, outcome: dict[str, Any]) -> None:
    """How a part ended, in its own file, which is made where it wrote none."""
    path = folder / f"{part.name}.json"
    results = _read(path) or {"notes": [], "tables": [], "rows": []}
    results["outcome"] = {"part": part.name, "command": part.words, **outcome}
    write_whole(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, and have it on the disk on return."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


# --- the table -------------------------------------------------------------------------------------------------------


def _write_table(folder: Path, parts: Sequence[Part], remarks: Sequence[str] = ()) -> str:
    text = make_table(folder, [part.name for part in parts], remarks)
    write_whole(folder / TABLE, text)
    return text


def make_table(folder: Path, order: Sequence[str] = (), remarks: Sequence[str] = ()) -> str:
    """Everything that the folder's JSON files hold, as Markdown: how each part ended, then its tables and notes."""
    found = {path.stem: results for path in sorted(folder.glob("*.json")) if (results := _read(path))}
    names = [name for name in order if name in found] + [name for name in found if name not in order]
    lines = _heading([found[name] for name in names]) + [f"- {remark}" for remark in remarks]
    ended = [outcome for name in names if (outcome := found[name].get("outcome"))]
    cells = [[o["part"], o["how"], f"{o['seconds']:.0f}", f"{o['limit_s']:.0f}", o["reason"]] for o in ended]
    lines += [_verdict(ended), "", *_markdown(("part", "ended", "s", "of", "why"), cells)]
    for name in names:
        results = found[name]
        lines += ["", f"## {name}", ""]
        lines += [f"`{results['command']}`", ""] if results.get("command") else []
        lines += [show_conditions(results["conditions"]), ""] if results.get("conditions") else []
        for table in results.get("tables", ()):
            if table["cells"]:
                lines += [table["title"], ""] if table["title"] else []
                lines += [*_markdown(table["head"], table["cells"]), ""]
        lines += [f"- {note}" for note in results.get("notes", ())]
    return "\n".join(lines).rstrip() + "\n"


def _verdict(ended: Sequence[dict[str, Any]]) -> str:
    """Whether the other numbers mean anything."""
    codes = {outcome["part"]: outcome["exit_code"] for outcome in ended if outcome["part"] in PARITY}
    if any(codes.values()):
        return "**Parity does not hold, or was not seen to its end: until it does, no other number counts.**"
    return "**Parity holds.**" if set(codes) == set(PARITY) else "Parity was not checked in full here."


def show_conditions(conditions: Mapping[str, Any]) -> str:
    """What the numbers depend on, in a line."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in conditions.items()}
    return "; ".join(f"{name}: {value}" for name, value in shown.items() if value is not None)


def _heading(results: Sequence[dict[str, Any]]) -> list[str]:
    known = next((one for one in results if one.get("machine")), None)
    if known is None:
        return ["# nothing was measured", ""]
    machine, versions = known["machine"], known["versions"]
    gpu = (
        [f"{machine['gpu_memory_gib']} GiB", f"driver {machine['driver']}", f"CUDA {machine['cuda']}"]
        if machine["gpu"]
        else []
    )
    packages = [f"{name} {value}" for name, value in versions.items() if value]
    name = machine["gpu"] or f"A rehearsal on a CPU: {machine['cpu']}"
    return [
        f"# {name}",
        "",
        ", ".join([known["date"], *(f"{key} {machine[key]}" for key in gpu)]) + "; " + ", ".join(packages),
        "",
    ]


def _markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *cells)]
    rules = ["---" if index == 0 else "---:" for index in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rules, *rows[1:])]


# --- wheels ----------------------------------------------------------------------------------------------------------


def install_wheels(folder: Path) -> tuple[dict[str, str], str]:
    """Unpack wheels into a folder that the parts find first; their environment, and a remark.

    Raises:
        ValueError: no wheels there, or one that does not fit here.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ValueError(f"wheels: there is no .whl file in {folder}")
    site = tempfile.mkdtemp(prefix="gpu-wheels-")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run([*command, "--target", site, *wheels], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"wheels: {(done.stderr.strip() or 'pip failed').splitlines()[-1]} ({shlex.join(command[:5])})"
        )
    paths = [site, *filter(None, [os.environ.get("PYTHONPATH")])]
    names = ", ".join("-".join(wheel.name.split("-")[:2]) for wheel in wheels)
    return {"PYTHONPATH": os.pathsep.join(paths)}, f"carried: {names}"
