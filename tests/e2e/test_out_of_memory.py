"""Out of memory in a step: the same update again in smaller micro-batches, said once, nothing lost.

Memory is a number of tokens here: what is larger raises as CUDA's allocator does, wherever a test wants it to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from cases import rarely

from simpo.display import Display
from simpo.parallel.mesh import MeshSizes
from simpo.recipe import load_recipe
from simpo.run import checkpoint as checkpoints
from simpo.run.stopping import OutOfMemory, missing_memory
from simpo.trainer import Trainer

Settings = dict[str, Any]
MESSAGE = "CUDA out of memory. Tried to allocate 2.31 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1 is free."
LORA = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.3}


class Spoken(Display):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def build(recipe: Settings, **changes: Any) -> Trainer:
    return Trainer(load_recipe({**recipe, **changes}), display=Spoken())


@pytest.fixture
def big_steps(tiny_recipe: Settings) -> Settings:
    """Eight pairs a step in one micro-batch; five steps."""
    changes = {"per_device_train_batch_size": 8, "eval_strategy": "no", "save_steps": 2, "logging_steps": 1}
    settings = {**tiny_recipe, **changes}
    del settings["gradient_accumulation_steps"], settings["eval_steps"]
    return settings


def test_a_model_that_does_not_fit_is_said_with_the_keys_that_need_less(
    tiny_recipe: Settings, monkeypatch: Any
) -> None:
    monkeypatch.setattr("simpo.trainer.load_model", Mock(side_effect=torch.OutOfMemoryError(MESSAGE)))
    with pytest.raises(
        OutOfMemory, match=r"loading the model: out of memory \(2.31 GiB more.*; use_peft: true, master_"
    ):
        build(tiny_recipe)


def hold(trainer: Trainer, tokens: int, where: str) -> list[int]:
    """Let this trainer's memory hold so many tokens in one micro-batch; returns where the sizes that failed are kept.

    where: forward, backward, or recomputing (in the backward pass, by gradient checkpointing).
    """
    forward, failed, size = trainer.forward, [], [0]

    def check() -> None:
        if size[0] > tokens:
            failed.append(size[0])
            raise torch.OutOfMemoryError(MESSAGE)

    def limited(micro_batch: Any, plan: Any, **options: Any) -> Any:
        size[0] = micro_batch.num_tokens
        losses, sums = forward(micro_batch, plan, **options)
        if where == "forward":  # with everything computed and kept
            check()
        if where == "backward":
            losses.register_hook(lambda gradient: check())
        return losses, sums

    def within_backward(module: Any, args: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            check()

    trainer.forward = limited
    if where == "recomputing":
        next(m for m in trainer.model.modules() if type(m).__name__.endswith("MLP")).register_forward_pre_hook(
            within_backward
        )
    return failed


def lines_of(folder: Path) -> list[Settings]:
    """metrics.jsonl without what no two runs have in common."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("_s", "memory_gib"))} for line in lines]


