"""The `simpo` command. Imports nothing heavy until the arguments are parsed: torch loads only where it computes.

A module of this package holds the commands of one subject; a command loads its recipe, calls one function of the
package and prints.
"""

import signal

from simpo.cli import start, training, report, recipes, onpolicy, tuning, judging, shipping  # isort: skip  as in --help
from simpo.cli.app import app
from simpo.errors import LEFT_OUT
from simpo.streams import lasting_streams, open_standard_descriptors

__all__ = ["app", "judging", "main", "onpolicy", "recipes", "report", "shipping", "start", "training", "tuning"]


def main() -> None:
    """Entry point of the `simpo` script."""
    open_standard_descriptors()
    try:
        with lasting_streams() as lost:
            app(prog_name="simpo")
    except SystemExit as end:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left to do at the end of Python may be left, silently
        if lost and not end.code:
            raise SystemExit(LEFT_OUT) from None
        raise
