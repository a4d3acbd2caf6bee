"""Two texts side by side: which words of each the other does not have.

Texts are what a model wrote, so every piece of them is escaped.
"""

from __future__ import annotations

import difflib
import re

from markupsafe import Markup, escape

# Words and single signs, each with the blanks behind it; scripts that write no blanks between words sign by sign.
_ALONE = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_PIECE = re.compile(rf"(?:[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s])\s*|\s+")
MOST_PIECES = 3000
"""Longer texts are shown without marks: finding them takes quadratic time."""
ALIKE = 0.35
"""Texts that have less than this share of words in common, in their order, are different texts: no marks."""


def mark_differences(before: str, after: str) -> tuple[Markup, Markup, str]:
    """Both texts with <del> and <ins> around what the other lacks, and a word on how much they share."""
    old, new = _PIECE.findall(before), _PIECE.findall(after)
    if before == after:
        return escape(before), escape(after), "the same"
    if max(len(old), len(new)) > MOST_PIECES:
        return escape(before), escape(after), "too long to compare"
    # By words alone: every second piece would be a blank, and each be held against all others.
    matcher = difflib.SequenceMatcher(
        None, *([piece.rstrip() for piece in side] for side in (old, new)), autojunk=False
    )
    share = matcher.ratio()
    if share < ALIKE:
        return escape(before), escape(after), f"rewritten: {share:.0%} of the words in common"
    left, right = Markup(), Markup()
    for kind, a, b, c, d in matcher.get_opcodes():
        gone, come = "".join(old[a:b]), "".join(new[c:d])
        left += escape(gone) if kind == "equal" else _mark("del", gone)
        right += escape(come) if kind == "equal" else _mark("ins", come)
    return left, right, f"{share:.0%} of the words in common"


def _mark(tag: str, text: str) -> Markup:
    words = text.rstrip()
    return Markup("<{0}>{1}</{0}>{2}").format(Markup(tag), words, text[len(words) :]) if text else Markup()
