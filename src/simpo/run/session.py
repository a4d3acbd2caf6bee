"""What a run does alike whoever drives it: the native trainer and the Hugging Face host are both built on this.

Must not import the trainer or evaluation.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import AutoConfig

from simpo.core.optimizers import OPTIMIZERS
from simpo.data.loader import PairStore, StepLoader
from simpo.errors import explain
from simpo.model.attention import unwrap
from simpo.model.costs import cost_weights
from simpo.model.kernels import describe_attention
from simpo.model.load import load_pretrained, set_precision
from simpo.recipe.checks import describe_long_warmup
from simpo.run.cpu_memory import keep_freed_memory
from simpo.run.optim import set_threads
from simpo.run.resume import best_checkpoint, put_aside, record_launch
from simpo.run.saved import NATIVE, CheckpointKind, wrong_type

if TYPE_CHECKING:
    from simpo.data.prepare import PreparedData
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe
    from simpo.run.saved import Checkpoint


@dataclass
class Progress:
    """Where a run stands; all of it goes into a checkpoint."""

    step: int = 0
    pairs_seen: int = 0
    tokens_seen: int = 0
    train_time_s: float = 0.0
    logged_step: int = 0
    logged_time_s: float = 0.0
    best_step: int | None = None
    best_metric: float | None = None
    best_in: str | None = None  # the folder of the best checkpoint where it is not the run's own
    evals_without_gain: int = 0  # running, up to the last one
    last_eval_step: int | None = None
    last_eval: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Any], checkpoint: Checkpoint) -> Progress:
        """From a state, perhaps of another version: what it lacks gets its default, what is unknown is ignored.

        Raises:
            ValueError: a value is of another type.
        """
        held = state["progress"]
        known = {item.name: held[item.name] for item in dataclasses.fields(cls) if item.name in held}
        try:
            return TypeAdapter(cls).validate_python(known)
        except ValidationError as error:
            raise ValueError(f"checkpoint {checkpoint.folder} is damaged: progress: {wrong_type(error)}") from error

    def track_best(self, values: Mapping[str, float], recipe: Recipe) -> None:
        """Take note of an evaluation after the present step if it is the best so far, and of whether it is any gain.

        Raises:
            ValueError: it lacks `metric_for_best_model`.
        """
        name, best = recipe.metric_for_best_model, self.best_metric
        if name not in values:
            raise ValueError(f"metric_for_best_model: {name!r} is not one of {', '.join(sorted(values))}")
        value = values[name]
        best = None if best is not None and math.isnan(best) else best  # of a checkpoint of an earlier version
        beats = best is None or (value > best if recipe.greater_is_better else value < best)
        is_better = beats and not math.isnan(value)
        is_gain = is_better and (best is None or abs(value - best) > recipe.early_stopping_threshold)
        self.evals_without_gain = 0 if is_gain else self.evals_without_gain + 1
        if is_better:
            self.best_metric, self.best_step, self.best_in = value, self.step, None

    def why_early(self, recipe: Recipe) -> str | None:
        """Why the run ends here, before its last step; None where it goes on."""
        patience = recipe.early_stopping_patience
        if patience is None or self.evals_without_gain < patience:
            return None
        return describe_early_stop(recipe, self.step, best_step=self.best_step, best_metric=self.best_metric)


def describe_early_stop(recipe: Recipe, step: int, *, best_step: int | None, best_metric: float | None) -> str:
    """What a run says that early_stopping_patience ends."""
    patience, least = recipe.early_stopping_patience, recipe.early_stopping_threshold
    best = "" if best_metric is None else f": its best value is {best_metric:.6g}, at step {best_step}"
    return (
        f"stopped early after step {step}: {recipe.metric_for_best_model} has not improved"
        f"{f' by more than {least:g}' if least else ''} in {patience} evaluation{'s' * (patience != 1)}{best}"
    )


def check_held_out(recipe: Recipe, data: PreparedData) -> list[str]:
    """A line for keys that do nothing without held-out pairs.

    Raises:
        ValueError: there are none, and a key chooses weights by them.
    """
    if data.eval is not None:
        return []
    asked = {
        "early_stopping_patience": recipe.early_stopping_patience,
        "load_best_model_at_end": recipe.load_best_model_at_end or None,
        "guard": "back" if "back" in recipe.guard.values() else None,
    }
    for key, value in asked.items():
        if value is not None:
            raise ValueError(
                f"{key} = {str(value).lower()}: there are no held-out pairs to evaluate on; give an evaluation split "
                "or a validation_fraction"
            )
    idle = [key for key in ("eval_on_start", "num_eval_generations") if getattr(recipe, key)]
    return [f"{' and '.join(idle)}: without effect: there are no held-out pairs to evaluate on"] if idle else []


def locate_best(progress: Progress, resumed: Checkpoint, own: Path, recipe: Recipe, mesh: Mesh) -> str | None:
    """Note in the progress of a resumed run where its best checkpoint lies; a line to show if it is gone.

    It may lie next to the checkpoint that is resumed, and may have been deleted since.

    Args:
        own: the run's own `checkpoints/`.
    """
    folder, line = Path(progress.best_in or resumed.folder.parent), None
    try:
        mesh.on_main(lambda: best_checkpoint(progress.best_step, folder))
    except ValueError as error:
        line = f"{error}. From here on the best is chosen among step {resumed.step} and those after it"
        progress.best_step = progress.best_metric = None
        if progress.last_eval_step == resumed.step:
            without_gain = progress.evals_without_gain  # goes on being counted
            progress.track_best(progress.last_eval, recipe)
            progress.evals_without_gain = without_gain
        folder = resumed.folder.parent
    progress.best_in = None if folder.resolve() == own.resolve() else str(folder.resolve())
    return line


def build_loader(
    dataset: Any, recipe: Recipe, model: nn.Module, tokenizer: Any, mesh: Mesh, *, evaluation: bool = False
) -> StepLoader:
    """The batch plan of training or held-out pairs, for this process of the mesh.

    Args:
        dataset: tokenised pairs.
        model: its longest sequence is checked, and its shape says what a pair costs.
    Raises:
        ValueError: a pair is longer than the model takes, or than max_tokens_per_micro_batch allows, or has no scores
            where score_margin or the loss needs them.
    """
    config = unwrap(model).config.get_text_config()
    store = PairStore(dataset, share_prompt=recipe.share_prompt)
    store.check_lengths(getattr(config, "max_position_embeddings", None))
    store.check_ids(config.vocab_size)
    if recipe.loss.is_of_lists:
        store.score_gaps(f"loss_type {recipe.loss_type}")
    return StepLoader(
        store,
        pairs_per_step=recipe.per_device_eval_batch_size if evaluation else recipe.pairs_per_step(mesh.sizes.data),
        num_micro_batches=1 if evaluation else recipe.gradient_accumulation_steps,
        max_tokens=None if evaluation else recipe.max_tokens_per_micro_batch,
        pack=recipe.pack,
        pad_token_id=tokenizer.pad_token_id or 0,
        seed=recipe.seed,
        weights=cost_weights(config),
        margins=None if recipe.score_margin is None else store.score_margins(recipe.score_margin),
        with_scores=recipe.loss.is_of_lists,
        rank=mesh.data_rank,
        num_ranks=mesh.sizes.data,
    )


def check_token_ids(data: PreparedData, recipe: Recipe) -> None:
    """Raise ValueError, before any weight is loaded, where data holds a token that the model has no embedding for.

    Without the model's configuration nothing is said: data can be looked at where its model is not.
    """
    try:
        config = load_pretrained(AutoConfig, recipe.model_name_or_path, recipe, what="configuration")
    except ValueError:
        return
    for dataset in (data.train, data.eval):
        if dataset is not None:
            PairStore(dataset).check_ids(config.get_text_config().vocab_size)


def count_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the run: `max_steps`, or `num_train_epochs` passes over the data, rounded up."""
    return recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * steps_per_epoch)


