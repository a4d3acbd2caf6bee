"""Samples responses to prompts from a chat model, several per prompt, on the CPU or wherever the model is.

Owns the demo's generation: `generate_responses` for a loaded model (the demo's answers before and after training) and
`sample_responses` for a model folder with one process per core (the candidates of the preference pairs).

Why not `model.generate`: it computes a prompt once per sample, sorts the whole vocabulary at each token for top-p, and
keeps finished rows in the batch until the longest one ends. Here a prompt is computed once, top-p is taken among the
64 most likely tokens, and finished rows leave. Measured with SmolLM2-135M-Instruct on one core of an AMD EPYC with
AVX512-BF16, decode steps of a 46-token prompt, tokens per CPU second: bf16 400 (16 rows), 550 (32), 700 (64), 760 (96);
fp32 170, 220, 270, 280. Whole runs (160 tokens, prompts and thinning batches included, two processes on two shared
cores, 128 rows): 370 per CPU second, 710 per second. Two threads in one process wait for each other at every layer, and
for whatever else wants the cores: one thread in each of two processes is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Beyond the 64 most likely tokens SmolLM2-135M-Instruct has 0.5% of the probability at temperature 0.7, on average over
# its own responses; at 2.5% of the steps the top-p set of 0.95 would be larger.
NUM_CANDIDATES = 64


@dataclass(frozen=True)
class Sample:
    """One response. `finished`: the model ended it itself; false when the token limit cut it."""

    text: str
    num_tokens: int
    finished: bool


def generate_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 160,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    batch_size: int = 128,
    progress: bool = False,
) -> list[list[str]]:
    """Texts of `num_samples` responses to each prompt, in the order of the prompts.

    Args:
        model: a causal language model that takes `past_key_values`; used in its own dtype and mode (call `.eval()`).
        tokenizer: with a chat template.
        prompts: user messages.
        temperature: 0 takes the most likely token each time (then `num_samples` must be 1).
        top_p: share of probability kept, in (0, 1].
        batch_size: responses generated together.
        progress: show a bar on stderr.
    Raises:
        ValueError: an option out of range, or a prompt is empty.
    """
    options = _Options(num_samples, max_new_tokens, temperature, top_p, seed)
    batches = _plan_batches(tokenizer, prompts, rows=batch_size, num_samples=num_samples)
    results: list[list[Sample]] = [[] for _ in prompts]
    with _bar(sum(len(b.places) for b in batches) * num_samples, shown=progress) as advance:
        for batch in batches:
            for place, samples in zip(batch.places, _generate_batch(model, tokenizer, batch, options), strict=True):
                results[place] = samples
                advance(len(samples))
    return [[sample.text for sample in samples] for samples in results]


def sample_responses(
    model_folder: str | Path,
    prompts: Sequence[str],
    *,
    num_samples: int,
    max_new_tokens: int = 160,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    batch_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    num_processes: int = 2,
) -> list[list[Sample]]:
    """`generate_responses` by a pool of one-thread CPU processes, with lengths and `finished` flags.

    The result depends on the seed and the batch size but not on `num_processes`: a batch is always computed by one
    thread, with a generator seeded by its number.
    """
    from transformers import AutoTokenizer

    options = _Options(num_samples, max_new_tokens, temperature, top_p, seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    batches = _plan_batches(tokenizer, prompts, rows=batch_size, num_samples=num_samples)
    results: list[list[Sample]] = [[] for _ in prompts]
    # `spawn`: a forked child inherits the parent's thread pools in an unusable state.
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(num_processes, initializer=_start_worker, initargs=(str(model_folder), dtype, options)) as pool,
        _bar(len(prompts) * num_samples, shown=True) as advance,
    ):
        for places, responses in pool.imap_unordered(_run_in_worker, batches):
            for place, samples in zip(places, responses, strict=True):
                results[place] = samples
                advance(len(samples))
    return results


@dataclass(frozen=True)
class _Options:
    num_samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"num_samples and max_new_tokens must be at least 1, got {self.num_samples} and {self.max_new_tokens}"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"temperature 0 gives {self.num_samples} equal responses; use num_samples 1 or a temperature"
            )


@dataclass(frozen=True)
class _Batch:
    """Prompts computed together: their number among the batches, places in the caller's list, token ids."""

    number: int
    places: list[int]
    prompt_ids: list[list[int]]


