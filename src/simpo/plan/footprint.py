"""The memory of a training step, from a model's sizes alone: what every GPU of a mesh holds at the step's peaks.

Everything here is arithmetic on shapes. Weights, gradients and moments are exact, shard by shard. What a block keeps
for its backward pass is written down for Llama-like blocks (`model.low_memory`) and agrees with what `run.memory`
measures; other architectures are estimated from it. Kernels' workspaces and the runtime's own memory are assumptions,
each a constant with its reason. Must not import data, train or evaluate.

Letters: H hidden size, I the MLP's width, Hq and Hk query and key heads of size D, V vocabulary, c bytes of a computed
number (2 in bf16), r bytes of the residual stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpo.core.logprobs import CHUNK_BYTES, CHUNK_BYTES_CUDA, SLICE_BYTES, SLICE_BYTES_CUDA
from simpo.recipe import OPTIMIZERS
from simpo.run.adamw import PIECE
from simpo.run.memory import SHARE_OF_FREE, STILL_ON_ITS_WAY

if TYPE_CHECKING:
    from simpo.parallel.mesh import MeshSizes
    from simpo.plan.sizes import ModelSizes, Weight
    from simpo.recipe import Recipe

GIB = 2**30

RUNTIME_BYTES = int(1.5 * GIB)
"""A CUDA context with its libraries' kernels, and NCCL's buffers. An assumption: 0.5 to 2 GiB are seen."""

OTHER_BLOCKS = 2.1
"""What blocks keep that `model.low_memory` leaves alone, relative to Llama's: 1.4 (Cohere) to 2.1 (Gemma-2)."""

_FP32, _ROUND_TO = 4, 64
_BERTHS = 8  # bytes a number: AdamWBf16 keeps two pieces' two moments on the GPU while they come and go
_BNB_BLOCK, _BNB_SMALLEST = 256, 4096  # bitsandbytes: numbers that share a scale; smaller tensors stay fp32


@dataclass(frozen=True)
class Adapters:
    """LoRA on some of a model's linear layers.

    Attributes:
        targets: names of modules, or "all-linear".
        also_whole: names of modules that are trained whole beside the adapters.
    """

    rank: int
    dropout: float
    targets: tuple[str, ...] | str = "all-linear"
    also_whole: tuple[str, ...] = ()

    def covers(self, weight: Weight) -> bool:
        module = weight.name.removesuffix(".weight")
        named = self.targets == "all-linear" or any(module == t or module.endswith(f".{t}") for t in self.targets)
        return weight.is_linear and named

    def trains_whole(self, weight: Weight) -> bool:
        module = weight.name.rpartition(".")[0]
        return any(module == name or module.endswith(f".{name}") for name in self.also_whole)


@dataclass(frozen=True)
class StepOptions:
    """What of a recipe decides the memory of a step; `step_options` reads it from one.

    Attributes:
        master_bytes, compute_bytes: of a weight, and of a number computed with.
        gather_bytes: of a weight that FSDP2 has gathered to compute a block.
        offload_weights: sharded weights, gradients and moments wait in host memory.
        offload_moments: moments alone do.
        quantized_bytes: of a 4-bit weight and its share of constants; None = not quantised.
        on_cpu: the CPU's kernels and sizes of chunks, for comparisons with what is measured there.
    """

    optim: str = "adamw_torch_fused"
    master_bytes: int = 4
    compute_bytes: int = 2
    gather_bytes: int = 2
    gradient_checkpointing: bool = False
    activation_offload: bool = False
    offload_weights: bool = False
    offload_moments: bool = False
    adapters: Adapters | None = None
    quantized_bytes: float | None = None
    chunk_size: int | None = None
    on_cpu: bool = False

    @property
    def trains_all(self) -> bool:
        """Whether embedding, head and every weight of the blocks are trained; otherwise adapters are."""
        return self.adapters is None


