"""Owns the one comparison of what the data says with what a template wrote: turns and tools in the prompt, answers.

Pure Python, of texts alone. A difference is a `RowError` that shows what is missing and names the key that helps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from simpo.data.columns import RowError
from simpo.data.messages import Message, Notes
from simpo.data.preferences import Pair

REWRITTEN = "rewritten by the template"
_TAGS = re.compile(r"(</?think>)")


def check_answer(message: Message, before: str, trained: str, side: str, *, is_apart: bool) -> None:
    """Raise unless reasoning, text and calls of an answer stand in this order in what is trained of it."""
    parts = [message.get("reasoning_content", ""), *_TAGS.split(message["content"])]
    parts = [part.strip() for part in parts if part.strip()]
    if is_apart:  # the template has its own marks around a thought
        parts = [part for part in parts if not _TAGS.fullmatch(part)]
    elif parts and parts[0] == "<think>" and before.rstrip().endswith("<think>"):
        del parts[0]
    at = 0
    for part in parts:
        found = trained.find(part, at)
        if found < 0:
            _missing(part, f"trained text of {side}", "keeps an answer and its reasoning as they are")
        at = found + len(part)
    for part in _called(message):
        if not _stands_in(part, trained):
            _missing(part, f"trained text of {side}", "renders tool_calls")


def check_prompt(pair: Pair, prompt: str) -> Notes:
    """Raise unless each tool, and each turn behind the one before, stands in the prompt's text.

    A system turn may stand anywhere. Thoughts of earlier turns may be left out, which is noted.
    """
    notes: Notes = {}
    reached = 0
    for tool in pair.tools:
        if not _stands_in(tool["function"]["name"], prompt):
            _missing(tool["function"]["name"], "prompt", "renders tools")
    for message in pair.turns:
        thought, _, content = message["content"].rpartition("</think>" if message["role"] == "assistant" else "\0")
        begin = 0 if message["role"] == "system" else reached
        end = _end_of(content.strip(), prompt, begin)
        if end is None:
            where = "prompt, in its place" if _stands_in(content.strip(), prompt) else "prompt"
            _missing(content.strip(), where, f"renders {message['role']} turns")
        reached = reached if message["role"] == "system" else end
        for part in _called(message):
            if not _stands_in(part, prompt):
                _missing(part, "prompt", "renders tool_calls")
        thought = message.get("reasoning_content", thought).replace("<think>", "").strip()
        if thought and thought not in prompt:
            notes["thoughts of turns before the answer left out by the template"] = repr(thought[:60])
    return notes


def _called(message: Message) -> Iterator[str]:
    """What a message's tool calls must show: names, and whatever their arguments hold."""
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        yield from _leaves(call["function"]["arguments"])


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, held in value.items():
            yield name
            yield from _leaves(held)
    elif isinstance(value, list):
        for held in value:
            yield from _leaves(held)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int) and not isinstance(value, bool):  # how a template writes other values is its own
        yield str(value)


def _stands_in(part: str, text: str) -> bool:
    return _end_of(part, text, 0) is not None


def _end_of(part: str, text: str, begin: int) -> int | None:
    """Where a part ends that stands in a text, as it is or as JSON writes it; None where it does not."""
    found = text.find(part, begin)
    if found >= 0:
        return found + len(part)
    written = (json.dumps(part, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return next((at + len(each) for each in written if (at := text.find(each, begin)) >= 0), None)


def _missing(part: str, where: str, wanted: str) -> NoReturn:
    raise RowError(REWRITTEN, f"not in the {where}: {part[:60]!r}; set chat_template to one that {wanted}")
