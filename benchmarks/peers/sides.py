"""The sides of a comparison: each trains the same pairs in the same order and says how long every step took.

`simpo` is this package's own Trainer; `padded` a plain loop over padded batches with the head on every position;
`liger` the same loop with Liger's chunked SimPO loss; `trl` TRL's CPOTrainer. Every side runs in a process of its own:
AdamW on fp32 master weights at a constant rate, gradients clipped, nothing truncated, no dropout, no checkpointing.
What only one side needs is imported there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.flops import matmul_counter
from peers.machine import resident_gib
from simpo.core.packing import PAIR_FIELDS, TokenPair

BETA, GAMMA_BETA_RATIO = 2.0, 0.5
MAX_GRAD_NORM = 1.0
IGNORED = -100
NEEDS = {"liger": ("liger_kernel", "pip install --no-deps liger-kernel"), "trl": ("trl", "pip install 'simpo[trl]'")}
"""The package that a side needs beyond this project's own, and how to get it."""


@dataclass(frozen=True)
class SideSpec:
    """What a side is to run.

    Attributes:
        side: "simpo", "padded", "liger" or "trl".
        model: folder of the model.
        pairs_per_micro_batch, accumulation: an optimizer step trains their product in pairs.
        steps: timed steps.
        warm_up_steps: steps before them, at least 1: the first ones pay for memory that grows.
        scratch: folder for what a trainer insists on writing.
    """

    side: str
    model: str
    pairs_per_micro_batch: int
    accumulation: int
    steps: int
    device: str
    bf16: bool
    threads: int
    scratch: str
    warm_up_steps: int = 1
    learning_rate: float = 1e-6

    @property
    def all_steps(self) -> int:
        return self.warm_up_steps + self.steps

    @property
    def pairs_per_step(self) -> int:
        return self.pairs_per_micro_batch * self.accumulation


@dataclass
class Record:
    """What a run leaves; lists begin with the warm-up steps.

    Attributes:
        step_times_s: from the first forward to the end of the optimizer's step.
        losses: mean loss of each step's pairs before its update.
        loaded_gib: memory in use when the first step begins: what is model and libraries.
        peak_gib: highest of the whole process (of the GPU's allocations on CUDA).
        warm_up_matmul_flops: counted in the last warm-up step, which counting slows down; None where the side compiles
            code.
    """

    step_times_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loaded_gib: float = 0.0
    peak_gib: float = 0.0
    warm_up_matmul_flops: int | None = None


class StepClock:
    """Times steps, and counts the operations of the step with the index `counted_step`; None = of none."""

    def __init__(self, device: torch.device, record: Record, *, counted_step: int | None) -> None:
        self.device, self.record, self.counted_step = device, record, counted_step
        self._counting = contextlib.ExitStack()
        self._counted: Callable[[], int] | None = None
        self._began = 0.0

    def begin(self) -> None:
        """The step starts now."""
        step = len(self.record.step_times_s)
        if step == 0:
            self._wait()
            cuda = self.device.type == "cuda"
            self.record.loaded_gib = torch.cuda.memory_allocated(self.device) / 2**30 if cuda else resident_gib("VmRSS")
        if step == self.counted_step:
            self._counted = self._counting.enter_context(matmul_counter())
        self._wait()
        self._began = time.perf_counter()

    def end(self) -> None:
        """The step is done."""
        self._wait()
        self.record.step_times_s.append(time.perf_counter() - self._began)
        if self._counted is not None:
            self.record.warm_up_matmul_flops = self._counted()
            self._counting.close()
            self._counted = None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run_side(spec: SideSpec, pairs: Sequence[TokenPair]) -> Record:
    """Train `spec.warm_up_steps` and then `spec.steps` timed steps, over consecutive pairs.

    Raises:
        ValueError: too few pairs, or the side is not installed.
    """
    missing = missing_package(spec.side)
    if missing is not None:
        raise ValueError(missing)
    needed = spec.pairs_per_step * spec.all_steps
    if len(pairs) < needed:
        raise ValueError(f"{needed} pairs are needed, and there are {len(pairs)}")
    torch.set_num_threads(spec.threads)
    device = torch.device(spec.device)
    record = Record()
    # Code that is compiled runs outside the counter's sight.
    clock = StepClock(device, record, counted_step=None if spec.side == "liger" else spec.warm_up_steps - 1)
    _SIDES[spec.side](spec, list(pairs[:needed]), clock, record)
    cuda = device.type == "cuda"
    record.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else resident_gib("VmHWM")
    return record


