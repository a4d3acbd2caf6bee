"""What an evaluation found: its numbers, their JSON and their tables.

`Evaluation` is one model on some pairs, `Comparison` two models on the same pairs. Both are plain values built from
per-pair log-probs; `run.py` runs the models.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from simpo.data.files import write_whole
from simpo.data.rows import name_sources
from simpo.display import say, visible
from simpo.evaluation.statistics import (
    SIMILAR_LENGTH,
    AccuracyTest,
    Interval,
    LengthBucket,
    PairedDifference,
    accuracy_by_length,
    compare_accuracies,
    mean_interval,
    paired_difference,
    preference_accuracy,
    preference_scores,
    spearman_correlation,
)

_BUCKET_WORDS = {
    "shorter": "chosen shorter",
    "similar": f"lengths within {SIMILAR_LENGTH:.0%}",
    "longer": "chosen longer",
}


@dataclass(frozen=True, slots=True)
class PairRecord:
    """One pair: summed log-probs in nats, and trained tokens, of both responses."""

    row_id: str
    chosen_sum: float
    rejected_sum: float
    chosen_length: int
    rejected_length: int

    @property
    def chosen_mean(self) -> float:
        """Nats per token."""
        return self.chosen_sum / self.chosen_length

    @property
    def rejected_mean(self) -> float:
        """Nats per token."""
        return self.rejected_sum / self.rejected_length

    @property
    def margin(self) -> float:
        """M, nats per token."""
        return self.chosen_mean - self.rejected_mean


class SourceResult(NamedTuple):
    """The pairs of one source."""

    name: str
    num_pairs: int
    accuracy: Interval
    margin: Interval


class SourceDifference(NamedTuple):
    """Two models on the pairs of one source, as in `Comparison`."""

    name: str
    num_pairs: int
    accuracy_difference: Interval
    accuracy_test: AccuracyTest
    margin: PairedDifference


@dataclass(frozen=True, slots=True)
class Generation:
    """A greedy response. `repeated_share`: share of its 4-token sequences that occur in it before."""

    row_id: str
    prompt: str
    response: str
    num_tokens: int
    repeated_share: float


@dataclass(frozen=True)
class Evaluation:
    """One model on held-out pairs. Intervals are at 95%; log-probs in nats.

    Attributes:
        model, data: what was evaluated, as it was named.
        split: of the data; None for pairs that came as tokens.
        data_fingerprint: hash of the very tokens that were evaluated.
        num_pairs: P.
        accuracy: share of pairs with mean log-prob chosen > rejected, ties half.
        accuracy_sum: the same under summed log-probs (no length normalisation).
        margin: M, mean log-prob of chosen minus rejected, per token.
        chosen_mean, rejected_mean: mean over pairs of the mean log-prob per token.
        chosen_sum, rejected_sum: mean over pairs of the summed log-prob.
        chosen_length, rejected_length: mean trained tokens.
        accuracy_by_length: buckets "shorter", "similar", "longer" of chosen against rejected.
        by_source: accuracy and margin of each source; empty where all pairs come from one.
        length_correlation: Spearman, of length and mean log-prob over all 2P responses; nan if there is none.
        generations: greedy responses, if any were asked for.
        pairs: the records all this comes from.
        settings: how it was computed: device, precision, layout.
        versions: of the packages that computed it.
        notes: what the reader must know: pairs dropped or cut, a fallback.
    """

    model: str
    data: str
    split: str | None
    data_fingerprint: str
    num_pairs: int
    accuracy: Interval
    accuracy_sum: Interval
    margin: Interval
    chosen_mean: float
    rejected_mean: float
    chosen_sum: float
    rejected_sum: float
    chosen_length: float
    rejected_length: float
    accuracy_by_length: tuple[LengthBucket, ...]
    length_correlation: float
    generations: tuple[Generation, ...]
    pairs: tuple[PairRecord, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    by_source: tuple[SourceResult, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-pair records, as plain values; what is not a number is None."""
        content = plain(dataclasses.replace(self, pairs=())) | {"repeated_share": plain(self.repeated_share)}
        del content["pairs"]
        if not self.by_source:
            del content["by_source"]
        return content

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        save_json(self.to_dict(), path)

    def save_pairs(self, path: str | Path) -> None:
        """Write one JSON line per pair: row_id, sums, means, margin, lengths."""
        means = ("chosen_mean", "rejected_mean", "margin")
        records = (dataclasses.asdict(pair) | {name: getattr(pair, name) for name in means} for pair in self.pairs)
        write_whole(path, "".join(json.dumps(record) + "\n" for record in records))

    @property
    def repeated_share(self) -> float | None:
        """Mean over generations; None without any."""
        shares = [generation.repeated_share for generation in self.generations]
        return sum(shares) / len(shares) if shares else None

    def render(self, console: Console | None = None) -> None:
        """Print as a table, and the generations."""
        console = console or Console(highlight=False)
        split = "" if self.split is None else f", split {self.split}"
        say(f"model  {self.model}", console, style="bold")
        say(f"data   {self.data}{split}: {_pairs(self.num_pairs)}, tokens {self.data_fingerprint}", console)
        table = table_of("", "value", "95% interval")
        table.add_row("preference accuracy", *percent(self.accuracy))
        table.add_row("margin M, nats per token", *_nats(self.margin))
        table.add_row("accuracy under sums", *percent(self.accuracy_sum))
        for bucket in self.accuracy_by_length:
            name = f"accuracy, {_BUCKET_WORDS[bucket.name]} ({_pairs(bucket.num_pairs)})"
            table.add_row(name, *(("-", "") if bucket.accuracy is None else percent(bucket.accuracy)))
        for name, num_pairs, accuracy, margin in self.by_source:
            table.add_row(Text(f"{name} ({_pairs(num_pairs)}): accuracy"), *percent(accuracy))
            table.add_row("  margin M", *_nats(margin))
        known = self.num_pairs > 1 and not math.isnan(self.length_correlation)  # two responses always lie on a line
        correlation = f"{self.length_correlation:+.3f}" if known else "-"
        table.add_row("Spearman of length and mean log-prob", correlation, "")
        console.print(table)
        table = table_of("", "chosen", "rejected")
        table.add_row("log-prob per token", f"{self.chosen_mean:.4f}", f"{self.rejected_mean:.4f}")
        table.add_row("log-prob, summed", f"{self.chosen_sum:.2f}", f"{self.rejected_sum:.2f}")
        table.add_row("tokens", f"{self.chosen_length:.1f}", f"{self.rejected_length:.1f}")
        console.print(table)
        self._render_generations(console)
        for note in self.notes:
            say(f"note: {note}", console, style="yellow")

    def _render_generations(self, console: Console) -> None:
        for generation in self.generations:
            prompt = generation.prompt.strip()
            text = Text(visible(prompt if len(prompt) <= 600 else f"...{prompt[-600:]}"), style="dim")
            text.append("\n\n" + (visible(generation.response) or "(empty)"), style="not dim")
            title = f"{generation.row_id}: {generation.num_tokens} tokens, {generation.repeated_share:.0%} repeated"
            console.print(Panel(text, title=Text(title), title_align="left"))
        if self.generations:
            say(f"repeated 4-token sequences: {self.repeated_share:.1%} on average", console)


