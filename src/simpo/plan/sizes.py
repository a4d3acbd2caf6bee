"""The sizes of a model: every parameter with the cuts that transformers' plans would make, without any weights.

Must not import data, train or evaluate.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from simpo.errors import first_line
from simpo.model.costs import decoder_sizes


@dataclass(frozen=True)
class Weight:
    """One parameter of a model.

    Attributes:
        unit: what FSDP2 gathers together: a block's name, the embedding's, "end" (last norm and head), "rest".
        split_dim: the dim that tensor parallelism splits; None = whole on every tp rank.
        is_linear: the weight of a linear layer inside a block: may have an adapter, or be 4-bit.
    """

    name: str
    shape: tuple[int, ...]
    unit: str
    split_dim: int | None = None
    is_linear: bool = False

    def local_shape(self, *, shard: int = 1, tp: int = 1) -> tuple[int, ...]:
        """Of the largest piece: tensor parallelism cuts first, then FSDP2 cuts what is left by rows."""
        shape = list(self.shape)
        if self.split_dim is not None:
            shape[self.split_dim] = math.ceil(shape[self.split_dim] / tp)
        if shape:
            shape[0] = math.ceil(shape[0] / shard)
        return tuple(shape)

    def local_numel(self, *, shard: int = 1, tp: int = 1) -> int:
        return math.prod(self.local_shape(shard=shard, tp=tp))

    @property
    def role(self) -> str:
        """The linear layer's own name: q_proj, down_proj, ..."""
        return self.name.split(".")[-2] if "." in self.name else self.name


@dataclass(frozen=True)
class ModelSizes:
    """A decoder, as far as its memory goes.

    Attributes:
        weights: every parameter once; a tied head is the embedding.
        head_tied: whether the head is the embedding.
        norms_heads: q and k are normalised head by head (Qwen3).
        is_known: its blocks are those of `model.low_memory`; what others keep is estimated.
    """

    name: str
    weights: tuple[Weight, ...]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    head_tied: bool
    norms_heads: bool
    is_known: bool

    @property
    def num_parameters(self) -> int:
        return sum(weight.local_numel() for weight in self.weights)

    @property
    def block_weights(self) -> tuple[Weight, ...]:
        """Those of the first block; all blocks are taken to be alike."""
        first = next((w.unit for w in self.weights if w.unit.startswith("block ")), "")
        return tuple(w for w in self.weights if w.unit == first)

    @property
    def linear_numel(self) -> int:
        """Weights in the blocks' linear layers."""
        return sum(w.local_numel() for w in self.weights if w.is_linear)

    @property
    def head_numel(self) -> int:
        return self.vocab_size * self.hidden_size


def describe_model(config: Any, *, name: str = "") -> ModelSizes:
    """Every parameter of a configuration's model, and how transformers' plans would cut it; on the meta device.

    Raises:
        ValueError: transformers has no causal language model for it, or it has experts, whose work depends on routing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from simpo.model.low_memory import install_low_memory_blocks

    text = config.get_text_config()
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(text, key, None):
            raise ValueError(
                f"{text.model_type}: what its experts need depends on their routing; a dense model is needed"
            )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except ValueError as error:
        raise ValueError(f"{text.model_type}: {first_line(error)}") from error
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
    tied = head.weight is embedding.weight
    weights = []
    for path, parameter in model.named_parameters():
        unit = _unit_of(path, model.fsdp_plan, tied=tied)
        split = _split_dim(path, parameter, model.tp_plan)
        in_block = id(parameter) in linear and unit.startswith("block ")
        weights.append(Weight(path, tuple(parameter.shape), unit, split, in_block))
    modules = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return ModelSizes(
        name=name or text.model_type,
        weights=tuple(weights),
        head_tied=tied,
        norms_heads="q_norm" in modules,
        is_known=install_low_memory_blocks(model) > 0,
        **decoder_sizes(config),
    )


def _unit_of(path: str, fsdp_plan: dict[str, str], *, tied: bool) -> str:
    """Which of FSDP2's groups a parameter is in; see transformers' base_model_fsdp_plan."""
    parts = path.split(".")
    for size in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:size])
        wildcard = ".".join("*" if part.isdecimal() else part for part in parts[:size])
        if wildcard not in fsdp_plan:
            continue
        if parts[size - 1].isdecimal():
            return f"block {module}"
        is_end = fsdp_plan[wildcard] == "keep_full_weight" or (tied and "embed" in parts[size - 1])
        return "end" if is_end else "embedding"
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return f"block {'.'.join(parts[: numbers[0] + 1])}" if numbers else "rest"


def _split_dim(path: str, parameter: Any, tp_plan: dict[str, str]) -> int | None:
    module, _, kind = path.rpartition(".")
    style = tp_plan.get(".".join("*" if part.isdecimal() else part for part in module.split(".")), "")
    if "colwise" in style or style == "embedding_rowwise":
        return 0
    if "rowwise" in style and kind == "weight":
        return parameter.ndim - 1
    return None
