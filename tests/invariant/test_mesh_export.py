"""The final model from any mesh is one that everybody loads, and no different from one process's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import rarely
from mesh_runs import LORA, TIED, UNTIED, Settings, assert_equal_bits, final_weights, metrics, run, whole_state
from mesh_runs import build as build_trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from simpo.run.saved import list_checkpoints

KEYS = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "warmup_ratio": 0.0}
TRACES = ("distributed", "FSDP", "fsdp", "mesh", "tp_plan", "tp_size", "DTensor", "LogprobHead")


def train_and_export(settings: Settings) -> dict[str, Tensor] | None:
    """A whole run; the weights that were trained, put together from the live model."""
    trainer = build_trainer(settings)
    trainer.run()
    state = whole_state(trainer)
    trainer.mesh.barrier()
    return {name: value for name, value in state.items() if " " not in name} if trainer.mesh.is_main else None


SHAPES = pytest.mark.parametrize(
    ("shape", "keys"),
    [(TIED, {}), (TIED, LORA), (UNTIED, {}), (UNTIED, LORA)],
    ids=["tied", "tied LoRA", "untied", "untied LoRA"],
)


@pytest.mark.parametrize(
    ("shape", "keys"),
    [rarely(TIED, {}), (TIED, LORA), (UNTIED, {}), rarely(UNTIED, LORA)],
    ids=["tied", "tied LoRA", "untied", "untied LoRA"],
)
def test_plain_libraries_load_what_a_mesh_exports(shape, keys, on_mesh, settings_of, tmp_path):
    check_exports(("fsdp2", "tp2", "cp2"), shape, keys, on_mesh, settings_of, tmp_path)


@pytest.mark.four_processes
@SHAPES
def test_plain_libraries_load_what_four_processes_export(shape, keys, on_mesh, settings_of, tmp_path):
    check_exports(("fsdp2 x tp2",), shape, keys, on_mesh, settings_of, tmp_path)


def check_exports(
    meshes: tuple[str, ...], shape: Settings, keys: Settings, on_mesh: Any, settings_of: Any, folder: Path
) -> None:
    """What each mesh exports is what one process does, and what was trained."""
    alone = settings_of("1 process", shape, name="alone", **KEYS, **keys)
    train_and_export(alone)
    theirs = folder / "alone" / "model"
    for mesh in meshes:
        expected = on_mesh(mesh, train_and_export, settings_of(mesh, shape, name=mesh, **KEYS, **keys))[0]
        ours = folder / mesh / "model"
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        for path in ours.glob("*.json"):
            assert _parsed(path) == _parsed(theirs / path.name), path.name
            assert not [trace for trace in TRACES if trace in path.read_text(encoding="utf-8")]
        assert_same_tensors_as(theirs, ours)
        loaded = _load(ours, alone["model_name_or_path"] if keys else None)
        if not keys:
            config = json.loads((ours / "config.json").read_text(encoding="utf-8"))
            assert config["architectures"] == [type(loaded).__name__] == ["LlamaForCausalLM"]
            assert config["dtype"] == "float32"
            assert config["tie_word_embeddings"] == shape.get("tie_word_embeddings", False)
        weights = dict(loaded.named_parameters())
        assert {name for name in expected if name not in weights} == set()
        for name, weight in expected.items():
            assert torch.equal(weights[name], weight), (mesh, name)
        assert torch.isfinite(loaded(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


def _load(folder: Path, base: str | None) -> torch.nn.Module:
    """An exported model, or its adapters on their base, by transformers and peft."""
    model = AutoModelForCausalLM.from_pretrained(base or folder)
    if base is None:
        return model
    from peft import PeftModel

    with warnings.catch_warnings():  # peft 0.21 reads an attribute that transformers 5.23 renamed
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, folder)


def assert_same_tensors_as(one: Path, other: Path) -> None:
    """The same names, shapes and dtypes in the files; the values of two meshes differ in their last bits."""
    found, expected = final_weights(other.parent), final_weights(one.parent)
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}


def _parsed(path: Path) -> Any:
    """peft writes a set's members, in no order."""
    parsed = json.loads(path.read_text(encoding="utf-8"))
    if "target_modules" in parsed:
        parsed["target_modules"] = sorted(parsed["target_modules"])
    return parsed


def train_in_bf16(settings: Settings) -> dict[str, Any]:
    """A whole run; the live weights before and after it, whole, and its evaluations."""
    trainer = build_trainer(settings)
    before = whole_state(trainer)
    result = trainer.run()
    after = {name: value for name, value in whole_state(trainer).items() if " " not in name}
    trainer.mesh.barrier()
    return {"before": before, "after": after, "metrics": result.metrics, "saved": result.saved_metrics}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_gathered_in_bf16_keep_their_masters_and_are_evaluated_as_saved(dtype, two_ranks, settings_of, tmp_path):
    """Steps of 1e-6, which bf16 cannot tell apart."""
    small = {"bf16": True, "learning_rate": 1e-6, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_steps": 4}
    keys = {**small, "save_strategy": "no", "save_dtype": dtype}
    outcome, other = two_ranks.run(train_in_bf16, settings_of("fsdp2", TIED, name="run", **keys))
    written = getattr(torch, dtype)
    assert_equal_bits(
        final_weights(tmp_path / "run"),
        {name: value.to(written) for name, value in outcome["after"].items() if name != "lm_head.weight"},
    )
    moved = torch.cat([(after - outcome["before"][name]).flatten() for name, after in outcome["after"].items()])
    assert (moved != 0).float().mean() > 0.9
    assert moved.abs().max() < 1e-5
    assert outcome["saved"] == other["saved"]
    if dtype == "float32":
        assert outcome["saved"] == {}
        return
    keys |= {"model_name_or_path": str(tmp_path / "run" / "model"), "bf16": False}
    expected = build_trainer(settings_of("1 process", TIED, name="again", **keys)).evaluate()
    assert outcome["saved"]["eval_saved_loss"] == pytest.approx(expected["eval_loss"], abs=2e-2)  # computed in bf16
    assert outcome["saved"]["eval_saved_pairs"] == expected["eval_pairs"]


def weights_of(settings: Settings, checkpoint: str) -> dict[str, Tensor]:
    trainer = build_trainer({**settings, "resume_from_checkpoint": checkpoint})
    return {name: value for name, value in whole_state(trainer).items() if " " not in name}


@pytest.mark.parametrize("in_background", [rarely(False), True], ids=["saved at once", "saved in the background"])
def test_the_best_checkpoint_is_the_final_model_of_a_sharded_run(in_background, two_ranks, settings_of, tmp_path):
    keys = {
        **{"max_steps": 8, "save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1},
        **{"metric_for_best_model": "eval_loss", "greater_is_better": True, "async_save": in_background},
    }
    two_ranks.run(run, settings_of("fsdp2", TIED, name="run", **keys))
    evaluations = {line["step"]: line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line}
    best = max(evaluations, key=evaluations.get)
    assert best < 8, evaluations  # the worst, so early: this run learns
    kept = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [c.step for c in kept] == [best, 8]
    settings = settings_of("1 process", TIED, name="loaded", **{**keys, "async_save": False})
    exported = final_weights(tmp_path / "run")
    expected = weights_of(settings, str(kept[0].folder))
    assert_equal_bits(exported, {name: value for name, value in expected.items() if name in exported})
