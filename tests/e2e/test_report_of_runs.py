"""Reports of runs as they are trained, by both hosts: whole, and killed midway."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import rarely
from hf_hosts import read_rows

from simpo.cli import app
from simpo.display import Display
from simpo.hosts.hf import SimPOTrainer
from simpo.hosts.hf.run import run_recipe
from simpo.recipe import load_recipe
from simpo.report import write_report
from simpo.report.read import read_run
from simpo.report.write import OFF
from simpo.trainer import Trainer

Settings = dict[str, Any]
ANSWERS = {"num_eval_generations": 2, "eval_generation_max_new_tokens": 3, "eval_on_start": True, "device": "cpu"}


class Killed(BaseException):
    """Nothing that a run could be prepared for."""


@pytest.fixture(autouse=True)
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave them, as they do for people; in other tests they do not."""
    monkeypatch.delenv(OFF, raising=False)


def native(settings: Settings) -> None:
    Trainer(load_recipe(settings), display=Display(quiet=True)).run()


def accelerate(settings: Settings) -> None:
    run_recipe(load_recipe(settings))


def page_of(settings: Settings) -> str:
    return Path(settings["output_dir"], "report.html").read_text(encoding="utf-8")


@pytest.mark.long
def test_a_run_under_accelerate_has_the_report_and_the_answers_of_a_native_one(
    tiny_recipe: Settings, tmp_path: Path
) -> None:
    native(ours := {**tiny_recipe, **ANSWERS, "output_dir": str(tmp_path / "native")})
    accelerate(theirs := {**tiny_recipe, **ANSWERS})
    answers = [read_rows(Path(each["output_dir"], "generations.jsonl")) for each in (ours, theirs)]
    assert [answer["step"] for answer in answers[1]] == [0, 0, 5, 5, 10, 10]
    assert answers[1][:2] == answers[0][:2]  # of the untrained model
    assert [answer.keys() for answer in answers[1]] == [answer.keys() for answer in answers[0]]
    page = page_of(theirs)
    for words in ("finished: 10 steps", "Preference accuracy", "before training", "after step 10", "Gradient norm"):
        assert words in page, words
    for section in ("curves", "evaluation", "answers", "data", "recipe", "next"):
        assert f'<h2 id="{section}">' in page, section
    assert f"simpo chat {shlex.quote(theirs['output_dir'])} --compare" in page


@pytest.mark.parametrize("train", [native, rarely(accelerate)])
def test_a_run_that_was_killed_and_resumed_has_one_curve(
    tiny_recipe: Settings, monkeypatch: pytest.MonkeyPatch, train: Callable[[Settings], None]
) -> None:
    settings = {**tiny_recipe, **ANSWERS, "eval_strategy": "steps", "eval_steps": 3}
    of, name = (Trainer, "train_step") if train is native else (SimPOTrainer, "training_step")
    step = getattr(of, name)

    def killed(self: Any, *args: Any) -> Any:
        if (self.progress.step if train is native else self.state.global_step) == 7:
            raise Killed
        return step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(of, name, killed)
        with pytest.raises(Killed):
            train(settings)
    assert "not finished: 7 of 10 steps done" in page_of(settings)
    assert "--resume_from_checkpoint true" in page_of(settings)
    train({**settings, "resume_from_checkpoint": True})
    run = read_run(settings["output_dir"])
    assert "finished: 10 steps" in page_of(settings)
    assert run.curve("loss").steps.tolist() == run.curve("pairs_per_s").steps.tolist() == list(range(1, 11))
    assert run.curve("eval_loss").steps.tolist() == [0, 3, 6, 9, 10]
    assert (run.evaluations[0]["step"], run.evaluations[-1]["step"]) == (0, 10)
    assert {tuple(answers) for answers in run.generations.values()} == {(0, 3, 6, 9, 10)}
    lines = read_rows(Path(settings["output_dir"], "metrics.jsonl"))
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))  # none twice


def test_what_a_page_says_to_type_is_what_the_run_said(
    tiny_recipe: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**tiny_recipe, "output_dir": f"{tiny_recipe['output_dir']} of mine", "use_peft": True, "max_steps": 1}
    Trainer(load_recipe(settings)).run()
    said = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    commands = [line.strip() for line in said if line.startswith("  simpo ")]
    assert [command.split()[1] for command in commands] == ["chat", "eval", "report", "merge", "export", "push"]
    page = write_report([settings["output_dir"]]).read_text(encoding="utf-8")
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    for command in commands:
        assert shlex.split(command)[1] in known
        assert command.replace("'", "&#39;") in page
