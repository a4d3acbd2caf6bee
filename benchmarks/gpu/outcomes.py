"""What `gpu.py parity` compares: architectures, pairs, and log-probs, loss and gradients computed in both ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu.workload import BETA, DEFAULT_RUNG, GAMMA_BETA_RATIO, LengthCase, Rung, StagedModel
from simpo.core.batch import PackedPairs, build_batch
from simpo.core.logprobs import response_logps
from simpo.core.packing import TokenPair
from simpo.model.attention import plain_attention, plain_implementation
from simpo.model.head import compute_token_logps
from simpo.model.offload import offload_activations

LARGEST_LOGIT = 15.0
"""Of the models that are compared, as trained models have it: small logits hide faults."""


def architectures(*, tiny: bool) -> dict[str, Any]:
    """Configurations by name: head sizes 64 and 128, groups, windows, norms, soft-caps; two or three layers."""
    import transformers as hf

    head = 16 if tiny else 64
    window = 24 if tiny else 200
    common = {
        "vocab_size": 199 if tiny else 16384,
        "num_hidden_layers": 2,
        "initializer_range": 0.06,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
    }

    def sizes(heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
        hidden = heads * head_dim
        return {
            **common,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
        }

    return {
        "llama 9/3 heads": hf.LlamaConfig(**sizes(9, 3, head)),
        "llama tied": hf.LlamaConfig(**sizes(4, 4, 2 * head), tie_word_embeddings=True),
        "mistral window": hf.MistralConfig(**sizes(8, 2, 2 * head), sliding_window=window),
        "qwen2": hf.Qwen2Config(**sizes(8, 2, head)),
        "qwen3": hf.Qwen3Config(**sizes(8, 4, 2 * head)),
        "gemma2 soft-caps": hf.Gemma2Config(
            **sizes(8, 4, head), sliding_window=window, query_pre_attn_scalar=head, attn_logit_softcapping=20.0
        ),
    }


def parity_pairs(vocab_size: int, *, tiny: bool) -> list[TokenPair]:
    """Ragged pairs: a prefix longer than a tile, one of a token, a response of a token, responses that begin alike."""
    lengths = ((300, 90, 140), (17, 33, 5), (1, 4, 80), (513, 1, 60), (129, 128, 127))
    if tiny:
        lengths = ((40, 9, 14), (3, 5, 1), (1, 4, 20))
    pairs = LengthCase("parity", lengths).pairs(len(lengths), vocab_size=vocab_size)
    first = pairs[0]
    start, alike = first.chosen_start, first.chosen_ids[: first.chosen_start + 5]
    longer = TokenPair("alike", first.chosen_ids, start, alike + first.rejected_ids[start + 5 :], start)
    return [*pairs, longer]


@dataclass
class Outcome:
    """Log-probs [N], mean loss and gradients by name, all in fp32."""

    logps: Tensor
    loss: float
    gradients: dict[str, Tensor]


def outcome_of(model: nn.Module, logps: Tensor, lengths: Tensor) -> Outcome:
    """Run the loss, written out, and the backward pass; leaves no gradient behind."""
    means = response_logps(logps, lengths) / lengths
    loss = -F.logsigmoid(BETA * (means[0::2] - means[1::2] - GAMMA_BETA_RATIO)).mean()
    loss.backward()
    gradients = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Outcome(logps.detach().float(), float(loss.detach()), gradients)


def reference_outcome(
    staged: StagedModel, pairs: Sequence[TokenPair], *, attention: str | None, alone: bool = False
) -> Outcome:
    """The ordinary way; `attention` as transformers names it, None = its own choice; `alone`: pair by pair."""
    model = staged.model
    implementation = model.config._attn_implementation
    logps, lengths = [], []
    model.set_attn_implementation(attention or plain_implementation(model))
    try:
        for some in [[pair] for pair in pairs] if alone else [pairs]:
            batch = build_batch(some, pack=False, share_prompt=False).to(staged.device)
            with staged.computing():
                logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            rows = logits.flatten(0, 1).index_select(0, batch.source_rows).float()
            logps.append(torch.log_softmax(rows, dim=-1).gather(1, batch.labels[:, None])[:, 0])
            lengths.append(batch.response_lengths)
    finally:
        model.set_attn_implementation(implementation)
    return outcome_of(model, torch.cat(logps), torch.cat(lengths))


def scale_logits(staged: StagedModel, pairs: Sequence[TokenPair]) -> None:
    """Scale the final norm so that the largest logit of these pairs is `LARGEST_LOGIT`; before any soft-cap."""
    base = staged.model
    batch = build_batch(pairs, pack=False, share_prompt=False).to(staged.device)
    heads: list[Tensor] = []
    hook = base.get_output_embeddings().register_forward_hook(lambda module, args, out: heads.append(out))
    with torch.no_grad(), plain_attention(base):
        base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    hook.remove()
    norm = base.model.norm.weight
    with torch.no_grad():
        offset = 1.0 - norm.mean().round()  # a new norm multiplies by one: Gemma keeps the difference from it
        norm.copy_((norm + offset) * (LARGEST_LOGIT / heads[0].abs().max()) - offset)


def packed_outcome(staged: StagedModel, batch: PackedPairs, rung: Rung = DEFAULT_RUNG) -> Outcome:
    """This package's way, or one of its rungs."""
    batch = batch.to(staged.device)
    with staged.on(rung):
        with staged.computing():
            logps = compute_token_logps(staged.model, batch)
        return outcome_of(staged.model, logps, batch.response_lengths)


def offloaded_outcome(staged: StagedModel, batch: PackedPairs, eligible: dict[str, Any]) -> tuple[Outcome, int]:
    """The same with activations in CPU memory between the passes, and the bytes that went there."""
    batch = batch.to(staged.device)
    with staged.on(DEFAULT_RUNG):
        with offload_activations(staged.model, **eligible) as copies, staged.computing():
            logps = compute_token_logps(staged.model, batch)
        return outcome_of(staged.model, logps, batch.response_lengths), copies.num_bytes


def errors_of(outcome: Outcome, truth: Outcome) -> dict[str, Any]:
    """How far one outcome is from another."""
    difference = outcome.logps - truth.logps
    norms = {name: float(gradient.norm()) for name, gradient in truth.gradients.items()}
    off = {
        name: float((outcome.gradients[name] - gradient).norm()) if name in outcome.gradients else math.inf
        for name, gradient in truth.gradients.items()
    }
    # A parameter whose gradient all but vanishes is measured against the largest one's.
    floor = 1e-3 * max(norms.values())
    return {
        "log-probs": float(difference.abs().max()),
        "log-probs rms": float(difference.square().mean().sqrt()),
        "loss": abs(outcome.loss - truth.loss),
        "gradients": math.hypot(*off.values()) / math.hypot(*norms.values()),
        "parameters": {name: off[name] / (norms[name] + floor) for name in norms},
    }
