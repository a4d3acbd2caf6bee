"""Owns one thing: turning a row of any accepted shape into one canonical `Pair`, or a `RowError` saying why not.

Pure Python: no tokenizer, no files, no torch. Every row that JSON can express gives a pair or a `RowError`;
no other exception leaves `pair_from_row`.

Shapes accepted: prompt/chosen/rejected as strings or message lists; whole dialogues in chosen and rejected, or texts
that begin alike (implicit prompt); `messages` or ShareGPT `conversations` with chosen/rejected; Anthropic
"\\n\\nHuman:" transcripts; Alpaca pairs (`output: [chosen, rejected]`); scored lists (`all_generated_responses`,
`all_rm_scores`); and the column aliases of `columns`. Messages are read in `messages`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simpo.core.packing import SIDES, common_prefix_length
from simpo.data.columns import (
    MESSAGE_COLUMNS,
    PROMPT_COLUMNS,
    SYSTEM_COLUMNS,
    RowError,
    decode_list,
    drop_ties,
    find_column,
    kind_of,
    missing_column,
    our_columns,
    raw_answers,
    read_scores,
    without_scores,
)
from simpo.data.messages import (
    Message,
    Notes,
    as_text,
    is_transcript,
    looks_like_message,
    read_message,
    read_messages,
    read_tools,
    read_transcript,
    says_something,
    turn,
)

Answer = str | list[Message]
"""The text of one assistant turn, or turns of which the first and the last are an assistant's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with a preferred and a less preferred response.

    `prompt` is a plain string, or messages that end with a user's or a tool's turn (a system turn may come first).
    `chosen` and `rejected` are never blank and never equal; `tools` are definitions of what an assistant may call.
    `notes` say what was done to the row, for the ledger; `scores` are those of chosen and rejected, where it has them.
    """

    row_id: str
    prompt: str | list[Message]
    chosen: Answer
    rejected: Answer
    tools: Sequence[dict[str, Any]] = ()
    notes: Notes = dataclasses.field(default_factory=dict, compare=False)
    scores: tuple[float, float] | None = dataclasses.field(default=None, compare=False)

    @property
    def turns(self) -> list[Message]:
        """The prompt as messages: a string is one user turn."""
        return _as_turns(self.prompt)

    @property
    def answers(self) -> tuple[list[Message], list[Message]]:
        """Chosen and rejected as messages."""
        chosen, rejected = (
            [turn("assistant", each)] if isinstance(each, str) else each for each in (self.chosen, self.rejected)
        )
        return chosen, rejected

    def key(self, *answers: Answer) -> int:
        """A 64-bit hash of the prompt's turns and tools, and of answers."""
        digest = hashlib.blake2b(digest_size=8)
        asked = [part for message in self.turns for part in message.values()]
        for part in (*asked, *([self.tools] if self.tools else []), *answers):
            content = as_text(part).encode()
            digest.update(b"%d " % len(content))
            digest.update(content)
        return int.from_bytes(digest.digest(), "little", signed=True)


def pair_reader(recipe: Any, *, empty_system: bool = False) -> Callable[..., Pair]:
    """`pair_from_row` with the recipe's columns and system prompt; can be sent to other processes."""
    return functools.partial(
        pair_from_row,
        prompt_column=recipe.prompt_column,
        chosen_column=recipe.chosen_column,
        rejected_column=recipe.rejected_column,
        system_prompt=recipe.system_prompt,
        empty_system=empty_system,
    )


def pair_from_row(
    row: Any,
    *,
    row_id: str = "",
    prompt_column: str | None = None,
    chosen_column: str | None = None,
    rejected_column: str | None = None,
    system_prompt: str | None = None,
    empty_system: bool = False,
) -> Pair:
    """Read one row of any accepted shape.

    Args:
        row: a mapping of column to value, or the `RowError` of a row that cannot be read.
        row_id: goes into the pair and nowhere else.
        prompt_column, chosen_column, rejected_column: look in this column only, instead of the known aliases.
        system_prompt: system message for rows that bring none of their own.
        empty_system: with no system message from either, insert an empty one.
    Raises:
        RowError: the row gives no pair.
    """
    row = _checked(row)
    if not (chosen_column or rejected_column):
        row = our_columns(row)
    drop_ties(row)
    notes: Notes = {}
    prompt_names = (prompt_column,) if prompt_column else PROMPT_COLUMNS
    raw = raw_answers(row, chosen_column, rejected_column)
    scores = read_scores(row, lists=not (chosen_column or rejected_column))
    dialogues = all(map(is_transcript, raw))
    sides = [_decoded(value, what, notes, transcript=dialogues) for value, what in zip(raw, SIDES)]
    if any(row.get(name) is not None for name in prompt_names):
        context = _prompt(row, prompt_names, notes)
    elif all(isinstance(side, list) and len(side) > 1 for side in sides):
        context = []
    else:
        chosen, rejected = sides
        if prompt_column or not isinstance(chosen, str) or not isinstance(rejected, str):
            raise missing_column(row, prompt_names, "prompt")  # and no dialogue that holds one
        context, *sides = _common_beginning(row, chosen, rejected, notes)
    context, chosen, rejected = _split(context, sides)
    context = _with_system(context, row, system_prompt, empty_system=empty_system)
    tools = read_tools(row.get("tools"))
    _check_prompt(context)
    pair = Pair(row_id, context, _simplest(chosen), _simplest(rejected), tools, notes, scores)
    _check_answers(pair)
    if scores is not None and scores[0] == scores[1]:
        raise RowError("tie", f"chosen and rejected both score {scores[0]:g} in the list beside them")
    return pair


