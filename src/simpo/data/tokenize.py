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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from simpo.core.packing import TokenPair, common_prefix_length
from simpo.data.preferences import Pair, RowError
from simpo.data.templates import (
    PROBE_ANSWERS,
    PROBE_USER,
    PairTexts,
    PlainRenderer,
    TemplateRenderer,
    load_chat_template,
)

Overlong = Literal["truncate", "drop", "error"]

_MAX_REMEMBERED = 4096  # short texts (headers) whose tokens are kept


@dataclass(frozen=True, slots=True)
class TokenizedPair(TokenPair):
    """The tokens of one pair, and how they came about; everything from `chosen_start` (`rejected_start`) on is trained.

    The `_cut` counts are tokens removed: from the left of the prompt, from the right of each response.
    """

    prompt_text: str
    chosen_text: str
    rejected_text: str
    prompt_cut: int = 0
    chosen_cut: int = 0
    rejected_cut: int = 0
    seam_shifted: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
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


# --- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tokens:
    """Full token lists of one pair before any cut; `shared` tokens at the front are equal and not trained."""

    chosen: list[int]
    chosen_start: int
    rejected: list[int]
    rejected_start: int
    shifted: bool

    @property
    def shared(self) -> int:
        limit = min(self.chosen_start, self.rejected_start)
        return common_prefix_length(self.chosen[:limit], self.rejected[:limit])


