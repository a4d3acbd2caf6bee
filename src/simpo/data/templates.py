"""Owns the rendering of pairs to text: the chat template, where the prompt ends, what ends a turn.

Knows nothing of token ids. The text of a prompt begins the text of both its full renderings; each full rendering ends
where training ends.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def template_takes_system(tokenizer: Any, chat_template: str | None = None) -> bool:
    """Whether the template renders a system turn."""
    template = load_chat_template(tokenizer, chat_template)
    if template is None:
        return False
    messages = [turn("system", PROBE_ANSWERS[0]), turn("user", PROBE_USER)]
    try:
        text = _render(tokenizer, template, [messages], header=True)[0]
    except Exception:  # a template may raise anything, and many raise on purpose here
        return False
    return PROBE_ANSWERS[0] in text


# --- rendering -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PairTexts:
    """One pair as text: `prompt` begins both full texts, which end where training ends."""

    prompt: str
    chosen: str
    rejected: str


def _render(tokenizer: Any, template: str, dialogues: list[list[Message]], *, header: bool) -> list[str]:
    return tokenizer.apply_chat_template(
        dialogues, chat_template=template, tokenize=False, add_generation_prompt=header
    )


class TemplateRenderer:
    """Pairs to text through a chat template.

    The prompt's text is the rendering with the generation header. Where the template writes more in front of every
    finished answer (an empty thinking block, a channel name), that belongs to the prompt too: it is not the response.

    Raises:
        ValueError: the template cannot render a user turn and an answer.
    """

    def __init__(self, tokenizer: Any, template: str, end_markers: Sequence[str]):
        self.tokenizer, self.template = tokenizer, template
        self.sample = str(self._render_one([turn("user", PROBE_USER)], header=True))
        before, self.suffix = self._probe_answer()
        kept, marker = _split_suffix(self.suffix, end_markers)
        self.kept_suffix = self.suffix[:kept]
        self.adds_end = marker is not None
        self.end_text = marker or tokenizer.eos_token
        # Blanks alone in front of an answer stay with it: they are part of its first token.
        extra = before[len(self.sample) :] if before.startswith(self.sample) else ""
        self.answer_opening = extra if extra.strip() else ""

    def _probe_answer(self) -> tuple[str, str]:
        """What the template writes before and behind the text of an answer."""
        try:
            dialogues = [[turn("user", PROBE_USER), turn("assistant", answer)] for answer in PROBE_ANSWERS]
            first, second = _render(self.tokenizer, self.template, dialogues, header=False)
        except Exception as error:  # whatever the template raises, the user needs to hear which key is at fault
            raise ValueError(
                f"chat_template: it cannot render a user turn and an answer ({one_line(error)}); "
                "set chat_template in the recipe to one that can"
            ) from error
        suffix = first[len(first) - common_prefix_length(first[::-1], second[::-1]) :]
        if not first.endswith(PROBE_ANSWERS[0] + suffix):
            raise ValueError("chat_template: it does not write an assistant turn's text as it is; set another one")
        return first[: len(first) - len(suffix) - len(PROBE_ANSWERS[0])], suffix

    def __call__(self, pairs: Sequence[Pair]) -> list[PairTexts | RowError]:
        prompts = [pair.turns for pair in pairs]
        answers = [[*m, turn("assistant", text)] for m, p in zip(prompts, pairs) for text in (p.chosen, p.rejected)]
        headers = self._render_each(prompts, header=True)
        fulls = self._render_each(answers, header=False)
        return [
            self._texts(prompt, header, chosen, rejected)
            for prompt, header, chosen, rejected in zip(prompts, headers, fulls[::2], fulls[1::2])
        ]

    def _render_each(self, dialogues: list[list[Message]], *, header: bool) -> Sequence[str | RowError]:
        try:
            return _render(self.tokenizer, self.template, dialogues, header=header)
        except Exception:  # one dialogue the template refuses must not take the others with it
            return [self._render_one(dialogue, header=header) for dialogue in dialogues]

    def _render_one(self, dialogue: list[Message], *, header: bool) -> str | RowError:
        try:
            return _render(self.tokenizer, self.template, [dialogue], header=header)[0]
        except Exception as error:
            return RowError("template", f"the chat template refuses this dialogue: {one_line(error)}")

    def _texts(
        self, prompt: list[Message], header: str | RowError, chosen: str | RowError, rejected: str | RowError
    ) -> PairTexts | RowError:
        if isinstance(header, RowError):
            return header
        if isinstance(chosen, RowError):
            return chosen
        if isinstance(rejected, RowError):
            return rejected
        opened = header + self.answer_opening
        if chosen.startswith(opened) and rejected.startswith(opened):
            header = opened
        elif not (chosen.startswith(header) and rejected.startswith(header)):
            answered = self._answered_header(prompt)
            if answered is None or not (chosen.startswith(answered) and rejected.startswith(answered)):
                return RowError("template", "the chat template rewrites the prompt when the answer is there")
            header = answered
        try:
            return PairTexts(header, self._trim(chosen, header, "chosen"), self._trim(rejected, header, "rejected"))
        except RowError as error:
            return error

    def _answered_header(self, prompt: list[Message]) -> str | None:
        """What stands before the text of an answer, for templates whose generation header says something else."""
        first, second = (self._render_one([*prompt, turn("assistant", text)], header=False) for text in PROBE_ANSWERS)
        if isinstance(first, RowError) or isinstance(second, RowError):
            return None
        length = common_prefix_length(first, second)
        return first[:length] if first[length:].startswith(PROBE_ANSWERS[0]) else None

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

    def __call__(self, pairs: Sequence[Pair]) -> list[PairTexts | RowError]:
        return [self._texts(pair) for pair in pairs]

    def _texts(self, pair: Pair) -> PairTexts | RowError:
        if not isinstance(pair.prompt, str):
            raise ValueError(
                f"row {pair.row_id}: the prompt is a list of messages but the tokenizer has no chat template; "
                "set chat_template in the recipe (Jinja text or a file), or use an instruct model's tokenizer"
            )
        try:
            chosen = _one_ending(pair.chosen, self.end_text, "chosen")
            rejected = _one_ending(pair.rejected, self.end_text, "rejected")
        except RowError as error:
            return error
        return PairTexts(pair.prompt, pair.prompt + chosen, pair.prompt + rejected)


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
