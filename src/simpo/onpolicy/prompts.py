"""Owns the prompts that responses are sampled for: read from any source, each once, known by an id that never moves."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from simpo.data.columns import RowError
from simpo.data.ledger import Dropped, count_rows
from simpo.data.messages import Message
from simpo.data.preferences import Pair, pair_reader, prompt_from_row
from simpo.data.sources import find_sources, load_splits, reader_of
from simpo.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: hash of its turns and tools (16 hexadecimal digits), wherever it stands.
        row_id: the row that it came from first.
        turns: messages; the last is a user's or a tool's.
        columns: what goes along with it for scorers (`generate.keep_columns`).
    """

    id: str
    row_id: str
    turns: list[Message]
    tools: Sequence[dict[str, Any]] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)

    def to_row(self) -> dict[str, Any]:
        """A row that `read_prompts` reads it from."""
        return {**self.columns, "prompt": self.turns, **({"tools": self.tools} if self.tools else {})}


@dataclass
class Prompts:
    """The prompts to answer, in the order of their rows, and the account of the rows.

    `rows` = prompts + `repeated` (rows with the prompt of an earlier one) + left out, less what max_prompts leaves.
    """

    prompts: list[Prompt]
    rows: int
    repeated: int
    left_out: dict[str, dict[str, Any]]
    notes: list[str]


def read_prompts(recipe: Recipe, *, held_out: bool = False, also_keep: Sequence[str] = ()) -> Prompts:
    """The prompts that `recipe.generate` names, or those of its training rows.

    Args:
        held_out: those of the evaluation rows instead.
        also_keep: columns to keep where a row has them, besides generate.keep_columns, which some row must have.
    Raises:
        ValueError: as `find_sources`; no row has a prompt; a column to keep is in no row.
    """
    wanted = recipe.generate
    changes: dict[str, Any] = {} if held_out else {"validation_fraction": 0.0, "max_train_samples": None}
    if wanted.prompts is not None:
        changes |= {"dataset_mixer": wanted.prompts, "dataset_configs": None}
    if not (wanted.prompts or recipe.dataset_mixer):
        raise ValueError("generate.prompts: no prompts; name a dataset there, or in dataset_mixer")
    recipe = load_recipe(recipe, changes)
    sources = find_sources(recipe)
    splits = load_splits(recipe, sources, group_answers=held_out)
    read = reader_of(recipe, sources, _reader)
    found: dict[str, Prompt] = {}
    repeated = differing = 0
    left_out: dict[str, dict[str, Any]] = {}
    rows, kept = splits.eval if held_out else splits.train, (*(wanted.keep_columns or ()), *also_keep)
    if held_out and not rows:
        raise ValueError("dataset_mixer has no held-out rows: add an evaluation split, or name prompts (judge.prompts)")
    for row_id, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            pair = read(row, row_id=row_id)
            prompt_id = f"{pair.key() % 2**64:016x}"
            columns = {name: row[name] for name in kept if _is_given(row.get(name))}
            first = found.setdefault(prompt_id, Prompt(prompt_id, row_id, pair.turns, pair.tools, columns))
            repeated += first.row_id != row_id
            known = {**columns, **first.columns}  # of the first row that has each
            differing += any(known[name] != value for name, value in columns.items())
            if known != first.columns:
                found[prompt_id] = replace(first, columns=known)
        except RowError as error:
            count_rows(left_out, [Dropped(row_id, error.reason, error.detail)])
    prompts = list(found.values())
    if differing:
        splits.notes.append(
            f"generate.keep_columns: {differing} rows repeat a prompt with other values; the first row's are kept"
        )
    for name in wanted.keep_columns or ():
        if prompts and not any(name in prompt.columns for prompt in prompts):
            raise ValueError(f"generate.keep_columns: no row has a column {name!r}")
    if not prompts:
        lines = [f"{entry['count']} {reason}: {entry['examples'][0]['detail']}" for reason, entry in left_out.items()]
        raise ValueError(f"none of {len(rows)} rows has a prompt ({'; '.join(lines)})")
    if wanted.max_prompts is not None and wanted.max_prompts < len(prompts):
        chosen = random.Random(f"{recipe.seed} prompts").sample(range(len(prompts)), wanted.max_prompts)
        splits.notes.append(f"generate.max_prompts: {wanted.max_prompts} of {len(prompts)} prompts")
        prompts = [prompts[index] for index in sorted(chosen)]
    return Prompts(prompts, len(rows), repeated, left_out, splits.notes)


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def check_rendered_alike(recipe: Recipe) -> None:
    """Raise ValueError where a source would be trained on in another form than this process answers prompts in."""
    key = "generate.prompts" if recipe.generate.prompts else "dataset_mixer"
    mixer = recipe.generate.prompts or recipe.dataset_mixer
    if recipe.generate.backend == "openai" or not mixer:
        return
    for source in find_sources(load_recipe(recipe, {"dataset_mixer": mixer, "dataset_configs": None})):
        for name in ("chat_template", "rendered_text"):
            if source.own.get(name, getattr(recipe, name)) != getattr(recipe, name):
                raise ValueError(
                    f"{key}: {source.name} has its own {name}, and all prompts are answered with the recipe's; set "
                    f"{name} for the whole recipe, or name the other prompts in generate.prompts"
                )


def _reader(recipe: Recipe) -> Callable[..., Pair]:
    own = {"prompt_column": recipe.prompt_column, "system_prompt": recipe.system_prompt}
    return functools.partial(prompt_from_row, read_pair=pair_reader(recipe), **own)
