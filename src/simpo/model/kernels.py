"""Which kernel computes a model's packed attention: the recipe's `attention_kernel`, tried before the run starts.

What needs a GPU is tried once on a few hundred tokens, with heads like the model's, and compared with the reference,
values and gradients. FlashAttention-3 and -4 come in through torch's own switch, which holds for the whole process.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simpo.core.attention import (
    ATTENTION_PATHS,
    AttentionPath,
    attention_path,
    packed_attention,
    reference_attention,
    why_not,
)
from simpo.core.blocks import AttentionBlocks
from simpo.errors import first_line
from simpo.model.attention import PACKED, is_packed, packed_by, unwrap
from simpo.model.costs import decoder_sizes, setting

# FlashAttentions that torch can switch to: their names there, the packages they are in, the cards they run on.
_FLASH = {
    "flash3": ("FA3", "flash_attn_interface", (9,)),
    "flash4": ("FA4", "flash_attn.cute.interface", (9, 10)),
}
_ERROR_LIMIT = 3e-2  # of the largest value; bf16 keeps 8 bits, and a wrong mask or scale is off by far more


class _Heads(NamedTuple):
    """What attention looks like in a model: sizes, and what decides which kernels can compute it."""

    groups: int
    query: Tensor  # [1, 1, 1, D], for its dtype, device and size
    value: Tensor
    softcap: float | None
    dropout: float
    sliding_window: int | None

    def path(self, prefer: AttentionPath | None = None) -> AttentionPath:
        """The one that packed attention takes."""
        return attention_path(self.query, self.value, softcap=self.softcap, dropout=self.dropout, prefer=prefer)


def choose_kernel(model: nn.Module, kernel: str = "auto", *, device: torch.device, half: bool) -> str | None:
    """Have a model's packed attention computed by a kernel; `auto` takes the fastest that works here.

    Args:
        kernel: see `attention_kernel` in the recipe.
        device: where the model will compute.
        half: whether it will compute in bf16, whatever its weights are in.
    Returns:
        For people: what `auto` had to leave out, and why; None = nothing.
    Raises:
        ValueError: a kernel that cannot compute this model's attention here.
    """
    base = unwrap(model)
    heads = _heads(base, device, half)
    if torch.nn.attention.current_flash_attention_impl() in [name for name, _, _ in _FLASH.values()]:
        torch.nn.attention.restore_flash_attention_impl()
    path, left_out = heads.path(), []
    if kernel == "auto":
        flashes = [name for name in _FLASH if path == "varlen" and _refusal(name, heads) is None]
        tried = [*flashes, *((path,) if path in ("varlen", "flex") else ())]
    else:
        path, tried = ("varlen" if kernel in _FLASH else kernel), [kernel]
    for name in tried:
        problem = _problem(name, heads)
        if problem is None:
            break
        if kernel != "auto":
            able = [name for name in (*_FLASH, *ATTENTION_PATHS) if name != kernel and _refusal(name, heads) is None]
            raise ValueError(
                f"attention_kernel: {kernel} cannot be used here: {problem}; this machine and model can do "
                f"{', '.join(able)}; auto takes the fastest"
            )
        left_out.append(f"{name} was left out: {problem}")
        if name == path:
            path = "matmul" if heads.softcap is not None else "blocks"
    note = "; ".join(left_out)
    # Without a preference each call chooses by its tensors.
    base.set_attn_implementation(packed_by(path if left_out or kernel != "auto" else None))
    base.__dict__["_attention_left_out"] = note
    return note or None


def describe_attention(model: nn.Module, *, half: bool) -> str:
    """For people: how this model attends to its rows, computing in bf16 (half) or in its weights' dtype."""
    base = unwrap(model)
    implementation = base.config._attn_implementation
    if not is_packed(implementation):
        return implementation
    heads = _heads(base, base.get_input_embeddings().weight.device, half)
    path = heads.path(implementation.removeprefix(PACKED).removeprefix("_") or None)
    version = torch.nn.attention.current_flash_attention_impl() or "torch's flash attention"
    text = {
        "varlen": f"varlen_attn ({version}), all blocks at once",
        "flex": "FlexAttention, all blocks at once",
        "matmul": "products of matrices, in tiles",
        "blocks": "torch's own, block by block",
    }[path]
    left_out = base.__dict__.get("_attention_left_out")
    return f"{text} ({left_out})" if left_out else text


