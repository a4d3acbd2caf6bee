"""Which checkpoint a run goes on from, and whether it is the same run.

Owns the rules; reading and writing checkpoints is `run.checkpoint`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo.parallel.mesh import restart_count
from simpo.recipe import KEYS
from simpo.run import checkpoint as checkpoints
from simpo.run.checkpoint import Checkpoint

if TYPE_CHECKING:
    from simpo.recipe import Recipe


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The keys that decide what a run computes, and their values."""
    return {key: value for key, value in recipe.to_dict().items() if not KEYS[key].may_change}


LAUNCH_FILE = ".launch"


def record_launch(output_dir: Path) -> None:
    """Note that this launch began the run in output_dir; nothing where nobody would start the same command again."""
    launch = _launch()
    if launch is not None:
        (output_dir / LAUNCH_FILE).write_text(launch, encoding="utf-8")


def is_begun_by_this_launch(output_dir: Path) -> bool:
    """Whether torchrun has started this process again after an attempt that got as far as `record_launch`.

    An attempt that was refused ("already holds a run") is started again as well, and has to be refused again.
    """
    path = output_dir / LAUNCH_FILE
    return bool(restart_count()) and path.is_file() and path.read_text(encoding="utf-8") == _launch()


def _launch() -> str | None:
    """What the attempts of one launch have in common: torchrun's run id; where that has no value, its process."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"process {os.getppid()}" if run in ("", "none") else run


def find_checkpoint(recipe: Recipe) -> Checkpoint | None:
    """The checkpoint that `resume_from_checkpoint` means; None to start afresh.

    After a process was lost and torchrun started the same command again: the newest of this launch, whatever the key
    says.

    Raises:
        ValueError: the checkpoint does not exist, or the run directory already holds a run that would be overwritten.
    """
    folder, wanted = Path(recipe.output_dir) / "checkpoints", recipe.resume_from_checkpoint
    existing = checkpoints.list_checkpoints(folder)
    named = _named_checkpoint(wanted) if isinstance(wanted, str) else None
    if is_begun_by_this_launch(folder.parent):
        if named is not None and not (existing and existing[-1].step > named.step):
            return named  # lost before the first checkpoint of its own
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
    if named is None:
        names = ", ".join(c.folder.name for c in existing) or "none"
        raise ValueError(
            f"resume_from_checkpoint: no complete checkpoint at {Path(wanted)}; in {folder} there is: {names}"
        )
    return named


def _named_checkpoint(wanted: str) -> Checkpoint | None:
    path = Path(wanted)
    return next((c for c in checkpoints.list_checkpoints(path.parent) if c.folder.name == path.name), None)


def best_checkpoint(step: int, folder: str | Path) -> Checkpoint:
    """The checkpoint of the best evaluation.

    Raises:
        ValueError: the folder does not hold it.
    """
    found = checkpoints.checkpoint_at(Path(folder), step)
    if found is None:
        raise ValueError(
            f"load_best_model_at_end: the checkpoint of the best evaluation, step {step}, is not in {folder} any more; "
            "with false the last step's weights become the model"
        )
    return found


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
