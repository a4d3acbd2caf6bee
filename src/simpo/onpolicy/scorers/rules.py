r"""Transparent rules, and functions of the user's own: from one response to a number.

Each rule is a function of its options, the row and the response, under the name of its kind in RULES; higher is better.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from simpo.core.own_loss import find_function
from simpo.data.cleaning import is_truncated
from simpo.data.columns import RowError, kind_of
from simpo.data.language import identify_language, known_languages
from simpo.data.near import split_words
from simpo.evaluation.statistics import repeated_share
from simpo.onpolicy.scorers.rating import Rater, Row, column, rate_each, rate_rows

Response = Mapping[str, Any]

_READING = {"math": 2}  # raised where what is taken for an answer, or for an equal one, changes
_REGEX_S = 5.0  # on one response; a pattern that takes longer would hardly come to an end


def build(kind: str, options: Any) -> Rater:
    """The scorer of a rule's kind, or of a function."""
    if kind == "function":
        return _own_function(options)
    identity: dict[str, Any] = {"reading": _READING[kind]} if kind in _READING else {}
    if kind == "language":
        if unknown := sorted({*(options.languages or ())} - {*known_languages()}):
            raise ValueError(f"languages: {unknown[0]!r} is not among {', '.join(known_languages())}")
        identity["py3langid"] = version("py3langid")
    elif kind == "math" and options.compare == "symbolic":
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("compare: symbolic needs math-verify: pip install 'simpo[math]'")
        identity["math-verify"] = version("math-verify")
    return Rater(rate_each(functools.partial(RULES[kind], options)), identity)


# --- a function of the user's own ------------------------------------------------------------------------------------


def _own_function(options: Any) -> Rater:
    function = find_function(options.function, "function")
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some built-in ones do not say
        names = []

    def rate(row: Row) -> list[Any]:
        texts = [response["text"] for response in row["responses"]]
        if names[1:2] != ["responses"]:
            return [function(row["prompt"], text, row, **options.options) for text in texts]
        returned = function(row["prompt"], texts, row, **options.options)
        if not isinstance(returned, Iterable):
            raise RowError("raised", f"{options.function} returned {kind_of(returned)}, not one for each response")
        scores = list(returned)
        if len(scores) != len(texts):
            raise RowError("raised", f"{options.function} returned {len(scores)} numbers for {len(texts)} responses")
        return scores

    module = inspect.getmodule(function)
    return Rater(rate_rows(rate), {"source": _source_digest(module) if module else None})


@functools.cache
def _source_digest(module: ModuleType) -> str | None:
    """Of a module's file, as it was when this process first asked: what is loaded stays if the file changes."""
    path = getattr(module, "__file__", None)
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest() if path else None


# --- rules -----------------------------------------------------------------------------------------------------------


def length(options: Any, row: Row, response: Response) -> float:
    if options.unit == "tokens":
        count = response.get("num_tokens")
        if count is None:
            raise RowError("no num_tokens", "a response does not say how many tokens it has; count words instead")
    else:
        count = len(split_words(response["text"]) if options.unit == "words" else response["text"])
    if options.min is None and options.max is None:
        return float(count)
    at_least, at_most = options.min or 0, options.max or count
    return min(1.0, count / at_least if at_least else 1.0, at_most / count if count else 1.0)


def repetition(options: Any, row: Row, response: Response) -> float:
    return 1 - repeated_share(split_words(response["text"]))  # type: ignore[arg-type]  any items will do


def language(options: Any, row: Row, response: Response) -> float:
    wanted = options.languages or [_language_of(row["prompt"][-1]["content"])[0]]
    found, confidence = _language_of(response["text"])
    if None in (found, *wanted):
        return 0.5
    return confidence if found in wanted else 0.0


@functools.lru_cache(maxsize=8)
def _language_of(text: str) -> tuple[str | None, float]:
    return identify_language(text) or (None, 0.0)


_BLOCK = re.compile(r"^```[^\n`]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +\S", re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t]+\S", re.MULTILINE)
_TABLE = re.compile(r"^[^\n]*\|[^\n]*\n[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$", re.MULTILINE)


def has_forms(options: Any, row: Row, response: Response) -> float:
    text = response["text"]
    return sum(_has(form, text) for form in options.has) / len(options.has)


def _has(form: str, text: str) -> bool:
    blocks, prose = _BLOCK.findall(text), _BLOCK.sub("", text)
    match form:
        case "json":
            return _is_json(blocks[0] if len(blocks) == 1 and not prose.strip() else text)
        case "code_block":
            return bool(blocks)
        case "heading":
            return bool(_HEADING.search(prose))
        case "list":
            return len(_ITEM.findall(prose)) > 1
        case "table":
            return any("|" in found for found in _TABLE.findall(prose))
        case "plain":
            return not any(_has(each, text) for each in ("code_block", "heading", "list", "table"))
        case _:  # "ends"
            return bool(text.strip()) and not is_truncated(text)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def matches(options: Any, row: Row, response: Response) -> float:
    import regex

    try:
        return float(regex.search(options.pattern, response["text"], timeout=_REGEX_S) is not None)
    except TimeoutError:
        raise RowError("slow pattern", f"{options.pattern!r} took over {_REGEX_S:g} s on a response") from None