def _heads(base: nn.Module, device: torch.device, half: bool) -> _Heads:
    config = base.config.get_text_config()
    sizes = decoder_sizes(config)
    size = setting(config, "qk_head_dim") or sizes["head_dim"]
    value_size = setting(config, "v_head_dim") or size
    dtype = torch.bfloat16 if half else base.get_input_embeddings().weight.dtype
    query, value = (torch.empty(1, 1, 1, width, dtype=dtype, device=device) for width in (size, value_size))
    rates = (getattr(module, "attention_dropout", 0.0) for module in base.modules())
    dropout = max((rate for rate in rates if isinstance(rate, int | float)), default=0.0)
    softcap = getattr(config, "attn_logit_softcapping", None)
    groups = max(1, sizes["num_heads"] // sizes["num_kv_heads"])
    window = 100 if setting(config, "sliding_window") else None
    return _Heads(groups, query, value, softcap, dropout, window)


def _refusal(kernel: str, heads: _Heads) -> str | None:
    """Why a kernel cannot be used here, without trying it."""
    path: AttentionPath = "varlen" if kernel in _FLASH else kernel
    reason = why_not(path, heads.query, heads.value, softcap=heads.softcap, dropout=heads.dropout)
    if reason is not None or kernel not in _FLASH:
        return reason
    name, package, majors = _FLASH[kernel]
    major, minor = torch.cuda.get_device_capability(heads.query.device)
    if major not in majors:
        cards = " or ".join(f"{number}.0" for number in majors)
        return f"it needs a GPU of compute capability {cards}, this one has {major}.{minor}"
    if name not in torch.nn.attention.list_flash_attention_impls():
        return "this torch cannot switch to it"
    return None if _is_installed(package) else f"the package {package} is not installed"


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # its parent package is missing
        return False


def _problem(kernel: str, heads: _Heads) -> str | None:
    """Why a kernel cannot be used here; one that needs a GPU is tried, and switched on for good if it is right."""
    reason = _refusal(kernel, heads)
    if reason is not None or kernel in ("matmul", "blocks"):
        return reason
    if kernel not in _FLASH:
        return _try(kernel, heads)
    try:
        torch.nn.attention.activate_flash_attention_impl(_FLASH[kernel][0])
    except Exception as error:  # whatever the package raises as it is imported
        return first_line(error)
    problem = _try("varlen", heads)
    if problem is not None:
        torch.nn.attention.restore_flash_attention_impl()
    return problem


def _try(path: AttentionPath, heads: _Heads) -> str | None:
    """Attend to a few short blocks both ways: what went wrong, or None."""
    blocks = AttentionBlocks(((0, 0, 0, 150), (0, 70, 150, 260), (260, 260, 260, 300)))
    generator = torch.Generator().manual_seed(0)
    size, value_size = heads.query.shape[-1], heads.value.shape[-1]
    shapes = [(1, 2 * heads.groups, 300, size), (1, 2, 300, size), (1, 2, 300, value_size)]
    half = [torch.randn(shape, generator=generator).to(heads.query).requires_grad_() for shape in shapes]
    exact = [tensor.detach().float().requires_grad_() for tensor in half]
    try:
        for window in {None, heads.sliding_window}:
            with torch.enable_grad(), torch.autocast(heads.query.device.type, enabled=False):
                out = packed_attention(*half, blocks, sliding_window=window, softcap=heads.softcap, prefer=path)
                truth = reference_attention(*exact, blocks, sliding_window=window, softcap=heads.softcap)
                direction = torch.ones_like(truth).cumsum(2) / truth.shape[2]
                gradients = torch.autograd.grad(out, half, direction.to(out.dtype))
                true_gradients = torch.autograd.grad(truth, exact, direction)
            pairs = zip((out, *gradients), (truth, *true_gradients), strict=True)
            error = max(float(((a.float() - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)
            if not error <= _ERROR_LIMIT:
                return f"its results differ from the reference by {error:.2g} of the largest"
    except Exception as error:  # what a kernel or its compiler cannot do decides what is raised
        return first_line(error)
    return None
