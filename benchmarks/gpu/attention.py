"""`gpu.py attention`: packed attention beside FlexAttention, torch's own block by block, and slices.

packed      `core.attention.packed_attention`: what training uses (one `varlen_attn` on CUDA in bf16)
flash3      the same with FlashAttention-3 switched on in torch, where that is installed
sliced      one `varlen_attn` on slices put together: the backward pass of each slice writes the whole tensor, so time
            a token grows with the pairs of a row
flex        FlexAttention (`core.flex_attention`), which soft-capped models train with; CUDA alone
per-block   `scaled_dot_product_attention` on each block, causal from the bottom right
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.device import Deadline, Meter, TimeUp, attempt, first_line, measure_median, stop_at
from gpu.report import Column, Report, digits, gib
from gpu.workload import LengthCase
from simpo.core.attention import attention_path, packed_attention, reference_attention
from simpo.core.batch import build_batch
from simpo.core.blocks import AttentionBlocks
from simpo.core.packing import TokenPair

DEFAULT_CASES = "ragged-200/350/350,1000/300/300,4096/256/256"
TOLERANCE = 2e-2
"""Of the check before timing: |difference| / |reference| of results and gradients, bf16 against fp32 on the same bf16
inputs. bf16 has 8 bits, so a rounded result alone is off by 2e-3, a product of rounded weights by as much again."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


# --- the ways --------------------------------------------------------------------------------------------------------


def per_block_way(blocks: AttentionBlocks) -> Attention:
    """torch's own on each block; rows must be covered by the blocks."""
    from torch.nn.attention.bias import causal_lower_right

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        outputs = []
        for prefix_start, prefix_end, start, end in blocks.ranges:
            q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
            if prefix_end == prefix_start:
                outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True))
                continue
            k = torch.cat([key[:, :, prefix_start:prefix_end], k], dim=2)
            v = torch.cat([value[:, :, prefix_start:prefix_end], v], dim=2)
            bias = causal_lower_right(q.shape[2], k.shape[2])
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
        return torch.cat(outputs, dim=2)

    return attend


def sliced_way(blocks: AttentionBlocks, device: torch.device) -> Attention:
    """Keys and queries sliced block by block and put together for one `varlen_attn`; blocks must cover the row."""
    from torch.nn.attention.varlen import varlen_attn

    keys = [
        [span for span in ((low, high), (start, end)) if span[0] < span[1]] for low, high, start, end in blocks.ranges
    ]
    q_lengths = [end - start for _, _, start, end in blocks.ranges]
    k_lengths = [sum(end - start for start, end in spans) for spans in keys]

    def cumulative(lengths: list[int]) -> Tensor:
        return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device=device, dtype=torch.int32)

    cu_q, cu_k = cumulative(q_lengths), cumulative(k_lengths)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        grouped = {"enable_gqa": True} if groups > 1 and "enable_gqa" in signature(varlen_attn).parameters else {}
        if not grouped:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        q = torch.cat([q[start:end] for _, _, start, end in blocks.ranges])
        k, v = (torch.cat([tensor[start:end] for spans in keys for start, end in spans]) for tensor in (k, v))
        out = varlen_attn(q, k, v, cu_q, cu_k, max(q_lengths), max(k_lengths), window_size=(-1, 0), **grouped)
        return out.transpose(0, 1)[None]

    return attend


@contextlib.contextmanager
def flash_attention_3() -> Iterator[None]:
    """Inside, torch's flash attention is the third; an ImportError where that is not installed."""
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        restore_flash_attention_impl()


# --- the command -----------------------------------------------------------------------------------------------------


