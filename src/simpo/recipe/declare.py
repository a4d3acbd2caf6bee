"""How a key of a recipe is declared: once, with its type, range, meaning, default and flags.

`in_section` makes the documented field of a pydantic model, `declared_key` reads back what it declares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from simpo.errors import short

Hosted = Literal["field", "argument", "shared", "run", "launcher", "refused"]
"""How the Hugging Face host takes a key: `field` of SimPOConfig under the recipe's rules; `argument` of
TrainingArguments, same name and meaning; `shared`, an argument that SimPOConfig also hands to the recipe; `run`, read
where a recipe is run; at its default only, since the `launcher` decides it or, `refused`, the native trainer alone
does it."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a recipe, as it was declared. A flag that is not given there is the careful one."""

    name: str
    section: str
    meaning: str
    allowed: str  # its values in words, from the type and range where they say it all
    default: str  # as YAML, or a sentence where it depends on other keys; "required" where there is none
    aliases: tuple[str, ...]  # other accepted names
    types: frozenset[type]  # the plain types of its values; null left out
    nullable: bool  # whether null is one of them
    # whether a resumed run may have another value: it changes what is written and shown, or at most the order of sums,
    # never what is computed
    may_change: bool = False
    decides_tokens: bool = False  # whether prepared data is stored by its value
    hf: Hosted = "refused"  # how the Hugging Face host takes it
    megatron: str = ""  # the name of the Megatron host's argument; "" for none
    shown: bool = False  # whether `simpo check` shows it at its default too


def in_section(section: str, **of_section: Any):
    """A maker of documented fields of one section; `of_section`: flags that its keys have unless they say otherwise."""

    def key(default: Any, meaning: str, allowed: str = "", **rest: Any) -> Any:
        """`rest`: null, only, derived (parts of `allowed` and `default` in words), bounds, and flags of `Key`; `secret`
        ones are never shown or written down."""
        hidden: dict[str, Any] = {"exclude": True, "repr": False} if rest.pop("secret", False) else {}
        bounds = {name: rest.pop(name) for name in ("ge", "gt", "le", "lt", "min_length") if name in rest}
        declared = {"section": section, "allowed": allowed, "bounds": bounds, **of_section, **rest}
        return Field(default, description=meaning, json_schema_extra=declared, **bounds, **hidden)

    return key


def _plain_types(annotation: Any) -> frozenset[Any]:
    """The types an annotation allows: str, bool, list, NoneType, ..."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _plain_types(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return frozenset().union(*map(_plain_types, get_args(annotation)))
    if origin is Literal:
        return frozenset({str})
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return frozenset({dict})
    return frozenset({origin or annotation})


def _allowed(annotation: Any, types: frozenset[Any], bounds: Mapping[str, Any]) -> str:
    """The values that a type and its bounds allow, in words."""
    parts = [annotation, *get_args(annotation)]
    names = next((get_args(part) for part in parts if get_origin(part) is Literal), ())
    if names:
        return f"{', '.join(names[:-1])} or {names[-1]}"
    if types == {bool}:
        return "true or false"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    ranges = [f"{sign} {bounds[name]}" for name, sign in signs.items() if name in bounds]
    if types == {int}:
        return ", ".join(["whole", *ranges])
    return ", ".join(f"x {each}" for each in ranges) or "any finite number"


def describe_wrong(name: str, found: Any, allowed: str) -> str:
    """The line for a value that pydantic found to be wrong."""
    ours = {"literal_error": "not one of its values", "model_type": "a mapping is needed"}
    said = str(found["ctx"]["error"]) if found["type"] == "value_error" else ours.get(found["type"]) or found["msg"]
    return f"{name} = {short(found['input'])}: {said[0].lower() + said[1:]} (allowed: {allowed})"


def declared_key(name: str, info: FieldInfo, *, aliases: tuple[str, ...] = ()) -> Key:
    """What the field `name` of a settings model declares."""
    declared: dict[str, Any] = dict(info.json_schema_extra)  # type: ignore[arg-type]  what `in_section` put there
    bounds, null, only, derived = (declared.pop(part, "") for part in ("bounds", "null", "only", "derived"))
    types = _plain_types(info.annotation)
    allowed = declared.pop("allowed") or _allowed(info.annotation, types - {NoneType}, bounds)
    allowed += f"; null = {null}" * bool(null) + f"; only {only}" * bool(only)
    return Key(
        name,
        meaning=info.description or "",
        allowed=allowed,
        default="required" if info.is_required() else derived or json.dumps(info.default),
        aliases=aliases,
        types=types - {NoneType},
        nullable=NoneType in types,
        **declared,
    )
