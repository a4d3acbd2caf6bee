"""Owns where rows come from: local files and folders, saved datasets, hub datasets; the mixer and the splits.

Rows are handed on as they are, each with an id such as "NAME/train#12" (row 12 of that source, counted from 0). What
cannot be read is either an error that names the file or, for one broken line among others, a `RowError` that the ledger
counts. Knows nothing of tokenizers or models.

Nothing here holds rows: a split is read once to count it and to choose (`rows.py`), and again for what is chosen.
"""

from __future__ import annotations

import difflib
import functools
import glob
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simpo.data.columns import messages_as_text
from simpo.data.files import (
    FORMATS,
    file_format,
    hash_files,
    is_saved_dataset,
    json_kind,
    json_rows,
    load_json,
    read_file,
)
from simpo.data.folders import find_parts
from simpo.data.preferences import Pair, pair_reader
from simpo.data.rows import Groups, RawRow, Readable, Rows, all_rows, hold_out, source_of, take_fraction, take_limit
from simpo.errors import one_line
from simpo.hub import unreachable_hub
from simpo.recipe.values import OWN_KEYS

TRAIN_NAMES = ("train", "train_prefs", "training")
EVAL_NAMES = ("test", "test_prefs", "validation", "eval", "valid", "val", "dev", "evaluation", "eval_prefs")

BUILDERS = {"json": ".json", "csv": ".csv", "parquet": ".parquet"}
"""How `datasets` calls formats of files -> the ending of a file whose own says nothing."""

MOST_NAMES = 100
"""Of files that are not read, in one note."""

_EVAL_WORD = re.compile(r"(?:^|[-_.])(?:test|valid\w*|eval\w*|val|dev)(?:$|[-_.\d])")
_SHARD = re.compile(r"[-_.]?\d+-of-\d+(?:-[0-9a-f]{16})?$")  # the hash is of older repositories of the hub


@dataclass
class Splits:
    """The rows to train on and to evaluate on; `notes` are sentences worth telling the user."""

    train: Rows
    eval: Rows
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """One entry of the mixer, found but not read.

    `splits` maps each split to a function that reads its rows from the first on; `content` reads as little as it can to
    tell whether the rows have changed. `wanted` names the splits to read, in place of dataset_splits; `columns` are
    those to keep; `own` are keys of the recipe that the entry gives for itself; `unread` are the files of a folder that
    hold no rows that could be read, and why.
    """

    splits: Mapping[str, Callable[[], Iterable[Any]]]
    content: Callable[[], str]
    is_plain_file: bool = False
    name: str = "the dataset"
    label: str = "dataset"
    fraction: float = 1.0
    wanted: list[str] | None = None
    columns: list[str] | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)

    def settings(self, recipe: Any) -> Any:
        """The recipe as this source is read by."""
        return recipe.model_copy(update=dict(self.own)) if self.own else recipe


def find_sources(recipe: Any) -> list[Source]:
    """The mixer's entries, checked to exist; nothing is parsed yet.

    Args:
        recipe: reads `dataset_mixer` and `dataset_configs`.
    Raises:
        ValueError: no entry, or one that is neither a local path nor a reachable hub dataset.
    """
    mixer = recipe.dataset_mixer
    if not mixer:
        raise ValueError("dataset_mixer: empty; give {path or hub name: fraction}")
    labels, configs = _labels(list(mixer)), recipe.dataset_configs or [None] * len(mixer)
    return [
        _find_entry(name, labels[name], entry if isinstance(entry, dict) else {"fraction": entry}, config)
        for (name, entry), config in zip(mixer.items(), configs, strict=True)
    ]


def rows_in_memory(train: Iterable[Any], evaluation: Iterable[Any] | None = None) -> Source:
    """Rows that a program holds already (lists, `datasets.Dataset`), as a source with the splits train and test."""
    given = {"train": train} | ({} if evaluation is None else {"test": evaluation})
    splits = {name: rows if isinstance(rows, Sized) else list(rows) for name, rows in given.items()}

    def content() -> str:
        digest = hashlib.sha256()
        for name, rows in splits.items():
            digest.update(f"{name} {len(rows)}\n".encode())
            for row in rows:
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    return Source({name: (lambda rows=rows: rows) for name, rows in splits.items()}, content)


