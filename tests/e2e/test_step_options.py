"""Runs with the options of a step: bf16 and 8-bit moments resume in the same bits; compiled blocks train the same."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import rarely

from simpo.display import Display
from simpo.model.compile import compile_blocks
from simpo.model.offload import offload_activations
from simpo.recipe import load_recipe
from simpo.trainer import Interrupted, Trainer

Settings = dict[str, Any]
# Dynamo looks for a gradient on every tensor it meets and hides torch's warning about that only where warnings show.
dynamo_asks_for_gradients = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def build(settings: Settings, **changes: Any) -> Trainer:
    return Trainer(load_recipe({**settings, **changes}), display=Display(quiet=True))


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and optimizer state by name."""
    found = {name: p.detach() for name, p in trainer.model.named_parameters()}
    for name, p in trainer.model.named_parameters():
        for key, value in trainer.optimizer.state.get(p, {}).items():
            found[f"{name}: {key}"] = torch.as_tensor(value)
    return found


def assert_same(one: Trainer, other: Trainer) -> None:
    ours, theirs = everything(one), everything(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


def run_to(trainer: Trainer, step: int) -> None:
    """Train until asked to stop after `step`, which saves."""
    original = trainer.train_step

    def train_step(plan: Any) -> dict[str, float]:
        values = original(plan)
        if trainer.progress.step == step:
            trainer._stop.set()
        return values

    trainer.train_step = train_step
    with pytest.raises(Interrupted):
        trainer.run()


@pytest.mark.parametrize(
    "options",
    [
        rarely({"optim": "adamw_bf16"}),
        {"optim": "adamw_bf16", "master_dtype": "bfloat16", "learning_rate": 1e-6},
        rarely({"optim": "adamw_bf16", "use_peft": True}),
        {"optim": "adamw_8bit"},
    ],
    ids=["bf16 moments", "bf16 weights", "adapters", "8-bit moments"],
)
def test_a_run_with_small_moments_resumes_bit_for_bit(tiny_recipe: Settings, tmp_path: Path, options: Settings) -> None:
    if options["optim"] == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    settings = {**tiny_recipe, **options}
    whole = build(settings, output_dir=str(tmp_path / "whole"))
    whole.run()
    run_to(build(settings), 3)
    resumed = build(settings, resume_from_checkpoint=True)
    resumed.run()
    assert_same(resumed, whole)


def test_resuming_with_another_optimizer_is_refused_by_name(tiny_recipe: Settings) -> None:
    run_to(build(tiny_recipe), 2)
    with pytest.raises(ValueError, match=r"other settings: optim \(was 'adamw_torch_fused', is 'adamw_bf16'\)"):
        build(tiny_recipe, optim="adamw_bf16", resume_from_checkpoint=True)


def test_offloading_on_a_cpu_is_refused(tiny_recipe: Settings) -> None:
    with pytest.raises(ValueError, match=r"activation_offload: .*(host|CPU) memory already"):
        build(tiny_recipe, activation_offload=True, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"activation_offload: .*(host|CPU) memory already"):
            build(tiny_recipe, activation_offload=True)


@dynamo_asks_for_gradients
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"use_peft": True, "lora_dropout": 0.0},
        {"pack": False, "share_prompt": False},
    ],
    ids=["fp32", "bf16", "checkpointing", "adapters", "padded"],
)
def test_steps_with_activations_moved_away_are_the_same_bits(tiny_recipe: Settings, options: Settings) -> None:
    """On a CPU anything may stand for what is on a GPU: the hooks, not the speed, are what is tested."""
    plain, moving = (build(tiny_recipe, output_dir=f"{tiny_recipe['output_dir']}-{i}", **options) for i in range(2))
    moved = 0
    forward = moving.forward

    def forward_and_move(*args: Any, **kwargs: Any) -> Any:
        nonlocal moved
        with offload_activations(moving.model, eligible=lambda t: True, min_bytes=1) as offload:
            result = forward(*args, **kwargs)
        moved += offload.num_bytes
        return result

    moving.forward = forward_and_move
    for plan in plain.loader.plans(0, 2):
        plain.train_step(plan)
        moving.train_step(plan)
    assert_same(moving, plain)
    assert moved > 0


# --- compiled blocks -------------------------------------------------------------------------------------------------


class Counting:
    """A backend that traces forward and backward, compiles nothing, and counts the graphs of each piece of code.

    A block is compiled in pieces, since attention is not: its norm and projections before, its projection and MLP
    behind.
    """

    def __init__(self) -> None:
        self._seen: set[Any] = set()

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self._seen.add(torch._guards.CompileContext.current_compile_id())
        return aot_eager(graph, example_inputs)

    @property
    def graphs(self) -> Counter[int]:
        """Compilations by piece of code."""
        return Counter(seen.frame_id for seen in self._seen)


def compiled(trainer: Trainer) -> Counting:
    torch._dynamo.reset()
    backend = Counting()
    compile_blocks(trainer.model, device=trainer.device, backend=backend)
    backend._seen.clear()  # the trial's
    return backend


def rows_of_many_lengths(trainer: Trainer, count: int) -> list[Any]:
    """Plans of one to four pairs, so that no two rows need be of one length."""
    loader, rng = trainer.loader, random.Random(0)
    batches = [loader.build(rng.sample(range(40), rng.randint(1, 4))) for _ in range(count)]
    assert len({batch.pairs.num_tokens for batch in batches}) >= 0.8 * count
    return batches


