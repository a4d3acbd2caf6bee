"""A loss of the user's own, named by its import path: `loss_type: module:function`.

Owns how the function is found, which options it gets, and the trial that says what is wrong with it before a model is
loaded. The function takes PairLogps and keyword-only options, and returns PairLoss, or the losses [P] alone: rewards
are then the mean log-probs, times beta where it takes beta.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from simpo.core.losses import GENERAL_KEYS, LOSSES, Loss, NeedsReference, PairLogps, PairLoss, keyword_defaults
from simpo.errors import one_line


@functools.lru_cache(maxsize=64)
def load_own_loss(path: str, options_json: str) -> Loss:
    """The loss that a path names, with its options filled in and tried.

    Args:
        path: "module:function"; the module is looked for in the working directory, then among the installed ones.
        options_json: its options as a JSON mapping, those of GENERAL_KEYS excepted: these are keys of the recipe.
    Returns:
        A Loss whose `defaults` are the keys and options to call it with.
    Raises:
        ValueError: module or function not found, an option that it does not take or that is missing, or losses that
            have the wrong shape, are not finite or do not depend on the log-probs.
    """
    function, options = find_function(path, "loss_type"), json.loads(options_json)
    taken = keyword_defaults(function)
    own = [name for name in taken if name not in GENERAL_KEYS]
    for name in options:
        if name in taken and name not in own:
            raise ValueError(f"loss_kwargs: {name} is a key of the recipe itself; write it there")
        if name not in own:
            raise ValueError(f"loss_kwargs: {path} has no option {name!r}; it takes {', '.join(own) or 'none'}")
    missing = [name for name in own if taken[name] is inspect.Parameter.empty and name not in options]
    if missing:
        raise ValueError(f"loss_kwargs: {path} needs {missing[0]}, which has no default; give loss_kwargs.{missing[0]}")
    general = {name: default for name, default in taken.items() if name in GENERAL_KEYS}
    general |= {name: LOSSES["sigmoid"].defaults[name] for name in general if general[name] is inspect.Parameter.empty}
    # Defaults that a recipe can hold are written into it, so that a run stays what it was if the module changes.
    plain = {name: taken[name] for name in own if isinstance(taken[name], bool | int | float | str | None)}
    plain = {name: value for name, value in plain.items() if value not in (math.inf, -math.inf) and value == value}
    loss = Loss(
        path,
        _checked(path, function),
        {**general, **plain, **options},
        equation=(inspect.getdoc(function) or path).partition("\n")[0],
        source="your own",
        at_zero_margin=lambda **values: _try(loss, values),
        zero_margin_note="at -1 nats per token",
    )
    try:
        _try(loss, loss.defaults)
    except NeedsReference:
        loss = replace(loss, needs_reference=True)
        _try(loss, loss.defaults)
    return loss


def find_function(path: str, key: str) -> Callable[..., Any]:
    """The function that "module:function" names, the module in the working directory or installed.

    Raises:
        ValueError: there is none; `key` says where in the recipe it was named.
    """
    module_name, _, name = path.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything when it is imported
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            where = f"neither in {folder} nor installed"
            raise ValueError(f"{key} = {path!r}: there is no module {error.name!r}, {where}") from None
        raise ValueError(f"{key} = {path!r}: {module_name} cannot be imported: {one_line(error)}") from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, name, None)
    if not callable(function):
        what = "no function" if function is None else f"a {type(function).__name__}, not a function,"
        raise ValueError(f"{key} = {path!r}: {what} {name!r} in {getattr(module, '__file__', module_name)}")
    return function


def _checked(path: str, function: Callable[..., Any]) -> Callable[..., PairLoss]:
    """The function, with its answer made a PairLoss."""

    def compute(logps: PairLogps, **options: Any) -> PairLoss:
        result, shape = function(logps, **options), logps.chosen_sum.shape
        if not isinstance(result, PairLoss):
            scale = options.get("beta", 1.0)
            result = PairLoss(result, scale * logps.chosen_mean, scale * logps.rejected_mean)
        for part in result:
            if not isinstance(part, torch.Tensor) or part.shape != shape:
                got = f"shape {list(part.shape)}" if isinstance(part, torch.Tensor) else type(part).__name__
                raise ValueError(
                    f"loss_type = {path!r}: returned {got} for {len(logps.chosen_sum)} pairs; one loss a pair, "
                    f"{list(shape)}, is needed, alone or in a PairLoss"
                )
        return PairLoss(result.losses, result.chosen_rewards.detach(), result.rejected_rewards.detach())

    return compute


def _try(loss: Loss, values: Mapping[str, Any]) -> float:
    """The loss of a pair of equal log-probs, after a look at what the function makes of three made-up pairs."""
    chosen, rejected = (torch.tensor(means, device="cpu") * 8 for means in ([-1.0, -0.5, -2.0], [-1.0, -2.0, -0.5]))
    lengths = torch.full((3,), 8, device="cpu")
    reference = (chosen.clone(), rejected.clone()) if loss.needs_reference else (None, None)
    try:
        with torch.enable_grad():
            logps = PairLogps(chosen.requires_grad_(), rejected.requires_grad_(), lengths, lengths, *reference)
            losses = loss(logps, **values).losses
    except (NeedsReference, ValueError):
        raise
    except Exception as error:  # the user's function may raise anything
        raise ValueError(f"loss_type = {loss.name!r}: failed on three made-up pairs: {one_line(error)}") from error
    if not losses.isfinite().all():
        raise ValueError(
            f"loss_type = {loss.name!r}: not finite for chosen and rejected at "
            f"{', '.join(f'{c / 8:g} and {r / 8:g}' for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True))} "
            f"nats per token: {losses.tolist()}"
        )
    if not losses.requires_grad:
        raise ValueError(f"loss_type = {loss.name!r}: the losses do not depend on the log-probs (detached, or numbers)")
    return losses[0].item()
