"""Commands that say which of two models' answers are better: judge."""

from __future__ import annotations

from typing import Annotated

import typer

from simpo.cli.app import (
    TAKES_OVERRIDES,
    AsJson,
    RecipeFile,
    app,
    exit_by_account,
    leaving_when_interrupted,
    load,
    output_option,
    print_json,
    stdout_for_json,
)


@app.command(context_settings=TAKES_OVERRIDES)
def judge(
    context: typer.Context,
    recipe: RecipeFile,
    output: Annotated[
        str | None, output_option("\\[default: judged in output_dir]", metavar="FOLDER", is_folder=True)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two models' answers: win rate, also at equal length. Keys can follow: --model A --against B"""
    resolved = load(recipe, context.args, stage="judge", writes=output is None)
    import json

    from rich.console import Console

    from simpo.display import say
    from simpo.judging.command import run_judge, show_judgement

    with stdout_for_json(as_json), leaving_when_interrupted():
        path = run_judge(resolved, output=output)
        content = json.loads(path.read_text(encoding="utf-8"))
        show_judgement(content, Console(highlight=False))
        say(f"numbers: {path}; answers and judgements: {path.parent}")
    if as_json:
        print_json(content)
    exit_by_account(path)
