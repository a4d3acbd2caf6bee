"""The models of the benchmark: a folder of yours, or a known shape with random weights, without a download."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_LLAMA_3 = {
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "initializer_range": 0.02,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 0,
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
    "llama-8b": {  # Meta-Llama-3-8B
        **_LLAMA_3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "head_dim": 128,
    },
}
SMALL_MODEL = "SmolLM2-135M-Instruct"


def small_model_folder() -> Path:
    """Where `make model` puts the demo's model; may not exist."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "simpo" / "models" / SMALL_MODEL


def check_model(model: str) -> None:
    """Raise ValueError unless `model` is a known shape or a folder with a config.json."""
    if model not in SHAPES and not (Path(model) / "config.json").is_file():
        hint = "; `make model` fetches the small model" if Path(model) == small_model_folder() else ""
        raise ValueError(
            f"model: {model} is neither a folder saved by save_pretrained nor one of {', '.join(SHAPES)} "
            f"(random weights){hint}"
        )


def build_config(model: str) -> Any:
    """The transformers configuration of a shape or folder."""
    if model in SHAPES:
        from transformers import LlamaConfig

        return LlamaConfig(**SHAPES[model])
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)


def tokenizer_folder(model: str) -> Path | None:
    """Whose tokenizer reads real pairs: the model's own, or the small model's for random weights; None = none here."""
    if model not in SHAPES:
        return Path(model)
    folder = small_model_folder()
    return folder if (folder / "tokenizer.json").is_file() else None


def write_random_model(model: str, folder: Path, *, device: str) -> None:
    """Save a shape with random weights (seed 0, bf16 on disk, so half the size) and a tokenizer that can only pad."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(build_config(model), dtype=torch.bfloat16)
    network.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2}, unk_token="<pad>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


def num_parameters(model: str) -> int:
    """Weights of the model, counted without any."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build_config(model)).num_parameters()
