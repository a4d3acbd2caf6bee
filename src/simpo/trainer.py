"""The trainer: from a recipe to a run directory with an aligned model.

    for each step's plan:
        for each micro-batch: forward, one loss per pair, backward of (their sum / pairs in the whole step)
        sum metrics over all processes; stop if anything is not finite; clip; update; log; evaluate; save

Every pair of a step weighs the same, however the step is cut into micro-batches and spread over processes. A run may be
killed at any moment: it goes on from its last checkpoint, bit for bit wherever torch computes the same bits twice (on
CPUs; on CUDA with `full_determinism`). Norm, losses and metrics of a step come to the host together, before its update;
nothing else in it waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpo.core.batch import PackedPairs
from simpo.core.losses import PairLogps
from simpo.data.loader import MicroBatch, PairStore, StepLoader, StepPlan
from simpo.data.prepare import PreparedData, prepare_pairs
from simpo.display import Display
from simpo.evaluation.generate import generate_greedy, save_generations
from simpo.model.attention import unwrap
from simpo.model.compile import compile_blocks
from simpo.model.costs import cost_weights
from simpo.model.head import compute_pair_logps
from simpo.model.kernels import describe_attention
from simpo.model.load import load_model, load_tokenizer, pick_device, set_precision
from simpo.model.low_memory import why_no_liger
from simpo.model.offload import offload_activations
from simpo.parallel.mesh import join_world
from simpo.parallel.sharding import GradientSync, drop_gathered
from simpo.recipe import Recipe
from simpo.run import checkpoint as checkpoints
from simpo.run.checkpoint import Checkpoint, CheckpointSave
from simpo.run.export import (
    WeightSample,
    as_saved,
    dtype_name,
    export_dtype,
    save_model,
    saved_tensors,
    settle_dtype,
    write_model_card,
)
from simpo.run.memory import TokenBudget, fit_micro_batches
from simpo.run.metrics import PAIR_METRICS, StepTotals, Totals, peak_memory_gib
from simpo.run.objective import trained_losses
from simpo.run.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    learning_rate_at,
    make_deterministic,
    seed_everything,
    set_threads,
)
from simpo.run.ram import keep_freed_memory
from simpo.run.reference import ReferenceLogps, compute_reference_logps
from simpo.run.resume import best_checkpoint, check_same_run, find_checkpoint, record_launch, run_identity
from simpo.run.stopping import Interrupted, NonFiniteError, OutOfMemory, StopRequest, missing_memory, needs_memory
from simpo.run.tracking import MetricsLog, check_trackers, forget_lines_after

_ADVICE_OF_STEP = (
    "gradient_checkpointing: true, use_peft: true, optim: adamw_bf16, a smaller logits_chunk_size or a lower "
    "max_length need less"
)
_ADVICE_OF_OPTIMIZER = (
    "optim: adamw_bf16 or adamw_8bit, or use_peft: true, need less. Weights may be half updated: go on from the last "
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
    """

    output_dir: Path
    model_dir: Path
    steps: int
    metrics: dict[str, float]
    saved_metrics: dict[str, float]
    best_step: int | None
    best_metric: float | None


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
    last_eval_step: int | None = None
    last_eval: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Progress:
        """Of a checkpoint, perhaps another version's: what it lacks has its default, what is not known here is left."""
        return cls(**{item.name: state[item.name] for item in dataclasses.fields(cls) if item.name in state})