# --- exact answers of maths ------------------------------------------------------------------------------------------

_SAYS = re.compile(  # but not the first item of a list below it
    r"answer(?:\s+is|\s*\*{0,2}\s*[:=])\s*+\**+\s*+:?+\s*+(?!(?<=\n)\d+[.)][ \t])([^\n]+)", re.IGNORECASE
)
_HASHES = re.compile(r"(?<!#)####(?!#)\s*(?!\d+[.)][ \t]+\S)(?:(?=[-+$\\(*]*\.?\d)|(?=[^\n]*\s*\Z))([^\n]*)")
_END = re.compile(
    r"[.!?](?=[\s*\"']|$)|;|(?<!\s),?\s+(?:because|since|as|which|where|given|due)\b|(?<!\s)\s+[\u2013\u2014-]\s+(?=[^\W\d_]{3})"
)
_PIECE = re.compile(r"\$[^$\n]+\$|\\[(\[].+?\\[)\]]|[-+]?\d+ +\d+/\d+\S*|\S*[\w%](?= +[A-Za-z]) +[A-Za-z]+|\S+")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|[mh]box)\s*\{([^{}]*)\}")
_ORNAMENTS = re.compile(r"\\left|\\right|\\[!,;: ]|\\[()\[\]]|\^\{?\\circ\}?|\\?%|\\?\$|\*\*|~|\s")

_NUMBER = re.compile(  # the first form is a mixed number, 1 1/2
    r"[-+]?(?:\d+\s+\d+/\d+|(?:\d+(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:/\d+)?)"
    r"(?:\s+(?i:million|billion|trillion)\b)?"  # as PRM800K's grader reads them
)
_POWERS = {"million": 10**6, "billion": 10**9, "trillion": 10**12}
_SPELLINGS = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"</?[A-Za-z]\w*>", " "),
        (r"\\!|\\left|\\right|\\displaystyle|\\?[$%]|\^ *\{?\\circ\}?|°|\\[()\[\]{}]", ""),
        (r"\\[,;: ]|~|\\quad", " "),
        (r"\{,\}", ","),
        (_TEXT, r" \1 "),
        (r"\\(?:times|cdot|div)\b", "\u00d7"),
        (r"\\approx\b", "≈"),
        (r"(?<!\w)[*_]+(?=[\w.-])|(?<=[\w.])[*_]+(?!\w)", ""),  # Markdown's emphasis
        (r"(?<=\d)\s+(?=\d{3}(?!\d))", ""),  # 10 000
        (r"(?<=\d)\s*(?=\\[dt]?frac|[¼-¾⅐-⅞])", " "),
        (r"[¼-¾⅐-⅞]", lambda found: unicodedata.normalize("NFKC", found[0]).replace("\u2044", "/")),
        (r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", r"\1\2/\3\4"),
        (r"(?<=\d)\s*/\s*(?=\d)", "/"),
        (r"^\s*-\s+|\b(?:[Nn]egative|[Mm]inus)\s+(?=[\d.])", "-"),
        (r"(?<![A-Za-z])([A-Za-z]{2,}|[ms])\s*(?:\^\s*\{?-?[1-3]\}?|[²³])", r"\1"),  # cm^2
        (r"/(?=[^\W\d_]{2})|(?<=[^\W\d_])/(?=[^\W\d_])", " per "),  # km/h
        (r"(?<=[^\W_])-(?=[^\W\d_]{2})", " "),  # 5-minute
        (r"\b[aI]\s+(?=[A-Za-z]{2})", ""),  # $18 a day
    )
]
_LEFT_SIDE = re.compile(  # of x = 5, and of 9 + 9 = 18
    r"^\s*+(?:(?:\\[A-Za-z]+\s*|[A-Za-z][^\d=≈<>\\^!]*|[-\d\s.,()+*/\u00d7÷·]*)[=≈]\s*+)+"
)
_OPERATOR = re.compile(r"[\\^_!=≈<>+*/|\u00d7÷·⋅±≤≥≠√∛∞∑∫∏…²³⁰-⁹万萬億亿千百-]|\.\.\.")
_LETTERS = "A-Za-z\u0370-\u03ff"  # those of formulas
_WORD = re.compile(f"[{_LETTERS}]+")
_TOUCHING = re.compile(f"(?<=#)[{_LETTERS}]+|(?<![{_LETTERS}])[{_LETTERS}]+(?=#)")
_SHORT = re.compile(  # 5 m may be metres; 5m, which is as often a formula, is asked about apart
    r"[mgshlLCFNJWV]|(?i:[ckm]?m|[km]g|[cm]l|lbs?|ft|in|yd|mi|oz|hrs?|min|sec|[km]ph|hz|pa|k[jwn]|[kmgt]b|[ap]m|sq|st|nd|"
    r"rd|th|us|rs|usd|eur|an|as|at|be|by|do|he|if|is|it|my|no|of|on|or|so|to|up|we|de|du|en|et|la|le|un|es|el|zu|im|di)"
)
_CHANGING = re.compile(  # words that make another number, or a bound, of the one beside them
    r"\b(?:not|than|above|below|half|twice|double|triple|minus|negative|sqrt|cbrt|root|log|ln|lg|exp|abs|mod|floor|ceil|"
    r"(?:a|arc)?(?:sin|cos|tan|cot|csc)h?)\b[^#]*#|"
    r"#\W*(?:dozen|hundred|thousand|\w*illions?|squared|cubed|factorial)\b",
    re.IGNORECASE,
)


