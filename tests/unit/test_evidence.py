"""The evidence page: arms are trained and measured once, and what is written is what was measured."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import evidence
import pytest


@pytest.fixture
def lab(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> evidence.Lab:
    monkeypatch.setattr(evidence, "RECIPE", {**evidence.RECIPE, "bf16": False, "num_threads": 1})
    words = {"model": str(tiny_model), "data": None, "size": "tiny", "output": tmp_path / "runs"}
    return evidence.Lab(argparse.Namespace(**words))


SECTION = evidence.Section(
    "sft",
    "The SFT term",
    "It holds the log-prob up.",
    [evidence.NONE, evidence.SIMPO, evidence.Arm("half swapped", noise=0.5)],
    ("accuracy", "chosen", "rule"),
    lambda by: by["SimPO"]["chosen"] > -math.inf,
    ("chosen",),
)


def test_a_section_says_what_was_measured(lab: evidence.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = evidence.write_section(lab, SECTION, tmp_path / "figures")
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert len(files) == 1 + 2 * 2, "the untrained model once, the others with each seed"
    rows = [row for row in map(json.loads, map(Path.read_text, files)) if row["arm"]["name"] == "SimPO"]
    chosen = [row["chosen"] for row in rows]
    assert len(set(chosen)) == 2, "a seed draws its own pairs"
    half = 12.706 * statistics.stdev(chosen) / math.sqrt(2)
    mean = statistics.fmean(chosen)
    (line,) = (line for line in lines if line.startswith("| SimPO |"))
    assert f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})" in line
    assert "**It holds with 2 of 2 seeds.**" in lines
    assert (tmp_path / "figures" / "sft.svg").read_text().startswith("<?xml")

    def trained(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(evidence.Lab, "_train", trained)
    assert evidence.write_section(lab, SECTION, tmp_path / "figures") == lines


def test_a_section_whose_pairs_are_missing_says_so(lab: evidence.Lab, tmp_path: Path) -> None:
    (section,) = (each for each in evidence.SECTIONS if each.name == "displacement")
    assert any("code_humanevalpack was not given" in line for line in evidence.write_section(lab, section, tmp_path))


def test_a_share_of_labels_is_swapped(lab: evidence.Lab) -> None:
    lab._train(evidence.Arm("half swapped", noise=0.5), seed=0)
    written = evidence.read_file(lab.args.output / "run" / "pairs" / "train.jsonl")
    drawn = {row["id"]: row for row in lab.draw("rule", "train", lab.size.train, 0)}
    assert sum(row["chosen"] == drawn[row["id"]]["rejected"] for row in written) == lab.size.train // 2


def test_every_claim_reads_what_its_arms_measure(lab: evidence.Lab) -> None:
    measured = ("accuracy", "margin", "chosen", "rejected", "length correlation", "rule", "readable", "tokens")
    numbers = dict.fromkeys((*measured, "repeated", "unrelated", "seconds"), 0.5)
    for section in evidence.SECTIONS:
        names = [arm.name for arm in section.arms]
        assert len(set(names)) == len(names)
        assert {*section.shown, *section.chart} <= numbers.keys()
        assert section.holds is None or section.holds(dict.fromkeys(names, numbers)) in (True, False)
        for arm in section.arms:
            evidence.simpo.load_recipe({"model_name_or_path": "m", **evidence.RECIPE, **arm.keys})
