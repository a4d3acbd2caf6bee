"""Draws docs/run.svg: what `simpo train recipes/demo.yaml` prints, from a real run (about three minutes on two cores).

python benchmarks/picture.py --model FOLDER [--write docs/run.svg]
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

REPO = Path(__file__).resolve().parents[1]
KEYS = ["--logging_steps", "8"]
WIDTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder of SmolLM2-135M-Instruct")
    parser.add_argument("--write", type=Path, default=REPO / "docs" / "run.svg")
    args = parser.parse_args()
    from simpo.display import Display
    from simpo.recipe import load_recipe
    from simpo.trainer import Trainer

    target, model = args.write.resolve(), args.model.expanduser().resolve()
    console = Console(record=True, file=io.StringIO(), width=WIDTH, highlight=False, force_terminal=False)
    with tempfile.TemporaryDirectory() as folder:
        # Names as a user would give them, whatever this machine calls its folders.
        os.chdir(folder)
        Path("HuggingFaceTB").mkdir()
        Path("HuggingFaceTB/SmolLM2-135M-Instruct").symlink_to(model)
        for name in ("examples", "recipes"):
            Path(name).symlink_to(REPO / name)
        console.print("[bold green]$[/] simpo train recipes/demo.yaml " + " ".join(KEYS))
        recipe = load_recipe("recipes/demo.yaml", KEYS)
        Trainer(recipe, display=Display(console=console)).run()
        os.chdir(REPO)
    svg = console.export_svg(title="simpo train", theme=MONOKAI)
    target.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")
    print(f"{target}: {target.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
