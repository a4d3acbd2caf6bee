"""Sampling from a causal language model: a prompt is computed once for all its samples, and finished rows leave.

Owns the loop, the choice of each token and its noise. The noise of a response follows from its key alone, so that a
response is the same whatever is computed beside it, up to the rounding of the logits. Knows nothing of texts.

Why not `model.generate`: it computes a prompt once for each sample, sorts the whole vocabulary at each token, keeps
finished rows until the longest one ends, and copies the whole cache at each step. It remains the way for models whose
cache cannot be repeated and thinned, one prompt at a time (`why_not_shared` says which).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from simpo.errors import first_line
from simpo.model.attention import unwrap

FEW = 64  # of the most likely tokens; more are looked at where top_p or min_p reaches further
ROOM = 64  # tokens that a cache has room for before it is copied again
THIN_AT = 8  # finished rows leave once they are one in so many: that copies the cache


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 takes the most likely one.

    In this order: `temperature` divides the logits; the `top_k` most likely tokens stay; of their probability the
    smallest set with a share of `top_p` stays; then tokens with at least `min_p` of the most likely one's probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0


@dataclass(frozen=True)
class Sampled:
    """One response: its tokens, the end included where it `finished`, and their summed log-prob in nats, under the
    model at temperature 1 without any truncation."""

    ids: list[int]
    finished: bool
    logprob: float


def _device_of(model: nn.Module) -> torch.device:
    weight = unwrap(model).get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.device


def end_tokens(tokenizer: Any, generation_config: Any) -> set[int]:
    """Tokens that end a response: the tokenizer's end, and those that a model's generation config, if any, names."""
    configured = getattr(generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return {end for end in ends if end is not None}


def noise_key(*parts: object) -> int:
    """A 64-bit key from what names a response."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@torch.no_grad()  # not inference_mode: what sharding gathers in it could not be trained with afterwards
