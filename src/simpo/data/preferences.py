"""Owns one thing: turning a row of any accepted shape into one canonical `Pair`, or a `RowError` saying why not.

Pure Python: no tokenizer, no files, no torch. Every row that JSON can express gives a pair or a `RowError`;
no other exception leaves `pair_from_row`.

Shapes accepted: prompt/chosen/rejected as strings or message lists; whole dialogues in chosen and rejected
(implicit prompt); `messages` or ShareGPT `conversations` with chosen/rejected; Anthropic "\\n\\nHuman:" transcripts;
Alpaca pairs (`output: [chosen, rejected]`); scored lists (`all_generated_responses`, `all_rm_scores`); message lists
written as JSON inside a CSV cell; and the column aliases below.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "input", "messages", "conversations", "conversation")
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
SYSTEM_COLUMNS = ("system", "system_prompt")

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
}

_SIDES = ("chosen", "rejected")
_TURN = re.compile(r"\n\n(Human|Assistant):")


class RowError(Exception):
    """Why one row gives no pair.

    Args:
        reason: short and countable: "missing column", "empty", "identical", "malformed" or "tie" here;
            tokenising adds "template", "overlong", "no prompt" and "identical after truncation".
        detail: one sentence about this row.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with a preferred and a less preferred response.

    `prompt` is a plain string, or messages that end with a user turn (a system turn may come first).
    `chosen` and `rejected` are the text of one assistant turn each, never blank, never equal.
    """

    row_id: str
    prompt: str | list[Message]
    chosen: str
    rejected: str

    @property
    def turns(self) -> list[Message]:
        """The prompt as messages: a string is one user turn."""
        return _as_turns(self.prompt)

    def key(self, *texts: str) -> int:
        """A 64-bit hash of the prompt's turns, and of further texts."""
        digest = hashlib.blake2b(digest_size=8)
        for text in (*(part for turn in self.turns for part in turn.values()), *texts):
            content = text.encode()
            digest.update(b"%d " % len(content))
            digest.update(content)
        return int.from_bytes(digest.digest(), "little", signed=True)


def pair_reader(recipe: Any, *, empty_system: bool = False) -> Callable[..., Pair]:
    """`pair_from_row` with the recipe's columns and system prompt; can be sent to other processes."""
    return functools.partial(
        pair_from_row,
        prompt_column=recipe.prompt_column,
        chosen_column=recipe.chosen_column,
        rejected_column=recipe.rejected_column,
        system_prompt=recipe.system_prompt,
        empty_system=empty_system,
    )


def pair_from_row(
    row: Any,
    *,
    row_id: str = "",
    prompt_column: str | None = None,
    chosen_column: str | None = None,
    rejected_column: str | None = None,
    system_prompt: str | None = None,
    empty_system: bool = False,
) -> Pair:
    """Read one row of any accepted shape.

    Args:
        row: a mapping of column to value; a `Pair` that was read before, or the `RowError` of a row that cannot be.
        row_id: goes into the pair and nowhere else.
        prompt_column, chosen_column, rejected_column: look in this column only, instead of the known aliases.
        system_prompt: system message for rows that bring none of their own.
        empty_system: with no system message from either, insert an empty one.
    Raises:
        RowError: the row gives no pair.
    """
    if isinstance(row, RowError):
        raise row
    if isinstance(row, Pair):
        return dataclasses.replace(row, row_id=row_id)  # a later pass over the rows has names of its own
    if not isinstance(row, Mapping):
        raise RowError("malformed", f"the row is {_kind(row)}, expected an object with columns")
    _drop_ties(row)
    prompt_names = (prompt_column,) if prompt_column else PROMPT_COLUMNS
    sides = [_decoded(value, what) for value, what in zip(_responses(row, chosen_column, rejected_column), _SIDES)]
    if any(row.get(name) is not None for name in prompt_names):
        context = _prompt(row, prompt_names)
    elif any(isinstance(side, str) or len(side) < 2 for side in sides):
        raise _missing(row, prompt_names, "prompt")  # and no dialogue that holds one
    else:
        context = None
    (before_chosen, chosen_text), (before_rejected, rejected_text) = map(_last_turn, sides, _SIDES)
    if context is None:
        if before_chosen != before_rejected:
            raise RowError("malformed", "chosen and rejected differ before their last turn, so they share no prompt")
        context = before_chosen
    for before, what in zip((before_chosen, before_rejected), _SIDES):
        context = _same_prompt(context, before, what)
    context = _with_system(context, row, system_prompt, empty_system)
    _check_prompt(context)
    _check_texts(context, chosen_text, rejected_text)
    return Pair(row_id, context, chosen_text, rejected_text)


# --- columns ---------------------------------------------------------------------------------------------------------


