"""What the GPU commands run: models of known shapes with random weights, pairs of given lengths, and the rungs.

A rung is one way to do the same training step. One set of weights serves them all: between rungs the attention, the
classes of blocks and the compiled code are switched, the weights stay.

    padded      one row a response, prompt in both, padded on the right to the longest of the micro-batch; the blocks
                of transformers, its sdpa attention with a padding mask; logits of every position, softmax in fp32.
                What TRL's CPOTrainer does
    packed      all responses end to end in one row without padding, each with its own copy of the prompt; packed
                attention; logits of response tokens only, all at one time (dense)
    shared      the prompt of a pair once
    head        the head in chunks, forward and backward (`core.logprobs.token_logps`)
    low-memory  the blocks of `model.low_memory`: less is kept for the backward pass; the last MLP skips unread rows.
                What `simpo train` does unless told otherwise
    compiled    transformers' blocks under torch.compile instead of the low-memory ones: `torch_compile: true`
    checkpoints the low-memory blocks, computed again in the backward pass: `gradient_checkpointing: true`

A step is forward, backward, clipping to norm 1 and the optimizer's update at learning rate 0: the same work as any
other, and weights that stay as they are, so the losses of all rungs and rounds on the same pairs can be compared.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from peers.cases import Case, build_pairs
from peers.models import SHAPES, llama_settings
from peers.sides import BETA, GAMMA_BETA_RATIO, MAX_GRAD_NORM, PaddedBatch, pad_pairs, padded_pair_losses
from torch import Tensor, nn

import simpo.model.head
from simpo.core.batch import PackedPairs, build_batch
from simpo.core.logprobs import reference_token_logps
from simpo.core.losses import LOSSES
from simpo.core.packing import TokenPair, iterate_steps
from simpo.model.attention import PACKED, plain_implementation, unwrap
from simpo.model.compile import compile_blocks
from simpo.model.head import compute_pair_logps, install_head
from simpo.model.load import disable_dropout
from simpo.model.low_memory import install_low_memory_blocks
from simpo.model.offload import offload_activations
from simpo.run.adamw import AdamWBf16
from simpo.run.optim import clip_gradients

GIB = 2**30

# --- models ----------------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {  # for rehearsals on a CPU
        "vocab_size": 199,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "smollm2-135m": llama_settings("smollm2-135m"),
    **SHAPES,
}


def build_config(model: str) -> Any:
    """The configuration of a shape by name.

    Raises:
        ValueError: no such shape.
    """
    from transformers import LlamaConfig

    if model not in MODELS:
        raise ValueError(f"model: {model!r} must be one of {', '.join(MODELS)} (shapes with random weights)")
    return LlamaConfig(**MODELS[model])


def build_model(config: Any, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights (seed 0) made on the device, with packed attention and the log-prob head, in training mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED)
    disable_dropout(model)
    install_head(model)
    return model.train()


@dataclass(frozen=True)
class WeightPlan:
    """In which precision weights are kept and what updates them.

    Attributes:
        weights: "fp32" (bf16 under autocast computes) or "bf16" (they compute themselves).
        optimizer: "adamw" (torch's fused), "adamw_bf16" (this package's) or "none": forward and backward only.
        why: in words.
    """

    weights: Literal["fp32", "bf16"]
    optimizer: Literal["adamw", "adamw_bf16", "none"]
    why: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.weights == "fp32" else torch.bfloat16

    @property
    def recipe_optim(self) -> str:
        """The recipe's name of the optimizer."""
        return "adamw_bf16" if self.optimizer == "adamw_bf16" else "adamw_torch_fused"


SHARE_FOR_STATE = 0.8
"""Weights, gradients and moments may take this share of the memory where the plan is picked by size."""
_BYTES = {("fp32", "adamw"): 16, ("bf16", "adamw_bf16"): 8, ("bf16", "none"): 4}


def plan_weights(
    num_parameters: int, total_bytes: int, *, weights: str = "auto", optimizer: str = "auto"
) -> WeightPlan:
    """What was asked for; "auto" takes the first of fp32 + AdamW, bf16 + adamw_bf16, bf16 alone whose state fits."""
    if weights == "auto" and optimizer == "auto":
        for (kept, updated), size in _BYTES.items():
            needed = size * num_parameters
            if needed <= SHARE_FOR_STATE * total_bytes or updated == "none":
                return WeightPlan(kept, updated, f"state of {needed / GIB:.1f} GiB, {total_bytes / GIB:.1f} GiB there")
    if weights == "auto":
        weights = "bf16" if optimizer == "adamw_bf16" else "fp32"
    if optimizer == "auto":
        optimizer = "adamw" if weights == "fp32" else "adamw_bf16"
    return WeightPlan(weights, optimizer, "as asked for")


