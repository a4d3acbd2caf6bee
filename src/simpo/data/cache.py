"""Owns the store of prepared pairs: its key, its files, and how they are written whole and read back.

One folder for each key under `cache_dir`: an Arrow stream for each split, ledger.json, the rows that were dropped, and
the digests of all of these. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from simpo.core.packing import SIDES
from simpo.data import sources as source_files
from simpo.data.files import digest_file, load_json, sync, sync_tree
from simpo.data.ledger import Dropped, Ledger
from simpo.data.overlap import benchmark_sources
from simpo.data.sources import Source
from simpo.display import say
from simpo.errors import explain, one_line
from simpo.recipe import KEYS

_IDS = pa.list_(pa.int32())
PAIR_COLUMNS = {
    "row_id": pa.string(),
    "chosen_ids": _IDS,
    "chosen_start": pa.int32(),
    "rejected_ids": _IDS,
    "rejected_start": pa.int32(),
    "chosen_gaps": _IDS,
    "rejected_gaps": _IDS,
    "shared_prefix": pa.int32(),
    "prompt_text": pa.string(),
    "chosen_text": pa.string(),
    "rejected_text": pa.string(),
    "score_chosen": pa.float64(),
    "score_rejected": pa.float64(),
    "more_ids": pa.list_(_IDS),
    "more_starts": _IDS,
    "more_scores": pa.list_(pa.float64()),
}
"""What a prepared dataset holds for each pair; `*_ids` are prompt and response, `*_start` the first trained token,
`*_gaps` the untrained stretches behind it (begin, end, begin, end, ...), `shared_prefix` how many leading tokens the
packed layout computes once; `score_*` null where the row has none;
`more_*` of a list's responses between the best and the worst."""
_PAIRS = pa.schema(PAIR_COLUMNS)
_ASIDE = ".new-"
BATCH_ROWS = 4096
"""Pairs to a record batch: a few MB, so that a mapped store of millions is a few thousand pieces."""
_LARGE = 1 << 22
"""Bytes from which an array lies in a file."""
_DROPPED = "dropped.jsonl"
_DIGESTS = "digests.json"


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """[rows] lengths of a column of lists, from Arrow's offsets: nothing is copied to count it."""
    return pc.call_function("list_value_length", [column]).to_numpy()


def flatten(column: pa.ChunkedArray) -> np.ndarray:
    """All numbers of a column of lists."""
    return pc.call_function("list_flatten", [column]).to_numpy()


def count_trained(table: pa.Table, side: str) -> np.ndarray:
    """[rows] trained tokens of one side's responses; the column of gaps may be missing."""
    counts = list_lengths(table[f"{side}_ids"]).astype(np.int64) - table[f"{side}_start"].to_numpy()
    if f"{side}_gaps" in table.column_names:
        gaps = table[f"{side}_gaps"]
        edges, sizes = flatten(gaps), list_lengths(gaps) // 2
        owners = np.repeat(np.arange(len(sizes)), sizes)
        counts -= np.bincount(owners, edges[1::2] - edges[::2], len(sizes)).astype(np.int64)
    return counts


@dataclass
class PreparedData:
    """Token datasets with the columns `PAIR_COLUMNS`, and the ledger of how they came about.

    `dropped` is the store's list of the rows that were dropped, a JSON line each; None where there is no store.
    """

    train: Any  # datasets.Dataset | None
    eval: Any  # datasets.Dataset | None
    ledger: Ledger
    dropped: Path | None = None

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over the tokens of both, see `fingerprint_tokens`."""
        prints = [fingerprint_tokens(dataset) for dataset in (self.train, self.eval) if dataset is not None]
        return hashlib.sha256(" ".join(prints).encode()).hexdigest()[:32]

    def save_ledger(self, path: Path) -> Path | None:
        """Write the ledger, and beside it the list of all rows that were dropped; the list's path, if there is one."""
        self.ledger.save(path)
        beside = path.with_suffix(".dropped.jsonl")
        if self.dropped is None or not any(split.dropped for split in self.ledger.splits.values()):
            beside.unlink(missing_ok=True)
            return None
        shutil.copyfile(self.dropped, beside)
        return beside


