"""Owns the way from recipe to trained tokens: rows -> pairs -> tokens, in parallel, cached, every row in the ledger.

Rows come from their sources a chunk at a time, and their tokens go to the store at once; what stays in memory are a few
numbers for each pair (`_numbers`), from which the account is made, and what depends on all rows is decided. Imports no
torch. The cache is keyed by everything that decides the result: the content of the sources, the tokenizer,
the recipe's data keys and this layer's own code (`cache.py`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
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
    NotStored,
    PairWriter,
    PreparedData,
    cache_folder,
    count_trained,
    fingerprint_data,
    list_lengths,
    load_cached,
)
from simpo.data.cleaning import FINDINGS, REASONS, PairCleaner, find_numbers
from simpo.data.columns import between
from simpo.data.ledger import MARKS, Dropped, Ledger, SplitLedger, describe_lengths
from simpo.data.overlap import read_benchmarks
from simpo.data.preferences import Pair, RowError, pair_reader
from simpo.data.review import Review
from simpo.data.rows import RawRow, Rows, later_pass, source_of
from simpo.data.sources import Source, Splits
from simpo.data.templates import (
    CHATML,
    DAY,
    NO_TEMPLATE,
    follows_clock,
    load_chat_template,
    on_one_day,
    template_takes_system,
)
from simpo.data.tokenize import PairTokenizer, TokenizedPair
from simpo.data.workers import map_rows
from simpo.display import counter, say

NOT_LISTED = "response of a list left out"
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
_SCHEMA = pa.schema({**PAIR_COLUMNS, **_ACCOUNT_COLUMNS, **FINDINGS})


def prepare_pairs(recipe: Any, tokenizer: Any, *, progress: bool = True, checks: bool = True) -> PreparedData:
    """Everything the recipe's datasets give, as tokens; a second call with the same inputs reads the cache.

    Args:
        recipe: the data keys of `simpo.recipe.Recipe`.
        tokenizer: a transformers tokenizer.
        progress: show a progress bar on a terminal.
        checks: False leaves `check_dropped` to the caller, who looks at the ledger first.
    Raises:
        ValueError: a dataset or key is wrong, more than `max_dropped_fraction` of the rows are dropped, no train pair
            is left, or a pair is too long with `overlong: error`.
    """
    prepared = _prepare(recipe, tokenizer, source_files.find_sources(recipe), progress=progress)
    if checks:
        advice = " (`simpo audit --output FILE` lists them all)"
        check_dropped(prepared.ledger, recipe.max_dropped_fraction, advice=advice)
    return prepared


def prepare_rows(
    recipe: Any, tokenizer: Any, train: Iterable[Any], evaluation: Iterable[Any] | None = None, *, progress: bool = True
) -> PreparedData:
    """As `prepare_pairs`, of rows in memory; their ids are "dataset/train#12" and "dataset/test#12".

    Args:
        recipe: its data keys, those that name datasets aside. Without evaluation rows `validation_fraction` applies.
        train, evaluation: mappings of columns, in any shape that files may have.
    """
    prepared = _prepare(recipe, tokenizer, [source_files.rows_in_memory(train, evaluation)], progress=progress)
    check_dropped(prepared.ledger, recipe.max_dropped_fraction)
    return prepared


def _prepare(recipe: Any, tokenizer: Any, sources: list[Source], *, progress: bool) -> PreparedData:
    console = Console(stderr=True, soft_wrap=True)
    limits = token_limits(recipe, tokenizer)
    own = {source.label: _own_limits(source, recipe, tokenizer) for source in sources if source.own}
    templates = {label: each["chat_template"] for label, each in own.items()}
    template = None if limits["chat_template"] == NO_TEMPLATE else limits["chat_template"]
    key = fingerprint_data(recipe, tokenizer, sources, [template, templates] if templates else template)
    folder = cache_folder(recipe) / key
    prepared = load_cached(folder, key, console)
    if prepared is None:
        read_pair = source_files.reader_of(
            recipe, sources, lambda each: pair_reader(each, empty_system=inserts_empty_system(tokenizer, each))
        )
        examine = PairCleaner(recipe.clean, read_benchmarks(recipe))
        lists = {source.label for source in sources if recipe.keep_lists and not _names_pair(source.settings(recipe))}
        build = functools.partial(RowTokenizer, tokenizer, read_pair, examine, own, lists=lists, **limits)
        splits = source_files.load_splits(recipe, sources, read_pair)
        bars = Console(stderr=True, quiet=not progress)
        ledger = Ledger(notes=splits.notes, fingerprint=key)
        if recipe.keep_lists and (pairs := [source.name for source in sources if source.label not in lists]):
            where = f" on {', '.join(pairs)}" if lists else ""
            ledger.notes.append(
                f"keep_lists: without effect{where}: chosen_column or rejected_column names a pair alone"
            )
        if template == CHATML and len(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]) > 1:
            ledger.notes.append("chat_template: this tokenizer writes each of chatml's marks as several tokens")
        texts = [each for each in (template, *templates.values()) if each]
        if any(on_one_day(each) != each for each in texts):
            ledger.notes.append(f"chat_template: it writes today's date; {DAY} stands for it, on every day")
        if any(map(follows_clock, texts)):
            ledger.notes.append(
                "chat_template: it writes the time it is; on another day the same rows are other tokens"
            )
        write = functools.partial(_write, recipe, tokenizer, build, splits, ledger, bars)
        try:
            with PairWriter(folder) as writer:
                prepared = write(writer)
        except NotStored as error:
            say(f"data cache not written to {folder.parent}: {error}", console)
            with PairWriter(None) as writer:
                prepared = write(writer)
    for line in prepared.ledger.notices:
        say(line, console)
    return prepared


def _write(
    recipe: Any,
    tokenizer: Any,
    build: Callable[[], RowTokenizer],
    splits: Splits,
    ledger: Ledger,
    bars: Console,
    writer: PairWriter,
) -> PreparedData:
    """The chosen rows as tokens, stored, and their account."""
    ledger = ledger.model_copy(deep=True)
    numbers: dict[str, _Numbers] = {}
    for name, rows in (("train", splits.train), ("eval", splits.eval)):
        if len(rows) or name == "train":
            account = ledger.splits[name] = SplitLedger(input=len(rows))
            with contextlib.closing(_tokenize_all(rows, build, recipe.preprocessing_num_workers, bars, name)) as chunks:
                numbers[name] = _write_split(chunks, name, account, writer)
    kept = _choose(numbers, ledger, writer, recipe)
    for name, keep in kept.items():
        account = ledger.splits[name]
        writer.keep(name, keep)
        _describe(numbers[name], keep, account)
        pairs = writer.read(name)
        account.add_kept(row_id for chunk in pairs["row_id"].chunks for row_id in chunk.to_pylist())
        account.examples = [_example(row, tokenizer) for row in pairs.slice(0, NUM_EXAMPLES).to_pylist()]
        account.check()
    if "eval" in numbers:
        prompts = {name: each["prompt_key"][kept[name]] for name, each in numbers.items()}
        ledger.eval_prompts_in_train = int(np.isin(prompts["eval"], prompts["train"]).sum())
    return writer.store(ledger)


def token_limits(recipe: Any, tokenizer: Any) -> dict[str, Any]:
    """What `PairTokenizer` is told by a recipe; the template as Jinja text, or none."""
    asked = recipe.chat_template
    if asked is None and recipe.rendered_text == "keep" and tokenizer.chat_template is None:
        asked = NO_TEMPLATE
    names = ("max_length", "max_prompt_length", "overlong", "train_on", "rendered_text")
    template = load_chat_template(tokenizer, asked) or NO_TEMPLATE
    return {name: getattr(recipe, name) for name in names} | {"chat_template": template}


def _own_limits(source: Source, recipe: Any, tokenizer: Any) -> dict[str, Any]:
    try:
        return token_limits(source.settings(recipe), tokenizer)
    except ValueError as error:
        raise ValueError(f"dataset_mixer: {source.name}: {error}") from None


def _names_pair(recipe: Any) -> bool:
    """Whether columns are named that hold a pair alone, whatever list stands beside them."""
    return bool(recipe.chosen_column or recipe.rejected_column)


def inserts_empty_system(tokenizer: Any, recipe: Any) -> bool:
    """Whether prompts without a system turn get an empty one: as the recipe asks, where the template takes it."""
    if not recipe.auto_insert_empty_system_msg:
        return False
    template = load_chat_template(tokenizer, token_limits(recipe, tokenizer)["chat_template"])
    return template_takes_system(tokenizer, template)


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
        examine: what a pair shows, as `cleaning.FINDINGS`; raises RowError for one that is filtered.
        own: those of the sources that have arguments of their own, by label.
        lists: labels of the sources whose scored lists keep the responses between the best and the worst too.
        limits: further arguments of `PairTokenizer`.
    """

    def __init__(
        self,
        tokenizer: Any,
        read_pair: Callable[..., Pair],
        examine: Callable[[Pair], dict[str, Any]],
        own: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        lists: Collection[str] = (),
        **limits: Any,
    ):
        self.read_pair, self.examine, self.lists = read_pair, examine, lists
        self.tokenize = PairTokenizer(tokenizer, **limits)
        own = {label: each for label, each in (own or {}).items() if each != limits}
        self.own = {label: PairTokenizer(tokenizer, **each) for label, each in own.items()}

    def __call__(self, rows: list[RawRow]) -> Chunk:
        """Every row ends up in the table or among the dropped."""
        pairs: list[Pair] = []
        others: list[list[tuple[Pair, float]]] = []
        findings: list[dict[str, Any]] = []
        dropped: list[Dropped] = []
        noticed: list[Dropped] = []
        kept: list[dict[str, Any]] = []
        for row in rows:
            try:
                pair = self.read_pair(row.row, row_id=row.row_id)
                findings.append(self.examine(pair))
                pairs.append(pair)
                others.append(self._read_others(row, noticed) if source_of(row.row_id) in self.lists else [])
            except RowError as error:
                dropped.append(Dropped(row.row_id, error.reason, error.detail))
        more = iter(self._tokenized([pair for some in others for pair, _ in some]))
        for pair, found, some, result in zip(pairs, findings, others, self._tokenized(pairs)):
            answers = [(score, next(more)) for _, score in some]
            if isinstance(result, RowError):
                dropped.append(Dropped(pair.row_id, result.reason, result.detail))
            else:
                fitting, unfit = _fitting(pair.row_id, result, answers)
                kept.append(_columns(pair, result, fitting) | found)
                noticed += unfit
                noticed += [Dropped(pair.row_id, what, detail) for what, detail in result.notes.items()]
        return Chunk(pa.Table.from_pylist(kept, _SCHEMA), dropped, noticed)

    def _read_others(self, row: RawRow, noticed: list[Dropped]) -> list[tuple[Pair, float]]:
        """The best response of a list against each of those between, with their scores."""
        found = []
        for other, score in between(row.row):
            try:
                pair = self.read_pair(other, row_id=row.row_id)
                self.examine(pair)  # what drops a pair leaves a response out
                found.append((pair, score))
            except RowError as error:
                noticed.append(Dropped(row.row_id, NOT_LISTED, f"{error.reason}: {error.detail}"))
        return found

    def _tokenized(self, pairs: list[Pair]) -> Iterable[TokenizedPair | RowError]:
        """Of each pair, as its source wants it."""
        if not self.own:
            return self.tokenize(pairs)
        sources = groupby(pairs, lambda pair: source_of(pair.row_id))
        return chain.from_iterable(self.own.get(label, self.tokenize)(list(some)) for label, some in sources)


