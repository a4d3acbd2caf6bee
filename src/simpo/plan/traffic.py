"""What the ranks of a mesh send each other in one optimizer step, on paper: bytes, and the least time they take.

Of a buffer of S bytes among n ranks, each sends

    all-gather, reduce-scatter    S (n - 1) / n        S: the whole, gathered
    all-reduce                  2 S (n - 1) / n        S: what every rank holds
    all-to-all                    S (n - 1) / n        S: what every rank holds

Sizes come from `plan.footprint`'s view of the model. Times are bytes over link speeds plus a latency for each hop of
a ring: nothing of it is measured, and what overlaps with computation is not taken off. Must not import data, the
trainer or evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from simpo.plan.footprint import (
    compute_bytes,
    compute_state,
    gather_bytes,
    key_copies,
    master_bytes,
    unit_numels,
    uses_fsdp,
)

if TYPE_CHECKING:
    from simpo.parallel.mesh import MeshSizes
    from simpo.plan.sizes import ModelSizes
    from simpo.recipe import Recipe

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]


@dataclass(frozen=True)
class Links:
    """Speeds that estimates assume, for one GPU and one direction; an H100 node's, with a 400 Gbit/s card a GPU."""

    node_bytes_per_s: float = 450e9  # between GPUs of one node
    network_bytes_per_s: float = 50e9  # from one GPU into the network between nodes
    hop_s: float = 5e-6  # latency of one step around a ring
    flops_per_s: float = 400e12  # of matrix products in bf16, where computing is compared with sending


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
    recipe: Recipe,
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
    found = _of_weights(model, recipe, mesh, micro_batches)
    found += _of_tokens(model, recipe, mesh, tokens / mesh.cp, labels / mesh.cp, micro_batches)
    exchanges = []
    for name, kind, ranks, apart, times, size, calls in found:
        if size and ranks > 1:
            near = max(1, gpus_per_node // apart)
            near = ranks if ranks <= near else math.gcd(ranks, near)  # how many of them share a node
            exchanges.append(Exchange(name, kind, ranks, near, times * size, times * calls))
    return exchanges


def compute_seconds(
    model: ModelSizes, recipe: Recipe, mesh: MeshSizes, *, tokens: int, micro_batches: int, links: Links
) -> float:
    """The products of weights and tokens of a step on one GPU, attention apart, at the assumed speed.

    Forward once and backward twice; LoRA's backward pass has no gradients of the frozen weights to compute;
    checkpointing computes the blocks' forward once more.
    """
    passes = 2 + (not recipe.use_peft)
    blocks = model.linear_numel * (passes + recipe.gradient_checkpointing)
    operations = 2 * tokens * micro_batches * (blocks + model.head_numel * passes)
    return operations / (mesh.cp * mesh.tp) / links.flops_per_s


# Name, kind, ranks, how far neighbours among them are apart, how often a step; bytes and calls of one time.
_Row = tuple[str, Kind, int, int, int, float, int]


def _of_weights(model: ModelSizes, recipe: Recipe, mesh: MeshSizes, micro_batches: int) -> list[_Row]:
    """FSDP's gathers and reductions, in every micro-batch; DDP's reduction, and that of adapters, once."""
    gradients = compute_state(model, recipe, mesh).gradients
    copies = mesh.shard * mesh.tp
    if not uses_fsdp(mesh):
        return [("DDP: gradients", "all-reduce", mesh.dp_replicate, copies, 1, gradients, 1)]
    units = unit_numels(model, mesh)
    numel = sum(units.values())
    blocks = sum(size for unit, size in units.items() if unit.startswith("block "))
    once = sum(size for unit, size in units.items() if unit.startswith("end"))  # stays gathered
    size = 2 * gather_bytes(recipe) * blocks + master_bytes(recipe) * (2 * (numel - blocks) - once)
    calls = sum(1 if unit.startswith("end") else 2 for unit in units)
    found: list[_Row] = [("FSDP: weights", "all-gather", mesh.shard, mesh.tp, micro_batches, size, calls)]
    if recipe.use_peft:
        return [*found, ("LoRA: gradients", "all-reduce", mesh.gradient, mesh.tp, 1, gradients, 1)]
    each = (micro_batches, 4 * numel, len(units))
    shares = (micro_batches, 4 * numel / mesh.shard, len(units))
    return [
        *found,
        ("FSDP: gradients", "reduce-scatter", mesh.shard, mesh.tp, *each),
        ("HSDP: gradients", "all-reduce", mesh.dp_replicate, copies, *shares),
    ]


def _of_tokens(
    model: ModelSizes, recipe: Recipe, mesh: MeshSizes, tokens: float, labels: float, micro_batches: int
) -> list[_Row]:
    """What tensor and context parallelism exchange in every micro-batch.

    tp: each block's two sums, and in its backward pass one for each of its five split inputs; the head's, over V. What
    checkpointing computes again ends before a block's last sum, but not in the last block.
    cp: q, k and v to the heads' owners and their mixture back, in every block, forward and backward.
    """
    layers, again, number = model.num_layers, int(recipe.gradient_checkpointing), compute_bytes(recipe)
    sums = 7 * layers + again * (layers + 1)
    stream = (sums * number + master_bytes(recipe)) * tokens * model.hidden_size  # and the embedding's
    head = labels * (3 * 4 + 4 * model.hidden_size)  # maximum, sum and label's logit; the gradient of its input
    passes, heads = 2 + again, 2 * (model.num_heads + model.num_kv_heads * key_copies(model, mesh)) / mesh.tp
    exchanged = passes * layers * number * tokens * heads * model.head_dim
    return [
        ("TP: activations", "all-reduce", mesh.tp, 1, micro_batches, stream, sums + 1),
        ("TP: vocabulary-parallel head", "all-reduce", mesh.tp, 1, micro_batches, head, 3),
        ("CP: q, k, v and outputs", "all-to-all", mesh.cp, mesh.tp, micro_batches, exchanged, 2 * passes * layers),
    ]