class PairTokenizer:
    """Batches of pairs to tokens, for one tokenizer and one set of limits.

    Args:
        max_length: tokens of prompt + response at most, for each side.
        max_prompt_length: how far the prompt may be cut when a pair is too long; see `plan_cut`.
        overlong: "truncate" cuts, "drop" gives a RowError, "error" raises.
        chat_template: Jinja text, or a file that holds it; None takes the tokenizer's own.
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
    ):
        if max_length < 2:
            raise ValueError(f"max_length: {max_length} leaves no room for a prompt and a response; at least 2")
        if overlong not in ("truncate", "drop", "error"):
            raise ValueError(f"overlong: {overlong!r} is not one of truncate, drop, error")
        self.max_length, self.max_prompt_length, self.overlong = max_length, max_prompt_length, overlong
        template = load_chat_template(tokenizer, chat_template)
        eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
        if template is None:
            self.render = PlainRenderer(eos)
        else:
            self.render = TemplateRenderer(tokenizer, template, _end_markers(tokenizer))
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
        texts = self.render(pairs)
        good = [text for text in texts if isinstance(text, PairTexts)]
        tokens = iter(self.encode(good))
        results: list[TokenizedPair | RowError] = []
        for pair, text in zip(pairs, texts):
            if isinstance(text, RowError):
                results.append(text)
                continue
            try:
                results.append(self._finish(pair, text, next(tokens)))
            except RowError as error:
                results.append(error)
        return results

    def _finish(self, pair: Pair, texts: PairTexts, tokens: _Tokens) -> TokenizedPair:
        """Add what the tokenizer adds, apply the limits, and check that both sides are worth training on."""
        if self.bos_ids and not (self.bos_text and texts.prompt.startswith(self.bos_text)):
            tokens.chosen, tokens.rejected = self.bos_ids + tokens.chosen, self.bos_ids + tokens.rejected
            tokens.chosen_start += len(self.bos_ids)
            tokens.rejected_start += len(self.bos_ids)
        tokens.chosen, tokens.rejected = tokens.chosen + self.end_ids, tokens.rejected + self.end_ids
        if tokens.chosen_start < 1 or tokens.rejected_start < 1 or tokens.shared < 1:
            raise RowError("no prompt", "the prompt has no token of its own to predict the response from")
        if tokens.chosen == tokens.rejected:
            raise RowError("identical", "chosen and rejected give the same tokens")
        cut = self._cut(pair, tokens)
        return TokenizedPair(
            row_id=pair.row_id,
            chosen_ids=tokens.chosen,
            chosen_start=tokens.chosen_start,
            rejected_ids=tokens.rejected,
            rejected_start=tokens.rejected_start,
            prompt_text=texts.prompt,
            chosen_text=pair.chosen,
            rejected_text=pair.rejected,
            prompt_cut=cut.prompt,
            chosen_cut=cut.chosen,
            rejected_cut=cut.rejected,
            seam_shifted=tokens.shifted,
        )

    def _cut(self, pair: Pair, tokens: _Tokens) -> Cut:
        """Cut an overlong pair in place."""
        longest = max(len(tokens.chosen), len(tokens.rejected))
        if longest <= self.max_length:
            return Cut()
        shared = tokens.shared
        chosen, rejected = len(tokens.chosen) - shared, len(tokens.rejected) - shared
        lengths = f"{shared} prompt + {chosen} chosen / {rejected} rejected tokens, max_length {self.max_length}"
        if self.overlong == "error":
            raise ValueError(
                f"row {pair.row_id} is too long: {lengths}; raise max_length, or set overlong to truncate or drop"
            )
        if self.overlong == "drop":
            raise RowError("overlong", lengths)
        cut = plan_cut(shared, chosen, rejected, max_length=self.max_length, max_prompt_length=self.max_prompt_length)
        start = self._start_tokens(tokens.chosen[:shared])
        if start + cut.prompt >= shared and cut.prompt:
            raise RowError("overlong", f"no prompt token would be left: {lengths}")
        for side, count in (("chosen", cut.chosen), ("rejected", cut.rejected)):
            ids, first = getattr(tokens, side), getattr(tokens, f"{side}_start")
            if len(ids) - count <= first:
                raise RowError("overlong", f"no token of {side} would be left: {lengths}")
            setattr(tokens, side, ids[:start] + ids[start + cut.prompt : len(ids) - count])
            setattr(tokens, f"{side}_start", first - cut.prompt)
        if tokens.chosen == tokens.rejected:
            raise RowError("identical after truncation", lengths)
        return cut

    def _start_tokens(self, prompt: list[int]) -> int:
        """How many leading tokens a cut must keep: BOS, and specials that open the text once and never recur."""
        count = 0
        for index, token in enumerate(prompt):
            is_bos = index == 0 and token == self.bos_id
            if not is_bos and (token not in self.special_ids or prompt.count(token) > 1):
                break
            count += 1
        return count


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
        self.remembered: dict[str, list[int]] = {}
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

    def __call__(self, texts: Sequence[PairTexts]) -> list[_Tokens]:
        splits = [self._anchor(text.prompt) for text in texts]
        heads = self._encode_many([text.prompt[:at] for text, at in zip(texts, splits)])
        tails = self._remembered_many([text.prompt[at:] for text, at in zip(texts, splits)])
        chosens = self._encode_many([text.chosen[at:] for text, at in zip(texts, splits)])
        rejecteds = self._encode_many([text.rejected[at:] for text, at in zip(texts, splits)])
        return [self._join(*parts) for parts in zip(texts, splits, heads, tails, chosens, rejecteds)]

    def _anchor(self, prompt: str) -> int:
        """Where the prompt may be cut without changing a token; 0 where nowhere."""
        return max(0, *(prompt.rfind(token) for token in self.anchors)) if self.anchors else 0

    def _join(
        self, texts: PairTexts, at: int, head: list[int], tail: list[int], chosen: list[int], rejected: list[int]
    ) -> _Tokens:
        seam = len(texts.prompt) - at
        chosen_start, chosen_shifted = self._seam(texts.chosen[at:], seam, tail, chosen)
        rejected_start, rejected_shifted = self._seam(texts.rejected[at:], seam, tail, rejected)
        return _Tokens(
            chosen=head + chosen,
            chosen_start=len(head) + chosen_start,
            rejected=head + rejected,
            rejected_start=len(head) + rejected_start,
            shifted=chosen_shifted or rejected_shifted,
        )

    def _seam(self, text: str, seam: int, prompt: list[int], full: list[int]) -> tuple[int, bool]:
        """Index of the first trained token of `full`, and whether tokenising apart would have given other tokens."""
        if full[: len(prompt)] == prompt:
            return len(prompt), False
        if self.backend is None:
            return common_prefix_length(prompt, full), True
        offsets = self._offsets(text)
        return next((index for index, (_, end) in enumerate(offsets) if end > seam), len(full)), True

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """Character spans of the tokens. Post-processors trim blanks off them, so a copy without one is asked."""
        if self._exact_offsets is None:
            from tokenizers import Tokenizer

            config = json.loads(self.backend.to_str())
            config.update(post_processor=None, truncation=None, padding=None)
            self._exact_offsets = Tokenizer.from_str(json.dumps(config))
        return self._exact_offsets.encode(text, add_special_tokens=False).offsets

    def _remembered_many(self, texts: list[str]) -> list[list[int]]:
        """As `_encode_many`, for texts that are nearly always the same few."""
        new = [text for text in dict.fromkeys(texts) if text not in self.remembered]
        if len(self.remembered) + len(new) > _MAX_REMEMBERED:
            self.remembered.clear()
            new = list(dict.fromkeys(texts))
        self.remembered.update(zip(new, self._encode_many(new)))
        return [self.remembered[text] for text in texts]

    def _encode_many(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self.backend is None:
            return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        self.backend.no_truncation()
        self.backend.no_padding()
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


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
