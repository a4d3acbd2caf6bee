"""As much of Go's text/template as ollama's templates here need, read from the language's description: actions without
trimming, range, if, else if, fields, $ variables, and the functions eq, ne, and, index, len, slice."""

from __future__ import annotations

import re
from typing import Any

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\(|\)|[^\s()]+')


def render_go(template: str, data: dict[str, Any]) -> str:
    """What a template makes of data; a field .Name is the key Name."""
    parts = re.split(r"\{\{(.*?)\}\}", template, flags=re.DOTALL)
    assert not any(part.startswith("-") or part.endswith("-") for part in parts[1::2]), "trimming is not understood"
    items = [("action" if at % 2 else "text", part.strip() if at % 2 else part) for at, part in enumerate(parts)]
    out, rest = _block(items, data, {"$": data}, run=True)
    assert not rest, "an end without a beginning"
    return out


def _block(items: list[Any], dot: Any, names: dict[str, Any], *, run: bool) -> tuple[str, list[Any]]:
    """Up to the end, or an else, that belongs to it; and the items from there."""
    out = ""
    while items:
        (kind, text), items = items[0], items[1:]
        if kind == "text":
            out += text if run else ""
        elif text == "end" or text.startswith("else"):
            return out, [(kind, text), *items]
        elif text.startswith("range "):
            piece, items = _range(text[6:], items, dot, names, run=run)
            out += piece
        elif text.startswith("if "):
            piece, items = _if(text[3:], items, dot, names, run=run)
            out += piece
        elif run:
            out += str(_value(text, dot, names))
    return out, []


def _range(text: str, items: list[Any], dot: Any, names: dict[str, Any], *, run: bool) -> tuple[str, list[Any]]:
    variables, _, what = text.rpartition(":=")
    out, after = "", _block(items, dot, names, run=False)[1]
    for place, item in enumerate(_value(what, dot, names) if run else []):
        bound = dict(zip([name.strip() for name in variables.split(",")], (place, item)))
        out += _block(items, item, names | bound, run=True)[0]
    assert after[0] == ("action", "end")
    return out, after[1:]


def _if(text: str, items: list[Any], dot: Any, names: dict[str, Any], *, run: bool) -> tuple[str, list[Any]]:
    is_met = run and bool(_value(text, dot, names))
    out, rest = _block(items, dot, names, run=is_met)
    _, word = rest[0]
    if word.startswith("else if "):
        other, rest = _if(word[8:], rest[1:], dot, names, run=run and not is_met)
        return out + other, rest
    if word == "else":
        other, rest = _block(rest[1:], dot, names, run=run and not is_met)
        out += other
    assert rest[0] == ("action", "end")
    return out, rest[1:]


def _value(text: str, dot: Any, names: dict[str, Any]) -> Any:
    value, rest = _call(_TOKEN.findall(text), dot, names)
    assert not rest, text
    return value


def _call(words: list[str], dot: Any, names: dict[str, Any]) -> tuple[Any, list[str]]:
    functions = {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "and": lambda *each: next((value for value in each if not value), each[-1]),
        "index": lambda of, place: of[place],
        "len": len,
        "slice": lambda of, begin: of[begin:],
    }
    if words[0] not in functions:
        return _operand(words, dot, names)
    function, words, given = functions[words[0]], words[1:], []
    while words and words[0] != ")":
        value, words = _operand(words, dot, names)
        given.append(value)
    return function(*given), words


def _operand(words: list[str], dot: Any, names: dict[str, Any]) -> tuple[Any, list[str]]:
    word, words = words[0], words[1:]
    if word == "(":
        value, words = _call(words, dot, names)
        assert words[0] == ")"
        words = words[1:]
        while words and words[0].startswith("."):
            value, words = value[words[0][1:]], words[1:]
        return value, words
    if word.startswith('"'):
        return word[1:-1], words
    if word.isdigit():
        return int(word), words
    name, *fields = word.split(".")
    value = names[name] if name else dot
    for field in filter(None, fields):
        value = value[field]
    return value, words
