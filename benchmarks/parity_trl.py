"""Same pairs, same order, same optimizer: TRL's CPOTrainer beside this trainer, step by step.

    python benchmarks/parity_trl.py --model MODEL --data PAIRS.jsonl --steps 20 --output parity.json
    python benchmarks/parity_trl.py ... --steps 200 --seeds 42 43 44 --losses simpo cpo alphapo
    python benchmarks/parity_trl.py ... --steps 200 --lora 16 --rounding

Prints the loss and reward margin of each optimizer step from both sides and the largest differences; exits 1 when one
exceeds --tolerance, as a share of a value above 1. --rounding measures what no two programs can agree beyond: this
trainer against itself, adding up in another order. Everything in fp32 on the CPU; nothing is truncated. Needs
`pip install 'simpo[trl]'`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import SequentialSampler

from simpo.display import Display
from simpo.recipe import Recipe, load_recipe
from simpo.trainer import Trainer

warnings.filterwarnings("ignore")


LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "simpo": ({"beta": 2.0, "gamma_beta_ratio": 0.5}, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "cpo": (
        {"loss_type": "cpo", "beta": 0.1, "sft_weight": 1.0, "sft_reduction": "tokens"},
        {"loss_type": "sigmoid", "cpo_alpha": 1.0},
    ),
    "alphapo": (
        {"loss_type": "alphapo", "beta": 2.0, "gamma_beta_ratio": 0.5, "alphapo_alpha": 0.25},
        {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.25},
    ),
}
"""Loss -> our recipe's keys, the peer's. Its SFT term is a mean over the tokens of the batch."""


def build_recipe(args: argparse.Namespace, loss: str, seed: int, output_dir: str, **keys: Any) -> Recipe:
    """The settings that both sides use, and `keys` of ours."""
    lora = (
        {"use_peft": True, "lora_r": args.lora, "lora_alpha": 2 * args.lora, "lora_dropout": 0.0} if args.lora else {}
    )
    return load_recipe(
        {
            **LOSSES[loss][0],
            **lora,
            "model_name_or_path": args.model,
            "dataset_mixer": {args.data: 1.0},
            "validation_fraction": 0.0,
            "output_dir": output_dir,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "per_device_train_batch_size": args.pairs,
            "gradient_accumulation_steps": args.accumulation,
            "max_steps": args.steps,
            "max_length": args.max_length,
            "max_prompt_length": args.max_length - 1,
            "overlong": "drop",  # nothing is truncated on either side
            "max_dropped_fraction": 1.0,
            "bf16": False,
            "save_strategy": "no",
            "eval_strategy": "no",
            "seed": seed,
            **keys,
        }
    )


def run_ours(recipe: Recipe) -> tuple[list[dict[str, float]], list[dict[str, str]], Any, Any]:
    """Losses and margins of this trainer, the pairs as text in the order it visited them, tokenizer and adapter."""
    trainer = Trainer(recipe, display=Display(quiet=True))
    adapter = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}
    records, rows = [], []
    for plan in trainer.loader.plans(0, trainer.total_steps):
        for indices in plan.micro_batches:
            rows += [_as_text(trainer.loader.store[i], trainer.tokenizer) for i in indices]
        values = trainer.train_step(plan)
        records.append({"loss": values["loss"], "margin": values["rewards/margins"], "grad_norm": values["grad_norm"]})
    return records, rows, trainer.tokenizer, adapter


def _as_text(pair: Any, tokenizer: Any) -> dict[str, str]:
    """A pair as TRL's string format; it tokenises back to the same ids (asserted in `run_trl`)."""
    start = min(pair.chosen_start, pair.rejected_start)
    return {
        "prompt": tokenizer.decode(pair.chosen_ids[:start]),
        "chosen": tokenizer.decode(pair.chosen_ids[start:]),
        "rejected": tokenizer.decode(pair.rejected_ids[start:]),
        "expected_ids": list(pair.chosen_ids),
    }


