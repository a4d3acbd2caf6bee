"""The `simpo` command. Imports nothing heavy until the arguments are parsed: torch loads only where it computes.

A module of this package holds the commands of one subject; a command loads its recipe, calls one function of the
package and prints.
"""

from simpo.cli import start, training, report, recipes, onpolicy, judging, shipping  # isort: skip  as in `simpo --help`
from simpo.cli.app import app

__all__ = ["app", "judging", "main", "onpolicy", "recipes", "report", "shipping", "start", "training"]


def main() -> None:
    """Entry point of the `simpo` script."""
    app(prog_name="simpo")
