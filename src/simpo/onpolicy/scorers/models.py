"""Numbers that models give: reward models, and the mean log-prob of a response under a language model.

A model sees some rows at a time, sorted by length so that little is padding; a row with a dialogue that is too long is
left out, never cut.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from simpo.core.batch import TokenList, build_list_batch
from simpo.data.columns import RowError
from simpo.data.limits import limited
from simpo.data.messages import turn
from simpo.data.preferences import Pair, with_empty_system
from simpo.data.prepare import inserts_empty_system, token_limits
from simpo.data.templates import PROBE_ANSWERS, digest_of_template, load_chat_template, render_chat
from simpo.data.tokenize import PairTokenizer, TokenizedPair
from simpo.data.workers import WorkersFailed, map_in_processes
from simpo.evaluation.run import READ_KEYS, find_tokenizer, model_folder, ready_model, settings_for
from simpo.model.attention import PACKED, is_packed, unwrap
from simpo.model.head import compute_response_logps
from simpo.model.load import load_pretrained, pick_device, slow_bf16
from simpo.onpolicy.sampler import find_places, identify_model
from simpo.onpolicy.scorers.rating import Rater, Row, Scores, rate_each, windows
from simpo.recipe import Recipe, load_recipe
from simpo.run.stopping import needs_memory

_PADDED = 1.25  # a batch has at most this many times the tokens of its dialogues
Work = Callable[[Sequence[Row]], list[Scores]]


def _rate_by(
    load: Callable[[], Work], options: Any, recipe: Recipe, rows: Iterable[Row]
) -> Iterator[tuple[str, Scores]]:
    """The scores of rows by a model that `load` loads, in this process or in one for each GPU."""
    wanted = options.processes or (None if pick_device(recipe.device).type == "cuda" else 1)
    places, threads = find_places(recipe, sys.maxsize, wanted)
    if len(places) == 1:
        work = load()
        for some in windows(rows):
            yield from zip([row["id"] for row in some], work(some), strict=True)
        return
    try:
        build = functools.partial(_Worker, load, threads)
        for found in map_in_processes(build, list(windows(rows)), len(places), environments=places, in_order=False):
            yield from found
    except WorkersFailed as error:
        raise ValueError(f"a process that scored is gone ({error}), most likely for want of memory") from None


class _Worker:
    """A process that scores: loads its model with the first rows, so that what is wrong with it is said."""

    def __init__(self, load: Callable[[], Work], threads: int) -> None:
        torch.set_num_threads(threads)
        self.work = functools.cache(load)

    def __call__(self, rows: Sequence[Row]) -> list[tuple[str, Scores]]:
        return [*zip([row["id"] for row in rows], self.work()(rows), strict=True)]


# --- reward models ---------------------------------------------------------------------------------------------------


def build_reward_model(options: Any, recipe: Recipe) -> Rater:
    """The scorer of a reward model, which is loaded when it begins.

    Raises:
        ValueError: there is no such model, or it has no chat template.
    """
    of_model = {"model_name_or_path": options.model, "model_revision": options.revision or "main"}
    own = load_recipe({**of_model, "trust_remote_code": options.trust_remote_code, "device": recipe.device})
    load_pretrained(AutoConfig, options.model, own, what="configuration", key="model")
    tokenizer = load_pretrained(AutoTokenizer, options.model, own, what="tokenizer", key="model")
    if load_chat_template(tokenizer, options.chat_template) is None:
        raise ValueError("chat_template: a reward model rates dialogues, so it needs one")
    rate = functools.partial(_rate_by, functools.partial(RewardModel, options, own), options, recipe)
    weights = identify_model(options.model, options.revision)
    note = slow_bf16(pick_device(recipe.device), "dtype: float32") if options.dtype == "bfloat16" else None
    return Rater(rate, {"weights": weights, **digest_of_template(options.chat_template)}, note)


class RewardModel:
    """A reward model on a device: from rows to the scores of their responses."""

    def __init__(self, options: Any, recipe: Recipe) -> None:
        self.options, self.device = options, pick_device(recipe.device)
        self.tokenizer = load_pretrained(AutoTokenizer, options.model, recipe, what="tokenizer")
        self.template = load_chat_template(self.tokenizer, options.chat_template)
        settings = {"dtype": getattr(torch, options.dtype), "output_loading_info": True}
        with needs_memory("the reward model", advice="choose a smaller one"):
            self.model, loaded = load_pretrained(
                AutoModelForSequenceClassification, options.model, recipe, what="reward model", **settings
            )
            self.model.to(self.device).eval()
        if loaded["missing_keys"]:
            raise ValueError(
                f"{options.model} is no reward model: it has no {', '.join(sorted(loaded['missing_keys']))}"
            )
        limits = (
            options.max_length,
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
            self.tokenizer.model_max_length,
        )
        self.limit = min(limit for limit in limits if limit)
        self.is_packed = False
        self.is_packed = self._takes_packed()

    def __call__(self, rows: Sequence[Row]) -> list[Scores]:
        tokens = [self._tokenize(row) for row in rows]
        found: list[Scores] = [each if isinstance(each, RowError) else [None] * len(each) for each in tokens]
        units = sorted(self._units(tokens), key=lambda unit: sum(len(ids) for _, _, ids in unit))
        for batch in self._batches(units, [sum(len(ids) for _, _, ids in unit) for unit in units]):
            scores = self.rate([[ids for _, _, ids in unit] for unit in batch])
            for (i, j, _), score in zip(chain(*batch), scores, strict=True):
                found[i][j] = score  # type: ignore[index]
        return found

    def _units(self, tokens: Sequence[list[list[int]] | RowError]) -> list[list[tuple[int, int, list[int]]]]:
        """What shares its prompt: a row's dialogues, as far as `batch_tokens` goes; padded, each by itself."""
        units: list[list[tuple[int, int, list[int]]]] = []
        for i, each in enumerate(tokens):
            room = 0
            for j, ids in enumerate([] if isinstance(each, RowError) else each):
                if not (self.is_packed and room >= len(ids)):
                    units.append([])
                    room = self.options.batch_tokens
                units[-1].append((i, j, ids))
                room -= len(ids)
        return units

    def _tokenize(self, row: Row) -> list[list[int]] | RowError:
        """The tokens of each response with its prompt."""
        found, tools = [], row.get("tools") or ()
        for place, response in enumerate(row["responses"], start=1):
            dialogue = [*row["prompt"], turn("assistant", response["text"])]
            try:
                with limited():
                    text = render_chat(self.tokenizer, self.template, dialogue, tools=tools)
            except RowError as error:
                return error
            found.append(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(found[-1]) > self.limit:
                return RowError(
                    "too long", f"response {place} has {len(found[-1])} tokens with its prompt, over {self.limit}"
                )
        return found

    def _batches(self, places: list[Any], lengths: list[int]) -> Iterator[list[Any]]:
        """Places in ascending order of length, in groups of at most `batch_tokens`, with little padding."""
        start, tokens = 0, 0
        for end, length in enumerate(lengths):
            padded = (end + 1 - start) * length
            if end > start and (padded > self.options.batch_tokens or padded > _PADDED * (tokens + length)):
                yield places[start:end]
                start, tokens = end, 0
            tokens += length
        if places:
            yield places[start:]

    @torch.no_grad()
    def rate(self, units: Sequence[Sequence[Sequence[int]]]) -> list[float]:
        """The scores of some dialogues, as tokens, in one forward pass; those of a unit may begin alike."""
        dialogues = [*chain(*units)]
        config = self.model.config.get_text_config()
        pad, was = config.pad_token_id, config.pad_token_id
        if pad is None:  # the model looks for its last token by this id, so any will do that is in none of them
            pad = next(number for number in range(config.vocab_size) if not any(number in ids for ids in dialogues))
        width = max(map(len, dialogues))
        ids = torch.tensor([[*each, *[pad] * (width - len(each))] for each in dialogues], device=self.device)
        mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in dialogues], device=self.device)
        advice = "lower the scorer's batch_tokens or max_length"
        with needs_memory(f"scoring {len(dialogues)} dialogues of up to {width} tokens", advice=advice):
            if self.is_packed:
                return self._read(self._packed(units, was))
            try:
                config.pad_token_id = pad
                output = self.model(input_ids=ids, attention_mask=mask)
            finally:
                config.pad_token_id = was
            return self._read(output)

    def _packed(self, units: Sequence[Sequence[Sequence[int]]], pad: int | None) -> Any:
        """The same logits from one row of all dialogues, in which those of a unit share what they begin with."""
        lists = []
        for unit in units:
            # transformers reads the last token that is no padding. Here that is the row that predicts one more.
            ends = [max((at for at, number in enumerate(ids, 1) if number != pad), default=len(ids)) for ids in unit]
            lists.append(TokenList("", [[*ids[:end], 0] for ids, end in zip(unit, ends, strict=True)], ends))
        batch = build_list_batch(lists).to(self.device)
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "packed_blocks": batch.blocks}
        mask = torch.ones_like(batch.input_ids, dtype=torch.bool)
        hidden = self.model.base_model(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
        return SimpleNamespace(logits=self.model.score(hidden.flatten(0, 1)[batch.source_rows]))

    @torch.no_grad()
    def _takes_packed(self) -> bool:
        """Whether it is a classifier of transformers' own whose scores are the same in packed rows: tried here."""
        if self.options.output not in (None, "logits") or not type(self.model).__module__.startswith("transformers."):
            return False
        before = self.model.config._attn_implementation
        begin, size = [11, 7, 5, 3, 13, 17, 2, 19], self.model.config.get_text_config().vocab_size
        units = [[[*begin, 23, 29], [*begin, 31, 37, 41], [*begin, 43]], [[5, 47, 6, 4, 8, 9, 21]]]
        units = [[[number % size for number in ids] for ids in unit] for unit in units]
        padded = torch.tensor(self.rate(units))
        try:
            self.model.set_attn_implementation(PACKED)
            packed = self._read(self._packed(units, self.model.config.get_text_config().pad_token_id))
        except (AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError, IndexError, KeyError):
            packed = [math.nan]
        limit = 1e-3 if self.model.dtype == torch.float32 else 0.2  # of what dialogues differ by
        spread = (padded.max() - padded.min()).item()
        if is_packed(self.model.config._attn_implementation) and (
            len(packed) == len(padded) and (torch.tensor(packed) - padded).abs().max().item() <= limit * spread
        ):
            return True
        self.model.set_attn_implementation(before)
        return False

    def _read(self, output: Any) -> list[float]:
        """One number for each dialogue from the output that the scorer's options mean."""
        name, index = self.options.output, self.options.index
        if name is None:
            name = "score" if getattr(output, "score", None) is not None else "logits"
        values = getattr(output, name, None)
        if not isinstance(values, torch.Tensor):
            raise ValueError(f"output: {self.options.model} gives no {name!r}; it gives {', '.join(output)}")
        values = values.reshape(len(values), -1)
        if (index is None and values.shape[1] > 1) or (index or 0) >= values.shape[1]:
            raise ValueError(
                f"index: {name} of {self.options.model} has {values.shape[1]} entries for each response; say which is "
                f"the score, from 0 to {values.shape[1] - 1}"
            )
        return values[:, index or 0].float().tolist()


# --- log-probs -------------------------------------------------------------------------------------------------------


def build_logprob(options: Any, recipe: Recipe) -> Rater:
    """The scorer by mean log-prob: what is written in the responses, or computed by a model.

    Raises:
        ValueError: there is no such model.
    """
    if options.model is None:
        return Rater(rate_each(_written_logprob))
    name = model_folder(options.model)
    own = settings_for(recipe, recipe.model_name_or_path, name)
    settings = load_recipe(own, {"model_name_or_path": name}, only=READ_KEYS)
    limits = token_limits(settings, find_tokenizer(settings, name)) | {"overlong": "drop"}
    load = functools.partial(LogprobModel, name, settings, limits)
    empty_system = {"auto_insert_empty_system_msg": settings.auto_insert_empty_system_msg}
    decide = {"bf16": settings.bf16, **limits, **empty_system, "weights": identify_model(name, settings.model_revision)}
    rate = functools.partial(_rate_by, load, options, settings)
    note = slow_bf16(pick_device(settings.device), "the recipe's bf16: false") if settings.bf16 else None
    return Rater(rate, decide, note)


def _written_logprob(row: Row, response: Any) -> float:
    logprob, count = response.get("logprob"), response.get("num_tokens")
    if logprob is None or not count:
        raise RowError("no log-prob", "a response has no logprob or num_tokens; name a model that computes it")
    return logprob / count


class LogprobModel:
    """A language model that is ready: from rows to the mean log-probs of their responses, as evaluation computes them.

    That is the same tokens, rows and precision. The end of turn counts, though an unfinished response has none.
    """

    def __init__(self, name: str, settings: Recipe, limits: Mapping[str, Any]) -> None:
        tokenizer = find_tokenizer(settings, name)
        self.settings, self.tokenize = settings, PairTokenizer(tokenizer, **limits)
        self._with_empty_system = inserts_empty_system(tokenizer, settings)
        self._ready = ExitStack()  # as long as this object is there
        self.model, self.packed, _ = self._ready.enter_context(ready_model(name, settings))
        self.device = unwrap(self.model).get_input_embeddings().weight.device

    def __call__(self, rows: Sequence[Row]) -> list[Scores]:
        tokens = [_tokenized(row, self.tokenize, empty_system=self._with_empty_system) for row in rows]
        lists = [
            TokenList(
                row["id"], [e.chosen_ids for e in each], [e.chosen_start for e in each], [e.chosen_gaps for e in each]
            )
            for row, each in zip(rows, tokens, strict=True)
            if not isinstance(each, RowError)
        ]
        lists.sort(key=lambda each: max(map(len, each.sequences)))
        means = {}
        for some in windows(lists, self.settings.per_device_eval_batch_size):
            means |= zip([each.row_id for each in some], self._mean_logps(some), strict=True)
        return [
            each if isinstance(each, RowError) else means[row["id"]] for row, each in zip(rows, tokens, strict=True)
        ]

    @torch.no_grad()
    def _mean_logps(self, lists: Sequence[TokenList]) -> list[list[float]]:
        batch = build_list_batch(lists, pack=self.packed, share_prompt=self.packed).to(self.device)
        in_bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.settings.bf16))
        with needs_memory("log-probs", advice="lower per_device_eval_batch_size"), in_bf16:
            chunk_size = self.settings.logits_chunk_size
            sums, lengths = compute_response_logps(self.model, batch, chunk_size=chunk_size)
        return [means.tolist() for means in (sums.double() / lengths).split(batch.group_sizes)]


def _tokenized(row: Row, tokenize: PairTokenizer, *, empty_system: bool) -> list[TokenizedPair] | RowError:
    """Each response as the chosen one of a pair; what the other one is does not matter to it."""
    texts = [response["text"] for response in row["responses"]]
    others = [PROBE_ANSWERS[text == PROBE_ANSWERS[0]] for text in texts]
    tools = row.get("tools", ())
    prompt = with_empty_system(row["prompt"]) if empty_system else row["prompt"]
    pairs = [Pair(row["id"], prompt, text, other, tools) for text, other in zip(texts, others, strict=True)]
    found = tokenize(pairs)
    return next((each for each in found if isinstance(each, RowError)), found)  # type: ignore[return-value]
