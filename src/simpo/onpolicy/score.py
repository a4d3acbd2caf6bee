"""`simpo score`: a number for each response, from one scorer or several.

Each scorer goes through the whole file on its own and keeps its numbers in `scores/` beside the output, under a name
that follows from the input, its options and its source or model: what was rated by another version is another file. The
output is put together from these.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import numbers
import statistics
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from simpo.data.columns import RowError
from simpo.data.files import hash_files
from simpo.display import counter, say
from simpo.onpolicy.journal import Journal, as_line, check_settings, read_about, read_rows, read_rows_of
from simpo.onpolicy.scorers import build_rater
from simpo.onpolicy.scorers.rating import Explained, Rater, Row, Scores
from simpo.recipe import Recipe
from simpo.recipe.scorers import SCORER_KEYS, Scorer, read_scorer
from simpo.run.lock import locked
from simpo.run.stopping import interruptible


def run_score(
    recipe: Recipe, *, input: str | Path | None = None, output: str | Path | None = None, digest: str | None = None
) -> Path:
    """Rate the responses of a file with the recipe's scorers; goes on where an earlier call stopped.

    Args:
        recipe: `score` says what rates.
        input: file of responses; None = the recipe's `score.input`, else responses.jsonl in output_dir.
        output: None = scored.jsonl in output_dir.
        digest: stands for the input, whose rows may become more, or fewer, but do not change, whichever command names
            it; None = the hash of its content.
    Returns:
        The output. Its account, in FILE.json, has the rows that were left out, by reason, and each scorer's range.
    Raises:
        ValueError: no responses, no scorers, one that cannot work here, or no row that all of them could rate.
        Interrupted: Ctrl-C or SIGTERM.
    """
    settings = recipe.score
    if not settings.scorers:
        raise ValueError("score.scorers: nothing to rate with; name a scorer there (`simpo keys score` has the kinds)")
    source = _path(recipe, input or settings.input, "responses.jsonl", "score.input")
    target = _path(recipe, output, "scored.jsonl", "--output")
    order, faults = _read_order(source)
    shared, digest = digest is not None, digest or hash_files([source])
    scorers = {name: _Part(name, spec, digest, recipe, target) for name, spec in settings.scorers.items()}
    decide = {
        "input": digest,
        "standardize": settings.standardize,
        "scorers": {name: {"weight": part.options.weight, **part.settings} for name, part in scorers.items()},
    }
    decide = json.loads(json.dumps(decide))  # as it is read again
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with locked(target.parent, lambda line: say(line, console)), interruptible(lambda: "what has been scored is kept"):
        before = read_about(target).get("settings", {})
        kept = _kept_rows(target, order) if before.get("input") not in (None, digest) else None
        is_anew = _is_made_anew(before, decide, has_grown=kept is not None)
        if not is_anew:
            check_settings(target, decide)  # before anyone is asked
        known = {before.get("input"): kept or set()}
        for part in scorers.values():
            faults |= part.work(source, order, faults, console, shared=shared, known=known)
        _combine(source, target, order, scorers, faults, decide, is_anew=is_anew)
    about = read_about(target)
    say(f"scored: {target}  ({about['rows']} of {len(order)} prompts)", console)
    for name, spread in about["scores"].items():
        low, mean, high = (f"{spread[each]:.4g}" for each in ("min", "mean", "max"))
        say(f"  {name}: {mean} on average, {low} to {high}, standard deviation {spread['sd']:.4g}", console)
    if not about["rows"]:
        lines = [
            f"{each['count']} {reason}: {each['examples'][0]['detail']}" for reason, each in about["left_out"].items()
        ]
        raise ValueError(f"{source}: none of {len(order)} rows could be scored ({'; '.join(lines)})")
    return target


def _path(recipe: Recipe, given: str | Path | None, name: str, key: str) -> Path:
    if given is None and recipe.output_dir is None:
        raise ValueError(f"output_dir: give it, or the file itself ({key})")
    return Path(given) if given is not None else Path(str(recipe.output_dir), name)


def _read_order(source: Path) -> tuple[dict[str, str], dict[str, RowError]]:
    """The ids of all rows, each with a digest of what it says, and what is wrong with those that cannot be rated.

    Raises:
        ValueError: as `read_rows`; no rows, or two with one id.
    """
    order: dict[str, str] = {}
    faults = {}
    for row in read_rows(source):
        if row["id"] in order:
            raise ValueError(f"{source}: two rows have the id {row['id']!r}")
        order[row["id"]] = _digest_of(row)
        if fault := _fault_of(row):
            faults[row["id"]] = fault
    if not order:
        raise ValueError(f"{source}: no rows")
    return order, faults


def _digest_of(row: Row) -> str:
    """Of everything that a row says."""
    return hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=8).hexdigest()


def _kept_rows(target: Path, order: Mapping[str, str]) -> set[str] | None:
    """The rows of the output, where all of them are among these as they are; None where some are not."""
    kept: set[str] = set()
    if target.is_file():
        with contextlib.suppress(ValueError):  # its last line was cut
            for row in read_rows_of(target):
                if order.get(row["id"]) != _digest_of(_unscored(row)):
                    return None
                kept.add(row["id"])
    return kept


def _unscored(row: Row) -> Row:
    """A row of the output as it was in the input."""
    added = ("scores", "score")
    bare = [{name: value for name, value in each.items() if name not in added} for each in row["responses"]]
    return {name: value for name, value in row.items() if name != "because"} | {"responses": bare}


def _is_made_anew(before: Mapping[str, Any], decide: Mapping[str, Any], *, has_grown: bool) -> bool:
    """Whether the output only differs in how responses are read, or in rows that have come in since."""
    same = {"input": None} if has_grown else {}
    return decide != before and {**_unread(before), **same} == {**_unread(decide), **same}


def _fault_of(row: Row) -> RowError | None:
    """What is wrong with a row, which no scorer then gets."""

    def is_list(value: Any, text: str) -> bool:
        return isinstance(value, list) and all(isinstance(e, dict) and isinstance(e.get(text), str) for e in value)

    if not is_list(row.get("responses"), "text"):
        return RowError("malformed", "responses is not a list of objects with a text")
    if not row["responses"]:
        return RowError("no responses", "its list of responses is empty")
    if not is_list(row.get("prompt"), "content") or not is_list(row["prompt"], "role") or not row["prompt"]:
        return RowError("malformed", "prompt is not a list of messages, with role and content")
    if not isinstance(row.get("columns", {}), dict):
        return RowError("malformed", "columns is not an object")
    try:
        as_line(row)
    except RowError as error:
        return error
    return None


def build_scorer(
    name: str, spec: Mapping[str, Any], recipe: Recipe, *, key: str = "score.scorers"
) -> tuple[str, Scorer, Rater]:
    """Kind, options and rater of a scorer, as a recipe describes it under `key`; nothing large is loaded.

    Raises:
        ValueError: its name, and what is not there.
    """
    try:
        kind, options = read_scorer(spec)
        return kind, options, build_rater(kind, options, recipe)
    except ValueError as error:
        raise ValueError(f"{key}.{name}: {error}") from error


class _Part:
    """One scorer and the journal of its numbers."""

    def __init__(self, name: str, spec: Mapping[str, Any], digest: str, recipe: Recipe, target: Path) -> None:
        kind, options, self.rater = build_scorer(name, spec, recipe)
        self.name, self.options = name, options
        decide = (key.name.rpartition(".")[2] for key in SCORER_KEYS[kind] if not key.may_change)
        self.settings = {"kind": kind, **{key: getattr(options, key) for key in decide}, **self.rater.identity}
        text = json.dumps([digest, self.settings], sort_keys=True)
        key = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        self.path = target.parent / "scores" / f"{name}-{key}.jsonl"
        self.digest = digest

    def work(
        self,
        source: Path,
        order: dict[str, str],
        faults: dict[str, RowError],
        console: Console,
        *,
        shared: bool,
        known: Mapping[str | None, set[str]],
    ) -> dict[str, RowError]:
        """Rate what is not rated yet; gives the rows that this failed for, and why.

        Args:
            shared: with other inputs.
            known: digest of an earlier input -> its rows that are as they were.
        """
        failed: dict[str, RowError] = {}
        with Journal(self.path, {"input": self.digest, **self.settings}) as journal:
            left = [row_id for row_id in order if row_id not in journal and row_id not in faults]
            for row in self._rated_elsewhere({row_id: order[row_id] for row_id in left}, known):
                journal.add(row)
            left = [row_id for row_id in left if row_id not in journal]
            if left:
                if not journal.done and self._is_read_anew():
                    say(f"note: {self.name}: rated anew, as this version reads responses otherwise", console)
                if self.rater.note:
                    say(f"note: {self.name}: {self.rater.note}", console)
                missing = set(left)
                rows = (row for row in read_rows(source) if row["id"] in missing)
                done = len(order) - len(left)
                with counter(console, f"{self.name}: prompts", len(order), done=done, unit="responses") as advance:
                    for row_id, scores in self.rater.rate(rows):
                        checked = _checked(scores)
                        if isinstance(checked, RowError):
                            failed[row_id] = RowError(f"{self.name}: {checked.reason}", checked.detail)
                            journal.leave_out(row_id, checked)
                        else:
                            because = {"because": scores.because} if isinstance(scores, Explained) else {}
                            journal.add({"id": row_id, "of": order[row_id], "scores": checked, **because})
                        advance(1, 0 if isinstance(checked, RowError) else len(checked))
            wanted = {*order}
            spread = _spread(row for row in journal.rows() if row["id"] in wanted)
            journal.finish(list(order), spread, keeps_others=shared)
        return failed

    def _others(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The other journals of the scorer beside this one, with their settings."""
        for other in sorted(self.path.parent.glob(f"{glob.escape(self.name)}-{'[0-9a-f]' * 12}.json")):
            with contextlib.suppress(ValueError):  # one that is damaged is of no account here
                if other.stem != self.path.stem:
                    yield other.with_suffix(".jsonl"), read_about(other).get("settings", {})

    def _rated_elsewhere(self, wanted: dict[str, str], known: Mapping[str | None, set[str]]) -> Iterator[Row]:
        """What is known of rows that an earlier input had as they are, so that nobody is asked, or paid, again."""
        settings = json.loads(json.dumps(self.settings))
        for path, before in self._others():
            if wanted and before == {**settings, "input": before.get("input")} and path.is_file():
                with contextlib.suppress(ValueError):  # its last line was cut
                    for row in read_rows_of(path):
                        of = wanted.get(row["id"])
                        # Earlier versions did not write down what a row says.
                        same = row["of"] == of if "of" in row else row["id"] in known.get(before["input"], ())
                        if of is not None and same:
                            del wanted[row["id"]]
                            yield {**row, "of": of}

    def _is_read_anew(self) -> bool:
        """Whether numbers are there that differ from these in nothing but their reading."""
        settings = {"input": self.digest, **self.settings}
        return any(_unread(before) == _unread(settings) for _, before in self._others())


