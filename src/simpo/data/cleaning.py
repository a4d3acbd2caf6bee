"""Owns what one pair by itself shows, and the filters of `clean` that need no other pair; runs where pairs are read.

What a pair shows is a few numbers (`FINDINGS`), no text: the filters over all pairs and the advice of `simpo audit`
work on them, see `review`. Rules of thumb on texts: each says in its comment what it lets pass.
"""

# ruff: noqa: RUF001  the patterns are of texts in several scripts
from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from enum import IntFlag
from typing import Any

import numpy as np
import pyarrow as pa

from simpo.core.packing import SIDES
from simpo.data.columns import RowError
from simpo.data.language import MIN_CONFIDENCE, check_languages, identify_language
from simpo.data.messages import as_text
from simpo.data.near import NUM_HASHES, has_minhash, load_minhash, sign_words, split_words
from simpo.data.overlap import Ngrams
from simpo.data.preferences import Answer, Pair
from simpo.data.rows import later_pass
from simpo.recipe.stages import Clean

FINDINGS = {
    "signs": pa.int32(),
    "answers_key": pa.int64(),
    "answers_turned": pa.bool_(),
    "chosen_chars": pa.int32(),
    "rejected_chars": pa.int32(),
    "score_chosen": pa.float64(),
    "score_rejected": pa.float64(),
    "later_pass": pa.int32(),
    "signature": pa.binary(NUM_HASHES),
}
"""What is kept of each pair until all are read. `signs` are of `Sign`; `answers_key` is the same for one prompt and two
answers whichever is chosen, `answers_turned` says which; `later_pass` is 0 in the first pass over the rows; the
signature is of the prompt's words, zeros where there is none."""
_UNSIGNED = bytes(NUM_HASHES)


class Sign(IntFlag):
    """What a careful reader would notice about a pair."""

    CHOSEN_REFUSES = 1
    REJECTED_REFUSES = 2
    CHOSEN_TRUNCATED = 4
    REJECTED_TRUNCATED = 8
    RESIDUE = 16
    ALMOST_SAME = 32


_REFUSES = (Sign.CHOSEN_REFUSES, Sign.REJECTED_REFUSES)
_TRUNCATED = (Sign.CHOSEN_TRUNCATED, Sign.REJECTED_TRUNCATED)
ALMOST_SAME = 0.9
"""Share of words, in any order, that almost the same answers have in common."""

REASONS = {
    "near_duplicates": "near-duplicate prompt",
    "leaks": "prompt in both splits",
    "contradictions": "contradicted",
    "one_pair_a_prompt": "further pair of its prompt",
    "max_length_ratio": "length ratio",
    "min_score_gap": "score gap",
    "template_residue": "template residue",
    "refusals": "refusal",
    "truncated": "truncated",
    "languages": "language",
    "benchmarks": "in a benchmark",
}
"""Key of `clean` -> the reason that the ledger gives for what it drops."""


