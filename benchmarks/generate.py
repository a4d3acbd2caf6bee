"""Responses to the demo's prompts by this package's sampler, by `model.generate` and by transformers' continuous
batching: tokens for each second of one core, in turns, so that what else the machine does meets all alike.

    python benchmarks/generate.py MODEL [--prompts 8] [--samples 8] [--max-new-tokens 128] [--rounds 3] [--only own]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from simpo.model.sampling import Sampling, noise_key, sample_responses

PROMPTS = Path(__file__).parents[1] / "examples" / "demo" / "prompts.jsonl"
TEMPERATURE, TOP_P = 0.7, 0.95


def by_own(model: Any, prompts: list[list[int]], args: argparse.Namespace, seed: int) -> int:
    keys = [[noise_key(seed, place, number) for number in range(args.samples)] for place in range(len(prompts))]
    found = sample_responses(
        model,
        prompts,
        keys,
        Sampling(TEMPERATURE, TOP_P),
        ends={model.generation_config.eos_token_id},
        max_new_tokens=args.max_new_tokens,
    )
    return sum(len(each.ids) for of_prompt in found for each in of_prompt)


def settings(model: Any, args: argparse.Namespace, **more: Any) -> GenerationConfig:
    end = model.generation_config.eos_token_id
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
    return GenerationConfig(max_new_tokens=args.max_new_tokens, eos_token_id=end, pad_token_id=end, **sampling, **more)


def by_generate(model: Any, prompts: list[list[int]], args: argparse.Namespace, seed: int) -> int:
    torch.manual_seed(seed)
    width, end = max(map(len, prompts)), model.generation_config.eos_token_id
    ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = settings(model, args, num_return_sequences=args.samples)
    out = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
    return int((out != end).sum() + (out == end).any(1).sum())


def by_continuous_batching(model: Any, prompts: list[list[int]], args: argparse.Namespace, seed: int) -> int:
    rows = len(prompts) * args.samples
    blocks = rows * (1 + (max(map(len, prompts)) + args.max_new_tokens) // 256)
    limits = ContinuousBatchingConfig(
        num_blocks=blocks, max_batch_tokens=max(256, rows), max_requests_per_batch=rows, seed=seed
    )
    before = model.config._attn_implementation
    each = [prompt for prompt in prompts for _ in range(args.samples)]  # blocks of equal prompts are shared
    found = model.generate_batch(each, generation_config=settings(model, args), continuous_batching_config=limits)
    model.set_attn_implementation(before)
    return sum(len(request.generated_tokens) for request in found.values())


WAYS = {"own": by_own, "generate": by_generate, "continuous": by_continuous_batching}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--only", choices=list(WAYS), action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    with PROMPTS.open(encoding="utf-8") as file:
        texts = [json.loads(line)["prompt"] for line in file][: args.prompts]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    speeds: dict[str, list[float]] = {}
    for number in range(args.rounds):
        for name in args.only or WAYS:
            start = time.process_time()
            tokens = WAYS[name](model, prompts, args, number)
            speeds.setdefault(name, []).append(tokens / (time.process_time() - start))
            print(f"{name} {tokens} tokens, {speeds[name][-1]:.0f} a CPU second", flush=True)
    first = median(next(iter(speeds.values())))
    for name, values in speeds.items():
        print(f"{name}: median {median(values):.0f} tokens a CPU second, ratio {median(values) / first:.2f}")


if __name__ == "__main__":
    main()
