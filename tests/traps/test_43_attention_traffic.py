"""Trap 43: one slice per block, whose backward fills the whole tensor: bytes grow with the square of the pairs.

Here the bytes that attention's backward reads and writes grow with the tokens alone. They are counted operation by
operation on fake tensors, with torch's own `varlen_attn`, whose backward is one operation more.
"""

from __future__ import annotations

import pytest
import torch
from cases import rarely
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpo.core.blocks import AttentionBlocks, ScoreOptions
from simpo.core.varlen_attention import block_attention, varlen_attention

pytest.importorskip("torch.nn.attention.varlen")

PROMPT, CHOSEN, REJECTED = 200, 350, 350
HEADS, KEY_HEADS, SIZE = 32, 8, 128  # Llama-3-8B


class CountedBytes(TorchDispatchMode):
    """Bytes that operations read and write; views, allocations and questions move none."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if not func.is_view and name.startswith(("aten::", "torch_attn::")) and not name.startswith("aten::empty"):
            self.total += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out


def bytes_of_backward(num_blocks: int, *, responses: int = 2, path=varlen_attention) -> int:
    ranges, at = [], 0
    for _ in range(num_blocks // responses):
        start, at = at, at + PROMPT + CHOSEN
        ranges.append((start, start, start, at))
        for _ in range(responses - 1):
            ranges.append((start, start + PROMPT, at, at + REJECTED))
            at += REJECTED
    with FakeTensorMode():
        tensors = [
            torch.empty(1, at, heads, SIZE, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for heads in (HEADS, KEY_HEADS, KEY_HEADS)
        ]
        out = path(*tensors, AttentionBlocks(tuple(ranges)), ScoreOptions(SIZE**-0.5))
        with CountedBytes() as counted:
            torch.autograd.backward(out, torch.empty_like(out), inputs=tensors)
    return counted.total


@pytest.mark.parametrize("responses", [2, rarely(4)])
@pytest.mark.parametrize("path", [varlen_attention, block_attention])
def test_bytes_of_attention_s_backward_grow_with_the_tokens_alone(path, responses: int) -> None:
    few, more, most = (bytes_of_backward(count, responses=responses, path=path) for count in (8, 40, 80))
    assert more == pytest.approx(5 * few, rel=1e-3)
    assert most == pytest.approx(10 * few, rel=1e-3)


def test_what_is_added_to_the_kernel_s_own_bytes_is_little() -> None:
    """The kernel reads and writes four tensors like the queries, two like the keys and two like the values."""
    tokens, seen = 40 * (PROMPT + CHOSEN + REJECTED), 40 * (2 * PROMPT + CHOSEN + REJECTED)
    kernel = 2 * SIZE * (4 * HEADS * tokens + 4 * KEY_HEADS * seen)
    assert kernel < bytes_of_backward(80) < 1.6 * kernel
