"""What every GPU of a mesh holds at each moment of a training step, and when the model is saved.

The passes are traced (`plan.trace`). Added to them by arithmetic: weights, gradients and moments, shard by shard; what
FSDP2 gathers and sends around them; what context parallelism exchanges; the optimizer's workspace; what saving copies.
The runtime's own memory is an assumption. Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from simpo.core.optimizers import OPTIMIZERS
from simpo.plan.sizes import ModelSizes
from simpo.plan.trace import KEPT, Parts, traced_passes
from simpo.run.adamw import PIECE
from simpo.run.memory import STILL_ON_ITS_WAY

if TYPE_CHECKING:
    from simpo.parallel.mesh import MeshSizes
    from simpo.recipe import Recipe

GIB = 2**30

RUNTIME_BYTES = int(1.5 * GIB)
"""A CUDA context with its libraries' kernels, and NCCL's buffers. An assumption: 0.5 to 2 GiB are seen."""

MOMENTS = ("forward", "head", "backward", "clip", "update", "save")
_FP32 = 4
_BERTHS = 8  # bytes a number: AdamWBf16 keeps two pieces' two moments on the GPU while they come and go
_BNB_BLOCK, _BNB_SMALLEST = 256, 4096  # bitsandbytes: numbers that share a scale; smaller tensors stay fp32


def compute_bytes(recipe: Recipe) -> int:
    """Of a number computed with."""
    return 2 if recipe.computes_in_bf16 else 4


def master_bytes(recipe: Recipe) -> int:
    """Of a weight that is neither an adapter's nor in 4 bits."""
    return 2 if recipe.master_dtype == "bfloat16" and not recipe.load_in_4bit else 4


def gather_bytes(recipe: Recipe) -> int:
    """Of a weight of a block that FSDP2 has gathered."""
    return 2 if recipe.bf16 and recipe.fsdp_param_dtype != "float32" else master_bytes(recipe)


class StateBytes(NamedTuple):
    """What one process keeps from step to step."""

    weights: int
    gradients: int
    moments: int


def compute_state(model: ModelSizes, recipe: Recipe, mesh: MeshSizes) -> StateBytes:
    """Weights, gradients and moments of the rank that holds the most."""
    return _state(model, recipe.optim, mesh)


@functools.cache
def _state(model: ModelSizes, optim: str, mesh: MeshSizes) -> StateBytes:
    weights, gradients, moments = 0.0, 0, 0
    for weight in model.weights:
        numel = weight.local_numel(shard=mesh.shard, tp=mesh.tp)
        weights += numel * weight.num_bytes
        if weight.is_trained:
            gradients += numel * int(weight.num_bytes)
            moments += _moment_bytes(numel, int(weight.num_bytes), optim)
            # transformers leaves the gradient of an embedding that is split by vocabulary whole.
            if weight.kind == "embedding" and not (uses_fsdp(mesh) or model.head_tied):
                gradients += (weight.local_numel() - numel) * int(weight.num_bytes)
    return StateBytes(math.ceil(weights), gradients, moments)


def _moment_bytes(numel: int, size: int, optim: str) -> int:
    if optim == "adamw_8bit":
        return 8 * numel if numel < _BNB_SMALLEST else 2 * numel + 8 * math.ceil(numel / _BNB_BLOCK)
    per_weight = OPTIMIZERS[optim].moment_bytes
    return numel * (2 * size if per_weight is None else per_weight)


def uses_fsdp(mesh: MeshSizes) -> bool:
    """Whether weights are gathered: on a mesh that transformers shards, wherever gradients are shared."""
    return mesh.is_sharded and mesh.gradient > 1


@functools.cache
def unit_numels(model: ModelSizes, mesh: MeshSizes) -> dict[str, int]:
    """Numbers in each of FSDP2's groups, on one tp rank.

    A tied head is in two: transformers 5.23 ties it after sharding, so it is gathered and reduced as "end head" too.
    """
    sizes: dict[str, int] = {}
    for weight in model.weights:
        if weight.unit:
            sizes[weight.unit] = sizes.get(weight.unit, 0) + weight.local_numel(tp=mesh.tp)
    if model.head_tied and uses_fsdp(mesh):
        sizes["end head"] = math.ceil(model.vocab_size / mesh.tp) * model.hidden_size
    return sizes


def key_copies(model: ModelSizes, mesh: MeshSizes) -> int:
    """How often context parallelism repeats key heads so that every rank gets some (`core.context`)."""
    return mesh.cp // math.gcd(max(1, model.num_kv_heads // mesh.tp), mesh.cp)


