"""What a mesh is predicted to hold, beside what it holds: real models on two ranks, read from the allocator."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import rarely
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from simpo.model.load import has_bf16
from simpo.parallel.mesh import mesh_sizes
from simpo.plan.footprint import compute_footprint, compute_state
from simpo.plan.shapes import load_config
from simpo.plan.sizes import describe_model
from simpo.plan.traffic import compute_traffic
from simpo.recipe import load_recipe

BF16 = has_bf16(torch.device("cpu"))  # a CPU without instructions for it takes half a minute a case
PAIRS = [(40, 130, 90), (25, 70, 160), (60, 20, 45)]  # prefix, chosen, rejected


def write_model(folder: Path, **changes: Any) -> str:
    """A random Llama whose sizes are unlike each other, so that none can stand in for another."""
    settings = {
        "vocab_size": 3001,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **(settings | changes)))
    model.save_pretrained(folder)
    return str(folder)


def peak_bytes(function) -> int:
    """The most that `function` holds at one time of what it allocates, by the CPU allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def measure(keys: dict[str, Any], world: int = 2, *, enough: float = 0) -> dict[str, float]:
    """Bytes of this rank's weights, gradients and moments, and the peak of a later step above weights and moments.

    The peak is that of the rank that holds the most. It varies by up to a fifth, and more beside busy processes, with
    how far gloo's threads have come: the least of twenty steps counts, or the first that holds no more than `enough`.
    """
    from simpo.core.batch import build_batch
    from simpo.core.packing import TokenPair
    from simpo.model.head import compute_pair_logps
    from simpo.model.load import load_model
    from simpo.parallel.mesh import Mesh
    from simpo.parallel.sharding import GradientSync
    from simpo.run.optim import build_optimizer

    warnings.simplefilter("ignore")
    recipe = load_recipe(keys)
    mesh = Mesh(mesh_sizes(recipe, world), device=torch.device("cpu"))
    model = load_model(recipe, device=torch.device("cpu"), mesh=mesh).train()
    sync = GradientSync(model, mesh)
    optimizer = build_optimizer(model, recipe)
    pairs = [TokenPair(f"row-{k}", [3] * p + [1] * c, p, [3] * p + [2] * r, p) for k, (p, c, r) in enumerate(PAIRS)]
    whole = build_batch(pairs)

    def step() -> None:
        batch = mesh.own_rows(whole)
        for _ in range(2):  # with gradients of the first micro-batch there is the most during the second
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bf16):
                logps = compute_pair_logps(sync.module, batch, chunk_size=recipe.logits_chunk_size)
            margins = logps.chosen_sum / logps.chosen_length - logps.rejected_sum / logps.rejected_length
            (margins.sum() * sync.scale).backward()
            del logps, margins
        sync.finish()
        held["gradients"] = sum(local(p.grad) for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    held: dict[str, float] = {"weights": sum(local(p) for p in model.parameters())}
    step()
    held["moments"] = sum(
        local(value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )
    gc.collect()  # peaks differ with what garbage is still there
    peaks: list[float] = []
    while len(peaks) < 20 and min(peaks, default=enough + 1) > enough:
        peaks.append(max(mesh.gather(peak_bytes(step))))
    held["peak"] = min(peaks)
    return held


def local(tensor: torch.Tensor) -> int:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.numel() * tensor.element_size()


class _Sent(TorchDispatchMode):
    """Number and bytes of every collective inside; of each the larger of what goes in and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = KINDS.get(str(func))
        if kind is not None:
            size = max(t.nbytes for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor))
            if size > 1000:  # not the sums of a few responses
                self.found.setdefault(kind, []).append(size)
        return out


KINDS = {
    "c10d._allgather_base_.default": "all-gather",
    "c10d._reduce_scatter_base_.default": "reduce-scatter",
    "c10d.alltoall_base_.default": "all-to-all",
    "c10d.allreduce_.default": "all-reduce",
    "_c10d_functional.all_reduce.default": "all-reduce",
}


def collectives(keys: dict[str, Any]) -> dict[str, list[int]]:
    """What `measure`'s step sends."""
    sent = _Sent()

    def run(step) -> int:
        sent.found.clear()
        with sent:
            step()
        return 0

    with mock.patch.dict(measure.__globals__, peak_bytes=run):
        measure(keys)
    return sent.found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, str]:
    """Models by whether their head is tied."""
    return {tied: write_model(tmp_path_factory.mktemp("sizes"), tie_word_embeddings=tied) for tied in (False, True)}


TOKENS, LABELS = sum(map(sum, PAIRS)), sum(c + r for _, c, r in PAIRS)
CASES = {
    "ddp": {"dp_replicate": 2, "dp_shard": 1},
    "fsdp": {},
    "fsdp, checkpointing": {"gradient_checkpointing": True},
    "fsdp, fp32": {"bf16": False},
    "fsdp, bf16 moments": {"optim": "adamw_bf16"},
    "tp": {"tp": 2},
    "cp": {"cp": 2},
    "lora, fsdp": {"use_peft": True},
    "lora, ddp": {"use_peft": True, "dp_replicate": 2, "dp_shard": 1},
}


def described(folder: str, keys: dict[str, Any]):
    recipe = load_recipe(keys | {"model_name_or_path": folder, "device": "cpu"})
    return describe_model(load_config(folder), recipe), recipe, mesh_sizes(recipe, 2)


@pytest.mark.parametrize(
    ("case", "tied"),
    [
        *((case, False) if case in ("fsdp", "cp") else rarely(case, False) for case in CASES),
        *(rarely(case, True) for case in ("ddp", "fsdp", "tp", "cp")),
    ],
)
def test_a_rank_holds_what_is_predicted(case, tied, folders, two_ranks):
    """Weights, gradients and moments to the byte; the peak within -15% and +35%, about half of them within 7%.

    Adapters come out 20% too high in a model of five blocks, whose first keeps less than the others.
    """
    keys = {"logits_chunk_size": 64, "bf16": BF16} | CASES[case]
    model, recipe, mesh = described(folders[tied], keys)
    state = compute_state(model, recipe, mesh)
    # Weights and moments are there before; and so are DDP's gradients, in its buckets.
    before = state.weights + state.moments + ("ddp" in case) * state.gradients
    peak = compute_footprint(model, recipe, mesh, tokens=TOKENS, labels=LABELS).total - before
    ranks = two_ranks.run(measure, keys | {"model_name_or_path": folders[tied]}, enough=peak / 0.85)
    found = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    assert (state.weights, state.gradients, state.moments) == (found["weights"], found["gradients"], found["moments"])
    assert 0.85 <= peak / found["peak"] <= 1.35


SENT = {
    "fsdp": {},
    "tp, checkpointing": {"tp": 2, "gradient_checkpointing": True},
    "cp, checkpointing": {"cp": 2, "gradient_checkpointing": True},
    "lora": {"use_peft": True},
}


@pytest.mark.parametrize(
    ("case", "tied"),
    [*((case, False) if case == "fsdp" else rarely(case, False) for case in SENT), rarely("fsdp", True)],
)
def test_a_step_sends_what_is_computed(case, tied, folders, two_ranks):
    """Number of collectives of each kind and their bytes, padding of uneven shards apart, of two micro-batches."""
    keys = {"logits_chunk_size": 64, "bf16": BF16} | SENT[case]
    found = two_ranks.run(collectives, keys | {"model_name_or_path": folders[tied]})[0]
    model, recipe, mesh = described(folders[tied], keys)
    expected: dict[str, list[float]] = {}
    for exchange in compute_traffic(model, recipe, mesh, tokens=TOKENS, labels=LABELS, micro_batches=2):
        calls, size = expected.get(exchange.kind, (0, 0.0))
        expected[exchange.kind] = (calls + exchange.calls, size + exchange.size)
    assert found.keys() == expected.keys()
    for kind, (calls, size) in expected.items():
        assert len(found[kind]) == calls, kind
        assert sum(found[kind]) == pytest.approx(size, rel=0.02), kind
