"""Owns what only all pairs together show: the filters of `clean` that compare pairs, and the advice of `simpo audit`.

Works on small numbers of each pair (`cleaning.FINDINGS` and its keys), never on texts, so that a million pairs need
about a hundred megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import numpy as np
import pyarrow as pa

from simpo.data.cache import BATCH_ROWS
from simpo.data.cleaning import REASONS, Sign
from simpo.data.ledger import Dropped
from simpo.data.near import NUM_HASHES, find_near
from simpo.recipe.stages import Clean

Numbers = Mapping[str, np.ndarray]
"""prompt_key and `cleaning.FINDINGS` of the pairs of a split: name -> [pairs]."""


class Review:
    """All pairs of a recipe, by split. Building it applies the filters: in `keep` those that go become False.

    Args:
        numbers: split -> what is known of its pairs.
        keep: split -> [pairs] which are there; changed.
        row_ids: split -> the ids of its rows.
        clean: the recipe's section.
        array: makes a large array of a shape and type.
    """

    def __init__(
        self,
        numbers: Mapping[str, Numbers],
        keep: Mapping[str, np.ndarray],
        row_ids: Mapping[str, pa.ChunkedArray],
        clean: Clean,
        array: Callable[..., np.ndarray] = np.empty,
    ):
        self.splits = {name: _Split(each, keep[name], row_ids[name], array) for name, each in numbers.items()}
        self.clean = clean
        for split in self.splits.values():
            if clean.contradictions:
                split.drop(split.contradicted(), "contradictions", "the same answers are the other way round in {}")
        if clean.leaks != "keep" and "eval" in self.splits:
            dropped, other = ("eval", "train") if clean.leaks_from == "eval" else ("train", "eval")
            for found, what in self._leaks(dropped, other, near=clean.leaks == "near"):
                self.splits[dropped].drop(found, "leaks", f"{what} {{}} of {other}", self.splits[other])
        for split in self.splits.values():
            if clean.near_duplicates:
                split.drop(split.near_duplicates(clean.similarity), "near_duplicates", "nearly the prompt of {}")
            if clean.one_pair_a_prompt:
                split.drop(split.further_pairs(), "one_pair_a_prompt", "{} is kept")

    def removed(self, split: str) -> Iterator[Dropped]:
        """The pairs of a split that the filters dropped, in order."""
        return chain.from_iterable(removed() for removed in self.splits[split].removed)

    def _leaks(self, dropped: str, other: str, *, near: bool) -> Iterator[tuple[np.ndarray, str]]:
        """[pairs] a pair of `other` with the prompt of each pair of `dropped` (-1: none): exactly, then nearly."""
        mine, theirs = self.splits[dropped], self.splits[other]
        yield theirs.having(mine.prompts), "the prompt of"
        if near:
            yield mine.near(theirs, self.clean.similarity), "nearly the prompt of"

    def advise(self) -> list[str]:
        """What a careful person would want to know of the pairs that are kept, with the key that deals with it."""
        train = self.splits["train"]
        lines = [*train.advise()]
        if not self.clean.near_duplicates:
            count = int(((train.near_duplicates(self.clean.similarity) >= 0) & train.kept).sum())
            if count:
                lines.append(f"pairs whose prompt nearly repeats an earlier one: {count} (clean.near_duplicates)")
        if "eval" in self.splits:
            exact, *rest = (found >= 0 for found, _ in self._leaks("eval", "train", near=bool(train.signatures.any())))
            kept = self.splits["eval"].kept
            counts = [f"{int((exact & kept).sum())} of {int(kept.sum())}"]
            if rest:
                counts.append(f"{int((rest[0] & ~exact & kept).sum())} more nearly so")
            if (exact & kept).any() or (rest and (rest[0] & kept).any()):
                lines.append(f"eval pairs whose prompt is also trained on: {', '.join(counts)} (clean.leaks)")
        return lines


class _Split:
    """The pairs of one split, and which of them are still there."""

    def __init__(self, numbers: Numbers, kept: np.ndarray, row_ids: pa.ChunkedArray, array: Callable[..., np.ndarray]):
        self.numbers, self.kept, self.row_ids, self.array = numbers, kept, row_ids, array
        self.prompts = numbers["prompt_key"]
        self.removed: list[Callable[[], Iterator[Dropped]]] = []

    def drop(self, others: np.ndarray, key: str, detail: str, split: _Split | None = None) -> None:
        """Drop those pairs for which another one is named; -1 names none."""
        gone = np.flatnonzero((others >= 0) & self.kept)
        named = others[gone]

        def removed() -> Iterator[Dropped]:
            for at in range(0, len(gone), BATCH_ROWS):
                some = (pa.array(places[at : at + BATCH_ROWS]) for places in (gone, named))
                ids = (of.row_ids.take(each).to_pylist() for of, each in zip((self, split or self), some))
                yield from (Dropped(mine, REASONS[key], detail.format(other)) for mine, other in zip(*ids))

        self.removed.append(removed)
        self.kept[gone] = False

    # What follows: [pairs] the pair that is the reason to drop each, or -1.

    def contradicted(self) -> np.ndarray:
        """Pairs of one prompt and two answers that are not all the same way round."""
        turned = self.numbers["answers_turned"]
        _, group = np.unique(self.numbers["answers_key"], return_inverse=True)
        found = np.full(len(turned), -1)
        for way in (False, True):
            example = np.full(len(turned), -1)
            these = np.flatnonzero((turned == way) & self.kept)[::-1]
            example[group[these]] = these  # the first of each group stays
            found = np.where(turned != way, example[group], found)
        return found

    def having(self, prompt_keys: np.ndarray) -> np.ndarray:
        """For each key, the first pair here that has the prompt."""
        mine = np.flatnonzero(self.kept)
        keys, first = np.unique(self.prompts[mine], return_index=True)
        if not len(keys):
            return np.full(len(prompt_keys), -1)
        at = np.minimum(np.searchsorted(keys, prompt_keys), len(keys) - 1)
        return np.where(keys[at] == prompt_keys, mine[first[at]], -1)

    @property
    def signatures(self) -> np.ndarray:
        """[pairs, NUM_HASHES]"""
        return self.numbers["signature"].view(np.uint8).reshape(-1, NUM_HASHES)

    def signed(self) -> np.ndarray:
        """The first kept pair of each prompt that has a signature, in order."""
        there = np.flatnonzero(self.kept & self.signatures.any(axis=1))
        _, first = np.unique(self.prompts[there], return_index=True)
        return there[np.sort(first)]

    def gather(self, *some: tuple[_Split, np.ndarray]) -> np.ndarray:
        """The signatures of some pairs of some splits, one after the other: [pairs, NUM_HASHES]."""
        signatures, end = self.array((sum(len(pairs) for _, pairs in some), NUM_HASHES), np.uint8), 0
        for split, pairs in some:
            for at in range(0, len(pairs), BATCH_ROWS):
                these = pairs[at : at + BATCH_ROWS]
                signatures[end : end + len(these)] = split.signatures[these]
                end += len(these)
        return signatures

    def near(self, others: _Split, similarity: float) -> np.ndarray:
        """Pairs whose prompt is nearly one of another split."""
        mine, theirs = self.signed(), others.signed()
        nearest, _ = find_near(self.gather((others, theirs), (self, mine)), similarity, num_others=len(theirs))
        nearest = nearest[len(theirs) :]
        return self._for_all_pairs(mine[nearest >= 0], theirs[nearest[nearest >= 0]])

    def near_duplicates(self, similarity: float) -> np.ndarray:
        """Pairs whose prompt is nearly an earlier one."""
        firsts = self.signed()
        nearest, _ = find_near(self.gather((self, firsts)), similarity)
        return self._for_all_pairs(firsts[nearest >= 0], firsts[nearest[nearest >= 0]])

    def _for_all_pairs(self, firsts: np.ndarray, found: np.ndarray) -> np.ndarray:
        """What was found for the first pair of a prompt, for all pairs of it."""
        keys = self.prompts[firsts]
        order = np.argsort(keys)
        if not len(order):
            return np.full(len(self.kept), -1)
        at = order[np.minimum(np.searchsorted(keys[order], self.prompts), len(keys) - 1)]
        return np.where(keys[at] == self.prompts, found[at], -1)

    def further_pairs(self) -> np.ndarray:
        """Pairs whose prompt another one has, with a larger gap between its scores or the same and earlier."""
        gaps = np.nan_to_num(self.numbers["score_chosen"] - self.numbers["score_rejected"], nan=-np.inf)
        passes = self.numbers["later_pass"]
        rows = np.flatnonzero(self.kept)
        order = rows[np.lexsort((rows, -gaps[rows], passes[rows], self.prompts[rows]))]
        keys = np.stack([self.prompts[order], passes[order]], axis=1)
        is_best = np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)] if len(order) else np.zeros(0, bool)
        best = order[np.maximum.accumulate(np.where(is_best, np.arange(len(order)), 0))]
        found = np.full(len(self.kept), -1)
        found[order[~is_best]] = best[~is_best]
        return found

    def advise(self) -> Iterator[str]:
        """Lines on the kept pairs of this split."""
        kept, total = self.kept, int(self.kept.sum())
        if not total:
            return
        chosen, rejected, score, other = (
            self.numbers[name][kept] for name in ("chosen_chars", "rejected_chars", "score_chosen", "score_rejected")
        )
        gaps = chosen - rejected
        longer, shorter = int((gaps > 0).sum()), int((gaps < 0).sum())
        right = (max(longer, shorter) + (total - longer - shorter) / 2) / total
        error = 1.96 * (right * (1 - right) / total) ** 0.5
        rule = "longer" if longer >= shorter else "shorter"
        yield (
            f"chosen is longer in {longer / total:.1%} of the pairs, shorter in {shorter / total:.1%}: length alone "
            f"(the {rule} answer) is right in {right:.1%} +- {error:.1%} (clean.max_length_ratio, pair.length_control)"
        )
        scored = np.isfinite(score - other)
        if scored.sum() > 2:
            r = correlate((score - other)[scored], gaps[scored])
            yield (
                f"scores and lengths of a pair's answers: r = {r:+.2f} over {int(scored.sum())} pairs; "
                f"chosen scores lower in {int((score < other).sum())} (clean.min_score_gap)"
            )
        contradicted = int(((self.contradicted() >= 0) & kept).sum())
        if contradicted:
            yield f"pairs that another pair contradicts: {contradicted} (clean.contradictions)"
        for sign, what, key in _NOTED:
            count = int(((self.numbers["signs"][kept] & int(sign)) > 0).sum())
            if count:
                yield f"{what}: {count} ({count / total:.1%}; {key})"


_NOTED = (
    (Sign.CHOSEN_REFUSES, "chosen answers that decline to help", "clean.refusals"),
    (Sign.CHOSEN_TRUNCATED, "chosen answers that stop in the middle", "clean.truncated"),
    (Sign.RESIDUE, "pairs with marks of a chat template in their texts", "clean.template_residue"),
    (Sign.ALMOST_SAME, "pairs whose answers are almost the same", "keep learning_rate low, watch logps/chosen"),
)


def correlate(score_gaps: np.ndarray, length_gaps: np.ndarray) -> float:
    """How far longer answers score higher within their pair: Pearson's r of the answers' scores and lengths, each less
    its pair's mean; in [-1, 1], 0 where either never differs.

    Args:
        score_gaps, length_gaps: [pairs], one answer's less the other's, in the same direction.
    """
    size = float(np.sqrt((score_gaps**2.0).sum() * (length_gaps**2.0).sum()))
    return float((score_gaps * length_gaps).sum()) / size if size else 0.0
