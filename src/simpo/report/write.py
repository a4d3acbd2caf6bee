"""Writes reports: which folder is what, where the page goes, and that a report which fails costs a run nothing.

write_report(["runs/first"])                    # -> runs/first/report.html and runs/first/report/*.png
write_report(["runs/first", "runs/second"])     # -> runs/report.html, the two compared
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from simpo.data.files import write_whole
from simpo.errors import one_line
from simpo.report.charts import to_png
from simpo.report.one_run import page_of_run
from simpo.report.page import render
from simpo.report.read import is_run, read_run
from simpo.report.rounds import is_rounds, page_of_rounds, runs_of_rounds
from simpo.report.several import page_of_runs
from simpo.run.lock import is_at_work

OFF = "SIMPO_REPORT"
"""In the environment, 0 keeps runs from leaving reports; `simpo report` writes them all the same."""


def report_path(folder: str | Path) -> Path:
    """Where the report of a folder lies."""
    return Path(folder) / "report.html"


def write_report(
    folders: Sequence[str | Path], output: str | Path | None = None, *, reload_s: int | None = None
) -> Path:
    """Write the report of a run, of rounds, or of several runs compared, and charts as PNG beside it.

    Args:
        folders: output_dirs of runs or of `simpo rounds`, or folders that hold some.
        output: the page; by default report.html in the folder, or in the one that several share.
        reload_s: the page loads itself again after so many seconds.
    Raises:
        ValueError: a folder holds no run.
    """
    places = [Path(folder) for folder in folders]
    runs = find_runs(places)
    home = places[0] if len(places) == 1 else Path(os.path.commonpath([os.path.abspath(place) for place in places]))
    path = report_path(home) if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not _is_report(path):
        raise ValueError(f"{path}: is there already, is no report, and is not overwritten; choose another --output")
    if len(places) == 1 and is_rounds(home):
        page = page_of_rounds(home, path.parent)
    elif len(runs) == 1:
        page = page_of_run(read_run(runs[0]))
    else:
        page = page_of_runs([read_run(run) for run in runs], path.parent, title=home.resolve().name)
    pictures = path.with_suffix("") if path.suffix else path.with_name(f"{path.name}_files")
    for name, charts in page.pictures.items() if not reload_s else ():
        to_png(name, charts, pictures)
    write_whole(path, render(page, reload_s=reload_s, pictures=pictures.name))
    return path


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return b": simpo report</title>" in file.read(4096)


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The runs that folders are or hold.

    Raises:
        ValueError: a folder holds none.
    """
    found: list[Path] = []
    for place in places:
        if is_rounds(place):
            inside = runs_of_rounds(place)
        elif is_run(place):
            inside = [place]
        else:
            below = [*sorted(place.glob("*/")), *sorted(place.glob("trial-*/*/run/"))]  # the latter of `simpo sweep`
            inside = [each for each in below if is_run(each)]
        if not inside and not is_rounds(place):
            what = "no run in it (no metrics.jsonl)" if place.is_dir() else "no such folder"
            raise ValueError(f"{place}: {what}; name the output_dir of a run, or a folder that holds some")
        found += inside
    return list(dict.fromkeys(found))


def try_report(folders: Sequence[Path], say: Callable[[str], None], output: Path | None = None) -> None:
    """`write_report`, unless `OFF` is set; what goes wrong with it is one line."""
    if os.environ.get(OFF) == "0":
        return
    try:
        say(f"report: {write_report(folders, output)}")
    except Exception as error:
        say(f"report: not written ({one_line(error)}); the run is not touched by that")


@contextmanager
def leave_report(folder: str | Path, say: Callable[[str], None], *, is_main: bool = True) -> Iterator[None]:
    """Around a run: at its end, however it ends, its report is written; what goes wrong with that is one line.

    Args:
        folder: the run's output_dir.
        say: shows a line.
        is_main: of several processes one writes.
    """
    place, at_once = Path(folder), False
    try:
        yield
    except KeyboardInterrupt:
        at_once = not is_rounds(place)  # the second Ctrl-C
        raise
    finally:
        if is_main and not at_once and (is_run(place) or is_rounds(place)):
            try_report([place], say)


def watch_runs(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    say: Callable[[str], None],
) -> None:
    """Write the report whenever a run has logged more; the page follows by itself.

    It ends when nobody is at work and all runs have their models, or nobody has been for a minute.
    """
    seen: list[tuple[int, int]] = []
    said, quiet_s = False, 0.0
    while True:
        runs = find_runs(places := [Path(folder) for folder in folders])  # rounds and trials become more
        quiet_s = 0.0 if any(map(is_at_work, {*places, *runs})) else quiet_s + _EVERY_S
        done = quiet_s >= (_EVERY_S if all((run / "model").is_dir() for run in runs) else _QUIET_S)
        files = [run / name for run in runs for name in _GROWING]
        now = [(stat.st_mtime_ns, stat.st_size) for file in files if file.is_file() for stat in [file.stat()]]
        if now != seen or done:
            path = write_report(folders, output, reload_s=None if done else _RELOAD_S)
            seen = now
            if not said or done:
                say(f"report: {path}" + ("" if done else " (follows the run until it ends; Ctrl-C to leave)"))
                said = True
        if done:
            return
        time.sleep(_EVERY_S)


_GROWING = ("metrics.jsonl", "generations.jsonl", "guard.jsonl")
_EVERY_S = 2.0
_RELOAD_S = 5
_QUIET_S = 60.0
