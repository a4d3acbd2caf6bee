"""A language model as the judge, behind OpenAI's protocol: grades, or comparisons in both orders.

Compared, a response's score is the mean of its points: 1 for each verdict for it, 0 against it, 1/2 for a tie. A judge
that prefers what comes first thereby gives both 1/2.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import permutations
from pathlib import Path
from typing import Any

from simpo.data.columns import RowError
from simpo.data.messages import Message
from simpo.errors import short
from simpo.onpolicy.client import Choice, Client, Request
from simpo.onpolicy.scorers.rating import Explained, Rater, Row, Scores, column

_PLACES = {"grade": {"prompt", "response"}, "pairs": {"prompt", "first", "second"}}
_PLACES["reference"] = _PLACES["pairs"]


def _line(name: str, value: str) -> re.Pattern[str]:
    """A line that begins with `name` and goes on with `value`; also a key of JSON, a tag, or the text's last sentence.

    What leaves it open ("1 or 2", "1/2", "1 if ...") is no value, nor is a number in a sentence ("Grade 10 would ...").
    """
    mark = r"(?:[^\w\n]|_)"  # of Markdown, JSON and the like
    words = r"(?:is|an?|the|answer|response|assistant|boxed|text)"
    begin = rf"^{mark}*(?:\d+[.)]{mark}*)?(?:(?:so|thus|therefore|my|the|final|overall)\b{mark}+)*{name}"
    inside = rf"""["'<]{name}(?=["'>])|(?<=[.!?] )(?=.{{,40}}\Z){mark}*{name}"""
    scale = r"(?:[\s*_]*(?:[(\[][^()\[\]\n]*[)\]]|(?:/|out of) ?10))?"  # Grade (1-10): 8
    other = rf"(?:and\b|[/|&=<]){mark}*(?:(?:answer|response){mark}*)?(?:\d|tie\b)|(?:to\b|[-\u2013:,])\s*\d"
    value += rf"""(?![^\W_]|[.,]\d|[%?]|[\s"'*_)]*(?:(?:or|if|unless|would|vs|versus|out)\b|{other}))"""
    said = rf"[^\S\n]*(?:[^\w\s]|_|is\b){mark}*(?:{words}{mark}*)*{value}"
    alone = rf"[\W_]*(?:{words}[\W_]*)*{value}{mark}*$"  # under a heading, or without a colon
    return re.compile(rf"(?im)(?:{begin}|{inside})(?![^\W_]){scale}(?:{said}|{alone})")


_GRADE = _line("grade", r"(?<![-\u2212.])(\d+(?:\.\d+)?)(?:[\s*_]*(?:/|out of)\s*10(?:\.0)?)?")
_VERDICT = _line("verdict", "(1|2|tie)")
_THOUGHT_ENDS = re.compile(r"(?i)</think(?:ing)?>|\[/think\]")
_THOUGHT_BEGINS = re.compile(r"(?i)<think(?:ing)?>|\[think\]")
POINTS = {"1": 1.0, "2": 0.0, "tie": 0.5}
"""Verdict -> points of the answer that comes first."""


def build(options: Any) -> Rater:
    """The scorer; the server is first asked when there is work.

    Raises:
        ValueError: the template is not there, or lacks a place; the client cannot be made.
    """
    template = _load_template(options)
    client = Client(
        options.url,
        options.model,
        key_variable=options.api_key_variable,
        concurrency=options.concurrency,
        timeout_s=options.timeout_s,
    )
    sampling = {"temperature": options.temperature, "max_tokens": options.max_tokens}

    def rate_rows(rows: Iterable[Row]) -> Iterator[tuple[str, Scores]]:
        with client:
            client.try_out(sampling)
            yield from _judge(client, rows, options, template, sampling)

    digest = hashlib.blake2b(template.encode(), digest_size=16).hexdigest()
    return Rater(rate_rows, {"template_text": digest})


def _load_template(options: Any) -> str:
    if options.template is None:
        name = "judge_grade.txt" if options.form == "grade" else "judge_pair.txt"
        return (files("simpo") / "onpolicy" / "scorers" / name).read_text(encoding="utf-8")
    path = Path(options.template)
    if not path.is_file():
        raise ValueError(f"template: {str(path)!r} is not a file")
    text = path.read_text(encoding="utf-8")
    if missing := sorted(each for each in _PLACES[options.form] if f"{{{each}}}" not in text):
        raise ValueError(f"template: {path} has no {{{missing[0]}}}, where that is to stand")
    return text


@dataclass
class _Open:
    """A row whose answers are still coming: what each (first, second) got, or each response's grade."""

    row: Row
    missing: int
    points: list[list[float]] = field(default_factory=list)
    said: list[dict[str, Any]] = field(default_factory=list)
    error: RowError | None = None


def _judge(
    client: Client, rows: Iterable[Row], options: Any, template: str, sampling: dict[str, Any]
) -> Iterator[tuple[str, Scores]]:
    open_rows: dict[str, _Open] = {}
    refused: list[tuple[str, RowError]] = []

    def requests() -> Iterator[tuple[str, Request]]:
        for row in rows:
            try:
                asked = list(_questions(row, options, template))
            except RowError as error:
                refused.append((row["id"], error))
                continue
            open_rows[row["id"]] = _Open(row, len(asked), [[] for _ in row["responses"]])
            for places, text in asked:
                yield f"{row['id']} {places[0]} {places[1]}", Request([{"role": "user", "content": text}], sampling)

    for name, answer in client.chat_all(requests()):
        row_id, *places = name.rsplit(" ", 2)
        state = open_rows[row_id]
        state.missing -= 1
        try:
            _note(state, [int(place) for place in places], answer, options.form)
        except RowError as error:
            state.error = error
        if not state.missing:
            del open_rows[row_id]
            scores = [sum(each) / len(each) for each in state.points] if state.error is None else []
            yield row_id, state.error or (Explained(scores, state.said) if options.keep_answers else scores)
        yield from refused
        refused.clear()
    yield from refused


def _questions(row: Row, options: Any, template: str) -> Iterator[tuple[tuple[int, int], str]]:
    """What is asked about a row: the places of the two it is about (-1: the reference, or nothing), and the text."""
    prompt, texts = prompt_as_text(row["prompt"]), [response["text"] for response in row["responses"]]
    if options.form == "grade":
        for place, text in enumerate(texts):
            yield (place, -1), _filled(template, prompt=prompt, response=text)
        return
    if options.form == "reference":
        reference = str(column(row, options.reference))
        both = [pair for place in range(len(texts)) for pair in ((place, -1), (-1, place))]
        texts = [*texts, reference]  # at -1
    else:
        if len(texts) < 2:
            raise RowError("one response", "there is nothing to compare it with; use form grade or reference")
        both = list(permutations(range(len(texts)), 2))
    for first, second in both:
        yield (first, second), _filled(template, prompt=prompt, first=texts[first], second=texts[second])


def _filled(template: str, **values: str) -> str:
    """The template with its places filled, in one pass: what is filled in is not looked at."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def prompt_as_text(prompt: Sequence[Message]) -> str:
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].upper()}: {message['content']}" for message in prompt)


def _note(state: _Open, places: list[int], answer: list[Choice] | RowError, form: str) -> None:
    """Add what one answer says to the points of the responses it is about. Raises RowError where it says nothing."""
    if isinstance(answer, RowError):
        raise answer
    text, (first, second) = answer[0].text, places
    if not answer[0].finished:
        raise RowError("unreadable", f"max_tokens cut the judge's answer, raise it: {short(text[-200:], 200)}")
    said = _THOUGHT_ENDS.split(text)[-1].strip()
    lines = () if _THOUGHT_BEGINS.match(said) else (_GRADE if form == "grade" else _VERDICT).finditer(said)
    found = [line[line.lastindex] for line in lines]
    if not found:
        raise RowError(
            "unreadable", f"no line 'Grade: N' or 'Verdict: N' in the judge's answer {short(text[-200:], 200)}"
        )
    if form == "grade":
        if not 1 <= float(found[-1]) <= 10:
            raise RowError("unreadable", f"the judge's grade is {found[-1]}, not 1 to 10")
        state.points[first].append(float(found[-1]))
        state.said.append({"response": first, "grade": float(found[-1]), "text": text})
        return
    points = POINTS[found[-1].lower()]
    state.said.append({"first": first, "second": second, "verdict": found[-1].lower(), "text": text})
    if first >= 0:
        state.points[first].append(points)
    if second >= 0:
        state.points[second].append(1 - points)
