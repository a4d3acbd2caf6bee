"""Whether the hub can be reached, which is asked once in each process, before anything is fetched from it.

Its libraries would try each file again and again, for the better part of a minute, where there is no network. Must not
import anything heavy.
"""

from __future__ import annotations

import functools
import sys
import threading
import time

_PATIENCE_S = 4.0
"""For all tries together, the time that names take to be resolved included."""


@functools.cache
def unreachable_hub() -> str:
    """Why the hub cannot be reached, in words; empty where it can.

    Where not, its libraries look into their caches alone from here on, as they do with HF_HUB_OFFLINE=1.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    answers: list[str] = []
    asking = threading.Thread(target=_ask, args=(constants.ENDPOINT, answers), daemon=True)
    asking.start()
    asking.join(_PATIENCE_S)
    reason = answers[-1] if answers else f"{constants.ENDPOINT} did not answer within {_PATIENCE_S:g} s"
    if reason:
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return reason


def _ask(url: str, answers: list[str]) -> None:
    """Append "" once the hub answers, whatever it says; before that what went wrong."""
    from huggingface_hub import get_session

    for _ in range(3):
        try:
            status = get_session().head(url, timeout=_PATIENCE_S).status_code
        except Exception as error:  # of whatever library it uses to ask
            answers.append(f"{url}: {error}")
        else:
            answers.append(f"{url} answers with {status}" if status >= 500 else "")
            if not answers[-1]:
                return
        time.sleep(1.0)
