"""Sweeps: what is tried, in which order, what counts as best, what is done once; with stand-ins for training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from simpo.cli import app
from simpo.evaluation.statistics import length_balanced, length_balanced_accuracy, preference_scores
from simpo.recipe import load_recipe
from simpo.run.resume import find_checkpoint
from simpo.run.stopping import killed_by
from simpo.tuning import calibrate, jobs, sweep
from simpo.tuning.calibrate import Margins
from simpo.tuning.space import Range, foresee, propose_all, propose_next, read_space
from simpo.tuning.sweep import _check_varied, read_sweep, run_sweep

# --- the space -------------------------------------------------------------------------------------------------------


def test_keys_with_several_values_are_varied_and_all_others_left():
    words = ["--learning_rate", "3e-7,5e-7", "--beta=2,10", "--dataset_splits", "[a, b]", "--seed", "1", "--bf16"]
    space, rest = read_space([*words, "--sft_weight", "0..0.5"])
    assert space == {"learning_rate": ("3e-7", "5e-7"), "beta": ("2", "10"), "sft_weight": Range(0, 0.5)}
    assert rest == ["--dataset_splits=[a, b]", "--seed=1", "--bf16"]
    assert read_space(["--clean.languages", "en,de", "--report_to=a,b"])[0] == {}, "whose own values are lists"


def test_a_grid_is_every_combination_and_a_random_search_has_no_repetition():
    space = {"learning_rate": ("1", "2", "3"), "beta": ("4", "5")}
    grid = propose_all(space, method="grid", trials=None, seed=0)
    assert [tuple(each.values()) for each in grid] == [(a, b) for a in "123" for b in "45"]
    drawn = propose_all(space, method="random", trials=100, seed=0)
    assert sorted(map(str, drawn)) == sorted(map(str, grid))


def test_learning_rates_are_drawn_by_their_logarithm():
    rates = [float(each["x"]) for each in propose_all({"x": Range(1e-7, 1e-5)}, method="random", trials=200, seed=0)]
    assert 80 < sum(rate < 1e-6 for rate in rates) < 120
    assert min(rates) >= 1e-7
    assert max(rates) <= 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--beta", "2"], "nothing to vary"),
        (["--beta", "2,,3"], "a value is missing"),
        (["--beta", "2,3", "--beta", "4,5"], "given twice"),
        (["--beta", "3..2"], "from a smaller number to a larger"),
        (["--beta", "1..2"], "a grid needs a list"),
        (["--beta", "2,x"], "beta = 'x'"),
        (["--beta", "-3..2", "--method", "random", "--trials", "3"], "beta = -3"),
        (["--beta", "-3..2", "--method", "optuna", "--trials", "3"], "beta = -3"),
        (["--beta", "2,3", "--method", "random"], "needs --trials"),
        (["--beta", "2,3", "--trials", "3"], "tries every combination"),
        (["--beta", "2,3", "--rungs", "10,5"], "ascending"),
        (["--evaluation_strategy", "epoch,steps"], "evaluation_strategy: cannot be varied"),
        (["--early-stopping-patience", "1,2"], "early_stopping_patience: cannot be varied"),
        (["--guard.displacement", "stop,back"], "guard.displacement: cannot be varied"),
        (["--max_steps", "10,20", "--rungs", "5,10"], "max_steps: cannot be varied with --rungs"),
        (["--num_train_epochs", "1..2", "--rungs", "5,10"], "num_train_epochs: cannot be varied with --rungs"),
        (["--beta", "2,3", "--method", "bayes"], "one of grid, random, optuna"),
    ],
)
def test_a_space_that_cannot_be_is_refused_in_a_line(words, message, tiny_recipe, tmp_path):
    path = load_recipe(tiny_recipe).save(tmp_path / "recipe.yaml") or tmp_path / "recipe.yaml"
    result = CliRunner().invoke(app, ["sweep", str(path), *words])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run").exists(), "before anything was made or computed"


@pytest.mark.parametrize("name", ["seed", "validation_fraction", "test_split_size", "dataset_mixer.other"])
def test_what_moves_the_hold_out_is_not_varied_unless_there_is_a_test_split(name, tiny_recipe):
    tried = {name: ("0.1", "0.2")}
    _check_varied(load_recipe(tiny_recipe), tried, ())
    drawn = load_recipe(tiny_recipe, {"dataset_splits": ["train"], "validation_fraction": 0.1})
    with pytest.raises(ValueError, match=f"^{name}: cannot be varied without a test split"):
        run_sweep(drawn, tried)
    _check_varied(drawn, {f"dataset_mixer.{path}": ("0.5", "1") for path in drawn.dataset_mixer}, ())


def test_a_value_is_tried_out_beside_one_of_the_other_keys(tiny_recipe):
    """score_margin is refused for the recipe's own loss, and for none that will be tried."""
    base = load_recipe({**tiny_recipe, "loss_type": "cpo"})
    space = {"loss_type": ("sigmoid", "hinge"), "score_margin": ("1", "2")}
    for settings in foresee(space, method="grid", trials=None, seed=0):
        load_recipe(base, [f"--{key}={value}" for key, value in settings.items()])
    with pytest.raises(ValueError, match="score_margin"):
        load_recipe(base, ["--score_margin=1"])


