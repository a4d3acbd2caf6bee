"""The demo's own script, on the tiny model: everything it promises is written and printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(sys, "path", [str(DEMO), *sys.path])
    before = set(sys.modules)
    yield load_script("examples", "demo", "run.py")
    for name in ("get_model", "rule", "sample"):
        if name not in before:
            sys.modules.pop(name, None)


def test_demo_trains_answers_and_reports(
    demo: ModuleType,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MODEL", str(tiny_model))
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 8)
    monkeypatch.chdir(tmp_path)  # the demo finds its pairs from anywhere
    output = tmp_path / "demo"
    keys = [f"--output_dir={output}", "--max_steps=2", "--eval_steps=2", "--max_length=400", "--bf16=false"]
    assert demo.main(keys) == 0
    result = json.loads((output / "demo.json").read_text())
    assert result["computed_in"] == "fp32"
    assert json.loads((output / "model" / "config.json").read_text())["dtype"] == "float32"
    assert len(result["answers"]) == result["prompts"] >= 80
    page = (output / "demo.md").read_text()
    assert page.count("## ") == result["prompts"]
    for name, (before, after) in result["rows"].items():
        assert f"| {name} | {before:.3f} | {after:.3f} |" in page
    printed = capsys.readouterr().out
    for part in ("held-out preference accuracy", "rule score", str(output / "model"), "minutes"):
        assert part in printed.replace("\n", ""), part


def test_demo_never_overwrites_a_run(demo: ModuleType, tmp_path: Path) -> None:
    assert demo.free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert demo.free_folder(tmp_path / "demo") == tmp_path / "demo-3"


def test_a_bad_key_is_one_line_and_no_run(
    demo: ModuleType, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL", str(tiny_model))
    assert demo.main(["--lerning_rate=1"]) == 1
    assert "learning_rate" in capsys.readouterr().err


def test_gains_and_their_interval_are_paired(demo: ModuleType) -> None:
    prompts = ["why is water wet and cold", "how do rivers form in hills", "what is bread made of"]
    good = "Water is wet because its molecules cling to what they touch, and cold when it gives its warmth away."
    before = ["", "", ""]
    after = [good, "", ""]
    evaluation = {"eval_rewards/accuracies": 0.5, "eval_logps/chosen": -1.0, "eval_logps/rejected": -1.5}
    summary = demo.summarise(prompts, before, after, (evaluation, evaluation))
    gain = summary["score_gain"]
    assert summary["better"] == 1
    assert summary["worse"] == 0
    assert gain["low"] < 0 < gain["mean"] < gain["high"]
    assert summary["rows"]["held-out margin, nats per token"] == [0.5, 0.5]
