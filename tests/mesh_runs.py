"""What the tests of checkpoints on meshes run on ranks, and in the parent as one process.

Whole tensors are put together here from the live model and optimizer, by no code of the checkpoints'.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run.saved import Checkpoint, read_state
from simpo.trainer import Interrupted, Trainer

Settings = dict[str, Any]
Whole = dict[str, Tensor]

ONE = {"dp_replicate": 1, "dp_shard": None, "cp": 1, "tp": 1}
MESHES: dict[str, Settings] = {
    "1 process": ONE,
    "dp2": {**ONE, "dp_replicate": 2, "dp_shard": 1},
    "fsdp2": {**ONE, "dp_shard": 2},
    "tp2": {**ONE, "tp": 2},
    "cp2": {**ONE, "cp": 2},
    "fsdp2 x tp2": {**ONE, "dp_shard": 2, "tp": 2},
    "hsdp 2x2": {**ONE, "dp_replicate": 2, "dp_shard": 2},
    "cp2 x tp2": {**ONE, "cp": 2, "tp": 2},
    "dp2 x tp2": {**ONE, "dp_replicate": 2, "dp_shard": 1, "tp": 2},
}
TWO = ("1 process", "dp2", "fsdp2", "tp2", "cp2")
FOUR = ("fsdp2 x tp2", "hsdp 2x2", "cp2 x tp2", "dp2 x tp2")
TIED = {"tie_word_embeddings": True, "vocab_size": 509}  # whose shards do not divide
UNTIED = {"vocab_size": 509, "attention_bias": True, "mlp_bias": True}
LORA = {"use_peft": True, "lora_r": 4}
TIMES = {"step_time_s", "pairs_per_s", "memory_gib", "eval_time_s", "eval_saved_time_s"}


def data_ranks(mesh: str) -> int:
    """Processes of a mesh that see other pairs."""
    sizes = MESHES[mesh]
    return sizes["dp_replicate"] * (sizes["dp_shard"] or 1)


def build(settings: Settings) -> Trainer:
    return Trainer(load_recipe(settings), display=Display(quiet=True))


def whole_state(trainer: Trainer) -> Whole:
    """Every trainable weight and all that AdamW keeps of it, whole, on every process."""
    found: Whole = {}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        found[name] = _whole(parameter)
        for kind, value in trainer.optimizer.state[parameter].items():
            found[f"{name} {kind}"] = _whole(torch.as_tensor(value))
    return found


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def fingerprint(state: Whole) -> str:
    """Of every bit of it."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode())
        found.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def as_answer(trainer: Trainer, **more: Any) -> dict[str, Any]:
    """What a test wants of a rank: the whole state from the first one, and from each how its own view looks."""
    state = whole_state(trainer)
    return {"state": state if trainer.mesh.is_main else None, "fingerprint": fingerprint(state), **more}


def train_and_save(settings: Settings, steps: int) -> dict[str, Any]:
    """Some steps, then a checkpoint of them."""
    trainer = build(settings)
    _shake_adapters(trainer.model)
    for plan in trainer.loader.plans(0, steps):
        trainer.train_step(plan)
    saved = trainer.save()
    trainer.mesh.barrier()
    return as_answer(trainer, folder=str(saved.folder), digest=read_state(saved)["digest"])


def _shake_adapters(model: torch.nn.Module) -> None:
    """B starts at zero, and so does A's gradient: make both move from the first step on."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.01)


def load_and_save_again(settings: Settings, *saved: str) -> list[dict[str, Any]]:
    """What a trainer holds that resumes from each checkpoint in turn, and the digest of its own checkpoint of the last.

    Between two of them nothing is left of the one before.
    """
    trainer = build({**settings, "resume_from_checkpoint": saved[0]})
    answers = [as_answer(trainer, step=trainer.progress.step)]
    for folder in saved[1:]:
        _wipe(trainer)
        _restore(trainer, folder)
        answers.append(as_answer(trainer, step=trainer.progress.step))
    again = trainer.save()
    trainer.mesh.barrier()
    answers[-1]["digest"] = read_state(again)["digest"]
    return answers


@torch.no_grad()
def _wipe(trainer: Trainer) -> None:
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            for tensor in (parameter, *trainer.optimizer.state[parameter].values()):
                tensor.zero_()
    trainer.progress.step = -1


def resume_and_step(settings: Settings, checkpoint: str) -> dict[str, Any]:
    """One step after a checkpoint."""
    trainer = build({**settings, "resume_from_checkpoint": checkpoint})
    start = trainer.progress.step
    values = [trainer.train_step(plan) for plan in trainer.loader.plans(start, start + 1)]
    return as_answer(trainer, values=values)


def run(settings: Settings, *, stop_after: int | None = None, evaluating: bool = False) -> str:
    """A whole run; asked to stop after a step, of several processes by the last one alone. Returns how it ended.

    evaluating: during the evaluation after that step, in place of the step itself.
    """
    trainer = build(settings)
    train_step, evaluate = trainer.train_step, trainer.evaluate

    def watched_evaluation(**options: Any) -> dict[str, float]:
        if trainer.progress.step == stop_after and trainer.mesh.rank == trainer.mesh.sizes.world - 1:
            trainer._stop.set()
        return evaluate(**options)

    def watched(plan: Any) -> dict[str, float]:
        if plan.step + 1 == stop_after and trainer.mesh.rank == trainer.mesh.sizes.world - 1:
            trainer._stop.set()
        return train_step(plan)

    if evaluating:
        trainer.evaluate = watched_evaluation
    else:
        trainer.train_step = watched
    try:
        trainer.run()
    except Interrupted:
        return "interrupted"
    finally:
        trainer.mesh.barrier()
    return "finished"


def error_of(settings: Settings, checkpoint: str) -> tuple[str, str]:
    """The kind and text of what keeps a trainer from going on from a checkpoint."""
    try:
        build({**settings, "resume_from_checkpoint": checkpoint})
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def errors_of(settings: Settings, *saved: str) -> list[tuple[str, str]]:
    """As `error_of` for each of several checkpoints, of one trainer that tries to go on from each in turn."""
    trainer, found = build(settings), []
    for folder in saved:
        try:
            _restore(trainer, folder)
            found.append(("nothing", ""))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return found


def _restore(trainer: Trainer, checkpoint: str) -> None:
    """What `Trainer` does for `resume_from_checkpoint`, on one that is there already."""
    folder = Path(checkpoint)
    trainer._restore(Checkpoint(folder, int(folder.name.removeprefix("step-"))))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def losses(folder: Path) -> dict[int, float]:
    """The training loss of each logged step."""
    return {line["step"]: line["loss"] for line in metrics(folder) if "loss" in line}


def final_weights(folder: Path) -> Whole:
    """The tensors of the exported model, or of its adapters."""
    from safetensors.torch import load_file

    (path,) = (folder / "model").glob("*.safetensors")
    return load_file(path)


def assert_equal_bits(ours: Whole, theirs: Whole) -> None:
    """The same tensors under the same names, to the last bit."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def assert_same_run(one: Path, other: Path) -> None:
    """Two run directories with the same metrics and final bits."""
    assert metrics(one) == metrics(other)
    assert_equal_bits(final_weights(one), final_weights(other))
