"""Trap 56, of the newer commands: a folder or file that holds somebody's results is not written over by others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simpo.cli import app
from simpo.judging.command import run_judge
from simpo.onpolicy.journal import Journal
from simpo.onpolicy.pair import run_pair
from simpo.recipe import load_recipe
from simpo.report import write_report
from simpo.tuning.sweep import run_sweep


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, said: str, *words: Any) -> None:
    """A command ends with one line, and leaves a folder as it was."""
    before = content(folder)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())
    assert content(folder) == before


@pytest.fixture
def scored(tmp_path: Path) -> dict[str, Any]:
    """A recipe, and responses to make pairs of."""
    rows = [
        {
            "id": f"p{i}",
            "row_id": f"a/train#{i}",
            "prompt": [{"role": "user", "content": f"question {i}?"}],
            "columns": {},
            "responses": [{"text": text, "num_tokens": 3, "finished": True, "score": score} for text, score in answers],
        }
        for i, answers in enumerate([(("yes", 1.0), ("no", 0.0))] * 8)
    ]
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model_name_or_path": "none", "output_dir": str(tmp_path / "runs")}


def test_pairs_of_other_settings_or_of_another_stay(scored: dict[str, Any], tmp_path: Path) -> None:
    folder = run_pair(load_recipe(scored))
    before = content(tmp_path)
    run_pair(load_recipe(scored))
    assert content(tmp_path) == before
    run_pair(load_recipe({**scored, "pair": {"min_gap": 0.5}}))
    aside = content(folder / "_superseded-1")
    assert aside.keys() == {path.removeprefix("runs/pairs/").removeprefix("runs/") for path in before} - {
        "scored.jsonl"
    }
    assert set(aside.values()) < set(before.values())
    (folder.parent / "pairs.json").unlink()
    (folder / "train.jsonl").write_text("mine")
    run_pair(load_recipe(scored))
    assert (folder / "_superseded-2" / "train.jsonl").read_text() == "mine"
    assert content(folder / "_superseded-1") == aside
    (tmp_path / "mine.json").write_text('{"my": "rows"}')
    with pytest.raises(ValueError, match=r"mine\.json: is there already, is not this command's"):
        run_pair(load_recipe(scored), output=tmp_path / "mine")


def test_a_file_beside_a_journal_that_is_not_its_account_stays(tmp_path: Path) -> None:
    for text in ('[{"prompt": "q"}]', '{"prompt": "q"}'):
        (tmp_path / "rows.json").write_text(text)
        with pytest.raises(ValueError, match=r"rows\.json: is there already"), Journal(tmp_path / "rows.jsonl", {}):
            raise AssertionError("opened")
        assert content(tmp_path) == {"rows.json": text.encode()}


def test_a_judgement_of_others_stays(scored: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "judged"
    sides = {name: str(tmp_path / f"{name}.json") for name in ("model", "against")}
    for path, text in zip(sides.values(), ("yes", "no, never"), strict=True):
        Path(path).write_text(json.dumps([{"prompt": "question?", "output": text}]))
    (tmp_path / "asked.jsonl").write_text('{"prompt": "question?"}\n')
    judge = {"prompts": {str(tmp_path / "asked.jsonl"): 1.0}, **sides, "scorers": {"long": {"kind": "length"}}}
    run_judge(load_recipe({**scored, "judge": judge}))
    first = content(folder)
    brief = {"brief": {"kind": "length", "weight": -1}}
    run_judge(load_recipe({**scored, "judge": {**judge, "scorers": brief}}))
    aside = content(folder / "_superseded-1")
    assert {"judgement.json", "judged.jsonl", "alpaca_eval/annotations.json"} < aside.keys()
    assert all(first[name] == held for name, held in aside.items())
    (folder / "judgement.json").unlink()
    (folder / "prompts.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"prompts\.jsonl: holds other prompts already"):
        run_judge(load_recipe({**scored, "judge": judge}))
    assert (folder / "prompts.jsonl").read_text() == "mine"


def test_trials_and_rounds_without_their_record_are_not_taken_up(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(tiny_recipe["output_dir"])
    (folder / "trial-01" / "run" / "model").mkdir(parents=True)
    (folder / "trial-01" / "result.json").write_text("{}")
    before = content(folder)
    with pytest.raises(ValueError, match=r"holds trial-01 of a sweep, and no sweep\.json that says of which; choose"):
        run_sweep(load_recipe(tiny_recipe), {"beta": ("2", "3")})
    assert content(folder) == before
    (folder / "sweep.json").write_text('{"sweep": "mine"}')
    with pytest.raises(ValueError, match=r"sweep\.json: is there already, is not this command's"):
        run_sweep(load_recipe(tiny_recipe), {"beta": ("2", "3")})
    shutil.rmtree(folder)
    (folder / "round-1").mkdir(parents=True)
    (tmp_path / "asked.jsonl").write_text("".join(f'{{"prompt": "question {i}?"}}\n' for i in range(40)))
    keys = {"generate": {"prompts": {str(tmp_path / "asked.jsonl"): 1.0}}, "pair": {"test_fraction": 0.2}}
    keys["score"] = {"scorers": {"long": {"kind": "length"}}}
    recipe = tmp_path / "rounds.yaml"
    load_recipe({**tiny_recipe, **keys}).save(recipe)
    refused(folder, "holds round-1, and no settings.json that says of which loop", "rounds", recipe)


def test_files_of_others_stay(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """--output that names a file which was never this command's."""
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    load_recipe(tiny_recipe).save(recipe)
    refused(tmp_path, "is not this command's", "audit", recipe, "--output", recipe)
    refused(tmp_path, "is not this command's", "eval", recipe, "--output", recipe)
    refused(tmp_path, "is not this command's", "plan", recipe, "--output", recipe)
    refused(tmp_path, "is not this command's", "calibrate", recipe, "--output", recipe)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"model": "another", "versions": {}, "margin": {}}))
    refused(tmp_path, "is of another, and is not overwritten", "eval", recipe, "--output", other)
    refused(tmp_path, "is there already and is not overwritten", "init", recipe, "--data", "x", "--model", "y")
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (run / "report.html").write_text("<!doctype html><title>mine</title>")
    with pytest.raises(ValueError, match=r"report\.html: is there already, is no report, and is not overwritten"):
        write_report([run])
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "mine").touch()
    refused(merged, "is there already, and nothing is overwritten", "merge", tiny_recipe["model_name_or_path"],
            "--save_dtype", "bfloat16", "--output", merged)  # fmt: skip
    refused(merged, "is there already, and nothing is overwritten", "export", "--gguf",
            tiny_recipe["model_name_or_path"], "--output", merged / "mine")  # fmt: skip
