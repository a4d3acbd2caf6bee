"""Owns `simpo generate`: responses to prompts, by a backend, into a journal.

    run_generate(load_recipe("recipe.yaml"))  # -> runs/first/responses.jsonl

A backend is an object as `sampler.Backend` says, made from the recipe by `_build_backend`: it takes prompts and yields
responses in any order. What may go wrong with one prompt is a `RowError` in their place. All else (what is done
already, writing, counting, progress, stopping) is here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from simpo.data.columns import RowError
from simpo.data.templates import digest_of_template
from simpo.display import counter, say
from simpo.onpolicy.journal import Journal
from simpo.onpolicy.prompts import Prompt, check_rendered_alike, read_prompts
from simpo.onpolicy.sampler import Backend, LocalBackend, Response
from simpo.recipe import Recipe
from simpo.recipe.stages import SERVER_KEYS
from simpo.run.stopping import interruptible

NOT_IN_RESPONSES = {"prompts", "keep_columns", "max_prompts", "batch_size", "processes", "tensor_parallel"}
NOT_IN_RESPONSES |= set(SERVER_KEYS)
"""Keys of `generate` that change no response; with any other changed, a file that was begun is not gone on with."""

KEYS_OF_BACKENDS = {
    **dict.fromkeys(SERVER_KEYS, ("openai",)),
    "tensor_parallel": ("vllm",),
    "options": ("openai", "vllm"),
}


def run_generate(recipe: Recipe, *, output: str | Path | None = None, keeps_others: bool = False) -> Path:
    """Sample responses to the recipe's prompts, and return the file that they are in.

    What the file has already is not done again. Its account is in FILE.json, see `Journal`.

    Args:
        output: FILE.jsonl; None = responses.jsonl in the recipe's output_dir.
        keeps_others: the file may have responses to other prompts, which stay, behind these.
    Raises:
        ValueError: no prompts, model or backend; settings that cannot be; a file that was begun with other ones.
        Interrupted: Ctrl-C or SIGTERM; the message says how far it came, and how it goes on.
    """
    wanted, console = recipe.generate, Console(stderr=True, highlight=False, soft_wrap=True)
    if output is None:
        recipe.require("output_dir")
        output = Path(recipe.output_dir or "", "responses.jsonl")
    if wanted.temperature == 0 and wanted.num_samples > 1:
        raise ValueError(
            f"generate.temperature 0 gives {wanted.num_samples} equal responses; set generate.num_samples to 1, or a "
            "temperature"
        )
    check_rendered_alike(recipe)
    found = read_prompts(recipe)
    if wanted.backend == "openai" and recipe.auto_insert_empty_system_msg:
        found.notes.append("auto_insert_empty_system_msg: a server renders prompts by its own template, without it")
    for note in found.notes:
        say(f"note: {note}", console)
    count = len(found.prompts)
    backend = _build_backend(recipe)
    keys = {name: value for name, value in wanted.model_dump().items() if name not in NOT_IN_RESPONSES}
    if wanted.backend == "ray":  # its samples are those of what it spreads
        keys |= {"backend": wanted.on_ray, "on_ray": "local"}
    keys["seed"] = recipe.seed if wanted.seed is None else wanted.seed
    keys |= {"chat_template": recipe.chat_template, "rendered_text": recipe.rendered_text}
    keys |= {"auto_insert_empty_system_msg": recipe.auto_insert_empty_system_msg and wanted.backend != "openai"}
    keys |= digest_of_template(recipe.chat_template)
    with Journal(output, {"generate": keys, **backend.settings}) as journal:
        journal.left_out.update(found.left_out)
        by_id = {prompt.id: prompt for prompt in found.prompts}
        if not keeps_others:
            journal.check_inputs(by_id.keys())
        journal.renew(lambda row: _with_columns(row, by_id[row["id"]]) if row["id"] in by_id else row)
        with interruptible(lambda: f"{journal.path}: responses to {len(journal.done)} of {count} prompts are there"):
            _fill(journal, found.prompts, backend, console, wanted.num_samples)
        summary = {"input_rows": found.rows, "repeated_prompts": found.repeated, **_count(journal)}
        journal.finish([prompt.id for prompt in found.prompts], summary, keeps_others=keeps_others)
        say(f"responses: {journal.path}  ({_describe(summary)})", console)
    return journal.path


def _fill(journal: Journal, prompts: Sequence[Prompt], backend: Backend, console: Console, num_samples: int) -> None:
    """Write each prompt's responses as they come."""
    by_id, said = {prompt.id: prompt for prompt in prompts}, 0
    done = journal.done.keys() & by_id.keys()
    if len(done) == len(prompts):
        return
    with (
        counter(console, "prompts", len(prompts), done=len(done), unit="tokens") as advance,
        contextlib.closing(backend.generate(prompts, done)) as answers,
    ):
        for together in answers:
            units = 0
            for row_id, found in together:
                prompt = by_id[row_id]
                if not isinstance(found, RowError) and len(found) < num_samples:
                    found = RowError("fewer responses", f"{len(found)} of {num_samples}")
                try:
                    if isinstance(found, RowError):
                        raise found
                    journal.add(_row(prompt, found))
                    units += sum(response.num_tokens or 0 for response in found)
                except RowError as error:
                    journal.leave_out(prompt.row_id, error)
            advance(len(together), units)
            for note in backend.notes[said:]:
                say(f"note: {note}", console)
            said = len(backend.notes)


def _with_columns(row: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
    """A row that was written before with what is kept of its prompt now."""
    columns, rest = {**row.get("columns", {}), **prompt.columns}, {k: v for k, v in row.items() if k != "responses"}
    return {**rest, **({"columns": columns} if columns else {}), "responses": row["responses"]}


def _row(prompt: Prompt, responses: Sequence[Response]) -> dict[str, Any]:
    more = {"tools": list(prompt.tools), "columns": dict(prompt.columns)}
    return {
        "id": prompt.id,
        "row_id": prompt.row_id,
        "prompt": prompt.turns,
        **{name: value for name, value in more.items() if value},
        "responses": [asdict(response) for response in responses],
    }


def _count(journal: Journal) -> dict[str, int]:
    """Of all responses that are there, whenever they came."""
    counts = {"responses": 0, "finished": 0, "empty": 0, "tokens": 0}
    for row in journal.rows():
        for response in row["responses"]:
            counts["responses"] += 1
            counts["finished"] += response["finished"]
            counts["empty"] += not response["text"].strip()
            counts["tokens"] += response["num_tokens"] or 0
    return counts


def _describe(summary: Mapping[str, int]) -> str:
    responses = summary["responses"]
    parts = [f"{responses} responses", f"{summary['tokens'] / max(1, responses):.0f} tokens each"]
    parts.append(f"{summary['finished'] / max(1, responses):.1%} finished")
    return ", ".join([*parts, *([f"{summary['empty']} empty"] if summary["empty"] else [])])


def _build_backend(recipe: Recipe) -> Backend:
    wanted = recipe.generate
    kind = wanted.on_ray if wanted.backend == "ray" else wanted.backend
    for name, kinds in KEYS_OF_BACKENDS.items():
        if kind not in kinds and getattr(wanted, name) != type(wanted).model_fields[name].default:
            raise ValueError(f"generate.{name} is a setting of {' and '.join(kinds)}, and {kind} samples here")
    if wanted.backend == "local":
        return LocalBackend(recipe)
    from simpo.onpolicy import backends

    found = {"openai": backends.OpenaiBackend, "vllm": backends.VllmBackend, "ray": backends.RayBackend}
    return found[wanted.backend](recipe)
