"""The `simpo eval` command: evaluate, compare with a baseline, print, write."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from simpo.data.files import check_own
from simpo.display import say
from simpo.evaluation.results import Evaluation, compare, plain, save_json
from simpo.evaluation.run import (
    HELD_OUT,
    READ_KEYS,
    EvalPairs,
    evaluate_pairs,
    find_tokenizer,
    is_recipe_file,
    load_pairs,
    model_folder,
    on_both,
    settings_for,
)
from simpo.evaluation.tasks import compare_tasks, measure_tasks, show_tasks
from simpo.recipe import load_recipe
from simpo.run.optim import set_threads


def run_eval_command(
    *,
    recipe_or_data: str | None,
    model: str | None,
    baseline: str | None,
    output: str | None,
    generations: int,
    max_pairs: int | None,
    split: str,
    overrides: Sequence[str],
    tasks: Sequence[str] = (),
) -> dict[str, Any]:
    """`simpo eval`: evaluate, compare with a baseline if there is one, print, write; what is written in --output.

    Args (others are the command's options):
        output: JSON file; the per-pair records go to FILE.pairs.jsonl next to it.
        overrides: recipe keys from the command line, such as `--max_length 700 --bf16 false`.
        tasks: benchmarks of lm-eval to run in place of pairs, on at most max_pairs documents each.
    Raises:
        ValueError: as `evaluate`; also a data file without a model.
    """
    console = Console(highlight=False)
    is_recipe = recipe_or_data is not None and is_recipe_file(recipe_or_data)
    data = None if is_recipe else recipe_or_data
    if data is None and not is_recipe and not tasks:
        raise ValueError("say what to evaluate on: a recipe, a file of pairs, or --tasks")
    if tasks and (data is not None or generations or split != HELD_OUT):
        raise ValueError("--tasks runs benchmarks in place of pairs: leave out the data, --generations and --split")
    if not is_recipe and model is None:
        raise ValueError(f"{data or '--tasks'} is not a recipe (.yaml): say with --model which model to evaluate")
    named = [] if model is None else ["--model_name_or_path", model]
    first = str(recipe_or_data) if is_recipe else {}
    settings = load_recipe(first, [*overrides, *named], only=READ_KEYS)
    own = settings.model_name_or_path
    if is_recipe and settings.model_revision == load_recipe(first, named, only=READ_KEYS).model_revision:
        with contextlib.suppress(ValueError):  # it names no model
            own = load_recipe(first, overrides, only=READ_KEYS).model_name_or_path
    settings = load_recipe(settings, {"model_name_or_path": model_folder(settings.model_name_or_path)})
    for notice in settings.notices if data is None else ():
        say(f"notice: {notice}", console)
    set_threads(settings.num_threads)
    if output is not None:
        _check_output(Path(output), settings.model_name_or_path, is_tasks=bool(tasks))

    settings_of = functools.partial(settings_for, settings, own)
    if baseline is not None:  # that it cannot be had is said before the first is measured
        its_tokenizer = find_tokenizer(settings_of(baseline), model_folder(baseline))
    if tasks:
        names = [name for name in (settings.model_name_or_path, baseline) if name is not None]
        content = compare_tasks(
            *(measure_tasks(name, tasks, settings_of(name), max_documents=max_pairs) for name in names)
        )
        if output is not None:
            save_json(content, output)
        show_tasks(content, console)
        if output is not None:
            say(f"results: {output}", console)
        return plain(content)
    tokenizer = find_tokenizer(settings_of(settings.model_name_or_path), settings.model_name_or_path)
    # The very same tokens where the vocabulary is the same: a base model may lack its child's chat template.
    if baseline is not None and its_tokenizer.get_vocab() != tokenizer.get_vocab():
        each = (load_pairs(data, settings, one, split=split, max_pairs=None) for one in (tokenizer, its_tokenizer))
        pairs, its_pairs = on_both(*each, max_pairs=max_pairs, seed=settings.seed)
    else:
        pairs = its_pairs = load_pairs(data, settings, tokenizer, split=split, max_pairs=max_pairs)

    def run(name: str, pairs: EvalPairs, tokenizer: Any) -> Evaluation:
        return evaluate_pairs(
            name,
            pairs,
            settings_of(name),
            tokenizer,
            batch_pairs=settings.per_device_eval_batch_size,
            num_generations=generations,
            max_new_tokens=settings.eval_generation_max_new_tokens,
        )

    evaluation = run(settings.model_name_or_path, pairs, tokenizer)
    content = evaluation.to_dict()
    _save(content, evaluation, output)  # before anything is shown, or another model run
    dataclasses.replace(evaluation, notes=pairs.notes).render(console)  # the others were said when it began
    if baseline is not None:
        other = run(baseline, its_pairs, its_tokenizer)
        comparison = compare(evaluation, other)
        content |= {"baseline": other.to_dict(), "comparison": comparison.to_dict()}
        _save(content, evaluation, output)
        for each in (dataclasses.replace(other, notes=its_pairs.notes), comparison):
            console.print()
            each.render(console)
    if output is not None:
        say(f"results: {output}, {_beside(output)}", console)
    return content


def _check_output(path: Path, model: str, *, is_tasks: bool) -> None:
    """Raise ValueError where something else is there than an earlier evaluation of the same kind and model."""
    before = check_own(path, "model", "versions", "tasks" if is_tasks else "margin")
    if before and before["model"] != model:
        raise ValueError(f"{path}: is of {before['model']}, and is not overwritten; choose another --output")


def _beside(output: str) -> Path:
    return Path(output).with_suffix(".pairs.jsonl")


def _save(content: dict[str, Any], evaluation: Evaluation, output: str | None) -> None:
    if output is not None:
        evaluation.save_pairs(_beside(output))
        save_json(content, output)  # at last: where it is, all is
