"""The relative compute of tokens, attention and head for a model, read from its configuration."""

from __future__ import annotations

from typing import Any

from simpo.core.packing import CostWeights


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
        return getattr(config, name, None)
    except RuntimeError:
        return max(getattr(layer, name) for layer in config.per_layer_config)
