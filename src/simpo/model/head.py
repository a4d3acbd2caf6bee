"""The log-prob head: a model's own output layer that gives log-probs of labels, and a batch's log-probs through it.

That these and packed attention agree with the model's ordinary forward pass is checked in `model.probe`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from simpo.core.batch import PackedPairs
from simpo.core.context import sum_over
from simpo.core.logprobs import VocabShard, response_logps, token_logps
from simpo.core.losses import PairLogps
from simpo.model.attention import PACKED, is_packed, plain_attention, unwrap
from simpo.model.low_memory import READ_ROWS
from simpo.parallel.sharding import original_class, swap_class


@dataclass(frozen=True)
class _Transform:
    """A step after the head that must move into it: where its value is kept, what kind it is, what switches it off."""

    owner: Any
    attribute: str
    scale: float = 1.0
    softcap: float | None = None

    @property
    def neutral(self) -> float | None:
        return None if self.softcap is not None else 1.0


def _find_transforms(base: PreTrainedModel) -> list[_Transform]:
    """What this architecture does to logits after `lm_head`, read from its configuration."""
    config = base.config.get_text_config()
    found: list[_Transform] = []
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:
        found.append(_Transform(config, "final_logit_softcapping", softcap=float(softcap)))
    scaling = getattr(config, "logits_scaling", None)
    if scaling not in (None, 1.0):
        scale = float(scaling) if "hyperclovax" in config.model_type else 1.0 / float(scaling)
        found.append(_Transform(config, "logits_scaling", scale=scale))
    if isinstance(getattr(base, "logit_scale", None), int | float):  # Cohere keeps it on the model
        found.append(_Transform(base, "logit_scale", scale=float(base.logit_scale)))
    inner = getattr(base, "model", None)
    if isinstance(getattr(inner, "lm_head_multiplier", None), int | float):  # Falcon-H1
        found.append(_Transform(inner, "lm_head_multiplier", scale=float(inner.lm_head_multiplier)))
    return [t for t in found if t.softcap is not None or t.scale != 1.0]


@dataclass
class _HeadRequest:
    """What the head is to compute during one forward pass."""

    source_rows: Tensor
    labels: Tensor
    scale: float
    softcap: float | None
    chunk_size: int | None


class LogprobHead(nn.Linear):
    """The model's own `lm_head`, its class swapped: log-probs of given labels when asked for, logits otherwise.

    The parameters, their names and their tying stay as they were, so saving, LoRA and sharding do not notice.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [R, T, D] -> logits [R, T, V]; inside `labels_in_head`, token log-probs [1, N] fp32."""
        request: _HeadRequest | None = self.__dict__.get("_request")
        if request is None:
            return (self.__dict__.get("_logits_over_ranks") or super().forward)(hidden)
        rows = hidden.flatten(0, -2).index_select(0, request.source_rows)
        device_type = hidden.device.type
        compute = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        weight, bias, shard = _own_rows(self.weight, self.bias)
        logps = token_logps(
            rows,
            weight,
            request.labels,
            bias=bias,
            shard=shard,
            scale=request.scale,
            softcap=request.softcap,
            compute_dtype=compute,
            chunk_size=request.chunk_size,
        )
        return logps[None].clone()  # what FSDP2 hands on must not be a view


def _own_rows(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabShard | None]:
    """This process's rows of an output embedding, with their bias, and where they lie; whole ones as they are."""
    if not isinstance(weight, DTensor):
        return weight, bias, None
    mesh = weight.device_mesh
    if mesh.ndim != 1 or weight.placements != (Shard(0),):
        raise ValueError(f"the output head is sharded as {weight.placements}; only its rows can be (Shard(0))")
    _, start = Shard.local_shard_size_and_offset(weight.shape[0], mesh.size(), mesh.get_local_rank())
    shard = VocabShard(mesh.get_group(), start, weight.shape[0])
    return weight.to_local(), bias.to_local() if isinstance(bias, DTensor) else bias, shard


