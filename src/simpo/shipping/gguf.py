"""`simpo export --gguf`: one file for llama.cpp, ollama and the like, by the `gguf` package's writer and tensor map.

Written here for the Llama, Mistral, Qwen2 and Qwen3 families; other architectures need llama.cpp's own converter, which
is used where it is installed. Queries and keys of Llama's and Mistral's attention are written in llama.cpp's order of
rows, which rotates neighbouring pairs where transformers rotates halves.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simpo.data.files import check_writable, sync
from simpo.display import Display
from simpo.shipping.merge import merge_adapters, stored_dtype, write_folder
from simpo.shipping.modelfile import write_modelfile
from simpo.shipping.source import Source, find_source, load_source, load_source_tokenizer

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model_type -> gguf's architecture."""
FORMATS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
CONVERTER = "convert_hf_to_gguf.py"


def run_export(name: str, overrides: Sequence[str] = (), *, quantize: str = "q8_0", output: str | None = None) -> Path:
    """Write the model that `name` stands for as a .gguf file, with a Modelfile beside it; return the file.

    Args:
        name: a run, a checkpoint, a model's or adapter's folder, or a hub name.
        overrides: recipe keys.
        quantize: of matrices, one of `FORMATS`; vectors stay in float32.
        output: the file; None = next to the model.
    Raises:
        ValueError: no `gguf`, an architecture or tokenizer that cannot be written, or something would be overwritten.
    """
    if quantize not in FORMATS:
        raise ValueError(f"--quantize {quantize}: must be one of {', '.join(FORMATS)}; others are llama-quantize's")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError("writing a .gguf file needs the package gguf: pip install 'simpo[gguf]'") from error
    source, display = find_source(name, overrides), Display()
    path = Path(output) if output is not None else source.home / f"{source.title}-{quantize}.gguf"
    modelfile = path.with_name("Modelfile" if path.stem == "model" else f"{path.stem}.Modelfile")
    # A Modelfile of a file that is not there is what a killed export left, and stays.
    is_left = modelfile.is_file() and f"FROM ./{path.name}\n" in modelfile.read_text(encoding="utf-8")
    for each in (path, modelfile):
        if each.exists() and not (each == modelfile and is_left):
            raise ValueError(f"{each} is there already, and nothing is overwritten; choose another --output")
    check_writable(path, "--output")
    tokenizer = load_source_tokenizer(source)
    # Merging wants fp32; a model that is written as it is has no more than its own files.
    exact = source.is_adapter or source.is_training_state
    dtype = torch.float32 if exact else stored_dtype(source)
    model = load_source(source, device=torch.device("cpu"), dtype=dtype)
    if source.is_adapter:
        model, _ = merge_adapters(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    try:
        if model.config.model_type in ARCHITECTURES:  # type: ignore[union-attr]
            title = (source.run or source.place).resolve().name if source.place.is_dir() else source.name
            for note in write_gguf(model, tokenizer, aside, quantize=quantize, name=title):
                display.say(note)
        else:
            _convert(model, tokenizer, source, aside, quantize)
        said = [] if is_left else write_modelfile(modelfile, tokenizer, path.name, source.recipe)
        sync(aside)
        aside.replace(path)  # last: with it the export is whole
    finally:
        aside.unlink(missing_ok=True)
    display.say(f"{path}: {path.stat().st_size / 2**20:,.1f} MiB, {quantize}")
    for line in said:
        display.say(line)
    return path


# --- the file --------------------------------------------------------------------------------------------------------


def write_gguf(model: Any, tokenizer: Any, path: Path, *, quantize: str, name: str) -> list[str]:
    """Write a model of one of `ARCHITECTURES` without adapters; lines to show.

    Raises:
        ValueError: its settings or its tokenizer cannot be expressed.
    """
    import gguf

    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    notes = _add_shape(writer, config, quantize, name)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    tensors = [*_rope_factors(model, architecture), *_tensors(model, architecture)]
    kinds = [_kind(tensor, quantize) for _, tensor in tensors]
    plain: list[str] = []
    for (each, tensor), kind in zip(tensors, kinds, strict=True):
        if tensor.ndim > 1 and kind.name != FORMATS[quantize]:
            plain.append(each)
        shape = tuple(tensor.shape)
        size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
        writer.add_tensor_info(each, shape, np.dtype(np.float32), size, raw_dtype=kind)
    if plain:
        notes.append(f"{len(plain)} matrices are in f16, for their rows are no multiple of 32: {plain[0]}, ...")
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (_, tensor), kind in zip(tensors, kinds, strict=True):
            values = gguf.quantize(np.ascontiguousarray(tensor.detach().float().numpy()), kind)
            writer.write_tensor_data(values)
    finally:
        writer.close()
    return notes


def _kind(tensor: Tensor, quantize: str) -> Any:
    """In which format llama.cpp's own converter would write it."""
    import gguf

    kind = gguf.GGMLQuantizationType[FORMATS[quantize]]
    if tensor.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return kind if tensor.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _add_shape(writer: Any, config: Any, quantize: str, name: str) -> list[str]:
    import gguf

    notes, context = [], config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None and config.model_type == "mistral" and window < context:
        notes.append(f"sliding_window: llama.cpp has none for this architecture, so the context is {window} tokens")
        context = window
    if config.model_type.startswith("qwen") and getattr(config, "use_sliding_window", False):
        raise ValueError("use_sliding_window: llama.cpp has no windows for this architecture")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act = {config.hidden_act}: llama.cpp computes this architecture with silu")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if quantize == 'f32' else 'MOSTLY'}_{FORMATS[quantize]}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return notes


def _rope_factors(model: Any, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """By what each rotary frequency is divided, as the model itself has them, where it is not by 1.

    Raises:
        ValueError: that does not say it all.
    """
    config = model.config
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return
    if architecture != "llama" or kind not in ("linear", "llama3"):
        raise ValueError(f"rope_parameters {config.rope_parameters}: not written for {config.model_type}")
    rotary = model.get_decoder().rotary_emb
    size = 2 * len(rotary.inv_freq)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors = plain / rotary.inv_freq.double()
    yield "rope_freqs.weight", torch.where((factors - 1).abs() < 1e-5, 1.0, factors).float()


def _tensors(model: Any, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor once under gguf's name; a tied head is the embedding there too."""
    import gguf

    config = model.config
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    is_tied = head is embedding or torch.equal(head, embedding)
    for name, tensor in model.state_dict().items():
        if is_tied and name == "lm_head.weight":
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"{name}: gguf has no such tensor for {config.model_type}")
        if architecture == "llama" and ".attn_q." in found:
            tensor = _paired(tensor, config.num_attention_heads)
        elif architecture == "llama" and ".attn_k." in found:
            tensor = _paired(tensor, config.num_key_value_heads)
        yield found, tensor


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head [first half, second half] as pairs of one of either: [2, half] -> [half, 2]."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Vocabulary, merges or scores, special tokens, how text is split, and the chat template."""
    from gguf import TokenType

    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"a tokenizer of type {model['type']} is not written here, but BPE; use llama.cpp's {CONVERTER}"
        )
    spelled: dict[str, int] = model["vocab"] | {token["content"]: token["id"] for token in parts["added_tokens"]}
    if len(spelled) > size or max(spelled.values()) >= size:
        raise ValueError(f"the tokenizer has {len(spelled)} tokens, and the model's embedding {size} rows")
    by_id = {index: token for token, index in spelled.items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    special = {token["id"]: token["special"] for token in parts["added_tokens"]}
    in_pieces = bool(model.get("byte_fallback"))
    unknown = tokenizer.unk_token_id if in_pieces else None

    def kind(index: int, token: str) -> int:
        if index not in by_id:
            return TokenType.UNUSED
        if index == unknown:
            return TokenType.UNKNOWN
        if index in special:
            return TokenType.CONTROL if special[index] else TokenType.USER_DEFINED
        return TokenType.BYTE if in_pieces and re.fullmatch("<0x..>", token) else TokenType.NORMAL

    writer.add_tokenizer_model("llama" if in_pieces else "gpt2")
    writer.add_tokenizer_pre("default" if in_pieces else _split_name(parts))
    writer.add_token_list(tokens)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if in_pieces:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0] != "a")
    else:
        writer.add_token_merges(merges)
    writer.add_token_types(list(map(kind, range(size), tokens)))
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    around = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(around[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """llama.cpp joins the pair whose token has the highest score; a merge list, the pair that comes first."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", ""), place)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _split_name(parts: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text before it merges.

    Raises:
        ValueError: it is none of those that are known here.
    """
    from transformers.integrations.gguf import gguf_tokenizer_mapping as known

    normalizer = parts.get("normalizer") or {"type": "NFC"}  # which llama.cpp leaves out for Qwen as well
    before = parts.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    plain = normalizer["type"] == "NFC" and not any(step.get("add_prefix_space") for step in steps)
    if plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
        splits = known.GGUF_PRE_TOKENIZER_SPLITS
        for name in ("llama-bpe", "qwen2", "tekken", "gpt-4o"):
            if splits.get(name) == steps[0]["pattern"].get("Regex"):
                return name
    raise ValueError(
        f"this tokenizer splits text in a way that is not known here ({', '.join(map(str, kinds))}), and llama.cpp has "
        f"to know it by name; use its {CONVERTER}"
    )


# --- other architectures ---------------------------------------------------------------------------------------------


def find_converter() -> Path | None:
    """llama.cpp's converter: on the PATH, or in the folder that LLAMA_CPP names."""
    here = Path(os.environ.get("LLAMA_CPP", "")) / CONVERTER
    found = shutil.which(CONVERTER)
    return here if os.environ.get("LLAMA_CPP") and here.is_file() else Path(found) if found else None


def _convert(model: nn.Module, tokenizer: Any, source: Source, path: Path, quantize: str) -> None:
    """By llama.cpp's converter, from an ordinary folder."""
    converter, kind = find_converter(), model.config.model_type  # type: ignore[union-attr]
    if converter is None:
        raise ValueError(
            f"{kind} is not written here (that is {', '.join(ARCHITECTURES)}); llama.cpp's {CONVERTER} may know it: "
            "put it on the PATH, or its folder into LLAMA_CPP"
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write_folder(model, tokenizer, source, Path(folder) / "model", next(model.parameters()).dtype)
        words = [sys.executable, converter, Path(folder) / "model", "--outfile", path, "--outtype", quantize]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode or not path.is_file():
        last = (done.stderr.strip() or done.stdout.strip()).split("\n")[-1]
        raise ValueError(f"{converter} does not convert {kind}: {last}")
