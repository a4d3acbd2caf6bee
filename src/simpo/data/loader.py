"""From tokenised pairs to the micro-batches of each optimizer step.

Owns the order of the data. What step k consists of is a pure function of the lengths, the seed and k, so a resumed run
needs nothing but k, and every rank can work out every other rank's share. Must not import models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from simpo.core.batch import PackedPairs, build_batch
from simpo.core.packing import (
    OTHER_FIELDS,
    PAIR_FIELDS,
    SIDES,
    TOKENS_ALONE,
    CostWeights,
    PairShape,
    TokenPair,
    epoch_order,
    iterate_steps,
    num_steps_per_epoch,
    pair_cost,
    plan_micro_batches,
    shared_prefix_length,
)
from simpo.data.cache import count_trained, flatten, list_lengths, scan
from simpo.data.rows import NamedSources, name_sources

if TYPE_CHECKING:
    import datasets


class PairStore:
    """Random access to tokenised pairs, with their shapes worked out once.

    Args:
        dataset: columns row_id, chosen_ids, chosen_start, rejected_ids, rejected_start; chosen_gaps, rejected_gaps,
            more_ids, more_starts, more_scores, score_chosen, score_rejected and shared_prefix are used if there.
        share_prompt: whether batches will share prefixes; decides the shapes the plan sees.
    """

    def __init__(self, dataset: datasets.Dataset, *, share_prompt: bool = True) -> None:
        self.dataset: Any = dataset  # its own annotations do not say what a column is
        self.share_prompt = share_prompt
        self._fields = (*PAIR_FIELDS, *(name for name in OTHER_FIELDS if name in dataset.column_names))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> TokenPair:
        row = self.dataset[index]
        scores = (row.get("score_chosen"), *(row.get("more_scores") or ()), row.get("score_rejected"))
        known = () if None in scores else scores
        return TokenPair(**{name: row[name] for name in self._fields}, scores=known)

    def score_margins(self, most: float) -> np.ndarray:
        """[num_pairs] each pair's gap of scores over the mean gap of all, between 0 and `most`.

        Raises:
            ValueError: a pair has no scores, or chosen responses score no higher than rejected ones on average.
        """
        gaps = self.score_gaps("score_margin")
        if gaps.mean() <= 0:
            raise ValueError(
                f"score_margin: chosen responses score no higher than rejected ones on average ({gaps.mean():g}); "
                "look at the scores, or remove the key"
            )
        return np.clip(gaps / gaps.mean(), 0.0, most)

    def score_gaps(self, key: str) -> np.ndarray:
        """[num_pairs] chosen's score less rejected's; ValueError, which names a key, where a pair has none."""
        if {"score_chosen", "score_rejected"} <= set(self.dataset.column_names):
            gaps = self._column("score_chosen").astype(np.float64) - self._column("score_rejected")
        else:
            gaps = np.full(len(self), np.nan)
        (without,) = np.nonzero(~np.isfinite(gaps))
        if len(without):
            raise ValueError(
                f"{key}: {len(without)} of {len(gaps)} pairs have no score of chosen and of rejected, such as "
                f"{self[int(without[0])].row_id}; give every row both (score_chosen, score_rejected), or remove the key"
            )
        return gaps

    @property
    def all_scores(self) -> np.ndarray:
        """The scores of every response."""
        every = [self._column(f"score_{side}") for side in SIDES]
        if "more_scores" in self.dataset.column_names:
            every.append(flatten(self.dataset.with_format("arrow")[:]["more_scores"]))
        return np.concatenate(every)

    @cached_property
    def sources(self) -> NamedSources:
        """Which source each pair comes from; no names unless there are several."""
        chunks = self.dataset.with_format("arrow")[:]["row_id"].chunks
        return name_sources(str(row_id) for chunk in chunks for row_id in chunk.to_pylist())

    def texts(self, index: int) -> dict[str, str]:
        """prompt_text, chosen_text and rejected_text of one pair."""
        row = self.dataset[index]
        return {name: row[name] for name in ("prompt_text", "chosen_text", "rejected_text")}

    def check_lengths(self, max_positions: int | None) -> None:
        """Raise ValueError that names the longest sequence if the model takes fewer tokens; None = any number."""
        lengths, (owners, more, _) = self.sequence_lengths.max(axis=1), self._more
        np.maximum.at(lengths, owners, more)
        if max_positions is not None and lengths.max(initial=0) > max_positions:
            longest = int(lengths.argmax())
            raise ValueError(
                f"max_length: pair {self[longest].row_id} has a sequence of {lengths[longest]} tokens, but this model "
                f"takes {max_positions} (max_position_embeddings); set max_length to {max_positions} or less"
            )

    def check_ids(self, num_embeddings: int) -> None:
        """Raise ValueError that names a pair with a token for which the model has no embedding."""
        names = [*(f"{side}_ids" for side in SIDES), *({"more_ids"} & {*self.dataset.column_names})]
        largest = dict.fromkeys(names, -1)
        for table in scan(self.dataset, names):
            for name in names:
                ids = table[name] if name != "more_ids" else pc.call_function("list_flatten", [table[name]])
                largest[name] = max(largest[name], int(flatten(ids).max(initial=-1)))
        for name, token in largest.items():
            if token < num_embeddings:
                continue
            every = (row[name] if name == "more_ids" else [row[name]] for row in self.dataset)
            pair = next(i for i, lists in enumerate(every) if any(token in ids for ids in lists))
            raise ValueError(
                f"vocabulary: pair {self[pair].row_id} holds token {token}, and the model's embedding has "
                f"{num_embeddings} rows, 0 to {num_embeddings - 1}; give the model's own tokenizer "
                "(tokenizer_name_or_path), or a model whose embedding was resized to this one"
            )

    @cached_property
    def response_lengths(self) -> np.ndarray:
        """[num_pairs, 2] trained tokens of chosen and rejected."""
        table = self.dataset.with_format("arrow")[:]
        return np.stack([count_trained(table, side) for side in SIDES], axis=1)

    @cached_property
    def num_labels(self) -> np.ndarray:
        """[num_pairs] trained tokens of all responses."""
        owners, lengths, starts = self._more
        return self.response_lengths.sum(axis=1) + self._per_pair(owners, lengths - starts)

    @cached_property
    def _more(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every response that is neither chosen nor rejected: its pair, its tokens with the prompt's, its start."""
        if "more_ids" not in self.dataset.column_names:
            none = np.zeros(0, dtype=np.int64)
            return none, none, none
        table = self.dataset.with_format("arrow")[:]
        owners = np.repeat(np.arange(len(self)), list_lengths(table["more_ids"]))
        lengths = list_lengths(pc.call_function("list_flatten", [table["more_ids"]])).astype(np.int64)
        return owners, lengths, flatten(table["more_starts"])

    def _per_pair(self, owners: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(owners, values, len(self)).astype(np.int64)

    @cached_property
    def shapes(self) -> PairShape:
        """Shapes of the pairs as they will be computed, each field an array [num_pairs]."""
        chosen, rejected = self.sequence_lengths.T
        prefixes = self._shared_prefixes() if self.share_prompt else np.zeros_like(chosen)
        owners, lengths, _ = self._more
        own = lengths - prefixes[owners]
        more = (self._per_pair(owners, own), self._per_pair(owners, own**2))
        return PairShape(prefixes, chosen - prefixes, rejected - prefixes, *more)

    @cached_property
    def tokens(self) -> np.ndarray:
        """[num_pairs] tokens that each pair takes in a packed row."""
        return self.shapes.tokens

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """[num_pairs, 2] tokens of prompt + chosen and of prompt + rejected."""
        table = self.dataset.with_format("arrow")[:]
        sides = [list_lengths(table[f"{side}_ids"]) for side in SIDES]
        return np.stack(sides, axis=1).astype(np.int64)  # attended combinations overflow 32 bits

    def _shared_prefixes(self) -> np.ndarray:
        if "shared_prefix" in self.dataset.column_names:
            return self._column("shared_prefix").astype(np.int64)
        every = ((row["chosen_ids"], row["rejected_ids"], *(row.get("more_ids") or ())) for row in self.dataset)
        return np.array([shared_prefix_length(*ids) for ids in every])

    def _column(self, name: str) -> np.ndarray:
        return self.dataset.with_format("numpy")[name][:]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass computes: the batch, and which pairs of the store it holds.

    Without indices it is a stand-in that counts for nothing: this rank has no pair left, but others wait for it.
    `sources` [S, P] bool says which pairs come from each source; None where there is one source. `margins` [P] is what
    each pair's target margin is multiplied by; None = 1. `scores` [S] are those of all responses, for losses of lists.
    """

    pairs: PackedPairs
    indices: tuple[int, ...]
    is_last: bool = True
    sources: Tensor | None = None
    margins: Tensor | None = None
    scores: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed for its pairs."""
        return self.pairs.num_tokens if self.indices else 0


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step, before any tensor exists."""

    step: int  # optimizer step, 0-based, counted over all epochs
    epoch: int  # which pass over the data it belongs to, 0-based
    num_pairs: int  # pairs in the step, over all ranks
    num_chosen_tokens: int  # trained tokens of the chosen responses in the step, over all ranks
    # this rank's micro-batches as indices into the store; every rank has the same number, some may be empty
    micro_batches: tuple[tuple[int, ...], ...]


class StepLoader:
    """Plans optimizer steps and builds their micro-batches.

    Args:
        store: the training pairs.
        pairs_per_step: pairs in an optimizer step over all ranks; the last step of an epoch may hold fewer.
        num_micro_batches: micro-batches per rank and step; with max_tokens, the minimum.
        max_tokens: packed tokens a micro-batch may hold; None = no limit.
        pack, pad_token_id: layout, see `core.batch.build_batch`.
        seed: of the order.
        weights: what attention and the head cost, for evening out micro-batches.
        margins: [num_pairs] what each pair's target margin is multiplied by; None = 1.
        with_scores: whether micro-batches have the scores of their responses.
        rank, num_ranks: this data-parallel rank and their number.
    """

    def __init__(
        self,
        store: PairStore,
        *,
        pairs_per_step: int,
        num_micro_batches: int,
        max_tokens: int | None = None,
        pack: bool = True,
        pad_token_id: int = 0,
        seed: int = 0,
        weights: CostWeights = TOKENS_ALONE,
        margins: np.ndarray | None = None,
        with_scores: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.store = store
        self.pairs_per_step = pairs_per_step
        self.num_micro_batches = num_micro_batches
        self.max_tokens: int | None = None
        self.pack = pack
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.weights = weights
        self.margins, self.with_scores = margins, with_scores
        self.rank, self.num_ranks = rank, num_ranks
        self.limit_tokens(max_tokens)

    @property
    def fingerprint(self) -> str:
        """12 hex digits over everything that the plan of any step, of any rank, follows from, and the margins."""
        settings = (self.pairs_per_step, self.num_micro_batches, self.max_tokens, self.num_ranks, self.seed, self.pack)
        digest = hashlib.sha256(repr(settings).encode())
        scores = self.store.all_scores if self.with_scores else None
        for numbers in (self.store.tokens, self.store.response_lengths, self.costs, self.margins, scores):
            digest.update(_bytes(numbers))
        return digest.hexdigest()[:12]

    @property
    def scores_fingerprint(self) -> str | None:
        """12 hex digits over the scores and the margins made of them; None where training reads none."""
        read = (self.margins, self.store.all_scores if self.with_scores else None)
        if all(numbers is None for numbers in read):
            return None
        return hashlib.sha256(b"|".join(map(_bytes, read))).hexdigest()[:12]

    @property
    def steps_per_epoch(self) -> int:
        return num_steps_per_epoch(len(self.store), pairs_per_step=self.pairs_per_step)

    def pairs_before(self, step: int) -> int:
        """Pairs in the first `step` optimizer steps."""
        epochs, within = divmod(step, self.steps_per_epoch)
        return epochs * len(self.store) + min(within * self.pairs_per_step, len(self.store))

    def plans(self, start: int, stop: int) -> Iterator[StepPlan]:
        """Plans of the optimizer steps start..stop-1, over as many epochs as that takes."""
        step = start
        while step < stop:
            epoch, within = divmod(step, self.steps_per_epoch)
            rest = epoch_order(len(self.store), seed=self.seed, epoch=epoch)[within * self.pairs_per_step :]
            for pairs in iterate_steps(rest, pairs_per_step=self.pairs_per_step):
                if step >= stop:
                    return
                yield self._plan(step, epoch, pairs)
                step += 1

    def plan_everything(self) -> StepPlan:
        """Every pair once over all ranks, as one plan, in micro-batches of pairs_per_step pairs of similar length."""
        batches = evaluation_batches(
            self.store, pairs_per_batch=self.pairs_per_step, rank=self.rank, num_ranks=self.num_ranks
        )
        return StepPlan(
            step=0,
            epoch=0,
            num_pairs=len(self.store),
            num_chosen_tokens=int(self.store.response_lengths[:, 0].sum()),
            micro_batches=tuple(tuple(items) for items in batches),
        )

    def micro_batches(self, plan: StepPlan) -> Iterator[MicroBatch]:
        """Build a step's micro-batches one at a time; with several ranks an empty one becomes a stand-in."""
        wanted = [indices for indices in plan.micro_batches if indices or self.num_ranks > 1]
        for number, indices in enumerate(wanted, start=1):
            yield replace(self.build(indices), is_last=number == len(wanted))

    def build(self, indices: Sequence[int]) -> MicroBatch:
        """One micro-batch of the given pairs; a stand-in for none."""
        if not indices:
            return self.stand_in()
        pairs = [self.store[i] for i in indices]
        batch = build_batch(pairs, pack=self.pack, share_prompt=self.store.share_prompt, pad_token_id=self.pad_token_id)
        margins = None if self.margins is None else torch.from_numpy(self.margins[list(indices)])
        scores = torch.tensor([score for pair in pairs for score in pair.scores]) if self.with_scores else None
        return MicroBatch(batch, tuple(indices), sources=self._sources(indices), margins=margins, scores=scores)

    def stand_in(self) -> MicroBatch:
        """The smallest batch there is, for a rank that must take part in a forward pass without a pair to compute."""
        pair = TokenPair("no pair", [0, 0], 1, [0, 1], 1)
        batch = build_batch([pair], pack=self.pack, share_prompt=self.store.share_prompt)
        return MicroBatch(batch, (), sources=self._sources(()))

    def _sources(self, indices: Sequence[int]) -> Tensor | None:
        names, numbers = self.store.sources
        own = numbers[np.asarray(indices, dtype=np.int64)]
        return torch.from_numpy(own == np.arange(len(names))[:, None]) if names else None

    def limit_tokens(self, max_tokens: int | None, *, even_below_a_pair: bool = False) -> None:
        """Plan micro-batches of at most this many packed tokens from now on; None = no limit.

        Args:
            even_below_a_pair: a step whose longest pair exceeds the limit takes that pair's tokens as its limit.
        Raises:
            ValueError: one pair alone exceeds it; names the longest.
        """
        if not even_below_a_pair and max_tokens is not None and self.store.tokens.max() > max_tokens:
            longest = int(self.store.tokens.argmax())
            tokens = self.store.tokens[longest]
            raise ValueError(
                f"max_tokens_per_micro_batch: {max_tokens} is too small for pair {self.store[longest].row_id}, which "
                f"takes {tokens} tokens; raise it to at least {tokens} or lower max_length"
            )
        self.max_tokens = max_tokens

    @cached_property
    def costs(self) -> np.ndarray:
        """[num_pairs] relative compute of each pair, see `core.packing.pair_cost`."""
        return pair_cost(self.store.shapes, self.weights, num_labels=self.store.num_labels)

    def _plan(self, step: int, epoch: int, pairs: Sequence[int]) -> StepPlan:
        tokens = self.store.tokens[pairs]
        shares = plan_micro_batches(
            tokens.tolist(),
            self.costs[pairs].tolist(),
            num_ranks=self.num_ranks,
            num_micro_batches=self.num_micro_batches,
            max_tokens=None if self.max_tokens is None else max(self.max_tokens, int(tokens.max())),
        )
        return StepPlan(
            step=step,
            epoch=epoch,
            num_pairs=len(pairs),
            num_chosen_tokens=int(self.store.response_lengths[pairs, 0].sum()),
            micro_batches=tuple(tuple([pairs[i] for i in items]) for items in shares[self.rank]),
        )


def _bytes(numbers: np.ndarray | None) -> bytes:
    return b"" if numbers is None else np.ascontiguousarray(numbers).tobytes()


def evaluation_batches(store: PairStore, *, pairs_per_batch: int, rank: int = 0, num_ranks: int = 1) -> list[list[int]]:
    """One rank's batches of similar length; over all ranks every pair once, and the same number of batches on each."""
    order = np.argsort(store.tokens, kind="stable").tolist()
    batches = [order[start : start + pairs_per_batch] for start in range(0, len(order), pairs_per_batch)]
    batches += [[] for _ in range(-len(batches) % num_ranks)]
    return batches[rank::num_ranks]
