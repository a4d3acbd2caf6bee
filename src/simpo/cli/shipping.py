"""Commands on a finished run or any model: chat, merge, export, push."""

from __future__ import annotations

from typing import Annotated

import typer

from simpo.cli.app import TAKES_OVERRIDES, app, name_stage, output_option

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A run, a checkpoint, a folder with a model or an adapter, or a hub name."),
]


@app.command(context_settings=TAKES_OVERRIDES)
def chat(
    context: typer.Context,
    model: Model,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Answers of the model it was trained from beside it; of another: --compare NAME."
        ),
    ] = False,
) -> None:
    """Talk to a model. Any key of sampling can follow: --temperature 0 --max_new_tokens 512 --system_prompt "Be brief."

    On a terminal: /reset begins anew, /quit leaves, Ctrl-C stops an answer. Elsewhere each line of stdin is a turn.
    """
    from simpo.shipping.chat import parse_compare, run_chat

    other, words = parse_compare(context.args, compare)
    run_chat(model, name_stage(words, "generate"), compare=other)


@app.command(context_settings=TAKES_OVERRIDES)
def merge(
    context: typer.Context,
    model: Model,
    output: Annotated[
        str | None, output_option("New folder. \\[default: beside the model, -merged]", metavar="DIR", is_folder=True)
    ] = None,
) -> None:
    """Write adapters merged into their base, or a checkpoint, as an ordinary model folder. --save_dtype can follow."""
    from simpo.shipping.merge import run_merge

    run_merge(model, context.args, output=output)


@app.command(context_settings=TAKES_OVERRIDES)
def export(
    context: typer.Context,
    model: Model,
    gguf: Annotated[bool, typer.Option("--gguf", help="As one file for llama.cpp and ollama.")] = False,
    quantize: Annotated[
        str, typer.Option("--quantize", metavar="FORMAT", help="Of the weights: q8_0, f16, bf16 or f32.")
    ] = "q8_0",
    output: Annotated[str | None, output_option("New file. \\[default: beside the model, .gguf]")] = None,
) -> None:
    """Write a model as a .gguf file, adapters merged, with a Modelfile for ollama beside it."""
    if not gguf:
        raise ValueError("export: say --gguf, the one format that there is; as transformers loads it: simpo merge")
    from simpo.shipping.gguf import run_export

    run_export(model, context.args, quantize=quantize, output=output)


@app.command(context_settings=TAKES_OVERRIDES)
def push(
    context: typer.Context,
    model: Model,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="NAME", help="Repository on the hub. \\[default: the run's name]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
) -> None:
    """Upload a model to the hub, with a card that says what it was trained on and what came of it."""
    from simpo.shipping.push import run_push

    run_push(model, context.args, repo=repo, dry_run=dry_run)
