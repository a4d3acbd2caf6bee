"""What a model's configuration says: the relative compute of tokens, attention and head, and which meshes fit."""

from __future__ import annotations

from typing import Any

from simpo.core.packing import CostWeights
from simpo.parallel.mesh import MeshSizes


def cost_weights(config: Any) -> CostWeights:
    """What attention and the head of a transformers model cost compared with one token's way through its blocks.

    Taken to be a dense decoder with gated feed-forward blocks. For another one (experts, ungated blocks) the weights
    are off by some tens of percent, which makes micro-batches a little less even and changes nothing that is computed.
    """
    sizes = decoder_sizes(config)
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    attention_weights = 2 * hidden * sizes["head_dim"] * (heads + sizes["num_kv_heads"])
    layer_weights = attention_weights + 3 * hidden * sizes["intermediate_size"]
    return CostWeights(
        attention=2 * heads * sizes["head_dim"] / layer_weights,
        head=sizes["vocab_size"] * hidden / (sizes["num_layers"] * layer_weights),
    )


def decoder_sizes(config: Any) -> dict[str, int]:
    """The sizes of a transformers model under one set of names, usual values where its configuration has none."""
    config = config.get_text_config()
    hidden, heads = config.hidden_size, setting(config, "num_attention_heads") or 1  # state-space models have none
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": hidden,
        "intermediate_size": setting(config, "intermediate_size") or 4 * hidden,
        "num_heads": heads,
        "num_kv_heads": setting(config, "num_key_value_heads") or heads,
        "head_dim": setting(config, "head_dim") or hidden // heads,
        "vocab_size": config.vocab_size,
    }


def experts_per_token(config: Any) -> int | None:
    """To how many experts a token is sent; None = the configuration does not say, or there are none."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
    return next((int(value) for name in names if (value := getattr(config.get_text_config(), name, None))), None)


def setting(config: Any, name: str) -> Any:
    """A setting of a transformers configuration, None where it has none; the largest where it varies between layers."""
    try:
        value = getattr(config, name, None)
        return max(value) if isinstance(value, list | tuple) and value else value
    except RuntimeError:
        return max(getattr(layer, name) for layer in config.per_layer_config)


def check_heads(config: Any, sizes: MeshSizes) -> None:
    """Raise ValueError where a model's heads do not divide by tp and cp, or transformers cannot shard it by tp.

    Args:
        config: the model's transformers configuration.
    """
    text = config.get_text_config()
    found = decoder_sizes(config)
    heads, kv_heads = found["num_heads"], found["num_kv_heads"]
    if sizes.tp > 1:
        if not getattr(text, "base_model_tp_plan", None):
            raise ValueError(
                f"tp = {sizes.tp}: transformers has no tensor-parallel plan for {text.model_type}; set tp: 1"
            )
        for name, count in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
            if count % sizes.tp:
                raise ValueError(
                    f"tp = {sizes.tp}: does not divide this model's {name} = {count}; choose one that does"
                )
    if sizes.cp > 1 and not setting(text, "num_attention_heads"):
        raise ValueError(f"cp = {sizes.cp}: {text.model_type} has no attention heads to share out; set cp: 1")
    if heads // sizes.tp % sizes.cp:
        each = f"{heads // sizes.tp} attention heads" + (f" of each of {sizes.tp} tp ranks" if sizes.tp > 1 else "")
        raise ValueError(f"cp = {sizes.cp}: does not divide the {each} of this model; choose one that does")
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type")
    if sizes.cp > 1 and rope in ("dynamic", "longrope"):
        raise ValueError(
            f"cp = {sizes.cp}: {text.model_type}'s rotary embedding ({rope}) depends on the longest position of a row, "
            "which the processes that share it would see differently; set cp: 1"
        )
    if sizes.shard > 1 and not getattr(text, "base_model_fsdp_plan", None):
        raise ValueError(
            f"transformers has no sharding plan for {text.model_type}; "
            "set dp_shard: 1, cp: 1 and dp_replicate to the number of processes"
        )
