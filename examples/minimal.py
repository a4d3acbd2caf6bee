"""SimPO in one file: preference pairs in, an aligned model out. Nothing but `simpo.core`, torch and transformers.

    python examples/minimal.py --model MODEL --pairs examples/demo/pairs/train.jsonl --output runs/minimal

To be read from top to bottom: tokens, attention, log-probs, loss, loop. `simpo train` makes the same update (a test
compares the losses of the first steps) and adds what a long run needs: data in every shape with every row accounted
for, evaluation, checkpoints, many processes, less memory, and models that soft-cap, scale or shard their logits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface

from simpo.core.attention import AttentionBlocks, packed_attention
from simpo.core.batch import PackedPairs, build_batch
from simpo.core.logprobs import response_logps, token_logps
from simpo.core.losses import PairLoss, simpo_loss
from simpo.core.packing import epoch_order, iterate_steps

# --- tokens: what is trained -----------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two full sequences, prompt and response, and where in each the response begins."""

    row_id: str
    chosen_ids: list[int]
    chosen_start: int
    rejected_ids: list[int]
    rejected_start: int


def read_pairs(path: Path, tokenizer: Any, *, max_length: int) -> list[Pair]:
    """Lines of {"prompt", "chosen", "rejected"}, messages or text; pairs that are too long are left out."""
    pairs = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            row = json.loads(line)
            chosen, rejected = (tokenize(row["prompt"], row[side], tokenizer) for side in ("chosen", "rejected"))
            if max(len(chosen[0]), len(rejected[0])) <= max_length:
                pairs.append(Pair(f"{path.name}#{number}", *chosen, *rejected))
    return pairs


def tokenize(prompt: Any, response: Any, tokenizer: Any) -> tuple[list[int], int]:
    """Token ids of the whole conversation, up to its end-of-turn token, and the first one that is trained."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answered = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    head = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(asked + answered, tokenize=False)
    text = text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]  # what stands behind it is not generated
    # One tokenisation of the whole text, since parts tokenised apart can give other tokens where they meet.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = next(index for index, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(head))
    return encoded["input_ids"], start


# --- attention: all pairs of a batch in one row, each prompt computed once -------------------------------------------


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float | None = None,
    sliding_window: int | None = None, packed_blocks: AttentionBlocks, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention signature. The blocks say which rows see which; no mask exists."""
    out = packed_attention(query, key, value, packed_blocks, scale=scaling, sliding_window=sliding_window)
    return out.transpose(1, 2), None


AttentionInterface.register("minimal", attend)
AttentionMaskInterface.register("minimal", lambda **others: None)

# --- log-probs and loss ----------------------------------------------------------------------------------------------


def pair_losses(model: nn.Module, batch: PackedPairs, *, beta: float, gamma_beta_ratio: float) -> PairLoss:
    """-log sigmoid(beta (m_w - m_r) - gamma) of each pair, m being the mean log-prob of a response's tokens."""
    hidden = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, packed_blocks=batch.blocks, use_cache=False
    ).last_hidden_state.flatten(0, 1)
    # The vocabulary projection runs on the rows that predict a response token, in chunks: no [T, V] logits.
    logps = token_logps(hidden[batch.source_rows], model.lm_head.weight, batch.labels)
    means = response_logps(logps, batch.response_lengths) / batch.response_lengths
    return simpo_loss(means[0::2], means[1::2], beta=beta, gamma_beta_ratio=gamma_beta_ratio)  # chosen, rejected, ...


# --- the loop --------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module, pairs: Sequence[Pair], *, pairs_per_step: int = 8, micro_batch: int = 4, epochs: int = 1,
    learning_rate: float = 2e-5, beta: float = 2.0, gamma_beta_ratio: float = 0.5, seed: int = 42,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Trains as it is iterated over; gives each step's mean loss, accuracy, and margin m_w - m_r."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for epoch in range(epochs):
        for step in iterate_steps(epoch_order(len(pairs), seed=seed, epoch=epoch), pairs_per_step=pairs_per_step):
            done = []
            for start in range(0, len(step), micro_batch):
                batch = build_batch([pairs[index] for index in step[start : start + micro_batch]]).to(model.device)
                done.append(pair_losses(model, batch, beta=beta, gamma_beta_ratio=gamma_beta_ratio))
                # Divided by the pairs of the whole step, so that each weighs the same however the step is cut.
                (done[-1].losses.sum() / len(step)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()
            losses, chosen, rejected = (torch.cat(column).detach() for column in zip(*done, strict=True))
            yield {
                "loss": losses.mean().item(),
                "accuracy": (chosen > rejected).float().mean().item(),
                "margin": (chosen - rejected).mean().item() / beta,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub name; Llama, Mistral, Qwen and their kin")
    parser.add_argument("--pairs", required=True, type=Path, help="a .jsonl file of prompt, chosen, rejected")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--max-length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="minimal")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    pairs = read_pairs(args.pairs, tokenizer, max_length=args.max_length)
    for number, values in enumerate(train(model, pairs, learning_rate=args.learning_rate), start=1):
        print(f"step {number}", *(f"{name} {value:.4f}" for name, value in values.items()), sep="  ", flush=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
