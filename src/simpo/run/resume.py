"""Which checkpoint a run is resumed from, and whether it is the same run.

Owns the rules; reading and writing checkpoints is `run.saved`'s and `run.checkpoint`'s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpo.data.files import supersede
from simpo.parallel.mesh import restart_count
from simpo.recipe import KEYS, load_recipe
from simpo.recipe.yaml import parse_yaml
from simpo.run.saved import (
    NATIVE,
    TRAINERS,
    Checkpoint,
    CheckpointKind,
    checkpoint_at,
    list_checkpoints,
    load_state,
    with_advice,
)
from simpo.run.stopping import StoppedByGuard
from simpo.run.tracking import LOGS, TRACKERS_FILE

if TYPE_CHECKING:
    from simpo.data.cache import PreparedData
    from simpo.data.loader import StepLoader
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe


LAUNCH_FILE = ".launch"
STOP_FILE = ".stopped"


def record_launch(output_dir: Path) -> None:
    """Note that this launch began the run in output_dir, if the launcher may start the same command again."""
    launch = _launch()
    (output_dir / STOP_FILE).unlink(missing_ok=True)
    if launch is not None:
        (output_dir / LAUNCH_FILE).write_text(launch, encoding="utf-8")


def is_begun_by_this_launch(output_dir: Path) -> bool:
    """Whether torchrun has started this process again after an attempt that got as far as `record_launch`.

    An attempt that was refused ("already holds a run") is started again as well, and has to be refused again.
    """
    path = output_dir / LAUNCH_FILE
    return bool(restart_count()) and path.is_file() and path.read_text(encoding="utf-8") == _launch()


def record_stop(output_dir: Path, why: str) -> None:
    """Note that the guard has ended the run in output_dir, for what may start the same command again."""
    (output_dir / STOP_FILE).write_text(why, encoding="utf-8")


def why_stopped(output_dir: Path) -> str | None:
    """What the guard said that ended the last start in output_dir; None if it did not."""
    path = output_dir / STOP_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def check_not_stopped(output_dir: Path, mesh: Mesh) -> None:
    """Raise StoppedByGuard, on every process, where the guard has ended an earlier attempt of this launch."""
    why = mesh.on_main(lambda: why_stopped(output_dir) if is_begun_by_this_launch(output_dir) else None)
    if why is not None:
        raise StoppedByGuard(why)


def _launch() -> str | None:
    """What the attempts of one launch have in common: torchrun's run id; where that has no value, its process."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"process {os.getppid()}" if run in ("", "none") else run


def find_checkpoint(recipe: Recipe, kind: CheckpointKind = NATIVE) -> Checkpoint | None:
    """The checkpoint that `resume_from_checkpoint` means; None to start afresh.

    After a process was lost and torchrun started the same command again: the newest of this launch, whatever the key
    says. What a finished run has done is done again only from a checkpoint that is named.

    Args:
        kind: of this host's checkpoints.
    Raises:
        ValueError: the checkpoint does not exist, or the run directory holds a run that would be overwritten.
    """
    output_dir, wanted = Path(recipe.output_dir), recipe.resume_from_checkpoint
    own = output_dir / "checkpoints"
    existing = list_checkpoints(own, kind)
    newest = existing[-1] if existing else None
    beside = list_checkpoints(Path(wanted).parent, kind) if isinstance(wanted, str) else []
    named = next((c for c in beside if c.folder.name == Path(wanted).name), None)
    if is_begun_by_this_launch(output_dir):
        if named is not None and (newest is None or newest.step <= named.step):
            return named  # lost before the first checkpoint of its own
        return newest
    if not restart_count():  # an earlier launch of the same name is not this one
        (output_dir / LAUNCH_FILE).unlink(missing_ok=True)
    if isinstance(wanted, str) and named is None:
        names = ", ".join(c.folder.name for c in existing) or "none"
        raise ValueError(
            f"resume_from_checkpoint: no complete checkpoint at {Path(wanted)}; in {own} there is: {names}"
        )
    if named is not None and named.folder.resolve().parent == own.resolve():
        return named
    _refuse_to_overwrite(recipe, newest, kind)
    return newest if wanted is True else named  # a run killed before its first checkpoint starts over


