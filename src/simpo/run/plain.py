"""Checkpoints are data: what is read from one builds numbers, tensors and names, and runs no code.

A pickle is a program. Those that libraries write into checkpoints are read here, or under the rules from here: torch's
restricted unpickler for tensors, a list of names for the index of torch.distributed.checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.serialization import safe_globals

_FORCE, _FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_ARRAYS: tuple[Any, ...] = (  # what NumPy's state of random numbers is made of
    *(np._core.multiarray._reconstruct, np.ndarray, np.dtype),
    type(np.dtype(np.uint32)),
)
_IN_AN_INDEX = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13's name of it
}


def _of_deepspeed() -> list[Any]:
    """The classes in DeepSpeed's checkpoints, which it reads with trust in everything."""
    if "deepspeed" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class NotData(ValueError):
    """A checkpoint names something that is not data; nothing of it was run."""


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _IN_AN_INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


def read_index(folder: Path) -> Any:
    """The index that torch.distributed.checkpoint wrote into a folder; UnpicklingError for more than data."""
    with (folder / ".metadata").open("rb") as file:
        return _IndexReader(file).load()


@contextlib.contextmanager
def only_data(checkpoint: str | Path | None) -> Iterator[None]:
    """Inside, whoever reads tensors, pickled values and indexes below a checkpoint's folder gets data or an error.

    Args:
        checkpoint: None does nothing.
    Raises:
        NotData: a file names something else.
    """
    if checkpoint is None:
        yield
        return
    folder = Path(checkpoint)
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORBID)}
    os.environ[_FORCE] = "1"
    try:
        for index in sorted(folder.rglob(".metadata")):
            read_index(index.parent)
        with safe_globals([*_ARRAYS, *_of_deepspeed()]):
            yield
    except (Exception, CheckpointException) as error:  # the latter is a BaseException, with the first ranks' errors
        failures = getattr(error, "failures", {0: (error, None)})
        text = " ".join(str(cause) for cause, _ in failures.values())
        if found := re.search(r"GLOBAL ([\w.]+)", text):
            raise NotData(
                f"checkpoint {folder} names {found[1]} where only data belongs; nothing of it was run. "
                "Resume from another one with resume_from_checkpoint: PATH"
            ) from error
        if "Weights only load failed" in text:  # torch would go on with advice to trust it
            raise ValueError(f"a file in {folder} is damaged, or holds more than data") from error
        raise
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})
