"""`gpu.py parity`: is what training computes on this device right? To be answered before anything is timed.

The truth is the ordinary way in fp32 without TF32, in code that shares nothing with the packed one: padded rows of one
response, the attention of transformers (eager), logits of every position, log-softmax, gather. What may differ from it
is measured, not guessed: the same ordinary way once more, in the precision that is checked, pair by pair and with
transformers' own choice of attention, is off by its rounding alone, and so may be what is checked (`RATIO`).

    fp32        fp32 weights and products
    autocast    fp32 weights, bf16 under autocast, as `simpo train` computes
    bf16        bf16 weights

Weights are random, and scaled so that logits reach `LARGEST_LOGIT`, as trained models' do: small logits hide faults.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import simpo.core.attention
from gpu.device import Deadline, Meter, TimeUp, stop_at
from gpu.report import Column, Report
from gpu.workload import (
    BETA,
    DEFAULT_RUNG,
    GAMMA_BETA_RATIO,
    RUNGS,
    LengthCase,
    Rung,
    StagedModel,
    build_model,
)
from simpo.core.attention import packed_attention, reference_attention
from simpo.core.batch import PackedPairs, build_batch
from simpo.core.logprobs import reference_token_logps, response_logps, token_logps
from simpo.data.loader import StoredPair
from simpo.engine.model import compute_token_logps, plain_attention, plain_implementation
from simpo.engine.offload import offload_activations
from simpo.engine.optim import build_optimizer

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
LARGEST_LOGIT = 15.0
KERNEL_LIMIT = 1e-5
"""|difference| / |reference| of one kernel in fp32."""
MODES = ("fp32", "autocast", "bf16")


# --- what is compared ------------------------------------------------------------------------------------------------


def architectures(*, tiny: bool) -> dict[str, Any]:
    """Configurations by name: head sizes 64 and 128, groups, windows, norms, soft-caps; two or three layers."""
    import transformers as hf

    head = 16 if tiny else 64
    window = 24 if tiny else 200
    common = {
        "vocab_size": 199 if tiny else 16384,
        "num_hidden_layers": 2,
        "initializer_range": 0.06,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
    }

    def sizes(heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
        hidden = heads * head_dim
        return {
            **common,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
        }

    return {
        "llama 9/3 heads": hf.LlamaConfig(**sizes(9, 3, head)),
        "llama tied": hf.LlamaConfig(**sizes(4, 4, 2 * head), tie_word_embeddings=True),
        "mistral window": hf.MistralConfig(**sizes(8, 2, 2 * head), sliding_window=window),
        "qwen2": hf.Qwen2Config(**sizes(8, 2, head)),
        "qwen3": hf.Qwen3Config(**sizes(8, 4, 2 * head)),
        "gemma2 soft-caps": hf.Gemma2Config(
            **sizes(8, 4, head), sliding_window=window, query_pre_attn_scalar=head, attn_logit_softcapping=20.0
        ),
    }


def parity_pairs(vocab_size: int, *, tiny: bool) -> list[StoredPair]:
    """Ragged pairs: a prefix longer than a tile, one of a token, a response of a token, responses that begin alike."""
    lengths = ((300, 90, 140), (17, 33, 5), (1, 4, 80), (513, 1, 60), (129, 128, 127))
    if tiny:
        lengths = ((40, 9, 14), (3, 5, 1), (1, 4, 20))
    pairs = LengthCase("parity", lengths).pairs(len(lengths), vocab_size=vocab_size)
    first = pairs[0]
    start, alike = first.chosen_start, first.chosen_ids[: first.chosen_start + 5]
    longer = StoredPair("alike", first.chosen_ids, start, alike + first.rejected_ids[start + 5 :], start)
    return [*pairs, longer]


@dataclass
class Outcome:
    """Log-probs [N], mean loss and gradients by name, all in fp32."""

    logps: Tensor
    loss: float
    gradients: dict[str, Tensor]


def outcome_of(model: nn.Module, logps: Tensor, lengths: Tensor) -> Outcome:
    """Run the loss, written out, and the backward pass; leaves no gradient behind."""
    means = response_logps(logps, lengths) / lengths
    loss = -F.logsigmoid(BETA * (means[0::2] - means[1::2] - GAMMA_BETA_RATIO)).mean()
    loss.backward()
    gradients = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Outcome(logps.detach().float(), float(loss.detach()), gradients)


def reference_outcome(
    staged: StagedModel, pairs: Sequence[StoredPair], *, attention: str | None, alone: bool = False
) -> Outcome:
    """The ordinary way; `attention` as transformers names it, None = its own choice; `alone`: pair by pair."""
    model = staged.model
    implementation = model.config._attn_implementation
    logps, lengths = [], []
    model.set_attn_implementation(attention or plain_implementation(model))
    try:
        for some in [[pair] for pair in pairs] if alone else [pairs]:
            batch = build_batch(some, pack=False, share_prompt=False).to(staged.device)
            with staged.computing():
                logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            rows = logits.flatten(0, 1).index_select(0, batch.source_rows).float()
            logps.append(torch.log_softmax(rows, dim=-1).gather(1, batch.labels[:, None])[:, 0])
            lengths.append(batch.response_lengths)
    finally:
        model.set_attn_implementation(implementation)
    return outcome_of(model, torch.cat(logps), torch.cat(lengths))


def scale_logits(staged: StagedModel, pairs: Sequence[StoredPair]) -> None:
    """Scale the final norm so that the largest logit of these pairs is `LARGEST_LOGIT`; before any soft-cap."""
    base = staged.model
    batch = build_batch(pairs, pack=False, share_prompt=False).to(staged.device)
    heads: list[Tensor] = []
    hook = base.get_output_embeddings().register_forward_hook(lambda module, args, out: heads.append(out))
    with torch.no_grad(), plain_attention(base):
        base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    hook.remove()
    norm = base.model.norm.weight
    with torch.no_grad():
        offset = 1.0 - norm.mean().round()  # a new norm multiplies by one: Gemma keeps the difference from it
        norm.copy_((norm + offset) * (LARGEST_LOGIT / heads[0].abs().max()) - offset)


def packed_outcome(
    staged: StagedModel, batch: PackedPairs, rung: Rung = DEFAULT_RUNG, *, checkpointing: bool = False
) -> Outcome:
    """This package's way, or one of its rungs."""
    batch = batch.to(staged.device)
    with staged.on(rung), staged.checkpointing(checkpointing):
        with staged.computing():
            logps = compute_token_logps(staged.model, batch)
        return outcome_of(staged.model, logps, batch.response_lengths)


