"""A recipe trained by transformers' Trainer: `accelerate launch ... -m simpo train RECIPE`.

The run directory is the native trainer's, but for the checkpoints in it, which are the Trainer's. A key of the recipe
is honoured or refused by name; none is passed over.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from simpo.core.optimizers import OPTIMIZERS
from simpo.data.prepare import prepare_pairs
from simpo.display import Display
from simpo.errors import is_disk_full
from simpo.hosts.hf.config import RECIPE_FIELDS, SimPOConfig
from simpo.hosts.hf.early_stop import EarlyStop
from simpo.hosts.hf.launch import join_launched_world
from simpo.hosts.hf.masters import local_masters
from simpo.hosts.hf.trainer import SimPOTrainer
from simpo.model.load import load_tokenizer, lora_config, pick_device, quantization_options
from simpo.model.settle import as_it_trains
from simpo.parallel.agreement import check_agreement, recipe_facts
from simpo.parallel.mesh import Mesh
from simpo.recipe import KEYS, Recipe
from simpo.report import leave_report
from simpo.run.eval_pairs import EvalPairs
from simpo.run.export import WeightSample, create_repository, export_dtype, publish_model, upload_model
from simpo.run.leftovers import Leftovers, find_leftovers
from simpo.run.lock import OutputLock
from simpo.run.next_commands import describe_next
from simpo.run.resume import check_not_stopped, find_checkpoint
from simpo.run.saved import TRAINERS, Checkpoint, list_checkpoints
from simpo.run.session import (
    card_of_data,
    check_held_out,
    check_token_ids,
    count_steps,
    describe_run,
    not_written,
    open_output_dir,
    set_up_process,
)
from simpo.run.shared import check_shared
from simpo.run.stopping import StopRequest, interrupted
from simpo.run.tracking import MetricsLog, check_trackers, open_log

_THE_LAUNCHER = "accelerate's configuration file says how the run is spread over processes"
_NATIVE_ONLY = "only the native trainer does it (simpo train, or torchrun -m simpo train)"
SAVED = "eval_saved"  # in front of metrics of the weights as they are written


def run_recipe(recipe: Recipe) -> None:
    """Train as a recipe says, with the engine that accelerate was launched for.

    Raises:
        ValueError: a key that this host cannot honour, or data, model, run directory and launcher do not fit together.
        simpo.NonFiniteError: a loss or gradient is not finite.
    """
    check_keys(recipe)
    check_trackers(recipe.report_to)
    device = pick_device(recipe.device)
    slow = set_up_process(recipe, device)
    # DeepSpeed 0.19 calls collectives by the names that they had before torch 2.13, at every step.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    args = build_config(recipe, device)
    mesh = join_launched_world(args)
    if recipe.load_in_4bit:  # on this process's own GPU, which is known now
        if is_deepspeed_zero3_enabled():
            raise ValueError("load_in_4bit: not under ZeRO-3; use multi_gpu.yaml or deepspeed_zero2.yaml")
        args.model_init_kwargs = quantization_options(recipe, args.device)
    check_agreement(recipe_facts(recipe))
    with OutputLock(Path(recipe.output_dir)) as lock:
        no_lock = mesh.on_main(lock.acquire)
        check_shared(lock.folder, mesh)
        check_not_stopped(Path(recipe.output_dir), mesh)
        resume = mesh.on_main(lambda: find_checkpoint(recipe, TRAINERS))
        display = Display(quiet=not mesh.is_main)
        for notice in [*recipe.notices, *filter(None, [slow, no_lock])]:
            display.say(notice)
        _train(recipe, args, resume, mesh, display)


def _train(recipe: Recipe, args: SimPOConfig, resume: Checkpoint | None, mesh: Mesh, display: Display) -> None:
    tokenizer = load_tokenizer(recipe)
    data = mesh.main_first(lambda: prepare_pairs(recipe, tokenizer, progress=mesh.is_main))
    if data.eval is None or recipe.eval_strategy is None:
        args.eval_strategy = "no"
    args.eval_on_start &= resume is None and data.eval is not None  # a run that goes on is not at its start
    check_token_ids(data, recipe)
    for line in check_held_out(recipe, data):
        display.say(line)
    dtype = export_dtype(recipe)  # asked now: an unreachable hub must not end a finished run
    repository = mesh.on_main(lambda: create_repository(recipe))
    directory = RunDirectory(recipe, display, mesh, lambda: open_output_dir(recipe, data, resume, TRAINERS))
    directory.evaluates = data.eval is not None and recipe.eval_strategy != "no"
    early = [] if recipe.early_stopping_patience is None else [EarlyStop(recipe)]
    trainer = SimPOTrainer(
        recipe.model_name_or_path,
        args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora_config(recipe) if recipe.use_peft else None,
        callbacks=[directory, *early],
    )
    directory.trainer, trainer.eval_pairs = trainer, EvalPairs(Path(recipe.output_dir))
    # The same settings; with the rest of it, a checkpoint knows the whole run.
    trainer.recipe = recipe = as_it_trains(recipe, trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    leftovers = find_leftovers(trainer.model, recipe.model_name_or_path, revision=recipe.model_revision)
    if leftovers is not None:
        display.say(str(leftovers))
    display.table("training", describe(trainer))
    model_dir = Path(recipe.output_dir) / "model"
    with contextlib.ExitStack() as closing:
        closing.enter_context(leave_report(recipe.output_dir, display.say, is_main=mesh.is_main))
        closing.enter_context(directory.resources)
        try:
            with directory.stop.listening():
                trainer.train(resume_from_checkpoint=None if resume is None else str(resume.folder))
            if trainer.is_stopped:
                step = trainer.state.global_step
                saved = Path(args.output_dir, f"{TRAINERS.prefix}-{step}")
                raise interrupted(step, trainer.state.max_steps, saved)
            why_early = next((stop.why for stop in early), None)
            if why_early is not None:
                display.say(why_early)
            save_final_model(trainer, model_dir, dtype, directory.untrained, leftovers, why_early=why_early)
        except Exception as error:
            if not (isinstance(error, OSError) or is_disk_full(error)):
                raise
            raise not_written(error, list_checkpoints(Path(recipe.output_dir, "checkpoints"), TRAINERS)) from error
        mesh.on_main(lambda: closing.pop_all().close())  # the others wait for trackers and the report
    metrics = Path(recipe.output_dir) / "metrics.jsonl"
    done = {"run directory": recipe.output_dir, "model": model_dir, "metrics": metrics}
    display.table("done", done | trainer.guard.summary())
    mesh.on_main(lambda: upload_model(model_dir, repository, recipe, display))
    display.say(describe_next(recipe, held_out=data.eval is not None))


def check_keys(recipe: Recipe) -> None:
    """Raise ValueError naming a key that this host cannot honour."""
    recipe.require("dataset_mixer", "output_dir")
    for name, key in KEYS.items():
        value = getattr(recipe, name)
        if key.hf in ("launcher", "refused") and value != Recipe.model_fields[name].default:
            reason = _THE_LAUNCHER if key.hf == "launcher" else _NATIVE_ONLY
            raise ValueError(f"{name} = {value}: not with accelerate launch; {reason}")
    if not OPTIMIZERS[recipe.optim].is_transformers:
        raise ValueError(f"optim = {recipe.optim}: not with accelerate launch; {_NATIVE_ONLY}")
    reference = recipe.ref_model_name_or_path
    if recipe.loss.needs_reference and reference not in (None, recipe.model_name_or_path):
        raise ValueError(
            f"ref_model_name_or_path = {reference}: with accelerate launch the reference is the model itself before "
            f"its first update; for another one, {_NATIVE_ONLY}"
        )


def build_config(recipe: Recipe, device: torch.device) -> SimPOConfig:
    """The recipe as the Trainer's arguments; what it saves goes to `checkpoints/` of the run directory."""
    values: dict[str, Any] = {name: getattr(recipe, name) for name in RECIPE_FIELDS if name not in recipe.unread_keys}
    values |= {name: getattr(recipe, name) for name, key in KEYS.items() if key.hf in ("argument", "shared")}
    if recipe.lr_scheduler_type == "constant":
        values["warmup_steps"] = 0
    elif recipe.warmup_steps > 0:
        values["warmup_steps"] = recipe.warmup_steps
    else:
        values["warmup_steps"], values["warmup_ratio"] = 0, recipe.warmup_ratio
    if recipe.min_lr:  # transformers' schedules that end above 0
        names = {"cosine": ("cosine_with_min_lr", {"min_lr": recipe.min_lr})}
        names["linear"] = ("polynomial", {"lr_end": recipe.min_lr, "power": 1.0})
        values["lr_scheduler_type"], values["lr_scheduler_kwargs"] = names[recipe.lr_scheduler_type]
    values["eval_strategy"] = recipe.eval_strategy or "no"  # the run directory asks for the evaluation at the end
    return SimPOConfig(
        output_dir=str(Path(recipe.output_dir) / "checkpoints"),
        use_cpu=device.type == "cpu",
        report_to=[],  # the run directory's log writes to the recipe's trackers
        disable_tqdm=True,
        **values,
    )


