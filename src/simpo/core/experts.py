"""The router's auxiliary loss of a mixture of experts, of each pair by itself: the same in every layout and batch.

A pair's loss is what transformers computes for a padded micro-batch of that pair alone: E times the sum over experts of
(share of assignments) x (mean probability), over all layers and over the tokens of both sequences (Switch Transformers,
arXiv:2101.03961, eq. 4 to 6). A token of a shared prefix stands in both sequences and counts twice; padding counts
nothing. As every pair has its own, the mean over a step's pairs does not depend on how the step is cut. Torch only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simpo.core.batch import PackedPairs
from simpo.core.context import sum_over


def router_losses(router_logits: Sequence[Tensor], batch: PackedPairs, *, num_selected: int) -> Tensor:
    """The auxiliary loss of each pair or list [P], fp32; 1 where the experts are in even use.

    Args:
        router_logits: of each layer that has experts: [tokens of the batch here, E].
        batch: what was computed; a slice of a row gives the same losses on every rank.
        num_selected: experts that a token is sent to.
    """
    device, num_experts = router_logits[0].device, router_logits[0].shape[-1]
    pairs, counts = (tensor.to(device) for tensor in _membership(batch))
    assigned, likely = (torch.zeros(len(batch.group_sizes), num_experts, device=device) for _ in range(2))
    for logits in router_logits:
        shares = logits.float().softmax(dim=-1)
        chosen = torch.zeros_like(shares).scatter(1, shares.topk(num_selected, dim=-1).indices, 1.0)
        assigned = assigned.index_add(0, pairs, chosen * counts[:, None])
        likely = likely.index_add(0, pairs, shares * counts[:, None])
    if batch.blocks is not None and batch.blocks.group is not None:
        assigned, likely = (sum_over(tensor, batch.blocks.group) for tensor in (assigned, likely))
    num_tokens = assigned.sum(dim=1, keepdim=True) / num_selected  # over all layers
    return num_experts * (assigned / num_tokens * (likely / num_tokens)).sum(dim=1)


def _membership(batch: PackedPairs) -> tuple[Tensor, Tensor]:
    """Of each of the batch's tokens here: the number of its pair, and in how many of its sequences it stands."""
    sizes = torch.tensor(batch.group_sizes)
    pair_of_sequence = torch.arange(len(sizes)).repeat_interleave(sizes)
    if batch.blocks is None:
        mask = batch.attention_mask
        assert mask is not None
        return pair_of_sequence[:, None].expand(mask.shape).flatten(), mask.flatten().float()
    group, here = batch.blocks.group, batch.input_ids.numel()
    first = 0 if group is None else group.rank() * here
    length = here if group is None else group.size() * here
    pairs, counts = torch.zeros(length, dtype=torch.long), torch.zeros(length)
    for pair, (prefix_start, prefix_end, start, end) in zip(pair_of_sequence, batch.blocks.ranges, strict=True):
        pairs[start:end] = pair
        counts[start:end] += 1
        counts[prefix_start:prefix_end] += 1
    return pairs[first : first + here], counts[first : first + here]
