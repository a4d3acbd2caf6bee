"""Preference optimization in Megatron-Core: what its forward-backward schedules call, for SimPO and its DPO twin.

Owns the step from one of Megatron's micro-batches to its loss and metrics, exact under tensor, pipeline (virtual stages
too), context and data parallelism. The engine (model, schedule, gradients' reduction, optimizer) is Megatron's. The
arguments are in `settings`, the batches in `batch`.

How the loss becomes the mean over all pairs of an optimizer step, whatever a micro-batch or rank holds:
    calculate_per_token_loss   sum of losses, number of pairs; Megatron divides summed gradients by summed counts
    otherwise                  sum of losses / mean_pairs; Megatron divides by its number of micro-batches and averages
                               over data-parallel ranks (context parallelism's factor is undone by its schedule)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simpo.core.context import sum_over
from simpo.core.logprobs import at_most_mean
from simpo.core.losses import PairLogps
from simpo.hosts.megatron.batch import IGNORED, MegatronBatch
from simpo.hosts.megatron.settings import MegatronSettings, Method
from simpo.run.metrics import PAIR_METRICS
from simpo.run.objective import trained_losses
from simpo.run.stopping import NonFiniteError

try:
    from megatron.core import parallel_state
    from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_model_config
except ImportError as error:
    raise ImportError("the Megatron host needs megatron-core: pip install 'simpo[megatron]'") from error

METRICS = tuple("lm loss" if name == "loss" else name for name in PAIR_METRICS)
"""Names under which metrics are reported: "lm loss" is the loss that is trained, as Megatron's own logs call it."""

BatchIterator = Iterator[MegatronBatch]
Report = dict[str, Tensor]
"""Metric -> [2] fp32: its sum over a micro-batch's pairs, and their number."""


def forward_step(
    data_iterator: BatchIterator | None, model: nn.Module, *, settings: MegatronSettings | None = None
) -> tuple[Tensor, functools.partial]:
    """One micro-batch of SimPO (or another loss without a reference) through one pipeline stage.

    Args:
        data_iterator: of `collate`d batches; `iterate_batches` makes one. Read on first and last stages only, on every
            rank of a model replica alike.
        model: a Megatron GPTModel, wrapped or not.
        settings: bind it with functools.partial; None takes Megatron's global arguments (megatron.training.get_args).
    Returns:
        The stage's output and `partial(loss_func, labels, ...)`, as get_forward_backward_func wants.
    Raises:
        ValueError: a loss that needs a reference, a ragged micro-batch that cannot be weighed, no data on a stage that
            needs it, or multi-token prediction (its loss would count prompts).
    """
    settings = settings or _settings_of_megatron("simpo")
    if settings.needs_reference:
        raise ValueError(f"{settings.recipe.loss_type} needs a reference: use dpo_forward_step")
    return _forward(data_iterator, model, settings)


def dpo_forward_step(
    data_iterator: BatchIterator | None, model: nn.Module, *, settings: MegatronSettings | None = None
) -> tuple[Tensor, functools.partial]:
    """The twin of `forward_step` for DPO; its batches carry the reference's log-probs (`collate(reference=...)`).

    With the schedules' `collect_non_loss_data=True, forward_only=True` nothing is trained, and log-probs come back
    instead: run it so on the model before training, and make the mapping with `gather_reference`.
    """
    settings = settings or _settings_of_megatron("dpo")
    if not settings.needs_reference:
        raise ValueError(f"{settings.recipe.loss_type} needs no reference: use forward_step")
    return _forward(data_iterator, model, settings)


def get_batch(
    data_iterator: BatchIterator | None,
    *,
    device: torch.device | None = None,
    first_stage: bool = True,
    last_stage: bool = True,
) -> MegatronBatch:
    """The next micro-batch as this rank needs it.

    Args:
        data_iterator: of `collate`d batches: labels are shifted already, so cutting rows loses none at the seams.
        device: where to; None = the current CUDA device, or the CPU where there is none.
        first_stage, last_stage: which pipeline stage asks: only a first one gets tokens and position_ids, only a last
            one labels and reference_sums.
    Returns:
        The batch with this context-parallel rank's share of every row (an early and a late chunk, as Megatron's
        attention expects).
    """
    if data_iterator is None:
        raise ValueError(
            "data_iterator is None on a rank that computes: give every rank of a model replica an iterator of its own "
            "(in Megatron-LM: set is_distributed = True on the dataset provider and --dataloader-type external)"
        )
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    batch = next(data_iterator)
    wanted = {"tokens": first_stage, "position_ids": first_stage, "labels": last_stage, "reference_sums": last_stage}
    values = {name: getattr(batch, name) if is_wanted else None for name, is_wanted in wanted.items()}
    rows = {name: None if value is None else value.to(device, non_blocking=True) for name, value in values.items()}
    sums = rows.pop("reference_sums")
    return replace(batch, reference_sums=sums, **get_batch_on_this_cp_rank(rows))  # which leaves what is None


