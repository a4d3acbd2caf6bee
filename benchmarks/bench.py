"""The same pairs through this trainer and its peers, side by side: speed, memory, operations, losses.

    python benchmarks/bench.py                                  # chat, hh and longprompt against TRL
    python benchmarks/bench.py --cases all --peers trl,padded
    python benchmarks/bench.py --from runs/bench/results.json   # table and charts again; runs nothing

Exit codes: 0 done, 2 an option, or a device that is not there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [folder for folder in (str(REPO / "benchmarks"), str(REPO / "src")) if folder not in sys.path]

import typer  # noqa: E402  what follows needs the path
from peers.models import small_model_folder  # noqa: E402
from peers.run import BenchOptions, describe_command, run_benchmark, show_results  # noqa: E402
from rich.console import Console  # noqa: E402

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A model's folder, or llama-1b, llama-3b, llama-8b: that shape with random weights. "
            "Default: the small model that `make model` fetches.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", envvar="SIMPO_DATA", help="Folder that holds the real cases' sets."),
    ] = "../shared/data",
    cases: Annotated[
        str,
        typer.Option(
            "--cases",
            help="chat, hh, longprompt, code, 200/350/350, 1000/300/300, 4096/256/256, or all; any lengths as "
            "prompt/chosen/rejected tokens; or a file or folder of pairs. Several with commas.",
        ),
    ] = "chat,hh,longprompt",
    peers: Annotated[
        str, typer.Option("--peers", help="trl, liger, padded, with commas; none for this trainer alone.")
    ] = "trl",
    pairs_per_micro_batch: Annotated[
        int | None, typer.Option("--pairs-per-micro-batch", min=1, help="Default: 4, and 1 for 4096/256/256.")
    ] = None,
    accumulation: Annotated[int, typer.Option("--accumulation", min=1, help="Micro-batches of a step.")] = 1,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps of each process.")] = 2,
    warm_up_steps: Annotated[
        int, typer.Option("--warm-up", min=1, help="Steps of each process before them; the first are slower.")
    ] = 3,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Processes of each side, in alternation.")] = 2,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="bf16 (autocast on fp32 weights), fp32, or auto: fp32 on a CPU without bfloat16, else bf16."
        ),
    ] = "auto",
    output: Annotated[
        str | None,
        typer.Option("--output", help="Folder for results.json, table.md and charts.png. Default: runs/bench."),
    ] = None,
    flops_only: Annotated[bool, typer.Option("--flops-only", help="Count operations, run nothing.")] = False,
    results: Annotated[
        str | None, typer.Option("--from", help="Show an earlier run's results.json again; runs nothing.")
    ] = None,
) -> None:
    """Run the same pairs through this trainer and its peers, side by side: speed, memory, operations, losses."""
    try:
        console = Console(highlight=False)
        if results is not None:
            folder = show_results(results, output=output, console=console)
        else:
            options = BenchOptions(
                model=model or str(small_model_folder()),
                cases=cases,
                peers=peers,
                data=data,
                pairs_per_micro_batch=pairs_per_micro_batch,
                accumulation=accumulation,
                steps=steps,
                warm_up_steps=warm_up_steps,
                rounds=rounds,
                device=device,
                dtype=dtype,
                output=output or "runs/bench",
                flops_only=flops_only,
            )
            folder = run_benchmark(options, command=describe_command(sys.argv[1:]), console=console).parent
        for name in ("table.md", "results.json", "charts.png"):
            if (folder / name).is_file():
                typer.echo(str(folder / name))
    except ValueError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
