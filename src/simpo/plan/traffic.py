"""What the ranks of a mesh send each other in one optimizer step, on paper: bytes, and the least time they take.

Of a buffer of S bytes among n ranks, each sends

    all-gather, reduce-scatter    S (n - 1) / n        S: the whole, gathered
    all-reduce                  2 S (n - 1) / n        S: what every rank holds
    all-to-all                    S (n - 1) / n        S: what every rank holds

Sizes come from `plan.footprint`'s view of the model. Times are bytes over link speeds plus a latency for each hop of
a ring: nothing of it is measured, and what overlaps with computation is not taken off. Must not import data, train or
evaluate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from simpo.plan.footprint import StepOptions, adapter_numels, key_copies, unit_numels, uses_fsdp

if TYPE_CHECKING:
    from simpo.parallel.mesh import MeshSizes
    from simpo.plan.sizes import ModelSizes

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]


@dataclass(frozen=True)
class Links:
    """Speeds that estimates assume, for one GPU and one direction; those of an H100 node with a 400 Gbit/s card a GPU.

    Attributes:
        node_bytes_per_s: between GPUs of one node.
        network_bytes_per_s: from one GPU into the network between nodes.
        hop_s: latency of one step around a ring.
        flops_per_s: of matrix products in bf16, where computing is compared with sending.
    """

    node_bytes_per_s: float = 450e9
    network_bytes_per_s: float = 50e9
    hop_s: float = 5e-6
    flops_per_s: float = 400e12


@dataclass(frozen=True)
class Exchange:
    """One kind of collective within a step.

    Attributes:
        name: what for.
        ranks, ranks_per_node: of its group: all of them, and how many of them share a node.
        size: S of the module's table, in bytes, summed over the `calls` of a step.
    """

    name: str
    kind: Kind
    ranks: int
    ranks_per_node: int
    size: float
    calls: int

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends in a step."""
        return (2 if self.kind == "all-reduce" else 1) * self.size * (self.ranks - 1) / self.ranks

    def seconds(self, links: Links) -> float:
        """The least time it takes.

        A ring over several nodes is as fast as the network cards of the ranks that share a node, together. Of an
        all-to-all each card carries what its own GPU sends to other nodes.
        """
        if self.ranks == self.ranks_per_node:
            speed = links.node_bytes_per_s
        elif self.kind == "all-to-all":
            speed = links.network_bytes_per_s * (self.ranks - 1) / (self.ranks - self.ranks_per_node)
        else:
            speed = min(links.node_bytes_per_s, links.network_bytes_per_s * self.ranks_per_node)
        hops = {"all-reduce": 2 * (self.ranks - 1), "all-to-all": 1}.get(self.kind, self.ranks - 1)
        return self.sent / speed + self.calls * hops * links.hop_s


def compute_traffic(
    model: ModelSizes,
    options: StepOptions,
    mesh: MeshSizes,
    *,
    tokens: int,
    labels: int | None = None,
    micro_batches: int = 1,
    gpus_per_node: int = 8,
) -> list[Exchange]:
    """Every exchange of a step that grows with the model or with the tokens.

    Args:
        tokens: of one micro-batch's whole row, which cp ranks share.
        labels: trained tokens among them; None = all.
        micro_batches: of the step, on each rank.
        gpus_per_node: that neighbouring ranks share.
    """
    labels = tokens if labels is None else labels
    found = _of_weights(model, options, mesh, micro_batches, gpus_per_node)
    if mesh.tp > 1:
        found += _of_tensor_parallel(
            model, options, mesh, tokens / mesh.cp, labels / mesh.cp, micro_batches, gpus_per_node
        )
    if mesh.cp > 1:
        found.append(_of_context_parallel(model, options, mesh, tokens / mesh.cp, micro_batches, gpus_per_node))
    return [exchange for exchange in found if exchange.size and exchange.ranks > 1]


def compute_seconds(
    model: ModelSizes, options: StepOptions, mesh: MeshSizes, *, tokens: int, micro_batches: int, links: Links
) -> float:
    """The products of weights and tokens of a step on one GPU, attention apart, at the assumed speed.

    Forward once and backward twice; LoRA's backward pass has no gradients of the frozen weights to compute;
    checkpointing computes the blocks' forward once more.
    """
    passes = 2 + options.trains_all
    blocks = model.linear_numel * (passes + options.gradient_checkpointing)
    operations = 2 * tokens * micro_batches * (blocks + model.head_numel * passes)
    return operations / (mesh.cp * mesh.tp) / links.flops_per_s


