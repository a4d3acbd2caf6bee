"""Early stopping under transformers' Trainer, by its own callback. Must not import the trainer."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback

from simpo.recipe import Recipe
from simpo.run.session import describe_early_stop


class EarlyStop(EarlyStoppingCallback):
    """`early_stopping_patience` of a recipe. Its count is that of the evaluations in the Trainer's history, so that a
    resumed run goes on with it, whatever patience it is given.

    Attributes:
        why: why training ended before its last step; None where it did not.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.early_stopping_patience, recipe.early_stopping_threshold)
        self.recipe = recipe
        self.why: str | None = None

    def count_again(self, args: Any, state: Any) -> bool:
        """Count a resumed run's evaluations; whether it had ended."""
        name, now, self.early_stopping_patience_counter = args.metric_for_best_model, state.best_metric, 0
        state.best_metric = None
        for line in state.log_history:
            if name in line and line["step"]:  # before the first step transformers keeps no best one
                self.check_metric_value(args, state, None, line[name])
                best = state.best_metric
                if best is None or (line[name] > best if args.greater_is_better else line[name] < best):
                    state.best_metric = line[name]
        state.best_metric = now
        return self._has_ended(state)

    def on_train_begin(self, *positional: Any, **others: Any) -> None:
        """transformers' own checks are the recipe's here."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **others: Any) -> None:
        """As in transformers; with the checkpoint that every run ends with."""
        super().on_evaluate(args, state, control, metrics, **others)
        if self._has_ended(state):
            control.should_save |= args.save_strategy != "no"

    def _has_ended(self, state: Any) -> bool:
        ended = self.early_stopping_patience_counter >= self.early_stopping_patience
        ended = ended and state.global_step < state.max_steps
        best = {"best_step": state.best_global_step, "best_metric": state.best_metric}
        self.why = describe_early_stop(self.recipe, state.global_step, **best) if ended else None
        return ended
