"""What samples responses for `simpo generate`: the interface of all backends, and the one of this package (`local`).

Owns how prompts become tokens and tokens become responses. A batch is planned from all prompts, done or not, and
computed whole by one process: what it holds, and so each rounding in it, is the same after an interruption.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from simpo.data.columns import RowError
from simpo.data.preferences import Pair, with_empty_system
from simpo.data.prepare import inserts_empty_system
from simpo.data.templates import PROBE_ANSWERS
from simpo.data.tokenize import PairTokenizer
from simpo.data.workers import WorkersFailed, map_in_processes
from simpo.environment import num_cores
from simpo.evaluation.run import READ_KEYS, base_model, find_tokenizer, model_folder
from simpo.model.costs import decoder_sizes
from simpo.model.load import digest_ends, load_model, load_pretrained, pick_device, set_precision
from simpo.model.sampling import Sampled, Sampling, end_tokens, noise_key, sample_responses, why_not_shared
from simpo.onpolicy.prompts import Prompt
from simpo.recipe import Recipe, load_recipe
from simpo.recipe.stages import Generate
from simpo.run.memory import free_memory
from simpo.run.stopping import OutOfMemory, needs_memory

PREFILL_TOKENS = 2**16  # of prompts that are computed together, at most


@dataclass(frozen=True)
class Response:
    """One response to a prompt.

    Attributes:
        text: without its end of turn or stop text.
        num_tokens: of the text and that end; None where a backend does not say.
        finished: the model ended it; False where `max_new_tokens` cut it.
        logprob: of all these tokens, summed, in nats, under the model at temperature 1 without any truncation; None
            likewise.
    """

    text: str
    num_tokens: int | None
    finished: bool
    logprob: float | None = None


Answer = tuple[str, "list[Response] | RowError"]
"""A prompt's id, and its responses or why it has none."""


class Backend(Protocol):
    """What samples.

    Attributes:
        settings: all that decides its responses besides the prompts and the recipe's `generate`, in plain values: the
            model. A file that was begun with others is not gone on with.
        notes: lines for the user, known once it is there.
    """

    @property
    def settings(self) -> Mapping[str, Any]: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def generate(self, prompts: Sequence[Prompt], done: Collection[str]) -> Generator[Sequence[Answer], None, None]:
        """Responses to all prompts but those whose id is in `done`, in any order, as soon as they are there: one
        answer at a time, or several that came together.

        Each answer has `num_samples` responses, or is the `RowError` that says why not; that prompt is tried again when
        the command is given again. The iterator may be closed at any moment, and then leaves no process behind.

        Raises:
            ValueError: nothing can be sampled at all.
        """
        ...


# --- tokens ----------------------------------------------------------------------------------------------------------


class PromptTokenizer:
    """Prompts to the tokens that training has in front of an answer.

    Attributes:
        end_text: what ends a turn; None where nothing is known to.
        stops: texts that the template writes at the end of an answer without a token of their own.
    Raises:
        ValueError: as `PairTokenizer`.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._pairs = PairTokenizer(
            tokenizer, max_length=2**40, chat_template=recipe.chat_template, rendered_text=recipe.rendered_text
        )
        self._with_empty_system = inserts_empty_system(tokenizer, recipe)
        render = self._pairs.render
        self.end_text: str | None = render.end_text
        self.stops = [] if render.adds_end else [text for text in [getattr(render, "kept_suffix", "")] if text.strip()]

    def __call__(self, prompts: Sequence[Prompt]) -> list[list[int] | RowError]:
        """The tokens of each prompt, the generation header included, or why there are none."""
        pairs = [Pair(prompt.row_id, self._asked(prompt), *PROBE_ANSWERS, tools=prompt.tools) for prompt in prompts]
        return [
            found if isinstance(found, RowError) else found.chosen_ids[: found.num_shared]
            for found in self._pairs(pairs)
        ]

    def _asked(self, prompt: Prompt) -> Any:
        """A single user's turn as the text that it was."""
        turns = prompt.turns
        if self._with_empty_system:
            return with_empty_system(turns)
        return turns[0]["content"] if len(turns) == 1 and turns[0].keys() == {"role", "content"} else turns


