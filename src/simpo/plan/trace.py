"""The passes of a training step, run without memory: what they hold beyond weights and gradients, storage by storage.

Model, packed attention, log-prob head, low-memory blocks and checkpoints are those that a run sets up; their tensors
have sizes alone (torch's fake tensors). There are only the first blocks and the last one: what the one before the last
keeps in its forward pass, every other block keeps. Sizes are those of one rank: tensor parallelism's pieces of weights,
in the format that FSDP2 gathers them in. Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpo.core.batch import build_batch
from simpo.core.device import every_tensor_counts_as_cuda
from simpo.core.logprobs import CHUNK_BYTES, CHUNK_BYTES_CUDA, SLICE_BYTES, SLICE_BYTES_CUDA
from simpo.core.packing import TokenPair
from simpo.model.attention import unwrap
from simpo.model.head import compute_pair_logps, install_head
from simpo.model.load import checkpoint_activations
from simpo.model.low_memory import install_low_memory_blocks
from simpo.plan.sizes import ModelSizes, build_on_meta, describe_weights, identity

if TYPE_CHECKING:
    from simpo.recipe import Recipe

Parts = dict[str, float]
"""Bytes by what they are for."""

KEPT, COPIES, WORKING = "activations", "copies of weights to compute with", "working memory"
_traces: dict[tuple[Any, ...], dict[str, Parts]] = {}


def traced_passes(
    model: ModelSizes, recipe: Recipe, *, tokens: float, labels: float, tp: int = 1, gathered: bool = False
) -> dict[str, Parts]:
    """The most that each part of forward and backward holds beyond weights and their gradients.

    Two short rows are traced. From the first on the head's slices in fp32 are of full size, and all else is linear in
    the tokens but the head's logits, which stop growing at a chunk (in its forward pass at two of them).

    Args:
        tokens, labels: of the row that this rank computes.
        tp: ranks that share each weight.
        gathered: whether FSDP2 gathers the blocks' weights, in the format it does so.
    Returns:
        "forward", "head", "head backward", "blocks" (of the backward pass) and, where it is trained, "embedding".
    """
    vocabulary, on_cpu = model.vocab_size / tp, recipe.device == "cpu"
    slice_bytes, chunk_bytes = (SLICE_BYTES, CHUNK_BYTES) if on_cpu else (SLICE_BYTES_CUDA, CHUNK_BYTES_CUDA)
    number = 2 if recipe.computes_in_bf16 else 4
    rows = recipe.logits_chunk_size or max(16, chunk_bytes / (number * vocabulary))
    few = min(64 if on_cpu else 2048, max(64, math.ceil(slice_bytes / (4 * vocabulary))))
    gathered = gathered and recipe.bf16 and recipe.master_dtype == "float32" and recipe.fsdp_param_dtype != "float32"
    found = []
    for n in (few, 4 * few):
        key = (*identity(model.config, recipe), n, tokens / labels, tp, gathered)
        if key not in _traces:
            length = max(n + 1, round(n * tokens / labels))
            _traces[key] = _trace(model, recipe, length, n, tp=tp, gathered=gathered)
        found.append(_traces[key])
    at = (labels - few) / (3 * few)

    def logits(count: float, chunks: int) -> float:
        return number * vocabulary * min(count, chunks * rows)

    passes = {}
    for moment, parts in found[0].items():
        more = {part: size - parts[part] for part, size in found[1][moment].items()}
        passes[moment] = {part: max(0.0, size + at * more[part]) for part, size in parts.items()}
        if chunks := {"head": 2, "head backward": 1}.get(moment):
            first, second = logits(few, chunks), logits(4 * few, chunks)
            passes[moment][WORKING] += logits(labels, chunks) - (first + at * (second - first))
    return passes


def _trace(model: ModelSizes, recipe: Recipe, tokens: int, labels: int, *, tp: int, gathered: bool) -> dict[str, Parts]:
    """`traced_passes` of one row."""
    on_cuda = contextlib.nullcontext() if recipe.device == "cpu" else every_tensor_counts_as_cuda()
    # torch's own product of groups has sizes for bf16 alone; this one keeps the same tensors.
    by_expert = mock.patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False)
    # FlexAttention looks at where tensors are; in its place tiles are traced, as on a machine without a GPU.
    no_flex = mock.patch("simpo.core.attention.has_compiler", return_value=False)
    with warnings.catch_warnings(), on_cuda, by_expert, no_flex, FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        warnings.simplefilter("ignore")
        blocks = min(3 if recipe.use_peft else 2, model.num_layers)  # the first one's input needs no gradient with LoRA
        network = build_on_meta(model.config, recipe, num_layers=blocks)
        install_head(network)  # from here as `model.load.load_model` does
        install_low_memory_blocks(network)
        if recipe.gradient_checkpointing:
            checkpoint_activations(unwrap(network))
        units = _give_sizes(network, recipe, fakes, tp=tp, gathered=gathered)
        batch = build_batch([_pair(tokens, labels)])
        held = _Held(network, like_it=model.num_layers - blocks + 1, round_to=1 if recipe.device == "cpu" else 512)
        _mark_moments(network, held, units)
        with held:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bf16):
                logps = compute_pair_logps(network, batch, chunk_size=recipe.logits_chunk_size)
            logps.chosen_sum.register_hook(lambda grad: held.begin("head backward"))
            (logps.chosen_sum / logps.chosen_length - logps.rejected_sum).sum().backward()
    return held.peaks


def _pair(tokens: int, labels: int) -> TokenPair:
    """Of so many packed tokens, of which so many are labels."""
    prompt, chosen = [0] * (tokens - labels), labels // 2
    return TokenPair("traced", prompt + [1] * chosen, len(prompt), prompt + [2] * (labels - chosen), len(prompt))


def _give_sizes(network: nn.Module, recipe: Recipe, fakes: FakeTensorMode, *, tp: int, gathered: bool) -> list[str]:
    """Every weight as this rank computes with it, and a gradient of an earlier micro-batch; the blocks' names."""
    made: dict[Tensor, nn.Parameter] = {}
    blocks: dict[str, None] = {}
    for weight, parameter in describe_weights(network, recipe):
        dtype = parameter.dtype
        if weight.unit.startswith("block "):
            blocks[weight.unit] = None
            dtype = torch.bfloat16 if gathered else dtype
        values = torch.empty(weight.local_shape(tp=tp), dtype=dtype, device="meta")
        fake = nn.Parameter(FakeTensor(fakes, values, torch.device("cpu")), requires_grad=weight.is_trained)
        fake.grad = torch.empty_like(fake) if weight.is_trained else None
        made[parameter] = fake
    for module in network.modules():
        for name, value in module._parameters.items():
            module._parameters[name] = made.get(value)
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else FakeTensor(fakes, value, torch.device("cpu"))
    return list(blocks)


