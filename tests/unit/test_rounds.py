"""The loop of rounds: what each command gets, what is done once, what is compared; with stand-ins for what computes."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
from typer.testing import CliRunner

from simpo.cli import app
from simpo.data.files import hash_files
from simpo.onpolicy import rounds
from simpo.onpolicy.journal import Journal
from simpo.onpolicy.pair import is_held_out
from simpo.onpolicy.prompts import Prompt, read_prompts
from simpo.onpolicy.rounds import StageFailed, run_rounds, split_prompts
from simpo.onpolicy.scorers.rating import Rater
from simpo.onpolicy.table import measure_model, table_lines
from simpo.recipe import Recipe, load_recipe

NUM_PROMPTS = 80


class Stages:
    """Stand-ins for the commands: a "model" is a folder with a skill, the mean score of what it writes."""

    def __init__(self, gains: list[float]) -> None:
        self.gains = gains
        self.calls: list[tuple[str, ...]] = []
        self.started_by: dict[str, tuple[list[str], bool]] = {}
        self.fail_at: Callable[[str], bool] = lambda words: False

    def __call__(self, words: list[str], *, is_launcher: bool = False) -> int:
        at = words.index("simpo") + 1
        name, path, *rest = words[at:]
        self.calls.append((name, path))
        self.started_by[name] = (words[: at - 2], is_launcher)
        if self.fail_at(f"{name} {path}"):
            raise KeyboardInterrupt
        recipe = load_recipe(path, [word for word in rest if name == "train"])
        return getattr(self, name)(recipe, rest)

    def generate(self, recipe: Recipe, rest: list[str]) -> int:
        skill = float(Path(recipe.model_name_or_path, "skill").read_text())
        rng = random.Random(f"{recipe.generate.seed}")
        with Journal(Path(recipe.output_dir, "responses.jsonl"), {}) as journal:
            prompts = read_prompts(recipe).prompts
            for prompt in prompts:
                texts = [f"{skill + rng.gauss(0, 1):.6f}" for _ in range(recipe.generate.num_samples)]
                responses = [{"text": text, "num_tokens": 5, "finished": True, "logprob": -1.0} for text in texts]
                journal.add({"id": prompt.id, "prompt": prompt.turns, "responses": responses})
            journal.finish([prompt.id for prompt in prompts], {})
        return 0

    def score(self, recipe: Recipe, rest: list[str]) -> int:
        with Journal(Path(recipe.output_dir, "scored.jsonl"), {}) as journal:
            rows = [json.loads(line) for line in Path(recipe.output_dir, "responses.jsonl").read_text().splitlines()]
            for row in rows:
                for each in row["responses"]:
                    each["score"] = float(each["text"])
                    each["scores"] = {"own": each["score"], "other": -each["score"]}
            own = [each["score"] for row in rows for each in row["responses"]]
            mean, sd = fmean(own), pstdev(own)
            for row in rows:
                for each in row["responses"] if recipe.score.standardize else ():
                    each["score"] = (each["score"] - mean) / sd
                journal.add(row)
            spreads = {"own": {"mean": mean, "sd": sd}, "other": {"mean": -mean, "sd": sd}}
            journal.finish([row["id"] for row in rows], {"scores": spreads})
        return 0

    def train(self, recipe: Recipe, rest: list[str]) -> int:
        assert recipe.resume_from_checkpoint is True
        (folder,) = recipe.dataset_mixer
        assert Path(folder, "train.jsonl").is_file()
        assert Path(folder, "test.jsonl").is_file()
        model = Path(recipe.output_dir, "model")
        shutil.copytree(recipe.model_name_or_path, model)
        skill = float((model / "skill").read_text()) + self.gains.pop(0)
        (model / "skill").write_text(f"{skill}")
        return 0

    def eval(self, recipe: Recipe, rest: list[str]) -> int:
        given = dict(zip(rest[::2], rest[1::2], strict=True))
        number = {"value": 0.5, "low": 0.4, "high": 0.6}
        Path(given["--output"]).write_text(json.dumps({"accuracy": number, "margin": number}))
        return 0

    @property
    def names(self) -> list[str]:
        return [f"{Path(path).parent.name} {name}" for name, path in self.calls]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    stand_in = Stages([1.0, 1.0, 1.0])
    monkeypatch.setattr(rounds, "run_command", stand_in)
    return stand_in


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"Question {number}?", "answer": f"{number}"} for number in range(NUM_PROMPTS)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tmp_path / "first"
    model.mkdir()
    (model / "skill").write_text("0")
    return {
        "model_name_or_path": str(model),
        "output_dir": str(tmp_path / "loop"),
        "generate": {"prompts": {str(tmp_path / "asked.jsonl"): 1.0}, "num_samples": 4, "keep_columns": ["answer"]},
        "score": {"scorers": {"own": {"kind": "length"}, "other": {"kind": "repetition", "weight": 0}}},
        "pair": {"test_fraction": 0.25},
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_folder_of_a_run_is_left_alone(stages, keys):
    folder = Path(keys["output_dir"])
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"^output_dir: .* already holds a run; choose another output_dir"):
        run_rounds(load_recipe(keys))
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_each_round_begins_with_the_last_ones_model_and_fresh_prompts(stages, keys, tmp_path):
    result = json.loads(run_rounds(load_recipe(keys)).read_text())
    steps = ["generate", "score", "eval"]
    assert stages.names == [
        *(f"evaluation {step}" for step in steps),
        *["round-1 generate", "round-1 score", "round-1 train", *(f"evaluation {step}" for step in steps)],
        *["round-2 generate", "round-2 score", "round-2 train", *(f"evaluation {step}" for step in steps)],
    ]
    loop = tmp_path / "loop"
    recipes = [load_recipe(loop / f"round-{number}" / "recipe.yaml") for number in (1, 2)]
    assert [r.model_name_or_path for r in recipes] == [str(tmp_path / "first"), str(loop / "round-1" / "run" / "model")]
    assert len({r.generate.seed for r in recipes}) == 2
    asked = [{row["id"] for row in read(loop / f"round-{n}" / "responses.jsonl")} for n in (1, 2)]
    held_out = {row["id"] for row in read(loop / "round-0" / "evaluation" / "responses.jsonl")}
    assert not asked[0] & asked[1]
    assert not held_out & (asked[0] | asked[1])
    assert len(held_out) + len(asked[0]) + len(asked[1]) in (NUM_PROMPTS, NUM_PROMPTS - 1)
    assert all(is_held_out(each, 0.25) for each in held_out)
    tests = [(loop / f"round-{n}" / "pairs" / "test.jsonl").read_bytes() for n in (0, 1, 2)]
    assert tests[0] == tests[1] == tests[2]
    scores = [model["score"]["value"] for model in result["models"]]
    assert scores == pytest.approx([0, 1, 2], abs=0.3)
    assert result["models"][1]["gain"]["value"] == pytest.approx(scores[1] - scores[0])
    assert result["models"][0]["score: other"]["value"] == pytest.approx(-scores[0])
    page = (loop / "rounds.md").read_text()
    assert page.count("\n| ") == 3
    assert "the highest held-out score is that of round 2" in page


def test_columns_for_scorers_go_along_into_the_rounds(stages, keys, tmp_path):
    run_rounds(load_recipe(keys))
    rows = read(tmp_path / "loop" / "round-1" / "prompts.jsonl")
    assert {row["prompt"][0]["content"] for row in rows} == {f"Question {row['answer']}?" for row in rows}


def test_provenance_names_model_data_recipe_and_versions(stages, keys, tmp_path):
    run_rounds(load_recipe(keys))
    about = [json.loads((tmp_path / "loop" / f"round-{n}" / "provenance.json").read_text()) for n in (1, 2)]
    assert list(about[0]["stages"]) == ["generate", "score", "pair", "train"]
    for name in ("model_fingerprint", "prompts_fingerprint", "recipe_fingerprint"):
        assert len({each[name] for each in about}) == 2
    assert {"simpo", "torch", "transformers"} <= about[0].keys()


def test_a_loop_that_is_killed_goes_on_and_repeats_nothing(stages, keys, tmp_path):
    run_rounds(load_recipe({**keys, "output_dir": str(tmp_path / "whole")}))
    whole, stages.calls = stages.names, []
    recipe, refused = load_recipe(keys), set()
    stages.gains = [1.0, 1.0]

    def fail_once(words: str) -> bool:
        first, _ = words not in refused, refused.add(words)
        return first

    stages.fail_at = fail_once
    for _ in range(len(whole)):
        with pytest.raises(KeyboardInterrupt):
            run_rounds(recipe)
    run_rounds(recipe)
    assert len(stages.calls) == 2 * len(whole)
    assert stages.names[1::2] == whole
    for name in ("round-1/pairs/train.jsonl", "round-2/pairs/train.jsonl", "round-2/evaluation/scored.jsonl"):
        assert (tmp_path / "loop" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    stages.calls = []
    run_rounds(recipe)
    assert stages.calls == []


def test_other_settings_or_prompts_are_refused_and_more_rounds_are_not(stages, keys, tmp_path):
    keys["rounds"] = {"rounds": 1, "prompts_per_round": 15}
    run_rounds(load_recipe(keys))
    with pytest.raises(ValueError, match=r"other settings \(pair.min_gap was 0.0 and is 0.5\)"):
        run_rounds(load_recipe({**keys, "pair": {**keys["pair"], "min_gap": 0.5}}))
    with pytest.raises(ValueError, match=r"other settings \(learning_rate was 1e-06 and is 0.1\)"):
        run_rounds(load_recipe({**keys, "learning_rate": 0.1}))
    with (tmp_path / "asked.jsonl").open("a") as file:
        file.write('{"prompt": "One more?", "answer": ""}\n')
    with pytest.raises(ValueError, match=r"other settings \(prompts was"):
        run_rounds(load_recipe(keys))
    lines = (tmp_path / "asked.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "asked.jsonl").write_text("".join(lines[:-1]))
    stages.calls = []
    run_rounds(load_recipe(keys, {"rounds.rounds": 2}))
    assert stages.names[0] == "round-2 generate"


EVALUATED = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"gradient_accumulation_steps": 4}, "pairs_per_step was 2 and is 8"),
        ({}, {"rounds.launcher": "torchrun --nproc_per_node=8"}, "pairs_per_step was 2 and is 16"),
        ({"rounds.launcher": "mpirun -n 8 python"}, {"rounds.launcher": "mpirun -n 4 python"}, "pairs_per_step was"),
        ({}, {"save_dtype": "float32"}, "save_dtype was 'auto' and is 'float32'"),
        ({}, {**EVALUATED, "load_best_model_at_end": True}, "load_best_model_at_end was None and is True"),
        ({**EVALUATED, "early_stopping_patience": 2}, {"early_stopping_patience": 3}, "early_stopping_patience was 2"),
        ({**EVALUATED, "early_stopping_patience": 2}, {"eval_steps": 1}, "eval_steps was 5 and is 1"),
        ({}, {"guard": {"displacement": "stop"}}, "guard.displacement was None and is 'stop'"),
        ({}, {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}, None),
        (
            {"global_batch_size": 64},
            {"rounds.launcher": "torchrun --nproc_per_node=8", "per_device_train_batch_size": 4},
            None,
        ),
        (
            {"rounds.launcher": "torchrun --nnodes=1 --nproc-per-node 8"},
            {"rounds.launcher": "torchrun --nproc_per_node=4 --master_port=1", "gradient_accumulation_steps": 2},
            None,
        ),
        ({}, {"eval_steps": 5, "guard": {"displacement": "say"}, "save_steps": 7}, None),
    ],
)
def test_what_decides_a_rounds_model_stays_and_how_it_is_computed_may_change(stages, keys, before, now, message):
    recipe = load_recipe({**keys, "rounds": {"rounds": 1}}, before)
    stages.fail_at = lambda words: True
    with pytest.raises(KeyboardInterrupt):
        run_rounds(recipe)
    with pytest.raises(ValueError, match=message) if message else pytest.raises(KeyboardInterrupt):
        run_rounds(load_recipe(recipe, now))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "http://b/v1", "concurrency": 4, "timeout_s": 9, "api_key_variable": "HOME"}, None),
        ({"model": "other"}, "score.scorers.judge.model was 'm' and is 'other'"),
        ({"weight": 2.0}, "score.scorers.judge.weight was 1.0 and is 2.0"),
    ],
)
def test_a_scorers_server_and_speed_may_change_and_what_it_rates_by_may_not(stages, keys, monkeypatch, change, message):
    monkeypatch.setattr(rounds, "build_scorer", lambda *_: (None, None, Rater(lambda rows: iter(()))))
    judge = {"kind": "judge", "url": "http://a/v1", "model": "m", "weight": 1.0}
    stages.fail_at = lambda words: True
    with pytest.raises(KeyboardInterrupt):
        run_rounds(load_recipe(keys, {"score.scorers": {"judge": judge}}))
    with pytest.raises(ValueError, match=message) if message else pytest.raises(KeyboardInterrupt):
        run_rounds(load_recipe(keys, {"score.scorers": {"judge": judge | change}}))


@pytest.mark.parametrize("before", [{"source": "old"}, {}], ids=["noted", "by an earlier version"])
def test_a_scorer_that_has_become_another_is_refused(stages, keys, monkeypatch, before):
    now = dict(before)
    monkeypatch.setattr(rounds, "build_scorer", lambda *_: (None, None, Rater(lambda rows: iter(()), now)))
    stages.fail_at = lambda words: True
    with pytest.raises(KeyboardInterrupt):
        run_rounds(load_recipe(keys))
    now["source"] = "new"
    message = "score.own.source_digest was 'old' and is 'new'"
    with pytest.raises(ValueError, match=message) if before else pytest.raises(KeyboardInterrupt):
        run_rounds(load_recipe(keys))


def test_the_steps_that_are_left_work_by_what_may_change_as_it_is_now(stages, keys, tmp_path):
    stages.fail_at = lambda words: words.startswith("train") and "round-1" in words
    with pytest.raises(KeyboardInterrupt):
        run_rounds(load_recipe(keys))
    stages.fail_at = lambda words: False
    run_rounds(load_recipe(keys, {"generate.batch_size": 3, "max_tokens_per_micro_batch": 64}))
    done, going_on = (
        load_recipe(tmp_path / "loop" / name / "recipe.yaml") for name in ("round-0/evaluation", "round-1")
    )
    assert (going_on.generate.batch_size, going_on.max_tokens_per_micro_batch) == (3, 64)
    assert done.max_tokens_per_micro_batch is None
    about = json.loads((tmp_path / "loop" / "round-1" / "provenance.json").read_text())
    assert about["recipe_fingerprint"] == hash_files([tmp_path / "loop" / "round-1" / "recipe.yaml"])


def test_a_loop_that_an_earlier_version_began_goes_on(stages, keys, tmp_path):
    run_rounds(load_recipe({**keys, "rounds": {"rounds": 1, "prompts_per_round": 15}}))
    path = tmp_path / "loop" / "settings.json"
    settings = json.loads(path.read_text())
    later = rounds.what_decides(load_recipe(keys))
    path.write_text(json.dumps({name: value for name, value in settings.items() if name not in later}))
    more = {"rounds": {"rounds": 2, "prompts_per_round": 15}, "save_dtype": "float32", "guard": "stop"}
    run_rounds(load_recipe({**keys, **more}))
    assert stages.names[-4] == "round-2 train"


def test_what_an_earlier_version_read_otherwise_is_scored_anew_to_be_compared(stages, keys, tmp_path):
    run_rounds(load_recipe({**keys, "rounds": {"rounds": 1, "prompts_per_round": 15}}))
    path = tmp_path / "loop" / "round-0" / "evaluation" / "scored.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "settings": {"scorers": {"own": {"reading": 1}, "other": {}}}}))
    calls = len(stages.names)
    with pytest.raises(ValueError, match="other settings"):  # of the stand-in, which goes on with no other file
        run_rounds(load_recipe({**keys, "rounds": {"rounds": 2, "prompts_per_round": 15}}))
    assert stages.names[calls:] == ["evaluation score"]


@pytest.mark.parametrize(("gains", "ends_at"), [([0.0, 9.0], 1), ([3.0, -3.0, 9.0], 2), ([3.0, 3.0, 3.0], 3)])
def test_stops_where_the_held_out_score_no_longer_rises(stages, keys, gains, ends_at):
    stages.gains = gains
    keys["rounds"] = {"rounds": 3, "min_gain": 2.0}
    result = json.loads(run_rounds(load_recipe(keys)).read_text())
    assert len(result["models"]) == ends_at + 1
    assert (result["stopped"] is None) == (ends_at == 3)
    if ends_at < 3:
        assert f"stopped after round {ends_at} of 3" in result["stopped"]
    before = len(stages.calls)
    assert json.loads(run_rounds(load_recipe(keys)).read_text()) == result
    assert len(stages.calls) == before


def test_scores_that_are_standardised_are_so_by_the_first_models_in_every_evaluation(stages, keys):
    """By each file's own mean every model would score 0, and min_gain end the loop."""
    keys["score"]["standardize"] = True
    result = json.loads(run_rounds(load_recipe({**keys, "rounds": {"min_gain": 2.0}})).read_text())
    assert result["stopped"] is None
    assert [model["score"]["value"] for model in result["models"]] == pytest.approx([0, 1, 2], abs=0.3)
    assert result["models"][0]["score"]["value"] == pytest.approx(0)
    assert result["models"][2]["gain"]["value"] == pytest.approx(1, abs=0.3)


