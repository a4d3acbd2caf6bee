"""`gpu.py parity`: is what training computes on this device right? To be answered before anything is timed.

The truth is the ordinary way in fp32 without TF32, in code that shares nothing with the packed one: padded rows of one
response, the attention of transformers (eager), logits of every position, log-softmax, gather. What may differ from it
is measured, not guessed: the same ordinary way once more, in the precision that is checked, pair by pair and with
transformers' own choice of attention, is off by its rounding alone, and so may be what is checked (`RATIO`).

    fp32        fp32 weights and products
    autocast    fp32 weights, bf16 under autocast, as `simpo train` computes
    bf16        bf16 weights

Weights are random; logits are as large as trained models' (`outcomes.LARGEST_LOGIT`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import simpo.core.attention
from gpu.device import Deadline, Meter, TimeUp, first_line, stop_at
from gpu.outcomes import (
    Outcome,
    architectures,
    errors_of,
    offloaded_outcome,
    packed_outcome,
    parity_pairs,
    reference_outcome,
    scale_logits,
)
from gpu.report import Column, Report
from gpu.workload import BETA, CHECKPOINTS_RUNG, RUNGS, StagedModel, build_model
from simpo.core.attention import packed_attention, reference_attention
from simpo.core.batch import PackedPairs, build_batch
from simpo.core.logprobs import reference_token_logps, token_logps
from simpo.core.packing import TokenPair
from simpo.model.head import compute_token_logps
from simpo.run.optim import build_optimizer

RATIO = {"fp32": 3.0, "autocast": 2.0, "bf16": 2.0}
"""Of an error to the ordinary way's: two computations that round at different places have errors of one size, not the
same. In fp32 the ordinary way repeats many of the truth's operations bit for bit, so its error is the smaller one."""
PARAMETER_RATIO = 2.0
"""On top for single parameters: the error of a short vector is itself uncertain by some tens of percent."""
LEAST = {"fp32": 1e-5, "autocast": 1e-3, "bf16": 1e-3}
"""No limit is below this, relative to the size of what is compared: some operations are the same bits by chance."""
LOSS_DEVIATIONS = 4.0
"""The loss is one number, the reference's error in it may be small by luck: so many standard deviations are allowed as
well, taking the log-probs' errors (limited by `RATIO` themselves) to be independent."""
KERNEL_LIMIT = 1e-5
"""|difference| / |reference| of one kernel in fp32."""
MODES = ("fp32", "autocast", "bf16")


# --- checks ----------------------------------------------------------------------------------------------------------