class PairCleaner:
    """Pairs to their findings; a `RowError` where a filter drops one. Can be sent to other processes.

    Args:
        clean: the recipe's section.
        benchmarks: what no pair may share, see `overlap.read_benchmarks`.
    Raises:
        ValueError: simpo[clean] is not installed where it is needed; or a language that there is not.
    """

    def __init__(self, clean: Clean, benchmarks: Ngrams | None = None):
        self.clean, self.benchmarks = clean, benchmarks
        self.signs_prompts = has_minhash()
        if clean.near_duplicates or clean.leaks == "near":
            load_minhash()
        if clean.languages:
            check_languages(set(clean.languages) - {"prompt"}, "clean.languages")
        checks: tuple[tuple[str, Callable[[Pair, Sign], str | None]], ...] = (
            ("max_length_ratio", self._length_ratio),
            ("min_score_gap", self._score_gap),
            ("template_residue", self._residue),
            ("refusals", functools.partial(self._sided, clean.refusals, _REFUSES, "declines to help")),
            ("truncated", functools.partial(self._sided, clean.truncated, _TRUNCATED, "stops in the middle")),
            ("languages", self._language),
            ("benchmarks", self._benchmark),
        )
        self.checks = [(REASONS[key], check) for key, check in checks if getattr(clean, key) != getattr(Clean(), key)]

    def __call__(self, pair: Pair) -> dict[str, Any]:
        """What there is to know about a pair, as `FINDINGS`.

        Raises:
            RowError: a filter drops it; the reason is one of `REASONS`.
        """
        signs = read_signs(pair)
        for reason, check in self.checks:
            if detail := check(pair, signs):
                raise RowError(reason, detail)
        chosen, rejected = (as_text(answer).strip() for answer in (pair.chosen, pair.rejected))
        scores = pair.scores or (None, None)
        return {
            "signs": int(signs),
            "answers_key": pair.key(*sorted((chosen, rejected))),
            "answers_turned": chosen > rejected,
            "chosen_chars": len(spoken(pair.chosen)),
            "rejected_chars": len(spoken(pair.rejected)),
            "score_chosen": scores[0],
            "score_rejected": scores[1],
            "later_pass": later_pass(pair.row_id),
            "signature": (sign_words(split_words(asked(pair))) if self.signs_prompts else None) or _UNSIGNED,
        }

    def _length_ratio(self, pair: Pair, signs: Sign) -> str | None:
        chosen, rejected = (len(spoken(answer)) for answer in (pair.chosen, pair.rejected))
        ratio = max(chosen, rejected) / max(1, min(chosen, rejected))
        if ratio > (self.clean.max_length_ratio or ratio):
            return f"chosen has {chosen} characters, rejected {rejected}"
        return None

    def _score_gap(self, pair: Pair, signs: Sign) -> str | None:
        if pair.scores is None:
            return "the row has no scores of its answers"
        chosen, rejected = pair.scores
        if chosen - rejected < (self.clean.min_score_gap or 0):
            return f"chosen scores {chosen:g}, rejected {rejected:g}"
        return None

    def _residue(self, pair: Pair, signs: Sign) -> str | None:
        return find_residue(pair) if Sign.RESIDUE in signs else None

    def _sided(self, wanted: str, sides: tuple[Sign, Sign], what: str, pair: Pair, signs: Sign) -> str | None:
        for side, sign in zip(SIDES if wanted == "either" else SIDES[:1], sides):
            if sign in signs:
                text = spoken(getattr(pair, side))
                return f"{side} {what}: {(text[-60:] if sign in _TRUNCATED else text[:60])!r}"
        return None

    def _language(self, pair: Pair, signs: Sign) -> str | None:
        wanted = set(self.clean.languages or ())
        if "prompt" in wanted:
            found = identify_language(asked(pair))
            if found is None or found[1] < MIN_CONFIDENCE:
                return None  # who knows what is right here
            wanted.add(found[0])
        for side in SIDES:
            found = identify_language(spoken(getattr(pair, side)))
            if found and found[0] not in wanted and found[1] >= MIN_CONFIDENCE:
                return f"{side} is {found[0]}: {spoken(getattr(pair, side))[:60]!r}"
        return None

    def _benchmark(self, pair: Pair, signs: Sign) -> str | None:
        assert self.benchmarks is not None
        for text in (asked(pair), spoken(pair.chosen), spoken(pair.rejected)):
            if found := self.benchmarks.find(split_words(text)):
                return found
        return None


def find_numbers(table: pa.Table) -> dict[str, np.ndarray]:
    """The findings of some pairs as arrays: name -> [pairs]; a score that is missing is nan."""
    signatures = np.array(table["signature"].to_pylist(), dtype=f"V{NUM_HASHES}")
    return {name: table[name].to_numpy() for name in FINDINGS if name != "signature"} | {"signature": signatures}


# --- texts -----------------------------------------------------------------------------------------------------------


def spoken(answer: Answer) -> str:
    """What an answer says: its assistant's texts, without reasoning."""
    if isinstance(answer, str):
        return answer
    return "\n".join(message["content"] for message in answer if message["role"] == "assistant")


def asked(pair: Pair) -> str:
    """What the prompt says, its system turn aside: one that all prompts have would make them all alike."""
    return "\n".join(message["content"] for message in pair.turns if message["role"] != "system")


def read_signs(pair: Pair) -> Sign:
    """Everything in `Sign` that holds for a pair."""
    chosen, rejected = spoken(pair.chosen), spoken(pair.rejected)
    found = (
        (Sign.CHOSEN_REFUSES, refuses(chosen)),
        (Sign.REJECTED_REFUSES, refuses(rejected)),
        (Sign.CHOSEN_TRUNCATED, is_truncated(chosen)),
        (Sign.REJECTED_TRUNCATED, is_truncated(rejected)),
        (Sign.RESIDUE, find_residue(pair) is not None),
        (Sign.ALMOST_SAME, are_almost_same(chosen, rejected)),
    )
    return Sign(sum(sign for sign, holds in found if holds))


def are_almost_same(chosen: str, rejected: str) -> bool:
    """Whether answers have `ALMOST_SAME` of their words in common, in any order, and about the same length."""
    if 4 * max(len(chosen), len(rejected)) > 5 * min(len(chosen), len(rejected)):
        return False
    one, other = split_words(chosen), split_words(rejected)
    return bool(one) and (Counter(one) & Counter(other)).total() >= ALMOST_SAME * max(len(one), len(other))


