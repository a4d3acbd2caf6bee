"""Whatever the machine does to a command, given again it comes to the same; `make chaos` does all of it."""

from __future__ import annotations

import itertools
import os

import pytest
from chaos.commands import COMMANDS
from chaos.harness import KINDS

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft 0.21
]

EVERYTHING = list(itertools.product(COMMANDS, KINDS))
SAMPLE = [("train", kind) for kind in KINDS]
SAMPLE += [each for each in zip(COMMANDS, itertools.cycle(KINDS)) if each[0] not in ("train", "rounds", "sweep")]


@pytest.mark.parametrize(("name", "kind"), EVERYTHING if os.environ.get("SIMPO_CHAOS") else SAMPLE)
def test_a_command_comes_to_the_same(name: str, kind: str, scene) -> None:
    KINDS[kind](scene(name)).check()