@dataclass(frozen=True)
class Footprint:
    """What one GPU holds at each of `MOMENTS`, and with a reference model where both are there, in bytes."""

    moments: dict[str, Parts]  # of each its parts, which add up
    offloaded: Parts  # in CPU memory throughout, of every process
    saving: Parts  # in CPU memory besides while something is saved, of the process that has the most

    @property
    def totals(self) -> dict[str, int]:
        return {moment: math.ceil(sum(parts.values())) for moment, parts in self.moments.items()}

    @property
    def moment(self) -> str:
        """When there is the most."""
        return max(self.totals, key=self.totals.get)

    @property
    def parts(self) -> Parts:
        """Of that moment."""
        return self.moments[self.moment]

    @property
    def total(self) -> int:
        return self.totals[self.moment]


def compute_footprint(
    model: ModelSizes, recipe: Recipe, mesh: MeshSizes, *, tokens: int, labels: int | None = None
) -> Footprint:
    """Every moment of an optimizer step whose largest micro-batch has so many packed tokens.

    Args:
        tokens: of the whole row, which cp ranks share.
        labels: of these, the trained ones; None = all, the most there can be.
    """
    state = compute_state(model, recipe, mesh)
    passes = _passes(model, recipe, mesh, tokens=tokens, labels=labels)
    always: Parts = state._asdict()
    offloaded: Parts = {}
    if recipe.optimizer_offload:
        offloaded = {"moments": state.moments}
        always["moments"] = _BERTHS * PIECE["cuda"]
    if recipe.activation_offload:
        offloaded["activations"] = passes["head"][KEPT]
        _offload_activations(passes, model)
    if recipe.device != "cpu":
        always["CUDA and NCCL"] = RUNTIME_BYTES

    def most(*parts: Parts) -> Parts:
        return max(parts, key=lambda each: sum(each.values()))

    head = most(passes["head"], passes["head backward"])
    backward = most(passes["blocks"], passes.get("embedding", {}))
    on_gpu, on_cpu = _save(model, recipe, mesh, state)
    added = {
        "forward": passes["forward"],
        "head": head,
        "backward": backward,
        "update": _update(model, recipe, mesh),
        "save": on_gpu,
    }
    moments = {moment: always | added.get(moment, {}) for moment in MOMENTS}
    moments["save"].pop("gradients", None)
    if recipe.loss.needs_reference:  # before the first step; taken to be as large as the model, and spread alike
        moments["reference"] = {part: always[part] for part in ("weights", "CUDA and NCCL") if part in always}
        moments["reference"]["the reference's weights"] = state.weights
    found = {moment: {part: size for part, size in parts.items() if size} for moment, parts in moments.items()}
    return Footprint(found, offloaded, on_cpu)


def _passes(model: ModelSizes, recipe: Recipe, mesh: MeshSizes, *, tokens: int, labels: int | None) -> dict[str, Parts]:
    """The traced passes, and what other ranks make of them.

    What two tensor parallel ranks share, any number of them shares; the rest each of them holds whole.
    """
    here, own = tokens / mesh.cp, (tokens if labels is None else labels) / mesh.cp
    fsdp = uses_fsdp(mesh)
    passes = traced_passes(model, recipe, tokens=here, labels=own, gathered=fsdp)
    if mesh.tp > 1:
        split = mesh.tp if mesh.tp % 2 else 2
        less = (1 - 1 / mesh.tp) / (1 - 1 / split)
        others = traced_passes(model, recipe, tokens=here, labels=own, gathered=fsdp, tp=split)
        passes = {
            moment: {part: max(0.0, size - less * (size - others[moment][part])) for part, size in parts.items()}
            for moment, parts in passes.items()
        }
    if mesh.cp > 1:
        _add_context_parallel(passes, model, recipe, mesh, here)
    if fsdp:
        _add_fsdp(passes, model, recipe, mesh)
    return passes


def _offload_activations(passes: dict[str, Parts], model: ModelSizes) -> None:
    """Of what is kept, a share waits on the GPU for its copy, and in the backward pass a block's worth is back."""
    kept = passes["head"][KEPT]
    block = kept / model.num_layers
    passes["head"][KEPT] = passes["head backward"][KEPT] = STILL_ON_ITS_WAY * kept
    passes["forward"][KEPT] = passes["blocks"][KEPT] = STILL_ON_ITS_WAY * kept + block


