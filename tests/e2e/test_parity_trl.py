"""The first optimizer steps of TRL's CPOTrainer (SimPO) and of this trainer, on the same pairs: the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    return load_script("benchmarks", "parity_trl.py")


@pytest.mark.filterwarnings("ignore")  # the peer's
@pytest.mark.parametrize(("pairs", "accumulation"), [("4", "1"), ("2", "2")])
def test_losses_margins_and_gradient_norms_equal_trls(
    parity: ModuleType, tiny_model: Path, pair_files: Path, tmp_path: Path, pairs: str, accumulation: str
) -> None:
    output = tmp_path / "parity.json"
    arguments = ["--model", str(tiny_model), "--data", str(pair_files), "--steps", "10", "--max-length", "128"]
    arguments += ["--pairs", pairs, "--accumulation", accumulation, "--learning-rate", "1e-3"]
    assert parity.main([*arguments, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert len(result["ours"]) == len(result["trl"]) == 10
    assert result["ours"][0]["loss"] - result["ours"][-1]["loss"] > 0.1  # it did train
    assert result["differences"]["loss"] < 2e-5
    assert result["differences"]["grad_norm"] < 2e-4
