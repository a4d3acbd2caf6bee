"""Owns the way from recipe to trained tokens: rows -> pairs -> tokens, in parallel, cached, every row in the ledger.

Imports no torch. The cache is keyed by everything that decides the result: the content of the sources, the tokenizer,
the recipe's data keys and this layer's own code (`cache.py`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from simpo.core.packing import SIDES, shared_prefix_length
from simpo.data import sources as source_files
from simpo.data.cache import (
    PAIR_COLUMNS,
    PreparedData,
    cache_folder,
    count_trained,
    fingerprint_data,
    list_lengths,
    load_cached,
    save_cached,
)
from simpo.data.ledger import MARKS, Dropped, Ledger, SplitLedger, describe_lengths
from simpo.data.preferences import Pair, RowError, pair_reader
from simpo.data.sources import RawRow, Source
from simpo.data.templates import CHATML, NO_TEMPLATE, load_chat_template, template_takes_system
from simpo.data.tokenize import PairTokenizer, TokenizedPair
from simpo.data.workers import WorkersFailed, map_in_processes
from simpo.display import progress_bar

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
    limits = _limits(recipe, tokenizer)
    own = {source.label: _own_limits(source, recipe, tokenizer) for source in sources if source.own}
    templates = {label: each["chat_template"] for label, each in own.items()}
    template = None if limits["chat_template"] == NO_TEMPLATE else limits["chat_template"]
    key = fingerprint_data(recipe, tokenizer, sources, [template, templates] if templates else template)
    folder = cache_folder(recipe) / key
    prepared = load_cached(folder, key, console)
    if prepared is None:
        read_pair = source_files.reader_of(recipe, sources, functools.partial(_reader, tokenizer))
        build = functools.partial(RowTokenizer, tokenizer, read_pair, own, **limits)
        splits = source_files.load_splits(recipe, sources, read_pair)
        bars = Console(stderr=True, quiet=not progress)
        ledger, tables = Ledger(notes=splits.notes, fingerprint=key), {}
        for name, rows in (("train", splits.train), ("eval", splits.eval)):
            if rows or name == "train":
                chunks = _tokenize_all(rows, build, recipe.preprocessing_num_workers, bars, name)
                ledger.splits[name], tables[name] = _account(len(rows), chunks, recipe.drop_duplicates, tokenizer)
        if template == CHATML and len(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]) > 1:
            ledger.notes.append("chat_template: this tokenizer writes each of chatml's marks as several tokens")
        if "eval" in tables:
            prompts = {name: table["prompt_key"].to_numpy() for name, table in tables.items()}
            ledger.eval_prompts_in_train = int(np.isin(prompts["eval"], prompts["train"]).sum())
        tables = {name: table.select(list(PAIR_COLUMNS)) for name, table in tables.items()}
        prepared = save_cached(folder, tables, ledger, console)
    for line in prepared.ledger.notices:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    _check_dropped(prepared.ledger, recipe.max_dropped_fraction)
    return prepared


def _limits(recipe: Any, tokenizer: Any) -> dict[str, Any]:
    """What `PairTokenizer` is told by a recipe; the template as Jinja text, or none."""
    asked = recipe.chat_template
    if asked is None and recipe.rendered_text == "keep" and tokenizer.chat_template is None:
        asked = NO_TEMPLATE
    names = ("max_length", "max_prompt_length", "overlong", "train_on", "rendered_text")
    template = load_chat_template(tokenizer, asked) or NO_TEMPLATE
    return {name: getattr(recipe, name) for name in names} | {"chat_template": template}


def _own_limits(source: Source, recipe: Any, tokenizer: Any) -> dict[str, Any]:
    try:
        return _limits(source.settings(recipe), tokenizer)
    except ValueError as error:
        raise ValueError(f"dataset_mixer: {source.name}: {error}") from None


def _reader(tokenizer: Any, recipe: Any) -> Callable[..., Pair]:
    with_empty = recipe.auto_insert_empty_system_msg
    if with_empty:
        template = load_chat_template(tokenizer, _limits(recipe, tokenizer)["chat_template"])
        with_empty = template_takes_system(tokenizer, template)
    return pair_reader(recipe, empty_system=with_empty)


# --- rows to tokens --------------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """What some rows gave: a table of kept pairs, in order, the rows dropped, and what was done to those kept."""

    table: pa.Table
    dropped: list[Dropped]
    noticed: list[Dropped]


class RowTokenizer:
    """Rows to a `Chunk`. Built once in each process.

    Args:
        read_pair: rows to pairs, see `sources.reader_of`.
        own: those of the sources that have arguments of their own, by label.
        limits: further arguments of `PairTokenizer`.
    """

    def __init__(
        self,
        tokenizer: Any,
        read_pair: Callable[..., Pair],
        own: Mapping[str, Mapping[str, Any]] | None = None,
        **limits: Any,
    ):
        self.read_pair = read_pair
        self.tokenize = PairTokenizer(tokenizer, **limits)
        own = {label: each for label, each in (own or {}).items() if each != limits}
        self.own = {label: PairTokenizer(tokenizer, **each) for label, each in own.items()}

    def __call__(self, rows: list[RawRow]) -> Chunk:
        """Every row ends up in the table or among the dropped."""
        pairs: list[Pair] = []
        dropped: list[Dropped] = []
        noticed: list[Dropped] = []
        kept: list[dict[str, Any]] = []
        for row in rows:
            try:
                pairs.append(self.read_pair(row.row, row_id=row.row_id))
            except RowError as error:
                dropped.append(Dropped(row.row_id, error.reason, error.detail))
        for pair, result in zip(pairs, self._tokenized(pairs)):
            if isinstance(result, RowError):
                dropped.append(Dropped(pair.row_id, result.reason, result.detail))
            else:
                kept.append(_columns(pair, result))
                noticed += [Dropped(pair.row_id, what, detail) for what, detail in result.notes.items()]
        return Chunk(pa.Table.from_pylist(kept, _SCHEMA), dropped, noticed)

    def _tokenized(self, pairs: list[Pair]) -> Iterable[TokenizedPair | RowError]:
        """Of each pair, as its source wants it."""
        if not self.own:
            return self.tokenize(pairs)
        sources = groupby(pairs, lambda pair: source_files.source_of(pair.row_id))
        return chain.from_iterable(self.own.get(label, self.tokenize)(list(some)) for label, some in sources)


def _columns(pair: Pair, tokens: TokenizedPair) -> dict[str, Any]:
    # A later pass over the same rows (a fraction above 1) is wanted: it does not duplicate the first.
    later_pass = pair.row_id.rpartition("~")[2] if "~" in pair.row_id else ""
    return {
        **vars(tokens),
        "prompt_key": pair.key(),
        "pair_key": pair.key(pair.chosen, pair.rejected, later_pass),
        "shared_prefix": shared_prefix_length(tokens.chosen_ids, tokens.rejected_ids),
    }


def _tokenize_all(
    rows: list[RawRow], build: Callable[[], RowTokenizer], num_workers: int | None, console: Console, name: str
) -> list[Chunk]:
    """All rows as chunks in order, over several processes where that pays."""
    pieces = [rows[at : at + CHUNK_ROWS] for at in range(0, len(rows), CHUNK_ROWS)]
    chunks: list[Chunk] = []
    with progress_bar(console, f"tokenising {name}", len(rows)) as advance:
        for chunk in _chunks(pieces, build, _num_processes(len(rows), num_workers)):
            advance(len(pieces[len(chunks)]))
            chunks.append(chunk)
    return chunks


def _chunks(pieces: list[list[RawRow]], build: Callable[[], RowTokenizer], num_processes: int) -> Iterator[Chunk]:
    done = 0
    if num_processes > 1:
        try:
            for chunk in map_in_processes(build, pieces, num_processes):
                done += 1
                yield chunk
        except WorkersFailed as error:
            Console(stderr=True).print(f"tokenising in this process alone: {error}", markup=False, highlight=False)
    if done < len(pieces):
        yield from map(build(), pieces[done:])


def _num_processes(num_rows: int, wanted: int | None) -> int:
    """1 stands for this process. At most one for `ROWS_PER_PROCESS` rows; by default at most 8 and the cores."""
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = min(cores, 8)
    return max(1, min(wanted, num_rows // ROWS_PER_PROCESS))


# --- the account -----------------------------------------------------------------------------------------------------


def _account(num_rows: int, chunks: list[Chunk], drop_duplicates: bool, tokenizer: Any) -> tuple[SplitLedger, pa.Table]:
    """The ledger of one split, and the table of its pairs to keep."""
    table = pa.concat_tables([_SCHEMA.empty_table(), *(chunk.table for chunk in chunks)])
    account = SplitLedger(input=num_rows)
    account.add_dropped(row for chunk in chunks for row in chunk.dropped)
    account.add_noticed(row for chunk in chunks for row in chunk.noticed)
    table = _count_duplicates(table, account, drop_duplicates)
    _describe(table, account)
    account.examples = [_example(row, tokenizer) for row in table.slice(0, NUM_EXAMPLES).to_pylist()]
    account.check()
    return account, table


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
    for side, end in (("prompt", "left"), ("chosen", "right"), ("rejected", "right")):
        counts = table[f"{side}_cut"].to_numpy()
        account.cut[f"{side}_{end}"] = {"pairs": int((counts > 0).sum()), "tokens": int(counts.sum())}
    totals = {side: list_lengths(table[f"{side}_ids"]) for side in SIDES}
    account.lengths = {
        "prompt": describe_lengths(table["chosen_start"].to_numpy()),
        **{side: describe_lengths(count_trained(table, side)) for side in SIDES},
    }
    account.tokens = int(totals["chosen"].sum() + totals["rejected"].sum())
    shared = 2 * int(table["shared_prefix"].to_numpy().sum())
    account.shared_prefix_share = shared / account.tokens if account.tokens else 0.0


def _example(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """One pair as decoded text: what is seen and what is trained, for both sides; gaps stand between turned marks."""
    example = {"row_id": row["row_id"]}
    for side in SIDES:
        ids, start = row[f"{side}_ids"], row[f"{side}_start"]
        edges = [0, start, *row[f"{side}_gaps"], len(ids)]
        parts = [tokenizer.decode(ids[a:b], clean_up_tokenization_spaces=False) for a, b in pairwise(edges)]
        example[f"{side}_prompt"] = parts[0]
        example[side] = parts[1] + "".join(
            MARKS[1] + gap + MARKS[0] + more for gap, more in zip(parts[2::2], parts[3::2])
        )
    return example


def _check_dropped(ledger: Ledger, max_dropped_fraction: float) -> None:
    """Stop where the data is not what the recipe expects. Duplicates are dropped on request and do not count."""
    for name, split in ledger.splits.items():
        duplicates = split.dropped.get("duplicate", {"count": 0})["count"]
        dropped = split.num_dropped - duplicates
        if dropped > max_dropped_fraction * split.input:
            raise ValueError(
                f"{dropped} of {split.input} {name} rows are dropped ({dropped / split.input:.1%}), more than "
                f"max_dropped_fraction {max_dropped_fraction:g} allows; correct the data or the keys, or raise it:\n"
                f"{split.top_reasons()}"
            )
    train = ledger.splits["train"]
    if not train.kept:
        raise ValueError(f"none of {train.input} train rows gives a pair:\n{train.top_reasons()}".rstrip(":\n"))
