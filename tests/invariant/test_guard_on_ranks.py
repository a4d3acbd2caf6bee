"""The guard on two processes, of both hosts: all end together, after the same step, and one of them writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import often
from hf_hosts import read_rows
from mesh_runs import MESHES, final_weights

from simpo.display import Display
from simpo.evaluation.generate import generate_greedy
from simpo.hosts.hf.run import run_recipe
from simpo.model.sampling import choose_tokens, end_tokens
from simpo.recipe import load_recipe
from simpo.run.stopping import StoppedByGuard
from simpo.trainer import Trainer

Settings = dict[str, Any]
ANSWERS = {"num_eval_generations": 3, "eval_generation_max_new_tokens": 3, "eval_on_start": True}
# The rate rises to 3 over the run: the first steps are harmless.
RISING = {
    **{"learning_rate": 1.0, "lr_scheduler_type": "linear", "warmup_steps": 1000, "max_steps": 40, "bf16": False},
    **{"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_dtype": "float32", "device": "cpu", **ANSWERS},
}


def train(host: str, settings: Settings, restarts: int = 0) -> tuple[str, int]:
    """How a run ended on this process: what it said last, and the exit code."""
    recipe = load_recipe(settings)
    launch = {"TORCHELASTIC_RUN_ID": "job 7", "TORCHELASTIC_RESTART_COUNT": str(restarts)}
    try:
        with mock.patch.dict(os.environ, launch):
            if host == "native":
                Trainer(recipe, display=Display(quiet=True)).run()
            else:
                run_recipe(recipe)
    except StoppedByGuard as error:
        return str(error), error.exit_code
    return "finished", 0


@pytest.fixture(params=often(["native dp2", "native fsdp2", "accelerate"], "native dp2"))
def host(request: pytest.FixtureRequest, tiny_recipe: Settings) -> tuple[str, Settings]:
    name, _, mesh = request.param.partition(" ")
    return name, {**tiny_recipe, **RISING, **(MESHES[mesh] if mesh else {}), "gradient_accumulation_steps": 1}


def test_stop_ends_every_process_after_the_same_step(two_ranks: Any, host: tuple[str, Settings]) -> None:
    name, settings = host
    stopped = {**settings, "guard": {"all": "stop", "learning_rate": "off"}}
    one, other = two_ranks.run(train, name, stopped)
    assert one == other
    assert one[1] == 4
    folder = Path(settings["output_dir"])
    (found,) = read_rows(folder / "guard.jsonl")
    assert f"stopped by the guard after step {found['step']} of 40" in one[0]
    lines, answers = read_rows(folder / "metrics.jsonl"), read_rows(folder / "generations.jsonl")
    evaluations = [line["step"] for line in lines if "eval_loss" in line]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, found["step"] + 1))
    assert [answer["step"] for answer in answers] == [step for step in evaluations for _ in range(3)]
    assert two_ranks.run(train, name, stopped, restarts=1) == [one, one], "a launcher's restart is no order to go on"
    assert read_rows(folder / "metrics.jsonl") == lines
    on = {**stopped, "resume_from_checkpoint": True}
    assert two_ranks.run(train, name, on)[0] != one, "a command of its own goes on"
    assert read_rows(folder / "metrics.jsonl")[len(lines) :]


@pytest.mark.long
def test_back_gives_every_process_the_weights_from_before(two_ranks: Any, host: tuple[str, Settings]) -> None:
    name, settings = host
    ended = two_ranks.run(train, name, {**settings, "guard": {"all": "back", "learning_rate": "off"}})
    assert ended == [("finished", 0)] * 2
    folder = Path(settings["output_dir"])
    found, gone = read_rows(folder / "guard.jsonl")
    lines = [line for line in read_rows(folder / "metrics.jsonl") if "eval_loss" in line]
    earlier = {line["step"]: line["eval_loss"] for line in lines if 0 < line["step"] <= found["since_step"] - 2}
    best = min(earlier, key=lambda step: earlier[step])
    assert gone["back_to"] == best
    again = {**settings, "output_dir": str(folder.with_name("short")), "guard": False}
    again |= {"max_steps": best, "eval_strategy": "no", "eval_on_start": False, "num_eval_generations": 0}
    two_ranks.run(train, name, again)
    expected = final_weights(Path(again["output_dir"]))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final_weights(folder).items())


def answer_apart(settings: Settings) -> list[list[int]]:
    """Tokens of a sharded model's samples, where rank 1 by itself would end at once."""
    trainer = Trainer(load_recipe(settings), display=Display(quiet=True))
    first, ends = trainer.mesh.is_main, end_tokens(trainer.tokenizer, None)

    def choose(logprobs: torch.Tensor, *others: Any) -> torch.Tensor:
        return choose_tokens(logprobs, *others) if first else torch.full((len(logprobs),), min(ends))

    with mock.patch("simpo.model.sampling.choose_tokens", choose):
        answers = generate_greedy(trainer.model, trainer.tokenizer, [[5, 6], [7]], max_new_tokens=4, mesh=trainer.mesh)
    return [answer.ids for answer in answers]


def test_all_processes_of_a_sharded_model_sample_the_same_tokens(two_ranks: Any, tiny_recipe: Settings) -> None:
    one, other = two_ranks.run(answer_apart, {**tiny_recipe, **MESHES["fsdp2"], "device": "cpu", "bf16": False})
    assert one == other
    assert [len(ids) for ids in one] == [4, 4]
