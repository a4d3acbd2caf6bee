"""Hugging Face weights into a Megatron-Core GPTModel and back (Llama, Mistral, Qwen2), any tensor and pipeline layout.

The names of a layer's weights differ, and three are laid out differently:
    linear_qkv   per key-value group, its query heads, then its key, then its value
    linear_fc1   gate and up one above the other, on every tensor-parallel rank its part of both
    vocabulary   rows, cut by the tensor-parallel size (which must divide their number: Megatron would fill up with rows
                 that take part in the softmax, and log-probs would no longer be those of the model)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

ARCHITECTURES = ("llama", "mistral", "qwen2")

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and where it comes from.

    Attributes:
        sources: names of the Hugging Face weights it is made of.
        fuse: their tensors (whole) -> one tensor for each tensor-parallel rank.
        split: those tensors -> the Hugging Face weights, in the order of `sources`.
    """

    sources: tuple[str, ...]
    fuse: Callable[[list[Tensor], int], list[Tensor]]
    split: Callable[[list[Tensor]], list[Tensor]]


def _whole(name: str) -> Entry:
    """The same on every tensor-parallel rank."""
    return Entry((name,), lambda tensors, tp: tensors * tp, lambda parts: parts[:1])


def _cut(name: str, dim: int) -> Entry:
    return Entry((name,), lambda tensors, tp: list(tensors[0].chunk(tp, dim)), lambda parts: [torch.cat(parts, dim)])


def _gated(gate: str, up: str) -> Entry:
    def fuse(tensors: list[Tensor], tp: int) -> list[Tensor]:
        return [torch.cat(halves) for halves in zip(*(tensor.chunk(tp) for tensor in tensors), strict=True)]

    def split(parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat(halves) for halves in zip(*(part.chunk(2) for part in parts), strict=True)]

    return Entry((gate, up), fuse, split)


def _attention(names: tuple[str, str, str], config: PretrainedConfig) -> Entry:
    groups = config.num_key_value_heads
    heads = config.num_attention_heads // groups
    size = head_dim(config)

    def fuse(tensors: list[Tensor], tp: int) -> list[Tensor]:
        by_group = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return list(torch.cat(by_group, dim=1).flatten(0, 1).chunk(tp))

    def split(parts: list[Tensor]) -> list[Tensor]:
        by_group = torch.cat(parts).unflatten(0, (groups, -1))
        return [tensor.flatten(0, 1) for tensor in by_group.split([heads * size, size, size], dim=1)]

    return Entry(names, fuse, split)