def run_attention(
    report: Report,
    meter: Meter,
    deadline: Deadline,
    *,
    cases: Sequence[LengthCase],
    pairs: Sequence[int],
    heads: tuple[int, int, int],
    softcap: float | None,
    repeats: int,
    dtype: torch.dtype = torch.bfloat16,
) -> bool:
    """Check every way on a small row, then time it where it is right; whether all that ran are right.

    Args:
        pairs: of a micro-batch, each number of them in turn.
        heads: query heads, KV heads, head size.
        softcap: of the scores; None = off. torch's own attention has none, so that way is left out with it.
    """
    device = meter.device
    fine, expected = True, 0
    query, _, value, _ = _tensors(heads, 1, device, dtype)
    report.conditions["packed takes"] = attention_path(query, value, softcap=softcap, dropout=0.0)
    rows = report.results["rows"]
    ways = _ways(softcap, device)
    with contextlib.suppress(TimeUp), stop_at(deadline):
        for way in ways:
            worst, failed = check_way(way, heads, softcap, device, dtype)
            if failed is None and not worst <= TOLERANCE:  # NaN is not right
                failed, fine = f"wrong: differs by {worst:.2g}", False
            fine &= failed is None or way != "packed"  # rivals may be unable to run here
            report.conditions[f"{way} differs"] = None if failed else worst
            if failed:
                report.note(f"{way}: {failed}")
                continue
            expected += len(cases) * len(pairs)
            for case, count in ((case, count) for case in cases for count in pairs):
                if deadline.allows(10 if device.type == "cuda" else 0):
                    batch = case.pairs(count, vocab_size=1000)
                    row = time_way(way, meter, case.name, batch, heads, softcap, dtype, repeats)
                    report.add(row)
                    took = row["failed"] or digits(row["step_s"] * 1e3) + " ms"
                    report.say(f"{case.name:<22}{count:>4} pairs  {way:<10}{took}")
    names = [case.name for case in cases]
    rows.sort(key=lambda row: (names.index(row["case"]), row["pairs"]))
    for row in rows:
        others = [o for o in rows if (o["case"], o["pairs"], o["way"]) == (row["case"], row["pairs"], "packed")]
        if others and "step_s" in others[0] and "step_s" in row:
            row["over_packed"] = row["step_s"] / others[0]["step_s"]
    complete = len(rows) == expected and {f"{way} differs" for way in ways} <= report.conditions.keys()
    if not complete:
        report.note("the time was over before all were measured: run the cases that are missing alone with --cases")
    report.finish(complete=complete)
    return fine


def _ways(softcap: float | None, device: torch.device) -> tuple[str, ...]:
    if softcap is not None:
        return ("packed",)
    only_there = ("flash3", "sliced", "flex") if device.type == "cuda" else ()  # flex last: it is compiled
    return ("packed", "per-block", *only_there)


def build_way(way: str, blocks: AttentionBlocks, softcap: float | None, device: torch.device) -> Attention:
    """A way by its name, for one row."""
    if way == "sliced":
        return sliced_way(blocks, device)
    if way == "per-block":
        return per_block_way(blocks)
    prefer = "flex" if way == "flex" else None
    return lambda q, k, v: packed_attention(q, k, v, blocks, softcap=softcap, prefer=prefer)


def _tensors(heads: tuple[int, int, int], num_tokens: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value, and the gradient of the result."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator(device).manual_seed(0)
    sizes = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    made = [torch.randn(1, h, num_tokens, head_dim, device=device, generator=generator).to(dtype) for h in sizes]
    return [tensor.requires_grad_(i < 3) for i, tensor in enumerate(made)]


def check_way(
    way: str,
    heads: tuple[int, int, int],
    softcap: float | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, str | None]:
    """Largest relative difference from `reference_attention` in fp32, of the result and of its gradients.

    The row has a prefix longer than a tile, one of a single token, and two pairs that must not see each other.
    """
    cases = ((300, 70, 150), (1, 40, 3), (130, 1, 129))
    rows = build_batch([_pair(*sizes) for sizes in cases])
    query, key, value, grad = _tensors(heads, rows.num_tokens, device, dtype)
    exact = [tensor.detach().float().requires_grad_() for tensor in (query, key, value)]
    expected = reference_attention(*exact, rows.blocks, softcap=softcap)
    try:
        with flash_attention_3() if way == "flash3" else contextlib.nullcontext():
            result = build_way(way, rows.blocks, softcap, device)(query, key, value)
            gradients = torch.autograd.grad(result, (query, key, value), grad)
    except Exception as error:  # what a kernel or a compiler raises where it cannot run differs
        return float("nan"), f"cannot run: {first_line(error)}"
    exact_gradients = torch.autograd.grad(expected, exact, grad.float())
    return max(
        _relative(result, expected), *(_relative(a, e) for a, e in zip(gradients, exact_gradients, strict=True))
    ), None


def _pair(prompt: int, chosen: int, rejected: int) -> TokenPair:
    ids = [1] * prompt
    return TokenPair("check", ids + [2] * chosen, prompt, ids + [3] * rejected, prompt)


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().float() - expected.detach()).norm() / expected.detach().norm())


