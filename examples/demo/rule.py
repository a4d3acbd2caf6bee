"""The demo's scoring rule: what counts as a better answer to an everyday question, without a judge model.

A good answer is brief, starts with the answer, does not repeat itself, comes to its end, says something of its own
and stays on the question. Each of the six is a part between 0 and 1; the score is their *product*, so that no virtue
pays for a vice: an empty answer scores 0, a single word at most 0.1, however clean. The rule cannot see whether an
answer is true.

| part | 1 when | otherwise |
|---|---|---|
| length | 10 to 90 words | shorter: words / 10; longer: (90 / words) squared |
| direct | starts with the answer | 0.5: an opener ("Certainly!", or "Hello" outside a letter); 0.6: filler later |
| fresh | no repeats | less 3x the repeated share of 4-word runs or sentences, less 4x what one word has above 10% |
| complete | ends like a sentence, list of full sentences, letter or code block | 0.4 |
| own | little of it is copied from the question | falls to 0 when half of its 4-word runs are the question's |
| topic | at least half of the question's content words come up | falls to 0.4 when none does |

Pure Python, no torch: the numbers are the same everywhere.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_WORDS, MAX_WORDS = 10, 90

# Ways to begin that delay the answer. Matched at the start, case ignored.
_OPENERS = re.compile(
    r"""["'*\s]*(
        certainly | sure\b | of\ course | absolutely\b | definitely\b | no\ problem | okay\b | ok\b | well,
      | (what\ a\ )?(great|good|excellent|wonderful|fantastic|interesting)\ question
      | that('s|\ is)\ (a|an)\ (great|good|excellent|wonderful|fantastic|interesting)
      | as\ an?\ ([a-z-]+\ )?(ai|chatbot|bot|language\ model|assistant|intelligence|being|soul)\b
      | ((this|that)('s|\ is)\ )?(an?|the|this)\ (age-old|classic|common|dreaded|eternal|infamous|tricky)\b
      | an?\ question\ (that|as)\b | while\ i('m|\ am|\ can|\ can't|\ cannot)\b
      | i('m|\ am|'d|\ would)\ (be\ )?(so\ |very\ |more\ than\ )?(happy|glad|delighted|pleased)\ to\ (help|assist)
      | i('m|\ am)\ (an\ ai|smollm|here) | i\ (can|will)\ help | ah\b | oh\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
# The assistant about itself further on, and closing offers.
_FILLER = re.compile(
    r"""( as\ an\ (ai|artificial|language) | i('m|\ am)\ (an\ ai|a\ language\ model|here\ to)
      | \b(chatbot|smollm|(helpful|caring)\ (ai|assistant))\b
      | i('m|\ am|'d|\ would)\ (be\ )?(happy|glad|delighted|pleased)\ to\ (help|assist)
      | (i\ )?hope\ (this|that|it)\ helps | (how|what)\ (can|may)\ i\ (help|assist) | is\ there\ anything\ else )""",
    re.IGNORECASE | re.VERBOSE,
)
# Fine in a letter, a delay in an answer: greetings and feelings at the start, courtesies further on.
_GREETINGS = re.compile(
    r"""["'*\s]*(
        hello\b | hi\b | hey\b | greetings\b | dear\b | unfortunately\b | thank\ you\ for | i\ apologi[sz]e
      | i('m|\ am|'d|\ would)\ (be\ |so\ |very\ |more\ than\ )*
        (happy|glad|delighted|pleased|excited|thrilled|sorry|afraid|unable|not\ able|an?\b)
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_COURTESIES = re.compile(
    r"""( i('d|\ would)\ (love\ to|be\ (happy|glad|delighted)) | i('m|\ am)\ (sorry\ (for|to)|unable|not\ able)
      | let\ me\ know\ if | feel\ free\ to\ (ask|reach) | if\ you\ have\ any\ (other|more|further|questions) )""",
    re.IGNORECASE | re.VERBOSE,
)
_ASKS_FOR_TEXT = re.compile(
    r"\b((re)?write|draft|compose|e-mail|message|letter|note|reply|toast|dialogue|postcard|poem|story|politely)\b"
    r"|^(ask|tell\ the|let\ a|thank|accept|resign|confirm|remind|apologi[sz]e|turn\ this|make\ this)\b",
    re.IGNORECASE,
)
_FUNCTION_WORDS_TEXT = """
a about above after again all also always am an and another any are aren't as at away be because been before being
below best better between both brief but by can can't cannot come compare could describe did didn't difference do does
doesn't doing don't down draft e.g each either else enough even ever every example explain few first for from further
get gets give gives go goes going good got had has have haven't having he help her here hers him his how however i i'd
i'll i'm i've i.e if in into is isn't it it's its itself just keep kind know let like long longer made make makes many
may me mean means might mine more most much must my need never new no nor not now of off often on once one only or
other our ours out over own part per put really right same say says see sentence sentences she short should show shows
simple simply so some someone something still such suggest take tell than that that's the their theirs them then there
there's these they thing things this those though three through to too two under until up us use used using very want
was way ways we well were what what's when where whether which while who whom whose why will with within without won't
word words would write you you'd you'll you're your yours yourself
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORDS_TEXT.split())


@dataclass(frozen=True)
class Score:
    """`total`: product of `parts`, each in 0..1."""

    total: float
    parts: dict[str, float]


def score(prompt: str, response: str) -> Score:
    """Score one response to one prompt; pure and deterministic."""
    parts = {
        "length": _length(response),
        "direct": _direct(prompt, response),
        "fresh": _fresh(response),
        "complete": 1.0 if _is_complete(response) else 0.4,
        "own": _own(prompt, response),
        "topic": _topic(prompt, response),
    }
    return Score(total=math.prod(parts.values()), parts=parts)


def rate(prompt: Sequence[Mapping[str, Any]], response: str, row: Mapping[str, Any]) -> float:
    """The total, for `simpo score`: of a response to the last turn of a prompt."""
    return score(prompt[-1]["content"], response).total


def repetition(response: str) -> float:
    """Share of 4-word runs that occurred before in the response, 0..1; 0 for under five words."""
    runs = _runs(_words(response))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def count_words(response: str) -> int:
    """Words as the rule counts them."""
    return len(_words(response))


def _length(response: str) -> float:
    count = count_words(response)
    if count < MIN_WORDS:
        return count / MIN_WORDS
    return 1.0 if count <= MAX_WORDS else (MAX_WORDS / count) ** 2


def _direct(prompt: str, response: str) -> float:
    text = response.replace("\u2019", "'")
    letter = _ASKS_FOR_TEXT.search(prompt)
    if _OPENERS.match(text) or (not letter and _GREETINGS.match(text)):
        return 0.5
    return 0.6 if _FILLER.search(text) or (not letter and _COURTESIES.search(text)) else 1.0


def _fresh(response: str) -> float:
    sentences = [" ".join(_words(s)) for s in re.split(r"(?<=[.!?])\s+|\n+", response)]
    sentences = [s for s in sentences if s.count(" ") >= 2]
    repeated = 1 - len(set(sentences)) / len(sentences) if sentences else 0.0
    # "Habits are about habits. The habits you have are habits.": few repeated runs, yet one word does all the work.
    counts = Counter(w for w in _words(response) if w not in _FUNCTION_WORDS and len(w) > 2).most_common(1)
    worn = counts[0][1] / count_words(response) - 0.1 if counts and counts[0][1] >= 4 else 0.0
    return max(0.0, 1 - 3 * max(repetition(response), repeated) - 4 * max(0.0, worn))


def _is_complete(response: str) -> bool:
    text = response.rstrip()
    if text.count("```") % 2:  # cut inside a code block
        return False
    if text.endswith("```"):
        return True
    lines = text.splitlines()
    # A letter ends with its signature: "Best regards," and a name.
    if len(lines) > 1 and lines[-1].strip() and count_words(lines[-1]) <= 4:
        greeting = next((line for line in reversed(lines[:-1]) if line.strip()), "")
        if greeting.rstrip().endswith(",") and count_words(greeting) <= 4:
            return True
    # The last character under closing quotes, brackets and markdown; "3." alone is the start of a list item.
    core = text.rstrip("\"'\u201d\u2019)]*_` ")
    return core.endswith((".", "!", "?", "\u2026")) and not re.search(r"(^|\s)\d+\.$", core.split("\n")[-1].strip())


def _own(prompt: str, response: str) -> float:
    asked, runs = set(_runs(_words(prompt))), _runs(_words(response))
    if not runs:
        return 0.0 if response.strip() and _words(response) == _words(prompt) else 1.0
    copied = sum(run in asked for run in runs) / len(runs)
    return min(1.0, max(0.0, (0.5 - copied) / 0.4))


def _topic(prompt: str, response: str) -> float:
    asked = _stems(prompt)
    if not asked:
        return 1.0
    return 0.4 + 0.6 * min(1.0, 2 * len(asked & _stems(response)) / len(asked))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['-]\w+)*", text.lower().replace("\u2019", "'"))


def _runs(words: list[str], size: int = 4) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]


def _stems(text: str) -> set[str]:
    """Content words by their first five letters, so that "freezing" meets "freeze"; numbers as they are."""
    return {w[:5] for w in _words(text) if w not in _FUNCTION_WORDS and (len(w) > 2 or w.isdigit())}