def build_optimizer(
    model: nn.Module, name: str, *, learning_rate: float = 0.0, offload: bool = False
) -> torch.optim.Optimizer | None:
    """The optimizer of a `WeightPlan`; `offload`: adamw_bf16's moments in CPU memory."""
    if name == "none":
        return None
    if name == "adamw_bf16":
        return AdamWBf16(model.parameters(), lr=learning_rate, offload=offload)
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)


# --- pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthCase:
    """Pairs of random tokens.

    Attributes:
        name: P/C/R, the same with "ragged-" before it, or a list's.
        lengths: [num_pairs][3] tokens of prompt, chosen and rejected; None = as the name says, as many as needed.
    """

    name: str
    lengths: tuple[tuple[int, int, int], ...] | None = None

    def pairs(self, count: int, *, vocab_size: int) -> list[TokenPair]:
        """The first `count` pairs, always the same.

        Raises:
            ValueError: a list with fewer.
        """
        if self.lengths is not None:
            if len(self.lengths) < count:
                raise ValueError(f"lengths: {self.name} has {len(self.lengths)} entries and {count} are needed")
            return [random_pair(i, sizes, vocab_size) for i, sizes in enumerate(self.lengths[:count])]
        sizes = self.name.removeprefix("ragged-")
        kind = "drawn" if sizes != self.name else "fixed"
        means = tuple(int(part) for part in sizes.split("/"))
        case = Case(self.name, "", kind, None, means)
        return build_pairs(case, count, vocab_size=vocab_size, tokenizer=None, data=None)

    def micro_batches(self, count: int, size: int, *, vocab_size: int) -> list[list[TokenPair]]:
        """The same pairs, `size` at a time."""
        pairs = self.pairs(count * size, vocab_size=vocab_size)
        return list(iterate_steps(pairs, pairs_per_step=size))


def random_pair(index: int, sizes: Sequence[int], vocab_size: int) -> TokenPair:
    """Random tokens; the responses differ in their first, so that exactly the prompt is shared."""
    rng = np.random.default_rng([1, index, *sizes])
    prompt, chosen, rejected = (rng.integers(0, vocab_size, size=size).tolist() for size in sizes)
    rejected[0] = (chosen[0] + 1) % vocab_size
    return TokenPair(str(index), prompt + chosen, len(prompt), prompt + rejected, len(prompt))


def find_cases(names: str, lengths_file: str | None) -> list[LengthCase]:
    """The cases of `--cases`, then those of a JSON file: {"name": [[prompt, chosen, rejected], ...], ...}, or one list.

    Raises:
        ValueError: a name or a file that is not of this form.
    """
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        match = re.fullmatch(r"(?:ragged-)?(\d+)/(\d+)/(\d+)", name)
        if match is None or min(map(int, match.groups())) < 1:
            raise ValueError(
                f"cases: {name!r} must be prompt/chosen/rejected tokens, such as 1000/300/300, or ragged-200/350/350 "
                "for log-normal lengths around such means"
            )
        found.append(LengthCase(name))
    return found + (_cases_of_file(Path(lengths_file)) if lengths_file else [])


def _cases_of_file(path: Path) -> list[LengthCase]:
    form = '{"name": [[prompt, chosen, rejected], ...]} or one such list, token counts of at least 1'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lists = content if isinstance(content, dict) else {path.stem: content}
        cases = [LengthCase(name, tuple((int(p), int(c), int(r)) for p, c, r in rows)) for name, rows in lists.items()]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"lengths: cannot read {path}: {error}; it must be {form}") from None
    if any(min(sizes) < 1 for case in cases for sizes in case.lengths):
        raise ValueError(f"lengths: {path}: an entry is below 1; it must be {form}")
    return cases


# --- rungs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """One way to do the same step; see the module's docstring."""

    name: str
    layout: Literal["padded", "packed", "shared"]
    dense_head: bool = False
    low_memory: bool = False
    compiled: bool = False
    checkpointing: bool = False


RUNGS = (
    Rung("padded", "padded", dense_head=True),
    Rung("packed", "packed", dense_head=True),
    Rung("shared", "shared", dense_head=True),
    Rung("head", "shared"),
    Rung("low-memory", "shared", low_memory=True),
    Rung("compiled", "shared", compiled=True),
    Rung("checkpoints", "shared", low_memory=True, checkpointing=True),
)
DEFAULT_RUNG = next(rung for rung in RUNGS if rung.name == "low-memory")
PADDED_RUNG, CHECKPOINTS_RUNG = RUNGS[0], RUNGS[-1]

Batch = PaddedBatch | PackedPairs