def fingerprint_sources(sources: list[Source]) -> str:
    """Hash of every source's content, in the order of the mixer."""
    digest = hashlib.sha256()
    for source in sources:
        parts = [source.label, source.fraction, source.wanted, source.columns, source.content()]
        parts += [dict(source.own)] if source.own else []
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()


def uses_seed(recipe: Any, sources: list[Source]) -> bool:
    """Whether the seed decides which rows are taken: a part of a dataset, a limit, or a hold-out."""
    parts = any(source.fraction != int(source.fraction) for source in sources)
    limits = recipe.max_train_samples is not None or recipe.max_eval_samples is not None
    limits |= any("max_train_samples" in source.own for source in sources)
    return parts or limits or not any(_chosen_splits(source, recipe)[1] for source in sources)


def load_splits(
    recipe: Any,
    sources: list[Source] | None = None,
    read_pair: Callable[..., Pair] | None = None,
    *,
    group_answers: bool = True,
) -> Splits:
    """Read and mix all sources.

    Each source gives its fraction of its train rows, chosen by a seeded shuffle; over 1, whole passes and then the
    rest, later passes marked "~2", "~3" in the row id. Eval splits are taken whole. Where no source has an eval split,
    `validation_fraction` of the train rows is held out by prompt: rows with one prompt stay on one side.

    Args:
        recipe: reads dataset_mixer, dataset_splits, dataset_configs, validation_fraction, max_train_samples,
            max_eval_samples, seed, score_column and the column keys.
        sources: what `find_sources` gave, if it was called before.
        read_pair: how rows become pairs, for the hold-out; None = `reader_of(recipe, sources)`.
        group_answers: bring rows of one scored answer together by their prompts.
    Raises:
        ValueError: as `find_sources`; also a file that cannot be read, an empty one, or a split that is not there.
    """
    sources = find_sources(recipe) if sources is None else sources
    notes: list[str] = []
    base: list[Rows] = []
    eval_rows = Rows()
    for source in sources:
        trained, evaluated = _chosen_splits(source, recipe)
        names = dict.fromkeys((*trained, *evaluated))
        read = {
            name: _read(source, name, notes, Groups(source.settings(recipe)) if group_answers else None)
            for name in names
        }
        base.append(all_rows(read[name] for name in trained))
        eval_rows += all_rows(read[name] for name in evaluated)
        for why in dict.fromkeys(source.unread.values()):
            names = [each for each, reason in source.unread.items() if reason == why]
            more = f" and {len(names) - MOST_NAMES} more" * (len(names) > MOST_NAMES)
            notes.append(f"{source.name}: not read, {why}: {', '.join(names[:MOST_NAMES])}{more}")
        if unread := sorted(source.splits.keys() - {*trained, *evaluated}):
            notes.append(f"{source.name}: not read, since dataset_splits does not name it: {', '.join(unread)}")
    if not eval_rows and recipe.validation_fraction > 0:
        rng = random.Random(f"{recipe.seed} hold out")
        read_pair, num_workers = read_pair or reader_of(recipe, sources), recipe.preprocessing_num_workers
        base, eval_rows = hold_out(base, recipe.validation_fraction, rng, read_pair, num_workers)
        if eval_rows:
            share = f"{recipe.validation_fraction:g} of the train rows ({len(eval_rows)})"
            notes.append(f"no eval split: {share} held out by prompt (validation_fraction)")
    train_rows = Rows()
    for source, rows in zip(sources, base):
        taken = take_fraction(rows, source.fraction, random.Random(f"{recipe.seed} {source.label}"))
        if rows and not taken:
            notes.append(f"dataset_mixer: {source.name}: {source.fraction:g} of its {len(rows)} rows rounds to none")
        capped = take_limit(
            taken, source.own.get("max_train_samples"), random.Random(f"{recipe.seed} {source.label} limit")
        )
        if len(capped) < len(taken):
            notes.append(f"dataset_mixer: {source.name}: {len(capped)} of {len(taken)} rows (max_train_samples)")
        train_rows += capped
    train_rows = take_limit(train_rows, recipe.max_train_samples, random.Random(f"{recipe.seed} limit"))
    eval_rows = take_limit(eval_rows, recipe.max_eval_samples, random.Random(f"{recipe.seed} limit"))
    return Splits(train_rows, eval_rows, notes)


