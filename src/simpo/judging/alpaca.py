"""AlpacaEval 2's own length-controlled win rate, by the alpaca-eval package, for its own 805 prompts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from simpo.errors import one_line

_DATASETS = {"helpful_base", "koala", "oasst", "selfinstruct", "vicuna"}
_PROMPTS = 805


def alpaca_eval_win_rate(annotations: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float] | None, str | None]:
    """The package's length-controlled win rate and its standard error, as shares, and a note for the reader.

    Its regression reads each instruction's difficulty from the hub by the place of the prompt among the 805, so that it
    is for all of them, in their order: nothing is asked of it for other prompts.

    Args:
        annotations: as AlpacaEval has them.
    Returns:
        None where these are other prompts, or the package could not do it; the note then says why.
    """
    if len(annotations) != _PROMPTS or {row["dataset"] for row in annotations} != _DATASETS:
        return None, None
    if find_spec("alpaca_eval") is None:
        return None, "these are AlpacaEval's prompts: its own length-controlled win rate needs pip install alpaca-eval"
    try:
        import pandas
        from alpaca_eval.metrics import get_length_controlled_winrate

        logging.disable(logging.WARNING)
        found = get_length_controlled_winrate(
            pandas.DataFrame(annotations), save_weights_dir=None, is_add_glm_preference_inplace=False
        )
    except Exception as error:  # the package's, its requirements' or the hub's: the result stands without it
        return None, f"alpaca-eval could not compute its own length-controlled win rate: {one_line(error)}"
    finally:
        logging.disable(logging.NOTSET)
    names = {"value": "length_controlled_winrate", "standard_error": "lc_standard_error"}
    return {key: float(found[name]) / 100 for key, name in names.items()}, None
