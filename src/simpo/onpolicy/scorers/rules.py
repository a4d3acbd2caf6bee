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
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from simpo.onpolicy.scorers.rating import Rater, Row, Scores, column, guarded, rate_each

Response = Mapping[str, Any]

_REGEX_S = 5.0  # on one response; a pattern that takes longer would hardly come to an end


def build(kind: str, options: Any) -> Rater:
    """The scorer of a rule's kind, or of a function."""
    if kind == "function":
        return _own_function(options)
    packages = []
    if kind == "language":
        packages = ["py3langid"]
        if unknown := sorted({*(options.languages or ())} - {*known_languages()}):
            raise ValueError(f"languages: {unknown[0]!r} is not among {', '.join(known_languages())}")
    elif kind == "math" and options.compare == "symbolic":
        packages = ["math-verify"]
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("compare: symbolic needs math-verify: pip install 'simpo[math]'")
    versions = {package: version(package) for package in packages}
    return Rater(rate_each(functools.partial(RULES[kind], options)), versions)


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

    def rate_rows(rows: Iterable[Row]) -> Iterator[tuple[str, Scores]]:
        for row in rows:
            yield row["id"], guarded(lambda row=row: rate(row))

    module = inspect.getmodule(function)
    return Rater(rate_rows, {"source": _source_digest(module) if module else None})


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

_NUMBERS = re.compile(r"[-+]?(?:\d+(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:/\d+)?")
_SAYS = re.compile(r"answer(?:\s+is|\s*\*{0,2}\s*[:=])\s*\**\s*:?\s*([^\n]+)", re.IGNORECASE)
_ORNAMENTS = re.compile(r"\\left|\\right|\\[!,;: ]|\\[()\[\]]|\^\{?\\circ\}?|\\?%|\\?\$|\*\*|~|\s")


def answers_rightly(options: Any, row: Row, response: Response) -> float:
    reference = str(column(row, options.reference))
    wanted = stated_answer(reference) or reference
    given = stated_answer(response["text"]) or _unmarked_answer(
        response["text"], is_number=as_number(wanted) is not None
    )
    return float((_is_same if options.compare == "exact" else _is_equivalent)(wanted, given))


def stated_answer(text: str) -> str | None:
    r"""The last \boxed{...}, else what follows the last ####, else the last "answer is" or "Answer:"; None without."""
    begin = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if begin >= 0:
        begin, depth = text.index("{", begin), 0
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[begin + 1 : place]
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    said = _SAYS.findall(text)
    return said[-1] if said else None


def _unmarked_answer(text: str, *, is_number: bool) -> str:
    """What a response that marks no answer may mean: its last number, or where no number is wanted all that it says."""
    numbers = _NUMBERS.findall(text.replace("$", "")) if is_number else []
    return numbers[-1] if numbers else text


def as_number(text: str) -> Fraction | None:
    """The number that an answer is, without LaTeX, units and what else stands around it; None for other answers."""
    plain = _plain(text)
    plain = re.sub(r"\\frac\{?(-?\d+)\}?\{?(\d+)\}?", r"\1/\2", plain)
    found = plain if _NUMBERS.fullmatch(plain) else None
    try:
        return Fraction(found.replace(",", "").removeprefix("+")) if found else None
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    text = re.sub(
        r"\\(?:text|mathrm|mbox|textbf)\{([^{}]*)\}",
        r"\1",
        text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"),
    )
    return _ORNAMENTS.sub("", text).rstrip(".,;:!").casefold()


def _is_same(wanted: str, given: str) -> bool:
    number = as_number(wanted)
    if number is None:
        return _plain(wanted) == _plain(given)
    found = as_number(given)
    if found is None:  # "18 eggs", "$18 a day": a unit may stand with one number
        numbers = _NUMBERS.findall(given.replace("$", ""))
        found = as_number(numbers[0]) if len(numbers) == 1 else None
    return found == number


def _is_equivalent(wanted: str, given: str) -> bool:
    from math_verify import parse, verify

    gold, found = (parse(f"${text.strip().strip('$')}$") for text in (wanted, given))
    return _is_same(wanted, given) or verify(gold, found)


RULES: dict[str, Callable[[Any, Row, Response], float]] = {
    "length": length,
    "repetition": repetition,
    "language": language,
    "format": has_forms,
    "regex": matches,
    "math": answers_rightly,
}
"""Kind -> its rule."""
