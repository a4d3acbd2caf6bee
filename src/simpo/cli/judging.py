"""Commands that say which of two models' answers are better: judge."""

from __future__ import annotations

from typing import Annotated

import typer

from simpo.cli.app import TAKES_OVERRIDES, RecipeFile, app, exit_by_account, leaving_when_interrupted, load


@app.command(context_settings=TAKES_OVERRIDES)
def judge(
    context: typer.Context,
    recipe: RecipeFile,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FOLDER", help="[default: judged in output_dir]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of a table.")] = False,
) -> None:
    """Compare two models' answers: win rate, also at equal length. Keys can follow: --model A --against B"""
    resolved = load(recipe, context.args, stage="judge")
    from rich.console import Console

    from simpo.judging.command import run_judge, show_judgement

    with leaving_when_interrupted():
        path = run_judge(resolved, output=output)
    content = path.read_text(encoding="utf-8")
    if as_json:
        typer.echo(content, nl=False)
    else:
        import json

        show_judgement(json.loads(content), Console(highlight=False))
        typer.echo(f"numbers: {path}; answers and judgements: {path.parent}")
    exit_by_account(path)