def _fitting(
    row_id: str, tokens: TokenizedPair, answers: list[tuple[float, TokenizedPair | RowError]]
) -> tuple[list[tuple[float, TokenizedPair]], list[Dropped]]:
    """Those of a list's other responses that stand behind the very prompt of its pair, and why not the rest."""
    fitting, unfit = [], []
    for score, answer in answers:
        if isinstance(answer, RowError):
            unfit.append(Dropped(row_id, NOT_LISTED, f"{answer.reason}: {answer.detail}"))
        elif answer.chosen_ids != tokens.chosen_ids:
            unfit.append(Dropped(row_id, NOT_LISTED, "its length would cut the prompt elsewhere; raise max_length"))
        elif answer.chosen_gaps or answer.rejected_gaps:
            unfit.append(Dropped(row_id, NOT_LISTED, "it has several trained turns, which lists cannot have"))
        else:
            fitting.append((score, answer))
    return fitting, unfit


def _columns(pair: Pair, tokens: TokenizedPair, more: list[tuple[float, TokenizedPair]]) -> dict[str, Any]:
    # A later pass over the same rows (a fraction above 1) is wanted: it does not duplicate the first.
    number = later_pass(pair.row_id)
    return {
        **vars(tokens),
        "prompt_key": pair.key(),
        "pair_key": pair.key(pair.chosen, pair.rejected, str(number) if number else ""),
        "shared_prefix": shared_prefix_length(
            tokens.chosen_ids, tokens.rejected_ids, *(each.rejected_ids for _, each in more)
        ),
        "more_ids": [each.rejected_ids for _, each in more],
        "more_starts": [each.rejected_start for _, each in more],
        "more_scores": [score for score, _ in more],
    }


