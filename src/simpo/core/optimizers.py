"""The optimizers that a recipe can name, and what each can do; `run.optim` builds them.

To add one, enter it here and build it there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Optimizer:
    """What is asked of an optimizer before it is built. What is not said is taken to be missing."""

    meaning: str = ""  # for `simpo keys`; "" where its name says it
    moment_bytes: int | None = None  # of each trained weight; None = two numbers in the weight's own format
    shards: bool = False  # whether it updates sharded weights
    offloads: bool = False  # whether it can keep its moments in CPU memory
    is_transformers: bool = False  # whether transformers' Trainer builds it under this name


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch_fused": Optimizer(shards=True, is_transformers=True),
    "adamw_torch": Optimizer(shards=True, is_transformers=True),
    "adamw_bf16": Optimizer(
        "keeps its moments, and bfloat16 weights, with stochastic rounding",
        moment_bytes=4,
        shards=True,
        offloads=True,
    ),
    "adamw_8bit": Optimizer("is bitsandbytes' (install simpo[8bit])", moment_bytes=2, is_transformers=True),
}
