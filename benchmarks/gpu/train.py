"""`gpu.py train`: `simpo train` itself on a small random model, and what a user would switch on there.

A run of six steps is done twice, once without a break and once resumed from its third step by a new trainer, with the
random state of torch disturbed in between: with deterministic algorithms the final weights must be the same bits,
without them equal to round-off. Then three steps with each option.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu.device import Deadline, Meter, TimeUp, first_line, stop_at
from gpu.report import Column, Report, digits

NEEDED = ("datasets", "dill", "multiprocess", "pydantic", "pydantic_core", "annotated_types", "typing_inspection")
NEEDED += ("rich", "accelerate")
ROUND_OFF = 0.05
"""Of the weights' displacement: how far a resumed run may be from one without a break, whose additions are in another
order. AdamW's first steps move each weight by the learning rate in the direction of its gradient's sign, and where the
gradient is round-off, so is the sign."""
STEPS, BROKEN_AT = 6, 3
WORDS = ("water", "stone", "light", "river", "bread", "paper", "glass", "green", "quick", "slow", "open", "close")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "activation_offload": {"activation_offload": True},
    "checkpointing": {"gradient_checkpointing": True},
    "8-bit": {"optim": "adamw_8bit"},
    "bf16 weights": {"master_dtype": "bfloat16", "optim": "adamw_bf16"},
    "optimizer_offload": {"master_dtype": "bfloat16", "optim": "adamw_bf16", "optimizer_offload": True},
    "flash3": {"attention_kernel": "flash3"},
    "liger": {"use_liger_kernel": True},
    "torch_compile": {"torch_compile": True},  # last: it takes its time
}
"""Keys of a recipe; a row whose keys this version lacks is left out."""


def run_train(report: Report, meter: Meter, deadline: Deadline, *, tiny: bool) -> bool:
    """Resume, then every option; whether weights of a resumed deterministic run are the same bits and nothing raised.

    Raises:
        ValueError: packages that `simpo train` needs are not here.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        report.finish(complete=False)
        raise ValueError(f"train: needs {', '.join(missing)}; carry wheels of them and add --wheels FOLDER")
    from simpo.recipe.keys import Recipe

    finished = False
    with contextlib.suppress(TimeUp), stop_at(deadline), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "train.jsonl", 48)
        write_model(folder / "model", tiny=tiny)
        base = {
            "model_name_or_path": str(folder / "model"),
            "dataset_mixer": {str(folder / "train.jsonl"): 1.0},
            "cache_dir": str(folder / "cache"),
            "device": meter.device.type,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_length": 512,
            "learning_rate": 1e-4,
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
        }
        for deterministic in (True, False):
            if deterministic and "full_determinism" not in Recipe.model_fields:
                continue
            keys = {"full_determinism": True} if deterministic else {}
            report.say(f"resume {keys or ''} ...")
            what = f"resume, {'deterministic' if deterministic else 'as it comes'}"
            report.add(attempt_row(meter, what, check_resume, folder, base | keys, deterministic))
        for name, keys in OPTIONS.items():
            if set(keys) <= Recipe.model_fields.keys() and not (meter.device.type == "cpu" and "offload" in name):
                report.say(f"{name} ...")
                steps = base | keys | {"max_steps": 3, "output_dir": str(folder / name)}
                report.add(attempt_row(meter, name, run_steps, steps))
        finished = True
    if not finished:
        report.note("the time was over before all options were run")
    report.finish(complete=finished)
    return all(row["ok"] is not False for row in report.results["rows"])


def attempt_row(meter: Meter, what: str, work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """The row that `work` gives, with its time; or the error that it ended with, which leaves the other rows.

    A ValueError is the trainer's own word that something cannot be had here, such as a package: no failure.
    """
    row: dict[str, Any] = {"what": what, "ok": True, "note": ""}
    began = time.perf_counter()
    try:
        row |= work(*args)
    except Exception as error:
        row |= {
            "ok": None if isinstance(error, ValueError) else False,
            "note": first_line(error),
        }
    torch.use_deterministic_algorithms(False)  # full_determinism holds for its process, and the next row shares it
    meter.release()
    return row | {"seconds": time.perf_counter() - began}


def check_resume(folder: Path, base: dict[str, Any], deterministic: bool) -> dict[str, Any]:
    """Train, train again from the middle, compare the weights bit by bit."""
    runs = [folder / f"{'deterministic' if deterministic else 'ordinary'}-{number}" for number in (1, 2)]
    keys = base | {"max_steps": STEPS, "save_strategy": "steps", "save_steps": BROKEN_AT, "async_save": True}
    first = run_steps(keys | {"output_dir": str(runs[0])})
    torch.manual_seed(123456)
    checkpoint = runs[0] / "checkpoints" / f"step-{BROKEN_AT}"
    run_steps(keys | {"output_dir": str(runs[1]), "resume_from_checkpoint": str(checkpoint)})
    one, other, start = (load_weights(path) for path in (runs[0] / "model", runs[1] / "model", folder / "model"))
    moved = sum(float((one[name].double() - start[name].double()).square().sum()) for name in one) ** 0.5
    off = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5
    fine = off == 0 if deterministic else off <= ROUND_OFF * moved
    note = "resumed: equal bits" if off == 0 else f"resumed: differs by {off / moved:.2g} of the displacement"
    return first | {"ok": fine and moved > 0, "note": note}


def run_steps(keys: dict[str, Any]) -> dict[str, Any]:
    """One run of the trainer; its last loss."""
    from simpo.display import Display
    from simpo.recipe import load_recipe
    from simpo.trainer import Trainer

    result = Trainer(load_recipe(keys), display=Display(quiet=True)).run()
    with (result.output_dir / "metrics.jsonl").open(encoding="utf-8") as lines:
        losses = [values["loss"] for line in lines if "loss" in (values := json.loads(line))]
    return {"steps": result.steps, "loss": losses[-1]}


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def write_pairs(path: Path, count: int) -> None:
    """Pairs of random words."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    rows = [
        {"prompt": text(5, 40), "chosen": "water " + text(5, 60), "rejected": "stone " + text(5, 60)}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_model(folder: Path, *, tiny: bool) -> None:
    """A random Llama whose heads take `varlen_attn`, and a byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    heads, size = (3, 16) if tiny else (8, 64)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=heads * size,
        intermediate_size=2 * heads * size,
        num_hidden_layers=2 if tiny else 4,
        num_attention_heads=heads,
        num_key_value_heads=1 if tiny else 2,
        initializer_range=0.08,
        max_position_embeddings=512,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


COLUMNS: tuple[Column, ...] = (
    ("what", lambda row: row["what"]),
    ("steps", lambda row: str(row.get("steps", ""))),
    ("loss", lambda row: f"{row['loss']:.5f}" if "loss" in row else ""),
    ("s", lambda row: digits(row["seconds"])),
    ("result", lambda row: {True: "ok", False: "FAILED", None: "not here"}[row["ok"]]),
    ("note", lambda row: row["note"]),
)
