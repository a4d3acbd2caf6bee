"""For `make docs`: blank lines between the sections of docstrings, which stand without them in the sources."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"\n(?=(?:Args|Attributes|Returns|Yields|Raises):\n|Source: )")


class Sections(griffe.Extension):
    """Makes sections visible to griffe's parser, which looks for a blank line before each."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)
