"""Owns the rendering of pairs to text: the chat template, where the prompt ends, what ends a turn.

Knows nothing of token ids. The text of a prompt begins the text of both its full renderings; each full rendering ends
where training ends.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simpo.core.packing import SIDES, common_prefix_length
from simpo.data.columns import RowError
from simpo.data.comparison import check_answer, check_prompt
from simpo.data.files import hash_files
from simpo.data.limits import MEMORY, REASON, limited
from simpo.data.messages import REASONING, Message, Notes, turn
from simpo.data.preferences import Pair
from simpo.errors import one_line

PROBE_USER = "Qx7 probe"
PROBE_ANSWERS = ("Zk3 one", "Wv8 two")
"""Stand-ins whose place in a rendering is looked for: nothing in common at either end."""

NO_TEMPLATE = "none"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BUILT_IN = {"chatml": CHATML}
"""Templates to choose for a tokenizer without one."""
_CHOICES = "chatml (built in), Jinja text or a file that holds it, or none (text rows train glued together)"


def load_chat_template(tokenizer: Any, chat_template: str | None = None) -> str | None:
    """The Jinja text to use: `chat_template` (text, a file, or a name that the tokenizer or `BUILT_IN` knows), else the
    tokenizer's own; None where "none" is asked for.

    Raises:
        ValueError: `chat_template` is none of these, the tokenizer has several templates and no default, or it has none
            and none is asked for.
    """
    own: str | dict[str, str] | None = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        if (name := chat_template or "default") in own:
            return own[name]
        if chat_template is None:
            raise ValueError(f"chat_template: the tokenizer has several, none named default; name one of {sorted(own)}")
    elif chat_template is None:
        if own is None:
            raise ValueError(
                "chat_template: the tokenizer has none (it is a base model's), so nothing would separate a prompt from "
                f"its answer; set it to {_CHOICES}"
            )
        return own
    if chat_template == NO_TEMPLATE:
        return None
    if "{" in chat_template or chat_template in BUILT_IN:
        return BUILT_IN.get(chat_template, chat_template)
    if os.path.isfile(chat_template):
        try:
            return Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"chat_template: {chat_template} cannot be read as text ({one_line(error)})") from error
    raise ValueError(f"chat_template: {chat_template!r} is neither Jinja text nor a file; set it to {_CHOICES}")


def install_chat_template(tokenizer: Any, chat_template: str | None) -> None:
    """Make the template that a recipe asks for the tokenizer's own, which is saved with the model."""
    template = load_chat_template(tokenizer, chat_template) if chat_template else None
    if template is not None:
        own = getattr(tokenizer, "chat_template", None)
        tokenizer.chat_template = {**own, "default": template} if isinstance(own, dict) else template


def digest_of_template(chat_template: str | None) -> dict[str, str]:
    """What tells one state of a template's file from another, as a setting; nothing where there is no file."""
    if chat_template is None or "{" in chat_template or not os.path.isfile(chat_template):
        return {}
    return {"chat_template_digest": hash_files([Path(chat_template)])[:16]}


def template_takes_system(tokenizer: Any, template: str | None) -> bool:
    """Whether the template renders a system turn."""
    messages = [turn("system", PROBE_ANSWERS[0]), turn("user", PROBE_USER)]
    try:
        with limited():
            return template is not None and PROBE_ANSWERS[0] in render_chat(tokenizer, template, messages, header=True)
    except RowError:  # many templates refuse on purpose here
        return False


Span = tuple[int, int]
"""Begin and end of a stretch of characters."""


class PairTexts(NamedTuple):
    """One pair as text: `prompt` begins both full texts, which end where training ends.

    Of each the stretches that are trained, ascending, the last of them at its end.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_spans: list[Span]
    rejected_spans: list[Span]
    notes: Notes


def render_chat(
    tokenizer: Any, template: str, dialogue: list[Message], *, tools: Sequence[Any] = (), header: bool = False
) -> str:
    """What a template makes of a dialogue. Raises RowError where it cannot, or where that is too long.

    One that writes today's date writes `DAY`. In time and memory it is bounded by `limited` alone, around it.
    """
    options = {"tools": list(tools)} if tools else {}
    try:
        text = tokenizer.apply_chat_template(
            dialogue, chat_template=on_one_day(template), tokenize=False, add_generation_prompt=header, **options
        )
    except RowError:
        raise
    except MemoryError:
        raise RowError(REASON, f"rendering it takes more than {MEMORY >> 20} MiB") from None
    except Exception as error:  # a template may raise anything
        raise RowError("template", f"the chat template refuses this dialogue: {one_line(error)}") from error
    if len(text) > MOST_CHARACTERS:
        raise RowError(REASON, f"its rendering is longer than {MOST_CHARACTERS:,} characters")
    return text


MOST_CHARACTERS = 1 << 24
DAY = datetime.date(2024, 7, 26)
"""That of dated templates, as Llama's have it where there is no clock: each day would give other tokens."""


