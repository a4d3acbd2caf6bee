"""Owns `simpo judge`: two sides' answers to the same prompts, who is better by whom, and what that comes to.

    run_judge(load_recipe("recipe.yaml"))  # -> runs/first/judged/judgement.json

Answers are sampled by `simpo generate`'s room and judged by `simpo score`'s, each with its journal: what is there is
neither sampled nor judged again. All else in the folder is put together from these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from simpo.data.files import check_own, supersede, write_whole
from simpo.display import say
from simpo.evaluation.plain import Interval, Z
from simpo.evaluation.results import percent, save_json, table_of
from simpo.judging.alpaca import alpaca_eval_win_rate
from simpo.judging.answers import KEPT_COLUMNS, Side, answers_of, find_prompts, label_sides, save_prompts
from simpo.judging.formats import games_of, save_alpaca_eval, save_arena_hard
from simpo.judging.winrate import length_controlled_win_rate, win_rate
from simpo.onpolicy.journal import changed_settings, read_about, read_rows
from simpo.onpolicy.prompts import Prompt
from simpo.onpolicy.score import build_scorer, run_score
from simpo.onpolicy.scorers.judge import POINTS
from simpo.recipe import Recipe, load_recipe
from simpo.run.lock import locked
from simpo.run.stopping import interruptible


def run_judge(recipe: Recipe, *, output: str | Path | None = None) -> Path:
    """Compare two sides' answers; goes on where an earlier call stopped.

    Args:
        recipe: `judge` says who and by what, `generate` how answers are sampled.
        output: folder; None = judged in output_dir.
    Returns:
        judgement.json in that folder: the numbers, and what was left out.
    Raises:
        ValueError: no prompts, no judge, an answer file that is none, or no prompt that both sides answered.
        Interrupted: Ctrl-C or SIGTERM.
    """
    wanted = recipe.judge
    scorers = wanted.scorers or recipe.score.scorers
    if not scorers:
        raise ValueError("judge.scorers: nothing to judge with; name a scorer there (`simpo keys score` has the kinds)")
    key = "judge.scorers" if wanted.scorers else "score.scorers"
    for name, spec in scorers.items():
        build_scorer(name, spec, recipe, key=key)  # before anything is answered
    if output is None:
        recipe.require("output_dir")
    if wanted.model is None and recipe.output_dir is None:
        raise ValueError("judge.model: say which model to judge")
    first, second = str(wanted.model or recipe.output_dir), str(wanted.against or recipe.model_name_or_path)
    labels = label_sides(first, second)
    folder = Path(output or Path(str(recipe.output_dir), "judged"))
    console = Console(stderr=True)
    with (
        locked(folder, lambda line: say(line, console)),
        interruptible(lambda: "what has been answered and judged is kept"),
    ):
        found = find_prompts(recipe)
        for note in found.notes:
            say(f"note: {note}", console)
        asked = folder / "prompts.jsonl"
        before = check_own(folder / "judgement.json", "model", "against", "judges")
        now = {"model": first, "against": second, "judges": json.loads(json.dumps({**scorers}))}
        if before and (changed := changed_settings({name: before[name] for name in now}, now)):
            aside = supersede(folder, [folder / name for name in _RESULTS])
            say(f"{changed}: the judgement that was there is kept in {aside}", console)
        save_prompts(found.prompts, asked, is_own=bool(before))
        sides = [
            answers_of(recipe, name, label, found.prompts, asked, folder / "answers")
            for name, label in zip((first, second), labels, strict=True)
        ]
        both = _Both(found.prompts, (sides[0], sides[1]))
        judged = both.judge(recipe, scorers, folder)
        result = _summarise(both, judged, scorers)
        result["left_out"] = _left_out(found.left_out, sides, folder)
        _save(folder, both, judged, result)
    return folder / "judgement.json"


_RESULTS = ("judgement.json", "judged.jsonl", "judged.json", "compared.jsonl", "alpaca_eval", "arena_hard")


@dataclass(frozen=True)
class _Judged:
    """One prompt: the judged side's share of the win, and what a judge said in each order."""

    points: float
    said: Sequence[Mapping[str, Any]] = ()