def _tokenize_all(
    rows: Rows, build: Callable[[], RowTokenizer], num_workers: int | None, console: Console, name: str
) -> Generator[Chunk]:
    """All rows as chunks in order, over several processes where that pays."""
    with counter(console, f"tokenising {name}", len(rows)) as advance:
        for chunk in map_rows(build, rows, len(rows), num_workers):
            advance(chunk.table.num_rows + len(chunk.dropped))
            yield chunk


_Numbers = dict[str, np.ndarray]
"""What is known of every kept pair of a split while the rest lies on disk: name -> [pairs]."""


def _write_split(chunks: Iterable[Chunk], split: str, account: SplitLedger, writer: PairWriter) -> _Numbers:
    """Store what the rows of a split gave, and count what was dropped; the numbers of the pairs."""
    writer.write(split, _SCHEMA.empty_table())
    numbers, count = {}, 0
    for chunk in chunks:
        account.add_dropped(writer.listed(split, chunk.dropped))
        account.add_noticed(chunk.noticed)
        writer.write(split, chunk.table)
        for name, values in _numbers(chunk.table).items():
            whole = numbers.setdefault(name, writer.array((account.input,), values.dtype))
            whole[count : count + len(values)] = values
        count += chunk.table.num_rows
    return {name: values[:count] for name, values in (numbers or _numbers(_SCHEMA.empty_table())).items()}


