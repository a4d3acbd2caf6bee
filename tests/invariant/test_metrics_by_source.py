"""Metrics by source are those of its pairs, each computed alone: however steps are cut, spread, resumed or begun again.

The slow way goes through every pair of a step by itself, before the step, and takes plain means.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import miniature
import pytest
import torch
from cases import often
from ranks import Ranks

from simpo.data.prepare import prepare_pairs
from simpo.data.rows import source_of
from simpo.display import Display
from simpo.hosts.hf import SimPOConfig, SimPOTrainer
from simpo.model.load import load_tokenizer
from simpo.recipe import load_recipe
from simpo.run.metrics import BY_SOURCE, PAIR_METRICS
from simpo.trainer import Interrupted, Trainer

Settings = dict[str, Any]
MESHES = {
    "one process": {},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5},
    "token limit": {"max_tokens_per_micro_batch": 100},
}
TWO = {
    "dp2": {"dp_replicate": 2, "dp_shard": 1, "per_device_train_batch_size": 1},
    "fsdp2": {"dp_shard": 2, "per_device_train_batch_size": 1},
    "cp2": {"cp": 2},
}


def keep(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def mixture(tiny_model: Path, pair_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A recipe of 27 pairs of one source, 10 of another and 3 of a third; held out 6, 0 and 4."""
    folder = tmp_path_factory.mktemp("mixture")
    train, test = ((pair_files / f"{name}.jsonl").read_text().splitlines(keepends=True) for name in ("train", "test"))
    for name, of_train, of_test in (("web", (0, 27), (0, 6)), ("maths", (27, 37), None), ("code", (37, 40), (6, 10))):
        keep(folder / name / "train.jsonl", train[slice(*of_train)])
        if of_test:
            keep(folder / name / "test.jsonl", test[slice(*of_test)])
    (folder / "maths" / "train.jsonl").rename(folder / "maths.jsonl")
    mixer = {str(folder / name): 1.0 for name in ("web", "maths.jsonl", "code")}
    recipe = miniature.recipe_in(folder, tiny_model, folder) | {"dataset_mixer": mixer, "logging_steps": 3}
    return recipe | {"save_strategy": "no", "eval_steps": 4, "max_steps": 11}


def settings_in(folder: Path, mixture: Settings, **changes: Any) -> Settings:
    return {**mixture, "output_dir": str(folder / "run"), **changes}


Truth = dict[str, dict[str, float]]


class Slowly:
    """Sums by source of pairs that are computed alone, and their means since they were asked for."""

    def __init__(self) -> None:
        self.sums: Truth = defaultdict(lambda: defaultdict(float))

    @torch.no_grad()
    def add(self, trainer: Any, loader: Any, indices: list[int], plan: Any, split: str) -> None:
        for index in indices:
            part = loader.build([index])
            (row_id,) = part.pairs.row_ids
            _, sums = trainer.forward(part, plan, split=split)
            own = self.sums[source_of(row_id)]
            for name, value in zip(PAIR_METRICS, sums.tolist(), strict=False):
                own[name] += value
            own["pairs"] += 1

    def means(self) -> Settings:
        found = {f"{m}/{source}": own[m] / own["pairs"] for source, own in self.sums.items() for m in BY_SOURCE}
        counts = {f"pairs/{source}": own["pairs"] for source, own in self.sums.items()}
        self.sums.clear()
        return found | counts