def head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def entries(chunk: GPTModel, config: PretrainedConfig) -> Iterator[tuple[str, Entry]]:
    """(parameter name, where it comes from) for every parameter of a model chunk."""
    if chunk.pre_process:
        yield "embedding.word_embeddings.weight", _cut("model.embed_tokens.weight", 0)
    for index, layer in enumerate(chunk.decoder.layers):
        ours, theirs = f"decoder.layers.{index}.", f"model.layers.{layer.layer_number - 1}."
        yield ours + "input_layernorm.weight", _whole(theirs + "input_layernorm.weight")
        for kind in ("weight", "bias") if config.model_type == "qwen2" else ("weight",):
            names = tuple(f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv")
            yield ours + f"self_attention.linear_qkv.{kind}", _attention(names, config)
        yield ours + "self_attention.linear_proj.weight", _cut(theirs + "self_attn.o_proj.weight", 1)
        yield ours + "pre_mlp_layernorm.weight", _whole(theirs + "post_attention_layernorm.weight")
        yield (
            ours + "mlp.linear_fc1.weight",
            _gated(theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"),
        )
        yield ours + "mlp.linear_fc2.weight", _cut(theirs + "mlp.down_proj.weight", 1)
    if chunk.post_process:
        yield "decoder.final_layernorm.weight", _whole("model.norm.weight")
        if not config.tie_word_embeddings:
            yield "output_layer.weight", _cut("lm_head.weight", 0)
        elif not chunk.pre_process:  # the last stage has a copy of the first one's embeddings
            yield "output_layer.weight", _cut("model.embed_tokens.weight", 0)


def check_config(config: PretrainedConfig, *, tp: int, pp: int, chunks: int) -> None:
    """Raise ValueError for a model or layout that this example does not convert."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"model type {config.model_type!r}: this example converts {', '.join(ARCHITECTURES)}")
    unusual = {
        "sliding_window": config.model_type == "mistral" and config.sliding_window,
        "use_sliding_window": getattr(config, "use_sliding_window", False),
        "attention_bias": getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "rope_parameters": config.rope_parameters.get("rope_type", "default") != "default",
        "hidden_act": config.hidden_act != "silu",
    }
    for name, found in unusual.items():
        if found:
            raise ValueError(f"{name} = {getattr(config, name)!r} of this model is not converted by this example")
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size"):
        if getattr(config, name) % tp:
            raise ValueError(
                f"tensor_model_parallel_size = {tp}: does not divide the model's {name}, {getattr(config, name)}"
            )
    if config.num_hidden_layers % (pp * chunks):
        raise ValueError(
            f"pipeline_model_parallel_size = {pp} with {chunks} virtual stage(s) does not divide the model's "
            f"{config.num_hidden_layers} layers"
        )


def megatron_config(config: PretrainedConfig, **options: object) -> TransformerConfig:
    """Megatron's configuration of the same transformer; options override it.

    Every fusion is off: with megatron-core alone there are no kernels for them. Weights are initialised although all
    are loaded: with use_cpu_initialization, 0.16 marks the shards of tensor-parallel ranks only there, and without the
    marks the gradient norm leaves out all but the first rank's.
    """
    settings: dict[str, object] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": head_dim(config),
        "ffn_hidden_size": config.intermediate_size,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "add_bias_linear": False,
        "add_qkv_bias": config.model_type == "qwen2",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
    }
    return TransformerConfig(**(settings | options))


def build_chunks(
    config: PretrainedConfig,
    megatron: TransformerConfig,
    *,
    max_sequence_length: int,
    layer_spec: ModuleSpec | None = None,
) -> list[GPTModel]:
    """The model chunks of this pipeline rank (several with virtual stages), without weights worth having.

    Args:
        layer_spec: of the transformer layers; None = megatron-core's own modules. With Transformer Engine installed,
            get_gpt_layer_with_transformer_engine_spec is faster (it merges norms into linear layers, under names that
            `entries` would have to learn).
    """
    chunks = megatron.virtual_pipeline_model_parallel_size or 1
    return [
        GPTModel(
            megatron,
            layer_spec or get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=config.vocab_size,
            max_sequence_length=max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            parallel_output=True,
            share_embeddings_and_output_weights=config.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=config.rope_parameters["rope_theta"],
            vp_stage=stage if chunks > 1 else None,
        )
        for stage in range(chunks)
    ]


@torch.no_grad()
def load_weights(chunks: list[GPTModel], config: PretrainedConfig, weights: Weights) -> None:
    """Copy Hugging Face weights into this rank's parts of the model.

    Raises:
        ValueError: a parameter that no rule fills, or a shape that differs.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        for name, entry in entries(chunk, config):
            part = entry.fuse([weights[source] for source in entry.sources], group.size())[group.rank()]
            parameter = parameters.pop(name)
            if parameter.shape != part.shape:
                raise ValueError(f"{name}: {tuple(part.shape)} from {entry.sources}, not {tuple(parameter.shape)}")
            parameter.copy_(part)
        if parameters:
            raise ValueError(f"nothing was loaded into {', '.join(parameters)}")


def gather_weights(
    chunks: list[GPTModel],
    config: PretrainedConfig,
    *,
    value: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter.detach(),
) -> dict[str, Tensor]:
    """The whole model under Hugging Face names, on the CPU of global rank 0; nothing on other ranks.

    Args:
        chunks: on every rank, without wrappers.
        value: what of each parameter is gathered; a test asks for gradients.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    whole: dict[str, Tensor] = {}
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        for name, entry in entries(chunk, config):
            own = value(parameters[name]).contiguous()
            parts = [torch.empty_like(own) for _ in range(group.size())]
            dist.all_gather(parts, own, group=group)
            whole |= zip(entry.sources, entry.split([part.cpu() for part in parts]), strict=True)
    # One rank of each pipeline stage speaks for it. All of the model passes through rank 0's memory: fine for models
    # that fit there, which this example is for.
    speaks = group.rank() == 0 and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    shares: list[dict[str, Tensor]] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(whole if speaks else {}, shares)
    return {name: tensor for share in shares or [] for name, tensor in share.items()}
