"""What is done to a command, and what it must come to all the same.

A command gets its test as a `Case`: its words, its folder's files, and what it promises. Each is then killed at its
file operations and at random moments, meets a full disk, files with a wrong bit, and a loss of power; afterwards the
same command is given again and has to come to what an undisturbed one comes to, or to say in a line why it does not.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chaos import layer
from chaos.layer import Plan

TRIALS = os.environ.get("SIMPO_CHAOS", "1")
"""Trials of each kind with each command: a number, or all, which is each operation once."""
RANDOM_KILLS = 40
LIMIT_S = 120
KILLED = -9
ENDED_WELL = (0, 3)  # 3: something was left out, and was said
Promises = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Case:
    """A command under test.

    Attributes:
        words: what follows `simpo`; given again after a kill.
        first: commands, as words, whose results it begins with.
        promises: name -> value, of a finished command's folder: what must be the same however often it was killed.
        progress: of a folder: how far the command has come, which may never become less; none = it starts anew.
        given: patterns of the files that the user gave: a wrong bit in one is another input.
        is_there: what the command may say, and exit with 2, where it is given again and was done.
        processes: that torchrun would start.
        prepare: MODULE:FUNCTION to call in the command's process first.
        env: variables on top of the environment.
    """

    words: Sequence[str]
    promises: Promises
    first: Sequence[Sequence[str]] = ()
    progress: Callable[[Path], int] = lambda root: 0
    given: Sequence[str] = ()
    is_there: str | None = None
    processes: int = 1
    prepare: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


class Server:
    """The process that commands are forks of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tests = Path(__file__).resolve().parents[1]
        env = {
            **os.environ,
            "LD_PRELOAD": str(layer.build_layer(folder)),
            "PYTHONPATH": os.pathsep.join(map(str, (tests.parent / "src", tests))),
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "SIMPO_REPORT": "0"},
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-m", "chaos.server"], env=env, **pipes)

    def run(
        self, case: Case, cwd: Path, *, plan: Plan | None = None, limit_s: float = LIMIT_S, learn: bool = False
    ) -> Ended:
        """The command, to its end or until it is killed.

        Args:
            learn: import in the server what it has imported in the end.
        """
        said = self.folder / "said.txt"
        said.unlink(missing_ok=True)
        env = dict(case.env)
        if case.processes > 1:
            from ranks import free_port

            world = {"WORLD_SIZE": str(case.processes), "LOCAL_WORLD_SIZE": str(case.processes)}
            env |= {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        request = {
            **{"words": ["-m", "simpo", *case.words], "env": env, "cwd": str(cwd), "said": str(said)},
            **{"plan": plan and str(plan.path), "limit_s": limit_s, "processes": case.processes},
            **{"prepare": case.prepare, "learn": str(self.folder / "modules") if learn else None},
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Ended(**answer, said=said.read_text(errors="replace") if said.exists() else "")

    def stop(self) -> None:
        with self._process:  # whose end closes its pipes
            self._process.stdin.close()


@dataclass(frozen=True)
class Ended:
    """What became of a command; `codes` of its processes."""

    codes: list[int]
    cpu_s: float
    wall_s: float
    said: str

    @property
    def code(self) -> int:
        """Of the process that failed by itself, where one did."""
        return next((each for each in self.codes if each not in (0, KILLED)), max(self.codes, key=abs))

    @property
    def is_fine(self) -> bool:
        return all(code in ENDED_WELL for code in self.codes)

    @property
    def last_words(self) -> str:
        return " | ".join(self.said.strip().splitlines()[-3:])[-600:]


class Table:
    """Trials of one kind with one command: which held, which did not, and what they took.

    Each is written down at once where `SIMPO_CHAOS_LOG` says.
    """

    all: list[Table] = []  # noqa: RUF012

    def __init__(self, kind: str, command: str) -> None:
        self.kind, self.command = kind, command
        self.held, self.failed, self.kills, self.cpu_s = 0, list[str](), 0, 0.0
        self._began = self.wall_s = time.monotonic()
        self.outcomes: dict[str, int] = {}
        Table.all.append(self)

    def add(self, where: str, fault: str | None, *ends: Ended, outcome: str = "") -> None:
        """A trial; `fault` None = it held."""
        self.held += fault is None
        if fault is not None:
            self.failed.append(f"{where}: {fault}")
        if outcome:
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.cpu_s += sum(end.cpu_s for end in ends)
        self.wall_s = time.monotonic() - self._began
        if path := os.environ.get("SIMPO_CHAOS_LOG"):
            with open(path, "a", encoding="utf-8") as file:
                line = {"kind": self.kind, "command": self.command, "where": where, "fault": fault, "outcome": outcome}
                line |= {"codes": [end.codes for end in ends], "cpu_s": round(sum(end.cpu_s for end in ends), 2)}
                file.write(json.dumps(line) + "\n")

    def check(self) -> None:
        """Raise AssertionError with the trials that did not hold, or where there was none."""
        assert self.held or self.failed, f"{self.kind}, {self.command}: nothing was tried"
        assert not self.failed, "\n".join([f"{len(self.failed)} of {self.held + len(self.failed)}:", *self.failed[:20]])


class Scene:
    """A command's folder: as it was given, as an undisturbed command leaves it, and its recorded operations.

    Args:
        build: fills the folder and gives the case.
    """

    def __init__(self, name: str, build: Callable[[Path], Case], server: Server, folder: Path) -> None:
        self.name, self.server = name, server
        self.root, self._before, self._aside = folder / "at", folder / "before", folder
        self.root.mkdir(parents=True)
        self.case = build(self.root)
        for words in self.case.first:
            done = server.run(replace(self.case, words=words), self.root)
            assert done.is_fine, done.said
        shutil.copytree(self.root, self._before)
        recording = folder / "recording"
        plan = Plan(folder / "plan", self.root, record=recording)
        self.whole = server.run(self.case, self.root, plan=plan, learn=True)
        assert self.whole.is_fine, self.whole.said
        self.num_operations = plan.count
        self.operations = layer.read_recording(recording)
        self.counted = [each for each in self.operations if each.kind != layer.SYNC]
        self.expected = dict(self.case.promises(self.root))
        self.files = self._names()
        assert self.expected

    def reset(self) -> None:
        """The folder as it was given."""
        shutil.rmtree(self.root)
        shutil.copytree(self._before, self.root)

    def run(self, mode: int = layer.NOTHING, at: int = 0, *, limit_s: float = LIMIT_S) -> Ended:
        plan = Plan(self._aside / "plan", self.root, mode, at)
        return self.server.run(self.case, self.root, plan=plan, limit_s=limit_s)

    def describe(self, at: int) -> str:
        """Operation number `at`, from 1."""
        if at > len(self.counted):
            return f"operation {at}"
        each = self.counted[at - 1]
        verbs = {layer.CREATE: "create", layer.WRITE: "write", layer.TRUNCATE: "cut", layer.RENAME: "rename"}
        verbs |= {layer.UNLINK: "unlink", layer.MKDIR: "mkdir", layer.RMDIR: "rmdir", layer.LINK: "link"}
        return f"{at} {verbs[each.kind]} {os.path.relpath(each.path, self.root)}"

    def difference(self, end: Ended) -> str | None:
        """Why what the command has come to is not what it promises; None where it is."""
        if not end.is_fine and not self.says_it_is_there(end):
            return f"ended with {end.codes}: {end.last_words}"
        if "Traceback" in end.said:
            return f"a traceback: {end.last_words}"
        try:
            found = self.case.promises(self.root)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        wrong = [name for name in {**self.expected, **found} if found.get(name) != self.expected.get(name)]
        return f"other {', '.join(wrong)}" if wrong else None

    def says_it_is_there(self, end: Ended) -> bool:
        return bool(self.case.is_there and re.search(self.case.is_there, end.said))

    def left_behind(self) -> set[str]:
        """Files that an undisturbed command would not have left, but for what was put aside on purpose."""
        return {name for name in self._names() - self.files if "_superseded" not in name}

    def _names(self) -> set[str]:
        return {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()}

    def choose(self, places: Sequence[Any], kind: str) -> list[Any]:
        """As many of these as shall be tried, in their order; the same for the same number."""
        wanted = len(places) if TRIALS == "all" else min(int(TRIALS), len(places))
        rng = random.Random(f"{self.name} {kind} {os.environ.get('SIMPO_CHAOS_SEED', 0)}")
        return [places[each] for each in sorted(rng.sample(range(len(places)), wanted))]


# --- what is done ----------------------------------------------------------------------------------------------------


def kill_at_operations(scene: Scene) -> Table:
    """Kill it before an operation, and in the middle of each write; then give it again."""
    table = Table("killed at a file operation", scene.name)
    places = [(layer.KILL, at) for at in range(1, scene.num_operations + 1)]
    places += [
        (layer.KILL_AMID, at)
        for at, each in enumerate(scene.counted, start=1)
        if each.kind == layer.WRITE and len(each.more) > 1
    ]
    come, rng = 0, random.Random(scene.name)
    for mode, at in sorted(scene.choose(places, table.kind), key=lambda place: place[1]):
        scene.reset()
        ends, before = [scene.run(mode, at)], come
        come = max(come, progress := scene.case.progress(scene.root))
        where = f"{'amid' if mode == layer.KILL_AMID else 'before'} {scene.describe(at)}"
        if progress < before:
            table.add(where, f"has come to {progress}, and had come to {before} by an earlier operation", *ends)
            continue
        if rng.random() < 0.5:  # and once more on its way
            ends.append(scene.run(layer.KILL, rng.randint(1, scene.num_operations)))
            where += ", and again"
        _killed(scene, table, where, *ends)
    return table


def kill_at_random(scene: Scene) -> Table:
    """Kill it after a random time, then give it again."""
    table, rng = Table("killed at random", scene.name), random.Random(scene.name)
    for number in scene.choose(range(RANDOM_KILLS), table.kind):
        scene.reset()
        limit_s = rng.uniform(0, 1.1 * scene.whole.wall_s)
        _killed(scene, table, f"{number}, after {limit_s:.3f} s", scene.run(limit_s=limit_s))
    return table


def _killed(scene: Scene, table: Table, where: str, *ends: Ended) -> None:
    again = scene.run()
    fault = scene.difference(again)
    for end in ends:
        table.kills += KILLED in end.codes
        if fault is None and KILLED not in end.codes and not end.is_fine and not scene.says_it_is_there(end):
            fault = f"ended with {end.codes} before it was killed: {end.last_words}"
    left = "" if fault or not scene.left_behind() else "left a file behind"
    table.add(where, fault, *ends, again, outcome=left)


def fill_disk(scene: Scene) -> Table:
    """The disk is full at an operation, for good or for a moment; then there is room and it is given again."""
    table = Table("full disk", scene.name)
    takes_room = [at for at, each in enumerate(scene.counted, start=1) if each.kind in layer.TAKES_ROOM]
    places = [*itertools.product((layer.FULL, layer.FULL_ONCE), takes_room), (layer.SHORT, 1)]
    for mode, at in scene.choose(places, table.kind):
        scene.reset()
        end = scene.run(mode, at)
        when = {layer.FULL: "from", layer.FULL_ONCE: "at", layer.SHORT: "short writes from"}[mode]
        where = f"{when} {scene.describe(at)}"
        fault = None
        if "Traceback" in end.said:
            fault = f"a traceback: {end.last_words}"
        elif KILLED in end.codes and scene.case.processes == 1:
            fault = "hung"
        elif mode == layer.SHORT or end.is_fine:
            fault = scene.difference(end)
            fault = fault and f"with exit {end.code}, {fault}"
        elif not re.search(r"disk (is|may be) full|No space left", end.said):
            fault = f"does not say that the disk is full: {end.last_words}"
        again = scene.run()
        table.add(where, fault or scene.difference(again), end, again, outcome=f"exit {end.code}")
    return table


def flip_bits(scene: Scene, flips: int = 3) -> Table:
    """A bit is wrong in a file that the command finds when it is given again, after it was killed or was done."""
    table = Table("one bit wrong", scene.name)
    stops = [scene.num_operations * part // 10 for part in (4, 6, 8, 9)] + [scene.num_operations + 1]
    kinds: dict[str, tuple[int, str]] = {}
    for at in stops:
        scene.reset()
        scene.run(layer.KILL, at)
        for name in sorted(scene._names()):
            is_given = any(Path(name).match(pattern) for pattern in scene.case.given)
            if not is_given and (scene.root / name).stat().st_size:
                kinds[re.sub(r"\d+", "N", name)] = (at, name)
    rng = random.Random(scene.name)
    for at, name in scene.choose([each for each in kinds.values() for _ in range(flips)], table.kind):
        scene.reset()
        before = scene.run(layer.KILL, at)
        path = scene.root / name
        content = bytearray(path.read_bytes() if path.exists() else b"")
        if not content:
            continue
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        end = scene.run()
        fault, outcome = scene.difference(end), "equal"
        is_named = path.name in end.said or path.parent.name in end.said
        if fault and "Traceback" not in end.said and not end.is_fine and 1 not in end.codes:
            fault, outcome = None, "refused" if is_named else "refused, the file not named"
        elif fault and end.is_fine:
            fault = f"silently {fault}"
        table.add(f"{name} bit {bit} of {8 * len(content)}, killed at {at}", fault, before, end, outcome=outcome)
    return table


def lose_power(scene: Scene) -> Table:
    """The power is lost after an operation, and with it what was not synced; then it is given again."""
    table = Table("power lost", scene.name)
    lose = [("names as synced, data as synced", False, False), ("all names, data as synced", True, False)]
    lose.append(("all names, some of the data", True, True))
    places = itertools.product(range(1, len(scene.operations) + 1), lose)
    for done, (what, all_names, some) in scene.choose(list(places), table.kind):
        unsynced = random.Random(done) if some else None
        layer.write_after_power_loss(
            scene._before, scene.root, scene.operations[:done], all_names=all_names, unsynced=unsynced
        )
        end = scene.run()
        each = scene.operations[done - 1]
        where = f"after {done} of {len(scene.operations)} ({os.path.relpath(each.path, scene.root)}), {what}"
        table.add(where, scene.difference(end), end)
    return table


def summary() -> Iterator[str]:
    """Every table, for people."""
    yield f"{'':<28}{'command':<14}{'kills':>6}{'held':>6}{'failed':>8}{'CPU s':>8}{'s':>7}"
    for table in Table.all:
        yield (
            f"{table.kind:<28}{table.command:<14}{table.kills:>6}{table.held:>6}{len(table.failed):>8}"
            f"{table.cpu_s:>8.0f}{table.wall_s:>7.0f}"
        )
        for outcome, count in sorted(table.outcomes.items(), key=lambda item: -item[1])[:6]:
            yield f"{'':<40}{count:>6} {outcome}"


KINDS = {
    "kill at operations": kill_at_operations,
    "kill at random": kill_at_random,
    "full disk": fill_disk,
    "one bit": flip_bits,
    "power": lose_power,
}