def prompt_from_row(
    row: Any,
    *,
    row_id: str = "",
    prompt_column: str | None = None,
    system_prompt: str | None = None,
    read_pair: Callable[..., Pair] = pair_from_row,
) -> Pair:
    """Read the prompt of a row that has answers or none: a `Pair` whose answers are empty texts.

    A dialogue without a prompt of its own is the prompt up to its last answer, as `read_pair` finds it.

    Other args and errors: as `pair_from_row`.
    """
    row = _checked(row)
    names, notes = (prompt_column,) if prompt_column else PROMPT_COLUMNS, {}
    if any(row.get(name) is not None for name in names):
        context = _prompt(row, names, notes)
        while isinstance(context, list) and context and context[-1]["role"] == "assistant":
            context = context[:-1]
        tools = read_tools(row.get("tools"))
    else:
        try:
            pair = read_pair(without_scores(row), prompt_column=prompt_column)
        except RowError:
            raise missing_column(row, names, "prompt") from None
        context, tools = pair.prompt, pair.tools
    context = _with_system(context, row, system_prompt, empty_system=False)
    _check_prompt(context)
    pair = Pair(row_id, context, "", "", tools, notes)
    _check_text(pair)
    return pair


def _checked(row: Any) -> Mapping:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError("malformed", f"the row is {kind_of(row)}, expected an object with columns")
    return row


def _prompt(row: Mapping, names: Sequence[str], notes: Notes) -> str | list[Message]:
    value = find_column(row, names, "prompt")
    if any(value is row.get(name) for name in MESSAGE_COLUMNS):
        value = decode_list(value)
    value = _decoded(value, "prompt", notes, transcript=is_transcript(value))
    if isinstance(value, list) and value[-1]["role"] == "assistant" and not says_something(value[-1]):
        value = value[:-1]  # a transcript that stops at "Assistant:"
    if isinstance(value, str) and any(value is row.get(name) for name in ("instruction", "query")):
        value = _alpaca_prompt(value, row)
    return value


def _alpaca_prompt(instruction: str, row: Mapping) -> str | list[Message]:
    """Alpaca's `instruction` with its optional `input` below, or `query`; its optional `history` of turns before."""
    extra = row.get("input") if instruction is row.get("instruction") else None
    if extra is not None and not isinstance(extra, str):
        raise RowError("malformed", f"input is {kind_of(extra)}, expected text")
    text = f"{instruction}\n{extra}" if extra and extra.strip() else instruction
    history = decode_list(row.get("history"))
    if not history:
        return text
    if not isinstance(history, list) or not all(
        isinstance(t, list) and len(t) == 2 and all(isinstance(s, str) for s in t) for t in history
    ):
        raise RowError("malformed", "history must be a list of [user, assistant] texts")
    messages = [m for user, bot in history for m in (turn("user", user), turn("assistant", bot))]
    return [*messages, turn("user", text)]


def _common_beginning(row: Mapping, chosen: str, rejected: str, notes: Notes) -> tuple[str, str, str]:
    """Prompt and answers of two texts without a prompt: they part behind the last blank of what they begin with."""
    missing = missing_column(row, PROMPT_COLUMNS, "prompt")
    if missing.reason == "empty":  # other rows have prompts, and this one's was left out
        raise missing
    others = [name for name, value in row.items() if isinstance(value, str) and value not in (chosen, rejected)]
    if others:  # one of them may be the prompt
        advice = "name the prompt's with prompt_column, or keep the texts alone (columns of the dataset_mixer's entry)"
        raise RowError(missing.reason, f"{missing.detail}; {advice}")
    if chosen.strip() == rejected.strip():
        raise RowError("identical", "chosen and rejected are the same text")
    common = chosen[: common_prefix_length(chosen, rejected)]
    if len(common) == min(len(chosen), len(rejected)):
        common = common.rstrip()  # one text begins the other: its last word is its answer
    at = max((match.end() for match in re.finditer(r"\s", common)), default=0)
    if not common[:at].strip():
        raise RowError(missing.reason, f"{missing.detail}; chosen and rejected do not begin with the same words")
    notes["prompt taken from the common beginning of chosen and rejected"] = repr(common[:at][-60:])
    return chosen[:at], chosen[at:], rejected[at:]


def _as_turns(prompt: str | list[Message]) -> list[Message]:
    return [turn("user", prompt)] if isinstance(prompt, str) else prompt


