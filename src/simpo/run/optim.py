"""The optimizer's side of a step: parameter groups, learning-rate schedule, gradient clipping, seeds and threads.

Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import math
import os
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from simpo.environment import num_cores
from simpo.errors import first_line
from simpo.parallel.sharding import local_part, total_norm
from simpo.run.adamw import AdamWBf16, load_state_as_saved

if TYPE_CHECKING:
    from simpo.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's AdamW over the trainable parameters; vectors (norms, biases) are never decayed.

    Raises:
        ValueError: nothing is trainable, or adamw_8bit does not run here.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter is trainable; with use_peft, check lora_target_modules")
    by_kind: dict[tuple[Any, bool], list[nn.Parameter]] = {}
    for p in trainable:  # one kernel updates a whole group, and takes tensors of one mesh at a time
        by_kind.setdefault((getattr(p, "device_mesh", None), p.ndim >= 2), []).append(p)
    groups = [
        {"params": params, "weight_decay": recipe.weight_decay if is_matrix else 0.0}
        for (_, is_matrix), params in sorted(by_kind.items(), key=lambda item: not item[0][1])
    ]
    options: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
    }
    if recipe.optim == "adamw_bf16":
        return AdamWBf16(groups, seed=recipe.seed, offload=recipe.optimizer_offload, **options)
    if recipe.optim == "adamw_8bit":
        return _adamw_8bit(trainable[0].device)(groups, **options)
    if recipe.optim not in ("adamw_torch_fused", "adamw_torch"):
        raise NotImplementedError(f"optim: {recipe.optim} is named in simpo.core.optimizers and not built here")
    # torch's choice on CUDA, all weights in one call, would hold temporaries as large as a moment of the whole model.
    return torch.optim.AdamW(groups, fused=recipe.optim == "adamw_torch_fused", foreach=False, **options)


def _adamw_8bit(device: torch.device) -> type[torch.optim.Optimizer]:
    """bitsandbytes' AdamW with 8-bit moments, tried on the device first: not every build of it runs everywhere."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optim: adamw_8bit needs bitsandbytes: pip install 'simpo[8bit]'") from error
    probe = nn.Parameter(torch.zeros(2**14, device=device))  # it keeps moments of fewer than 4096 numbers in fp32
    probe.grad = torch.ones_like(probe)
    try:
        AdamW8bit([probe], lr=1.0).step()
        works = bool((probe < 0).all())
        reason = "a trial step did nothing"
    except Exception as error:  # what is raised differs from build to build
        works = False
        reason = first_line(error)
    if not works:
        raise ValueError(
            f"optim: this bitsandbytes cannot run adamw_8bit on {device.type} ({reason}); update it, or use adamw_bf16"
        )

    class AdamW8bitAsTorch(AdamW8bit):
        # bitsandbytes nests its state for FSDP 1, which torch.distributed.checkpoint cannot put together again.
        state_dict = torch.optim.Optimizer.state_dict
        load_state_dict = load_state_as_saved

    return AdamW8bitAsTorch


def learning_rate_at(step: int, total_steps: int, recipe: Recipe) -> float:
    """Learning rate of 0-based optimizer step `step`: linear warm-up from 0, then the schedule, down to `min_lr`.

    The same values as transformers' schedulers, so that published settings mean the same here; as there, the very
    first step of a warm-up has rate 0.
    """
    from simpo.recipe.checks import warmup_steps  # here: benchmarks/gpu.py runs where there is no pydantic

    warmup = warmup_steps(total_steps, recipe)
    if recipe.lr_scheduler_type == "constant":
        return recipe.learning_rate
    if step < warmup:
        return recipe.learning_rate * step / max(1, warmup)
    if recipe.lr_scheduler_type == "constant_with_warmup":
        return recipe.learning_rate
    done = (step - warmup) / max(1, total_steps - warmup)
    falls = recipe.learning_rate - recipe.min_lr
    if recipe.lr_scheduler_type == "linear":
        return recipe.min_lr + falls * max(0.0, 1.0 - done)
    return recipe.min_lr + falls * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """The 2-norm of the whole gradient, however it is sharded: a scalar in fp64, not yet waited for."""
    return total_norm([p.grad for p in model.parameters() if p.grad is not None])


def clip_gradients(model: nn.Module, max_norm: float, *, norm: float | None = None) -> float:
    """Scale all gradients so that their joint 2-norm is at most max_norm (0 = leave them); returns the norm before.

    A norm that is not finite leaves the gradients as they are.

    Args:
        norm: what `gradient_norm` gave; None = compute it.
    """
    norm = float(gradient_norm(model)) if norm is None else norm
    if max_norm and math.isfinite(norm) and norm + 1e-6 > max_norm:  # as torch.nn.utils.clip_grad_norm_ has it
        by_kind: dict[Any, list[torch.Tensor]] = {}
        for part in (local_part(p.grad) for p in model.parameters() if p.grad is not None):
            by_kind.setdefault((part.device, part.dtype), []).append(part)
        for parts in by_kind.values():
            torch._foreach_mul_(parts, max_norm / (norm + 1e-6))
    return norm


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Where the random numbers of this process stand: Python's, NumPy's, torch's and the device's, in JSON values."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return pack_rng(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def pack_rng(python: Any, numpy: Any, torch: Any, cuda: Any) -> dict[str, Any]:
    """In JSON values what the libraries give."""
    kind, keys, *rest = numpy
    return {
        "python": python,
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in cuda],
    }


def set_rng_state(state: dict[str, Any], device: torch.device, *, rank: int = 0) -> None:
    """Go back to where they stood.

    Args:
        rank: of this process, whose device was the one of this number where an earlier version wrote down every GPU.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"][rank % len(state["cuda"])]), device)


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def make_deterministic() -> None:
    """From here on torch computes the same bits from the same numbers on CUDA too, or raises where it cannot.

    Raises:
        ValueError: CUDA has been started already without the setting that cuBLAS needs.
    """
    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        if torch.cuda.is_initialized():
            raise ValueError(
                "full_determinism: this process uses CUDA already, and cuBLAS reads its settings when it starts; set "
                "CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"
            )
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers' flash-attn
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory before it is written


def set_threads(num_threads: int | None) -> None:
    """Use num_threads CPU threads; None keeps torch's choice within the cores this process may run on."""
    if num_threads is None:
        if "OMP_NUM_THREADS" in os.environ:
            return
        num_threads = min(torch.get_num_threads(), num_cores())
    torch.set_num_threads(num_threads)
