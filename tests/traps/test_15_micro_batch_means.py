"""Trap 15: a mean of micro-batch means, in which pairs of short or ragged micro-batches weigh more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from simpo.core.batch import build_batch
from simpo.core.losses import LOSSES
from simpo.core.packing import TokenPair, plan_micro_batches
from simpo.model.attention import PACKED
from simpo.model.head import compute_pair_logps


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=PACKED)


def make_pairs(count: int) -> list[TokenPair]:
    generator = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 300, (length,), generator=generator).tolist()

    prompts = [tokens(2, 6) for _ in range(count)]
    return [TokenPair(f"row-{i}", p + tokens(1, 9), len(p), p + tokens(1, 9), len(p)) for i, p in enumerate(prompts)]


def pair_losses(model: torch.nn.Module, pairs: list[TokenPair]) -> torch.Tensor:
    return LOSSES["sigmoid"](compute_pair_logps(model, build_batch(pairs)), beta=2.0, gamma_beta_ratio=0.5).losses


def gradient(model: torch.nn.Module) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return flat


def test_five_pairs_in_two_micro_batches_weigh_one_fifth_each(model: torch.nn.Module) -> None:
    """`Trainer.train_step` divides sums by the step's pairs; tests/invariant/test_accumulation.py runs it in full."""
    pairs = make_pairs(5)
    tokens = [len(p.chosen_ids) + len(p.rejected_ids) for p in pairs]
    (micro_batches,) = plan_micro_batches(tokens, tokens, num_ranks=1, num_micro_batches=2)
    assert sorted(len(items) for items in micro_batches) != [0, 5]

    pair_losses(model, pairs).mean().backward()
    expected = gradient(model)

    for items in micro_batches:
        (pair_losses(model, [pairs[i] for i in items]).sum() / len(pairs)).backward()
    assert (gradient(model) - expected).abs().max() < 2e-6 * expected.abs().max()

    for items in micro_batches:  # the bug: the mean of 2 and the mean of 3 pairs, each weighing a half
        (pair_losses(model, [pairs[i] for i in items]).mean() / len(micro_batches)).backward()
    assert (gradient(model) - expected).abs().max() > 1e-2 * expected.abs().max()
