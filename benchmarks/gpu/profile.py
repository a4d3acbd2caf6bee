"""One training step under torch's profiler: which kernels take the time, how many are launched, who waits for the GPU.

Both are looked at apart: a profiled step says how often the host waited, a step in which every wait is a warning says
on which lines of code.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu.device import CudaMeter, Meter, first_line
from gpu.report import Report, digits

PROFILE_S = {"cuda": 20.0, "cpu": 2.0}
"""Time that a command keeps for it."""
MOST = 14
"""Lines of each table."""
COUNTED = {
    "kernel launches": r"cu(da)?LaunchKernel.*",
    "cudaStreamSynchronize": r"cudaStreamSynchronize",
    "cudaDeviceSynchronize": r"cudaDeviceSynchronize",
    "cudaEventSynchronize": r"cudaEventSynchronize",
    "cudaMemcpyAsync": r"cudaMemcpyAsync",
    "cudaMalloc": r"cudaMalloc|cuMemCreate",
}


def profile_step(report: Report, meter: Meter, what: str, work: Callable[[], Any]) -> None:
    """Keep a profile of `work` in the report; a profiler that does not work here is a note."""
    try:
        found = measure_profile(meter, work)
    except Exception as error:  # CUPTI may be missing, or not be allowed
        report.note(f"no profile: {first_line(error)}")
        return
    report.results["profile"] = {"of": what, **found}
    total = sum(kernel["seconds"] for kernel in found["kernels"]) or 1.0
    cells = [
        [kernel["name"][:70], str(kernel["count"]), digits(kernel["seconds"] * 1e3), f"{kernel['seconds'] / total:.1%}"]
        for kernel in found["kernels"][:MOST]
    ]
    busy = f"{total * 1e3:.4g} ms of kernels in a step of {found['seconds'] * 1e3:.4g} ms"
    report.add_table(f"One step ({what}): {busy}", ("kernel", "calls", "ms", "share"), cells)
    if found["calls"]:
        report.add_table(
            "Calls of one step (two waits for the device are the clock's)",
            ("call", "times"),
            [[k, str(v)] for k, v in found["calls"].items()],
        )
    if found["waits"]:
        waits = [[line, str(count)] for line, count in found["waits"].items()]
        report.add_table("Lines on which the host waits for the GPU", ("line", "times"), waits)


def measure_profile(meter: Meter, work: Callable[[], Any]) -> dict[str, Any]:
    """Kernels by time (operations on a CPU), runtime calls, and lines that synchronize, each of one run of `work`."""
    on_gpu = isinstance(meter, CudaMeter)
    seconds = min(meter.measure(work).seconds for _ in range(2))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, acc_events=True) as profiler:
        meter.measure(work)
    kernels, calls = read_events(profiler.key_averages(), on_gpu=on_gpu)
    return {"seconds": seconds, "kernels": kernels, "calls": calls, "waits": find_waits(work) if on_gpu else {}}


def read_events(events: Sequence[Any], *, on_gpu: bool) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Kernels, the longest first, and how often each of `COUNTED` was called.

    Those of `CudaMeter.measure` itself are among the latter: two waits for the device.
    """
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    times = [
        {
            "name": event.key,
            "count": event.count,
            "seconds": (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6,
        }
        for event in events
        if event.device_type == wanted
    ]
    calls = {
        name: sum(
            event.count for event in events if event.device_type == DeviceType.CPU and re.fullmatch(form, event.key)
        )
        for name, form in COUNTED.items()
    }
    return sorted(times, key=lambda row: -row["seconds"]), calls if on_gpu else {}


def find_waits(work: Callable[[], Any], cuda: Any = torch.cuda) -> dict[str, int]:
    """Lines of Python under which an operation waited for the GPU, with how often; the most frequent first."""
    before = cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            cuda.set_sync_debug_mode(before)
    lines = [f"{short_path(w.filename)}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return dict(Counter(lines).most_common())


def short_path(path: str) -> str:
    """Below the packages' or the source folder: nothing of this machine."""
    return re.sub(r".*/(site-packages|src|benchmarks)/", "", path)
