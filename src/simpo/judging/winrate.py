"""What judgements say: win rate, and win rate at equal length, each with an interval by bootstrap over prompts.

Pure functions of NumPy arrays.
"""

from __future__ import annotations

import numpy as np

from simpo.evaluation.statistics import Interval, wilson_interval

_RESAMPLES = 10_000
_REFITS = 1_000
_HELD = 2**17  # weights at one time
_NEWTON_STEPS = 100
_WEAK = 100.0  # so weak a penalty (c^2 / 200) moves no estimate, and keeps one finite where length decides all


def win_rate(points: np.ndarray) -> Interval:
    """Mean of the points, with the middle 95% of its bootstrap; Wilson's interval where all points are equal.

    Args:
        points: [P], 1 for each prompt that is won, 0 lost, between them what was judged in part.
    """
    values, counts = np.unique(points, return_counts=True)
    if len(values) == 1:  # resampling cannot know what else there might be
        return wilson_interval(float(points.sum()), len(points))
    drawn = np.random.default_rng(0).multinomial(len(points), counts / len(points), size=_RESAMPLES)
    return Interval(float(points.mean()), *_middle(drawn @ values / len(points)))


def length_controlled_win_rate(points: np.ndarray, lengths: np.ndarray, other_lengths: np.ndarray) -> Interval:
    """The win rate to expect of answers as long as the other side's.

        logit P(win) = theta + phi * tanh((length - other length) / standard deviation of these differences)

    fitted to the points, at length difference 0: 1 / (1 + exp(-theta)). This is AlpacaEval 2's model without its term
    for each instruction's difficulty, which is known for its own 805 alone.

    Args:
        points: as in `win_rate`.
        lengths, other_lengths: [P], of both sides' answers, in characters.
    Source: Dubois et al., Length-Controlled AlpacaEval, arXiv:2404.04475, section 3.
    """
    count, rng = len(points), np.random.default_rng(0)
    if len(np.unique(points)) == 1:
        return win_rate(points)
    difference = (lengths - other_lengths).astype(float)
    spread = difference.std()
    features = np.stack([np.ones(count), np.tanh(difference / spread) if spread else difference])
    chunk = max(1, _HELD // count)
    sizes = [min(chunk, _REFITS - done) for done in range(0, _REFITS, chunk)]
    drawn = (rng.multinomial(count, np.full(count, 1 / count), size=size) for size in sizes)
    (fitted,) = fit_logistic(points, features, np.ones((1, count)))
    refitted = np.concatenate([fit_logistic(points, features, weights, begin=fitted)[:, 0] for weights in drawn])
    return Interval(float(_logistic(fitted[0])), *_middle(_logistic(refitted)))


def fit_logistic(
    points: np.ndarray, features: np.ndarray, weights: np.ndarray, *, begin: np.ndarray | float = 0.0
) -> np.ndarray:
    """The coefficients of a logistic model, for many weightings of the same observations at once, by Newton's method.

    Args:
        points: [P], 0 to 1; one between is a win and a loss, each in part.
        features: [F, P].
        weights: [B, P].
        begin: coefficients [F] that are near.
    Returns:
        [B, F]: scikit-learn's `LogisticRegression(C=100, fit_intercept=False)`, which takes 3 ms for each weighting and
        would make the bootstrap what one waits for.
    """
    found = np.zeros((len(weights), len(features))) + begin
    ridge = np.eye(len(features)) / _WEAK
    for _ in range(_NEWTON_STEPS):
        chance = _logistic(found @ features)
        slope = (weights * (points - chance)) @ features.T - found / _WEAK
        curved = weights * chance * (1 - chance)
        curvature = np.einsum("fp,bp,gp->bfg", features, curved, features, optimize=True) + ridge
        step = np.linalg.solve(curvature, slope[..., None])[..., 0].clip(-2, 2)  # far off, Newton's steps are too long
        found += step
        if np.abs(step).max() < 1e-8:
            break
    return found


def _logistic(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(values / 2))


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