def missing_package(side: str) -> str | None:
    """Why a side cannot run here, or None."""
    package, remedy = NEEDS.get(side, (None, None))
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed: {remedy}"


def _micro_batches(spec: SideSpec, pairs: Sequence[Any], step: int) -> list[list[Any]]:
    size, first = spec.pairs_per_micro_batch, step * spec.pairs_per_step
    return [list(pairs[first + k * size : first + (k + 1) * size]) for k in range(spec.accumulation)]


# --- simpo -----------------------------------------------------------------------------------------------------------


def build_recipe(spec: SideSpec) -> Any:
    """The settings of a run, as this package's recipe; the other sides take theirs from it too."""
    from simpo.recipe import load_recipe

    return load_recipe(
        {
            "model_name_or_path": spec.model,
            "output_dir": str(Path(spec.scratch) / spec.side),
            "loss_type": "sigmoid",
            "beta": BETA,
            "gamma_beta_ratio": GAMMA_BETA_RATIO,
            "sft_weight": 0.0,
            "learning_rate": spec.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
            "max_grad_norm": MAX_GRAD_NORM,
            "per_device_train_batch_size": spec.pairs_per_micro_batch,
            "gradient_accumulation_steps": spec.accumulation,
            "max_steps": spec.all_steps,
            "bf16": spec.bf16,
            "device": spec.device,
            "num_threads": spec.threads,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "eval_strategy": "no",
        }
    )


def _run_simpo(spec: SideSpec, pairs: list[TokenPair], clock: StepClock, record: Record) -> None:
    from simpo.data.cache import PreparedData
    from simpo.data.ledger import Ledger, SplitLedger
    from simpo.data.loader import StepPlan
    from simpo.display import Display
    from simpo.trainer import Trainer

    ledger = Ledger(splits={"train": SplitLedger(input=len(pairs), kept=len(pairs))})
    data = PreparedData(pairs_as_dataset(pairs), None, ledger)
    trainer = Trainer(build_recipe(spec), display=Display(quiet=True), data=data)
    for step in range(spec.all_steps):
        micro_batches = _micro_batches(spec, range(len(pairs)), step)
        indices = [index for items in micro_batches for index in items]
        plan = StepPlan(
            step=step,
            epoch=0,
            num_pairs=len(indices),
            num_chosen_tokens=sum(len(pairs[i].chosen_ids) - pairs[i].chosen_start for i in indices),
            micro_batches=tuple(tuple(items) for items in micro_batches),
        )
        clock.begin()
        values = trainer.train_step(plan)
        clock.end()
        record.losses.append(values["loss"])


def pairs_as_dataset(pairs: Sequence[TokenPair]) -> Any:
    """The pairs as the loader reads them: a `datasets.Dataset`, or a table alike where that package is missing."""
    columns = {name: [getattr(pair, name) for pair in pairs] for name in PAIR_FIELDS}
    if importlib.util.find_spec("datasets") is not None:
        import datasets

        return datasets.Dataset.from_dict(columns)
    return ColumnTable(columns)


class ColumnTable:
    """The part of `datasets.Dataset` that `PairStore` uses, over columns in memory."""

    def __init__(self, columns: dict[str, list[Any]], kind: str | None = None) -> None:
        self._columns, self._kind = columns, kind

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def __len__(self) -> int:
        return len(self._columns["row_id"])

    def with_format(self, kind: str) -> ColumnTable:
        """The same columns, read as "numpy" or "arrow"."""
        return ColumnTable(self._columns, kind)

    def __iter__(self) -> Any:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            return {name: values[key] for name, values in self._columns.items()}
        if self._kind == "numpy":
            import numpy as np

            return np.asarray(self._columns[key])
        import pyarrow as pa

        return pa.table(self._columns)


