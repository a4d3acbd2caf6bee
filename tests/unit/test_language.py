"""Languages of texts, by a packaged model: right where it answers, and no answer where there is little to go by."""

from __future__ import annotations

import pytest

pytest.importorskip("py3langid", reason="needs simpo[clean]")

from simpo.data.language import identify_language

TEXTS = {
    "en": "The library closes at six, so please return the books before you leave.",
    "de": "Die Bibliothek schließt um sechs, bitte geben Sie die Bücher vorher zurück.",
    "fr": "La bibliothèque ferme à six heures, merci de rendre les livres avant de partir.",
    "es": "La biblioteca cierra a las seis, así que devuelva los libros antes de salir.",
    "zh": "图书馆六点关门。请在离开之前归还所有借阅的书籍。谢谢合作。",
    "ja": "図書館は六時に閉まりますので、お帰りの前に本をお返しください。",
    "ru": "Библиотека закрывается в шесть, поэтому верните книги до ухода.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_a_sentence_is_recognised(language):
    found = identify_language(TEXTS[language])
    assert found is not None
    assert found[0] == language
    assert found[1] > 0.7


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "OK, Berlin!",
        "x = 1 + 2 * 3",
        "```python\nfor index in range(10):\n    print(index)\n```",
        "12:30 :-)",
    ],
)
def test_what_says_too_little_has_no_language(text):
    assert identify_language(text) is None


def test_code_and_addresses_do_not_decide():
    code = "```python\nfor index, value in enumerate(values):\n    print('the value of this', value)\n```"
    found = identify_language(f"{TEXTS['de']}\n{code}\nhttps://example.org/the/quick/brown/fox/and/so/on")
    assert found is not None
    assert found[0] == "de"
