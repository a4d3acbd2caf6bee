"""Megatron-Core 0.16 on CPU and gloo: what it takes from CUDA, replaced for as long as a test runs.

    with on_cpu(tensor_model_parallel_size=2):
        ...   # parallel_state is initialised; models, schedules, DDP and the fp32 optimizer work

Only for tests: the host itself has no such code. Imported by rank processes alone (importing megatron warns).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.optimizer.optimizer as megatron_optimizer
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core import parallel_state


class _CudaMeansCpu(TorchFunctionMode):
    """Tensors asked for on "cuda" are made on the CPU, and no memory is pinned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


class _NoTracker:
    """In place of the tracker of CUDA random states; nothing in these models is random."""

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None: ...

    def add(self, name: str, seed: int) -> None: ...

    def get_states(self) -> dict[str, Tensor]:
        return {}

    @contextlib.contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        yield


def _clip(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
    """Megatron's formula; its own function takes CUDA tensors alone."""
    scale = max_norm / (total_norm + 1.0e-6)
    if scale < 1.0:
        for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)


@contextlib.contextmanager
def on_cpu(**sizes: Any) -> Iterator[None]:
    """Shims and `initialize_model_parallel(**sizes)`; both are undone at the end."""
    cpu = torch.device("cpu")
    tracker = _NoTracker()
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "current_device", lambda: cpu),
            (torch.cuda, "synchronize", lambda *args, **kwargs: None),
            (torch.cuda, "manual_seed", lambda seed: None),
            (Tensor, "cuda", lambda self, *args, **kwargs: self),
            (megatron_random, "_CUDA_RNG_STATE_TRACKER", tracker),
            (megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
            (megatron_random, "initialize_rng_tracker", lambda *args, **kwargs: None),
            (megatron_optimizer, "clip_grad_by_total_norm_fp32", _clip),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(_CudaMeansCpu())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if sizes.pop("initialize", True):
            parallel_state.initialize_model_parallel(**sizes)
            stack.callback(parallel_state.destroy_model_parallel)
        yield


class GatheredAttention(nn.Module):
    """Core attention under context parallelism without Transformer Engine: gathers keys and values, then is plain.

    Stands in for TEDotProductAttention, which needs CUDA: same inputs, same cut of the rows (each rank an early and a
    late chunk), same result.
    """

    def __init__(self, config: Any, layer_number: int, **others: Any) -> None:
        super().__init__()
        self.scale = config.kv_channels**-0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **others: Any) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] of this rank -> [s, b, heads * d]."""
        group = parallel_state.get_context_parallel_group()
        chunk = query.shape[0] // 2
        places = [_places(rank, group.size(), chunk) for rank in range(group.size())]
        own, everywhere = places[group.rank()], torch.cat(places)
        key, value = _Gather.apply(key, group), _Gather.apply(value, group)
        repeats = query.shape[2] // key.shape[2]
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key.repeat_interleave(repeats, dim=2)) * self.scale
        scores = scores.masked_fill(everywhere[None, :] > own[:, None], float("-inf"))
        mixed = torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value.repeat_interleave(repeats, dim=2))
        return mixed.flatten(2)


def _places(rank: int, size: int, chunk: int) -> Tensor:
    """Positions in the whole row of a rank's tokens."""
    return torch.cat([torch.arange(chunk) + chunk * at for at in (rank, 2 * size - 1 - rank)])


class _Gather(torch.autograd.Function):
    """x of every rank, one after the other; backward, the sum of what all ranks want of this rank's x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None
