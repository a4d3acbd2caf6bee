"""The report of a run: what it says of every kind of folder, and that it can be read safely."""

from __future__ import annotations

import json
import math
import os
import random
import re
import socket
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import pytest
from finished_runs import HOSTILE, pairs_line, training_line, write_lines, write_run
from typer.testing import CliRunner

from simpo.cli import app
from simpo.report import leave_report, watch_runs, write_report
from simpo.report import write as write_module
from simpo.report.charts import POINTS, smooth, thin
from simpo.report.differences import mark_differences
from simpo.report.held_out import of_run
from simpo.report.read import Curve, read_run
from simpo.run.lock import LOCK_FILE


class Elements(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(path: Path) -> Elements:
    page = Elements()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing PNGs takes longer than all the rest."""
    monkeypatch.setattr(write_module, "to_png", lambda *_: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("report") / "first", eval_on_start=True)
    row = {"kind": "displacement", "level": "warn", "step": 20, "since_step": 12}
    write_lines(folder / "guard.jsonl", [{**row, "saw": f"chosen falls {HOSTILE}", "advice": "lower learning_rate"}])
    write_report([folder])
    return folder


def test_a_page_has_every_part_and_asks_the_network_for_nothing(finished: Path) -> None:
    page = page_of(finished / "report.html")
    for part in (
        "Curves",
        "Evaluation",
        "Answers side by side",
        "Data",
        "Recipe",
        "How to go on",
        "What the guard saw",
    ):
        assert part in page.text
    for words in ("lower learning_rate", "since step 12", "finished: 40 steps", "gamma, the margin asked for"):
        assert words in page.text
    loads = [(tag, attrs) for tag, attrs in page.found if tag in ("script", "img", "link", "iframe", "object", "video")]
    assert loads == []
    assert not re.search(r"@import|url\((?!#)", (finished / "report.html").read_text())
    links = [attrs["href"] for tag, attrs in page.found if tag == "a"]
    assert all(link.startswith(("#", "report/")) for link in links)
    assert all((finished / link).is_file() for link in links if not link.startswith("#"))


def test_what_models_and_data_say_is_shown_as_text_and_not_run(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in text
    assert "<img" not in text
    assert "<script" not in text
    assert page_of(finished / "report.html").text.count("<script>alert") >= 4  # answer, prompt, ledger, guard


def test_ids_are_unique_and_every_reference_has_its_target(finished: Path) -> None:
    page = page_of(finished / "report.html")
    ids = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = {attrs["href"][1:] for _, attrs in page.found if (attrs.get("href") or "").startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", (finished / "report.html").read_text()))
    assert targets <= set(ids)


def test_every_chart_says_in_words_what_it_shows_and_takes_the_colours_of_the_page(finished: Path) -> None:
    charts = [attrs for tag, attrs in page_of(finished / "report.html").found if tag == "svg" and "role" in attrs]
    assert len(charts) >= 11
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    text = (finished / "report.html").read_text()
    svgs = re.findall(r'<svg viewBox[^>]*role="img".*?</svg>', text, flags=re.DOTALL)
    colours = {colour for svg in svgs for colour in re.findall(r"(?:stroke|fill): ([^;\"]+)", svg)}
    assert {colour for colour in colours if not colour.startswith("var(--")} <= {"none", "#ffffff"}


def test_intervals_and_changes_are_those_of_simpo_eval(tmp_path: Path) -> None:
    from simpo.evaluation.results import PairRecord, build_evaluation, compare

    run = read_run(write_run(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "eval_pairs.jsonl").read_text().splitlines()]

    def evaluation(line: dict) -> object:
        columns = ("row_ids", "logps/chosen", "logps/rejected", "tokens/chosen", "tokens/rejected")
        rows = zip(*(line[name] for name in columns), strict=True)
        pairs = [PairRecord(i, c * nc, r * nr, int(nc), int(nr)) for i, c, r, nc, nr in rows]
        identity = {"model": "", "data": "", "split": "", "data_fingerprint": "", "generations": (), "settings": {}}
        return build_evaluation(pairs, **identity, versions={})

    before, after = (evaluation(line) for line in lines)
    difference, found = compare(after, before), of_run(run)
    assert (found.before, found.after) == ("before training", "after step 40")
    everything, *rest = found.accuracy
    assert everything.before == pytest.approx(before.accuracy)
    assert everything.after == pytest.approx(after.accuracy)
    assert everything.change == pytest.approx(difference.accuracy_difference)
    by_length = [bucket for bucket in after.accuracy_by_length if bucket.accuracy]
    assert [(row.num_pairs, row.after) for row in rest[:3]] == [
        (b.num_pairs, pytest.approx(b.accuracy)) for b in by_length
    ]
    assert [(row.label, row.after) for row in rest[3:]] == [
        (s.name, pytest.approx(s.accuracy)) for s in after.by_source
    ]
    assert found.sides[0].change == pytest.approx(difference.chosen_mean[:3])


def test_pairs_of_a_step_are_known_where_epochs_end_in_less_than_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=10)
    log = [{"step": 10, "loss": 1.0, "pairs_seen": 110}, {"step": 20, "loss": 1.0, "pairs_seen": 220}]  # 8, 8, 6; ...
    write_lines(run / "metrics.jsonl", log)
    assert read_run(run).pairs_per_step == 16  # of two processes


def test_the_best_weights_are_judged_where_a_run_keeps_those(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", eval_strategy="steps", eval_steps=20, save_steps=20, load_best_model_at_end=True
    )
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if "eval_loss" in line:
            line["eval_loss"] = {0: 0.05, 20: 0.1}.get(line["step"], line["eval_loss"])
    write_lines(metrics, lines)
    rng = random.Random(0)
    write_lines(folder / "eval_pairs.jsonl", [pairs_line(step, ("water",), rng) for step in (0, 20, 40)])
    assert of_run(read_run(folder)).after == "after step 20", "before training there is nothing to choose"


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("half done", "not finished: 12 of 40 steps done"),
        ("no evaluation", "No held-out pairs were evaluated"),
        ("evaluated at the end", "eval_on_start: true makes one"),
        ("not finite", "not finite at step 7, 9"),
        ("older", "of another version and is shown unchecked"),
        ("torn", "1 lines could not be read"),
        ("begun", "0 of 40 steps done"),
        ("metrics alone", "finished: 40 steps"),
        ("no eval_pairs", "before training"),
    ],
)
def test_every_run_gives_a_page(tmp_path: Path, case: str, words: str) -> None:
    folder = tmp_path / "run"
    options = {
        "half done": {"steps": 12, "total": 40, "finished": False, "evaluations": (0,)},
        "no evaluation": {"evaluations": ()},
        "evaluated at the end": {"evaluations": (40,)},
        "begun": {"steps": 0, "total": 40, "finished": False, "evaluations": ()},
    }
    write_run(folder, **options.get(case, {}))
    metrics = folder / "metrics.jsonl"
    if case == "not finite":
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        bad = [line | ({"loss": math.nan, "grad_norm": math.inf} if line["step"] in (7, 9) else {}) for line in lines]
        write_lines(metrics, bad)
    if case == "older":
        (folder / "recipe.yaml").write_text("model_name_or_path: m\nforgotten_key: 3\n")
        (folder / "audit.json").write_text('{"splits": {"train": {"input": 3, "kept": 3}}}')
    if case == "torn":
        lines = metrics.read_text().splitlines()
        metrics.write_text("\n".join([*lines[:5], '{"step": 6, "lo', *lines[6:], '{"step": 41, "los']))
    if case == "begun":
        metrics.unlink()
    if case == "metrics alone":
        for name in ("recipe.yaml", "audit.json", "eval_pairs.jsonl", "generations.jsonl"):
            (folder / name).unlink()
    if case == "no eval_pairs":
        (folder / "eval_pairs.jsonl").unlink()
    assert words in page_of(write_report([folder])).text


@pytest.mark.usefixtures("without_pictures")
def test_an_evaluation_that_is_not_finite_is_no_change(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    last = json.loads((folder / "eval_pairs.jsonl").read_text().splitlines()[-1])
    broken = {name: [math.nan] * 24 for name in ("margin", "logps/chosen", "logps/rejected")}
    first = (folder / "eval_pairs.jsonl").read_text().splitlines()[0]
    (folder / "eval_pairs.jsonl").write_text(f"{first}\n{json.dumps(last | broken)}\n")
    text = page_of(write_report([folder])).text
    assert not re.search(r"[+\u2212 ]nan\b", text)
    assert "points (95%" not in text


def test_a_long_run_is_thinned_and_keeps_its_extremes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000)
    values[[77, 50_001]] = 40.0, -40.0
    values[1234] = np.nan
    thinned = thin(Curve(np.arange(1, 100_001), values))
    assert len(thinned) <= POINTS + 2
    assert (np.nanmax(thinned.values), np.nanmin(thinned.values)) == (40.0, -40.0)
    assert np.isnan(thinned.values).any()
    assert (thinned.steps[0], thinned.steps[-1]) == (1, 100_000)
    mean = smooth(Curve(np.arange(48), np.arange(48.0)))
    assert mean.values[24] == pytest.approx(24.0)


def test_differences_are_marked_in_both_texts_and_only_where_they_are_alike() -> None:
    left, right, word = mark_differences("a <b> is blue today", "a <b> is green today")
    assert left == "a &lt;b&gt; is <del>blue</del> today"
    assert right == "a &lt;b&gt; is <ins>green</ins> today"
    assert word == "86% of the words in common"
    left, right, word = mark_differences("one two three", "four five six seven")
    assert "<del>" not in left + right
    assert word.startswith("rewritten")
    assert mark_differences("水是蓝色的", "水是绿色的")[0] == "水是<del>蓝</del>色的"


@pytest.mark.usefixtures("without_pictures")
def test_runs_are_compared_in_one_page(tmp_path: Path) -> None:
    first = write_run(tmp_path / "runs" / "first")
    second = write_run(tmp_path / "runs" / "second", seed=1, learning_rate=5e-5, steps=20, finished=False)
    write_report([first])
    path = write_report([first, second])
    assert path == tmp_path / "runs" / "report.html"
    page = page_of(path)
    for words in ("2 runs compared", "Keys in which the runs differ", "learning_rate", "minus first", "5e-05"):
        assert words in page.text
    links = [attrs["href"] for tag, attrs in page.found if tag == "a" and not attrs["href"].startswith("#")]
    assert links[:2] == ["first/report.html", "report/curves.png"]  # second has none
    assert "2 runs compared" in page_of(write_report([tmp_path / "runs"])).text


@pytest.mark.usefixtures("without_pictures")
def test_links_lead_to_folders_of_any_name(tmp_path: Path) -> None:
    names = ("50%25 off#1", "why? a&b")
    for name in names:
        write_report([write_run(tmp_path / "runs" / name)])
    path = write_report([tmp_path / "runs"], tmp_path / "all #2.html")
    links = [attrs["href"] for tag, attrs in page_of(path).found if tag == "a" and not attrs["href"].startswith("#")]
    assert [urljoin(path.as_uri(), link) for link in links[:2]] == [
        (tmp_path / "runs" / name / "report.html").as_uri() for name in names
    ]
    assert urljoin(path.as_uri(), links[2]) == (tmp_path / "all #2" / "curves.png").as_uri()


@pytest.mark.usefixtures("without_pictures")
def test_the_trials_of_a_sweep_are_compared_by_their_held_out_measures(tmp_path: Path) -> None:
    for number, accuracy in ((1, 0.625), (2, 0.75)):
        trial = tmp_path / "sweep" / f"trial-0{number}" / "steps-3"
        write_run(trial / "run", steps=3, evaluations=(), beta=float(number))
        share, margin = ({"value": x, "low": x - 0.1, "high": x + 0.1} for x in (accuracy, 1.0))
        means = {"model": "m", "num_pairs": 24, "chosen_mean": -1.5, "rejected_mean": -2.5, "accuracy_by_length": []}
        (trial / "result.json").write_text(json.dumps({**means, "accuracy": share, "margin": margin}))
    text = page_of(write_report([tmp_path / "sweep"])).text
    for words in ("2 runs compared", "trial-01/steps-3/run", "62.5%", "75.0%", "65.0% to 85.0%"):
        assert words in text, words
    assert "There is none." not in text


@pytest.mark.usefixtures("without_pictures")
def test_rounds_are_shown_with_their_table(tmp_path: Path) -> None:
    folder = tmp_path / "rounds"
    write_run(folder / "round-1" / "run", evaluations=())
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    models = [{"round": n, "model": "m", "gain": n and interval, "prompts": 8, "score": interval} for n in (0, 1)]
    models[0]["gain"] = None
    (folder / "rounds.json").write_text(json.dumps({"models": models}))
    for n in (0, 1):
        place = folder / f"round-{n}" / "evaluation"
        place.mkdir(parents=True)
        row = {"id": "x", "prompt": [{"role": "user", "content": "Why?"}], "responses": [{"text": f"because {n}"}]}
        (place / "responses.jsonl").write_text(json.dumps(row) + "\n")
    page = page_of(write_report([folder]))
    for words in ("Round 0 is the model before any training", "gain", "Why?", "because 0", "round-1/run"):
        assert words in page.text


@pytest.mark.usefixtures("without_pictures")
def test_a_report_that_fails_is_one_line_and_fails_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(write_module.OFF, "1")
    folder, said = write_run(tmp_path / "run"), []
    with leave_report(folder, said.append):
        pass
    assert said == [f"report: {folder / 'report.html'}"]

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nspace")

    monkeypatch.setattr(write_module, "write_report", fail)
    with leave_report(folder, said.append):
        pass
    assert said[1:] == ["report: not written (RuntimeError: no space); the run is not touched by that"]
    with leave_report(tmp_path / "never begun", said.append), leave_report(folder, said.append, is_main=False):
        pass
    assert len(said) == 2


@pytest.mark.usefixtures("without_pictures")
def test_a_watched_page_follows_the_run_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", steps=10, total=40, finished=False, evaluations=())
    seen, said = [], []

    def wait(_: float) -> None:
        seen.append((folder / "report.html").read_text())
        if len(seen) == 1:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(training_line(11, random.Random(0))) + "\n")
        else:
            (folder / "model").mkdir()

    monkeypatch.setattr(write_module.time, "sleep", wait)
    watch_runs([folder], say=said.append)
    assert ["10 of 40" in seen[0], "11 of 40" in seen[1]] == [True, True]
    assert ['http-equiv="refresh"' in text for text in (*seen, (folder / "report.html").read_text())] == [
        True,
        True,
        False,
    ]
    assert len(said) == 2


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_another_process_works_on_is_running(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=10, total=40, finished=False, evaluations=())
    ended = "not finished: 10 of 40 steps done"
    for process, words in ((os.getppid(), "running: step 10 of 40"), (os.getpid(), ended), (2**22 + 1, ended)):
        (folder / LOCK_FILE).write_text(f"process {process} on {socket.gethostname()} since today")
        assert words in page_of(write_report([folder])).text


@pytest.mark.usefixtures("without_pictures")
def test_a_page_is_not_watched_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was for a run that ended without a model, and rounds ended with the first of them."""
    folder = write_run(tmp_path / "run", steps=10, total=40, finished=False, evaluations=())
    waits = []
    monkeypatch.setattr(write_module.time, "sleep", waits.append)
    watch_runs([folder], say=waits.append)
    assert 20 <= waits.count(2.0) <= 40, "a minute, in which a launcher may start it again"
    (folder / "model").mkdir()
    (folder / LOCK_FILE).write_text(f"process {os.getpid()} on {socket.gethostname()} since today")
    waits.clear()
    monkeypatch.setattr(write_module.time, "sleep", lambda _: waits.append((folder / LOCK_FILE).unlink()))
    watch_runs([folder], say=lambda _: None)
    assert waits == [None], "while it is at work"
    (folder / LOCK_FILE).write_text(f"process {2**22 + 1} on {socket.gethostname()} since today")
    watch_runs([folder], say=lambda _: None)
    assert waits == [None], "one that was killed is not"


def test_the_command_names_the_page_and_what_is_no_run(finished: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(finished), "--output", str(tmp_path / "pages" / "one.html")])
    assert (result.exit_code, result.output.strip()) == (0, f"report: {tmp_path}/pages/one.html")
    assert (tmp_path / "pages" / "one" / "curves.png").is_file()
    for _ in range(2):
        result = CliRunner().invoke(app, ["report", str(finished), "--output", str(tmp_path / "plain")])
        assert (result.exit_code, result.output.strip()) == (0, f"report: {tmp_path}/plain"), "a name without a suffix"
    assert (tmp_path / "plain_files" / "curves.png").is_file()
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "no such folder; name the output_dir of a run" in result.output
