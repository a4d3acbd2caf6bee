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
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from simpo.core.losses import LOSSES
from simpo.errors import short
from simpo.recipe.aliases import (
    ALIASES,
    BF16_MASTERS_NOTICE,
    INPUT_KEYS,
    KNOWN_ELSEWHERE,
    UNSET,
    Alias,
    check_loss_of_trl,
    recognise,
    refusal,
)
from simpo.recipe.declare import describe_wrong
from simpo.recipe.keys import KEYS, Recipe
from simpo.recipe.stages import STAGE_KEYS, STAGES
from simpo.recipe.values import as_number, as_settings, as_text, as_whole
from simpo.recipe.yaml import FALSE, NULL, TRUE, parse_yaml, read_recipe_file


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | Sequence[str] | None = None,
    *,
    processes: int | None = None,
    only: Container[str] | None = None,
) -> Recipe:
    """The resolved recipe of a YAML file, a mapping or a recipe, with overrides on top.

    Args:
        source: path of a YAML file, or a mapping with its keys, or a recipe.
        overrides: a mapping, or words of a command line: `--key value`, `--key=value`, `key=value`, `--flag`. They win
            over the source whatever name either uses; `gamma` replaces `gamma_beta_ratio` of the source and the
            reverse, and likewise global_batch_size / gradient_accumulation_steps, dataset_name / dataset_mixer.
        processes: data-parallel processes that share `global_batch_size`; None = those torchrun started (WORLD_SIZE).
        only: the keys to read; others keep their defaults, whatever is given. None = all.
    Returns:
        The recipe; `notices` has one line for each accepted key without effect here.
    Raises:
        ValueError: a file that is not a recipe; unknown keys, all of them, each with the nearest known one, and
            settings that are not supported; two names of one key, a value out of range, or keys that contradict each
            other.
    """
    if isinstance(source, Recipe):
        if not overrides and only is None:
            return source
        given = source.model_fields_set - source.unread_keys
        values = {name: getattr(source, name) for name in given}
        values |= {name: values[name].model_dump(exclude_unset=True) for name in STAGES.keys() & given}
        base = _Layer(values, list(source.notices))
        if source.global_batch_size is not None:  # which overrides may cut into other micro-batches
            key, processes = "global_batch_size", processes or source._shared_by
            values[key], base.spelled[key] = source.global_batch_size, key
            values.pop("gradient_accumulation_steps")
        for key, (given, became) in source._relative.items():  # to the beta, or the rate, that overrides may set
            if getattr(source, INPUT_KEYS[key][0]) == became:  # and not another since
                values[key], base.spelled[key] = given, key
                values.pop(INPUT_KEYS[key][0], None)
    elif isinstance(source, Mapping):
        base = _read_layer(source)
    elif isinstance(source, (str, os.PathLike)):
        base = _read_layer(read_recipe_file(source))
    else:
        raise ValueError(f"a recipe is a path, a mapping or a Recipe, not {short(source)}")
    if overrides is not None and not isinstance(overrides, Mapping):
        is_words = isinstance(overrides, Sequence) and not isinstance(overrides, str)
        if not is_words or not all(isinstance(word, str) for word in overrides):
            raise ValueError(f"overrides: a mapping or a list of words is needed, not {short(overrides)}")
        overrides = _parse_overrides(overrides)
    started = os.environ.get("WORLD_SIZE", "1")
    processes = processes or (int(started) if started.isdecimal() else 1) or 1
    layer = _merge(base, _read_layer(overrides or {}))
    if only is not None:
        layer.values = {key: value for key, value in layer.values.items() if INPUT_KEYS.get(key, (key,))[0] in only}
        layer.entries = {entry: value for entry, value in layer.entries.items() if entry[0] in only}
    return _build(layer, processes)


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
    wrong: list[str] = []
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
            if name == "dataset_mixture" and isinstance(value, Mapping):
                later.append((f"{written}.test_split_size", "test_split_size", value.get("test_split_size")))
        elif (reason := refusal(name, value)) is not None:
            wrong.append(f"{written} = {short(value)}: {reason}")
        elif name in KNOWN_ELSEWHERE:
            layer.notices.append(f"{written}: not used here ({KNOWN_ELSEWHERE[name]})")
        else:
            wrong.append(describe_unknown(written))
    _say_what_it_is_for(layer, mapping, wrong)
    for written, name, value in later:
        _put_alias(layer, written, ALIASES[name], value)
    for key, (target, _) in INPUT_KEYS.items():
        if key in layer.values and target in layer.values:
            raise ValueError(f"{layer.spelled[key]} and {layer.spelled[target]}: both set {target}; keep one")
    return layer


