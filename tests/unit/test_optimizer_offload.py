"""Moments in CPU memory: the bits of the optimizer that keeps them with the weights, through checkpoints too.

On a CPU both places are CPU memory; the way there and back is the one that a GPU's moments take.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run import adamw
from simpo.run.adamw import AdamWBf16
from simpo.trainer import Trainer

HAS_CUDA = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA GPU"))]


def parameters(device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 40), (7,), (40, 11), (3, 5, 2)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[2:3] = [made[2].bfloat16()]
    return [nn.Parameter(value.to(device)) for value in made]


def give_gradients(weights: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight)


def moments(optimizer: AdamWBf16) -> list[Tensor]:
    states = (optimizer.state[p] for group in optimizer.param_groups for p in group["params"])
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [1000, 7, 2**20], ids=["some pieces", "tiny pieces", "one piece"])
def test_the_bits_are_those_of_moments_beside_the_weights(piece: int, device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    options = {"lr": 1e-2, "weight_decay": 0.1, "seed": 3, "piece_numel": piece}
    away, here = AdamWBf16(ours, offload=True, **options), AdamWBf16(theirs, **options)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        away.step()
        here.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    state = away.state_dict()["state"]
    assert all(value.device.type == "cpu" for each in state.values() for value in each.values())
    for one, other in zip(moments(away), moments(here), strict=True):
        assert torch.equal(one, other.cpu())
        assert not HAS_CUDA or device == "cpu" or one.is_pinned()


def test_no_update_is_computed_where_the_moments_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = parameters("cpu")
    optimizer = AdamWBf16(weights, offload=True, piece_numel=500)
    update, seen = adamw._update, []

    def watched(piece: Any, *args: Any, **options: Any) -> None:
        seen.extend(t.untyped_storage().data_ptr() for slices in piece for t in slices[2:])
        update(piece, *args, **options)

    monkeypatch.setattr(adamw, "_update", watched)
    give_gradients(weights, 0)
    optimizer.step()
    kept = {moment.untyped_storage().data_ptr() for moment in moments(optimizer)}
    assert seen
    assert kept.isdisjoint(seen)
    assert len(set(seen)) == 1  # both berths are one allocation


def test_a_saved_state_goes_on_in_either_place() -> None:
    def run(switch: bool, offload: bool) -> list[nn.Parameter]:
        weights = parameters("cpu")
        optimizer = AdamWBf16(weights, lr=1e-2, offload=offload)
        for step in range(4):
            if step == 2 and switch:
                saved = optimizer.state_dict()
                optimizer = AdamWBf16(weights, lr=1e-2, offload=not offload)
                optimizer.load_state_dict(saved)
            give_gradients(weights, step)
            optimizer.step()
        return weights

    expected = run(switch=False, offload=False)
    for offload in (False, True):
        for one, other in zip(run(switch=True, offload=offload), expected, strict=True):
            assert torch.equal(one, other)


def test_a_run_resumes_from_its_checkpoint_to_the_same_bits(tiny_recipe: dict[str, Any], tmp_path: Any) -> None:
    def build(name: str, *, offload: bool, **keys: Any) -> Trainer:
        settings = {**tiny_recipe, "optim": "adamw_bf16", "output_dir": str(tmp_path / name), **keys}
        trainer = Trainer(load_recipe(settings), display=Display(quiet=True))
        trainer.optimizer._offload = offload  # as optimizer_offload sets it, which a CPU refuses
        return trainer

    whole, cut = build("whole", offload=False), build("cut", offload=True)
    for trainer, steps in ((whole, 4), (cut, 2)):
        for plan in trainer.loader.plans(0, steps):
            trainer.train_step(plan)
    cut.save()
    resumed = build("cut", offload=True, resume_from_checkpoint=True)
    for plan in resumed.loader.plans(2, 4):
        resumed.train_step(plan)
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_cannot_do_it_says_so_in_one_line(tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="optimizer_offload: optim adamw_torch_fused keeps its moments"):
        load_recipe({**tiny_recipe, "optimizer_offload": True})
    with pytest.raises(ValueError, match="optimizer_offload: with device: cpu"):
        load_recipe({**tiny_recipe, "optim": "adamw_bf16", "optimizer_offload": True, "device": "cpu"})
    if not HAS_CUDA:
        recipe = load_recipe({**tiny_recipe, "optim": "adamw_bf16", "optimizer_offload": True})
        with pytest.raises(ValueError, match="optimizer_offload: on a CPU"):
            Trainer(recipe, display=Display(quiet=True))