def test_a_loss_of_lists_is_trained_on_lists(stages, keys, tmp_path):
    run_rounds(load_recipe({**keys, "loss_type": "plackett_luce", "rounds": {"rounds": 1}}))
    recipe = load_recipe(tmp_path / "loop" / "round-1" / "recipe.yaml")
    (folder,) = recipe.dataset_mixer
    rows = read(Path(folder, "train.jsonl"))
    assert all(len(row["responses"]) == len(row["scores"]) == 4 for row in rows)
    assert read(Path(folder, "test.jsonl"))[0].keys() >= {"chosen", "score_rejected"}


def test_only_training_is_started_by_the_launcher(stages, keys):
    run_rounds(load_recipe({**keys, "rounds": {"rounds": 1, "launcher": "torchrun --nproc_per_node=2"}}))
    assert stages.started_by["train"] == (["torchrun", "--nproc_per_node=2"], True)
    assert stages.started_by["generate"] == ([sys.executable], False)


def test_a_launchers_processes_share_the_global_batch_size_that_was_asked_for(stages, keys, tmp_path):
    launched = {"global_batch_size": 64, "rounds": {"rounds": 1, "launcher": "torchrun --nproc_per_node=8"}}
    run_rounds(load_recipe({**keys, **launched}))
    path = tmp_path / "loop" / "round-1" / "recipe.yaml"
    assert [load_recipe(path, processes=n).pairs_per_step(n) for n in (1, 8)] == [64, 64]


