"""Any number of responses to a prompt in one row: the log-probs and gradients of each on its own.

The reference runs one unpadded sequence at a time through transformers' own attention, with full logits.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from simpo.core.batch import build_batch, build_list_batch
from simpo.model.head import compute_pair_logps, compute_response_logps

VOCABULARY = 509
LAYOUTS = [(True, True), (True, False), (False, True), (False, False)]


class Responses(NamedTuple):
    row_id: str
    sequences: list[list[int]]
    starts: list[int]


def make_lists(sizes: list[int], *, seed: int = 0) -> list[Responses]:
    """One list of each size; in every second one all responses begin alike, in every third the starts differ."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    lists = []
    for index, size in enumerate(sizes):
        prompt = tokens(1, 12)
        common = tokens(1, 4) if index % 2 else []
        sequences = [prompt + common + tokens(2, 12) for _ in range(size)]
        starts = [len(prompt) + (k % 2 if index % 3 == 2 else 0) for k in range(size)]
        lists.append(Responses(f"row-{index}", sequences, starts))
    return lists


def gradients_of(model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def weights_of(count: int) -> Tensor:
    """A different factor for each response, so that mixing responses up changes the gradient."""
    return torch.linspace(-1.0, 1.5, count)


def dense_reference(model, lists: list[Responses]) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    softcapped = hasattr(model.config, "attn_logit_softcapping")  # transformers' sdpa refuses soft-caps
    model.set_attn_implementation("eager" if softcapped else "sdpa")
    sums = []
    for each in lists:
        for ids, start in zip(each.sequences, each.starts, strict=True):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            log_probs = torch.log_softmax(logits, dim=-1)
            sums.append(torch.stack([log_probs[t - 1, ids[t]] for t in range(start, len(ids))]).sum())
    sums = torch.stack(sums)
    (sums * weights_of(len(sums))).sum().backward()
    return sums.detach(), gradients_of(model)


def assert_lists_equal_reference(model, lists: list[Responses], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Sums to 2e-6 of what a response of uniform tokens has; gradients to 2e-6 of the largest in the model."""
    lengths = torch.tensor([len(s) - b for each in lists for s, b in zip(each.sequences, each.starts, strict=True)])
    largest = max(float(g.abs().max()) for g in expected[1].values())
    for pack, share in LAYOUTS:
        batch = build_list_batch(lists, pack=pack, share_prompt=share, pad_token_id=3)
        sums, found_lengths = compute_response_logps(model, batch)
        assert torch.equal(found_lengths, lengths)
        limit = 2e-6 * lengths * math.log(VOCABULARY)
        assert bool(((sums.detach() - expected[0]).abs() <= limit).all()), (pack, share)
        (sums * weights_of(len(sums))).sum().backward()
        for name, gradient in gradients_of(model).items():
            assert float((gradient - expected[1][name]).abs().max()) <= 2e-6 * largest, (name, pack, share)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_n_responses_in_one_row_equal_n_separate_sequences(random_model, size):
    model, lists = random_model("Llama"), make_lists([size], seed=size)
    assert_lists_equal_reference(model, lists, dense_reference(model, lists))


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [("Llama", False), ("Qwen2", True), ("Mistral", False), ("Gemma2", True), ("Phi3", False), ("Cohere", True)],
    ids=str,
)
def test_lists_of_unequal_size_in_one_row_equal_separate_sequences(random_model, architecture, tied):
    model, lists = random_model(architecture, tied=tied), make_lists([3, 5, 1, 2, 4])
    assert_lists_equal_reference(model, lists, dense_reference(model, lists))


def test_sums_come_apart_list_by_list(random_model):
    model, lists = random_model("Llama"), make_lists([2, 1, 3])
    batch = build_list_batch(lists)
    with torch.no_grad():
        sums, _ = compute_response_logps(model, batch)
        alone = [compute_response_logps(model, build_list_batch([each]))[0] for each in lists]
    for part, expected in zip(sums.split(batch.group_sizes), alone, strict=True):
        assert torch.allclose(part, expected, rtol=1e-5)


def test_pair_log_probs_of_lists_are_their_first_and_last_and_one_response_is_refused(random_model, ragged_pairs):
    model = random_model("Llama")
    batch = build_list_batch(make_lists([3, 2]))
    with torch.no_grad():
        found, (sums, _) = compute_pair_logps(model, batch), compute_response_logps(model, batch)
    assert torch.equal(torch.stack([found.chosen_sum, found.rejected_sum]), sums[torch.tensor([[0, 3], [2, 4]])])
    assert torch.equal(found.lists.sums, sums)
    with pytest.raises(ValueError, match="a list of one response has none to compare it with"):
        compute_pair_logps(model, build_list_batch(make_lists([3, 1])))
    pairs = ragged_pairs(3)
    as_lists = [Responses(p.row_id, [p.chosen_ids, p.rejected_ids], [p.chosen_start, p.rejected_start]) for p in pairs]
    with torch.no_grad():
        assert torch.equal(
            compute_pair_logps(model, build_list_batch(as_lists)).chosen_sum,
            compute_pair_logps(model, build_batch(pairs)).chosen_sum,
        )
