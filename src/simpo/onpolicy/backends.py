"""Owns the backends of `simpo generate` that are not this process: a server of OpenAI's protocol, vLLM, a Ray cluster.

See `sampler.Backend` for what they share. vLLM and Ray compute what the local backend would, batch by batch; a server
gets messages and renders them itself. vllm, ray and openai are imported where they are used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import logging
import os
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from simpo.data.columns import RowError
from simpo.errors import first_line, one_line
from simpo.evaluation.run import base_model, find_tokenizer
from simpo.model.load import load_pretrained
from simpo.model.sampling import Sampled, noise_key
from simpo.onpolicy.client import Client, Request
from simpo.onpolicy.prompts import Prompt
from simpo.onpolicy.sampler import (
    Answer,
    Job,
    LocalBackend,
    LocalSampler,
    Response,
    ResponseReader,
    Worker,
    find_places,
)
from simpo.recipe import Recipe, load_recipe
from simpo.recipe.stages import Generate


class OpenaiBackend:
    """`backend: openai`: a server that has the model; see `Backend`.

    A response depends on its prompt, the sampling settings and a seed of its own; whether the seed decides it is up to
    the server.

    Raises:
        ValueError: no such server, or, before any work, it does not do what is asked.
    """

    def __init__(self, recipe: Recipe) -> None:
        wanted = recipe.generate
        if wanted.url is None:
            raise ValueError("generate.url: backend openai needs a server, such as http://localhost:8000/v1")
        self.seed = recipe.seed if wanted.seed is None else wanted.seed
        self.num_samples = wanted.num_samples
        self.sampling = {
            "temperature": wanted.temperature,
            "top_p": wanted.top_p if wanted.top_p < 1 else None,
            "top_k": wanted.top_k,
            "min_p": wanted.min_p or None,
            "max_tokens": wanted.max_new_tokens,
            "stop": wanted.stop or None,
            **(wanted.options or {}),
        }
        self.client = Client(
            wanted.url,
            wanted.served_model,
            key_variable=wanted.api_key_variable,
            concurrency=wanted.concurrency,
            timeout_s=wanted.timeout_s,
        )
        if wanted.served_model is None:
            with self.client as client:
                client.find_model()
        self.settings = {"model": self.client.model}
        self.notes: list[str] = []
        if recipe.chat_template is not None:
            self.notes.append("the server renders the prompts by its own chat template, not by the recipe's")

    def generate(self, prompts: Sequence[Prompt], done: Collection[str]) -> Iterator[list[Answer]]:
        """See `Backend`."""
        open_prompts = (prompt for prompt in prompts if prompt.id not in done)
        has_said = False
        with self.client as client:
            client.try_out(self.sampling, num_choices=self.num_samples, logprobs=True)
            if not client.gives_logprobs:
                self.notes.append("the server gives no log-probs: they are null")
            for row_id, found in client.chat_all((prompt.id, self._request(prompt)) for prompt in open_prompts):
                if not isinstance(found, RowError):
                    if not has_said and any(one.thought for one in found):
                        has_said = True
                        self.notes.append(
                            "the server gives thinking apart from the answers, and only the answers are kept, without "
                            "log-probs; a server without a reasoning parser gives both as one text"
                        )
                    found = [Response(one.text, one.num_tokens, one.finished, one.logprob) for one in found]
                yield [(row_id, found)]

    def _request(self, prompt: Prompt) -> Request:
        seeds = [noise_key(self.seed, prompt.id, number) % 2**31 for number in range(self.num_samples)]
        tools = {"tools": list(prompt.tools)} if prompt.tools else {}
        return Request(prompt.turns, {**self.sampling, **tools}, seeds)


# --- vLLM ------------------------------------------------------------------------------------------------------------

ENGINE_RESPONSES = 4096
"""Handed to vLLM's engine at once, which batches them itself; their rows are written together."""


