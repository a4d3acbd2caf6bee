"""Configurations of GPU users, with the weights of SmolLM2-135M-Instruct on a CPU: each starts, trains and evaluates.

Real logits are what random two-layer models lack: rounding moves these in bfloat16 by more than some faults do. The
first step's loss is compared with that of float32: of two pairs with short answers, rounding moves it by up to 0.1.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import rarely
from faults import FAULTS
from hf_hosts import launch, read_rows
from mesh_runs import ONE, Settings
from mesh_runs import build as build_trainer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import simpo
from simpo.model.load import load_model
from simpo.model.probe import probe_layout
from simpo.recipe import load_recipe

pytestmark = [pytest.mark.real_model, pytest.mark.usefixtures("needs_bf16")]
needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
    for name in ("bitsandbytes", "deepspeed", "peft")
}
BF16 = {"master_dtype": "bfloat16", "optim": "adamw_bf16"}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}
STEPS = {"per_device_train_batch_size": 2, "max_steps": 1, "max_length": 128, "max_prompt_length": 64}
ROWS = [
    ("Name a river in Egypt.", "The Nile.", "Egypt has deserts, and I like deserts."),
    ("What is 3 + 4?", "3 + 4 = 7.", "It is about eight, or nine on some days."),
    ("Which colour is the sky?", "On a clear day the sky is blue.", "Green."),
    ("Give me a word for cold rain.", "Sleet.", "Rain is wet and falls from clouds."),
    ("Who wrote Hamlet?", "William Shakespeare wrote it.", "A person from France, in 1980."),
    ("How many legs has a spider?", "Eight.", "Spiders have six legs like all insects."),
    ("Translate 'bread' into French.", "Pain.", "Bread is baked in an oven."),
    ("What melts at 0 degrees?", "Ice melts at 0 degrees Celsius.", "Iron."),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six training pairs and two held out."""
    folder = tmp_path_factory.mktemp("real-pairs")
    rows = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) + "\n" for row in ROWS]
    (folder / "train.jsonl").write_text("".join(rows[:6]), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(rows[6:]), encoding="utf-8")
    return folder


@pytest.fixture
def settings(smol_model: Path, pairs: Path, tmp_path: Path) -> Settings:
    """A recipe of one step of two short pairs."""
    return {
        **{"model_name_or_path": str(smol_model), "dataset_mixer": {str(pairs): 1.0}, **STEPS, **ONE},
        **{"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"), "preprocessing_num_workers": 1},
        **{"learning_rate": 1e-5, "warmup_ratio": 0.0, "num_threads": 1, "max_tokens_per_micro_batch": 512},
    }


@pytest.fixture(scope="module")
def first_loss(smol_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Of the first step's pairs, in float32."""
    folder = tmp_path_factory.mktemp("float32")
    keys = {"output_dir": str(folder / "run"), "cache_dir": str(folder / "cache"), "preprocessing_num_workers": 1}
    data = {"model_name_or_path": str(smol_model), "dataset_mixer": {str(pairs): 1.0}}
    trainer = build_trainer({**data, **STEPS, **ONE, **keys, "num_threads": 1, "pack": False, "bf16": False})
    plan = next(trainer.loader.plans(0, 1))
    with torch.no_grad():
        return sum(float(trainer.forward(part, plan)[0].sum()) for part in trainer.loader.micro_batches(plan)) / 2


def train_and_evaluate(settings: Settings) -> dict[str, Any]:
    """The steps' losses, the evaluation after them, and adapters that got no gradient."""
    trainer = build_trainer(settings)
    still = []

    def note(name: str, parameter: nn.Parameter) -> None:
        if not parameter.grad.any():
            still.append(name)

    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: note(name, p))
    losses = [trainer.train_step(plan)["loss"] for plan in trainer.loader.plans(0, trainer.total_steps)]
    evaluation = trainer.evaluate()
    trainer.mesh.barrier()
    return {"losses": losses, "eval_loss": evaluation["eval_loss"], "still": still}


def check(found: dict[str, Any], first_loss: float, *, tolerance: float = 0.2) -> None:
    assert len(found["losses"]) == 1
    assert found["losses"][0] == pytest.approx(first_loss, abs=tolerance)
    assert all(map(math.isfinite, [*found["losses"], found["eval_loss"]]))
    assert not found.get("still")


