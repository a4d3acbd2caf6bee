"""The demo's sampler against transformers' own `generate`, on a tiny random model."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import load_script
from transformers import LlamaConfig, LlamaForCausalLM

PROMPTS = ["a", "bcd efg", "hello there, how are you", "x y"]


class Letters:
    """One token per character; just what the sampler asks of a tokenizer."""

    eos_token_id = 2

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return f"<{messages[0]['content']}>"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 60 for c in text]}

    def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


@pytest.fixture(scope="module")
def sample() -> ModuleType:
    return load_script("examples", "demo", "sample.py")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,  # large enough that greedy text varies and ends
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def reference(model: LlamaForCausalLM, prompt: str, **options: Any) -> str:
    ids = torch.tensor([Letters()(f"<{prompt}>")["input_ids"]])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return " ".join(str(token) for token in out[0, ids.shape[1] :].tolist() if token != 2)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_batches_equal_generate_one_prompt_at_a_time(sample, model, batch_size):
    # 24 different prompts, so that rows end at different steps and the batch shrinks.
    prompts = [prompt + chr(97 + i) for i in range(6) for prompt in PROMPTS]
    got = sample.generate_responses(model, Letters(), prompts, max_new_tokens=24, temperature=0, batch_size=batch_size)
    expected = [reference(model, prompt, max_new_tokens=24, do_sample=False) for prompt in prompts]
    assert [texts for (texts,) in got] == expected
    lengths = {len(text.split()) for text in expected}
    assert len(lengths) > 2, "the case must contain responses that end early, and at different steps"


def test_samples_depend_on_the_seed_only(sample, model):
    def draw(seed: int) -> list[list[str]]:
        return sample.generate_responses(
            model, Letters(), PROMPTS, num_samples=5, max_new_tokens=12, seed=seed, batch_size=10
        )

    first = draw(1)
    assert first == draw(1)
    assert first != draw(2)
    assert [len(texts) for texts in first] == [5] * 4
    assert all(len(set(texts)) > 1 for texts in first)


def test_sampled_first_tokens_follow_the_nucleus_distribution(sample, model):
    count, top_p = 4000, 0.6
    got = sample.generate_responses(
        model, Letters(), ["q"], num_samples=count, max_new_tokens=1, temperature=1.5, top_p=top_p, batch_size=count
    )[0]
    ids = torch.tensor([Letters()("<q>")["input_ids"]])
    with torch.no_grad():
        probs, order = (model(ids).logits[0, -1] / 1.5).softmax(-1).sort(descending=True)
    kept = int((probs.cumsum(-1) < top_p).sum()) + 1
    expected = {str(token) if token != 2 else "": p for token, p in zip(order[:kept].tolist(), probs[:kept].tolist())}
    assert set(got) <= set(expected)
    for text, prob in expected.items():
        share = prob / sum(expected.values())
        # Five standard deviations of a binomial share.
        assert abs(got.count(text) / count - share) < 5 * (share * (1 - share) / count) ** 0.5 + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 0.0, "num_samples": 2}, "equal responses"),
    ],
)
def test_wrong_options_are_named(sample, model, options, message):
    with pytest.raises(ValueError, match=message):
        sample.generate_responses(model, Letters(), PROMPTS, **options)


def test_empty_prompt_is_named(sample, model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample.generate_responses(model, Letters(), ["a", " "])
