"""How many packed tokens fit into memory: measured on small rows of the model at hand, compared with what is free.

What a step holds at its peak is taken apart into what does not depend on the micro-batch (gradients, optimizer state,
casts of weights, the head's chunk of logits) and what its forward pass keeps for the backward pass. The latter is
linear in pairs, tokens, labels and attention scores, so five small rows determine it exactly, whatever the
architecture, precision, adapters or checkpointing. Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpo.core.batch import PackedPairs, build_batch
from simpo.core.logprobs import CHUNK_BYTES, CHUNK_BYTES_CUDA
from simpo.core.optimizers import OPTIMIZERS
from simpo.core.packing import PairShape, TokenPair
from simpo.model.attention import unwrap
from simpo.parallel.sharding import gathered_bytes, local_part

if TYPE_CHECKING:
    from simpo.data.loader import PairStore
    from simpo.recipe import Recipe

SHARE_OF_FREE = {"cuda": 0.9, "cpu": 0.5}
"""Share of the free memory that is planned with. The rest is reserve: kernels' workspaces, fragmentation, other
programs; on CPU the allocator keeps growing for 50 to 100 steps of varying lengths, so it is large there."""

HOPELESS = 2.0
"""A pair that is predicted to need more than this many times the free memory stops the run before it starts."""

STILL_ON_ITS_WAY = 0.25
"""Share of offloaded activations taken to be on the GPU at one time, waiting for their copy. An assumption: how far
copies lag behind depends on the machine."""

_ROUND_TO = 64  # tokens
_GIB = 2**30

Forward = Callable[[PackedPairs], Any]


class _Probe(NamedTuple):
    """A small row: `count` pairs that share `prefix` tokens (all of the prompt), and the tokens of their responses."""

    count: int
    prefix: int
    chosen: int
    rejected: int

    def build(self, vocabulary: int, *, share_prompt: bool) -> PackedPairs:
        def tokens(count: int, first: int) -> list[int]:
            return [(first + 7 * index) % vocabulary for index in range(count)]

        prompt = tokens(self.prefix, 0)
        chosen, rejected = prompt + tokens(self.chosen, 1), prompt + tokens(self.rejected, 2)
        pair = TokenPair("probe", chosen, self.prefix, rejected, self.prefix)
        return build_batch([pair] * self.count, share_prompt=share_prompt)

    def features(self, *, share_prompt: bool) -> list[int]:
        """Its numbers of rows, pairs, tokens, labels and scores."""
        p, c, r = self.prefix, self.chosen, self.rejected
        shape = PairShape(p, c, r) if share_prompt else PairShape(0, p + c, p + r)
        return [1, *(self.count * number for number in (1, shape.tokens, c + r, _scores(shape)))]


# In units of a few tokens. Their features (rows, pairs, tokens, labels, scores) are linearly independent.
_PROBES = (_Probe(1, 1, 1, 1), _Probe(1, 1, 3, 3), _Probe(1, 4, 1, 1), _Probe(2, 1, 1, 1), _Probe(1, 2, 4, 1))


def _scores(shape: PairShape) -> int:
    """Entries of the score rectangles (queries x keys) of both blocks, for attention that writes them out."""
    others = shape.prefix * (shape.rejected + shape.more) + shape.rejected**2 + shape.more_squares
    return (shape.prefix + shape.chosen) ** 2 + others


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """What a micro-batch holds at its peak beyond weights, gradients and moments, in bytes."""

    fixed: float  # whatever it consists of: casts of weights, mostly
    per_pair: float
    per_token: float  # packed
    per_label: float  # trained token
    per_score: float  # of attention; 0 wherever that is computed in tiles

    def of_pairs(self, shape: PairShape, num_labels: Any) -> Any:
        """Bytes of a pair, without `fixed`; arrays give an array."""
        return (
            self.per_pair
            + self.per_token * shape.tokens
            + self.per_label * num_labels
            + self.per_score * _scores(shape)
        )

    def shared_by(self, processes: int) -> ActivationBytes:
        """For one of the processes that share each row; labels may all fall to one of them."""
        share = 1 / processes
        return dataclasses.replace(self, per_token=self.per_token * share, per_score=self.per_score * share)


class _Storages(TorchDispatchMode):
    """Remembers every storage that operations inside it return, without keeping any alive.

    But for logits [n, V]: however many labels there are, the head keeps one chunk, which `step_bytes` counts.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch compile inside, which it refuses under other modes: FlexAttention (Gemma-2) is compiled."""
        return True

    def __init__(self, device: torch.device, *, vocabulary: int) -> None:
        super().__init__()
        self._device_type = device.type
        self._vocabulary = vocabulary
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.device.type == self._device_type and not self._is_logits(value):
                storage = value.untyped_storage()
                reference = StorageWeakRef(storage)
                self._seen[reference.cdata] = (reference, storage.nbytes())
        return out

    def _is_logits(self, value: Tensor) -> bool:
        return value.ndim == 2 and value.shape[1] == self._vocabulary

    def live_bytes(self, *, without: set[int]) -> int:
        """Bytes of those that still exist, but for the storages named by their address.

        At the size that they have now: what FSDP2 gathered exists for good, and is emptied.
        """
        seen = ((ref, size) for key, (ref, size) in self._seen.items() if key not in without)
        alive = ((torch.UntypedStorage._new_with_weak_ptr(ref.cdata), size) for ref, size in seen)
        return sum(min(size, storage.nbytes()) for storage, size in alive if storage is not None)


def kept_bytes(model: nn.Module, forward: Forward, batch: PackedPairs, *, device: torch.device) -> int:
    """Bytes that a forward pass leaves behind on the device for its backward pass, the model's own tensors excepted."""
    tensors = map(local_part, (*model.parameters(), *model.buffers()))
    own = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in tensors}
    devices = [device] if device.type == "cuda" else []
    vocabulary = unwrap(model).get_output_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=devices), _Storages(device, vocabulary=vocabulary) as storages:
        result = forward(batch)
        held = storages.live_bytes(without=own)
        if device.type == "cpu" and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            # Threads of gloo may hold what they gathered some milliseconds longer than the collective takes.
            for _ in range(15):
                time.sleep(0.003)
                held = min(held, storages.live_bytes(without=own))
    del result
    return held


