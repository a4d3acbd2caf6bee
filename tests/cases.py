"""Which cases of a test run every time; the others are long ones (make test-long)."""

from collections.abc import Iterable
from typing import Any

import pytest


def rarely(*values: Any, **options: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.long, **options)


def often(cases: Iterable[str], *names: str) -> list[Any]:
    """The cases in their order, those that are not named as long ones."""
    if unknown := {*names} - {*(cases := list(cases))}:
        raise ValueError(f"no such case: {sorted(unknown)}; there are {cases}")
    return [case if case in names else rarely(case) for case in cases]
