"""`simpo train` whose processes are sent signals: signalled_worker.py RECIPE PLAN, under torchrun.

PLAN is JSON: for each attempt (torchrun's restarts counted from 0) the rank, the step and the signal's name; the
process gets it as that step begins. Later attempts are left alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from simpo.cli import main
from simpo.trainer import Trainer


def send_signals(plan: list[list[Any]]) -> None:
    """Have this process signalled if it is its turn."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt >= len(plan):
        return
    rank, step, name = plan[attempt]
    train_step = Trainer.train_step

    def signalled(self: Trainer, step_plan: Any) -> dict[str, float]:
        if int(os.environ["RANK"]) == rank and step_plan.step + 1 == step:
            os.kill(os.getpid(), signal.Signals[name])
        return train_step(self, step_plan)

    Trainer.train_step = signalled


if __name__ == "__main__":
    recipe, plan = sys.argv[1:]
    send_signals(json.loads(plan))
    sys.argv = ["simpo", "train", recipe]
    main()