def step_options(recipe: Recipe, **changes: Any) -> StepOptions:
    """The options of a recipe; `changes` by name, for sizes that are being tried."""
    compute = 2 if recipe.bf16 else 4
    adapters, quantized = None, None
    if recipe.use_peft:
        targets = recipe.lora_target_modules
        adapters = Adapters(
            recipe.lora_r,
            recipe.lora_dropout,
            targets if isinstance(targets, str) else tuple(targets),
            tuple(recipe.lora_modules_to_save or ()),
        )
    if recipe.load_in_4bit:
        # A scale in fp32 for every 64 weights; quantised itself, 8 bits and an fp32 scale for 256 of them.
        quantized = 0.5 + ((1 + 4 / 256) / 64 if recipe.bnb_4bit_use_double_quant else 4 / 64)
    options = {
        "optim": recipe.optim,
        # peft turns what is not quantised into fp32.
        "master_bytes": 2 if recipe.master_dtype == "bfloat16" and not recipe.load_in_4bit else 4,
        "compute_bytes": compute,
        "gather_bytes": 4 if recipe.fsdp_param_dtype == "float32" else compute,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "activation_offload": recipe.activation_offload,
        "offload_weights": recipe.fsdp_cpu_offload,
        "offload_moments": recipe.optimizer_offload,
        "adapters": adapters,
        "quantized_bytes": quantized,
        "chunk_size": recipe.logits_chunk_size,
    }
    return StepOptions(**{**options, **changes})


# --- weights, gradients, moments -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateBytes:
    """What one GPU keeps from step to step.

    Attributes:
        weights, gradients, moments: bytes.
        trainable: numbers that this GPU's optimizer updates.
    """

    weights: int
    gradients: int
    moments: int
    trainable: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


def compute_state(model: ModelSizes, options: StepOptions, mesh: MeshSizes) -> StateBytes:
    """Weights, gradients and moments of the rank that holds the most."""
    weights, trained = 0.0, []
    for weight in model.weights:
        numel = weight.local_numel(shard=mesh.shard, tp=mesh.tp)
        quantized = options.quantized_bytes is not None and weight.is_linear
        weights += numel * (options.quantized_bytes if quantized else options.master_bytes)
        if options.trains_all:
            trained.append((numel, options.master_bytes))
        elif options.adapters.trains_whole(weight):
            weights += numel * _FP32
            trained.append((numel, _FP32))
    adapters = adapter_numels(model, options, mesh)
    weights += _FP32 * sum(adapters)  # which peft keeps in fp32, and FSDP2 does not know: whole on every rank
    trained += [(numel, _FP32) for numel in adapters]
    gradients = sum(numel * size for numel, size in trained)
    if mesh.tp > 1 and not uses_fsdp(mesh) and not model.head_tied and options.trains_all:
        # transformers 5.23 leaves the gradient of an embedding that is split by vocabulary whole.
        gradients += (
            model.head_numel - math.ceil(model.vocab_size / mesh.tp) * model.hidden_size
        ) * options.master_bytes
    moments = sum(_moment_bytes(numel, size, options.optim) for numel, size in trained)
    return StateBytes(math.ceil(weights), gradients, moments, sum(numel for numel, _ in trained))


def adapter_numels(model: ModelSizes, options: StepOptions, mesh: MeshSizes) -> list[int]:
    """LoRA's numbers in A [rank, in] and B [out, rank] of each adapted layer; cut where the layer is."""
    if options.adapters is None:
        return []
    found, rank = [], options.adapters.rank
    for weight in model.weights:
        if options.adapters.covers(weight):
            num_out, num_in = weight.local_shape(tp=mesh.tp)
            found += [rank * num_in, rank * num_out]
    return found


def _moment_bytes(numel: int, size: int, optim: str) -> int:
    if optim == "adamw_8bit":
        return 8 * numel if numel < _BNB_SMALLEST else 2 * numel + 8 * math.ceil(numel / _BNB_BLOCK)
    per_weight = OPTIMIZERS[optim].moment_bytes
    return numel * (2 * size if per_weight is None else per_weight)


# --- activations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenBytes:
    """What a forward pass keeps, for each token and each trained token (label) of a GPU's share of a row."""

    per_token: float
    per_label: float

    def of(self, tokens: float, labels: float) -> float:
        return self.per_token * tokens + self.per_label * labels


def compute_activations(
    model: ModelSizes, options: StepOptions, mesh: MeshSizes, *, at_blocks: bool = True
) -> TokenBytes:
    """What is kept until the backward pass, and what that adds while it works on one block.

    As `run.memory.measure_activations` counts it: everything that is kept, and one block's activations once more
    for their gradients; with checkpointing the blocks' inputs, and one block twice.

    Args:
        at_blocks: False leaves out what is added: before the backward pass reaches the blocks.
    """
    kept = all_kept = _kept(model, options, mesh)
    if options.gradient_checkpointing:
        kept = _kept_with_checkpoints(model, options)
    share = STILL_ON_ITS_WAY if options.activation_offload else 1.0
    again = 2 if options.gradient_checkpointing or options.activation_offload else 1
    part = again / model.num_layers if at_blocks else 0.0
    return TokenBytes(
        share * kept.per_token + part * all_kept.per_token, share * kept.per_label + part * all_kept.per_label
    )


