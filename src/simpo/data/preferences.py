"""Owns one thing: turning a row of any accepted shape into one canonical `Pair`, or a `RowError` saying why not.

Pure Python: no tokenizer, no files, no torch. Every row that JSON can express gives a pair or a `RowError`;
no other exception leaves `pair_from_row`.

Shapes accepted: prompt/chosen/rejected as strings or message lists; whole dialogues in chosen and rejected
(implicit prompt); `messages` or ShareGPT `conversations` with chosen/rejected; Anthropic "\\n\\nHuman:" transcripts;
Alpaca pairs (`output: [chosen, rejected]`); scored lists (`all_generated_responses`, `all_rm_scores`); and the column
aliases of `columns`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simpo.data.columns import (
    MESSAGE_COLUMNS,
    PROMPT_COLUMNS,
    SYSTEM_COLUMNS,
    RowError,
    decode_list,
    drop_ties,
    find_column,
    kind_of,
    missing_column,
    our_columns,
    raw_answers,
)

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

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
        raise RowError("malformed", f"the row is {kind_of(row)}, expected an object with columns")
    if not (chosen_column or rejected_column):
        row = our_columns(row)
    drop_ties(row)
    prompt_names = (prompt_column,) if prompt_column else PROMPT_COLUMNS
    sides = [_decoded(value, what) for value, what in zip(raw_answers(row, chosen_column, rejected_column), _SIDES)]
    if any(row.get(name) is not None for name in prompt_names):
        context = _prompt(row, prompt_names)
    elif any(isinstance(side, str) or len(side) < 2 for side in sides):
        raise missing_column(row, prompt_names, "prompt")  # and no dialogue that holds one
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


def _prompt(row: Mapping, names: Sequence[str]) -> str | list[Message]:
    value = find_column(row, names, "prompt")
    if any(value is row.get(name) for name in MESSAGE_COLUMNS):
        value = decode_list(value)
    value = _decoded(value, "prompt")
    if isinstance(value, list) and value and value[-1]["role"] == "assistant" and not value[-1]["content"].strip():
        value = value[:-1]  # a transcript that stops at "Assistant:"
    if isinstance(value, str) and any(value is row.get(name) for name in ("instruction", "query")):
        value = _alpaca_prompt(value, row)
    return value


def _alpaca_prompt(instruction: str, row: Mapping) -> str | list[Message]:
    """Alpaca's `instruction` with its optional `input` below, or `query`; its optional `history` of turns before."""
    extra = row.get("input") if instruction is row.get("instruction") else None
    if extra is not None and not isinstance(extra, str):
        raise RowError("malformed", f"input is {kind_of(extra)}, expected text")
    text = f"{instruction}\n{extra}" if extra and extra.strip() else instruction
    history = decode_list(row.get("history"))
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


def _decoded(value: Any, what: str) -> str | list[Message]:
    """A value as plain text or as messages."""
    if isinstance(value, str):
        return _transcript(value) or value
    if _looks_like_message(value):
        return [_read_message(value, what)]
    if isinstance(value, list):
        if not value:
            raise RowError("empty", f"{what} is an empty list")
        return [_read_message(item, what) for item in value]
    raise RowError("malformed", f"{what} is {kind_of(value)}, expected text or messages")


def _looks_like_message(value: Any) -> bool:
    return isinstance(value, Mapping) and (
        ("role" in value and "content" in value) or ("from" in value and "value" in value)
    )


def _read_message(value: Any, what: str) -> Message:
    if not _looks_like_message(value):
        raise RowError("malformed", f"{what} holds {kind_of(value)} where a message (role and content) should be")
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
    raise RowError("malformed", f"{what} has a message whose content is {kind_of(content)}, expected text")


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
        raise RowError("malformed", f"system is {kind_of(system)}, expected text")
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