def is_due(strategy: str | None, every: float | None, *, step: int, steps_per_epoch: int, total_steps: int) -> bool:
    """Whether evaluating or saving is due after a step; it always is after the last one, unless the strategy is no.

    Args:
        strategy: "no", "epoch" or "steps"; None = at the end alone.
        every: steps between two times; below 1 a share of the run, as in transformers; None = at the end alone.
    """
    if strategy in ("no", None) or step == total_steps:
        return strategy != "no" and step == total_steps
    if strategy == "epoch":
        return step % steps_per_epoch == 0
    every = max(1, math.ceil(every * total_steps)) if every is not None and every < 1 else every
    return every is not None and step % int(every) == 0


def set_up_process(recipe: Recipe, device: torch.device, *, sharded: bool = False) -> str | None:
    """Precision, threads and malloc of this process, before anything is computed; what to say of the precision."""
    slow = set_precision(recipe, device)
    set_threads(recipe.num_threads)
    if device.type == "cpu" and not sharded:  # gathered weights come and go: what malloc kept would be full of holes
        keep_freed_memory()
    return slow


def check_device(recipe: Recipe, mesh: Mesh) -> None:
    """Raise ValueError for keys that need another device or mesh."""
    for key, what in (("activation_offload", "activations are"), ("optimizer_offload", "the optimizer is")):
        if getattr(recipe, key) and mesh.device.type == "cpu":
            raise ValueError(f"{key}: on a CPU {what} in CPU memory already; set it to false")
    if recipe.optimizer_offload and mesh.sizes.is_sharded:
        raise ValueError(
            "optimizer_offload: only for weights that are whole on each process; with sharded ones accelerate launch "
            "with DeepSpeed and offload_optimizer_device: cpu keeps the moments in CPU memory"
        )


