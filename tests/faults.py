"""Mistakes that the start-up check has to find, planted one at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from simpo.core.batch import PackedPairs
from simpo.model import head, probe


def change_logits(change: Callable[[Tensor], Tensor]) -> Any:
    """The architecture does something behind its head that nobody was told of."""
    inner = LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = inner(self, *args, **kwargs)
        out.logits = change(out.logits)
        return out

    return mock.patch.object(LlamaForCausalLM, "forward", forward)


def change_batch(change: Callable[[PackedPairs], PackedPairs]) -> Any:
    """The rows that train are laid out otherwise, where they have blocks."""
    inner = probe.build_batch

    def build(*args: Any, **kwargs: Any) -> PackedPairs:
        batch = inner(*args, **kwargs)
        return batch if batch.blocks is None else change(batch)

    return mock.patch.object(probe, "build_batch", build)


def shift_rejected(batch: PackedPairs) -> PackedPairs:
    """Rejected responses restart one position too late."""
    positions = batch.position_ids.clone()
    for _, _, start, end in batch.blocks.ranges[1::2]:
        positions[:, start:end] += 1
    return dataclasses.replace(batch, position_ids=positions)


def leak_one_token(batch: PackedPairs) -> PackedPairs:
    """The second pair sees the last token of the first one."""
    ranges = list(batch.blocks.ranges)
    _, _, start, end = ranges[2]
    ranges[2] = (start - 1, start, start, end)
    return dataclasses.replace(batch, blocks=dataclasses.replace(batch.blocks, ranges=tuple(ranges)))


def misread_scale(scale: float) -> Any:
    """The head computes a scale that the model does not have."""
    return mock.patch.object(head, "_find_transforms", return_value=(scale, None, []))


FAULTS: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "scale in the head 2% high": lambda: misread_scale(1.02),
    "scale in the head 2% low": lambda: misread_scale(0.98),
    "scale behind the head missed, 2%": lambda: change_logits(lambda logits: logits * 1.02),
    "soft-cap missed": lambda: change_logits(lambda logits: 30 * torch.tanh(logits / 30)),
    "rejected one position late": lambda: change_batch(shift_rejected),
    "one token leaks": lambda: change_batch(leak_one_token),
}
