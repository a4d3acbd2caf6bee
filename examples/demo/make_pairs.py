"""Preference pairs from the model's own samples, as in the SimPO paper (arXiv:2405.14734).

Each prompt gets several responses from the policy; `rule.py` scores them in place of the paper's reward model; the best
becomes `chosen`, the worst `rejected`. Prompts where the rule sees too little difference, or where even the best
response is poor or cut by the token limit, are sampled once more, then left out. Writes `pairs/train.jsonl`,
`pairs/test.jsonl` (other prompts) and `pairs/README.md` with the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from get_model import NAME, get_model
from rule import count_words, repetition, score

HERE = Path(__file__).parent
Row = dict[str, Any]


def build_pair(row: Row, *, min_gap: float, min_chosen: float, source: str) -> Row | None:
    """Best against worst of one prompt's samples, or None.

    Args:
        row: `{"id", "prompt", "samples": [{"text", "num_tokens", "finished"}]}`.
        min_gap: least difference of the two scores.
        min_chosen: least score of the chosen response.
        source: what made the responses; copied into the pair.
    """
    scored = [(score(row["prompt"], s["text"]).total, s) for s in row["samples"]]
    # On equal scores the earlier sample wins: no hidden preference, and the same pair every time.
    best = max((x for x in scored if x[1]["finished"]), key=lambda x: x[0], default=None)
    worst = min(scored, key=lambda x: x[0])
    if best is None or best[0] < min_chosen or best[0] - worst[0] < min_gap or not worst[1]["text"]:
        return None
    return {
        "id": row["id"],
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": best[1]["text"]}],
        "rejected": [{"role": "assistant", "content": worst[1]["text"]}],
        "score_chosen": round(best[0], 4),
        "score_rejected": round(worst[0], 4),
        "source": source,
    }


def split_pairs(pairs: Sequence[Row], *, num_train: int, num_test: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Seeded split by prompt; pairs over both counts are left out.

    Raises:
        ValueError: fewer pairs than `num_train + num_test`.
    """
    if len(pairs) < num_train + num_test:
        raise ValueError(
            f"{len(pairs)} pairs are fewer than {num_train} + {num_test}; "
            "sample more (--num-samples), or lower --num-train, --num-test or --min-gap"
        )
    shuffled = random.Random(seed).sample(list(pairs), len(pairs))
    return shuffled[num_test : num_test + num_train], shuffled[:num_test]


def merge_samples(rows: Sequence[Row]) -> list[Row]:
    """One row per prompt with all its samples, in the order of first appearance."""
    merged: dict[str, Row] = {}
    for row in rows:
        earlier = merged.setdefault(row["id"], {**row, "samples": []})
        if earlier["prompt"] != row["prompt"]:
            raise ValueError(f"samples of {row['id']} answer two prompts: {earlier['prompt']!r}, {row['prompt']!r}")
        merged[row["id"]] = {**earlier, "samples": earlier["samples"] + row["samples"]}
    return list(merged.values())


def describe(rows: Sequence[Row]) -> str:
    """Markdown table: mean score, words and repetition of each side."""
    lines = ["| side | mean score | median words | mean words | mean repetition |", "|---|---|---|---|---|"]
    for side in ("chosen", "rejected"):
        texts = [row[side][0]["content"] for row in rows]
        words = [count_words(text) for text in texts]
        lines.append(
            f"| {side} | {statistics.mean(row['score_' + side] for row in rows):.3f} "
            f"| {statistics.median(words):.0f} | {statistics.mean(words):.1f} "
            f"| {statistics.mean(map(repetition, texts)):.3f} |"
        )
    return "\n".join(lines)


