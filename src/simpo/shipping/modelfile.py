"""A Modelfile for ollama: its Go template is put together from what the chat template is seen to write, and only where
the two agree on test dialogues.

What is understood are templates that write each turn as (what begins the role) content (what ends it), perhaps with a
system turn of their own, and a header for the answer. ollama reads no Jinja; the .gguf carries the chat template too.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpo.data.files import write_whole
from simpo.data.limits import limited
from simpo.data.messages import Message, turn
from simpo.data.templates import PROBE_ANSWERS, PROBE_USER, load_chat_template, render_chat
from simpo.errors import one_line
from simpo.recipe import Recipe

_SYSTEM = "Ys5 rule"
DIALOGUES = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
"""Roles of the dialogues on which both templates have to agree."""


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes.

    Attributes:
        begin: before everything.
        default: in place of a system turn where there is none.
        around: role -> what begins and ends its turns.
        header: after the last turn.
        joined: "first" or "last" where a system turn becomes part of that turn of the user; "" elsewhere.
        between: system text and the user's there.
    """

    begin: str
    default: str
    around: dict[str, tuple[str, str]]
    header: str
    joined: str = ""
    between: str = ""

    @property
    def takes_system(self) -> bool:
        return bool(self.joined) or "system" in self.around

    def to_go(self) -> str:
        """ollama's template; nothing is trimmed in it, so that every blank stands for itself."""
        default = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_text(self.default)}{{{{ end }}}}'
        turns, word = [], "if"
        for role, (begin, end) in self.around.items():
            inside = self._system() if role == "user" else ""
            turns.append(f'{{{{ {word} eq .Role "{role}" }}}}{_text(begin)}{inside}{{{{ .Content }}}}{_text(end)}')
            word = "else if"
        loop = "{{ range $i, $_ := .Messages }}" + "".join(turns) + "{{ end }}{{ end }}"
        return _text(self.begin) + (default if self.default else "") + loop + _text(self.header)

    def _system(self) -> str:
        if not self.joined:
            return ""
        at = "eq $i 1" if self.joined == "first" else "eq (len (slice $.Messages $i)) 1"
        return f"{{{{ if and $.System ({at}) }}}}{{{{ $.System }}}}{_text(self.between)}{{{{ end }}}}"

    def render(self, messages: list[Message]) -> str:
        """What that template makes of messages."""
        said = next((each["content"] for each in messages if each["role"] == "system"), "")
        users = [at for at, each in enumerate(messages) if each["role"] == "user"]
        takes = {"first": 1, "last": users[-1]}.get(self.joined) if said else None
        turns = []
        for at, each in enumerate(messages):
            if each["role"] in self.around:
                begin, end = self.around[each["role"]]
                turns.append(begin + (said + self.between if at == takes else "") + each["content"] + end)
        default = "" if messages[0]["role"] == "system" else self.default
        return "".join([self.begin, default, *turns, self.header])


def _text(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def write_modelfile(path: Path, tokenizer: Any, model: str, recipe: Recipe) -> list[str]:
    """Write it, if the chat template can be said in it; lines to show.

    Args:
        model: the .gguf file's name, in the same folder.
        recipe: its chat_template and system_prompt.
    """
    found = find_pieces(tokenizer, recipe.chat_template)
    if isinstance(found, str):
        return [f"no Modelfile: {found}; llama.cpp uses the chat template in the file itself"]
    if _adds_bos(tokenizer):  # ollama does as well, as the file says
        if not found.begin.startswith(tokenizer.bos_token):
            return [f"no Modelfile: ollama would begin with {tokenizer.bos_token}, and the chat template does not"]
        found = replace(found, begin=found.begin.removeprefix(tokenizer.bos_token))
    template, end = found.to_go(), found.around["assistant"][1].strip()
    lines = [f"FROM ./{model}", f'TEMPLATE """{template}"""']
    if end:
        lines.append(f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}")
    if recipe.system_prompt:
        lines.append(f'SYSTEM """{recipe.system_prompt}"""')
    if '"""' in template or '"""' in (recipe.system_prompt or ""):
        return ['no Modelfile: the chat template or the system prompt holds """']
    write_whole(path, "\n".join([*lines, ""]))
    without = "; the chat template has no system turn, so ollama leaves one out" * (not found.takes_system)
    return [f"{path}: ollama create NAME -f {shlex.quote(str(path))}{without}"]


def _adds_bos(tokenizer: Any) -> bool:
    return bool(tokenizer.bos_token) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def find_pieces(tokenizer: Any, chat_template: str | None = None) -> Pieces | str:
    """What the chat template writes, by looking at what it makes of stand-ins; or why a Go template cannot say it."""
    try:
        template = load_chat_template(tokenizer, chat_template)
    except ValueError as error:
        return str(error)
    if template is None:
        return "there is no chat template"

    def render(roles: tuple[str, ...], header: bool = True) -> str:
        with limited():
            return render_chat(tokenizer, template, stand_ins(roles), header=header)

    try:
        pieces = _pieces(render, tokenizer.bos_token if _adds_bos(tokenizer) else "")
        known = [roles for roles in DIALOGUES if pieces.takes_system or "system" not in roles]
        wrong = next((roles for roles in known if pieces.render(stand_ins(roles)) != render(roles)), None)
    except Exception as error:  # templates raise what they like
        return f"the chat template is not understood here: {one_line(error)}"
    if wrong is not None:
        return f"the chat template writes a dialogue of {', '.join(wrong)} in a way that is not understood here"
    return pieces


def stand_ins(roles: tuple[str, ...]) -> list[Message]:
    """A turn of each role; no two are alike."""
    said = {"system": _SYSTEM, "user": PROBE_USER, "assistant": PROBE_ANSWERS[0]}
    return [turn(role, f"{said[role]} {place}") for place, role in enumerate(roles)]


def _pieces(render: Any, bos: str) -> Pieces:
    """By what stands around the stand-ins in the smallest dialogues that show it.

    Args:
        render: of roles, with the header or without.
        bos: what the tokenizer sets in front of every text.
    """

    def around(*roles: str, header: bool = False) -> list[str]:
        rest, found = render(roles, header), []
        for message in stand_ins(roles):
            before, said, rest = rest.partition(message["content"])
            if not said:
                raise ValueError(f"it leaves out a turn of the {message['role']}")
            found.append(before)
        return [*found, rest]

    opening, end_user = around("user")
    header = around("user", header=True)[1].removeprefix(end_user)
    end_answer = around("user", "assistant")[2]
    _, to_answer, to_user, _ = around("user", "assistant", "user")
    begin_answer, begin_user = to_answer.removeprefix(end_user), to_user.removeprefix(end_answer)
    default = opening.removesuffix(begin_user)
    answers = {"user": (begin_user, end_user), "assistant": (begin_answer, end_answer)}
    try:
        before_system, between, _ = around("system", "user")
    except Exception:  # whatever a template raises that has none
        return Pieces(default, "", answers, header)
    begin = bos if default.startswith(bos) and before_system.startswith(bos) else ""
    if before_system.startswith(default):
        begin = default
    if before_system == default + begin_user:  # it is part of a user's turn
        longer = render(("system", "user", "assistant", "user"), False)
        joined = "first" if longer.startswith(f"{before_system}{stand_ins(('system',))[0]['content']}") else "last"
        return Pieces(default, "", answers, header, joined, between)
    begin_system, end_system = before_system.removeprefix(begin), between.removesuffix(begin_user)
    return Pieces(begin, default.removeprefix(begin), {"system": (begin_system, end_system)} | answers, header)