def reader_of(
    recipe: Any, sources: list[Source], build: Callable[[Any], Callable[..., Pair]] = pair_reader
) -> Callable[..., Pair]:
    """How rows become pairs, by their row id: as the recipe says, or as their source's entry does in its place.

    Args:
        build: a recipe to its reader, which can be sent to other processes.
    """
    readers = {"": build(recipe)} | {source.label: build(source.settings(recipe)) for source in sources if source.own}
    return functools.partial(_read_by_source, readers) if len(readers) > 1 else readers[""]


def _read_by_source(readers: Mapping[str, Callable[..., Pair]], row: Any, *, row_id: str) -> Pair:
    return readers.get(source_of(row_id), readers[""])(row, row_id=row_id)


def _labels(names: list[str]) -> dict[str, str]:
    """A short name for row ids: the last part of the path, or all of it where two would be the same."""
    short = {name: re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name for name in names}
    return {name: label if list(short.values()).count(label) == 1 else name for name, label in short.items()}


def _is_eval_name(name: str) -> bool:
    return bool(_EVAL_WORD.search(name.lower()))


def _chosen_splits(source: Source, recipe: Any) -> tuple[list[str], list[str]]:
    """The splits of a source to train on, the first and others that say train, and those to evaluate on."""
    if source.is_plain_file and source.wanted is None:
        return list(source.splits), []
    first, *others = source.wanted or recipe.dataset_splits
    train = [first, *(name for name in others if "train" in name.lower() and not _is_eval_name(name))]
    return (
        [found for name in train for found in _match(source, name, TRAIN_NAMES)],
        [found for name in others if name not in train for found in _match(source, name, EVAL_NAMES)],
    )


