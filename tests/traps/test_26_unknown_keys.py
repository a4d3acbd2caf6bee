"""Trap 26: a hidden default, because a misspelt key or override was ignored."""

from __future__ import annotations

import pytest

from simpo.recipe import load_recipe


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("gamma_beta_ration", "gamma_beta_ratio"),
        ("learnign_rate", "learning_rate"),
        ("max_lenght", "max_length"),
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("simpo-betta", "simpo_beta"),
        ("Beta", "beta"),
    ],
)
def test_a_misspelt_key_is_an_error_with_the_nearest_one(wrong, meant):
    with pytest.raises(ValueError, match=f"unknown key .*{meant}.*simpo keys"):
        load_recipe({"model_name_or_path": "m", wrong: 1})
    with pytest.raises(ValueError, match=f"unknown key .*{meant}"):
        load_recipe({"model_name_or_path": "m"}, [f"--{wrong}", "1"])
    with pytest.raises(ValueError, match=f"unknown key .*{meant}"):
        load_recipe({"model_name_or_path": "m"}, {wrong: 1})


def test_a_key_known_elsewhere_is_accepted_and_said_so_once():
    recipe = load_recipe({"model_name_or_path": "m", "dataloader_num_workers": 4}, ["--ddp_backend", "1800"])
    assert [notice.split(":")[0] for notice in recipe.notices] == ["dataloader_num_workers", "ddp_backend"]


def test_no_override_goes_unread():
    with pytest.raises(ValueError, match="unexpected"):
        load_recipe({"model_name_or_path": "m"}, ["--beta", "3", "0.5"])
