"""Trap 18: averages that include prompt and padding tokens. Here every number is over response tokens only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from simpo.core.batch import build_batch
from simpo.core.losses import LOSSES
from simpo.core.packing import TokenPair
from simpo.model.attention import PACKED
from simpo.model.head import compute_pair_logps
from simpo.run.metrics import Totals, pair_metric_sums

LAYOUTS = [(True, True), (True, False), (False, True), (False, False)]
PAIRS = [
    TokenPair("a", [5, 6, 7, 8, 9, 50, 51], 5, [5, 6, 7, 8, 9, 60], 5),
    TokenPair("b", [5, 70], 1, [5, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81], 1),
]


@pytest.mark.parametrize(("pack", "share"), LAYOUTS)
def test_metrics_are_means_over_response_tokens_alone(tiny_model: Path, pack: bool, share: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=PACKED)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")

    def mean_over(ids: list[int], first: int) -> float:
        """Mean log-prob of ids[first:] from full logits of the bare sequence."""
        logits = plain(input_ids=torch.tensor([ids])).logits[0, first - 1 : -1]
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[first:])[:, None]).mean().item()

    with torch.no_grad():
        batch = build_batch(PAIRS, pack=pack, share_prompt=share)
        logps = compute_pair_logps(model, batch)
        loss = LOSSES["sigmoid"](logps, beta=2.0, gamma_beta_ratio=0.5)
        meter = Totals()
        meter.add(pair_metric_sums(logps, loss, loss.losses), batch.num_pairs)
        expected = sum(mean_over(p.chosen_ids, p.chosen_start) for p in PAIRS) / 2
        with_prompt = sum(mean_over(p.chosen_ids, 1) for p in PAIRS) / 2
    assert meter.means()["logps/chosen"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected - with_prompt) > 1e-2, "the test could not tell the difference"


@pytest.mark.parametrize(("pack", "share"), LAYOUTS)
def test_nothing_but_response_tokens_is_a_label(pack: bool, share: bool) -> None:
    batch = build_batch(PAIRS, pack=pack, share_prompt=share, pad_token_id=0)
    assert batch.labels.tolist() == [50, 51, 60, 70, *range(71, 82)]
    assert batch.response_lengths.tolist() == [2, 1, 1, 11]
