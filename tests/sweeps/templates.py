"""What becomes of each kind of answer under each kind of chat template: the table in docs/data.md.

    PYTHONPATH=tests python tests/sweeps/templates.py [--write docs/data.md]

The templates are the tests' own, written after the kinds that are met. Some seconds; not in CI.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from tokenizers_for_tests import build_tokenizer, tokenize_pair

from simpo.data.preferences import RowError, pair_from_row

TEMPLATES = {
    "chatml": "ChatML",
    "llama3": "trims",
    "gemma": "trims, refuses system",
    "mistral": "user and assistant alone",
    "words": "words, no marks",
    "agent": "tools, reasoning",
    "channels": "thinking, joined arguments",
    "cuts": "cuts every thought",
    "thinking": "header opens a thought",
    "empty_thinking": "empty thought first",
    "empty_header": "header with an empty thought",
    "asked": "system turn while asked",
    "wait": "calls end otherwise",
}
ASK = [{"role": "user", "content": "Weather in Oslo?"}]
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
THOUGHT = "<think>\nIt is winter.\n</think>\n\nSnow."
RESULT = {"role": "tool", "content": "-3 C"}


def say(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


ANSWERS = {
    "text": {"chosen": "Snow."},
    "blanks around": {"chosen": "\n\nSnow. \n"},
    "text parts": {"chosen": [say([{"type": "text", "text": "Snow."}])]},
    "thought in the text": {"chosen": THOUGHT},
    "thought in the text, opened by the header": {"chosen": THOUGHT.removeprefix("<think>\n")},
    "`reasoning_content`": {"chosen": [say("Snow.", reasoning_content="It is winter.")]},
    "call": {"chosen": [say("", tool_calls=[CALL])]},
    "call of a defined tool": {"chosen": [say("", tool_calls=[CALL])], "tools": [TOOL]},
    "call, result, answer": {"chosen": [say("", tool_calls=[CALL]), RESULT, say("Snow.")]},
    "two turns": {"chosen": [say("Which day?"), {"role": "user", "content": "Today."}, say("Snow.")]},
    "two turns with thoughts": {"chosen": [say(THOUGHT), {"role": "user", "content": "Sure?"}, say(THOUGHT)]},
    "thought in the history": {"prompt": [*ASK, say(THOUGHT), *ASK], "chosen": "Snow."},
    "result in the history": {"prompt": [*ASK, say("", tool_calls=[CALL]), RESULT], "chosen": "Snow."},
    "system turn": {"system": "Be brief.", "chosen": "Snow."},
}
SIGNS = {
    "": "yes",
    "thoughts given to the template as reasoning": "as reasoning",
    "answers with thoughts put in the place of a plain answer": "in place",
    "arguments of tool calls given to the template as JSON text": "as text",
    "thoughts of turns before the answer left out by the template": "noted",
    "prompts as the template writes them when it asks for an answer": "as asked",
    "rewritten by the template": "**dropped**",
    "template": "*refused*",
}
BEGIN, END = "<!-- templates x answers: begin -->", "<!-- templates x answers: end -->"


def outcome(kind: str, row: dict[str, Any]) -> str:
    """What becomes of a pair of this answer and a plain one."""
    try:
        pair = pair_from_row({"prompt": ASK, "rejected": "Sun.", **row})
        notes = list(tokenize_pair(pair, build_tokenizer(kind), max_length=4000).notes)
    except RowError as error:
        return SIGNS[error.reason]
    return ", ".join(SIGNS[note] for note in notes or [""])


def table() -> str:
    """The table in Markdown."""
    lines = ["| |" + "".join(f" {words} |" for words in TEMPLATES.values()), "|---" * (len(TEMPLATES) + 1) + "|"]
    for name, row in ANSWERS.items():
        lines.append(f"| {name} |" + "".join(f" {outcome(kind, row)} |" for kind in TEMPLATES))
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it between its marks in a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page that holds the table")
    page, text = parser.parse_args().write, table()
    print(text)
    if page is not None:
        old = page.read_text(encoding="utf-8")
        new = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", old, flags=re.DOTALL)
        page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