class Trainer:
    """One run of preference optimization; with several processes, one part of it in each.

    Args:
        recipe: what to train, how, and where to write; see `simpo.recipe`. The same on every process.
        display: where progress is shown; None = the terminal, and of several processes the first one's.
        data: pairs that are tokenised already; None = read and tokenise the recipe's datasets.
    Raises:
        ValueError: data, model, device, run directory or checkpoint do not fit the recipe.
    """

    def __init__(self, recipe: Recipe, *, display: Display | None = None, data: PreparedData | None = None) -> None:
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
        self.generations_path = self.output_dir / "generations.jsonl"
        resume = self.mesh.on_main(lambda: find_checkpoint(recipe))
        for notice in recipe.notices:
            self.display.say(notice)

        if recipe.activation_offload and self.device.type == "cpu":
            raise ValueError("activation_offload: on a CPU activations are in host memory already; set it to false")
        if recipe.optimizer_offload and self.device.type == "cpu":
            raise ValueError("optimizer_offload: on a CPU the optimizer is in host memory already; set it to false")
        if recipe.optimizer_offload and self.mesh.sizes.is_sharded:
            raise ValueError(
                "optimizer_offload: only for weights that are whole on each process; with sharded ones "
                "fsdp_cpu_offload: true keeps the moments in host memory"
            )
        set_precision(recipe, self.device)
        set_threads(recipe.num_threads)
        if self.device.type == "cpu" and not self.mesh.sizes.is_sharded:  # gathered weights come and go: holes
            keep_freed_memory()
        seed_everything(recipe.seed)
        self.tokenizer = load_tokenizer(recipe)
        self.data = data or self.mesh.main_first(
            lambda: prepare_pairs(recipe, self.tokenizer, progress=self.mesh.is_main)
        )
        self.export_dtype = export_dtype(recipe)  # asked now: the end of a run is no time to find the hub unreachable
        self.model = load_model(recipe, device=self.device, mesh=self.mesh)
        if recipe.use_liger_kernel and (reason := why_no_liger(unwrap(self.model), self.device)):
            self.display.say(f"use_liger_kernel: without effect here: {reason}")
        self.model.train()
        self._untrained = None if recipe.use_peft else WeightSample(self._trained_weights())
        self.gradients = GradientSync(self.model, self.mesh)
        # Dropout differs between processes that see other tokens; those of one tp group must drop the same.
        seed_everything(recipe.seed + self.mesh.data_rank * self.mesh.sizes.cp + self.mesh.cp_rank)
        self.loader = self._build_loader(self.data.train)
        self.eval_loader = self._build_loader(self.data.eval, evaluation=True) if self.data.eval is not None else None
        self.total_steps = count_steps(recipe, self.loader.steps_per_epoch)
        self.optimizer = build_optimizer(self.model, recipe)
        self.reference = self._prepare_reference()
        self.progress = Progress()
        self.window = Totals()  # pairs since the last logged step
        self.log: MetricsLog | None = None  # opened by run() on the first process
        self.saving: CheckpointSave | None = None  # written in the background
        self._host_copies = checkpoints.HostCopies()  # from here
        self._best_of_saved: int | None = None  # the best step as of the newest checkpoint, which may still be written
        self._stop = StopRequest(self.display.say)  # this process was asked to stop
        self._stop_together = False  # one of several processes was, when the last step ended
        self.budget: TokenBudget | None = None  # picked by memory; a resumed run keeps what its checkpoint says
        if resume is not None:
            self._restore(resume)
        else:
            self._fit_micro_batches()
        self._check_agreement()
        if recipe.torch_compile:  # after the memory was measured: rows that small would be compiled for nothing
            compile_blocks(self.model, device=self.device)
        self.mesh.on_main(self._open_output_dir)

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Train to the last step and save the final model.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved first.
            NonFiniteError: a loss or gradient is not finite.
        """
        self.display.table("training", self._summary())
        with self._metrics_log():
            with self._stop.listening():
                if self.recipe.eval_on_start and self.progress.step == 0:
                    self._evaluate_and_log()
                with self.display.progress(self.total_steps, self.progress.step) as bar:
                    for plan in self.loader.plans(self.progress.step, self.total_steps):
                        values = self.train_step(plan)
                        bar.update(self.progress.step, values)
                        self._after_step(values)
            return self._finish()

    def train_step(self, plan: StepPlan) -> dict[str, float]:
        """One optimizer step over the plan's pairs; returns their means, the gradient norm and the speed."""
        started = time.perf_counter()
        totals, losses = self._accumulate(plan)
        norm = gradient_norm(self.model)
        total = totals.over(self.mesh, plan.num_pairs, stop=self._stop.is_set(), grad_norm=norm)  # waits for the device
        if total.num_not_finite:
            raise self._not_finite(plan, "a loss is not finite", _rows_not_finite(losses))
        grad_norm = total.grad_norm
        if not math.isfinite(grad_norm):
            rows = [row for row_ids, _ in losses for row in row_ids]
            raise self._not_finite(plan, f"the gradient norm is {grad_norm}", rows)
        clip_gradients(self.model, self.recipe.max_grad_norm, norm=grad_norm)
        learning_rate = learning_rate_at(plan.step, self.total_steps, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with needs_memory(f"{self._where(plan)}: updating the weights", advice=_ADVICE_OF_OPTIMIZER):
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
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "step_time_s": step_time_s,
            "pairs_per_s": plan.num_pairs / step_time_s,
        }

    def _accumulate(self, plan: StepPlan) -> tuple[StepTotals, list[tuple[tuple[str, ...], Tensor]]]:
        """The gradient of a step, its totals, and each micro-batch's losses by row.

        Where memory runs out, the step begins again in smaller micro-batches, with the same pairs and the same dice.
        """
        dice = _DeviceDice(self.device)
        while True:
            missing = None
            try:
                return self._backward(plan)
            except RuntimeError as error:
                missing = missing_memory(error)
                if missing is None:
                    raise
            # Out here nobody holds what the failed attempt had computed: the error did, frame by frame.
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            plan = self._replan(plan, missing)
            dice.restore()

    def _backward(self, plan: StepPlan) -> tuple[StepTotals, list[tuple[tuple[str, ...], Tensor]]]:
        totals, losses = StepTotals(), []
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

    def _replan(self, plan: StepPlan, missing: str) -> StepPlan:
        """The same step in micro-batches of half the tokens, which later steps keep to as well.

        Raises:
            OutOfMemory: every micro-batch holds one pair, or other processes are in the middle of theirs.
        """
        tokens = self.loader.store.tokens
        largest = max(int(tokens[list(indices)].sum()) for indices in plan.micro_batches)
        longest = max((int(tokens[list(indices)].max()) for indices in plan.micro_batches if indices), default=0)
        what = f"{self._where(plan)}: out of memory in micro-batches of up to {largest:,} tokens ({missing})"
        if longest == largest:
            raise OutOfMemory(f"{what}, which is one pair alone; nothing was updated. {_ADVICE_OF_STEP}")
        limit = max(longest, largest // 2)
        key = "a smaller per_device_train_batch_size"
        if self.recipe.pack:
            key = f"max_tokens_per_micro_batch: {max(limit, int(tokens.max()))}"
        if self.mesh.sizes.world > 1:
            raise OutOfMemory(
                f"{what}; nothing was updated, and several processes cannot begin a step again. Set {key} and go on "
                f"with --resume_from_checkpoint true. {_ADVICE_OF_STEP} too"
            )
        self.loader.limit_tokens(limit, even_below_a_pair=True)
        self.display.say(
            f"{what}: begun again with up to {limit:,}, which holds from here on; the update stays the same"
            + (f". {key} starts like that" if self.recipe.pack else "")
        )
        return next(self.loader.plans(plan.step, plan.step + 1))

    def _where(self, plan: StepPlan) -> str:
        rank = f"rank {self.mesh.rank}, " if self.mesh.sizes.world > 1 else ""
        return f"{rank}step {plan.step + 1}"

    def forward(self, micro_batch: MicroBatch, plan: StepPlan, *, split: str = "train") -> tuple[Tensor, Tensor]:
        """The trained loss of each pair [P], SFT term included, and the sums of its metrics."""
        recipe = self.recipe
        logps = self._logps(self.mesh.own_rows(micro_batch.pairs))
        if not micro_batch.indices:  # a stand-in: every weight takes part, with a gradient of zero
            nothing = 0.0 * (logps.chosen_sum + logps.rejected_sum)
            return nothing, torch.zeros(len(PAIR_METRICS), dtype=torch.float64, device=self.device)
        if self.reference is not None:
            chosen, rejected = self.reference[split].lookup(micro_batch.indices, device=self.device)
            logps = dataclasses.replace(logps, ref_chosen_sum=chosen, ref_rejected_sum=rejected)
        return trained_losses(logps, recipe, num_pairs=plan.num_pairs, num_chosen_tokens=plan.num_chosen_tokens)

    def _logps(self, batch: PackedPairs) -> PairLogps:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bool(self.recipe.bf16)):
            module, chunk_size = self.gradients.module, self.recipe.logits_chunk_size
            return compute_pair_logps(module, batch.to(self.device), chunk_size=chunk_size)

    def _after_step(self, values: Mapping[str, float]) -> None:
        """Between steps, in this order: log, evaluate, save, stop if asked to."""
        recipe, step, last = self.recipe, self.progress.step, self.progress.step == self.total_steps
        if step % recipe.logging_steps == 0 or last:
            self._log_window(values)
        if self._is_due(recipe.eval_strategy, self._eval_every) or (last and recipe.eval_strategy != "no"):
            self._evaluate_and_log()
        if self._is_due(recipe.save_strategy, recipe.save_steps) or (last and recipe.save_strategy != "no"):
            self.save()
        self._finish_saving(wait=last)
        if (self._stop.is_set() if self.mesh.sizes.world == 1 else self._stop_together) and not last:
            saved = self.save()
            self._finish_saving(wait=True)
            raise Interrupted(
                f"stopped after step {step} of {self.total_steps} and saved {saved.folder}; "
                "to go on, run the same command with --resume_from_checkpoint true"
            )

    def _finish(self) -> TrainResult:
        progress = self.progress
        results, kept_step = progress.last_eval, progress.step
        if self.recipe.load_best_model_at_end and progress.best_step not in (None, progress.step):
            self.mesh.barrier()
            folder = progress.best_in or self.checkpoint_dir
            best = self.mesh.on_main(lambda: best_checkpoint(progress.best_step, folder))
            checkpoints.load_weights(best, model=self.model, mesh=self.mesh)
            results, kept_step = checkpoints.read_state(best)["progress"]["last_eval"], best.step
            self.display.say(f"the best evaluation was at step {best.step}: its weights are the final model")
        dtype, model_dir = self._settle_export_dtype(), self.output_dir / "model"
        data = {
            "training pairs": len(self.data.train),
            "held-out pairs": len(self.data.eval or ()),
            "data fingerprint": self.data.fingerprint,
            "optimizer step of these weights": f"{kept_step} of {self.total_steps}",
        }
        save_model(
            self.model,
            self.tokenizer,
            self.recipe,
            model_dir,
            dtype=dtype,
            data=data,
            results=results,
            mesh=self.mesh,
        )
        written = self._evaluate_as_saved(dtype) if results else {}  # once the model is safe
        if written:
            self.mesh.on_main(lambda: write_model_card(model_dir, self.recipe, data=data, results=results | written))
        metrics = self.output_dir / "metrics.jsonl"
        self.display.table("done", {"run directory": self.output_dir, "model": model_dir, "metrics": metrics})
        return TrainResult(
            self.output_dir,
            model_dir,
            steps=progress.step,
            metrics=progress.last_eval,
            saved_metrics=written,
            best_step=progress.best_step,
            best_metric=progress.best_metric,
        )

    def _settle_export_dtype(self) -> torch.dtype:
        """In which dtype to write; says what that costs the trained weights, or why it is not the one asked for."""
        return settle_dtype(
            self.export_dtype,
            saved_tensors(self.model),
            untrained=self._untrained,
            trained=self._trained_weights(),
            mesh=self.mesh,
            say=self.display.say,
        )

    def _trained_weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _evaluate_as_saved(self, dtype: torch.dtype) -> dict[str, float]:
        """The last evaluation again, of the weights as they are written, where that is not what was evaluated."""
        with as_saved(saved_tensors(self.model), dtype) as changed:
            if not self.mesh.largest(changed):
                return {}
            values = self.mesh.from_main(self.evaluate())
        values = {name.replace("eval_", "eval_saved_", 1): value for name, value in values.items()}
        self._write(values)
        self.display.say_evaluation(f"as written in {dtype_name(dtype)}", values, prefix="eval_saved")
        return values

    # --- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over all held-out pairs, with `eval_` in front; empty without held-out pairs."""
        if self.eval_loader is None:
            return {}
        started, totals = time.perf_counter(), StepTotals()
        whole = self.eval_loader.plan_everything()
        self.model.eval()
        with needs_memory("evaluation", advice="lower per_device_eval_batch_size"):
            for micro_batch in self.eval_loader.micro_batches(whole):
                losses, sums = self.forward(micro_batch, whole, split="eval")
                totals.add(sums, losses, num_tokens=micro_batch.num_tokens)
        self.model.train()
        drop_gathered(self.model)
        results = totals.over(self.mesh, whole.num_pairs).means()
        values = {f"eval_{name}": value for name, value in results.items()}
        return values | {"eval_pairs": whole.num_pairs, "eval_time_s": time.perf_counter() - started}

    def _evaluate_and_log(self) -> None:
        if self.progress.last_eval_step == self.progress.step:
            return
        values = self.mesh.from_main(self.evaluate())  # to the last bit: what follows is decided by them
        if not values:
            return
        self.progress.last_eval_step, self.progress.last_eval = self.progress.step, values
        self._track_best(values)
        self._write(values | {"epoch": self._epoch})
        self.display.say_evaluation(f"evaluation at step {self.progress.step}", values)
        if self.recipe.num_eval_generations:
            self._generate_samples()

    def _track_best(self, values: Mapping[str, float]) -> None:
        name, best = self.recipe.metric_for_best_model, self.progress.best_metric
        if name not in values:
            raise ValueError(f"metric_for_best_model: {name!r} is not one of {', '.join(sorted(values))}")
        if best is None or (values[name] > best if self.recipe.greater_is_better else values[name] < best):
            self.progress.best_metric, self.progress.best_step = values[name], self.progress.step
            self.progress.best_in = None

    def _generate_samples(self) -> None:
        store = self.eval_loader.store
        indices = range(min(self.recipe.num_eval_generations, len(store)))
        # Sharded blocks are gathered in bf16, which fp32 activations meet only under autocast.
        sharded = self.mesh.sizes.is_sharded and bool(self.recipe.bf16)
        advice = "lower num_eval_generations or eval_generation_max_new_tokens"
        with (
            needs_memory("generating samples", advice=advice),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=sharded),
        ):
            responses = generate_greedy(
                self.model,
                self.tokenizer,
                [store[i].prompt_ids for i in indices],
                max_new_tokens=self.recipe.eval_generation_max_new_tokens,
            )
        drop_gathered(self.model)
        if not self.mesh.is_main:
            return
        save_generations(
            self.generations_path,
            step=self.progress.step,
            row_ids=[store[i].row_id for i in indices],
            prompts=[store.texts(i)["prompt_text"] for i in indices],
            responses=responses,
        )

    # --- saving and resuming -----------------------------------------------------------------------------------------

    def save(self) -> Checkpoint:
        """Write a checkpoint of this moment, unless this step has one; returns it.

        With `async_save` it is complete later: see `_finish_saving`.
        """
        step = self.progress.step
        self._finish_saving(wait=True)
        existing = self.mesh.on_main(lambda: checkpoints.checkpoint_at(self.checkpoint_dir, step))
        if existing is not None:
            return existing
        if self.log is not None:
            self.log.sync()
        state = {
            "progress": dataclasses.asdict(self.progress),
            "window": self.window.to_json(),
            "max_tokens_per_micro_batch": self.loader.max_tokens,
            "max_tokens_asked_for": self.recipe.max_tokens_per_micro_batch,
            **self._identity(),
        }
        self.saving = checkpoints.save_checkpoint(
            self.checkpoint_dir,
            step=step,
            model=self.model,
            optimizer=self.optimizer,
            state=state,
            mesh=self.mesh,
            in_background=self.recipe.async_save and (self.mesh.cpu_group or True),
            copies=self._host_copies,
        )
        self._best_of_saved = self.progress.best_step
        saved = self.saving.checkpoint
        self._finish_saving(wait=not self.recipe.async_save)
        return saved

    def _finish_saving(self, *, wait: bool) -> None:
        """Complete the checkpoint on its way, if there is one and it is written, and delete those beyond the limit."""
        if self.saving is None or not (wait or self.mesh.least(self.saving.is_written)):
            return
        self.saving.finish()
        self.saving = None
        if self.recipe.save_total_limit is not None and self.mesh.is_main:
            protect = self._best_of_saved if self.recipe.load_best_model_at_end else None
            checkpoints.prune_checkpoints(self.checkpoint_dir, keep=self.recipe.save_total_limit, protect=protect)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = self.mesh.on_main(lambda: checkpoints.read_state(checkpoint))
        step, identity = state["step"], self._identity()
        seen = (step, state["progress"]["pairs_seen"])
        for line in check_same_run(
            state, identity, checkpoint.folder, recipe=self.recipe, loader=self.loader, seen=seen
        ):
            self.display.say(line)
        self.mesh.on_main(lambda: checkpoints.clear_leftovers(self.checkpoint_dir))
        self.mesh.on_main(lambda: checkpoints.forget_after(self.checkpoint_dir, checkpoint))
        checkpoints.load_checkpoint(checkpoint, model=self.model, optimizer=self.optimizer, mesh=self.mesh)
        self.progress = Progress.from_json(state["progress"])
        if self.recipe.load_best_model_at_end and self.progress.best_step is not None:
            self._look_for_best(checkpoint)
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

    def _look_for_best(self, resumed: Checkpoint) -> None:
        """The best checkpoint so far may lie beside the one that is resumed; it may also have been deleted since."""
        progress, folder = self.progress, Path(self.progress.best_in or resumed.folder.parent)
        try:
            self.mesh.on_main(lambda: best_checkpoint(progress.best_step, folder))
        except ValueError as error:
            self.display.say(f"{error}. Going on: the best is chosen among step {resumed.step} and those after it")
            progress.best_step = progress.best_metric = None
            if progress.last_eval_step == resumed.step:
                self._track_best(progress.last_eval)
            folder = resumed.folder.parent
        is_own = folder.resolve() == self.checkpoint_dir.resolve()
        progress.best_in = None if is_own else str(folder.resolve())

    def _identity(self) -> dict[str, Any]:
        return run_identity(self.recipe, self.data, self.loader, total_steps=self.total_steps)

    def _check_agreement(self) -> None:
        """Stop unless every process is about to do its part of the same run."""
        facts = {f"recipe key {name}": value for name, value in self.recipe.to_dict().items()}
        facts |= {f"version of {name}": version(name) for name in ("simpo", "torch", "transformers")}
        facts["fingerprint of the data"] = self.data.fingerprint
        facts["batch plan"] = self.loader.fingerprint
        facts["optimizer steps done"] = self.progress.step
        self.mesh.check_agreement(facts)

    def _open_output_dir(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.recipe.save(self.output_dir / "recipe.yaml")
        record_launch(self.output_dir)
        self.data.ledger.save(self.output_dir / "audit.json")

    @contextlib.contextmanager
    def _metrics_log(self) -> Iterator[None]:
        """Opens the log on the first process; what a resumed run will do again is dropped from it first."""
        if not self.mesh.is_main:
            yield
            return
        done = self.progress.step or None
        forget_lines_after(self.generations_path, done)
        log = MetricsLog(self.output_dir / "metrics.jsonl", self.recipe, resume_step=done)
        with contextlib.closing(log) as self.log:
            yield

    def _fit_micro_batches(self) -> None:
        """Where the recipe leaves it open, let a micro-batch hold as many tokens as fit into the free memory."""
        recipe, store = self.recipe, self.loader.store
        if recipe.max_tokens_per_micro_batch is not None or not recipe.pack:
            return

        def forward(batch: PackedPairs) -> PairLogps:
            drop_gathered(self.model)  # so that each begins alike
            return self._logps(batch)

        self.budget = fit_micro_batches(
            self.model,
            forward,
            store.shapes,
            store.response_lengths.sum(axis=1),
            device=self.device,
            share_prompt=recipe.share_prompt,
            optim="offloaded" if recipe.optimizer_offload else recipe.optim,
            chunk_size=recipe.logits_chunk_size,
            offloaded=recipe.activation_offload,
            cp=self.mesh.sizes.cp,
            name_of=lambda index: store[index].row_id,
        )
        drop_gathered(self.model)
        if self.budget is not None:
            self.loader.limit_tokens(int(self.mesh.least(self.budget.tokens)))
            if self.budget.warning is not None:
                self.display.say(self.budget.warning)

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def _epoch(self) -> float:
        return self.progress.pairs_seen / len(self.loader.store)

    @property
    def _eval_every(self) -> int | None:
        every = self.recipe.eval_steps
        if every is None or every >= 1:
            return None if every is None else int(every)
        return max(1, math.ceil(every * self.total_steps))  # a share of the run, as in transformers

    def _is_due(self, strategy: str, every: int | None) -> bool:
        if strategy == "epoch":
            return self.progress.step % self.loader.steps_per_epoch == 0
        return strategy == "steps" and every is not None and self.progress.step % every == 0

    def _build_loader(self, dataset: Any, *, evaluation: bool = False) -> StepLoader:
        recipe, config = self.recipe, unwrap(self.model).config.get_text_config()
        store = PairStore(dataset, share_prompt=recipe.share_prompt)
        store.check_lengths(getattr(config, "max_position_embeddings", None))
        return StepLoader(
            store,
            pairs_per_step=(
                recipe.per_device_eval_batch_size if evaluation else recipe.pairs_per_step(self.mesh.sizes.data)
            ),
            num_micro_batches=1 if evaluation else recipe.gradient_accumulation_steps,
            max_tokens=None if evaluation else recipe.max_tokens_per_micro_batch,
            pack=recipe.pack,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            seed=recipe.seed,
            weights=cost_weights(config),
            rank=self.mesh.data_rank,
            num_ranks=self.mesh.sizes.data,
        )

    def _prepare_reference(self) -> dict[str, ReferenceLogps] | None:
        if not self.recipe.loss.needs_reference:
            return None  # a reference-free loss never loads a second model
        stores = {"train": self.loader.store}
        if self.eval_loader is not None:
            stores["eval"] = self.eval_loader.store
        with needs_memory("the reference's log-probs", advice="lower per_device_eval_batch_size"):
            return compute_reference_logps(self.recipe, stores, mesh=self.mesh, fingerprint=self.data.fingerprint)

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
            "memory_gib": self.mesh.largest(peak_memory_gib(self.device)),
        }
        self.window = Totals()
        progress.logged_step, progress.logged_time_s = progress.step, progress.train_time_s
        self._write(values)
        left_s = progress.train_time_s / progress.step * (self.total_steps - progress.step)
        self.display.log_step(progress.step, self.total_steps, values, left_s=left_s)

    def _write(self, values: Mapping[str, Any]) -> None:
        if self.log is not None:
            self.log.write(values, step=self.progress.step)

    def _not_finite(self, plan: StepPlan, what: str, rows: list[str]) -> NonFiniteError:
        """The error to raise, on every process: rows are this one's, which all call this together."""
        by_rank = {rank: theirs for rank, theirs in enumerate(self.mesh.gather(rows)) if theirs}
        if self.mesh.sizes.world > 1:
            rows = [f"rank {rank}: {row}" for rank, theirs in by_rank.items() for row in theirs]
        self._finish_saving(wait=True)
        saved = checkpoints.list_checkpoints(self.checkpoint_dir)
        last = f"The last good checkpoint is {saved[-1].folder}" if saved else "There is no checkpoint yet"
        more = f" and {len(rows) - 16} more" if len(rows) > 16 else ""
        return NonFiniteError(
            f"step {plan.step + 1}: {what}; nothing was updated. Rows: {', '.join(rows[:16])}{more}. {last}. "
            "Look at these rows with simpo audit, or lower learning_rate or beta"
        )

    def _summary(self) -> dict[str, Any]:
        recipe, trainable = self.recipe, sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        layout = "packed" if recipe.pack else "padded"
        return {
            "model": f"{recipe.model_name_or_path} ({trainable / 1e6:,.1f} M trainable parameters)",
            "device": f"{self.device}, {torch.get_num_threads()} threads, {'bf16' if recipe.bf16 else 'fp32'} compute",
            "mesh": str(self.mesh.sizes),
            "pairs": f"{len(self.data.train)} to train, {len(self.data.eval or ())} held out",
            "rows": f"{layout}, prompt {'shared' if recipe.share_prompt else 'repeated'}",
            "attention": describe_attention(self.model, half=bool(recipe.bf16)),
            "steps": f"{self.total_steps} of {self.loader.pairs_per_step} pairs",
            "micro-batches": self._describe_micro_batches(),
            "loss": recipe.describe_loss(),
        }

    def _describe_micro_batches(self) -> str:
        first = next(self.loader.plans(0, 1)).micro_batches
        text = f"{len(first)} in the first step"
        if self.loader.max_tokens is not None:
            text = f"up to {self.loader.max_tokens:,} tokens, {text}"
        return text if self.budget is None else f"{text}; {self.budget}"


class _DeviceDice:
    """The state of torch's random numbers, here and on a device, to be gone back to."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._host_state = device, torch.get_rng_state()
        self._state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._host_state)
        if self._state is not None:
            torch.cuda.set_rng_state(self._state, self._device)


def _rows_not_finite(losses: list[tuple[tuple[str, ...], Tensor]]) -> list[str]:
    """Names of the pairs whose loss is not finite."""
    finite = [(row_ids, torch.isfinite(values).tolist()) for row_ids, values in losses]
    return [row for row_ids, fine in finite for row, ok in zip(row_ids, fine, strict=True) if not ok]


def count_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the run: `max_steps`, or `num_train_epochs` passes over the data, rounded up."""
    return recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * steps_per_epoch)
