"""What a sweep tries: values of recipe keys, on a grid, drawn at random, or proposed by Optuna.

    values, rest = read_space(["--learning_rate", "3e-7,5e-7", "--beta", "2,10", "--seed", "1"])

A text of the command line stands for each value, and the recipe reads it as it reads any override.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simpo.recipe import KEYS, STAGE_KEYS

METHODS = ("grid", "random", "optuna")
Space = dict[str, "tuple[str, ...] | Range"]
Settings = dict[str, str]  # key -> a value of it, as text

_RANGE = re.compile(r"(?P<low>[^.,\s][^,\s]*?)\.\.(?P<high>[^.,\s][^,\s]*)")
_MANY = 200  # runs that are more likely a slip than meant


@dataclass(frozen=True, slots=True)
class Range:
    """low..high; by their logarithm where they are a factor of 10 or more apart, as learning rates are."""

    low: float
    high: float

    @property
    def is_log(self) -> bool:
        return self.low > 0 and self.high / self.low >= 10

    def at(self, share: float) -> str:
        """The value at a share of the way, in [0, 1], to three digits."""
        if self.is_log:
            return f"{math.exp(math.log(self.low) + share * math.log(self.high / self.low)):.3g}"
        return f"{self.low + share * (self.high - self.low):.3g}"

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


def read_space(words: Sequence[str]) -> tuple[Space, list[str]]:
    """Split the words of a command line into the keys with several values and all others, which are left as they are.

    Raises:
        ValueError: a range that is none; a key given twice.
    """
    space: Space = {}
    rest: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if not equals and word.startswith("--") and left and not left[0].startswith("--"):
            value = left.pop(0)
            word = f"{word}={value}"
        key = name.removeprefix("--").replace("-", "_")
        parsed = _values(key, value)
        if parsed is None:
            rest.append(word)
        elif key in space:
            raise ValueError(f"{key} is given twice; write all of its values in one list: --{key} a,b,c")
        else:
            space[key] = parsed
    return space, rest


def _values(key: str, text: str) -> tuple[str, ...] | Range | None:
    """Several values of a key; None for a single one, and for a key whose own value is a list or a mapping."""
    known = KEYS.get(key) or STAGE_KEYS.get(key)
    if known is not None and known.types & {list, dict}:
        return None
    if found := _RANGE.fullmatch(text):
        try:
            low, high = float(found["low"]), float(found["high"])
        except ValueError:
            return None  # a path with two dots, say
        if not low < high or not math.isfinite(high):
            raise ValueError(f"{key} = {text}: a range goes from a smaller number to a larger one, as 1e-7..1e-5")
        return Range(low, high)
    if "," not in text:
        return None
    values = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if "" in values:
        raise ValueError(f"{key} = {text}: a value is missing between two commas")
    return values


def propose_all(space: Mapping[str, Any], *, method: str, trials: int | None, seed: int) -> list[Settings]:
    """All settings that a grid or a random search tries, without repetition, in their order.

    Raises:
        ValueError: nothing to vary, a range on a grid, a number of trials that does not fit the method.
    """
    check_space(space, method=method, trials=trials)
    if method == "grid":
        return [dict(zip(space, each)) for each in itertools.product(*space.values())]
    rng = random.Random(seed)
    found: dict[tuple[str, ...], Settings] = {}
    for _ in range(100 * (trials or 1)):  # a small space has fewer settings than were asked for
        drawn = {key: v.at(rng.random()) if isinstance(v, Range) else rng.choice(v) for key, v in space.items()}
        found.setdefault(tuple(drawn.values()), drawn)
        if len(found) == trials:
            break
    return list(found.values())


def foresee(space: Mapping[str, Any], *, method: str, trials: int | None, seed: int) -> list[Settings]:
    """Each value and each end of a range, beside the first of the other keys; then all that is known to be tried.

    Raises:
        ValueError: as `propose_all`; also Optuna is wanted and not there.
    """
    check_space(space, method=method, trials=trials)
    ends = {key: (v.at(0), v.at(1)) if isinstance(v, Range) else v for key, v in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    one_by_one = [{**first, key: value} for key, values in ends.items() for value in values]
    if method == "optuna":
        return [*one_by_one, propose_next(space, [], seed=seed)]
    return one_by_one + propose_all(space, method=method, trials=trials, seed=seed)


def check_space(space: Mapping[str, Any], *, method: str, trials: int | None) -> None:
    """See `propose_all`."""
    if not space:
        raise ValueError("nothing to vary: give a key several values, as --learning_rate 3e-7,5e-7,1e-6")
    if method == "grid":
        ranges = [key for key, values in space.items() if isinstance(values, Range)]
        if ranges:
            raise ValueError(f"{ranges[0]} = {space[ranges[0]]}: a grid needs a list; or give --method random")
        if trials is not None:
            raise ValueError("--trials: a grid tries every combination; give --method random or optuna")
        count = math.prod(len(values) for values in space.values())
        if count > _MANY:
            raise ValueError(f"a grid of {count} runs; at most {_MANY}: fewer values, or --method random --trials N")
    elif trials is None:
        raise ValueError(f"--method {method} needs --trials: how many settings to try")


def propose_next(space: Mapping[str, Any], tried: Sequence[tuple[Settings, float | None]], *, seed: int) -> Settings:
    """Optuna's next proposal after the settings that were tried, with what each measured; higher is better.

    Args:
        tried: None for a run that failed.
    Source: TPE, as in optuna (Bergstra et al., NeurIPS 2011).
    """
    try:
        import optuna
    except ImportError:
        raise ValueError("--method optuna: install simpo[sweep], or give --method random") from None

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {
        key: optuna.distributions.FloatDistribution(values.low, values.high, log=values.is_log)
        if isinstance(values, Range)
        else optuna.distributions.CategoricalDistribution(values)
        for key, values in space.items()
    }
    # Its seed depends on how many there were, so that a sweep that goes on proposes what it would have proposed.
    sampler = optuna.samplers.TPESampler(seed=seed + len(tried), n_startup_trials=max(4, 2 * len(space)))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for settings, value in tried:
        params = {key: float(text) if isinstance(space[key], Range) else text for key, text in settings.items()}
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=value, state=state))
    proposed = study.ask(spaces).params
    return {key: f"{value:.3g}" if isinstance(space[key], Range) else str(value) for key, value in proposed.items()}
