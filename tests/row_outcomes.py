"""What a row of data comes to, as a value that tests compare."""

from __future__ import annotations

from typing import Any

from simpo.data.preferences import RowError, pair_from_row


def outcome(row: Any) -> Any:
    """(prompt, chosen, rejected) of a row, or why it gives no pair."""
    try:
        pair = pair_from_row(row)
    except RowError as error:
        return error.reason
    return pair.prompt, pair.chosen, pair.rejected
