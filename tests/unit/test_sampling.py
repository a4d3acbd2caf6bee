"""Sampling against models' plain forward passes: the same tokens whatever is computed beside them."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from simpo.model import sampling
from simpo.model.sampling import Sampled, Sampling, choose_tokens, noise_key, sample_responses, why_not_shared

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "mamba": {},
}
PROMPTS = [[10, 0, *range(12, 10 + size)] for size in (21, 3, 9, 30)]  # 0 is a token like any other
KEYS = [[noise_key(0, place, number) for number in range(3)] for place in range(len(PROMPTS))]
ENDS = range(64, 92)


def build(family: str) -> Any:
    """A random model with logits of realistic size."""
    torch.manual_seed(0)
    changes = {**SIZES, **FAMILIES[family]}
    if family == "mamba":
        changes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config = transformers.CONFIG_MAPPING[family](**changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        largest = model(input_ids=torch.tensor([PROMPTS[0]])).logits.abs().max()
        model.get_output_embeddings().weight.mul_(12 / largest)
    return model


def draw(model: Any, places: Any = range(4), how: Sampling | None = None, **options: Any) -> list[list[Sampled]]:
    prompts, keys = [PROMPTS[place] for place in places], [KEYS[place] for place in places]
    options = {"ends": ENDS, "max_new_tokens": 12, **options}
    return sample_responses(model, prompts, keys, how or Sampling(0.9, 0.95), **options)


def tokens(found: list[list[Sampled]]) -> list[list[list[int]]]:
    return [[each.ids for each in of_prompt] for of_prompt in found]


@torch.no_grad()
def one_by_one(model: Any, prompt: list[int], key: int, how: Sampling) -> tuple[list[int], float]:
    """A response without a cache, and its log-prob."""
    ids, logprob = list(prompt), 0.0
    for step in range(12):
        logprobs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1].log_softmax(-1)
        ids.append(int(choose_tokens(logprobs, torch.tensor([key]), step, how)))
        logprob += float(logprobs[0, ids[-1]])
        if ids[-1] in ENDS:
            break
    return ids[len(prompt) :], logprob


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_any_family_equal_one_response_at_a_time_without_a_cache(family):
    model = build(family)
    assert (why_not_shared(model) is None) == (family != "mamba")
    how = Sampling(0.9, 0.95)
    found = draw(model, shared=family != "mamba")
    lengths = set()
    for prompt, keys, sampled in zip(PROMPTS, KEYS, found, strict=True):
        for key, each in zip(keys, sampled, strict=True):
            ids, logprob = one_by_one(model, prompt, key, how)
            assert (each.ids, each.finished) == (ids, ids[-1] in ENDS)
            assert each.logprob == pytest.approx(logprob, abs=1e-3)
            lengths.add(len(ids))
    assert len(lengths) > 2, "responses must end at different steps, so that the batch is thinned"


def test_batch_order_and_way_change_nothing():
    model = build("llama")
    expected = tokens(draw(model))
    assert tokens(draw(model, [3, 1])) == [expected[3], expected[1]]
    assert [tokens(draw(model, [place]))[0] for place in range(4)] == expected
    assert tokens(draw(model, shared=False)) == expected


def test_responses_of_a_trained_model_do_not_depend_on_the_batch(smol_model):
    model = transformers.AutoModelForCausalLM.from_pretrained(smol_model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smol_model)
    asked = ["What is rain?", "Name three rivers and say where they are."]
    chats = [[{"role": "user", "content": text}] for text in asked]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    options = {"ends": {tokenizer.eos_token_id}, "max_new_tokens": 10}
    together = sample_responses(model, prompts, KEYS[:2], Sampling(0.8, 0.95), **options)
    alone = sample_responses(model, prompts[:1], KEYS[:1], Sampling(0.8, 0.95), **options)
    assert tokens(together)[:1] == tokens(alone)


def test_a_text_that_stops_ends_a_response():
    model = build("llama")
    free = draw(model)
    stopped = draw(model, is_stopped=lambda ids: ids[-1] % 2 == 0)
    for before, after in zip(chain(*free), chain(*stopped), strict=True):
        expected = next((number for number, token in enumerate(before.ids, 1) if token % 2 == 0), len(before.ids))
        assert after.ids == before.ids[:expected]
        assert after.finished or len(after.ids) == 12


def test_greedy_equals_generate():
    model = build("gemma2")
    for prompt, (found,) in zip(PROMPTS, sample_responses(
        model, PROMPTS, [[0]] * 4, Sampling(), ends=ENDS, max_new_tokens=12
    ), strict=True):  # fmt: skip
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=transformers.GenerationConfig(max_new_tokens=12, eos_token_id=list(ENDS), pad_token_id=0),
        )
        assert found.ids == out[0, len(prompt) :].tolist()


def nucleus(logprobs: Tensor, how: Sampling) -> Tensor:
    """The distribution to draw from, by sorting everything."""
    values, order = (logprobs / how.temperature).softmax(-1).sort(descending=True)
    if how.top_k is not None:
        values[how.top_k :] = 0
        values /= values.sum()
    values = values * (values.cumsum(-1) - values < how.top_p) * (values >= how.min_p * values[0])
    return torch.zeros_like(logprobs).scatter(0, order, values / values.sum())


@pytest.mark.parametrize(
    "how",
    [
        Sampling(1.4),
        Sampling(1.3, 0.98),  # reaches far behind the first few
        Sampling(1.0, 0.9, top_k=30),
        Sampling(1.5, 1.0, min_p=0.002),
    ],
)
def test_draws_follow_the_distribution_over_the_whole_vocabulary(how, monkeypatch):
    monkeypatch.setattr(sampling, "FEW", 8)
    torch.manual_seed(0)
    count, logprobs = 8000, (torch.randn(1030) * 2).log_softmax(-1)
    keys = torch.tensor([noise_key("test", number) for number in range(count)])
    drawn = torch.cat([choose_tokens(logprobs.expand(1000, -1), part, 3, how) for part in keys.split(1000)])
    shares, expected = torch.bincount(drawn, minlength=1030) / count, nucleus(logprobs, how)
    assert shares[expected == 0].sum() == 0
    likely = expected * count > 20
    deviations = (shares - expected) / (expected * (1 - expected) / count).sqrt()
    assert deviations[likely].abs().max() < 4.5
    assert 0.5 < deviations[likely].square().mean() < 1.7
    rest = expected[~likely].sum()
    assert abs(shares[~likely].sum() - rest) < 5 * (rest * (1 - rest) / count) ** 0.5 + 1e-9


def test_the_largest_values_are_found_in_any_size():
    for size in (100, 4096, 9999):
        values = torch.randn(3, size)
        found, ids = sampling._top(values, 20)
        assert torch.equal(found, values.topk(20).values)
        assert torch.equal(values.gather(1, ids), found)
