"""Configurations without weights: of shapes known by name, and from a name, a folder or a file.

Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpo.errors import first_line
from simpo.hub import unreachable_hub

_OF_WIDTH = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")


def _rope(theta: float, **others: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | others


_LLAMA_3 = {
    **{"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    **{"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 0, "initializer_range": 0.02},
    **{"max_position_embeddings": 8192, "tie_word_embeddings": False, "rope_parameters": _rope(500000.0)},
}
_LLAMA_3_2 = _LLAMA_3 | {
    **{"max_position_embeddings": 131072, "tie_word_embeddings": True},
    "rope_parameters": _rope(
        500000.0,
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
}
_MISTRAL = {  # whose window of 4096 tokens is left out
    **{"model_type": "mistral", "vocab_size": 32000, "num_key_value_heads": 8, "max_position_embeddings": 32768},
    **{"sliding_window": None, "tie_word_embeddings": False},
}
_QWEN_2_5 = {
    **{"model_type": "qwen2", "vocab_size": 152064, "num_key_value_heads": 8, "max_position_embeddings": 32768},
    **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_parameters": _rope(1000000.0)},
}
_DEEPSEEK = {"model_type": "llama", "vocab_size": 102400, "num_key_value_heads": 32, "max_position_embeddings": 4096}
_GEMMA_2 = {
    **{"model_type": "gemma2", "vocab_size": 256000, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    **{"query_pre_attn_scalar": 256, "sliding_window": 4096, "tie_word_embeddings": True},
}
_SMOLLM2 = {
    **{"model_type": "llama", "vocab_size": 49152, "num_key_value_heads": 3, "rms_norm_eps": 1e-5},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 8192},
    **{"tie_word_embeddings": True, "rope_parameters": _rope(100000.0)},
}
_KNOWN: tuple[tuple[str, tuple[str, ...], dict[str, Any], tuple[int, ...]], ...] = (
    # name, how the names of its models on the hub begin, family, the sizes of _OF_WIDTH
    ("smollm2-135m", ("HuggingFaceTB/SmolLM2-135M",), _SMOLLM2, (576, 1536, 30, 9, 64)),
    ("llama-1b", ("meta-llama/Llama-3.2-1B",), _LLAMA_3_2, (2048, 8192, 16, 32, 64)),
    ("llama-3b", ("meta-llama/Llama-3.2-3B",), _LLAMA_3_2, (3072, 8192, 28, 24, 128)),
    ("mistral-7b", ("mistralai/Mistral-7B", "alignment-handbook/zephyr-7b"), _MISTRAL, (4096, 14336, 32, 32, 128)),
    ("deepseek-7b", ("deepseek-ai/deepseek-math-7b",), _DEEPSEEK, (4096, 11008, 30, 32, 128)),
    ("llama-8b", ("meta-llama/Meta-Llama-3-8B", "princeton-nlp/Llama-3-"), _LLAMA_3, (4096, 14336, 32, 32, 128)),
    ("gemma-9b", ("google/gemma-2-9b",), _GEMMA_2, (3584, 14336, 42, 16, 256)),
    ("qwen-14b", ("Qwen/Qwen2.5-14B",), _QWEN_2_5, (5120, 13824, 48, 40, 128)),
    ("qwen-32b", ("Qwen/Qwen2.5-32B",), _QWEN_2_5, (5120, 27648, 64, 40, 128)),
    ("llama-70b", ("meta-llama/Meta-Llama-3-70B",), _LLAMA_3, (8192, 28672, 80, 64, 128)),
)
SHAPES: dict[str, dict[str, Any]] = {
    name: {**family, **dict(zip(_OF_WIDTH, sizes, strict=True))} for name, _, family, sizes in _KNOWN
}
"""Settings of the configurations of models that are known by name."""


def load_config(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """A transformers configuration, without weights.

    Args:
        name: a known shape; a .json, .yaml or .yml file with the settings of a config.json; a folder saved by
            save_pretrained; or a hub name. One that has a known shape is not asked for: it may want a login.
    Raises:
        ValueError: none of these, or not the configuration of a language model.
    """
    if name in SHAPES:
        return _from_settings(SHAPES[name] | {"dtype": "bfloat16"})  # as their weights are published
    if Path(name).suffix in (".json", ".yaml", ".yml"):
        return _from_settings(_read_settings(Path(name)), source=name)
    from transformers import AutoConfig

    known = next((shape for shape, beginnings, *_ in _KNOWN if name.startswith(beginnings)), None)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": known is not None}
    if known is None and not Path(name).is_dir():
        unreachable_hub()
    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, KeyError, ValueError) as error:
        if known is not None:
            return load_config(known)
        raise ValueError(
            f"cannot read the configuration of {name!r} ({first_line(error)}); give a folder, a hub name that can be "
            f"reached, a .json or .yaml file, or --shape with one of {', '.join(SHAPES)}"
        ) from error


def _read_settings(path: Path) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {first_line(error)}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise ValueError(f"{str(path)!r}: a configuration is a mapping with a model_type (llama, qwen2, ...)")
    return settings


def _from_settings(settings: dict[str, Any], *, source: str = "") -> Any:
    from transformers import AutoConfig

    settings = dict(settings)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source!r} is not a configuration that transformers knows: {first_line(error)}") from error