class _Both:
    """The prompts that both sides answered, and their answers."""

    def __init__(self, prompts: Sequence[Prompt], sides: tuple[Side, Side]) -> None:
        ours, theirs = (side.answers for side in sides)
        self.sides = sides
        self.labels = (sides[0].label, sides[1].label)
        if self.labels[0] == self.labels[1]:
            self.labels = (f"{sides[0].label}-1", f"{sides[1].label}-2")
        self.prompts = [prompt for prompt in prompts if prompt.id in ours and prompt.id in theirs]
        self.answers = {prompt.id: (ours[prompt.id], theirs[prompt.id]) for prompt in self.prompts}
        if not self.prompts:
            raise ValueError(f"{sides[0].name} and {sides[1].name} have no answers to the same prompt")

    def judge(self, recipe: Recipe, scorers: Mapping[str, Any], folder: Path) -> dict[str, _Judged]:
        """Prompt id -> what was judged. Answers that are the same are a tie, and nobody is asked."""
        judged = {p.id: _Judged(0.5) for p in self.prompts if len({a.text for a in self.answers[p.id]}) == 1}
        rows = [self._row(prompt) for prompt in self.prompts if prompt.id not in judged]
        if not rows:
            return judged
        compared, scored = folder / "compared.jsonl", folder / "judged.jsonl"
        write_whole(compared, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for path in (scored, scored.with_suffix(".json")):  # put together from scores/, which is kept
            path.unlink(missing_ok=True)
        told = {
            name: spec | {"keep_answers": True} if spec["kind"] == "judge" else spec for name, spec in scorers.items()
        }
        # A row's name says what is in it: more rows leave what is judged as it is, and a corrected reference does not.
        run_score(
            load_recipe(recipe, {"score.scorers": told}), input=compared, output=scored, digest="compared answers"
        )
        decides = _only_judge(scorers)
        for row in read_rows(scored):
            first, second = (response["score"] for response in row["responses"])
            points = (first > second) + (first == second) / 2
            said = ()
            if decides is not None:
                points, said = row["responses"][0]["scores"][decides], row["because"][decides]
            judged[row["id"].partition("-")[0]] = _Judged(points, said)
        return judged

    def _row(self, prompt: Prompt) -> dict[str, Any]:
        answers = self.answers[prompt.id]
        more = {"columns": dict(prompt.columns), **({"tools": list(prompt.tools)} if prompt.tools else {})}
        # But for the names of prompts, which rate nothing, and which were not in it in earlier versions.
        rating = {**more, "columns": {k: v for k, v in prompt.columns.items() if k not in KEPT_COLUMNS}}
        told = [answer.text for answer in answers] + [rating] * any(rating.values())
        digest = hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()
        return {
            "id": f"{prompt.id}-{digest}",
            "row_id": prompt.row_id,
            "prompt": prompt.turns,
            **more,
            "responses": [
                {"text": answer.text, "num_tokens": answer.num_tokens, "finished": True, "logprob": None}
                for answer in answers
            ],
        }


def _only_judge(scorers: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The scorer that compares the two answers itself, where there is no other that counts."""
    counting = [name for name, spec in scorers.items() if spec.get("weight", 1) != 0]
    if len(counting) == 1 and (spec := scorers[counting[0]])["kind"] == "judge":
        return counting[0] if spec.get("form", "pairs") == "pairs" and spec.get("weight", 1) > 0 else None
    return None


def _summarise(both: _Both, judged: Mapping[str, _Judged], scorers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers, as plain values."""
    prompts = [prompt for prompt in both.prompts if prompt.id in judged]
    points = np.array([judged[prompt.id].points for prompt in prompts])
    ours, theirs = (
        np.array([len(both.answers[prompt.id][place].text) for prompt in prompts], dtype=float) for place in (0, 1)
    )
    games = [each.said for each in judged.values() if each.said]
    agreed = [len({_winner(game) for game in said}) == 1 for said in games]
    first = [POINTS[game["verdict"]] for said in games for game in said]
    return {
        "simpo": version("simpo"),
        "model": both.sides[0].name,
        "against": both.sides[1].name,
        "judges": {name: {**spec} for name, spec in scorers.items()},
        "compared": len(prompts),
        "identical": sum(len({answer.text for answer in both.answers[prompt.id]}) == 1 for prompt in prompts),
        "wins": int((points > 0.5).sum()),
        "ties": int((points == 0.5).sum()),
        "losses": int((points < 0.5).sum()),
        "win_rate": win_rate(points)._asdict(),
        "length_controlled_win_rate": length_controlled_win_rate(points, ours, theirs)._asdict(),
        "alpaca_eval": None,
        "characters": {"model": float(ours.mean()), "against": float(theirs.mean())},
        # Of a judge that is asked in both orders: how often it comes to the same, and how often to what stands first.
        "both_orders_agree": sum(agreed) / len(agreed) if agreed else None,
        "first_preferred": sum(first) / len(first) if first else None,
        "notes": [],
    }


def _winner(game: Mapping[str, Any]) -> Any:
    return {"1": game["first"], "2": game["second"], "tie": None}[game["verdict"]]


def _left_out(rows: Mapping[str, Any], sides: Sequence[Side], folder: Path) -> dict[str, Any]:
    """What every step left out, each reason with where it was."""
    found = {f"{reason} (prompts)": entry for reason, entry in rows.items()}
    for side in sides:
        found |= {f"{reason} ({side.name})": entry for reason, entry in side.left_out.items()}
    return found | read_about(folder / "judged.jsonl").get("left_out", {})


def _save(folder: Path, both: _Both, judged: Mapping[str, _Judged], result: dict[str, Any]) -> None:
    """Write the files that other tools read, then the numbers."""
    judge = "+".join(result["judges"])
    names = {"labels": both.labels, "judge": judge}
    points = {prompt_id: each.points for prompt_id, each in judged.items()}
    save_alpaca_eval(folder / "alpaca_eval", both.prompts, both.answers, points, **names)
    games = {prompt_id: games_of(each.points, each.said) for prompt_id, each in judged.items()}
    save_arena_hard(folder / "arena_hard", both.prompts, both.answers, games, **names)
    annotations = json.loads((folder / "alpaca_eval" / "annotations.json").read_text(encoding="utf-8"))
    result["alpaca_eval"], note = alpaca_eval_win_rate(annotations)
    result["notes"] += [note] if note else []
    save_json(result, folder / "judgement.json")


def show_judgement(result: Mapping[str, Any], console: Console) -> None:
    """Print the numbers of a judgement as a table."""
    for title in ("model", "against"):
        say(f"{title:<7}  {result[title]}", console)
    kinds = ", ".join(f"{name} ({spec['kind']})" for name, spec in result["judges"].items())
    say(f"judge    {kinds}, on {result['compared']} prompt{'s' * (result['compared'] != 1)}", console)
    table = table_of("", "value", "95% interval")
    table.add_row("win rate", *percent(Interval(**result["win_rate"])))
    table.add_row("at equal length", *percent(Interval(**result["length_controlled_win_rate"])))
    if result["alpaca_eval"]:
        value, error = result["alpaca_eval"]["value"], Z * result["alpaca_eval"]["standard_error"]
        table.add_row("at equal length, by alpaca-eval", *percent(Interval(value, value - error, value + error)))
    table.add_row("won / tied / lost", f"{result['wins']} / {result['ties']} / {result['losses']}", "")
    if result["identical"]:
        table.add_row("  the same answer", str(result["identical"]), "")
    characters = (f"{result['characters'][side]:.0f}" for side in ("model", "against"))
    table.add_row("characters, of each side", " / ".join(characters), "")
    if result["both_orders_agree"] is not None:
        table.add_row("both orders agree", f"{result['both_orders_agree']:.0%}", "")
        table.add_row("prefers what comes first", f"{result['first_preferred']:.0%}", "")
    console.print(table)
    for note in result["notes"]:
        say(f"note: {note}", console, style="yellow")
