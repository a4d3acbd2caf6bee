"""How a recipe is loaded: a file or mapping, other programs' names, overrides, in that order, and strictly.

Owns `load_recipe` and the messages that a wrong recipe gets. The keys themselves are in `recipe.keys`, the names that
others use in `recipe.aliases`, the text formats in `recipe.yaml`. Must not import torch, transformers or datasets: a
recipe is checked in a blink.

Paths in a recipe are used as given: a relative path is relative to the working directory, not to the recipe.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from simpo.errors import short
from simpo.recipe.aliases import ALIASES, BF16_MASTERS_NOTICE, INPUT_KEYS, KNOWN_ELSEWHERE, REFUSED, UNSET
from simpo.recipe.keys import KEYS, Recipe
from simpo.recipe.values import as_number, as_text, as_whole
from simpo.recipe.yaml import Kind, parse_overrides, read_recipe_file


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    processes: int | None = None,
) -> Recipe:
    """The resolved recipe of a YAML file, a mapping or a recipe, with overrides on top.

    Args:
        source: path of a YAML file, or a mapping with its keys, or a recipe.
        overrides: a mapping, or words of a command line: `--key value`, `--key=value`, `key=value`, `--flag`. They win
            over the source whatever name either uses; `gamma` replaces `gamma_beta_ratio` of the source and the
            reverse, and likewise global_batch_size / gradient_accumulation_steps, dataset_name / dataset_mixer.
        processes: data-parallel processes that share `global_batch_size`; None = those torchrun started (WORLD_SIZE).
    Returns:
        The recipe; `notices` has one line for each accepted key without effect here.
    Raises:
        ValueError: a file that is not a recipe, an unknown key (the nearest known one is named), two names of one key,
            a value out of range, or keys that contradict each other.
    """
    if isinstance(source, Recipe):
        if not overrides:
            return source
        given = source._given - source.unread_keys
        base = _Layer({name: getattr(source, name) for name in given}, list(source.notices))
    elif isinstance(source, Mapping):
        base = _read_layer(source)
    elif isinstance(source, (str, os.PathLike)):
        base = _read_layer(read_recipe_file(source))
    else:
        raise ValueError(f"a recipe is a path, a mapping or a Recipe, not {short(source)}")
    merged = _merge(base, _read_layer(_override_mapping(overrides)))
    return _build(merged, processes or _processes())


def _override_mapping(overrides: Mapping[str, Any] | Sequence[str] | None) -> Mapping[str, Any]:
    if overrides is None:
        return {}
    if isinstance(overrides, Mapping):
        return overrides
    is_words = isinstance(overrides, Sequence) and not isinstance(overrides, str)
    if not is_words or not all(isinstance(word, str) for word in overrides):
        raise ValueError(f"overrides: a mapping or a list of words is needed, not {short(overrides)}")
    return parse_overrides(overrides, _kind_of)


@dataclass
class _Layer:
    """One source of values under our names.

    Attributes:
        values: our key or an input key -> value.
        notices: lines to print.
        spelled: our key -> the name it was written under.
        entries: (mapping key, entry) -> value, from `mapping.entry=value`.
    """

    values: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    spelled: dict[str, str] = field(default_factory=dict)
    entries: dict[tuple[str, str], Any] = field(default_factory=dict)


_MAPPINGS = tuple(name for name, key in KEYS.items() if dict in key.types)


def _read_layer(mapping: Mapping[str, Any]) -> _Layer:
    """Values of one source under our names, with every name accounted for."""
    layer = _Layer()
    later: list[tuple[str, str, Any]] = []  # aliases that give way to our key, wherever it stands
    for written, value in mapping.items():
        if not isinstance(written, str):
            raise ValueError(f"key {short(written)}: must be text")
        name = _plain_name(written)
        head, dot, entry = name.partition(".")
        if dot and head in _MAPPINGS:
            layer.entries[head, entry] = value
        elif name in KEYS or name in INPUT_KEYS:
            if value is not None or not (name in INPUT_KEYS or _is_derived(name)):
                _put(layer, written, name, value)
        elif name in ALIASES:
            later.append((written, name, value))
        elif name in REFUSED and REFUSED[name][0](value):
            raise ValueError(f"{written} = {short(value)}: {REFUSED[name][1]}")
        elif name in KNOWN_ELSEWHERE:
            layer.notices.append(f"{written}: not used here ({KNOWN_ELSEWHERE[name]})")
        else:
            raise unknown_key(written)
    for written, name, value in later:
        _put_alias(layer, written, name, value)
    _check_rivals(layer)
    return layer


def _is_derived(name: str) -> bool:
    """Whether null is the same as leaving the line out: other keys decide the default."""
    return Recipe.model_fields[name].default is None and not KEYS[name].nullable


def nearest_key(name: str) -> str:
    """The known key, of ours or of others, whose spelling is closest to `name`."""
    name = name[:60].lower().replace("-", "_")
    ours = [*KEYS, *INPUT_KEYS, *ALIASES]
    close = difflib.get_close_matches(name, ours, n=1, cutoff=0.6)
    close = close or difflib.get_close_matches(name, KNOWN_ELSEWHERE, n=1, cutoff=0.6)
    close = close or difflib.get_close_matches(name, ours, n=1, cutoff=0.0)
    return close[0]


def unknown_key(written: str) -> ValueError:
    """The error for a key that is neither ours nor another program's."""
    near = nearest_key(written.removeprefix("--"))
    return ValueError(f"unknown key {short(written)}: the nearest known key is {near!r}; `simpo keys` lists them all")


