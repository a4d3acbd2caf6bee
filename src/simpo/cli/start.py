"""The command that writes a first recipe: init."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from simpo.cli.app import TAKES_OVERRIDES, app, name_model, say_chosen


@app.command(context_settings=TAKES_OVERRIDES)
def init(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help="File to write.")] = "recipe.yaml",
    data: Annotated[
        str | None, typer.Option("--data", help="Pairs: a file, a folder or a hub name. \\[default: asked]")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model to train: a folder or a hub name. \\[default: asked]")
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Folder of the run. \\[default: asked]")
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs to plan with. \\[default: all]")] = None,
) -> None:
    """Look at pairs, model and machine, and write a commented recipe that fits them. Any key can follow."""
    words = list(context.args)
    if recipe.startswith("-"):  # a key's, where no file is named
        recipe, words = "recipe.yaml", [recipe, *words]
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{recipe}: a recipe's name ends in .yaml; the pairs are given with --data")
    from simpo.data.files import check_writable

    check_writable(path, "init")
    if path.exists():
        raise ValueError(f"{recipe} is there already and is not overwritten; give another name: simpo init NAME.yaml")
    asks = sys.stdin.isatty()
    if not asks and not (data and model):
        raise ValueError("init asks its questions at a terminal only; give --model NAME and --data FILE")
    model = model or typer.prompt("Which model (folder or hub name)?", err=True)
    data = data or str(typer.prompt("Which pairs (file, folder or hub name)?", err=True))
    if asks and output_dir is None:
        output_dir = typer.prompt("Where shall the run be written?", default="as chosen", err=True)
    words += ["--model_name_or_path", model]
    words += ["--output_dir", output_dir] if output_dir and output_dir != "as chosen" else []
    from simpo.starting import choose_recipe

    chosen = choose_recipe(data, name_model(words), recipe_name=recipe, gpus=gpus)
    text = chosen.to_yaml()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    say_chosen(chosen.facts)
    typer.echo(
        f"{recipe} is written; its comments say why. Next:\n  simpo check {shlex.quote(recipe)}\n  {chosen.launch}"
    )
