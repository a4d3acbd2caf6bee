"""Owns the rendering of pairs to text: the chat template, where the prompt ends, what ends a turn.

Knows nothing of token ids. The text of a prompt begins the text of both its full renderings; each full rendering ends
where training ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from simpo.core.packing import common_prefix_length
from simpo.data.preferences import Message, Pair, RowError, turn
from simpo.errors import one_line

PROBE_USER = "Qx7 probe"
PROBE_ANSWERS = ("Zk3 one", "Wv8 two")
"""Stand-ins whose place in a rendering is looked for: nothing in common at either end."""


def load_chat_template(tokenizer: Any, chat_template: str | None = None) -> str | None:
    """The Jinja text to use: `chat_template` (text, a file, or a name the tokenizer knows), else the tokenizer's own.

    Raises:
        ValueError: `chat_template` is none of these, or the tokenizer has several templates and no default.
    """
    own: str | dict[str, str] | None = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        if (name := chat_template or "default") in own:
            return own[name]
        if chat_template is None:
            raise ValueError(f"chat_template: the tokenizer has several, none named default; name one of {sorted(own)}")
    elif chat_template is None:
        return own
    if "{" in chat_template:
        return chat_template
    if os.path.isfile(chat_template):
        with open(chat_template, encoding="utf-8") as file:
            return file.read()
    raise ValueError(f"chat_template: {chat_template!r} is neither Jinja text nor a file; give one or the other")


def template_takes_system(tokenizer: Any, template: str | None) -> bool:
    """Whether the template renders a system turn."""
    messages = [turn("system", PROBE_ANSWERS[0]), turn("user", PROBE_USER)]
    try:
        return template is not None and PROBE_ANSWERS[0] in _render(tokenizer, template, messages, header=True)
    except RowError:  # many templates refuse on purpose here
        return False


# --- rendering -------------------------------------------------------------------------------------------------------


class PairTexts(NamedTuple):
    """One pair as text: `prompt` begins both full texts, which end where training ends."""

    prompt: str
    chosen: str
    rejected: str


def _render(tokenizer: Any, template: str, dialogue: list[Message], *, header: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            dialogue, chat_template=template, tokenize=False, add_generation_prompt=header
        )
    except Exception as error:  # a template may raise anything
        raise RowError("template", f"the chat template refuses this dialogue: {one_line(error)}") from error


class TemplateRenderer:
    """Pairs to text through a chat template.

    The prompt's text is the rendering with the generation header. Where the template writes more in front of every
    finished answer (an empty thinking block, a channel name), that belongs to the prompt too: it is not the response.

    Raises:
        ValueError: the template cannot render a user turn and an answer.
    """

    def __init__(self, tokenizer: Any, template: str, end_markers: Sequence[str]):
        self.tokenizer, self.template = tokenizer, template
        prompt = [turn("user", PROBE_USER)]
        try:
            self.sample = self._render(prompt, header=True)
            first, second = self._probe_answers(prompt)
        except RowError as error:
            raise ValueError(
                f"chat_template: it cannot render a user turn and an answer ({one_line(error.__cause__ or error)}); "
                "set chat_template in the recipe to one that can"
            ) from error
        self.suffix = first[len(first) - common_prefix_length(first[::-1], second[::-1]) :]
        before = first.removesuffix(PROBE_ANSWERS[0] + self.suffix)
        if before == first:
            raise ValueError("chat_template: it does not write an assistant turn's text as it is; set another one")
        kept, marker = _split_suffix(self.suffix, end_markers)
        self.kept_suffix = self.suffix[:kept]
        self.adds_end = marker is not None
        self.end_text = marker or tokenizer.eos_token
        # Blanks alone in front of an answer stay with it: they are part of its first token.
        extra = before[len(self.sample) :] if before.startswith(self.sample) else ""
        self.answer_opening = extra if extra.strip() else ""

    def __call__(self, pair: Pair) -> PairTexts:
        """The texts of a pair.

        Raises:
            RowError: the template refuses the dialogue, or what it writes is not the prompt and an answer.
        """
        prompt = pair.turns
        header = self._render(prompt, header=True)
        chosen, rejected = (self._render([*prompt, turn("assistant", text)]) for text in (pair.chosen, pair.rejected))
        for begin in self._beginnings(prompt, header):
            if chosen.startswith(begin) and rejected.startswith(begin):
                return PairTexts(begin, self._trim(chosen, begin, "chosen"), self._trim(rejected, begin, "rejected"))
        raise RowError("template", "the chat template rewrites the prompt when the answer is there")

    def _render(self, dialogue: list[Message], *, header: bool = False) -> str:
        return _render(self.tokenizer, self.template, dialogue, header=header)

    def _probe_answers(self, prompt: list[Message]) -> list[str]:
        return [self._render([*prompt, turn("assistant", answer)]) for answer in PROBE_ANSWERS]

    def _beginnings(self, prompt: list[Message], header: str) -> Iterator[str]:
        """What may stand before the text of an answer, the likeliest first."""
        yield header + self.answer_opening
        yield header
        # Some templates ask for an answer with another header than they write before a finished one.
        first, second = self._probe_answers(prompt)
        length = common_prefix_length(first, second)
        if first[length:].startswith(PROBE_ANSWERS[0]):
            yield first[:length]

    def _trim(self, full: str, header: str, what: str) -> str:
        """The full text up to its one end of turn."""
        if not full.endswith(self.suffix) or len(full) - len(self.suffix) < len(header):
            raise RowError("template", f"the chat template ends {what} unlike other answers")
        body = full[len(header) : len(full) - len(self.suffix)]
        return header + _one_ending(body, self.end_text, what) + self.kept_suffix


class PlainRenderer:
    """Pairs to text without a template: prompt and response as they are; the end of turn is added as a token."""

    adds_end = False
    sample = ""

    def __init__(self, end_text: str | None):
        self.end_text = end_text

    def __call__(self, pair: Pair) -> PairTexts:
        """The texts of a pair. Raises ValueError for messages, RowError for a response that ends twice."""
        prompt = pair.prompt
        if not isinstance(prompt, str):
            raise ValueError(
                f"row {pair.row_id}: the prompt is a list of messages but the tokenizer has no chat template; "
                "set chat_template in the recipe (Jinja text or a file), or use an instruct model's tokenizer"
            )
        chosen = _one_ending(pair.chosen, self.end_text, "chosen")
        return PairTexts(prompt, prompt + chosen, prompt + _one_ending(pair.rejected, self.end_text, "rejected"))


def _split_suffix(suffix: str, end_markers: Sequence[str]) -> tuple[int, str | None]:
    """How much of the template's suffix is trained, and the end-of-turn text in it.

    Kept up to and with the first end marker. A suffix without one is kept without its trailing blanks.
    """
    found = [(suffix.find(marker), -len(marker), marker) for marker in end_markers if marker and marker in suffix]
    if not found:
        return len(suffix.rstrip()), None
    at, _, marker = min(found)
    return at + len(marker), marker


def _one_ending(body: str, end_text: str | None, what: str) -> str:
    """The response without end-of-turn text that the data itself brought along."""
    if end_text and end_text in body:
        stripped = body.rstrip()
        while stripped.endswith(end_text):
            body = stripped[: -len(end_text)]
            stripped = body.rstrip()
        if end_text in body:
            raise RowError("malformed", f"the end-of-turn token {end_text!r} stands inside {what}")
    if not body.strip():
        raise RowError("empty", f"nothing is left of {what} in the template's rendering")
    return body
