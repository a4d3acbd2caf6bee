"""The types of a recipe's values: what a YAML file, a command line or Python may give for them.

Strict: true is not 1, and "3" is not 3; 3.0 is 3, since YAML writers mean it. What does not fit raises ValueError with
what is needed; the caller adds key and value.
"""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from simpo.core.losses import LOSSES
from simpo.core.optimizers import OPTIMIZERS
from simpo.errors import short


def as_number(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError("a number is needed, without quotes")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("a finite number is needed")
    return number


def as_whole(value: Any) -> Any:
    number = as_number(value)
    if number is None:
        return None
    if number != int(number) or abs(number) > 2**53:
        raise ValueError("a whole number is needed")
    return int(value)


def _steps(value: Any) -> Any:
    """Whole steps, or a share of all steps in (0, 1)."""
    number = as_number(value)
    if number is None or 0 < number < 1:
        return number
    if number < 1:
        raise ValueError("must be at least 1 step, or a share of all steps between 0 and 1")
    return as_whole(value)


def as_text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text is needed (in quotes if it looks like a number)")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds characters that UTF-8 cannot write") from None
    return value


def as_path(value: Any) -> Any:
    """Text whose leading ~ is the home folder; no shell has seen that of a YAML file."""
    value = as_text(value)
    return None if value is None else os.path.expanduser(value)


def as_words(value: Any) -> Any:
    """A list of text; one text is a list of one."""
    if value is None:
        return None
    if isinstance(value, (str, os.PathLike)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError("a list of names is needed")
    return [as_text(item) for item in value]


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab"]


def as_trackers(value: Any) -> Any:
    if value is None or value is False:
        return []
    words = as_words(value)
    return [] if [str(word).lower() for word in words] == ["none"] else words


def _strategy(value: Any) -> Any:
    return "no" if value is False else value  # YAML reads a bare `no` as false


def as_loss(value: Any) -> Any:
    """A name in LOSSES, or the form module:function."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not (value in ("simpo", *LOSSES) or re.fullmatch(r"[\w.]+:\w+", value)):
        raise ValueError("not one of its values")
    return "sigmoid" if value == "simpo" else value


def as_optimizer(value: Any) -> Any:
    value = "adamw_8bit" if value == "adamw_bnb_8bit" else value  # transformers has both names for the one
    if not isinstance(value, str) or value not in OPTIMIZERS:
        raise ValueError("not one of its values")
    return value


def _fraction(value: Any) -> Any:
    number = as_number(value)
    if number is None or number <= 0:
        raise ValueError("the fraction must be > 0 (1.0 is the whole dataset, 2.0 twice)")
    return number


def _names(value: Any) -> Any:
    """Names, at least one of them."""
    words = as_words(value)
    if not words or None in words:
        raise ValueError("a list of names is needed, without null")
    return words


def _files(value: Any) -> Any:
    """Names or patterns of files, or a mapping of split to them."""
    if value and isinstance(value, Mapping):
        return {as_text(name): _names(files) for name, files in value.items()}
    return _names(value)


def _at_least_one(value: Any) -> Any:
    number = as_whole(value)
    if number < 1:
        raise ValueError("must be at least 1")
    return number


def _one_of(choice: Any) -> Callable[[Any], Any]:
    """A check for one of the values of a Literal."""

    def check(value: Any) -> Any:
        if value not in get_args(choice):
            raise ValueError(f"must be one of {', '.join(get_args(choice))}")
        return value

    return check


TrainOn = Literal["answer", "all_assistant_turns"]
RenderedText = Literal["auto", "keep", "render"]

OWN_KEYS = {
    **dict.fromkeys(("prompt_column", "chosen_column", "rejected_column", "score_column"), as_text),
    "system_prompt": as_text,
    "chat_template": as_path,
    "rendered_text": _one_of(RenderedText),
    "train_on": _one_of(TrainOn),
    "max_train_samples": _at_least_one,
}
"""Keys of the recipe that an entry of the mixer may give for itself -> the check of a value that is not null."""

_ENTRY = {
    "fraction": _fraction,
    "path": as_text,
    "config": as_text,
    "split": _names,
    "columns": _names,
    "data_files": _files,
    **OWN_KEYS,
}
"""What an entry of the mixer may say -> its check."""


def as_mixture(value: Any) -> Any:
    """{name: fraction}, or {name: {what `_ENTRY` knows}}; what an entry leaves null is left out."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError("a mapping of dataset name to fraction is needed, such as {pairs.jsonl: 1.0}")
    if not value:
        raise ValueError("is empty; name at least one dataset")
    mixer = {}
    for name, entry in value.items():
        try:
            mixer[os.fspath(as_text(name))] = _entry(entry) if isinstance(entry, Mapping) else _fraction(entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{short(name)}: {error}") from None
    return mixer


def _entry(value: Mapping[Any, Any]) -> dict[str, Any]:
    checked = {}
    for key, given in value.items():
        if key not in _ENTRY:
            raise ValueError(f"{short(key)} is not known here; a dataset may have {', '.join(_ENTRY)}")
        try:
            if given is not None and (key, given) != ("split", []):  # recipes of earlier versions may have that one
                checked[key] = _ENTRY[key](given)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return checked


GuardLevel = Literal["off", "say", "warn", "stop", "back"]
"""What a finding of the guard does: nothing; a line; a line that stands out and is repeated at the end; end the run
with a checkpoint; end it with the best earlier checkpoint as the model."""
GUARD_CHECKS = ("displacement", "margin", "overfitting", "answers", "gradient", "sources", "learning_rate")


def as_guard(value: Any) -> Any:
    """A level for all checks, or {check: level}, `all` for those that are not named; {"all": ..., check: ...}."""
    value = {"all": value} if not isinstance(value, Mapping) else {"all": "warn", **value}
    levels = {name: "off" if level is False else level for name, level in value.items()}  # YAML reads a bare `off` so
    for name, level in levels.items():
        if name != "all" and name not in GUARD_CHECKS:
            raise ValueError(f"{short(name)} is not a check")
        if level not in get_args(GuardLevel):
            raise ValueError(f"{short(level)} is not a level")
    return levels


def as_lora_targets(value: Any) -> Any:
    if value is None or value == "all-linear" or value == ["all-linear"]:
        return "all-linear"
    given = as_words(value)
    if None in given:
        raise ValueError("null is not a module; name modules, or write all-linear")
    words = [part for word in given for part in word.replace(",", " ").split()]
    if not words:
        raise ValueError("is empty; name modules, or write all-linear")
    return words


def as_settings(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError("a mapping of names to values is needed")
    for name, setting in value.items():
        is_plain = isinstance(setting, (bool, str, int, type(None)))
        if not is_plain and not (isinstance(setting, float) and math.isfinite(setting)):
            raise ValueError(f"{name} must be true, false, text or a finite number, not {short(setting)}")
    return dict(value)


def as_resume(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value or None
    return as_path(value)


Number = Annotated[float, BeforeValidator(as_number)]
Whole = Annotated[int, BeforeValidator(as_whole)]
Steps = Annotated[int | float, BeforeValidator(_steps)]
Text = Annotated[str, BeforeValidator(as_text)]
PathText = Annotated[str, BeforeValidator(as_path)]
Words = Annotated[list[str], BeforeValidator(as_words)]
Strategy = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_strategy)]
