"""From token lengths to rows and steps: what is computed together, decided from integers alone.

Owns: the shared prefix of a pair, the cost of a pair, and the batch plan (which pairs form an optimizer step, and how
that step's pairs are spread over ranks and micro-batches). Imports no torch: the plan is the same on every rank because
it is pure integer arithmetic on the same inputs.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PairShape:
    """Token counts of one pair.

    Attributes:
        prefix: tokens computed once and seen by both responses; 0 when nothing is shared.
        chosen: tokens of the chosen sequence after the prefix, >= 1.
        rejected: tokens of the rejected sequence after the prefix, >= 1.
    """

    prefix: int
    chosen: int
    rejected: int

    @property
    def tokens(self) -> int:
        """Tokens this pair occupies in a packed row."""
        return self.prefix + self.chosen + self.rejected

    @property
    def attended(self) -> int:
        """(query, key) combinations that causal attention evaluates for this pair."""
        p, c, r = self.prefix, self.chosen, self.rejected
        return (p * (p + 1) + c * (c + 1) + r * (r + 1)) // 2 + p * (c + r)


def shared_prefix_length(chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> int:
    """Length of the longest common token prefix that leaves each sequence at least one token of its own.

    The prefix may reach beyond the prompt, into what both responses begin with: exact, because equal tokens at equal
    positions with equal history have equal hidden states.
    """
    limit = min(len(chosen_ids), len(rejected_ids)) - 1
    length = 0
    while length < limit and chosen_ids[length] == rejected_ids[length]:
        length += 1
    return length


def pair_cost(shape: PairShape, *, attention_weight: float = 0.0) -> float:
    """Relative compute of one pair: tokens + attention_weight * attended (query, key) combinations.

    attention_weight is the cost of one attended combination in units of one token's share of the weights. For a
    transformer with hidden size H it is about 4*H*layers / (2*num_parameters), roughly 1/(6*H).
    """
    return shape.tokens + attention_weight * shape.attended


def spread_evenly(costs: Sequence[float], num_bins: int) -> list[list[int]]:
    """Assign items to bins so that the costliest bin is close to the mean (longest processing time first).

    Args:
        costs: cost of each item, >= 0.
        num_bins: bins to fill, >= 1.
    Returns:
        For each bin the indices of its items in ascending order; bins beyond the number of items are empty.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, not {num_bins}")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    # Ties go to the bin with fewer items, then to the lower index: the same assignment on every rank.
    heap = [(0.0, 0, index) for index in range(num_bins)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, count, index = heapq.heappop(heap)
        bins[index].append(item)
        heapq.heappush(heap, (cost + costs[item], count + 1, index))
    return [sorted(items) for items in bins]


def fill_to_budget(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Group whole items into as few bins as best fit (largest first) finds, none above `budget` tokens.

    Raises:
        ValueError: one item alone exceeds the budget.
    """
    largest = max(tokens, default=0)
    if largest > budget:
        raise ValueError(
            f"a pair of {largest} tokens does not fit in a micro-batch of {budget} tokens; "
            "raise max_tokens_per_micro_batch or lower max_length"
        )
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        fitting = [b for b in range(len(bins)) if room[b] >= tokens[item]]
        if fitting:
            tightest = min(fitting, key=lambda b: (room[b], b))
        else:
            tightest = len(bins)
            bins.append([])
            room.append(budget)
        bins[tightest].append(item)
        room[tightest] -= tokens[item]
    return [sorted(items) for items in bins]


def plan_micro_batches(
    shapes: Sequence[PairShape],
    *,
    num_ranks: int,
    num_micro_batches: int,
    max_tokens: int | None = None,
    attention_weight: float = 0.0,
) -> list[list[list[int]]]:
    """Spread the pairs of one optimizer step over ranks and micro-batches, evenly by cost.

    Args:
        shapes: the step's pairs.
        num_ranks: data-parallel ranks, >= 1.
        num_micro_batches: micro-batches per rank when max_tokens is None; otherwise the least number used.
        max_tokens: no micro-batch holds more packed tokens than this; as many micro-batches as that takes.
    Returns:
        plan[rank][micro_batch] = indices into `shapes`. Every rank has the same number of micro-batches, so that
        collectives line up; a micro-batch may be empty. Each pair appears exactly once.
    Raises:
        ValueError: a pair alone exceeds max_tokens.
    """
    costs = [pair_cost(shape, attention_weight=attention_weight) for shape in shapes]
    if max_tokens is None:
        bins = spread_evenly(costs, num_ranks * num_micro_batches)
    else:
        bins = _spread_within_budget(shapes, costs, num_ranks, num_micro_batches, max_tokens)
    per_rank = len(bins) // num_ranks
    # Bins sorted by cost and dealt in turn: micro-batch k is about equally long on every rank.
    order = sorted(range(len(bins)), key=lambda b: (-sum(costs[i] for i in bins[b]), b))
    return [[bins[order[k * num_ranks + rank]] for k in range(per_rank)] for rank in range(num_ranks)]


def _spread_within_budget(
    shapes: Sequence[PairShape],
    costs: Sequence[float],
    num_ranks: int,
    num_micro_batches: int,
    max_tokens: int,
) -> list[list[int]]:
    tokens = [shape.tokens for shape in shapes]
    packed = fill_to_budget(tokens, max_tokens)
    per_rank = max(-(-len(packed) // num_ranks), num_micro_batches if len(packed) >= num_ranks else 1)
    even = spread_evenly(costs, per_rank * num_ranks)
    if all(sum(tokens[i] for i in items) <= max_tokens for items in even):
        return even  # balanced and within budget: better than the fullest packing
    return packed + [[] for _ in range(per_rank * num_ranks - len(packed))]


def epoch_order(num_pairs: int, *, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits its pairs: a permutation that depends on seed and epoch alone."""
    order = list(range(num_pairs))
    random.Random(f"simpo-epoch-{seed}-{epoch}").shuffle(order)
    return order


def iterate_steps(order: Sequence[int], *, pairs_per_step: int) -> Iterator[Sequence[int]]:
    """Consecutive optimizer steps of one epoch; the last one may be smaller, and no pair is left out."""
    if pairs_per_step < 1:
        raise ValueError(f"pairs_per_step must be at least 1, not {pairs_per_step}")
    for start in range(0, len(order), pairs_per_step):
        yield order[start : start + pairs_per_step]


def num_steps_per_epoch(num_pairs: int, *, pairs_per_step: int) -> int:
    """Optimizer steps of one epoch, the last ragged one included."""
    return -(-num_pairs // pairs_per_step)