def test_a_stage_that_fails_ends_the_loop_with_its_code(keys, monkeypatch):
    monkeypatch.setattr(rounds, "run_command", lambda words, **_: 2)
    with pytest.raises(StageFailed, match=r"`simpo generate .*round-0/evaluation/recipe.yaml` ended with code 2"):
        run_rounds(load_recipe(keys))


def test_of_a_stage_that_was_killed_the_signal_is_named(keys, monkeypatch):
    monkeypatch.setattr(rounds, "run_command", lambda words, **_: -9)
    with pytest.raises(StageFailed, match="it was killed by SIGKILL, as the system does where memory runs out: then"):
        run_rounds(load_recipe(keys))


def test_what_was_left_out_is_in_the_account_and_the_exit_code(stages, keys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(load_recipe(keys).to_yaml())
    score = stages.score

    def tie(recipe: Recipe, rest: list[str]) -> int:
        path = Path(recipe.output_dir, "responses.jsonl")
        rows = read(path)
        rows[0]["responses"] = rows[0]["responses"][:1] * 4
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return score(recipe, rest)

    stages.score = tie
    done = CliRunner().invoke(app, ["rounds", str(recipe)])
    assert done.exit_code == 3, done.output
    assert "1 one answer (round-1/pairs)" in done.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair.test_fraction": 0.0}, "pair.test_fraction: 0 holds out no prompts"),
        ({"pair.test_fraction": 1e-9}, "pair.test_fraction: 1e-09 of 80 prompts holds out none"),
        ({"score.scorers": None}, "score.scorers: nothing to rate with"),
        ({"score.scorers": {"own": {"kind": "function", "function": "nowhere:rate"}}}, "own: .* no module 'nowhere'"),
        ({"pair.input": "x.jsonl"}, "pair.input: each step"),
        ({"generate.backend": "openai"}, "generate.backend: a server has one model"),
        ({"output_dir": None}, "output_dir must be set"),
        ({"rounds.prompts_per_round": 50}, "2 rounds of 50 prompts need 100, and there are"),
        ({"push_to_hub": True, "hub_model_id": "a/b"}, "push_to_hub: not in rounds"),
    ],
)
def test_what_cannot_be_is_refused_at_once(stages, keys, changes, message):
    with pytest.raises(ValueError, match=message):
        run_rounds(load_recipe(keys, changes))
    assert stages.calls == []