def fingerprint_tokens(dataset: Any) -> str:
    """32 hex digits over the tokens of all pairs in their order, and what of them is trained; over nothing else.

    Args:
        dataset: a datasets.Dataset with the columns of token pairs.
    """
    digest = hashlib.sha256()
    names = [name for side in SIDES for name in (f"{side}_ids", f"{side}_start", f"{side}_gaps")]
    names = [name for name in names if name in dataset.column_names]
    numbers: dict[str, list[np.ndarray]] = {}
    for table in scan(dataset, names):
        for name in names:
            parts = (
                {name: table[name].to_numpy()} if name.endswith("_start") else {f"#{name}": list_lengths(table[name])}
            )
            parts |= {name: flatten(table[name])} if name.endswith("_gaps") else {}
            for part, values in parts.items():  # copied: a view would hold all that was read with it
                numbers.setdefault(part, []).append(values.astype("<i4", copy=True))
    whole = {name: np.concatenate(parts) for name, parts in numbers.items()}
    for side in SIDES:
        digest.update(whole[f"#{side}_ids"].data)
        for table in scan(dataset, [f"{side}_ids"]):
            digest.update(np.ascontiguousarray(flatten(table[f"{side}_ids"]), dtype="<i4").data)
        if f"#{side}_gaps" in whole and whole[f"#{side}_gaps"].any():
            digest.update(whole[f"#{side}_gaps"].data)
            digest.update(whole[f"{side}_gaps"].data)
        digest.update(whole[f"{side}_start"].data)
    more = [name for name in ("more_ids", "more_starts") if name in dataset.column_names]
    for table in scan(dataset, more) if more else ():
        for name in more if list_lengths(table["more_ids"]).any() else ():
            digest.update(list_lengths(table[name]).astype("<i4").data)
            values = table[name] if name == "more_starts" else pc.call_function("list_flatten", [table[name]])
            digest.update(list_lengths(values).astype("<i4").data if name == "more_ids" else b"")
            digest.update(np.ascontiguousarray(flatten(values), dtype="<i4").data)
    return digest.hexdigest()[:32]


def scan(dataset: Any, columns: list[str]) -> Iterator[pa.Table]:
    """Columns of a dataset, some thousand rows at a time, for passes over all of it.

    What is mapped from a file is read from it instead: the pages that such a pass maps would all count as this
    process's memory.
    """
    from datasets.table import MemoryMappedTable

    mapped = dataset.data
    is_file = isinstance(mapped, MemoryMappedTable) and dataset._indices is None
    if is_file and all(name == "replace_schema_metadata" for name, *_ in mapped.replays or ()):
        with pa.OSFile(mapped.path) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                yield pa.Table.from_batches([batch]).select(columns)
    else:
        yield from dataset.select_columns(columns).with_format("arrow").iter(BATCH_ROWS)


