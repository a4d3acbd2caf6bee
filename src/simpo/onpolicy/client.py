"""Owns the client of servers that speak OpenAI's chat protocol: many requests at once, and each fails alone.

Sampling (`backend: openai`) and the judge share it. Retries, their delays and Retry-After are the openai package's.
Must not import torch or transformers.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice, product
from typing import Any
from urllib.parse import urlsplit

from simpo.data.columns import RowError
from simpo.data.messages import Message
from simpo.errors import first_line, one_line, short

RETRIES = 4
"""Of one request, after 0.5 s, 1 s, 2 s and 4 s, or when the server says."""

GRACE_S = 10.0  # for connecting and waiting, on top of each of a request's timeouts

TRIAL = [{"role": "user", "content": "Write ten random digits and three invented names."}]
"""A first question, whose answers differ where they are sampled."""

_UNREACHED = ("no connection", "timeout", "server error")
"""Reasons that are the server's alone; when they come one after another it is gone."""


@dataclass(frozen=True)
class Choice:
    """One answer; `num_tokens` and `logprob` (sum in nats) are None where the server does not say.

    `thought`: the server gave thinking apart from the text, which is not kept; the tokens are then those of both.
    """

    text: str
    finished: bool
    num_tokens: int | None = None
    logprob: float | None = None
    thought: bool = False


@dataclass(frozen=True)
class Request:
    """What to ask, and for how many answers: one for each seed; None leaves it to the server.

    `sampling` are fields of the protocol's body: temperature, top_p, max_tokens, stop, tools, ...
    """

    messages: Sequence[Message]
    sampling: Mapping[str, Any]
    seeds: Sequence[int | None] = (None,)


