"""`simpo plan`: from a recipe and a number of GPUs to a mesh, what it holds, what it sends, and what would help.

Sizes are picked in an order of preference, the first that fits the recipe's longest pair: as few GPUs to a copy of the
model as will do, a node's before the network's; checkpointing before weights are spread over nodes; context
parallelism, then tensor parallelism, only where nothing else fits. Everything is computed from the model's
configuration (`plan.footprint`, `plan.traffic`): no weights, no data, no GPU. Must not import data, train or
evaluate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from simpo.parallel.mesh import MeshSizes, check_heads, mesh_sizes
from simpo.plan.footprint import (
    GIB,
    Footprint,
    StepOptions,
    compute_footprint,
    compute_reserve,
    fit_tokens,
    step_options,
)
from simpo.plan.shapes import load_config
from simpo.plan.sizes import ModelSizes, describe_model
from simpo.plan.traffic import Exchange, Links, compute_seconds, compute_traffic
from simpo.recipe import OPTIMIZERS, Recipe

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
        longest_pair: tokens of the longest pair that the recipe lets through: two sequences of max_length.
        tokens: of a micro-batch that `footprint` and `exchanges` are for.
        tokens_that_fit: most that leave the reserve free; 0 where not even the model fits.
        choices: the sizes of the mesh, checkpointing and tokens, in that order.
        remedies: what would make it fit, where it does not.
    """

    model: ModelSizes
    machines: Machines
    mesh: MeshSizes
    options: StepOptions
    longest_pair: int
    tokens: int
    tokens_that_fit: int
    footprint: Footprint
    reserve: int
    exchanges: tuple[Exchange, ...]
    choices: tuple[Choice, ...]
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether `tokens` leave the reserve free."""
        return self.tokens_that_fit >= self.tokens


# --- making one ------------------------------------------------------------------------------------------------------


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
    search = Search(describe_model(config, name=shape or recipe.model_name_or_path), config, recipe, machines)
    if is_fixed(recipe):
        mesh, options = mesh_sizes(recipe, machines.gpus), step_options(recipe)
        check_heads(config, mesh)
        if mesh.tp > machines.gpus_per_node:
            raise ValueError(f"tp = {mesh.tp}: reaches beyond a node of {machines.gpus_per_node} GPUs; lower it")
        _check_optimizer(recipe, mesh)
    else:
        mesh, options = search.first_that_fits() or search.least()
    return search.report(mesh, options)


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

    model: ModelSizes
    config: Any
    recipe: Recipe
    machines: Machines

    @property
    def longest_pair(self) -> int:
        return 2 * self.recipe.max_length

    @property
    def needed(self) -> int:
        """Tokens that must fit: the recipe's own number, or its longest pair's."""
        return self.recipe.max_tokens_per_micro_batch or self.longest_pair

    def candidates(self) -> Iterator[tuple[MeshSizes, StepOptions]]:
        """Every mesh worth trying, best first, with and without checkpointing."""
        plain = step_options(self.recipe)
        checkpointing = [True] if plain.gradient_checkpointing else [False, True]
        for cp, tp in self._splits():
            ranks, near = self.machines.gpus // (cp * tp), self.machines.gpus_per_node // (cp * tp)
            shards = [n for n in _divisors(ranks) if n in (1, near) or n % near == 0]
            for scope in ([n for n in shards if n <= near], [n for n in shards if n > near]):
                for recompute in checkpointing:
                    for shard in scope:
                        mesh = MeshSizes(ranks // shard, shard, cp, tp)
                        if self._is_possible(mesh):
                            yield mesh, replace(plain, gradient_checkpointing=recompute)

    def first_that_fits(self) -> tuple[MeshSizes, StepOptions] | None:
        return next((found for found in self.candidates() if self.fits(*found)), None)

    def least(self) -> tuple[MeshSizes, StepOptions]:
        """The candidate that comes closest."""
        return min(self.candidates(), key=lambda found: self.peak(*found))

    def fits(self, mesh: MeshSizes, options: StepOptions) -> bool:
        reserve = compute_reserve(self.model, options, mesh, gpu_bytes=self.machines.gpu_bytes)
        return self.peak(mesh, options) <= self.machines.gpu_bytes - reserve

    def peak(self, mesh: MeshSizes, options: StepOptions) -> int:
        """Of a GPU with the `needed` tokens in a micro-batch."""
        return compute_footprint(self.model, options, mesh, tokens=self.needed).total

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

    def report(self, mesh: MeshSizes, options: StepOptions) -> Plan:
        """Everything about one mesh."""
        most = fit_tokens(self.model, options, mesh, gpu_bytes=self.machines.gpu_bytes)
        if self.fits(mesh, options):  # which is not rounded down
            most = max(most, self.needed)
        share = self.recipe.pairs_per_step() * self.longest_pair  # of one rank in a step, at the most
        tokens = self.recipe.max_tokens_per_micro_batch or min(max(most, self.needed), share)
        plan = Plan(
            model=self.model,
            machines=self.machines,
            mesh=mesh,
            options=options,
            longest_pair=self.longest_pair,
            tokens=tokens,
            tokens_that_fit=most,
            footprint=compute_footprint(self.model, options, mesh, tokens=tokens),
            reserve=compute_reserve(self.model, options, mesh, gpu_bytes=self.machines.gpu_bytes),
            exchanges=tuple(
                compute_traffic(self.model, options, mesh, tokens=tokens, gpus_per_node=self.machines.gpus_per_node)
            ),
            choices=(),
        )
        if not plan.fits:
            plan = replace(plan, remedies=tuple(self._remedies(plan)))
        return replace(plan, choices=tuple(self._choices(plan)))

    def _choices(self, plan: Plan) -> Iterator[Choice]:
        mesh, options = plan.mesh, plan.options
        sizes = asdict(mesh)
        if is_fixed(self.recipe):
            reasons = dict.fromkeys([*sizes, "gradient_checkpointing"], "as the recipe says")
        elif not plan.fits:
            reasons = dict.fromkeys([*sizes, "gradient_checkpointing"], "")
            reasons["dp_replicate"] = "no sizes fit; these need the least memory"
        else:
            reasons = {
                "dp_replicate": self._why_replicate(mesh),
                "dp_shard": self._why_shard(mesh, options),
                "cp": self._why_cp(mesh, options),
                "tp": self._why_tp(mesh, options),
                "gradient_checkpointing": self._why_checkpointing(mesh, options),
            }
        for name, value in sizes.items():
            yield Choice(name, value, reasons[name])
        yield Choice("gradient_checkpointing", options.gradient_checkpointing, reasons["gradient_checkpointing"])
        yield self._tokens(plan)

    def _tokens(self, plan: Plan) -> Choice:
        given = self.recipe.max_tokens_per_micro_batch
        reason = f"fills a GPU up to the reserve of {_gib(plan.reserve)}; left out, a run measures and picks its own"
        if given is not None:
            too_many = plan.tokens_that_fit < given
            reason = f"as the recipe says; {'only ' * too_many}{plan.tokens_that_fit:,} fit"
        elif not plan.fits:
            reason = f"the longest pair has {plan.longest_pair:,} tokens"
        return Choice("max_tokens_per_micro_batch", given or plan.tokens_that_fit, reason)

    def _why_replicate(self, mesh: MeshSizes) -> str:
        copies = mesh.dp_replicate
        if copies == 1:
            return "one copy of the model over all GPUs" if mesh.world > 1 else "one GPU"
        return f"{copies} copies of the model, each computing other pairs; only gradients go between them"

    def _why_shard(self, mesh: MeshSizes, options: StepOptions) -> str:
        if mesh.dp_shard == 1:
            what = "the model with its gradients and moments fits into one GPU"
            return what if mesh.world == mesh.dp_replicate else "the others share each copy already"
        near = self.machines.gpus_per_node // (mesh.cp * mesh.tp)
        fewer = near if mesh.dp_shard > near else 1
        other = MeshSizes(self.machines.gpus // (fewer * mesh.cp * mesh.tp), fewer, mesh.cp, mesh.tp)
        needed = f"{_gib(self.peak(other, options))} a GPU"
        if fewer == 1:
            return f"within a node, whose links are fast; unsharded it takes {needed}"
        return f"over {mesh.dp_shard // near} nodes; sharded within one it takes {needed}"

    def _why_cp(self, mesh: MeshSizes, options: StepOptions) -> str:
        pair = f"the longest pair ({self.longest_pair:,} tokens)"
        if mesh.cp == 1:
            return f"{pair} fits into one GPU"
        alone = replace(mesh, cp=1, dp_shard=mesh.dp_shard * mesh.cp)
        return f"{pair} takes {_gib(self.peak(alone, options))} unless GPUs share its tokens"

    def _why_tp(self, mesh: MeshSizes, options: StepOptions) -> str:
        if mesh.tp == 1:
            return "not needed, and it sends the most"
        alone = replace(mesh, tp=1, dp_shard=mesh.dp_shard * mesh.tp)
        return f"without it a GPU needs {_gib(self.peak(alone, options))}"

    def _why_checkpointing(self, mesh: MeshSizes, options: StepOptions) -> str:
        if not options.gradient_checkpointing:
            return "the longest pair's activations fit without it, and it costs about a third more time"
        without = self.peak(mesh, replace(options, gradient_checkpointing=False))
        said = "as the recipe says; " if self.recipe.gradient_checkpointing else ""
        return f"{said}without it the longest pair takes {_gib(without)}"

    def _remedies(self, plan: Plan) -> Iterator[str]:
        """What would make the longest pair fit, each on its own, cheapest for the run first."""
        mesh, tokens = plan.mesh, plan.tokens_that_fit
        if is_fixed(self.recipe):
            other = replace(self, recipe=_unfixed(self.recipe)).first_that_fits()
            if other is not None:
                yield f"another mesh of the same GPUs ({_keys(*other)})"
        changes = {
            "gradient_checkpointing: true": {"gradient_checkpointing": True},
            "optim: adamw_bf16": {"optim": "adamw_bf16"},
            "optim: adamw_8bit": {"optim": "adamw_8bit"},
            "fsdp_cpu_offload: true": {"fsdp_cpu_offload": True},
            "activation_offload: true": {"activation_offload": True},
            "master_dtype: bfloat16 with optim: adamw_bf16 and optimizer_offload: true": {
                "master_dtype": "bfloat16",
                "optim": "adamw_bf16",
                "optimizer_offload": True,
            },
            "master_dtype: bfloat16 with optim: adamw_bf16": {"master_dtype": "bfloat16", "optim": "adamw_bf16"},
            "use_peft: true (LoRA)": {"use_peft": True},
            "use_peft: true with master_dtype: bfloat16": {"use_peft": True, "master_dtype": "bfloat16"},
            "use_peft: true with load_in_4bit: true (QLoRA)": {"use_peft": True, "load_in_4bit": True},
        }
        for words, values in changes.items():
            if all(getattr(self.recipe, key) == value for key, value in values.items()):
                continue
            other = replace(self, recipe=self.recipe.model_copy(update=values))
            if found := other._fitting(mesh):
                yield f"{words} ({other._changes(*found)})"
        machines = self.machines
        while machines.gpus < MOST_GPUS:
            more = machines.gpus * 2
            machines = replace(machines, gpus=more, gpus_per_node=min(more, max(8, machines.gpus_per_node)))
            other = replace(self, recipe=_unfixed(self.recipe), machines=machines)
            if found := other._fitting(mesh):
                yield f"{machines.gpus} GPUs ({other._changes(*found)})"
                break
        if self.longest_pair <= tokens < self.needed:
            yield f"max_tokens_per_micro_batch: {tokens}"
        elif tokens >= 2 * 64:
            yield f"max_length: {tokens // 2} (of {self.recipe.max_length})"

    def _fitting(self, mesh: MeshSizes) -> tuple[MeshSizes, StepOptions] | None:
        """What fits this recipe: its own mesh where it has one."""
        if not is_fixed(self.recipe):
            return self.first_that_fits()
        options = step_options(self.recipe)
        return (mesh, options) if self._is_possible(mesh) and self.fits(mesh, options) else None

    def _changes(self, mesh: MeshSizes, options: StepOptions) -> str:
        host = compute_footprint(self.model, options, mesh, tokens=self.needed).host
        words = _keys(mesh, options) or "nothing else"
        return words + (f"; {_gib(host)} of host memory for each process" if host else "")


def _unfixed(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"dp_replicate": 1, "dp_shard": None, "cp": 1, "tp": 1})


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


# --- showing it ------------------------------------------------------------------------------------------------------

_MOMENTS = {
    "head": "when the backward pass begins, at the head",
    "blocks": "in the backward pass of a block",
    "embedding": "at the end of the backward pass, at the embedding",
    "update": "when the optimizer updates",
}


def describe_plan(plan: Plan, recipe: Recipe, *, recipe_name: str = "RECIPE", links: Links | None = None) -> str:
    """The plan for people."""
    links = links or Links()
    model, machines = plan.model, plan.machines
    layout = "" if machines.gpus == 1 else f", {machines.nodes} node{'s' * (machines.nodes > 1)}"
    lines = [
        f"{model.name}: {model.num_parameters / 1e9:.2f} billion parameters, {model.num_layers} blocks of width "
        f"{model.hidden_size}, vocabulary {model.vocab_size:,}",
        f"{machines.gpus} GPU{'s' * (machines.gpus > 1)} of {machines.gpu_gib:g} GiB{layout}; {plan.mesh}",
        "",
        *_aligned([(choice.key, _plain(choice.value), choice.reason) for choice in plan.choices]),
        "",
        f"memory of a GPU with {plan.tokens:,} tokens in a micro-batch, {_MOMENTS[plan.footprint.moment]}:",
        *_aligned([(name, _gib(size), "") for name, size in plan.footprint.parts.items()]),
        *_aligned(_totals(plan)),
    ]
    if not model.is_known:
        lines.append("the activations of its blocks are estimated from Llama's, from above: they may take half as much")
    lines += ["", *_traffic_lines(plan, links), "", *_ending(plan, recipe, recipe_name)]
    return "\n".join(line.rstrip() for line in lines)


def _totals(plan: Plan) -> list[tuple[str, str, str]]:
    limit = plan.machines.gpu_bytes
    rows = [("in all", _gib(plan.footprint.total), f"of {_gib(limit)}"), ("reserve", _gib(plan.reserve), "")]
    if plan.footprint.host:
        rows.append(("host memory", _gib(plan.footprint.host), "for each process"))
    return rows


def _traffic_lines(plan: Plan, links: Links) -> list[str]:
    computing = compute_seconds(plan.model, plan.options, plan.mesh, tokens=plan.tokens, micro_batches=1, links=links)
    lines = [
        f"sent by each GPU for a step of one such micro-batch (computed; its products take {computing:.2f} s at "
        f"{links.flops_per_s / 1e12:g} TFLOP/s):"
    ]
    if not plan.exchanges:
        return [*lines, "  nothing"]
    return lines + _aligned(
        [
            (each.name, f"{each.sent / 1e9:.2f} GB", f"{each.kind}, at least {each.seconds(links):.2f} s")
            for each in plan.exchanges
        ]
    )


def _ending(plan: Plan, recipe: Recipe, recipe_name: str) -> list[str]:
    if not plan.fits:
        what = f"the longest pair ({plan.tokens:,} tokens)"
        if plan.tokens != plan.longest_pair:
            what = f"a micro-batch of {plan.tokens:,} tokens"
        lines = [
            f"warning: this does not fit: {what} takes {_gib(plan.footprint.total)} a GPU, and "
            f"{_gib(plan.machines.gpu_bytes - plan.reserve)} are planned with"
        ]
        return lines + ([f"  would fit: {words}" for words in plan.remedies] or ["  nothing that was tried fits"])
    ranks = plan.mesh.data
    return [
        f"batch: {recipe.pairs_per_step(ranks)} pairs an optimizer step ({recipe.per_device_train_batch_size} x "
        f"{recipe.gradient_accumulation_steps} accumulated x {ranks} rank{'s' * (ranks > 1)})",
        f"start: {launch_line(plan, recipe, recipe_name=recipe_name)}",
    ]


def launch_line(plan: Plan, recipe: Recipe, *, recipe_name: str) -> str:
    """The command that starts a run on this mesh; on several nodes, on each of them."""
    machines, options = plan.machines, plan.options
    if recipe.gradient_checkpointing:
        options = replace(options, gradient_checkpointing=False)  # no need to say it again
    words = [f"--{key.replace(': ', ' ')}" for key in _keys(plan.mesh, options).split(", ") if key]
    command = " ".join(["simpo train", recipe_name, *words])
    if machines.gpus == 1:
        return command
    where = ""
    if machines.nodes > 1:
        where = f"--nnodes {machines.nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id RUN "
    return f"torchrun {where}--nproc-per-node {machines.gpus_per_node} -m {command}"


def plan_as_dict(plan: Plan, *, links: Links | None = None) -> dict[str, Any]:
    """The plan for programs: plain values, bytes and seconds."""
    links = links or Links()
    return {
        "model": {"name": plan.model.name, "parameters": plan.model.num_parameters},
        "machines": asdict(plan.machines),
        "mesh": asdict(plan.mesh),
        "fits": plan.fits,
        "choices": {choice.key: {"value": choice.value, "reason": choice.reason} for choice in plan.choices},
        "longest_pair_tokens": plan.longest_pair,
        "memory": {
            "tokens": plan.tokens,
            "moment": plan.footprint.moment,
            "bytes": dict(plan.footprint.parts),
            "total_bytes": plan.footprint.total,
            "reserve_bytes": plan.reserve,
            "host_bytes": plan.footprint.host,
        },
        "exchanges": [
            asdict(exchange) | {"sent_bytes": exchange.sent, "seconds": exchange.seconds(links)}
            for exchange in plan.exchanges
        ],
        "links": asdict(links),
        "remedies": list(plan.remedies),
    }


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write `plan_as_dict` as JSON."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(plan_as_dict(plan), indent=2) + "\n", encoding="utf-8")


def _keys(mesh: MeshSizes, options: StepOptions) -> str:
    """Keys of the recipe that differ from their defaults."""
    shown = [f"{name}: {size}" for name, size in asdict(mesh).items() if size != 1]
    if mesh.world > 1 and mesh.dp_shard == 1:
        shown.insert(0, "dp_shard: 1")
    return ", ".join([*shown, *(["gradient_checkpointing: true"] if options.gradient_checkpointing else [])])


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:,}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _aligned(rows: list[tuple[str, str, str]]) -> list[str]:
    return [f"  {name:<34} {value:>10}  {note}" for name, value, note in rows]