def test_optuna_learns_from_what_was_tried_and_proposes_the_same_again():
    pytest.importorskip("optuna")
    space = {"x": Range(0.0, 1.0)}

    def search() -> list[float]:
        tried: list = []
        while len(tried) < 24:
            settings = propose_next(space, tried, seed=0)
            tried.append((settings, None if len(tried) == 3 else -abs(float(settings["x"]) - 0.8)))
        return [float(settings["x"]) for settings, _ in tried]

    found = search()
    assert found == search()
    assert sum(abs(x - 0.8) < 0.15 for x in found[12:]) > 6


# --- the measure -----------------------------------------------------------------------------------------------------


def test_preferring_the_longer_response_buys_nothing():
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(5, 50, (500,), generator=generator).double()
    longer = torch.rand(500, generator=generator) < 0.8
    rejected = chosen - torch.where(longer, 1, -1) * torch.randint(1, 20, (500,), generator=generator)
    margins = chosen - rejected
    plain = float(preference_scores(margins).mean())
    assert plain > 0.7
    balanced = length_balanced_accuracy(margins, chosen, rejected)
    assert balanced.value == pytest.approx(0.5)
    assert float(length_balanced(preference_scores(margins), chosen, rejected).mean()) == pytest.approx(0.5)


def test_the_balanced_accuracy_holds_the_truth_in_95_of_100_intervals():
    generator = torch.Generator().manual_seed(0)
    longer = torch.rand(80, generator=generator) < 0.7
    chosen = torch.where(longer, 20.0, 10.0)
    chances = torch.where(longer, 0.8, 0.4)
    hits = 0
    for _ in range(400):
        margins = torch.where(torch.rand(80, generator=generator) < chances, 1.0, -1.0)
        _, low, high = length_balanced_accuracy(margins, chosen, torch.full((80,), 15.0))
        hits += low <= 0.6 <= high
    assert 0.92 < hits / 400 <= 0.99


# --- the loop --------------------------------------------------------------------------------------------------------


