"""Checkpoints on meshes: what was saved on one is what any other loads, and a run goes on from it."""

from __future__ import annotations

import itertools
import shutil
from typing import Any

import pytest
import torch
from cases import often, rarely
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


def check_reshards(loaded_on: dict[str, tuple[str, ...]], shape: Settings, on_mesh: Any, settings_of: Any, **keys: Any):
    """Saved on meshes after two steps and loaded on others: every bit, and the same digest, on every rank.

    Args:
        loaded_on: for each mesh that loads, those whose checkpoints it does.
    """
    saved: dict[str, dict[str, Any]] = {}
    for source in dict.fromkeys(itertools.chain(*loaded_on.values())):
        answers = on_mesh(source, train_and_save, settings_of(source, shape, **keys), 2)
        assert {answer["fingerprint"] for answer in answers} == {answers[0]["fingerprint"]}, "the ranks' copies differ"
        state = answers[0]["state"]
        assert {name.rpartition(" ")[2] for name in state if " " in name} == {"exp_avg", "exp_avg_sq", "step"}
        assert all(float(value) == 2 for name, value in state.items() if name.endswith(" step"))
        saved[source] = answers[0]
    for target, sources in loaded_on.items():
        settings = settings_of(target, shape, name=f"on-{target}", **keys)
        ranks = on_mesh(target, load_and_save_again, settings, *(saved[source]["folder"] for source in sources))
        for index, source in enumerate(sources):
            assert_equal_bits(ranks[0][index]["state"], saved[source]["state"])
            expected = {"fingerprint": saved[source]["fingerprint"], "step": 2}
            if index == len(sources) - 1:  # these bits are the others' too
                expected["digest"] = saved[source]["digest"]
            for answers in ranks:
                found = {name: value for name, value in answers[index].items() if name != "state"}
                assert found == expected, f"saved on {source}, loaded on {target}"


@pytest.mark.long
def test_saved_on_two_processes_or_one_loads_on_any_of_their_meshes(on_mesh, settings_of):
    check_reshards(dict.fromkeys(TWO, TWO), TIED, on_mesh, settings_of)


def test_saved_on_each_mesh_of_two_processes_loads_on_another(on_mesh, settings_of):
    loaded_on = {"fsdp2": ("tp2",), "1 process": ("dp2", "cp2")}
    check_reshards(loaded_on, TIED, on_mesh, settings_of)


@pytest.mark.long
def test_an_untied_head_and_biases_load_on_another_mesh(on_mesh, settings_of):
    loaded_on = {"1 process": ("tp2",), "tp2": ("1 process", "fsdp2"), "fsdp2": ("tp2",)}
    check_reshards(loaded_on, UNTIED, on_mesh, settings_of)


FEW = {"1 process": ("fsdp2",), "tp2": ("fsdp2",), "fsdp2": ("tp2",)}
ALL = dict.fromkeys(FEW, ("fsdp2", "tp2", "cp2"))


@pytest.mark.parametrize("loaded_on", [rarely(FEW), rarely(ALL)], ids=["some", "all"])
def test_adapters_saved_on_a_mesh_load_on_one_process_and_back(loaded_on, on_mesh, settings_of):
    check_reshards(loaded_on, TIED, on_mesh, settings_of, **LORA)


@pytest.mark.long
def test_bfloat16_moments_load_on_another_mesh(on_mesh, settings_of):
    loaded_on = dict.fromkeys(("1 process", "tp2", "fsdp2"), ("fsdp2", "tp2"))
    check_reshards(loaded_on, UNTIED, on_mesh, settings_of, optim="adamw_bf16")


@pytest.mark.four_processes
def test_saved_on_four_processes_loads_on_fewer_and_on_as_many_what_one_saved(on_mesh, settings_of):
    loaded_on = {mesh: (mesh, "1 process") for mesh in FOUR} | dict.fromkeys(("1 process", "fsdp2", "tp2"), FOUR)
    check_reshards(loaded_on, TIED, on_mesh, settings_of)