def describe(trainer: SimPOTrainer) -> dict[str, str]:
    """What is about to run, for people."""
    recipe, world, state = trainer.recipe, trainer.mesh.sizes.world, trainer.accelerator.state
    stage = f", ZeRO-{state.deepspeed_plugin.zero_stage}" if trainer.is_deepspeed_enabled else ""
    engine = f"{trainer.accelerator.distributed_type.value}{stage}, {world} process{'es' * (world > 1)}"
    loader, limit = trainer.build_loader(trainer.train_dataset), recipe.max_tokens_per_micro_batch
    return describe_run(
        recipe,
        trainer.model,
        trainer.data,
        loader,
        where={
            "host": "transformers' Trainer",
            "engine": engine,
            "device": f"{trainer.args.device}, {'bf16' if recipe.computes_in_bf16 else 'fp32'} compute",
        },
        total_steps=count_steps(recipe, loader.steps_per_epoch),
        micro_batches="no limit of tokens" if limit is None else f"up to {limit:,} tokens",
    )


def save_final_model(
    trainer: SimPOTrainer,
    folder: Path,
    dtype: torch.dtype,
    untrained: WeightSample | None,
    leftovers: Leftovers | None = None,
    *,
    why_early: str | None = None,
) -> None:
    """The model as the native trainer leaves it, put together from whatever engine held it. Every process calls it."""
    recipe = trainer.recipe
    step, results = trainer.state.global_step, last_evaluation(trainer)
    if recipe.load_best_model_at_end and trainer.state.best_global_step:
        step = trainer.state.best_global_step
    publish_model(
        trainer.model,
        trainer.whole_weights(),
        trainer.processing_class,
        recipe,
        folder,
        leftovers=leftovers,
        dtype=dtype,
        untrained=untrained,
        data=card_of_data(trainer.data, step=step, total_steps=trainer.state.max_steps, why_early=why_early),
        results=results,
        evaluate=functools.partial(trainer.evaluate, metric_key_prefix=SAVED),
        mesh=trainer.mesh,
        display=trainer.display,
    )