_IS_SIMPO = "is SimPO's here; DPO is loss_type: dpo"


def _say_what_it_is_for(layer: _Layer, mapping: Mapping[str, Any], wrong: Sequence[str]) -> None:
    """Raise ValueError with all that is wrong; a recipe for another kind of training is named as one."""
    kind, signs = recognise({_plain_name(name): value for name, value in mapping.items()})
    looks = f"this looks like {kind} recipe ({', '.join(signs)})" if kind else ""
    if wrong:
        means = ", and simpo trains on pairs of a chosen and a rejected answer: " if kind else ""
        hint = "; `simpo keys` lists all keys" * any("unknown key" in line for line in wrong)
        raise ValueError(f"{looks}{means}{'; '.join(wrong[:20])}{'; ...' * (len(wrong) > 20)}{hint}")
    if kind == "a DPO" and mapping.get("loss_type") in (None, "sigmoid", "hinge", "ipo"):
        layer.notices.append(f"{looks}: loss_type {mapping.get('loss_type') or 'sigmoid'} {_IS_SIMPO}")
    elif kind and kind != "a DPO" and (len(signs) > 1 or signs[0] not in KNOWN_ELSEWHERE):
        layer.notices.append(f"{looks}: simpo trains on pairs of a chosen and a rejected answer")


def _is_derived(name: str) -> bool:
    """Whether null is the same as leaving the line out: other keys decide the default."""
    return Recipe.model_fields[name].default is None and not KEYS[name].nullable


def nearest_key(name: str) -> str | None:
    """The known key, of ours or of others, whose spelling is closest to `name`; None where none is close."""
    name = name[:60].lower().replace("-", "_")
    own = {key.partition(".")[2]: key for key in reversed(STAGE_KEYS)}  # temperature, without generate.
    for names, cutoff in ((KEYS, 0.8), (own, 0.8), ([*KEYS, *INPUT_KEYS, *ALIASES], 0.6), (KNOWN_ELSEWHERE, 0.6)):
        if close := difflib.get_close_matches(name, names, n=1, cutoff=cutoff):
            return own[close[0]] if names is own else close[0]
    return None


def describe_unknown(written: str) -> str:
    """What is said of a key that is neither ours nor another program's."""
    return _unknown(written, nearest_key(written))


def _unknown(written: str, nearest: str | None) -> str:
    return f"unknown key {short(written)}" + (f": the nearest known key is {nearest!r}" if nearest else "")


def _plain_name(written: str) -> str:
    head, dot, entry = written.partition(".")
    head = head.replace("-", "_")
    return head + dot + (entry.replace("-", "_") if head in STAGES else entry)


def _put(layer: _Layer, written: str, target: str, value: Any) -> None:
    if target in layer.values:
        first = layer.spelled[target]
        raise ValueError(f"{first} and {written}: two names of the same key {target}; keep one")
    layer.values[target] = value
    layer.spelled[target] = written