class ResponseReader:
    """Sampled tokens to responses.

    Args:
        generation_config: the model's, which may name end tokens; None where there is none.
    Attributes:
        ends: tokens that end a response: the template's end of turn, the tokenizer's end and the model's own.
        stops: texts that do.
    Raises:
        ValueError: there are neither.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, generation_config: Any) -> None:
        prompts, self.tokenizer = PromptTokenizer(recipe, tokenizer), tokenizer
        of_turn = set() if prompts.end_text is None else {tokenizer.convert_tokens_to_ids(prompts.end_text)}
        self.ends = end_tokens(tokenizer, generation_config) | of_turn
        self.stops = [*recipe.generate.stop, *prompts.stops]
        if not (self.ends or self.stops):
            raise ValueError(
                "no end of turn: neither the chat template nor the tokenizer nor the model's generation config names "
                "one, so every response would run to max_new_tokens; set generate.stop to the text that ends a turn"
            )
        self._reach = max((len(stop.encode()) for stop in self.stops), default=0) + 8

    def __call__(self, sampled: Sequence[Sampled]) -> list[Response] | RowError:
        """All responses to a prompt."""
        if not all(math.isfinite(each.logprob) for each in sampled):
            return RowError("not finite", "the model's logits are not finite for this prompt")
        return [self._response(each) for each in sampled]

    def _response(self, sampled: Sampled) -> Response:
        ids = sampled.ids
        has_end = sampled.finished and ids[-1] in self.ends
        text = self._text(ids[:-1] if has_end else ids)
        if sampled.finished and not has_end:
            text = text[: min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=None)]
        return Response(text, len(ids), sampled.finished, sampled.logprob)

    def is_stopped(self, ids: list[int]) -> bool:
        """Whether the newest of these tokens complete a text that ends a response."""
        tail = self._text(ids[-self._reach :])
        return any(stop in tail for stop in self.stops)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# --- one process -----------------------------------------------------------------------------------------------------

Job = list[tuple[str, list[int]]]
"""Prompts that are computed together: the id and the tokens of each."""


class LocalSampler:
    """One process's model: batches of prompts to responses.

    Args:
        recipe: its `model_name_or_path` is a folder with a model or an adapter, or a hub name.
        threads: of the CPU.
        is_child: ends this process when the one that started it has gone.
    Raises:
        ValueError: no such model, or nothing that would end a response.
    """

    def __init__(self, recipe: Recipe, *, threads: int, is_child: bool = False) -> None:
        self.wanted, self._parent = recipe.generate, os.getppid() if is_child else None
        self.seed = recipe.seed if self.wanted.seed is None else self.wanted.seed
        torch.set_num_threads(threads)
        device = pick_device(recipe.device)
        slow = set_precision(recipe, device)
        with needs_memory("loading the model", advice="use a machine with more of it"):
            self.model = load_model(_plainly(recipe), device=device, trainable=False, check=False)
        generation_config = getattr(self.model, "generation_config", None)
        self.read = ResponseReader(recipe, find_tokenizer(recipe, recipe.model_name_or_path), generation_config)
        why_not = why_not_shared(self.model)
        self.shares = why_not is None
        one_by_one = None if why_not is None else f"sampled one prompt at a time, which is slower: {why_not}"
        self.notes = list(filter(None, [slow, one_by_one]))

    def __call__(self, job: Job) -> list[Answer]:
        """Responses to the prompts of a batch, or why there are none."""
        wanted = self.wanted
        keys = [[noise_key(self.seed, row_id, number) for number in range(wanted.num_samples)] for row_id, _ in job]
        with needs_memory(f"{len(job) * wanted.num_samples} responses at once", advice="lower generate.batch_size"):
            found = sample_responses(
                self.model,
                [ids for _, ids in job],
                keys,
                Sampling(wanted.temperature, wanted.top_p, wanted.top_k, wanted.min_p),
                ends=self.read.ends,
                max_new_tokens=wanted.max_new_tokens,
                is_stopped=self.read.is_stopped if self.read.stops else None,
                shared=self.shares,
                each_step=self._each_step,
            )
        return [(row_id, self.read(sampled)) for (row_id, _), sampled in zip(job, found, strict=True)]

    def _each_step(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            os._exit(1)


def _plainly(recipe: Recipe) -> Recipe:
    """The recipe's model as it is sampled from: transformers' attention, weights in the precision of its matmuls."""
    changes = {"pack": False, "share_prompt": False, "attention_kernel": "auto"}
    changes["master_dtype"] = "bfloat16" if recipe.bf16 else "float32"
    return load_recipe(recipe, changes, only=READ_KEYS)


class Worker:
    """A sampler in another process: its errors as ValueError, its notes with each answer."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = functools.cache(build)

    def __call__(self, job: Job) -> tuple[list[str], list[Answer]]:
        try:
            sampler = self._build()
            return sampler.notes, sampler(job)
        except OutOfMemory as error:
            raise ValueError(str(error)) from None


