"""The models of the benchmark: a folder of yours, or a known shape with random weights, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpo.plan import shapes


def llama_settings(shape: str) -> dict[str, Any]:
    """Of LlamaConfig, for a shape of `plan.shapes`."""
    return {key: value for key, value in shapes.SHAPES[shape].items() if key != "model_type"}


SHAPES = {name: llama_settings(name) for name in ("llama-1b", "llama-3b", "llama-8b")}
"""Those that one machine can hold with random weights."""
SMALL_MODEL = "SmolLM2-135M-Instruct"


def small_model_folder() -> Path:
    """Where `make model` puts the demo's model; may not exist."""
    from simpo.data.cache import user_cache  # it imports pyarrow, which a GPU machine need not have

    return user_cache() / "models" / SMALL_MODEL


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
        return shapes.load_config(model)
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
