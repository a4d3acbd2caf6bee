"""The trainer: from a recipe to a run directory with an aligned model.

    for each step's plan:
        for each micro-batch: forward, one loss per pair, backward of (their sum / pairs in the whole step)
        sum metrics over all processes; stop if anything is not finite; clip; update; log; evaluate; save

Every pair of a step weighs the same, however the step is cut into micro-batches and spread over processes. A run may be
killed at any moment and resumed from its last checkpoint, bit for bit wherever torch computes the same bits twice (on
CPUs; on CUDA with `full_determinism`). Norm, losses and metrics of a step are fetched from the device together, before
its update; nothing else in it waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpo.core.batch import PackedPairs
from simpo.core.losses import PairLogps
from simpo.data.loader import MicroBatch, StepPlan
from simpo.data.prepare import PreparedData, dropped_by_source, prepare_pairs
from simpo.data.templates import install_chat_template
from simpo.display import Display
from simpo.errors import is_disk_full
from simpo.evaluation.generate import save_samples
from simpo.model.attention import unwrap
from simpo.model.compile import compile_blocks
from simpo.model.load import identify_weights, load_model, load_tokenizer, pick_device
from simpo.model.low_memory import why_no_liger
from simpo.model.offload import offload_activations
from simpo.model.settle import as_it_trains, notes_of
from simpo.parallel.agreement import check_agreement, recipe_facts
from simpo.parallel.mesh import join_world
from simpo.parallel.sharding import GradientSync, drop_gathered, whole_weights
from simpo.recipe import Recipe, load_recipe
from simpo.report import leave_report
from simpo.run import checkpoint as checkpoints
from simpo.run.checkpoint import CheckpointSaver, NotSaved
from simpo.run.eval_pairs import EvalPairs
from simpo.run.export import WeightSample, create_repository, export_dtype, publish_model, upload_model
from simpo.run.guard import RunGuard
from simpo.run.leftovers import find_leftovers
from simpo.run.lock import OutputLock
from simpo.run.memory import TokenBudget, fit_micro_batches
from simpo.run.metrics import StepTotals, Totals, peak_memory_gib
from simpo.run.next_commands import describe_next
from simpo.run.objective import micro_batch_losses, recipe_logps
from simpo.run.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    learning_rate_at,
    make_deterministic,
    seed_everything,
)
from simpo.run.reference import load_references
from simpo.run.resume import best_checkpoint, check_not_stopped, check_same_run, find_checkpoint, run_identity
from simpo.run.saved import Checkpoint
from simpo.run.session import (
    Progress,
    build_loader,
    card_of_data,
    check_device,
    check_held_out,
    check_room,
    check_token_ids,
    count_steps,
    describe_run,
    is_due,
    locate_best,
    not_written,
    open_output_dir,
    set_up_process,
)
from simpo.run.shared import check_shared
from simpo.run.shrink import shrink_until_it_fits
from simpo.run.stopping import (
    Interrupted,
    NonFiniteError,
    OutOfMemory,
    StepLosses,
    StopRequest,
    interrupted,
    name_step,
    needs_memory,
    not_finite,
)
from simpo.run.tracking import MetricsLog, check_trackers, open_log, read_evaluation, sync_logs

_ADVICE_OF_MODEL = "use_peft: true, master_dtype: bfloat16, load_in_4bit: true or more GPUs (dp_shard) need less"
_ADVICE_OF_OPTIMIZER = (
    "optim: adamw_bf16 or adamw_8bit, or use_peft: true, need less. Weights may be half updated: resume from the last "
    "checkpoint, or start anew"
)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        output_dir: the run directory.
        model_dir: the final model, loadable by transformers.
        steps: optimizer steps done.
        metrics: of the last evaluation (`eval_*`); empty without held-out pairs.
        saved_metrics: the same of the weights as they were written (`eval_saved_*`); empty where that rounds nothing.
        best_step, best_metric: of the best evaluation by `metric_for_best_model`; None without one.
        why_early: why `early_stopping_patience` ended it before its last step; None where it did not.
    """

    output_dir: Path
    model_dir: Path
    steps: int
    metrics: dict[str, float]
    saved_metrics: dict[str, float]
    best_step: int | None
    best_metric: float | None
    why_early: str | None = None