class Client:
    """One model of one server; a context, which holds the connections and can be entered again.

    Args:
        url: of the server, as http://localhost:8000/v1; without a path /v1 is meant.
        model: its name there; None: the only one that the server lists.
        key_variable: environment variable that holds the key; its value is sent and never shown.
        concurrency: requests on their way at once.
        timeout_s: longest wait for an answer.
    Attributes:
        takes_n, gives_logprobs: what `try_out` found.
    Raises:
        ValueError: no such variable, an URL that is none, or the openai package is not installed.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        key_variable: str | None = None,
        concurrency: int = 32,
        timeout_s: float = 600.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{short(url)} is not the URL of a server, such as http://localhost:8000/v1")
        if find_spec("openai") is None:
            raise ValueError("a server's model needs the openai package: pip install 'simpo[openai]'")
        # A key that is not given here would be read from OPENAI_API_KEY and sent to whatever server this is.
        self._key = os.environ.get(key_variable, "") if key_variable else "none"
        if not self._key:
            raise ValueError(f"the environment variable {key_variable}, which is to hold the server's key, is not set")
        self.url = url if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
        self.model, self.timeout_s, self.concurrency = model, timeout_s, concurrency
        self.takes_n, self.gives_logprobs, self._limit_field = True, False, "max_tokens"

    def __enter__(self) -> Client:
        import openai
        from anyio.from_thread import start_blocking_portal

        timeout = openai.Timeout(self.timeout_s, connect=min(self.timeout_s, 10.0))
        self._api = openai.AsyncOpenAI(base_url=self.url, api_key=self._key, timeout=timeout, max_retries=RETRIES)
        self._slots = asyncio.Semaphore(self.concurrency)
        self._lost = 0  # requests in a row that went without an answer
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            stack.callback(self._portal.call, self._api.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def find_model(self) -> list[str]:
        """The names that the server lists, the only one of which is the model where none was named.

        Raises:
            ValueError: no server answers, or a model must be named.
        """
        names = self._portal.call(self._list_models)
        if self.model is None:
            if len(names) != 1:
                raise ValueError(f"{self.url}: name the model to ask{_listed(names)}")
            self.model = names[0]
        return names

    def try_out(self, sampling: Mapping[str, Any], *, num_choices: int = 1, logprobs: bool = False) -> None:
        """Find the model and ask it for a few words with these settings, to learn which optional ones the server takes.

        Raises:
            ValueError: no server, no such model; it refuses the key or a setting, or answers as if at temperature 0.
        """
        self._portal.call(self._try_out, sampling, num_choices, logprobs, _listed(self.find_model()))

    def chat(self, request: Request) -> list[Choice]:
        """The answers to one request. Raises RowError where there are none."""
        return self._portal.call(self._chat, request)

    def chat_all(self, requests: Iterable[tuple[str, Request]]) -> Iterator[tuple[str, list[Choice] | RowError]]:
        """Each request's name with its answers, or with why it has none, as they come. Reads `requests` as it goes.

        Raises:
            ValueError: the server has not answered many requests in a row.
        """
        waiting: dict[Future, str] = {}
        requests = iter(requests)
        try:
            while True:
                for name, request in islice(requests, self.concurrency - len(waiting)):
                    waiting[self._portal.start_task_soon(self._chat, request)] = name
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    name, error = waiting.pop(future), future.exception()
                    if error is not None and not isinstance(error, RowError):
                        raise error
                    yield name, future.result() if error is None else error
        finally:
            for future in waiting:
                future.cancel()

    async def _chat(self, request: Request) -> list[Choice]:
        choices: list[Choice] = []
        count, body = len(request.seeds), {"messages": for_the_protocol(request.messages), **request.sampling}
        if count > 1 and self.takes_n:
            choices = (await self._ask(body, seed=request.seeds[0], n=count))[:count]
        # The first answer's seed is the same either way, so what a server that does not take n has given stays.
        rest = await asyncio.gather(*(self._ask(body, seed=seed) for seed in request.seeds[len(choices) :]))
        return [*choices, *(answers[0] for answers in rest)]

    async def _ask(self, body: Mapping[str, Any], **more: Any) -> list[Choice]:
        async with self._slots:
            try:
                reply = await self._post({**body, **more, **({"logprobs": True} if self.gives_logprobs else {})})
                self._lost = 0
            except RowError as error:
                self._lost = self._lost + 1 if error.reason in _UNREACHED else 0
                if self._lost >= max(20, 2 * self.concurrency):
                    raise ValueError(
                        f"{self.url}: {self._lost} requests in a row went without an answer (the last: {error}); "
                        "when the server is up again, the same command goes on"
                    ) from None
                raise
        return read_choices(reply)

    async def _post(self, body: Mapping[str, Any]) -> Any:
        """What the server answers to a body, decoded; RowError where it does not."""
        import openai

        fields = {name: value for name, value in body.items() if value is not None}
        if "max_tokens" in fields:
            fields[self._limit_field] = fields.pop("max_tokens")
        # The package's own limit begins anew with each byte, and some proxies send blanks while they wait.
        deadline = (self.timeout_s + GRACE_S) * (RETRIES + 1)
        try:
            async with asyncio.timeout(deadline):
                return await self._api.post("/chat/completions", cast_to=object, body={"model": self.model, **fields})
        except (openai.APITimeoutError, TimeoutError):
            raise RowError("timeout", f"no answer within {self.timeout_s:g} s, {RETRIES + 1} times") from None
        except openai.APIConnectionError as error:
            raise RowError("no connection", one_line(error.__cause__ or error)) from None
        except openai.APIStatusError as error:
            is_servers = error.status_code >= 500 or error.status_code in (408, 409, 429)
            said = " ".join(f"{error.status_code} {error.response.text}".split()).replace(self._key, "***")[:300]
            raise RowError("server error" if is_servers else "refused", said) from None
        except ValueError as error:
            raise RowError("not an answer", f"not JSON: {first_line(error)}") from None

    async def _try_out(self, sampling: Mapping[str, Any], num_choices: int, logprobs: bool, listed: str) -> None:
        body = {**sampling, "messages": TRIAL, "max_tokens": 32, "seed": 0}
        try:
            choices = await self._find_ways(body, num_choices, logprobs)  # servers may give some at once, and not all
            if len(choices) < min(num_choices, 2):
                choices += read_choices(await self._post(body | {"seed": 1}), is_trial=True)
        except RowError as error:
            raise ValueError(f"{self.url}: model {self.model!r} gives no answer ({error}){listed}") from None
        # No text: the few tokens went into thinking, which the server gives apart.
        is_same = num_choices > 1 and choices[0].text == choices[1].text and bool(choices[0].text.strip())
        if is_same and sampling.get("temperature", 1) >= 0.5:
            raise ValueError(
                f"{self.url}: model {self.model!r} answers {short(TRIAL[0]['content'])} twice with "
                f"{short(choices[0].text)}: the server takes the most likely token at temperature "
                f"{sampling.get('temperature', 1):g} too. transformers serve does so unless the model's "
                'generation_config.json says "do_sample": true'
            )

    async def _find_ways(self, body: Mapping[str, Any], count: int, logprobs: bool) -> list[Choice]:
        """The answers to a first request, with as many of the optional fields as the server takes."""
        ways = list(dict.fromkeys(product((count, 1), (logprobs, False))))
        for n, with_logprobs in ways:
            optional = {"n": n if n > 1 else None, "logprobs": with_logprobs or None}
            try:
                choices = read_choices(await self._try({**body, **optional}), is_trial=True)
            except RowError as error:
                if error.reason != "refused" or (n, with_logprobs) == ways[-1]:
                    raise
            else:
                self.takes_n = n > 1 and len(choices) >= n
                is_told = choices[0].logprob is not None or not choices[0].text.strip()  # of no text it need not say
                self.gives_logprobs = with_logprobs and is_told
                return choices
        raise AssertionError("the last way returns or raises")

    async def _try(self, body: Mapping[str, Any]) -> Any:
        try:
            return await self._post(body)
        except RowError as error:
            if self._limit_field != "max_tokens" or "max_completion_tokens" not in error.detail:
                raise
            self._limit_field = "max_completion_tokens"  # what OpenAI's own server calls it since its reasoning models
            return await self._post(body)

    async def _list_models(self) -> list[str]:
        """The names that the server lists; none where it has no list."""
        import openai

        try:
            reply = await self._api.with_options(max_retries=0).get("/models", cast_to=object)
        except openai.APITimeoutError:
            raise ValueError(f"{self.url}: the server has not answered within {self.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            raise ValueError(f"{self.url}: no server answers ({one_line(error.__cause__ or error)})") from None
        except (openai.APIStatusError, ValueError):
            return []  # what matters is whether it answers
        models = reply.get("data") if isinstance(reply, dict) else None
        return [model["id"] for model in models or () if isinstance(model, dict) and isinstance(model.get("id"), str)]


def _listed(names: Sequence[str]) -> str:
    return f"; the server lists {', '.join(names[:20])}" if names else ""


def for_the_protocol(messages: Sequence[Message]) -> list[Message]:
    """Messages as the protocol has them: a call's arguments as text, and an id for it and for its result."""
    sent, calls = [], iter(())
    for message in map(dict, messages):
        if message.get("tool_calls"):
            message["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.get("id", f"call_{len(sent)}_{place}"),
                    "function": {**call["function"], "arguments": _as_json(call["function"]["arguments"])},
                }
                for place, call in enumerate(message["tool_calls"])
            ]
            calls = iter([call["id"] for call in message["tool_calls"]])
        elif message["role"] == "tool":
            message.setdefault("tool_call_id", next(calls, "call"))
        sent.append(message)
    return sent


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def read_choices(reply: Any, *, is_trial: bool = False) -> list[Choice]:
    """The answers in a server's reply, as decoded from JSON.

    Args:
        is_trial: an answer that is cut before its text begins, while the model thinks, is one too: it is empty.
    Raises:
        RowError: it is no reply of this protocol, or holds no text.
    """
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    if not isinstance(choices, list) or not choices:
        raise RowError("not an answer", f"a reply without choices: {short(reply)}")
    used = reply.get("usage")
    tokens = used.get("completion_tokens") if isinstance(used, Mapping) and len(choices) == 1 else None
    return [_read_choice(choice, tokens if isinstance(tokens, int) else None, is_trial) for choice in choices]