def _match(source: Source, wanted: str, usual: tuple[str, ...]) -> list[str]:
    """The split called `wanted`; for the default names "train" and "test", else one that usually means the same.

    Without "test" there is none, since nobody asked for it by name.
    """
    found = [name for name in (usual if wanted == usual[0] else (wanted,)) if name in source.splits]
    if not found and (usual is TRAIN_NAMES or wanted != usual[0]):
        there = ", ".join(sorted(source.splits)) or "none"
        part = "; a part of a split is a fraction of its dataset" * ("[" in wanted)
        raise ValueError(f"dataset_splits: {source.name!r} has no split {wanted!r}; its splits: {there}{part}")
    return found[:1]


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split of a source, read anew at each iteration."""

    source: Source
    split: str
    count: int

    @property
    def name(self) -> str:
        return f"{self.source.label}/{self.split.replace('/', '|')}"  # the last slash ends the source

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[RawRow]:
        place = 0
        for row in self.source.splits[self.split]():
            yield RawRow(f"{self.name}#{place}", _select(row, self.source.columns))
            place += 1
        if place != self.count:
            raise ValueError(
                f"dataset_mixer: {self.source.name!r} had {self.count} rows in its split {self.split!r}, and now has "
                f"{place}: it was changed while it was read"
            )


def _read(source: Source, split: str, notes: list[str], groups: Groups | None) -> Readable:
    """One split, read once from end to end, so that what is wrong with it shows before anything is made of it."""
    first: list[Any] = []
    there: dict[str, None] = {}
    count = 0
    for row in source.splits[split]():
        if source.columns is not None:
            there |= dict.fromkeys(row if isinstance(row, Mapping) else ())
            row = _select(row, source.columns)
        if count < 100:
            first.append(row)
        if groups is not None:
            groups.add(count, row)
        count += 1
    if not count:
        raise ValueError(f"dataset_mixer: {source.name!r} has no rows in its split {split!r}")
    if missing := [column for column in source.columns or () if column not in there]:
        has = ", ".join(map(str, there)) or "none"
        raise ValueError(f"dataset_mixer: {source.name!r} has no column {missing[0]!r}; its columns: {has}")
    rows = SplitRows(source, split, count)
    if columns := messages_as_text(first):
        which = f"{rows.name}: {', '.join(columns)}"
        notes.append(f"{which}: messages written as text are trained as text; store lists to have them read")
    return rows if groups is None else groups.bring_together(rows, rows.name, notes)


def _select(row: Any, columns: list[str] | None) -> Any:
    """A row with these columns alone; a line that is no row stays, for the ledger."""
    if columns is None or not isinstance(row, Mapping):
        return row
    return {column: row[column] for column in columns if column in row}


def _find_entry(name: str, label: str, entry: Mapping[str, Any], config: str | None) -> Source:
    """One entry of the mixer: where it is found, and what it says about itself."""
    place = entry.get("path", name)
    if entry.get("config") and Path(place).expanduser().exists():
        raise ValueError(f"dataset_mixer: {name}: config: {place} is local and has no configurations; name its folder")
    found = _find(place, entry.get("config", config), entry.get("data_files"))
    own = {key: entry[key] for key in OWN_KEYS if key in entry}
    how = {"fraction": entry.get("fraction", 1.0), "wanted": entry.get("split"), "columns": entry.get("columns")}
    return replace(found, name=name, label=label, own=own, **how)


def _find(name: str, config: str | None, data_files: Any) -> Source:
    path = Path(name).expanduser()
    is_folder = path.is_dir()
    if name in BUILDERS and not (path.exists() or data_files):
        raise ValueError(
            f"dataset_mixer: {name} is how files are read, not a dataset; write {{{name}: {{data_files: ...}}}}"
        )
    if data_files and (is_folder or name in BUILDERS) and "://" not in str(data_files):
        return _find_files(path if is_folder else Path(), data_files, None if is_folder else BUILDERS[name])
    if path.is_file():
        if data_files:
            raise ValueError(f"dataset_mixer: {name} is a file, so that there is nothing to choose with data_files")
        return _find_file(path)
    if is_folder:
        return _find_folder(path)
    if path.exists():
        raise _read_once(path)
    if _looks_like_path(name):
        raise ValueError(f"dataset_mixer: no such file or folder: {name}{_nearest(path)}")
    return _find_on_hub(name, config, data_files)


def _find_files(folder: Path, data_files: Any, builder: str | None) -> Source:
    """Files named one by one or by patterns, all of them training rows unless named by split."""
    named = data_files if isinstance(data_files, Mapping) else {"train": data_files}
    splits: dict[str, list[Path]] = {}
    for split, patterns in named.items():
        for pattern in patterns:
            name = str(Path(pattern).expanduser())  # of a file, [ and all, before it is a pattern
            found = [name] if (folder / name).exists() else sorted(glob.glob(name, root_dir=folder, recursive=True))
            splits.setdefault(split, []).extend(folder / each for each in found)
            if not found:
                raise ValueError(f"dataset_mixer: data_files: no such file: {pattern}{_nearest(folder / pattern)}")
    for file in (file for files in splits.values() for file in files):
        if not (file.is_file() or file.is_dir()):
            raise _read_once(file)
        if not (file_format(file) or builder or is_saved_dataset(file)):
            raise ValueError(
                f"dataset_mixer: data_files: {file}: unknown kind of file; use one of {', '.join(FORMATS)}"
            )
    every = [file for files in splits.values() for file in files]
    sizes = json.dumps({split: len(files) for split, files in splits.items()})
    return Source(_readers(splits, builder), lambda: hash_files(every) + sizes, is_plain_file=named is not data_files)


def _readers(splits: Mapping[str, list[Path]], otherwise: str | None = None) -> dict[str, Callable[[], Iterable[Any]]]:
    return {
        split: (lambda parts=parts: (row for part in parts for row in read_file(part, otherwise)))
        for split, parts in splits.items()
    }


def _read_once(path: Path) -> ValueError:
    return ValueError(
        f"dataset_mixer: {path} is a pipe or a device, from which rows come once; they are read several times, so save "
        "them to a file first"
    )


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name or file_format(Path(name)) is not None
    )


def _nearest(path: Path) -> str:
    """What is there instead: the first folder above that exists, and its most similar entry."""
    folder, missing = path.parent, path.name
    while not folder.is_dir() and folder != folder.parent:
        folder, missing = folder.parent, folder.name
    entries = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(missing, entries, n=1, cutoff=0.4)
    if near:
        return f"; did you mean {folder / near[0]}?"
    listed = ", ".join(entries[:8]) or "nothing"
    return f"; {folder} holds {listed}"


def _find_file(path: Path) -> Source:
    if file_format(path) is None:
        allowed = ", ".join(FORMATS)
        raise ValueError(f"dataset_mixer: {path}: unknown kind of file {path.suffix!r}; use one of {allowed} (or .gz)")
    is_whole = file_format(path) == ".json" and json_kind(path) == "value"
    content = load_json(path) if is_whole else None
    if isinstance(content, dict) and _holds_splits(content):
        readers = {split: (lambda rows=rows: rows) for split, rows in content.items()}
        return Source(readers, lambda: hash_files([path]))
    readers = {"train": lambda: json_rows(content, path) if is_whole else read_file(path)}
    return Source(readers, lambda: hash_files([path]), is_plain_file=True)


def _find_folder(path: Path) -> Source:
    """A folder with a file, several shards, a folder for each split, or what `save_to_disk` wrote in any of these."""
    parts, unread = ([path], {}) if is_saved_dataset(path) else find_parts(path)
    if not parts:
        allowed = ", ".join(FORMATS)
        there = "; ".join(f"{name}: {why}" for name, why in list(unread.items())[:3])
        raise ValueError(
            f"dataset_mixer: the folder {path} holds no file with rows ({allowed}, or .gz){'; ' * bool(there)}{there}"
        )
    splits: dict[str, list[Path]] = {}
    for part in parts:
        splits.setdefault(_split_of(part, path), []).append(part)
    has_usual = any("train" in split or split in (*TRAIN_NAMES, *EVAL_NAMES) for split in splits)
    if not has_usual and not (path / "dataset_dict.json").is_file():
        splits = {"train": parts}
    files = {split: [part.relative_to(path).as_posix() for part in parts] for split, parts in splits.items()}
    names = json.dumps([files, unread])  # what is unread is in the ledger
    return Source(_readers(splits), lambda: hash_files(parts) + names, is_plain_file=parts == [path], unread=unread)


def _split_of(file: Path, folder: Path) -> str:
    """The split a file belongs to: its own name, or the folder it lies in when that is a split's name."""
    parent = file.parent.name
    if file.parent != folder and ("train" in parent.lower() or _is_eval_name(parent)):
        return parent
    stem = file.name if file.is_dir() else _SHARD.sub("", re.sub(r"(?i)\.\w+(\.gz)?$", "", file.name))
    for name in sorted((*TRAIN_NAMES, *EVAL_NAMES), key=len, reverse=True):
        if re.fullmatch(rf"{name}[-_.]?\d+", stem):
            return name
    return stem


def _find_on_hub(name: str, config: str | None, data_files: Any) -> Source:
    why = unreachable_hub()
    from datasets import load_dataset

    try:
        loaded = load_dataset(name, config, data_files=data_files) if data_files else load_dataset(name, config)
    except Exception as error:  # offline, unknown name, unknown config: many types, one remedy
        raise ValueError(
            f"dataset_mixer: {name!r} is not a local file or folder, and could not be loaded from the hub "
            f"({why or one_line(error)}); check the name, dataset_configs and the connection, or give a local path"
        ) from error
    readers = {str(split): (lambda rows=rows: rows) for split, rows in loaded.items()}
    prints = json.dumps({str(split): rows._fingerprint for split, rows in loaded.items()}, sort_keys=True)
    return Source(readers, lambda: prints)


def _holds_splits(content: dict[str, Any]) -> bool:
    """Whether a parsed JSON object is {split name: rows}."""
    return bool(content) and all(
        isinstance(rows, list) and ("train" in name.lower() or _is_eval_name(name)) for name, rows in content.items()
    )
