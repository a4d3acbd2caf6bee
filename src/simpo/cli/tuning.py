"""Commands that choose settings: sweep, calibrate."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from simpo.cli.app import (
    TAKES_OVERRIDES,
    AsJson,
    RecipeFile,
    app,
    leaving_when_interrupted,
    load,
    output_option,
    print_json,
    stdout_for_json,
)


@app.command(context_settings=TAKES_OVERRIDES)
def sweep(
    context: typer.Context,
    recipe: RecipeFile,
    method: Annotated[str, typer.Option("--method", help="grid, random or optuna.")] = "grid",
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Settings to try, of random and optuna.")
    ] = None,
    rungs: Annotated[
        str,
        typer.Option("--rungs", metavar="N,N", help="Steps: all settings train for the first, the best for the next."),
    ] = "",
    generations: Annotated[int, typer.Option("--generations", min=0, help="Answers that show a collapse.")] = 8,
    ray: Annotated[bool, typer.Option("--ray", help="Run by Ray Tune, over its cluster.")] = False,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep all models, not the best alone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try several settings, name the best: --learning_rate 3e-7,1e-6 --beta 2,10; given again, it goes on."""
    from simpo.tuning.space import METHODS, read_space
    from simpo.tuning.sweep import run_sweep

    space, rest = read_space(context.args)
    resolved = load(recipe, rest, writes=True, trains_here=True)
    if method not in METHODS:
        raise ValueError(f"--method {method}: one of {', '.join(METHODS)} is needed")
    steps = [int(part) if part.strip().isdecimal() else 0 for part in rungs.split(",")] if rungs else []
    with leaving_when_interrupted(), stdout_for_json(as_json):
        path = run_sweep(
            resolved,
            space,
            method=method,
            trials=trials,
            rungs=steps,
            generations=generations,
            ray=ray,
            keep_models=keep_models,
        )
    if as_json:
        print_json(json.loads(path.read_text(encoding="utf-8")))


@app.command(context_settings=TAKES_OVERRIDES)
def calibrate(
    context: typer.Context,
    recipe: RecipeFile,
    output: Annotated[str | None, output_option("\\[default: calibrated.yaml in output_dir]")] = None,
) -> None:
    """Propose gamma_beta_ratio, beta, learning rate and budget by measuring and short probes. Any key can follow."""
    resolved = load(recipe, context.args, writes=True, trains_here=True)
    from simpo.tuning.calibrate import run_calibrate

    with leaving_when_interrupted():
        run_calibrate(resolved, output=output)
