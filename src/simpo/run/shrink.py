"""A step that runs out of memory begins again in smaller micro-batches. Must not import the trainer or evaluation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from simpo.data.loader import StepLoader, StepPlan
from simpo.parallel.mesh import Mesh
from simpo.run.optim import rng_state, set_rng_state
from simpo.run.stopping import OutOfMemory, missing_memory, name_step

T = TypeVar("T")

_ADVICE = (
    "gradient_checkpointing: true, use_peft: true, optim: adamw_bf16, a smaller logits_chunk_size or a lower "
    "max_length need less"
)


def shrink_until_it_fits(
    attempt: Callable[[StepPlan], T],
    plan: StepPlan,
    *,
    loader: StepLoader,
    mesh: Mesh,
    forget: Callable[[], None],
    say: Callable[[str], None],
) -> T:
    """attempt(plan); where memory runs out, again in smaller micro-batches, with the same pairs and random numbers.

    Args:
        loader: later steps keep to the smaller micro-batches too.
        forget: drops what a failed attempt left.
        say: prints a line.
    Raises:
        OutOfMemory: every micro-batch holds one pair, or other processes are in the middle of theirs.
    """
    random = rng_state(mesh.device)
    while True:
        missing = None
        try:
            return attempt(plan)
        except RuntimeError as error:
            missing = missing_memory(error)
            if missing is None:
                raise
        # Out here nothing holds what the failed attempt had computed: the error did, frame by frame.
        forget()
        gc.collect()
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        plan = _in_smaller_micro_batches(plan, missing, loader, mesh, say)
        set_rng_state(random, mesh.device)


def _in_smaller_micro_batches(
    plan: StepPlan, missing: str, loader: StepLoader, mesh: Mesh, say: Callable[[str], None]
) -> StepPlan:
    """The same step in micro-batches of half the tokens."""
    tokens = loader.store.tokens
    largest = max(int(tokens[list(indices)].sum()) for indices in plan.micro_batches)
    longest = max((int(tokens[list(indices)].max()) for indices in plan.micro_batches if indices), default=0)
    what = f"{name_step(mesh, plan.step)}: out of memory in micro-batches of up to {largest:,} tokens ({missing})"
    if longest == largest:
        raise OutOfMemory(f"{what}, which is one pair alone; nothing was updated. {_ADVICE}")
    limit = max(longest, largest // 2)
    key = "a smaller per_device_train_batch_size"
    if loader.pack:
        key = f"max_tokens_per_micro_batch: {max(limit, int(tokens.max()))}"
    if mesh.sizes.world > 1:
        raise OutOfMemory(
            f"{what}; nothing was updated, and several processes cannot begin a step again. Set {key} and resume with "
            f"--resume_from_checkpoint true. {_ADVICE} too"
        )
    loader.limit_tokens(limit, even_below_a_pair=True)
    say(
        f"{what}: begun again with up to {limit:,}, which holds from here on; the update stays the same"
        + (f". {key} starts like that" if loader.pack else "")
    )
    return next(loader.plans(plan.step, plan.step + 1))