def fingerprint_data(recipe: Any, tokenizer: Any, sources: list[Source], template: Any) -> str:
    """32 hex digits of everything that decides the prepared tokens; `template` with those of single sources, if any."""
    import tokenizers
    import transformers

    keys = {name: getattr(recipe, name) for name, key in KEYS.items() if key.decides_tokens}
    keys["clean"] = keys["clean"].model_dump(exclude_defaults=True)
    if not source_files.uses_seed(recipe, sources):
        del keys["seed"]
    content = {
        "keys": keys,
        "sources": source_files.fingerprint_sources(sources),
        "benchmarks": source_files.fingerprint_sources(benchmark_sources(recipe)),
        "tokenizer": _fingerprint_tokenizer(tokenizer),
        "template": template,
        "code": _fingerprint_code(),
        "versions": [transformers.__version__, tokenizers.__version__],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _fingerprint_tokenizer(tokenizer: Any) -> str:
    """Vocabulary, rules and special tokens; not the padding or truncation that a call leaves behind."""
    if getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        rules = backend.to_str()
    else:
        rules = sorted(tokenizer.get_vocab().items())
    text = json.dumps([type(tokenizer).__name__, rules, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint_code() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_folder(recipe: Any) -> Path:
    """Where prepared data is stored: `cache_dir`, else in the user's cache."""
    return Path(recipe.cache_dir).expanduser() if recipe.cache_dir else user_cache() / "data"


def user_cache() -> Path:
    """This package's folder in the user's cache; may not exist."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "simpo"
    except RuntimeError:  # a user without a home, as in a container; a shared folder could hold another user's tokens
        return Path.cwd() / ".cache" / "simpo"


def load_cached(folder: Path, key: str, console: Console) -> PreparedData | None:
    """What an earlier call stored, or None; a broken store is put aside with one line said.

    Raises:
        ValueError: the system does not let it be read, which says nothing about what it holds.
    """
    if not folder.is_dir():
        return None
    try:
        for name, digest in load_json(folder / _DIGESTS).items():
            if digest_file(folder / name) != digest:
                raise ValueError(f"{name} is not as it was written")
        ledger = Ledger.load(folder / "ledger.json")
        if ledger.fingerprint != key:
            raise ValueError("it holds other data")
        return _open(folder, ledger)
    except (OSError, ValueError, pa.ArrowException) as error:
        refused = error if isinstance(error, OSError) else error.__cause__
        if isinstance(refused, OSError) and refused.errno not in (None, errno.ENOENT):  # Arrow's own have no number
            raise ValueError(
                f"cache_dir: {folder} cannot be read ({explain(refused)}), and is left as it is; start again, or give "
                "another cache_dir"
            ) from error
        reason = one_line(error, 120)
        say(f"data cache {folder} is broken ({reason}); building it again", console)
        aside = folder.with_name(f"{_ASIDE}{secrets.token_hex(6)}")
        with contextlib.suppress(OSError):  # not removed yet: other runs may have it mapped
            folder.rename(aside)
            os.utime(aside)
        return None


class NotStored(Exception):
    """The store cannot be written; says why. Says nothing about the data."""


class PairWriter:
    """Prepared pairs on their way into the store: written aside as they come, and named when they are whole.

    A context; what has not been stored when it ends is removed.

    Args:
        folder: of the store; None = in memory, where there can be none.
    Raises:
        NotStored: from every method, where a file cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._aside: Path | None = None
        self._files: dict[str, Any] = {}  # split -> the file that is being written
        self._writers: dict[str, Any] = {}
        self._memory: dict[str, pa.Buffer] = {}
        self._waiting: dict[str, list[pa.Table]] = {}

    def __enter__(self) -> PairWriter:
        if self.folder is not None:
            with _storing():
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                _clear_leftovers(self.folder.parent)
                aside = self.folder.with_name(f"{_ASIDE}{secrets.token_hex(6)}")
                aside.mkdir()  # by the umask, which tempfile ignores
                self._aside = aside
        return self

    def __exit__(self, *error: Any) -> None:
        for file in self._files.values():
            file.close()
        if self._aside is not None:
            shutil.rmtree(self._aside, ignore_errors=True)

    def write(self, split: str, table: pa.Table) -> None:
        """Add pairs to a split; an empty table makes it known."""
        with _storing():
            if split not in self._writers:
                path = self._path(split)
                self._files[split] = pa.BufferOutputStream() if path is None else open(path, "wb")  # noqa: SIM115
                self._writers[split] = pa.ipc.new_stream(self._files[split], _PAIRS)
                self._waiting[split] = []
            self._waiting[split].append(table.select(_PAIRS.names))
            if sum(each.num_rows for each in self._waiting[split]) >= BATCH_ROWS:
                self._write_batch(split)

    def _write_batch(self, split: str) -> None:
        if self._waiting[split]:
            self._writers[split].write_table(pa.concat_tables(self._waiting[split]).combine_chunks())
        self._waiting[split] = []

    def listed(self, split: str, rows: Iterable[Dropped]) -> Iterator[Dropped]:
        """The rows, which are not trained on; the store lists each."""
        path = os.devnull if self._aside is None else os.path.join(self._aside, _DROPPED)
        with _storing(), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            for row in rows:
                file.write(json.dumps({"split": split, **row._asdict()}, ensure_ascii=False) + "\n")
                yield row

    def array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array to work with; a large one lies in a file without a name, whose memory the system may take back."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self._aside is None or size < _LARGE or not hasattr(os, "posix_fallocate"):
            return np.empty(shape, dtype)
        with _storing(), tempfile.TemporaryFile(dir=self._aside) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, later it would be a signal
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))

    def read(self, split: str) -> pa.Table:
        """The pairs of a split, mapped; it is complete then."""
        with _storing():
            if split in self._writers:
                self._write_batch(split)
                self._writers.pop(split).close()
                file = self._files.pop(split)
                if self._aside is None:
                    self._memory[split] = file.getvalue()
                else:
                    file.close()
            path = self._path(split)
            source = pa.BufferReader(self._memory[split]) if path is None else pa.memory_map(path)
            return pa.ipc.open_stream(source).read_all()

    def keep(self, split: str, mask: np.ndarray) -> None:
        """Leave out the pairs of a split where `mask` is False."""
        if mask.all():
            return
        self.read(split)  # so that it is complete
        path = self._path(split)
        with _storing():
            # Read, not mapped: see `scan`.
            before = pa.BufferReader(self._memory[split]) if path is None else pa.OSFile(path)
            if path is not None:
                os.unlink(path)  # it is still open
        begin = 0
        self.write(split, _PAIRS.empty_table())
        with before, pa.ipc.open_stream(before) as batches:
            for batch in batches:
                kept = pa.array(mask[begin : begin + len(batch)])
                self.write(split, pa.Table.from_batches([batch]).filter(kept))
                begin += len(batch)

    def store(self, ledger: Ledger) -> PreparedData:
        """Name what is written. The result is mapped from the store, or in memory where there is none."""
        from datasets import Dataset

        tables = {name: self.read(name) for name in ledger.splits}
        if self.folder is None or self._aside is None:
            datasets = {
                name: Dataset(table, fingerprint=f"{ledger.fingerprint}-{name}") for name, table in tables.items()
            }
            return PreparedData(datasets["train"], datasets.get("eval") or None, ledger)
        with _storing():
            aside = self._aside
            ledger.save(aside / "ledger.json")
            digests = {path.name: digest_file(path) for path in sorted(aside.iterdir())}
            (aside / _DIGESTS).write_text(json.dumps(digests, indent=1), encoding="utf-8")
            sync_tree(aside)
            try:
                os.rename(aside, self.folder)
                sync(self.folder.parent)
            except OSError:  # another process may have stored the same meanwhile; then its store stands
                if not (self.folder / "ledger.json").is_file():
                    raise
            return _open(self.folder, ledger)

    def _path(self, split: str) -> str | None:
        return None if self._aside is None else os.path.join(self._aside, f"{split}.arrow")


def _clear_leftovers(parent: Path) -> None:
    """Remove what a killed process left, and broken stores: nobody has written there for a day."""
    for aside in parent.glob(f"{_ASIDE}*"):
        with contextlib.suppress(OSError):  # another process may do the same
            if time.time() - max(file.stat().st_mtime for file in (aside, *aside.iterdir())) > 24 * 3600:
                shutil.rmtree(aside)


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotStored(error.strerror or str(error)) from error


def _open(folder: Path, ledger: Ledger) -> PreparedData:
    """The stored datasets, memory-mapped. Raises ValueError or ArrowException for what is no store of pairs."""
    from datasets import Dataset

    datasets = {}
    for name, account in ledger.splits.items():
        path, count = str(folder / f"{name}.arrow"), 0
        with pa.OSFile(path) as file, pa.ipc.open_stream(file) as batches:  # not mapped: see `scan`
            if not batches.schema.equals(_PAIRS):
                raise ValueError(f"{name} has other columns")
            for batch in batches:
                batch.validate(full=True)  # Arrow follows offsets wherever they lead
                count += len(batch)
        if count != account.kept:
            raise ValueError(f"{name} has {count} rows, the ledger {account.kept}")
        datasets[name] = Dataset.from_file(path)
    return PreparedData(datasets["train"], datasets.get("eval") or None, ledger, folder / _DROPPED)