# --- padded, liger ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaddedBatch:
    """Chosen rows first, then rejected ones, [2P, L]: ids, mask (1 on real tokens), labels (IGNORED on the rest)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> PaddedBatch:
        """The same batch on another device."""
        return PaddedBatch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def pad_pairs(pairs: Sequence[TokenPair], *, pad_token_id: int) -> PaddedBatch:
    """The ordinary layout: one row a response, the prompt in both, padded on the right to the longest."""
    rows = [(pair.chosen_ids, pair.chosen_start) for pair in pairs]
    rows += [(pair.rejected_ids, pair.rejected_start) for pair in pairs]
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for index, (ids, start) in enumerate(rows):
        input_ids[index, : len(ids)] = torch.tensor(ids)
        mask[index, : len(ids)] = 1
        labels[index, start : len(ids)] = torch.tensor(ids[start:])
    return PaddedBatch(input_ids, mask, labels)


def padded_pair_losses(model: nn.Module, batch: PaddedBatch) -> Tensor:
    """SimPO's loss of each pair [P], with logits of every position."""
    mask = None if batch.input_ids.is_meta else batch.attention_mask  # meta tensors hold no mask to look at
    logits = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    labels = batch.labels[:, 1:]
    trained = labels != IGNORED
    picked = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logps = (picked - logits.logsumexp(-1)) * trained
    chosen, rejected = (logps.sum(-1) / trained.sum(-1)).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected - GAMMA_BETA_RATIO))


def liger_mean_loss(model: nn.Module, batch: PaddedBatch, *, compiled: bool) -> tuple[Tensor, Tensor]:
    """Liger's chunked SimPO loss, the mean over pairs, and the hidden states it was given.

    Its `gamma` is the paper's, beta * gamma_beta_ratio; without `compute_nll_loss` it has no SFT term.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    loss = LigerFusedLinearSimPOLoss(
        ignore_index=IGNORED,
        beta=BETA,
        gamma=BETA * GAMMA_BETA_RATIO,
        alpha=0.0,
        compute_nll_loss=False,
        compiled=compiled,
    )
    mask = None if batch.input_ids.is_meta else batch.attention_mask
    hidden = model.get_decoder()(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    states = hidden[:, :-1]
    return loss(model.get_output_embeddings().weight, states, batch.labels[:, 1:].contiguous())[0], states


def _run_padded(spec: SideSpec, pairs: list[TokenPair], clock: StepClock, record: Record) -> None:
    _run_plain_loop(spec, pairs, clock, record, lambda model, batch: padded_pair_losses(model, batch).mean())


def _run_liger(spec: SideSpec, pairs: list[TokenPair], clock: StepClock, record: Record) -> None:
    def mean_loss(model: nn.Module, batch: PaddedBatch) -> Tensor:
        return liger_mean_loss(model, batch, compiled=True)[0]

    _run_plain_loop(spec, pairs, clock, record, mean_loss)


def _run_plain_loop(
    spec: SideSpec,
    pairs: list[TokenPair],
    clock: StepClock,
    record: Record,
    mean_loss: Callable[[nn.Module, PaddedBatch], Tensor],
) -> None:
    """Forward, backward, clip, AdamW: nothing else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from simpo.model.load import disable_dropout

    device = torch.device(spec.device)
    pad_token_id = AutoTokenizer.from_pretrained(spec.model).pad_token_id or 0
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32).to(device)
    disable_dropout(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=0.0, fused=True)
    for step in range(spec.all_steps):
        clock.begin()
        losses = []
        for items in _micro_batches(spec, pairs, step):
            batch = pad_pairs(items, pad_token_id=pad_token_id).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=spec.bf16):
                loss = mean_loss(model, batch)
            (loss / spec.accumulation).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.end()
        record.losses.append(float(torch.stack(losses).double().mean()))