def assert_same(one: Trainer, other: Trainer) -> None:
    for (name, weight), expected in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(weight, expected), name
    assert lines_of(one.output_dir) == lines_of(other.output_dir)


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ("forward", LORA),
        rarely("backward", LORA),
        ("backward", {"optim": "adamw_bf16", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        rarely("recomputing", {**LORA, "gradient_checkpointing": True}),
    ],
    ids=["forward", "backward", "of the second micro-batch", "recomputing"],
)
def test_a_run_that_ran_out_is_the_run_that_had_less_from_the_start(
    where: str, keys: Settings, big_steps: Settings, tmp_path: Path
) -> None:
    trainer = build(big_steps, **keys)
    first = next(trainer.loader.plans(0, 1))
    sizes = [int(trainer.loader.store.tokens[list(items)].sum()) for items in first.micro_batches]
    room = min(sizes) - 1 if len(sizes) > 1 else sizes[0] // 2 + 40
    failed = hold(trainer, room, where)
    if len(sizes) > 1:  # fail on the last one, when the gradient of the first is there
        trainer.loader.micro_batches = reversed_order(trainer.loader.micro_batches)
    trainer.run()
    assert failed
    limit = trainer.loader.max_tokens
    assert limit == max(sizes) // 2
    said = [line for line in trainer.display.lines if "out of memory" in line]
    assert len(said) == len(failed)
    assert said[0].startswith(f"step 1: out of memory in micro-batches of up to {max(sizes):,} tokens (2.31 GiB more")
    less = build(big_steps, **keys, max_tokens_per_micro_batch=limit, output_dir=str(tmp_path / "less"))
    if len(sizes) > 1:
        less.loader.micro_batches = reversed_order(less.loader.micro_batches)
    less.run()
    assert_same(trainer, less)
    state = checkpoints.read_state(checkpoints.list_checkpoints(trainer.checkpoint_dir)[-1])
    assert state["max_tokens_per_micro_batch"] == limit


def reversed_order(micro_batches: Callable[..., Any]) -> Callable[..., Any]:
    """The same micro-batches, the smallest first."""

    def changed(plan: Any) -> Any:
        found = sorted(micro_batches(plan), key=lambda each: each.num_tokens)
        assert found[-1].num_tokens > found[0].num_tokens or len(found) > 2
        return iter(found)

    return changed


def test_it_may_happen_again_and_a_resumed_run_remembers(big_steps: Settings, tmp_path: Path) -> None:
    trainer = build(big_steps)
    tokens = trainer.loader.store.tokens
    failed = hold(trainer, int(tokens.max()) + 10, "backward")
    values = [trainer.train_step(plan) for plan in trainer.loader.plans(0, 2)]
    assert len(failed) >= 2
    limit = trainer.loader.max_tokens
    trainer.save()
    resumed = build(big_steps, resume_from_checkpoint=True)
    assert resumed.loader.max_tokens == limit
    hold(resumed, int(tokens.max()) + 10, "backward")
    later = [resumed.train_step(plan)["loss"] for plan in resumed.loader.plans(2, 5)]
    assert later == [trainer.train_step(plan)["loss"] for plan in trainer.loader.plans(2, 5)]
    assert all(value["pairs_per_s"] > 0 for value in values)
    # What a recipe asks for now wins over what was found out then.
    asked = build(big_steps, resume_from_checkpoint=True, max_tokens_per_micro_batch=500)
    assert asked.loader.max_tokens == 500


def test_a_later_pair_that_is_longer_than_the_limit_gets_a_micro_batch_of_its_own(big_steps: Settings) -> None:
    trainer = build(big_steps)
    tokens = trainer.loader.store.tokens
    trainer.loader.limit_tokens(int(tokens.min()) + 1, even_below_a_pair=True)
    plans = list(trainer.loader.plans(0, 5))
    assert sorted(i for plan in plans for items in plan.micro_batches for i in items) == list(range(len(tokens)))
    for plan in plans:
        step = [i for items in plan.micro_batches for i in items]
        assert all(tokens[list(items)].sum() <= tokens[step].max() for items in plan.micro_batches)


