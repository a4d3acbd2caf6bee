"""The demo's own script and the loop it runs, on the tiny model: everything promised is written and printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

REPO = Path(__file__).resolve().parents[2]
DEMO = REPO / "examples" / "demo"
SMALL = ["--bf16=false", "--generate.processes=1", "--generate.num_samples=3", "--generate.max_new_tokens=24"]
SMALL += ["--rounds.prompts_per_round=8", "--rounds.eval_prompts=6", "--num_threads=1", "--learning_rate=1e-3"]
SMALL += ["--pair.min_gap=0", "--pair.min_score=null", "--pair.finished_only=false"]  # a random model ends nothing


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(sys, "path", [str(DEMO), str(REPO), *sys.path])
    before = set(sys.modules)
    yield load_script("examples", "demo", "run.py")
    for name in {"get_model", "examples", "examples.demo", "examples.demo.rule", "examples.demo.readable"} - before:
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("rounds_in_process")
def test_demo_goes_through_two_rounds_and_reports(
    demo: ModuleType,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MODEL", str(tiny_model))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(tmp_path)  # the demo finds its prompts from anywhere
    output = tmp_path / "demo"
    keys = [*SMALL, f"--output_dir={output}", f"--cache_dir={tmp_path / 'cache'}"]
    assert demo.main(keys) == 0
    result = json.loads((output / "rounds.json").read_text())
    assert [model["round"] for model in result["models"]] == [0, 1, 2]
    assert {"score", "score: rule", "score: readable", "tokens", "finished"} <= result["models"][2].keys()
    config = json.loads((output / "round-2" / "run" / "model" / "config.json").read_text())
    assert config["dtype"] == "float32"
    page = (output / "demo.md").read_text()
    assert page.count("\n## ") == result["models"][0]["prompts"] == 6
    printed = capsys.readouterr().out
    for part in ("held-out pairs", "rule score", "from the first model to the last on 6 held-out prompts", "minutes"):
        assert part in printed, part
    answers = demo.pair_answers(output)
    gain = result["models"][2]["score"]["value"] - result["models"][0]["score"]["value"]
    assert sum(demo.gains(answers)) / len(answers) == pytest.approx(gain)
    assert demo.main(keys) == 0  # nothing is left to do
    assert "took 0" not in capsys.readouterr().out


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
