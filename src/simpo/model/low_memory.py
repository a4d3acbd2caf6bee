"""Puts `core.low_memory` into Hugging Face models whose blocks are known to be Llama's: less memory, the same values.

With `use_liger_kernel` norms, rotary embeddings and MLPs compute by Liger's fused CUDA kernels instead, wherever Liger
supports the architecture. And the last block's MLP computes only the rows that the head will read: a prompt's rows give
that block keys and values and nothing else, so nobody reads what their MLP would compute.

A block is recognised by its class. Other architectures are left alone: only they know what their norms feed, and in
which precision.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from simpo.core.low_memory import gated_silu, rms_norm
from simpo.parallel.sharding import original_class

# Decoder layers of the form x + attention(norm(x)), then x + mlp(norm(x)): their norms feed projections only, which
# compute in the autocast dtype, so the norm may hand them that dtype itself.
_LLAMA_LIKE = frozenset(
    ["LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "SmolLM3DecoderLayer"]
)

READ_ROWS = "packed_read_rows"  # the keyword of the model's forward that names the rows that are read
_FUSED = "_fused_forward"  # where a module of these classes keeps the forward that Liger bound to it


class _LowMemoryNorm:
    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler fuses better from the model's own code; so below
            return super().forward(hidden_states)
        device = hidden_states.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if fused := self.__dict__.get(_FUSED):
            return fused(hidden_states) if cast is None else fused(hidden_states).to(cast)
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon, out_dtype=cast)


class _LowMemoryMLP:
    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        if fused := self.__dict__.get(_FUSED):
            return fused(x)
        return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))


class _RowsMLP:
    """An MLP that computes the rows in `_read_rows` and gives zeros for the others; all rows where that is None."""

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor | None = None if torch.compiler.is_compiling() else self.__dict__.get("_read_rows")
        if rows is None:
            return super().forward(x)
        flat = x.flatten(0, 1)  # read rows count through the rows of a batch
        out = super().forward(flat.index_select(0, rows)[None])[0]
        return torch.zeros_like(flat, dtype=out.dtype).index_copy(0, rows, out).view_as(x)


def _note_read_rows(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the last block runs, in the forward pass or again in a checkpoint's: hand its MLP the rows."""
    block.mlp.__dict__["_read_rows"] = kwargs.get(READ_ROWS)


def install_low_memory_blocks(model: nn.Module) -> int:
    """Swap the classes of the norms and MLPs of every known block; returns the number of these blocks. Idempotent.

    Parameters and their names stay as they were, so saving, adapters and sharding do not notice.
    """
    blocks = [module for module in model.modules() if original_class(module).__name__ in _LLAMA_LIKE]
    for block in blocks:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            if type(norm).__name__.endswith("RMSNorm"):
                _mix_in(_LowMemoryNorm, norm)
        if type(getattr(block.mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation"):
            _mix_in(_LowMemoryMLP, block.mlp)
        _mix_in(_RowsMLP, block.mlp)  # all of them: compiled blocks share one class
    if blocks and _note_read_rows not in blocks[-1]._forward_pre_hooks.values():
        blocks[-1].register_forward_pre_hook(_note_read_rows, with_kwargs=True)
    return len(blocks)


def _mix_in(mixin: type, module: nn.Module) -> None:
    """Put a class before the module's own; its forward calls the one that Liger bound to the module, if any."""
    if not isinstance(module, mixin):
        module.__class__ = _mixed(mixin, type(module))
    if "forward" in module.__dict__:
        module.__dict__[_FUSED] = module.__dict__.pop("forward")


@cache
def _mixed(mixin: type, original: type) -> type:
    return type(original.__name__, (mixin, original), {})


def why_no_liger(base: nn.Module, device: torch.device) -> str | None:
    """Why Liger's kernels cannot be used for this transformers model on this device; None where they can."""
    if device.type != "cuda":
        return f"Liger's kernels need a CUDA GPU, and this run computes on {device.type}"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as supported
    except ImportError as error:
        return f"{error.name or 'liger_kernel'} is not installed (pip install 'simpo[liger]')"
    if base.config.model_type not in supported:
        return f"Liger has no kernels for {base.config.model_type}"
    return None


def install_liger_kernels(base: nn.Module) -> None:
    """Bind Liger's norm, rotary embedding and MLP to a transformers model; its head and its loss stay ours.

    To be called before `install_low_memory_blocks`. Rotary embeddings are functions of the architecture's module, so
    those of all its models in this process change.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=base, cross_entropy=False, fused_linear_cross_entropy=False)