def loss_func(
    labels: Tensor,
    output: Tensor,
    non_loss_data: bool = False,
    *,
    batch: MegatronBatch,
    settings: MegatronSettings,
    per_token: bool,
) -> Any:
    """Loss and metrics of a micro-batch, from the cross entropies that a GPTModel returns for labels.

    Args:
        labels: [R, S_local], this context-parallel rank's.
        output: [R, S_local] nats, cross entropy of every position.
        non_loss_data: as the schedules pass it with collect_non_loss_data.
        batch: row_ids and reference_sums belong to the whole pairs.
        settings: the loss.
        per_token: whether Megatron divides by counts at the end of a step (calculate_per_token_loss).
    Returns:
        (sum of losses, pairs counted here, report) with per_token, else (sum of losses / mean_pairs, report).
        With non_loss_data {"row_ids": names, "sums": [P, 2] nats, "lengths": [P, 2]}.
    Raises:
        simpo.NonFiniteError: a loss is not finite; names this rank and the pairs. Raised on all context- and
            tensor-parallel ranks of the replica, before gradients or metrics of it reach any other.
    """
    group, num_pairs = parallel_state.get_context_parallel_group(), len(batch.row_ids)
    trained = labels != IGNORED
    token_logps = torch.where(trained, -output.to(torch.promote_types(output.dtype, torch.float32)), 0.0)
    own_sums, lengths = token_logps.sum(dim=1), trained.sum(dim=1).to(token_logps.dtype)
    sums = own_sums
    if group.size() > 1:
        sums, lengths = sum_over(torch.stack([own_sums, lengths]), group)
    extras = _low_sums(trained, token_logps, lengths, group) if settings.recipe.extras else {}
    by_pair, lengths = sums[: 2 * num_pairs].view(-1, 2), lengths[: 2 * num_pairs].view(-1, 2)
    if non_loss_data:
        return {"row_ids": batch.row_ids, "sums": by_pair.detach(), "lengths": lengths.long()}
    losses, metric_sums = _pair_losses(by_pair, lengths, extras, batch, settings)
    if settings.check_for_nan:
        _stop_unless_finite(losses, own_sums, batch, group)
    total = losses.sum()  # of blank rows alone, a 0 that still runs backward
    counts = torch.full_like(metric_sums, num_pairs)
    report = dict(zip(METRICS, torch.stack([metric_sums, counts], dim=1).float(), strict=True))
    if not per_token:
        return total / _pairs_per_micro_batch(batch, settings), report
    # Counts are added up over context-parallel ranks too, which share their pairs: one of them counts them.
    counted = num_pairs if group.rank() == 0 else 0
    return total, torch.tensor(counted, dtype=torch.int, device=output.device), report


def reduce_metrics(reports: Sequence[Report]) -> dict[str, float]:
    """Means over every pair of every micro-batch on every data-parallel rank, from what a schedule returned.

    Args:
        reports: a schedule's result: one report a micro-batch on a last pipeline stage, nothing on others.
    Returns:
        METRICS -> mean; empty on stages that compute no loss. (Megatron-LM's own training loop forms the same means
        from the same reports.)
    """
    if not reports:
        return {}
    totals = torch.stack([torch.stack([report[name] for name in METRICS]) for report in reports]).sum(dim=0)
    dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    sums, counts = totals.double().unbind(dim=1)
    return dict(zip(METRICS, (sums / counts).tolist(), strict=True)) if counts[0] > 0 else {}