def offloaded_outcome(staged: StagedModel, batch: PackedPairs, eligible: dict[str, Any]) -> tuple[Outcome, int]:
    """The same with activations in host memory between the passes, and the bytes that went there."""
    batch = batch.to(staged.device)
    with staged.on(DEFAULT_RUNG):
        with offload_activations(staged.model, **eligible) as copies, staged.computing():
            logps = compute_token_logps(staged.model, batch)
        return outcome_of(staged.model, logps, batch.response_lengths), copies.num_bytes


def errors_of(outcome: Outcome, truth: Outcome) -> dict[str, Any]:
    """How far one outcome is from another."""
    difference = outcome.logps - truth.logps
    norms = {name: float(gradient.norm()) for name, gradient in truth.gradients.items()}
    off = {
        name: float((outcome.gradients[name] - gradient).norm()) if name in outcome.gradients else math.inf
        for name, gradient in truth.gradients.items()
    }
    # A parameter whose gradient all but vanishes is measured against the largest one's.
    floor = 1e-3 * max(norms.values())
    return {
        "log-probs": float(difference.abs().max()),
        "log-probs rms": float(difference.square().mean().sqrt()),
        "loss": abs(outcome.loss - truth.loss),
        "gradients": math.hypot(*off.values()) / math.hypot(*norms.values()),
        "parameters": {name: off[name] / (norms[name] + floor) for name in norms},
    }


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
    def surviving(self, subject: str, what: str, *, when: bool = True) -> Iterator[None]:
        """Inside, an error is a failed check; what torch raises where it has no kernel or no compiler differs."""
        try:
            yield
        except Exception as error:
            if not when:
                raise
            self.fail(subject, what, (str(error).strip() or type(error).__name__).splitlines()[0][:200])

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
    """Check kernels, then architectures in every precision, the first also in every way to run a step.

    Args:
        tiny: small models and short pairs, for a CPU.
        only: `KERNELS` and names of `architectures`; None = all.
    Returns:
        Whether all was checked and is right.
    """
    torch.set_float32_matmul_precision("highest")
    checks = Checks(report)
    configs = {name: c for name, c in architectures(tiny=tiny).items() if only is None or name in only}
    finished = False
    with contextlib.suppress(TimeUp), stop_at(deadline):
        if only is None or KERNELS in only:
            check_attention_kernels(checks, meter.device, tiny=tiny)
            check_head_kernels(checks, meter.device, tiny=tiny)
        for index, (name, config) in enumerate(configs.items()):
            report.say(f"{name} ...")
            with checks.surviving(name, "running"):
                check_architecture(checks, name, config, meter.device, tiny=tiny, thorough=index == 0)
            meter.release()
        finished = True
    if not finished:
        report.note("the time was over before all was checked: name the architectures that are left with --only")
    rows = report.results["rows"]
    failures = [f"{row['subject']}: {row['what']}" for row in rows if row["ok"] is False]
    report.note(f"{sum(row['ok'] is True for row in rows)} checks passed, {len(failures)} failed")
    for failure in failures:
        report.note(f"FAILED {failure}")
    report.finish(COLUMNS, complete=finished)
    return finished and not failures