def run_trl(
    recipe: Recipe, keys: dict[str, Any], rows: Sequence[dict[str, str]], tokenizer: Any, adapter: dict[str, Any]
) -> list[dict[str, float]]:
    """Losses and margins of TRL's trainer on the same pairs in the same order, an adapter beginning as ours did."""
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class InOrder(CPOTrainer):
        def _get_train_sampler(self, *args: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Collect(TrainerCallback):
        def __init__(self) -> None:
            self.records: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                self.records.append(
                    {"loss": logs["loss"], "margin": logs["rewards/margins"], "grad_norm": float(logs["grad_norm"])}
                )

    config = CPOConfig(
        output_dir=str(Path(recipe.output_dir) / "trl"),
        **keys,
        beta=recipe.beta,
        simpo_gamma=recipe.gamma,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_ratio,  # a fraction is a share of the run
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        max_steps=recipe.max_steps,
        max_length=recipe.max_length,
        disable_dropout=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path, dtype=torch.float32)
    if adapter:
        from peft import LoraConfig, get_peft_model

        sizes = {"r": recipe.lora_r, "lora_alpha": recipe.lora_alpha, "lora_dropout": 0.0}
        names = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in adapter})
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=names, **sizes))
        unknown = model.load_state_dict(adapter, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"the peer's adapter lacks {unknown[0]}")
    collect = Collect()
    dataset = datasets.Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows])
    trainer = InOrder(model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[collect])
    for ours, theirs in zip(rows, trainer.train_dataset, strict=True):
        if list(theirs["chosen_input_ids"]) != ours["expected_ids"]:
            raise ValueError("the peer tokenised a pair differently, so the runs cannot be compared")
    trainer.train()
    return collect.records


def compare(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], *, relative: bool = False
) -> dict[str, float]:
    """Largest difference of each quantity over the steps; relative: as a share of values above 1."""
    return {
        name: max(
            abs(a[name] - b[name]) / (max(1.0, abs(b[name])) if relative else 1.0)
            for a, b in zip(ours, theirs, strict=True)
        )
        for name in ("loss", "margin", "grad_norm")
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--data", required=True, help="file or folder of preference pairs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=4, help="pairs per micro-batch")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["simpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument(
        "--lora", type=int, default=0, help="rank of adapters on all linear layers; 0 = train all weights"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of losses and margins")
    parser.add_argument("--rounding", action="store_true", help="this trainer with other logits_chunk_size, as well")
    parser.add_argument("--output", help="write the curves here as JSON, after each pair of runs")
    args = parser.parse_args(arguments)
    results = []
    for loss, seed in itertools.product(args.losses, args.seeds):
        results.append(run(args, loss, seed))
        if args.output:
            Path(args.output).write_text(json.dumps(results, indent=1))
    found = [compare(each["ours"], each["trl"], relative=True) for each in results]
    return int(max(each[name] for each in found for name in ("loss", "margin")) > args.tolerance)


def run(args: argparse.Namespace, loss: str, seed: int) -> dict[str, Any]:
    """Both sides' curves, printed as well."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = build_recipe(args, loss, seed, folder)
        ours, rows, tokenizer, adapter = run_ours(recipe)
        theirs = run_trl(recipe, LOSSES[loss][1], rows, tokenizer, adapter)
        results = {"differences": compare(ours, theirs)}
        if args.rounding:
            other = build_recipe(args, loss, seed, f"{folder}/again", logits_chunk_size=16)
            results["rounding"] = compare(ours, run_ours(other)[0])
    print(f"{'step':>4} {'loss ours':>12} {'loss TRL':>12} {'margin ours':>12} {'margin TRL':>12}")
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
        print(f"{step:>4} {a['loss']:>12.7f} {b['loss']:>12.7f} {a['margin']:>12.7f} {b['margin']:>12.7f}")
    for name, largest in results.items():
        numbers = ", ".join(f"{measure} {value:.2e}" for measure, value in largest.items())
        print(f"{loss}{f', LoRA {args.lora}' * bool(args.lora)}, seed {seed}: largest {name}: {numbers}", flush=True)
    return {"loss": loss, "seed": seed, "lora": args.lora, "ours": ours, "trl": theirs, **results}


if __name__ == "__main__":
    sys.exit(main())
