"""`simpo push`: a model to the hub, with a card that has the run's numbers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run.export import create_repository, is_own_card, upload_model
from simpo.shipping.card import EVALUATION, card_of, evaluation_of
from simpo.shipping.source import Source, find_source

KEYS = frozenset({"hub_model_id", "hub_private_repo", "hub_token"})


def run_push(name: str, overrides: Sequence[str] = (), *, repo: str | None = None, dry_run: bool = False) -> None:
    """Upload a model's folder, or show what would be sent.

    Args:
        name: a finished run, or a folder with a model or an adapter.
        overrides: recipe keys: hub_private_repo, hub_token.
        repo: the repository; None = the run's hub_model_id, or the name of the run or the folder.
        dry_run: send nothing.
    Raises:
        ValueError: there is no folder to send, or the repository cannot be created.
        OSError: the upload failed; says how to try again.
    """
    source, display = find_source(name, overrides, keys=KEYS), Display()
    if source.is_training_state:
        file = None if source.folder is None else source.training_file
        what = "is a checkpoint in shards" if file is None else f"holds the state of a training ({file})"
        advice = f"write it as a model first: simpo merge {shlex.quote(name)}"
        raise ValueError(f"{name} {what}; {advice}" + (", or move that out of it" if file is not None else ""))
    folder = source.place
    if not folder.is_dir():
        raise ValueError(f"{name}: there is no such folder")
    repo = repo or source.recipe.hub_model_id or source.title
    recipe = load_recipe(source.recipe, {"push_to_hub": True, "hub_model_id": repo})
    card = _card(source, folder)
    if card is None:
        display.say(f"{folder / 'README.md'} was written, or changed, by somebody else than simpo: it is sent as it is")
    elif source.run is not None and evaluation_of(source) is None:
        path = source.run / EVALUATION
        named, base, output = map(shlex.quote, (name, source.base, str(path)))
        display.say(
            f"{path} is of benchmarks or of another model: the card has nothing of it"
            if path.is_file()
            else "the card has the run's own evaluations; one against the base, with intervals of everything, comes "
            f"with: simpo eval DATA --model {named} --compare {base} --output {output}"
        )
    if dry_run:
        display.table(f"would be sent to {repo}", _sizes(folder))
        display.say("" if card is None else card)
        return
    upload_model(folder, create_repository(recipe), recipe, display, card=card)


def _card(source: Source, folder: Path) -> str | None:
    """The card to send, the folder's own where there is no run; None where somebody wrote one, or changed simpo's."""
    path = folder / "README.md"
    own = path.read_text(encoding="utf-8") if path.is_file() else None
    if own is not None and not is_own_card(own):
        return None
    return own if own is not None and source.run is None else card_of(source)


def _sizes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {str(path.relative_to(folder)): f"{path.stat().st_size / 2**20:,.1f} MiB" for path in files}
