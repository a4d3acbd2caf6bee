"""Owns what a message is: role, text, reasoning and tool calls, read from any of the usual spellings.

Pure Python, of one message at a time. What cannot be a message is a `RowError`; what a message holds beside these is
noted for the ledger.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from simpo.data.columns import RowError, decode_list, kind_of

Message = dict[str, Any]
"""`role` (system, user, assistant, tool) and `content` (text, "" where there is none); where the data has them
`reasoning_content` (text), `tool_calls` (a list of {"type", "function": {"name", "arguments"}}), `name` and
`tool_call_id`."""
Notes = dict[str, str]
"""What happened to a row that is kept, in a few countable words, each with a detail of this row."""

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
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
"""What data and templates call an assistant's thoughts."""

_CALLS = ("function_call", "tool_call")
_TEXTS = ("text", "input_text", "output_text")
_THOUGHTS = ("thinking", "reasoning")
_CONTENTS = ("content", "tool_calls", "function_call", *REASONING)
_KNOWN = {"role", "from", "value", "name", "tool_call_id", *_CONTENTS}
_TRANSCRIPT_TURN = re.compile(r"\r?\n\r?\n(Human|Assistant):")


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def looks_like_message(value: Any) -> bool:
    return isinstance(value, Mapping) and (
        ("role" in value and any(name in value for name in _CONTENTS)) or ("from" in value and "value" in value)
    )


def read_message(value: Any, what: str, notes: Notes) -> Message:
    """One message in our spelling. `what` names the column in a RowError."""
    if not looks_like_message(value):
        raise RowError("malformed", f"{what} holds {kind_of(value)} where a message (role and content) should be")
    ours = "role" in value and any(name in value for name in _CONTENTS)
    role, content = (value["role"], value.get("content")) if ours else (value["from"], value["value"])
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise RowError("malformed", f"{what} has a message with unknown role {str(role)[:40]!r}")
    calls = value.get("tool_calls")
    if role.lower() in _CALLS:
        calls, content = content, None
    elif not calls and isinstance(value.get("function_call"), Mapping):
        calls = [value["function_call"]]
    message: Message = turn(known, "")
    thoughts, content = _thoughts_apart(content)
    reasoning = next((value[name] for name in REASONING if value.get(name)), thoughts)
    if reasoning is not None:
        message["reasoning_content"] = _text(reasoning, f"{what} has a message whose reasoning")
    if calls:
        message["tool_calls"] = _tool_calls(calls, what)
    if content is not None or len(message) == 2:
        message["content"] = _text(content, f"{what} has a message whose content")
    message |= {name: value[name] for name in ("name", "tool_call_id") if isinstance(value.get(name), str)}
    for name, held in value.items():
        if name not in _KNOWN and held not in (None, "", [], {}):
            notes[f"key {str(name)[:40]!r} of a message left out"] = f"{what}: {str(held)[:60]!r}"
    return message


def read_messages(values: Sequence[Any], what: str, notes: Notes) -> list[Message]:
    """Messages in our spelling; calls that are messages of their own join the assistant's turn before them."""
    messages: list[Message] = []
    for value in values:
        message = read_message(value, what, notes)
        is_call = str(value.get("role", value.get("from"))).lower() in _CALLS
        if is_call and messages and messages[-1]["role"] == "assistant":
            messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]}
        else:
            messages.append(message)
    return messages


def _thoughts_apart(content: Any) -> tuple[list[Any] | None, Any]:
    """The parts of a thought that stand in front of a content's others, as text parts; and the others."""
    parts = content if isinstance(content, list) else []
    is_thought = [isinstance(part, Mapping) and part.get("type") in _THOUGHTS for part in parts]
    count = [*is_thought, False].index(False)
    if not count or any(is_thought[count:]):  # none, or one between texts, whose place would be lost
        return None, content
    held = [part.get(part["type"], part.get("text")) for part in parts[:count]]
    return [text for each in held for text in (each if isinstance(each, list) else [each])], parts[count:]


def _text(content: Any, what: str) -> str:
    """Text, or a list of parts that are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("malformed", f"{what} is {kind_of(content)}, expected text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in _TEXTS:
            raise RowError("not text", f"{what} has a part of type {str(kind)[:40]!r}; only text is trained on")
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise RowError("malformed", f"{what} is a list that holds {kind_of(text)}, expected text")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, what: str) -> list[dict[str, Any]]:
    calls = decode_list(calls)
    if not isinstance(calls, list):
        raise RowError("malformed", f"{what} has tool calls that are {kind_of(calls)}, expected a list")
    return [_tool_call(call, what) for call in calls]


def _tool_call(call: Any, what: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("malformed", f"{what} has a tool call without a function's name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        decoded = decode_list(arguments)  # most templates want the object, whose text they write themselves
        arguments = decoded[0] if decoded is not arguments and arguments.lstrip()[:1] == "{" else arguments
    found = {"type": "function", "function": {"name": function["name"], "arguments": without_nulls(arguments or {})}}
    return {"id": call["id"], **found} if isinstance(call.get("id"), str) else found


def read_tools(value: Any) -> list[dict[str, Any]]:
    """A row's definitions of tools, as a list or as JSON text of one."""
    value = decode_list(value)
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("malformed", f"tools is {kind_of(value)}, expected a list of definitions, or JSON text of one")
    tools = [without_nulls(tool if "function" in tool else {"type": "function", "function": tool}) for tool in value]
    for tool in tools:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise RowError("malformed", "tools holds a definition without a function's name")
    return tools


def without_nulls(value: Any) -> Any:
    """An object without its null entries: files in columns have them for every key that any other row has."""
    if isinstance(value, Mapping):
        return {str(name): without_nulls(held) for name, held in value.items() if held is not None}
    return [without_nulls(held) for held in value] if isinstance(value, list) else value


def is_transcript(text: Any) -> bool:
    """Whether a text is a "\\n\\nHuman: ...\\n\\nAssistant: ..." transcript."""
    if not isinstance(text, str):
        return False
    text = "\n\n" + text.lstrip()
    return text.startswith("\n\nHuman:") and "Assistant" in _TRANSCRIPT_TURN.findall(text)


def read_transcript(text: str) -> list[Message]:
    """The messages of a transcript."""
    parts = _TRANSCRIPT_TURN.split("\n\n" + text.lstrip())[1:]  # role, text, role, text, ...
    roles = {"Human": "user", "Assistant": "assistant"}
    return [turn(roles[role], content.strip()) for role, content in zip(parts[::2], parts[1::2])]


def says_something(message: Message) -> bool:
    """Whether an assistant's message is more than blank."""
    return bool(message["content"].strip() or message.get("tool_calls"))


def as_text(answer: str | Sequence[Message]) -> str:
    """An answer as one text, for keys and for people: itself, or its turns as JSON."""
    return answer if isinstance(answer, str) else json.dumps(list(answer), ensure_ascii=False, sort_keys=True)
