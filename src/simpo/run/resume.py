"""Which checkpoint a run is resumed from, and whether it is the same run.

Owns the rules; reading and writing checkpoints is `run.checkpoint`'s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo.parallel.mesh import restart_count
from simpo.recipe import KEYS, load_recipe
from simpo.recipe.yaml import parse_yaml
from simpo.run import checkpoint as checkpoints
from simpo.run.checkpoint import Checkpoint

if TYPE_CHECKING:
    from simpo.data.cache import PreparedData
    from simpo.data.loader import StepLoader
    from simpo.recipe import Recipe


LAUNCH_FILE = ".launch"


def record_launch(output_dir: Path) -> None:
    """Note that this launch began the run in output_dir, if the launcher may start the same command again."""
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
                f"output_dir: {recipe.output_dir} already holds a run ({at}); add --resume_from_checkpoint true to "
                "resume it, or choose another output_dir"
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


def run_identity(recipe: Recipe, data: PreparedData, loader: StepLoader, *, total_steps: int) -> dict[str, Any]:
    """What decides which run this is, in JSON values; a checkpoint holds it.

    Args:
        loader: of the training pairs.
        total_steps: optimizer steps of the whole run.
    """
    identity = {
        "recipe": {name: value for name, value in recipe.to_dict().items() if not KEYS[name].may_change},
        "data_fingerprint": data.fingerprint,
        "pairs_per_step": loader.pairs_per_step,
        "total_steps": total_steps,
    }
    return json.loads(json.dumps(identity))


def check_same_run(
    saved: Mapping[str, Any], current: Mapping[str, Any], folder: Path, *, recipe: Recipe, pairs_fit: bool
) -> list[str]:
    """Refuse to resume a checkpoint under settings or data that would make it another run.

    A recipe key that came after the checkpoint is taken to have had its default there; one that this version lacks is
    ignored, with a line that names it. Data is the same if its tokens are, wherever they came from.

    Args:
        saved: the checkpoint's state, as `run.checkpoint.load_state` gives it.
        current: `run_identity` of the run at hand, with its recipe.
        folder: the checkpoint's.
        pairs_fit: whether the pairs trained on by the checkpoint's step are as many as they would be in this run.
    Returns:
        Lines to show.
    Raises:
        ValueError: names each setting that differs, with both values.
    """
    changed, lines = _differences(saved, current, recipe, pairs_fit), []
    if changed:
        raise ValueError(
            f"{folder} belongs to a run with other settings: {'; '.join(changed)}. "
            "Restore them to resume it, or start afresh in another output_dir"
        )
    if saved["format"] == 0:
        lines.append(
            f"{folder} comes from an older simpo, which did not record the tokens of its data; settings and number of "
            "pairs are the same, so the data is taken to be"
        )
    unknown = [f"{key} = {value!r}" for key, value in saved["recipe"].items() if key not in KEYS]
    if unknown:
        lines.append(f"{folder} has recipe keys that this simpo lacks, which are ignored: {', '.join(unknown)}")
    return lines


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any], recipe: Recipe, pairs_fit: bool) -> list[str]:
    """What makes a checkpoint another run's, for people."""
    without_tokens = saved["format"] == 0  # its fingerprint is of source files, this package's among them
    other_data = not without_tokens and saved["data_fingerprint"] != current["data_fingerprint"]
    changed = []
    for key, value in current["recipe"].items():
        was = saved["recipe"][key] if key in saved["recipe"] else _default(key, recipe)
        if was != value and (without_tokens or other_data or KEYS[key].section != "data"):
            changed.append(f"{key} (was {was!r}, is {value!r})")
    if other_data or (without_tokens and not pairs_fit):
        changed.append("the training data or its tokenisation")
    if saved["pairs_per_step"] != current["pairs_per_step"]:
        changed.append(
            f"the pairs in an optimizer step (was {saved['pairs_per_step']}, is {current['pairs_per_step']}; with "
            "another number of processes, change gradient_accumulation_steps to match)"
        )
    elif saved["total_steps"] != current["total_steps"]:
        changed.append(f"the number of steps (was {saved['total_steps']}, is {current['total_steps']})")
    return changed


def _default(key: str, recipe: Recipe) -> Any:
    """What a key would be in this recipe if it were not set; a JSON value."""
    others = parse_yaml(recipe.to_yaml(), where="the recipe")
    others.pop(key, None)
    return json.loads(json.dumps(load_recipe(others).to_dict()[key]))