class VllmSampler:
    """One engine of vLLM: batches of prompts to responses, as `LocalSampler` makes them.

    Args:
        recipe: as for `LocalSampler`.
        is_child: ends this process when the one that started it has gone.
    Raises:
        ValueError: the engine does not start.
    """

    def __init__(self, recipe: Recipe, *, is_child: bool = False) -> None:
        # In this process, so that requests are scheduled the same each time, and nothing outlives it.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        vllm = _import("vllm", "pip install vllm")
        if is_child:
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        wanted, name = recipe.generate, recipe.model_name_or_path
        base = base_model(name)
        self.notes: list[str] = []
        self.seed, self.num_samples = recipe.seed if wanted.seed is None else wanted.seed, wanted.num_samples
        self.read = ResponseReader(recipe, find_tokenizer(recipe, name), _config_with_ends(base, recipe))
        self.sampling = {
            "n": wanted.num_samples,
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "top_k": wanted.top_k or 0,
            "min_p": wanted.min_p,
            "max_tokens": wanted.max_new_tokens,
            "stop_token_ids": sorted(self.read.ends),
            "stop": self.read.stops or None,
            "logprobs": 0,  # those of the tokens drawn
        }
        options = {
            "model": base,
            "revision": recipe.model_revision,
            "trust_remote_code": recipe.trust_remote_code,
            "dtype": "bfloat16" if recipe.bf16 else "float32",
            "tensor_parallel_size": wanted.tensor_parallel,
            "seed": self.seed,
            "logprobs_mode": "raw_logprobs",  # at temperature 1, of all tokens
        }
        if wanted.tensor_parallel > 1:
            options["distributed_executor_backend"] = "mp"  # in a Ray actor too, which has all of the engine's GPUs
        self.adapter = None
        if base != name:
            rank = json.loads(Path(name, "adapter_config.json").read_text(encoding="utf-8"))["r"]
            # vLLM takes powers of two from 8.
            options |= {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}
            self.adapter = importlib.import_module("vllm.lora.request").LoRARequest("adapter", 1, name)
        try:
            self.engine = vllm.LLM(**(options | (wanted.options or {})))
        except Exception as error:  # of many kinds, vLLM's own and torch's among them
            raise ValueError(f"vLLM's engine does not start: {one_line(error)}") from error
        self.params = vllm.SamplingParams

    def __call__(self, job: Job) -> list[Answer]:
        """Responses to the prompts of a batch, or why there are none."""
        # vLLM seeds the n responses to a prompt with this number and those that follow.
        params = [self.params(**self.sampling, seed=noise_key(self.seed, row_id) % 2**62) for row_id, _ in job]
        prompts = [{"prompt_token_ids": ids} for _, ids in job]
        results = self.engine.generate(prompts, params, use_tqdm=False, lora_request=self.adapter)
        return [(row_id, self._responses(result)) for (row_id, _), result in zip(job, results, strict=True)]

    def _responses(self, result: Any) -> list[Response] | RowError:
        outputs = result.outputs
        ended = {output.finish_reason for output in outputs}
        if len(outputs) != self.num_samples or not ended <= {"stop", "length"}:
            return RowError("not finished", f"vLLM gave {len(outputs)} responses, ended by {sorted(map(str, ended))}")
        return self.read(
            [Sampled(list(each.token_ids), each.finish_reason == "stop", each.cumulative_logprob) for each in outputs]
        )


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _config_with_ends(name: str, recipe: Recipe) -> Any:
    """What names a model's end tokens: its generation config, or its config where it has none."""
    try:
        return load_pretrained(GenerationConfig, name, recipe, what="generation config")
    except ValueError:
        return load_pretrained(AutoConfig, name, recipe, what="configuration").get_text_config()


def _import(name: str, command: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"generate.backend: {name} cannot be imported ({first_line(error)}): {command}") from None


class VllmBackend(LocalBackend):
    """`backend: vllm`: an engine of vLLM for each `tensor_parallel` GPUs, in processes of their own; see `Backend`."""

    def __init__(self, recipe: Recipe) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "generate.backend: vLLM is not installed: pip install vllm; or serve the model from another "
                "environment by `vllm serve` and sample with generate.backend openai"
            )
        super().__init__(recipe)
        length = (recipe.generate.options or {}).get("max_model_len")
        self.limit = length if isinstance(length, int) else self.limit

    def _plan(self, tokens: Mapping[str, list[int]], done: Collection[str]) -> list[Job]:
        return _share_out(tokens, done, self.recipe.generate)

    def _computed(self, batches: Sequence[Job]) -> Iterator[list[Answer]]:
        wanted = self.recipe.generate
        places, _ = find_places(self.recipe, len(batches), wanted.processes, gpus_each=wanted.tensor_parallel)
        # Never in this process: the memory of its GPU would not come back.
        yield from self._by_processes(batches, places, functools.partial(VllmSampler, self.recipe))


