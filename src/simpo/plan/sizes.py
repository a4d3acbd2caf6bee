"""A model without memory, as a recipe trains it: every weight, and how transformers' plans would cut it.

Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from simpo.errors import first_line
from simpo.model.attention import PACKED, unwrap
from simpo.model.costs import decoder_sizes, experts_per_token
from simpo.model.load import add_adapters, lora_config

if TYPE_CHECKING:
    from simpo.recipe import Recipe


@dataclass(frozen=True)
class Weight:
    """One parameter of a model."""

    name: str
    shape: tuple[int, ...]
    # what FSDP2 gathers together: a block's name, "embedding", "end" (last norm and head), "rest"; of an adapter, which
    # FSDP2 is not told of, ""
    unit: str
    split_dim: int | None  # the dim that tensor parallelism splits; None = whole on every tp rank
    num_bytes: float  # of one of its numbers
    is_trained: bool  # whether it has a gradient and moments
    kind: Literal["linear", "experts", "embedding", "head", "adapter", "other"]

    def local_shape(self, *, shard: int = 1, tp: int = 1) -> tuple[int, ...]:
        """Of the largest piece: tensor parallelism cuts first, then FSDP2 cuts what is left by rows."""
        shape = list(self.shape)
        if self.split_dim is not None:
            shape[self.split_dim] = math.ceil(shape[self.split_dim] / tp)
        if shape and self.unit:
            shape[0] = math.ceil(shape[0] / shard)
        return tuple(shape)

    def local_numel(self, *, shard: int = 1, tp: int = 1) -> int:
        return math.prod(self.local_shape(shard=shard, tp=tp))


@dataclass(frozen=True, eq=False)
class ModelSizes:
    """A decoder, as far as its memory goes."""

    name: str
    config: Any  # transformers'
    weights: tuple[Weight, ...]  # every parameter once; a tied head is the embedding
    head_tied: bool  # whether the head is the embedding
    share_of_experts: float  # how many of a block's experts a token is sent to, of all; 1 without experts
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def num_parameters(self) -> int:
        """Of the model itself, adapters apart."""
        return sum(weight.local_numel() for weight in self.weights if weight.kind != "adapter")

    @property
    def linear_numel(self) -> int:
        """Weights in the blocks' linear layers that a token is multiplied with: of experts those that it is sent to."""
        of_experts = sum(weight.local_numel() for weight in self.weights if weight.kind == "experts")
        linear = sum(weight.local_numel() for weight in self.weights if weight.kind == "linear")
        return linear + round(of_experts * self.share_of_experts)

    @property
    def head_numel(self) -> int:
        return self.vocab_size * self.hidden_size


_described: dict[tuple[str, ...], ModelSizes] = {}


def describe_model(config: Any, recipe: Recipe, *, name: str = "") -> ModelSizes:
    """The model of a configuration as a recipe trains it, adapters and 4-bit weights included.

    Raises:
        ValueError: transformers has no causal language model for it.
    """
    text = config.get_text_config()
    key = (name, *identity(config, recipe))
    if key not in _described:
        model = build_on_meta(config, recipe)
        base = unwrap(model)
        _described[key] = ModelSizes(
            name=name or text.model_type,
            config=config,
            weights=tuple(weight for weight, _ in describe_weights(model, recipe)),
            share_of_experts=_share_of_experts(text),
            head_tied=base.get_output_embeddings().weight is base.get_input_embeddings().weight,
            **decoder_sizes(config),
        )
    return _described[key]


