"""What can be typed once a run is done: said at its end, and in its report. Must not import torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simpo.recipe import Recipe


def next_commands(run: str | Path, base: str, *, held_out: bool, adapters: bool) -> list[tuple[str, str]]:
    """What each is for, and the command.

    Args:
        run: the run directory.
        base: the model that was trained.
        held_out: whether there are held-out pairs.
        adapters: whether adapters were trained.
    """
    folder, recipe, result = (shlex.quote(str(Path(run, name))) for name in ("", "recipe.yaml", "evaluation.json"))
    compare = f"simpo eval {recipe} --model {folder} --compare {shlex.quote(base)} --output {result}" * held_out
    found = [
        ("talk to it, the model before beside it", f"simpo chat {folder} --compare"),
        ("measure it against the model before, with paired tests; the report shows it too", compare),
        ("make the report again, after anything was added", f"simpo report {folder}"),
        ("adapters and their base as one model", f"simpo merge {folder}" * adapters),
        ("one file for llama.cpp and ollama", f"simpo export {folder} --gguf"),
        ("upload it, with a card of these numbers", f"simpo push {folder}"),
    ]
    return [(what, command) for what, command in found if command]


def describe_next(recipe: Recipe, *, held_out: bool) -> str:
    """The same for the terminal."""
    run, base = str(recipe.output_dir), recipe.model_name_or_path
    commands = next_commands(run, base, held_out=held_out, adapters=recipe.use_peft)
    return "\n".join(["next:", *(f"  {command}" for _, command in commands)])
