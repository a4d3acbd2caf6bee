"""Make many synthetic rows out of real pairs, and watch what a command takes to prepare them.

    python benchmarks/rows.py make rows.jsonl --rows 1000000 --pairs FOLDER
    python benchmarks/rows.py watch simpo audit recipe.yaml
    python benchmarks/rows.py watch python benchmarks/rows.py compare FOLDER --rows 10000000

`make` writes JSON Lines, a JSON list, CSV or Parquet, as the name says: rows of about 270 to 1,500 bytes whose prompts
and answers are put together from different pairs, 1% of them equal to an earlier row. `watch` prints wall and CPU time
and the peak of the resident memory of the command and all its processes together (PSS, so that what they share counts
once): what they hold themselves, and the pages of files that are mapped, which the system takes back when it needs
them. Linux only. `compare` does what follows the tokenisers (the filters of all pairs, the account, the store in
FOLDER) with made-up pairs of four tokens: its memory is what a pair takes while the rest of its split is prepared.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

SIZES = (270, 1500)
SAMPLE_EVERY_S = 0.2


def synthetic_rows(folder: Path, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of prompt, chosen and rejected."""
    rng, recent = random.Random(seed), []
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    asked = [pair["prompt"][-1]["content"] for pair in pairs]
    answers = [pair[side][-1]["content"] for pair in pairs for side in ("chosen", "rejected")]
    while count:
        if recent and rng.random() < 0.01:
            row = rng.choice(recent)
        else:
            prompt = f"{rng.choice(asked)} {rng.choice(asked)} ({rng.randrange(10**6)})"
            row = {"prompt": prompt, "chosen": rng.choice(answers), "rejected": rng.choice(answers)}
            if not SIZES[0] <= len(json.dumps(row)) <= SIZES[1]:
                continue
            recent = [*recent[-999:], row] if rng.random() < 0.01 else recent
        yield row
        count -= 1


def write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """`rows` in the format of the file's name."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema({name: pyarrow.string() for name in ("prompt", "chosen", "rejected")})
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            while some := list(islice(rows, 100_000)):
                writer.write_table(pyarrow.Table.from_pylist(some, schema))
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
            table.writeheader()
            table.writerows(rows)
        elif path.suffix == ".json":
            file.write("[")
            for number, row in enumerate(rows):
                file.write(("," if number else "") + json.dumps(row))
            file.write("]")
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def watch(command: list[str]) -> int:
    """Run it and print what it took; its exit code."""
    start, peaks = time.perf_counter(), {"Pss": 0, "Pss_Anon": 0, "Pss_File": 0}
    process = subprocess.Popen(command)
    while process.poll() is None:
        now = dict.fromkeys(peaks, 0)
        for pid in _tree(process.pid):
            for name, kib in _memory(pid).items():
                now[name] += kib
        peaks = {name: max(peaks[name], now[name]) for name in peaks}
        time.sleep(SAMPLE_EVERY_S)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    total, own, mapped = (kib / 1024 for kib in peaks.values())
    print(
        f"{time.perf_counter() - start:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of CPU; peak of all processes "
        f"{total:.0f} MiB (held {own:.0f} MiB, mapped from files {mapped:.0f} MiB)",
        file=sys.stderr,
    )
    return process.returncode


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has ended
            continue
        for child in children:
            yield from _tree(int(child))


def _memory(pid: int) -> dict[str, int]:
    """KiB by kind."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) for name in ("Pss", "Pss_Anon", "Pss_File") if name in fields}


def compare(folder: Path, count: int) -> None:
    """Filter and store `count` made-up pairs: 1% contradict another, 5% have a signature that others have."""
    import numpy as np
    import pyarrow as pa

    from simpo.data import prepare
    from simpo.data.ledger import Ledger
    from simpo.recipe import load_recipe

    rng, size = np.random.default_rng(0), 4096
    common = rng.integers(0, 256, (size, 128), np.uint8)

    def column(field: pa.Field, rows: range) -> pa.Array:
        n = len(rows)
        if field.name == "row_id":
            return pa.array([f"made-up/train#{row}" for row in rows])
        if field.name == "signature":
            signatures = rng.integers(0, 256, (n, 128), np.uint8)
            alike = rng.random(n) < 0.05
            signatures[alike] = common[rng.integers(0, size, alike.sum())]
            return pa.FixedSizeBinaryArray.from_buffers(field.type, n, [None, pa.py_buffer(signatures.tobytes())])
        if field.name.endswith("_key"):
            keys = rng.integers(-(2**62), 2**62, n)
            return pa.array(np.where(rng.random(n) < 0.01, 7, keys) if field.name == "answers_key" else keys)
        if pa.types.is_boolean(field.type):
            return pa.array(rng.random(n) < 0.5)
        if pa.types.is_list(field.type):
            each = 0 if field.name.endswith("gaps") else 4
            ends = np.arange(n + 1, dtype=np.int32) * each
            return pa.ListArray.from_arrays(ends, pa.array(np.zeros(n * each, np.int32))).cast(field.type)
        return pa.array(np.ones(n)).cast(field.type)

    def tokenised(rows: range, *_: Any) -> Iterator[Any]:
        for at in range(0, len(rows), size):
            some = rows[at : at + size]
            columns = [column(field, some) for field in prepare._SCHEMA]
            yield prepare.Chunk(pa.Table.from_arrays(columns, schema=prepare._SCHEMA), [], [])

    prepare._tokenize_all, prepare._example = tokenised, lambda *_: {}
    clean = {"near_duplicates": True, "leaks": "near", "contradictions": True}
    recipe = load_recipe({"model_name_or_path": "-", "dataset_name": "-", "drop_duplicates": True, "clean": clean})
    splits = argparse.Namespace(train=range(count * 19 // 20), eval=range(count // 20))
    with prepare.PairWriter(folder / "store") as writer:
        print(prepare._write(recipe, None, None, splits, Ledger(fingerprint="store"), None, writer).ledger.splits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    make = parts.add_parser("make")
    make.add_argument("path", type=Path)
    make.add_argument("--rows", type=int, default=1_000_000)
    make.add_argument("--pairs", type=Path, required=True, help="folder with train.jsonl.gz: pairs with messages")
    parts.add_parser("watch").add_argument("command", nargs=argparse.REMAINDER)
    made_up = parts.add_parser("compare")
    made_up.add_argument("folder", type=Path)
    made_up.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    if args.part == "make":
        write(args.path, synthetic_rows(args.pairs, args.rows))
    elif args.part == "compare":
        compare(args.folder, args.rows)
    else:
        raise SystemExit(watch(args.command))


if __name__ == "__main__":
    main()