class Trainings:
    """Stands for the commands: how good a model is follows from its settings and steps."""

    def __init__(self, skill) -> None:
        self.skill, self.words, self.stop_after = skill, [], None

    def __call__(self, words, log: Path, **_: object) -> tuple[int, str]:
        self.words.append(words[:2])
        if self.stop_after is not None and len(self.words) > self.stop_after:
            raise KeyboardInterrupt
        log.parent.mkdir(parents=True, exist_ok=True)
        if words[0] == "train":
            recipe = load_recipe(words[1])
            if recipe.learning_rate > 1:
                return 1, "error: step 3: the loss is not finite"
            (Path(recipe.output_dir) / "model").mkdir(parents=True)
            return 0, ""
        result = Path(words[words.index("--output") + 1])
        recipe = load_recipe(result.parent / "recipe.yaml")
        skill = self.skill(recipe) if "--model" in words else 0.5
        records = [
            {"row_id": str(i), "margin": 1 if i < 100 * skill else -1, "chosen_length": i % 2, "rejected_length": 0.5}
            for i in range(100)
        ]
        result.with_suffix(".pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        repeated = 0.9 if recipe.learning_rate > 0.5 and "--model" in words else 0.1
        content = {"margin": [skill, 0, 1], "chosen_mean": -1.0, "repeated_share": repeated}
        content["margin"] = {"value": skill, "low": 0, "high": 1}
        result.write_text(json.dumps(content))
        return 0, ""


@pytest.fixture
def trainings(monkeypatch):
    made = Trainings(lambda recipe: 0.5 + 3 * recipe.learning_rate + 0.01 * recipe.beta)
    monkeypatch.setattr(jobs, "run_command_line", made)
    return made


RATES = ("0.01", "0.03", "0.1", "0.9", "5")


def test_the_best_is_named_and_collapsed_and_failed_runs_are_not(trainings, tiny_recipe, tmp_path):
    path = run_sweep(load_recipe(tiny_recipe), {"learning_rate": RATES, "beta": ("2", "3")})
    found = read_sweep(path)
    assert found.best.settings == {"learning_rate": "0.1", "beta": "3"}
    assert [trial.settings["beta"] for trial in found.as_good] == ["2"]
    failed = {
        t["settings"]["learning_rate"]: t["results"][-1]["failed"] for t in json.loads(path.read_text())["trials"]
    }
    assert "collapsed: 90%" in failed["0.9"]
    assert "not finite" in failed["5"]
    assert failed["0.03"] is None
    best = load_recipe(path.parent / "best.yaml")
    assert (best.learning_rate, best.beta) == (0.1, 3)
    assert find_checkpoint(best) is None, "it can be trained as it stands"
    assert len(list(path.parent.glob("trial-*/run/run/model"))) == 1
    table = (path.parent / "sweep.md").read_text()
    assert "| none |" in table
    assert "counts for nothing: collapsed" in table


def test_a_recipe_that_acts_on_its_evaluations_can_be_varied(trainings, tiny_recipe):
    """Trials are not evaluated while they train."""
    often = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5, "early_stopping_patience": 2}
    recipe = load_recipe({**tiny_recipe, **often, "early_stopping_threshold": 0.1, "guard": {"displacement": "back"}})
    path = run_sweep(recipe, {"learning_rate": ("0.01", "0.1")})
    assert load_recipe(path.parent / "trial-01" / "run" / "recipe.yaml").guard["displacement"] == "stop"
    best = load_recipe(path.parent / "best.yaml")
    assert (best.learning_rate, best.early_stopping_patience, best.guard["displacement"]) == (0.1, 2, "back")


def test_a_collapsed_run_is_no_success_to_learn_from(trainings, tiny_recipe, monkeypatch):
    """It may have the highest accuracy of all."""
    rates, known = iter(("0.9", "0.1", "5")), []

    def propose(space, tried, seed):
        known[:] = tried
        return {"learning_rate": next(rates)}

    monkeypatch.setattr(sweep, "propose_next", propose)
    run_sweep(load_recipe(tiny_recipe), {"learning_rate": Range(0.01, 0.9)}, method="optuna", trials=3)
    assert [worth for _, worth in known] == [None, pytest.approx(0.82)]


def test_a_trial_that_the_system_kills_has_failed_and_one_that_is_stopped_stops_the_sweep(
    trainings, tiny_recipe, monkeypatch
):
    endings = [-2, -15, 130, -9]

    def run(words, log, **options):
        if words[0] == "train" and "trial-01" in str(log):
            code = endings.pop(0)
            return code, killed_by(code)
        return trainings(words, log, **options)

    monkeypatch.setattr(jobs, "run_command_line", run)
    for _ in endings[:3]:
        with pytest.raises(KeyboardInterrupt):
            run_sweep(load_recipe(tiny_recipe), {"learning_rate": RATES[:2]})
    trials = json.loads(run_sweep(load_recipe(tiny_recipe), {"learning_rate": RATES[:2]}).read_text())["trials"]
    assert "it was killed by SIGKILL, as the system does where memory" in trials[0]["results"][0]["failed"]
    assert trials[1]["results"][0]["failed"] is None


def test_of_each_rung_the_best_go_on_and_every_rung_costs_about_the_same(trainings, tiny_recipe):
    path = run_sweep(load_recipe(tiny_recipe), {"learning_rate": RATES[:3], "beta": ("2", "4", "6")}, rungs=(5, 15, 45))
    trials = json.loads(path.read_text())["trials"]
    assert sorted(len(trial["results"]) for trial in trials) == [1] * 6 + [2] * 2 + [3]
    steps = [result["steps"] for trial in trials for result in trial["results"]]
    assert {count: steps.count(count) * count for count in (5, 15, 45)} == {5: 45, 15: 45, 45: 45}
    assert read_sweep(path).best.settings == {"learning_rate": "0.1", "beta": "6"}
    recipe = load_recipe(path.parent / "trial-09" / "steps-45" / "recipe.yaml")
    assert (recipe.max_steps, recipe.learning_rate) == (45, 0.1)