def _kept(model: ModelSizes, options: StepOptions, mesh: MeshSizes) -> TokenBytes:
    """Without checkpointing: all blocks, then what lies outside them."""
    h, c = model.hidden_size, options.compute_bytes
    outside = _kept_outside(model, options)
    block = _kept_by_block(model, options, mesh)
    rows = label = 0.0
    if model.is_known:  # whose last MLP computes the rows that predict a label, and no others
        rows = (2 + options.trains_all) * c * model.intermediate_size / mesh.tp + options.trains_all * c * h
        rows += _adapter_inputs(model, options, mesh, roles=("gate_proj", "up_proj", "down_proj"))
        label = rows + c * h
    per_token = model.num_layers * block + outside.per_token - rows
    return TokenBytes(per_token, outside.per_label + label)


def _kept_with_checkpoints(model: ModelSizes, options: StepOptions) -> TokenBytes:
    """The blocks' inputs, and what lies outside them."""
    outside = _kept_outside(model, options)
    inputs = model.num_layers * _residual_bytes(options) * model.hidden_size
    return TokenBytes(inputs + outside.per_token, outside.per_label)


def _kept_outside(model: ModelSizes, options: StepOptions) -> TokenBytes:
    """The last norm, rotary cosines and sines, ids; for each label the head's input and a few numbers."""
    h, r = model.hidden_size, _residual_bytes(options)
    return TokenBytes(4 * h + r * h + 2 * r * model.head_dim + 12, r * h + 16)


def _kept_by_block(model: ModelSizes, options: StepOptions, mesh: MeshSizes) -> float:
    """Bytes a token of one block: what its backward pass needs."""
    h, inner, c, r = model.hidden_size, model.intermediate_size, options.compute_bytes, _residual_bytes(options)
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    keys *= key_copies(model, mesh)
    flash = not options.on_cpu and c == 2
    whole = 2 * (r * h + 4)  # what both norms read, and the inverse of its size
    split = c * (queries + 2 * keys)  # q, k, v as attention reads them
    if flash:
        split += c * 2 * keys + c * queries + 4 * model.num_heads  # prefixes' k, v once more (at most); its output
    split += 2 * c * inner  # gate and up
    if options.trains_all:
        whole += 2 * c * h  # what both norms give, for the gradients of q, k, v, gate and up
        split += (0 if flash and mesh.cp == 1 else c * queries) + c * inner  # what o and down read
    else:
        whole += _adapter_inputs(model, options, mesh)
    if model.norms_heads:
        split += (queries + keys) * (4 + c) + 4 * (model.num_heads + model.num_kv_heads)
    total = whole + split / mesh.tp
    return total if model.is_known else OTHER_BLOCKS * total


def _adapter_inputs(model: ModelSizes, options: StepOptions, mesh: MeshSizes, roles: tuple[str, ...] = ()) -> float:
    """Bytes a token that the adapters of a block's layers keep: their input, dropout's mask, A's output."""
    adapters, c, total = options.adapters, options.compute_bytes, 0.0
    if adapters is None:
        return total
    mask = 0 if not adapters.dropout else _FP32 if options.on_cpu else 1
    for weight in model.block_weights:
        if adapters.covers(weight) and (not roles or weight.role in roles):
            total += weight.local_shape(tp=mesh.tp)[1] * (c + mask) + c * adapters.rank
    return total


def _residual_bytes(options: StepOptions) -> int:
    """Of the residual stream, which has the embedding's format: autocast leaves it alone."""
    return options.master_bytes


def key_copies(model: ModelSizes, mesh: MeshSizes) -> int:
    """How often context parallelism repeats key heads so that every rank gets some (`core.context`)."""
    return mesh.cp // math.gcd(max(1, model.num_kv_heads // mesh.tp), mesh.cp)


# --- the peak --------------------------------------------------------------------------------------------------------

Parts = dict[str, float]