def _share_out(tokens: Mapping[str, list[int]], done: Collection[str], wanted: Generate) -> list[Job]:
    """What is open, in parts that an engine is handed at once: how it is shared out changes no more than rounding."""
    prompts = sorted((item for item in tokens.items() if item[0] not in done), key=lambda item: -len(item[1]))
    size = max(1, ENGINE_RESPONSES // wanted.num_samples)
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


# --- Ray -------------------------------------------------------------------------------------------------------------

MAX_BLOCKS = 1000
"""Of Ray Data; the rows of a block come back together."""

RAY = "pip install 'simpo[ray]'"

LIVES = 3
"""How often an actor that is gone, and what it was at, is begun again."""


class RayBackend(LocalBackend):
    """`backend: ray`: `local` or `vllm` in actors of Ray Data, over the cluster that Ray finds; see `Backend`.

    The batches of `local` are the same ones, and so are the responses.

    Raises:
        ValueError: no Ray, or a cluster too small.
    """

    def __init__(self, recipe: Recipe) -> None:
        _import("ray.data", RAY)
        super().__init__(recipe)
        folder = Path(self.recipe.model_name_or_path)
        if folder.is_dir():  # an actor's working directory may be another
            self.recipe = load_recipe(self.recipe, {"model_name_or_path": str(folder.resolve())})
        self.on_vllm = recipe.generate.on_ray == "vllm"

    def _plan(self, tokens: Mapping[str, list[int]], done: Collection[str]) -> list[Job]:
        if self.on_vllm:
            return _share_out(tokens, done, self.recipe.generate)
        return super()._plan(tokens, done)

    def _computed(self, batches: Sequence[Job]) -> Iterator[list[Answer]]:
        if not batches:
            return
        ray = _import("ray", RAY)
        if self.on_vllm:
            build: Callable[[], Any] = functools.partial(VllmSampler, self.recipe)
        else:
            build = functools.partial(LocalSampler, self.recipe, threads=self.recipe.num_threads or 1)
        with _ray_cluster() as resources:
            count, needs = self._actors(resources, len(batches))
            data = ray.data.from_items(
                [{"job": pickle.dumps(batch)} for batch in batches], override_num_blocks=min(len(batches), MAX_BLOCKS)
            )
            with warnings.catch_warnings():
                # Ray 2.64 will have other names for these two, and its default is to begin again for ever.
                warnings.simplefilter("ignore")
                answered = data.map(
                    _RayActor,
                    fn_constructor_args=[build],
                    compute=ray.data.ActorPoolStrategy(size=count),
                    max_restarts=LIVES,
                    max_task_retries=LIVES,
                    **needs,
                )
            try:
                for row in answered.iter_rows():
                    found = pickle.loads(row["answers"])
                    if isinstance(found, ValueError):
                        raise found
                    notes, answers = found
                    self.notes[:] = dict.fromkeys([*self.notes, *notes])
                    yield answers
            except ray.exceptions.RayError as error:
                raise ValueError(f"Ray: {one_line(error)}; what is there stays, and the same command goes on") from None

    def _actors(self, resources: Mapping[str, float], num_batches: int) -> tuple[int, dict[str, float]]:
        """How many actors, and what each takes of the cluster."""
        wanted = self.recipe.generate
        on_gpu = self.on_vllm or (self.recipe.device != "cpu" and resources.get("GPU", 0) > 0)
        kind, each = ("GPU", wanted.tensor_parallel if self.on_vllm else 1) if on_gpu else ("CPU", 1)
        room = int(resources.get(kind, 0) // each)
        if room < 1:
            raise ValueError(
                f"generate.backend ray: the cluster has {resources.get(kind, 0):g} {kind}s, and each of its processes "
                f"needs {each}"
            )
        return min(wanted.processes or room, room, num_batches), {f"num_{kind.lower()}s": each}


class _RayActor:
    """A sampler in an actor; errors that are the user's come back as values, so that Ray does not try again."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._work = Worker(build)

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, bytes]:
        try:
            found: Any = self._work(pickle.loads(row["job"]))
        except ValueError as error:
            found = ValueError(str(error))
        return {"answers": pickle.dumps(found)}


@contextlib.contextmanager
def _ray_cluster() -> Iterator[Mapping[str, float]]:
    """Inside, Ray is there: the cluster that it finds, or one that ends with this. Gives its resources."""
    import ray

    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield ray.cluster_resources()
    finally:
        if ours:
            ray.shutdown()