def sample_responses(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    ends: Collection[int],
    max_new_tokens: int,
    is_stopped: Callable[[list[int]], bool] | None = None,
    shared: bool = True,
    each_step: Callable[[], Any] = lambda: None,
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> list[list[Sampled]]:
    """Responses to each prompt, as many as it has keys; all are computed together.

    Args:
        model: in eval mode, with transformers' own attention.
        prompts: token ids, the generation header included.
        keys: of each prompt's responses, the same number for all; see `noise_key`.
        ends: tokens that end a response.
        is_stopped: whether a response that has these tokens ends here.
        shared: False goes the slow way of models that `why_not_shared` says something about.
        each_step: called before each token.
        agree: makes the tokens of all processes those of one, where none can go on without the others.
    """
    num_samples = len(keys[0])
    device = _device_of(model)
    flat = torch.tensor([key for of_prompt in keys for key in of_prompt], device=device)
    responses = _Responses(flat, sampling, frozenset(ends), max_new_tokens, is_stopped, each_step, agree)
    if shared:
        _decode_shared(model, prompts, num_samples, responses)
    else:
        for place, prompt in enumerate(prompts):
            rows = torch.arange(place * num_samples, (place + 1) * num_samples, device=device)
            _generate_plainly(model, prompt, rows, responses)
    done = responses.sampled()
    return [done[start : start + num_samples] for start in range(0, len(done), num_samples)]


@dataclass(eq=False)
class _Responses:
    """What was drawn for each response so far."""

    keys: Tensor
    sampling: Sampling
    ends: frozenset[int]
    max_new_tokens: int
    is_stopped: Callable[[list[int]], bool] | None
    each_step: Callable[[], Any]
    agree: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        self.tokens: list[list[int]] = [[] for _ in self.keys]
        self.finished = [False] * len(self.keys)
        self.logprobs = torch.zeros(len(self.keys), dtype=torch.float64, device=self.keys.device)

    def draw(self, logits: Tensor, rows: Tensor, going: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The next token of each row, and which rows go on after it.

        Args:
            logits: [rows, vocabulary].
            rows: the response that each row belongs to.
            going: [rows], False where the response has ended already; its token is of no account.
        """
        self.each_step()
        logprobs = logits.log_softmax(-1, dtype=torch.float32)
        chosen = self.agree(choose_tokens(logprobs, self.keys[rows], step, self.sampling))
        self.logprobs[rows] += logprobs.gather(1, chosen[:, None]).squeeze(1) * going
        goes_on = []
        for row, token, was_going in zip(rows.tolist(), chosen.tolist(), going.tolist(), strict=True):
            if was_going:
                tokens = self.tokens[row]
                tokens.append(token)
                self.finished[row] = token in self.ends or (self.is_stopped is not None and self.is_stopped(tokens))
            goes_on.append(was_going and not self.finished[row] and step + 1 < self.max_new_tokens)
        return chosen, torch.tensor(goes_on, device=rows.device)

    def sampled(self) -> list[Sampled]:
        return [Sampled(*each) for each in zip(self.tokens, self.finished, self.logprobs.tolist(), strict=True)]


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for further tokens, which transformers' own copies itself for at each one."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized or self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end:
            rooms = (each.new_empty(*each.shape[:2], end + ROOM, each.shape[3]) for each in (self.keys, self.values))
            self._room = (next(rooms), next(rooms))
            for room, before in zip(self._room, (self.keys, self.values), strict=True):
                room[:, :, :start] = before
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Any) -> None:
        self._room = None
        super().reorder_cache(beam_idx)


def _new_cache(model: nn.Module) -> DynamicCache:
    cache = DynamicCache(config=unwrap(model).config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _of_routers(model: nn.Module) -> dict[str, bool]:
    """Their loss, which a configuration may ask for, cannot be computed behind a cache, and nobody wants it here."""
    asked = getattr(unwrap(model).config.get_text_config(), "output_router_logits", False)
    return {"output_router_logits": False} if asked else {}


def _prefill(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Logits [prompts, vocabulary] of the first token, cache, mask and last positions; padded on the left."""
    device = _device_of(model)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {"past_key_values": _new_cache(model), "use_cache": True, "logits_to_keep": 1}
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, **options, **_of_routers(model))
    return out.logits[:, -1], out.past_key_values, mask, positions[:, -1:]


def _step(model: nn.Module, chosen: Tensor, cache: Any, mask: Tensor, positions: Tensor) -> Tensor:
    """Logits of the token after `chosen`."""
    options = {"past_key_values": cache, "use_cache": True, **_of_routers(model)}
    out = model(input_ids=chosen[:, None], attention_mask=mask, position_ids=positions, **options)
    return out.logits[:, -1]


def _decode_shared(model: nn.Module, prompts: Sequence[Sequence[int]], num_samples: int, responses: _Responses) -> None:
    logits, cache, mask, positions = _prefill(model, prompts)
    each = torch.arange(len(prompts), device=mask.device).repeat_interleave(num_samples)
    if num_samples > 1:
        cache.reorder_cache(each)
        logits, mask, positions = logits[each], mask[each], positions[each]
    rows = torch.arange(len(each), device=mask.device)
    going = torch.ones_like(rows, dtype=torch.bool)
    for step in range(responses.max_new_tokens):
        chosen, going = responses.draw(logits, rows, going, step)
        num_going = int(going.sum())
        if not num_going:
            break
        mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions + 1
        if (len(going) - num_going) * THIN_AT >= len(going):
            kept = going.nonzero().flatten()
            cache.reorder_cache(kept)
            mask, positions, chosen, rows, going = (x[kept] for x in (mask, positions, chosen, rows, going))
        logits = _step(model, chosen, cache, mask, positions)


_tried: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def why_not_shared(model: nn.Module) -> str | None:
    """Why the cache of a model cannot be repeated and thinned; None where it can: tried once with a few tokens."""
    if model not in _tried:
        _tried[model] = _try_sharing(model)
    return _tried[model]


@torch.no_grad()
def _try_sharing(model: nn.Module) -> str | None:
    prompts, after = [[11, 7, 5, 3, 13, 17, 2, 19], [23, 3, 29, 6, 31]], [9, 8, 14]
    try:
        logits, cache, mask, positions = _prefill(model, prompts)
        expected = [prompts[0], prompts[1]]
        for token, kept in zip(after, ([0, 1, 1], [1, 2], [1])):
            index = torch.tensor(kept, device=mask.device)
            cache.reorder_cache(index)
            expected = [[*expected[row], token] for row in kept]
            mask, positions = mask[index], positions[index] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = _step(model, index.new_full((len(kept),), token), cache, mask, positions)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError, IndexError, KeyError) as error:
        return first_line(error)
    whole = torch.tensor(expected, device=mask.device)
    plain = model(input_ids=whole, use_cache=False, **_of_routers(model)).logits[:, -1]
    apart = (plain.float().softmax(-1) - logits.float().softmax(-1)).abs().sum(-1).max().item() / 2
    limit = 1e-3 if plain.dtype == torch.float32 else 0.2  # rounding alone makes 0.00001 and 0.05
    return None if apart <= limit else f"with padding its probabilities are others (by {apart:.2g})"


def _generate_plainly(model: nn.Module, prompt: Sequence[int], rows: Tensor, responses: _Responses) -> None:
    """By `model.generate`, which asks for each token here."""
    going, step = torch.ones_like(rows, dtype=torch.bool), 0

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal going, step
        chosen, going = responses.draw(scores, rows, going, step)
        step += 1
        return torch.full_like(scores, -math.inf).scatter(1, chosen[:, None], 0.0)

    base: Any = unwrap(model)
    before, base.generation_config = base.generation_config, GenerationConfig()
    try:
        base.generate(
            torch.tensor([list(prompt)] * len(rows), device=rows.device),
            # Without a padding token: generate would take the prompt's own tokens of that id for padding.
            generation_config=GenerationConfig(max_new_tokens=responses.max_new_tokens),
            logits_processor=LogitsProcessorList([process]),
            stopping_criteria=StoppingCriteriaList([lambda ids, scores, **_: ~going]),
        )
    finally:
        base.generation_config = before