def _of_weights(
    model: ModelSizes, options: StepOptions, mesh: MeshSizes, micro_batches: int, gpus_per_node: int
) -> list[Exchange]:
    """FSDP's gathers and reductions, in every micro-batch; DDP's reduction, and that of adapters, once."""
    units = unit_numels(model, mesh)
    blocks = sum(numel for unit, numel in units.items() if unit.startswith("block "))
    others = sum(units.values()) - blocks
    replicas = (mesh.dp_replicate, max(1, gpus_per_node // (mesh.shard * mesh.tp)))
    if not uses_fsdp(mesh):
        numel = sum(units.values()) if options.trains_all else sum(adapter_numels(model, options, mesh))
        size = (options.master_bytes if options.trains_all else 4) * numel
        return [Exchange("DDP: gradients", "all-reduce", mesh.dp_replicate, _near(*replicas), size, 1)]
    shard = (mesh.shard, _near(mesh.shard, gpus_per_node // mesh.tp))
    once = sum(numel for unit, numel in units.items() if unit.startswith("end"))  # stays gathered
    gathered = 2 * options.gather_bytes * blocks + options.master_bytes * (2 * (others - once) + once)
    calls = micro_batches * sum(1 if unit.startswith("end") else 2 for unit in units)
    found = [Exchange("FSDP: weights", "all-gather", *shard, micro_batches * gathered, calls)]
    if options.trains_all:
        size, calls = 4 * micro_batches * (blocks + others), micro_batches * len(units)
        found.append(Exchange("FSDP: gradients", "reduce-scatter", *shard, size, calls))
        found.append(
            Exchange("HSDP: gradients", "all-reduce", mesh.dp_replicate, _near(*replicas), size / mesh.shard, calls)
        )
    else:
        near = _near(mesh.gradient, gpus_per_node // mesh.tp)
        size = 4 * sum(adapter_numels(model, options, mesh))
        found.append(Exchange("LoRA: gradients", "all-reduce", mesh.gradient, near, size, 1))
    return found


def _of_tensor_parallel(
    model: ModelSizes,
    options: StepOptions,
    mesh: MeshSizes,
    tokens: float,
    labels: float,
    micro_batches: int,
    gpus_per_node: int,
) -> list[Exchange]:
    """Each block's two sums, and in its backward pass one for each of its five split inputs; the head's, over V.

    What checkpointing computes again ends before a block's last sum, but in the last block, which goes on behind it.
    """
    group = (mesh.tp, _near(mesh.tp, gpus_per_node))
    sums = 7 * model.num_layers + options.gradient_checkpointing * (model.num_layers + 1)
    stream = options.compute_bytes * tokens * model.hidden_size
    blocks = sums * stream + options.master_bytes * tokens * model.hidden_size  # and the embedding
    head = labels * (3 * 4 + 4 * model.hidden_size)  # maximum, sum and label's logit; the gradient of its input
    return [
        Exchange(
            "TP: activations",
            "all-reduce",
            *group,
            micro_batches * blocks,
            micro_batches * (sums + 1),
        ),
        Exchange("TP: vocabulary-parallel head", "all-reduce", *group, micro_batches * head, 3 * micro_batches),
    ]


def _of_context_parallel(
    model: ModelSizes, options: StepOptions, mesh: MeshSizes, tokens: float, micro_batches: int, gpus_per_node: int
) -> Exchange:
    """q, k and v to the heads' owners and their mixture back, in every block, forward and backward."""
    queries = model.num_heads * model.head_dim / mesh.tp
    keys = model.num_kv_heads * model.head_dim / mesh.tp * key_copies(model, mesh)
    passes = 2 + options.gradient_checkpointing
    size = passes * model.num_layers * options.compute_bytes * tokens * (2 * queries + 2 * keys)
    near = _near(mesh.cp, gpus_per_node // mesh.tp)
    calls = 2 * passes * model.num_layers * micro_batches
    return Exchange("CP: q, k, v and outputs", "all-to-all", mesh.cp, near, micro_batches * size, calls)


def _near(ranks: int, at_most: int) -> int:
    """How many of a group's ranks share a node."""
    return max(1, math.gcd(ranks, at_most) if ranks > at_most else ranks)
