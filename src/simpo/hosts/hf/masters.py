"""fp32 masters under DeepSpeed: kept when the engine casts the weights, and read for exports.

With bf16 DeepSpeed computes with bf16 weights and updates an fp32 copy, split over the processes. Left alone, it makes
that copy from the weights in bf16 and hands out the weights in bf16: each loses what small learning rates change. Must
not import the trainer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled

from simpo.run.export import overflows, tie

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_READ = "_read_in_fp32"  # attribute of a ZeRO-3 parameter: this process's partition as it was read


def _zero3_config() -> dict[str, Any]:
    """DeepSpeed's own configuration; empty without ZeRO-3."""
    return (deepspeed_config() or {}) if is_deepspeed_zero3_enabled() else {}


@contextlib.contextmanager
def reading_in_fp32() -> Iterator[None]:
    """Around from_pretrained: ZeRO-3 splits weights in the dtype they are asked for, not in that of the engine.

    `narrow_partitions` has to follow.
    """
    config = _zero3_config()
    on_disk = config.get("zero_optimization", {}).get("offload_param", {}).get("device") == "nvme"
    halves = [config[name] for name in _HALF if config.get(name, {}).get("enabled") is True and not on_disk]
    for part in halves:
        part["enabled"] = False
    try:
        yield
    finally:
        for part in halves:
            part["enabled"] = True


@torch.no_grad()
def narrow_partitions(model: nn.Module) -> None:
    """Give a model that ZeRO-3 has split the engine's dtype; what it was read in is kept for `take_masters`."""
    config = _zero3_config()
    half = next((dtype for name, dtype in _HALF.items() if config.get(name, {}).get("enabled") is True), None)
    for parameter in model.parameters():
        if half is not None and hasattr(parameter, "ds_tensor") and parameter.ds_tensor.dtype == torch.float32:
            setattr(parameter, _READ, parameter.ds_tensor.data)
            parameter.ds_tensor.data = parameter.ds_tensor.data.to(half)
            parameter.data = parameter.data.to(half)


def take_masters(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """The trained weights that are there in fp32 before the engine is prepared: whole, or this process's partition."""
    masters = {}
    for parameter in model.parameters():
        read = parameter.__dict__.pop(_READ, None)
        if parameter.requires_grad and read is not None:
            masters[parameter] = read
        elif parameter.requires_grad and parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id"):
            masters[parameter] = parameter.data
    return masters


@torch.no_grad()
def give_masters(masters: dict[nn.Parameter, Tensor]) -> None:
    """Have a prepared engine update the weights that `take_masters` found, where it cast its own."""
    for parameter, master in masters.items():
        if parameter.dtype == torch.float32:
            continue
        if hasattr(parameter, "ds_id"):
            size = parameter.ds_tensor.ds_numel
            if master.shape == parameter.ds_shape:  # whole; the last partition is filled up with zeros
                part = master.reshape(-1)[parameter.ds_zero_partition_rank * size :][:size]
                master = torch.zeros(size, dtype=part.dtype, device=part.device)
                master[: part.numel()] = part
            parameter._z3_optimizer.set_local_hp_param(master, parameter)
        elif hasattr(parameter, "set_full_hp_param"):
            parameter.set_full_hp_param(master)


@torch.no_grad()
def whole_weights(engine: Any, *, keep: bool) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole tensor in CPU memory) of a model that DeepSpeed trains: masters where it has them.

    One at a time. Every process must run through all of it. For a PEFT model the trained parameters alone; a tied
    weight comes under its first name.

    Args:
        keep: whether this process wants the tensors; others get None.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    model = engine.module
    adapters = hasattr(model, "peft_config")
    if engine._optimizer_has_ckpt_event_prologue():
        engine.optimizer.checkpoint_event_prologue()
    for name, parameter in model.named_parameters():
        if adapters and not parameter.requires_grad:
            continue
        has_master = hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")
        master = safe_get_full_fp32_param(parameter) if has_master and parameter.requires_grad else None
        gathers = master is None and hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=gathers):
            whole = parameter.detach() if master is None else master
            yield name, whole.to("cpu", copy=True) if keep else None
    if engine._optimizer_has_ckpt_event_epilogue():
        engine.optimizer.checkpoint_event_epilogue()
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and not adapters:
            yield name, buffer.detach().cpu() if keep else None


def whole_state_dict(
    weights: Iterator[tuple[str, Tensor | None]], model: nn.Module, dtype: torch.dtype | None, *, keep: bool
) -> dict[str, Tensor]:
    """The state dict that `weights` make, in `dtype` if one is given; every process calls it.

    They are narrowed one by one, so that no whole model is there in fp32.

    Args:
        keep: whether this process wants it; others get an empty one.
    Raises:
        ValueError: a weight is too large for the dtype.
    """
    state = {}
    for name, value in weights:
        narrows = value is not None and dtype is not None and value.is_floating_point()
        if narrows and overflows([value], dtype):
            raise ValueError(
                f"save_dtype = {str(dtype).removeprefix('torch.')}: a weight of {name} is too large; use bfloat16"
            )
        if value is not None and keep:
            state[name] = value.detach().to(dtype) if narrows else value
    tie(state, model)
    return state


def local_masters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, this process's part) of each trained weight, as the optimizer of a prepared engine updates it."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "_z3_optimizer"):
            yield name, parameter._z3_optimizer.get_local_fp32_param(parameter)
        elif not hasattr(parameter, "_hp_mapping"):
            yield name, parameter.detach()
        elif parameter._hp_mapping is not None:  # None: another process has all of it
            yield name, parameter._hp_mapping.hp_fragment