def test_a_server_answers_for_the_pairs_and_not_for_the_models_that_are_measured(stages, keys, tmp_path):
    server = {"generate.backend": "openai", "generate.url": "http://127.0.0.1:9", "generate.options": {"user": "me"}}
    run_rounds(load_recipe(keys, {**server, "rounds.rounds": 1}))
    backends = {
        str(path.parent.relative_to(tmp_path)).partition("/")[2]: load_recipe(path).generate.backend
        for path in tmp_path.rglob("recipe.yaml")
    }
    assert backends == {"round-0/evaluation": "local", "round-1": "openai", "round-1/evaluation": "local"}


def test_prompts_are_split_or_drawn():
    prompts = [Prompt(f"{number:04}", "", []) for number in range(10)]
    parts = split_prompts(prompts, 3, each=None, reuse=False, seed=1)
    assert sorted(p.id for part in parts for p in part) == [p.id for p in prompts]
    assert sorted(map(len, parts)) == [3, 3, 4]
    two = split_prompts(prompts, 2, each=3, reuse=False, seed=1)
    assert split_prompts(prompts, 3, each=3, reuse=False, seed=1)[:2] == two
    assert split_prompts(prompts, 2, each=None, reuse=True, seed=1) == [prompts, prompts]
    drawn = split_prompts(prompts, 2, each=6, reuse=True, seed=2)
    assert drawn[0] != drawn[1]
    with pytest.raises(ValueError, match="11 rounds of 1 prompts need 11, and there are 10"):
        split_prompts(prompts, 11, each=None, reuse=False, seed=1)


def test_one_held_out_pair_has_numbers_without_an_interval(tmp_path: Path) -> None:
    scored, pairs = tmp_path / "scored.jsonl", tmp_path / "pairs.json"
    responses = [{"text": "water", "score": 1.0, "scores": {"rule": 1.0}}]
    scored.write_text(json.dumps({"id": "a", "responses": responses}) + "\n")
    margin = {"value": 0.25, "low": None, "high": None}
    pairs.write_text(json.dumps({"accuracy": {"value": 1.0, "low": 0.2, "high": 1.0}, "margin": margin}))
    model = measure_model(1, "model", scored, pairs)
    assert model.to_dict()["margin"] == margin
    assert table_lines([model])[2].endswith("| 100.0% (20.0% to 100.0%) | +0.2500 |")
