"""Owns the way from scored responses to preference pairs: which two of a prompt's responses, and which prompts not.

What is written depends on the rows and the keys alone, never on the order of either the prompts or their responses.
Every prompt is accounted for: it gives pairs, or there is a reason why not. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

from simpo.data.columns import RowError
from simpo.data.files import check_own, hash_files, supersede, write_whole
from simpo.data.ledger import Dropped, count_rows
from simpo.display import Display
from simpo.onpolicy.journal import FORMAT, as_line, read_rows
from simpo.recipe import Recipe
from simpo.recipe.stages import Pair as PairKeys
from simpo.run.lock import locked

ASKED_FOR = ("unfinished", "min_score", "min_gap", "length_control")
"""Reasons that the recipe's own limits give; every other reason is something wrong with the input."""


class Answer(NamedTuple):
    """One scored response; `num_tokens` is None where its backend did not count."""

    text: str
    score: float
    num_tokens: int | None = None
    finished: bool = True


class Candidate(NamedTuple):
    """Two responses to one prompt that could be a pair."""

    prompt_id: str
    chosen: Answer
    rejected: Answer

    @property
    def gap(self) -> float:
        return self.chosen.score - self.rejected.score


@dataclass
class _Account:
    """What became of prompts and responses: reason -> its count and some examples."""

    prompts: int = 0
    without_pair: dict[str, dict[str, Any]] = field(default_factory=dict)
    responses: Counter[str] = field(default_factory=Counter)

    def leave_out(self, row_id: str, error: RowError) -> None:
        count_rows(self.without_pair, [Dropped(row_id, error.reason, error.detail)])


