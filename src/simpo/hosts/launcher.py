"""Who started this process. Imports nothing heavy: the command line asks before torch is loaded."""

from __future__ import annotations

import os


def launched_by_accelerate() -> bool:
    """Whether `accelerate launch` started this process.

    It tells its processes the precision it was configured with, on every path (one process, several, FSDP, DeepSpeed);
    torchrun and a plain start set no such variable.
    """
    return "ACCELERATE_MIXED_PRECISION" in os.environ
