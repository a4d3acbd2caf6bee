"""Which checkpoint a run goes on from, and whether it is the same run.

Owns the rules; reading and writing checkpoints is `engine.checkpoint`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo.engine import checkpoint as checkpoints
from simpo.engine.checkpoint import Checkpoint
from simpo.engine.mesh import restart_count

if TYPE_CHECKING:
    from simpo.recipe import Recipe

# Keys that change what is written and shown, never what is computed.
_MAY_CHANGE_ON_RESUME = frozenset(
    {
        "output_dir",
        "run_name",
        "report_to",
        "logging_dir",
        "logging_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "eval_strategy",
        "eval_steps",
        "eval_on_start",
        "num_eval_generations",
        "eval_generation_max_new_tokens",
        "preprocessing_num_workers",
        "cache_dir",
        "activation_offload",
        "async_save",
        "ddp_timeout",
        # These change the order of sums, so the last bits. (Pairs in a step have to stay: see Trainer._identity.)
        "num_threads",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "dp_replicate",
        "dp_shard",
        "cp",
        "tp",
        "fsdp_cpu_offload",
    }
)


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide what a run computes, and their values."""
    return {key: value for key, value in recipe.to_dict().items() if key not in _MAY_CHANGE_ON_RESUME}


def find_checkpoint(recipe: Recipe) -> Checkpoint | None:
    """The checkpoint that `resume_from_checkpoint` means; None to start afresh.

    Raises:
        ValueError: the checkpoint does not exist, or the run directory already holds a run that would be overwritten.
    """
    folder, wanted = Path(recipe.output_dir) / "checkpoints", recipe.resume_from_checkpoint
    existing = checkpoints.list_checkpoints(folder)
    if restart_count():  # torchrun started the same command again after a process was lost
        return existing[-1] if existing else None
    if not wanted:
        if existing or any((folder.parent / name).exists() for name in ("model", "metrics.jsonl")):
            at = f"checkpoint at step {existing[-1].step}" if existing else "no checkpoint"
            raise ValueError(
                f"output_dir: {recipe.output_dir} already holds a run ({at}); add --resume_from_checkpoint true to go "
                "on with it, or choose another output_dir"
            )
        return None
    if wanted is True:
        return existing[-1] if existing else None  # a run killed before its first checkpoint starts over
    path = Path(wanted)
    match = [c for c in checkpoints.list_checkpoints(path.parent) if c.folder.name == path.name]
    if not match:
        names = ", ".join(c.folder.name for c in existing) or "none"
        raise ValueError(f"resume_from_checkpoint: no complete checkpoint at {path}; in {folder} there is: {names}")
    return match[0]


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse to continue a checkpoint under settings or data that would make it another run.

    Args:
        saved: the checkpoint's trainer state.
        current: recipe (`recipe_identity`), data_fingerprint, pairs_per_step and total_steps of the run at hand.
    Raises:
        ValueError: names each setting that differs, with both values.
    """
    changed = [
        f"{key} (was {saved['recipe'].get(key)!r}, is {value!r})"
        for key, value in current["recipe"].items()
        if saved["recipe"].get(key) != value
    ]
    if saved["data_fingerprint"] != current["data_fingerprint"]:
        changed.append("the training data or its tokenisation")
    if saved["pairs_per_step"] != current["pairs_per_step"]:
        changed.append(
            f"the pairs in an optimizer step (was {saved['pairs_per_step']}, is {current['pairs_per_step']}; with "
            "another number of processes, change gradient_accumulation_steps to match)"
        )
    elif saved["total_steps"] != current["total_steps"]:
        changed.append(f"the number of steps (was {saved['total_steps']}, is {current['total_steps']})")
    if changed:
        raise ValueError(
            f"{checkpoint.folder} belongs to a run with other settings: {'; '.join(changed)}. "
            "Restore them to go on, or start afresh in another output_dir"
        )
