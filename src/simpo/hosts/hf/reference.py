"""Reference log-probs in the Trainer's checkpoints: a resumed run has no untrained model to ask for them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from simpo.data.loader import PairStore
from simpo.run.reference import ReferenceLogps

REFERENCE_FILE = "reference.npz"  # name of the pairs -> [num_pairs, 2] sums, nats


def save_references(checkpoint: Path, references: Mapping[str, ReferenceLogps]) -> None:
    """Into a checkpoint's folder, by the name of the pairs: "train", or of held-out pairs their fingerprint."""
    np.savez(checkpoint / REFERENCE_FILE, **{name: logps.sums for name, logps in references.items()})


def load_references(
    checkpoint: Path, stores: Mapping[str, PairStore], *, by_position: bool
) -> dict[str, ReferenceLogps]:
    """From a checkpoint's folder.

    Args:
        stores: the pairs whose log-probs are needed, by name.
        by_position: the checkpoint has other names for them, in the same order.
    Raises:
        ValueError: the file is missing or damaged, or lacks pairs of these stores.
    """
    path = checkpoint / REFERENCE_FILE
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