# --- the backend -----------------------------------------------------------------------------------------------------


class LocalBackend:
    """`backend: local`: this process, or one for each GPU or core; see `Backend`.

    Args:
        recipe: the whole recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        name = model_folder(recipe.model_name_or_path)
        self.recipe = load_recipe(recipe, {"model_name_or_path": name})
        self.tokenize = PromptTokenizer(recipe, find_tokenizer(self.recipe, name))
        self.notes: list[str] = []
        other = recipe.tokenizer_name_or_path
        self.settings = {
            "model": identify_model(name, recipe.model_revision),
            "tokenizer_digest": None if other is None else identify_model(other, None),
            "dtype": "bfloat16" if recipe.bf16 else "float32",
        }
        self.config = load_pretrained(AutoConfig, base_model(name), self.recipe, what="configuration")
        self.limit: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if self.limit is not None and recipe.generate.max_new_tokens >= self.limit:
            raise ValueError(
                f"generate.max_new_tokens = {recipe.generate.max_new_tokens}: {name} has {self.limit} positions for "
                "prompt and response"
            )

    def generate(self, prompts: Sequence[Prompt], done: Collection[str]) -> Generator[Sequence[Answer], None, None]:
        """See `Backend`."""
        tokens: dict[str, list[int]] = {}
        failed: list[Answer] = []
        more = self.recipe.generate.max_new_tokens
        for prompt, found in zip(prompts, self.tokenize(prompts), strict=True):
            if not isinstance(found, RowError) and self.limit is not None and len(found) + more > self.limit:
                said = f"{len(found)} prompt tokens and generate.max_new_tokens {more} in {self.limit} positions"
                found = RowError("too long", said)
            if isinstance(found, RowError):
                failed.append((prompt.id, found))
            else:
                tokens[prompt.id] = found
        yield failed
        for answers in self._computed(self._plan(tokens, done)):
            yield [(row_id, found) for row_id, found in answers if row_id not in done]

    def _plan(self, tokens: Mapping[str, list[int]], done: Collection[str]) -> list[Job]:
        batches = plan_batches(tokens, self.recipe.generate)
        return [batch for batch in batches if any(row_id not in done for row_id, _ in batch)]

    def _computed(self, batches: Sequence[Job]) -> Iterator[list[Answer]]:
        if not batches:
            return
        wanted = self.recipe.generate.processes
        most = len(batches) if wanted else min(len(batches), self._room(batches))
        places, threads = find_places(self.recipe, most, wanted)
        if len(places) == 1:
            before = torch.get_num_threads()
            try:
                sampler = LocalSampler(self.recipe, threads=threads)
                self.notes += sampler.notes
                yield from map(sampler, batches)
            finally:
                torch.set_num_threads(before)
            return
        yield from self._by_processes(batches, places, functools.partial(LocalSampler, self.recipe, threads=threads))

    def _room(self, batches: Sequence[Job]) -> int:
        """How many processes the CPU's free memory has room for, at least one; no limit on GPUs, which have one each.

        Of each: the weights, and of the largest batch its keys and values at their longest and its log-probs.
        """
        free = free_memory(torch.device("cpu"))
        if free is None or pick_device(self.recipe.device).type != "cpu":
            return sys.maxsize
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.recipe.trust_remote_code)
        wanted, sizes = self.recipe.generate, decoder_sizes(self.config)
        number = 2 if self.recipe.bf16 else 4  # bytes of one
        of_token = 2 * number * sizes["num_layers"] * sizes["num_kv_heads"] * sizes["head_dim"]
        rows = max(map(len, batches)) * wanted.num_samples
        width = max(len(ids) for _, ids in batches[0]) + wanted.max_new_tokens  # the longest prompts come first
        each = number * sum(weight.numel() for weight in model.parameters())
        each += rows * (width * of_token + 3 * 4 * sizes["vocab_size"])
        count, most = max(1, free // each), min(num_cores(), len(batches))
        if count < most:
            self.notes.append(
                f"{count} of {most} processes: each takes about {each / 2**30:.1f} GiB, and {free / 2**30:.1f} are "
                "free (generate.processes says another number, a lower generate.batch_size makes room)"
            )
        return count

    def _by_processes(
        self, batches: Sequence[Job], places: Sequence[Mapping[str, str]], build: Callable[..., Any]
    ) -> Iterator[list[Answer]]:
        """`build(is_child=True)(batch)` in as many processes as there are places, which are their environments."""
        worker = functools.partial(Worker, functools.partial(build, is_child=True))
        try:
            for notes, answers in map_in_processes(worker, batches, len(places), environments=places, in_order=False):
                self.notes[:] = dict.fromkeys([*self.notes, *notes])
                yield answers
        except WorkersFailed as error:
            raise ValueError(
                f"a process that sampled is gone ({error}), most likely for want of memory; lower generate.batch_size "
                "or generate.processes"
            ) from None


def plan_batches(tokens: Mapping[str, list[int]], wanted: Generate) -> list[Job]:
    """Prompts of like length together, the longest first; the same batches whatever the order of the prompts.

    A batch has at most `batch_size` responses, but all of one prompt.
    """
    batches: list[Job] = []
    for row_id, ids in sorted(tokens.items(), key=lambda item: (-len(item[1]), item[0])):
        batch = batches[-1] if batches else []
        count, width = len(batch) + 1, len(batch[0][1]) if batch else 0
        if not batch or count * wanted.num_samples > wanted.batch_size or count * width > PREFILL_TOKENS:
            batches.append(batch := [])
        batch.append((row_id, ids))
    return batches


def find_places(
    recipe: Recipe, num_jobs: int, processes: int | None, *, gpus_each: int = 1
) -> tuple[list[dict[str, str]], int]:
    """The environment of each process to work in, and its CPU threads; `processes` None: one a GPU, or core."""
    cores = num_cores()
    on_gpu = pick_device(recipe.device).type == "cuda"
    gpus = torch.cuda.device_count() if on_gpu else 0
    groups = gpus // gpus_each
    if on_gpu and not groups:
        raise ValueError(f"generate.tensor_parallel = {gpus_each}: this machine has {gpus} GPUs")
    count = min(processes or groups or cores, groups or cores, max(1, num_jobs))
    threads = recipe.num_threads or max(1, cores // count)
    if not on_gpu:
        return [{}] * count, threads
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or list(
        map(str, range(gpus))
    )
    starts = range(0, count * gpus_each, gpus_each)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(seen[start : start + gpus_each])} for start in starts], threads


def identify_model(name: str, revision: str | None) -> str:
    """A model by its name and, for a folder, what its files hold, as far as their ends tell; moved, it is the same."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision or 'main'}"
    return f"{folder.resolve().name} {digest_ends(folder)}"