@functools.lru_cache
def on_one_day(template: str) -> str:
    """The template, with `DAY` where it asks for the clock (`strftime_now("...")`)."""
    return re.sub(
        r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*,?\s*\)""",
        lambda found: found[1] + DAY.strftime(found[2]) + found[1],
        template,
    )


def follows_clock(template: str) -> bool:
    """Whether a template asks for the time in a way that `on_one_day` does not know."""
    return re.search(r"strftime_now\s*\(|\|\s*strftime_now", on_one_day(template)) is not None


_ROLES_IN_LINES = re.compile(r"\s*Human:.*^[ \t]*Assistant:", re.DOTALL | re.MULTILINE)
_AS_ONE_TURN = (
    'prompts with lines that begin with "Human:" and "Assistant:" taken as one turn: a transcript has a blank line '
    "before each turn"
)

_THOUGHT = re.compile(r"\s*(?:<think>)?\n*(.*?)\n*</think>\n*", re.DOTALL)
_OPENED = r"(?:<think>\s*)?(?:</think>\s*)?"  # a header may end with a thought begun, an empty one, or an end of one


class _Way(NamedTuple):
    """How messages are given to the template; `splice` puts an answer's text where the template writes a stand-in."""

    note: str = ""
    spell: Callable[[Message], Message] = dict
    splice: bool = False


