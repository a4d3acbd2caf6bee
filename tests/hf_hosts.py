"""What the tests of the Trainer's host run in one process, in several, and under `accelerate launch`.

As a script, under a launcher: hf_hosts.py OUTPUT MODEL PAIRS runs a few cases and leaves their outcomes in OUTPUT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import yaml
from ranks import free_port
from transformers import TrainerCallback

from simpo.display import Display
from simpo.hosts.hf import SimPOConfig, SimPOTrainer
from simpo.recipe import Recipe, load_recipe
from simpo.trainer import NonFiniteError, Trainer

REPO = Path(__file__).resolve().parents[1]
TOLERANCE = 2e-6  # relative to the largest number of a kind
METRICS = ("loss", "grad_norm", "learning_rate", "rewards/margins", "rewards/accuracies", "logps/chosen", "sft_loss")

# DeepSpeed would first build an operator for inference on CPUs, for a minute; when a build is killed, the lock that it
# leaves makes every later launch hang.
LAUNCH = """
import runpy, sys
if "deepspeed" in sys.argv[2]:
    import deepspeed.comm.torch  # as an attribute of deepspeed.comm, torch is torch
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
"""


class Watch(TrainerCallback):
    """Keeps the first step's gradients, and how many optimizer steps were done."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.steps = 0
        self.trainer: SimPOTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.trainer.is_deepspeed_enabled:
            self.watch_engine(self.trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **others: Any) -> None:
        self.steps += 1
        if not self.gradients:
            named = model.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def watch_engine(self, trainer: SimPOTrainer) -> None:
        """DeepSpeed updates the weights in its backward call: look at the gradients there."""
        from deepspeed.utils import safe_get_full_grad

        engine, step = trainer.model_wrapped, trainer.model_wrapped.step

        def watched() -> None:
            if not self.gradients:
                named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
                self.gradients = {name: safe_get_full_grad(p).clone() for name, p in named}
            step()

        engine.step = watched


