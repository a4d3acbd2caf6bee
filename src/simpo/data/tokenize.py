"""Owns the exact tokens that are trained: chat template, seam between prompt and response, end of turn, truncation.

Knows nothing of files, recipes or models. Works on any transformers tokenizer; fast ones are called in batches through
their Rust backend.

The rules, in order:
1. With a chat template, the prompt is rendered with the generation header and each response as the template renders a
   finished answer; the full rendering must begin with the prompt rendering (`templates.py` says what happens with
   templates that answer behind another header). Without a template: prompt + response, as text.
2. Tokens are those of the full text. The first trained token is the first one that ends behind the seam, so a token
   that straddles the seam is trained.
3. BOS is what the template writes; without a template, what the tokenizer adds.
4. A complete response ends with exactly one end-of-turn token: the template's, with what the template writes after it
   removed, else the tokenizer's EOS.
5. Nothing is cut while prompt + longer response <= max_length. Otherwise see `plan_cut`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

from simpo.core.packing import SIDES, common_prefix_length, prompt_length, trained_ranges
from simpo.data.columns import RowError
from simpo.data.limits import limited
from simpo.data.messages import Notes, as_text
from simpo.data.preferences import Pair
from simpo.data.templates import (
    PROBE_ANSWERS,
    PROBE_USER,
    PairTexts,
    PlainRenderer,
    Span,
    TemplateRenderer,
    load_chat_template,
)

T = TypeVar("T")
Overlong = Literal["truncate", "drop", "error"]


@dataclass
class TokenizedPair:
    """The tokens of one pair, and how they came about.

    From `chosen_start` (`rejected_start`) on all is trained but the gaps, see `TokenPair`. The `_cut` counts are tokens
    removed: from the left of the prompt, from the right of each response.
    """

    row_id: str
    chosen_ids: list[int]
    chosen_start: int
    rejected_ids: list[int]
    rejected_start: int
    prompt_text: str
    chosen_text: str
    rejected_text: str
    chosen_gaps: list[int] = field(default_factory=list)
    rejected_gaps: list[int] = field(default_factory=list)
    prompt_cut: int = 0
    chosen_cut: int = 0
    rejected_cut: int = 0
    seam_shifted: bool = False
    notes: Notes = field(default_factory=dict)

    @property
    def num_shared(self) -> int:
        """Tokens at the front that are equal on both sides and no part of the answer."""
        has_gaps = self.chosen_gaps or self.rejected_gaps
        limit = prompt_length(self) if has_gaps else min(self.chosen_start, self.rejected_start)
        return common_prefix_length(self.chosen_ids[:limit], self.rejected_ids[:limit])


class Cut(NamedTuple):
    """How many tokens to remove: `prompt` from the left behind the kept start tokens, the others from the right."""

    prompt: int = 0
    chosen: int = 0
    rejected: int = 0


def plan_cut(prompt: int, chosen: int, rejected: int, *, max_length: int, max_prompt_length: int | None) -> Cut:
    """Where an overlong pair loses tokens. Integers only.

    First the prompt gives way, from the left, no further than needed and never below `max_prompt_length`; a prompt that
    is shorter than that is not cut. What is still too long is cut from the right of the responses, each on its own.
    `max_prompt_length` None, or not below `max_length`, stands for half of `max_length`.

    Args:
        prompt, chosen, rejected: lengths in tokens.
    """
    longer = max(chosen, rejected)
    if prompt + longer <= max_length:
        return Cut()
    if max_prompt_length is None or max_prompt_length >= max_length:
        max_prompt_length = max_length // 2
    kept_prompt = min(prompt, max(max_prompt_length, max_length - longer))
    room = max_length - kept_prompt
    return Cut(prompt - kept_prompt, max(0, chosen - room), max(0, rejected - room))


class PairTokenizer:
    """Batches of pairs to tokens, for one tokenizer and one set of limits.

    Args:
        max_length: tokens of prompt + response at most, for each side.
        max_prompt_length: how far the prompt may be cut when a pair is too long; see `plan_cut`.
        overlong: "truncate" cuts, "drop" gives a RowError, "error" raises.
        chat_template: see `load_chat_template`.
        train_on, rendered_text: see `TemplateRenderer`; without a template all text is taken as it is.
    Raises:
        ValueError: the template cannot be used, messages without any template, or an overlong pair with "error".
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        max_prompt_length: int | None = None,
        overlong: Overlong = "truncate",
        chat_template: str | None = None,
        train_on: str = "answer",
        rendered_text: str = "auto",
    ):
        self.max_length, self.max_prompt_length, self.overlong = max_length, max_prompt_length, overlong
        template = load_chat_template(tokenizer, chat_template)
        eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
        if template is None:
            self.render = PlainRenderer(eos)
        else:
            options = {"train_on": train_on, "rendered_text": rendered_text, "adds_bos": bool(_added_front(tokenizer))}
            self.render = TemplateRenderer(tokenizer, template, _end_markers(tokenizer), **options)
        self.end_ids = [] if self.render.adds_end or eos_id is None else [eos_id]
        self.bos_ids = _added_front(tokenizer) if template is None else []
        self.bos_text = tokenizer.bos_token if self.bos_ids else None
        self.bos_id = tokenizer.bos_token_id
        self.special_ids = frozenset(tokenizer.all_special_ids) | frozenset(
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        self.encode = _Encoder(tokenizer, self.render.sample)

    def __call__(self, pairs: Sequence[Pair]) -> list[TokenizedPair | RowError]:
        """The tokens of each pair, in order, or the `RowError` that says why there are none."""
        texts = []
        with limited() as begin:
            for pair in pairs:
                begin()
                texts.append(_or_error(self.render, pair))
        rendered = [(pair, text) for pair, text in zip(pairs, texts) if isinstance(text, PairTexts)]
        tokens = iter(self.encode(rendered))
        return [text if isinstance(text, RowError) else _or_error(self._finish, next(tokens)) for text in texts]

    def _finish(self, pair: TokenizedPair) -> TokenizedPair:
        """Add what the tokenizer adds, apply the limits, and check that both sides are worth training on."""
        front = [] if self.bos_text and pair.prompt_text.startswith(self.bos_text) else self.bos_ids
        pair.chosen_ids = front + pair.chosen_ids + self.end_ids
        pair.rejected_ids = front + pair.rejected_ids + self.end_ids
        for side in SIDES:
            setattr(pair, f"{side}_start", getattr(pair, f"{side}_start") + len(front))
            setattr(pair, f"{side}_gaps", [edge + len(front) for edge in getattr(pair, f"{side}_gaps")])
        if pair.num_shared < 1 or min(pair.chosen_start, pair.rejected_start) < 1:
            raise RowError("no prompt", "the prompt has no token of its own to predict the response from")
        if pair.chosen_ids == pair.rejected_ids:
            raise RowError("identical", "chosen and rejected give the same tokens")
        if max(len(pair.chosen_ids), len(pair.rejected_ids)) > self.max_length:
            self._cut(pair)
        return pair

    def _cut(self, pair: TokenizedPair) -> None:
        shared = pair.num_shared
        chosen, rejected = len(pair.chosen_ids) - shared, len(pair.rejected_ids) - shared
        lengths = f"{shared} prompt + {chosen} chosen / {rejected} rejected tokens, max_length {self.max_length}"
        if self.overlong == "error":
            raise ValueError(
                f"row {pair.row_id} is too long: {lengths}; raise max_length, or set overlong to truncate or drop"
            )
        if self.overlong == "drop":
            raise RowError("overlong", lengths)
        cut = plan_cut(shared, chosen, rejected, max_length=self.max_length, max_prompt_length=self.max_prompt_length)
        start = self._start_tokens(pair.chosen_ids[:shared])
        if start + cut.prompt >= shared and cut.prompt:
            raise RowError("overlong", f"no prompt token would be left: {lengths}")
        for side, count in (("chosen", cut.chosen), ("rejected", cut.rejected)):
            ids = getattr(pair, f"{side}_ids")
            trained = trained_ranges(getattr(pair, f"{side}_start"), getattr(pair, f"{side}_gaps"), len(ids))
            first, end = start + cut.prompt, len(ids) - count
            first += not start  # nothing predicts the first token of all
            kept = [(max(each.start, first), min(each.stop, end)) for each in trained]
            edges = [edge - cut.prompt for stretch in kept if stretch[0] < stretch[1] for edge in stretch]
            if not edges or edges[-1] <= shared - cut.prompt:
                raise RowError("overlong", f"no token of {side} would be left: {lengths}")
            ids = ids[:start] + ids[start + cut.prompt :]
            setattr(pair, f"{side}_ids", ids[: edges[-1]])  # what stands behind the last trained token trains nothing
            setattr(pair, f"{side}_start", edges[0])
            setattr(pair, f"{side}_gaps", edges[1:-1])
        if pair.chosen_ids == pair.rejected_ids:
            raise RowError("identical after truncation", lengths)
        pair.prompt_cut, pair.chosen_cut, pair.rejected_cut = cut

    def _start_tokens(self, prompt: list[int]) -> int:
        """How many leading tokens a cut must keep: BOS, and specials that open the text once and never recur."""
        count = 0
        for index, token in enumerate(prompt):
            is_bos = index == 0 and token == self.bos_id
            if not is_bos and (token not in self.special_ids or prompt.count(token) > 1):
                break
            count += 1
        return count


def _or_error(function: Callable[[Any], T], argument: Any) -> T | RowError:
    try:
        return function(argument)
    except RowError as error:
        return error


def _end_markers(tokenizer: Any) -> list[str]:
    """Texts that can end a turn: the EOS and every added token (templates end turns with their own)."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return [token for token in dict.fromkeys([tokenizer.eos_token, *added]) if token and token.strip()]


def _added_front(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer itself puts before a text."""
    bare = list(tokenizer(PROBE_USER, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(PROBE_USER)["input_ids"])
    for count in range(len(full) - len(bare) + 1):
        if full[count : count + len(bare)] == bare:
            return full[:count]
    return []


class _Encoder:
    """Texts to tokens, without special tokens added and without truncation. `sample` is one rendered prompt.

    On a fast tokenizer the text is cut in front of the last special token of the prompt: the tokenizer splits there
    anyway, so both parts give the same tokens as the whole, and the long part before it is encoded once for both
    responses. Only tokens that no other added token can overlap, and that swallow no neighbours, are used for this.
    """

    def __init__(self, tokenizer: Any, sample: str):
        self.tokenizer = tokenizer
        self._exact_offsets: Any = None
        self.backend = self._usable_backend(tokenizer)
        self.anchors = _anchors(tokenizer, sample) if self.backend is not None else []

    @staticmethod
    def _usable_backend(tokenizer: Any) -> Any:
        """The Rust tokenizer, if calling it gives what the Python tokenizer gives."""
        if not getattr(tokenizer, "is_fast", False):
            return None
        backend = tokenizer.backend_tokenizer
        probe = f"{PROBE_USER}\n\n{tokenizer.eos_token or ''} 12 \u2013 {PROBE_ANSWERS[0]} "
        expected = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        return backend if backend.encode(probe, add_special_tokens=False).ids == expected else None

    def __call__(self, rendered: Sequence[tuple[Pair, PairTexts]]) -> list[TokenizedPair]:
        parts = []
        for _, texts in rendered:
            (chosen_begin, _), (rejected_begin, _) = texts.chosen_spans[0], texts.rejected_spans[0]
            at = self._anchor(texts.prompt[: min(chosen_begin, rejected_begin)])
            sides = (texts.chosen[at:chosen_begin], texts.chosen[at:], texts.rejected[at:rejected_begin])
            parts.append((texts.prompt[:at], *sides, texts.rejected[at:]))
        tokens = zip(*(self._encode_many(texts) for texts in zip(*parts)))
        return [self._join(*both, *each) for both, *each in zip(rendered, parts, tokens)]

    def _join(self, pair: Pair, texts: PairTexts, parts: Sequence[str], tokens: Sequence[list[int]]) -> TokenizedPair:
        head, chosen_before, chosen, rejected_before, rejected = tokens
        at = len(parts[0])
        chosen_edges, chosen_shifted = self._edges(parts[2], texts.chosen_spans, at, chosen_before, chosen)
        rejected_edges, rejected_shifted = self._edges(parts[4], texts.rejected_spans, at, rejected_before, rejected)
        return TokenizedPair(
            row_id=pair.row_id,
            chosen_ids=head + chosen,
            chosen_start=len(head) + chosen_edges[0],
            rejected_ids=head + rejected,
            rejected_start=len(head) + rejected_edges[0],
            prompt_text=texts.prompt,
            chosen_text=as_text(pair.chosen),
            rejected_text=as_text(pair.rejected),
            chosen_gaps=[len(head) + edge for edge in chosen_edges[1:]],
            rejected_gaps=[len(head) + edge for edge in rejected_edges[1:]],
            seam_shifted=chosen_shifted or rejected_shifted,
            notes={**pair.notes, **texts.notes},
        )

    def _edges(
        self, text: str, spans: Sequence[Span], skipped: int, prompt: list[int], full: list[int]
    ) -> tuple[list[int], bool]:
        """The first trained token of `full`, then begins and ends of gaps; whether the seam is shifted.

        `spans` count from `skipped` characters before `text`. Trained is a token that reaches into a span.
        """
        shifted = full[: len(prompt)] != prompt
        first = self._first_token(text, spans[0][0] - skipped, full, behind=True) if shifted else len(prompt)
        edges = [first]
        for (_, gap_begin), (gap_end, _) in pairwise(spans):
            begin = self._first_token(text, gap_begin - skipped, full, behind=False)
            end = self._first_token(text, gap_end - skipped, full, behind=True)
            if edges[-1] < begin < end < len(full):
                edges += [begin, end]
        return edges, shifted

    def _first_token(self, text: str, seam: int, full: list[int], *, behind: bool) -> int:
        """Index of the first token that starts (`behind`: ends) behind a place in the text."""
        if self.backend is None:
            (before,) = self._encode_many([text[:seam]])
            return common_prefix_length(before, full)
        reached = (end > seam if behind else begin >= seam for begin, end in self._offsets(text))
        return next((index for index, is_there in enumerate(reached) if is_there), len(full))

    def _anchor(self, prompt: str) -> int:
        """Where the prompt may be cut without changing a token; 0 where nowhere."""
        return max([0, *(prompt.rfind(token) for token in self.anchors)])

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """Character spans of the tokens. Post-processors trim blanks off them, so a copy without one is asked."""
        if self._exact_offsets is None:
            from tokenizers import Tokenizer

            config = json.loads(self.backend.to_str())
            config.update(post_processor=None, truncation=None, padding=None)
            self._exact_offsets = Tokenizer.from_str(json.dumps(config))
        return self._exact_offsets.encode(text, add_special_tokens=False).offsets

    def _encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        few = list(dict.fromkeys(texts))  # from the last special token to the answer they are nearly always the same
        if self.backend is None:
            found = [list(ids) for ids in self.tokenizer(few, add_special_tokens=False)["input_ids"]]
        else:
            self.backend.no_truncation()
            self.backend.no_padding()
            found = [encoding.ids for encoding in self.backend.encode_batch_fast(few, add_special_tokens=False)]
        tokens = dict(zip(few, found))
        return [tokens[text] for text in texts]


def _anchors(tokenizer: Any, sample: str) -> list[str]:
    """Special tokens of the template at which a text may be cut without changing any token on either side."""
    added = list(tokenizer.added_tokens_decoder.values())
    contents = [token.content for token in added]
    return [
        token.content
        for token in added
        if token.special
        and token.content in sample
        and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        and not any(_may_overlap(other, token.content) for other in contents if other != token.content)
    ]


def _may_overlap(other: str, token: str) -> bool:
    """Whether an occurrence of `other` can cover the place where `token` starts."""
    if token in other:
        return True
    return any(other.endswith(token[:size]) for size in range(1, min(len(token), len(other) + 1)))