def answers_rightly(options: Any, row: Row, response: Response) -> float:
    reference, text = (each.replace("\u2212", "-") for each in (str(column(row, options.reference)), response["text"]))
    stated = stated_answers(reference) or [reference]
    wanted = next((each for each in stated if _wanted_number(each)), stated[0])
    given = stated_answers(text) or [_unmarked_answer(text, wanted)]
    same = _is_same if options.compare == "exact" else _is_equivalent
    return float(any(same(wanted, each) for each in given))


def stated_answers(text: str) -> list[str]:
    r"""The last \boxed{...}, else what follows the last ####, else the last "answer is" or "Answer:"; [] without.

    After "answer is" come the line and what of it is left without what follows the sentence or gives reasons.
    """
    begin = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if begin >= 0:
        begin, depth = text.index("{", begin), 0
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return [text[begin + 1 : place]]
    if marked := _HASHES.findall(text):
        return [marked[-1]]
    said = _SAYS.findall(text)
    return [said[-1], _END.split(said[-1], maxsplit=1)[0]] if said else []


def _unmarked_answer(text: str, wanted: str) -> str:
    """What a response that marks no answer may mean: the last that has a number, or where none is wanted all of it."""
    numbers = [piece for piece in _PIECE.findall(text) if re.search(r"\d", piece)] if _wanted_number(wanted) else []
    return numbers[-1].rstrip("!") if numbers else text


def _wanted_number(reference: str) -> tuple[Fraction, set[str]] | None:
    """As read_number, where a reference begins with it and few words follow: neither "Apollo 11" nor "y = 5"."""
    found = None if re.match(r"[^\d\\]*[^\W\d]|[^=]*[=≈]", reference) else read_number(reference)
    return found if found and len(found[1]) < 5 else None


def read_number(text: str) -> tuple[Fraction, set[str]] | None:
    """The only number of an answer and the words behind it; None where anything but words and signs of money stands by.

    A short run of letters is a word if it is a known one; others are variables.
    """
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    text = _LEFT_SIDE.sub("", text)
    found = _NUMBER.findall(text)
    if len(found) != 1:
        return None
    beside = text.replace(found[0], "#")
    words, touching = _WORD.findall(beside), _TOUCHING.findall(beside)
    if (
        _OPERATOR.search(beside)
        or _CHANGING.search(beside)
        or not all(len(word) > 2 or _SHORT.fullmatch(word) for word in words)
        or not all(len(word) > 3 or (len(word) > 1 and _SHORT.fullmatch(word)) for word in touching)
    ):
        return None
    *parts, last = found[0].lstrip("+-").replace(",", "").split()
    scale = _POWERS.get(last.casefold())
    fractions = [part.partition("/") for part in (parts if scale else (*parts, last))]
    try:
        number = sum((Fraction(over) / Fraction(under or 1) for over, _, under in fractions), Fraction()) * (scale or 1)
    except (ValueError, ZeroDivisionError):
        return None
    unit = {word.casefold().rstrip("s") or word for word in _WORD.findall(beside.partition("#")[2])}
    return -number if found[0].startswith("-") else number, unit


def _plain(text: str) -> str:
    text = _TEXT.sub(r"\1", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    text = re.sub(r"(?<=[^\W\d_]{2})!+$", "", _ORNAMENTS.sub("", text)).rstrip(".,;:").casefold()
    return re.sub(r"^\(([^(),]*)\)$", r"\1", text)


def _is_same(wanted: str, given: str) -> bool:
    number = _wanted_number(wanted)
    if number is None:
        return _plain(wanted) == _plain(given)
    found = read_number(given)
    if found is None or found[0] != number[0]:
        return False
    return not number[1] or not found[1] or number[1] <= found[1] or found[1] <= number[1]


def _is_equivalent(wanted: str, given: str) -> bool:
    from math_verify import parse, verify

    if _is_same(wanted, given):
        return True
    if _wanted_number(wanted):
        given = _LEFT_SIDE.sub("", _TEXT.sub(r"\1", given.strip().strip("$")).replace("π", r"\pi ").rstrip(".,;:"))
        if not given.isascii() or re.search(r"[A-Za-df-hj-z]", re.sub(r"\\[A-Za-z]+", "", given)):
            return False  # no number has variables or words in it, which math-verify may leave out
    gold, found = (parse(f"${text.strip().strip('$')}$") for text in (wanted, given))
    return verify(gold, found)


RULES: dict[str, Callable[[Any, Row, Response], float]] = {
    "length": length,
    "repetition": repetition,
    "language": language,
    "format": has_forms,
    "regex": matches,
    "math": answers_rightly,
}
"""Kind -> its rule."""
