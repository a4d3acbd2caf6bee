"""run.memory: what a micro-batch is predicted to hold, what is free, and the token budget made of both."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from simpo.core.batch import build_batch
from simpo.core.logprobs import CHUNK_BYTES
from simpo.core.packing import PairShape, TokenPair
from simpo.model.attention import PACKED
from simpo.model.head import compute_pair_logps
from simpo.model.load import checkpoint_activations
from simpo.run import memory
from simpo.run.memory import (
    ActivationBytes,
    free_memory,
    kept_bytes,
    measure_activations,
    pick_token_budget,
    step_bytes,
)

CPU = torch.device("cpu")
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 4, 48, 96, 4, 2, 12


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation=PACKED).train()


def forward_of(model, *, bf16: bool = False):
    def forward(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return compute_pair_logps(model, batch)

    return forward


def make_pairs(shapes: list[tuple[int, int, int]]) -> list[TokenPair]:
    """Pairs of the given prefix, chosen and rejected lengths; every token after the prefix is trained."""
    return [TokenPair(f"row-{k}", [0] * p + [1] * c, p, [0] * p + [2] * r, p) for k, (p, c, r) in enumerate(shapes)]


RAGGED = [(40, 70, 30), (5, 20, 90), (100, 10, 12)]


def predicted(found: ActivationBytes, shapes: list[tuple[int, int, int]]) -> float:
    return found.fixed + sum(found.of_pairs(PairShape(*shape), shape[1] + shape[2]) for shape in shapes)


def one_block_less(found: ActivationBytes, num_blocks: int) -> float:
    """What share of a prediction without checkpointing is there at the end of the forward pass."""
    return num_blocks / (num_blocks + 1)


@pytest.mark.parametrize("bf16", [False, True])
def test_bytes_predicted_from_small_rows_are_those_of_a_large_ragged_row(model, bf16):
    """Rows of at most 72 tokens predict 377 tokens of three pairs; autocast adds the casts of the weights."""
    found = measure_activations(model, forward_of(model, bf16=bf16), device=CPU)
    held = kept_bytes(model, forward_of(model, bf16=bf16), build_batch(make_pairs(RAGGED)), device=CPU)
    kept = found.fixed + (predicted(found, RAGGED) - found.fixed) * one_block_less(found, LAYERS)
    assert kept == pytest.approx(held, rel=0.03)
    in_blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    everything = sum(p.numel() for p in model.parameters())
    assert (2 * in_blocks if bf16 else 0) <= found.fixed <= (2 * everything if bf16 else 0) + 2000


def saved_bytes(model, forward, batch) -> int:
    """An independent count: what autograd saves, each storage once, weights excepted."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward(batch)
    assert result is not None  # the graph is alive while it is counted
    return sum(seen.values())


def test_bytes_kept_are_those_that_autograd_saves(model):
    """Within 10%, and less by the batch's own tensors only: attention may hold what it does not pass to autograd."""
    batch = build_batch(make_pairs(RAGGED))
    saved = saved_bytes(model, forward_of(model), batch)
    own = sum(t.nbytes for t in (batch.input_ids, batch.source_rows, batch.labels, batch.response_lengths))
    assert saved - own <= kept_bytes(model, forward_of(model), batch, device=CPU) <= 1.1 * saved


def test_logits_are_left_to_the_count_of_the_step(model):
    """The head keeps one chunk of them at most, so bytes for each label would be too many for a long row."""
    found = measure_activations(model, forward_of(model), device=CPU)
    assert found.per_label < 4 * HIDDEN * 3 < 4 * 300


def test_bytes_of_a_token_are_between_the_least_and_the_most_that_a_hand_count_gives(model):
    """fp32, per token and block, written down from the block's equations.

    Needed by any backward pass: the two norms' inputs (2H) and outputs (2H), q, k, v and the attention's output
    (2 Hq D + 2 Hkv D), gate, up, the gate's activation and their product (4I). Transformers' unfused operations save
    at most the norms' fp32 copies and scaled intermediates (4H more), rotated q and k and the two halves of each
    rotation (3 times Hq D + Hkv D), and k and v again where a prefix is put before a block (2 Hkv D).
    """
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    least = 4 * LAYERS * (4 * HIDDEN + 2 * queries + 2 * keys + 4 * INNER)
    most = least + 4 * LAYERS * (4 * HIDDEN + 3 * (queries + keys) + 2 * keys)
    found = measure_activations(model, forward_of(model), device=CPU)
    assert least <= found.per_token * one_block_less(found, LAYERS) <= 1.1 * most