@dataclass(frozen=True)
class Footprint:
    """What one GPU holds at the step's peak, in bytes.

    Attributes:
        parts: by what it is for; they add up to `total`.
        moment: when the peak is: "head", "blocks", "embedding" (of the backward pass) or "update".
        host: bytes in host memory, of one process.
    """

    parts: dict[str, int]
    moment: str
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def compute_footprint(
    model: ModelSizes, options: StepOptions, mesh: MeshSizes, *, tokens: int, labels: int | None = None
) -> Footprint:
    """The peak of an optimizer step whose largest micro-batch has so many packed tokens.

    Args:
        tokens: of the whole row, which cp ranks share.
        labels: of these, the trained ones; None = all, the most there can be.
    """
    moments = _moments(model, options, mesh, tokens, tokens if labels is None else labels)
    moment, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    state = compute_state(model, options, mesh)
    host = state.total if _offloads(options, mesh) else options.offload_moments * state.moments
    if options.activation_offload:
        host += int(_kept(model, options, mesh).of(tokens / mesh.cp, tokens / mesh.cp))
    return Footprint({name: math.ceil(size) for name, size in parts.items() if size}, moment, host)


def fit_tokens(model: ModelSizes, options: StepOptions, mesh: MeshSizes, *, gpu_bytes: int) -> int:
    """Most packed tokens of a micro-batch that leave the reserve free; 0 where not even the model fits."""
    room = gpu_bytes - compute_reserve(model, options, mesh, gpu_bytes=gpu_bytes)
    low, high = 0, 2**24
    while high - low > _ROUND_TO:  # a footprint never falls as tokens grow
        middle = (low + high) // 2
        fits = compute_footprint(model, options, mesh, tokens=middle).total <= room
        low, high = (middle, high) if fits else (low, middle)
    return low // _ROUND_TO * _ROUND_TO


def compute_reserve(model: ModelSizes, options: StepOptions, mesh: MeshSizes, *, gpu_bytes: int) -> int:
    """Bytes that are not planned with: as a run does, a tenth of what is free once the weights are loaded."""
    weights = 0 if _offloads(options, mesh) else compute_state(model, options, mesh).weights
    return int((1 - SHARE_OF_FREE["cuda"]) * max(0, gpu_bytes - RUNTIME_BYTES - weights))


def _moments(model: ModelSizes, options: StepOptions, mesh: MeshSizes, tokens: int, labels: int) -> dict[str, Parts]:
    """Every moment of a step that can be its peak, with what is held then."""
    here, labels_here = tokens / mesh.cp, labels / mesh.cp
    always = _always(model, options, mesh)
    copies = {"autocast copies of weights": _autocast_copies(model, options, mesh)}
    kept = {"activations": compute_activations(model, options, mesh, at_blocks=False).of(here, labels_here)}
    in_block = {"activations": compute_activations(model, options, mesh).of(here, labels_here)}
    stream = {"activations": _residual_bytes(options) * model.hidden_size * here}
    return {
        "head": always | copies | kept | _at_head(model, options, mesh, labels_here),
        "blocks": always | copies | in_block | _at_blocks(model, options, mesh, here),
        "embedding": always | stream | _at_embedding(model, options, mesh),
        "update": always | _at_update(model, options, mesh),
    }


def _always(model: ModelSizes, options: StepOptions, mesh: MeshSizes) -> Parts:
    state = compute_state(model, options, mesh)
    runtime: Parts = {} if options.on_cpu else {"CUDA and NCCL": RUNTIME_BYTES}
    if _offloads(options, mesh):
        return runtime
    moments = _BERTHS * _piece(options) if options.offload_moments else state.moments
    return {"weights": state.weights, "gradients": state.gradients, "moments": moments} | runtime


def _at_head(model: ModelSizes, options: StepOptions, mesh: MeshSizes, labels: float) -> Parts:
    """All activations are there; the head's chunk of logits, and the gradient of its weight."""
    c, numel = options.compute_bytes, model.head_numel / mesh.tp
    vocabulary = model.vocab_size / mesh.tp
    chunk_bytes, slice_bytes = (CHUNK_BYTES, SLICE_BYTES) if options.on_cpu else (CHUNK_BYTES_CUDA, SLICE_BYTES_CUDA)
    rows = options.chunk_size or max(16, int(chunk_bytes / (c * vocabulary)))
    logits = c * vocabulary * min(labels, 2 * rows)  # the chunk that waits for its backward pass, and another
    logits += 2 * min(slice_bytes, 4 * vocabulary * min(labels, rows))
    cast = 0 if c == options.master_bytes else c * numel
    gradient = (c + 4) * numel if options.trains_all else 0  # a product and, in fp32, the sum of them
    parts = {"head: logits, weight, gradient": logits + cast + gradient + (c + 4) * labels * model.hidden_size}
    if uses_fsdp(mesh):
        block = _block_numel(model, mesh)
        parts["gathered weights"] = options.master_bytes * _end_numel(model, mesh) + options.gather_bytes * block
    return parts