def _numbers(table: pa.Table) -> _Numbers:
    """Of some pairs: the columns of the account, lengths in tokens, and how many tokens are trained."""
    plain = (*_ACCOUNT_COLUMNS, "chosen_start", "shared_prefix")
    return {
        **{name: table[name].to_numpy() for name in plain},
        **find_numbers(table),
        **{f"{side}_tokens": list_lengths(table[f"{side}_ids"]) for side in SIDES},
        **{f"{side}_trained": count_trained(table, side) for side in SIDES},
    }


def _choose(numbers: Mapping[str, _Numbers], ledger: Ledger, writer: PairWriter, recipe: Any) -> dict[str, np.ndarray]:
    """Split -> [pairs] which of its pairs are kept, by what depends on all of them; the others are counted here."""
    row_ids = {name: writer.read(name)["row_id"] for name in ledger.splits}
    keep = {}
    for name, account in ledger.splits.items():
        _, first = np.unique(numbers[name]["pair_key"], return_index=True)
        mask = keep[name] = np.ones(len(numbers[name]["pair_key"]), dtype=bool)
        account.duplicates = len(mask) - len(first)
        if recipe.drop_duplicates and account.duplicates:
            mask[:] = False
            mask[first] = True
            repeated = row_ids[name].filter(pa.array(~mask))
            twins = (Dropped(row_id.as_py(), "duplicate", "equal to an earlier row") for row_id in repeated)
            account.add_dropped(writer.listed(name, twins))
    review = Review(numbers, keep, row_ids, recipe.clean, writer.array)
    for name, account in ledger.splits.items():
        account.add_dropped(writer.listed(name, review.removed(name)))
    ledger.advice = review.advise()
    return keep


def _describe(numbers: _Numbers, keep: np.ndarray, account: SplitLedger) -> None:
    """Counts and lengths of the kept pairs."""

    def kept(name: str) -> np.ndarray:
        return numbers[name][keep]

    account.kept = int(keep.sum())
    account.seam_shifted = int(kept("seam_shifted").sum())
    account.same_prompt = account.kept - len(np.unique(kept("prompt_key")))
    for side, end in (("prompt", "left"), ("chosen", "right"), ("rejected", "right")):
        counts = kept(f"{side}_cut")
        account.cut[f"{side}_{end}"] = {"pairs": int((counts > 0).sum()), "tokens": int(counts.sum())}
    account.lengths = {
        "prompt": describe_lengths(kept("chosen_start")),
        **{side: describe_lengths(kept(f"{side}_trained")) for side in SIDES},
    }
    account.tokens = sum(int(kept(f"{side}_tokens").sum()) for side in SIDES)
    shared = 2 * int(kept("shared_prefix").sum())
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


def _count_unasked(dropped: Mapping[str, int]) -> int:
    """Rows of {reason: count} but for those dropped on request."""
    requested = {"duplicate", *REASONS.values()}
    return sum(count for reason, count in dropped.items() if reason not in requested)


def dropped_by_source(ledger: Ledger) -> dict[str, tuple[int, int]]:
    """Of each source its training rows that were dropped, though not on request, and all of them."""
    sources = ledger.splits["train"].sources if "train" in ledger.splits else {}
    return {
        name: (_count_unasked(counts["dropped"]), counts["kept"] + sum(counts["dropped"].values()))
        for name, counts in sources.items()
    }


def check_dropped(ledger: Ledger, max_dropped_fraction: float, *, advice: str = "") -> None:
    """Raise ValueError where the data is not what the recipe expects. What was dropped on request does not count."""
    for name, split in ledger.splits.items():
        dropped = _count_unasked({reason: entry["count"] for reason, entry in split.dropped.items()})
        if dropped > max_dropped_fraction * split.input:
            raise ValueError(
                f"{dropped} of {split.input} {name} rows are dropped ({dropped / split.input:.1%}), more than "
                f"max_dropped_fraction {max_dropped_fraction:g} allows; correct the data or the keys, or raise it"
                f"{advice}:\n"
                f"{split.top_reasons()}"
            )
    train = ledger.splits["train"]
    if not train.kept:
        raise ValueError(f"none of {train.input} train rows gives a pair:\n{train.top_reasons()}".rstrip(":\n"))