def settings(folder: Path | str, **changes: Any) -> dict[str, Any]:
    """What both hosts are told; fp32, and no clipping, so that gradients can be looked at."""
    return {
        "output_dir": str(folder),
        "cache_dir": str(Path(folder).parent / "cache"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "max_grad_norm": 0.0,
        "max_length": 96,
        "max_prompt_length": 64,
        "max_steps": 3,
        "bf16": False,
        "seed": 7,
        **changes,
    }


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def native_recipe(model: Path, pairs: Path, folder: Path, **changes: Any) -> Recipe:
    data = {"model_name_or_path": str(model), "dataset_mixer": {str(pairs): 1.0}, "validation_fraction": 0.0}
    return load_recipe({**data, **settings(folder, **changes), "num_threads": 1}, processes=1)


def run_native(model: Path, pairs: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Metrics of the native trainer's steps, the first step's gradients, and the weights in the end."""
    trainer = Trainer(native_recipe(model, pairs, folder, **changes), display=Display(quiet=True))
    plan = next(trainer.loader.plans(0, 1))
    for micro_batch in trainer.loader.micro_batches(plan):
        (trainer.forward(micro_batch, plan)[0].sum() / plan.num_pairs).backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    lines = [trainer.train_step(plan) for plan in trainer.loader.plans(0, trainer.total_steps)]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {"lines": lines, "gradients": gradients, "weights": weights}


def run_host(
    model: Path | str,
    pairs: Path | str,
    folder: Path | str,
    *,
    lora: bool = False,
    poison: str = "",
    of: str = "loss",
    **changes: Any,
) -> dict[str, Any]:
    """The same of the Trainer of transformers; on every process where there are several.

    Args:
        lora: train adapters.
        poison: name of a row whose loss, or its gradient alone, is made not a number.
        of: "loss" or "gradient".
    """
    resume = changes.pop("resume", None)
    eval_rows = read_rows(changes.pop("held_out")) if "held_out" in changes else None
    args = SimPOConfig(**{"report_to": [], "save_strategy": "no", "disable_tqdm": True, **settings(folder, **changes)})
    watch = Watch()
    trainer = watch.trainer = SimPOTrainer(
        str(model),
        args,
        train_dataset=read_rows(pairs),
        eval_dataset=eval_rows,
        peft_config=adapters() if lora else None,
        callbacks=[watch],
    )
    if poison:
        poison_row(trainer, poison, of=of)
    outcome: dict[str, Any] = {"world": trainer.accelerator.num_processes}
    try:
        trainer.train(resume_from_checkpoint=resume)
    except NonFiniteError as error:
        outcome["error"] = str(error)
    history = trainer.state.log_history
    return outcome | {
        "lines": [line for line in history if "loss" in line],
        "evaluations": [line for line in history if "eval_loss" in line],
        "gradients": watch.gradients,
        "weights": weights_of(trainer),
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def weights_of(trainer: SimPOTrainer) -> dict[str, torch.Tensor]:
    """The trained weights, whole."""
    if trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
        trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        return {name: value for name, value in state.items() if name in trained}
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def adapters() -> Any:
    from peft import LoraConfig

    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)


def launch(config: str, folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of forks, with one of the repository's configurations, for two processes of this machine."""
    settings = yaml.safe_load((REPO / "recipes" / "accelerate" / config).read_text(encoding="utf-8"))
    adapted = folder / config
    adapted.write_text(yaml.safe_dump({**settings, "num_processes": 2}), encoding="utf-8")
    port = ["--main_process_port", str(free_port())]
    return forks.run(
        *("-c", LAUNCH, "--config_file", adapted, *port, *command),
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
    )


def poison_row(trainer: SimPOTrainer, row_id: str, *, of: str) -> None:
    """Make one pair's loss, or only its gradient, not a number, wherever it is computed."""
    whole = trainer._pair_losses

    def poisoned(model: Any, part: Any, plan: Any, *, name: str) -> Any:
        losses, sums = whole(model, part, plan, name=name)
        hit = torch.tensor([row == row_id and bool(part.indices) for row in part.pairs.row_ids])
        # The square root's slope at 0 is infinite, and times 0 it is no number.
        bad = losses * float("nan") if of == "loss" else losses + torch.sqrt(losses * 0.0)
        return torch.where(hit, bad, losses), sums

    trainer._pair_losses = poisoned


def assert_same_run(host: dict[str, Any], native: dict[str, Any], *, gradients: bool = True) -> None:
    assert len(host["lines"]) == len(native["lines"])
    for ours, theirs in zip(host["lines"], native["lines"], strict=True):
        for name in METRICS:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5 if ours is not host["lines"][0] else TOLERANCE)
    if gradients:
        scale = max(float(value.abs().max()) for value in native["gradients"].values())
        assert host["gradients"].keys() == native["gradients"].keys()
        for name, value in native["gradients"].items():
            assert float((host["gradients"][name] - value).abs().max()) <= TOLERANCE * scale, name


def first_rows(model: Path, pairs: Path, folder: Path) -> list[str]:
    """Names of the first step's pairs."""
    args = SimPOConfig(report_to=[], **settings(folder))
    trainer = SimPOTrainer(str(model), args, train_dataset=read_rows(pairs))
    trainer.get_train_dataloader()
    plan = next(trainer.loader.plans(0, 1))
    return [trainer.loader.store[index].row_id for part in plan.micro_batches for index in part]


def main(output: str, model: str, pairs: str, row: str) -> None:
    """Several runs under one launch: starting it costs more than they do."""
    folder = Path(output).parent / "runs"
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    longer = {"max_steps": 6, **batch}
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    outcomes = {
        "plain": run_host(model, pairs, folder / "plain", **longer),
        "checkpointing": run_host(model, pairs, folder / "checkpointing", gradient_checkpointing=True, **longer),
        "lora": run_host(model, pairs, folder / "lora", lora=True, **batch),
        "saved": run_host(model, pairs, folder / "saved", **saving, **batch),
        "resumed": run_host(
            model, pairs, folder / "saved", resume=str(folder / "saved" / "checkpoint-2"), **saving, **batch
        ),
        "dpo": run_host(model, pairs, folder / "dpo", loss_type="dpo", beta=0.1, **batch),
        "loss": run_host(model, pairs, folder / "loss", poison=row, **batch),
        "gradient": run_host(model, pairs, folder / "gradient", poison=row, of="gradient", warmup_steps=0, **batch),
    }
    if torch.distributed.get_rank() == 0:
        torch.save(outcomes, output)
    sys.stdout.flush()
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way


if __name__ == "__main__":
    main(*sys.argv[1:])
