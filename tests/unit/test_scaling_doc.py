"""docs/scaling.md: its numbers are the functions', its commands parse."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from scripts import load_script
from torch.distributed.run import get_args_parser

from simpo.recipe import KEYS

pytestmark = pytest.mark.usefixtures("shared_traces")
REPO = Path(__file__).resolve().parents[2]
TEXT = (REPO / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scaling():
    """benchmarks/scaling.py, which is no part of the package."""
    return load_script("benchmarks", "scaling.py")


@pytest.mark.long
def test_the_tables_are_what_the_functions_compute(scaling):
    """After a change that moves them: python benchmarks/scaling.py --write docs/scaling.md"""
    assert set(re.findall(r"<!-- table: (\w+) -->", TEXT)) == set(scaling.TABLES)
    assert scaling.fill(TEXT) == TEXT


def test_a_marker_that_names_no_table_is_refused(scaling):
    with pytest.raises(ValueError, match="meshes, claims"):
        scaling.fill("<!-- table: none -->\n<!-- end of table -->")


def commands() -> list[str]:
    """Every torchrun command of the document's code blocks, continued lines joined."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return [line[line.index("torchrun") :] for line in blocks.splitlines() if "torchrun " in line]


def test_launch_lines_are_torchruns_and_their_keys_are_the_recipes():
    assert len(commands()) == 3
    for command in commands():
        words = command.replace('"$SLURM_NNODES"', "8").replace('"', "").split()[1:]
        arguments = get_args_parser().parse_args(words)
        assert (arguments.module, arguments.training_script) == (True, "simpo")
        command, recipe, *overrides = arguments.training_script_args
        assert (command, recipe) == ("train", "RECIPE")
        assert all(key.removeprefix("--") in KEYS for key in overrides[::2])


def test_the_sbatch_script_is_a_shell_script():
    script = next(
        block for block in re.findall(r"^```\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE) if "#SBATCH" in block
    )
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False).stderr == ""


def test_keys_and_options_that_the_document_names_exist():
    for key in ("dp_replicate", "dp_shard", "cp", "tp", "ddp_timeout", "async_save", "save_steps"):
        assert f"`{key}" in TEXT
        assert key in KEYS
