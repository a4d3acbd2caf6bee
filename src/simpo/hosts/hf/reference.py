"""Reference log-probs under transformers' Trainer: the model's own before its first update, kept in its checkpoints."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simpo.core.batch import PackedPairs
from simpo.core.losses import PairLogps
from simpo.data.cache import fingerprint_tokens
from simpo.data.loader import PairStore
from simpo.run.reference import ReferenceLogps
from simpo.run.saved import TRAINERS, load_state

if TYPE_CHECKING:
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe

REFERENCE_FILE = "reference.npz"  # name of the pairs -> [num_pairs, 2] sums, nats


class References:
    """By the name of pairs: "train", or that of held-out ones. Empty until training begins, or where the loss needs
    none."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._known: dict[str, ReferenceLogps] = {}

    def name_of(self, held_out: Any) -> str:
        """It takes a while, and is empty where the loss needs no reference."""
        return fingerprint_tokens(held_out) if self._recipe.loss.needs_reference else ""

    def compute(
        self, forward: Callable[[PackedPairs], PairLogps], stores: Mapping[str, PairStore], recipe: Recipe, mesh: Mesh
    ) -> None:
        """Before the first update the model is the reference.

        Args:
            recipe: as it trains.
        """
        self._known = {name: ReferenceLogps.compute(forward, store, recipe, mesh) for name, store in stores.items()}

    def load(self, checkpoint: Path, stores: Mapping[str, PairStore], mesh: Mesh) -> None:
        """From a checkpoint's folder, for these pairs by name: a resumed run has no untrained model to ask.

        Raises:
            ValueError: the file is missing or damaged, or lacks pairs of these stores.
        """
        self._known = mesh.on_main(lambda: _read(checkpoint, stores))

    def save(self, checkpoint: Path) -> None:
        """Into a checkpoint's folder."""
        if self._known:
            np.savez(checkpoint / REFERENCE_FILE, **{name: logps.sums for name, logps in self._known.items()})

    def put_into(self, logps: PairLogps, indices: Sequence[int], name: str, *, is_trained: bool) -> PairLogps:
        """With the reference's sums.

        Raises:
            ValueError: pairs without any, and the model is no longer its own reference.
        """
        if name in self._known:
            return self._known[name].put_into(logps, indices)
        if is_trained:
            raise ValueError(
                f"loss_type = {self._recipe.loss_type}: these held-out pairs were not there when training began, so "
                "the reference's log-probs of them are not known; give them to the trainer as eval_dataset"
            )
        untrained = {"ref_chosen_sum": logps.chosen_sum.detach(), "ref_rejected_sum": logps.rejected_sum.detach()}
        return dataclasses.replace(logps, **untrained)


def _read(checkpoint: Path, stores: Mapping[str, PairStore]) -> dict[str, ReferenceLogps]:
    path = checkpoint / REFERENCE_FILE
    by_position = load_state(checkpoint / TRAINERS.state_file)["format"] == 0  # it had other names, in the same order
    try:
        with np.load(path) as arrays:
            names = stores if by_position else arrays.files
            known = {name: ReferenceLogps(arrays[file]) for name, file in zip(names, arrays.files, strict=False)}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"resume_from_checkpoint: {path} cannot be read ({error}); resume from an earlier one"
        ) from error
    for name, store in stores.items():
        if name not in known:
            raise ValueError(
                f"resume_from_checkpoint: {path} has no reference log-probs of these held-out pairs; give the "
                "eval_dataset that the run began with"
            )
        if not known[name].is_of(len(store)):
            raise ValueError(f"resume_from_checkpoint: {path} is damaged; resume from an earlier one")
    return known
