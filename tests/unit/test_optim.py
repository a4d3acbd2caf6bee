"""run.optim: the schedules of transformers, torch's clipping, and which parameters are decayed."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.recipe.checks import warmup_steps
from simpo.run.adamw import AdamWBf16
from simpo.run.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    make_deterministic,
    rng_state,
    set_rng_state,
)
from simpo.trainer import Trainer


def make_recipe(**changes) -> SimpleNamespace:
    """The keys that run.optim reads."""
    defaults = {
        "learning_rate": 3e-6,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "warmup_steps": 0,
        "min_lr": 0.0,
        "weight_decay": 0.01,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "optim": "adamw_torch",
        "optimizer_offload": False,
        "seed": 42,
    }
    return SimpleNamespace(**(defaults | changes))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("total_steps", [1, 2, 7, 50])
@pytest.mark.parametrize("warmup", [{}, {"warmup_ratio": 0.0}, {"warmup_ratio": 1.0}, {"warmup_steps": 3}])
def test_learning_rates_equal_transformers_schedulers_at_every_step(name, total_steps, warmup):
    recipe = make_recipe(lr_scheduler_type=name, **warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=recipe.warmup_steps or math.ceil(recipe.warmup_ratio * total_steps),
        num_training_steps=total_steps,
    )
    for step in range(total_steps):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_at(step, total_steps, recipe) == pytest.approx(expected, rel=1e-12, abs=1e-20)
        optimizer.step()
        scheduler.step()


def test_warmup_steps_override_the_ratio_and_the_ratio_rounds_up():
    assert warmup_steps(101, make_recipe()) == 11
    assert warmup_steps(101, make_recipe(warmup_steps=2)) == 2
    assert warmup_steps(5, make_recipe(warmup_ratio=0.0)) == 0


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    model[1].weight.requires_grad_(False)
    return model


def backward(model: nn.Module, factor: float) -> None:
    (factor * model(torch.tensor([1, 2, 3])).square().sum()).backward()


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("max_norm", [1.0, 0.3])
def test_clipping_equals_torch(factor, max_norm):
    ours, theirs = make_model(), make_model()
    backward(ours, factor)
    backward(theirs, factor)
    norm = clip_gradients(ours, max_norm)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.allclose(a.grad, b.grad, rtol=1e-6, atol=0)


def test_the_norm_of_a_large_gradient_keeps_its_digits():
    """On a CPU torch's own norm adds in fp32, one number after the other: 0.1% is lost of 28 million."""
    model = nn.Linear(4000, 2500, bias=False)
    model.weight.grad = 1e-3 * torch.randn(2500, 4000, generator=torch.Generator().manual_seed(0))
    exact = float(model.weight.grad.double().norm())
    assert clip_gradients(model, 1.0) == pytest.approx(exact, rel=1e-7)
    assert float(model.weight.grad.double().norm()) == pytest.approx(1.0, rel=1e-6)


def test_max_norm_zero_measures_and_changes_nothing():
    model = make_model()
    backward(model, 100.0)
    before = [copy.deepcopy(p.grad) for p in model.parameters()]
    squares = sum(float(g.square().sum()) for g in before if g is not None)
    assert clip_gradients(model, 0.0) == pytest.approx(squares**0.5, rel=1e-6)
    assert all(g is None or torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_leaves_the_gradients_alone(bad):
    model = make_model()
    backward(model, 1.0)
    model[3].bias.grad[1] = bad
    before = model[0].weight.grad.clone()
    assert not math.isfinite(clip_gradients(model, 1.0))
    assert torch.equal(model[0].weight.grad, before)


def test_an_optimizer_that_has_a_name_and_is_not_built_is_refused():
    with pytest.raises(NotImplementedError, match="optim: lion is named in"):
        build_optimizer(make_model(), make_recipe(optim="lion"))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_bf16"])
def test_only_trainable_matrices_are_decayed(optim):
    model = make_model()
    optimizer = build_optimizer(model, make_recipe(optim=optim))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        id(p): 0.01 if p.ndim >= 2 else 0.0 for p in model.parameters() if p.requires_grad
    }  # norms and biases are vectors
    assert decay == expected
    assert {(g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups} == {(3e-6, (0.8, 0.95), 1e-7)}


def test_fused_and_plain_adamw_make_the_same_update():
    models = []
    for optim in ("adamw_torch", "adamw_torch_fused"):
        models.append(make_model())
        optimizer = build_optimizer(models[-1], make_recipe(optim=optim, learning_rate=1e-2))
        for _ in range(3):
            backward(models[-1], 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter is trainable"):
        build_optimizer(make_model().requires_grad_(False), make_recipe())


def test_adamw_bf16_is_seeded_by_the_recipe():
    optimizer = build_optimizer(make_model(), make_recipe(optim="adamw_bf16", seed=7))
    assert isinstance(optimizer, AdamWBf16)
    assert {group["seed"] for group in optimizer.param_groups} == {7}


def test_eight_bit_moments_are_bitsandbytes_and_train_like_fp32_ones():
    pytest.importorskip("bitsandbytes")
    models = []
    for optim in ("adamw_torch", "adamw_8bit"):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(100, 200), nn.Tanh(), nn.Linear(200, 3)))
        start = torch.cat([p.detach().flatten() for p in models[-1].parameters()])
        optimizer = build_optimizer(models[-1], make_recipe(optim=optim, learning_rate=1e-4, adam_beta2=0.999))
        data = torch.Generator().manual_seed(1)
        for _ in range(20):
            models[-1](torch.randn(4, 100, generator=data)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.state[models[1][0].weight]["state1"].dtype == torch.uint8
    exact, ours = (torch.cat([p.detach().flatten() for p in model.parameters()]) - start for model in models)
    # Eight bits a moment, blockwise: a step is a few percent off where the moments are small within their block.
    assert float(nn.functional.cosine_similarity(ours, exact, dim=0)) > 0.98
    assert float(ours.norm() / exact.norm()) == pytest.approx(1.0, abs=0.03)


def test_eight_bit_without_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"adamw_8bit needs bitsandbytes: pip install 'simpo\[8bit\]'"):
        build_optimizer(make_model(), make_recipe(optim="adamw_8bit"))