def _at_blocks(model: ModelSizes, options: StepOptions, mesh: MeshSizes, tokens: float) -> Parts:
    """The backward pass of one block: the next one's weights come in, the last one's gradients go out."""
    queries, keys = (count * model.head_dim / mesh.tp for count in (model.num_heads, model.num_kv_heads))
    keys *= key_copies(model, mesh)
    if options.on_cpu:
        workspace = 2 * _FP32 * keys * tokens  # gradients of keys and values in fp32
    else:  # flash attention's: the query's gradient in fp32, those of key and value for every query head
        workspace = (_FP32 + 2 * options.compute_bytes) * queries * tokens
    parts = {"attention's workspace": workspace}
    if mesh.cp > 1:  # sent and received
        parts["context parallel exchange"] = 2 * options.compute_bytes * (queries + 2 * keys) * tokens
    if uses_fsdp(mesh):
        block, end = _block_numel(model, mesh), _end_numel(model, mesh)
        parts["gathered weights"] = 2 * options.gather_bytes * block + (options.master_bytes * end * model.head_tied)
        if options.trains_all:
            parts["gradients on their way"] = options.gather_bytes * block + _FP32 * max(block, end)
    return parts


def _at_embedding(model: ModelSizes, options: StepOptions, mesh: MeshSizes) -> Parts:
    """The end of the backward pass: activations are gone, and the embedding's gradient is dense."""
    if not options.trains_all:
        return {}
    numel = model.head_numel / mesh.tp
    if not uses_fsdp(mesh):
        return {"gradients on their way": options.master_bytes * numel}
    unit = _end_numel(model, mesh) if model.head_tied else unit_numels(model, mesh).get("embedding", 0)
    block = _block_numel(model, mesh)
    on_their_way = _FP32 * (numel * (2 if model.head_tied else 1) + unit + block)
    return {"gathered weights": options.master_bytes * unit, "gradients on their way": on_their_way}


def _at_update(model: ModelSizes, options: StepOptions, mesh: MeshSizes) -> Parts:
    state = compute_state(model, options, mesh)
    if options.optim == "adamw_bf16":
        return {"optimizer's workspace": 40 * min(_piece(options), state.trainable)}
    if options.optim == "adamw_torch":  # the square root of one tensor's second moments, and its quotient
        largest = max(weight.local_numel(shard=mesh.shard, tp=mesh.tp) for weight in model.weights)
        return {"optimizer's workspace": 2 * options.master_bytes * min(largest, state.trainable)}
    return {}


def _piece(options: StepOptions) -> int:
    """Numbers that AdamWBf16 works on at a time."""
    return PIECE["cpu" if options.on_cpu else "cuda"]


def _autocast_copies(model: ModelSizes, options: StepOptions, mesh: MeshSizes) -> float:
    """Copies of the blocks' weights in the compute dtype, which a backward pass needs."""
    stored = options.gather_bytes if uses_fsdp(mesh) else options.master_bytes
    if stored == options.compute_bytes or options.quantized_bytes is not None:
        return 0
    return options.compute_bytes * sum(w.local_numel(tp=mesh.tp) for w in model.weights if w.is_linear)


def uses_fsdp(mesh: MeshSizes) -> bool:
    """Whether weights are gathered: on a mesh that transformers shards, wherever gradients are shared."""
    return mesh.is_sharded and mesh.gradient > 1


def _offloads(options: StepOptions, mesh: MeshSizes) -> bool:
    return options.offload_weights and uses_fsdp(mesh)


def unit_numels(model: ModelSizes, mesh: MeshSizes) -> dict[str, int]:
    """Numbers in each of FSDP2's groups, on one tp rank.

    A tied head is in two: transformers 5.23 ties it after sharding, so it is gathered and reduced as "end head" too.
    """
    sizes: dict[str, int] = {}
    for weight in model.weights:
        sizes[weight.unit] = sizes.get(weight.unit, 0) + weight.local_numel(tp=mesh.tp)
    if model.head_tied and uses_fsdp(mesh):
        sizes["end head"] = math.ceil(model.vocab_size / mesh.tp) * model.hidden_size
    return sizes


def _block_numel(model: ModelSizes, mesh: MeshSizes) -> int:
    """Of the largest block."""
    return max((numel for name, numel in unit_numels(model, mesh).items() if name.startswith("block ")), default=0)


def _end_numel(model: ModelSizes, mesh: MeshSizes) -> int:
    """Of what stays gathered from the forward to the backward pass."""
    return sum(numel for name, numel in unit_numels(model, mesh).items() if name.startswith("end"))
