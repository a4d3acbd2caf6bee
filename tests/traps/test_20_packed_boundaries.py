"""Trap 20: packed boundaries off by one or by the padding, and an initial loss several times too high."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from simpo.core.batch import PackedPairs, build_batch
from simpo.core.blocks import AttentionBlocks
from simpo.core.packing import TokenPair
from simpo.model.attention import PACKED
from simpo.model.head import compute_token_logps


@pytest.fixture(scope="module")
def copying_model(tiny_model: Path) -> torch.nn.Module:
    """A model that has learnt to count: token n is followed by n + 1. Any slip at a boundary costs many nats."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=PACKED)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        torch.manual_seed(0)
        basis = torch.randn(embedding.shape[0], embedding.shape[1])
        embedding.copy_(torch.nn.functional.normalize(basis, dim=1) * 3)
        for layer in model.model.layers:  # the residual stream passes through unchanged
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head = torch.nn.Linear(embedding.shape[1], embedding.shape[0], bias=False)
        head.weight.copy_(embedding.roll(1, dims=0) * 3)  # row n + 1 answers to token n
        model.lm_head = head
    return model


def counting_pairs() -> list[TokenPair]:
    """Every response counts on from its prompt; lengths are ragged."""
    pairs = []
    for index, (first, prompt, chosen, rejected) in enumerate([(10, 3, 6, 2), (100, 1, 1, 9), (200, 7, 3, 3)]):
        sequence = list(range(first, first + prompt + max(chosen, rejected)))
        pairs.append(
            TokenPair(f"row-{index}", sequence[: prompt + chosen], prompt, sequence[: prompt + rejected], prompt)
        )
    return pairs


@pytest.mark.parametrize(("pack", "share"), [(True, True), (True, False), (False, True), (False, False)])
def test_initial_loss_of_a_model_that_knows_the_answer_is_near_zero(
    copying_model: torch.nn.Module, pack: bool, share: bool
) -> None:
    batch = build_batch(counting_pairs(), pack=pack, share_prompt=share)
    with torch.no_grad():
        assert -compute_token_logps(copying_model, batch).mean() < 0.1


@pytest.mark.parametrize("shift", [-1, 1])
def test_boundaries_off_by_one_would_show(copying_model: torch.nn.Module, shift: int) -> None:
    batch = build_batch(counting_pairs())
    wrong = dataclasses.replace(batch, source_rows=(batch.source_rows + shift).clamp(0, batch.num_tokens - 1))
    with torch.no_grad():
        assert -compute_token_logps(copying_model, wrong).mean() > math.log(420) / 2


def test_attention_across_a_boundary_would_show(tiny_model: Path) -> None:
    """Packed log-probs equal those of bare sequences; one block over the whole row (no boundaries) does not."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=PACKED)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    pairs = counting_pairs()
    batch = build_batch(pairs)
    with torch.no_grad():
        packed = compute_token_logps(model, batch)
        bare = torch.cat([_bare_logps(plain, pair) for pair in pairs])
        assert (packed - bare).abs().max() < 1e-5
        joined = compute_token_logps(model, _without_boundaries(batch))
        assert (joined - bare).abs().max() > 0.05


def _bare_logps(model: torch.nn.Module, pair: TokenPair) -> torch.Tensor:
    logps = []
    for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        logps.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0])
    return torch.cat(logps)


def _without_boundaries(batch: PackedPairs) -> PackedPairs:
    return dataclasses.replace(batch, blocks=AttentionBlocks(((0, 0, 0, batch.num_tokens),)))
