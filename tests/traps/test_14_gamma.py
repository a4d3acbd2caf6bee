"""Trap 14: gamma taken for gamma / beta, or the reverse. Both names exist, never together; what acts is printed."""

from __future__ import annotations

import math

import pytest
from typer.testing import CliRunner

from simpo.cli import app
from simpo.recipe import load_recipe


def recipe(overrides=None, **values):
    return load_recipe({"model_name_or_path": "m", **values}, overrides)


def test_gamma_and_its_ratio_to_beta_say_the_same_thing():
    assert recipe(beta=2.5, gamma=1.375) == recipe(beta=2.5, gamma_beta_ratio=0.55)
    assert recipe(beta=10, gamma_beta_ratio=0.3).gamma == pytest.approx(3.0)
    assert recipe(beta=10, gamma=3).gamma_beta_ratio == pytest.approx(0.3)


def test_gamma_is_divided_by_the_beta_that_acts():
    assert recipe(gamma=1.6).gamma_beta_ratio == pytest.approx(0.8)  # beta is 2 by default
    assert recipe({"beta": 4}, gamma=1.6).gamma_beta_ratio == pytest.approx(0.4)


@pytest.mark.parametrize("gamma", ["gamma", "simpo_gamma"])
@pytest.mark.parametrize("ratio", ["gamma_beta_ratio", "gamma-beta-ratio", "simpo_gamma_beta_ratio"])
def test_both_together_are_refused(gamma, ratio):
    with pytest.raises(ValueError, match=f"{gamma} and {ratio}"):
        recipe(**{gamma: 1.0, ratio: 0.5})


def test_the_last_word_replaces_either_spelling():
    assert recipe(["--gamma", "1"], gamma_beta_ratio=0.3).gamma_beta_ratio == pytest.approx(0.5)
    assert recipe(["--gamma_beta_ratio", "0.3"], gamma=9).gamma == pytest.approx(0.6)


def test_check_prints_beta_gamma_and_ratio_with_the_loss_they_predict(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: m\nbeta: 2.5\ngamma: 1.375\n")
    printed = CliRunner().invoke(app, ["check", str(path)]).output
    assert "beta 2.5, gamma/beta 0.55, gamma 1.375" in printed
    assert f"{math.log(1 + math.exp(1.375)):.4f} nats at zero margin" in printed  # -log sigmoid(-gamma) = 1.6004