def _read_choice(choice: Any, num_tokens: int | None, is_trial: bool) -> Choice:
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(message, Mapping):
        raise RowError("not an answer", f"a choice without a message: {short(choice)}")
    if message.get("tool_calls"):
        raise RowError("tool call", "the answer calls a tool, which the server gives apart from its text")
    text = message.get("content")
    if text is None and choice.get("finish_reason") == "length":
        if not is_trial:
            detail = "the limit of tokens came before any text: raise max_tokens (max_new_tokens in generate)"
            raise RowError("cut while thinking", detail)
        text = ""
    if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:  # half of a surrogate pair
        raise RowError("not an answer", f"a choice without text: {short(choice)}")
    if choice.get("finish_reason") not in ("stop", "length"):
        raise RowError("not an answer", f"it ended by {short(choice.get('finish_reason'))}, not by stop or length")
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    values = [token.get("logprob") for token in tokens or () if isinstance(token, Mapping)]
    values = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    is_known = bool(values) and len(values) == len(tokens or ())
    thought = bool(message.get("reasoning_content") or message.get("reasoning"))  # two servers' names for it
    return Choice(
        text=text,
        finished=choice["finish_reason"] == "stop",
        num_tokens=len(values) if is_known else num_tokens,
        logprob=math.fsum(values) if is_known and not thought else None,
        thought=thought,
    )
