"""From tokenised pairs to rows and steps: what is computed together, decided from integers alone.

Owns: a tokenised pair, its shared prefix and its cost, and the batch plan (which pairs form an optimizer step, and how
that step's pairs are spread over ranks and micro-batches). Imports neither torch nor numpy: the plan is the same on
every rank because it is plain arithmetic on the same numbers, and a million pairs take seconds (`benchmarks/plan.py`).
"""

from __future__ import annotations

import heapq
import random
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")
SIDES = ("chosen", "rejected")
Count = Any
"""An int, or an integer array with one entry a pair: this module does arithmetic on either and imports no numpy."""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A tokenised pair: full sequences (prompt + response), and where in each the response begins (>= 1).

    A response of several turns holds tokens that are not the model's own (a user's turn, a tool's result): the gaps,
    begin, end, begin, end, ... in ascending order, each inside the response; none by default. In a list of more than
    two responses chosen is the best, rejected the worst, and the others are in `more_ids`; `scores` are those of
    chosen, of the others, and of rejected, where they are known.
    """

    row_id: str
    chosen_ids: list[int]
    chosen_start: int
    rejected_ids: list[int]
    rejected_start: int
    chosen_gaps: Sequence[int] = ()
    rejected_gaps: Sequence[int] = ()
    more_ids: Sequence[list[int]] = ()
    more_starts: Sequence[int] = ()
    scores: Sequence[float] = ()

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens, for generation: up to the first trained turn in which the two sides differ."""
        if not self.chosen_gaps:
            return self.chosen_ids[: min(self.chosen_start, self.rejected_start)]
        return self.chosen_ids[: prompt_length(self)]


PAIR_FIELDS = tuple(field.name for field in fields(TokenPair) if field.default is MISSING)
"""The columns that a data set of tokenised pairs must have."""
OTHER_FIELDS = ("chosen_gaps", "rejected_gaps", "more_ids", "more_starts")
"""Those that it may have."""


def trained_ranges(start: int, gaps: Sequence[int], length: int) -> list[range]:
    """Positions of the trained tokens of a sequence of `length` tokens whose response starts at `start`."""
    edges = [start, *gaps, length]
    return [range(begin, end) for begin, end in zip(edges[::2], edges[1::2])]


def prompt_length(pair: Any) -> int:
    """Where the first trained turn begins in which the sides of a `TokenPair` differ; where it has gaps, in tokens."""
    common = common_prefix_length(pair.chosen_ids, pair.rejected_ids)
    begins = {side: (getattr(pair, f"{side}_start"), *getattr(pair, f"{side}_gaps")[1::2]) for side in SIDES}
    return max(
        (at for found in begins.values() for at in found if at <= common), default=min(map(min, begins.values()))
    )


@dataclass(frozen=True, slots=True)
class PairShape:
    """Token counts of one pair, or of many (`Count`).

    Attributes:
        prefix: tokens computed once and seen by both responses; 0 when nothing is shared.
        chosen: tokens of the chosen sequence after the prefix, >= 1.
        rejected: tokens of the rejected sequence after the prefix, >= 1.
        more, more_squares: tokens after the prefix of a list's other responses, and the sum of their squares.
    """

    prefix: Count
    chosen: Count
    rejected: Count
    more: Count = 0
    more_squares: Count = 0

    @property
    def tokens(self) -> Count:
        """Tokens this pair occupies in a packed row."""
        return self.prefix + self.chosen + self.rejected + self.more

    @property
    def attended(self) -> Count:
        """(query, key) combinations that causal attention evaluates for this pair."""
        p, c, r = self.prefix, self.chosen, self.rejected
        own = p * (p + 1) + c * (c + 1) + r * (r + 1) + self.more_squares + self.more
        return own // 2 + p * (c + r + self.more)


@dataclass(frozen=True, slots=True)
class CostWeights:
    """What attention and the head cost, in units of one token's way through the blocks' weights.

    With N weights in the blocks, Hq query heads of size D, vocabulary V and hidden size H, a forward pass takes
    2N operations a token, 4 * layers * Hq * D an attended (query, key) combination and 2VH a predicted label; the
    backward pass takes twice that of each. The units are therefore the ratios to 2N.

    Attributes:
        attention: of one attended combination.
        head: of one label.
    """

    attention: float = 0.0
    head: float = 0.0


TOKENS_ALONE = CostWeights()
"""Attention and head free: the cost of a pair is its number of tokens."""


def shared_prefix_length(first: Sequence[int], *others: Sequence[int]) -> int:
    """Length of the longest token prefix common to all sequences that leaves each at least one token of its own.

    The prefix may reach beyond the prompt, into what all responses begin with: exact, because equal tokens at equal
    positions with equal history have equal hidden states.
    """
    return min(common_prefix_length(first, *others), min(map(len, (first, *others))) - 1)


def common_prefix_length(first: Sequence[Any], *others: Sequence[Any]) -> int:
    """How many leading items all sequences (of one type) have in common."""
    length = min(map(len, (first, *others)))
    for other in others:
        equal, limit = 0, length
        while equal < limit:  # halving: slices are compared much faster than items
            middle = (equal + limit + 1) // 2
            if first[equal:middle] == other[equal:middle]:
                equal = middle
            else:
                limit = middle - 1
        length = equal
    return length


def pair_cost(shape: PairShape, weights: CostWeights = TOKENS_ALONE, *, num_labels: Count = 0) -> Count:
    """Relative compute of one pair (or of each, for arrays): tokens + attention + head.

    Args:
        shape: its token counts.
        weights: see `CostWeights`.
        num_labels: trained tokens of all its responses.
    """
    return shape.tokens + weights.attention * shape.attended + weights.head * num_labels


