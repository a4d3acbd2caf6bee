"""Losses that people add: by import path, and by the README's few lines in core/losses.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.trainer import Trainer

REPO = Path(__file__).resolve().parents[2]
MARGIN = "from torch.nn.functional import logsigmoid\n\ndef simpo(logps, *, beta, gamma_beta_ratio, scale=1.0):\n" + (
    "    return -scale * logsigmoid(beta * (logps.chosen_mean - logps.rejected_mean - gamma_beta_ratio))\n"
)


def losses(output_dir: str | Path) -> list[float]:
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def code_blocks(language: str) -> list[str]:
    pages = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.S)]


def test_a_loss_by_import_path_trains_like_the_same_loss_in_the_package_and_resumes(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "losses_that_train.py").write_text(MARGIN)

    def run(name: str, **keys: Any) -> list[float]:
        values = {**tiny_recipe, "max_steps": 4, "save_steps": 2, "eval_strategy": "no", **keys}
        Trainer(load_recipe(values, {"output_dir": str(tmp_path / name)}), display=Display(quiet=True)).run()
        return losses(tmp_path / name)

    own = {"loss_type": "losses_that_train:simpo"}
    ours = run("ours")
    assert run("own", **own) == ours
    shutil.copytree(tmp_path / "own", tmp_path / "again")
    resume = {"resume_from_checkpoint": str(tmp_path / "again" / "checkpoints" / "step-2")}
    assert run("again", **own, **resume) == ours
    with pytest.raises(ValueError, match=r"loss_kwargs \(was {'scale': 1.0}, is {'scale': 2}\)"):
        run("again", **own, **resume, loss_kwargs={"scale": 2})


def test_a_loss_by_import_path_trains_under_transformers_trainer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_hosts import run_host
    from miniature import write_pairs

    monkeypatch.chdir(tmp_path)
    (tmp_path / "losses_of_a_host.py").write_text(MARGIN)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 9, seed=3)
    ours = run_host(tiny_model, pairs, tmp_path / "ours", max_steps=2)
    own = run_host(tiny_model, pairs, tmp_path / "own", max_steps=2, loss_type="losses_of_a_host:simpo")
    assert [line["loss"] for line in own["lines"]] == [line["loss"] for line in ours["lines"]]


@pytest.mark.long
def test_the_documentations_lines_for_a_loss_work_with_one_file_touched(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A copy of the package with the block at the end of core/losses.py: explained, checked, refused, trained."""
    (block,) = [block for block in code_blocks("python") if block.startswith("@declare(")]
    shutil.copytree(REPO / "src" / "simpo", tmp_path / "simpo", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "simpo" / "core" / "losses.py").open("a") as file:
        file.write("\n\n" + block)
    path = tmp_path / "recipe.yaml"
    keys = {"loss_type": "cauchy", "cauchy_width": 0.5, "max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    path.write_text(yaml.safe_dump({**tiny_recipe, **keys}))
    program = (
        "import sys; from typer.testing import CliRunner; from simpo.cli import app\n"
        "for words in ('keys cauchy_width', 'losses', 'check RECIPE', 'check RECIPE --loss_type sigmoid',\n"
        "              'check RECIPE --cauchy_width 0', 'train RECIPE'):\n"
        "    result = CliRunner().invoke(app, words.replace('RECIPE', sys.argv[1]).split())\n"
        "    print('exit', result.exit_code); print(result.output)\n"
        "from simpo.hosts.hf import SimPOConfig\n"
        "print(SimPOConfig('x', loss_type='cauchy', cauchy_width=3, report_to=[]).to_recipe().cauchy_width)\n"
        "from simpo.hosts.megatron.settings import SIMPO_ARGUMENTS; print(SIMPO_ARGUMENTS['cauchy_width'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    text = done.stdout
    assert re.findall(r"^exit (\d)", text, flags=re.M) == ["0", "0", "0", "2", "2", "0"], text + done.stderr
    assert "Width of cauchy, in rewards.\n      allowed: x > 0; only cauchy\n      default: 1.0" in text
    assert "cauchy     log(1 + (z/cauchy_width)^2 / 2)" in text
    assert "cauchy: beta 2, gamma/beta 0.5, cauchy_width 0.5, gamma 1, 1.0986 nats at zero margin" in text
    assert "cauchy_width: loss_type 'sigmoid' does not read it, only cauchy does" in text
    assert "cauchy_width = 0.0: input should be greater than 0 (allowed: x > 0; only cauchy)" in text
    assert text.splitlines()[-2:] == ["3.0", "cauchy_width"]
    assert len(losses(tiny_recipe["output_dir"])) == 2