def run_beside(settings: Settings, stop_after: int | None = None) -> tuple[list[Settings], list[Settings]]:
    """A native run: what it wrote for each logged step and evaluation, and the same computed slowly."""
    trainer = Trainer(load_recipe(settings), display=Display(quiet=True))
    slow, truth = Slowly(), []
    step, evaluate, log = trainer.train_step, trainer.evaluate, trainer._log_window

    def train_step(plan: Any) -> Any:
        ours = {index for part in plan.micro_batches for index in part}
        everyone = sorted(set().union(*trainer.mesh.gather(ours)))
        slow.add(trainer, trainer.loader, everyone, plan, "train")
        if plan.step + 1 == stop_after:
            trainer._stop.set()
        return step(plan)

    def log_window(values: Any) -> None:
        truth.append(slow.means())
        log(values)

    def evaluated(**options: Any) -> Any:
        held = Slowly()
        whole = trainer.eval_loader.plan_everything()
        held.add(trainer, trainer.eval_loader, list(range(len(trainer.eval_loader.store))), whole, "eval")
        truth.append({f"eval_{name}": value for name, value in held.means().items()})
        return evaluate(**options)

    trainer.train_step, trainer._log_window, trainer.evaluate = train_step, log_window, evaluated
    try:
        trainer.run()
    except Interrupted:
        truth.append(dict(slow.sums))
    finally:
        trainer.mesh.barrier()
    lines = (Path(settings["output_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], truth


def by_source(line: Settings) -> Settings:
    return {name: value for name, value in line.items() if "/" in name.replace("rewards/", "").replace("logps/", "")}


def assert_as_slowly(lines: list[Settings], truth: list[Settings], *, total: int = 11) -> None:
    assert len(lines) == len(truth)
    for line, slow in zip(lines, truth, strict=True):
        if "loss" in line:
            slow = {name: value for name, value in slow.items() if not name.startswith("pairs/")}
        assert by_source(line) == pytest.approx(slow, rel=1e-5, abs=1e-6)
    assert {source for line in lines for source in by_source(line)} >= {"loss/maths.jsonl", "eval_pairs/code"}
    assert lines[-1]["step"] == total


@pytest.mark.parametrize("case", MESHES)
def test_lines_have_the_means_of_each_sources_pairs(case: str, mixture: Settings, tmp_path: Path) -> None:
    lines, truth = run_beside(settings_in(tmp_path, mixture, **MESHES[case]))
    assert_as_slowly(lines, truth)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert all(
        (line["eval_pairs"], line["eval_pairs/web"], line["eval_pairs/code"]) == (10, 6, 4) for line in evaluations
    )
    for line in evaluations:
        whole = (6 * line["eval_loss/web"] + 4 * line["eval_loss/code"]) / 10
        assert line["eval_loss"] == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("case", often(["dp2", "fsdp2", "cp2"], "fsdp2"))
def test_two_processes_sum_over_both(
    case: str, two_ranks: Ranks, mixture: Settings, model_folder: Any, tmp_path: Path
) -> None:
    settings = settings_in(tmp_path, mixture, model_name_or_path=model_folder(), **TWO[case])
    lines, truth = two_ranks.run(run_beside, settings)[0]
    assert_as_slowly(lines, truth)


@pytest.mark.long
def test_a_resumed_window_has_the_pairs_of_both_parts(mixture: Settings, tmp_path: Path) -> None:
    whole, _ = run_beside(settings_in(tmp_path / "whole", mixture))
    parted = settings_in(tmp_path / "parted", mixture)
    run_beside(parted, stop_after=5)
    lines, _ = run_beside({**parted, "resume_from_checkpoint": True})
    assert [by_source(line) for line in lines] == [by_source(line) for line in whole]


def test_a_step_that_is_begun_again_counts_its_pairs_once(mixture: Settings, tmp_path: Path) -> None:
    def lines(folder: Path, fail: bool) -> list[Settings]:
        settings = settings_in(folder, mixture, per_device_train_batch_size=4, gradient_accumulation_steps=1)
        trainer = Trainer(load_recipe(settings), display=Display(quiet=True))
        forward, failed = trainer.forward, []

        def fails_once(part: Any, plan: Any, **options: Any) -> Any:
            found = forward(part, plan, **options)
            if fail and plan.step == 4 and not failed:
                failed.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            return found

        trainer.forward = fails_once
        trainer.run()
        assert len(failed) == fail
        return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]

    ours, theirs = lines(tmp_path / "again", True), lines(tmp_path / "once", False)
    for line, other in zip(ours, theirs, strict=True):
        assert by_source(line) == pytest.approx(by_source(other), rel=1e-5, abs=1e-6)


def test_one_source_has_the_lines_it_always_had_and_several_train_the_same(mixture: Settings, tmp_path: Path) -> None:
    """The same rows in the same order, in one folder: the same weights and metrics, bit for bit."""
    places = [Path(place) for place in mixture["dataset_mixer"]]
    for split in ("train", "test"):
        files = [path if path.is_file() else path / f"{split}.jsonl" for path in places]
        rows = [
            line
            for path in files
            if path.is_file() and (split == "train" or path.name == "test.jsonl")
            for line in path.read_text().splitlines(keepends=True)
        ]
        keep(tmp_path / "all" / f"{split}.jsonl", rows)
    runs = {}
    for name, mixer in (("one", {str(tmp_path / "all"): 1.0}), ("several", mixture["dataset_mixer"])):
        settings = settings_in(tmp_path / name, mixture, dataset_mixer=mixer, save_strategy="steps", save_steps=11)
        Trainer(load_recipe(settings), display=Display(quiet=True)).run()
        lines = [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        runs[name] = lines, (tmp_path / name / "run" / "model" / "model.safetensors").read_bytes()
    times = {"step_time_s", "pairs_per_s", "memory_gib", "eval_time_s"}
    for one, several in zip(runs["one"][0], runs["several"][0], strict=True):
        assert not by_source(one)
        assert {n: v for n, v in one.items() if n not in times} == {
            n: v for n, v in several.items() if n not in times | by_source(several).keys()
        }
    assert runs["one"][1] == runs["several"][1]


def run_host(settings: Settings) -> list[Settings]:
    """The lines of transformers' Trainer over the same mixture."""
    recipe = load_recipe(settings)
    tokenizer = load_tokenizer(recipe)
    data = prepare_pairs(recipe, tokenizer, progress=False)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "max_steps", "max_length")
    names += ("max_prompt_length", "logging_steps", "eval_steps", "bf16", "output_dir", "per_device_eval_batch_size")
    values = {name: getattr(recipe, name) for name in names}
    args = SimPOConfig(**values, eval_strategy="steps", report_to=[], save_strategy="no", disable_tqdm=True)
    trainer = SimPOTrainer(recipe.model_name_or_path, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line or "eval_loss" in line]


def test_the_host_of_transformers_writes_the_same_lines(mixture: Settings, two_ranks: Ranks, tmp_path: Path) -> None:
    settings = settings_in(tmp_path, mixture, max_steps=9, eval_steps=3)
    Trainer(load_recipe(settings), display=Display(quiet=True)).run()
    native = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    native = sorted((line for line in native if "eval_saved_loss" not in line), key=lambda line: line["step"])
    one = run_host({**settings, "output_dir": str(tmp_path / "one")})
    halved = {"per_device_train_batch_size": 1, "output_dir": str(tmp_path / "two")}
    two = two_ranks.run(run_host, {**settings, **halved})[0]
    for lines in (one, two):
        for line, ours in zip(lines, native, strict=True):
            assert by_source(line) == pytest.approx(by_source(ours), rel=1e-4, abs=1e-6)
            assert by_source(line)
