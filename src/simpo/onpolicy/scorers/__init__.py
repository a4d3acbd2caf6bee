"""What rates responses, a module for each way to: rules and functions, code, models, a judge.

Their kinds and options are declared in `simpo.recipe.scorers`; a new one is a declaration there and an entry here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simpo.onpolicy.scorers.rating import Rater
    from simpo.recipe import Recipe


def build_rater(kind: str, options: Any, recipe: Recipe) -> Rater:
    """The scorer of a kind, with its options as `read_scorer` gives them; nothing large is loaded before it works.

    Raises:
        ValueError: a function, model or package that is not there.
    """
    if kind in ("reward_model", "logprob"):
        from simpo.onpolicy.scorers import models

        build = models.build_reward_model if kind == "reward_model" else models.build_logprob
        return build(options, recipe)
    if kind in ("code", "judge"):
        from simpo.onpolicy.scorers import code, judge

        return (code if kind == "code" else judge).build(options)
    from simpo.onpolicy.scorers import rules

    return rules.build(kind, options)
