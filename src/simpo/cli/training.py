"""Commands on a recipe's data and model: train, audit, eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simpo.cli.app import (
    TAKES_OVERRIDES,
    AsJson,
    RecipeOrData,
    app,
    leaving_when_interrupted,
    load,
    output_option,
    print_json,
    stdout_for_json,
)


@app.command(context_settings=TAKES_OVERRIDES)
def train(context: typer.Context, recipe: RecipeOrData) -> None:
    """Train. Any key can follow the recipe: --learning_rate 5e-7 --output_dir runs/first"""
    resolved = load(recipe, context.args, trains_here=True)
    resolved.require("dataset_mixer", "output_dir")
    from simpo.hosts.launcher import launched_by_accelerate
    from simpo.parallel.mesh import leave_world
    from simpo.trainer import Trainer

    with leaving_when_interrupted():
        if launched_by_accelerate():
            from simpo.hosts.hf import run_recipe

            run_recipe(resolved)
        else:
            Trainer(resolved).run()
    leave_world()


@app.command(context_settings=TAKES_OVERRIDES)
def audit(
    context: typer.Context,
    recipe: RecipeOrData,
    examples: Annotated[
        int, typer.Option("--examples", min=0, max=10, help="Pairs to print, the trained text marked.")
    ] = 2,
    output: Annotated[str | None, output_option("File for the ledger, instead of output_dir.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read and tokenise the data, and account for every row: kept, cut or dropped, and why."""
    resolved = load(recipe, context.args, writes=output is None)
    resolved.require("dataset_mixer")
    from rich.console import Console

    from simpo.data.files import check_own
    from simpo.data.prepare import check_dropped, prepare_pairs
    from simpo.model.load import load_tokenizer
    from simpo.run.session import check_token_ids

    with stdout_for_json(as_json):
        path = Path(output) if output else resolved.output_dir and Path(resolved.output_dir, "audit.json")
        if path:
            check_own(path, "splits", "fingerprint")
        prepared = prepare_pairs(resolved, load_tokenizer(resolved), checks=False)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            listed = prepared.save_ledger(path)
        prepared.ledger.render(Console(), examples=examples)
        if path:
            typer.echo(f"ledger: {path}" + f"; every dropped row: {listed}" * bool(listed))
    if as_json:
        print_json(prepared.ledger.model_dump(mode="json"))
    check_dropped(prepared.ledger, resolved.max_dropped_fraction)
    check_token_ids(prepared, resolved)


@app.command(name="eval", context_settings=TAKES_OVERRIDES)
def evaluate(
    context: typer.Context,
    recipe_or_data: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE_OR_DATA", help="A recipe, or a file or folder of pairs; may be left out with --tasks."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model to evaluate: a folder or a hub name. \\[default: the recipe's]")
    ] = None,
    compare: Annotated[str | None, typer.Option("--compare", help="A second model, on the same pairs.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", help="Benchmarks of lm-evaluation-harness in place of pairs: names or YAML files, with commas."
        ),
    ] = None,
    output: Annotated[str | None, output_option("JSON file for the results.")] = None,
    generations: Annotated[int, typer.Option("--generations", min=0, help="Prompts to answer and show.")] = 0,
    max_pairs: Annotated[
        int | None, typer.Option("--max-pairs", min=1, help="At most this many pairs, or documents a task.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of the data to use; test is what is held out.")] = "test",
    as_json: AsJson = False,
) -> None:
    """Measure a model on held-out pairs: preference accuracy, margins, length bias. Any key can follow."""
    from simpo.evaluation.command import run_eval_command

    if tasks and recipe_or_data and recipe_or_data.startswith("-"):  # the first key, where no recipe is given
        recipe_or_data, context.args[:0] = None, [recipe_or_data]
    with stdout_for_json(as_json):
        content = run_eval_command(
            recipe_or_data=recipe_or_data,
            model=model,
            baseline=compare,
            output=output,
            generations=generations,
            max_pairs=max_pairs,
            split=split,
            overrides=context.args,
            tasks=[name.strip() for name in tasks.split(",") if name.strip()] if tasks else (),
        )
    if as_json:
        print_json(content)