class Trainer:
    """One run of preference optimization; with several processes, one part of it in each.

    Args:
        recipe: what to train, how, and where to write; see `simpo.recipe`. The same on every process. A YAML file or a
            mapping is read by `load_recipe`.
        display: where progress is shown; None = the terminal, and of several processes the first one's.
        data: pairs that are tokenised already; None = read and tokenise the recipe's datasets.
    Raises:
        ValueError: data, model, device, run directory or checkpoint do not fit the recipe.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any],
        *,
        display: Display | None = None,
        data: PreparedData | None = None,
    ) -> None:
        recipe = load_recipe(recipe)
        if recipe.output_dir is None:
            raise ValueError("output_dir: a run needs a folder to write to, for example --output_dir runs/first")
        self.recipe = recipe
        check_trackers(recipe.report_to)
        if recipe.full_determinism:
            make_deterministic()
        self.mesh = join_world(recipe, pick_device(recipe.device))
        self.device = self.mesh.device
        self.display = display or Display(quiet=not self.mesh.is_main)
        self.output_dir = Path(recipe.output_dir)
        self.checkpoint_dir = self.output_dir / "checkpoints"
        self.eval_pairs = EvalPairs(self.output_dir)
        self.lock = OutputLock(self.output_dir)
        no_lock = self.mesh.on_main(self.lock.acquire)
        weakref.finalize(self, self.lock.release)  # of a trainer that never runs
        for notice in [*recipe.notices, *filter(None, [no_lock])]:
            self.display.say(notice)
        try:
            self._set_up(recipe, data)
        except BaseException:
            self.lock.release()
            raise

    def _set_up(self, recipe: Recipe, data: PreparedData | None) -> None:
        """All that `run` needs, from the data to the place in the run directory."""
        check_shared(self.output_dir, self.mesh)
        check_not_stopped(self.output_dir, self.mesh)
        resume = self.mesh.on_main(lambda: find_checkpoint(recipe))
        check_device(recipe, self.mesh)
        if (slow := set_up_process(recipe, self.device, sharded=self.mesh.sizes.is_sharded)) is not None:
            self.display.say(slow)
        seed_everything(recipe.seed)
        self.tokenizer = load_tokenizer(recipe)
        install_chat_template(self.tokenizer, recipe.chat_template)
        self.data = data or self.mesh.main_first(
            lambda: prepare_pairs(recipe, self.tokenizer, progress=self.mesh.is_main)
        )
        weights = self.mesh.main_first(lambda: identify_weights(recipe))
        check_agreement({"fingerprint of the data": self.data.fingerprint, **weights})
        check_token_ids(self.data, recipe)
        for line in check_held_out(recipe, self.data):
            self.display.say(line)
        self.export_dtype = export_dtype(recipe)  # asked now: an unreachable hub must not end a finished run
        self.repository = self.mesh.on_main(lambda: create_repository(recipe))
        with needs_memory("loading the model", advice=_ADVICE_OF_MODEL):
            self.model = load_model(recipe, device=self.device, mesh=self.mesh)
        self.recipe = recipe = as_it_trains(recipe, self.model)
        self.leftovers = find_leftovers(self.model, recipe.model_name_or_path, revision=recipe.model_revision)
        for note in (*notes_of(self.model), *([self.leftovers] if self.leftovers else [])):
            self.display.say(str(note))
        if recipe.use_liger_kernel and (reason := why_no_liger(unwrap(self.model), self.device)):
            self.display.say(f"use_liger_kernel: without effect here: {reason}")
        self.model.train()
        self._untrained = None if recipe.use_peft else WeightSample(self._trained_weights)
        self.gradients = GradientSync(self.model, self.mesh)
        # Dropout differs between processes that see other tokens; those of one tp group must drop the same.
        seed_everything(recipe.seed + self.mesh.data_rank * self.mesh.sizes.cp + self.mesh.cp_rank)
        build = functools.partial(
            build_loader, recipe=recipe, model=self.model, tokenizer=self.tokenizer, mesh=self.mesh
        )
        self.loader = build(self.data.train)
        self.eval_loader = build(self.data.eval, evaluation=True) if self.data.eval is not None else None
        self.total_steps = count_steps(recipe, self.loader.steps_per_epoch)
        self.optimizer = build_optimizer(self.model, recipe)
        steps = {"total_steps": self.total_steps, "steps_per_epoch": self.loader.steps_per_epoch}
        if (line := self.mesh.on_main(lambda: check_room(recipe, self.model, self.export_dtype, **steps))) is not None:
            self.display.say(line)
        stores = {"train": self.loader.store} | ({} if self.eval_loader is None else {"eval": self.eval_loader.store})
        self.reference = load_references(recipe, stores, mesh=self.mesh, fingerprint=self.data.fingerprint)
        self.progress = Progress()
        self.window = Totals()  # pairs since the last logged step
        self.log: MetricsLog | None = None  # opened by run() on the first process
        self.saver = CheckpointSaver(
            self.checkpoint_dir, self.mesh, in_background=recipe.async_save, keep=recipe.save_total_limit
        )
        self.mesh.limit_waits(recipe.ddp_timeout)  # now that all groups are made
        self._stop = StopRequest(self.display.say)  # this process was asked to stop
        self._stop_together = False  # one of several processes was, when the last step ended
        self.budget: TokenBudget | None = None  # picked by memory; a resumed run keeps what its checkpoint says
        if resume is not None:
            self._restore(resume)
        else:
            self._fit_micro_batches()
        facts = {"batch plan": self.loader.fingerprint, "optimizer steps done": self.progress.step}
        check_agreement(recipe_facts(recipe) | facts)
        if recipe.torch_compile:  # after the memory was measured: rows that small would be compiled for nothing
            compile_blocks(self.model, device=self.device)
        aside = self.mesh.on_main(lambda: open_output_dir(recipe, self.data, resume))
        if aside is not None:
            self.display.say(aside)

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Train to the last step and save the final model.

        Raises:
            Interrupted: Ctrl-C or SIGTERM, or, a StoppedByGuard, its guard; a checkpoint was saved first.
            NonFiniteError: a loss or gradient is not finite.
        """
        self.display.table("training", self._describe())
        report = leave_report(self.output_dir, self.display.say, is_main=self.mesh.is_main)
        log = open_log(self.output_dir, self.recipe, self.display.say, done=self.progress.step, mesh=self.mesh)
        with contextlib.ExitStack() as closing:
            _, _, self.log = (closing.enter_context(each) for each in (self.lock, report, log))
            self._train()
            with self._naming_what_is_whole():
                result = self._finish()
            self.mesh.on_main(lambda: upload_model(result.model_dir, self.repository, self.recipe, self.display))
            self.display.say(describe_next(self.recipe, held_out=self.data.eval is not None))
            self.mesh.on_main(lambda: closing.pop_all().close())  # the others wait for trackers and the report
        return result

    def _train(self) -> None:
        """All steps that are left, unless it is ended before."""
        with self._stop.listening():
            self.guard = RunGuard(self.recipe, self.output_dir, self.mesh, self.display, done=self.progress.step)
            self.guard.begin(dropped_by_source(self.data.ledger))
            self._make_up_for_an_evaluation()
            with self.display.progress(self.total_steps, self.progress.step) as show:
                for plan in self.loader.plans(self.progress.step, self.total_steps):
                    if self._is_ended_by_guard() or self.progress.why_early(self.recipe) is not None:
                        break
                    with self._finishing_what_is_on_its_way():
                        values = self.train_step(plan)
                    show(self.progress.step, values)
                    with self._naming_what_is_whole(saves=self.mesh.sizes.world == 1):  # others may be elsewhere
                        self._after_step(values)
            self._is_ended_by_guard()  # after the last step

    def _make_up_for_an_evaluation(self) -> None:
        """The one before the first step, or after the last one that is done, where a stop or want of memory came first.

        One that a start before this one has made up for is in the log, and not in the checkpoint.
        """
        step = self.progress.step
        if not (self.recipe.eval_on_start if step == 0 else self._evaluates_at(step)):
            return
        values = self.mesh.on_main(lambda: read_evaluation(self.output_dir / "metrics.jsonl", step))
        if values is None:
            self._evaluate_and_log()
        elif self.progress.last_eval_step != step:
            self._take_note_of(values)

    @contextlib.contextmanager
    def _finishing_what_is_on_its_way(self) -> Iterator[None]:
        """Around a step: where it fails, the checkpoint that is being written is the one to go on from."""
        try:
            yield
        except Exception:
            if self.mesh.sizes.world == 1:  # others are elsewhere
                with contextlib.suppress(OSError):
                    self.saver.finish()
            raise

    @contextlib.contextmanager
    def _naming_what_is_whole(self, *, saves: bool = False) -> Iterator[None]:
        """Around what writes files, between steps: where that fails, a checkpoint is tried, if `saves`, and named."""
        try:
            yield
        except OutOfMemory as error:
            if not saves:
                raise
            saved = self._save_to_stop()
            raise OutOfMemory(f"{error}. Saved {saved}, to resume with --resume_from_checkpoint true") from None
        except Exception as error:
            if not (isinstance(error, OSError) or is_disk_full(error)):
                raise
            if saves and not isinstance(error, NotSaved):
                with contextlib.suppress(OSError):
                    self._save_to_stop()
            raise not_written(error, checkpoints.list_checkpoints(self.checkpoint_dir)) from error

    def train_step(self, plan: StepPlan) -> dict[str, float]:
        """One optimizer step over the plan's pairs; returns their means, the gradient norm and the speed."""
        started = time.perf_counter()
        totals, losses = shrink_until_it_fits(
            self._accumulate,
            plan,
            loader=self.loader,
            mesh=self.mesh,
            forget=self.optimizer.zero_grad,
            say=self.display.say,
        )
        norm = gradient_norm(self.model)
        total = totals.over(self.mesh, plan.num_pairs, stop=self._stop.is_set(), grad_norm=norm)  # waits for the device
        if total.num_not_finite or not math.isfinite(total.grad_norm):
            raise self._not_finite(plan, losses, total)
        clip_gradients(self.model, self.recipe.max_grad_norm, norm=total.grad_norm)
        learning_rate = learning_rate_at(plan.step, self.total_steps, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with needs_memory(f"{name_step(self.mesh, plan.step)}: updating the weights", advice=_ADVICE_OF_OPTIMIZER):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        step_time_s = time.perf_counter() - started
        self.window.merge(total)
        self._stop_together = total.stop
        self.progress.step = plan.step + 1
        self.progress.pairs_seen += plan.num_pairs
        self.progress.tokens_seen += total.num_tokens
        self.progress.train_time_s += step_time_s
        return total.means() | {
            "grad_norm": total.grad_norm,
            "learning_rate": learning_rate,
            "step_time_s": step_time_s,
            "pairs_per_s": plan.num_pairs / step_time_s,
        }

    def _accumulate(self, plan: StepPlan) -> tuple[StepTotals, StepLosses]:
        """The gradient of a step, its totals, and each pair's loss."""
        totals, losses = StepTotals(self.loader.store.sources.names), []
        for micro_batch in self.loader.micro_batches(plan):
            with self.gradients.micro_batch(is_last=micro_batch.is_last):
                with offload_activations(self.model) if self.recipe.activation_offload else contextlib.nullcontext():
                    pair_losses, metric_sums = self.forward(micro_batch, plan)
                # Each backward adds this micro-batch's share of the gradient of the mean over *all* pairs of the step.
                (pair_losses.sum() * (self.gradients.scale / plan.num_pairs)).backward()
            totals.add(metric_sums, pair_losses, num_tokens=micro_batch.num_tokens)
            if micro_batch.indices:
                losses.append((micro_batch.pairs.row_ids, pair_losses.detach()))
        self.gradients.finish()
        return totals, losses

    def forward(self, micro_batch: MicroBatch, plan: StepPlan, *, split: str = "train") -> tuple[Tensor, Tensor]:
        """The trained loss of each pair [P], SFT term included, and the sums of its metrics."""
        logps = self._logps(self.mesh.own_rows(micro_batch.pairs))
        if self.reference is not None and micro_batch.indices:
            logps = self.reference[split].put_into(logps, micro_batch.indices)
        pairs = self.eval_pairs if split == "eval" else None
        return micro_batch_losses(logps, micro_batch, plan, self.recipe, pairs=pairs)

    def _logps(self, batch: PackedPairs) -> PairLogps:
        return recipe_logps(self.gradients.module, batch.to(self.device), self.recipe)

    def _after_step(self, values: Mapping[str, float]) -> None:
        """Between steps, in this order: log, evaluate, save, stop if asked to.

        An evaluation may take longer than whoever asks will wait: it is left to the resumed run. The last one is made,
        after a checkpoint.
        """
        recipe, step, last = self.recipe, self.progress.step, self.progress.step == self.total_steps
        evaluates = self._evaluates_at(step)
        if step % recipe.logging_steps == 0 or last:
            self._log_window(values)
        if evaluates:
            if self._is_asked_to_stop():
                saved = self._save_to_stop()
                if not last:
                    raise self._interrupted(saved)
            self._evaluate_and_log()
        at = self._at(step)
        if not last and self.progress.why_early(recipe) is not None:
            last, at["total_steps"] = True, step
            if self.progress.logged_step != step:
                self._log_window(values)
        is_best = recipe.load_best_model_at_end and self.progress.best_step == step
        if is_due(recipe.save_strategy, recipe.save_steps, **at) or is_best:
            self.save()
        self.saver.finish(wait=last)
        if not last and (self._is_asked_to_stop() if evaluates or self.mesh.sizes.world == 1 else self._stop_together):
            raise self._interrupted(self._save_to_stop())

    def _is_asked_to_stop(self) -> bool:
        """Whether any process is, by now; every process calls it."""
        return any(self.mesh.gather(self._stop.is_set()))

    def _interrupted(self, saved: Path) -> Interrupted:
        return interrupted(self.progress.step, self.total_steps, saved)

    def _evaluates_at(self, step: int) -> bool:
        return is_due(self.recipe.eval_strategy, self.recipe.eval_steps, **self._at(step))

    def _at(self, step: int) -> dict[str, int]:
        return {"step": step, "steps_per_epoch": self.loader.steps_per_epoch, "total_steps": self.total_steps}

    def _finish(self) -> TrainResult:
        self.saver.finish()
        progress = self.progress
        is_early = progress.step < self.total_steps and self.guard.back_to is None
        why_early = progress.why_early(self.recipe) if is_early else None
        if why_early is not None:
            self.display.say(why_early)
        results, kept_step = progress.last_eval, progress.step
        best_step, folder = self.guard.back_to, self.checkpoint_dir
        if best_step is None and self.recipe.load_best_model_at_end:
            best_step, folder = progress.best_step, progress.best_in or self.checkpoint_dir
        if best_step not in (None, progress.step):
            self.mesh.barrier()
            best = self.mesh.on_main(lambda: best_checkpoint(best_step, folder))
            then = Progress.from_checkpoint(checkpoints.load_checkpoint(best, model=self.model, mesh=self.mesh), best)
            results, kept_step = then.last_eval, best.step
            if then.last_eval_step != best.step:  # it was saved before its evaluation
                log = best.folder.parents[1] / "metrics.jsonl"
                results = self.mesh.on_main(lambda: read_evaluation(log, best.step)) or {}
            if self.guard.back_to is None:
                self.display.say(f"the best evaluation was at step {best.step}: its weights are the final model")
        model_dir = self.output_dir / "model"
        written = publish_model(
            self.model,
            whole_weights(self.model, keep=self.mesh.is_main),
            self.tokenizer,
            self.recipe,
            model_dir,
            leftovers=self.leftovers,
            dtype=self.export_dtype,
            untrained=self._untrained,
            data=card_of_data(self.data, step=kept_step, total_steps=self.total_steps, why_early=why_early),
            results=results,
            evaluate=functools.partial(self.evaluate, prefix="eval_saved"),
            mesh=self.mesh,
            display=self.display,
        )
        if written:
            self._write(written | ({"of_step": float(kept_step)} if kept_step != progress.step else {}))
        metrics = self.output_dir / "metrics.jsonl"
        done = {"run directory": self.output_dir, "model": model_dir, "metrics": metrics}
        self.display.table("done", done | self.guard.summary())
        return TrainResult(
            self.output_dir,
            model_dir,
            steps=progress.step,
            metrics=progress.last_eval,
            saved_metrics=written,
            best_step=progress.best_step,
            best_metric=progress.best_metric,
            why_early=why_early,
        )

    def _trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    # --- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, *, prefix: str = "eval") -> dict[str, float]:
        """Means over all held-out pairs, with `eval_` in front; the same bits on every process. Empty without pairs."""
        if self.eval_loader is None:
            return {}
        started, totals = time.perf_counter(), StepTotals(self.eval_loader.store.sources.names)
        whole = self.eval_loader.plan_everything()
        self.eval_pairs.clear()
        self.model.eval()
        with needs_memory("evaluation", advice="lower per_device_eval_batch_size"):
            for micro_batch in self.eval_loader.micro_batches(whole):
                losses, sums = self.forward(micro_batch, whole, split="eval")
                totals.add(sums, losses, num_tokens=micro_batch.num_tokens)
        self.model.train()
        drop_gathered(self.model)
        total = totals.over(self.mesh, whole.num_pairs)
        values = total.means() | total.counts() | {"time_s": time.perf_counter() - started}
        return self.mesh.from_main({f"{prefix}_{name}": value for name, value in values.items()})

    def _evaluate_and_log(self) -> None:
        if self.progress.last_eval_step == self.progress.step:
            return
        values = self.evaluate()
        if not values:
            return
        self._take_note_of(values)
        self._write(values | {"epoch": self._epoch})
        keep = {self.progress.best_step, *self._may_go_back_to()}
        self.eval_pairs.save(self.progress.step, self.mesh, keep=keep)
        self.display.say_evaluation(f"evaluation at step {self.progress.step}", values)
        self.guard.heed(self.progress.step, values, self._generate_samples())

    def _take_note_of(self, values: dict[str, float]) -> None:
        self.progress.last_eval_step, self.progress.last_eval = self.progress.step, values
        if self.progress.step:  # before the first one there is no checkpoint to go back to
            self.progress.track_best(values, self.recipe)

    def _generate_samples(self) -> list[dict[str, Any]]:
        # Sharded blocks are gathered in bf16, which fp32 activations meet only under autocast.
        sharded = self.mesh.sizes.is_sharded and bool(self.recipe.bf16)
        place = {"step": self.progress.step, "mesh": self.mesh}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=sharded):
            store = self.eval_loader.store
            answers = save_samples(self.output_dir, self.model, self.tokenizer, store, self.recipe, **place)
        drop_gathered(self.model)
        return answers

    # --- saving and resuming -----------------------------------------------------------------------------------------

    def save(self) -> Checkpoint:
        """Write a checkpoint of this moment, unless this step has one; with `async_save` it is complete later."""
        self.saver.finish()  # what is on its way counts among those that may have to stay
        if self.log is not None:
            sync_logs(self.output_dir)
        state = {
            "progress": dataclasses.asdict(self.progress),
            "window": self.window.to_json(),
            "max_tokens_per_micro_batch": self.loader.max_tokens,
            "max_tokens_asked_for": self.recipe.max_tokens_per_micro_batch,
            **self._identity(),
        }
        wanted = {self.progress.best_step, *self._may_go_back_to()}
        return self.saver.save(self.progress.step, self.model, self.optimizer, state, protect=wanted)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = self.mesh.on_main(lambda: checkpoints.read_state(checkpoint))
        progress = Progress.from_checkpoint(state, checkpoint)
        fits = self.loader.pairs_before(state["step"]) == progress.pairs_seen
        identity = self._identity()
        for line in check_same_run(state, identity, checkpoint.folder, recipe=self.recipe, pairs_fit=fits):
            self.display.say(line)
        self.mesh.on_main(lambda: checkpoints.clear_leftovers(self.checkpoint_dir))
        checkpoints.load_checkpoint(checkpoint, model=self.model, optimizer=self.optimizer, mesh=self.mesh)
        self.progress = progress
        if self.recipe.load_best_model_at_end and self.progress.best_step is not None:
            line = locate_best(self.progress, checkpoint, self.checkpoint_dir, self.recipe, self.mesh)
            if line is not None:
                self.display.say(line)
        self.window = Totals.from_json(state["window"])
        before = state.get("max_tokens_asked_for", state["recipe"].get("max_tokens_per_micro_batch"))
        if state["mesh"] == str(self.mesh.sizes) and self.recipe.max_tokens_per_micro_batch == before:
            # What is free today must not change it, and what ran out of memory before would again.
            self.loader.limit_tokens(state.get("max_tokens_per_micro_batch"), even_below_a_pair=True)
        else:
            self._fit_micro_batches()
        if state["mesh"] != str(self.mesh.sizes):
            self.display.say(f"the checkpoint is of {state['mesh']}: the last bits of what follows differ from theirs")
        self.display.say(f"resumed from {checkpoint.folder}: step {checkpoint.step} of {self.total_steps} is done")

    def _identity(self) -> dict[str, Any]:
        return run_identity(self.recipe, self.data, self.loader, total_steps=self.total_steps)

    def _fit_micro_batches(self) -> None:
        """Where the recipe leaves it open, let a micro-batch hold as many tokens as fit into the free memory."""
        if self.recipe.max_tokens_per_micro_batch is not None or not self.recipe.pack:
            return

        def forward(batch: PackedPairs) -> PairLogps:
            drop_gathered(self.model)  # so that each begins alike
            return self._logps(batch)

        store = self.loader.store
        on = {"device": self.device, "cp": self.mesh.sizes.cp, "state": self.optimizer.state}
        self.budget = fit_micro_batches(self.model, forward, store, self.recipe, **on)
        drop_gathered(self.model)
        if self.budget is not None:
            self.loader.limit_tokens(min(self.mesh.gather(self.budget.tokens)))
            if self.budget.warning is not None:
                self.display.say(self.budget.warning)

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def _epoch(self) -> float:
        return self.progress.pairs_seen / len(self.loader.store)

    def _log_window(self, step_values: Mapping[str, float]) -> None:
        """Means over every pair and second since the last logged step."""
        progress = self.progress
        time_s, num_pairs = progress.train_time_s - progress.logged_time_s, max(self.window.pairs.values())
        values = self.window.means() | {
            "grad_norm": step_values["grad_norm"],
            "learning_rate": step_values["learning_rate"],
            "epoch": self._epoch,
            "pairs_seen": progress.pairs_seen,
            "tokens_seen": progress.tokens_seen,
            "step_time_s": time_s / (progress.step - progress.logged_step),
            "pairs_per_s": num_pairs / time_s,
            "memory_gib": max(self.mesh.gather(peak_memory_gib(self.device))),
        }
        self._write(values)
        self.window = Totals()  # only now: what could not be written is in the next line
        progress.logged_step, progress.logged_time_s = progress.step, progress.train_time_s
        left_s = progress.train_time_s / progress.step * (self.total_steps - progress.step)
        self.display.log_step(progress.step, self.total_steps, values, left_s=left_s)
        self.guard.heed(progress.step, values)

    def _is_ended_by_guard(self) -> bool:
        """Whether it goes back to a checkpoint instead of on; raises where it stops the run."""
        if self.guard.verdict is not None and self.guard.back_to is None:
            self.guard.choose(self._saved_steps())
            if self.guard.back_to is None:
                raise self.guard.stopped(self.total_steps, self._save_to_stop())
        return self.guard.back_to is not None

    def _may_go_back_to(self) -> set[int | None]:
        """Steps with a checkpoint that the guard, which is there while it trains, might make the final model of."""
        return {*self.guard.may_go_back_to(self._saved_steps())} if hasattr(self, "guard") else set()

    def _saved_steps(self) -> list[int]:
        return [saved.step for saved in checkpoints.list_checkpoints(self.checkpoint_dir)]

    def _save_to_stop(self) -> Path:
        saved = self.save()
        self.saver.finish()
        return saved.folder

    def _write(self, values: Mapping[str, Any]) -> None:
        if self.log is not None:
            self.log.write(values, step=self.progress.step)

    def _not_finite(self, plan: StepPlan, losses: StepLosses, total: Totals) -> NonFiniteError:
        self.saver.finish()
        saved = checkpoints.list_checkpoints(self.checkpoint_dir)
        last = f"The last good checkpoint is {saved[-1].folder}. " if saved else "There is no checkpoint yet. "
        norm = None if total.num_not_finite else total.grad_norm
        return not_finite(plan.step, losses, self.mesh, grad_norm=norm, saved=last)

    def _describe(self) -> dict[str, str]:
        precision = "bf16" if self.recipe.computes_in_bf16 else "fp32"
        first = next(self.loader.plans(0, 1)).micro_batches
        cut = f"{len(first)} in the first step"
        if self.loader.max_tokens is not None:
            cut = f"up to {self.loader.max_tokens:,} tokens, {cut}"
        return describe_run(
            self.recipe,
            self.model,
            self.data,
            self.loader,
            where={
                "device": f"{self.device}, threads: {torch.get_num_threads()}, {precision} compute",
                "mesh": str(self.mesh.sizes),
            },
            total_steps=self.total_steps,
            micro_batches=cut if self.budget is None else f"{cut}; {self.budget}",
        )