class Checks:
    """Collects what was checked; a value that is no number fails."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def at_most(self, subject: str, what: str, value: float, limit: float, *, note: str = "") -> bool:
        """Check that value <= limit."""
        fine = bool(value <= limit)
        self._add(subject, what, value=value, limit=limit, ok=fine, note=note)
        if not fine:
            self._report.say(f"FAILED  {subject}: {what} {value:.3g}, at most {limit:.3g} {note}")
        return fine

    def fail(self, subject: str, what: str, note: str) -> None:
        """Something that should have worked did not."""
        self._add(subject, what, value=None, limit=None, ok=False, note=note)
        self._report.say(f"FAILED  {subject}: {what}: {note}")

    @contextlib.contextmanager
    def surviving(self, subject: str, what: str) -> Iterator[None]:
        """Inside, an error is a failed check; what torch raises where it has no kernel or no compiler differs."""
        try:
            yield
        except Exception as error:
            self.fail(subject, what, first_line(error))

    def tell(self, subject: str, what: str, note: str, value: float | None = None) -> None:
        """Something that was not checked, or only looked at."""
        self._add(subject, what, value=value, limit=None, ok=None, note=note)

    def compare(
        self, subject: str, mode: str, errors: dict[str, Any], reference: dict[str, Any], truth: Outcome, slope: float
    ) -> None:
        """Against the errors that the ordinary way has in this precision.

        Args:
            slope: how far a loss moves, typically, when every log-prob is off at random by one nat.
        """
        least = {"log-probs rms": LEAST[mode] * float(truth.logps.square().mean().sqrt()), "gradients": LEAST[mode]}
        for what, smallest in least.items():
            limit = max(RATIO[mode] * reference[what], smallest)
            self.at_most(subject, what, errors[what], limit, note=f"ordinary {reference[what]:.2g}")
        noise = max(reference["log-probs rms"], least["log-probs rms"])
        limit = max(RATIO[mode] * reference["loss"], LOSS_DEVIATIONS * slope * noise)
        self.at_most(subject, "loss", errors["loss"], limit, note=f"ordinary {reference['loss']:.2g}")
        ratios = {
            name: errors["parameters"][name] / max(size, LEAST[mode]) for name, size in reference["parameters"].items()
        }
        worst = max(ratios, key=lambda name: ratios[name])
        limit = PARAMETER_RATIO * RATIO[mode]
        self.at_most(subject, "worst gradient / ordinary's", ratios[worst], limit, note=worst)

    def _add(self, subject: str, what: str, **row: Any) -> None:
        self._report.add({"subject": subject, "what": what, **row})


def loss_slope(batch: PackedPairs) -> float:
    """Standard deviation of the mean loss when every log-prob has an independent error of one nat, from above."""
    per_response = 1.0 / batch.response_lengths.double()  # variance of each response's mean
    return BETA * float(per_response.sum().sqrt()) / batch.num_pairs


KERNELS = "kernels"
"""The name of what is checked without any model."""


def run_parity(
    report: Report,
    meter: Meter,
    deadline: Deadline,
    *,
    tiny: bool = False,
    only: Sequence[str] | None = None,
) -> bool:
    """Check kernels, then architectures in every precision, then the first of them in every way to run a step.

    Args:
        tiny: small models and short pairs, for a CPU.
        only: `KERNELS` and names of `architectures`; None = all.
    Returns:
        Whether all was checked and is right.
    """
    torch.set_float32_matmul_precision("highest")
    checks = Checks(report)
    configs = {name: c for name, c in architectures(tiny=tiny).items() if only is None or name in only}
    first, finished = list(configs.items())[:1], False
    with contextlib.suppress(TimeUp), stop_at(deadline):
        if only is None or KERNELS in only:
            check_head_kernels(checks, meter.device, tiny=tiny)
            check_attention_kernels(checks, meter.device, tiny=tiny)
        for thorough, (name, config) in [*((False, item) for item in configs.items()), *((True, i) for i in first)]:
            report.say(f"{name}{', every way' if thorough else ''} ...")
            with checks.surviving(name, "running"):
                check_architecture(checks, name, config, meter.device, tiny=tiny, thorough=thorough)
            meter.release()
        finished = True
    if not finished:
        report.note("the time was over before all was checked: name the architectures that are left with --only")
    rows = report.results["rows"]
    failures = [f"{row['subject']}: {row['what']}" for row in rows if row["ok"] is False]
    report.note(f"{sum(row['ok'] is True for row in rows)} checks passed, {len(failures)} failed")
    for failure in failures:
        report.note(f"FAILED {failure}")
    report.finish(complete=finished)
    return finished and not failures


def check_architecture(
    checks: Checks, name: str, config: Any, device: torch.device, *, tiny: bool, thorough: bool
) -> None:
    """One architecture in every precision; `thorough`: the ways to run a step, those that take longest last."""
    pairs = parity_pairs(config.vocab_size, tiny=tiny)
    batch = build_batch(pairs)
    slope = loss_slope(batch)
    model = build_model(config, device=device, dtype=torch.float32)
    staged = StagedModel(model, device=device, autocast=False)
    scale_logits(staged, pairs)
    with torch.no_grad():
        for parameter in model.parameters():  # so that bf16 weights are the same weights
            parameter.copy_(parameter.bfloat16())
    truth = reference_outcome(staged, pairs, attention="eager")
    for mode in MODES:
        subject = f"{name}, {mode}"
        if mode == "bf16":
            for parameter in model.parameters():  # buffers keep fp32 (rotary frequencies), as when it is loaded so
                parameter.data = parameter.data.bfloat16()
        staged = StagedModel(model, device=device, autocast=mode == "autocast")
        with counted_varlen() as calls:
            outcome = packed_outcome(staged, batch)
        reference = errors_of(reference_outcome(staged, pairs, attention=None, alone=True), truth)

        def compare(subject: str, outcome: Outcome, mode: str = mode, reference: dict[str, Any] = reference) -> None:
            checks.compare(subject, mode, errors_of(outcome, truth), reference, truth, slope)

        if thorough:
            check_ways(checks, subject, mode, staged, pairs, outcome, reference["gradients"], compare)
            continue
        compare(subject, outcome)
        if takes_varlen(device, mode, config) and not calls:
            checks.fail(subject, "varlen_attn", "was never called: attention takes the slow path in this precision")
    if thorough:
        check_optimizers(checks, name, config, batch, device)
        for rung in (rung for rung in RUNGS if rung.compiled):
            with checks.surviving(f"{subject}, {rung.name}", "compiling"):
                compare(f"{subject}, {rung.name}", packed_outcome(staged, batch, rung))


def check_ways(
    checks: Checks,
    subject: str,
    mode: str,
    staged: StagedModel,
    pairs: Sequence[TokenPair],
    outcome: Outcome,
    noise: float,
    compare: Callable[[str, Outcome], None],
) -> None:
    """Layouts, rungs, checkpointing, offloading, and the same step twice.

    Args:
        noise: |difference| / |truth| of the ordinary way's gradients.
    """
    batch = build_batch(pairs)
    for layout, other in (
        ("repeated prompts", build_batch(pairs, share_prompt=False)),
        ("unpacked", build_batch(pairs, pack=False)),
    ):
        compare(f"{subject}, {layout}", packed_outcome(staged, other))
    for rung in RUNGS:
        if rung.layout == "shared" and not rung.low_memory and not rung.compiled:
            compare(f"{subject}, {rung.name}", packed_outcome(staged, batch, rung))

    def repeat(what: str, again: Outcome, first: Outcome, limit: float) -> None:
        value = errors_of(again, first)["gradients"]
        checks.at_most(subject, what, value, limit, note="" if value else "equal bits")

    round_off = max(RATIO[mode] * noise, LEAST[mode])
    repeat("twice, kernels as they come", packed_outcome(staged, batch), outcome, round_off)
    with checks.surviving(subject, "deterministic algorithms"), deterministic_algorithms():
        first = packed_outcome(staged, batch)
        repeat("twice, deterministic algorithms", packed_outcome(staged, batch), first, 0.0)
        repeat("deterministic or not", first, outcome, round_off)
        repeat("checkpointing", packed_outcome(staged, batch, CHECKPOINTS_RUNG), first, round_off)
        eligible = {"min_bytes": 1} | ({} if staged.device.type == "cuda" else {"eligible": lambda tensor: True})
        moved, num_bytes = offloaded_outcome(staged, batch, eligible)
        repeat("activation offload", moved, first, round_off)
        if num_bytes == 0:
            checks.fail(subject, "activation offload", "nothing was moved to CPU memory")


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Inside, operations give the same bits again or raise: warnings alone would leave flash's backward on atomics."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def takes_varlen(device: torch.device, mode: str, config: Any) -> bool:
    """Whether attention is meant to go through `varlen_attn`: on CUDA, computing in bf16, without a soft-cap."""
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    return device.type == "cuda" and mode != "fp32" and not softcapped


@contextlib.contextmanager
def counted_varlen() -> Iterator[list[None]]:
    """Inside, every use of the `varlen_attn` path adds an entry to the list."""
    calls: list[None] = []
    path = simpo.core.attention.varlen_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return path(*args, **kwargs)

    with mock.patch.object(simpo.core.attention, "varlen_attention", counted):
        yield calls


# --- kernels ---------------------------------------------------------------------------------------------------------


def relative(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest |difference| / |reference| over tensors."""
    pairs = zip(actual, expected, strict=True)
    return max(float((a.detach().double() - e.detach().double()).norm() / e.detach().double().norm()) for a, e in pairs)