def lay_out(rung: Rung, pairs: Sequence[TokenPair]) -> Batch:
    """The pairs as the rung wants them, on the CPU."""
    if rung.layout == "padded":
        return pad_pairs(pairs, pad_token_id=0)
    return build_batch(pairs, share_prompt=rung.layout == "shared")


def count_pairs(batch: Batch) -> int:
    """Pairs of a batch in either layout."""
    return batch.num_pairs if isinstance(batch, PackedPairs) else batch.input_ids.shape[0] // 2


def dense_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    **others: Any,
) -> Tensor:
    """In place of `core.logprobs.token_logps`: all logits at one time, and autograd's own backward pass."""
    return reference_token_logps(hidden, weight, labels, bias=bias, scale=scale, softcap=softcap)


class StagedModel:
    """A model whose rung can be switched.

    Args:
        model: as `build_model` leaves it.
        autocast: compute in bf16 on fp32 weights.
    """

    def __init__(self, model: nn.Module, *, device: torch.device, autocast: bool) -> None:
        self.model, self.device, self.autocast = model, device, autocast
        self._plain = [(module, type(module)) for module in model.modules()]
        install_low_memory_blocks(model)
        self._low_memory = [(module, type(module)) for module in model.modules()]
        self._compiled: list[tuple[nn.Module, Callable[..., Any]]] | None = None
        self._checkpointing_ready = False
        self._set_classes(low_memory=False)

    def losses(self, rung: Rung, batch: Batch) -> Tensor:
        """SimPO's loss of each pair [P]; only inside `on(rung)`."""
        batch = batch.to(self.device)
        with self.computing():
            if isinstance(batch, PaddedBatch):
                return padded_pair_losses(self.model, batch)
            logps = compute_pair_logps(self.model, batch)
        options = {"beta": BETA, "gamma_beta_ratio": GAMMA_BETA_RATIO, "label_smoothing": 0.0}
        return LOSSES["sigmoid"](logps, **options).losses

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    @contextlib.contextmanager
    def on(self, rung: Rung) -> Iterator[None]:
        """Inside, the model is that of the rung."""
        base = unwrap(self.model)
        self._set_classes(low_memory=rung.low_memory)
        self._set_checkpointing(rung.checkpointing)
        base.set_attn_implementation(plain_implementation(base) if rung.layout == "padded" else PACKED)
        head = contextlib.nullcontext()
        if rung.dense_head:
            head = mock.patch.object(simpo.model.head, "token_logps", dense_token_logps)
        with head, self._running_compiled() if rung.compiled else contextlib.nullcontext():
            try:
                yield
            finally:
                base.set_attn_implementation(PACKED)
                self._set_checkpointing(False)
                self._set_classes(low_memory=False)

    def _set_classes(self, *, low_memory: bool) -> None:
        for module, kind in self._low_memory if low_memory else self._plain:
            module.__class__ = kind

    @contextlib.contextmanager
    def _running_compiled(self) -> Iterator[None]:
        if self._compiled is None:
            blocks = compile_blocks(self.model, device=self.device)
            self._compiled = [(block, block.forward) for block in blocks]
        for block, forward in self._compiled:
            block.forward = forward
        try:
            yield
        finally:
            for block, _ in self._compiled:
                del block.forward  # what the class says shows again

    def _set_checkpointing(self, value: bool) -> None:
        if value and not self._checkpointing_ready:
            base = unwrap(self.model)
            # transformers 5.23 gave it another name.
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            self._checkpointing_ready = True
        for module in self.model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module.gradient_checkpointing = value

    def step(
        self,
        rung: Rung,
        batches: Sequence[Batch],
        optimizer: torch.optim.Optimizer | None,
        *,
        offload: bool = False,
    ) -> tuple[Tensor, int]:
        """One training step over micro-batches; gives the mean loss before it, and the bytes that went to the host.

        Raises:
            RuntimeError: memory ran out; no gradient is left behind.
        """
        moved, total = 0, torch.zeros((), device=self.device)
        num_pairs = sum(map(count_pairs, batches))
        try:
            for batch in batches:
                if offload:
                    with offload_activations(self.model, **self._eligible()) as copies:
                        losses = self.losses(rung, batch)
                    moved += copies.num_bytes
                else:
                    losses = self.losses(rung, batch)
                (losses.sum() / num_pairs).backward()
                total += losses.detach().sum()
                del losses
            clip_gradients(self.model, MAX_GRAD_NORM)
            if optimizer is not None:
                optimizer.step()
            return total / num_pairs, moved
        finally:
            self.model.zero_grad(set_to_none=True)

    def _eligible(self) -> dict[str, Any]:
        """What may be moved to CPU memory; on a CPU, where all is there already, everything."""
        return {} if self.device.type == "cuda" else {"eligible": lambda tensor: True, "min_bytes": 1}
