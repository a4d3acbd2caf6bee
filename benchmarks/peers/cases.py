"""The cases of the benchmark: which pairs, of which lengths, as exactly the token ids that every side trains on.

Imports numpy and the batch plan alone; the data layer is imported where real pairs are tokenised.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from simpo.core.packing import TokenPair

SIGMA = 0.7
"""Spread of the drawn log-lengths: padding to the longest of 2, 4 and 8 such pairs multiplies tokens by 1.55, 1.91 and
2.29, as measured chat data does (1.56, 1.94, 2.33)."""
LONGEST = 8192
"""Real pairs with a longer side are left out, and counted; none is cut."""


class CaseSkipped(ValueError):
    """This case cannot be had here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One kind of pairs.

    Attributes:
        name: as `--cases` takes it.
        about: one line for tables and charts.
        kind: "file" (real pairs), "fixed" (every pair has the same lengths) or "drawn" (log-normal lengths).
        source: of a file, its path; a named set's folder is looked for in the data folder.
        lengths: prompt, chosen and rejected tokens of synthetic pairs; the means where they are drawn.
        pairs_per_micro_batch: used unless the command says otherwise.
    """

    name: str
    about: str
    kind: Literal["file", "fixed", "drawn"]
    source: str | None = None
    lengths: tuple[int, int, int] | None = None
    pairs_per_micro_batch: int = 4

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-")


def _fixed(name: str, *, pairs_per_micro_batch: int = 4) -> Case:
    prompt, chosen, rejected = (int(part) for part in name.split("/"))
    about = f"every pair {prompt} + {chosen} / {rejected} tokens"
    return Case(name, about, "fixed", None, (prompt, chosen, rejected), pairs_per_micro_batch)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("chat", "short prompts, ragged lengths around 173 + 263 / 277", "drawn", None, (173, 263, 277)),
        Case("hh", "human chat, several turns", "file", "en_hh_helpful"),
        Case("longprompt", "questions with passages", "file", "en_qa_feedback_longprompt"),
        Case("code", "near-identical code", "file", "code_humanevalpack"),
        _fixed("200/350/350"),
        _fixed("1000/300/300"),
        _fixed("4096/256/256", pairs_per_micro_batch=1),
    )
}


def find_cases(names: str) -> list[Case]:
    """The cases that `--cases` names: known names, `all`, lengths as P/C/R, or files and folders of pairs.

    Raises:
        ValueError: a name that is none of these, with what is allowed.
    """
    found: dict[str, Case] = {}
    for name in (part.strip() for part in names.split(",")):
        if name == "all":
            found |= CASES
        elif name in CASES:
            found[name] = CASES[name]
        elif re.fullmatch(r"\d+/\d+/\d+", name):
            if min(map(int, name.split("/"))) < 1:
                raise ValueError(f"cases: {name}: prompt, chosen and rejected need at least one token each")
            found[name] = _fixed(name)
        elif name and Path(name).exists():
            label = Path(name).resolve().name
            found[label] = Case(label, "pairs of your own", "file", str(Path(name).resolve()))
        else:
            raise ValueError(
                f"cases: {name!r} is none of {', '.join(CASES)}, nor all, nor lengths such as 500/100/100 "
                "(prompt/chosen/rejected tokens), nor a file or folder of pairs"
            )
    return list(found.values())


def build_pairs(
    case: Case, count: int, *, warm_up: int = 0, vocab_size: int, tokenizer: Path | None, data: str | None
) -> list[TokenPair]:
    """The case's fixed list: the same pairs in the same order on every call.

    Args:
        case: which.
        count: pairs to measure; they alone stand for the case.
        warm_up: pairs in front of them.
        vocab_size: synthetic tokens are drawn below it; real ones must lie below it.
        tokenizer: folder of the tokenizer for real pairs; None = there is none.
        data: folder that holds the named sets.
    Raises:
        CaseSkipped: no such data here, no tokenizer for it, or fewer pairs than needed.
    """
    if case.kind == "file":
        return _real_pairs(case, count, warm_up, vocab_size, tokenizer, data)
    rng = np.random.default_rng([0, *case.lengths])
    lengths = np.concatenate([_draw_lengths(case, rng, size) for size in (warm_up, count)])
    return [_synthetic_pair(rng, f"{case.slug}-{i}", *sizes, vocab_size) for i, sizes in enumerate(lengths.tolist())]


def _draw_lengths(case: Case, rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, 3] tokens; drawn ones are scaled so that their means are the case's."""
    if case.kind == "fixed" or count == 0:
        return np.tile(case.lengths, (count, 1))
    drawn = np.exp(rng.normal(0.0, SIGMA, size=(count, 3)))
    return np.maximum(2, np.rint(drawn * case.lengths / drawn.mean(axis=0))).astype(int)