def gradients(trainer: Trainer, batch: Any) -> dict[str, torch.Tensor]:
    plan = next(iter(trainer.loader.plans(0, 1)))
    losses, _ = trainer.forward(batch, plan)
    losses.sum().backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return found


@pytest.mark.long  # pieces of a block: unit/test_compile.py
@dynamo_asks_for_gradients
@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"use_peft": True, "lora_dropout": 0.0},
        {"use_peft": True, "lora_dropout": 0.0, "gradient_checkpointing": True},
    ],
    ids=["bf16", "checkpointing", "adapters", "adapters and checkpointing"],
)
def test_one_compilation_serves_all_layers_and_twenty_lengths(tiny_recipe: Settings, options: Settings) -> None:
    settings = {**tiny_recipe, **options}
    plain = build(settings, output_dir=str(tiny_recipe["output_dir"]) + "-plain")
    trainer = build(settings)
    names = [name for name, _ in trainer.model.named_parameters()]
    backend = compiled(trainer)
    assert [name for name, _ in trainer.model.named_parameters()] == names
    for batch in rows_of_many_lengths(trainer, 20):
        ours, theirs = gradients(trainer, batch), gradients(plain, batch)
        assert ours.keys() == theirs.keys()
        for name in theirs:  # traced operations, run one by one: only the order of some sums may differ
            tolerance = 1e-5 if not options.get("bf16") else 2e-2
            assert torch.allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance * theirs[name].abs().max())
    # Frozen embeddings make the first layer's input one without gradient: adapters may need a second graph for it.
    assert 0 < max(backend.graphs.values()) <= (2 if "use_peft" in options else 1)
    training = backend.graphs.total()
    trainer.evaluate()  # without gradients, in eval mode: graphs of its own, once
    once = backend.graphs.total()
    trainer.evaluate()
    assert training < once == backend.graphs.total()
    assert max(backend.graphs.values()) <= 4  # dynamo gives up on a piece of code at 8


def swap(model: torch.nn.Module, dtype: torch.dtype) -> dict[tuple[torch.nn.Module, str], torch.nn.Parameter]:
    """Put copies of the blocks' weights in their places; returns what stood there."""
    before = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.ndim == 2:
                before[module, name] = p
                module._parameters[name] = torch.nn.Parameter(p.detach().to(dtype))
    return before


@pytest.mark.long
@dynamo_asks_for_gradients
def test_weights_that_are_swapped_for_bf16_copies_and_back_need_few_compilations(tiny_recipe: Settings) -> None:
    trainer = build(tiny_recipe, bf16=True)
    backend = compiled(trainer)
    for batch in rows_of_many_lengths(trainer, 10):
        before = swap(trainer.model, torch.bfloat16)
        gradients(trainer, batch)
        for (module, name), p in before.items():
            module._parameters[name] = p
        with torch.no_grad():
            trainer.forward(batch, next(iter(trainer.loader.plans(0, 1))))
    # Copies with gradients, originals without: one set of graphs each, however often they take turns.
    assert 0 < max(backend.graphs.values()) <= 2


@pytest.mark.long
@dynamo_asks_for_gradients
def test_compiled_blocks_let_their_activations_be_moved(tiny_recipe: Settings) -> None:
    trainer = build(tiny_recipe)
    compiled(trainer)
    batch = rows_of_many_lengths(trainer, 1)[0]
    expected = gradients(trainer, batch)
    plan = next(iter(trainer.loader.plans(0, 1)))
    with offload_activations(trainer.model, eligible=lambda t: True, min_bytes=1) as offload:
        losses, _ = trainer.forward(batch, plan)
    assert offload.num_bytes > 0
    losses.sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.long
@dynamo_asks_for_gradients
def test_padded_batches_and_generation_go_through_compiled_blocks(tiny_recipe: Settings) -> None:
    """Generation runs uncompiled: it has a cache, one token at a time, and would be compiled again and again."""
    settings = {**tiny_recipe, "pack": False, "share_prompt": False, "num_eval_generations": 2}
    trainer = build(settings, max_steps=2, eval_generation_max_new_tokens=5)
    backend = compiled(trainer)
    for batch in rows_of_many_lengths(trainer, 6):
        gradients(trainer, batch)
    before = backend.graphs.total()
    assert max(backend.graphs.values()) <= 2
    trainer._generate_samples()
    assert backend.graphs.total() == before > 0
    assert len((trainer.output_dir / "generations.jsonl").read_text().splitlines()) == 2


@pytest.mark.long
@dynamo_asks_for_gradients
def test_a_compiled_run_resumes_and_saves_an_ordinary_model(
    tiny_recipe: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("simpo.model.compile.BACKEND", "aot_eager")  # inductor would take a minute
    settings = {**tiny_recipe, "torch_compile": True, "gradient_checkpointing": True, "max_steps": 4, "eval_steps": 2}
    whole = build(settings, output_dir=str(tmp_path / "whole"))
    result = whole.run()
    run_to(build(settings), 2)
    resumed = build(settings, resume_from_checkpoint=True)
    resumed.run()
    assert_same(resumed, whole)
    saved = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert torch.equal(saved.lm_head.weight, whole.model.lm_head.weight)


def test_a_missing_compiler_is_one_clear_line_at_start(tiny_recipe: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(graph: Any, example_inputs: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nand a page of advice")

    monkeypatch.setattr("simpo.model.compile.BACKEND", no_compiler)
    expected = r"torch_compile: .*no working C\+\+ compiler.*set torch_compile: false"
    with pytest.raises(ValueError, match=expected) as error:
        build(tiny_recipe, torch_compile=True)
    assert "\n" not in str(error.value)
