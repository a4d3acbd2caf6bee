"""`simpo chat`: what is said when, from a pipe and on a terminal, and that its tokens are the sampler's."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from simpo.cli import app
from simpo.onpolicy.prompts import Prompt
from simpo.onpolicy.sampler import LocalSampler, PromptTokenizer
from simpo.recipe import load_recipe
from simpo.shipping import chat as chatting
from simpo.shipping.chat import Chat, Speaker, parse_compare
from simpo.shipping.source import find_source

GREEDY = ["--bf16", "false", "--max_new_tokens", "12", "--device", "cpu", "--temperature", "0"]
KEYS = [*GREEDY[:-1], "0.7"]


def spoken(*words: str, turns: str) -> str:
    result = CliRunner().invoke(app, ["chat", *words], input=turns)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_pipe_gets_the_answers_of_the_sampler(tiny_model: Path):
    said = spoken(str(tiny_model), *KEYS, turns="water light\n\n")
    recipe = load_recipe(
        {"model_name_or_path": str(tiny_model), "bf16": False, "device": "cpu"},
        {"generate.max_new_tokens": 12, "generate.temperature": 0.7, "generate.num_samples": 1},
    )
    sampler = LocalSampler(recipe, threads=1)
    (ids,) = PromptTokenizer(recipe, sampler.read.tokenizer)(
        [Prompt("", "", [{"role": "user", "content": "water light"}])]
    )
    from simpo.model.sampling import Sampling, noise_key, sample_responses

    keys = [[noise_key(recipe.seed, 1, *ids)]]
    sampling = Sampling(0.7, recipe.generate.top_p, recipe.generate.top_k, recipe.generate.min_p)
    (found,) = sample_responses(sampler.model, [ids], keys, sampling, ends=sampler.read.ends, max_new_tokens=12)
    assert said == sampler.read(found)[0].text.lstrip() + "\n\n"


def test_a_second_turn_sees_the_first_and_reset_forgets_it(tiny_model: Path):
    turns = "light\nlight\n/reset\nlight\n/quit\nnever asked\n"
    answers = spoken(str(tiny_model), *KEYS, "--system_prompt", "stone", turns=turns).split("\n\n")
    assert len(answers) == 4
    assert answers[3] == ""
    assert answers[0] == answers[2] != answers[1]
    assert answers[0] != spoken(str(tiny_model), *KEYS, turns="light\n").split("\n\n")[0]  # there is a system turn


def test_the_base_stands_beside_the_trained_model(tiny_recipe: dict[str, Any]):
    from simpo.display import Display
    from simpo.trainer import Trainer

    short = {"max_steps": 2, "save_steps": 2, "use_peft": True, "learning_rate": 0.1}
    run = Trainer(load_recipe({**tiny_recipe, **short}), display=Display(quiet=True)).run().output_dir
    base, keys = tiny_recipe["model_name_or_path"], GREEDY
    both = spoken(str(run), "--compare", *keys, turns="water\n")
    alone = [spoken(name, *keys, turns="water\n") for name in (base, str(run))]
    assert both == f"[{base}]\n{alone[0]}[{run}]\n{alone[1]}"
    assert alone[0] != alone[1]
    checkpoint = str(run / "checkpoints" / "step-2")
    assert spoken(checkpoint, *keys, turns="water\n") == alone[1]
    named = spoken(base, "--compare", str(run), *keys, turns="water\n")
    assert named == f"[{run}]\n{alone[1]}[{base}]\n{alone[0]}"
    refused = CliRunner().invoke(app, ["chat", base, "--compare"])
    assert (refused.exit_code, "name it: --compare MODEL" in refused.stderr) == (2, True)


def test_a_base_without_a_tokenizer_answers_with_the_one_that_training_took(
    tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
):
    from simpo.display import Display
    from simpo.trainer import Trainer

    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, base)
    short = {"max_steps": 2, "save_strategy": "no", "learning_rate": 0.1}
    named = {"model_name_or_path": str(base), "tokenizer_name_or_path": str(tiny_model)}
    run = Trainer(load_recipe({**tiny_recipe, **short, **named}), display=Display(quiet=True)).run().output_dir
    alone = [spoken(str(name), *GREEDY, turns="water\n") for name in (tiny_model, run)]
    both = spoken(str(run), "--compare", *GREEDY, turns="water\n")
    assert both == f"[{base}]\n{alone[0]}[{run}]\n{alone[1]}"


def test_both_sides_are_asked_as_the_run_says(tiny_recipe: dict[str, Any]):
    """The base would else be asked without the system prompt, sampled, and in bfloat16."""
    from simpo.display import Display
    from simpo.trainer import Trainer

    asked = {"system_prompt": "stone", "generate.temperature": 0.0, "generate.max_new_tokens": 12, "bf16": False}
    short = {"max_steps": 2, "learning_rate": 0.1, "save_strategy": "no", "generate.num_samples": 1}
    run = Trainer(load_recipe({**tiny_recipe, **short, **asked}), display=Display(quiet=True)).run().output_dir
    base, words = tiny_recipe["model_name_or_path"], [f"--{key}={value}" for key, value in asked.items()]
    alone = [spoken(name, *words, turns="water light\n") for name in (base, str(run))]
    assert alone[0] != alone[1]
    assert spoken(str(run), "--compare", turns="water light\n") == f"[{base}]\n{alone[0]}[{run}]\n{alone[1]}"
    assert spoken(base, "--compare", str(run), turns="water light\n") == f"[{run}]\n{alone[1]}[{base}]\n{alone[0]}"


class Terminal(Chat):
    """A dialogue on a terminal of so many columns, with turns that are typed in."""

    def __init__(
        self, speakers: list[Speaker], typed: list[Any], columns: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.shown = io.StringIO()
        super().__init__(speakers, Console(file=self.shown, force_terminal=True, width=columns, highlight=False))
        monkeypatch.setattr(chatting.sys, "stdin", SimpleNamespace(isatty=lambda: True))
        self.typed = iter(typed)
        monkeypatch.setattr("builtins.input", self.type)

    def type(self, prompt: str) -> str:
        said = next(self.typed, EOFError)
        if isinstance(said, str):
            return said
        raise said


@pytest.fixture(scope="module")
def speaker(tiny_model: Path) -> Speaker:
    return Speaker(
        find_source(str(tiny_model), ["--bf16", "false", "--generate.max_new_tokens", "60"], keys=chatting.KEYS), ""
    )


def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls = 0

    def once(text: str) -> str:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(chatting, "_printable", once)
    Terminal([speaker], ["water light", KeyboardInterrupt, "never asked"], 60, monkeypatch).run()
    assert "(stopped)" in capsys.readouterr().err
    assert [message["role"] for message in speaker.turns] == ["user", "assistant"]
    speaker.turns.clear()


def test_lines_break_between_words_at_60_columns_and_two_stand_side_by_side_at_120(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
):
    shown = Terminal([speaker], ["water light river"], 60, monkeypatch)
    shown.run()
    lines = shown.shown.getvalue().split("\n")
    answer = chatting._printable(speaker.turns[1]["content"])
    assert max(map(len, lines)) <= 70  # the help line has colours
    assert "".join(answer.split()) in "".join("".join(lines).split())
    speaker.turns.clear()
    wide = Terminal([speaker, speaker], ["water"], 120, monkeypatch)
    monkeypatch.setattr(speaker, "title", "one of them")
    wide.run()
    assert any(line.count("one of them") == 2 for line in wide.shown.getvalue().split("\n"))
    speaker.turns.clear()


def test_what_would_steer_the_terminal_is_not_shown():
    assert chatting._printable("a\x1b[31mb\x07\tc\nd é 水") == "a[31mb\tc\nd é 水"


def test_a_model_behind_compare_is_told_from_values_of_keys():
    assert parse_compare(["--temperature", "0", "other"], True) == ("other", ["--temperature", "0"])
    assert parse_compare(["--temperature=0"], True) == ("", ["--temperature=0"])
    assert parse_compare(["beta=3"], False) == (None, ["beta=3"])
    with pytest.raises(ValueError, match="'other': not an option"):
        parse_compare(["other"], False)


def test_an_answer_has_the_room_that_is_left_and_a_dialogue_that_leaves_none_is_refused(model_folder: Any):
    model = model_folder(max_position_embeddings=40)
    answer = spoken(model, "--temperature", "0", "--bf16", "false", turns="water\n")
    assert answer.strip()
    result = CliRunner().invoke(app, ["chat", model], input="water " * 40 + "\n")
    assert result.exit_code == 2
    assert re.search(
        rf"error: {model}: the dialogue has \d+ tokens, and the model takes 40; /reset begins anew", result.stderr
    )
