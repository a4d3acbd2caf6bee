"""`simpo calibrate`: settings for a recipe, from its own model and pairs, with the reasons.

    run_calibrate("recipe.yaml")  # -> calibrated.yaml in output_dir

One forward pass over some of the training pairs gives the margins the model begins with, and from them the target
margin and the scales of beta to try; short trainings, a sweep with two rungs, try those with learning rates around the
recipe's. Together they take about as many optimizer steps as the recipe's own run.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo.data.files import not_own, write_whole
from simpo.display import Display
from simpo.onpolicy.rounds import count_ranks
from simpo.recipe import KEYS, Recipe, load_recipe
from simpo.run.session import count_steps
from simpo.tuning.jobs import read_pairs, run_command_line
from simpo.tuning.sweep import Found, check_base, digests, prepare, read_sweep, run_sweep

TARGET_SHARE = 0.9
"""The target margin is what this share of the pairs does not have yet, so that most have a gradient to begin with."""

SPREADS = (1.0, 3.0)
"""Betas to try, in units of 1 / (spread of the margins): how differently a step weighs easy and hard pairs."""

RATES = (0.1, 0.3, 1.0, 3.0)
"""Learning rates to try, in units of the recipe's."""

NUM_PAIRS = 256


@dataclass(frozen=True, slots=True)
class Margins:
    """Where pairs start, in nats per token: quantiles of the mean log-prob of chosen less that of rejected."""

    count: int
    low: float
    middle: float
    high: float
    target: float

    @classmethod
    def of(cls, margins: Sequence[float]) -> Margins:
        ordered = sorted(margins)
        at = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.16, 0.5, 0.84, TARGET_SHARE)]
        return cls(len(ordered), *at)

    @property
    def spread(self) -> float:
        """Half of the middle 68%: the deviation, were they normal."""
        return (self.high - self.low) / 2


_HEAD = "# Proposed by simpo calibrate.\n"
"""Begins each file that this command writes, and may write anew."""


def run_calibrate(
    recipe: str | Path | Recipe, *, output: str | Path | None = None, display: Display | None = None
) -> Path:
    """Measure, probe, and write a recipe.

    Args:
        recipe: of a loss with a target margin and pairs of which some are held out.
        output: file to write; None = calibrated.yaml in output_dir.
    Returns:
        The file: the recipe with gamma_beta_ratio, beta and learning_rate as proposed, the reasons in front.
    Raises:
        ValueError: as `run_sweep`; also a loss that has no gamma_beta_ratio, or an output that holds something
            else.
    """
    base, display = load_recipe(recipe), display or Display()
    check_base(base)
    if base.loss_type != "sigmoid":
        raise ValueError(f"loss_type: {base.loss_type} is not calibrated; `simpo sweep` tries values of its keys")
    folder = Path(base.output_dir or "") / "calibration"
    target = Path(output) if output else Path(base.output_dir or "") / "calibrated.yaml"
    if target.is_file() and not target.read_bytes().startswith(_HEAD.encode()):
        raise not_own(target)
    data = prepare(base)
    in_a_step = base.global_batch_size or base.pairs_per_step(count_ranks(base) or 1)
    total = count_steps(base, math.ceil(len(data.train) / in_a_step))
    decides = {name: value for name, value in base.to_dict().items() if not KEYS[name].may_change}
    text = json.dumps([decides, digests(base, data)], sort_keys=True)
    key = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    margins = _measure(base, folder / f"margins-{key}")
    ratio = _rounded(min(1.2, max(0.1, margins.target)))
    betas = [_rounded(min(20.0, max(1.0, unit / max(margins.spread, 1e-3)))) for unit in SPREADS]
    first = max(3, round(total / (2 * len(betas) * len(RATES))))
    rates = [float(f"{base.learning_rate * unit:.1e}") for unit in RATES]
    short = {"save_strategy": "no"}  # what is measured is written as the recipe says
    probed = load_recipe(base, {"output_dir": str(folder / "probes"), "gamma_beta_ratio": ratio, **short})
    space: Any = {
        "learning_rate": tuple(f"{r:g}" for r in rates),
        "beta": tuple(dict.fromkeys(f"{b:g}" for b in betas)),
    }
    path = run_sweep(probed, space, rungs=(first, 4 * first), display=display)
    found = read_sweep(path)
    lines = _reasons(margins, ratio, found, total)
    chosen = load_recipe(base, {"gamma_beta_ratio": ratio, **{k: float(v) for k, v in found.best.settings.items()}})
    reasons = "".join(f"# {line}\n" for line in lines)
    write_whole(target, f"{_HEAD}{reasons}\n{chosen.to_yaml(for_any_processes=True)}")
    for line in lines:
        display.say(line)
    display.say(f"recipe: {target}; train it with `simpo train {shlex.quote(str(target))}`")
    return target


def _measure(base: Recipe, place: Path) -> Margins:
    """The untrained model's margins on some of the pairs it is to be trained on."""
    result = place / "result.json"
    if not result.exists():
        write_whole(place / "recipe.yaml", base.to_yaml())
        words = ["eval", str(place / "recipe.yaml"), "--split", "train", "--max-pairs", str(NUM_PAIRS)]
        code, said = run_command_line([*words, "--output", str(result)], place / "log.txt")
        if code:
            raise ValueError(f"the model's margins could not be measured: {said}")
    return Margins.of(read_pairs(place, "margin")[0].tolist())


def _rounded(value: float) -> float:
    """To two digits, which is more than is known."""
    return float(f"{value:.2g}")


def _reasons(margins: Margins, ratio: float, found: Found, total: int) -> list[str]:
    best = found.best
    beta, rate = best.settings["beta"], best.settings["learning_rate"]
    others = "; ".join(map(str, found.as_good)) or "none"
    steps = best.last.steps or 0
    goes_on = (
        f"it was still gaining between {best.results[-2].steps} and {steps} steps: give it the whole run, {total}"
        if found.gained
        else f"it gained no more than chance between {best.results[-2].steps} and {steps} steps: a run of {total} "
        "may be longer than these pairs need; watch the held-out accuracy"
    )
    return [
        f"gamma_beta_ratio {ratio:g}: the model begins with margins of {margins.middle:+.3f} ({margins.low:+.3f} to "
        f"{margins.high:+.3f} for the middle 68% of {margins.count} training pairs, nats per token); "
        f"{TARGET_SHARE:.0%} of them are below {margins.target:+.3f}",
        f"beta {beta}: the margins' spread is {margins.spread:.3f}, so that beta * spread is "
        f"{float(beta) * margins.spread:.1f}; of those tried it did best",
        f"learning_rate {rate}: the best on held-out pairs after {steps} steps, {best.last.accuracy.value:.1%} right "
        f"(longer and shorter chosen responses alike); as good within the interval of their difference: {others}",
        f"budget: {goes_on}",
    ]
