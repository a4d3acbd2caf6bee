"""What is shown on the terminal: notices, progress bars, evaluations, where everything lies.

On a terminal a live bar; elsewhere (a log file, CI) one line per logged step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Display:
    """Prints to a rich console; `Display(quiet=True)` prints nothing."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._has_bar = False

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def progress(self, total_steps: int, done: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """A bar over optimizer steps on a terminal, elsewhere nothing. Gives a function that shows a step's numbers."""
        columns = (
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        self._has_bar = self.console.is_terminal and not self.console.quiet
        with Progress(*columns, console=self.console, disable=not self._has_bar) as bar:
            task = bar.add_task("train", total=total_steps, completed=done, numbers="")
            yield lambda step, values: bar.update(task, completed=step, numbers=format_numbers(values))

    def log_step(self, step: int, total_steps: int, values: Mapping[str, float], *, left_s: float) -> None:
        """One line for a logged step, where there is no live bar."""
        if not self._has_bar:
            self.say(f"step {step}/{total_steps}  {format_numbers(values)}  {format_duration(left_s)} left")

    def say_evaluation(self, what: str, values: Mapping[str, float], *, prefix: str = "eval") -> None:
        """The held-out numbers of one evaluation; `what` was evaluated, and `prefix` begins the names of its values."""
        time_s, chosen, rejected = (values[f"{prefix}_{name}"] for name in ("time_s", "logps/chosen", "logps/rejected"))
        self.say(
            f"{what}: {_result(values, prefix)}, chosen {chosen:.3f} and rejected {rejected:.3f} nats/token "
            f"({values[f'{prefix}_pairs']:.0f} pairs, {time_s:.1f} s)"
        )
        begin = f"{prefix}_pairs/"
        for source, pairs in ((name[len(begin) :], n) for name, n in values.items() if name.startswith(begin)):
            self.say(f"  {source}: {_result(values, prefix, f'/{source}')} ({pairs:.0f} pairs)")

    def table(self, title: str, rows: Mapping[str, Any]) -> None:
        """A two-column table."""
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for key, value in rows.items():
            table.add_row(key, str(value))
        self.console.print(table)


def _result(values: Mapping[str, float], prefix: str, of: str = "") -> str:
    names = ("loss", "rewards/accuracies", "rewards/margins")
    loss, accuracy, margin = (values[f"{prefix}_{name}{of}"] for name in names)
    return f"loss {loss:.4f}, accuracy {accuracy:.1%}, margin {margin:+.4f}"


def format_numbers(values: Mapping[str, float]) -> str:
    """Loss, accuracy, margin and speed, as a short line."""
    return (
        f"loss {values['loss']:.4f}  acc {values['rewards/accuracies']:.0%}  "
        f"margin {values['rewards/margins']:+.3f}  {values['pairs_per_s']:.2f} pairs/s"
    )


@contextlib.contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, elsewhere nothing. Gives a function that advances it."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal or console.quiet or not total
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


_LINE_EVERY_S = 30.0


@contextlib.contextmanager
def counter(
    console: Console, title: str, total: int, *, done: int = 0, unit: str = ""
) -> Iterator[Callable[[int, float], None]]:
    """A bar with speed and time left on a terminal, elsewhere a line now and then.

    Args:
        title: what is counted, of which `total` there are and `done` were there before.
        unit: of what the speed is said.
    Returns:
        A function that takes how many are done now, and how many units they took.
    """
    began = shown = time.monotonic()
    new, units = 0, 0.0
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    has_bar = console.is_terminal and not console.quiet
    with Progress(*columns, console=console, transient=True, disable=not has_bar) as bar:
        task = bar.add_task(title, total=total, completed=done, speed="")

        def advance(count: int, amount: float) -> None:
            nonlocal new, units, shown
            new, units, now = new + count, units + amount, time.monotonic()
            elapsed = max(now - began, 1e-9)
            left = format_duration(elapsed / new * (total - done - new)) if new else "?"
            speed = f"{units / elapsed:,.0f} {unit}/s  {left} left" if unit else f"{left} left"
            bar.update(task, completed=done + new, speed=speed)
            if not has_bar and now - shown >= _LINE_EVERY_S:
                shown = now
                console.print(f"{title} {done + new}/{total}  {speed}", markup=False)

        yield advance


def format_duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
