"""Plan an epoch of chat-like pairs and print how long it took, how full rows are and how even the work is.

    python benchmarks/plan.py --pairs 1000000 --pairs-per-step 128 --ranks 8 --budget 8192

Time covers everything but reading tokens: shapes to costs, the epoch's order, the plan of every step for all ranks,
lists of pair indices for one. Lengths are drawn from log-normal distributions: prompts around 150 tokens (4 to 1800),
responses around 250 (2 to 1024); costs are those of Llama-3-8B.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np

from simpo.core.packing import CostWeights, PairShape, fill_to_budget
from simpo.data.loader import StepLoader

LLAMA_8B = CostWeights(attention=8192 / 218103808, head=128256 * 4096 / (32 * 218103808))


@dataclass(frozen=True)
class Lengths:
    """What a `StepLoader` asks a `PairStore` for to make plans."""

    shapes: PairShape
    tokens: np.ndarray
    response_lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def chat_like(num_pairs: int, *, seed: int) -> Lengths:
    """Pairs whose prompts and responses have log-normal lengths."""
    rng = np.random.default_rng(seed)

    def draw(median: int, sigma: float, low: int, high: int) -> np.ndarray:
        return rng.lognormal(np.log(median), sigma, num_pairs).clip(low, high).astype(np.int64)

    shapes = PairShape(draw(150, 0.8, 4, 1800), draw(250, 0.7, 2, 1024), draw(250, 0.7, 2, 1024))
    return Lengths(shapes, shapes.tokens, np.stack([shapes.chosen, shapes.rejected], axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--pairs-per-step", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--budget", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lengths = chat_like(args.pairs, seed=args.seed)

    def loader(rank: int) -> StepLoader:
        return StepLoader(
            lengths,
            pairs_per_step=args.pairs_per_step,
            num_micro_batches=1,
            max_tokens=args.budget,
            seed=args.seed,
            weights=LLAMA_8B,
            rank=rank,
            num_ranks=args.ranks,
        )

    started = time.perf_counter()
    first = loader(0)
    mine = list(first.plans(0, first.steps_per_epoch))
    plan_time_s = time.perf_counter() - started

    others = [list(loader(rank).plans(0, len(mine))) for rank in range(1, args.ranks)]
    costs, tokens = first.costs, lengths.tokens
    rows, uneven, uneven_steps = 0, [], []
    for ranks in zip(mine, *others, strict=True):
        # [rank, micro-batch]; ranks wait for each other after every micro-batch, or only at the end of the step
        loads = np.array([[costs[list(items)].sum() for items in plan.micro_batches] for plan in ranks])
        rows += sum(bool(items) for plan in ranks for items in plan.micro_batches)
        uneven.append(loads.max(axis=0).sum() / loads.mean() / loads.shape[1])
        uneven_steps.append(loads.sum(axis=1).max() / loads.sum(axis=1).mean())
    started = time.perf_counter()
    packed = fill_to_budget(tokens.tolist(), args.budget)
    pack_time_s = time.perf_counter() - started
    lines = {
        "plan of the epoch": f"{plan_time_s:.2f} s",
        "micro-batches a step and rank": f"{rows / len(mine) / args.ranks:.2f}",
        "costliest rank / mean, micro-batch by micro-batch": f"{np.mean(uneven):.4f}",
        "costliest rank / mean, whole steps": f"{np.mean(uneven_steps):.4f}",
        "row fill of that even plan": f"{tokens.sum() / (rows * args.budget):.1%}",
        "row fill of best fit over all pairs": f"{tokens.sum() / (len(packed) * args.budget):.1%}, {pack_time_s:.2f} s",
    }
    print(
        f"{args.pairs:,} pairs of {tokens.mean():.0f} tokens, {args.pairs_per_step} a step, {args.ranks} ranks, "
        f"rows of at most {args.budget:,} tokens"
    )
    for name, value in lines.items():
        print(f"  {name:<52}{value}")


if __name__ == "__main__":
    main()