def _mark_moments(network: nn.Module, held: _Held, blocks: list[str]) -> None:
    """Tell `held` where the passes have come to: the head's work, the backward pass of the blocks, the embedding's."""
    base = unwrap(network)

    def at(moment: str) -> Any:
        return lambda grad: held.begin(moment)

    def before_head(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        held.begin("head")
        args[0].register_hook(at("blocks"))

    def after_embedding(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(at("embedding"))

    for unit in blocks[-2:-1]:
        block = base.get_submodule(unit.removeprefix("block "))
        block.register_forward_pre_hook(lambda *_: held.enter(True))
        block.register_forward_hook(lambda *_: held.enter(False))
    base.get_output_embeddings().register_forward_pre_hook(before_head)
    base.get_input_embeddings().register_forward_hook(after_embedding)


class _Held(TorchDispatchMode):
    """Counts the storages that are made inside and still exist, and the most there were of them in each moment.

    Args:
        like_it: blocks that the one before the last stands for.
        round_to: bytes that the allocator rounds up to.
    """

    def __init__(self, network: nn.Module, *, like_it: int, round_to: int) -> None:
        super().__init__()
        self._times, self._like_it, self._round_to = 1, like_it, round_to
        self.peaks: dict[str, Parts] = {}
        self._now: Counter[str] = Counter({KEPT: 0, COPIES: 0, WORKING: 0})
        self._moment = "forward"
        self._known: dict[int, Any] = {}
        self._weights: set[int] = set()
        for tensor in (*network.parameters(), *network.buffers()):
            for own in (tensor, tensor.grad):
                if own is not None:
                    self._weights.add(own.untyped_storage()._cdata)

    def begin(self, moment: str) -> None:
        self._moment = moment
        self._note_peak()

    def enter(self, stands_for_others: bool) -> None:
        """A block's forward pass; what is computed again in the backward pass is there once."""
        self._times = self._like_it if stands_for_others and self._moment == "forward" else 1

    def _note_peak(self, more: float = 0) -> None:
        if self._times > 1:  # what comes and goes in a block is there once, which the last block shows
            return
        now = {**self._now, WORKING: self._now[WORKING] + more}
        if sum(now.values()) > sum(self.peaks.get(self._moment, {}).values()):
            self.peaks[self._moment] = now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # 1 where a number does not follow from sizes
            constant = getattr(args[0], "constant", None)
            return 1 if constant is None else constant.item()
        out = func(*args, **(kwargs or {}))
        part = KEPT if self._moment == "forward" else WORKING
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            part = COPIES
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage(), part)
        self._note_peak(_workspace(func, args))
        return out

    def _add(self, storage: Any, part: str) -> None:
        key, size = storage._cdata, self._times * math.ceil(storage.nbytes() / self._round_to) * self._round_to

        def drop(_: Any) -> None:
            del self._known[key]
            self._now[part] -= size

        if key not in self._weights and key not in self._known:
            self._known[key] = weakref.ref(storage, drop)
            self._now[part] += size


def _workspace(func: Any, args: Any) -> float:
    """What flash attention's backward pass holds inside: the query's gradient in fp32, and of fewer key heads than
    query heads the gradients of keys and values for every query head."""
    if "varlen_attn_backward" not in str(func):
        return 0
    _, query, key = args[:3]
    for_every_head = 2 * key.element_size() * key.shape[0] * query.shape[1] * query.shape[2]
    return 4 * query.numel() + (for_every_head if key.shape[1] != query.shape[1] else 0)
