"""`simpo plan`: from a recipe and a number of GPUs to a mesh, what it holds, what it sends, and what would help.

Sizes are picked in an order of preference, the first that fits the recipe's longest pair: as few GPUs to a copy of the
model as will do, a node's before the network's; checkpointing before weights are spread over nodes; context
parallelism, then tensor parallelism, only where nothing else fits. Everything follows from the model's configuration:
no weights, no data, no GPU. Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from simpo.core.optimizers import OPTIMIZERS
from simpo.parallel.mesh import MeshSizes, check_heads, mesh_sizes
from simpo.plan.footprint import GIB, Footprint, compute_footprint, compute_reserve, compute_state, fit_tokens, fits
from simpo.plan.shapes import load_config
from simpo.plan.sizes import ModelSizes, describe_model
from simpo.plan.traffic import Exchange, compute_traffic
from simpo.recipe import Recipe

MOST_GPUS = 1024  # how far the search for enough GPUs goes


@dataclass(frozen=True)
class Machines:
    """The GPUs of a run.

    Attributes:
        gpu_gib: memory of one; what is sold as 80 GB is 79 to 80 GiB.
    """

    gpus: int
    gpus_per_node: int
    gpu_gib: float

    @property
    def gpu_bytes(self) -> int:
        return int(self.gpu_gib * GIB)

    @property
    def nodes(self) -> int:
        return self.gpus // self.gpus_per_node

    @classmethod
    def of(cls, *, gpus: int | None, nodes: int | None, gpus_per_node: int | None, gpu_gib: float) -> Machines:
        """From what was given of --gpus, --nodes and --gpus-per-node.

        Raises:
            ValueError: they contradict each other, or a node would be half full.
        """
        if gpu_gib <= 0:
            raise ValueError(f"--gpu-memory {gpu_gib:g}: must be more than 0 GiB")
        if gpus is None:
            per_node = gpus_per_node or 8
            return cls((nodes or 1) * per_node, per_node, gpu_gib)
        if nodes is not None:
            per_node = gpus_per_node or gpus // nodes
            if per_node * nodes != gpus:
                raise ValueError(f"--gpus {gpus}: {nodes} nodes of {per_node} GPUs have {nodes * per_node}")
            return cls(gpus, per_node, gpu_gib)
        per_node = min(gpus, gpus_per_node or 8)
        if gpus % per_node:
            raise ValueError(f"--gpus {gpus}: not a multiple of the {per_node} GPUs of a node; see --gpus-per-node")
        return cls(gpus, per_node, gpu_gib)


@dataclass(frozen=True)
class Choice:
    """One size, and why it is what it is."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """A mesh, and what it comes to.

    Attributes:
        recipe: with the plan's gradient_checkpointing.
        longest_pair: tokens of the longest pair that the recipe lets through: two sequences of max_length.
        tokens: of a micro-batch that `footprint` and `exchanges` are for.
        tokens_that_fit: most that leave the reserve free; 0 where not even the model fits.
        choices: the sizes of the mesh, checkpointing and tokens, in that order.
        search: that found it.
    """

    search: Search
    model: ModelSizes
    machines: Machines
    mesh: MeshSizes
    recipe: Recipe
    longest_pair: int
    tokens: int
    tokens_that_fit: int
    footprint: Footprint
    reserve: int
    exchanges: tuple[Exchange, ...]
    choices: tuple[Choice, ...] = ()

    @cached_property
    def remedies(self) -> tuple[str, ...]:
        """What would make it fit, where it does not; looked for when it is asked for."""
        return () if self.fits else tuple(self.search.remedies(self))

    @property
    def fits(self) -> bool:
        """Whether `tokens` leave the reserve free."""
        return self.tokens_that_fit >= self.tokens


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
        return search.report(*(search.first_that_fits() or search.least()))
    mesh = mesh_sizes(recipe, machines.gpus)
    check_heads(config, mesh)
    if mesh.tp > machines.gpus_per_node:
        raise ValueError(f"tp = {mesh.tp}: reaches beyond a node of {machines.gpus_per_node} GPUs; lower it")
    _check_optimizer(recipe, mesh)
    return search.report(mesh, recipe)


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


Candidate = tuple[MeshSizes, Recipe]


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
        """Tokens that must fit: the recipe's own number, or its longest pair's."""
        return self.recipe.max_tokens_per_micro_batch or self.longest_pair

    def candidates(self) -> Iterator[Candidate]:
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
                            yield mesh, recipe

    def first_that_fits(self) -> Candidate | None:
        return next((found for found in self.candidates() if self.fits(*found)), None)

    def least(self) -> Candidate:
        """The candidate that comes closest, among those whose weights, gradients and moments take the least."""
        found = [(compute_state(self.model, recipe, mesh).total, mesh, recipe) for mesh, recipe in self.candidates()]
        least = min(state for state, *_ in found)
        near = [(mesh, recipe) for state, mesh, recipe in found if state <= 1.1 * least and recipe is found[-1][2]]
        return min(near, key=lambda each: self.peak(*each))

    def fits(self, mesh: MeshSizes, recipe: Recipe) -> bool:
        return fits(self.model, recipe, mesh, tokens=self.needed, gpu_bytes=self.machines.gpu_bytes)

    def peak(self, mesh: MeshSizes, recipe: Recipe) -> int:
        """Of a GPU with the `needed` tokens in a micro-batch."""
        return compute_footprint(self.model, recipe, mesh, tokens=self.needed).total

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

    # --- the report --------------------------------------------------------------------------------------------------

    def report(self, mesh: MeshSizes, recipe: Recipe) -> Plan:
        """Everything about one mesh."""
        size = {"gpu_bytes": self.machines.gpu_bytes}
        most = fit_tokens(self.model, recipe, mesh, **size)
        if self.fits(mesh, recipe):  # which is not rounded down
            most = max(most, self.needed)
        share = self.recipe.pairs_per_step() * self.longest_pair  # of one rank in a step, at the most
        tokens = self.recipe.max_tokens_per_micro_batch or min(max(most, self.needed), share)
        sent = compute_traffic(self.model, recipe, mesh, tokens=tokens, gpus_per_node=self.machines.gpus_per_node)
        plan = Plan(
            search=self,
            model=self.model,
            machines=self.machines,
            mesh=mesh,
            recipe=recipe,
            longest_pair=self.longest_pair,
            tokens=tokens,
            tokens_that_fit=most,
            footprint=compute_footprint(self.model, recipe, mesh, tokens=tokens),
            reserve=compute_reserve(self.model, recipe, mesh, **size),
            exchanges=tuple(sent),
        )
        return replace(plan, choices=tuple(self._choices(plan)))

    def _choices(self, plan: Plan) -> Iterator[Choice]:
        sizes: dict[str, Any] = asdict(plan.mesh) | {"gradient_checkpointing": plan.recipe.gradient_checkpointing}
        if is_fixed(self.recipe):
            reasons = dict.fromkeys(sizes, "as the recipe says")
        elif not plan.fits:
            reasons = dict.fromkeys(sizes, "") | {"dp_replicate": "no mesh fits; this one needs the least"}
        else:
            reasons = self._reasons(plan.mesh, plan.recipe)
        for name, value in sizes.items():
            yield Choice(name, value, reasons[name])
        given = self.recipe.max_tokens_per_micro_batch
        reason = (
            f"fills a GPU up to a reserve of {gib(plan.reserve)}; unless the recipe sets it, a run measures its own"
        )
        if given is not None:
            reason = f"as the recipe says; {'only ' * (not plan.fits)}{plan.tokens_that_fit:,} fit"
        elif not plan.fits:
            reason = f"the longest pair has {plan.longest_pair:,} tokens"
        yield Choice("max_tokens_per_micro_batch", given or plan.tokens_that_fit, reason)

    def _reasons(self, mesh: MeshSizes, recipe: Recipe) -> dict[str, str]:
        """Why each size of a mesh that was picked is what it is: what a GPU would need otherwise."""

        def without(**changes: int) -> str:
            return gib(self.peak(replace(mesh, **changes), recipe))

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
            reasons["cp"] = (
                f"{pair} needs {without(cp=1, dp_shard=mesh.dp_shard * mesh.cp)} unless GPUs share its tokens"
            )
        reasons["tp"] = "not needed, and it sends the most"
        if mesh.tp > 1:
            reasons["tp"] = f"without it a GPU needs {without(tp=1, dp_shard=mesh.dp_shard * mesh.tp)}"
        reasons["gradient_checkpointing"] = "the longest pair fits without it; it costs about a third more time"
        if recipe.gradient_checkpointing:
            needed = gib(self.peak(mesh, recipe.model_copy(update={"gradient_checkpointing": False})))
            said = "as the recipe says; " if self.recipe.gradient_checkpointing else ""
            reasons["gradient_checkpointing"] = f"{said}without it a GPU needs {needed}"
        return reasons

    def remedies(self, plan: Plan) -> Iterator[str]:
        """What would make the longest pair fit, each on its own, cheapest for the run first."""
        if is_fixed(self.recipe):
            other = replace(self, recipe=_unfixed(self.recipe)).first_that_fits()
            if other is not None:
                yield f"another mesh of the same GPUs ({changed_keys(*other)})"
        for values in _REMEDIES:
            if any(getattr(self.recipe, key) != value for key, value in values.items()):
                other = replace(self, recipe=self.recipe.model_copy(update=values))
                if found := other._fitting(plan.mesh):
                    words = " and ".join(f"{key}: {str(value).lower()}" for key, value in values.items())
                    yield f"{words} ({other._changes(*found)})"
        machines = self.machines
        while machines.gpus < MOST_GPUS:
            more = machines.gpus * 2
            machines = replace(machines, gpus=more, gpus_per_node=min(more, max(8, machines.gpus_per_node)))
            other = replace(self, recipe=_unfixed(self.recipe), machines=machines)
            if found := other._fitting(plan.mesh):
                yield f"{machines.gpus} GPUs ({other._changes(*found)})"
                break
        if self.longest_pair <= plan.tokens_that_fit < self.needed:
            yield f"max_tokens_per_micro_batch: {plan.tokens_that_fit}"
        elif plan.tokens_that_fit >= 2 * 64:
            yield f"max_length: {plan.tokens_that_fit // 2} (instead of {self.recipe.max_length})"

    def _fitting(self, mesh: MeshSizes) -> Candidate | None:
        """What fits this recipe: its own mesh where it has one."""
        if not is_fixed(self.recipe):
            return self.first_that_fits()
        return (mesh, self.recipe) if self._is_possible(mesh) and self.fits(mesh, self.recipe) else None

    def _changes(self, mesh: MeshSizes, recipe: Recipe) -> str:
        cpu = sum(compute_footprint(self.model, recipe, mesh, tokens=self.needed).offloaded.values())
        words = changed_keys(mesh, recipe) or "on one GPU"
        return words + (f"; {gib(cpu)} of CPU memory for each process" if cpu else "")


_BF16 = {"master_dtype": "bfloat16", "optim": "adamw_bf16"}
_REMEDIES: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"optim": "adamw_bf16"},
    {"optim": "adamw_8bit"},
    {"fsdp_cpu_offload": True},
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