def _unread(settings: Any) -> dict[str, Any]:
    """Settings of a scorer, or of several, but for their `reading`."""
    if not isinstance(settings, Mapping):
        return {}
    scorers = {name: {**each, "reading": None} for name, each in settings.get("scorers", {}).items()}
    return json.loads(json.dumps({**settings, "reading": None, "scorers": scorers}))


def _checked(scores: Scores) -> list[float] | RowError:
    """Finite numbers, or what is wrong with them."""
    if isinstance(scores, RowError):
        return scores
    found, scores = [], scores.scores if isinstance(scores, Explained) else scores
    for place, score in enumerate(scores, start=1):
        score = score.item() if getattr(score, "ndim", None) == 0 else score  # of torch or NumPy
        if not isinstance(score, numbers.Real) or not math.isfinite(score):
            return RowError("no finite number", f"response {place} of {len(scores)} got {str(score)[:60]!r}")
        found.append(float(score))
    return found


def _spread(rows: Iterator[Row]) -> dict[str, Any]:
    """Mean, standard deviation, lowest and highest of all numbers of a journal."""
    values = array("d", (score for row in rows for score in row["scores"]))
    if not values:
        return {"responses": 0}
    mean = math.fsum(values) / len(values)
    return {
        "responses": len(values),
        "mean": mean,
        "sd": statistics.pstdev(values, mean),
        "min": min(values),
        "max": max(values),
    }