@pytest.mark.four_processes
def test_adapters_saved_on_four_processes_load_on_fewer(on_mesh, settings_of):
    sources = ("fsdp2 x tp2", "dp2 x tp2")
    loaded_on = {mesh: (mesh,) for mesh in sources} | dict.fromkeys(("1 process", "fsdp2", "tp2"), sources)
    check_reshards(loaded_on, UNTIED, on_mesh, settings_of, **LORA)


# --- the run goes on -------------------------------------------------------------------------------------------------

STEPS = {"max_steps": 6, "save_steps": 100, "eval_steps": 2, "learning_rate": 2e-4, "warmup_ratio": 0.0}


SOME = {"fsdp2": "1 process", "cp2": "tp2"}
OTHERS = {"1 process": "tp2", "tp2": "fsdp2", "cp2": "dp2", "dp2": "cp2"}


@pytest.mark.parametrize("moves", [SOME, rarely(OTHERS)], ids=["some", "others"])
def test_a_run_stopped_and_resumed_on_another_mesh_goes_on_as_if_on_one_process(moves, on_mesh, settings_of, tmp_path):
    run(settings_of("1 process", TIED, name="alone", **STEPS))
    alone, expected = losses(tmp_path / "alone"), final_weights(tmp_path / "alone")
    assert list(alone) == [1, 2, 3, 4, 5, 6]
    for before, after in moves.items():
        moved = tmp_path / f"from-{before}"
        settings = settings_of(before, TIED, name=moved.name, **STEPS)
        assert set(on_mesh(before, run, settings, stop_after=3)) == {"interrupted"}
        settings = settings_of(after, TIED, name=moved.name, **STEPS, resume_from_checkpoint=True)
        assert set(on_mesh(after, run, settings)) == {"finished"}
        assert losses(moved) == pytest.approx(alone, rel=1e-5), (before, after)
        weights = final_weights(moved)
        for name, tensor in expected.items():
            assert torch.allclose(weights[name], tensor, atol=1e-4), (before, after, name)


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
    "fsdp2 bf16, bf16 moments": ("fsdp2", {"bf16": True, "optim": "adamw_bf16"}),
    "fsdp2 LoRA with dropout": ("fsdp2", {**LORA, "lora_dropout": 0.2, "disable_dropout": False}),
    "tp2 LoRA with dropout": ("tp2", {**LORA, "lora_dropout": 0.2, "disable_dropout": False}),
}


@pytest.mark.parametrize("case", often(SAME, "fsdp2"))
def test_a_run_resumed_on_its_mesh_ends_in_the_same_bits(case, on_mesh, settings_of, tmp_path):
    """From the checkpoint of step 3, as after a kill at the end: in the midst of what is logged and of an epoch."""
    mesh, keys = SAME[case]
    keys = {"max_steps": 6, "save_steps": 3, "eval_steps": 4, "logging_steps": 2, **keys}
    on_mesh(mesh, run, settings_of(mesh, TIED, name="whole", **keys))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    step_3 = str(tmp_path / "cut" / "checkpoints" / "step-3")
    on_mesh(mesh, run, settings_of(mesh, TIED, name="cut", **keys, resume_from_checkpoint=step_3))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert (tmp_path / "cut" / "checkpoints" / "_superseded-1" / "step-6").is_dir()  # it was done again


def test_ranks_that_drop_alike_still_do_after_ranks_that_did_not(on_mesh, settings_of):
    """Both meshes have two processes; random states are of ranks that see other pairs on one, the same on the other."""
    keys = {**LORA, "lora_dropout": 0.2, "disable_dropout": False}
    saved = on_mesh("fsdp2", train_and_save, settings_of("fsdp2", TIED, **keys), 1)[0]["folder"]
    answers = on_mesh("tp2", resume_and_step, settings_of("tp2", TIED, name="tp", **keys), saved)
    assert answers[0]["fingerprint"] == answers[1]["fingerprint"]