def test_short_rungs_are_judged_by_how_far_pairs_lean_before_any_changes_sides(trainings, tiny_recipe, monkeypatch):
    def run(words, log, **options):
        code, said = trainings(words, log, **options)
        if words[0] == "eval" and "steps-2" in str(log):  # accuracy 0.5 for all, as of the untrained model
            pairs = log.parent / "result.pairs.jsonl"
            rate, records = load_recipe(log.parent / "recipe.yaml").learning_rate, pairs.read_text().splitlines()
            records = [{**json.loads(each), "margin": (1 if i < 50 else -1) + rate} for i, each in enumerate(records)]
            pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
        return code, said

    monkeypatch.setattr(jobs, "run_command_line", run)
    path = run_sweep(load_recipe(tiny_recipe), {"learning_rate": RATES[:3]}, rungs=(2, 6))
    trials = json.loads(path.read_text())["trials"]
    assert [trial["results"][0]["accuracy"][0] for trial in trials] == [0.5] * 3
    assert [len(trial["results"]) for trial in trials] == [1, 1, 2]


@pytest.mark.parametrize("stop_after", [0, 1, 4, 9])
def test_given_again_it_does_what_was_left_and_the_untrained_model_is_measured_once(
    stop_after, trainings, tiny_recipe, monkeypatch
):
    recipe, space = load_recipe(tiny_recipe), {"learning_rate": RATES[:3], "beta": ("2", "4")}
    trainings.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        run_sweep(recipe, space)
    trainings.words, trainings.stop_after = trainings.words[:-1], None
    path = run_sweep(recipe, space)
    commands = [tuple(words) for words in trainings.words]
    assert len([words for words in commands if words[0] == "train"]) == 6
    assert len([words for words in commands if words[0] == "eval"]) == 7  # six trials, and the untrained model once
    done = path.read_text()
    run_sweep(recipe, space)
    assert path.read_text() == done
    monkeypatch.setattr(sweep, "prepare_pairs", None)  # other settings are refused before the pairs are read
    with pytest.raises(ValueError, match=r"space.beta was \['2', '4'\] and is"):
        run_sweep(recipe, {"learning_rate": RATES[:3], "beta": ("2", "5")})


@pytest.fixture
def own_recipe(tiny_recipe, tmp_path):
    """Whose pairs and model a test may change."""
    (pairs,) = tiny_recipe["dataset_mixer"]
    shutil.copytree(pairs, tmp_path / "pairs")
    shutil.copytree(tiny_recipe["model_name_or_path"], tmp_path / "model")
    return {**tiny_recipe, "dataset_mixer": {"pairs": 1.0}, "model_name_or_path": "model"}


