"""Trap 45: an engine's export is rounded to bf16 though the file says float32 (cosine of the displacement 0.04).

As a script, under a launcher: test_45_fp32_masters_are_exported.py OUTPUT MODEL PAIRS trains with DeepSpeed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import rarely
from safetensors.torch import load_file
from torch import Tensor

KEYS = {
    **{"learning_rate": 1e-6, "warmup_steps": 0, "lr_scheduler_type": "constant", "max_steps": 6, "bf16": True},
    **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True},
}
"""Six steps that each lower the loss: the best evaluation, of the highest loss, is an early one."""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, rarely(3)])
def test_deepspeed_in_bf16_trains_and_saves_fp32_masters(
    stage: int, tiny_model: Path, pair_files: Path, tmp_path: Path
) -> None:
    from hf_hosts import launch

    output = tmp_path / "outcome.pt"
    done = launch(f"deepspeed_zero{stage}.yaml", tmp_path, __file__, output, tiny_model, pair_files)
    assert output.is_file(), done.stdout + done.stderr
    outcome: dict[str, Any] = torch.load(output)
    read = load_file(tiny_model / "model.safetensors")
    assert outcome["computes in"] == torch.bfloat16
    assert_same(outcome["masters before"], read)  # not what bf16 leaves of them
    last, best, half = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("last", "best", "half"))
    assert_same(last, outcome["masters at the last step"])
    assert_same(best, outcome["masters at the end"])  # of the best step, which was loaded again
    assert_same(best, load_file(Path(outcome["best"]) / "model.safetensors"))
    assert_same(half, {name: value.bfloat16() for name, value in best.items()})
    written = [json.loads((tmp_path / "run" / name / "config.json").read_text())["dtype"] for name in ("best", "half")]
    assert written == ["float32", "bfloat16"]
    moved = torch.cat([(last[name] - read[name]).flatten() for name in read])
    assert (moved != 0).float().mean() > 0.95
    assert moved.abs().max() < 1e-5  # six steps of 1e-6; rounding the weights to bf16 would change them by 2e-4
    expected = displacement_in_fp32(tiny_model, pair_files, tmp_path)
    cosine = torch.nn.functional.cosine_similarity(moved, torch.cat([expected[name].flatten() for name in read]), dim=0)
    assert cosine > 0.9


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def displacement_in_fp32(model: Path, pairs: Path, folder: Path) -> dict[str, Tensor]:
    from hf_hosts import settings

    from simpo.display import Display
    from simpo.recipe import load_recipe
    from simpo.trainer import Trainer

    data = {"model_name_or_path": str(model), "dataset_mixer": {str(pairs): 1.0}, "num_threads": 1}
    keys = {**KEYS, "warmup_ratio": 0.0, "bf16": False, "save_strategy": "no", "load_best_model_at_end": False}
    trainer = Trainer(load_recipe({**data, **settings(folder / "native", **keys)}), display=Display(quiet=True))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for plan in trainer.loader.plans(0, trainer.total_steps):
        trainer.train_step(plan)
    return {name: p.detach() - before[name] for name, p in trainer.model.named_parameters()}


# --- under the launcher ----------------------------------------------------------------------------------------------


def main(output: str, model: str, pairs: str) -> None:
    """Train; keep the masters as DeepSpeed's own function tells them, and what the trainer saves."""
    from deepspeed.utils import safe_get_full_fp32_param
    from hf_hosts import read_rows, settings
    from transformers import TrainerCallback

    from simpo.hosts.hf import SimPOConfig, SimPOTrainer
    from simpo.recipe import load_recipe

    def masters(trained: Any) -> dict[str, Tensor]:
        return {name: safe_get_full_fp32_param(p).clone() for name, p in trained.named_parameters()}

    outcome: dict[str, Any] = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **others: Any) -> None:
            outcome["masters before"] = masters(model)
            outcome["computes in"] = next(model.parameters()).dtype

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **others: Any) -> None:
            if state.global_step == state.max_steps:
                outcome["masters at the last step"] = masters(model)
                trainer.save_model(str(folder / "last"))

    folder = Path(output).parent / "run"
    keys = {**KEYS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    args = SimPOConfig(report_to=[], disable_tqdm=True, **settings(folder, **keys))
    train, held_out = (read_rows(Path(pairs) / f"{split}.jsonl") for split in ("train", "test"))
    trainer = SimPOTrainer(model, args, train_dataset=train, eval_dataset=held_out, callbacks=[Watch()])
    trainer.train()
    outcome["masters at the end"] = masters(trainer.model)
    outcome["best"] = trainer.state.best_model_checkpoint
    trainer.save_model(str(folder / "best"))
    trainer.recipe = load_recipe(trainer.recipe, {"save_dtype": "bfloat16"})
    trainer.save_model(str(folder / "half"))
    if torch.distributed.get_rank() == 0:
        torch.save(outcome, output)
    sys.stdout.flush()
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way


if __name__ == "__main__":
    main(*sys.argv[1:])
