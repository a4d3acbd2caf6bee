"""The `simpo` command. Imports nothing heavy until the arguments are parsed: torch loads only where it computes.

A module of this package holds the commands of one subject; a command loads its recipe, calls one function of the
package and prints.
"""

import io
import sys

from simpo.cli import start, training, report, recipes, onpolicy, tuning, judging, shipping  # isort: skip  as in --help
from simpo.cli.app import app

__all__ = ["app", "judging", "main", "onpolicy", "recipes", "report", "shipping", "start", "training", "tuning"]


def main() -> None:
    """Entry point of the `simpo` script."""
    for stream in (sys.stdout, sys.stderr):  # a log in ASCII is no reason for a run to end
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="simpo")
