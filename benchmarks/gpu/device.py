"""All that differs between a GPU and a CPU when something is measured: time, memory, running out of it, names.

Everything that calls into `torch.cuda` stands in `CudaMeter` or takes a device that is one.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from peers.machine import available_gib, resident_gib

from simpo.run.stopping import missing_memory

GIB = 2**30


class TimeUp(BaseException):
    """The command's time is over. Not an `Exception`, so that no library's handler swallows it."""


class Deadline:
    """When a command has to be done.

    Args:
        minutes: allowed, > 0.
        began: reading of `clock` when the command started.
    """

    def __init__(
        self, minutes: float, *, began: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._end = (clock() if began is None else began) + 60 * minutes

    @property
    def left_s(self) -> float:
        """Seconds that are left; negative when it has passed."""
        return self._end - self._clock()

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether something that takes so long can still be done."""
        return self.left_s > seconds


@contextlib.contextmanager
def stop_at(deadline: Deadline) -> Iterator[None]:
    """Inside, `TimeUp` is raised when the deadline passes: for what was begun in time and takes too long.

    Only the main thread can be interrupted, and only between two operations of Python.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if _is_swallowed(frame):
            signal.setitimer(signal.ITIMER_REAL, 0.01)  # again, when that is over
            return
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline.left_s))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_swallowed(frame: FrameType | None) -> bool:
    """Whether Python would print an exception that is raised here and go on: garbage is being collected."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in callbacks or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@dataclass(frozen=True)
class Measured:
    """One piece of work.

    Attributes:
        seconds: by CUDA events, or wall-clock time on a CPU.
        before_bytes: allocated when it began.
        peak_bytes: most that was allocated at one time while it ran.
    """

    seconds: float
    before_bytes: int
    peak_bytes: int

    @property
    def extra_bytes(self) -> int:
        """Peak beyond what was there before."""
        return self.peak_bytes - self.before_bytes


class CudaMeter:
    """Time and memory of one GPU; `cuda` is `torch.cuda`, or what stands in for it."""

    memory = "allocated on the GPU"

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self._cuda = device, cuda

    def measure(self, work: Callable[[], Any]) -> Measured:
        """Run it between two events; its peak of memory counts from its beginning."""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda.synchronize(self.device)
        before = self._cuda.memory_allocated(self.device)
        self._cuda.reset_peak_memory_stats(self.device)
        start.record()
        work()
        end.record()
        self._cuda.synchronize(self.device)
        return Measured(start.elapsed_time(end) / 1e3, before, self._cuda.max_memory_allocated(self.device))

    def allocated_bytes(self) -> int:
        """Bytes in tensors now."""
        return self._cuda.memory_allocated(self.device)

    def total_bytes(self) -> int:
        """Memory of the device."""
        return self._cuda.get_device_properties(self.device).total_memory

    def release(self) -> None:
        """Give back what no tensor holds, after running out of memory above all."""
        gc.collect()
        self._cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """The GPU's name, size, compute capability, driver and CUDA."""
        capability = self._cuda.get_device_capability(self.device)
        return {
            "gpu": self._cuda.get_device_name(self.device),
            "gpu_memory_gib": round(self.total_bytes() / GIB, 1),
            "compute_capability": ".".join(map(str, capability)),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }


class CpuMeter:
    """Wall-clock time and the process's resident memory, whose peak never falls: a rehearsal, no measurement."""

    memory = "resident, whole process, highest so far"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def measure(self, work: Callable[[], Any]) -> Measured:
        """Run it and look at the clock."""
        before = self.allocated_bytes()
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        return Measured(seconds, before, max(before, round(resident_gib("VmHWM") * GIB)))

    def allocated_bytes(self) -> int:
        """Resident memory now."""
        return round(resident_gib("VmRSS") * GIB)

    def total_bytes(self) -> int:
        """Memory that the system can give out."""
        return round((available_gib() or 4.0) * GIB)

    def release(self) -> None:
        """Drop what nobody refers to."""
        gc.collect()

    def describe(self) -> dict[str, Any]:
        """No GPU."""
        return {"gpu": None}


Meter = CudaMeter | CpuMeter


def pick_meter(device: str) -> Meter:
    """The meter for "cuda" or "cpu".

    Raises:
        ValueError: CUDA where there is none, with what can be done instead.
    """
    if device == "cpu":
        return CpuMeter(torch.device("cpu"))
    if not torch.cuda.is_available():
        raise ValueError(
            "device: no CUDA GPU is at hand, and these measurements mean nothing without one; to rehearse the same "
            "code on a CPU add --device cpu --model tiny"
        )
    return CudaMeter(torch.device("cuda", torch.cuda.current_device()))


def driver_version() -> str | None:
    """The NVIDIA driver's, as nvidia-smi says it; None where it does not."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0].strip() if said.strip() else None


def first_line(error: BaseException) -> str:
    """Of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def attempt(work: Callable[[], Any], meter: Meter) -> tuple[Any, str | None]:
    """Its result, or the reason why memory did not suffice, in one line; other errors go on."""
    try:
        return work(), None
    except RuntimeError as error:
        if missing_memory(error) is None:
            raise
        reason = first_line(error)
    meter.release()  # only here: the error held everything that its frames held
    return None, reason


def measure_median(meter: Meter, work: Callable[[], Any], *, repeats: int, warm_up: int) -> dict[str, float]:
    """Median, smallest and largest seconds of `repeats` runs, and the largest memory beyond what was there before."""
    for _ in range(warm_up):
        work()
    runs = [meter.measure(work) for _ in range(repeats)]
    times = [run.seconds for run in runs]
    return {
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
        "extra_bytes": max(run.extra_bytes for run in runs),
    }


def measure_ceiling(meter: Meter, *, size: int = 8192, repeats: int = 20, warm_up: int = 200) -> float:
    """TFLOP/s of one large bf16 product of random matrices, the median of several.

    The warm-up takes a third of a second on an H100, whose clock starts at a fifth of what it reaches.
    """
    generator = torch.Generator(meter.device).manual_seed(0)
    options = {"device": meter.device, "dtype": torch.bfloat16, "generator": generator}
    left, right = torch.randn(size, size, **options), torch.randn(size, size, **options)
    out = torch.empty_like(left)

    def work() -> None:
        torch.mm(left, right, out=out)

    seconds = measure_median(meter, work, repeats=repeats, warm_up=warm_up)["median_s"]
    return 2 * size**3 / seconds / 1e12