def install_head(model: nn.Module) -> LogprobHead:
    """Swap the class of the model's output embedding for `LogprobHead`; idempotent.

    Raises:
        ValueError: the head is not a plain nn.Linear (adapters or quantisation on it, or no head at all).
    """
    head = unwrap(model).get_output_embeddings()
    if isinstance(head, LogprobHead):
        return head
    if head is None or original_class(head) is not nn.Linear:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has a {type(head).__name__} as output embedding, not a plain linear "
            "layer; remove lm_head from lora_target_modules, lora_modules_to_save and quantisation"
        )
    swap_class(head, LogprobHead)
    if "forward" in head.__dict__:  # transformers' tensor parallelism puts its own on the instance
        head.__dict__["_logits_over_ranks"] = head.__dict__.pop("forward")
    return head


@contextlib.contextmanager
def labels_in_head(model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None) -> Iterator[None]:
    """Inside, `model(...).logits` are the log-probs of the batch's labels, [1, N].

    Scales and soft-caps that the architecture applies after its head are done in the head and switched off behind it.
    """
    base = unwrap(model)
    head = install_head(model)
    transforms = _find_transforms(base)
    scale, softcap = 1.0, None
    for transform in transforms:
        scale *= transform.scale
        softcap = transform.softcap if transform.softcap is not None else softcap
    saved = [(t, getattr(t.owner, t.attribute)) for t in transforms]
    for transform in transforms:
        setattr(transform.owner, transform.attribute, transform.neutral)
    head.__dict__["_request"] = _HeadRequest(batch.source_rows, batch.labels, scale, softcap, chunk_size)
    try:
        yield
    finally:
        head.__dict__["_request"] = None
        for transform, value in saved:
            setattr(transform.owner, transform.attribute, value)


def compute_token_logps(model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None) -> Tensor:
    """Log-probs of the batch's labels, [N] fp32, through one forward pass.

    Raises:
        ValueError: rows that share a prefix or are packed, on a model whose attention is not ours. Restarted positions
            without our mask would silently be taken for separate documents.
    """
    base = unwrap(model)
    implementation = base.config._attn_implementation
    if batch.blocks is not None and not is_packed(implementation):
        raise ValueError(
            f"packed or shared-prompt rows need attention {PACKED!r}, not {implementation!r}; load the model with "
            f"attn_implementation={PACKED!r}, or set pack: false and share_prompt: false"
        )
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if batch.blocks is not None:
        inputs["packed_blocks"] = batch.blocks
        inputs[READ_ROWS] = batch.read_rows  # blocks without a use for it ignore it, like packed_blocks
        # Without a mask transformers looks for packed rows in the positions, and waits for the device to tell.
        inputs["attention_mask"] = torch.ones_like(batch.input_ids, dtype=torch.bool)
        attention = contextlib.nullcontext()
    else:
        inputs["attention_mask"] = batch.attention_mask
        attention = plain_attention(model)
    with attention, labels_in_head(model, batch, chunk_size=chunk_size):
        return model(**inputs).logits.squeeze(0)


def compute_response_logps(
    model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Summed log-probs [S] fp32 and lengths [S] int64 of the batch's S responses, pairs or lists, in its order.

    A batch may be spread over ranks (`core.context`); all of them get the same sums.
    """
    here = batch.response_lengths if batch.local_lengths is None else batch.local_lengths
    sums = response_logps(compute_token_logps(model, batch, chunk_size=chunk_size), here)
    if batch.blocks is not None and batch.blocks.group is not None:
        sums = sum_over(sums, batch.blocks.group)
    return sums, batch.response_lengths


def compute_pair_logps(model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None) -> PairLogps:
    """Sums and lengths of the batch's pairs, as the losses want them.

    Raises:
        ValueError: the batch holds lists of another number of responses than two.
    """
    if set(batch.group_sizes) != {2}:
        raise ValueError(
            f"pairs have two responses each, this batch has lists of {sorted(set(batch.group_sizes))}; "
            "use compute_response_logps"
        )
    sums, lengths = compute_response_logps(model, batch, chunk_size=chunk_size)
    return PairLogps(
        chosen_sum=sums[0::2],
        rejected_sum=sums[1::2],
        chosen_length=lengths[0::2],
        rejected_length=lengths[1::2],
    )