class TemplateRenderer:
    """Pairs to text through a chat template.

    The prompt's text is the rendering with the generation header. Where the template writes more in front of every
    finished answer (an empty thinking block, a channel name), that belongs to the prompt too: it is not the response.

    What the data says must stand in the rendering: the prompt's turns and tools anywhere before the answer, an answer's
    reasoning, text and calls in what is trained of its turn. Where they do not, other ways to give the template the
    same answer are tried (`_ways`) before the row is given up.

    Args:
        train_on: "answer" trains the assistant's turns after the prompt, "all_assistant_turns" those in it too.
        rendered_text: text that was rendered already; "auto" recognises it row by row and keeps it, "keep" keeps every
            text as it is, "render" none.
        adds_bos: whether the tokenizer puts its BOS before a text.
    Raises:
        ValueError: the template cannot render a user turn and an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        end_markers: Sequence[str],
        *,
        train_on: str = "answer",
        rendered_text: str = "auto",
        adds_bos: bool = False,
    ):
        self.tokenizer, self.template, self.rendered_text = tokenizer, template, rendered_text
        self.end_markers, self.trains_all = end_markers, train_on == "all_assistant_turns"
        self.reasoning = next((name for name in REASONING if re.search(rf"\b{name}\b", template)), REASONING[0])
        self.cut_at = {"</think>", *re.findall(r"\.split\(\s*['\"]([<\[][^'\"]{2,})['\"]", template)}
        prompt = [turn("user", PROBE_USER)]
        try:
            with limited():
                self.sample = self._render(prompt, header=True)
                first, second = self._probe_answers(prompt, 1)
        except RowError as error:
            raise ValueError(
                f"chat_template: it cannot render a user turn and an answer ({one_line(error.__cause__ or error)}); "
                "set chat_template in the recipe to one that can"
            ) from error
        self.suffix = _common_end(first, second)
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
        bos, count = tokenizer.bos_token or "", self.sample.count(tokenizer.bos_token or "\0")
        self.bos = bos if (count == 0 and adds_bos) or (count == 1 and self.sample.startswith(bos)) else ""
        # What a rendered prompt begins with, and what stands between its last question and the answer.
        opening, self.closing = self.sample.removeprefix(self.bos).split(PROBE_USER, 1)
        self.openings = [self._mark_in(opening)]
        with contextlib.suppress(RowError), limited():
            asked = self._render([turn("system", PROBE_ANSWERS[0]), *prompt], header=True).removeprefix(self.bos)
            self.openings += [self._mark_in(asked.split(PROBE_ANSWERS[0])[0])] * (PROBE_ANSWERS[0] in asked)

    def _mark_in(self, opening: str) -> str:
        return min((m for m in self.end_markers if m in opening), key=opening.find, default=opening.strip())

    def __call__(self, pair: Pair) -> PairTexts:
        """The texts of a pair.

        Raises:
            RowError: the template refuses the dialogue, writes it otherwise than it stands in the data, or ends an
                answer unlike others.
        """
        if (kept := self._kept(pair)) is not None:
            return kept
        first: RowError | None = None
        for way in self._ways(pair):
            try:
                texts = self._texts(pair, way)
            except RowError as error:
                first = error if first is None or first.reason == "template" else first  # a comparison says more
            else:
                return texts._replace(notes={**texts.notes, way.note: f"{pair.row_id}"}) if way.note else texts
        assert first is not None
        raise first

    def _kept(self, pair: Pair) -> PairTexts | None:
        """The texts of a pair that is rendered already, as they are but for one BOS and one end of turn; else None."""
        *before, asked = pair.turns
        if self.rendered_text == "render" or any(m["role"] != "system" for m in before):
            return None
        answers, prompt = [pair.chosen, pair.rejected], asked["content"]
        texts = [each.rstrip() for each in answers if isinstance(each, str)]
        if len(texts) < 2 or asked.keys() != {"role", "content"} or pair.tools:
            return None
        text, closing = prompt.lstrip().removeprefix(self.bos).lstrip(), self.closing.rstrip()
        has_end = self.adds_end and any(each.endswith(self.end_text) for each in texts)
        asks, marks = text.rstrip().endswith(closing), tuple(filter(None, self.openings))
        is_rendered = text.startswith(marks) and (has_end or asks)
        # Of some templates the system's text is the first that there is.
        is_rendered |= "" in self.openings[1:] and asks and bool(closing) and all(mark in text for mark in marks)
        if not is_rendered and (self.rendered_text == "auto" or not isinstance(pair.prompt, str)):
            return None
        if is_rendered and self.closing in prompt and not text.rstrip().endswith(closing):
            at = prompt.rfind(self.closing) + len(self.closing)  # of two texts without a prompt that begin alike
            prompt, answers = prompt[:at], [prompt[at:] + str(each) for each in answers]
        end = self.end_text if is_rendered or has_end else self.tokenizer.eos_token
        put = end if end and self.adds_end else ""  # else a token is added later
        chosen, rejected = (_one_ending(str(each), end, side) + put for each, side in zip(answers, SIDES))
        prompt = prompt if not self.bos or prompt.startswith(self.bos) else self.bos + prompt
        what = "text that was rendered already" if is_rendered else "text"
        dropped = " (without the system prompt)" if before else ""
        notes = {f"{what} kept as it is{dropped}; see rendered_text": repr(prompt[:60])}
        return _glued(prompt, chosen, rejected, notes)

    def _ways(self, pair: Pair) -> Iterator[_Way]:
        """As the data has the messages; then what templates need that want a thought or arguments in another form."""
        yield _Way()
        answers = [message for answer in pair.answers for message in answer]
        if any("</think>" in message["content"] for message in answers):
            yield _Way("thoughts given to the template as reasoning", _with_thought_apart)
        if any(self.cuts(message["content"]) for message in answers):
            yield _Way("answers with thoughts put in the place of a plain answer", splice=True)
        if any("tool_calls" in message for message in (*pair.turns, *answers)):
            yield _Way("arguments of tool calls given to the template as JSON text", _with_arguments_as_text)

    def cuts(self, text: str) -> bool:
        """Whether a text has a mark at which templates cut a thought off."""
        return any(mark in text for mark in self.cut_at)

    def _texts(self, pair: Pair, way: _Way) -> PairTexts:
        prompt = [self._spelled(message) for message in pair.turns]
        if way.spell is _with_arguments_as_text:
            prompt = [way.spell(message) for message in prompt]
        header = self._render(prompt, tools=pair.tools, header=True)
        rendered = [
            _Rendered(self, prompt, answer, pair.tools, header, way, side) for answer, side in zip(pair.answers, SIDES)
        ]
        begin, other = sorted((each.full[: each.begin] for each in rendered), key=len)
        if not all(each.full.startswith(begin) for each in rendered) or not other.startswith(begin):
            raise RowError("template", "the chat template rewrites the prompt when the answer is there")
        try:
            notes = check_prompt(pair, begin)
        except RowError:
            # Some templates write a system turn or tools with the last question, and only while an answer is asked for.
            if self.trains_all or not begin.endswith(self.closing):
                raise
            begin, notes = header, check_prompt(pair, header)
            notes["prompts as the template writes them when it asks for an answer"] = pair.row_id
            for each in rendered:
                each.put_behind(header)
        chosen, rejected = rendered
        *before, asked = pair.turns
        if all(message["role"] == "system" for message in before) and _ROLES_IN_LINES.match(asked["content"]):
            notes[_AS_ONE_TURN] = repr(asked["content"][:60])
        return PairTexts(begin, chosen.full, rejected.full, chosen.spans, rejected.spans, notes)

    def _spelled(self, message: Message) -> Message:
        """The message with its reasoning under the name that the template reads."""
        if "reasoning_content" not in message or self.reasoning == "reasoning_content":
            return message
        return {self.reasoning if name == "reasoning_content" else name: held for name, held in message.items()}

    def _render(self, dialogue: list[Message], *, tools: Sequence[Any] = (), header: bool = False) -> str:
        return render_chat(self.tokenizer, self.template, dialogue, tools=tools, header=header)

    def _probe_answers(self, dialogue: list[Message], at: int, tools: Sequence[Any] = ()) -> list[str]:
        """The dialogue with a stand-in as its turn `at`, twice."""
        return [
            self._render([*dialogue[:at], turn("assistant", answer), *dialogue[at + 1 :]], tools=tools)
            for answer in PROBE_ANSWERS
        ]


class _Rendered:
    """One side of a pair as text: `full` ends where training ends, `begin` is where its answer begins.

    Raises:
        RowError: see `TemplateRenderer`.
    """

    def __init__(
        self,
        renderer: TemplateRenderer,
        prompt: list[Message],
        answer: list[Message],
        tools: Sequence[Any],
        header: str,
        way: _Way,
        side: str,
    ):
        self.renderer, self.tools, self.side = renderer, tools, side
        self.texts: dict[str, str] = {}  # stand-ins, and what is put in their place
        answer = [self._cleaned(message) for message in answer]
        self.turns = [*prompt, *(self._given(message, way) for message in answer)]
        self.full = self._render(self.turns)
        self.spans, self.begin = [], 0
        for at in range(0 if renderer.trains_all else len(prompt), len(self.turns)):
            if self.turns[at]["role"] == "assistant":
                begin, end = self._span(at, header if at == len(prompt) else None)
                if at >= len(prompt):
                    said = answer[at - len(prompt)]
                    check_answer(
                        said, self.full[:begin], self.full[begin:end], side, is_apart=way.spell is _with_thought_apart
                    )
                if at == len(prompt):
                    self.begin = begin
                self.spans.append((begin, end))
        self.full = self.full[: self.spans[-1][1]]

    def put_behind(self, prompt: str) -> None:
        """Give the answer another text before it."""
        moved = len(prompt) - self.begin
        self.full, self.begin = prompt + self.full[self.begin :], len(prompt)
        self.spans = [(begin + moved, end + moved) for begin, end in self.spans]

    def _cleaned(self, message: Message) -> Message:
        """An assistant's message without an end of turn that the data itself brought along."""
        end = self.renderer.end_text
        if message["role"] != "assistant" or not end:
            return message
        if end in message.get("reasoning_content", ""):
            raise RowError("malformed", f"the end-of-turn token {end!r} stands inside the reasoning of {self.side}")
        content = message["content"]
        return {**message, "content": _one_ending(content, end, self.side)} if end in content else message

    def _given(self, message: Message, way: _Way) -> Message:
        """The message as the template gets it."""
        if not way.splice or not self.renderer.cuts(message["content"]):
            return self.renderer._spelled(way.spell(message))
        text = message["content"]
        opened = re.search(rf"{_OPENED}\Z", self.renderer.sample)[0]  # type: ignore[index]
        if "</think>" in text and "<think>" not in text and "<think>" in opened:  # the header's
            text = ("<think>\n" if "</think>" in opened else opened) + text
        stand_in = f"{PROBE_ANSWERS[0]} {len(self.texts)}"
        self.texts[stand_in] = text
        return {**message, "content": stand_in}

    def _render(self, turns: list[Message], *, header: bool = False) -> str:
        return self._filled(self.renderer._render(turns, tools=self.tools, header=header))

    def _filled(self, text: str) -> str:
        for stand_in, wanted in self.texts.items():
            text = re.sub(f"{_OPENED}{stand_in}", lambda _, wanted=wanted: wanted, text)
        return text

    def _span(self, at: int, header: str | None) -> Span:
        """Where the answer of turn `at` stands in the full text, with its one end of turn."""
        renderer, full = self.renderer, self.full
        header = self._render(self.turns[:at], header=True) if header is None else header
        after, probes = renderer.suffix, []
        if at + 1 < len(self.turns):
            probes = [self._filled(text) for text in renderer._probe_answers(self.turns, at, self.tools)]
            after = _common_end(*probes)
        for begin in self._beginnings(at, header, probes):
            if full.startswith(begin):
                break
        else:
            raise RowError("template", "the chat template rewrites the prompt when the answer is there")
        after = after.removeprefix(renderer.kept_suffix)
        end = len(full) - len(after)
        ends = tuple(renderer.end_markers if renderer.adds_end else [renderer.kept_suffix])
        if renderer.adds_end and not (full.endswith(after) and full[len(begin) : end].endswith(ends)):
            # Some templates end a turn of calls otherwise than one of text.
            alone = self._render(self.turns[: at + 1]).rstrip()
            after, end = ("", len(alone)) if full.startswith(alone) else (after, end)
        is_behind = not self.spans or len(begin) >= self.spans[-1][1]
        if not (full.endswith(after) and full[len(begin) : end].endswith(ends) and is_behind):
            raise RowError("template", f"the chat template ends {self.side} unlike other answers")
        return len(begin), end

    def _beginnings(self, at: int, header: str, probes: Sequence[str]) -> Iterator[str]:
        """What may stand before the text of an answer, the likeliest first."""
        yield header + self.renderer.answer_opening
        yield header
        # Some ask for an answer with another header than they write before a finished one.
        first, second = probes or map(self._filled, self.renderer._probe_answers(self.turns, at, self.tools))
        length = common_prefix_length(first, second)
        if first[length:].startswith(PROBE_ANSWERS[0]):
            before, closing = first[:length], self.renderer.closing
            closes = before.rfind(closing) + len(closing) if closing in before else length
            yield before if before[closes:].strip() else before[:closes]  # blanks stay with the answer
        yield re.sub(rf"{_OPENED}\Z", "", header)  # the answer brings its own thought


