"""Trap 63: JSON lines cut by `str.splitlines`, which also cuts at U+2028 and its kin: such lines vanish, or fail."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from simpo.data.prepare import prepare_pairs
from simpo.run.tracking import forget_lines_after

REPO = Path(__file__).resolve().parents[2]
SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # what str.splitlines cuts at besides "\r" and "\n"
# JSON escapes those below a blank; raw they may be what follows.
RAW = "\x85\u2028\u2029"


def lines_of(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_a_resume_keeps_every_generation_of_the_steps_it_keeps(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    rows = [{"step": step, "response": f"one{mark}two"} for step, mark in enumerate(RAW, start=1)]
    path.write_bytes(lines_of(*rows).encode() + '{"step": 2, "response": "\u6c34'.encode()[:-1])  # cut in a character
    forget_lines_after(path, 2)
    assert path.read_text(encoding="utf-8") == lines_of(*rows[:2])


def test_a_resume_keeps_lines_that_are_not_of_its_making(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\na note of mine\n{"note": 1}\n[1]\n{"step": 5}\n', encoding="utf-8")
    forget_lines_after(path, 1)
    assert path.read_text(encoding="utf-8") == '{"step": 1}\na note of mine\n{"note": 1}\n[1]\n'


def test_pairs_with_separators_are_read_whole(tmp_path: Path, data_recipe: Any, build_tokenizer: Any) -> None:
    rows = [{"prompt": f"a{mark}b", "chosen": f"yes{mark}indeed", "rejected": f"no{mark}never"} for mark in SEPARATORS]
    path = tmp_path / "pairs.jsonl"
    path.write_text(lines_of(*rows), encoding="utf-8")
    prepared = prepare_pairs(data_recipe(path, validation_fraction=0.0), build_tokenizer("chatml"), progress=False)
    assert len(prepared.train) == len(SEPARATORS)


def test_the_demo_pairs_its_answers_by_lines(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("demo_run", REPO / "examples" / "demo" / "run.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    (tmp_path / "rounds.json").write_text(json.dumps({"models": ["first", "trained"]}), encoding="utf-8")
    for number in (0, 1):
        rows = [
            {
                "id": str(place),
                "prompt": [{"role": "user", "content": f"one{mark}two"}],
                "responses": [{"text": f"{number}{mark}", "score": float(number)}],
            }
            for place, mark in enumerate(RAW)
        ]
        folder = tmp_path / f"round-{number}" / "evaluation"
        folder.mkdir(parents=True)
        (folder / "scored.jsonl").write_text(lines_of(*rows), encoding="utf-8")
    answers = demo.pair_answers(tmp_path)
    assert [(each["prompt"], each["before"], each["after"]) for each in answers] == [
        (f"one{mark}two", f"0{mark}", f"1{mark}") for mark in RAW
    ]


@pytest.mark.parametrize("folder", ["src", "examples", "benchmarks"])
def test_nobody_reads_json_lines_by_splitlines(folder: str) -> None:
    """No function has both; where text is cut for people to see, splitlines is right."""
    for path in (REPO / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.Lambda):
                called = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
                assert not {"splitlines", "loads"} <= called, f"{path.name}: {getattr(node, 'name', 'lambda')}"