def _put_alias(layer: _Layer, written: str, alias: Alias, value: Any) -> None:
    if value is None:
        return
    taken = {alias.target} | {rival for key, (rival, _) in INPUT_KEYS.items() if key == alias.target}
    if alias.yields and taken & set(layer.values):
        layer.notices.append(f"{written}: not used, since {min(taken & set(layer.values))} is given")
        return
    try:
        converted = alias.convert(value) if alias.convert else value
    except ValueError as error:
        raise ValueError(f"{written} = {short(value)}: {error}") from None
    if converted is UNSET:
        layer.notices.append(f"{written}: {alias.unset}")
        return
    _put(layer, written, alias.target, converted)
    if alias.notice:
        layer.notices.append(f"{written}: read as {alias.target}; {alias.notice.format(value=short(value))}")


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
    if layer.spelled.get("sft_weight") == "cpo_alpha" and "loss_type" in layer.values:
        (loss,) = loss if isinstance(loss := layer.values["loss_type"], list) and len(loss) == 1 else [loss]
        check_loss_of_trl(loss, "cpo_alpha", ratio=layer.values.get("gamma_beta_ratio"))
    relative = {key: layer.values[key] for key in ("gamma", "lr_scheduler_kwargs") if key in layer.values}
    _resolve_datasets(layer)
    _resolve_schedule(layer)
    asked = _resolve_global_batch(layer, processes)
    steps = layer.values.get("warmup_steps")
    if isinstance(steps, float) and 0 < steps < 1:  # as transformers 5 has it
        layer.values["warmup_ratio"] = layer.values.pop("warmup_steps")
        layer.notices.append(f"warmup_steps: {steps} is a share of all steps, read as warmup_ratio")
    recipe = _with_gamma(layer) if "gamma" in layer.values else _typed(layer)
    if recipe.loss_type in LOSSES and recipe.loss.needs_reference:
        layer.notices = [notice for notice in layer.notices if _IS_SIMPO not in notice]
    recipe._notices = tuple(dict.fromkeys(layer.notices + list(recipe._notices)))
    recipe._global_batch_size, recipe._shared_by = asked, processes
    recipe._relative = {key: (given, getattr(recipe, INPUT_KEYS[key][0])) for key, given in relative.items()}
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
        current = values.get(key)
        if key == "guard" and isinstance(current, (str, bool)):  # of all checks
            current = {"all": current}
        current = current or {}
        if not isinstance(current, Mapping):
            raise ValueError(f"{key}: must be a mapping before {key}.{entry} can be set, not {short(current)}")
        values[key] = {**current, entry: value}


def _resolve_schedule(layer: _Layer) -> None:
    """cosine_with_min_lr and lr_scheduler_kwargs, as transformers has them -> cosine and min_lr."""
    values = layer.values
    if "lr_scheduler_kwargs" in values:
        name, given = layer.spelled["lr_scheduler_kwargs"], _take(layer, "lr_scheduler_kwargs", as_settings)
        if not set(given) <= {"min_lr", "min_lr_rate"} or len(given) > 1:
            raise ValueError(f"{name} = {short(given)}: only min_lr or min_lr_rate, one of them, can be set")
        if "min_lr" in given:
            values["min_lr"] = given["min_lr"]
        if "min_lr_rate" in given:
            peak = _value_of(layer, "learning_rate", as_number)
            layer.spelled.setdefault("min_lr_rate", name)
            values["min_lr"] = _checked(layer, "min_lr_rate", as_number, given["min_lr_rate"]) * peak
    if values.get("lr_scheduler_type") == "cosine_with_min_lr":
        values["lr_scheduler_type"] = "cosine"
        if "min_lr" not in values:
            raise ValueError("lr_scheduler_type = 'cosine_with_min_lr': min_lr is missing, the rate it ends at")