@pytest.mark.parametrize(
    ("keys", "tolerance"),
    [
        pytest.param(BF16, 0.2, id="bf16 weights"),
        pytest.param({**BF16, **LORA}, 0.2, id="bf16 weights, LoRA", marks=[pytest.mark.long, needs["peft"]]),
        pytest.param(
            {**LORA, "load_in_4bit": True},
            0.5,  # other weights, after all
            id="QLoRA",
            marks=[pytest.mark.long, needs["peft"], needs["bitsandbytes"]],
        ),
        rarely(
            {**BF16, "pack": False, "share_prompt": False, "max_tokens_per_micro_batch": None}, 0.2, id="padded, bf16"
        ),
    ],
)
def test_it_starts_trains_and_evaluates(settings: Settings, first_loss: float, keys: Settings, tolerance: float):
    check(train_and_evaluate({**settings, **keys}), first_loss, tolerance=tolerance)


def round_to_tf32(x: Tensor) -> Tensor:
    """To 10 bits behind the leading one, as tensor cores take float32 operands."""
    bits = x.detach().float().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Instead(torch.autograd.Function):
    """Another tensor in this one's place, whose gradient is this one's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        return other.view_as(other)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@pytest.mark.long
def test_float32_with_operands_rounded_as_tf32_does(settings: Settings, first_loss: float, monkeypatch):
    kept: dict[nn.Linear, Tensor] = {}  # rounded weights, until the next update
    times: Counter[nn.Linear] = Counter()

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if self not in kept:
            kept[self] = round_to_tf32(self.weight)
            times[self] += 1
        operands = Instead.apply(x, round_to_tf32(x)), Instead.apply(self.weight, kept[self])
        return nn.functional.linear(*operands, self.bias)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    updates = register_optimizer_step_post_hook(lambda *_: kept.clear())
    try:
        check(train_and_evaluate({**settings, "bf16": False}), first_loss, tolerance=0.01)
    finally:
        updates.remove()
    assert len(times) >= 210  # seven of each layer
    assert max(times.values()) == 2  # as read, and after the update


@pytest.mark.long
def test_fsdp_on_two_processes_gathers_in_bf16(settings: Settings, first_loss: float, two_ranks):
    keys = {"dp_shard": 2, "per_device_train_batch_size": 1}
    first, second = two_ranks.run(train_and_evaluate, {**settings, **keys})
    check(first, first_loss)
    assert first == second


@pytest.mark.long
@needs["deepspeed"]
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_in_bf16_on_two_processes(stage: int, smol_model: Path, pairs: Path, first_loss: float, tmp_path: Path):
    output = tmp_path / "found.json"
    done = launch(f"deepspeed_zero{stage}.yaml", tmp_path, Path(__file__), output, smol_model, pairs)
    assert output.is_file(), done.stdout + done.stderr
    check(json.loads(output.read_text(encoding="utf-8")), first_loss)


def train_under_transformers(model: Any, pairs: Path | str, folder: Path, *, batch: int, **keys: Any) -> dict[str, Any]:
    """The same step through SimPOTrainer."""
    from simpo.hosts.hf import SimPOConfig, SimPOTrainer

    changes = {"per_device_train_batch_size": batch, "learning_rate": 1e-5, "warmup_steps": 0, "seed": 42, "bf16": True}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "cache_dir": str(folder / "cache")}
    args = SimPOConfig(output_dir=str(folder / "run"), **{**STEPS, **changes, **quiet, **keys})
    train, held_out = (read_rows(Path(pairs) / f"{name}.jsonl") for name in ("train", "test"))
    trainer = SimPOTrainer(model, args, train_dataset=train, eval_dataset=held_out)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": losses, "eval_loss": trainer.evaluate()["eval_loss"]}


@pytest.mark.long
def test_a_loaded_bf16_model_is_evaluated_and_trained(smol_model: Path, pairs: Path, first_loss: float, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smol_model, dtype=torch.bfloat16)
    keys = {"max_length": 128, "max_prompt_length": 64, "preprocessing_num_workers": 1}
    evaluation = simpo.evaluate(model, pairs, recipe={**keys, "cache_dir": str(tmp_path / "cache")})
    assert evaluation.settings["rows"] == "packed, shared prompt"
    assert math.isfinite(evaluation.margin.value)
    found = train_under_transformers(model, pairs, tmp_path, batch=2, master_dtype="bfloat16")
    check(found, first_loss)


@pytest.mark.long
def test_a_planted_fault_is_found_in_real_weights_in_bf16(settings: Settings):
    recipe = load_recipe({**settings, **BF16, "bf16": False})
    model = load_model(recipe, device=torch.device("cpu"), trainable=False, check=False)
    for name, fault in FAULTS.items():
        with fault():
            found = probe_layout(model, pack=True, share_prompt=True, bf16=False)
        assert found.is_good == (name == "none"), f"{name}: {found}"


if __name__ == "__main__":
    output, model, pairs = sys.argv[1:]
    found = train_under_transformers(model, pairs, Path(output).parent, batch=1)
    if torch.distributed.get_rank() == 0:
        Path(output).write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way