def run_pair(recipe: Recipe, *, input: str | Path | None = None, output: str | Path | None = None) -> Path:
    """Make pairs of scored responses, as `recipe.pair` says.

    Writes train.jsonl and test.jsonl, each whole, and FOLDER.json beside the folder with the account; lists go to
    the folder `lists` next to it.

    Args:
        input: rows of `simpo score`; None = `pair.input`, or scored.jsonl in output_dir.
        output: the folder of pairs; None = `pairs` in output_dir.
    Returns:
        That folder: a data set with the splits train and test.
    Raises:
        ValueError: the input is missing, not complete or not scored, or no prompt gives a pair.
    """
    keys = recipe.pair
    if not output or not (input or keys.input):
        recipe.require("output_dir")
    source = Path(input or keys.input or Path(recipe.output_dir or "", "scored.jsonl"))
    folder = Path(output or Path(recipe.output_dir or "", "pairs"))
    account = _Account()
    rows, candidates = _read_candidates(source, keys, recipe.seed, account)
    pairs, lengths = _control_length(candidates, rows, keys, recipe.seed, account)
    if not pairs:
        reasons = "; ".join(
            f"{entry['count']} {reason} ({entry['examples'][0]['row_id']}: {entry['examples'][0]['detail']})"
            for reason, entry in account.without_pair.items()
        )
        raise ValueError(f"{source}: none of {account.prompts} prompts gives a pair ({reasons})")
    settings = keys.model_dump(exclude={"input"}) | {"seed": recipe.seed, "input": hash_files([source])}
    head = {"simpo": version("simpo"), "format": FORMAT, "settings": settings}
    with locked(folder.parent, Display().say):
        about, lists = account_of(folder), folder.with_name("lists")
        if check_own(about, "format", "settings").get("settings") != json.loads(json.dumps(settings)):
            for place in (folder, *[lists] * keys.lists):
                aside = supersede(place, [place / "train.jsonl", place / "test.jsonl", *[about] * (place == folder)])
                if aside is not None:
                    Display().say(f"what was in {place}, of other settings or another input, is kept in {aside}")
        write_whole(about, json.dumps({**head, "complete": False}, indent=1) + "\n")
        torn = (list(place.glob(".t*.jsonl.*")) for place in (folder, lists))
        for path in (*folder.parent.glob(f".{about.name}.*"), *chain(*torn)):
            path.unlink()  # begun by a process that was killed
        counts = _write_splits(folder, keys, pairs, lambda own: _pair_rows(own, rows))
        if keys.lists:
            _write_splits(lists, keys, pairs, lambda own: _list_rows(own, rows, account.responses))
        summary = {
            **head,
            "complete": True,
            "prompts": account.prompts,
            "prompts_with_pairs": len(pairs),
            "pairs": counts,
            "left_out": {k: v for k, v in account.without_pair.items() if k not in ASKED_FOR},
            "filtered": {k: v for k, v in account.without_pair.items() if k in ASKED_FOR},
            "responses": dict(account.responses),
            "length": lengths,
        }
        write_whole(about, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    _show(summary, folder, lists if keys.lists else None)
    return folder


def account_of(folder: Path) -> Path:
    """The file that says how a folder of pairs was made."""
    return folder.with_name(f"{folder.name}.json")


def is_held_out(prompt_id: str, fraction: float) -> bool:
    """Whether a prompt is on the test side: decided by its content alone, whatever else there is.

    A larger fraction holds out what a smaller one does, and more.
    """
    return int.from_bytes(hashlib.blake2b(prompt_id.encode(), digest_size=8).digest(), "big") < fraction * 2**64


# --- one prompt ------------------------------------------------------------------------------------------------------


def read_answers(row: Mapping[str, Any], left_out: Counter[str] | None = None) -> list[Answer]:
    """The responses of a row that can be in a pair, best first; those of one text count once, with the best score.

    Args:
        left_out: counts the others by reason.
    Raises:
        RowError: the row has no list of responses, or none of them has a score.
    """
    left_out = Counter() if left_out is None else left_out
    responses = row.get("responses")
    if not isinstance(responses, list) or not all(isinstance(each, Mapping) for each in responses):
        raise RowError("malformed", "responses must be a list of objects with text and score")
    found: list[Answer] = []
    for each in responses:
        text, score, length = each.get("text"), each.get("score"), each.get("num_tokens")
        if not _is_number(score):
            left_out["no score"] += 1
        elif not isinstance(text, str) or not text.strip():
            left_out["empty"] += 1
        else:
            number = length if isinstance(length, int) and not isinstance(length, bool) else None
            found.append(Answer(text, float(score), number, each.get("finished") is not False))
    if responses and not found and left_out["no score"]:
        raise RowError("no score", "no response has a number as its score")
    # Equal scores in the order of a hash: neither the earlier nor the shorter response is preferred.
    found.sort(key=lambda each: (-each.score, not each.finished, _hash(row.get("id"), each.text)))
    distinct = {each.text.strip(): each for each in reversed(found)}  # the first of each text stays
    left_out["equal text"] += len(found) - len(distinct)
    return [each for each in found if distinct[each.text.strip()] is each]


def choose_pairs(row: Mapping[str, Any], answers: Sequence[Answer], keys: PairKeys, seed: int) -> list[Candidate]:
    """The pairs of one prompt by the method, largest gap first.

    Args:
        row: as scored; the mean and the deviation of best_sigma are those of all its scores.
        answers: as `read_answers` gives them.
    Raises:
        RowError: none, and why.
    """
    prompt_id = row["id"]
    if len(answers) < 2:
        raise RowError("one answer", f"{len(answers)} of {len(row['responses'])} responses can be in a pair; two must")
    if answers[0].score == answers[-1].score:
        raise RowError("tie", f"all {len(answers)} scores equal {answers[0].score:g}")
    able = [each for each in answers if each.finished or not keys.finished_only]
    if not able:
        raise RowError("unfinished", f"none of {len(answers)} responses comes to its end (finished_only)")
    if keys.min_score is not None:
        best, able = able[0].score, [each for each in able if each.score >= keys.min_score]
        if not able:
            raise RowError("min_score", f"the best score is {best:g}, below {keys.min_score:g}")
    able = [each for each in able if each.score > answers[-1].score]
    if not able:
        raise RowError("unfinished", "no finished response has a higher score than another one")
    rng = random.Random(f"{seed} {prompt_id}")
    scores = [each["score"] for each in row["responses"] if _is_number(each.get("score"))]
    found = [
        Candidate(prompt_id, chosen, rejected)
        for chosen, rejected in _METHODS[keys.method](able, answers, scores, keys, rng)
        if chosen.score > rejected.score
    ]
    wide = [each for each in found if each.gap >= keys.min_gap]
    if not wide:
        gap = max((each.gap for each in found), default=0.0)
        raise RowError("min_gap", f"the scores differ by {gap:g}, less than {keys.min_gap:g}")
    return sorted(wide, key=lambda each: (-each.gap, _hash(prompt_id, each.chosen.text, each.rejected.text)))


_Two = Iterable[tuple[Answer, Answer]]


def _against_worst(able: Sequence[Answer], answers: Sequence[Answer], *_: Any) -> _Two:
    return [(able[0], answers[-1])]


def _against_sigma(
    able: Sequence[Answer], answers: Sequence[Answer], scores: Sequence[float], keys: PairKeys, _: Any
) -> _Two:
    """Rejected: the response nearest to mean - k sigma of the prompt's scores. Source: arXiv:2502.16825."""
    target = statistics.fmean(scores) - keys.sigmas * statistics.pstdev(scores)
    lower = [each for each in answers if each.score < able[0].score]
    return [(able[0], min(lower, key=lambda each: abs(each.score - target)))]


def _against_random(
    able: Sequence[Answer], answers: Sequence[Answer], _: Any, keys: PairKeys, rng: random.Random
) -> _Two:
    lower = [each for each in answers if able[0].score - each.score >= max(keys.min_gap, math.ulp(0.0))]
    return [(able[0], rng.choice(lower or answers[-1:]))]


def _every_two(able: Sequence[Answer], answers: Sequence[Answer], *_: Any) -> _Two:
    return product(able, answers)


def _top_against_bottom(able: Sequence[Answer], answers: Sequence[Answer], _: Any, keys: PairKeys, __: Any) -> _Two:
    size = min(keys.top_k, len(answers) // 2)
    return product(able[:size], answers[-size:])


_METHODS: dict[str, Callable[..., _Two]] = {
    "best_worst": _against_worst,
    "best_sigma": _against_sigma,
    "best_random": _against_random,
    "all": _every_two,
    "top_bottom": _top_against_bottom,
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _hash(*parts: Any) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()


# --- all prompts -----------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """What is kept of a prompt that gives pairs."""

    asked: dict[str, Any]  # prompt, and tools where it has some
    answers: list[Answer]


def _read_candidates(
    source: Path, keys: PairKeys, seed: int, account: _Account
) -> tuple[dict[str, _Row], dict[str, list[Candidate]]]:
    """By prompt id, in the order of the ids."""
    rows: dict[str, _Row] = {}
    candidates: dict[str, list[Candidate]] = {}
    seen: set[str] = set()
    for row in read_rows(source):
        account.prompts += 1
        if row["id"] in seen:
            raise ValueError(f"{source}: {row['id']} is there twice; all responses to a prompt belong in one row")
        seen.add(row["id"])
        try:
            as_line(row)
            answers = read_answers(row, account.responses)
            candidates[row["id"]] = choose_pairs(row, answers, keys, seed)
            tools = {"tools": row["tools"]} if row.get("tools") else {}
            rows[row["id"]] = _Row({"prompt": row.get("prompt"), **tools}, answers)
        except RowError as error:
            account.leave_out(row["id"], error)
    if not seen:
        raise ValueError(f"{source}: holds no rows")
    unscored = account.without_pair.get("no score", {"count": 0})["count"]
    if unscored == account.prompts:
        raise ValueError(f"{source}: no response has a score; run `simpo score` on it first")
    return rows, {prompt_id: candidates[prompt_id] for prompt_id in sorted(candidates)}


def _control_length(
    candidates: Mapping[str, list[Candidate]],
    rows: Mapping[str, _Row],
    keys: PairKeys,
    seed: int,
    account: _Account,
) -> tuple[dict[str, list[Candidate]], dict[str, Any]]:
    """The pairs that stay, at most `max_pairs` a prompt, and what length has to do with score before and after."""
    every = [answer for row in rows.values() for answer in row.answers]
    counted = all(answer.num_tokens is not None for answer in every)

    def length(answer: Answer) -> int:
        return answer.num_tokens if counted and answer.num_tokens is not None else len(answer.text)

    capped = {prompt_id: found[: keys.max_pairs] for prompt_id, found in candidates.items()}
    slope = length_slope([[(length(a), a.score) for a in row.answers] for row in rows.values()])
    kept, why = capped, ""
    if keys.length_control == "drop":
        kept = {
            prompt_id: [each for each in found if each.gap > slope * (length(each.chosen) - length(each.rejected))][
                : keys.max_pairs
            ]
            for prompt_id, found in candidates.items()
        }
        why = f"length alone explains the order, by {slope:.3g} of score a token"
    elif keys.length_control == "balance":
        kept = _balance(capped, length, keys, seed)
        why = "as many pairs are kept with the longer response chosen as with the shorter one"
    for prompt_id in candidates:
        if not kept[prompt_id]:
            account.leave_out(prompt_id, RowError("length_control", why))
    kept = {prompt_id: found for prompt_id, found in kept.items() if found}
    lengths: dict[str, Any] = {
        "unit": "tokens" if counted else "characters",
        "score_per_unit": slope,
        "before": describe_length(capped, length),
    }
    if keys.length_control != "none":
        lengths["after"] = describe_length(kept, length)
    return kept, lengths


def length_slope(prompts: Iterable[Sequence[tuple[float, float]]]) -> float:
    """Score for each unit of length, by least squares within prompts: each prompt has a mean of its own.

    Args:
        prompts: (length, score) of each prompt's responses.
    Returns:
        sum (l - mean l)(s - mean s) / sum (l - mean l)^2; 0 where no two lengths differ.
    """
    together = alone = 0.0
    for responses in prompts:
        mean_length, mean_score = (statistics.fmean(values) for values in zip(*responses, strict=True))
        together += sum((length - mean_length) * (score - mean_score) for length, score in responses)
        alone += sum((length - mean_length) ** 2 for length, _ in responses)
    return together / alone if alone else 0.0


def _balance(
    found: Mapping[str, list[Candidate]], length: Callable[[Answer], int], keys: PairKeys, seed: int
) -> dict[str, list[Candidate]]:
    """As many pairs with the longer response chosen as with the shorter one, on either side; a seeded choice."""
    dropped: set[Candidate] = set()
    for held_out in (False, True):
        sides: dict[int, list[Candidate]] = {1: [], -1: []}
        for each in (each for pairs in found.values() for each in pairs):
            difference = length(each.chosen) - length(each.rejected)
            if difference and is_held_out(each.prompt_id, keys.test_fraction) == held_out:
                sides[1 if difference > 0 else -1].append(each)
        fewer = min(map(len, sides.values()))
        for pairs in sides.values():
            by_hash = sorted(pairs, key=lambda each: _hash(seed, each.prompt_id, each.chosen.text, each.rejected.text))
            dropped.update(by_hash[fewer:])
    return {prompt_id: [each for each in pairs if each not in dropped] for prompt_id, pairs in found.items()}


def describe_length(found: Mapping[str, list[Candidate]], length: Callable[[Answer], int]) -> dict[str, Any]:
    """What length has to do with score in pairs.

    Returns:
        pairs; length_only_accuracy: the share of pairs in which the longer response is chosen, equal lengths half;
        spearman and pearson of score and length over the responses of the pairs, None where one does not vary.
    """
    import torch

    from simpo.evaluation.statistics import spearman_correlation

    pairs = [each for prompt in found.values() for each in prompt]
    if not pairs:
        return {"pairs": 0, "length_only_accuracy": None, "spearman": None, "pearson": None}
    longer = sum(
        (length(each.chosen) > length(each.rejected)) + (length(each.chosen) == length(each.rejected)) / 2
        for each in pairs
    )
    sides = [answer for each in pairs for answer in (each.chosen, each.rejected)]
    scores = torch.tensor([answer.score for answer in sides], dtype=torch.float64)
    lengths = torch.tensor([length(answer) for answer in sides], dtype=torch.float64)
    found_by = {
        "spearman": spearman_correlation(scores, lengths),
        "pearson": float(torch.corrcoef(torch.stack([scores, lengths]))[0, 1]),
    }
    correlations = {name: None if math.isnan(value) else round(value, 4) for name, value in found_by.items()}
    return {"pairs": len(pairs), "length_only_accuracy": round(longer / len(pairs), 4), **correlations}


# --- files -----------------------------------------------------------------------------------------------------------


def _pair_rows(pairs: Mapping[str, list[Candidate]], rows: Mapping[str, _Row]) -> Iterator[dict[str, Any]]:
    for prompt_id, found in pairs.items():
        for number, each in enumerate(found):
            yield {
                "id": prompt_id if len(found) == 1 else f"{prompt_id}-{number}",
                **rows[prompt_id].asked,
                "chosen": [{"role": "assistant", "content": each.chosen.text}],
                "rejected": [{"role": "assistant", "content": each.rejected.text}],
                "score_chosen": each.chosen.score,
                "score_rejected": each.rejected.score,
            }


def _list_rows(
    pairs: Mapping[str, list[Candidate]], rows: Mapping[str, _Row], left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The responses of each prompt that gives pairs, best first, from the best one on that is chosen in a pair.

    What stands above it may not be chosen, and a list's best is: it would teach what a limit keeps out.
    """
    for prompt_id, found in pairs.items():
        answers = rows[prompt_id].answers
        best = min(answers.index(each.chosen) for each in found)
        if best:
            left_out["above the best that may be chosen (of lists)"] += best
        answers = answers[best:]
        of_each = {"responses": [each.text for each in answers], "scores": [each.score for each in answers]}
        yield {"id": prompt_id, **rows[prompt_id].asked, **of_each}


def _write_splits(
    folder: Path,
    keys: PairKeys,
    pairs: Mapping[str, list[Candidate]],
    build: Callable[[Mapping[str, list[Candidate]]], Iterable[dict[str, Any]]],
) -> dict[str, int]:
    """train.jsonl and test.jsonl; a split without rows has no file. Returns how many pairs each has."""
    counts = {}
    for split in ("train", "test"):
        own = {k: v for k, v in pairs.items() if is_held_out(k, keys.test_fraction) == (split == "test")}
        counts[split] = sum(map(len, own.values()))
        path = folder / f"{split}.jsonl"
        if own:
            write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in build(own)))
        else:
            path.unlink(missing_ok=True)
    return counts


def _show(summary: Mapping[str, Any], folder: Path, lists: Path | None) -> None:
    display = Display()
    without = {**summary["left_out"], **summary["filtered"]}
    shown = {
        "prompts": summary["prompts"],
        "with pairs": summary["prompts_with_pairs"],
        **{
            f"without: {reason}": f"{entry['count']}  ({entry['examples'][0]['row_id']}: "
            f"{entry['examples'][0]['detail']})"
            for reason, entry in without.items()
        },
        **{f"responses left out: {reason}": count for reason, count in summary["responses"].items() if count},
        "pairs": f"{summary['pairs']['train']} to train, {summary['pairs']['test']} held out",
    }
    for when in ("before", "after"):
        if found := summary["length"].get(when):
            label = "length and score" if when == "before" else "  after length control"
            shown[label] = _length_line(found)
    shown["written to"] = f"{folder}" + (f", {lists}" if lists else "")
    display.table("pairs", shown)


def _length_line(found: Mapping[str, Any]) -> str:
    if not found["pairs"]:
        return "no pairs"
    spearman, pearson = ("-" if (value := found[name]) is None else f"{value:+.2f}" for name in ("spearman", "pearson"))
    return (
        f"chosen longer in {found['length_only_accuracy']:.0%} of {found['pairs']} pairs; "
        f"Spearman {spearman}, Pearson {pearson}"
    )
