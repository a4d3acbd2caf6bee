"""Owns what the columns of a row are called and what their cells hold: answers, scores, lists written as text.

Pure Python, of one row at a time. What a cell cannot be is a `RowError`, for the ledger to count. Messages are read in
`preferences`.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import numbers
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "input", *MESSAGE_COLUMNS)
CHOSEN_COLUMNS = ("chosen", "response_chosen", "winner", "preferred", "chosen_response")
REJECTED_COLUMNS = ("rejected", "response_rejected", "loser", "rejected_response")
SCORED_COLUMNS = (
    ("all_generated_responses", "all_rm_scores"),
    ("responses", "scores"),
    ("completions", "scores"),
)
SCORE_PAIR_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
_SCORES = frozenset(itertools.chain.from_iterable((*SCORED_COLUMNS, *SCORE_PAIR_COLUMNS)))
_OF_A_PAIR = _SCORES.union(CHOSEN_COLUMNS, REJECTED_COLUMNS)
PREFERENCE_COLUMNS = (
    ("response1", "response2", "overall_preference"),
    ("response_1", "response_2", "preference_strength"),
)
"""Two answers, and a number: below 0 the first is better, above 0 the second (HelpSteer3, HelpSteer2-Preference)."""
ANSWER_COLUMNS = ("response", "completion", "answer")
SCORE_COLUMNS = ("helpfulness", "score")
"""One answer a row, and its score: rows of one prompt are brought together (HelpSteer)."""
SYSTEM_COLUMNS = ("system", "system_prompt")


class RowError(Exception):
    """Why one row gives no pair.

    Args:
        reason: short and countable, such as "missing column".
        detail: one sentence about this row.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def find_column(row: Mapping, names: Sequence[str], what: str) -> Any:
    """The first value that is not null under one of `names`."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise missing_column(row, names, what)


def missing_column(row: Mapping, names: Sequence[str], what: str) -> RowError:
    present = [name for name in names if name in row]
    if present:
        return RowError("empty", f"{what} ({present[0]}) is null")
    looked_for = ", ".join(names)
    has = ", ".join(str(name) for name in list(row)[:12]) or "no columns"
    if len(row) == 1 and (found := re.search(r"[;|]|\t", has)):
        has = f"one, named {has!r}: separate columns by a comma, or a tab in a .tsv file, not by {found[0]!r}"
    return RowError("missing column", f"no {what} column (looked for {looked_for}); the row has {has}")


def our_columns(row: Mapping) -> Mapping:
    """The row under our columns, where it is laid out as ms-swift's or HelpSteer's pairs are; else as it is."""

    def has(*names: str) -> bool:
        return any(row.get(name) is not None for name in names)

    if has(*CHOSEN_COLUMNS):
        return row
    turns = decode_list(row.get("messages"))
    if has("rejected_messages"):
        return {**row, "messages": None, "chosen": turns, "rejected": decode_list(row["rejected_messages"])}
    if has("rejected_response"):
        if has("response", "output"):
            return {**row, "chosen": find_column(row, ("response", "output"), "chosen")}
        return {**row, "messages": turns[:-1], "chosen": turns[-1:]} if isinstance(turns, list) else row
    for first, second, name in PREFERENCE_COLUMNS:
        if has(name) and has(first, second):
            strength = _number(row[name])
            if strength is None:
                raise RowError("malformed", f"{name} is {kind_of(row[name])}, expected a number")
            if not strength:
                raise RowError("tie", f"{name} is 0")
            chosen, rejected = (first, second) if strength < 0 else (second, first)
            prompt = row.get("context") if row.get("prompt") is None else row["prompt"]
            return {**row, "prompt": prompt, "chosen": row.get(chosen), "rejected": row.get(rejected)}
    if has("label") and has(*ANSWER_COLUMNS) and not has(*REJECTED_COLUMNS):
        raise RowError("unpaired", "one answer with a label; a pair is two answers to one prompt, chosen and rejected")
    return row


def scored_answer(row: Any, score_column: str | None) -> tuple[str, str] | None:
    """The columns of the answer and its score in a row that has one answer; None for every other row."""
    if not isinstance(row, Mapping):
        return None
    several = (*CHOSEN_COLUMNS, *REJECTED_COLUMNS, "rejected_messages")
    several += tuple(names[0] for names in (*SCORED_COLUMNS, *PREFERENCE_COLUMNS))
    if any(row.get(name) is not None for name in several):
        return None
    answer, score = (
        next((name for name in names if row.get(name) is not None), None)
        for names in (ANSWER_COLUMNS, (score_column,) if score_column else SCORE_COLUMNS)
    )
    return (answer, score) if answer and score else None


def raw_answers(row: Mapping, chosen_column: str | None, rejected_column: str | None) -> tuple[Any, Any]:
    """The raw chosen and rejected values, from their columns, an Alpaca pair or a scored list."""
    if not (chosen_column or rejected_column or _names_pair(row)):
        if (found := _read_list(row)) is not None:
            best, worst = found.ends
            if found.scores[best] == found.scores[worst]:
                raise RowError("tie", f"all {len(found.scores)} scores equal {found.scores[best]:g}")
            return found.responses[best], found.responses[worst]
        output = decode_list(row.get("output"))
        if isinstance(output, list):
            if len(output) != 2:
                raise RowError("malformed", f"output has {len(output)} entries, expected [chosen, rejected]")
            return output[0], output[1]
    chosen_names = (chosen_column,) if chosen_column else CHOSEN_COLUMNS
    rejected_names = (rejected_column,) if rejected_column else REJECTED_COLUMNS
    try:
        return find_column(row, chosen_names, "chosen"), find_column(row, rejected_names, "rejected")
    except RowError as error:
        if not (chosen_column or rejected_column) or (columns := _list_columns(row)) is None:
            raise
        advice = "is not read where chosen_column or rejected_column is given: name both, or neither"
        raise RowError(error.reason, f"{error.detail}; the list ({', '.join(columns)}) {advice}") from None


def _scores(values: Any) -> list[float]:
    values = decode_list(values)
    if not isinstance(values, list):
        raise RowError("malformed", f"scores are {kind_of(values)}, expected a list of numbers")
    scores = [number for number in map(_number, values) if number is not None]
    if len(scores) < len(values):
        raise RowError("malformed", "scores must be finite numbers (found NaN, infinity, null or text)")
    return scores


def _number(value: Any) -> float | None:
    """`value`, or the number that a cell of text holds, as a finite float; else None."""
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real | Decimal):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


class _List(NamedTuple):
    """A scored list, and where in it the two responses of the row's pair stand."""

    responses: list[Any]
    scores: list[float]
    ends: tuple[int, int]