def time_way(
    way: str,
    meter: Meter,
    case: str,
    pairs: Sequence[TokenPair],
    heads: tuple[int, int, int],
    softcap: float | None,
    dtype: torch.dtype,
    repeats: int,
) -> dict[str, Any]:
    """Forward alone, and forward with backward, of one layer's attention over one micro-batch."""
    batch = build_batch(pairs)
    row: dict[str, Any] = {"case": case, "pairs": len(pairs), "way": way, "tokens": batch.num_tokens, "failed": None}
    attended = sum(
        (end - start) * (prefix_end - prefix_start) + (end - start) * (end - start + 1) // 2
        for prefix_start, prefix_end, start, end in batch.blocks.ranges
    )
    query, key, value, grad = _tensors(heads, batch.num_tokens, meter.device, dtype)
    attend = build_way(way, batch.blocks, softcap, meter.device)

    def forward() -> None:
        with torch.no_grad():
            attend(query, key, value)

    def both() -> None:
        torch.autograd.grad(attend(query, key, value), (query, key, value), grad)

    def work() -> dict[str, Any]:
        ahead = measure_median(meter, forward, repeats=repeats, warm_up=3)
        step = measure_median(meter, both, repeats=repeats, warm_up=3)
        unit = 4 * heads[0] * heads[2] * attended / 1e12  # both products, forward
        return {
            "forward_s": ahead["median_s"],
            "forward_tflops": unit / ahead["median_s"],
            "step_s": step["median_s"],
            "step_min_s": step["min_s"],
            "step_max_s": step["max_s"],
            "step_tflops": 3 * unit / step["median_s"],
            "extra_bytes": step["extra_bytes"],
        }

    try:
        with flash_attention_3() if way == "flash3" else contextlib.nullcontext():
            found, row["failed"] = attempt(work, meter)
    except Exception as error:  # as in `check_way`: the other ways go on
        found, row["failed"] = None, f"cannot run: {first_line(error)}"
    return row | (found or {})


COLUMNS: tuple[Column, ...] = (
    ("case", lambda row: row["case"]),
    ("pairs", lambda row: str(row["pairs"])),
    ("way", lambda row: row["way"]),
    ("tokens", lambda row: str(row["tokens"])),
    ("forward ms", lambda row: digits(row["forward_s"] * 1e3) if "forward_s" in row else row["failed"][:40]),
    ("fwd+bwd ms", lambda row: digits(row["step_s"] * 1e3) if "step_s" in row else ""),
    (
        "min-max",
        lambda row: "-".join(digits(row[k] * 1e3) for k in ("step_min_s", "step_max_s")) if "step_s" in row else "",
    ),
    ("us/token", lambda row: digits(row["step_s"] / row["tokens"] * 1e6) if "step_s" in row else ""),
    ("TFLOP/s", lambda row: digits(row.get("step_tflops"))),
    ("/ packed's time", lambda row: digits(row.get("over_packed"))),
    ("extra GiB", lambda row: gib(row.get("extra_bytes"))),
)
