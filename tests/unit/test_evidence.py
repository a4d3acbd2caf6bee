"""The evidence page: arms are trained and measured once, and what is written is what was measured."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

import evidence
import pytest


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one test has trained the others do not train again."""
    return tmp_path_factory.mktemp("evidence")


@pytest.fixture
def lab(tiny_model: Path, measured: Path, monkeypatch: pytest.MonkeyPatch) -> evidence.Lab:
    monkeypatch.setattr(evidence, "RECIPE", {**evidence.RECIPE, "bf16": False, "num_threads": 1})
    words = {"model": str(tiny_model), "data": None, "size": "tiny", "output": measured, "at_once": 2, "first_seed": 0}
    return evidence.Lab(argparse.Namespace(**words))


SECTION = evidence.Section(
    "sft",
    "The SFT term",
    "It holds the log-prob up.",
    [evidence.NONE, evidence.SIMPO, evidence.Arm("half swapped", noise=0.5)],
    ("accuracy", "chosen", "rule"),
    {"it is above -1000": lambda by: by["SimPO"]["chosen"] + 1000},
    ("chosen",),
)


@pytest.mark.long
def test_a_section_says_what_was_measured(lab: evidence.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = evidence.write_section(lab, SECTION, tmp_path / "figures")
    files = sorted(lab.args.output.glob("*.json"))
    assert len(files) == 1 + 2 * 2, "the untrained model once, the others with each seed"
    rows = lab.measured["sft"]["SimPO"]
    chosen = [row["chosen"] for row in rows]
    assert len(set(chosen)) == 2, "a seed draws its own pairs"
    half = 12.706 * statistics.stdev(chosen) / math.sqrt(2)
    mean = statistics.fmean(chosen)
    (line,) = (line for line in lines if line.startswith("| SimPO |"))
    assert f"{mean:.3f} ± {half:.3f} |" in line
    low, high = mean + 1000 - half, mean + 1000 + half
    assert f"- it is above -1000: {mean + 1000:+.3f} ({low:+.3f} to {high:+.3f}); with 2 of 2 seeds" in lines
    assert (tmp_path / "figures" / "sft.svg").read_text().startswith("<?xml")

    def trained(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(evidence.Lab, "_train", trained)
    assert evidence.write_section(lab, SECTION, tmp_path / "figures") == lines
    same = evidence.Arm("0% swapped", keys={"beta": 2.0, "learning_rate": evidence.RECIPE["learning_rate"]})
    assert [row["chosen"] for row in lab.results(same)] == chosen, "another name of the same way to train"


@pytest.mark.long  # two processes start
def test_two_processes_measure_what_one_does(
    lab: evidence.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # as processes of their own see the recipe
    one = [lab.results(arm)[0]["chosen"] for arm in SECTION.arms]
    lab.args.output = tmp_path
    lab.measure([SECTION, SECTION])
    assert len(list(tmp_path.glob("*.json"))) == 1 + 2 * 2
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.setattr(evidence.Lab, "_train", None)
    assert [lab.results(arm)[0]["chosen"] for arm in SECTION.arms] == pytest.approx(one, abs=1e-3)


def test_a_section_whose_pairs_are_missing_says_so(lab: evidence.Lab, tmp_path: Path) -> None:
    (section,) = (each for each in evidence.SECTIONS if each.name == "displacement")
    assert any("code_humanevalpack was not given" in line for line in evidence.write_section(lab, section, tmp_path))


def test_a_share_of_labels_is_swapped(lab: evidence.Lab) -> None:
    lab._train(evidence.Arm("half swapped", noise=0.5), seed=0)
    written = evidence.read_file(lab.place / "pairs" / "train.jsonl")
    drawn = {row["id"]: row for row in lab.draw("rule", "train", lab.size.train, 0)}
    assert sum(row["chosen"] == drawn[row["id"]]["rejected"] for row in written) == lab.size.train // 2


def test_every_claim_and_figure_reads_what_its_arms_measure(lab: evidence.Lab, tmp_path: Path) -> None:
    measured = ("accuracy", "margin", "chosen", "rejected", "length correlation", "rule", "readable", "tokens")
    numbers = dict.fromkeys((*measured, "own accuracy", "repeated", "unrelated", "seconds", "pairs"), 0.5) | {"gain": 0}
    for section in evidence.SECTIONS:
        names = [arm.name for arm in section.arms]
        assert len(set(names)) == len(names)
        assert {*section.shown, *section.chart} <= numbers.keys()
        for holds in section.holds.values():
            assert holds(dict.fromkeys(names, numbers)) <= 0, "nothing is less than itself"
        if section.chart:
            path = tmp_path / f"{section.name}.svg"
            evidence.draw(section, {name: [{**numbers, "seed": seed} for seed in (0, 1)] for name in names}, path)
            assert path.read_text(encoding="utf-8").count("<!-- 0.500 -->") == (section.name == "map") * 27
        for arm in section.arms:
            evidence.simpo.load_recipe({"model_name_or_path": "m", **evidence.RECIPE, **arm.keys})


def test_the_numbers_lie_beside_the_page_and_are_compared_with_those_of_another_run(
    lab: evidence.Lab, tmp_path: Path
) -> None:
    page = tmp_path / "evidence.md"
    evidence.write_page(lab, [SECTION], page)
    (path,) = (tmp_path / "evidence").glob("tiny-*.json")
    text = page.read_text(encoding="utf-8")
    assert "No other run of as many pairs" in text
    assert "Written by `python benchmarks/evidence.py --model MODEL --size tiny`, size tiny, in part: " in text
    assert "`python benchmarks/evidence.py --model MODEL --size tiny --only sft`" in text
    assert "1 of 1 statements are shown: " in text
    assert "| [The SFT term](#the-sft-term) | it is above -1000 (2 of 2) |  |  |\n" in text
    assert "| llama-3-8b-instruct-simpo | 2.5 | 1.38 | 2.0177 | 1.6004 |" in text, "the first loss, from the margin"
    run = json.loads(path.read_text(encoding="utf-8"))
    assert run["measured"]["sft"]["SimPO"] == lab.measured["sft"]["SimPO"]
    run["date"] = "2000-01-01"
    for row in run["measured"]["sft"]["SimPO"]:
        row["chosen"] -= 1000
    del run["measured"]["sft"]["untrained"]
    path.with_name("tiny-2000-01-01.json").write_text(json.dumps(run), encoding="utf-8")
    evidence.write_page(lab, [SECTION], page)
    expected = (
        "the same pairs: 5 of 6 intervals meet this page's; not: sft, SimPO, chosen. 3 were not measured then. Of 1 "
        "statements that both measured, 0 have a mean difference of the same sign; of 1 shown here, 0 were shown then, "
        "1 refuted."
    )
    assert expected in page.read_text(encoding="utf-8")
    later = next(each for each in evidence.SECTIONS if each.name == "later")
    run["measured"]["later"] = {"untrained": [{"chosen": -7.125, "seed": 0, "pairs": 3, "threads": 1}]}
    for row in run["measured"]["sft"]["half swapped"]:
        row["arm"]["noise"] = 0.25  # of that name, and another way to train
    path.with_name("tiny-2000-01-01.json").write_text(json.dumps(run), encoding="utf-8")
    evidence.write_page(lab, [SECTION], page)
    text = page.read_text(encoding="utf-8")
    assert "2 of 3 intervals meet this page's; not: sft, SimPO, chosen. 6 were not" in text
    assert f"## {later.title}\n\n*Claim:* {later.claim}\n\nMeasured in the run of 2000-01-01, " in text
    assert "| untrained |  |  | -7.125 |  |" in text, "what this run has not measured is shown as another has it"
    assert "(later)" not in text


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, 0.5),  # means: 0.5 ahead, 0.25 behind
        ({"loss_type": "alphapo"}, 0.5),
        ({"loss_type": "cpo"}, 1.0),  # sums: 1 ahead, 2 ahead
        ({"loss_type": "dpo"}, 0.25),  # less the reference's: level, 1 behind
        ({"loss_type": "dpo_norm"}, 0.5),  # the same by the token: level, level
    ],
)
def test_pairs_are_ranked_by_the_reward_that_is_trained(keys, expected) -> None:
    lengths = [[2, 2], [8, 12]]
    row = {"pairs' sums": [[-3.0, -4.0], [-10.0, -12.0]], "pairs' lengths": lengths}
    before = {"pairs' sums": [[-4.0, -5.0], [-12.0, -15.0]], "pairs' lengths": lengths}
    assert evidence.own_accuracy(evidence.Arm("", keys=keys), row, before) == expected