def check_attention_kernels(checks: Checks, device: torch.device, *, tiny: bool) -> None:
    """`packed_attention` against dense fp64: results and gradients, head by head; a rejected response has q != k."""
    blocks = build_batch(parity_pairs(199, tiny=tiny)).blocks
    num_tokens = blocks.ranges[-1][3]
    masks = functools.cache(simpo.core.attention.dense_mask)  # written out row by row, which takes a while
    window = 24 if tiny else 200
    heads = (9, 3, 64), (4, 4, 128), (8, 2, 128), (4, 2, 256)
    cases = [(each, options) for each in heads for options in ({}, {"sliding_window": window})]
    # Last, since FlexAttention is compiled for them.
    for (num_heads, num_kv_heads, head_dim), options in [*cases, (heads[-1], {"softcap": 20.0})]:
        generator = torch.Generator(device).manual_seed(0)
        drawn = [
            torch.randn(1, count, num_tokens, head_dim, device=device, generator=generator).bfloat16()
            for count in (num_heads, num_kv_heads, num_kv_heads, num_heads)
        ]

        def run(attention: Any, dtype: torch.dtype, drawn: Any = drawn, options: Any = options) -> list[Tensor]:
            *inputs, grad = (tensor.to(dtype) for tensor in drawn)
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            with mock.patch.object(simpo.core.attention, "dense_mask", masks):
                out = attention(*inputs, blocks, **options)
            return [out, *torch.autograd.grad(out, inputs, grad)]

        truth = run(reference_attention, torch.float64)
        subject = f"attention {num_heads}/{num_kv_heads}x{head_dim} {' '.join(options)}".strip()
        with checks.surviving(subject, "bf16"):
            limit = RATIO["bf16"] * relative(run(reference_attention, torch.bfloat16), truth)
            checks.at_most(subject, "bf16", relative(run(packed_attention, torch.bfloat16), truth), limit)
        value = relative(run(packed_attention, torch.float32), truth)
        checks.at_most(subject, "fp32", value, KERNEL_LIMIT)


