"""Trap 28, recipe side: label smoothing silently ignored by a loss that does not define it."""

from __future__ import annotations

import pytest

from simpo.core.losses import LOSSES
from simpo.recipe import load_recipe

WITH = {"sigmoid", "cpo", "cpo_simpo", "confpo", "dpo", "dpo_norm", "r_dpo"}


@pytest.mark.parametrize("loss", LOSSES)
def test_label_smoothing_is_used_or_refused(loss):
    values = {"model_name_or_path": "m", "loss_type": loss, "label_smoothing": 0.1}
    if loss in WITH:
        assert load_recipe(values).label_smoothing == 0.1
        return
    with pytest.raises(ValueError, match=f"label_smoothing = 0.1.*{loss}"):
        load_recipe(values)
    assert load_recipe({**values, "label_smoothing": 0.0}).loss_type == loss


def test_an_override_cannot_slip_past():
    with pytest.raises(ValueError, match="label_smoothing"):
        load_recipe({"model_name_or_path": "m", "simpo_label_smoothing": 0.1}, ["--simpo_loss_type", "hinge"])