@dataclass(frozen=True)
class Comparison:
    """Model a against model b (the baseline) on the same pairs. Differences are a - b, intervals at 95%.

    Attributes:
        model_a, model_b: their names.
        num_pairs: P.
        accuracy_a, accuracy_b: preference accuracies.
        accuracy_difference: of the accuracies, normal interval over pairs.
        accuracy_test: pairs on which each is better, and McNemar's exact p-value.
        margin, chosen_mean, rejected_mean: paired differences, nats per token, with sign-flip p-values.
        chosen_fell: likelihood displacement (arXiv:2410.08847): share of pairs whose chosen mean log-prob is lower
            under a; a margin can grow while both responses become less likely.
        by_source: accuracies and margins of each source; empty where all pairs come from one.
        notes: what the reader must know, such as different tokenisations.
    """

    model_a: str
    model_b: str
    num_pairs: int
    accuracy_a: Interval
    accuracy_b: Interval
    accuracy_difference: Interval
    accuracy_test: AccuracyTest
    margin: PairedDifference
    chosen_mean: PairedDifference
    rejected_mean: PairedDifference
    chosen_fell: Interval
    notes: tuple[str, ...] = ()
    by_source: tuple[SourceDifference, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is not a number is None."""
        content = plain(self)
        if not self.by_source:
            del content["by_source"]
        return content

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        save_json(self.to_dict(), path)

    def render(self, console: Console | None = None) -> None:
        """Print as a table."""
        console = console or Console(highlight=False)
        say(f"a  {self.model_a}", console, style="bold")
        say(f"b  {self.model_b}", console, style="bold")
        table = table_of(f"a - b on {_pairs(self.num_pairs)}", "value", "95% interval", "p")
        test = self.accuracy_test
        name = f"accuracy {self.accuracy_a.value:.1%} - {self.accuracy_b.value:.1%}, points"
        table.add_row(name, *_points(self.accuracy_difference), _p(test.p_value))
        table.add_row(f"  a better on {test.a_better}, b on {_pairs(test.b_better)}", "", "", "")
        for name, difference in (
            ("margin M, nats per token", self.margin),
            ("chosen log-prob per token", self.chosen_mean),
            ("rejected log-prob per token", self.rejected_mean),
        ):
            table.add_row(name, *_nats(Interval(*difference[:3])), _p(difference.p_value))
        table.add_row("pairs whose chosen log-prob is lower under a", *percent(self.chosen_fell), "")
        for each in self.by_source:
            name = Text(f"{each.name} ({_pairs(each.num_pairs)}): accuracy, points")
            table.add_row(name, *_points(each.accuracy_difference), _p(each.accuracy_test.p_value))
            table.add_row("  margin M", *_nats(Interval(*each.margin[:3])), _p(each.margin.p_value))
        console.print(table)
        for note in self.notes:
            say(f"note: {note}", console, style="yellow")


# --- from records to numbers -----------------------------------------------------------------------------------------


def build_evaluation(pairs: Sequence[PairRecord], **identity: Any) -> Evaluation:
    """The numbers of some pairs.

    Args:
        pairs: at least one, with finite log-probs.
        identity: the other attributes of `Evaluation`: model, data, split, data_fingerprint, generations, settings,
            versions, notes.
    Raises:
        ValueError: no pairs, or log-probs that are not finite.
    """
    if not pairs:
        raise ValueError("no pairs to evaluate")
    broken = [p.row_id for p in pairs if not math.isfinite(p.chosen_sum + p.rejected_sum)]
    if broken:
        more = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
        raise ValueError(
            f"the model's log-probs are not finite on {len(broken)} of {len(pairs)} pairs: {', '.join(broken[:8])}"
            f"{more}; the model's weights are broken, or overflow in this precision (try bf16: false)"
        )
    names = [f"{side}_{what}" for what in ("mean", "sum", "length") for side in ("chosen", "rejected")]
    columns = {name: _column(pairs, name) for name in names}
    chosen, rejected = columns["chosen_mean"], columns["rejected_mean"]
    lengths = columns["chosen_length"], columns["rejected_length"]
    return Evaluation(
        num_pairs=len(pairs),
        accuracy=preference_accuracy(chosen - rejected),
        accuracy_sum=preference_accuracy(columns["chosen_sum"] - columns["rejected_sum"]),
        margin=mean_interval(chosen - rejected),
        **{name: float(values.mean()) for name, values in columns.items()},
        accuracy_by_length=accuracy_by_length(chosen - rejected, *lengths),
        length_correlation=spearman_correlation(torch.cat(lengths), torch.cat([chosen, rejected])),
        pairs=tuple(pairs),
        by_source=_by_source(pairs, chosen - rejected),
        **identity,
    )


def _masks(pairs: Sequence[PairRecord]) -> list[tuple[str, Tensor]]:
    """Each source and which pairs [P] are its; nothing where there is only one."""
    names, numbers = name_sources(pair.row_id for pair in pairs)
    return [(name, torch.from_numpy(numbers == number)) for number, name in enumerate(names)]


def _by_source(pairs: Sequence[PairRecord], margins: Tensor) -> tuple[SourceResult, ...]:
    of_each = ((name, margins[mask]) for name, mask in _masks(pairs))
    return tuple(SourceResult(name, len(own), preference_accuracy(own), mean_interval(own)) for name, own in of_each)


def _differences(pairs: Sequence[PairRecord], margins_a: Tensor, margins_b: Tensor) -> tuple[SourceDifference, ...]:
    return tuple(
        SourceDifference(
            name,
            len(a),
            mean_interval(preference_scores(a) - preference_scores(b)),
            compare_accuracies(a, b),
            paired_difference(a, b),
        )
        for name, a, b in ((name, margins_a[mask], margins_b[mask]) for name, mask in _masks(pairs))
    )


def compare(evaluation_a: Evaluation, evaluation_b: Evaluation) -> Comparison:
    """Two models on the same pairs, by paired tests.

    Args:
        evaluation_a: the model in question.
        evaluation_b: the baseline, evaluated on the same pairs, in any order.
    Raises:
        ValueError: the two were not evaluated on the same pairs, or a row_id names two pairs.
    """
    pairs_a, pairs_b = evaluation_a.pairs, _aligned(evaluation_a.pairs, evaluation_b.pairs)
    chosen_a, chosen_b = _column(pairs_a, "chosen_mean"), _column(pairs_b, "chosen_mean")
    rejected_a, rejected_b = _column(pairs_a, "rejected_mean"), _column(pairs_b, "rejected_mean")
    margin_a, margin_b = chosen_a - rejected_a, chosen_b - rejected_b
    notes = ()
    lengths = [[(p.chosen_length, p.rejected_length) for p in pairs] for pairs in (pairs_a, pairs_b)]
    if lengths[0] != lengths[1]:
        notes = ("the models split the text into different tokens: nats per token do not compare, accuracies do",)
    return Comparison(
        model_a=evaluation_a.model,
        model_b=evaluation_b.model,
        num_pairs=len(pairs_a),
        accuracy_a=evaluation_a.accuracy,
        accuracy_b=evaluation_b.accuracy,
        accuracy_difference=mean_interval(preference_scores(margin_a) - preference_scores(margin_b)),
        accuracy_test=compare_accuracies(margin_a, margin_b),
        margin=paired_difference(margin_a, margin_b),
        chosen_mean=paired_difference(chosen_a, chosen_b),
        rejected_mean=paired_difference(rejected_a, rejected_b),
        chosen_fell=preference_accuracy(chosen_b - chosen_a),
        notes=notes,
        by_source=_differences(pairs_a, margin_a, margin_b),
    )


def _aligned(pairs_a: Sequence[PairRecord], pairs_b: Sequence[PairRecord]) -> list[PairRecord]:
    """pairs_b in the order of pairs_a."""
    by_id = {pair.row_id: pair for pair in pairs_b}
    ids = {pair.row_id for pair in pairs_a}
    if len(by_id) < len(pairs_b) or len(ids) < len(pairs_a):
        raise ValueError("two models are compared pair by pair, but some pairs have the same row_id; make them unique")
    if ids != set(by_id):
        only, total = sorted(ids ^ set(by_id)), len(ids | set(by_id))
        raise ValueError(
            f"two models are compared on the same pairs, but {len(only)} of {total} pairs were evaluated for one model "
            f"alone, for example {only[0]}; use the same data, split and max_pairs for both"
        )
    return [by_id[pair.row_id] for pair in pairs_a]


def _column(pairs: Sequence[PairRecord], name: str) -> Tensor:
    return torch.tensor([getattr(pair, name) for pair in pairs], dtype=torch.float64)


# --- writing and printing --------------------------------------------------------------------------------------------


def save_json(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a mapping as JSON, whole or not at all; what is not a number is null."""
    write_whole(path, json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Named tuples and dataclasses as mappings; nan and infinities as None."""
    if dataclasses.is_dataclass(value):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table_of(*columns: str) -> Table:
    """An empty table of numbers, without lines."""
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", header_style="dim", no_wrap=bool(index))
    return table


def _pairs(count: int) -> str:
    return f"{count} pair{'s' * (count != 1)}"


def percent(interval: Interval) -> tuple[str, str]:
    """A share and its interval, for a table."""
    return f"{interval.value:.1%}", f"{interval.low:.1%} .. {interval.high:.1%}"


def _nats(interval: Interval) -> tuple[str, str]:
    between = "-" if math.isnan(interval.low) else f"{interval.low:+.4f} .. {interval.high:+.4f}"
    return f"{interval.value:+.4f}", between


def _points(interval: Interval) -> tuple[str, str]:
    value, low, high = (f"{100 * x:+.1f}" for x in interval)
    return value, "-" if math.isnan(interval.low) else f"{low} .. {high}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
