"""`gpu.py head`: log-probs of given tokens from hidden states, in chunks beside all logits at one time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpu.device import Deadline, Meter, TimeUp, attempt, measure_median, stop_at
from gpu.report import Column, Report, digits, gib
from gpu.workload import dense_token_logps
from simpo.core.logprobs import chunk_rows, token_logps

TARGET = 0.10
"""Of the dense head's extra memory that the chunked one may need."""


def run_head(
    report: Report,
    meter: Meter,
    deadline: Deadline,
    *,
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    chunks: Sequence[int | None],
    repeats: int,
) -> bool:
    """Forward and backward of every head, for bf16 weights and for fp32 weights under autocast.

    Args:
        chunks: rows of a chunk; None = `core.logprobs`' own choice.
    Returns:
        Whether every chunked head's values are those of the dense one (see `run_kind`).
    """
    fine = True
    with contextlib.suppress(TimeUp), stop_at(deadline):
        for weights in ("bf16", "fp32"):
            inputs = _inputs(meter.device, weights, num_rows, vocab_size, hidden_size)
            dense: dict[str, Any] | None = None
            for chunk in ("dense", *chunks):
                if not deadline.allows(20 if meter.device.type == "cuda" else 0):
                    break
                row = run_kind(meter, inputs, weights, chunk, repeats=repeats)
                dense = row if chunk == "dense" else dense
                fine &= _compare(report, row, dense)
                report.add({key: value for key, value in row.items() if key != "values"})
                report.say(f"{weights:<6}{row['head']:<18}{row['failed'] or digits(row['median_s'] * 1e3) + ' ms'}")
            del inputs
            meter.release()
    expected = 2 * (1 + len(chunks))
    if len(report.results["rows"]) < expected:
        report.note(f"{len(report.results['rows'])} of {expected} heads were measured before the time was over")
    report.finish(complete=len(report.results["rows"]) == expected)
    return fine


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _inputs(device: torch.device, weights: str, num_rows: int, vocab_size: int, hidden_size: int) -> Inputs:
    """Hidden states, weight, labels, and the gradient that comes from the loss."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    hidden = torch.randn(num_rows, hidden_size, device=device, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, device=device, generator=generator).mul_(0.02)
    labels = torch.randint(0, vocab_size, (num_rows,), device=device, generator=generator)
    grad = torch.randn(num_rows, device=device, generator=generator).div_(num_rows)
    return hidden, weight.to(dtype).requires_grad_(), labels, grad


def run_kind(meter: Meter, inputs: Inputs, weights: str, chunk: int | str | None, *, repeats: int) -> dict[str, Any]:
    """One head. Memory counts beyond the inputs and the two gradients that any head returns."""
    hidden, weight, labels, grad = inputs
    compute = torch.bfloat16
    kept: list[Tensor] = []

    def work() -> None:
        kept.clear()
        with torch.autocast(meter.device.type, dtype=compute, enabled=weights == "fp32"):
            logps = head_function(chunk)(hidden, weight, labels, compute_dtype=compute)
        torch.autograd.backward(logps, grad)
        kept.append(logps.detach())
        hidden.grad = weight.grad = None

    result, reason = attempt(lambda: measure_median(meter, work, repeats=repeats, warm_up=2), meter)
    hidden.grad = weight.grad = None
    row: dict[str, Any] = {"weights": weights, "head": _name(chunk, hidden, weight), "chunk": chunk, "failed": reason}
    if result is None:
        return row | {"values": None}
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in (hidden, weight))
    operations = 6 * hidden.numel() * weight.shape[0]
    return row | {
        **result,
        "extra_bytes": result["extra_bytes"] - gradients,
        "useful_tflops": operations / result["median_s"] / 1e12,
        "values": kept[0],
    }


def head_function(chunk: int | str | None) -> Callable[..., Tensor]:
    """The head of a row's `chunk`."""
    if chunk == "dense":
        return dense_token_logps
    return lambda *tensors, **options: token_logps(*tensors, **options, chunk_size=chunk)


def _name(chunk: int | str | None, hidden: Tensor, weight: Tensor) -> str:
    if chunk is None:
        first = chunk_rows(hidden.to(torch.bfloat16), weight.shape[0], None)[0]
        return f"default ({first.stop} rows)"
    return str(chunk) if chunk == "dense" else f"{chunk} rows"


def _compare(report: Report, row: dict[str, Any], dense: dict[str, Any] | None) -> bool:
    """Time, memory and values beside the dense head's, where that ran."""
    if dense is None or dense["failed"] or row["failed"]:
        return True
    row["time_over_dense"] = row["median_s"] / dense["median_s"]
    row["memory_over_dense"] = row["extra_bytes"] / dense["extra_bytes"] if dense["extra_bytes"] > 0 else None
    row["largest_difference"] = float((row["values"] - dense["values"]).abs().max())
    # Both round logits to bf16 (8 bits: half a unit at 8 is 0.016) after sums in different orders.
    fine = row["largest_difference"] <= 0.1
    if not fine:
        report.note(f"{row['weights']}, {row['head']}: log-probs differ by {row['largest_difference']:.2g} nats")
    return fine


def _share(row: dict[str, Any]) -> str:
    share = row.get("memory_over_dense")
    if share is None or row["chunk"] == "dense":
        return ""
    return f"{share:.1%}" + ("" if share <= TARGET else " (above 10%)")


COLUMNS: tuple[Column, ...] = (
    ("head", lambda row: row["head"]),
    ("weights", lambda row: row["weights"]),
    ("ms", lambda row: digits(row["median_s"] * 1e3) if "median_s" in row else row["failed"][:40]),
    ("min-max", lambda row: "-".join(digits(row[k] * 1e3) for k in ("min_s", "max_s")) if "min_s" in row else ""),
    ("time/dense", lambda row: digits(row.get("time_over_dense"))),
    ("extra GiB", lambda row: gib(row.get("extra_bytes"))),
    ("of dense", _share),
    ("useful TFLOP/s", lambda row: digits(row.get("useful_tflops"))),
    ("values differ", lambda row: f"{row['largest_difference']:.1e}" if "largest_difference" in row else ""),
)
