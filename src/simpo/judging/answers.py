"""Owns the answers that are compared: one of each side to each prompt, sampled as `simpo generate` does or read.

A file of answers may be this command's or `simpo generate`'s, AlpacaEval's model_outputs.json, Arena-Hard's
model_answer, or any rows with a prompt and an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpo.data.columns import ANSWER_COLUMNS, RowError
from simpo.data.files import write_whole
from simpo.data.ledger import Dropped, count_rows
from simpo.data.preferences import prompt_from_row
from simpo.errors import short
from simpo.evaluation.run import model_folder, settings_for
from simpo.onpolicy.generate import run_generate
from simpo.onpolicy.journal import read_about, read_rows
from simpo.onpolicy.prompts import Prompt, Prompts, read_prompts
from simpo.recipe import Recipe, load_recipe

KEPT_COLUMNS = ("dataset", "uid", "question_id", "category")
"""What AlpacaEval and Arena-Hard know prompts by; goes along with them where it is there."""

_NAME_COLUMNS = ("generator", "model", "model_id")


@dataclass(frozen=True)
class Answer:
    """One answer; `num_tokens` where whoever sampled it counted them."""

    text: str
    num_tokens: int | None = None


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: as it was given.
        label: a short name that can be a file's.
        answers: prompt id -> its answer.
        left_out: prompts it gave no answer to, by reason, as a journal's account has them.
    """

    name: str
    label: str
    answers: Mapping[str, Answer]
    left_out: Mapping[str, Any]


def find_prompts(recipe: Recipe) -> Prompts:
    """The prompts that `recipe.judge` names, or the held-out ones of dataset_mixer.

    Raises:
        ValueError: there are none; as `read_prompts`.
    """
    wanted = recipe.judge
    changes = {"generate.prompts": wanted.prompts, "generate.max_prompts": wanted.max_prompts}
    changes["generate.keep_columns"] = None  # these prompts may lack what those of training have
    held_out, also_keep = wanted.prompts is None, (*KEPT_COLUMNS, *(recipe.generate.keep_columns or ()))
    if held_out and not recipe.dataset_mixer:
        raise ValueError("judge.prompts: no prompts to answer; name a file or dataset of prompts there")
    return read_prompts(load_recipe(recipe, changes), held_out=held_out, also_keep=also_keep)


def save_prompts(prompts: Sequence[Prompt], path: Path, *, is_own: bool) -> None:
    """Write prompts as data that `generate.prompts` can name.

    Raises:
        ValueError: other ones are there, unless these are the command's `own`.
    """
    text = "".join(json.dumps(each.to_row(), ensure_ascii=False) + "\n" for each in prompts)
    if path.exists() and not is_own and path.read_bytes() != text.encode():
        raise ValueError(f"{path}: holds other prompts already, and is not overwritten; choose another --output")
    write_whole(path, text)


def label_sides(first: str, second: str) -> tuple[str, str]:
    """Short names of two models or files, by as many of the last parts of their paths as tell them apart.

    Raises:
        ValueError: both are the same.
    """
    if first == second:
        raise ValueError(f"judge.model and judge.against are both {first}: there is nothing to compare")
    parts = [[part for part in Path(name).with_suffix("").parts if part not in ("/", ".")] for name in (first, second)]
    for name, own in zip((first, second), parts, strict=True):
        if not Path(name).is_file() and Path(name).suffix:  # a version number is no suffix
            own[-1] = Path(name).name
    longest = max(map(len, parts))
    labels = ["-".join(own[-count:]) for count in range(1, longest + 1) for own in parts]
    for one, two in zip(labels[::2], labels[1::2], strict=True):
        if one != two:
            return one, two
    return f"{labels[-2]}-1", f"{labels[-1]}-2"


def answers_of(recipe: Recipe, name: str, label: str, prompts: Sequence[Prompt], asked: Path, folder: Path) -> Side:
    """One side's answers, read where `name` is a file, else sampled into `folder`, where they go on.

    Args:
        asked: the file of the prompts, as `save_prompts` wrote it.
    Raises:
        ValueError: as `read_answers` and `run_generate`.
    """
    if Path(name).is_file() or Path(name).suffix in (".json", ".jsonl"):
        answers, generator = read_answers(Path(name), prompts, recipe)
        left_out: dict[str, Any] = {}
        missing = (each.row_id for each in prompts if each.id not in answers)
        count_rows(left_out, (Dropped(row_id, "no answer", f"{name} has no answer to it") for row_id in missing))
        return Side(name, generator or label, answers, left_out)
    path = run_generate(_sampling(recipe, name, asked), output=folder / f"{label}.jsonl", keeps_others=True)
    answers = {
        row["id"]: Answer(row["responses"][0]["text"], row["responses"][0]["num_tokens"]) for row in read_rows(path)
    }
    return Side(name, label, answers, read_about(path)["left_out"])


