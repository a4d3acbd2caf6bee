"""Trap 13: "simpo" that silently adds a supervised term of weight 1, or takes beta 0.1 from another loss."""

from __future__ import annotations

import pytest

from simpo.recipe import load_recipe


@pytest.mark.parametrize("name", [None, "simpo", "sigmoid"])
def test_simpo_means_the_papers_loss_and_nothing_added(name):
    chosen = {} if name is None else {"loss_type": name}
    recipe = load_recipe({"model_name_or_path": "m", **chosen})
    assert (recipe.loss_type, recipe.beta, recipe.gamma_beta_ratio, recipe.sft_weight) == ("sigmoid", 2.0, 0.5, 0.0)
    assert recipe.label_smoothing == 0.0


def test_a_supervised_term_is_there_only_where_the_loss_has_one_or_it_is_asked_for():
    assert load_recipe({"model_name_or_path": "m", "loss_type": "cpo_simpo"}).sft_weight == 1.0
    assert load_recipe({"model_name_or_path": "m", "loss_type": "cpo_simpo", "sft_weight": 0}).sft_weight == 0.0
    assert load_recipe({"model_name_or_path": "m", "cpo_alpha": 0.1}).sft_weight == 0.1


def test_switching_the_loss_switches_its_defaults():
    recipe = load_recipe({"model_name_or_path": "m", "loss_type": "cpo"})
    assert (recipe.beta, recipe.sft_weight) == (0.1, 1.0)
    back = load_recipe(recipe, {"loss_type": "simpo"})
    assert (back.beta, back.gamma_beta_ratio, back.sft_weight) == (2.0, 0.5, 0.0)
