"""The machine a benchmark ran on, and the memory of this process."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
PACKAGES = ("simpo", "torch", "transformers", "trl", "liger-kernel", "accelerate", "datasets", "numpy", "triton")
PACKAGES += ("tokenizers", "peft", "bitsandbytes", "pydantic", "flash-attn", "flash-attn-3")
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bf16 peak by a part of the GPU's name, as its maker states it; the first that fits counts."""


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, and what this process may use of them; no torch needed."""
    model, flags = "unknown", set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        entries = {key.strip(): value.strip() for key, value in lines.items()}
        model, flags = entries.get("model name", model), set(entries.get("flags", "").split())
    return {
        "cpu": model if model != "unknown" else platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def package_versions() -> dict[str, str | None]:
    """Versions of what takes part; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def git_commit() -> str | None:
    """The checkout's commit, with + behind it where files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "--short=12", "HEAD").strip()
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_tflops(gpu: str) -> float | None:
    """The dense bf16 peak that MFU is stated against; None for a GPU that is not known here."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu), None)


def resident_gib(field: str) -> float:
    """Memory of this process: `VmRSS` now, `VmHWM` at its peak.

    Read from /proc where there is one: getrusage's peak of a child also holds its parent's from before the exec.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def available_gib() -> float | None:
    """Memory that the system can still give out; None where it does not say."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    return None
