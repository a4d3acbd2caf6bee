"""Fake tensors on a CUDA device, where torch is built without CUDA: a device guard that does nothing stands for one.

Forward passes run with it, autograd's graph included. Backward passes do not: autograd's engine wants streams of a
device that is there.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""


def pretend_cuda(folder: Path) -> None:
    """From here on this process can move fake tensors to "cuda"; skips the test where there is no C++ compiler."""
    if torch.backends.cuda.is_built():
        return  # fake tensor mode brings a guard of its own
    compiler, torch_folder = shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None:
        pytest.skip("needs g++")
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(_GUARD)
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10"]
    subprocess.run([compiler, str(source), *options, "-o", str(library)], check=True, timeout=120)
    ctypes.CDLL(str(library))


@contextmanager
def cuda_autocast(enabled: bool) -> Iterator[None]:
    """torch.autocast("cuda", bfloat16), which itself does nothing where there is no card."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class HostWaits(TorchDispatchMode):
    """Operations for which the host waits until the device has come to them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def on_card(values: object) -> bool:
            return any(isinstance(value, Tensor) and value.is_cuda for value in tree_leaves(values))

        reads = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            if reads and on_card(args):
                self.found.append(str(func))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            from_card = all(on_card(value) for value in args if isinstance(value, Tensor))
            if on_card(args) and not on_card(out):
                self.found.append(f"{func} to the host")
            elif on_card(out) and not from_card and not (kwargs or {}).get("non_blocking", args[2:] == (True,)):
                self.found.append(f"{func} from the host")
        return out
