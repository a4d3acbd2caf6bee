"""`simpo plan`: from a recipe and a number of GPUs to a mesh, what it holds, what it sends, and what would help.

Sizes are picked in an order of preference, the first that fits the recipe's longest pair: as few GPUs to a copy of the
model as will do, a node's before the network's; checkpointing before weights are spread over nodes; context
parallelism, then tensor parallelism, only where nothing else fits. Everything follows from the model's configuration:
no weights, no data, no GPU. Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from simpo.core.optimizers import OPTIMIZERS
from simpo.model.costs import check_heads
from simpo.parallel.mesh import MeshSizes, mesh_sizes
from simpo.plan.footprint import (
    GIB,
    RUNTIME_BYTES,
    Footprint,
    StateBytes,
    compute_footprint,
    compute_state,
)
from simpo.plan.shapes import load_config
from simpo.plan.sizes import ModelSizes, describe_model
from simpo.plan.traffic import Exchange, compute_traffic
from simpo.recipe import Recipe
from simpo.run.memory import SHARE_OF_FREE

MOST_GPUS = 1024  # how far the search for enough GPUs goes
_ROUND_TO, _MOST_TOKENS = 64, 2**24


@dataclass(frozen=True)
class Machines:
    """The GPUs of a run."""

    gpus: int
    gpus_per_node: int
    gpu_gib: float  # memory of one; what is sold as 80 GB is 79 to 80 GiB

    @property
    def gpu_bytes(self) -> int:
        return int(self.gpu_gib * GIB)

    @property
    def nodes(self) -> int:
        return self.gpus // self.gpus_per_node

    def more(self) -> Machines:
        """The next that one would rent: a node of 2, 4 or 8 GPUs, then twice as many nodes."""
        if self.nodes > 1 or self.gpus >= 8:
            return replace(self, gpus=2 * self.gpus)
        gpus = 1 << self.gpus.bit_length()
        return replace(self, gpus=gpus, gpus_per_node=gpus)

    @classmethod
    def of(cls, *, gpus: int | None, nodes: int | None, gpus_per_node: int | None, gpu_gib: float) -> Machines:
        """From what was given of --gpus, --nodes and --gpus-per-node.

        Raises:
            ValueError: they contradict each other, or a node would be half full.
        """
        if not 0 < gpu_gib < math.inf:
            raise ValueError(f"--gpu-memory {gpu_gib:g}: must be a number of GiB above 0")
        if gpus is None:
            per_node = gpus_per_node or 8
            return cls((nodes or 1) * per_node, per_node, gpu_gib)
        per_node = (gpus_per_node or gpus // nodes) if nodes else min(gpus, gpus_per_node or 8)
        if not per_node or gpus % per_node or nodes not in (None, gpus // per_node):
            many = "whole" if nodes is None else nodes
            raise ValueError(f"--gpus {gpus}: not {many} nodes of {per_node} GPUs; see --nodes and --gpus-per-node")
        return cls(gpus, per_node, gpu_gib)


def plan_recipe(recipe: Recipe, machines: Machines, *, shape: str | None = None) -> Plan:
    """Pick sizes for a recipe, or report on those that it has.

    A recipe that sets any size of the mesh keeps all of them, and its gradient_checkpointing.

    Args:
        shape: a known shape or a configuration's file instead of the recipe's model.
    Raises:
        ValueError: no such model, sizes that do not multiply to the GPUs, heads that do not divide.
    """
    config = load_config(
        shape or recipe.model_name_or_path,
        revision=recipe.model_revision or "main",
        trust_remote_code=recipe.trust_remote_code,
    )
    recipe = recipe.model_copy(update={"device": "cuda"})
    search = Search(shape or recipe.model_name_or_path, config, recipe, machines)
    if not is_fixed(recipe):
        return search.first_that_fits() or search.least()
    mesh = mesh_sizes(recipe, machines.gpus)
    check_heads(config, mesh)
    if mesh.tp > machines.gpus_per_node:
        raise ValueError(f"tp = {mesh.tp}: reaches beyond a node of {machines.gpus_per_node} GPUs; lower it")
    _check_optimizer(recipe, mesh)
    return Plan(search, mesh, recipe)


def is_fixed(recipe: Recipe) -> bool:
    """Whether the recipe says what its mesh is."""
    return recipe.dp_shard is not None or (recipe.dp_replicate, recipe.cp, recipe.tp) != (1, 1, 1)


def _check_optimizer(recipe: Recipe, mesh: MeshSizes) -> None:
    """What `parallel.sharding` refuses as well."""
    whole = {"optim": not OPTIMIZERS[recipe.optim].shards, "load_in_4bit": recipe.load_in_4bit}
    for key, needed in {**whole, "optimizer_offload": recipe.optimizer_offload}.items():
        if mesh.is_sharded and needed:
            value = str(getattr(recipe, key)).lower()
            raise ValueError(f"{key}: {value} cannot be sharded; set dp_shard, cp and tp to 1")


@dataclass(frozen=True)
class Search:
    """The meshes that a model and a recipe allow on some machines, in order of preference."""

    name: str
    config: Any
    recipe: Recipe
    machines: Machines

    @cached_property
    def model(self) -> ModelSizes:
        return describe_model(self.config, self.recipe, name=self.name)

    @property
    def longest_pair(self) -> int:
        return 2 * self.recipe.max_length

    @property
    def needed(self) -> int:
        """Tokens that must fit: the recipe's own number, its longest pair's, or without packing so many of these."""
        if not self.recipe.pack:
            return self.recipe.per_device_train_batch_size * self.longest_pair
        return self.recipe.max_tokens_per_micro_batch or self.longest_pair

    def candidates(self) -> Iterator[Plan]:
        """Every mesh worth trying, best first, with and without checkpointing."""
        recipes = [self.recipe]
        if not self.recipe.gradient_checkpointing:
            recipes.append(self.recipe.model_copy(update={"gradient_checkpointing": True}))
        for cp, tp in self._splits():
            ranks, near = self.machines.gpus // (cp * tp), self.machines.gpus_per_node // (cp * tp)
            shards = [n for n in _divisors(ranks) if n in (1, near) or n % near == 0]
            for scope in ([n for n in shards if n <= near], [n for n in shards if n > near]):
                for recipe in recipes:
                    for shard in scope:
                        mesh = MeshSizes(ranks // shard, shard, cp, tp)
                        if self._is_possible(mesh):
                            yield Plan(self, mesh, recipe)

    def first_that_fits(self) -> Plan | None:
        return next((plan for plan in self.candidates() if plan.fits), None)

    def least(self) -> Plan:
        """The candidate that comes closest, among those whose weights, gradients and moments take the least."""
        found = list(self.candidates())
        states = [sum(plan.state) for plan in found]
        near = [
            plan
            for plan, state in zip(found, states, strict=True)
            if state <= 1.1 * min(states) and plan.recipe is found[-1].recipe
        ]
        return min(near, key=lambda plan: plan.peak(self.needed))

    def fitting(self, mesh: MeshSizes) -> Plan | None:
        """What fits this recipe: its own mesh where it has one."""
        if not is_fixed(self.recipe):
            return self.first_that_fits()
        plan = Plan(self, mesh, self.recipe)
        return plan if self._is_possible(mesh) and plan.fits else None

    def _splits(self) -> list[tuple[int, int]]:
        """(cp, tp) that stay within a node and divide the heads; cp before tp, since it sends less."""
        sizes = _divisors(self.machines.gpus_per_node)
        pairs = [(cp, tp) for tp in sizes for cp in sizes if self.machines.gpus_per_node % (cp * tp) == 0]
        return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]))

    def _is_possible(self, mesh: MeshSizes) -> bool:
        try:
            check_heads(self.config, mesh)
            _check_optimizer(self.recipe, mesh)
        except ValueError:
            return False
        return True


@dataclass(frozen=True)
class Plan:
    """A mesh, and what it comes to."""

    search: Search  # that found it: what was asked for, and what could be had instead
    mesh: MeshSizes
    recipe: Recipe  # with the plan's gradient_checkpointing

    @property
    def model(self) -> ModelSizes:
        return self.search.model

    @property
    def machines(self) -> Machines:
        return self.search.machines

    @property
    def longest_pair(self) -> int:
        return self.search.longest_pair

    @property
    def state(self) -> StateBytes:
        return compute_state(self.model, self.recipe, self.mesh)

    def peak(self, tokens: int) -> int:
        """Of a GPU with so many tokens in a micro-batch."""
        return compute_footprint(self.model, self.recipe, self.mesh, tokens=tokens).total

    @property
    def reserve(self) -> int:
        """Bytes that are not planned with: as a run does, a tenth of what is free once the weights are loaded."""
        free = self.machines.gpu_bytes - RUNTIME_BYTES - self.state.weights
        return int((1 - SHARE_OF_FREE["cuda"]) * max(0, free))

    def leaves_reserve(self, tokens: int) -> bool:
        """Whether a micro-batch of so many tokens does; nothing is traced where the state alone does not."""
        room, state = self.machines.gpu_bytes - self.reserve, self.state
        least = RUNTIME_BYTES + state.weights + state.gradients + state.moments * (not self.recipe.optimizer_offload)
        return least <= room and self.peak(tokens) <= room

    @cached_property
    def fits(self) -> bool:
        """Whether the tokens that must fit do."""
        return self.leaves_reserve(self.search.needed)

    @cached_property
    def tokens_that_fit(self) -> int:
        """Most in a micro-batch that leave the reserve free; 0 where not even the model fits."""
        room = self.machines.gpu_bytes - self.reserve
        low, high = (n * self.mesh.cp for n in (2 * _ROUND_TO, 4096))
        if not self.leaves_reserve(low):
            return 0
        while high < _MOST_TOKENS and self.peak(high) <= room:
            low, high = high, 4 * high
        for _ in range(4):  # what is held is nearly linear in the tokens
            below, above = self.peak(low), self.peak(high)
            guess = int(low + (high - low) * (room - below) / max(1, above - below)) // _ROUND_TO * _ROUND_TO
            if not low < guess < high:
                break
            low, high = (guess, high) if self.peak(guess) <= room else (low, guess)
        most = low // _ROUND_TO * _ROUND_TO
        return max(most, self.search.needed) if self.fits else most

    @property
    def tokens(self) -> int:
        """Of the micro-batch that `footprint` and `exchanges` are for: never more than a rank's share of a step."""
        if not self.recipe.pack:
            return self.search.needed
        share = self.search.recipe.pairs_per_step() * self.longest_pair
        most = min(max(self.tokens_that_fit, self.search.needed), share)
        return self.search.recipe.max_tokens_per_micro_batch or most

    @cached_property
    def footprint(self) -> Footprint:
        return compute_footprint(self.model, self.recipe, self.mesh, tokens=self.tokens)

    @cached_property
    def exchanges(self) -> list[Exchange]:
        near = self.machines.gpus_per_node
        return compute_traffic(self.model, self.recipe, self.mesh, tokens=self.tokens, gpus_per_node=near)

    @cached_property
    def choices(self) -> dict[str, tuple[Any, str]]:
        """The sizes of the mesh, checkpointing and tokens: each with its value, and why it is what it is."""
        sizes: dict[str, Any] = asdict(self.mesh) | {"gradient_checkpointing": self.recipe.gradient_checkpointing}
        if is_fixed(self.search.recipe):
            reasons = dict.fromkeys(sizes, "as the recipe says")
        elif not self.fits:
            reasons = dict.fromkeys(sizes, "") | {"dp_replicate": "no mesh fits; this one needs the least"}
        else:
            reasons = self._reasons()
        given = self.search.recipe.max_tokens_per_micro_batch
        reason = (
            f"fills a GPU up to a reserve of {gib(self.reserve)}; unless the recipe sets it, a run measures its own"
        )
        if given is not None:
            reason = f"as the recipe says; {'only ' * (not self.fits)}{self.tokens_that_fit:,} fit"
        elif not self.fits:
            reason = f"the longest pair has {self.longest_pair:,} tokens"
        found = {key: (value, reasons[key]) for key, value in sizes.items()}
        if not self.recipe.pack:
            reason = f"as the recipe says; without packing a micro-batch is {self.search.needed:,} tokens at once"
            return found | {"per_device_train_batch_size": (self.recipe.per_device_train_batch_size, reason)}
        return found | {"max_tokens_per_micro_batch": (given or self.tokens_that_fit, reason)}

    def _reasons(self) -> dict[str, str]:
        """Why each size of a mesh that was picked is what it is: what a GPU would need otherwise."""
        mesh = self.mesh

        def without(**changes: int) -> str:
            return gib(replace(self, mesh=replace(mesh, **changes)).peak(self.search.needed))

        reasons = {"dp_replicate": "one GPU", "dp_shard": "the whole training state fits on one GPU"}
        if mesh.world > 1:
            reasons["dp_replicate"] = "one copy of the model over all GPUs"
        if mesh.dp_replicate > 1:
            reasons["dp_replicate"] = f"{mesh.dp_replicate} copies of the model, each trained on other pairs"
        near = self.machines.gpus_per_node // (mesh.cp * mesh.tp)
        if mesh.dp_shard > near:
            needed = without(dp_replicate=self.machines.gpus // (near * mesh.cp * mesh.tp), dp_shard=near)
            reasons["dp_shard"] = f"over {mesh.dp_shard // near} nodes; sharded over one, a GPU needs {needed}"
        elif mesh.dp_shard > 1:
            needed = without(dp_replicate=mesh.data, dp_shard=1)
            reasons["dp_shard"] = f"within a node, where links are fast; unsharded, a GPU needs {needed}"
        elif mesh.cp * mesh.tp > 1:
            reasons["dp_shard"] = "cp and tp spread each copy already"
        pair = f"the longest pair ({self.longest_pair:,} tokens)"
        reasons["cp"] = f"{pair} fits on one GPU"
        if mesh.cp > 1:
            needed = without(cp=1, dp_shard=mesh.dp_shard * mesh.cp)
            reasons["cp"] = f"{pair} needs {needed} unless GPUs share its tokens"
        reasons["tp"] = "not needed, and it sends the most"
        if mesh.tp > 1:
            reasons["tp"] = f"without it a GPU needs {without(tp=1, dp_shard=mesh.dp_shard * mesh.tp)}"
        reasons["gradient_checkpointing"] = "the longest pair fits without it; it costs about a third more time"
        if self.recipe.gradient_checkpointing:
            other = replace(self, recipe=self.recipe.model_copy(update={"gradient_checkpointing": False}))
            said = "as the recipe says; " if self.search.recipe.gradient_checkpointing else ""
            reasons["gradient_checkpointing"] = f"{said}without it a GPU needs {gib(other.peak(self.search.needed))}"
        return reasons

    @cached_property
    def remedies(self) -> list[str]:
        """What would make it fit, where it does not, each on its own, cheapest for the run first."""
        return [] if self.fits else list(self._remedies())

    def _remedies(self) -> Iterator[str]:
        search, machines = self.search, self.machines
        if is_fixed(search.recipe):
            other = replace(search, recipe=_unfixed(search.recipe)).first_that_fits()
            if other is not None:
                yield f"another mesh of the same GPUs ({changed_keys(other.mesh, other.recipe)})"
        for values in _REMEDIES:
            if any(getattr(search.recipe, key) != value for key, value in values.items()):
                other = replace(search, recipe=search.recipe.model_copy(update=values)).fitting(self.mesh)
                if other is not None:
                    words = " and ".join(f"{key}: {str(value).lower()}" for key, value in values.items())
                    yield f"{words} ({other._changes()})"
        while machines.gpus < MOST_GPUS:
            machines = machines.more()
            other = replace(search, recipe=_unfixed(search.recipe), machines=machines).first_that_fits()
            if other is not None:
                yield f"{machines.gpus} GPUs ({other._changes()})"
                break
        if self.longest_pair <= self.tokens_that_fit < search.needed:
            fewer = f"per_device_train_batch_size: {self.tokens_that_fit // self.longest_pair}"
            yield f"max_tokens_per_micro_batch: {self.tokens_that_fit}" if search.recipe.pack else fewer
        elif self.tokens_that_fit >= 2 * 64:
            yield f"max_length: {self.tokens_that_fit // 2} (instead of {search.recipe.max_length})"

    def _changes(self) -> str:
        cpu = sum(compute_footprint(self.model, self.recipe, self.mesh, tokens=self.search.needed).offloaded.values())
        words = changed_keys(self.mesh, self.recipe) or "on one GPU"
        return words + (f"; {gib(cpu)} of CPU memory for each process" if cpu else "")


_BF16 = {"master_dtype": "bfloat16", "optim": "adamw_bf16"}
_REMEDIES: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"optim": "adamw_bf16"},
    {"optim": "adamw_8bit"},
    {"activation_offload": True},
    {**_BF16, "optimizer_offload": True},
    _BF16,
    {"use_peft": True},
    {"use_peft": True, "master_dtype": "bfloat16"},
    {"use_peft": True, "load_in_4bit": True},
)


def _unfixed(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"dp_replicate": 1, "dp_shard": None, "cp": 1, "tp": 1})


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def changed_keys(mesh: MeshSizes, recipe: Recipe) -> str:
    """Keys of the recipe that a mesh and its checkpointing set to other than their defaults."""
    shown = [f"{name}: {size}" for name, size in asdict(mesh).items() if size != 1]
    if mesh.world > 1 and mesh.dp_shard == 1:
        shown.insert(0, "dp_shard: 1")
    return ", ".join([*shown, *(["gradient_checkpointing: true"] if recipe.gradient_checkpointing else [])])


def gib(size: float) -> str:
    """For people."""
    return f"{size / GIB:.1f} GiB"