def last_evaluation(trainer: SimPOTrainer) -> dict[str, float]:
    """Metrics of the evaluation that belongs to the final weights; empty without one."""
    wanted = trainer.state.best_global_step if trainer.recipe.load_best_model_at_end else None
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    lines = [line for line in lines if wanted in (None, line["step"])]
    return {name: value for name, value in lines[-1].items() if name.startswith("eval_")} if lines else {}


class RunDirectory(TrainerCallback):
    """Keeps the run directory as the native trainer does, and what a run shows on the terminal.

    Args:
        recipe: says where it is, and which trackers to write to.
        display: of this process; quiet on all but the first.
        mesh: the run's processes; the first one writes.
        begin: called by the first process once nothing can be refused any more; gives a line to show, or None.
    """

    def __init__(self, recipe: Recipe, display: Display, mesh: Mesh, begin: Callable[[], str | None]) -> None:
        self.recipe, self.display, self.mesh, self.begin = recipe, display, mesh, begin
        self.resources = contextlib.ExitStack()  # to be closed after training: the log and its trackers
        self.stop = StopRequest(display.say)  # this process was asked to stop
        self.trainer: SimPOTrainer | None = None
        self.log: MetricsLog | None = None
        self.untrained: WeightSample | None = None
        self.evaluates = False

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **others: Any) -> None:
        if not self.recipe.use_peft and not state.global_step:  # a resumed run no longer has the untrained weights
            self.untrained = WeightSample(functools.partial(local_masters, model))
        line = self.mesh.on_main(self.begin)
        if line is not None:
            self.display.say(line)
        folder, say = Path(self.recipe.output_dir), self.display.say
        log = open_log(folder, self.recipe, say, done=state.global_step, mesh=self.mesh)
        self.log = self.resources.enter_context(log)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **others: Any) -> None:
        known = ("loss", "eval_loss", f"{SAVED}_loss")  # the Trainer's own summary has none of them
        if self.log is None or not any(name in logs for name in known):
            return
        if f"{SAVED}_loss" in logs:
            best = state.best_global_step if args.load_best_model_at_end else None
            of_step = {"of_step": best} if best not in (None, state.global_step) else {}
            return self.log.write({**logs, **of_step}, step=state.global_step)
        self.log.write(logs, step=state.global_step)
        if "eval_loss" in logs:
            self.display.say_evaluation(f"evaluation at step {state.global_step}", logs)
        else:
            left_s = logs["step_time_s"] * (state.max_steps - state.global_step)
            self.display.log_step(state.global_step, state.max_steps, logs, left_s=left_s)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """One that a stop cut short is none."""
        if self.trainer.is_stopped:
            control.should_save = control.should_evaluate = False

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """After the last step: log, evaluate and save, whatever the intervals; asked to stop: save, and no more."""
        asked = self.mesh.sum_over_all(torch.tensor(float(self.stop.is_set()), device=self.mesh.device))
        if asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.trainer.is_stopped = True
            control.should_evaluate = False  # which may take longer than whoever asks will wait
            return
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate |= self.evaluates
            control.should_save |= args.save_strategy != "no"