def _decoded(value: Any, what: str, notes: Notes, *, transcript: bool) -> str | list[Message]:
    """A value as plain text or as messages."""
    if isinstance(value, str):
        return read_transcript(value) if transcript else value
    if looks_like_message(value):
        return [read_message(value, what, notes)]
    if isinstance(value, list):
        if not value:
            raise RowError("empty", f"{what} is an empty list")
        return read_messages(value, what, notes)
    raise RowError("malformed", f"{what} is {kind_of(value)}, expected text or messages")


def _split(
    prompt: str | list[Message], sides: Sequence[Answer]
) -> tuple[str | list[Message], *tuple[list[Message], ...]]:
    """The prompt and the turns of both answers; what dialogues have in common goes to the prompt."""
    answers = []
    for side, what in zip(sides, SIDES):
        if isinstance(side, str):
            answers.append([turn("assistant", side)])
            continue
        if side[-1]["role"] != "assistant":
            raise RowError("malformed", f"{what} ends with a {side[-1]['role']} turn, expected an assistant turn")
        system = side[:1] if prompt and _has_system(side) else []
        turns, own = side[len(system) :], _as_turns(prompt)
        asked = own[1:] if _has_system(own) else own
        if system and _has_system(own) and own[:1] != system:
            raise RowError("malformed", f"{what} has another system turn than the prompt")
        if turns[: len(asked)] == asked:
            turns = turns[len(asked) :]
            prompt = prompt if not system or _has_system(own) else [*system, *own]
        elif system or turns[0]["role"] != "assistant":
            raise RowError("malformed", f"{what} has {len(side)} turns that do not begin with the prompt")
        answers.append(turns)
    chosen, rejected = answers
    same = common_prefix_length(chosen, rejected)
    parts = [
        at for at in range(same + 1) if all(at < len(each) and each[at]["role"] == "assistant" for each in answers)
    ]
    if not parts or not (prompt or parts[-1]):
        raise RowError("malformed", "chosen and rejected share no prompt before an assistant turn")
    if at := parts[-1]:
        prompt = [*_as_turns(prompt), *chosen[:at]]
    return prompt, chosen[at:], rejected[at:]


def _simplest(answer: list[Message]) -> Answer:
    """The text alone, where there is nothing else."""
    return answer[0]["content"] if len(answer) == 1 and answer[0].keys() == {"role", "content"} else answer


def _has_system(messages: list[Message]) -> bool:
    return bool(messages) and messages[0]["role"] == "system"


def _with_system(
    prompt: str | list[Message], row: Mapping, system_prompt: str | None, *, empty_system: bool
) -> str | list[Message]:
    """The prompt with a system turn: its own, else the row's, else the recipe's, else an empty one if asked."""
    if isinstance(prompt, list) and _has_system(prompt):
        return prompt
    system = next((row[name] for name in SYSTEM_COLUMNS if row.get(name) not in (None, "")), None)
    if system is not None and not isinstance(system, str):
        raise RowError("malformed", f"system is {kind_of(system)}, expected text")
    system = system or system_prompt or ("" if empty_system else None)
    if system is None:
        return prompt
    return [turn("system", system), *_as_turns(prompt)]


def with_empty_system(prompt: str | list[Message]) -> str | list[Message]:
    """The prompt, with an empty system turn where it has none."""
    return _with_system(prompt, {}, None, empty_system=True)


def _check_prompt(prompt: str | list[Message]) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError("empty", "the prompt is blank")
        return
    if not prompt:
        raise RowError("empty", "the prompt has no turns")
    if any(message["role"] == "system" for message in prompt[1:]):
        raise RowError("malformed", "the prompt has a system turn that is not the first")
    if not any(message["role"] == "user" for message in prompt):
        raise RowError("malformed", f"the prompt has no user turn (its last is a {prompt[-1]['role']} turn)")
    last = prompt[-1]
    if last["role"] not in ("user", "tool"):
        article = "an" if last["role"] == "assistant" else "a"
        raise RowError("malformed", f"the prompt ends with {article} {last['role']} turn, expected a user turn")
    if last["role"] == "user" and not last["content"].strip():
        raise RowError("empty", "the prompt's last turn is blank")


def _check_answers(pair: Pair) -> None:
    for messages, what in zip(pair.answers, SIDES):
        if any(message["role"] == "assistant" and not says_something(message) for message in messages):
            raise RowError("empty", f"{what} is blank")
    chosen, rejected = (
        [{**message, "content": message["content"].strip()} for message in each] for each in pair.answers
    )
    if chosen == rejected:
        raise RowError("identical", "chosen and rejected are the same text")
    _check_text(pair)


def _check_text(pair: Pair) -> None:
    try:
        pair.key(pair.chosen, pair.rejected)
    except UnicodeEncodeError as error:
        raise RowError("malformed", f"not valid Unicode: {error.reason} ({error.object[error.start]!a})") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("malformed", f"tools or tool calls hold what JSON cannot ({error})") from None
