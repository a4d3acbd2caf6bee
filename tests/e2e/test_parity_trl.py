"""The first optimizer steps of TRL's CPOTrainer (SimPO) and of this trainer, on the same pairs: the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

from simpo.data.files import read_file

REPO = Path(__file__).parents[2]

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    return load_script("benchmarks", "parity_trl.py")


@pytest.mark.filterwarnings("ignore")  # the peer's
@pytest.mark.parametrize(
    ("pairs", "accumulation", "more"),
    [
        ("4", "1", ["--rounding"]),
        ("2", "2", ["--rounding"]),
        ("4", "1", ["--losses", "cpo"]),
        ("4", "1", ["--losses", "alphapo"]),
        ("4", "1", ["--lora", "4"]),
    ],
)
def test_losses_margins_and_gradient_norms_equal_trls(
    parity: ModuleType,
    tiny_model: Path,
    pair_files: Path,
    tmp_path: Path,
    pairs: str,
    accumulation: str,
    more: list[str],
) -> None:
    output = tmp_path / "parity.json"
    arguments = ["--model", str(tiny_model), "--data", str(pair_files), "--steps", "10", "--max-length", "128"]
    arguments += ["--pairs", pairs, "--accumulation", accumulation, "--learning-rate", "1e-3"]
    assert parity.main([*arguments, *more, "--output", str(output)]) == 0
    (result,) = json.loads(output.read_text())
    assert len(result["ours"]) == len(result["trl"]) == 10
    assert result["ours"][0]["loss"] - result["ours"][-1]["loss"] > 0.1  # it did train
    scale = max(1.0, result["ours"][0]["loss"]) if "--losses" in more else 1.0  # theirs are larger than SimPO's
    assert result["differences"]["loss"] < 2e-5 * scale
    assert result["differences"]["grad_norm"] < 2e-4 * scale
    if "--rounding" in more:
        assert 0 < result["rounding"]["loss"] < 2e-5, "this trainer against itself, in another order"


@pytest.mark.long
@pytest.mark.real_model
@pytest.mark.filterwarnings("ignore")  # the peer's
@pytest.mark.parametrize("lora", ["0", "8"])
def test_real_weights_go_the_same_way(parity: ModuleType, smol_model: Path, tmp_path: Path, lora: str) -> None:
    """The short version of 200 steps: three losses, one seed."""
    source, pairs = REPO / "examples/demo/pairs/train.jsonl", tmp_path / "pairs.jsonl"
    rows = sorted(read_file(source), key=lambda row: len(str(row)))[:40]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = [
        "--model",
        str(smol_model),
        "--data",
        str(pairs),
        "--steps",
        "6",
        "--max-length",
        "256",
        "--lora",
        lora,
    ]
    arguments += ["--pairs", "2", "--learning-rate", "1e-5" if lora == "0" else "1e-3"]
    assert parity.main([*arguments, "--losses", "simpo", "cpo", "alphapo"]) == 0