def _refuse_to_overwrite(recipe: Recipe, newest: Checkpoint | None, kind: CheckpointKind) -> None:
    """Unless it resumes the newest checkpoint of its own directory, or that holds no more than a log."""
    output_dir, resumes = Path(recipe.output_dir), recipe.resume_from_checkpoint is True
    own, is_finished = output_dir / "checkpoints", (output_dir / "model").exists()
    for several in ("rounds", "sweep"):  # whose report would be replaced
        if (output_dir / f"{several}.json").exists() and not (output_dir / "metrics.jsonl").exists():
            raise ValueError(f"output_dir: {output_dir} is that of `simpo {several}`; choose another output_dir")
    for other in (NATIVE, TRAINERS):
        if other != kind and list_checkpoints(own, other):
            raise ValueError(
                f"output_dir: the checkpoints in {own} are another host's; resume them with {other.command}, or choose "
                "another output_dir"
            )
    if newest is not None and resumes:
        with with_advice(newest, kind):
            state = load_state(newest.folder / kind.state_file) if is_finished else {"total_steps": 0}
        if newest.step >= state.get("total_steps", newest.step):
            return
        advice = f"--resume_from_checkpoint {newest.folder} goes on from it; or"
    elif newest is None and is_finished:
        advice = "there is nothing to resume:"
    elif newest is None and (recipe.resume_from_checkpoint or not (output_dir / "metrics.jsonl").exists()):
        return
    else:
        advice = "add --resume_from_checkpoint true to resume it, or"
    what = "a finished run" if is_finished else "a run"
    at = f"checkpoint at step {newest.step}" if newest else "no checkpoint"
    raise ValueError(f"output_dir: {output_dir} already holds {what} ({at}); {advice} choose another output_dir")


def put_aside(recipe: Recipe, resumed: Checkpoint | None, kind: CheckpointKind = NATIVE) -> Path | None:
    """Move what this start would replace, though nobody asked it to, into a folder `_superseded-N`; None if nothing is.

    A run that starts over leaves its logs. One that is resumed from a checkpoint that was named leaves its model with
    what was measured of it, what its logs hold so far, and later checkpoints; then its trackers begin new runs. Call it
    once nothing can be refused any more.
    """
    output_dir, wanted = Path(recipe.output_dir), recipe.resume_from_checkpoint
    logs = [output_dir / name for name in LOGS]
    if resumed is None or resumed.folder.resolve().parent != (output_dir / "checkpoints").resolve():
        old = output_dir / "recipe.yaml"
        is_other = old.is_file() and old.read_text(encoding="utf-8", errors="replace") != recipe.to_yaml()
        return supersede(output_dir, [*logs, output_dir / TRACKERS_FILE, *[old] * is_other])
    if not isinstance(wanted, str) or Path(wanted).resolve() != resumed.folder.resolve():
        return None
    left = [output_dir / name for name in (TRACKERS_FILE, "evaluation.json", "evaluation.pairs.jsonl", "model")]
    has_later = any(c.step > resumed.step for c in list_checkpoints(output_dir / "checkpoints", kind))
    aside = supersede(output_dir, left if left[-1].exists() else left[:1] * has_later, copied=logs)
    supersede_checkpoints(output_dir / "checkpoints", resumed.step, kind)
    return aside


def supersede_checkpoints(folder: Path, step: int, kind: CheckpointKind) -> Path | None:
    """Move the checkpoints after a step aside, whole or not."""
    every = list_checkpoints(folder, replace(kind, marker=""))
    return supersede(folder, [c.folder for c in every if c.step > step])


def best_checkpoint(step: int, folder: str | Path) -> Checkpoint:
    """The checkpoint of the best evaluation.

    Raises:
        ValueError: the folder does not hold it.
    """
    found = checkpoint_at(Path(folder), step)
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
        "scores_fingerprint": loader.scores_fingerprint,
    }
    return json.loads(json.dumps(identity))


def check_same_run(
    saved: Mapping[str, Any], current: Mapping[str, Any], folder: Path, *, recipe: Recipe, pairs_fit: bool
) -> list[str]:
    """Refuse to resume a checkpoint under settings or data that would make it another run.

    A recipe key that came after the checkpoint is taken to have had its default there; one that this version lacks is
    ignored, with a line that names it. Data is the same if its tokens are, wherever they came from.

    Args:
        saved: the checkpoint's state, as `run.saved.load_state` gives it.
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
    elif saved.get("scores_fingerprint") not in (None, current.get("scores_fingerprint")):
        changed.append("the scores of the training pairs")
    for name, value in current.get("arguments", {}).items():  # of transformers' Trainer, where it is the host
        was = saved.get("arguments", {}).get(name, value)
        if was != value:
            changed.append(f"{name} (was {was!r}, is {value!r})")
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
