"""The `simpo eval` command: evaluate, compare with a baseline, print, write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from simpo.evaluation.results import Evaluation, compare, save_json
from simpo.evaluation.run import (
    HELD_OUT,
    EvalPairs,
    evaluate_pairs,
    find_tokenizer,
    is_recipe_file,
    load_pairs,
    resolve_settings,
)
from simpo.recipe import Recipe, load_recipe
from simpo.run.optim import set_threads


def run_eval_command(
    *,
    recipe_or_data: str,
    model: str | None = None,
    baseline: str | None = None,
    output: str | None = None,
    generations: int = 0,
    max_pairs: int | None = None,
    split: str = HELD_OUT,
    overrides: Sequence[str] = (),
) -> None:
    """`simpo eval`: evaluate, compare with a baseline if there is one, print, write.

    Args:
        recipe_or_data: a recipe (.yaml, .yml), or a file or folder of pairs.
        model: what to evaluate; None = the recipe's `model_name_or_path`.
        baseline: a second model for the same pairs.
        output: JSON file; the per-pair records go to FILE.pairs.jsonl next to it.
        generations, max_pairs, split: as `evaluate`.
        overrides: recipe keys from the command line, such as `--max_length 700 --bf16 false`.
    Raises:
        ValueError: as `evaluate`; also a data file without a model.
    """
    console = Console(highlight=False)
    settings, data = _resolve(recipe_or_data, model, overrides)
    for notice in settings.notices if data is None else ():
        console.print(f"notice: {notice}", markup=False, soft_wrap=True)
    set_threads(settings.num_threads)
    tokenizer = find_tokenizer(settings, settings.model_name_or_path)
    pairs = load_pairs(data, settings, tokenizer, split=split, max_pairs=max_pairs)

    def run(name: str, pairs: EvalPairs, tokenizer: Any) -> Evaluation:
        return evaluate_pairs(
            name,
            pairs,
            settings,
            tokenizer,
            batch_pairs=settings.per_device_eval_batch_size,
            num_generations=generations,
            max_new_tokens=settings.eval_generation_max_new_tokens,
        )

    evaluation = run(settings.model_name_or_path, pairs, tokenizer)
    evaluation.render(console)
    content = evaluation.to_dict()
    if baseline is not None:
        its_tokenizer = find_tokenizer(settings, baseline)
        # The very same tokens where the vocabulary is the same: a base model may lack its child's chat template.
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            pairs = load_pairs(data, settings, its_tokenizer, split=split, max_pairs=max_pairs)
        other = run(baseline, pairs, its_tokenizer)
        console.print()
        other.render(console)
        console.print()
        comparison = compare(evaluation, other)
        comparison.render(console)
        content |= {"baseline": other.to_dict(), "comparison": comparison.to_dict()}
    if output is not None:
        path = Path(output)
        save_json(content, path)
        evaluation.save_pairs(path.with_suffix(".pairs.jsonl"))
        console.print(f"results: {path}, {path.with_suffix('.pairs.jsonl')}", markup=False, soft_wrap=True)


def _resolve(recipe_or_data: str, model: str | None, overrides: Sequence[str]) -> tuple[Recipe, str | None]:
    """The recipe to compute by, and the data where it does not come from the recipe."""
    if is_recipe_file(recipe_or_data):
        words = [*overrides, *([] if model is None else ["--model_name_or_path", model])]
        recipe, data = load_recipe(recipe_or_data, words), None
    elif model is None:
        raise ValueError(f"{recipe_or_data} is not a recipe (.yaml): say with --model which model to evaluate")
    else:
        data = recipe_or_data
        recipe = load_recipe({"model_name_or_path": model, "dataset_mixer": {data: 1.0}}, overrides)
    settings, _ = resolve_settings(recipe.model_name_or_path, None, recipe)
    return settings, data