def _combine(
    source: Path,
    target: Path,
    order: Mapping[str, str],
    parts: Mapping[str, _Part],
    faults: Mapping[str, RowError],
    decide: Mapping[str, Any],
    *,
    is_anew: bool,
) -> None:
    """Write the output from the scorers' numbers, all of which are there."""
    spreads = {
        name: {key: kept[key] for key in ("mean", "sd", "min", "max")}
        for name, part in parts.items()
        if (kept := read_about(part.path))["responses"]
    }
    about, standardize = read_about(target), decide["standardize"]
    # Every standardised score depends on the rows that have come in since, and each on how responses are read.
    if is_anew or (standardize and about.get("scores") != spreads and about.get("settings") == decide):
        target.unlink(missing_ok=True)
        target.with_suffix(".json").unlink()
    with Journal(target, decide) as journal:
        rated = {name: _Follower(read_rows(part.path)) for name, part in parts.items()}
        for row in read_rows(source):
            found = {name: each.row(row["id"]) for name, each in rated.items()}
            if row["id"] in faults or None in found.values():
                journal.leave_out(row["id"], faults.get(row["id"], RowError("not rated", "by an earlier call")))
            elif row["id"] not in journal:
                journal.add(_scored(row, found, parts, spreads if standardize else None))  # type: ignore[arg-type]
        journal.finish(list(order), {"prompts": len(order), "scores": spreads})


def _scored(
    row: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, _Part],
    spreads: Mapping[str, Mapping[str, float]] | None,
) -> dict[str, Any]:
    """The row with its responses' numbers and their weighted sum."""
    responses = []
    for place, response in enumerate(row["responses"]):
        scores = {name: rated["scores"][place] for name, rated in found.items()}
        weighed = scores
        if spreads is not None:
            weighed = {name: (x - spreads[name]["mean"]) / (spreads[name]["sd"] or 1.0) for name, x in scores.items()}
        total = math.fsum(parts[name].options.weight * x for name, x in weighed.items())
        responses.append({**response, "scores": scores, "score": total})
    because = {name: rated["because"] for name, rated in found.items() if "because" in rated}
    return {**row, "responses": responses, **({"because": because} if because else {})}


class _Follower:
    """The rows of a scorer's journal, some of the input's in its order, looked up while the input is read."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    def row(self, row_id: str) -> dict[str, Any] | None:
        if self._next is None or self._next["id"] != row_id:
            return None
        found, self._next = self._next, next(self._rows, None)
        return found