def _plan_batches(tokenizer: Any, prompts: Sequence[str], *, rows: int, num_samples: int) -> list[_Batch]:
    """Prompts of like length together, so that little padding is computed; longest first."""
    encoded = []
    for place, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {place} is empty; every prompt needs text")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        encoded.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    order = sorted(range(len(prompts)), key=lambda place: -len(encoded[place]))
    size = max(1, rows // num_samples)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    return [_Batch(number, places, [encoded[p] for p in places]) for number, places in enumerate(chunks)]


@torch.inference_mode()
def _generate_batch(model: Any, tokenizer: Any, batch: _Batch, options: _Options) -> list[list[Sample]]:
    """`num_samples` responses for each prompt of the batch."""
    from transformers import DynamicCache

    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(options.seed * 1_000_003 + batch.number)
    ends = torch.tensor(_end_tokens(model, tokenizer), device=device)
    width = max(len(ids) for ids in batch.prompt_ids)
    pad = [width - len(ids) for ids in batch.prompt_ids]
    ids = torch.tensor([[0] * n + i for n, i in zip(pad, batch.prompt_ids, strict=True)], device=device)
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in pad], device=device)

    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    ).logits
    # The prompt was computed once; from here on each of its samples has a row.
    cache.batch_repeat_interleave(options.num_samples)
    mask, positions, logits = (x.repeat_interleave(options.num_samples, 0) for x in (mask, positions[:, -1:], logits))
    tokens: list[list[int]] = [[] for _ in range(mask.shape[0])]
    finished = [False] * mask.shape[0]
    rows = torch.arange(mask.shape[0], device=device)  # the response that each row of the shrinking batch belongs to
    done = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(options.max_new_tokens):
        chosen = _choose(logits[:, -1].float(), options, generator)
        ended = torch.isin(chosen, ends)
        for row, token, end, was_done in zip(
            rows.tolist(), chosen.tolist(), ended.tolist(), done.tolist(), strict=True
        ):
            if was_done:
                continue
            finished[row] = end
            if not end:
                tokens[row].append(token)
        done = done | ended
        if bool(done.all()) or step + 1 == options.max_new_tokens:
            break
        mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions + 1
        # Dropping rows copies the cache: worth it once an eighth of the rows is done.
        if int(done.sum()) * 8 >= len(done):
            keep = (~done).nonzero().flatten()
            cache.batch_select_indices(keep)
            mask, positions, chosen, rows, done = (x[keep] for x in (mask, positions, chosen, rows, done))
        logits = model(
            input_ids=chosen[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits

    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    samples = [Sample(x.strip(), len(t), f) for x, t, f in zip(texts, tokens, finished, strict=True)]
    return [samples[i : i + options.num_samples] for i in range(0, len(samples), options.num_samples)]


def _choose(logits: torch.Tensor, options: _Options, generator: torch.Generator) -> torch.Tensor:
    """[rows, vocabulary] -> the next token of each row, [rows]."""
    if options.temperature == 0:
        return logits.argmax(-1)
    top, ids = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]), dim=-1)
    probs = (top / options.temperature).softmax(-1)
    probs = probs * (probs.cumsum(-1) - probs < options.top_p)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's and those of the generation config."""
    configured = model.generation_config.eos_token_id
    ends = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)


_worker: dict[str, Any] = {}  # the model of a pool process, loaded once by `_start_worker`


def _start_worker(model_folder: str, dtype: torch.dtype, options: _Options) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    _worker["model"] = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).eval()
    _worker["tokenizer"] = AutoTokenizer.from_pretrained(model_folder)
    _worker["options"] = options


def _run_in_worker(batch: _Batch) -> tuple[list[int], list[list[Sample]]]:
    return batch.places, _generate_batch(_worker["model"], _worker["tokenizer"], batch, _worker["options"])


@contextlib.contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """`with _bar(total, shown=...) as advance`: a bar on a terminal, a line per tenth elsewhere, or nothing."""
    console = Console(stderr=True, quiet=not shown, highlight=False)
    count = 0

    def advance_line(number: int) -> None:
        nonlocal count
        tenth, count = 10 * count // total, count + number
        if 10 * count // total > tenth:
            console.print(f"responses {count}/{total}")

    if not (shown and console.is_terminal):
        yield advance_line
        return
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("responses"), *columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda number: progress.advance(task, number)


def to_rows(ids: Sequence[str], prompts: Sequence[str], samples: list[list[Sample]]) -> list[dict[str, Any]]:
    """`{"id", "prompt", "samples": [{"text", "num_tokens", "finished"}]}` for each prompt."""
    return [
        {"id": row_id, "prompt": prompt, "samples": [asdict(sample) for sample in responses]}
        for row_id, prompt, responses in zip(ids, prompts, samples, strict=True)
    ]


def main() -> None:
    """Sample responses to the prompts of a JSON-lines file (`id`, `prompt`)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", help="model folder; default: SmolLM2-135M-Instruct, fetched if need be")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "prompts.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to write")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128, help="responses generated together")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--num-processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--limit", type=int, help="only the first prompts")
    args = parser.parse_args()

    from get_model import get_model

    with args.prompts.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][: args.limit]
    prompts = [row["prompt"] for row in rows]
    samples = sample_responses(
        get_model(args.model),
        prompts,
        num_samples=args.num_samples,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        batch_size=args.batch_size,
        dtype=getattr(torch, args.dtype),
        num_processes=args.num_processes,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        for row in to_rows([row["id"] for row in rows], prompts, samples):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(args.out)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
