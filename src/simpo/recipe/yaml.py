"""A recipe's YAML to plain values and back.

Owns the strict YAML dialect of recipes: one flat mapping, each key once, numbers as people write them (`1e-6` is a
number), no anchors, tags or dates. Everything wrong raises ValueError with the line. Knows no recipe key.
Imports PyYAML only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from simpo.errors import short

MAX_RECIPE_BYTES = 1_000_000
"""A larger file is not a recipe (a model or data file named by mistake): it is refused unread."""

_INT = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
TRUE = re.compile(r"(?:true|True|TRUE|yes|Yes|YES|on|On|ON)\Z")
FALSE = re.compile(r"(?:false|False|FALSE|no|No|NO|off|Off|OFF)\Z")
NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")


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


for _pattern in (_INT, _FLOAT, TRUE, FALSE, NULL):
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
    if NULL.match(text):
        return None
    return True if TRUE.match(text) else False if FALSE.match(text) else text


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        ValueError: the file is missing, not text, not valid YAML, empty, or not a flat mapping of keys to values.
    """
    path, name = Path(path).expanduser(), str(path)[:200]
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