def check_head_kernels(checks: Checks, device: torch.device, *, tiny: bool) -> None:
    """`token_logps` beside `reference_token_logps`, in one chunk and in ragged ones."""
    num_rows, vocab_size, hidden_size = (37, 199, 24) if tiny else (1000, 32003, 512)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, device=device, generator=generator).bfloat16()
    weight = (0.1 * torch.randn(vocab_size, hidden_size, device=device, generator=generator)).bfloat16()
    labels = torch.randint(0, vocab_size, (num_rows,), device=device, generator=generator)
    grad = torch.randn(num_rows, device=device, generator=generator)

    def run(head: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        inputs = [tensor.to(dtype).detach().requires_grad_() for tensor in (hidden, weight)]
        out = head(*inputs, labels, **options)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    for options in ({}, {"softcap": 30.0, "scale": 0.5}):
        truth = run(reference_token_logps, torch.float64, **options)
        limit = RATIO["bf16"] * relative(run(reference_token_logps, torch.bfloat16, **options), truth)
        for chunk_size in (None, num_rows // 3 + 1, 1 if tiny else 64):
            subject = f"head, chunks of {chunk_size or 'default size'} {' '.join(options)}".strip()
            value = relative(run(token_logps, torch.float32, chunk_size=chunk_size, **options), truth)
            checks.at_most(subject, "fp32", value, KERNEL_LIMIT)
            value = relative(run(token_logps, torch.bfloat16, chunk_size=chunk_size, **options), truth)
            checks.at_most(subject, "bf16", value, limit)


# --- optimizers ------------------------------------------------------------------------------------------------------


def check_optimizers(checks: Checks, name: str, config: Any, batch: PackedPairs, device: torch.device) -> None:
    """One step of each of the recipe's optimizers beside AdamW's first step, -lr g / (|g| + eps), written out."""
    rate, epsilon = 1e-3, 1e-8
    for optim, dtype in (
        ("adamw_torch", torch.float32),
        ("adamw_torch_fused", torch.float32),
        ("adamw_bf16", torch.float32),
        ("adamw_bf16", torch.bfloat16),
        ("adamw_8bit", torch.float32),
    ):
        subject = f"{name}, {optim} on {str(dtype).removeprefix('torch.')}"
        model = build_model(config, device=device, dtype=dtype)
        recipe = types.SimpleNamespace(
            optim=optim,
            learning_rate=rate,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=epsilon,
            optimizer_offload=False,
            seed=0,
        )
        try:
            optimizer = build_optimizer(model, recipe)
        except ValueError as error:
            checks.tell(subject, "skipped", str(error))
            continue
        logps = compute_token_logps(model, batch.to(device))
        (-logps.mean()).backward()
        before = [p.detach().double().clone() for p in model.parameters()]
        gradients = [p.grad.double().clone() for p in model.parameters()]
        optimizer.step()
        worst = 0.0
        for p, old, g in zip(model.parameters(), before, gradients, strict=True):
            expected = old - rate * g / (g.abs() + epsilon)
            off = (p.detach().double() - expected).abs()
            if dtype == torch.bfloat16:  # rounded up or down: less than one unit in the last of 8 bits
                off = off / (expected.abs() * 2**-7 + 1e-12)
            else:
                off = off / rate
            worst = max(worst, float(off.max()) if bool(off.isfinite().all()) else math.nan, key=_nan_first)
        if dtype == torch.bfloat16:
            checks.at_most(subject, "units in the last place", worst, 1.0 + 1e-3)
        else:
            checks.at_most(subject, "off / learning rate", worst, 0.1 if optim == "adamw_8bit" else 1e-2)


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


COLUMNS: tuple[Column, ...] = (
    ("subject", lambda row: row["subject"]),
    ("check", lambda row: row["what"]),
    ("value", lambda row: _shown(row["value"])),
    ("limit", lambda row: _shown(row["limit"])),
    ("result", lambda row: {True: "ok", False: "FAILED", None: "-"}[row["ok"]]),
    ("note", lambda row: row["note"][:60]),
)