_THOUGHT = re.compile(r".*?</think>", re.DOTALL)
_CANNOT = r"(?:can(?:no|['’]?)t|can not|(?:am |['’]m )?(?:not able|unable)|won['’]t|['’]m not (?:comfortable|going))"
_HELP = (
    r"(?:help|assist|provide|do that|fulfill|comply|answer|create|write|generate|give|support|discuss|engage|share|"
    r"participate|continue|offer|recommend|encourage|condone|tell you|talk about)"
)
_REFUSAL = re.compile(
    rf"\bI(?:['’]m| am) (?:\w+ )?sorry,? (?:but )?(?:as an? [^.]{{0,40}}, )?I ?{_CANNOT}|"
    rf"\bI ?{_CANNOT} (?:to |in )?(?:\w+ )?{_HELP}|"
    rf"\b[Aa]s an? (?:AI|artificial intelligence|(?:large )?language model)\b[^.]{{0,60}}I ?(?:{_CANNOT}|don.t have)|"
    "(?:抱歉|对不起|很遗憾)[^。]{0,12}(?:无法|不能|没办法)|作为[^。]{0,10}(?:人工智能|AI|语言模型)[^。]{0,40}(?:无法|不能)|"
    "我(?:无法|不能)(?:提供|回答|帮助|协助|满足|完成)|"
    r"\bEs tut mir leid, (?:aber )?(?:ich kann|das kann ich)[^.]{0,40}\bnicht\b|"
    r"\bJe suis désolée?, (?:mais )?je ne peux pas\b|\bLo siento, (?:pero )?no puedo\b"
)


_CANNOTS = (
    *("cannot", "can't", "can’t", "cant", "can not", "able", "won't", "won’t", "not comfortable", "not going", "don"),
    *("无法", "不能", "没办法", "nicht", "ne peux pas", "no puedo"),
)
"""One of these is in every refusal: most texts are known by them not to be one."""


def refuses(text: str) -> bool:
    """Whether an answer begins by declining to help, in English, Chinese, German, French or Spanish.

    Only its first 200 characters are looked at: what declines later on has helped before.
    """
    thought = _THOUGHT.match(text) if "</think>" in text else None
    begin = text[thought.end() if thought else 0 :].lstrip()[:200]
    return any(mark in begin for mark in _CANNOTS) and _REFUSAL.search(begin) is not None


_ITEM = re.compile(r"\s*(?:[-*+•>#|]|\d+[.)]|[a-zA-Z][.)])")
# Nothing has ended behind a comma, an opening bracket or a dash; nor behind a letter where full stops are not left out.
_GOES_ON = re.compile(r"[^\W\u2e80-\ufaff]|[,;(\-–—、，；（]")


def is_truncated(text: str) -> bool:
    """Whether a text ends in an open block of code, or in the middle of a sentence.

    The latter is said of a last line that ends in a comma or the like, or has at least eight words (between blanks) and
    no mark at its end; not of an item of a list, a heading, a quotation, a row of a table, or an address. Answers of a
    few words, verses and code pass.
    """
    text = text.rstrip()
    if text.count("```") % 2:
        return True
    line = text[text.rfind("\n") + 1 :]
    words = line.split()
    if not _GOES_ON.match(line[-1:]) or _ITEM.match(line) or "://" in words[-1] or words[-1].startswith("www."):
        return False
    return len(words) >= 8 or line[-1] in "、，；（"


_SPECIAL = re.compile(
    r"<[|｜][\w▁ .:-]{1,40}[|｜]>|</?(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|\A\s*<s>|</s>\s*\Z|<\|\w+\Z", re.ASCII
)
_ROLE_LINE = re.compile(
    r"^(?:#{2,4} ?(?:Instruction|Response|Human|Assistant|User) ?:|(?:Human|Assistant|USER|ASSISTANT|System|User) ?:)",
    re.MULTILINE,
)


def find_residue(pair: Pair) -> str | None:
    """A mark of a chat template in a pair's texts, and where; None for text that was rendered as a whole.

    Special tokens count anywhere; a line that begins with a role ("Human:") only in answers, since prompts may quote
    a dialogue.
    """
    if isinstance(pair.prompt, str) and _SPECIAL.match(pair.prompt.lstrip()):
        return None
    prompt = "\n".join(message["content"] for message in pair.turns)
    for where, text in (("the prompt", prompt), *zip(SIDES, map(spoken, (pair.chosen, pair.rejected)))):
        found = ("<" in text or "[" in text) and _SPECIAL.search(text)
        found = found or (_ROLE_LINE.search(text) if where != "the prompt" else None)
        if found:
            around = text[max(0, found.start() - 20) : found.end() + 20]
            return f"{found[0].strip()} in {where}: {around!r}"
    return None