def _find(row: Mapping, names: Sequence[str], what: str) -> Any:
    """The first value that is not null under one of `names`."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise _missing(row, names, what)


def _missing(row: Mapping, names: Sequence[str], what: str) -> RowError:
    present = [name for name in names if name in row]
    if present:
        return RowError("empty", f"{what} ({present[0]}) is null")
    looked_for = ", ".join(names)
    has = ", ".join(str(name) for name in list(row)[:12]) or "no columns"
    return RowError("missing column", f"no {what} column (looked for {looked_for}); the row has {has}")


def _responses(row: Mapping, chosen_column: str | None, rejected_column: str | None) -> tuple[Any, Any]:
    """The raw chosen and rejected values, from their columns, an Alpaca pair or a scored list."""
    chosen_names = (chosen_column,) if chosen_column else CHOSEN_COLUMNS
    rejected_names = (rejected_column,) if rejected_column else REJECTED_COLUMNS
    named = chosen_column or rejected_column or any(name in row for name in (*chosen_names, *rejected_names))
    if not named:
        for responses_name, scores_name in SCORED_COLUMNS:
            if responses_name in row and scores_name in row:
                return _best_and_worst(row[responses_name], row[scores_name])
        output = _decoded_list(row.get("output"))
        if isinstance(output, list):
            if len(output) != 2:
                raise RowError("malformed", f"output has {len(output)} entries, expected [chosen, rejected]")
            return output[0], output[1]
    return _find(row, chosen_names, "chosen"), _find(row, rejected_names, "rejected")


def _scores(values: Any) -> list[float]:
    values = _decoded_list(values)
    if not isinstance(values, list):
        raise RowError("malformed", f"scores are {_kind(values)}, expected a list of numbers")
    scores = [number for number in map(_number, values) if number is not None]
    if len(scores) < len(values):
        raise RowError("malformed", "scores must be finite numbers (found NaN, infinity, null or text)")
    return scores


def _number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _best_and_worst(responses: Any, scores: Any) -> tuple[Any, Any]:
    responses, scores = _decoded_list(responses), _scores(scores)
    if not isinstance(responses, list) or len(responses) != len(scores):
        count = len(responses) if isinstance(responses, list) else _kind(responses)
        raise RowError("malformed", f"{count} responses but {len(scores)} scores")
    if len(scores) < 2:
        raise RowError("malformed", f"{len(scores)} scored responses, at least 2 are needed")
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        raise RowError("tie", f"all {len(scores)} scores equal {scores[best]:g}")
    return responses[best], responses[worst]


def _drop_ties(row: Mapping) -> None:
    """A pair whose two sides were scored equal says nothing about preference."""
    for chosen_name, rejected_name in SCORE_PAIR_COLUMNS:
        chosen, rejected = _number(row.get(chosen_name)), _number(row.get(rejected_name))
        if chosen is not None and chosen == rejected:
            raise RowError("tie", f"{chosen_name} and {rejected_name} are both {chosen:g}")


def _prompt(row: Mapping, names: Sequence[str]) -> str | list[Message]:
    value = _find(row, names, "prompt")
    value = _decoded(value, "prompt")
    if isinstance(value, list) and value and value[-1]["role"] == "assistant" and not value[-1]["content"].strip():
        value = value[:-1]  # a transcript that stops at "Assistant:"
    if value is row.get("instruction") and isinstance(value, str):
        value = _alpaca_prompt(value, row)
    return value


def _alpaca_prompt(instruction: str, row: Mapping) -> str | list[Message]:
    """Alpaca's `instruction` with its optional `input` below and its optional `history` of turns before."""
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowError("malformed", f"input is {_kind(extra)}, expected text")
    text = f"{instruction}\n{extra}" if extra and extra.strip() else instruction
    history = row.get("history")
    if not history:
        return text
    if not isinstance(history, list) or not all(
        isinstance(t, list) and len(t) == 2 and all(isinstance(s, str) for s in t) for t in history
    ):
        raise RowError("malformed", "history must be a list of [user, assistant] texts")
    messages = [m for user, bot in history for m in (turn("user", user), turn("assistant", bot))]
    return [*messages, turn("user", text)]


# --- values ----------------------------------------------------------------------------------------------------------


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _as_turns(prompt: str | list[Message]) -> list[Message]:
    return [turn("user", prompt)] if isinstance(prompt, str) else prompt


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _decoded(value: Any, what: str) -> str | list[Message]:
    """A value as plain text or as messages."""
    if isinstance(value, str):
        listed = _decoded_list(value)
        if isinstance(listed, list) and listed and all(_looks_like_message(item) for item in listed):
            return [_read_message(item, what) for item in listed]
        return _transcript(value) or value
    if _looks_like_message(value):
        return [_read_message(value, what)]
    if isinstance(value, list):
        if not value:
            raise RowError("empty", f"{what} is an empty list")
        return [_read_message(item, what) for item in value]
    raise RowError("malformed", f"{what} is {_kind(value)}, expected text or messages")


