"""Model shapes that are known by name, and configurations from a name, a folder or a file: sizes without weights.

Must not import data, train or evaluate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpo.errors import first_line

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "initializer_range": 0.02,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 0,
}
_LLAMA_3_0 = {
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "head_dim": 128,
}
_LLAMA_3_2 = {
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN_2_5 = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {  # Llama-3.2-1B
        **_LLAMA_3,
        **_LLAMA_3_2,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
    "llama-3b": {  # Llama-3.2-3B
        **_LLAMA_3,
        **_LLAMA_3_2,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
    },
    "mistral-7b": {  # Mistral-7B-v0.1, whose window of 4096 tokens is left out
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "llama-8b": {  # Meta-Llama-3-8B
        **_LLAMA_3,
        **_LLAMA_3_0,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "qwen-14b": {**_QWEN_2_5, "intermediate_size": 13824, "num_hidden_layers": 48},  # Qwen2.5-14B
    "qwen-32b": {**_QWEN_2_5, "intermediate_size": 27648, "num_hidden_layers": 64},  # Qwen2.5-32B
    "llama-70b": {  # Meta-Llama-3-70B
        **_LLAMA_3,
        **_LLAMA_3_0,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


def build_config(shape: str) -> Any:
    """The transformers configuration of a known shape.

    Raises:
        ValueError: no shape of that name.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape: {shape!r} is not known; choose one of {', '.join(SHAPES)}, or give a file")
    return _from_settings(SHAPES[shape])


def load_config(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """A transformers configuration, without weights.

    Args:
        name: a known shape; a .json, .yaml or .yml file with the settings of a config.json; a folder saved by
            save_pretrained; or a hub name.
    Raises:
        ValueError: none of these, or not the configuration of a language model.
    """
    if name in SHAPES:
        return build_config(name)
    path = Path(name)
    if path.suffix in (".json", ".yaml", ".yml"):
        return _from_settings(_read_settings(path), source=name)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"cannot read the configuration of {name!r} ({first_line(error)}); give a folder, a hub name that can be "
            f"reached, a .json or .yaml file, or a shape: {', '.join(SHAPES)}"
        ) from error


def _read_settings(path: Path) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {first_line(error)}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise ValueError(
            f"{str(path)!r} holds no configuration: a mapping with a model_type (llama, qwen2, ...) is needed"
        )
    return settings


def _from_settings(settings: dict[str, Any], *, source: str = "") -> Any:
    from transformers import AutoConfig

    settings = dict(settings)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source!r} is not a configuration that transformers knows: {first_line(error)}") from error