def check_architecture(
    checks: Checks, name: str, config: Any, device: torch.device, *, tiny: bool, thorough: bool
) -> None:
    """One architecture in every precision; `thorough` adds the ways to run a step."""
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

        compare(subject, outcome)
        if takes_varlen(device, mode, config) and not calls:
            checks.fail(subject, "varlen_attn", "was never called: attention takes the slow path in this precision")
        if thorough:
            check_ways(checks, subject, mode, staged, pairs, outcome, reference["gradients"], compare)
    if thorough:
        check_optimizers(checks, name, config, batch, device)


def check_ways(
    checks: Checks,
    subject: str,
    mode: str,
    staged: StagedModel,
    pairs: Sequence[StoredPair],
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
        if rung.layout == "shared" and rung is not DEFAULT_RUNG:
            with checks.surviving(f"{subject}, {rung.name}", "running", when=rung.compiled):
                compare(f"{subject}, {rung.name}", packed_outcome(staged, batch, rung))
    torch.compiler.reset()  # the next precision is compiled anew, not as one more version of the same code

    def repeat(what: str, again: Outcome, first: Outcome, limit: float) -> None:
        value = errors_of(again, first)["gradients"]
        checks.at_most(subject, what, value, limit, note="" if value else "equal bits")

    round_off = max(RATIO[mode] * noise, LEAST[mode])
    repeat("twice, kernels as they come", packed_outcome(staged, batch), outcome, round_off)
    with checks.surviving(subject, "deterministic algorithms"), deterministic_algorithms():
        first = packed_outcome(staged, batch)
        repeat("twice, deterministic algorithms", packed_outcome(staged, batch), first, 0.0)
        repeat("deterministic or not", first, outcome, round_off)
        repeat("checkpointing", packed_outcome(staged, batch, checkpointing=True), first, round_off)
        eligible = {"min_bytes": 1} | ({} if staged.device.type == "cuda" else {"eligible": lambda tensor: True})
        moved, num_bytes = offloaded_outcome(staged, batch, eligible)
        repeat("activation offload", moved, first, round_off)
        if num_bytes == 0:
            checks.fail(subject, "activation offload", "nothing was moved to host memory")


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
    window = 24 if tiny else 200
    for num_heads, num_kv_heads, head_dim in ((9, 3, 64), (4, 4, 128), (8, 2, 128), (4, 2, 256)):
        for options in ({}, {"sliding_window": window}, {"softcap": 20.0}):
            generator = torch.Generator(device).manual_seed(0)
            drawn = [
                torch.randn(1, heads, num_tokens, head_dim, device=device, generator=generator).bfloat16()
                for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
            ]

            def run(attention: Any, dtype: torch.dtype, drawn: Any = drawn, options: Any = options) -> list[Tensor]:
                *inputs, grad = (tensor.to(dtype) for tensor in drawn)
                inputs = [tensor.detach().requires_grad_() for tensor in inputs]
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
    ("", lambda row: {True: "ok", False: "FAILED", None: "-"}[row["ok"]]),
    ("note", lambda row: row["note"][:60]),
)