def _list_columns(row: Mapping) -> tuple[str, str] | None:
    return next((each for each in SCORED_COLUMNS if all(row.get(name) is not None for name in each)), None)


def _read_list(row: Mapping) -> _List | None:
    """None where there is none; where chosen and rejected are named too, also for one that they are not in.

    Raises:
        RowError: it cannot be read, and is all that the row has.
    """
    if (columns := _list_columns(row)) is None:
        return None
    names_pair = _names_pair(row)
    try:
        responses, scores = _responses_and_scores(row[columns[0]], row[columns[1]])
        if not names_pair:
            return _List(responses, scores, (scores.index(max(scores)), scores.index(min(scores))))
        sides = [_last_text(find_column(row, names, "")) for names in (CHOSEN_COLUMNS, REJECTED_COLUMNS)]
    except RowError:
        if names_pair:
            return None
        raise
    texts = [_last_text(each) for each in responses]
    if not all(side is not None and side in texts for side in sides):
        return None
    return _List(responses, scores, (texts.index(sides[0]), texts.index(sides[1])))


def _responses_and_scores(responses: Any, scores: Any) -> tuple[list[Any], list[float]]:
    responses, scores = decode_list(responses), _scores(scores)
    if not isinstance(responses, list) or len(responses) != len(scores):
        count = len(responses) if isinstance(responses, list) else kind_of(responses)
        raise RowError("malformed", f"{count} responses but {len(scores)} scores")
    if len(scores) < 2:
        raise RowError("malformed", f"{len(scores)} scored responses, at least 2 are needed")
    return responses, scores


def _names_pair(row: Mapping) -> bool:
    # A table has every column in every row, and null where another row has something.
    return any(row.get(name) is not None for name in (*CHOSEN_COLUMNS, *REJECTED_COLUMNS))


def _last_text(answer: Any) -> str | None:
    """The words of an answer, or of the last turn of a dialogue."""
    if isinstance(answer, list) and answer:
        answer = answer[-1]
    text = answer.get("content", answer.get("value")) if isinstance(answer, Mapping) else answer
    return text.strip() if isinstance(text, str) else None


def _in_its_place(answer: Any, response: Any) -> Any:
    """A dialogue with another last answer; the response itself where `answer` is none."""
    if not (isinstance(answer, list) and answer and isinstance(answer[-1], Mapping) and isinstance(response, str)):
        return response
    name = "content" if "content" in answer[-1] else "value"
    return [*answer[:-1], {**answer[-1], name: response}]