def _sampling(recipe: Recipe, name: str, asked: Path) -> Recipe:
    """The recipe by which a model answers."""
    changes: dict[str, Any] = {
        "generate.prompts": {str(asked): 1.0},
        "generate.max_prompts": None,
        "generate.keep_columns": None,
        "generate.num_samples": 1,
        "generate.temperature": recipe.judge.temperature,
        "prompt_column": None,
        "max_train_samples": None,
        "dataset_splits": ["train", "test"],
        "dataset_configs": None,
    }
    if recipe.generate.backend == "openai":
        return load_recipe(recipe, changes | {"generate.served_model": name})
    own = settings_for(recipe, recipe.model_name_or_path, name)
    return load_recipe(own, changes | {"model_name_or_path": model_folder(name)})


# --- files of answers ------------------------------------------------------------------------------------------------


def read_answers(path: Path, prompts: Sequence[Prompt], recipe: Recipe) -> tuple[dict[str, Answer], str | None]:
    """The answers that a file has to these prompts, by prompt id, and whose they are where it says so.

    A row is known by its id (of `simpo generate`), by the prompt's uid or question_id, or by the prompt itself.

    Raises:
        ValueError: no such file, a row without an answer, two answers to one prompt, or none to any.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file of answers")
    by_name = {
        str(each.columns[key]): each.id for each in prompts for key in ("uid", "question_id") if key in each.columns
    }
    known, found, generator, rows = {each.id for each in prompts}, {}, None, 0
    for rows, row in enumerate(_rows(path), start=1):
        where = f"{path}: row {rows}"
        prompt_id = _prompt_id(row, by_name, recipe, where)
        if prompt_id not in known:
            continue
        answer = _answer_in(row, where)
        if found.setdefault(prompt_id, answer).text != answer.text:
            raise ValueError(f"{where}: a second answer to a prompt; keep one of each")
        generator = generator or next((str(row[name]) for name in _NAME_COLUMNS if row.get(name)), None)
    if not found:
        raise ValueError(f"{path}: none of its {rows} rows answers one of the {len(prompts)} prompts")
    return found, generator and re.sub(r"[^\w.-]+", "-", generator.rpartition("/")[2])


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    try:
        rows = (
            json.loads(text) if text.lstrip().startswith("[") else map(json.loads, filter(str.strip, text.split("\n")))
        )
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is not an object")
            yield row
    except ValueError as error:
        raise ValueError(f"{path}: not a file of answers ({error})") from None


def _prompt_id(row: Mapping[str, Any], by_name: Mapping[str, str], recipe: Recipe, where: str) -> str:
    if "responses" in row and isinstance(row.get("id"), str):
        return row["id"].partition("-")[0]
    for key in ("uid", "question_id"):
        if str(row.get(key)) in by_name:
            return by_name[str(row[key])]
    if "choices" in row:  # Arena-Hard's first version, which has no prompt beside the answer
        return ""
    if isinstance(row.get("messages"), list) and "prompt" not in row:
        row = {"prompt": row["messages"][:-1]}
    try:
        pair = prompt_from_row(row, prompt_column=recipe.prompt_column, system_prompt=recipe.system_prompt)
    except RowError as error:
        raise ValueError(f"{where}: {error}") from None
    return f"{pair.key() % 2**64:016x}"


def _answer_in(row: Mapping[str, Any], where: str) -> Answer:
    try:
        if "responses" in row:
            (response,) = row["responses"]
            return Answer(response["text"], response.get("num_tokens"))
        if "choices" in row:
            text = row["choices"][0]["turns"][-1]["content"]
        elif "messages" in row:
            text = row["messages"][-1]["content"]
            text = text["answer"] if isinstance(text, dict) else text
        else:
            text = next(row[name] for name in ("output", *ANSWER_COLUMNS) if row.get(name) is not None)
        if isinstance(text, str):
            return Answer(text)
    except (LookupError, TypeError, ValueError, StopIteration):
        pass
    raise ValueError(f"{where}: no single answer in {short(dict(row), 120)}; it stands in output, response or answer")
