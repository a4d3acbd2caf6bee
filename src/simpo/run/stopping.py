"""How a run stops before its end: because it was asked to, because a number is not finite, or for want of memory.

Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from simpo.parallel.mesh import Mesh


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; nothing was updated. The message names the step and its rows."""


class OutOfMemory(RuntimeError):
    """Memory ran out where no smaller micro-batch helps. The message says where, and which keys need less."""


class Interrupted(RuntimeError):
    """The run was asked to stop, has saved itself, and says how to resume it."""

    exit_code = 130


class StoppedByGuard(Interrupted):
    """The guard stopped the run at a level of `guard: stop`; it has saved itself."""

    exit_code = 4


StepLosses = list[tuple[tuple[str, ...], Tensor]]
"""Of each micro-batch the names of its pairs, and their losses [P]."""


def not_finite(
    step: int, losses: StepLosses, mesh: Mesh, *, grad_norm: float | None, saved: str = ""
) -> NonFiniteError:
    """The error to raise on every process, all of which call this together.

    Args:
        step: of the optimizer, 0-based.
        losses: of this process.
        grad_norm: the gradient's norm where that is what is not finite; None where a loss is.
        saved: a sentence on the last checkpoint.
    """
    what, rows = f"the gradient norm is {grad_norm}", [row for row_ids, _ in losses for row in row_ids]
    if grad_norm is None:
        what = "a loss is not finite"
        finite = [(row_ids, torch.isfinite(values).tolist()) for row_ids, values in losses]
        rows = [row for row_ids, fine in finite for row, ok in zip(row_ids, fine, strict=True) if not ok]
    by_rank = mesh.gather(rows)
    named = [f"rank {rank}: {row}" for rank, theirs in enumerate(by_rank) for row in theirs] if by_rank[1:] else rows
    more = f" and {len(named) - 16} more" if len(named) > 16 else ""
    return NonFiniteError(
        f"step {step + 1}: {what}; nothing was updated. Rows: {', '.join(named[:16])}{more}. {saved}"
        "Look at these rows with simpo audit, or lower learning_rate or beta"
    )


_ASKS_TO_STOP = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def killed_by(code: int) -> str:
    """Of a child's exit code: the signal that ended it, and why, unless that asked it to stop; "" = nothing did."""
    if code >= 0 or -code in _ASKS_TO_STOP:
        return ""
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"it was killed by {name}" + ", as the system does where memory runs out" * (name == "SIGKILL")


@contextlib.contextmanager
def on_stop_signal(handler: Callable[[int, Any], Any] = signal.default_int_handler) -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and the end of the terminal call `handler`; by default they raise KeyboardInterrupt.

    What nohup, or a shell for what runs in the background, has this process ignore stays ignored. Threads other than
    the main one have no signals.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _ASKS_TO_STOP}
    before = {number: own for number, own in before.items() if own not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


def interrupted(step: int, total_steps: int, saved: Path) -> Interrupted:
    """The end of a run that was asked to stop after a step, with its checkpoint of that."""
    return Interrupted(
        f"stopped after step {step} of {total_steps} and saved {saved}; "
        "to resume, run the same command with --resume_from_checkpoint true"
    )


class StopRequest(threading.Event):
    """Set by the first Ctrl-C, SIGTERM or SIGHUP while `listening`: stop after this step. A second Ctrl-C does at once.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the signals of this process come here."""
        return on_stop_signal(self._request)

    def _request(self, number: int, frame: Any) -> None:
        if self.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.set()
        self._say("stopping after this step; once more to stop at once without saving")


@contextlib.contextmanager
def interruptible(progress: Callable[[], str]) -> Iterator[None]:
    """Around work that loses nothing when it ends at any moment: Ctrl-C, SIGTERM and SIGHUP end it at once.

    Args:
        progress: says how far it has come.
    Raises:
        Interrupted: with that, and that the same command goes on.
    """
    try:
        with on_stop_signal():
            yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {progress()}; the same command goes on") from None


# What torch raises for want of memory without its own class for it: cuBLAS, cuDNN, other CUDA calls, the CPU; NCCL.
_OTHER_WORDS = (
    *("CUBLAS_STATUS_ALLOC_FAILED", "error: out of memory", "can't allocate memory"),
    *("'out of memory'", "Failed to CUDA "),
)


def missing_memory(error: BaseException) -> str | None:
    """What an error says could not be allocated, for people; None where it is about something else than memory."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and not any(words in text for words in _OTHER_WORDS):
        return None
    found = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    return f"{found[1]} more were asked for" if found else "some allocation failed"


def name_step(mesh: Mesh, step: int) -> str:
    """A 0-based optimizer step, and of several processes this one's rank, for people."""
    return f"rank {mesh.rank}, step {step + 1}" if mesh.sizes.world > 1 else f"step {step + 1}"


@contextlib.contextmanager
def needs_memory(what: str, *, advice: str) -> Iterator[None]:
    """Around work that cannot be made smaller from here: want of memory becomes one line.

    Args:
        what: the work.
        advice: which keys need less.
    Raises:
        OutOfMemory: instead of torch's error, which would keep everything alive that the work had in hand.
    """
    missing = None
    try:
        yield
    except RuntimeError as error:
        missing = missing_memory(error)
        if missing is None:
            raise
    if missing is not None:
        raise OutOfMemory(f"{what}: out of memory ({missing}); {advice}")