def gather_reference(outputs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Reference log-probs of all data-parallel ranks' pairs, for `collate` and `iterate_batches`.

    Args:
        outputs: what schedules returned with collect_non_loss_data; nothing on stages that are not last.
    Returns:
        row_id -> (chosen sum, rejected sum), nats; empty on stages that are not last, which need none.
    """
    own = {
        row_id: (chosen, rejected)
        for output in outputs
        for row_id, (chosen, rejected) in zip(output["row_ids"], output["sums"].tolist(), strict=True)
    }
    group = parallel_state.get_data_parallel_group()
    shares: list[dict[str, tuple[float, float]]] = [{} for _ in range(group.size())]
    dist.all_gather_object(shares, own, group=group)
    return {row_id: sums for share in shares for row_id, sums in share.items()}


@functools.cache
def _settings_of_megatron(method: Method) -> MegatronSettings:
    try:
        from megatron.training import get_args
    except ImportError:
        raise ValueError(
            "settings: there are no global Megatron arguments here; pass functools.partial(forward_step, settings="
            "MegatronSettings.from_arguments(...)) to the schedule"
        ) from None
    return MegatronSettings.from_arguments(get_args(), method=method)


def _forward(
    data_iterator: BatchIterator | None, model: nn.Module, settings: MegatronSettings
) -> tuple[Tensor, functools.partial]:
    config = get_model_config(model)
    if getattr(config, "mtp_num_layers", None):
        raise ValueError(f"mtp_num_layers = {config.mtp_num_layers}: multi-token prediction cannot be trained on pairs")
    for name in ("hidden_dropout", "attention_dropout"):
        if model.training and (rate := getattr(config, name, 0.0)):
            raise ValueError(
                f"{name} = {rate}: a policy's log-probs, and a reference's, must not depend on chance; set it to 0 "
                f"(--{name.replace('_', '-')} 0)"
            )
    first, last = (get_attr_wrapped_model(model, name) for name in ("pre_process", "post_process"))
    batch = MegatronBatch(None, None, None, row_ids=())
    if first or last:  # stages between them get hidden states, and read no data
        device = next(model.parameters()).device
        batch = get_batch(data_iterator, device=device, first_stage=first, last_stage=last)
    labels = None if batch.labels is None else batch.labels.clamp(min=0)
    # No mask: Megatron's attention is causal, and padding stands after all that is trained.
    output = model(batch.tokens, batch.position_ids, None, labels=labels)
    per_token = bool(getattr(config, "calculate_per_token_loss", False))
    return output, functools.partial(loss_func, batch.labels, batch=batch, settings=settings, per_token=per_token)


def _low_sums(trained: Tensor, token_logps: Tensor, lengths: Tensor, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """What `core.losses.EXTRAS` calls low, [R] each, of whole rows; a mean probability is one over a whole row too."""
    probabilities = torch.where(trained, token_logps.detach().double().exp(), 0.0)
    means = sum_over(probabilities.sum(dim=1), group) / lengths
    low = trained & at_most_mean(probabilities, means[:, None])
    sums = torch.stack([torch.where(low, token_logps, 0.0).sum(dim=1), low.sum(dim=1).to(token_logps.dtype)])
    return dict(zip(("low_sum", "low_length"), sum_over(sums, group), strict=True))


def _pair_losses(
    sums: Tensor, lengths: Tensor, extras: Mapping[str, Tensor], batch: MegatronBatch, settings: MegatronSettings
) -> tuple[Tensor, Tensor]:
    if settings.needs_reference and batch.reference_sums is None:
        raise ValueError("the batch has no reference_sums: collate it with reference=gather_reference(...)")
    reference = (None, None) if batch.reference_sums is None else batch.reference_sums.unbind(dim=1)
    sides = [{name: values[: 2 * len(sums)][side::2] for name, values in extras.items()} for side in (0, 1)]
    logps = PairLogps(
        *sums.unbind(dim=1), *lengths.unbind(dim=1), *reference, chosen_extras=sides[0], rejected_extras=sides[1]
    )
    # The counts are read by sft_reduction "tokens" alone, which settings refuse.
    return trained_losses(logps, settings.recipe, num_pairs=len(batch.row_ids), num_chosen_tokens=1)


def _pairs_per_micro_batch(batch: MegatronBatch, settings: MegatronSettings) -> float:
    if batch.mean_pairs is not None:
        return batch.mean_pairs
    if len(batch.row_ids) != settings.micro_batch_size:
        raise ValueError(
            f"a micro-batch of {len(batch.row_ids)} pairs, not micro_batch_size = {settings.micro_batch_size}: a mean "
            "over it would weigh pairs unequally. Set calculate_per_token_loss, or give collate the step's mean_pairs"
        )
    return settings.micro_batch_size


def _stop_unless_finite(losses: Tensor, own_sums: Tensor, batch: MegatronBatch, group: dist.ProcessGroup) -> None:
    """The sums of all context-parallel ranks went into the losses, so all of them come to the same conclusion."""
    finite = torch.isfinite(losses.detach())
    if bool(finite.all()):
        return
    row_ids = [row_id for row_id, fine in zip(batch.row_ids, finite.tolist(), strict=True) if not fine]
    broken = torch.isfinite(own_sums.detach()).logical_not().any().int()[None]
    flags = [torch.zeros_like(broken) for _ in range(group.size())]
    dist.all_gather(flags, broken, group=group)
    sources = [rank for rank, flag in zip(dist.get_process_group_ranks(group), flags, strict=True) if bool(flag)]
    where = f" (log-probs computed on rank {', '.join(map(str, sources))})" if group.size() > 1 and sources else ""
    raise NonFiniteError(
        f"rank {dist.get_rank()}{where}: the loss of {len(row_ids)} pair(s) is not finite, nothing was updated: "
        f"{', '.join(row_ids[:8])}{', ...' if len(row_ids) > 8 else ''}"
    )
