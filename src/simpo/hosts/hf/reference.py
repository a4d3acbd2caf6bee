"""Reference log-probs under transformers' Trainer: those of the model itself before its first update.

The engine's own model computes them, so that no second one is loaded, however the weights are spread. Checkpoints carry
them: a resumed run has no untrained model to ask.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from simpo.data.loader import PairStore
from simpo.parallel.mesh import Mesh
from simpo.recipe import Recipe
from simpo.run.reference import Forward, ReferenceLogps, compute_all

REFERENCE_FILE = "reference.npz"  # in each checkpoint: name of the pairs -> [num_pairs, 2] sums, nats


class References(Mapping[str, ReferenceLogps]):
    """Reference log-probs by the name of the pairs: "train", or of held-out pairs their fingerprint.

    Args:
        mesh: the run's processes; all of them call every method.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._known = mesh, dict[str, ReferenceLogps]()

    def __getitem__(self, name: str) -> ReferenceLogps:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def compute(self, forward: Forward, stores: Mapping[str, PairStore], recipe: Recipe) -> None:
        """Of every pair, by the model as it is now; what was known before is forgotten."""
        self._known = {name: compute_all(forward, store, recipe, mesh=self._mesh) for name, store in stores.items()}

    def save(self, checkpoint: Path) -> None:
        """Into a checkpoint's folder. One process calls it."""
        np.savez(checkpoint / REFERENCE_FILE, **{name: logps.sums for name, logps in self._known.items()})

    def load(self, checkpoint: Path, stores: Mapping[str, PairStore], *, by_position: bool) -> None:
        """From a checkpoint's folder.

        Args:
            stores: as when they were computed.
            by_position: the checkpoint has other names for them, in the same order.
        Raises:
            ValueError: the file is missing or damaged, or lacks pairs of these stores; on every process.
        """
        self._known = self._mesh.on_main(lambda: _read(checkpoint / REFERENCE_FILE, stores, by_position))


def _read(path: Path, stores: Mapping[str, PairStore], by_position: bool) -> dict[str, ReferenceLogps]:
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
