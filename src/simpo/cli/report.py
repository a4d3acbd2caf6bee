"""The report of a run: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simpo.cli.app import app, output_option


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Output folders of runs, of rounds, or folders that hold some."),
    ],
    output: Annotated[Path | None, output_option("The page. \\[default: report.html in the folder]")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Write it anew whenever a run has logged more.")] = False,
) -> None:
    """Write the report of a run as one HTML page, also while it goes on; of several runs, compare them."""
    from simpo.report import watch_runs, write_report

    if watch:
        watch_runs(runs, output, say=typer.echo)
    else:
        typer.echo(f"report: {write_report(runs, output)}")
