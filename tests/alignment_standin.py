"""A stand-in for the alignment-handbook's package, by the names that scripts import: its dataclasses and functions.

The SimPO authors' scripts and recipes are written for it. Only names and field names are its own.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint


def neighbour(name: str, **fields: Any) -> type:
    """A dataclass with these fields; each is a default, or (type, default)."""
    declared = []
    for field, default in fields.items():
        kind, value = default if isinstance(default, tuple) else (type(default), default)
        mutable = isinstance(value, list | dict)
        rest = {"default_factory": lambda value=value: copy.copy(value)} if mutable else {"default": value}
        declared.append((field, kind, dataclasses.field(**rest)))
    return dataclasses.make_dataclass(name, declared)


ModelArguments = neighbour(
    "ModelArguments",
    **dict.fromkeys(("base_model_revision", "model_name_or_path", "model_code_revision"), (str | None, None)),
    **dict.fromkeys(("torch_dtype", "tokenizer_name_or_path", "attn_implementation"), (str | None, None)),
    **dict.fromkeys(("lora_target_modules", "lora_modules_to_save"), (list[str] | None, None)),
    **dict.fromkeys(("trust_remote_code", "use_flash_attention_2", "use_peft", "load_in_8bit", "load_in_4bit"), False),
    **{"model_revision": "main", "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": False},
    **{"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
)
DataArguments = neighbour(
    "DataArguments",
    **dict.fromkeys(("chat_template", "truncation_side", "text_column"), (str | None, None)),
    dataset_mixer=(dict | None, None),
    dataset_splits=(list[str] | None, ["train", "test"]),
    dataset_configs=(list[str] | None, None),
    preprocessing_num_workers=(int | None, None),
    auto_insert_empty_system_msg=True,
)


class H4ArgumentParser(HfArgumentParser):
    """`run_simpo.py recipe.yaml --key=value`: the file first, then the words in each class that has the key."""

    def parse(self) -> tuple[Any, ...]:
        path, *words = sys.argv[1:]
        given = dict(word.removeprefix("--").split("=", 1) for word in words)
        outcome = []
        for read in self.parse_yaml_file(path):
            values = {f.name: getattr(read, f.name) for f in dataclasses.fields(read) if f.init}
            outcome.append(type(read)(**{**values, **{key: text for key, text in given.items() if key in values}}))
        return tuple(outcome)


def get_checkpoint(training_args: Any) -> str | None:
    return get_last_checkpoint(training_args.output_dir) if Path(training_args.output_dir).is_dir() else None


def get_datasets(data_args: Any, *, splits: list[str], **others: Any) -> Any:
    """Pairs as lists of messages, the way the handbook's data sets have them."""
    from datasets import DatasetDict, load_dataset

    def as_messages(row: dict[str, str]) -> dict[str, Any]:
        asked = {"role": "user", "content": row["prompt"]}
        return {side: [asked, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}

    (folder,) = data_args.dataset_mixer
    files = {split: str(Path(folder) / f"{split}.jsonl") for split in splits}
    read = load_dataset("json", data_files=files)
    return DatasetDict({split: rows.map(as_messages) for split, rows in read.items()})


def get_tokenizer(model_args: Any, data_args: Any) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    tokenizer.bos_token = "<|endoftext|>"  # one that the template does not write
    if data_args.chat_template is not None:
        tokenizer.chat_template = data_args.chat_template
    return tokenizer


def get_peft_config(model_args: Any) -> Any:
    if not model_args.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def get_quantization_config(model_args: Any) -> None:
    assert not model_args.load_in_4bit


def decontaminate_humaneval(rows: dict[str, list[str]], text_column: str) -> list[bool]:
    """Which rows of a batch do not hold the benchmark's text."""
    return ["def has_close_elements" not in text for text in rows[text_column]]
