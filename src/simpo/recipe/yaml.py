"""Text to plain values and back: a recipe's YAML file and the command line's overrides.

Owns the strict YAML dialect of recipes: one flat mapping, each key once, numbers as people write them (`1e-6` is a
number), no anchors, tags or dates. Everything wrong raises ValueError with the line. Knows no recipe key.
Imports PyYAML only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from simpo.errors import short

MAX_RECIPE_BYTES = 1_000_000
"""A larger file is not a recipe (a model or data file named by mistake): it is refused unread."""

_INT = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_TRUE = re.compile(r"(?:true|True|TRUE|yes|Yes|YES|on|On|ON)\Z")
_FALSE = re.compile(r"(?:false|False|FALSE|no|No|NO|off|Off|OFF)\Z")
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")


class _Loader(yaml.SafeLoader):
    """SafeLoader without anchors, aliases and tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _wrong(event, "anchors and aliases (& and *) are not allowed; put quotes around text that starts so")
        if event.tag is not None:
            raise _wrong(event, f"tags ({event.tag}) are not allowed; put quotes around text that starts with !")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every text that YAML 1.1 or `parse_yaml` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _pattern in (_INT, _FLOAT, _TRUE, _FALSE, _NULL):
    _Dumper.add_implicit_resolver("not text", _pattern, None)


def parse_yaml(text: str, *, where: str) -> Any:
    """The one YAML document in `text` as plain Python values.

    Args:
        text: YAML, in the dialect of this module.
        where: file name or key, for messages.
    Raises:
        ValueError: anything that is not valid, with the line and what is wrong.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = re.sub(r"\s+", " ", error.problem or error.context or "not valid YAML")
        raise ValueError(f"{where}{line}: {problem}") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"{where}: not a text file (character {error.position}: {error.reason})") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply; a recipe is one flat list of `key: value` lines") from None


def _wrong(at: yaml.Event | yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _value(node: yaml.Node) -> Any:
    """A node as a plain value: no dates, base-60 or octal numbers (042 is 42); each key of a mapping text, and once."""
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else _plain_value(node)
    values: dict[str, Any] = {}
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = _value(key_node), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise _wrong(key_node, f"a key must be text, not {short(key)}; put it in quotes if it is meant")
        if key in values:
            raise _wrong(key_node, f"key {short(key)} is given twice, on lines {first_line[key]} and {line}; keep one")
        first_line[key], values[key] = line, _value(value_node)
    return values


def _plain_value(node: yaml.ScalarNode) -> Any:
    """What text without quotes stands for."""
    text = node.value
    if _INT.match(text):
        if len(text) > 40:
            raise _wrong(node, f"{short(text)} has too many digits")
        return int(text)
    if _FLOAT.match(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if _NULL.match(text):
        return None
    return True if _TRUE.match(text) else False if _FALSE.match(text) else text


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        ValueError: the file is missing, not text, not valid YAML, empty, or not a flat mapping of keys to values.
    """
    path, name = Path(path), str(path)[:200]
    try:
        if path.is_dir():
            raise ValueError(f"{name}: a folder, not a recipe; name the YAML file in it")
        if not path.is_file():
            raise ValueError(f"{name}: no such recipe file")
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise ValueError(f"{name}: larger than {MAX_RECIPE_BYTES} bytes, so it is not a recipe")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not a text file in UTF-8, so it is not a recipe") from None
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from None
    values = parse_yaml(text, where=name)
    if values is None:
        raise ValueError(f"{name}: empty; a recipe needs at least `model_name_or_path: ...`")
    if not isinstance(values, dict):
        kind = {list: "a list", str: "plain text"}.get(type(values), "a single value")
        raise ValueError(f"{name}: holds {kind}; a recipe is a flat list of `key: value` lines")
    return values


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML that `parse_yaml` reads back equal, one key a line in the given order."""
    options = {"Dumper": _Dumper, "sort_keys": False, "width": 2**31}
    text = yaml.dump(values, allow_unicode=True, **options)
    if re.search("[\x85\u2028\u2029\ufeff]", text):  # PyYAML writes these as they are, then reads them as line breaks
        text = yaml.dump(values, allow_unicode=False, **options)
    return text


Kind = Literal["flag", "list", "mapping", "text", "value", "open"]
"""How a key takes its value on a command line; "open": any number of words, none means true."""


def parse_overrides(arguments: Sequence[str], kind_of: Callable[[str], Kind]) -> dict[str, Any]:
    """Command-line overrides: `--key value`, `--key=value`, `key=value`, and `--flag` alone for true.

    Hyphens stand for underscores in keys. Values are YAML scalars; a list key also takes several words or words with
    commas, a text key takes its word as it is. `mapping.NAME=value` sets one entry of a mapping.

    Args:
        arguments: words as the shell gives them.
        kind_of: the kind of a key; may raise ValueError for an unknown key.
    Returns:
        keys as spelled (underscores) to plain values.
    Raises:
        ValueError: a word that fits none of these, a value missing, or one key given two different values.
    """
    result: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        dashed = word.startswith("--")
        key, equals, text = (word[2:] if dashed else word).partition("=")
        if not key or key.startswith("-") or not (dashed or equals):
            raise ValueError(f"unexpected {short(word)}: write --key value, --key=value or key=value")
        key = _underscored(key)
        kind = "value" if "." in key else kind_of(key)
        words = [text] if equals else _following(arguments[position:], kind)
        position += 0 if equals else len(words)
        value = _read_words(key, words, kind)
        if key in result and not _same(result[key], value):
            raise ValueError(f"{key} is given twice, as {short(result[key])} and {short(value)}; keep one")
        result[key] = value
    return result


def _underscored(key: str) -> str:
    head, dot, tail = key.partition(".")
    return head.replace("-", "_") + dot + tail


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def _following(rest: Sequence[str], kind: Kind) -> list[str]:
    """The words after `--key` that are its value."""
    words = []
    for word in rest:
        if word.startswith("--") or (kind != "text" and re.match(r"[A-Za-z_][\w.-]*=", word)):
            break
        if kind == "flag" and not any(pattern.match(word) for pattern in (_TRUE, _FALSE, _NULL)):
            break
        words.append(word)
        if kind in ("flag", "mapping", "text", "value"):
            break
    return words


def _read_words(key: str, words: list[str], kind: Kind) -> Any:
    if not words:
        if kind in ("flag", "open"):
            return True
        raise ValueError(f"{key}: a value is missing; write --{key} VALUE")
    if kind == "text":
        return None if _NULL.match(words[0]) else words[0]
    if len(words) > 1:
        return [_scalar(key, word) for word in words]
    word = words[0]
    if kind == "list" and "," in word and not word.lstrip().startswith("["):
        return [_scalar(key, part.strip()) for part in word.split(",")]
    return _scalar(key, word)


def _scalar(key: str, text: str) -> Any:
    value = parse_yaml(text, where=key)
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        return text  # "a: b" typed as a value is text; a mapping is written {a: b}
    return value
