"""Trap 71: at 80 columns the live bar cut the step number, other libraries' bars and warnings stood in the middle of a
run's output, and a native run imported DeepSpeed wherever it was installed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from terminal import in_terminal, screen_of

from simpo.display import Display, counter, say
from simpo.recipe.yaml import dump_yaml

VALUES = {
    "loss": 0.69314,
    "rewards/accuracies": 1.0,
    "rewards/margins": -12.3456,
    "logps/chosen": -1.2345,
    "pairs_per_s": 123.45,
}


def shown(columns: int, **options: Any) -> str:
    """What the bar of step 4567 of 9999 sends to a terminal."""
    sent = io.StringIO()
    display = Display(console=Console(file=sent, width=columns, force_terminal=True, soft_wrap=True, **options))
    with display.progress(9999, 4566) as show:
        show(4567, VALUES)
        display.log_step(4567, 9999, VALUES, left_s=100)
    return sent.getvalue()


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_bar_shows_step_and_time_whole(columns: int):
    bar, numbers = screen_of(shown(columns), columns=columns)[:2]
    assert max(map(len, (bar, numbers))) <= columns
    assert re.fullmatch(r"step 4567/9999 \S+ \d:\d\d:\d\d left [\d-]+:[\d-]+:[\d-]+", bar.replace("╸", "━"))
    assert numbers.startswith("loss 0.6931  acc 100%  margin -12.346  chosen -1.234")
    assert ("pairs/s" in numbers) == (columns > 60)


def test_what_data_holds_commands_no_terminal():
    file = io.StringIO()
    say("row \x1b[2J\x1b]0;title\x07 \r \u202eabc \x00, naïve 👩\u200d💻", Console(file=file, force_terminal=True))
    shown_text = file.getvalue().removesuffix("\n")
    assert shown_text == r"row \x1b[2J\x1b]0;title\x07 \r \u202eabc \x00, naïve 👩" + "\u200d💻"


@pytest.mark.parametrize("settings", [{}, {"TERM": "dumb"}])
def test_without_a_live_terminal_a_step_is_a_line(settings: dict[str, str]):
    file, how = io.StringIO(), {"soft_wrap": True, "color_system": None, "_environ": settings}
    display = Display(console=Console(file=file, force_terminal=bool(settings), **how))
    with display.progress(9999, 0) as show:
        show(1, VALUES)
        display.log_step(1, 9999, VALUES, left_s=100)
    display.table("done", {"run directory": "/a/very/long/path" * 8, "model": "m"})
    line = "step 1/9999  loss 0.6931  acc 100%  margin -12.346  chosen -1.234  123.45 pairs/s  1:40 left"
    assert file.getvalue().splitlines() == [
        line,
        "done",
        f"  run directory  {'/a/very/long/path' * 8}",
        "  model          m",
    ]


def test_lines_are_folded_between_words_below_their_last_column_and_commands_stay_whole():
    sent = io.StringIO()
    console = Console(file=sent, width=60, force_terminal=True, color_system=None)
    words = " ".join(["words"] * 20)
    say(f"generate   {words}\nnotice: {words} /a/path/{'x' * 60}\n  simpo eval {words}", console)
    lines = sent.getvalue().splitlines()
    assert lines[:2] == [f"{begin:<11}{' '.join(['words'] * 8)}" for begin in ("generate", "")]
    assert all(len(line) <= 60 for line in lines[:-2])
    assert lines[-2:] == [f"  /a/path/{'x' * 60}", f"  simpo eval {words}"]


def test_a_counter_fits_the_terminal():
    sent = io.StringIO()
    with counter(Console(file=sent, width=60, force_terminal=True), "evaluating", 12345, unit="tokens") as advance:
        advance(678, 1)
    rows = [row for row in re.split(r"[\r\n]|\x1b\[\??[\d;]*[A-Za-z]", sent.getvalue()) if row]
    assert not any("…" in row for row in rows)


RUN = """
import sys
sys.argv = ["simpo", *sys.argv[1:]]
from simpo.cli import main
try:
    main()
finally:
    print("imported:", *sorted({"deepspeed", "trl", "ray", "megatron"} & set(sys.modules)))
"""


@pytest.mark.long
@pytest.mark.parametrize(("columns", "keys"), [(60, {}), (80, {"use_peft": True, "lora_r": 4})])
def test_a_run_speaks_with_one_voice_and_imports_what_it_uses(
    tiny_recipe: dict[str, Any], tmp_path: Path, columns: int, keys: dict[str, Any]
):
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    recipe = tmp_path / "recipe.yaml"
    settings = {**tiny_recipe, "save_strategy": "no", "output_dir": "run", **keys}
    recipe.write_text(dump_yaml(settings), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    env |= {"TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}
    code, sent = in_terminal([sys.executable, "-c", RUN, "train", str(recipe)], columns=columns, env=env, cwd=tmp_path)
    lines = screen_of(sent, columns=columns)
    text = "\n".join(lines)
    assert code == 0, text
    assert lines[-2:] == ["imported:", ""], text
    ours = re.compile(r"training$|evaluation at step|step 10/10 |loss 0\.|done$|next:$|imported:$|  |$")
    whole = [line for before, line in pairwise(["", *lines]) if len(before) < columns]  # the others hold a path's rest
    assert all(ours.match(line) for line in whole), text
    assert not re.search(r"WARNING|Loading weights|Writing model|…", text)


@pytest.mark.long
def test_a_log_of_ascii_has_lines_alone(tiny_recipe: dict[str, Any], tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    odd = tmp_path / "Läufe…"
    recipe.write_text(
        dump_yaml({**tiny_recipe, "save_strategy": "no", "max_steps": 2, "output_dir": str(odd)}), encoding="utf-8"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "simpo", "train", str(recipe)], capture_output=True, env=env, check=True
    )
    assert not done.stderr, done.stderr
    assert not re.search(rb"[\r\x1b]", done.stdout)
    assert rb"L\xe4ufe\u2026" in done.stdout
