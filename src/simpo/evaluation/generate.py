"""Responses of a model to prompts: greedy samples during evaluation.

Prompts are token ids, exactly those that training sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from simpo.evaluation.statistics import repeated_share
from simpo.model.attention import plain_attention, unwrap
from simpo.model.sampling import Sampling, end_tokens, sample_responses, why_not_shared
from simpo.run.stopping import needs_memory
from simpo.run.tracking import GENERATIONS_FILE

if TYPE_CHECKING:
    from simpo.data.loader import PairStore
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe


class Generated(NamedTuple):
    """A response: its text without special tokens, its tokens, and whether it came to an end by itself."""

    text: str
    ids: list[int]
    finished: bool


def generate_greedy(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    advance: Callable[[int], Any] = lambda count: None,
    mesh: Mesh | None = None,
) -> list[Generated]:
    """The most likely response to each prompt, token by token.

    Args:
        model: a causal language model; its mode and attention are as before afterwards.
        tokenizer: decodes; its end-of-sequence token ends a response, as do those of the model's generation config.
        prompts: token ids, the generation header included.
        max_new_tokens: longer responses are cut there, or where learned positions end.
        batch_size: prompts generated together, padded on the left.
        advance: is told how many prompts were answered.
        mesh: whose processes all give the same prompts; none may end before the others where the model is sharded.
    Returns:
        One response to each prompt.
    """
    ends = end_tokens(tokenizer, getattr(unwrap(model), "generation_config", None))
    was_training, answers = model.training, [Generated("", [], False)] * len(prompts)
    positions, rooms = _learned_positions(unwrap(model)), {}
    for place, prompt in enumerate(prompts):
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompt))
        rooms.setdefault(room, []).append(place)
    batches = [
        (room, places[start : start + batch_size])
        for room, places in rooms.items()
        for start in range(0, len(places), batch_size)
    ]
    model.eval()
    try:
        # Compiled blocks would be compiled again for single tokens with a cache and a mask.
        with plain_attention(model), torch.compiler.set_stance("force_eager"):
            shared, together = why_not_shared(model) is None, {}
            if mesh is not None:
                shared, together = mesh.from_main(shared), {"agree": mesh.broadcast}
            for room, places in batches:
                advance(len(places))
                if room < 1:
                    continue
                batch, size = [prompts[place] for place in places], {"max_new_tokens": room, "shared": shared}
                found = sample_responses(model, batch, [[0]] * len(batch), Sampling(), ends=ends, **size, **together)
                texts = tokenizer.batch_decode([response.ids for (response,) in found], skip_special_tokens=True)
                for place, text, (response,) in zip(places, texts, found, strict=True):
                    answers[place] = Generated(text.strip(), response.ids, response.finished)
    finally:
        model.train(was_training)
    return answers


def _learned_positions(model: nn.Module) -> int | None:
    """How many there are, where each has a vector of its own; None where others are computed, and may go further."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words, sizes = model.get_input_embeddings(), range(positions or 0, (positions or 0) + 3)  # OPT's begin at 2
    tables = (each for each in model.modules() if isinstance(each, nn.Embedding) and each is not words)
    return positions if positions and any(table.num_embeddings in sizes for table in tables) else None


def save_samples(
    folder: str | Path,
    model: nn.Module,
    tokenizer: Any,
    store: PairStore,
    recipe: Recipe,
    *,
    step: int,
    mesh: Mesh,
) -> list[dict[str, Any]]:
    """Answer the first `num_eval_generations` prompts of held-out pairs; every process calls it.

    Args:
        folder: of the run; the first process appends one JSON line for each answer to its `generations.jsonl`.
        step: of the optimizer, for the lines.
    Returns:
        What the lines hold; nothing on the other processes.
    Raises:
        OutOfMemory: it does not fit.
    """
    indices = range(min(recipe.num_eval_generations, len(store)))
    if not indices:
        return []
    prompts = [store[i].prompt_ids for i in indices]
    with needs_memory("generating samples", advice="lower num_eval_generations or eval_generation_max_new_tokens"):
        length = recipe.eval_generation_max_new_tokens
        responses = generate_greedy(model, tokenizer, prompts, max_new_tokens=length, mesh=mesh)
    if not mesh.is_main:
        return []
    records = [
        {
            **{"step": step, "row_id": store[i].row_id, "prompt": store.texts(i)["prompt_text"]},
            **{"response": response.text, "tokens": len(response.ids), "finished": response.finished},
            "repeated_share": repeated_share(response.ids),
        }
        for i, response in zip(indices, responses, strict=True)
    ]
    with Path(folder, GENERATIONS_FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return records