def test_no_prompt_is_trained_on_and_held_out_and_other_seeds_draw_other_pairs(
    lab: evidence.Lab, tmp_path: Path
) -> None:
    asked = [[{"role": "user", "content": f"{n} stones"}] for n in range(30)]
    rows = [{"id": n, "prompt": prompt, "chosen": [], "rejected": []} for n, prompt in enumerate(asked)]
    for split, some in (("train", rows), ("test", rows[20:] + rows[:3])):
        evidence.write_rows(tmp_path / f"{split}.jsonl", some)
    lab.folders["rule"] = tmp_path
    drawn = [[row["id"] for row in lab.draw("rule", "train", 12, seed)] for seed in (0, 1)]
    assert set(drawn[0]) | set(drawn[1]) <= set(range(3, 20))
    assert drawn[0] != drawn[1]
    lab.args.first_seed = 3
    assert lab.seeds == range(3, 5)
    assert evidence.command(lab, "", lab.args.first_seed).endswith("MODEL --size tiny --first-seed 3")


def test_the_papers_numbers_stand_beside_a_checkpoints(
    tiny_model: Path, pair_files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--paper", f"simpo={tiny_model}", "--pairs", str(pair_files)])
    assert evidence.main() == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| simpo |"))
    assert re.fullmatch(r"\| simpo \| [\d.]+% \| -?[\d.]+ \| -?[\d.]+ \| 0.34 \|", line)


def test_rows_of_the_authors_formats_become_pairs_or_are_counted(tiny_model: Path) -> None:
    rows = [line.strip("| ").split(" | ") for line in evidence.formats(str(tiny_model))[6:-1]]
    cells = {name: rest for name, *rest in rows}
    assert cells.keys() == evidence.FORMATS.keys()
    without_scores = cells.pop("Anthropic/hh-rlhf")
    assert without_scores == ["trained", "identical", "empty", "trained", "trained"]
    assert all(each == ["trained", "identical", "empty", "tie", "trained"] for each in cells.values())


@pytest.mark.parametrize("words", [["--paper", "simpo=m"], ["--pairs", "p"], ["--size", "quik"]])
def test_what_cannot_be_measured_is_said_at_once(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evidence.py", *words])
    with pytest.raises(SystemExit):
        evidence.main()


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ((1.0, 1.2), (1.1, 1.3), True),
        ((1.0, 1.001), (1.1, 1.101), False),
        ((1.0,), (1.005,), True),
        ((1.0,), (1.05,), False),
        ((1.0, 1.0), (1.005, 1.005), False),
    ],
)
def test_intervals_meet_where_they_have_a_point_in_common(here, there, expected) -> None:
    assert evidence.meet(here, there) is expected