def load_rows(path: Path) -> list[Row]:
    """JSON lines; the error of a bad line names it."""
    rows = []
    # Not str.splitlines: it also splits at characters that JSON strings may hold, such as U+2028.
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from error
    return rows


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Sample responses to the prompts, score them by the rule, write preference pairs."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "pairs", help="folder to write")
    parser.add_argument("--samples", type=Path, nargs="+", help="files of sample.py to score instead of sampling now")
    parser.add_argument("--keep-samples", type=Path, help="file for the samples drawn now, to score again later")
    parser.add_argument("--rounds", type=int, default=2, help="of sampling; later ones for prompts without a pair")
    parser.add_argument("--model", help="model folder; without it SmolLM2-135M-Instruct, fetched if need be")
    parser.add_argument("--num-samples", type=int, default=8, help="responses per prompt")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of the split")
    parser.add_argument("--min-gap", type=float, default=0.3, help="least difference of scores in a pair")
    parser.add_argument("--min-chosen", type=float, default=0.6, help="least score of a chosen response")
    parser.add_argument("--num-train", type=int, default=420)
    parser.add_argument("--num-test", type=int, default=88)
    args = parser.parse_args()

    name = Path(args.model or os.environ.get("MODEL") or NAME).name

    def to_pair(row: Row) -> Row | None:
        return build_pair(row, min_gap=args.min_gap, min_chosen=args.min_chosen, source=name)

    if args.samples:
        rows = merge_samples([row for path in args.samples for row in load_rows(path)])
    else:
        rows = _draw(args, to_pair)
    if args.keep_samples:
        save_rows(args.keep_samples, rows)
    made = [to_pair(row) for row in rows]
    pairs = [pair for pair in made if pair]
    train, test = split_pairs(pairs, num_train=args.num_train, num_test=args.num_test, seed=args.seed)
    save_rows(args.out / "train.jsonl", train)
    save_rows(args.out / "test.jsonl", test)
    (args.out / "README.md").write_text(_readme(args, rows, pairs, train, test, name), encoding="utf-8")
    print(f"{len(pairs)} of {len(rows)} prompts gave a pair; wrote {len(train)} + {len(test)} to {args.out}")
    print(describe(train))


def _draw(args: argparse.Namespace, to_pair: Callable[[Row], Row | None]) -> list[Row]:
    """Samples in rounds: every prompt, then those that gave no pair with the next seed."""
    from sample import sample_responses, to_rows

    model, rows = get_model(args.model), load_rows(args.prompts)
    missing, drawn = rows, [{"id": row["id"], "prompt": row["prompt"], "samples": []} for row in rows]
    for number in range(args.rounds):
        texts = [row["prompt"] for row in missing]
        samples = sample_responses(
            model,
            texts,
            num_samples=args.num_samples,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed + number,
        )
        drawn = merge_samples([*drawn, *to_rows([row["id"] for row in missing], texts, samples)])
        missing = [row for row in drawn if to_pair(row) is None]
        if not missing:
            break
    return drawn


def _readme(
    args: argparse.Namespace, rows: list[Row], pairs: list[Row], train: list[Row], test: list[Row], name: str
) -> str:
    scores = [score(row["prompt"], s["text"]).total for row in rows for s in row["samples"]]
    finished = [s["finished"] for row in rows for s in row["samples"]]
    tokens = [s["num_tokens"] for row in rows for s in row["samples"]]
    facts = {
        "samples": f"{len(scores)}, {statistics.mean(tokens):.0f} tokens on average",
        "ended before the token limit": f"{100 * statistics.mean(finished):.0f}%",
        "mean score of all samples": f"{statistics.mean(scores):.3f}",
        "prompts that gave a pair": f"{len(pairs)} of {len(rows)} (chosen complete, its score at least "
        f"{args.min_chosen}; gap at least {args.min_gap})",
        "`train.jsonl`, `test.jsonl`": f"{len(train)} and {len(test)} pairs, no prompt in both",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""# On-policy preference pairs of the demo

Made by `make_pairs.py` (this file too), in the manner of the SimPO paper: {args.num_samples} responses to each of
{len(rows)} prompts (`../prompts.jsonl`, written for this project), {args.num_samples} more where these gave no pair,
sampled from {name} itself at temperature {args.temperature}, top-p 0.95, at most {args.max_new_tokens} new tokens,
seed {args.seed} (then {args.seed + 1}), bf16 on the CPU; scored by `../rule.py`; best against worst.
The rule prefers brief, direct, complete, unrepetitive answers.
It cannot tell what is true, nor can a model of this size: the pairs teach manners, not facts.

    python examples/demo/make_pairs.py

| | |
|---|---|
{table}

## Train
{describe(train)}

## Test
{describe(test)}

Fields: `id`, `prompt`, `chosen`, `rejected` (message lists), `score_chosen`, `score_rejected`, `source`.
Licence: Apache-2.0. The prompts and the rule are this project's; the responses were generated by SmolLM2-135M-Instruct,
itself under Apache-2.0.
"""


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
