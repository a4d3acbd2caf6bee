"""Owns the way from recipe to trained tokens: rows -> pairs -> tokens, in parallel, cached, every row in the ledger.

Imports no torch. The cache is keyed by everything that decides the result: the content of the sources, the tokenizer,
the recipe's data keys and this layer's own code (`cache.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simpo.core.packing import shared_prefix_length
from simpo.data import sources as source_files
from simpo.data.cache import PAIR_COLUMNS, PreparedData, cache_folder, fingerprint_data, load_cached, save_cached
from simpo.data.ledger import Dropped, Ledger, SplitLedger, describe_lengths
from simpo.data.preferences import Pair, RowError, pair_from_row
from simpo.data.sources import RawRow, Source, Splits
from simpo.data.templates import load_chat_template, template_takes_system
from simpo.data.tokenize import PairTokenizer, TokenizedPair
from simpo.data.workers import WorkersFailed, map_in_processes

CHUNK_ROWS = 256
ROWS_PER_PROCESS = 2000
"""Fewer rows than this do not pay for starting one more process."""
NUM_EXAMPLES = 10
"""Pairs that the ledger keeps as text: as many as `simpo audit --examples` may ask for."""

_ACCOUNT_COLUMNS = {
    "prompt_cut": pa.int32(),
    "chosen_cut": pa.int32(),
    "rejected_cut": pa.int32(),
    "seam_shifted": pa.bool_(),
    "prompt_key": pa.int64(),
    "pair_key": pa.int64(),
}
_SCHEMA = pa.schema({**PAIR_COLUMNS, **_ACCOUNT_COLUMNS})


@dataclass(frozen=True)
class RowSettings:
    """How rows become tokens: the part of the recipe that a worker process needs."""

    prompt_column: str | None
    chosen_column: str | None
    rejected_column: str | None
    system_prompt: str | None
    empty_system: bool
    max_length: int
    max_prompt_length: int | None
    overlong: str
    chat_template: str | None


def prepare_pairs(recipe: Any, tokenizer: Any, *, progress: bool = True) -> PreparedData:
    """Everything the recipe's datasets give, as tokens; a second call with the same inputs reads the cache.

    Args:
        recipe: the data keys of `simpo.recipe.Recipe`.
        tokenizer: a transformers tokenizer.
        progress: show a progress bar on a terminal.
    Raises:
        ValueError: a dataset or key is wrong, more than `max_dropped_fraction` of the rows are dropped, no train pair
            is left, or a pair is too long with `overlong: error`.
    """
    return _prepare(recipe, tokenizer, source_files.find_sources(recipe), progress=progress)


def prepare_rows(
    recipe: Any, tokenizer: Any, train: Iterable[Any], evaluation: Iterable[Any] | None = None, *, progress: bool = True
) -> PreparedData:
    """As `prepare_pairs`, of rows in memory; their ids are "dataset/train#12" and "dataset/test#12".

    Args:
        recipe: its data keys, those that name datasets aside. Without evaluation rows `validation_fraction` applies.
        train, evaluation: mappings of columns, in any shape that files may have.
    """
    return _prepare(recipe, tokenizer, [source_files.rows_in_memory(train, evaluation)], progress=progress)


def _prepare(recipe: Any, tokenizer: Any, sources: list[Source], *, progress: bool) -> PreparedData:
    console = Console(stderr=True)
    template = load_chat_template(tokenizer, recipe.chat_template)
    key = fingerprint_data(recipe, tokenizer, sources, template)
    folder = cache_folder(recipe) / key
    prepared = load_cached(folder, key, console)
    if prepared is None:
        splits = source_files.load_splits(recipe, sources)
        settings = _row_settings(recipe, tokenizer, template)
        workers = recipe.preprocessing_num_workers
        chunks = {
            name: _tokenize_all(rows, tokenizer, settings, workers, console if progress else None, name)
            for name, rows in (("train", splits.train), ("eval", splits.eval))
        }
        tables, ledger = _account(splits, chunks, recipe.drop_duplicates, tokenizer)
        ledger.fingerprint = key
        prepared = save_cached(folder, tables, ledger, console)
    _check_dropped(prepared.ledger, recipe.max_dropped_fraction)
    return prepared


# --- one chunk -------------------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """What some rows gave: a table of kept pairs, in order, and the rows dropped."""

    table: pa.Table
    dropped: list[Dropped]


class RowTokenizer:
    """Rows to a `Chunk`. Built once in each process."""

    def __init__(self, tokenizer: Any, settings: RowSettings):
        self.settings = settings
        self.tokenize = PairTokenizer(
            tokenizer,
            max_length=settings.max_length,
            max_prompt_length=settings.max_prompt_length,
            overlong=settings.overlong,
            chat_template=settings.chat_template,
        )

    def __call__(self, rows: list[RawRow]) -> Chunk:
        """Every row ends up in the table or among the dropped."""
        dropped: list[Dropped] = []
        pairs: list[Pair] = []
        for row in rows:
            try:
                pairs.append(self._pair(row))
            except RowError as error:
                dropped.append(Dropped(row.row_id, error.reason, error.detail))
        kept: list[tuple[Pair, TokenizedPair]] = []
        for pair, result in zip(pairs, self.tokenize(pairs)):
            if isinstance(result, RowError):
                dropped.append(Dropped(pair.row_id, result.reason, result.detail))
            else:
                kept.append((pair, result))
        return Chunk(_table(kept), dropped)

    def _pair(self, row: RawRow) -> Pair:
        settings = self.settings
        return pair_from_row(
            row.row,
            row_id=row.row_id,
            prompt_column=settings.prompt_column,
            chosen_column=settings.chosen_column,
            rejected_column=settings.rejected_column,
            system_prompt=settings.system_prompt,
            empty_system=settings.empty_system,
        )


def _table(kept: list[tuple[Pair, TokenizedPair]]) -> pa.Table:
    columns: dict[str, list] = {name: [] for name in _SCHEMA.names}
    for pair, tokens in kept:
        prompt = [pair.prompt] if isinstance(pair.prompt, str) else [t for turn in pair.prompt for t in turn.values()]
        # A later pass over the same rows (a fraction above 1) is asked for, so it is no duplicate of the first.
        later_pass = pair.row_id.rpartition("~")[2] if "~" in pair.row_id else ""
        columns["prompt_key"].append(_key(*prompt))
        columns["pair_key"].append(_key(*prompt, pair.chosen, pair.rejected, later_pass))
        columns["shared_prefix"].append(_shared_prefix(tokens))
        for name in _SCHEMA.names:
            if name not in ("shared_prefix", "prompt_key", "pair_key"):
                columns[name].append(getattr(tokens, name))
    return pa.table({name: pa.array(values, _SCHEMA.field(name).type) for name, values in columns.items()}, _SCHEMA)


def _key(*texts: str) -> int:
    """A 64-bit hash that tells lists of texts apart."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        content = text.encode()
        digest.update(b"%d " % len(content))
        digest.update(content)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _shared_prefix(tokens: TokenizedPair) -> int:
    """`shared_prefix_length`, without walking over the prompt where it is the same on both sides."""
    known = min(tokens.chosen_start, tokens.rejected_start)
    if tokens.chosen_ids[:known] != tokens.rejected_ids[:known]:
        known = 0
    return known + shared_prefix_length(tokens.chosen_ids[known:], tokens.rejected_ids[known:])


