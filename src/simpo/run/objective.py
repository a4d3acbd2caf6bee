"""What every host trains: log-probs and the loss of each pair by a recipe, its added SFT term, sums of the metrics.

The native trainer, transformers' Trainer and Megatron differ in how they compute log-probs and add up gradients; from
log-probs on, all of them go through here. Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from simpo.core.batch import PackedPairs
from simpo.core.device import move
from simpo.core.losses import PairLogps, sft_losses
from simpo.core.reweight import calibrated, wpo_weights
from simpo.model.head import compute_pair_logps
from simpo.run.metrics import num_sums, pair_metric_sums

if TYPE_CHECKING:
    from simpo.data.loader import MicroBatch, StepPlan
    from simpo.recipe import Recipe
    from simpo.run.eval_pairs import EvalPairs


def recipe_logps(model: nn.Module, batch: PackedPairs, recipe: Recipe) -> PairLogps:
    """A batch's log-probs, in the precision and chunks that the recipe says; the batch is where the model is."""
    with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=bool(recipe.bf16)):
        return compute_pair_logps(model, batch, chunk_size=recipe.logits_chunk_size, extras=recipe.extras)


def trained_losses(
    logps: PairLogps,
    recipe: Recipe,
    *,
    num_pairs: int,
    num_chosen_tokens: int,
    sources: Tensor | None = None,
    margins: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The trained loss of each pair and the sums of its metrics.

    Args:
        logps: of P pairs; with the reference's sums where the loss reads them.
        recipe: its loss, beta and so on.
        num_pairs, num_chosen_tokens: pairs, and trained tokens of their chosen responses, in the whole optimizer step
            over all ranks.
        sources: [S, P] bool, which pairs come from each source; None where they are not told apart.
        margins: [P], what each pair's gamma_beta_ratio is multiplied by; None = 1.
    Returns:
        losses [P], all added terms included: their sum over every pair of the step, divided by num_pairs, is what is
            trained.
        sums [num_sums(S)], see `run.metrics.pair_metric_sums`.
    """
    values = recipe.loss_values
    if margins is not None:
        values["gamma_beta_ratio"] *= margins.to(logps.chosen_sum.dtype)
    loss = calibrated(recipe.loss, logps, **values) if recipe.reward_calibration else recipe.loss(logps, **values)
    total = loss.losses * wpo_weights(logps) if recipe.wpo_weights else loss.losses
    if recipe.sft_weight and recipe.sft_reduction == "tokens":
        # The step's token mean, written so that (sum over pairs) / num_pairs gives it.
        total = total - recipe.sft_weight * logps.chosen_sum * (num_pairs / num_chosen_tokens)
    elif recipe.sft_weight:
        total = total + recipe.sft_weight * sft_losses(logps)
    if logps.router_loss is not None:
        total = total + logps.router_loss
    return total, pair_metric_sums(logps, loss, total, sources)


def micro_batch_losses(
    logps: PairLogps, micro_batch: MicroBatch, plan: StepPlan, recipe: Recipe, *, pairs: EvalPairs | None = None
) -> tuple[Tensor, Tensor]:
    """As `trained_losses`, of one micro-batch of a step; a stand-in for no pair counts for nothing.

    Every weight takes part in a stand-in, with a gradient of zero, so that processes meet in their collectives.

    Args:
        pairs: takes note of the pairs, one by one.
    """
    sources = micro_batch.sources
    if not micro_batch.indices:
        nothing = 0.0 * (logps.chosen_sum + logps.rejected_sum)
        width = num_sums(0 if sources is None else len(sources))
        return nothing, torch.zeros(width, dtype=torch.float64, device=nothing.device)
    sources = None if sources is None else move(sources, logps.chosen_sum.device)
    if micro_batch.scores is not None:
        logps = replace(logps, scores=move(micro_batch.scores, logps.chosen_sum.device).to(logps.chosen_sum.dtype))
    if pairs is not None:
        pairs.add(logps, micro_batch, recipe)
    margins = None if micro_batch.margins is None else move(micro_batch.margins, logps.chosen_sum.device)
    counts = {"num_pairs": plan.num_pairs, "num_chosen_tokens": plan.num_chosen_tokens}
    return trained_losses(logps, recipe, **counts, sources=sources, margins=margins)