def forward_backward(side: str, model: nn.Module, pairs: Sequence[TokenPair]) -> None:
    """One micro-batch's forward and backward in the layout and with the head of `side`, on the model's device.

    Raises:
        ValueError: "trl", which owns its loop; its layout and head are those of "padded".
    """
    device = model.get_input_embeddings().weight.device
    if side == "simpo":
        from simpo.core.batch import build_batch
        from simpo.core.losses import LOSSES
        from simpo.model.head import compute_pair_logps

        logps = compute_pair_logps(model, build_batch(pairs).to(device))
        options = {"beta": BETA, "gamma_beta_ratio": GAMMA_BETA_RATIO, "label_smoothing": 0.0}
        LOSSES["sigmoid"](logps, **options).losses.mean().backward()
    elif side == "padded":
        padded_pair_losses(model, pad_pairs(pairs, pad_token_id=0).to(device)).mean().backward()
    elif side == "liger":
        loss, states = liger_mean_loss(model, pad_pairs(pairs, pad_token_id=0).to(device), compiled=False)
        if loss.is_meta:  # all of the head is done by now, and its backward looks at a value: begin behind it
            states.backward(torch.empty_like(states))
        else:
            loss.backward()
    else:
        raise ValueError(f"{side} has no forward pass of its own here")


# --- trl -------------------------------------------------------------------------------------------------------------


def _run_trl(spec: SideSpec, pairs: list[TokenPair], clock: StepClock, record: Record) -> None:
    """TRL's CPOTrainer with loss_type "simpo" and cpo_alpha 0, fed these very token ids in this order."""
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    losses: list[Tensor] = []
    seen: list[str] = []

    class GivenTokens(CPOTrainer):
        """Takes tokens instead of text, in the dataset's order, and keeps each micro-batch's loss."""

        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return trl_columns(by_row_id[feature["row_id"]])

        def _get_train_sampler(self, *args: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            seen.extend(inputs["row_id"])
            loss = super().compute_loss(model, inputs, *args, **options)
            losses.append(loss.detach())
            return loss

    class Timed(TrainerCallback):
        def on_step_begin(self, *args: Any, **options: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            clock.end()

    by_row_id = {pair.row_id: pair for pair in pairs}
    if len(by_row_id) != len(pairs):
        raise ValueError("two pairs of the case have the same row id")
    recipe = build_recipe(spec)
    config = CPOConfig(
        output_dir=recipe.output_dir,
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=BETA,
        simpo_gamma=BETA * GAMMA_BETA_RATIO,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        per_device_train_batch_size=spec.pairs_per_micro_batch,
        gradient_accumulation_steps=spec.accumulation,
        max_steps=recipe.max_steps,
        use_cpu=spec.device == "cpu",
        bf16=spec.bf16,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32)
    texts = {"prompt": "", "chosen": "", "rejected": ""}  # columns that it asks for and that tokenize_row does not read
    rows = datasets.Dataset.from_list([{"row_id": pair.row_id, **texts} for pair in pairs])
    trainer = GivenTokens(model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[Timed()])
    for pair, row in zip(pairs, trainer.train_dataset, strict=True):
        if any(list(row[name]) != values for name, values in trl_columns(pair).items()):
            raise ValueError(f"TRL holds other tokens than those given for pair {pair.row_id}")
    trainer.train()
    if seen != [pair.row_id for pair in pairs]:
        raise ValueError("TRL trained the pairs in another order")
    means = torch.stack(losses).double().cpu().unflatten(0, (-1, spec.accumulation)).mean(1)
    record.losses.extend(means.tolist())


def trl_columns(pair: TokenPair) -> dict[str, list[int]]:
    """The columns that TRL's collator pads, from exact ids."""
    columns: dict[str, list[int]] = {}
    for side in ("chosen", "rejected"):
        ids, start = list(getattr(pair, f"{side}_ids")), getattr(pair, f"{side}_start")
        columns[f"{side}_input_ids"] = ids
        columns[f"{side}_attention_mask"] = [1] * len(ids)
        columns[f"{side}_labels"] = [IGNORED] * start + ids[start:]
    prompt = list(pair.chosen_ids[: min(pair.chosen_start, pair.rejected_start)])
    return columns | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}


_SIDES: dict[str, Callable[[SideSpec, list[TokenPair], StepClock, Record], None]] = {
    "simpo": _run_simpo,
    "padded": _run_padded,
    "liger": _run_liger,
    "trl": _run_trl,
}