def choose_tokens(logprobs: Tensor, keys: Tensor, step: int, sampling: Sampling) -> Tensor:
    """[rows, vocabulary] in fp32 -> the next token of each row, [rows]: the largest sum of log-prob and noise.

    Noise of Gumbel's distribution makes that a draw from the softmax; restricted to a set of tokens, from the softmax
    over the set.
    """
    if sampling.temperature == 0:
        return logprobs.argmax(-1)
    size, chosen = logprobs.shape[-1], torch.empty(len(logprobs), dtype=torch.long, device=logprobs.device)
    left, few = torch.arange(len(logprobs), device=logprobs.device), min(sampling.top_k or FEW, size)
    log_total = None  # of all tokens' probabilities at this temperature, where that is not that of the top_k
    if sampling.top_k is None:
        log_total = (logprobs / sampling.temperature).exp_().sum(-1, keepdim=True).log_()
    while len(left):
        top, ids = _top(logprobs if len(left) == len(logprobs) else logprobs[left], few)
        top = top / sampling.temperature
        probs = (top - (top.logsumexp(-1, keepdim=True) if log_total is None else log_total[left])).exp()
        if sampling.top_p == 1 and not (sampling.min_p or log_total is None or few == size):
            rest = log_total + (1 - probs.sum(-1, keepdim=True, dtype=torch.float64)).clamp(min=0).log()
            return _drawn_from_all(logprobs / sampling.temperature, top, ids, rest, keys, step)
        kept = (probs.cumsum(-1) - probs < sampling.top_p) & (probs >= sampling.min_p * probs[:, :1])
        kept[:, 0] = True
        noise = gumbel_noise(keys[left, None], step, ids)
        best = (top + noise).masked_fill(~kept, -math.inf).argmax(-1, keepdim=True)
        chosen[left] = ids.gather(1, best).squeeze(1)
        if log_total is None or few == size:
            break
        left, few = left[kept[:, -1]], min(few * 16, size)
    return chosen


def _drawn_from_all(scaled: Tensor, top: Tensor, ids: Tensor, rest: Tensor, keys: Tensor, step: int) -> Tensor:
    """A draw over the whole vocabulary that seldom looks at it: all tokens but the top ones stand as one, with their
    summed probability (`rest`, its log), and only where that one is drawn, one of them is."""
    size = scaled.shape[-1]
    all_ids = torch.cat([ids, torch.full_like(rest, size, dtype=torch.long)], 1)
    noise = gumbel_noise(keys[:, None], step, all_ids)
    chosen = all_ids.gather(1, (torch.cat([top, rest], 1) + noise).argmax(-1, keepdim=True)).squeeze(1)
    rows = (chosen == size).nonzero().squeeze(1)
    if len(rows):
        others = scaled[rows].scatter(1, ids[rows], -math.inf)
        noise = gumbel_noise(keys[rows, None], step, torch.arange(size, device=scaled.device))
        chosen[rows] = (others + noise).argmax(-1)
    return chosen


CHUNK = 64


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`values.topk(count)` of [rows, size], but faster: the largest are in the chunks with the largest maxima."""
    size = values.shape[-1]
    if count * CHUNK * 4 > size:
        return values.topk(count, dim=-1)
    whole = size - size % CHUNK
    chunks = values[:, :whole].unflatten(1, (-1, CHUNK))
    best = chunks.amax(-1).topk(count, dim=-1).indices[..., None]
    found = chunks.gather(1, best.expand(-1, -1, CHUNK)).flatten(1)
    ids = (best * CHUNK + torch.arange(CHUNK, device=values.device)).flatten(1)
    rest = torch.arange(whole, size, device=values.device).expand(len(values), -1)
    top, places = torch.cat([found, values[:, whole:]], 1).topk(count, dim=-1)
    return top, torch.cat([ids, rest], 1).gather(1, places)


def gumbel_noise(keys: Tensor, step: int, tokens: Tensor) -> Tensor:
    """Noise in fp64 for tokens of responses at one step, from nothing but these; shapes broadcast."""
    x = _mixed(keys + noise_key(step))
    x = _mixed(_mixed(x ^ (tokens * -0x4B47D0C5E3A8D9F3)))
    uniform = ((x >> 12) & (2**52 - 1)).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _mixed(x: Tensor) -> Tensor:
    """64-bit whole numbers without any pattern; wraps around on purpose."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))
