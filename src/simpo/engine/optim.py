"""The optimizer's side of a step: parameter groups, learning-rate schedule, gradient clipping, seeds and threads.

Must not import data, train or evaluate.
"""

from __future__ import annotations

import math
import os
import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from simpo.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (norms, biases) are never decayed.

    Raises:
        ValueError: nothing is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter is trainable; with use_peft, check lora_target_modules")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=recipe.optim == "adamw_torch_fused",
    )


def learning_rate_at(step: int, total_steps: int, recipe: Recipe) -> float:
    """Learning rate of 0-based optimizer step `step`: linear warm-up from 0, then the schedule.

    The same values as transformers' schedulers, so that published settings mean the same here; as there, the very
    first step of a warm-up has rate 0.
    """
    warmup = warmup_steps(total_steps, recipe)
    if recipe.lr_scheduler_type == "constant":
        return recipe.learning_rate
    if step < warmup:
        return recipe.learning_rate * step / max(1, warmup)
    if recipe.lr_scheduler_type == "constant_with_warmup":
        return recipe.learning_rate
    done = (step - warmup) / max(1, total_steps - warmup)
    if recipe.lr_scheduler_type == "linear":
        return recipe.learning_rate * max(0.0, 1.0 - done)
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def warmup_steps(total_steps: int, recipe: Recipe) -> int:
    """Steps of warm-up: `warmup_steps` where given, else `warmup_ratio` of the run, rounded up."""
    return recipe.warmup_steps if recipe.warmup_steps > 0 else math.ceil(recipe.warmup_ratio * total_steps)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their joint 2-norm is at most max_norm (0 = leave them); returns the norm before.

    A norm that is not finite leaves the gradients as they are.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    value = float(norm)
    if max_norm and math.isfinite(value):
        parameters = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return value


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_threads(num_threads: int | None) -> None:
    """Use num_threads CPU threads; None keeps torch's choice within the cores this process may run on."""
    if num_threads is None:
        if "OMP_NUM_THREADS" in os.environ:
            return
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_threads = min(torch.get_num_threads(), allowed)
    torch.set_num_threads(num_threads)