def _common_end(first: str, second: str) -> str:
    return first[len(first) - common_prefix_length(first[::-1], second[::-1]) :]


def _with_thought_apart(message: Message) -> Message:
    """A thought that stands in an answer's text as its reasoning."""
    found = _THOUGHT.match(message["content"])
    if found is None or message["role"] != "assistant" or "reasoning_content" in message:
        return message
    return {**message, "reasoning_content": found[1], "content": message["content"][found.end() :]}


def _with_arguments_as_text(message: Message) -> Message:
    """The arguments of tool calls as JSON text, which some templates write as it is."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls}


class PlainRenderer:
    """Pairs to text without a template: prompt and response as they are; the end of turn is added as a token."""

    adds_end = False
    sample = ""

    def __init__(self, end_text: str | None):
        self.end_text = end_text

    def __call__(self, pair: Pair) -> PairTexts:
        """The texts of a pair. Raises ValueError for messages, RowError for a response that ends twice."""
        prompt, answers = pair.prompt, (pair.chosen, pair.rejected)
        if not isinstance(prompt, str) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(
                f"row {pair.row_id}: it is a list of messages, which needs a chat template; set chat_template in the "
                "recipe to chatml (built in), Jinja text or a file, or use an instruct model's tokenizer"
            )
        seam = f"{prompt[-20:]}{str(answers[0])[:20]}"
        chosen, rejected = (_one_ending(str(text), self.end_text, side) for text, side in zip(answers, SIDES))
        return _glued(prompt, chosen, rejected, {"prompt and answer glued together, without a template": repr(seam)})


def _glued(prompt: str, chosen: str, rejected: str, notes: Notes) -> PairTexts:
    """Prompt and answers end to end."""
    chosen, rejected = prompt + chosen, prompt + rejected
    return PairTexts(prompt, chosen, rejected, [(len(prompt), len(chosen))], [(len(prompt), len(rejected))], notes)


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
