"""Owns the files in which AlpacaEval 2 and Arena-Hard keep answers and judgements, written as those tools read them.

Arena-Hard has had two layouts: v0.1's rows have question_id, model_id, choices (at first with token_len in a turn) and
conv_metadata; v2.0's have uid, model, messages and metadata. Neither minds the other's fields, so that each row has
both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simpo.data.files import write_whole
from simpo.judging.answers import Answer
from simpo.onpolicy.prompts import Prompt
from simpo.onpolicy.scorers.judge import prompt_as_text

GAME_SCORES = {"1": "A>B", "2": "B>A", "tie": "A=B"}
"""Verdict of a judge -> Arena-Hard's word for it, where A comes first."""


def save_alpaca_eval(
    folder: Path,
    prompts: Sequence[Prompt],
    answers: Mapping[str, tuple[Answer, Answer]],
    points: Mapping[str, float],
    *,
    labels: tuple[str, str],
    judge: str,
) -> None:
    """Write model_outputs.json, reference_outputs.json and annotations.json.

    Args:
        prompts: those that both sides answered, in order.
        answers: prompt id -> answers of the judged side and of the other one.
        points: prompt id -> share of the win that the judged side has; a preference is 1 (the other one) to 2.
        labels: the names of both sides.
        judge: the annotator's name.
    """
    rows = [
        {"dataset": str(prompt.columns.get("dataset", "simpo")), "instruction": prompt_as_text(prompt.turns)}
        for prompt in prompts
    ]
    for place, name in enumerate(("model_outputs", "reference_outputs")):
        texts = (answers[prompt.id][place].text for prompt in prompts)
        outputs = [{**row, "output": text, "generator": labels[place]} for row, text in zip(rows, texts)]
        _save_list(folder / f"{name}.json", outputs)
    annotations = []
    for row, prompt in zip(rows, prompts):
        if prompt.id in points:
            ours, theirs = answers[prompt.id]
            annotations.append(
                {
                    **row,
                    "output_1": theirs.text,
                    "generator_1": labels[1],
                    "output_2": ours.text,
                    "generator_2": labels[0],
                    "annotator": judge,
                    "preference": 1 + points[prompt.id],
                }
            )
    _save_list(folder / "annotations.json", annotations)


def save_arena_hard(
    folder: Path,
    prompts: Sequence[Prompt],
    answers: Mapping[str, tuple[Answer, Answer]],
    games: Mapping[str, tuple[dict[str, Any], dict[str, Any]]],
    *,
    labels: tuple[str, str],
    judge: str,
) -> None:
    """Write model_answer/LABEL.jsonl of both sides and model_judgment/JUDGE/LABEL.jsonl of the judged one.

    Args:
        games: prompt id -> the two comparisons, each with score and judgment; in the first A is the other side, in the
            second the judged one.
        others: as in `save_alpaca_eval`.
    """
    for place, label in enumerate(labels):
        rows = (_arena_answer(prompt, answers[prompt.id][place], label) for prompt in prompts)
        _save_lines(folder / "model_answer" / f"{label}.jsonl", rows)
    judged = (
        {
            **_arena_names(prompt),
            "category": str(prompt.columns.get("category", "hard_prompt")),
            "judge": judge,
            "model": labels[0],
            "baseline": labels[1],
            "games": list(games[prompt.id]),
        }
        for prompt in prompts
        if prompt.id in games
    )
    _save_lines(folder / "model_judgment" / judge / f"{labels[0]}.jsonl", judged)


def games_of(points: float, said: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arena-Hard's two games of one prompt: what a judge said in each order, or twice what else decided.

    Args:
        said: a judge's verdicts, with the places of both answers: 0 is the judged side.
    """
    if said:
        by_first = {each["first"]: {"score": GAME_SCORES[each["verdict"]], "judgment": each["text"]} for each in said}
        return by_first[1], by_first[0]
    scores = ("A=B", "A=B") if points == 0.5 else ("B>A", "A>B") if points > 0.5 else ("A>B", "B>A")
    return tuple({"score": score, "judgment": ""} for score in scores)  # type: ignore[return-value]


def _arena_names(prompt: Prompt) -> dict[str, str]:
    name = str(prompt.columns.get("uid", prompt.columns.get("question_id", prompt.id)))
    return {"uid": name, "question_id": name}


def _arena_answer(prompt: Prompt, answer: Answer, label: str) -> dict[str, Any]:
    name = _arena_names(prompt)
    style = _style_of(answer)
    return {
        **name,
        "ans_id": f"{label}-{name['uid']}",
        "answer_id": f"{label}-{name['uid']}",
        "model": label,
        "model_id": label,
        "messages": [*prompt.turns, {"role": "assistant", "content": {"answer": answer.text}}],
        "choices": [{"index": 0, "turns": [{"content": answer.text, "token_len": style["token_len"]}]}],
        "metadata": style,
        "conv_metadata": style,
    }


def _style_of(answer: Answer) -> dict[str, Any]:
    """What Arena-Hard's control of style goes by: tokens (words, where nobody counted tokens) and Markdown's marks."""
    text = re.sub(r"```.*?```", "", answer.text, flags=re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#{1,6})\s", text, re.MULTILINE)]
    return {
        # Arena-Hard divides by it.
        "token_len": max(1, len(answer.text.split()) if answer.num_tokens is None else answer.num_tokens),
        "header_count": {f"h{level}": levels.count(level) for level in range(1, 7)},
        "list_count": {
            "ordered": len(re.findall(r"^\s*\d+\.\s", text, re.MULTILINE)),
            "unordered": len(re.findall(r"^\s*[-*+]\s", text, re.MULTILINE)),
        },
        "bold_count": {
            "**": len(re.findall(r"\*\*[^*\n]+\*\*", text)),
            "__": len(re.findall(r"__[^_\n]+__", text)),
        },
    }


def _save_list(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_whole(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def _save_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
