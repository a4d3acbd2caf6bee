"""SimPOTrainer: transformers' Trainer around this project's data, packed batches, log-prob head and losses.

The loop, the engines (DDP, FSDP2, DeepSpeed ZeRO), callbacks, trackers, checkpoints and the hub are transformers' and
accelerate's. What is trained is the native trainer's: the same plan of the same pairs, and the same loss.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from simpo.core.batch import PackedPairs
from simpo.core.losses import PairLogps
from simpo.data.cache import PreparedData
from simpo.data.files import follow_umask
from simpo.data.ledger import Ledger
from simpo.data.loader import MicroBatch, StepLoader, StepPlan
from simpo.data.prepare import dropped_by_source
from simpo.data.templates import install_chat_template
from simpo.display import Display
from simpo.evaluation.generate import save_samples
from simpo.hosts.hf.batches import TrainingOrder, build_dataloader, evaluation_order, is_tokenised, prepare_datasets
from simpo.hosts.hf.config import SimPOConfig, check_arguments
from simpo.hosts.hf.early_stop import EarlyStop
from simpo.hosts.hf.launch import check_launch, join_launched_world
from simpo.hosts.hf.masters import give_masters, take_masters, whole_state_dict, whole_weights
from simpo.hosts.hf.model import load_by_name, make_ready, tokenizer_of, weights_are_elsewhere, wrap_in_adapters
from simpo.hosts.hf.reference import References
from simpo.hosts.hf.resume import IDENTITY_FILE, check_checkpoint, find_best
from simpo.hosts.hf.window import Window
from simpo.model.attention import plain_attention
from simpo.model.head import compute_pair_logps
from simpo.model.load import weights_at
from simpo.model.settle import as_configured, as_it_trains, check_rows, notes_of
from simpo.parallel.agreement import check_agreement, recipe_facts
from simpo.parallel.sharding import drop_gathered
from simpo.recipe import KEYS, Recipe, load_recipe
from simpo.run.checkpoint import prune_checkpoints
from simpo.run.eval_pairs import EvalPairs
from simpo.run.export import record_dtype
from simpo.run.guard import RunGuard
from simpo.run.lock import OutputLock
from simpo.run.metrics import StepTotals
from simpo.run.objective import micro_batch_losses
from simpo.run.plain import only_data
from simpo.run.resume import run_identity, supersede_checkpoints
from simpo.run.saved import TRAINERS, check_sealed, list_checkpoints, read_sealed, seal
from simpo.run.session import build_loader
from simpo.run.shared import check_shared
from simpo.run.stopping import StepLosses, name_step, needs_memory, not_finite
from simpo.run.tracking import GENERATIONS_FILE, forget_lines_after, sync_logs
from simpo.streams import lasting_streams


class SimPOTrainer(Trainer):
    """transformers' Trainer for preference pairs.

    Args:
        model: a name or folder, or a loaded causal language model, with adapters or without. A name is loaded with
            fp32 weights; those of a loaded model that are trained are widened to fp32 (see `SimPOConfig.master_dtype`).
        args: what to train and how.
        train_dataset, eval_dataset: rows with prompt, chosen and rejected in any shape the data layer reads, as a
            `datasets.Dataset` or a list, or tokenised pairs; train_dataset may be `PreparedData`, which has both.
            eval_dataset may be a mapping of name to dataset.
        processing_class: the tokenizer; None = the model's own. `tokenizer` is its older name.
        peft_config: adapters to train instead of all weights.
        model_init, callbacks, optimizers: as in transformers.
    Attributes:
        recipe: the settings as a recipe: what data, loss and log-probs are computed by.
        ledger: every row kept, cut or dropped, and why; empty for datasets that came tokenised.
    Raises:
        ValueError: settings, data or model do not fit together, or the processes are not what the launcher said.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole step

    def __init__(
        self,
        model: str | nn.Module | None = None,
        args: SimPOConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        peft_config: Any = None,
        tokenizer: Any = None,
        **others: Any,
    ) -> None:
        args = SimPOConfig(output_dir="simpo_trainer") if args is None else args
        check_arguments(args, {"data_collator": data_collator, **others})
        self._given_name = model if isinstance(model, str) else None
        self.recipe: Recipe = args.to_recipe(self._given_name)
        self._read = self.recipe  # what `args` said when they were last looked at
        self.mesh = join_launched_world(args)
        check_agreement(recipe_facts(self.recipe))
        self.references = References(self.recipe)
        self.display = Display(quiet=not self.mesh.is_main)
        for notice in self.recipe.notices:
            self.display.say(notice)
        if isinstance(model, str):
            name, model = model, load_by_name(model, self.recipe, args.loading_options())
            check_agreement({f"weights of {name}": weights_at(name, model.config)})
        elif args.model_init_kwargs:
            raise ValueError(
                "model_init_kwargs: the model is loaded already; give its name, or give them to from_pretrained"
            )
        is_apart = isinstance(eval_dataset, Mapping) and not isinstance(train_dataset, PreparedData)
        if is_apart and self.recipe.clean.leaks != "keep":
            raise ValueError(
                "clean.leaks: the sets of a mapping are not compared with train_dataset; give one eval_dataset, or "
                "leave clean.leaks out"
            )
        tokenizer = processing_class or tokenizer or tokenizer_of(model, self.recipe)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        install_chat_template(tokenizer, self.recipe.chat_template)
        self._peft_config, self._tokenizer, self._text_as_is = peft_config, tokenizer, args.text_as_is
        self._is_checked = False  # the model's forward pass, where it trains
        self.loader: StepLoader | None = None  # of the training pairs; made when training begins
        model = None if model is None else self._ready(model)
        if isinstance(train_dataset, PreparedData):
            self.data, eval_dataset = train_dataset, eval_dataset or train_dataset.eval
        else:
            self.data = self._prepare(train_dataset, None if isinstance(eval_dataset, Mapping) else eval_dataset)
        self.ledger: Ledger = self.data.ledger
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._tokenised(rows) for name, rows in eval_dataset.items()}
        elif not isinstance(train_dataset, PreparedData):
            eval_dataset = self.data.eval
        given = {"train_dataset": self.data.train, "eval_dataset": eval_dataset, "processing_class": tokenizer}
        super().__init__(model=model, args=args, **given, **others)
        check_launch(self.accelerator, self.recipe)
        if self.is_fsdp_enabled and getattr(self.model, "is_quantized", False):
            raise ValueError(
                "load_in_4bit: accelerate's FSDP cannot load what it saves of 4-bit weights; use multi_gpu.yaml or "
                "deepspeed_zero2.yaml"
            )
        if args.save_on_each_node and self.is_fsdp_enabled:
            raise ValueError(
                "save_on_each_node: with FSDP the first process alone gets the whole weights; write to a folder that "
                "all nodes see"
            )
        if self.model is not None:
            self._check_if_here(self.model)
        self._total_steps = 0
        self._window: Window | None = None  # of the training that is under way
        self._guard: RunGuard | None = None
        self._best_saved: int | None = None  # the last step that was saved for its evaluation
        self._answers: list[dict[str, Any]] = []  # of the evaluation that is to be logged next
        self._eval_totals: StepTotals | None = None
        self.eval_pairs: EvalPairs | None = None  # of a run directory
        self._step_losses: StepLosses = []
        self.is_stopped = False  # before its end, by whoever listens to signals

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, **options: Any) -> Any:
        """As in transformers. No other process may train into `output_dir` meanwhile, and no checkpoint in it is lost.

        Raises:
            ValueError: another process does, or the checkpoint is another run's.
        """
        with lasting_streams(), OutputLock(Path(self.args.output_dir)) as lock:
            no_lock = self.mesh.on_main(lock.acquire)
            if no_lock is not None:
                self.display.say(no_lock)
            if not self.args.save_on_each_node:
                check_shared(lock.folder, self.mesh)
            if isinstance(resume_from_checkpoint, os.PathLike):
                resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            if resume_from_checkpoint is True:
                found = self.mesh.on_main(lambda: list_checkpoints(Path(self.args.output_dir), TRAINERS))
                resume_from_checkpoint = str(found[-1].folder) if found else True
            if isinstance(resume_from_checkpoint, str):
                self._check_sealed(Path(resume_from_checkpoint), read_sealed)
            result = super().train(resume_from_checkpoint, **options)
            if self.guard.verdict is not None and self.guard.back_to is None:
                raise self.guard.stopped(self.state.max_steps, self._checkpoint_of(self.state.global_step))
            return result

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This process's share of the mean loss over all pairs of the step, times the processes that are averaged."""
        (part,) = inputs["parts"]
        plan: StepPlan = inputs["plan"]
        losses, sums = self._pair_losses(model, part, plan, name=inputs["name"])
        loss = losses.sum() / plan.num_pairs
        if model.training:
            self._window.sums.add(sums, losses, num_tokens=part.num_tokens)
            self._step_losses.append((part.pairs.row_ids, losses.detach()))
            if self.accelerator.sync_gradients:
                self._stop_unless_finite()
            loss = loss * self.mesh.sizes.world
        elif self._eval_totals is not None:
            self._eval_totals.add(sums, losses, num_tokens=part.num_tokens)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _pair_losses(
        self, model: nn.Module, part: MicroBatch, plan: StepPlan, *, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [P] and the sums of their metrics; `name` is the pairs' in `references`."""
        batch = part.pairs.to(self.args.device)
        wanted = {"chunk_size": self.recipe.logits_chunk_size, "extras": self.recipe.extras}
        logps = compute_pair_logps(model, batch, **wanted)
        if self.recipe.loss.needs_reference and part.indices:
            is_trained = self.is_in_train or self.state.global_step > 0
            logps = self.references.put_into(logps, part.indices, name, is_trained=is_trained)
        pairs = None if model.training else self.eval_pairs
        return micro_batch_losses(logps, part, plan, self.recipe, pairs=pairs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch, or of the several that max_tokens_per_micro_batch makes of it."""
        parts, is_last = inputs["parts"], self.accelerator.sync_gradients
        assert self.guard.verdict is None  # it begins here, at the latest
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts, start=1):
            syncs = is_last and number == len(parts)
            self.accelerator.gradient_state._set_sync_gradients(syncs)
            waits = number < len(parts) and not self.is_deepspeed_enabled
            with self._needs_memory(), self.accelerator.no_sync(model) if waits else contextlib.nullcontext():
                total += super().training_step(model, {**inputs, "parts": [part]}, num_items_in_batch)
        return total

    def _needs_memory(self) -> contextlib.AbstractContextManager[None]:
        """Around a micro-batch: want of memory becomes one line."""
        limit = self.recipe.max_tokens_per_micro_batch
        advice = f"{'a smaller' if limit else 'set'} max_tokens_per_micro_batch{f' than {limit}' if limit else ''}"
        return needs_memory(
            name_step(self.mesh, self.state.global_step),
            advice=f"{advice}, or activation_checkpointing, needs less; then resume from the last checkpoint",
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> int | None:
        """Pairs of the whole step over all processes: the plan knows them, so no process has to be asked."""
        return batch_samples[0]["plan"].num_pairs if batch_samples else None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm before clipping; one that is not finite stops every process, since all of them have the same one."""
        norm, losses = super()._get_grad_norm(model, grad_norm=grad_norm), self._step_losses
        self._step_losses = []
        if norm is not None and not math.isfinite(float(norm)):
            raise not_finite(self.state.global_step, losses, self.mesh, grad_norm=float(norm))
        return norm

    def _stop_unless_finite(self) -> None:
        """Before the step's last backward pass, which is where DeepSpeed updates the weights."""
        bad = torch.stack([(~torch.isfinite(losses)).sum() for _, losses in self._step_losses]).sum().double()
        if self.mesh.sum_over_all(bad).item():
            raise not_finite(self.state.global_step, self._step_losses, self.mesh, grad_norm=None)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay spares vectors, as in the native trainer: norms and biases, and DoRA's magnitudes."""
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}  # ZeRO-3's are flat
        return [name for name, shape in shapes.items() if len(shape) >= 2]

    def get_train_dataloader(self) -> DataLoader:
        """The plan of this process; see `hosts.hf.batches`."""
        self._follow_arguments()
        self.loader = self.build_loader(self.train_dataset)
        self._window = Window(self.loader, self.mesh)
        order = TrainingOrder(self.loader, lambda: self.state.global_step)
        return build_dataloader(self.loader, order, self.args, name="train")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This process's share of the held-out pairs; no pair is computed twice."""
        if not self.is_in_train:
            self._follow_arguments()
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        elif eval_dataset is None:
            eval_dataset = self.eval_dataset
        if eval_dataset is None:
            raise ValueError("eval_dataset: there is none to evaluate on; give one to the trainer or to evaluate()")
        pairs = self._tokenised(eval_dataset)
        loader = self.build_loader(pairs, evaluation=True)
        return build_dataloader(loader, evaluation_order(loader), self.args, name=self.references.name_of(pairs))

    get_test_dataloader = get_eval_dataloader

    def build_loader(self, dataset: Any, *, evaluation: bool = False) -> StepLoader:
        """The native trainer's batch plan of tokenised pairs, for this process."""
        if dataset is None:
            raise ValueError("train_dataset: there is none to train on")
        return build_loader(dataset, self.recipe, self.model, self._tokenizer, self.mesh, evaluation=evaluation)

    def _prepare(self, train: Any, evaluation: Any, *, recipe: Recipe | None = None) -> PreparedData:
        if train is None:
            return PreparedData(None, None if evaluation is None else self._tokenised(evaluation), Ledger())
        options = {"text_as_is": self._text_as_is, "progress": self.mesh.is_main}
        return self.mesh.main_first(
            lambda: prepare_datasets(train, evaluation, recipe or self.recipe, self._tokenizer, **options)
        )

    def _tokenised(self, dataset: Any) -> Any:
        """Held-out rows of one dataset as tokenised pairs."""
        if is_tokenised(dataset):
            return dataset
        limit = load_recipe(self.recipe, {"max_train_samples": self.recipe.max_eval_samples})
        return self._prepare(dataset, None, recipe=limit).train

    def _ready(self, model: nn.Module) -> nn.Module:
        if self._peft_config is not None:
            model = wrap_in_adapters(model, self._peft_config, seed=self.recipe.seed)
        for line in make_ready(model, self.recipe, device=self.mesh.device):
            self.display.say(line)
        self._settle(model)
        self._check_if_here(model)
        return model

    def _check_if_here(self, model: nn.Module) -> None:
        """Check the forward pass, once, of a model that is whole on the device that trains."""
        is_here = next(model.parameters()).device.type == self.mesh.device.type and not weights_are_elsewhere(model)
        if is_here and not self._is_checked:
            self._check_forward(model, bf16=bool(self.recipe.bf16))

    def _check_forward(self, model: nn.Module, *, bf16: bool) -> None:
        check_rows(model, self.recipe, bf16=bf16, mesh=self.mesh)
        if as_it_trains(self.recipe, model) != self.recipe and self.loader is not None:
            raise ValueError(f"{notes_of(model)[-1]}; batches are planned already: set pack and share_prompt to false")
        self._settle(model)
        self._is_checked = True

    def _settle(self, model: nn.Module) -> None:
        """Show what was settled otherwise than asked for, and go on with the rows that the model takes."""
        notes = notes_of(model)
        while notes:
            self.display.say(notes.pop(0))
        self.recipe = as_it_trains(self.recipe, model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """The model of `model_init`, made ready."""
        self._follow_arguments(model_is_ready=False)
        self._is_checked = False
        return self._ready(super().call_model_init(trial))

    def _follow_arguments(self, *, model_is_ready: bool = True) -> None:
        """Take up what was changed in `args`, as trials of `hyperparameter_search` do.

        Raises:
            ValueError: pairs or model depend on it, and they are there already.
        """
        now = self.args.to_recipe(self._given_name)
        changed = {name: getattr(now, name) for name in KEYS if getattr(now, name) != getattr(self._read, name)}
        made = {name for name, key in KEYS.items() if key.section in ("model", "data") and not key.may_change}
        if model_is_ready:
            made |= {"disable_dropout", "router_aux_loss_coef", "attention_kernel", "pack", "share_prompt"}
        late = [name for name in changed if name in made]
        if late:
            raise ValueError(
                f"{', '.join(late)}: changed after pairs and model had been made ready; make another trainer"
            )
        self._read, self.recipe = now, self.recipe.model_copy(update=changed)
        if "loss_type" in changed:
            self.references = References(self.recipe)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Hand everything to the engine, then check what only the engine's model can show."""
        masters = take_masters(self.model) if self.is_deepspeed_enabled else {}
        with only_data(resume_from_checkpoint):
            model, dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is None:
            give_masters(masters)
        del masters
        if not self._is_checked or self.is_deepspeed_enabled or self.is_fsdp_enabled:  # these have weights of their own
            with self.compute_loss_context_manager():
                self._check_forward(model, bf16=False)
        # FSDP2 keeps the head whole until a backward pass; samples of the weights are of shards.
        drop_gathered(model)
        facts = {"fingerprint of the data": self.data.fingerprint, "batch plan": self.loader.fingerprint}
        facts["optimizer steps done"] = self.state.global_step
        check_agreement(recipe_facts(self.recipe) | facts)
        if self.recipe.loss.needs_reference:
            self._prepare_references(model, resume_from_checkpoint)
        self._window.begin(self.state.global_step)
        folder, step = Path(self.args.output_dir), self.state.global_step
        aside = self.mesh.on_main(lambda: supersede_checkpoints(folder, step, TRAINERS))
        if aside is not None:
            self.display.say(f"later checkpoints of {folder} are kept in {aside}")
        self._guard, self._step_losses, self._best_saved = None, [], None
        self.mesh.on_main(lambda: forget_lines_after(Path(self.recipe.output_dir, GENERATIONS_FILE), step or -1))
        return model, dataloader

    def _prepare_references(self, model: nn.Module, resume_from_checkpoint: Any) -> None:
        """Before the first update the model is the reference; a resumed run has its log-probs from the checkpoint."""
        stores = {"train": self.loader.store}
        every = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset]
        known = [dataset for dataset in every if dataset is not None]
        stores |= {self.references.name_of(each): self.build_loader(each, evaluation=True).store for each in known}
        if resume_from_checkpoint is not None:
            self.references.load(Path(resume_from_checkpoint), stores, self.mesh)
            return
        self.display.say("computing the reference's log-probs: the model's own before its first update")

        def forward(batch: PackedPairs) -> PairLogps:
            with self.compute_loss_context_manager():
                return compute_pair_logps(model, batch, chunk_size=self.recipe.logits_chunk_size)

        model.eval()
        self.references.compute(forward, stores, self.recipe, self.mesh)
        drop_gathered(model)
        model.train()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers; a training line has the means over all pairs since the last one, of all processes."""
        if not self.is_in_train:
            return super().log(logs, start_time)
        guard, step = self.guard, self.state.global_step  # which has read the lines before this one
        if "loss" in logs and step > self._window.step:
            logs |= self._window.close(step, self.state.log_history, self.args.device)
        super().log(logs, start_time)
        guard.heed(step, logs, self._answers)
        self._answers = []
        if guard.verdict is not None and not guard.has_chosen:
            self._end_by_guard()

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """As in transformers; where training ends here, the steps since the last line are logged before the save."""
        # What comes here may be saved at once, where it is the best.
        self.control.should_log |= self.control.should_evaluate and self.args.save_strategy == "best"
        saves, self.control.should_save = self.control.should_save, False
        super()._maybe_log_save_evaluate(*args, **options)
        # Each that is the best so far is saved, once: a step may come here twice.
        step = self.state.global_step
        is_best = self.args.load_best_model_at_end and self.state.best_global_step == step != self._best_saved
        self._best_saved = step if is_best else self._best_saved
        self.control.should_save |= saves or is_best
        # A checkpoint's history is complete, or a resumed run would miss the pairs since its last line.
        self.control.should_log |= self.control.should_training_stop or self.control.should_save
        super()._maybe_log_save_evaluate(*args, **options)

    @property
    def guard(self) -> RunGuard:
        """Of the training that is under way, or was the last one."""
        if self._guard is None:  # not before the run directory is open
            done, history, folder = self.state.global_step, self.state.log_history, Path(self.recipe.output_dir)
            self._guard = RunGuard(self.recipe, folder, self.mesh, self.display, done=done, history=history)
            self._guard.begin(dropped_by_source(self.ledger))
        return self._guard

    def _end_by_guard(self) -> None:
        """Stop after this step: with a checkpoint of it, or with the weights of an earlier one."""
        self.guard.choose(self._saved_steps())
        self.control.should_training_stop = True
        self.control.should_save |= self.guard.back_to is None
        if self.guard.back_to is not None:
            self.args.load_best_model_at_end = True
            self.recipe = self.recipe.model_copy(update={"load_best_model_at_end": True})
            self.state.best_model_checkpoint = str(self._checkpoint_of(self.guard.back_to))

    def _saved_steps(self) -> list[int]:
        return [saved.step for saved in list_checkpoints(Path(self.args.output_dir), TRAINERS)]

    def _to_keep(self) -> set[int | None]:
        """The best step, and those that the guard might go back to."""
        back = self._guard.may_go_back_to(self._saved_steps()) if self._guard is not None else ()
        best = self.state.best_model_checkpoint
        return {self.state.best_global_step, *back, *([] if best is None else [_step_of(best)])}

    def _checkpoint_of(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *others: Any, **options: Any) -> Any:
        """The loss of one evaluation batch; there are no logits to hand on."""
        with needs_memory("evaluation", advice="lower per_device_eval_batch_size"), torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *others: Any, metric_key_prefix: str = "eval", **options: Any
    ) -> EvalLoopOutput:
        """Means over all pairs of all processes, each pair once."""
        started, self._eval_totals = time.perf_counter(), StepTotals(dataloader.dataset.loader.store.sources.names)
        if self.eval_pairs is not None:
            self.eval_pairs.clear()
        output = super().evaluation_loop(
            dataloader, description, *others, metric_key_prefix=metric_key_prefix, **options
        )
        total, self._eval_totals = self._eval_totals.over(self.mesh, output.num_samples), None
        values = total.means() | total.counts() | {"time_s": time.perf_counter() - started}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        if self.eval_pairs is not None and metric_key_prefix == "eval":
            self.eval_pairs.save(self.state.global_step, self.mesh, keep=self._to_keep())
        first = [f"eval_{name}" for name in self.eval_dataset][:1] if isinstance(self.eval_dataset, Mapping) else []
        if self.is_in_train and metric_key_prefix in ("eval", *first):
            folder, place = self.recipe.output_dir, {"step": self.state.global_step, "mesh": self.mesh}
            store = dataloader.dataset.loader.store
            with self.compute_loss_context_manager():
                self._answers = save_samples(folder, self.model, self._tokenizer, store, self.recipe, **place)
        if self._window is not None:
            self._window.leave_out(time.perf_counter() - started)
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, with the weights that the optimizer updates, wherever the engine has them.

        They are written in `save_dtype`; in the dtype they are trained in where that is not set, and in checkpoints.
        """
        asked = None if _internal_call or self.recipe.save_dtype == "auto" else getattr(torch, self.recipe.save_dtype)
        with plain_attention(self.model), as_configured(self.model):
            if asked is None and not isinstance(self.deepspeed, nn.Module):
                super().save_model(output_dir, _internal_call=_internal_call)
                return
            state = whole_state_dict(self.whole_weights(), self.model, asked, keep=self.args.should_save)
            folder = self.args.output_dir if output_dir is None else output_dir
            self._save(folder, state_dict=state)
        if self.args.should_save:
            record_dtype(Path(folder), next(iter(state.values())).dtype)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *positional: Any, dataset_name: str | None = None, **options: Any) -> None:
        """As in transformers; `dataset_name` is what TRL's scripts call `dataset`, in push_to_hub too."""
        super().create_model_card(*positional, **({"dataset": dataset_name} | options))

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, whole tensor) of all that a saved model holds, as it is trained, where it is saved; None elsewhere.

        Every process must run through all of it.
        """
        if isinstance(self.deepspeed, nn.Module):
            yield from whole_weights(self.deepspeed, keep=self.args.should_save)
        elif self.is_fsdp_enabled:
            yield from (self.accelerator.get_state_dict(self.model_wrapped) or {}).items()
        else:
            yield from self.model.state_dict().items()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # torch's writer of files, which does not say why it cannot
                raise
            raise OSError(f"{folder} could not be written; the disk may be full") from error
        finally:
            self.args.save_total_limit = limit
        self.mesh.barrier()  # the others' files are there
        if self.args.should_save:
            self.references.save(folder)
            follow_umask(folder)
            sync_logs(Path(self.recipe.output_dir or "."))
        if not self.args.save_on_each_node:
            seal(folder, self._identity(), self.mesh)
        elif self.args.should_save:
            seal(folder, self._identity())
        # Only now may an earlier one go, which the Trainer deletes before this one is whole.
        if self.args.should_save and limit is not None and limit > 0:
            prune_checkpoints(folder.parent, keep=limit, protect=self._to_keep(), kind=TRAINERS)

    def _init_training_state(self, max_steps: int, *others: Any) -> Any:
        """Where the run stands; refuses a checkpoint of another run, whose pairs are not those still to come."""
        self._total_steps = max_steps
        _, num_epochs, resume_from_checkpoint, _ = others
        if resume_from_checkpoint is not None:
            for line in check_checkpoint(Path(resume_from_checkpoint), self._identity(), self.loader, self.recipe):
                self.display.say(line)
        place = super()._init_training_state(max_steps, *others)
        if resume_from_checkpoint is not None and self.args.load_best_model_at_end:
            self.state.best_model_checkpoint = find_best(Path(resume_from_checkpoint))
        stops = [each for each in self.callback_handler.callbacks if isinstance(each, EarlyStop)]
        # The Trainer would do a step beyond the last one before it looks.
        has_ended = (
            any([stop.count_again(self.args, self.state) for stop in stops]) or self.state.global_step >= max_steps
        )
        return (num_epochs, 0) if has_ended else place

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with only_data(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        if self.is_stopped:  # and goes on from the weights of its last step
            return
        if self.guard.back_to is not None:  # what was saved since may have been better by its metric
            self.state.best_global_step = self.guard.back_to
            self.state.best_model_checkpoint = str(self._checkpoint_of(self.guard.back_to))
        best = Path(self.state.best_model_checkpoint)
        self.state.best_global_step = _step_of(best)  # an earlier version may have evaluated more often than it saved
        self._check_sealed(best, check_sealed)
        with only_data(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _check_sealed(self, folder: Path, check: Callable[..., Any]) -> None:
        """Check a checkpoint, if there is one: each process its share of a folder that all of them see, or one process
        of each node all of its own."""
        is_sealed = (folder / IDENTITY_FILE).is_file
        if self.args.save_on_each_node:
            self.mesh.on_each_node(lambda: check(folder) if is_sealed() else None)
        elif self.mesh.on_main(is_sealed):
            check(folder, self.mesh)

    def _identity(self) -> dict[str, Any]:
        """With what a recipe of `SimPOConfig.to_recipe` does not hold: schedule, optimizer and adapters."""
        named = {name: str(getattr(self.args, name)) for name in _ARGUMENTS}
        for config in list(getattr(self.model, "peft_config", {}).values())[:1]:
            named |= {f"peft_config.{name}": str(getattr(config, name, None)) for name in _OF_ADAPTERS}
        return run_identity(self.recipe, self.data, self.loader, total_steps=self._total_steps) | {"arguments": named}


_ARGUMENTS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args")
_ARGUMENTS += ("adam_beta1", "adam_beta2", "adam_epsilon")
_OF_ADAPTERS = ("r", "lora_alpha", "use_rslora", "lora_dropout")


def _step_of(checkpoint: str | Path) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])
