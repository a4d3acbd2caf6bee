"""Trap 61: `check` named one unknown key at a time and did not see that a recipe is for SFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from simpo.cli import app
from simpo.recipe import load_recipe


def check(folder: Path, **keys: Any) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "m", **keys}))
    return CliRunner().invoke(app, ["check", str(path)]).output


def test_all_unknown_keys_are_named_each_with_its_nearest_and_what_is_refused_beside_them(tmp_path: Path):
    said = check(tmp_path, lerning_rate=1e-6, bata=2.0, max_lenght=512, fp16=True)
    for wrong, near in (("lerning_rate", "learning_rate"), ("bata", "beta"), ("max_lenght", "max_length")):
        assert f"unknown key '{wrong}': the nearest known key is '{near}'" in said
    assert "fp16 = True: float16 is not supported" in said
    assert len(said.splitlines()) == 1


def test_those_of_the_command_line_too():
    with pytest.raises(ValueError, match=r"'bata'.*'beta'.*'sed'.*'seed'"):
        load_recipe({"model_name_or_path": "m"}, ["--bata", "2", "--sed=1"])


SFT = {"dataset_splits": ["train_sft", "test_sft"], "max_seq_length": 2048, "packing": True}


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (SFT, "an SFT recipe (max_seq_length, packing, dataset_splits train_sft)"),
        ({"stage": "sft"}, "an SFT recipe (stage)"),
        ({"num_generations": 8, "reward_funcs": ["r"]}, "a GRPO recipe (num_generations, reward_funcs)"),
        ({"center_rewards_coefficient": 0.01}, "a reward model's recipe (center_rewards_coefficient)"),
        ({"desirable_weight": 1.0}, "a KTO recipe (desirable_weight)"),
        ({"reference_free": True}, "a DPO recipe (reference_free)"),
    ],
)
def test_a_recipe_for_another_training_is_recognised(keys: dict[str, Any], kind: str, tmp_path: Path):
    assert check(tmp_path, **keys).startswith(f"error: this looks like {kind}, and simpo trains on pairs")


def test_a_dpo_recipe_without_a_wrong_key_is_told_whose_loss_sigmoid_is(tmp_path: Path):
    keys: dict[str, Any] = {"precompute_ref_log_probs": True, "beta": 0.1}
    assert "loss_type sigmoid is SimPO's here; DPO is loss_type: dpo" in check(tmp_path, **keys)
    assert "looks like" not in check(tmp_path, **keys, loss_type="dpo")
    assert "looks like" not in check(tmp_path, precompute_ref_log_probs=False, discopop_tau=None)


def test_settings_far_from_published_ones_are_said_with_the_range_and_its_source(tmp_path: Path):
    usual = {"learning_rate": 6e-7, "global_batch_size": 128}
    assert "warning" not in check(tmp_path, **usual)
    said = check(tmp_path, learning_rate=1e-5, beta=0.1, gamma_beta_ratio=2.0, num_train_epochs=10, max_length=512)
    for name in ("learning_rate = 1e-05", "beta = 0.1", "gamma_beta_ratio = 2", "num_train_epochs = 10", "pairs in an"):
        assert f"warning: {name}" in said
    assert said.count("arXiv:2405.14734") >= 5
    assert "warning" not in check(tmp_path, **usual, loss_type="dpo", beta=0.1)
