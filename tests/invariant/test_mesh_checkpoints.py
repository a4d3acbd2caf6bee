"""Checkpoints on meshes: what was saved on one is what any other loads, and a run goes on from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mesh_runs import (
    FOUR,
    LORA,
    TIED,
    TWO,
    UNTIED,
    Settings,
    assert_equal_bits,
    assert_same_run,
    error_of,
    final_weights,
    load_and_save_again,
    losses,
    resume_and_step,
    run,
    train_and_save,
)

from simpo.run.checkpoint import list_checkpoints


def check_reshards(
    source: str, targets: tuple[str, ...], shape: Settings, on_mesh: Any, settings_of: Any, **keys: Any
) -> None:
    """Saved on one mesh after two steps and loaded on others: every bit, and the same digest, on every rank."""
    answers = on_mesh(source, train_and_save, settings_of(source, shape, **keys), 2)
    saved = answers[0]
    assert {answer["fingerprint"] for answer in answers} == {saved["fingerprint"]}, "the ranks' copies differ"
    moments = {name.rpartition(" ")[2] for name in saved["state"] if " " in name}
    assert moments == {"exp_avg", "exp_avg_sq", "step"}
    assert all(float(value) == 2 for name, value in saved["state"].items() if name.endswith(" step"))
    for target in targets:
        settings = settings_of(target, shape, name=f"on-{target}", **keys)
        loaded = on_mesh(target, load_and_save_again, settings, saved["folder"])
        assert_equal_bits(loaded[0]["state"], saved["state"])
        for answer in loaded:
            assert answer["fingerprint"] == saved["fingerprint"]
            assert answer["digest"] == saved["digest"]
            assert answer["step"] == 2


@pytest.mark.parametrize("source", TWO)
def test_saved_on_two_processes_or_one_loads_on_any_of_their_meshes(source, on_mesh, settings_of):
    check_reshards(source, TWO, TIED, on_mesh, settings_of)


@pytest.mark.parametrize(
    ("source", "targets"), [("1 process", ("tp2",)), ("tp2", ("1 process", "fsdp2")), ("fsdp2", ("tp2",))]
)
def test_an_untied_head_and_biases_load_on_another_mesh(source, targets, on_mesh, settings_of):
    check_reshards(source, targets, UNTIED, on_mesh, settings_of)


@pytest.mark.parametrize("source", ["fsdp2", "tp2", "cp2"])
def test_adapters_saved_on_a_mesh_load_on_one_process_and_back(source, on_mesh, settings_of):
    check_reshards(source, ("1 process", "tp2", "fsdp2"), TIED, on_mesh, settings_of, **LORA)


@pytest.mark.parametrize("source", ["fsdp2", "tp2"])
def test_bfloat16_moments_load_on_another_mesh(source, on_mesh, settings_of):
    keys = {"optim": "adamw_bf16"}
    check_reshards(source, ("1 process", "tp2", "fsdp2"), UNTIED, on_mesh, settings_of, **keys)


@pytest.mark.four_processes
@pytest.mark.parametrize("source", FOUR)
def test_saved_on_four_processes_loads_on_fewer(source, on_mesh, settings_of):
    check_reshards(source, (source, "1 process", "fsdp2", "tp2"), TIED, on_mesh, settings_of)


@pytest.mark.four_processes
@pytest.mark.parametrize("source", ["fsdp2 x tp2", "dp2 x tp2"])
def test_adapters_saved_on_four_processes_load_on_fewer(source, on_mesh, settings_of):
    check_reshards(source, (source, "1 process", "fsdp2", "tp2"), UNTIED, on_mesh, settings_of, **LORA)


@pytest.mark.four_processes
@pytest.mark.parametrize("target", FOUR)
def test_saved_on_one_process_loads_on_four(target, on_mesh, settings_of):
    check_reshards("1 process", (target,), TIED, on_mesh, settings_of)


# --- the run goes on -------------------------------------------------------------------------------------------------

STEPS = {"max_steps": 6, "save_steps": 100, "eval_steps": 2, "learning_rate": 2e-4, "warmup_ratio": 0.0}


@pytest.mark.parametrize(
    ("before", "after"),
    [("fsdp2", "1 process"), ("1 process", "tp2"), ("tp2", "fsdp2"), ("cp2", "dp2"), ("dp2", "cp2")],
)
def test_a_run_resumed_on_another_mesh_goes_on_as_if_on_one_process(before, after, on_mesh, settings_of, tmp_path):
    run(settings_of("1 process", TIED, name="alone", **STEPS))
    assert set(on_mesh(before, run, settings_of(before, TIED, name="moved", **STEPS), stop_after=3)) == {"interrupted"}
    settings = settings_of(after, TIED, name="moved", **STEPS, resume_from_checkpoint=True)
    assert set(on_mesh(after, run, settings)) == {"finished"}
    alone, moved = losses(tmp_path / "alone"), losses(tmp_path / "moved")
    assert list(moved) == list(alone) == [1, 2, 3, 4, 5, 6]
    assert moved == pytest.approx(alone, rel=1e-5)
    ours, theirs = final_weights(tmp_path / "moved"), final_weights(tmp_path / "alone")
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-4), name


def test_another_number_of_pairs_in_a_step_is_refused_with_what_to_change(on_mesh, settings_of):
    saved = on_mesh("fsdp2", train_and_save, settings_of("fsdp2", TIED), 1)[0]["folder"]
    changed = settings_of("fsdp2", TIED, name="changed", gradient_accumulation_steps=2)
    alone = settings_of("1 process", TIED, name="alone", per_device_train_batch_size=2)
    for mesh, settings, pairs in (("fsdp2", changed, 8), ("1 process", alone, 2)):
        for kind, text in on_mesh(mesh, error_of, settings, saved):
            assert kind == "ValueError"
            assert f"the pairs in an optimizer step (was 4, is {pairs}" in text
            assert "change gradient_accumulation_steps to match" in text
            assert "\n" not in text


SAME: dict[str, tuple[str, Settings]] = {
    "fsdp2": ("fsdp2", {}),
    "tp2": ("tp2", {}),
    "cp2": ("cp2", {}),
    "dp2": ("dp2", {}),
    "fsdp2 bf16": ("fsdp2", {"bf16": True}),
    "fsdp2 bf16 moments": ("fsdp2", {"optim": "adamw_bf16"}),
    "fsdp2 LoRA with dropout": ("fsdp2", {**LORA, "lora_dropout": 0.2, "disable_dropout": False}),
    "tp2 LoRA with dropout": ("tp2", {**LORA, "lora_dropout": 0.2, "disable_dropout": False}),
}


@pytest.mark.parametrize("case", SAME)
def test_a_run_stopped_and_resumed_on_its_mesh_ends_in_the_same_bits(case, on_mesh, settings_of, tmp_path):
    mesh, keys = SAME[case]
    keys = {"max_steps": 6, "save_steps": 100, "eval_steps": 4, "logging_steps": 2, **keys}
    on_mesh(mesh, run, settings_of(mesh, TIED, name="whole", **keys))
    assert set(on_mesh(mesh, run, settings_of(mesh, TIED, name="cut", **keys), stop_after=3)) == {"interrupted"}
    assert [c.step for c in list_checkpoints(tmp_path / "cut" / "checkpoints")] == [3]
    on_mesh(mesh, run, settings_of(mesh, TIED, name="cut", **keys, resume_from_checkpoint=True))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_ranks_that_drop_alike_still_do_after_ranks_that_did_not(on_mesh, settings_of):
    """Both meshes have two processes; random states are of ranks that see other pairs on one, the same on the other."""
    keys = {**LORA, "lora_dropout": 0.2, "disable_dropout": False}
    saved = on_mesh("fsdp2", train_and_save, settings_of("fsdp2", TIED, **keys), 1)[0]["folder"]
    answers = on_mesh("tp2", resume_and_step, settings_of("tp2", TIED, name="tp", **keys), saved)
    assert answers[0]["fingerprint"] == answers[1]["fingerprint"]
