"""The batch plan as transformers' Trainer can iterate over it, and rows in memory as tokenised pairs.

What a process computes in optimizer step k is a function of k, so a resumed run goes on with the right pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from simpo.core.packing import PAIR_FIELDS
from simpo.data.ledger import Ledger
from simpo.data.loader import StepLoader, StepPlan
from simpo.data.prepare import PreparedData, prepare_rows
from simpo.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Work:
    """What a process computes in one turn of the Trainer's loop: a micro-batch, or several where tokens are limited."""

    plan: StepPlan  # of the optimizer step
    # pairs of each micro-batch, as indices into the store; an empty part waits for other processes
    parts: tuple[tuple[int, ...], ...]


class PlannedPairs(Dataset):
    """Builds what a `Work` asks for. Its length is the number of pairs.

    Args:
        name: of the pairs, where a reference's log-probs of them are looked up.
    """

    def __init__(self, loader: StepLoader, name: str) -> None:
        self.loader, self.name = loader, name

    def __len__(self) -> int:
        return len(self.loader.store)

    def __getitem__(self, work: Work) -> dict[str, Any]:
        parts = [self.loader.build(indices) for indices in work.parts]
        tokens = torch.cat([part.pairs.input_ids.flatten() for part in parts])  # for the Trainer, which counts them
        return {"input_ids": tokens, "plan": work.plan, "parts": parts, "name": self.name}


class TrainingOrder:
    """One epoch of `Work`, in lists of one: a batch sampler, with as many items on every process.

    Args:
        loader: plans the steps.
        done: optimizer steps done so far; asked when an epoch begins. An epoch that was begun earlier is gone through
            from its start: the Trainer skips what it has done.
    """

    def __init__(self, loader: StepLoader, done: Callable[[], int]) -> None:
        self.loader, self.done = loader, done

    def __len__(self) -> int:
        return self.loader.steps_per_epoch * self.loader.num_micro_batches

    def __iter__(self) -> Iterator[list[Work]]:
        first = self.done() // self.loader.steps_per_epoch * self.loader.steps_per_epoch
        for plan in self.loader.plans(first, first + self.loader.steps_per_epoch):
            count, turns = len(plan.micro_batches), self.loader.num_micro_batches
            for turn in range(turns):
                parts = plan.micro_batches[count * turn // turns : count * (turn + 1) // turns]
                yield [Work(plan, parts)]


def evaluation_order(loader: StepLoader) -> list[list[Work]]:
    """Every pair once over all processes, as `TrainingOrder`."""
    plan = loader.plan_everything()
    return [[Work(plan, (indices,))] for indices in plan.micro_batches]


def build_dataloader(loader: StepLoader, order: Any, args: Any, *, name: str) -> DataLoader:
    """A DataLoader over an order of `Work`, with the workers that TrainingArguments ask for.

    It is not handed to accelerate, which would share out and repeat what is planned for this process already.
    """
    return DataLoader(
        PlannedPairs(loader, name),
        batch_sampler=order,
        collate_fn=itemgetter(0),
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


def is_tokenised(dataset: Any) -> bool:
    """Whether a dataset holds what the data layer gives, and no rows to be tokenised."""
    return set(PAIR_FIELDS) <= set(getattr(dataset, "column_names", None) or ())


def prepare_datasets(
    train: Any, evaluation: Any, recipe: Recipe, tokenizer: Any, *, text_as_is: bool | None, progress: bool
) -> PreparedData:
    """Rows of a program's datasets as tokenised pairs, with their ledger; tokenised ones are taken as they are.

    Args:
        train, evaluation: rows in any shape that the data layer reads, or tokenised pairs; evaluation may be None.
        text_as_is: see `SimPOConfig`.
    Raises:
        ValueError: a dataset without length or rows, one tokenised and the other not, or as `prepare_rows`.
    """
    for name, dataset in (("train_dataset", train), ("eval_dataset", evaluation)):
        if dataset is not None and not hasattr(dataset, "__len__"):
            raise ValueError(f"{name}: rows are read whole, so a list or a datasets.Dataset is needed, not a stream")
        if dataset is not None and not len(dataset):
            raise ValueError(f"{name}: it holds no rows")
    if is_tokenised(train):
        if evaluation is not None and not is_tokenised(evaluation):
            raise ValueError(
                "eval_dataset: train_dataset is tokenised and this is not; give both as rows or both tokenised"
            )
        return PreparedData(train, evaluation, Ledger())
    if text_as_is is not None:
        recipe = load_recipe(recipe, {"rendered_text": "keep" if text_as_is else "render"})
    return prepare_rows(recipe, tokenizer, train, evaluation, progress=progress)