@pytest.mark.parametrize("keys", [{"pack": False}, {"pack": False, "share_prompt": False}], ids=["shared", "ordinary"])
def test_padded_rows_are_split_too(keys: Settings, big_steps: Settings, tmp_path: Path) -> None:
    trainer = build(big_steps, **keys)
    plan = next(trainer.loader.plans(0, 1))
    (micro_batch,) = trainer.loader.micro_batches(plan)
    failed = hold(trainer, micro_batch.num_tokens * 2 // 3, "backward")
    values = trainer.train_step(plan)
    assert failed
    assert "max_tokens" not in trainer.display.lines[-1]
    whole = build(big_steps, **keys, output_dir=str(tmp_path / "whole"))
    expected = whole.train_step(next(whole.loader.plans(0, 1)))
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert values[name] == pytest.approx(expected[name], rel=1e-4)


def test_one_pair_that_is_too_much_ends_in_one_line_and_changes_nothing(big_steps: Settings) -> None:
    trainer = build(big_steps)
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    hold(trainer, 0, "backward")
    with pytest.raises(OutOfMemory, match=r"step 1: out of memory .* one pair alone.*gradient_checkpointing") as error:
        trainer.run()
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.progress.step == 0


def test_one_of_several_processes_stops_and_says_what_to_set(big_steps: Settings) -> None:
    trainer = build(big_steps)
    plan = next(trainer.loader.plans(0, 1))
    size = int(trainer.loader.store.tokens[list(plan.micro_batches[0])].sum())
    hold(trainer, size // 2 + 40, "forward")
    trainer.mesh.sizes, trainer.mesh.rank = MeshSizes(dp_replicate=2), 1
    wanted = (
        rf"^rank 1, step 1: out of memory in micro-batches of up to {size:,} .*max_tokens_per_micro_batch: {size // 2}"
    )
    with pytest.raises(OutOfMemory, match=wanted) as error:
        trainer.train_step(plan)
    assert "--resume_from_checkpoint true" in str(error.value)
    assert "\n" not in str(error.value)


def test_evaluation_and_samples_say_which_key_to_lower(big_steps: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(big_steps, num_eval_generations=1)
    hold(trainer, 0, "forward")
    with pytest.raises(OutOfMemory, match=r"evaluation: out of memory \(2.31 GiB .* lower per_device_eval_batch_size"):
        trainer.evaluate()

    def too_much(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr("simpo.evaluation.generate.sample_responses", too_much)
    with pytest.raises(OutOfMemory, match="lower num_eval_generations or eval_generation_max_new_tokens"):
        trainer._generate_samples()


def test_want_of_memory_in_an_evaluation_loses_no_step_and_what_is_advised_can_be_changed(
    big_steps: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**big_steps, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 2}
    trainer = build(settings)
    evaluate = trainer.evaluate

    def too_much(**options: Any) -> dict[str, float]:
        hold(trainer, 0, "forward")
        return evaluate(**options)

    monkeypatch.setattr(trainer, "evaluate", too_much)
    with pytest.raises(OutOfMemory, match=r"lower per_device_eval_batch_size\. Saved .*step-3, to resume with "):
        trainer.run()
    advised = {"per_device_eval_batch_size": 1, "gradient_checkpointing": True, "logits_chunk_size": 8}
    result = build(settings, **advised, resume_from_checkpoint=True).run()
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 5], "what could not be done is made up for"


def test_the_optimizers_own_want_of_memory_is_one_line(big_steps: Settings) -> None:
    trainer = build(big_steps)

    def too_much() -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    trainer.optimizer.step = too_much
    with pytest.raises(OutOfMemory, match=r"step 1: updating the weights: out of memory .* adamw_bf16"):
        trainer.run()


def test_other_errors_are_left_alone(big_steps: Settings) -> None:
    trainer = build(big_steps)

    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("shapes do not fit")

    trainer.forward = broken
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        trainer.run()


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "some allocation failed"),
        ("ncclUnhandledCudaError: Last error:\nCuda failure 2 'out of memory'", "some allocation failed"),
        ("ncclUnhandledCudaError: Last error:\nFailed to CUDA calloc async 4 bytes", "some allocation failed"),
        ("ncclUnhandledCudaError: Last error:\nFailed to CUDA malloc 4 bytes", "some allocation failed"),
        ("ncclUnhandledCudaError: Last error:\nCuda failure 1 'invalid argument'", None),
        (
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
            "8589934592 bytes. Error code 12 (Cannot allocate memory)",
            "8589934592 bytes more were asked for",
        ),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_want_of_memory_has_other_names_too(text: str, missing: str | None) -> None:
    assert missing_memory(RuntimeError(text)) == missing