def change(path: str, old: str, new: str) -> None:
    Path(path).write_text(Path(path).read_text().replace(old, new))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"gradient_accumulation_steps": 8}, "recipe.pairs_per_step was 4 and is 16"),
        ({"save_dtype": "float16"}, "recipe.save_dtype was 'auto' and is 'float16'"),
        ({"guard": {"displacement": "stop"}}, "recipe.guard.displacement was None and is 'stop'"),
        ("pairs/train.jsonl", "data_digest was"),
        ("model/generation_config.json", "model_digest was"),
        ({"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "eval_steps": 7}, None),
    ],
)
def test_what_decides_trials_stays_unless_an_earlier_version_did_not_write_it_down(
    now, message, trainings, own_recipe, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    space = {"learning_rate": ("0.01", "0.1")}
    path = run_sweep(load_recipe(own_recipe), space)
    if isinstance(now, str):
        change(now, "water", "stone") if now.startswith("pairs") else change(now, "{", "{ ")
    recipe = load_recipe(own_recipe, now if isinstance(now, dict) else {})
    if message is None:
        assert run_sweep(recipe, space) == path
        return
    with pytest.raises(ValueError, match=message):
        run_sweep(recipe, space)
    content = json.loads(path.read_text())
    for name in sweep.what_decides(recipe):
        del content["asked"]["recipe"][name]
    del content["asked"]["data_digest"], content["asked"]["model_digest"]
    path.write_text(json.dumps(content))
    assert run_sweep(recipe, space) == path


def test_margins_are_measured_anew_where_pairs_or_model_are_others(trainings, own_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate, "run_command_line", trainings)
    monkeypatch.setattr(calibrate, "run_sweep", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    counts = []
    for path, old, new in [(None, "", ""), ("pairs/train.jsonl", "water", "stone"), ("model/config.json", "{", "{ ")]:
        if path:
            change(path, old, new)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                calibrate.run_calibrate(load_recipe(own_recipe))
        counts.append(len(trainings.words))
    assert counts == [1, 2, 3]


def test_steps_are_counted_for_the_processes_that_the_launcher_starts(trainings, tiny_recipe, monkeypatch):
    monkeypatch.setattr(calibrate, "run_command_line", trainings)
    rungs = []

    def stop(*_: Any, rungs: Any, found: list[Any] = rungs, **__: Any) -> None:
        found.append(rungs[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "run_sweep", stop)
    two = {"launcher": ["torchrun", "--nproc-per-node", "2"]}
    recipe = {**tiny_recipe, "num_train_epochs": 20, "max_steps": -1}
    del recipe["gradient_accumulation_steps"]
    for keys in ({}, {"rounds": two}, {"global_batch_size": 2}, {"global_batch_size": 2, "rounds": two}):
        with pytest.raises(KeyboardInterrupt):
            calibrate.run_calibrate(load_recipe({**recipe, **keys}))
    one, half, given, same = rungs
    assert one == pytest.approx(2 * half, abs=1)
    assert given == same


def test_the_folder_of_a_run_is_left_alone(trainings, tiny_recipe):
    folder = Path(tiny_recipe["output_dir"])
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"^output_dir: .* already holds a run; choose another output_dir"):
        run_sweep(load_recipe(tiny_recipe), {"learning_rate": ("0.1", "0.2")})
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == ["metrics.jsonl"]


def test_a_sweep_needs_held_out_pairs_and_one_run_that_can_be_trained(trainings, tiny_recipe):
    with pytest.raises(ValueError, match=r"every run failed .*not finite"):
        run_sweep(load_recipe(tiny_recipe), {"learning_rate": ("5", "6")})
    recipe = load_recipe(tiny_recipe, {"dataset_splits": ["train"], "validation_fraction": 0.0, "output_dir": "other"})
    with pytest.raises(ValueError, match="no held-out pairs"):
        run_sweep(recipe, {"learning_rate": ("0.1", "0.2")})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"push_to_hub": True}, "push_to_hub: not in a sweep"),
        ({"resume_from_checkpoint": True}, "resume_from_checkpoint: a sweep goes on by itself"),
        ({"dataset_splits": ["train"], "validation_fraction": 0.0}, "no held-out pairs"),
    ],
)
def test_calibration_refuses_what_its_sweep_would_before_it_measures(
    keys, message, trainings, tiny_recipe, monkeypatch
):
    monkeypatch.setattr(calibrate, "run_command_line", trainings)
    with pytest.raises(ValueError, match=message):
        calibrate.run_calibrate(load_recipe(tiny_recipe, keys))
    assert trainings.words == []


def test_margins_that_a_model_begins_with_are_read_by_their_quantiles():
    margins = Margins.of(torch.randn(20_000, generator=torch.Generator().manual_seed(0)).mul(0.3).tolist())
    assert margins.spread == pytest.approx(0.3, rel=0.03)
    assert margins.target == pytest.approx(1.2816 * 0.3, rel=0.03)


def test_a_launchers_processes_share_the_global_batch_size_that_was_asked_for(trainings, tiny_recipe):
    del tiny_recipe["per_device_train_batch_size"], tiny_recipe["gradient_accumulation_steps"]
    launched = {"global_batch_size": 16, "rounds": {"launcher": "torchrun --nproc_per_node=4"}}
    path = run_sweep(load_recipe({**tiny_recipe, **launched}), {"per_device_train_batch_size": ("1", "2")})
    for name in ("untrained/recipe.yaml", "trial-01/run/recipe.yaml", "trial-02/run/recipe.yaml", "best.yaml"):
        for processes in (1, 4):
            assert load_recipe(path.parent / name, processes=processes).pairs_per_step(processes) == 16
