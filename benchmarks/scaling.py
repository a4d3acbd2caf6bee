"""The tables of docs/scaling.md, computed: which mesh for which model, and what a step sends.

    python benchmarks/scaling.py                          print them
    python benchmarks/scaling.py --write docs/scaling.md  put them between the document's markers

Everything comes from `simpo.plan`; nothing is measured. A table stands between
`<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simpo.parallel.mesh import MeshSizes
from simpo.plan.footprint import GIB, compute_footprint, compute_state
from simpo.plan.search import Machines, Plan, plan_recipe
from simpo.plan.shapes import load_config
from simpo.plan.sizes import ModelSizes, describe_model
from simpo.plan.traffic import Links, compute_seconds, compute_traffic
from simpo.recipe import Recipe, load_recipe

LORA = {"use_peft": True}
LORA_BF16 = LORA | {"master_dtype": "bfloat16"}
BF16 = {"master_dtype": "bfloat16", "optim": "adamw_bf16"}
OFFLOADED = BF16 | {"optimizer_offload": True}
SETTINGS: tuple[tuple[str, int, int, dict[str, Any], str], ...] = (
    # shape, GPUs, GiB of each, keys beside max_length, what the keys mean
    ("llama-1b", 1, 40, {}, ""),
    ("llama-3b", 8, 40, {}, ""),
    ("mistral-7b", 8, 40, {}, ""),
    ("llama-8b", 8, 40, {}, ""),
    ("llama-8b", 4, 80, {}, ""),
    ("llama-8b", 8, 80, {}, ""),
    ("llama-8b", 64, 80, {}, ""),
    ("llama-8b", 8, 80, {"max_length": 65536}, "`max_length: 65536`"),
    ("llama-8b", 1, 80, BF16, "bf16 weights and moments"),
    ("mistral-7b", 1, 40, OFFLOADED, "bf16 weights and moments, `optimizer_offload`"),
    ("llama-8b", 1, 24, LORA_BF16, "LoRA, bf16 weights"),
    ("llama-8b", 1, 24, LORA | {"load_in_4bit": True}, "QLoRA"),
    ("qwen-14b", 8, 80, {}, ""),
    ("qwen-32b", 16, 80, {}, ""),
    ("qwen-32b", 32, 80, {}, ""),
    ("llama-70b", 32, 80, {}, ""),
    ("llama-70b", 64, 80, {}, ""),
    ("llama-70b", 1024, 80, {}, ""),
    ("llama-70b", 16, 80, BF16, "bf16 weights and moments"),
    ("llama-70b", 8, 80, LORA, "LoRA"),
)
CLAIMS: tuple[tuple[str, str, int, int, dict[str, Any]], ...] = (
    ("7B on one 40 GB card", "mistral-7b", 1, 40, {}),
    ("the same, bf16 weights, moments offloaded", "mistral-7b", 1, 40, OFFLOADED),
    ("the same with LoRA, bf16 weights", "mistral-7b", 1, 40, LORA_BF16),
    ("8B on two 40 GB cards", "llama-8b", 2, 40, {}),
    ("8B on four 80 GB cards", "llama-8b", 4, 80, {}),
    ("8B on eight 40 GB cards", "llama-8b", 8, 40, {}),
    ("70B on eight 80 GB cards", "llama-70b", 8, 80, {}),
    ("the same with LoRA", "llama-70b", 8, 80, LORA),
    ("the same, bf16 weights and moments", "llama-70b", 8, 80, BF16),
)
TOKENS = 16384  # of a micro-batch, in the tables of traffic
SIZES = (8, 64, 256, 1024)


def model_of(shape: str, recipe: Recipe) -> ModelSizes:
    return describe_model(load_config(shape), recipe, name=shape)


def recipe_of(**keys: Any) -> Recipe:
    return load_recipe({"model_name_or_path": "any", "max_length": 2048, **keys})


def plan_of(shape: str, gpus: int, gib: int, keys: dict[str, Any]) -> Plan:
    return plan_recipe(
        recipe_of(**keys), Machines.of(gpus=gpus, nodes=None, gpus_per_node=None, gpu_gib=gib), shape=shape
    )


def mesh_table() -> list[list[str]]:
    """For each setting the mesh that `simpo plan` picks, and a GPU's memory with the longest pair in a micro-batch."""
    rows = [
        ["model", "GPUs", "", "mesh", "checkpointing", "state", "activations", "other", "in all", "tokens that fit"]
    ]
    for shape, gpus, gib, keys, meaning in SETTINGS:
        plan = plan_of(shape, gpus, gib, keys)
        assert plan.fits, (shape, gpus, gib, keys)
        found = compute_footprint(plan.model, plan.recipe, plan.mesh, tokens=plan.longest_pair)
        state = sum(found.parts.get(name, 0) for name in ("weights", "gradients", "moments"))
        activations = found.parts.get("activations", 0)
        cells = [state, activations, found.total - state - activations, found.total]
        rows.append(
            [
                *(shape, f"{gpus} x {gib}", meaning, keys_of(plan.mesh)),
                "yes" if plan.recipe.gradient_checkpointing else "no",
                *(f"{cell / GIB:.1f}" for cell in cells),
                f"{plan.tokens_that_fit:,}",
            ]
        )
    return rows