@pytest.mark.long  # three samplings and two trainings in processes of their own
def test_pairs_and_lists_of_the_models_own_answers_are_made_of_prompts_that_are_not_asked(
    lab: evidence.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny random model finishes no answer, and the rule gives all of them 0."""
    asked = {row["id"] for row in evidence.read_file(lab.folders["rule"] / "test.jsonl")}
    (tmp_path / "letters.py").write_text("def rate(prompt, response, row): return sum(map(ord, response))")
    monkeypatch.chdir(tmp_path)
    scorers = {"rule": {"kind": "function", "function": "letters:rate"}}
    easy = {"score.scorers": scorers, "pair.finished_only": False, "pair.min_gap": 0.0, "pair.min_score": None}
    own = lab.on_policy
    monkeypatch.setattr(lab, "on_policy", lambda folder, keys: own(folder, {**keys, **easy}))
    lists = lab.draw("lists", "train", 9, 0)
    assert lists
    assert all(3 <= len(row["scores"]) == len(row["responses"]) <= 4 for row in lists), "all but empty ones"
    assert not asked & {row["id"] for row in lists}
    model, about = lab._train(evidence.Arm("2 rounds", rounds=2), seed=1)
    assert (model / "config.json").is_file()
    assert about["pairs"] > 0
    assert "round-2" in str(model)
    assert not asked & {row["id"] for row in evidence.read_file(lab.place / "prompts.jsonl")}