def _plain_name(written: str) -> str:
    head, dot, entry = written.partition(".")
    return head.replace("-", "_") + dot + entry


def _put(layer: _Layer, written: str, target: str, value: Any) -> None:
    if target in layer.values:
        first = layer.spelled[target]
        raise ValueError(f"{first} and {written}: two names of the same key {target}; keep one")
    layer.values[target] = value
    layer.spelled[target] = written


def _put_alias(layer: _Layer, written: str, name: str, value: Any) -> None:
    alias = ALIASES[name]
    if value is None:
        return
    taken = {alias.target} | {rival for key, (rival, _) in INPUT_KEYS.items() if key == alias.target}
    if alias.yields and taken & set(layer.values):
        layer.notices.append(f"{written}: not used, since {min(taken & set(layer.values))} is given")
        return
    try:
        converted = alias.translate(value)
    except ValueError as error:
        raise ValueError(f"{written} = {short(value)}: {error}") from None
    if converted is UNSET:
        if alias.target == "master_dtype" and value != "auto":
            layer.notices.append(f"{written}: {BF16_MASTERS_NOTICE}")
        elif alias.target != "master_dtype":
            layer.notices.append(f"{written}: not used here (it changes nothing)")
        return
    _put(layer, written, alias.target, converted)
    if alias.notice:
        layer.notices.append(f"{written}: read as {alias.target}; {alias.notice.format(value=short(value))}")


def _check_rivals(layer: _Layer) -> None:
    for key, (target, _) in INPUT_KEYS.items():
        if key in layer.values and target in layer.values:
            a, b = layer.spelled[key], layer.spelled[target]
            raise ValueError(f"{a} and {b}: both set {target}; keep one")


def _merge(base: _Layer, top: _Layer) -> _Layer:
    """`top` over `base`; a key of `top` also removes from `base` the other ways to set the same thing."""
    values, entries = dict(base.values), dict(base.entries)
    for key in top.values:
        target = INPUT_KEYS[key][0] if key in INPUT_KEYS else key
        rivals = [target] if key in INPUT_KEYS else [name for name, (to, _) in INPUT_KEYS.items() if to == key]
        for rival in rivals:
            values.pop(rival, None)
        entries = {entry: value for entry, value in entries.items() if entry[0] != target}
    values.update(top.values)
    notices = [line for line in base.notices if line not in top.notices] + top.notices
    return _Layer(values, notices, base.spelled | top.spelled, entries | top.entries)


def _build(layer: _Layer, processes: int) -> Recipe:
    """Resolve input keys, then let the typed recipe check every value."""
    if "master_dtype" in layer.values:
        layer.notices = [notice for notice in layer.notices if BF16_MASTERS_NOTICE not in notice]
    _resolve_datasets(layer)
    _resolve_global_batch(layer, processes)
    _resolve_warmup(layer)
    recipe = _with_gamma(layer) if "gamma" in layer.values else _typed(layer)
    recipe._notices = tuple(dict.fromkeys(layer.notices + list(recipe._notices)))
    return recipe


def _typed(layer: _Layer) -> Recipe:
    try:
        return Recipe(**layer.values)
    except ValidationError as error:
        raise ValueError(_explain(error, layer.spelled)) from None


def _with_gamma(layer: _Layer) -> Recipe:
    """gamma -> gamma_beta_ratio, with the beta that will be used."""
    name, gamma = layer.spelled["gamma"], _take(layer, "gamma", as_number)
    recipe = _typed(layer)
    if "gamma_beta_ratio" in recipe.unread_keys:
        layer.notices.append(f"{name}: not used, since loss_type {recipe.loss_type!r} does not read it")
        return recipe
    if gamma < 0 or not math.isfinite(gamma / recipe.beta):
        raise ValueError(f"{name} = {gamma}: must be >= 0, and gamma / beta finite (beta = {recipe.beta})")
    layer.values["gamma_beta_ratio"] = gamma / recipe.beta
    return _typed(layer)


