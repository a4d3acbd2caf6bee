"""How many planted near-duplicates MinHash finds, and how many of those it finds are some: the table in docs/data.md.

    PYTHONPATH=tests python tests/sweeps/near_duplicates.py FOLDER_OF_PAIRS... [--write docs/data.md] [--speed]

Of each of 1,500 prompts of 20 words or more a copy is planted in which a share of the words, drawn at random, is
replaced by words of other prompts. Precision and recall are against the exact Jaccard similarity of pairs of words, of
all rows that share one: right is what reaches the threshold, or the threshold less `MARGIN`. `--speed` times 100,000
rows beside datasketch (pip install datasketch). Minutes; not in CI.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from simpo.data.cleaning import asked
from simpo.data.near import NUM_HASHES, find_near, sign_words, split_words
from simpo.data.preferences import pair_from_row
from simpo.data.sources import find_sources
from simpo.recipe import load_recipe

SHARES = (0.05, 0.1, 0.2, 0.4)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8)
MARGIN = 0.05


def prompts_of(folders: Sequence[str], count: int = 1500) -> list[list[str]]:
    """The words of different prompts of 20 words or more."""
    recipe = load_recipe({"model_name_or_path": "none", "dataset_mixer": dict.fromkeys(folders, 1.0)})
    words = {}
    for source in find_sources(recipe):
        for row in source.splits["train"]():
            found = split_words(asked(pair_from_row(row)))
            if len(found) >= 20:
                words[" ".join(found)] = found
    return list(words.values())[:count]


def edited(words: Sequence[str], share: float, vocabulary: Sequence[str], rng: random.Random) -> list[str]:
    places = set(rng.sample(range(len(words)), round(share * len(words))))
    return [rng.choice(vocabulary) if index in places else word for index, word in enumerate(words)]


def shingles(words: Sequence[str]) -> set[tuple[str, str]]:
    return set(pairwise(("^", *words, "$")))


def sign_all(rows: Sequence[Sequence[str]]) -> np.ndarray:
    return np.frombuffer(b"".join(sign_words(row) or b"" for row in rows), np.uint8).reshape(-1, NUM_HASHES)


def exact_matches(rows: Sequence[Sequence[str]], least: float) -> dict[int, float]:
    """Row -> its largest Jaccard similarity to an earlier row, where that is at least `least`; through a full index."""
    index: dict[tuple[str, str], list[int]] = {}
    sets, best = [shingles(row) for row in rows], {}
    for number, mine in enumerate(sets):
        shared: dict[int, int] = {}
        for shingle in mine:
            for other in index.setdefault(shingle, []):
                shared[other] = shared.get(other, 0) + 1
            index[shingle].append(number)
        found = max((n / (len(mine) + len(sets[other]) - n) for other, n in shared.items()), default=0.0)
        if found >= least:
            best[number] = found
    return best


def table(prompts: Sequence[Sequence[str]]) -> Iterator[str]:
    rng = random.Random(0)
    vocabulary = sorted({word for words in prompts for word in words})
    yield "| words edited | Jaccard, mean | " + " | ".join(f"found at {each}" for each in THRESHOLDS) + " |"
    yield "|---|---|" + "---|" * len(THRESHOLDS)
    counts = np.zeros((len(THRESHOLDS), 4))  # found, right, nearly right, there
    for share in SHARES:
        copies = [edited(words, share, vocabulary, rng) for words in prompts]
        similar = np.mean([len(a & b) / len(a | b) for a, b in zip(map(shingles, prompts), map(shingles, copies))])
        rows = [*prompts, *copies]
        signatures, exact = sign_all(rows), exact_matches(rows, THRESHOLDS[0] - MARGIN)
        cells = []
        for which, threshold in enumerate(THRESHOLDS):
            near = find_near(signatures, threshold)[0] >= 0
            cells.append(f"{near[len(prompts) :].mean():.1%}")
            similarity = np.array([exact.get(row, 0) for row in range(len(rows))])
            truth, nearly = similarity >= threshold, similarity >= threshold - MARGIN
            counts[which] += near.sum(), (near & truth).sum(), (near & nearly).sum(), truth.sum()
        yield f"| {share:.0%} | {similar:.2f} | {' | '.join(cells)} |"
    found, right, nearly, there = counts.T
    rows = {"precision": right / found, f"precision, less {MARGIN}": nearly / found, "recall": right / there}
    for name, each in rows.items():
        yield f"| {name} | | {' | '.join(f'{value:.1%}' for value in each)} |"


def compare_speed(prompts: Sequence[Sequence[str]], count: int = 100_000) -> Iterator[str]:
    from datasketch import MinHash, MinHashLSH

    rng = random.Random(1)
    vocabulary = sorted({word for words in prompts for word in words})
    rows = [edited(rng.choice(prompts), rng.choice((0.05, 0.4, 0.9)), vocabulary, rng) for _ in range(count)]
    begin = time.process_time()
    near = find_near(sign_all(rows), 0.7)[0] >= 0
    yield f"this package, rensa's signatures: {time.process_time() - begin:.1f} s CPU, {int(near.sum())} found"
    begin, found = time.process_time(), 0
    lsh = MinHashLSH(threshold=0.7, num_perm=NUM_HASHES)
    for number, row in enumerate(rows):
        sketch = MinHash(num_perm=NUM_HASHES)
        sketch.update_batch([f"{a} {b}".encode() for a, b in shingles(row)])
        found += any(lsh_match(lsh, sketch))
        lsh.insert(number, sketch)
    yield f"datasketch: {time.process_time() - begin:.1f} s CPU, {found} with a candidate"
    yield f"peak memory of both together: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def lsh_match(lsh, sketch) -> Iterator[bool]:
    return (True for _ in lsh.query(sketch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--speed", action="store_true")
    arguments = parser.parse_args()
    prompts = prompts_of(arguments.folders)
    print(f"{len(prompts)} prompts, {np.mean([len(each) for each in prompts]):.0f} words in the mean")
    text = "\n".join(compare_speed(prompts) if arguments.speed else table(prompts))
    print(text)
    if arguments.write:
        marks = "<!-- near-duplicates: begin -->\n", "\n<!-- near-duplicates: end -->"
        page = arguments.write.read_text(encoding="utf-8")
        pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
        arguments.write.write_text(re.sub(pattern, text.join(marks).replace("\\", r"\\"), page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