def spread_evenly(
    costs: Sequence[float], num_bins: int, *, tokens: Sequence[int] | None = None, budget: int = 0
) -> list[list[int]] | None:
    """Assign items to bins so that the costliest bin is close to the mean (longest processing time first).

    The costliest item goes first, each into the cheapest bin that has room for it.

    Args:
        costs: cost of each item, >= 0.
        num_bins: bins to fill, >= 1.
        tokens, budget: size of each item, and what fits in a bin; None = everything fits.
    Returns:
        For each bin the indices of its items in ascending order, bins beyond the number of items empty; None when one
        finds no room.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, not {num_bins}")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [budget] * num_bins
    # Ties go to the bin with fewer items, then to the lower index: the same assignment on every rank.
    heap = [(0.0, 0, index) for index in range(num_bins)]
    for item in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        size = 0 if tokens is None else tokens[item]
        passed = []
        while room[heap[0][2]] < size:
            passed.append(heapq.heappop(heap))
            if not heap:
                return None
        cost, count, index = heap[0]
        heapq.heapreplace(heap, (cost + costs[item], count + 1, index))
        for entry in passed:
            heapq.heappush(heap, entry)
        bins[index].append(item)
        room[index] -= size
    return [sorted(items) for items in bins]


def fill_to_budget(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Group whole items into as few bins as best fit (largest first) finds, none above `budget` tokens.

    Row fill is the sum of tokens / (number of bins * budget). Over many chat-like pairs it exceeds 97%; what is
    missing to 100% costs no padding, since a row is as long as its tokens, only a few more, shorter kernel launches.

    Returns:
        For each bin the indices of its items in ascending order.
    Raises:
        ValueError: one item alone exceeds the budget.
    """
    if (largest := max(tokens, default=0)) > budget:
        raise ValueError(
            f"a pair of {largest} tokens does not fit in a micro-batch of {budget} tokens; "
            "raise max_tokens_per_micro_batch or lower max_length"
        )
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (what is left of the budget, bin), ascending
    for item in sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True):
        at = bisect_left(rooms, (tokens[item], 0))  # the tightest room; of bins with the same, the first
        if at == len(rooms):
            rooms.append((budget, len(bins)))
            bins.append([])
        room, index = rooms.pop(at)
        bins[index].append(item)
        insort(rooms, (room - tokens[item], index))
    return [sorted(items) for items in bins]


def plan_micro_batches(
    tokens: Sequence[int],
    costs: Sequence[float],
    *,
    num_ranks: int,
    num_micro_batches: int,
    max_tokens: int | None = None,
) -> list[list[list[int]]]:
    """Spread the pairs of one optimizer step over ranks and micro-batches, evenly by cost.

    Args:
        tokens: packed tokens of each of the step's pairs.
        costs: their relative compute, see `pair_cost`.
        num_ranks: data-parallel ranks, >= 1.
        num_micro_batches: micro-batches per rank; the least number where max_tokens asks for more.
        max_tokens: no micro-batch holds more packed tokens than this; as few micro-batches more as that takes.
    Returns:
        plan[rank][micro_batch] = indices into `tokens`. Every rank has the same number of micro-batches, so that
        collectives line up; a micro-batch may be empty. Each pair appears exactly once. Micro-batches come costliest
        first, micro-batch k is about equally long on every rank, and so are the ranks' sums.
    Raises:
        ValueError: a pair alone exceeds max_tokens.
    """
    budget = max(1, sum(tokens)) if max_tokens is None else max_tokens
    per_rank = max(num_micro_batches, -(-sum(tokens) // (budget * num_ranks)))
    packed: list[list[int]] | None = None
    while (bins := spread_evenly(costs, per_rank * num_ranks, tokens=tokens, budget=budget)) is None:
        packed = packed or fill_to_budget(tokens, budget)
        if len(packed) <= per_rank * num_ranks:  # so tight that only best fit fits: then all are about full
            bins = packed + [[] for _ in range(per_rank * num_ranks - len(packed))]
            break
        per_rank += 1
    return _deal(bins, costs, num_ranks)


def _deal(bins: list[list[int]], costs: Sequence[float], num_ranks: int) -> list[list[list[int]]]:
    """Hand out bins in groups of like cost, one to each rank; within a group the costliest to the rank with least."""
    loads = [sum([costs[i] for i in items]) for items in bins]
    order = sorted(range(len(bins)), key=loads.__getitem__, reverse=True)
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for start in range(0, len(bins), num_ranks):
        ranks = sorted(range(num_ranks), key=totals.__getitem__)
        for rank, index in zip(ranks, order[start : start + num_ranks], strict=True):
            plan[rank].append(bins[index])
            totals[rank] += loads[index]
    return plan


def epoch_order(num_pairs: int, *, seed: int, epoch: int) -> array[int]:
    """The order in which an epoch visits its pairs: a permutation that depends on seed and epoch alone.

    An array: 8 bytes for each of millions of pairs, where a list of numbers takes 40.
    """
    order = array("q", range(num_pairs))
    random.Random(f"simpo-epoch-{seed}-{epoch}").shuffle(order)
    return order


def iterate_steps(order: Sequence[T], *, pairs_per_step: int) -> Iterator[Sequence[T]]:
    """Consecutive optimizer steps of one epoch; the last one may be smaller, and no pair is left out."""
    if pairs_per_step < 1:
        raise ValueError(f"pairs_per_step must be at least 1, not {pairs_per_step}")
    for start in range(0, len(order), pairs_per_step):
        yield order[start : start + pairs_per_step]


def num_steps_per_epoch(num_pairs: int, *, pairs_per_step: int) -> int:
    """Optimizer steps of one epoch, the last ragged one included."""
    return -(-num_pairs // pairs_per_step)