def measure_activations(
    model: nn.Module, forward: Forward, *, device: torch.device, share_prompt: bool = True, offloaded: bool = False
) -> ActivationBytes:
    """Measure what micro-batches of this model hold, by forward passes of five rows of at most 72 tokens.

    Args:
        model: in training mode, as it will be trained.
        forward: from a batch (on the CPU) to its loss, as a training step runs it but without offloading.
        device: whose memory is looked at.
        share_prompt: whether rows share prompts.
        offloaded: what is kept will wait in CPU memory. `STILL_ON_ITS_WAY` of it counts.
    Returns:
        What is kept at the end of the forward pass, and on top what the backward pass adds while it works on one
        block: gradients of the block's activations, about as many bytes as the activations, and with checkpointing
        those activations themselves.
    """
    config = unwrap(model).config.get_text_config()
    unit = max(1, min(8, (getattr(config, "max_position_embeddings", None) or 48) // 6))
    probes = [_Probe(probe.count, *(unit * length for length in probe[1:])) for probe in _PROBES]
    batches = [probe.build(config.vocab_size, share_prompt=share_prompt) for probe in probes]
    features = np.array([probe.features(share_prompt=share_prompt) for probe in probes], dtype=np.float64)

    def solve() -> np.ndarray:
        held = [kept_bytes(model, forward, batch, device=device) for batch in batches]
        return np.linalg.solve(features, np.array(held, dtype=np.float64))

    kept_bytes(model, forward, batches[0], device=device)  # FSDP2's first pass makes buffers that stay
    kept = solve()
    with _without_checkpointing(model) as checkpoints:
        full = solve() if checkpoints else kept
    one_block = full / config.num_hidden_layers
    total = kept * (STILL_ON_ITS_WAY if offloaded else 1) + one_block * (2 if checkpoints or offloaded else 1)
    total[0] = max(kept[0], full[0])
    return ActivationBytes(*(max(0.0, float(value)) for value in total))


@contextlib.contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[bool]:
    """Inside, every activation is kept; gives whether that changed anything."""
    modules = [module for module in model.modules() if module.__dict__.get("gradient_checkpointing")]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield bool(modules)
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def step_bytes(
    model: nn.Module,
    *,
    optim: str,
    device: torch.device,
    chunk_size: int | None = None,
    state: Mapping[Tensor, Any] | None = None,
) -> int:
    """Bytes that an optimizer step needs whatever its micro-batches: gradients, moments, the head's work, and what
    FSDP2 gathers.

    Args:
        device: whose memory is looked at; gradients and moments of weights that wait elsewhere are there too.
        model: its trainable parameters count; what already has a gradient does not count again.
        optim: the recipe's optimizer; "offloaded" if its moments are in CPU memory.
        state: the optimizer's; the moments of parameters that it has are allocated already.
        chunk_size: rows of logits in one chunk; None = the default of `core.logprobs`.
    """
    moments = 0 if optim == "offloaded" else OPTIMIZERS[optim].moment_bytes
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad and local_part(parameter).device.type == device.type:
            size = parameter.element_size()
            gradient = size if parameter.grad is None else 0
            moment = 0 if state and parameter in state else 2 * size if moments is None else moments
            total += local_part(parameter).numel() * (gradient + moment)
    weight = unwrap(model).get_output_embeddings().weight
    default = CHUNK_BYTES_CUDA if device.type == "cuda" else CHUNK_BYTES
    # With tensor parallelism a process has its rows of the head; FSDP2 puts the head together before it computes.
    vocabulary = weight.shape[0] // (getattr(unwrap(model), "_tp_size", None) or 1)
    logits = default if chunk_size is None else 4 * chunk_size * vocabulary
    # The last chunk's logits and the next one's; the weight's fp32 gradient, and the embedding's it is tied to.
    total += 2 * logits + (8 * vocabulary * weight.shape[1] if weight.requires_grad else 0)
    return total + gathered_bytes(model)


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """How many packed tokens a micro-batch may hold."""

    tokens: int  # at least the longest pair's
    # what an optimizer step needs however small its micro-batches, beyond what is allocated before it
    fixed_bytes: float
    bytes_per_token: float  # the most that a token of any pair takes
    free_bytes: int  # free when it was picked
    warning: str | None = None  # one line where the longest pair eats into the reserve; None otherwise

    @property
    def needed_bytes(self) -> float:
        """Predicted peak of a step with a full micro-batch, beyond what is allocated before it."""
        return self.fixed_bytes + self.tokens * self.bytes_per_token

    def __str__(self) -> str:
        """What a full micro-batch takes of what is free, for people."""
        return f"a full one takes about {self.needed_bytes / _GIB:.1f} of {self.free_bytes / _GIB:.1f} GiB free"


def fit_micro_batches(
    model: nn.Module,
    forward: Forward,
    store: PairStore,
    recipe: Recipe,
    *,
    device: torch.device,
    cp: int = 1,
    state: Mapping[Tensor, Any] | None = None,
) -> TokenBudget | None:
    """Measure the model and the memory, and pick the budget for the pairs of a store.

    Args:
        forward: of whole rows, also where `cp` processes will share them; as for `measure_activations`.
        state: the optimizer's, see `step_bytes`.
    Returns:
        The budget; None where the system does not say how much memory is free.
    """
    free = free_memory(device)
    if free is None:
        return None
    optim = "offloaded" if recipe.optimizer_offload else recipe.optim
    fixed_bytes = step_bytes(model, optim=optim, device=device, chunk_size=recipe.logits_chunk_size, state=state)
    options = {"share_prompt": recipe.share_prompt, "offloaded": recipe.activation_offload}
    return pick_token_budget(
        measure_activations(model, forward, device=device, **options).shared_by(cp),
        store.shapes,
        store.num_labels,
        fixed_bytes=fixed_bytes,
        free_bytes=free,
        share=SHARE_OF_FREE[device.type],
        name_of=lambda index: store[index].row_id,
    )


def pick_token_budget(
    activations: ActivationBytes,
    shapes: PairShape,
    num_labels: np.ndarray,
    *,
    fixed_bytes: int,
    free_bytes: int,
    share: float,
    name_of: Callable[[int], str] = str,
) -> TokenBudget:
    """As many tokens as fit into a share of the free memory, whichever of the pairs they come from.

    With several ranks each must use the least of their budgets: plans are made from equal numbers.

    Args:
        activations: measured.
        shapes: of all pairs, fields [num_pairs]; at least one pair.
        num_labels: [num_pairs] trained tokens of both responses.
        fixed_bytes: see `step_bytes`.
        free_bytes: see `free_memory`.
        share: of the free memory that may be used, 0 < share <= 1.
        name_of: a pair's name by its index.
    Raises:
        ValueError: one pair needs more than `HOPELESS` times the free memory. Less than that, but more than the
            share: the budget is that pair's tokens, and carries a warning.
    """
    fixed = fixed_bytes + activations.fixed
    tokens, sizes = shapes.tokens, activations.of_pairs(shapes, num_labels)
    largest, longest = int(np.argmax(sizes)), int(tokens.max())
    per_token = float((sizes / tokens).max())
    room = share * free_bytes - fixed
    budget = int(room / per_token) // _ROUND_TO * _ROUND_TO if room > 0 else 0
    needed = fixed + sizes[largest]
    where = (
        f"memory: one optimizer step needs about {needed / _GIB:.1f} GiB with pair {name_of(largest)} "
        f"({int(tokens[largest]):,} tokens) alone in a micro-batch, and {free_bytes / _GIB:.1f} GiB are free"
    )
    advice = "gradient_checkpointing: true, use_peft: true, optim: adamw_bf16 or a lower max_length need less"
    if needed > HOPELESS * free_bytes:
        raise ValueError(f"{where}; {advice}; max_tokens_per_micro_batch: {longest} skips this check")
    if budget >= longest:
        return TokenBudget(budget, fixed, per_token, free_bytes)
    return TokenBudget(longest, fixed, per_token, free_bytes, warning=f"{where}, little or no reserve; {advice}")


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process can still allocate on a device; None where the system does not say.

    CUDA: what the driver has and what torch's allocator holds unused. CPU: available memory, or what the process's
    control group leaves of its limit, whichever is less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = [size for size in (_available_memory(), *_cgroup_rooms()) if size is not None]
    return max(0, min(found)) if found else None


def _available_memory(root: Path = Path("/")) -> int | None:
    """Linux's own estimate; elsewhere the pages that are free, where the system can be asked."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):  # of Windows the last
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup_rooms(root: Path = Path("/")) -> list[int]:
    """Limit - use of the process's memory control group and all above it, versions 1 and 2; pages of files are free.

    In a container the path of a group may be the outer system's: what is not there is skipped.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rooms = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit here
                limit, usage = (int((folder / name).read_text(encoding="ascii")) for name in names[:2])
                stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
                rooms.append(limit - usage + int(dict(line.split() for line in stat).get(names[2], 0)))
    return rooms
