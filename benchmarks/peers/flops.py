"""Floating-point operations of a training step: the floor that cannot be avoided, and what a layout executes.

    N_l   weights of the linear layers in the blocks: layers * (2 H Hq D + 2 H Hkv D + 3 H I)
    step  3 * (2 N_l tokens + 4 layers Hq D attended + 2 V H head_rows), forward once and backward twice

The floor puts in what has to be computed: every distinct token once, every visible (query, key) combination once, one
head row for each distinct trained prediction. What is executed is counted (matrix products of a real forward and
backward pass on meta tensors), except attention, which every kernel does differently: it enters by formula on both
sides, the recomputation of scores in a backward pass included on neither. Imports torch, transformers and core only.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from simpo.core.packing import PairShape, TokenPair, shared_prefix_length
from simpo.model.costs import decoder_sizes


@dataclass(frozen=True)
class ModelShape:
    """What decides the work of a dense decoder with gated MLPs.

    Attributes:
        block_weights: N_l, weights of all linear layers in the blocks.
        attention_width: layers * Hq * D.
        head_weights: V * H.
    """

    block_weights: int
    attention_width: int
    head_weights: int


@dataclass(frozen=True)
class PairWork:
    """What one pair has to have computed.

    Attributes:
        shape: tokens: the shared prefix, and what is left of chosen and rejected after it.
        head_rows: distinct predictions that the two responses need. A prompt's last token predicts the first token of
            both and is counted for both, so that without a longer shared prefix this is chosen + rejected tokens. Where
            both responses begin alike, the labels inside the shared prefix are the same prediction: counted once.
        labels: trained tokens of both responses, every one counted.
    """

    shape: PairShape
    head_rows: int
    labels: int


def model_shape(config: Any) -> ModelShape:
    """Read a transformers configuration.

    Raises:
        ValueError: no dense decoder with gated MLPs, the only kind whose floor is known here.
    """
    text = config.get_text_config()
    if getattr(text, "intermediate_size", None) is None:
        raise ValueError(f"the floor is not known for {text.model_type}, which has no gated MLPs of one width")
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(text, name, None):
            raise ValueError(f"the work of {text.model_type} depends on its experts' routing; a dense model is needed")
    sizes = decoder_sizes(config)
    hidden, layers = sizes["hidden_size"], sizes["num_layers"]
    queries, keys = (sizes[name] * sizes["head_dim"] for name in ("num_heads", "num_kv_heads"))
    per_layer = hidden * (2 * queries + 2 * keys + 3 * sizes["intermediate_size"])
    return ModelShape(layers * per_layer, layers * queries, sizes["vocab_size"] * hidden)


def pair_work(pair: TokenPair) -> PairWork:
    """The work of one tokenised pair."""
    chosen, rejected = len(pair.chosen_ids), len(pair.rejected_ids)
    prefix = shared_prefix_length(pair.chosen_ids, pair.rejected_ids)
    starts = (pair.chosen_start, pair.rejected_start)
    labels = chosen - starts[0] + rejected - starts[1]
    # Labels at positions inside the prefix that both responses train.
    common = max(0, prefix - max(starts))
    return PairWork(PairShape(prefix, chosen - prefix, rejected - prefix), labels - common, labels)


def step_flops(model: ModelShape, *, tokens: float, attended: float, head_rows: float) -> float:
    """Forward and backward over this many tokens, (query, key) combinations and rows of the head."""
    blocks, attention = 2 * model.block_weights * tokens, 4 * model.attention_width * attended
    return 3.0 * (blocks + attention + 2 * model.head_weights * head_rows)


def floor_flops(model: ModelShape, works: Sequence[PairWork]) -> float:
    """The work of one step over these pairs that no layout avoids."""
    return sum(
        step_flops(model, tokens=w.shape.tokens, attended=w.shape.attended, head_rows=w.head_rows) for w in works
    )


# --- what a layout executes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayoutWork:
    """What one micro-batch in one layout computes.

    Attributes:
        slots: token positions computed, padding included.
        tokens: of these, the ones that are not padding.
        attended: (query, key) combinations that its attention evaluates.
    """

    slots: int
    tokens: int
    attended: int


def shared_layout(pairs: Sequence[TokenPair]) -> LayoutWork:
    """Packed rows with shared prompts: what is visible is what is evaluated."""
    shapes = [pair_work(pair).shape for pair in pairs]
    tokens = sum(shape.tokens for shape in shapes)
    return LayoutWork(tokens, tokens, sum(shape.attended for shape in shapes))


def padded_layout(pairs: Sequence[TokenPair]) -> LayoutWork:
    """One row a response, padded to the longest of the micro-batch.

    Attention with a padding mask evaluates the full rectangle of every row; where no row is padded transformers leaves
    the mask out and the kernel evaluates the causal triangle.
    """
    sizes = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    width, rows = max(sizes), len(sizes)
    padded = min(sizes) < width
    attended = rows * (width * width if padded else width * (width + 1) // 2)
    return LayoutWork(rows * width, sum(sizes), attended)


def attention_flops(model: ModelShape, attended: int) -> float:
    """Both products of attention, forward once and backward twice."""
    return 12.0 * model.attention_width * attended


def count_matmul_flops(step: Callable[[], object]) -> int:
    """Operations of the 2-D matrix products that `step` runs: linear layers and the head, forward and backward.

    Batched products (3-D) belong to attention and are left out, as are fused attention kernels.
    """
    with matmul_counter() as counted:
        step()
    return counted()


@contextlib.contextmanager
def matmul_counter() -> Iterator[Callable[[], int]]:
    """As `count_matmul_flops`, around any code: yields a function that gives the count so far."""
    aten = torch.ops.aten
    with FlopCounterMode(display=False) as counter:

        def total() -> int:
            counts = counter.get_flop_counts().get("Global", {})
            return int(sum(counts.get(op, 0) for op in (aten.mm, aten.addmm)))

        yield total


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Inside, a model on the meta device can run, and new tensors are on it too.

    What asks for a tensor's values, or for autocast there, gets a no: transformers 5 looks for packed documents in
    position ids, and torch 2.13 does not say whether autocast is on for a device it has none for.
    """
    import transformers.masking_utils

    is_enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def is_enabled_for(*device_type: str) -> bool:
        return False if device_type == ("meta",) else is_enabled(*device_type)

    def autocast_for(device_type: str, *args: Any, **options: Any) -> Any:
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *args, **options)

    with (
        torch.device("meta"),
        mock.patch.object(transformers.masking_utils, "find_packed_sequence_indices", return_value=None),
        mock.patch.object(torch, "is_autocast_enabled", is_enabled_for),
        mock.patch.object(torch, "autocast", autocast_for),
    ):
        yield


def build_on_meta(config: Any, *, packed: bool, bf16: bool = False) -> nn.Module:
    """The model of a configuration without weights, in training mode.

    Args:
        packed: prepared for packed rows as `model.load.load_model` prepares it, or as transformers builds it.
        bf16: its weights' dtype, since there is no autocast on meta tensors; else fp32.
    Raises:
        ValueError: its linear layers are not those of the floor's formula.
    """
    from transformers import AutoModelForCausalLM

    from simpo.model.attention import PACKED
    from simpo.model.low_memory import install_low_memory_blocks

    with torch.device("meta"):
        # A copy: the attention's name is written into the configuration, which models built from it share.
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            attn_implementation=PACKED if packed else "sdpa",
            dtype=torch.bfloat16 if bf16 else torch.float32,
        )
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    expected = model_shape(config).block_weights
    if linear != expected:
        raise ValueError(
            f"{type(model).__name__} has {linear} weights in linear layers, and the floor's formula expects {expected}"
        )
    if packed:
        install_low_memory_blocks(model)
    return model.train()