def _decoded_list(value: Any) -> Any:
    """A list (or one message) written as JSON, or as Python text, in a CSV cell; anything else unchanged."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] == "{" and text[-1:] == "}":
        text = f"[{text}]"
    if text[:1] != "[" or text[-1:] != "]":
        return value
    try:
        decoded = json.loads(text)
    except (ValueError, RecursionError):
        decoded = _python_list(text)
    return decoded if isinstance(decoded, list) else value


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


def _looks_like_message(value: Any) -> bool:
    return isinstance(value, Mapping) and (
        ("role" in value and "content" in value) or ("from" in value and "value" in value)
    )


def _read_message(value: Any, what: str) -> Message:
    if not _looks_like_message(value):
        raise RowError("malformed", f"{what} holds {_kind(value)} where a message (role and content) should be")
    role, content = (
        (value["role"], value["content"]) if "role" in value and "content" in value else (value["from"], value["value"])
    )
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise RowError("malformed", f"{what} has a message with unknown role {str(role)[:40]!r}")
    return turn(known, _content(content, what))


def _content(content: Any, what: str) -> str:
    """Message content: text, or a list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise RowError("malformed", f"{what} has a message whose content is {_kind(content)}, expected text")


def _transcript(text: str) -> list[Message] | None:
    """Messages of a "\\n\\nHuman: ...\\n\\nAssistant: ..." transcript, or None if it is not one."""
    text = "\n\n" + text.lstrip()
    if not text.startswith("\n\nHuman:") or "\n\nAssistant:" not in text:
        return None
    parts = _TURN.split(text)[1:]  # role, text, role, text, ...
    roles = {"Human": "user", "Assistant": "assistant"}
    return [turn(roles[role], content.strip()) for role, content in zip(parts[::2], parts[1::2])]


# --- prompt and responses --------------------------------------------------------------------------------------------


def _last_turn(value: str | list[Message], what: str) -> tuple[list[Message], str]:
    """The turns before the response, if there are any, and the text of the response."""
    if isinstance(value, str):
        return [], value
    if value[-1]["role"] != "assistant":
        raise RowError("malformed", f"{what} ends with a {value[-1]['role']} turn, expected an assistant turn")
    return value[:-1], value[-1]["content"]


def _same_prompt(prompt: str | list[Message], before: list[Message], what: str) -> str | list[Message]:
    """The prompt: its own turns, or those before the response where they are the same and bring a system turn."""
    asked = _as_turns(prompt)
    if before and _without_system(before) != _without_system(asked):
        raise RowError("malformed", f"{what} has {len(before) + 1} turns that do not begin with the prompt")
    return before if _has_system(before) and not _has_system(asked) else prompt


def _has_system(messages: list[Message]) -> bool:
    return bool(messages) and messages[0]["role"] == "system"


def _without_system(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] != "system"]


def _with_system(
    prompt: str | list[Message], row: Mapping, system_prompt: str | None, empty_system: bool
) -> str | list[Message]:
    """The prompt with a system turn: its own, else the row's, else the recipe's, else an empty one if asked."""
    if isinstance(prompt, list) and _has_system(prompt):
        return prompt
    system = next((row[name] for name in SYSTEM_COLUMNS if row.get(name) not in (None, "")), None)
    if system is not None and not isinstance(system, str):
        raise RowError("malformed", f"system is {_kind(system)}, expected text")
    system = system or system_prompt or ("" if empty_system else None)
    if system is None:
        return prompt
    return [turn("system", system), *_as_turns(prompt)]


def _check_prompt(prompt: str | list[Message]) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError("empty", "the prompt is blank")
        return
    if not prompt:
        raise RowError("empty", "the prompt has no turns")
    if any(message["role"] == "system" for message in prompt[1:]):
        raise RowError("malformed", "the prompt has a system turn that is not the first")
    last = prompt[-1]
    if last["role"] != "user":
        article = "an" if last["role"] == "assistant" else "a"
        raise RowError("malformed", f"the prompt ends with {article} {last['role']} turn, expected a user turn")
    if not last["content"].strip():
        raise RowError("empty", "the prompt's last turn is blank")


def _check_texts(prompt: str | list[Message], chosen: str, rejected: str) -> None:
    for text, what in ((chosen, "chosen"), (rejected, "rejected")):
        if not text.strip():
            raise RowError("empty", f"{what} is blank")
    if chosen.strip() == rejected.strip():
        raise RowError("identical", "chosen and rejected are the same text")
    try:
        for text in (chosen, rejected, *(message["content"] for message in _as_turns(prompt))):
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("malformed", f"not valid Unicode: {error.reason} ({error.object[error.start]!a})") from None