# --- all rows --------------------------------------------------------------------------------------------------------


def _row_settings(recipe: Any, tokenizer: Any, template: str | None) -> RowSettings:
    wants_empty = recipe.auto_insert_empty_system_msg
    return RowSettings(
        prompt_column=recipe.prompt_column,
        chosen_column=recipe.chosen_column,
        rejected_column=recipe.rejected_column,
        system_prompt=recipe.system_prompt,
        empty_system=wants_empty and template_takes_system(tokenizer, template),
        max_length=recipe.max_length,
        max_prompt_length=recipe.max_prompt_length,
        overlong=recipe.overlong,
        chat_template=template,
    )


def _tokenize_all(
    rows: list[RawRow],
    tokenizer: Any,
    settings: RowSettings,
    num_workers: int | None,
    console: Console | None,
    name: str,
) -> list[Chunk]:
    """All rows as chunks in order, over several processes where that pays."""
    pieces = [rows[at : at + CHUNK_ROWS] for at in range(0, len(rows), CHUNK_ROWS)]
    done: dict[int, Chunk] = {}
    with _bar(console, f"tokenising {name}", len(rows)) as advance:
        for index, chunk in _chunks(pieces, tokenizer, settings, _num_processes(len(rows), num_workers)):
            done[index] = chunk
            advance(len(pieces[index]))
    return [done[index] for index in range(len(pieces))]


def _chunks(
    pieces: list[list[RawRow]], tokenizer: Any, settings: RowSettings, num_processes: int
) -> Iterator[tuple[int, Chunk]]:
    done: set[int] = set()
    if num_processes > 1:
        try:
            for index, chunk in map_in_processes(RowTokenizer, (tokenizer, settings), pieces, num_processes):
                done.add(index)
                yield index, chunk
        except WorkersFailed as error:
            Console(stderr=True).print(f"tokenising in this process alone: {error}", markup=False, highlight=False)
    if len(done) < len(pieces):
        tokenize = RowTokenizer(tokenizer, settings)
        for index, piece in enumerate(pieces):
            if index not in done:
                yield index, tokenize(piece)


