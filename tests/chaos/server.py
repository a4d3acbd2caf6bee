"""Forks commands of a process that has imported torch and simpo, with the layer before their disk.

A program of its own, started with LD_PRELOAD: it answers a request, a JSON line on stdin, with what became of the
command. It has computed nothing, so that what forks from it may.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import forks
from chaos import layer

GRACE_S = 20  # that the other processes of a command get once one has ended


def become(request: dict[str, Any], rank: int) -> int:
    """In a fork: be the command that is asked for; its exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    said = forks._Stream(os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    env = {**os.environ, **request["env"]}
    if request["processes"] > 1:
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if request["plan"] is not None:
        env["CHAOS_PLAN"] = request["plan"]
        layer.arm(request["plan"])
    if request["prepare"]:
        module, _, name = request["prepare"].partition(":")
        getattr(importlib.import_module(module), name)()
    try:
        forks._become(request["words"], env, request["cwd"], [said, said])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def fork(request: dict[str, Any], rank: int) -> int:
    """Start one process of a command."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        code = become(request, rank)
        atexit._run_exitfuncs()
        if request["learn"]:
            with open(request["learn"], "w") as file:
                file.writelines(f"{name}\n" for name in list(sys.modules))
    except BaseException:
        traceback.print_exc()
    finally:
        for file in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                file.flush()
        os._exit(code)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run a command to its end, or until `limit_s`."""
    began, ends, cpu_s = time.monotonic(), {}, 0.0
    running = {fork(request, rank): rank for rank in range(request["processes"])}
    until = began + request["limit_s"]
    while running:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if not pid:
            if time.monotonic() > until:
                for each in running:
                    os.kill(each, signal.SIGKILL)
                until = float("inf")
            time.sleep(0.001)
            continue
        rank = running.pop(pid)
        ends[rank] = os.waitstatus_to_exitcode(status)
        cpu_s += usage.ru_utime + usage.ru_stime
        if ends[rank]:  # as a launcher does
            until = min(until, time.monotonic() + (0.02 if ends[rank] == -signal.SIGKILL else GRACE_S))
    codes = [ends[rank] for rank in sorted(ends)]
    if request["learn"] and os.path.exists(request["learn"]):
        with open(request["learn"]) as file:
            load(file.read().split())
    return {"codes": codes, "cpu_s": cpu_s, "wall_s": time.monotonic() - began}


def load(names: list[str]) -> None:
    """Import what commands need, once for all."""
    for name in names:
        if name not in sys.modules and name not in ("__main__", "frozen"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    load(forks.PRELOADED)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
