"""Two pieces of a transformer block that keep less for the backward pass than autograd would: RMSNorm and SwiGLU.

    rms_norm(x)        = weight * (x / sqrt(mean(x^2) + eps))         keeps x, which the residual stream keeps anyway
    gated_silu(g, u)   = silu(g) * u                                  keeps g and u; silu(g) is computed again

Autograd also keeps the normalised x, its cast for each projection that reads it, and silu(g): about a third of
what a Llama-like block keeps. The values are the same. Torch only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """Root-mean-square normalisation over the last dim, as transformers' LlamaRMSNorm computes it.

    Args:
        x: [..., D]; normalised in fp32 (fp64 if x is).
        weight: [D].
        eps: added to the mean square, >= 0.
        out_dtype: of the result; None = x and weight promoted.
    Source: Zhang and Sennrich, arXiv:1910.07467, eq. 4.
    """
    return _RMSNorm.apply(x, weight, eps, out_dtype or torch.promote_types(x.dtype, weight.dtype))


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, in their dtype. Source: Shazeer, arXiv:2002.05202 (SwiGLU)."""
    return _GatedSilu.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # 1 / root mean square of each row, [..., 1]
        inverse = torch.rsqrt(torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.x_dtype = x.dtype
        normed = (wide * inverse).to(x.dtype)
        return (normed * weight).to(out_dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        x, grad, wide_weight = (tensor.to(inverse.dtype) for tensor in (x, grad, weight))
        # Both sums, over rows and over columns, are products of this with a vector.
        product = grad * x
        d_weight, d_x = None, None
        with torch.autocast(x.device.type, enabled=False):  # a backward pass inside it would round them
            if ctx.needs_input_grad[1]:
                d_weight = (inverse.flatten() @ product.flatten(0, -2)).to(weight.dtype)
            if ctx.needs_input_grad[0]:
                # d x = inverse (d_normed - normed mean(d_normed normed)): a row's own direction keeps its norm
                along = (product @ wide_weight).unsqueeze(-1) * inverse.square() / x.shape[-1]
                d_x = torch.addcmul(grad * wide_weight, x, along, value=-1).mul_(inverse).to(ctx.x_dtype)
        return d_x, d_weight, None, None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return d_gate, F.silu(gate).mul_(grad)
