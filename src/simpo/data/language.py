"""Owns one thing: which language a text is in, by py3langid's packaged model (97 languages, no download).

Shared by the filter `clean.languages` and by scorers. Imports the package where it is used: simpo[clean].
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from typing import Any

MIN_LETTERS = 20
"""Below this a text says too little: names, numbers and loan words look like any language."""
MIN_CONFIDENCE = 0.9

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)
_NOT_LETTERS = re.compile(r"[\W\d_]+")


def identify_language(text: str) -> tuple[str, float] | None:
    """The language of a text and how sure that is, code and addresses aside.

    Returns:
        Its ISO 639-1 code and a probability; None where fewer than `MIN_LETTERS` letters are left to go by (a third of
        that in scripts whose letters are syllables or words).
    Raises:
        ValueError: simpo[clean] is not installed.
    """
    identify = _identifier().classify
    plain = _CODE.sub(" ", text)
    letters = _NOT_LETTERS.sub("", plain)
    if len(letters) + 2 * sum(letter >= "\u2e80" for letter in letters) < MIN_LETTERS:
        return None
    language, confidence = identify(plain)
    return language, confidence


def known_languages() -> list[str]:
    """The codes that `identify_language` can give. Raises as it does."""
    return sorted({*_identifier().nb_classes})


def check_languages(codes: Iterable[str], where: str) -> None:
    """Raise ValueError for a code that `identify_language` never gives; `where` is the key that holds it."""
    known = _identifier().labels
    for code in codes:
        if code not in known:
            near = difflib.get_close_matches(code[:2].lower(), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where} = {code!r}: no such language; write its two-letter code, such as {near!r}")


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError("telling languages apart needs py3langid: pip install 'simpo[clean]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