def check_room(
    recipe: Recipe, model: nn.Module, saved: torch.dtype, *, total_steps: int, steps_per_epoch: int
) -> str | None:
    """Whether what the run is to write fits on the disk of its folder; a line to show where not all checkpoints do.

    Args:
        saved: dtype of the final model's weights.
    Raises:
        ValueError: not even one checkpoint and the final model.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = OPTIMIZERS[recipe.optim].moment_bytes
    each = sum(p.numel() * (p.element_size() + (2 * p.element_size() if moments is None else moments)) for p in trained)
    weights = trained if recipe.use_peft else list(model.parameters())
    needed = sum(p.numel() for p in weights) * saved.itemsize
    count = 0
    if recipe.save_strategy != "no":
        every = steps_per_epoch if recipe.save_strategy == "epoch" else recipe.save_steps or total_steps
        if recipe.load_best_model_at_end and recipe.save_strategy == "steps":
            every = recipe.eval_steps or every  # each may be the best so far
        every = max(1, math.ceil(every * total_steps if every < 1 else every))
        # The newest is written before the oldest goes.
        limit = math.inf if recipe.save_total_limit is None else recipe.save_total_limit + 1
        count = int(min(math.ceil(total_steps / every), limit))
        needed += each
    place = Path(recipe.output_dir)
    free = shutil.disk_usage(next(folder for folder in (place, *place.absolute().parents) if folder.exists())).free
    gib = f"output_dir: {place} has room for {free / 2**30:.1f} GiB"
    if free < needed:
        raise ValueError(
            f"{gib}, and {f'a checkpoint ({each / 2**30:.1f} GiB) and ' * bool(count)}the final model take "
            f"{needed / 2**30:.1f} GiB: make room, or choose another output_dir"
        )
    if count < 2 or free >= needed + (count - 1) * each:
        return None
    total = needed + (count - 1) * each
    return (
        f"{gib}, and this run's {count} checkpoints and its model take {total / 2**30:.1f} GiB: lower "
        "save_total_limit, or make room"
    )


def not_written(error: Exception, saved: Sequence[Checkpoint]) -> OSError:
    """The error of a run that cannot write a file any more: what is wrong, and where it can be resumed from."""
    where = "there is no checkpoint yet"
    if saved:
        where = f"{saved[-1].folder} is whole; the same command with --resume_from_checkpoint true goes on from it"
    return OSError(f"{explain(error)}; {where}")


def describe_run(
    recipe: Recipe,
    model: nn.Module,
    data: PreparedData,
    loader: StepLoader,
    *,
    where: Mapping[str, str],
    total_steps: int,
    micro_batches: str,
) -> dict[str, str]:
    """What is about to run, for people.

    Args:
        where: the rows that say what it runs on.
        micro_batches: how a step is cut.
    """
    long_warmup = None if recipe.max_steps > 0 else describe_long_warmup(total_steps, recipe)  # or a notice says it
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    return {
        "model": f"{recipe.model_name_or_path} ({trainable / 1e6:,.1f} M trainable parameters)",
        **where,
        "pairs": f"{len(data.train)} to train, {len(data.eval or ())} held out",
        "rows": f"{'packed' if recipe.pack else 'padded'}, prompt {'shared' if recipe.share_prompt else 'repeated'}",
        "attention": describe_attention(model, half=bool(recipe.bf16)),
        "steps": f"{total_steps} of {loader.pairs_per_step} pairs" + (f"; {long_warmup}" if long_warmup else ""),
        "micro-batches": micro_batches,
        "loss": recipe.describe_loss(),
    }


def open_output_dir(
    recipe: Recipe, data: PreparedData, resumed: Checkpoint | None, kind: CheckpointKind = NATIVE
) -> str | None:
    """Write down what is about to run, once nothing can be refused any more. One process calls it; a line to show.

    Args:
        resumed: the checkpoint, of this kind, that the run goes on from.
    """
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    aside = put_aside(recipe, resumed, kind)
    record_launch(folder)
    recipe.save(folder / "recipe.yaml")
    data.save_ledger(folder / "audit.json")
    return aside and f"what was in {folder} and would be replaced is kept in {aside}"


def card_of_data(data: PreparedData, *, step: int, total_steps: int, why_early: str | None = None) -> dict[str, Any]:
    """What the model card says of the training: see `run.export.publish_model`."""
    early = {} if why_early is None else {"end of the run": why_early}
    return {
        "training pairs": len(data.train),
        "held-out pairs": len(data.eval or ()),
        "data fingerprint": data.fingerprint,
        "optimizer step of these weights": f"{step} of {total_steps}",
        **early,
    }
