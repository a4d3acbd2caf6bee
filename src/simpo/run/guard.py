"""The guard: what of a run's numbers and answers looks like a collapse, said once, with what to change.

`Guard` judges the lines of metrics.jsonl and the answers of generations.jsonl, and nothing else, so that a resumed run,
or anybody, gets the same verdicts by reading them again. `RunGuard` is a run's: it judges on the first process, writes
guard.jsonl, shows what was found, and tells every process whether to stop. Thresholds are relative to the run's own
start and to gamma; each is named here once, and docs/trouble.md shows `CHECKS` word for word.

Must not import the trainer or evaluation.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from simpo.data.files import write_whole
from simpo.data.language import MIN_CONFIDENCE, identify_language
from simpo.run.logs import read_log
from simpo.run.resume import record_stop
from simpo.run.stopping import StoppedByGuard
from simpo.run.tracking import GENERATIONS_FILE, forget_lines_after

if TYPE_CHECKING:
    from simpo.display import Display
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe

WINDOW = 8  # logged lines in "the start" and in "now"
FALL = 0.75  # of the log-prob at the start
CRASH = 2.3  # nats: a token's probability falls to a tenth
BROKEN = -10.0  # nats a token
BEYOND_GAMMA = 4.0  # sigmoid(-4) = 0.018: what is left of a pair's gradient
ACCURACY_GAP = 0.15
HELD_OUT_FALL = 0.25  # of gamma
SURE = 3.0  # standard errors; 4 where few lines tell them
SPIKE = 10.0
NORMS = 50  # logged lines that a norm is compared with
MORE_ANSWERS = 0.25
LOOPS = 0.5  # of an answer's 4-token sequences occur in it before
LONGER, SHORTER = 2.0, 1 / 3
SOURCE_LINES = 20
HUGE_RATE = 1e-2


class Check(NamedTuple):
    """One thing to watch: when it speaks, where its thresholds come from, and what to change then."""

    when: str
    source: str
    advice: str


CHECKS = {
    "displacement": Check(
        f"the mean log-prob of chosen answers has fallen by {FALL:.0%} of what it was at the start, and by more than "
        f"the margin has grown (means of {WINDOW} lines, or held-out); or by {CRASH:g} nats, or from above "
        f"{BROKEN:g} to below it, in two lines in a row or held-out",
        "[3] for -10; the rest ours",
        "Lower learning_rate, or raise beta; sft_weight: 0.05 to 0.1 holds the chosen answers up",
    ),
    "margin": Check(
        f"`rewards/margins` is above gamma + {BEYOND_GAMMA:g} (median of {WINDOW} lines, or held-out): less than 2% of "
        "a pair's gradient is left",
        "the loss itself; at gamma 1 it is the 5 of [3]",
        "Train for fewer steps, or lower learning_rate",
    ),
    "overfitting": Check(
        f"accuracy has grown by {ACCURACY_GAP:.0%} more on training than on held-out pairs, {SURE:g} standard errors; "
        f"or the held-out margin has fallen by {HELD_OUT_FALL:g} gamma while that of training pairs grew",
        "ours",
        "Look for swapped or contradictory pairs (simpo audit); train for fewer steps, or lower learning_rate",
    ),
    "answers": Check(
        f"{MORE_ANSWERS:.0%} of the held-out answers, and at least 2, do since the first ones what they did not: "
        f"repeat themselves ({LOOPS:.0%} of 4-token sequences), run to the limit, or change language; or the "
        f"median length of those that came to their end at first is {LONGER:g} times or a third of what it was",
        "ours",
        "Lower learning_rate, and read generations.jsonl",
    ),
    "gradient": Check(
        f"`grad_norm` is {SPIKE:g} times its median over the last {NORMS} lines",
        "ours",
        "Look at the pairs of that step (simpo audit); if it happens again, lower learning_rate",
    ),
    "sources": Check(
        "pairs of one source have a negative margin, and that of the others is gamma and 4 standard errors above it; "
        f"or its held-out accuracy fell by {SURE:g} standard errors; or more of its rows are dropped than "
        "`max_dropped_fraction` allows of all",
        "ours",
        "Look at its pairs (simpo audit), or lower its fraction in dataset_mixer",
    ),
    "learning_rate": Check(
        f"`learning_rate` is {HUGE_RATE:g} or more: AdamW moves each weight by about as much a step, and a model's "
        "weights are of that size",
        "ours; published are 3e-7 to 1e-6 [1]",
        "Lower learning_rate: 1e-6 for a large model, up to 5e-5 for a very small one",
    ),
}


class Finding(NamedTuple):
    """What was found after `step`, and since when it shows; `source` where it is of one source of a mixture."""

    step: int
    check: str
    since_step: int
    saw: str
    source: str = ""


class _Reading(NamedTuple):
    """How near one check is to speaking: at 1 it does."""

    check: str
    severity: float
    saw: str
    source: str = ""
    kind: str = ""  # of several signs of one check


class Guard:
    """Judges a run by its lines, in their order.

    Args:
        gamma: target reward margin; None where the loss has none.
    """

    def __init__(self, *, gamma: float | None) -> None:
        self._gamma = gamma
        self._since: dict[tuple[str, ...], int] = {}
        self._said: set[tuple[str, str]] = set()
        self._first: list[Mapping[str, float]] = []  # of the training lines
        self._recent: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._margins: deque[dict[str, float]] = deque(maxlen=SOURCE_LINES)  # of each source
        self._num_lines = 0
        self._accuracies = [_Accuracy()]  # of training pairs, between evaluations
        self._held_out: Mapping[str, float] | None = None  # the first evaluation
        self._answers: dict[str, Mapping[str, Any]] | None = None  # the first ones, by row
        self._languages: dict[str, str] = {}

    def read(self, line: Mapping[str, Any]) -> list[Finding]:
        """A line of metrics.jsonl: of training or of an evaluation; others say nothing."""
        if "eval_loss" in line:
            return self._judge(line["step"], self._read_evaluation(line))
        return self._judge(line["step"], self._read_training(line)) if "logps/chosen" in line else []

    def read_answers(self, step: int, answers: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """The lines of generations.jsonl after one step."""
        return self._judge(step, self._read_answers({str(answer["row_id"]): answer for answer in answers}))

    def read_start(self, learning_rate: float, dropped: Mapping[str, tuple[int, int]], most: float) -> list[Finding]:
        """What can be seen before the first step.

        Args:
            dropped: source -> rows that were dropped, and all of them.
            most: `max_dropped_fraction`.
        """
        saw = f"the learning rate is {learning_rate:g}, about as large as a model's weights"
        readings = [_Reading("learning_rate", learning_rate / HUGE_RATE, saw)]
        for source, (count, rows) in dropped.items():
            saw = f"{count} of {rows} rows of {source} were dropped"
            severity = count / rows / most if most and rows >= 10 and len(dropped) > 1 else 0.0
            readings.append(_Reading("sources", severity, saw, source))
        return self._judge(0, readings)

    @property
    def suspected_since(self) -> Collection[int]:
        """The steps since which something shows that is not said yet, or was."""
        return set(self._since.values())

    def _judge(self, step: int, readings: Iterable[_Reading]) -> list[Finding]:
        found = []
        for check, severity, saw, source, kind in readings:
            if severity < 0.5:
                self._since.pop((check, source, kind), None)
                continue
            since = self._since.setdefault((check, source, kind), step)
            if severity >= 1 and (check, source) not in self._said:
                self._said.add((check, source))
                found.append(Finding(step, check, since, saw, source))
        return found

    # --- training ----------------------------------------------------------------------------------------------------

    def _read_training(self, line: Mapping[str, Any]) -> Iterator[_Reading]:
        pairs = line.get("pairs_seen", 0) - (self._recent[-1].get("pairs_seen", 0) if self._recent else 0)
        self._accuracies[-1].add(line["rewards/accuracies"], max(pairs, 1))
        self._num_lines += 1
        if len(self._first) < WINDOW:
            self._first.append(line)
        self._recent.append(line)
        yield self._crash()
        if self._num_lines >= 2 * WINDOW:
            yield self._displacement()
        if self._gamma is not None and self._num_lines >= WINDOW:
            yield _margin(statistics.median(each["rewards/margins"] for each in self._recent), self._gamma)
        yield from self._gradient(line.get("grad_norm"))
        yield from self._sources(line)

    def _crash(self) -> _Reading:
        """By two lines in a row, for one may have unusual pairs; by one alone where it is three times as far."""
        start = statistics.median(each["logps/chosen"] for each in self._first)
        *_, before, now = [start, *(each["logps/chosen"] for each in self._recent)]
        one, two = _crash(start, now), _crash(start, max(before, now))
        return one._replace(severity=max(two.severity, one.severity / 3, min(one.severity, 0.5)))

    def _displacement(self) -> _Reading:
        """The last lines against the first ones."""
        first, now = ([each["logps/chosen"] for each in part] for part in (self._first, self._recent))
        start, fall = statistics.fmean(first), statistics.fmean(first) - statistics.fmean(now)
        growth = statistics.fmean(map(_margin_of, self._recent)) - statistics.fmean(map(_margin_of, self._first))
        error = math.sqrt((statistics.variance(first) + statistics.variance(now)) / WINDOW)
        return _fall(start, fall, growth, at_least=(SURE + 1) * error)

    def _gradient(self, norm: float | None) -> Iterator[_Reading]:
        if norm is None:
            return
        if len(self._norms) >= 8:
            usual = statistics.median(self._norms)
            saw = f"the gradient's norm is {norm:.3g}; {usual:.3g} is usual in this run"
            yield _Reading("gradient", norm / max(SPIKE * usual, 1e-12), saw)
        self._norms.append(norm)

    def _sources(self, line: Mapping[str, Any]) -> Iterator[_Reading]:
        name = "rewards/margins/"
        margins = {key[len(name) :]: value for key, value in line.items() if key.startswith(name)}
        if not margins:
            return
        self._margins.append(margins)
        for source in margins:
            own = [each[source] for each in self._margins if source in each]
            rest = [value for each in self._margins for other, value in each.items() if other != source]
            if min(len(own), len(rest)) < 4:
                continue
            mean, others = statistics.fmean(own), statistics.fmean(rest)
            error = math.sqrt(statistics.variance(own) / len(own) + statistics.variance(rest) / len(rest))
            least = 0.0 if self._gamma is None else self._gamma or 1.0
            gap, needed = others - mean, max(least, (SURE + 1) * error, 1e-12)
            saw = f"the margin of {source}'s pairs is {mean:+.2f}, that of the others {others:+.2f}"
            yield _Reading("sources", gap / needed if mean < 0 else 0.0, saw, source, "train")

    # --- held-out pairs ----------------------------------------------------------------------------------------------

    def _read_evaluation(self, line: Mapping[str, Any]) -> Iterator[_Reading]:
        now = {name[5:]: value for name, value in line.items() if name.startswith("eval_")}
        if self._gamma is not None:
            yield _margin(now["rewards/margins"], self._gamma, "held-out ")
        self._accuracies.append(_Accuracy())
        if self._held_out is None:
            self._held_out = now
            return
        start = self._held_out
        fall = start["logps/chosen"] - now["logps/chosen"]
        yield _crash(start["logps/chosen"], now["logps/chosen"], "held-out ")
        yield _fall(start["logps/chosen"], fall, _margin_of(now) - _margin_of(start), "held-out ")
        yield from self._gap(start, now)
        yield from self._held_out_fall(start, now)
        name = "rewards/accuracies/"
        for source in (key[len(name) :] for key in now if key.startswith(name) and key in start):
            pairs = now.get(f"pairs/{source}", 0)
            was, is_ = start[name + source], now[name + source]
            saw = f"accuracy on held-out pairs of {source} fell from {was:.0%} to {is_:.0%}"
            severity = (was - is_) / (SURE * _error((was, pairs), (is_, pairs)))
            yield _Reading("sources", severity, saw, source, "held-out")

    def _gap(self, start: Mapping[str, float], now: Mapping[str, float]) -> Iterator[_Reading]:
        """Accuracy on training pairs between evaluations, against that on held-out pairs."""
        parts = [part for part in self._accuracies if part.pairs]
        if len(parts) < 2:
            return
        (was, n), (is_, m) = ((part.mean, part.pairs) for part in (parts[0], parts[-1]))
        before, after, pairs = start["rewards/accuracies"], now["rewards/accuracies"], now.get("pairs", 0)
        gap = (is_ - was) - (after - before)
        error = _error((was, n), (is_, m), (before, pairs), (after, pairs))
        trained = f"accuracy on training pairs went from {was:.0%} to {is_:.0%}"
        saw = f"{trained}, on held-out pairs from {before:.0%} to {after:.0%}"
        yield _Reading("overfitting", gap / max(ACCURACY_GAP, SURE * error), saw, kind="gap")

    def _held_out_fall(self, start: Mapping[str, float], now: Mapping[str, float]) -> Iterator[_Reading]:
        if self._gamma is None or self._num_lines <= WINDOW:
            return
        before, after = start["rewards/margins"], now["rewards/margins"]
        was, is_ = (statistics.fmean(each["rewards/margins"] for each in part) for part in (self._first, self._recent))
        saw = (
            f"the held-out margin went from {before:+.2f} to {after:+.2f}, that of training pairs from {was:+.2f} to "
            f"{is_:+.2f}"
        )
        severity = (before - after) / (HELD_OUT_FALL * (self._gamma or 1.0)) if is_ > was else 0.0
        yield _Reading("overfitting", severity, saw, kind="fall")

    # --- answers -----------------------------------------------------------------------------------------------------

    def _read_answers(self, answers: dict[str, Mapping[str, Any]]) -> Iterator[_Reading]:
        if self._answers is None:
            self._answers = answers
            self._languages = {row: code for row, each in answers.items() if (code := _language(each["response"]))}
            return
        before = self._answers
        both = [(before[row], answer) for row, answer in answers.items() if "tokens" in before.get(row, ())]
        if not both:
            return
        enough = max(2.0, MORE_ANSWERS * len(both))
        for kind, does, what in (
            ("loops", lambda answer: answer["repeated_share"] > LOOPS, "repeat themselves"),
            ("limit", lambda answer: not answer["finished"], "run to the limit"),
        ):
            was, is_ = (sum(map(does, side)) for side in zip(*both, strict=True))
            saw = f"{is_} of {len(both)} held-out answers {what}; {was} did at the start"
            yield _Reading("answers", (is_ - was) / enough, saw, kind=kind)
        # An answer that ran to the limit at the start had no length of its own; that it ends now is no bad sign.
        ratios = [max(now["tokens"], 1) / max(was["tokens"], 1) for was, now in both if was["finished"]]
        if len(ratios) >= enough:
            ratio = statistics.median(ratios)
            change = math.log(ratio) / math.log(LONGER if ratio > 1 else SHORTER)
            saw = f"held-out answers are {ratio:.2g} times as long as at the start (median)"
            yield _Reading("answers", change, saw, kind="length")
        languages = {row: _language(answers[row]["response"]) for row in self._languages if row in answers}
        other = [row for row, code in languages.items() if code not in (None, self._languages[row])]
        saw = f"{len(other)} of {len(both)} held-out answers are in another language than at the start"
        yield _Reading("answers", len(other) / enough, saw, kind="language")


@dataclass
class _Accuracy:
    right: float = 0.0
    pairs: int = 0

    def add(self, mean: float, pairs: int) -> None:
        self.right, self.pairs = self.right + mean * pairs, self.pairs + pairs

    @property
    def mean(self) -> float:
        return self.right / self.pairs


def _margin_of(values: Mapping[str, float]) -> float:
    """In nats a token, whatever the loss calls a reward."""
    return values["logps/chosen"] - values["logps/rejected"]


def _margin(margin: float, gamma: float, where: str = "") -> _Reading:
    saw = f"the {where}margin is {margin:+.2f}, and the loss asks for {gamma:g}"
    return _Reading("margin", margin / (gamma + BEYOND_GAMMA), saw, kind=where)


def _crash(start: float, now: float, where: str = "") -> _Reading:
    saw = f"the log-prob of {where}chosen answers went from {start:.2f} to {now:.2f} nats a token"
    severity = max((start - now) / CRASH, now / BROKEN if start > BROKEN else 0.0)
    return _Reading("displacement", severity, saw, kind=f"{where}crash")


def _fall(start: float, fall: float, growth: float, where: str = "", *, at_least: float = 0.0) -> _Reading:
    needed = max(FALL * abs(start), growth, at_least)
    saw = (
        f"the log-prob of {where}chosen answers fell from {start:.2f} to {start - fall:.2f} nats a token, while their "
        f"margin over the rejected ones grew by {growth:.2f}"
    )
    return _Reading("displacement", fall / max(needed, 1e-12), saw, kind=f"{where}fall")


def _error(*shares: tuple[float, float]) -> float:
    """Of a sum of shares, each of so many; a share of 0 or 1 counts as if one more had been otherwise."""
    smoothed = [((share * n + 0.5) / (n + 1), n + 1) for share, n in shares]
    return math.sqrt(sum(p * (1 - p) / n for p, n in smoothed))


def _language(text: str) -> str | None:
    """The language of a text where that is clear, and where simpo[clean] is installed."""
    try:
        found = identify_language(text)
    except ValueError:
        return None
    return found[0] if found is not None and found[1] >= MIN_CONFIDENCE else None


# --- a run's guard ---------------------------------------------------------------------------------------------------


class RunGuard:
    """The guard of a run that is under way; every process has one and calls the same methods.

    Args:
        folder: gets guard.jsonl, one line for each finding.
        done: steps that were done before; what was found up to there is not found again.
        history: the lines of metrics.jsonl up to there; None = read them, as the answers always are, from the folder.
    Attributes:
        verdict: the finding that ends the run, and its level; None while it goes on.
        has_chosen: whether `choose` was called.
        back_to: the step whose checkpoint becomes the model; set by `choose`.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        mesh: Mesh,
        display: Display,
        *,
        done: int = 0,
        history: Iterable[Mapping[str, Any]] | None = None,
    ) -> None:
        self._recipe, self._mesh, self._display, self._done = recipe, mesh, display, done
        self._path = folder / "guard.jsonl"
        self._acts = {"stop", "back"} & set(recipe.guard.values())
        self._evaluated: dict[int, float] = {}
        self._guard = Guard(gamma=recipe.gamma if "gamma_beta_ratio" in recipe.loss.defaults else None)
        self.verdict: tuple[Finding, str] | None = None
        self.has_chosen, self.back_to = False, None
        if mesh.is_main:
            forget_lines_after(self._path, done if done else -1)
            rows = [*read_log(self._path)]
            if any("back_to" in row for row in rows):  # it goes on after all
                kept = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows if "back_to" not in row)
                write_whole(self._path, kept)
            answers = groupby(read_log(folder / GENERATIONS_FILE), lambda answer: answer["step"])
            by_step = {step: list(group) for step, group in answers}
            for line in read_log(folder / "metrics.jsonl") if history is None else history:
                self._judge(line, by_step.get(line["step"], ()) if "eval_loss" in line else ())

    def begin(self, dropped: Mapping[str, tuple[int, int]]) -> None:
        """Before the first step of this start; see `Guard.read_start`.

        Raises:
            StoppedByGuard: something was found whose level is stop or back.
        """
        found = self._guard.read_start(self._recipe.learning_rate, dropped, self._recipe.max_dropped_fraction)
        self._tell([] if self._done or not self._mesh.is_main else found)
        if self.verdict is not None:
            check = self.verdict[0].check
            raise self._stop(
                f"stopped by the guard before the first step ({check}); --guard.{check} warn trains all the same"
            )

    def heed(self, step: int, values: Mapping[str, Any], answers: Sequence[Mapping[str, Any]] = ()) -> None:
        """After a logged step or an evaluation: its values, as metrics.jsonl has them, and the answers made at it."""
        self._tell(self._judge({"step": step, **values}, answers) if self._mesh.is_main else [])

    def _judge(self, line: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> list[Finding]:
        metric = self._recipe.metric_for_best_model
        if not math.isnan(line.get(metric, math.nan)):
            self._evaluated[line["step"]] = line[metric]
        return self._guard.read(line) + (self._guard.read_answers(line["step"], answers) if answers else [])

    def _tell(self, findings: Iterable[Finding]) -> None:
        """Write and show what was found by its level, and let every process know whether it ends the run."""
        for finding in findings:
            level = self._recipe.guard.get(finding.check, self._recipe.guard["all"])
            if level == "off":
                continue
            advice = CHECKS[finding.check].advice
            row = {"step": finding.step, "kind": finding.check, "level": level, "since_step": finding.since_step}
            row |= {"saw": finding.saw, "advice": advice} | ({"source": finding.source} if finding.source else {})
            self._write(row)
            since = f" (since step {finding.since_step})" if finding.since_step < finding.step else ""
            word = "note" if level == "say" else "warning"
            text = f"{word} at step {finding.step}: {finding.saw}{since}. {advice}"
            self._display.say(text, style="" if level == "say" else "yellow")
            if level in self._acts and self.verdict is None:
                self.verdict = (finding, level)
        if self._acts:
            self.verdict = self._mesh.from_main(self.verdict)

    def _write(self, row: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def choose(self, checkpoints: Sequence[int]) -> None:
        """After a verdict: which of the steps with a checkpoint to go back to, if any. Every process calls it."""
        assert self.verdict is not None
        self.has_chosen, (finding, level) = True, self.verdict
        if level == "back":
            self.back_to = self._mesh.from_main(self._best_before(finding.since_step, checkpoints))
        if self.back_to is not None:
            best = f"the best evaluation before that was at step {self.back_to}"
            self._display.say(f"the guard goes back: {best}; its weights are the final model")
            row = {"step": finding.step, "kind": "back", "level": "say", "since_step": finding.since_step}
            row |= {"saw": f"gone back: {best}; its weights are the final model", "advice": "", "back_to": self.back_to}
            if self._mesh.is_main:
                self._write(row)

    def stopped(self, total_steps: int, saved: Path) -> StoppedByGuard:
        """The error to raise where the verdict leaves no checkpoint to go back to; every process calls it.

        Args:
            saved: a checkpoint of this moment.
        """
        assert self.verdict is not None
        finding, level = self.verdict
        none = "; there is no earlier checkpoint with an evaluation to go back to" if level == "back" else ""
        return self._stop(
            f"stopped by the guard after step {finding.step} of {total_steps} ({finding.check}) and saved {saved}{none}"
            ". To go on all the same, run the same command with --resume_from_checkpoint true"
        )

    def _stop(self, why: str) -> StoppedByGuard:
        """The error to raise, once it is noted for what may start the same command again."""
        self._mesh.on_main(lambda: record_stop(self._path.parent, why))
        return StoppedByGuard(why)

    def may_go_back_to(self, checkpoints: Sequence[int]) -> Iterator[int | None]:
        """Which of the steps with a checkpoint a finding might go back to, of what shows already or will."""
        if "back" in self._recipe.guard.values():
            newest = max(self._evaluated, default=0) + 1
            for since in (*self._guard.suspected_since, newest, math.inf):
                yield self._best_before(since, checkpoints)

    def _best_before(self, since: float, checkpoints: Sequence[int]) -> int | None:
        """The best evaluated checkpoint of weights that did not show yet what shows since a step."""
        last = since - self._recipe.logging_steps - 1  # a line is of the weights before its updates
        steps = [step for step in checkpoints if step in self._evaluated and step <= last]
        sign = 1 if self._recipe.greater_is_better else -1
        return max(steps, key=lambda step: sign * self._evaluated[step], default=None)

    def summary(self) -> dict[str, str]:
        """A row for the end of the run: what was warned of."""
        rows = [row for row in read_log(self._path) if row["level"] != "say"] if self._mesh.is_main else []
        if not rows:
            return {}
        kinds = ", ".join(f"{row['kind']} at step {row['step']}" for row in rows)
        return {"guard": f"{len(rows)} warning{'s' * (len(rows) > 1)}: {kinds}; {self._path}"}
