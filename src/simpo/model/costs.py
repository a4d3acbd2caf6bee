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
    heads = config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
    }
