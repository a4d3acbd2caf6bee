"""Trap 22: an unused reference model is loaded. Here a reference-free loss loads one model, the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simpo.core.losses import LOSSES
from simpo.display import Display
from simpo.model import load as loading
from simpo.recipe import load_recipe
from simpo.trainer import Trainer


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
def test_only_losses_that_need_a_reference_load_one(
    tiny_recipe: dict[str, Any], scored_lists: Path, loss_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    original = loading.AutoModelForCausalLM.from_pretrained

    def count(name: str, *args: Any, **kwargs: Any) -> Any:
        loads.append(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", count)
    data = {"dataset_mixer": {str(scored_lists): 1.0}} if LOSSES[loss_type].is_of_lists else {}
    Trainer(load_recipe({**tiny_recipe, "loss_type": loss_type, **data}), display=Display(quiet=True))
    assert len(loads) == (2 if loss_type in ("dpo", "dpo_norm", "r_dpo") else 1)
