"""What is shown on the terminal: notices, progress bars, evaluations, where everything lies.

On a terminal a live bar; elsewhere (a log file, CI) one line per logged step.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class _StepBar(Progress):
    """A bar whose numbers stand in a line of their own below it: both fit 60 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(task.fields["numbers"], no_wrap=True, overflow="crop") for task in self.tasks)


class Display:
    """Prints to a rich console; `Display(quiet=True)` prints nothing."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(quiet=quiet, highlight=False, soft_wrap=True)
        self._has_bar = False

    def say(self, text: str, *, style: str = "") -> None:
        """As `say`."""
        say(text, self.console, style=style)

    @contextlib.contextmanager
    def progress(self, total_steps: int, done: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """A bar over optimizer steps on a terminal, elsewhere nothing. Gives a function that shows a step's numbers."""
        columns = (
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            _bar(self.console, beside=36),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        self._has_bar = _is_live(self.console)
        with _StepBar(*columns, console=self.console, disable=not self._has_bar) as bar:
            task = bar.add_task("train", total=total_steps, completed=done, numbers="")

            def show(step: int, values: Mapping[str, float]) -> None:
                bar.update(task, completed=step, numbers=format_numbers(values, width=self.console.width))

            yield show

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
        """A two-column table; a line for each row, and for each item of one, where no terminal has a width."""
        self.console.print(title, style="bold", markup=False)
        keys = max(map(len, rows), default=0)
        for key, value in rows.items():
            for place, item in enumerate(value if isinstance(value, list) else [value]):
                line = f"  {key if place == 0 else '':<{keys}}  {item}"
                self.console.print(_fold(line, self.console, hang=keys + 4), markup=False)


_COMMAND = re.compile(r" *(start: )?(simpo|torchrun) ")


_UNSEEN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")


def visible(text: str) -> str:
    """Text whose characters that command a terminal, or turn its direction of writing, stand as escapes: data may
    hold any."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str, console: Console | None = None, *, style: str = "") -> None:
    """Print lines; where a terminal is narrower, each is folded between words, below where its last column begins.

    A command that is to be typed stays whole, so that it can be copied.

    Args:
        console: None = stdout.
        style: a colour of rich.
    """
    console = console or Console()
    for line in visible(text).split("\n"):
        columns = (found.end() for found in re.finditer(r"(?<=\S)  +(?=\S)", line))
        begins = [place for place in columns if place <= console.width / 2]
        hang = begins[-1] if begins else len(line) - len(line.lstrip()) + 2
        shown = line if _COMMAND.match(line) else _fold(line, console, hang=hang)
        console.print(shown, markup=False, highlight=False, style=style, soft_wrap=True)


def _fold(text: str, console: Console, *, hang: int) -> str:
    """Text as it is shown, each further line indented by `hang`; words (paths, that is) are never cut."""
    if not console.is_terminal or console.is_dumb_terminal or len(text) <= console.width:
        return text
    return textwrap.fill(
        text,
        max(console.width, hang + 20),
        subsequent_indent=" " * hang,
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _result(values: Mapping[str, float], prefix: str, of: str = "") -> str:
    names = ("loss", "rewards/accuracies", "rewards/margins")
    loss, accuracy, margin = (values[f"{prefix}_{name}{of}"] for name in names)
    return f"loss {loss:.4f}, accuracy {accuracy:.1%}, margin {margin:+.4f}"


def format_numbers(values: Mapping[str, float], *, width: int = 10_000) -> str:
    """Loss, accuracy, margin, the chosen log-prob (nats per token) and speed, as many of them as `width` holds."""
    parts = (
        f"loss {values['loss']:.4f}",
        f"acc {values['rewards/accuracies']:.0%}",
        f"margin {values['rewards/margins']:+.3f}",
        f"chosen {values['logps/chosen']:.3f}",
        f"{values['pairs_per_s']:.2f} pairs/s",
    )
    lines = ("  ".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((line for line in lines if len(line) <= width), "")


def _is_live(console: Console) -> bool:
    """Whether a bar can move there."""
    return console.is_terminal and not console.is_dumb_terminal and not console.quiet


def _bar(console: Console, *, beside: int) -> BarColumn:
    """A bar in a row that holds about so many other characters."""
    return BarColumn(bar_width=min(40, max(4, console.width - beside)))


_LINE_EVERY_S = 30.0


@contextlib.contextmanager
def counter(
    console: Console, title: str, total: int, *, done: int = 0, unit: str = ""
) -> Iterator[Callable[..., None]]:
    """A bar with speed and time left on a terminal, elsewhere a line now and then.

    Args:
        title: what is counted, of which `total` there are and `done` were there before.
        unit: of what the speed is said.
    Returns:
        A function that takes how many more are done, and how many units they took.
    """
    began = shown = time.monotonic()
    new, units = 0, 0.0
    beside = len(title) + 2 * len(str(total)) + len(unit) + 28
    columns = (
        TextColumn(title),
        _bar(console, beside=beside),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    has_bar = _is_live(console)
    with Progress(*columns, console=console, transient=True, disable=not has_bar) as bar:
        task = bar.add_task(title, total=total, completed=done, speed="")

        def advance(count: int, amount: float = 0.0) -> None:
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