def claims_table() -> list[list[str]]:
    """What is said to fit, and what the function says; all weights, fp32 and AdamW where nothing else is said."""
    rows = [["", "a GPU needs", "of", "fits", "CPU memory a process"]]
    for words, shape, gpus, gib, keys in CLAIMS:
        plan = plan_of(shape, gpus, gib, keys)
        found = compute_footprint(plan.model, plan.recipe, plan.mesh, tokens=plan.longest_pair)
        cpu = sum(found.offloaded.values())
        fits = "yes" if plan.fits else "no"
        rows.append([words, f"{found.total / GIB:.1f}", str(gib), fits, f"{cpu / GIB:.0f}" if cpu else ""])
    return rows


def weights_table() -> list[list[str]]:
    """Sent by each GPU for weights and gradients in one micro-batch, by how the model is sharded."""
    links, rows = Links(), [["model", "GPUs", "mesh", "state, GiB", "GB sent", "at least, s", "products, s"]]
    for shape, copy in (("llama-8b", 8), ("llama-70b", 32)):  # GPUs to a copy of the model, at the least
        recipe = recipe_of(gradient_checkpointing=shape == "llama-70b")
        model = model_of(shape, recipe)
        computing = compute_seconds(model, recipe, MeshSizes(), tokens=TOKENS, micro_batches=1, links=links)
        for gpus in SIZES:
            if gpus < copy:
                continue
            for mesh in dict.fromkeys([MeshSizes(1, gpus), MeshSizes(gpus // copy, copy)]):
                found = compute_traffic(model, recipe, mesh, tokens=TOKENS)
                state = sum(compute_state(model, recipe, mesh)) / GIB
                sent, least = sum(e.sent for e in found) / 1e9, sum(e.seconds(links) for e in found)
                rows.append(
                    [
                        shape,
                        f"{gpus:,}",
                        keys_of(mesh),
                        f"{state:.1f}",
                        f"{sent:.0f}",
                        f"{least:.2f}",
                        f"{computing:.2f}",
                    ]
                )
    return rows


def ddp_table() -> list[list[str]]:
    """Sent by each GPU once in a step where every GPU holds the whole model."""
    links, rows = Links(), [["", "GPUs", "GB sent", "at least, s"]]
    for words, shape, recipe in (
        ("llama-1b", "llama-1b", recipe_of()),
        ("llama-8b, LoRA of rank 16", "llama-8b", recipe_of(use_peft=True)),
    ):
        for gpus in SIZES:
            mesh = MeshSizes(dp_replicate=gpus)
            (found,) = compute_traffic(model_of(shape, recipe), recipe, mesh, tokens=TOKENS)
            rows.append([words, f"{gpus:,}", f"{found.sent / 1e9:.2f}", f"{found.seconds(links):.3f}"])
    return rows


def tokens_table() -> list[list[str]]:
    """Sent by each GPU for the tokens of one micro-batch by tensor and context parallelism, within a node."""
    links, rows = Links(), [["model", "mesh", "activations, GB", "head, GB", "at least, s", "products, s"]]
    for shape in ("llama-8b", "llama-70b"):
        for mesh in (MeshSizes(tp=2), MeshSizes(tp=8), MeshSizes(cp=2), MeshSizes(cp=8)):
            recipe = recipe_of()
            model = model_of(shape, recipe)
            found = [e for e in compute_traffic(model, recipe, mesh, tokens=TOKENS) if e.name[:2] in ("TP", "CP")]
            head = sum(exchange.sent for exchange in found if "head" in exchange.name)
            computing = compute_seconds(model, recipe, mesh, tokens=TOKENS, micro_batches=1, links=links)
            rows.append(
                [
                    *(shape, keys_of(mesh)),
                    *(f"{size / 1e9:.1f}" if size else "" for size in (sum(e.sent for e in found) - head, head)),
                    *(f"{seconds:.2f}" for seconds in (sum(e.seconds(links) for e in found), computing)),
                ]
            )
    return rows


def keys_of(mesh: MeshSizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in asdict(mesh).items() if size != 1) or "one GPU"


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "meshes": mesh_table,
    "claims": claims_table,
    "weights": weights_table,
    "ddp": ddp_table,
    "tokens": tokens_table,
}


def markdown(rows: Iterable[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    columns = head.count("|") - 1
    return "\n".join(
        [head.replace("|  |", "| |"), "|" + "---|" * columns, *(row.replace("|  |", "| |") for row in body)]
    )


def fill(text: str) -> str:
    """The document with every table between its markers computed anew.

    Raises:
        ValueError: a marker names no table.
    """

    def replacement(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in TABLES:
            raise ValueError(f"table: {name!r} is none of {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{markdown(TABLES[name]())}\n<!-- end of table -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", replacement, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="document to fill")
    path = parser.parse_args().write
    if path is not None:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, table in TABLES.items():
        print(f"{name}\n{markdown(table())}\n")


if __name__ == "__main__":
    main()