class RaisesOnThisDevice(torch.optim.SGD):
    def step(self, closure=None):
        raise NotImplementedError("no kernel for this device\nand more lines")


class DoesNothing(torch.optim.SGD):
    def step(self, closure=None):
        pass


@pytest.mark.parametrize(
    ("stand_in", "reason"), [(RaisesOnThisDevice, "no kernel for this device"), (DoesNothing, "did nothing")]
)
def test_a_bitsandbytes_that_cannot_run_here_is_refused_in_one_line(monkeypatch, stand_in, reason):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=stand_in))
    with pytest.raises(ValueError, match=rf"cannot run adamw_8bit on cpu .*{reason}.*adamw_bf16") as caught:
        build_optimizer(make_model(), make_recipe(optim="adamw_8bit"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def without_determinism(monkeypatch):
    """torch's switches and the environment as they were, afterwards."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_determinism_is_set_before_cuda_starts_or_refused(without_determinism, monkeypatch):
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's own
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(ValueError, match="full_determinism: this process uses CUDA already"):
        make_deterministic()


def test_a_deterministic_step_is_the_same_step_on_a_cpu(tiny_recipe, without_determinism):
    losses = []
    for determined in (False, True):
        recipe = load_recipe({**tiny_recipe, "full_determinism": determined})
        trainer = Trainer(recipe, display=Display(quiet=True))
        losses.append([trainer.train_step(plan)["loss"] for plan in trainer.loader.plans(0, 2)])
    assert torch.are_deterministic_algorithms_enabled()
    assert losses[0] == losses[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this test to itself")
def test_on_cuda_a_deterministic_run_resumes_to_the_same_bits(tiny_recipe, tmp_path):
    """In processes of their own: the setting belongs before CUDA starts."""
    code = """
import sys, torch
from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.trainer import Trainer
recipe, steps, out = eval(sys.argv[1]), range(int(sys.argv[2]), int(sys.argv[3])), sys.argv[4]
trainer = Trainer(load_recipe(recipe), display=Display(quiet=True))
for plan in trainer.loader.plans(steps.start, steps.stop):
    trainer.train_step(plan)
trainer.save()
torch.save([weight.cpu() for weight in trainer.model.parameters()], out)
"""
    found = []
    for name, parts in (("whole", [(0, 4)]), ("cut", [(0, 2), (2, 4)])):
        for start, stop in parts:
            recipe = {**tiny_recipe, "output_dir": str(tmp_path / name), "bf16": True, "full_determinism": True}
            recipe |= {"resume_from_checkpoint": True} if start else {}
            out = str(tmp_path / f"{name}.pt")
            subprocess.run([sys.executable, "-c", code, repr(recipe), str(start), str(stop), out], check=True)
        found.append(torch.load(tmp_path / f"{name}.pt"))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_random_numbers_of_a_gpu_are_those_of_the_process_alone(monkeypatch):
    """Where more GPUs were visible than now; earlier versions wrote down every one of them."""
    gpu, asked, given = torch.device("cuda", 0), [], []
    own = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: (asked.append(device), own)[1])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: given.append((state.tolist(), device)))
    state = rng_state(gpu)
    assert (asked, len(state["cuda"])) == ([gpu], 1)
    set_rng_state(state, gpu, rank=5)
    set_rng_state({**state, "cuda": [f"{gpu:02x}" for gpu in range(8)]}, gpu, rank=3)
    assert given == [(own.tolist(), gpu), ([3], gpu)]
    set_rng_state(state, torch.device("cpu"))
    assert len(given) == 2
