"""Commands that make pairs of a model's own responses: generate, score, pair, rounds."""

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
    say_once,
    stdout_for_json,
)


@app.command(context_settings=TAKES_OVERRIDES)
def generate(
    context: typer.Context,
    recipe: RecipeFile,
    output: Annotated[str | None, output_option("File to write. \\[default: responses.jsonl in output_dir]")] = None,
    as_json: AsJson = False,
) -> None:
    """Sample responses to prompts; given again, it goes on. Keys can follow: --num_samples 8 --temperature 0.7"""
    resolved = load(recipe, context.args, stage="generate", writes=output is None)
    from simpo.onpolicy.generate import run_generate

    with leaving_when_interrupted(), stdout_for_json(as_json):
        path = run_generate(resolved, output=output)
    exit_by_account(path.with_suffix(".json"), as_json=as_json)


@app.command(context_settings=TAKES_OVERRIDES)
def score(
    context: typer.Context,
    recipe: RecipeFile,
    output: Annotated[str | None, output_option("\\[default: scored.jsonl in output_dir]")] = None,
    as_json: AsJson = False,
) -> None:
    """Rate responses by rules, functions, models, a judge. Any key can follow: --input FILE --standardize true"""
    resolved = load(recipe, context.args, stage="score", writes=output is None)
    from simpo.onpolicy.score import run_score

    with leaving_when_interrupted(), stdout_for_json(as_json):
        path = run_score(resolved, output=output)
    exit_by_account(path.with_suffix(".json"), as_json=as_json)


@app.command(context_settings=TAKES_OVERRIDES)
def pair(
    context: typer.Context,
    recipe: RecipeFile,
    output: Annotated[
        str | None, output_option("Folder. \\[default: pairs in output_dir]", metavar="FOLDER", is_folder=True)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make preference pairs of scored responses. Any key can follow: --method best_sigma --min_gap 0.3"""
    resolved = load(recipe, context.args, stage="pair", writes=output is None)
    from simpo.onpolicy.pair import account_of, run_pair

    with stdout_for_json(as_json):
        account = account_of(run_pair(resolved, output=output))
    exit_by_account(account, examples=False, as_json=as_json)


@app.command(context_settings=TAKES_OVERRIDES)
def rounds(context: typer.Context, recipe: RecipeFile, as_json: AsJson = False) -> None:
    """Generate, score, pair, train, evaluate, several times; given again, it goes on. Any key can follow: --rounds 3"""
    resolved = load(recipe, context.args, stage="rounds", writes=True)
    from simpo.onpolicy.rounds import StageFailed, run_rounds

    try:
        with stdout_for_json(as_json):
            path = run_rounds(resolved)
    except StageFailed as failed:
        say_once(f"error: {failed}", color="red")
        raise typer.Exit(failed.code) from None
    except KeyboardInterrupt:
        say_once("interrupted; the same command goes on from here", color="yellow")
        raise typer.Exit(130) from None
    exit_by_account(path, as_json=as_json)
