"""How far training moves the weights, and where to: every precision and engine beside one process in fp32.

    python benchmarks/displacement.py --model MODEL [--pairs examples/demo/pairs] [--only ZeRO] [--output table.json]

At a learning rate of 1e-6 a run moves each weight by some 1e-5: less than bf16 can tell apart, and nothing that a loss
curve would show. So each row trains the same pairs in the same order on the CPU, writes its model in float32, and its
displacement (weights written - weights read, as bf16 has them where it trains those) is compared with the first row's:
the cosine between the two, and the ratio of their lengths. The last column is the share of the weights that a file in
bf16 would show as they were before. LoRA rows compare what the adapters add to the weights, with LoRA in fp32. Exits 1
where a row could not be trained. ZeRO rows need deepspeed; a row takes one to two minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from torch import Tensor

REPO = Path(__file__).resolve().parents[1]
FP32, BF16 = {"bf16": False}, {"bf16": True}
LORA = {"use_peft": True, "lora_dropout": 0.0}


@dataclass(frozen=True)
class Row:
    """One way to train: recipe keys, and the launcher of its two processes (none: one process)."""

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    launcher: str = ""  # "torchrun", or a file of recipes/accelerate
    like: str = "fp32"  # the row whose displacement is the reference


ROWS = (
    Row("fp32", FP32),
    Row("bf16 compute", BF16),
    Row("bf16 weights, adamw_bf16", BF16 | {"master_dtype": "bfloat16", "optim": "adamw_bf16"}),
    Row("bf16 weights, adamw_torch", BF16 | {"master_dtype": "bfloat16", "optim": "adamw_torch"}),
    Row("FSDP2 on two", BF16 | {"dp_shard": 2}, "torchrun"),
    Row("ZeRO-2 on two", BF16, "deepspeed_zero2.yaml"),
    Row("ZeRO-3 on two", BF16, "deepspeed_zero3.yaml"),
    Row("LoRA, fp32", FP32 | LORA, like="LoRA, fp32"),
    Row("LoRA, bf16 compute", BF16 | LORA, like="LoRA, fp32"),
    Row("LoRA, bf16 weights", BF16 | LORA | {"master_dtype": "bfloat16"}, like="LoRA, fp32"),
)


def main() -> int:
    """Train every row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model; its weights in safetensors")
    parser.add_argument("--pairs", default=str(REPO / "examples/demo/pairs"), help="preference pairs")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--pairs-per-step", type=int, default=2, help="even, so that two processes can share them")
    parser.add_argument("--max-length", type=int, default=128, help="longer pairs are left out")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--only", default="", help="only rows with this in their names, and their references")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    wanted = [row for row in ROWS if args.only.lower() in row.name.lower()]
    rows = [row for row in ROWS if row in wanted or row.name in {each.like for each in wanted}]
    results: list[dict[str, Any]] = []
    print("| | cosine with fp32 | length / its | mean change of a weight | held-out loss | lost in bf16 |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for row in rows:
            folder = Path(work) / row.name.replace(" ", "-").replace(",", "")
            result = {"row": row.name, **measure(row, rows, folder, args)}
            results.append(result)
            print(as_line(result), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any("error" in result for result in results))


def measure(row: Row, rows: list[Row], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train one row into `folder`; how its displacement compares with its reference's, which was trained before."""
    if row.launcher.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        return {"error": "deepspeed is not installed"}
    error = train(row, folder, args)
    if error:
        return {"error": error}
    reference = folder.with_name(row.like.replace(" ", "-").replace(",", ""))
    dot = own = other = total = lost = 0.0
    count = 0
    in_bf16 = row.keys.get("master_dtype") == "bfloat16"
    for name, ours in displacement(folder / "model", args.model, in_bf16=in_bf16):
        theirs = displacement_of(name, reference / "model", args.model, in_bf16=False)
        dot += float((ours * theirs).sum())
        own, other = own + float(ours.square().sum()), other + float(theirs.square().sum())
        total, count = total + float(ours.abs().sum()), count + ours.numel()
        if "lora_A" not in name:
            after, before = (reader(where)(name).bfloat16() for where in (folder / "model", args.model))
            lost += float((after == before).sum())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]
    return {
        "cosine": dot / max((own * other) ** 0.5, 1e-300),
        "length_ratio": (own / other) ** 0.5,
        "mean_change": total / count,
        "eval_loss": next((line["eval_loss"] for line in reversed(lines) if "eval_loss" in line), float("nan")),
        "lost_in_bf16": None if row.keys.get("use_peft") else lost / count,
    }


def as_line(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"| {result['row']} | {result['error']} | | | | |"
    lost = "" if result["lost_in_bf16"] is None else f"{result['lost_in_bf16']:.1%}"
    return (
        f"| {result['row']} | {result['cosine']:.4f} | {result['length_ratio']:.4f} | {result['mean_change']:.2e} | "
        f"{result['eval_loss']:.4f} | {lost} |"
    )


# --- training --------------------------------------------------------------------------------------------------------


def train(row: Row, folder: Path, args: argparse.Namespace) -> str:
    """`simpo train` under the row's launcher; returns what went wrong, or nothing."""
    processes = 2 if row.launcher else 1
    recipe = {
        "model_name_or_path": str(args.model.expanduser().resolve()),
        "dataset_mixer": {args.pairs: 1.0},
        "output_dir": str(folder),
        "cache_dir": str(folder.parent / "cache"),
        **{"max_length": args.max_length, "max_prompt_length": args.max_length - 1},
        **{"overlong": "drop", "max_dropped_fraction": 1.0},
        **{"learning_rate": args.learning_rate, "lr_scheduler_type": "constant", "warmup_ratio": 0.0},
        **{"max_steps": args.steps, "per_device_train_batch_size": args.pairs_per_step // processes},
        **{
            "save_dtype": "float32",
            "save_strategy": "no",
            "eval_strategy": "steps",
            "eval_steps": args.steps,
            "logging_steps": args.steps,
        },
        **{"device": "cpu", "num_threads": args.threads, "max_tokens_per_micro_batch": 16 * args.max_length},
        **row.keys,
    }
    folder.mkdir(parents=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [*launcher(row, folder), "-m", "simpo", "train", str(path)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    env["OMP_NUM_THREADS"] = str(args.threads)
    done = subprocess.run(command, env=env, cwd=REPO, text=True, capture_output=True, check=False)
    if done.returncode == 0:
        return ""
    lines = (done.stderr or done.stdout).strip().splitlines()
    return next((line for line in lines if line.lstrip().startswith("error:")), lines[-1] if lines else "failed")


def launcher(row: Row, folder: Path) -> list[str]:
    """The command in front of `-m simpo`."""
    if not row.launcher:
        return [sys.executable]
    if row.launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = yaml.safe_load((REPO / "recipes" / "accelerate" / row.launcher).read_text(encoding="utf-8"))
    adapted = folder.with_suffix(".accelerate.yaml")
    adapted.write_text(yaml.safe_dump({**settings, "num_processes": 2}), encoding="utf-8")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(adapted)]
    return [*start, "--main_process_port", port]


# --- displacement ----------------------------------------------------------------------------------------------------


def displacement(model: Path, base: Path, *, in_bf16: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, what training added), in fp64, for each weight of a model folder or of its adapters."""
    for name in sorted(names_in(model)):
        if "lora_B" not in name:
            yield name, displacement_of(name, model, base, in_bf16=in_bf16)


def displacement_of(name: str, model: Path, base: Path, *, in_bf16: bool) -> Tensor:
    """What training added to one weight; for LoRA `name` is that of A, and B times A is what counts (up to a factor
    that all rows share)."""
    read = reader(model)
    if "lora_A" in name:
        return read(name.replace("lora_A", "lora_B")) @ read(name)
    before = reader(base)(name)
    return read(name) - (before.bfloat16().double() if in_bf16 else before)


def names_in(folder: Path) -> list[str]:
    return [name for path in folder.glob("*.safetensors") for name in keys_of(path)]


def keys_of(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def reader(folder: Path) -> Callable[[str], Tensor]:
    """A function that reads one tensor by name."""

    def read(name: str) -> Tensor:
        for path in folder.expanduser().glob("*.safetensors"):
            if name in keys_of(path):
                with safe_open(path, "pt") as file:
                    return file.get_tensor(name).double()
        raise ValueError(f"{folder} has no weight {name}")

    return read


if __name__ == "__main__":
    sys.exit(main())