def between(row: Mapping) -> list[tuple[dict, float]]:
    """Of a scored list, for each response besides the pair's a row of the chosen one against it, and its score.

    The pair is the best against the worst, or what chosen and rejected name. Empty for every other row.
    """
    if (found := _read_list(row)) is None:
        return []
    chosen = find_column(row, CHOSEN_COLUMNS, "chosen") if _names_pair(row) else found.responses[found.ends[0]]
    row = {name: value for name, value in row.items() if name not in _OF_A_PAIR}
    return [
        ({**row, "chosen": chosen, "rejected": _in_its_place(chosen, found.responses[at])}, found.scores[at])
        for at in range(len(found.scores))
        if at not in found.ends
    ]


def read_scores(row: Mapping, *, lists: bool = True) -> tuple[float, float] | None:
    """The scores of chosen and rejected, where a row has both: with `lists` in a scored list, else in their columns."""
    if lists and (found := _read_list(row)) is not None:  # whose other scores are by the same scale
        return found.scores[found.ends[0]], found.scores[found.ends[1]]
    for names in SCORE_PAIR_COLUMNS:
        chosen, rejected = (_number(row.get(name)) for name in names)
        if chosen is not None and rejected is not None:
            return chosen, rejected
    return None


def without_scores(row: Mapping) -> Mapping:
    """A row that names its pair without what would make it a tie; every other row as it is."""
    return {name: value for name, value in row.items() if name not in _SCORES} if _names_pair(row) else row


def drop_ties(row: Mapping) -> None:
    """A pair whose two sides were scored equal says nothing about preference."""
    for chosen_name, rejected_name in SCORE_PAIR_COLUMNS:
        chosen, rejected = _number(row.get(chosen_name)), _number(row.get(rejected_name))
        if chosen is not None and chosen == rejected:
            raise RowError("tie", f"{chosen_name} and {rejected_name} are both {chosen:g}")


def kind_of(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def decode_list(value: Any) -> Any:
    """A list (or one object) written as text, in JSON or as pandas writes it; anything else unchanged.

    For the cells of columns that hold lists, never for an answer's text.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] == "{" and text[-1:] == "}":
        text = f"[{text}]"
    if text[:1] != "[" or text[-1:] != "]":
        return value
    decoded = _parsed(text)
    decoded = _python_list(text) if decoded is None else decoded
    return decoded if isinstance(decoded, list) else value


def _parsed(text: str) -> Any:
    """What JSON text stands for; None for any other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def type_cells(row: Mapping[str, Any], messages: Collection[str]) -> dict[str, Any]:
    """A row of a format that knows only text, with the types that other formats would have.

    An empty cell is null. Of columns only those of messages are decoded: lists and scores are read where their columns
    are, and everything else is text, whatever it looks like.

    Args:
        messages: what `message_columns` found in all rows.
    """
    return {name: (decode_list(cell) if name in messages else cell) if cell else None for name, cell in row.items()}


def messages_as_text(rows: Sequence[Any]) -> list[str]:
    """Columns that `type_cells` would read as messages, in rows of a format in which they are text, and stay it."""
    first = [row for row in rows[:100] if isinstance(row, Mapping)]
    texts = dict.fromkeys(name for row in first for name, cell in row.items() if isinstance(cell, str))
    cells = [{name: row[name] if isinstance(row.get(name), str) else None for name in texts} for row in first]
    return [
        name
        for name in message_columns(cells)
        if name not in MESSAGE_COLUMNS and all(isinstance(row.get(name), str | None) for row in first)
    ]


def message_columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns whose every cell of text is messages; those of answers only together.

    Reads as far as it must: to the row behind which no column is left that could be one.

    Args:
        rows: all with the same columns.
    """
    names: list[str] = []
    found, text, answers = set(), set(), set()
    for row in rows:
        names = names or list(row)
        for name, cell in row.items():
            if cell and name not in text:
                decoded = decode_list(cell)
                found.update([name] if decoded else ())
                text.update([] if _are_messages(decoded) else [name])
                answers.update({name} & {*CHOSEN_COLUMNS, *REJECTED_COLUMNS})
        if len(text) == len(row):
            break
    found -= text
    return [name for name in names if name in found and (answers <= found or name not in answers)]


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and ("role" in item or "from" in item) for item in value
    )


def _python_list(text: str) -> Any:
    """pandas writes lists of dicts into CSV as Python literals."""
    if not text.startswith(("[{'", '[{"', "['", '["')):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
