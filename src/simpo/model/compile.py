"""torch.compile for the repeated blocks of a transformer.

One compilation of a block serves all of its layers, and rows of every length. Packed attention stays outside: it loops
over ranges that are data.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from simpo.errors import first_line
from simpo.model.attention import unwrap
from simpo.parallel.sharding import original_class

BACKEND = "inductor"


def compile_blocks(
    model: nn.Module, *, device: torch.device, backend: str | Callable[..., Any] | None = None
) -> list[nn.Module]:
    """Compile the forward of every transformer block in place; names of parameters and hooks stay as they were.

    Nothing is compiled yet on return: that happens as the first rows come through.

    Args:
        device: where the model is.
        backend: of torch.compile; None = `BACKEND`.
    Returns:
        The blocks.
    Raises:
        ValueError: torch cannot compile for this device, or the model does not say what its blocks are.
    """
    blocks = find_blocks(unwrap(model))
    backend = BACKEND if backend is None else backend
    _try_compiler(device, backend)
    for block in blocks:
        _compile_block(block, backend)
    return blocks


def find_blocks(base: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model: members of a ModuleList whose class it lists as not to be split.

    Raises:
        ValueError: there are none.
    """
    names = set(getattr(base, "_no_split_modules", None) or ())
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for members in lists for block in members if original_class(block).__name__ in names]
    if not blocks:
        raise ValueError(
            f"torch_compile: {original_class(base).__name__} does not say which of its modules are its blocks; "
            "set torch_compile: false"
        )
    return blocks


def _compile_block(block: nn.Module, backend: str | Callable[..., Any]) -> None:
    # transformers checkpoints inside the block's forward, and a graph cannot break inside a checkpoint, as it must at
    # attention: all of the block would run uncompiled. So the checkpoint goes around the compiled block, inside FSDP2's
    # hooks. What is compiled is the code within transformers' wrapper, which FSDP2's class has around its own once
    # more: dynamo would count both, and those of all architectures, as recompilations of one function.
    own = original_class(block).forward
    while own.__code__.co_name == "forward_with_checkpointing":
        own = own.__wrapped__
    forward = torch.compile(own.__get__(block), dynamic=True, backend=backend)
    if getattr(block, "gradient_checkpointing", False):
        block.gradient_checkpointing = False
        forward = _checkpointed(block, forward, block._gradient_checkpointing_func)
    block.forward = forward


def _checkpointed(block: nn.Module, forward: Callable[..., Any], checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def forward_with_checkpointing(*args: Any, **kwargs: Any) -> Any:
        if block.training:
            return checkpoint(functools.partial(forward, **kwargs), *args)
        return forward(*args, **kwargs)

    return forward_with_checkpointing


def _try_compiler(device: torch.device, backend: str | Callable[..., Any]) -> None:
    """Compile something small first: on a CPU it takes a C++ compiler, on CUDA triton, and neither is a given."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13's own, from inductor's first import
            torch.compile(_small, dynamic=True, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # what is missing decides what is raised
        needed = "a C++ compiler such as g++" if device.type == "cpu" else "triton, and a C compiler"
        raise ValueError(
            f"torch_compile: torch cannot compile for {device.type} here ({first_line(error)}); install {needed}, or "
            "set torch_compile: false"
        ) from error


def _small(x: torch.Tensor) -> torch.Tensor:
    return (x + 1).sin()