_DECIDES = (
    *("master_dtype", "bf16", "fsdp_param_dtype", "load_in_4bit", "bnb_4bit_use_double_quant", "logits_chunk_size"),
    *("use_peft", "lora_r", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_dora"),
    *("gradient_checkpointing", "disable_dropout", "device"),
)


def identity(config: Any, recipe: Recipe) -> tuple[str, str]:
    """Equal where the same recipe trains the same model as far as its passes go."""
    return config.to_json_string(use_diff=False), json.dumps([getattr(recipe, key) for key in _DECIDES])


def build_on_meta(config: Any, recipe: Recipe, *, num_layers: int | None = None) -> nn.Module:
    """The recipe's model without memory: its blocks or the first few of them, adapters and 4-bit layers in place.

    Raises:
        ValueError: transformers has no causal language model for this configuration.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if num_layers is not None:
        for key, value in vars(text).items():
            if isinstance(value, list) and len(value) == text.num_hidden_layers:
                # The first blocks may have no experts, as nearly all that they stand for have.
                setattr(text, key, value[-num_layers:] if key == "mlp_layer_types" else value[:num_layers])
        for key in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
            if getattr(text, key, None):
                setattr(text, key, 0)
        text.num_hidden_layers = num_layers
    # Soft-capped scores go through FlexAttention, which cannot run here; flash attention keeps the same tensors.
    if getattr(text, "attn_logit_softcapping", None) is not None:
        text.attn_logit_softcapping = None
    dtype = torch.float32 if recipe.load_in_4bit else getattr(torch, recipe.master_dtype)  # as peft wants it
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=dtype).train()
    except ValueError as error:
        raise ValueError(f"{text.model_type}: {first_line(error)}") from error
    if recipe.load_in_4bit:
        for module in _linear_layers(model):
            module.__class__ = FourBitLinear
    if recipe.use_peft:
        with torch.device("meta"):
            model = add_adapters(model, lora_config(recipe), seed=recipe.seed)
    if recipe.device != "cpu":
        for module in model.modules():
            if type(module) is nn.Dropout:
                module.__class__ = _FusedDropout
    return model


class FourBitLinear(nn.Linear):
    """Stands for bitsandbytes' 4-bit layer: its weight is unpacked for each product, and its input is not kept."""

    def forward(self, x: Tensor) -> Tensor:
        return _FourBitProduct.apply(x, self.weight, self.bias)


class _FusedDropout(nn.Dropout):
    """Dropout as CUDA computes it, keeping a mask of bytes; a CPU keeps one of the values' format."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, self.training)[0] if self.p else x


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, torch.empty_like(weight, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ torch.empty_like(ctx.weight, dtype=grad.dtype), None, None


def describe_weights(model: nn.Module, recipe: Recipe) -> Iterator[tuple[Weight, Tensor]]:
    """Every parameter of a model from `build_on_meta`, with what is known of it."""
    base = unwrap(model)
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    linear = {id(module.weight) for module in _linear_layers(base)}
    # A scale in fp32 for every 64 weights; quantised itself, 8 bits and an fp32 scale for 256 of them.
    four_bits = 0.5 + ((1 + 4 / 256) / 64 if recipe.bnb_4bit_use_double_quant else 4 / 64)
    for path, parameter in model.named_parameters():
        name = path.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        unit = _unit_of(name, base.fsdp_plan, tied=head is embedding)
        kind = "embedding" if parameter is embedding else "head" if parameter is head else "other"
        num_bytes: float = parameter.element_size()
        if ".lora_" in path or ".modules_to_save." in path:
            kind, unit = "adapter", ""
        elif id(parameter) in linear and unit.startswith("block "):
            kind, num_bytes = "linear", four_bits if recipe.load_in_4bit else num_bytes
        elif parameter.ndim == 3 and unit.startswith("block "):  # bitsandbytes leaves them as they are
            kind = "experts"
        split = _split_dim(name, parameter, base.tp_plan)
        shape = tuple(parameter.shape)
        yield Weight(name, shape, unit, split, num_bytes, parameter.requires_grad, kind), parameter


def _share_of_experts(text: Any) -> float:
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = next((count for name in names if (count := getattr(text, name, None))), None)
    return 1.0 if experts is None else min(1.0, (experts_per_token(text) or experts) / experts)


def _linear_layers(model: nn.Module) -> Iterator[nn.Linear]:
    """All but the head and what belongs to adapters."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in path:
            yield module


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


def _split_dim(path: str, parameter: Tensor, tp_plan: dict[str, str]) -> int | None:
    """Of an adapter: the dim that faces its layer's split one (`parallel.sharding.rebuild_adapters`)."""
    layer, _, lora = path.partition(".lora_")
    module, _, kind = path.rpartition(".")

    def style_of(name: str) -> str:
        return tp_plan.get(".".join("*" if part.isdecimal() else part for part in name.split(".")), "")

    if parameter.ndim == 3:  # experts, each [out, in]
        style = style_of(path)
        return 1 if "colwise" in style else 2 if "rowwise" in style else None
    style = style_of(layer if lora else module)
    if lora:
        return 0 if lora[0] == "B" and "colwise" in style else 1 if lora[0] == "A" and "rowwise" in style else None
    if "colwise" in style or style == "embedding_rowwise":
        return 0
    if "rowwise" in style and kind == "weight":
        return parameter.ndim - 1
    return None
