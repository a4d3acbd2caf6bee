"""plan.traffic: the formulas of collectives, and what grows with what. Beside real collectives: footprint_peaks."""

from __future__ import annotations

import pytest

from simpo.parallel.mesh import MeshSizes
from simpo.plan.shapes import load_config
from simpo.plan.sizes import describe_model
from simpo.plan.traffic import Exchange, Links, compute_seconds, compute_traffic
from simpo.recipe import load_recipe

PLAIN = load_recipe({"model_name_or_path": "any"})
CHECKPOINTS = load_recipe({"model_name_or_path": "any", "gradient_checkpointing": True})
MODEL = describe_model(load_config("llama-8b"), PLAIN)
LINKS = Links(node_bytes_per_s=400e9, network_bytes_per_s=50e9, hop_s=0.0)


def sent(mesh: MeshSizes, *, model=MODEL, recipe=PLAIN, **changes) -> dict[str, float]:
    found = compute_traffic(model, recipe, mesh, **({"tokens": 8192} | changes))
    return {exchange.name: exchange.sent for exchange in found}


@pytest.mark.parametrize(
    ("kind", "expected"), [("all-gather", 75), ("reduce-scatter", 75), ("all-to-all", 75), ("all-reduce", 150)]
)
def test_bytes_sent_are_the_ring_formulas(kind, expected):
    assert Exchange("x", kind, 4, 4, 100.0, 1).sent == expected


@pytest.mark.parametrize(
    ("near", "kind", "speed"),
    [
        (8, "all-gather", 400e9),  # within a node
        (4, "all-gather", 200e9),  # four network cards, one for each rank of a node
        (1, "all-reduce", 50e9),
        (2, "all-to-all", 50e9 * 7 / 6),  # 6 of 7 other ranks are in other nodes
    ],
)
def test_the_slowest_link_decides(near, kind, speed):
    exchange = Exchange("x", kind, 8, near, 8e9, 1)
    assert exchange.seconds(LINKS) == pytest.approx(exchange.sent / speed)


def test_every_hop_of_every_call_adds_its_latency():
    def latency(kind: str) -> float:
        return Exchange("x", kind, 1024, 8, 0.0, 3).seconds(Links(hop_s=1e-6))

    assert latency("all-gather") == pytest.approx(3 * 1023e-6)
    assert latency("all-reduce") == pytest.approx(6 * 1023e-6)
    assert latency("all-to-all") == pytest.approx(3e-6)


def test_fsdp_gathers_bf16_twice_and_reduces_fp32_once_in_every_micro_batch():
    found = sent(MeshSizes(dp_shard=8), micro_batches=3)
    blocks, ends = MODEL.num_parameters - 2 * MODEL.head_numel, 2 * MODEL.head_numel
    assert found["FSDP: gradients"] == pytest.approx(3 * 4 * (blocks + ends) * 7 / 8)
    # The embedding in fp32 twice, the head (and the last norm) once.
    assert found["FSDP: weights"] == pytest.approx(3 * (2 * 2 * blocks + 4 * 1.5 * ends) * 7 / 8, rel=1e-4)


def test_replicas_of_shards_reduce_what_a_rank_holds():
    found = compute_traffic(MODEL, PLAIN, MeshSizes(4, 8), tokens=8192)
    last = next(exchange for exchange in found if exchange.name == "HSDP: gradients")
    assert (last.ranks, last.ranks_per_node) == (4, 1)
    assert last.sent == pytest.approx(2 * 4 * MODEL.num_parameters / 8 * 3 / 4)
    first = next(exchange for exchange in found if exchange.name == "FSDP: weights")
    assert (first.ranks, first.ranks_per_node) == (8, 8)


def test_ddp_reduces_once_a_step_and_adapters_alone_where_there_are_any():
    one, many = (sent(MeshSizes(dp_replicate=8), micro_batches=count) for count in (1, 5))
    assert one == many == {"DDP: gradients": pytest.approx(2 * 4 * MODEL.num_parameters * 7 / 8)}
    lora = load_recipe({"model_name_or_path": "any", "use_peft": True, "lora_r": 16})
    rank_sums = sum(16 * sum(w.shape) for w in MODEL.weights if w.kind == "linear")
    adapted = describe_model(load_config("llama-8b"), lora)
    found = sent(MeshSizes(dp_replicate=8), model=adapted, recipe=lora)
    assert found == {"DDP: gradients": 2 * 4 * rank_sums * 7 / 8}


def test_tensor_parallel_traffic_grows_with_tokens_and_sharded_weights_do_not():
    mesh = MeshSizes(dp_shard=4, tp=2)
    small, large = sent(mesh, tokens=1024), sent(mesh, tokens=4096)
    for name in small:
        assert large[name] == pytest.approx(small[name] * (4 if name.startswith("TP") else 1))


def test_context_parallel_exchanges_queries_keys_values_and_outputs():
    """Llama-3-8B: 32 query and 8 key heads of 128; with 16 ranks each key head is sent twice."""
    for cp, copies in ((8, 1), (16, 2)):
        found = sent(MeshSizes(cp=cp), tokens=16384)["CP: q, k, v and outputs"]
        numbers = (2 * 32 + 2 * 8 * copies) * 128
        assert found == pytest.approx(2 * 32 * 2 * numbers * 16384 / cp * (cp - 1) / cp)


def test_checkpointing_sends_the_forward_pass_again_but_no_weights():
    mesh = MeshSizes(dp_shard=2, cp=2, tp=2)
    plain, more = sent(mesh), sent(mesh, recipe=CHECKPOINTS)
    assert more["CP: q, k, v and outputs"] == pytest.approx(1.5 * plain["CP: q, k, v and outputs"])
    assert more["TP: activations"] > plain["TP: activations"]
    assert more["FSDP: weights"] == plain["FSDP: weights"]


def test_one_gpu_sends_nothing():
    assert sent(MeshSizes()) == {}


def test_groups_know_how_many_of_their_ranks_share_a_node():
    found = {e.name: e for e in compute_traffic(MODEL, PLAIN, MeshSizes(2, 16, 1, 4), tokens=64)}
    assert (found["TP: activations"].ranks, found["TP: activations"].ranks_per_node) == (4, 4)
    assert (found["FSDP: weights"].ranks, found["FSDP: weights"].ranks_per_node) == (16, 2)
    assert (found["HSDP: gradients"].ranks, found["HSDP: gradients"].ranks_per_node) == (2, 1)


def test_computing_takes_three_forward_passes_and_one_more_of_the_blocks_with_checkpointing():
    options = {"tokens": 1000, "micro_batches": 2, "links": Links(flops_per_s=1e12)}
    plain = compute_seconds(MODEL, PLAIN, MeshSizes(), **options)
    assert plain == pytest.approx(2 * 2000 * 3 * (MODEL.linear_numel + MODEL.head_numel) / 1e12)
    again = compute_seconds(MODEL, CHECKPOINTS, MeshSizes(), **options)
    assert again - plain == pytest.approx(2 * 2000 * MODEL.linear_numel / 1e12)
    assert compute_seconds(MODEL, PLAIN, MeshSizes(tp=4), **options) == pytest.approx(plain / 4)