def _resolve_global_batch(layer: _Layer, processes: int) -> int | None:
    """global_batch_size -> gradient_accumulation_steps of each process; gives what was asked."""
    if "global_batch_size" not in layer.values:
        return None
    total = _take(layer, "global_batch_size", as_whole)
    for key in ("cp", "tp"):  # their processes compute the same pairs
        processes = max(1, processes // max(1, _value_of(layer, key, as_whole)))
    key = "per_device_train_batch_size"
    each = _value_of(layer, key, as_whole)
    if total < 1 or each < 1 or total % (each * processes):
        raise ValueError(
            f"{layer.spelled['global_batch_size']} = {total}: must be a multiple of {layer.spelled.get(key, key)} x "
            f"processes = {each} x {processes}, so that gradient_accumulation_steps is whole"
        )
    layer.values["gradient_accumulation_steps"] = total // (each * processes)
    return total


def _take(layer: _Layer, key: str, check: Callable[[Any], Any]) -> Any:
    """Remove an input key from the layer and return its checked value."""
    layer.spelled[INPUT_KEYS[key][0]] = layer.spelled[key]
    return _checked(layer, key, check, layer.values.pop(key))


def _value_of(layer: _Layer, key: str, check: Callable[[Any], Any]) -> Any:
    """The checked value of one of our keys, or its default."""
    return _checked(layer, key, check, layer.values.get(key, Recipe.model_fields[key].default))


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
        parts = found["loc"][: 2 if found["loc"][:1] and found["loc"][0] in STAGES else 1]
        key = ".".join(map(str, parts))
        if key in seen:
            continue  # a union reports one finding for each of its types
        seen.add(key)
        said = str(found.get("ctx", {}).get("error", found["msg"]))
        lines.append(_explain_one(key, found, spelled) if key else _as_written(said, spelled))
    return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")


def _as_written(message: str, spelled: Mapping[str, str]) -> str:
    """The message, with the names the user wrote for keys that it calls by ours."""
    mentioned = set(re.findall(r"\w+", message))
    written = [f"{name} is {key}" for key, name in spelled.items() if key in mentioned and name not in mentioned]
    return f"{message} ({', '.join(written)})" if written else message


def _explain_one(key: str, found: Any, spelled: Mapping[str, str]) -> str:
    declared = (KEYS | STAGE_KEYS).get(key)
    if declared is None:
        stage, _, wrong = key.partition(".")
        near = difflib.get_close_matches(wrong, STAGES[stage].model_fields, n=1)
        return f"{_unknown(key, f'{stage}.{near[0]}' if near else None)}; `simpo keys {stage}` lists them"
    name = spelled.get(key, key)
    name = key if _plain_name(name) == key else f"{name} ({key})"
    if found["type"] == "missing":
        return f"{name} is missing: {declared.meaning} Write `{key}: ...` or give --{key} VALUE"
    if found["input"] is None:
        return f"{name}: null is not a value; remove the line to get the default ({declared.default})"
    return describe_wrong(name, found, declared.allowed)


def _parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Keys as spelled, with underscores, to plain values: `--key value`, `--key=value`, `key=value`, `--flag` for true.

    Values are YAML scalars; a list key also takes several words or words with commas, a text key takes its word as it
    is. `mapping.NAME=value` sets one entry of a mapping.

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
        key = _plain_name(key)
        types = _types_of(key)
        words = [text] if equals else _following(arguments[position:], types)
        position += 0 if equals else len(words)
        value = _read_words(key, words, types)
        if key in result and (type(result[key]), result[key]) != (type(value), value):
            raise ValueError(f"{key} is given twice, as {short(result[key])} and {short(value)}; keep one")
        result[key] = value
    return result


def _types_of(name: str) -> frozenset[type]:
    """The types of the values that a key may have under this name; none where a conversion decides."""
    alias = ALIASES.get(name)
    target = alias.target if alias else name
    if name in KNOWN_ELSEWHERE:
        return frozenset({bool, list})  # whatever follows, or nothing
    if alias and alias.convert:
        return frozenset({bool} if alias.is_switch else ())
    if name in STAGE_KEYS:
        return STAGE_KEYS[name].types
    if "." in name or target in INPUT_KEYS:
        return frozenset({str} if target.startswith("dataset_") and "." not in name else ())
    return KEYS[target].types if target in KEYS else frozenset({bool, list})  # an unknown key is named later


def _following(rest: Sequence[str], types: frozenset[type]) -> list[str]:
    """The words after `--key` that are its value."""
    words = []
    for word in rest:
        is_next_key = word.startswith("--") or (types != {str} and re.match(r"[A-Za-z_][\w.-]*=", word))
        is_no_flag = types == {bool} and not any(pattern.match(word) for pattern in (TRUE, FALSE, NULL))
        if is_next_key or is_no_flag or (words and list not in types):
            break
        words.append(word)
    return words


def _read_words(key: str, words: list[str], types: frozenset[type]) -> Any:
    if not words and bool in types:
        return True
    is_unknown = types == {bool, list}  # which is said later
    if not is_unknown and not any(word.strip() for word in words):  # none, or that of a variable that is not set
        raise ValueError(f"{key}: a value is missing; write --{key} VALUE (null for none)")
    if types == {str}:
        return None if NULL.match(words[0]) else words[0]
    if list in types and len(words) == 1 and "," in words[0] and not words[0].lstrip().startswith("["):
        return [_scalar(key, part.strip()) for part in words[0].split(",")]
    values = [_scalar(key, word) for word in words]
    return values if len(values) > 1 else values[0]


def _scalar(key: str, text: str) -> Any:
    value = parse_yaml(text, where=key)
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        return text  # "a: b" typed as a value is text; a mapping is written {a: b}
    return value