def _add_context_parallel(
    passes: dict[str, Parts], model: ModelSizes, recipe: Recipe, mesh: MeshSizes, here: float
) -> None:
    """Attention's output before and after its exchange, copies of key heads, and what is on its way."""
    number = compute_bytes(recipe) * here * model.head_dim / mesh.tp
    queries, copies = number * model.num_heads, (key_copies(model, mesh) - 1) * 2 * number * model.num_kv_heads
    blocks = 1 if recipe.gradient_checkpointing else model.num_layers
    for moment in ("forward", "head", "head backward", "blocks"):
        passes[moment][KEPT] += blocks * (queries + copies)
    passes["blocks"]["context parallel exchange"] = 2 * (queries + copies + 2 * number * model.num_kv_heads)


def _add_fsdp(passes: dict[str, Parts], model: ModelSizes, recipe: Recipe, mesh: MeshSizes) -> None:
    """Gathered weights: two blocks, the next on its way, and what stays from forward to backward; and gradients that
    are whole until they are reduced."""
    units = unit_numels(model, mesh)
    block = max((numel for unit, numel in units.items() if unit.startswith("block ")), default=0)
    end = sum(numel for unit, numel in units.items() if unit.startswith("end"))
    last = end if model.head_tied else units.get("embedding", 0)
    head = model.head_numel / mesh.tp
    master, gather, trained = master_bytes(recipe), gather_bytes(recipe), not recipe.use_peft
    gathered = {
        "forward": 2 * gather * block + master * end * model.head_tied,
        "head": gather * block + master * end,
        "head backward": gather * block + master * end,
        "blocks": 2 * gather * block + master * end * model.head_tied,
        "embedding": master * last,
    }
    whole = {
        "blocks": gather * block + _FP32 * max(block, end),
        "embedding": _FP32 * (head * model.head_tied + last + block),
    }
    for moment, parts in passes.items():
        parts["gathered weights"] = gathered[moment]
        parts["gradients on their way"] = trained * whole.get(moment, 0)


def _update(model: ModelSizes, recipe: Recipe, mesh: MeshSizes) -> Parts:
    piece = PIECE["cpu" if recipe.device == "cpu" else "cuda"]
    trained = [w.local_numel(shard=mesh.shard, tp=mesh.tp) for w in model.weights if w.is_trained]
    # adamw_torch: the square root of one tensor's second moments, and its quotient
    sizes = {"adamw_bf16": 40 * min(piece, sum(trained)), "adamw_torch": 2 * master_bytes(recipe) * max(trained)}
    return {"optimizer's workspace": sizes.get(recipe.optim, 0)}


def _save(model: ModelSizes, recipe: Recipe, mesh: MeshSizes, state: StateBytes) -> tuple[Parts, Parts]:
    """What saving adds on the GPU, and in CPU memory.

    A checkpoint of weights that tensor parallelism and FSDP2 both cut by rows first puts those shards in one piece, and
    their moments; with `async_save` a copy waits in CPU memory. The final model comes together weight by weight, in the
    first process's CPU memory; where it is written in a narrower format than it is trained in, its last evaluation is
    of weights rounded to that, while their own values are kept.
    """
    written = export_bytes(model, recipe)
    floats = [weight for weight in model.weights if weight.num_bytes >= 2]  # 4-bit ones are written as they are
    changed = [weight for weight in floats if mesh.is_sharded or weight.num_bytes != written]
    whole = max((w.local_numel() * (w.num_bytes * mesh.is_sharded + written) for w in changed), default=0)
    in_one_piece, trained = 0.0, 0.0
    for weight in (weight for weight in floats if weight.is_trained):
        numel = weight.local_numel(shard=mesh.shard, tp=mesh.tp)
        trained += numel * weight.num_bytes
        if mesh.tp > 1 and mesh.shard > 1 and weight.unit and weight.split_dim == 0:
            in_one_piece += numel * weight.num_bytes + _moment_bytes(numel, int(weight.num_bytes), recipe.optim)
    as_saved = state.weights if not recipe.use_peft and written < master_bytes(recipe) else 0
    on_gpu: Parts = {"copies to save": max(whole, in_one_piece, as_saved)}
    on_cpu: Parts = {"the final model, in the first process": sum(weight.local_numel() for weight in changed) * written}
    if recipe.async_save:
        on_cpu["a checkpoint on its way to the disk"] = trained + state.moments
    return on_gpu, on_cpu


def export_bytes(model: ModelSizes, recipe: Recipe) -> int:
    """Of a number in the final model's files (`run.export.export_dtype`)."""
    if recipe.save_dtype != "auto":
        return getattr(torch, recipe.save_dtype).itemsize
    return (model.config.dtype or torch.float32).itemsize