def _resolve_datasets(layer: _Layer) -> None:
    """dataset_name, dataset_config and the split names -> the lists they stand for; then entries of mappings."""
    values = layer.values
    if "dataset_name" in values:
        values["dataset_mixer"] = {_take(layer, "dataset_name", as_text): 1.0}
    if "dataset_config" in values:
        values["dataset_configs"] = [_take(layer, "dataset_config", as_text)]
    if "dataset_train_split" in values or "dataset_test_split" in values:
        usual = {"dataset_train_split": "train", "dataset_test_split": "test"}
        values["dataset_splits"] = [
            _take(layer, key, as_text) if key in values else name for key, name in usual.items()
        ]
    for (key, entry), value in layer.entries.items():
        current = values.get(key) or {}
        if not isinstance(current, Mapping):
            raise ValueError(f"{key}: must be a mapping before {key}.{entry} can be set, not {short(current)}")
        values[key] = {**current, entry: value}


def _resolve_global_batch(layer: _Layer, processes: int) -> None:
    """global_batch_size -> gradient_accumulation_steps of each process."""
    if "global_batch_size" not in layer.values:
        return
    total = _take(layer, "global_batch_size", as_whole)
    for key in ("cp", "tp"):  # their processes compute the same pairs
        processes = max(1, processes // max(1, _checked(layer, key, as_whole, layer.values.get(key, 1))))
    key = "per_device_train_batch_size"
    each = layer.values.get(key, Recipe.model_fields[key].default)
    each = _checked(layer, key, as_whole, each)
    if total < 1 or each < 1 or total % (each * processes):
        raise ValueError(
            f"{layer.spelled['global_batch_size']} = {total}: must be a multiple of {layer.spelled.get(key, key)} x "
            f"processes = {each} x {processes}, so that gradient_accumulation_steps is whole"
        )
    layer.values["gradient_accumulation_steps"] = total // (each * processes)


def _processes() -> int:
    """Processes that torchrun started (WORLD_SIZE), 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def _resolve_warmup(layer: _Layer) -> None:
    """transformers 5 takes a share of all steps as warmup_steps."""
    steps = layer.values.get("warmup_steps")
    if isinstance(steps, float) and 0 < steps < 1:
        layer.values["warmup_ratio"] = layer.values.pop("warmup_steps")
        layer.notices.append(f"warmup_steps: {steps} is a share of all steps, read as warmup_ratio")


def _take(layer: _Layer, key: str, check: Callable[[Any], Any]) -> Any:
    """Remove an input key from the layer and return its checked value."""
    layer.spelled[INPUT_KEYS[key][0]] = layer.spelled[key]
    return _checked(layer, key, check, layer.values.pop(key))


def _checked(layer: _Layer, key: str, check: Callable[[Any], Any], value: Any) -> Any:
    name = layer.spelled.get(key, key)
    try:
        checked = check(value)
    except ValueError as error:
        raise ValueError(f"{name} = {short(value)}: {error}") from None
    if checked is None:
        raise ValueError(f"{name}: null is not a value; remove the line")
    return checked


def _explain(error: ValidationError, spelled: Mapping[str, str]) -> str:
    """Pydantic's findings as one line: key, value, what is wrong, what is allowed."""
    lines = []
    seen = set()
    for found in error.errors(include_url=False):
        key = str(found["loc"][0]) if found["loc"] else ""
        if key in seen:
            continue  # a union reports one finding for each of its types
        seen.add(key)
        message = str(found.get("ctx", {})["error"]) if found["type"] == "value_error" else found["msg"]
        lines.append(_explain_one(key, found, message, spelled) if key else message + _also_written(message, spelled))
    return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")


def _also_written(message: str, spelled: Mapping[str, str]) -> str:
    """The names the user wrote for keys that `message` calls by ours."""
    mentioned = set(re.findall(r"\w+", message))
    written = [f"{name} is {key}" for key, name in spelled.items() if key in mentioned and name not in mentioned]
    return f" ({', '.join(written)})" if written else ""


def _explain_one(key: str, found: Any, message: str, spelled: Mapping[str, str]) -> str:
    name = spelled.get(key, key)
    name = key if _plain_name(name) == key else f"{name} ({key})"
    if found["type"] == "missing":
        return f"{name} is missing: {KEYS[key].meaning} Write `{key}: ...` or give --{key} VALUE"
    value = found["input"]
    if value is None:
        return f"{name}: null is not a value; remove the line to get the default ({KEYS[key].default})"
    if found["type"] == "literal_error":
        message = "not one of its values"
    return f"{name} = {short(value)}: {message[0].lower() + message[1:]} (allowed: {KEYS[key].allowed})"


def _kind_of(name: str) -> Kind:
    """How a key takes its value on a command line. Raises ValueError for an unknown key."""
    alias = ALIASES.get(name)
    target = alias.target if alias else name
    if name in KNOWN_ELSEWHERE:
        return "open"
    if alias and (alias.when_true or alias.convert):
        return "flag" if alias.when_true else "value"
    if target in INPUT_KEYS:
        return "text" if target.startswith("dataset") else "value"
    if target not in KEYS:
        raise unknown_key(f"--{name}")
    types = KEYS[target].types
    if types & {dict, list}:
        return "mapping" if dict in types else "list"
    return "flag" if types == {bool} else "text" if types == {str} else "open" if types == {bool, str} else "value"