def _num_processes(num_rows: int, wanted: int | None) -> int:
    """1 stands for this process. At most one for `ROWS_PER_PROCESS` rows; by default at most 8 and the cores."""
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = min(cores, 8)
    return max(1, min(wanted, num_rows // ROWS_PER_PROCESS))


@contextlib.contextmanager
def _bar(console: Console | None, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, elsewhere nothing. Gives a function that advances it."""
    if console is None or not console.is_terminal or not total:
        yield lambda count: None
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


# --- the account -----------------------------------------------------------------------------------------------------


def _account(
    splits: Splits, chunks: dict[str, list[Chunk]], drop_duplicates: bool, tokenizer: Any
) -> tuple[dict[str, pa.Table], Ledger]:
    """Tables of the pairs to keep, and the ledger over everything."""
    ledger = Ledger(notes=list(splits.notes))
    tables: dict[str, pa.Table] = {}
    prompts: dict[str, np.ndarray] = {}
    for name, num_rows in (("train", len(splits.train)), ("eval", len(splits.eval))):
        if not num_rows and name == "eval":
            continue
        table = pa.concat_tables([chunk.table for chunk in chunks[name]]) if num_rows else _SCHEMA.empty_table()
        account = SplitLedger(input=num_rows)
        account.add_dropped(row for chunk in chunks[name] for row in chunk.dropped)
        table = _count_duplicates(table, account, drop_duplicates)
        _describe(table, account)
        account.examples = [_example(row, tokenizer) for row in table.slice(0, NUM_EXAMPLES).to_pylist()]
        account.check()
        ledger.splits[name] = account
        prompts[name] = table["prompt_key"].to_numpy()
        tables[name] = table.select(list(PAIR_COLUMNS))
    if "eval" in prompts:
        ledger.eval_prompts_in_train = int(np.isin(prompts["eval"], prompts["train"]).sum())
    return tables, ledger


def _count_duplicates(table: pa.Table, account: SplitLedger, drop: bool) -> pa.Table:
    """Count rows equal to an earlier one; without them if `drop`."""
    _, first = np.unique(table["pair_key"].to_numpy(), return_index=True)
    is_first = np.zeros(table.num_rows, dtype=bool)
    is_first[first] = True
    account.duplicates = int(table.num_rows - len(first))
    if not drop or not account.duplicates:
        return table
    repeated = table.filter(pa.array(~is_first))["row_id"].to_pylist()
    account.add_dropped(Dropped(row_id, "duplicate", "equal to an earlier row") for row_id in repeated)
    return table.filter(pa.array(is_first))


def _describe(table: pa.Table, account: SplitLedger) -> None:
    """Counts and lengths of the kept pairs."""
    account.kept = table.num_rows
    account.seam_shifted = int(table["seam_shifted"].to_numpy().sum())
    account.same_prompt = int(table.num_rows - len(np.unique(table["prompt_key"].to_numpy())))
    for place, column in (
        ("prompt_left", "prompt_cut"),
        ("chosen_right", "chosen_cut"),
        ("rejected_right", "rejected_cut"),
    ):
        counts = table[column].to_numpy()
        account.cut[place] = {"pairs": int((counts > 0).sum()), "tokens": int(counts.sum())}
    totals = {side: _list_lengths(table[f"{side}_ids"]) for side in ("chosen", "rejected")}
    starts = {side: table[f"{side}_start"].to_numpy() for side in ("chosen", "rejected")}
    account.lengths = {
        "prompt": describe_lengths(starts["chosen"]),
        "chosen": describe_lengths(totals["chosen"] - starts["chosen"]),
        "rejected": describe_lengths(totals["rejected"] - starts["rejected"]),
    }
    account.tokens = int(totals["chosen"].sum() + totals["rejected"].sum())
    shared = 2 * int(table["shared_prefix"].to_numpy().sum())
    account.shared_prefix_share = shared / account.tokens if account.tokens else 0.0


def _list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    import pyarrow.compute

    return pyarrow.compute.list_value_length(column).to_numpy()


def _example(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """One pair as decoded text: what is seen and what is trained, for both sides."""
    example = {"row_id": row["row_id"]}
    for side in ("chosen", "rejected"):
        ids, start = row[f"{side}_ids"], row[f"{side}_start"]
        example[f"{side}_prompt"] = tokenizer.decode(ids[:start], clean_up_tokenization_spaces=False)
        example[side] = tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)
    return example


def _check_dropped(ledger: Ledger, max_dropped_fraction: float) -> None:
    """Stop where the data is not what the recipe takes it for. Duplicates were asked to go and do not count."""
    for name, split in ledger.splits.items():
        duplicates = split.dropped.get("duplicate", {"count": 0})["count"]
        dropped = split.num_dropped - duplicates
        if dropped > max_dropped_fraction * split.input:
            raise ValueError(
                f"{dropped} of {split.input} {name} rows are dropped ({dropped / split.input:.1%}), more than "
                f"max_dropped_fraction {max_dropped_fraction:g} allows; mend the data or the keys, or raise it:\n"
                f"{split.top_reasons()}"
            )
    train = ledger.splits["train"]
    if not train.kept:
        raise ValueError(f"no train pair is left of {train.input} rows:\n{train.top_reasons()}".rstrip(":\n"))
