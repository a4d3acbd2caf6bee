"""A plan for people and for programs. Must not import data, the trainer or evaluation."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from simpo.plan.search import Plan, changed_keys, gib
from simpo.plan.traffic import Links, compute_seconds
from simpo.recipe import Recipe


def describe_plan(plan: Plan, recipe: Recipe, *, recipe_name: str = "RECIPE") -> str:
    """The plan for people."""
    model, machines, found = plan.model, plan.machines, plan.footprint
    layout = "" if machines.gpus == 1 else f", {machines.nodes} node{'s' * (machines.nodes > 1)}"
    notes = {"save": "gradients are gone", "reference": "before the first step: the model and its reference"}
    experts = f", a token multiplied with {model.linear_numel / 1e9:.2f} billion" * (model.share_of_experts < 1)
    lines = [
        f"{model.name}: {model.num_parameters / 1e9:.2f} billion parameters{experts}, {model.num_layers} blocks of "
        f"width {model.hidden_size}, vocabulary {model.vocab_size:,}",
        f"{machines.gpus} GPU{'s' * (machines.gpus > 1)} of {machines.gpu_gib:g} GiB{layout}; {plan.mesh}",
        "",
        *_aligned([(key, _plain(value), reason) for key, (value, reason) in plan.choices.items()]),
        "",
        f"memory of a GPU through a step, with {plan.tokens:,} tokens in a micro-batch:",
        *_aligned(
            [
                (moment, gib(size), "the peak" if moment == found.moment else notes.get(moment, ""))
                for moment, size in found.totals.items()
            ]
        ),
        "",
        f"at the peak ({found.moment}):",
        *_aligned([(name, gib(size), "") for name, size in found.parts.items()]),
        *_aligned([("in all", gib(found.total), f"of {gib(machines.gpu_bytes)}"), ("reserve", gib(plan.reserve), "")]),
    ]
    cpu = [(name, gib(size), "") for name, size in found.offloaded.items()]
    cpu += [(name, gib(size), "while it is saved") for name, size in found.saving.items() if size]
    lines += ["", "CPU memory of a process:", *_aligned(cpu)] if cpu else []
    lines += ["", *_traffic_lines(plan), "", *_ending(plan, recipe, recipe_name)]
    return "\n".join(line.rstrip() for line in lines)


def _traffic_lines(plan: Plan) -> list[str]:
    if not plan.exchanges:
        return ["nothing is sent between GPUs"]
    links = Links()
    computing = compute_seconds(plan.model, plan.recipe, plan.mesh, tokens=plan.tokens, micro_batches=1, links=links)
    rows = [
        (each.name, f"{each.sent / 1e9:.2f} GB", f"{each.kind}, at least {each.seconds(links):.2f} s")
        for each in plan.exchanges
    ]
    return [
        f"sent by each GPU for a step of one such micro-batch, which computes for {computing:.2f} s at "
        f"{links.flops_per_s / 1e12:g} TFLOP/s (all assumed, nothing measured):",
        *_aligned(rows),
    ]


def _ending(plan: Plan, recipe: Recipe, recipe_name: str) -> list[str]:
    if not plan.fits:
        what = f"the longest pair ({plan.tokens:,} tokens)"
        if plan.tokens != plan.longest_pair:
            what = f"a micro-batch of {plan.tokens:,} tokens"
        lines = [
            f"warning: this does not fit: with {what} a GPU needs {gib(plan.footprint.total)} and may use "
            f"{gib(plan.machines.gpu_bytes - plan.reserve)}"
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
    machines, planned = plan.machines, plan.recipe
    if recipe.gradient_checkpointing:
        planned = planned.model_copy(update={"gradient_checkpointing": False})  # no need to say it again
    words = [f"--{key.replace(': ', ' ')}" for key in changed_keys(plan.mesh, planned).split(", ") if key]
    command = " ".join(["simpo train", shlex.quote(recipe_name), *words])
    if machines.gpus == 1:
        return command
    where = ""
    if machines.nodes > 1:
        where = f"--nnodes {machines.nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id RUN "
    return f"torchrun {where}--nproc-per-node {machines.gpus_per_node} -m {command}"


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for programs: plain values, bytes and seconds."""
    links, found = Links(), plan.footprint
    return {
        "model": {"name": plan.model.name, "parameters": plan.model.num_parameters},
        "machines": asdict(plan.machines),
        "mesh": asdict(plan.mesh),
        "fits": plan.fits,
        "choices": {key: {"value": value, "reason": reason} for key, (value, reason) in plan.choices.items()},
        "longest_pair_tokens": plan.longest_pair,
        "memory": {
            "tokens": plan.tokens,
            "moment": found.moment,
            "moments": found.totals,
            "bytes": found.parts,
            "total_bytes": found.total,
            "reserve_bytes": plan.reserve,
            "offloaded_bytes": found.offloaded,
            "saving_cpu_bytes": found.saving,
        },
        "exchanges": [
            asdict(exchange) | {"sent_bytes": exchange.sent, "seconds": exchange.seconds(links)}
            for exchange in plan.exchanges
        ],
        "links": asdict(links),
        "remedies": plan.remedies,
    }


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:,}"


def _aligned(rows: list[tuple[str, str, str]]) -> list[str]:
    return [f"  {name:<34} {value:>10}  {note}" for name, value, note in rows]
