"""Whether a Trainer's checkpoint is one of the run that is to go on from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from simpo.run.resume import check_same_run
from simpo.run.saved import TRAINERS, load_state

if TYPE_CHECKING:
    from simpo.data.loader import StepLoader
    from simpo.recipe import Recipe

IDENTITY_FILE = TRAINERS.state_file  # in each checkpoint: what must be equal to resume it


def check_checkpoint(folder: Path, identity: Mapping[str, Any], loader: StepLoader, recipe: Recipe) -> list[str]:
    """Lines to show before it is resumed.

    Args:
        identity: of the run that is about to start.
        loader: its plan.
    Raises:
        ValueError: it is another run's, whose pairs are not those still to come, or no checkpoint of this trainer.
    """
    if not (folder / IDENTITY_FILE).is_file():
        raise ValueError(f"resume_from_checkpoint: {folder} was not saved by this trainer (no {IDENTITY_FILE})")
    if not any(folder.glob("rng_state*")):  # which transformers writes with the optimizer, whatever holds that
        raise ValueError(
            f"resume_from_checkpoint: {folder} holds weights alone (save_only_model), so that nothing can go on from "
            "it; begin a run with it as the model"
        )
    history = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).log_history
    counts = [(line["step"], line["pairs_seen"]) for line in history if "pairs_seen" in line]
    fits = all(loader.pairs_before(step) == count for step, count in counts)
    return list(check_same_run(load_state(folder / IDENTITY_FILE), identity, folder, recipe=recipe, pairs_fit=fits))


def find_best(resumed: Path) -> str | None:
    """The checkpoint of the best evaluation before this one: beside it, where the run may have been moved since.

    Raises:
        ValueError: it is gone.
    """
    recorded = TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME)).best_model_checkpoint
    if recorded is None:
        return None
    places = (resumed.with_name(re.split(r"[\\/]", recorded)[-1]), Path(recorded))  # of any system
    if (found := next((place for place in places if place.is_dir()), None)) is None:
        raise ValueError(
            f"load_best_model_at_end: the checkpoint of the best evaluation, {places[0]}, is not there any more; with "
            "false the last step's weights become the model"
        )
    return str(found)