def _synthetic_pair(
    rng: np.random.Generator, row_id: str, prompt: int, chosen: int, rejected: int, vocab_size: int
) -> TokenPair:
    """Random tokens; the responses differ in their first, so that exactly the prompt is shared."""
    ids, one, other = (rng.integers(0, vocab_size, size=size).tolist() for size in (prompt, chosen, rejected))
    other[0] = (one[0] + 1) % vocab_size
    return TokenPair(row_id, ids + one, prompt, ids + other, prompt)


def _real_pairs(
    case: Case, count: int, warm_up: int, vocab_size: int, tokenizer: Path | None, data: str | None
) -> list[TokenPair]:
    path = Path(case.source)
    if not path.is_absolute():
        path = Path(data or ".") / path
        if not path.exists():
            raise CaseSkipped(f"there is no folder {case.source} in the data folder; --data says where the sets are")
    if tokenizer is None:
        raise CaseSkipped(
            "random weights have no tokenizer; `make model` fetches the small model, whose tokenizer would do"
        )
    if importlib.util.find_spec("datasets") is None:
        raise CaseSkipped("reading pairs needs datasets, which is not installed")
    from simpo.data.loader import PairStore
    from simpo.data.prepare import prepare_pairs
    from simpo.model.load import load_tokenizer
    from simpo.recipe import load_recipe

    recipe = load_recipe(
        {
            "model_name_or_path": str(tokenizer),
            "dataset_mixer": {str(path): 1.0},
            "validation_fraction": 0.0,
            "max_length": LONGEST,
            "max_prompt_length": LONGEST - 1,
            "overlong": "drop",
            "max_dropped_fraction": 1.0,
        }
    )
    store = PairStore(prepare_pairs(recipe, load_tokenizer(recipe), progress=False).train)
    needed = warm_up + count
    if len(store) < needed:
        raise CaseSkipped(f"has {len(store)} pairs and {needed} are needed; lower --steps or the pairs per step")
    ranked = np.argsort(store.sequence_lengths.sum(axis=1), kind="stable").tolist()
    measured = _evenly(ranked, count)
    others = set(measured)
    first = _evenly([index for index in ranked if index not in others], warm_up)
    pairs = [store[index] for index in first + measured]
    largest = max(max(pair.chosen_ids + pair.rejected_ids) for pair in pairs)
    if largest >= vocab_size:
        raise CaseSkipped(f"token {largest} is not in the model's vocabulary of {vocab_size}")
    return pairs


def _evenly(ranked: Sequence[int], count: int) -> list[int]:
    """Evenly spaced ones of indices ranked by length, shuffled: few pairs that stand for all."""
    chosen = [ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count)]
    random.Random("simpo-bench").shuffle(chosen)
    return chosen


def save_pairs(pairs: Sequence[TokenPair], path: Path) -> None:
    """Write pairs for the workers, as JSON."""
    path.write_text(json.dumps([asdict(pair) for pair in pairs]), encoding="utf-8")


def load_pairs(path: Path) -> list[TokenPair]:
    """Read what `save_pairs` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    lists = ("chosen_ids", "rejected_ids")
    values = ({k: tuple(v) if isinstance(v, list) and k not in lists else v for k, v in row.items()} for row in rows)
    return [TokenPair(**each) for each in values]


def describe_pairs(pairs: Sequence[TokenPair]) -> dict[str, float]:
    """Mean lengths in tokens: prompt, chosen and rejected responses."""
    starts = np.array([[pair.chosen_start, pair.rejected_start] for pair in pairs])
    sizes = np.array([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs])
    chosen, rejected = (sizes - starts).mean(axis=0)
    return {
        "prompt": round(float(starts.min(axis=1).mean()), 1),
        "chosen": round(float(chosen), 1),
        "rejected": round(float(rejected), 1),
        "longest_row": int(sizes.max()),
    }