def test_checkpointing_keeps_the_blocks_inputs_and_one_block(model):
    plain = measure_activations(model, forward_of(model), device=CPU)
    checkpoint_activations(model)
    try:
        found = measure_activations(model, forward_of(model), device=CPU)
        assert all(layer.gradient_checkpointing for layer in model.model.layers), "switched back on"
    finally:
        newer = hasattr(model, "activation_checkpointing_disable")  # transformers 5.23
        (model.activation_checkpointing_disable if newer else model.gradient_checkpointing_disable)()
    one_block = plain.per_token / (LAYERS + 1)
    inputs = 4 * HIDDEN * (LAYERS + 2)  # of each block, of the final norm, and the norm's
    assert found.per_token == pytest.approx(2 * one_block + inputs, rel=0.15)
    assert found.per_token < 0.6 * plain.per_token


def test_offloaded_activations_count_by_the_share_that_waits_for_its_copy(model):
    plain = measure_activations(model, forward_of(model), device=CPU)
    found = measure_activations(model, forward_of(model), device=CPU, offloaded=True)
    kept = plain.per_token * LAYERS / (LAYERS + 1)
    assert found.per_token == pytest.approx(memory.STILL_ON_ITS_WAY * kept + 2 * kept / LAYERS, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 reads it
def test_adapters_are_measured_as_they_are_and_frozen_weights_get_no_gradient(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    found = measure_activations(wrapped, forward_of(wrapped), device=CPU)
    held = kept_bytes(wrapped, forward_of(wrapped), build_batch(make_pairs(RAGGED)), device=CPU)
    kept = found.fixed + (predicted(found, RAGGED) - found.fixed) * one_block_less(found, LAYERS)
    assert kept == pytest.approx(held, rel=0.03)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert step_bytes(wrapped, device=CPU, optim="adamw_torch") == 12 * trainable + 2 * CHUNK_BYTES


def test_measuring_leaves_no_gradient_and_no_trace_in_random_numbers(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measure_activations(model, lambda batch: (torch.rand(7), forward_of(model)(batch)), device=CPU)
    assert torch.equal(torch.rand(3), expected)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("optim", "moments"), [("adamw_torch_fused", 8), ("adamw_bf16", 4), ("adamw_8bit", 2)])
def test_a_step_needs_gradients_moments_and_the_heads_work(model, optim, moments):
    weights = sum(p.numel() for p in model.parameters())
    head = 8 * 300 * HIDDEN
    assert step_bytes(model, device=CPU, optim=optim) == (4 + moments) * weights + 2 * CHUNK_BYTES + head
    assert (
        step_bytes(model, device=CPU, optim=optim, chunk_size=10) == (4 + moments) * weights + 2 * 10 * 300 * 4 + head
    )


def test_moments_that_are_there_already_are_not_counted_again(model):
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    fresh = step_bytes(model, device=CPU, optim="adamw_torch", state=optimizer.state)
    assert fresh == step_bytes(model, device=CPU, optim="adamw_torch")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    weights = sum(p.numel() for p in model.parameters())
    assert step_bytes(model, device=CPU, optim="adamw_torch", state=optimizer.state) == fresh - 8 * weights


def test_written_out_scores_grow_with_the_square_of_a_sequence():
    """Attention that saves its probabilities: found as bytes per score, 4 for each head and layer."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation=PACKED).train()
    layers, heads = 2, 4

    def forward(batch):
        areas = [(end - start) * (p_end - p_start + end - start) for p_start, p_end, start, end in batch.blocks.ranges]
        return forward_of(model)(batch), [torch.empty(layers, heads, area) for area in areas]

    plain = measure_activations(model, forward_of(model), device=CPU)
    found = measure_activations(model, forward, device=CPU)
    extra = (found.per_score - plain.per_score) * layers / (layers + 1)
    assert extra == pytest.approx(4 * layers * heads, rel=0.01)


# --- the budget ------------------------------------------------------------------------------------------------------

FLAT = ActivationBytes(fixed=1e6, per_pair=0, per_token=1000, per_label=0, per_score=0)
SHAPES = PairShape(np.array([10, 100]), np.array([20, 300]), np.array([20, 200]))
LABELS = np.array([40, 500])


def pick(free: float, *, activations: ActivationBytes = FLAT, share: float = 0.5):
    return pick_token_budget(
        activations, SHAPES, LABELS, fixed_bytes=3_000_000, free_bytes=int(free), share=share, name_of="pair-{}".format
    )


def test_budget_is_what_fits_into_the_share_of_free_memory_rounded_down():
    budget = pick(20e6)  # 10e6 usable, 4e6 fixed: 6000 tokens
    assert (budget.tokens, budget.needed_bytes, budget.warning) == (5952, 4e6 + 5952e3, None)
    assert str(budget) == "a full one takes about 0.0 of 0.0 GiB free"


def test_budget_is_made_for_the_costliest_kind_of_token():
    """Written-out scores make tokens of long pairs dearer: 600 of 1000 bytes, and 400^2 + 200*300 scores of 10."""
    dear = ActivationBytes(fixed=1e6, per_pair=0, per_token=1000, per_label=0, per_score=10)
    per_token = 1000 + 10 * (400**2 + 200 * 300) / 600
    assert pick(40e6, activations=dear).tokens == int(16e6 / per_token) // 64 * 64


def test_a_pair_that_eats_into_the_reserve_goes_alone_with_a_warning():
    budget = pick(8.5e6)  # 4.25e6 usable: 250 tokens, and the longest pair has 600
    assert budget.tokens == 600
    assert "with pair pair-1 (600 tokens) alone" in budget.warning
    assert "gradient_checkpointing: true" in budget.warning
    assert pick(3e6).tokens == 600  # nothing left beside what is fixed, but less than twice what is free


def test_a_pair_that_cannot_fit_by_far_stops_the_run_in_one_line():
    with pytest.raises(
        ValueError, match=r"memory: .* 0\.0 GiB with pair pair-1 .*max_tokens_per_micro_batch: 600"
    ) as e:
        pick(2.2e6)  # 4.6e6 needed
    assert "\n" not in str(e.value)


# --- free memory -----------------------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


def test_available_memory_is_the_systems_own_estimate(tmp_path):
    root = write(tmp_path, {"proc/meminfo": "MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable:     300 kB\n"})
    assert memory._available_memory(root) == 300 * 1024


def test_limits_of_control_groups_count_at_every_level(tmp_path):
    second = {
        "proc/self/cgroup": "0::/user/run\n",
        "sys/fs/cgroup/user/run/memory.max": "max\n",
        "sys/fs/cgroup/user/run/memory.current": "10\n",
        "sys/fs/cgroup/user/memory.max": "1000\n",
        "sys/fs/cgroup/user/memory.current": "700\n",
        "sys/fs/cgroup/user/memory.stat": "anon 500\ninactive_file 50\n",
    }
    assert memory._cgroup_rooms(write(tmp_path / "v2", second)) == [1000 - 700 + 50]
    first = {
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/jobs/7\n0::/\n",
        "sys/fs/cgroup/memory/jobs/7/memory.limit_in_bytes": "2000\n",
        "sys/fs/cgroup/memory/jobs/7/memory.usage_in_bytes": "1500\n",
        "sys/fs/cgroup/memory/jobs/7/memory.stat": "total_inactive_file 100\n",
    }
    assert memory._cgroup_rooms(write(tmp_path / "v1", first)) == [2000 - 1500 + 100]
    assert memory._cgroup_rooms(tmp_path / "nothing") == []


def test_free_memory_is_the_least_that_anything_leaves(monkeypatch):
    monkeypatch.setattr(memory, "_available_memory", lambda: 500)
    for rooms, expected in (([], 500), ([700, 300], 300), ([-20], 0)):
        monkeypatch.setattr(memory, "_cgroup_rooms", lambda rooms=rooms: rooms)
        assert free_memory(CPU) == expected
    monkeypatch.setattr(memory, "_available_memory", lambda: None)
    monkeypatch.setattr(memory, "_cgroup_rooms", list)
    assert free_memory(CPU) is None


def test_what_is_compiled_is_compiled_while_it_is_measured() -> None:
    """torch refuses to compile under a dispatch mode that does not allow it; Gemma-2's FlexAttention is compiled."""
    double = torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)
    with memory._Storages(CPU, vocabulary=10):
        assert double(torch.ones(2)).tolist() == [2, 2]
