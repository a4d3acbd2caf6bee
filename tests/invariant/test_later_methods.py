"""WPO, ConfPO and RC on a model: values and gradients of their definitions, token by token, however a step is cut.

The definitions are written out below on ordinary logits of one sequence at a time.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mesh_runs import build
from torch import Tensor
from transformers import AutoModelForCausalLM

from simpo.core.batch import build_batch
from simpo.core.losses import PairLogps
from simpo.core.packing import TokenPair
from simpo.core.reweight import wpo_weights
from simpo.model.head import compute_pair_logps
from simpo.recipe import Recipe, load_recipe
from simpo.run.objective import trained_losses

BETA, RATIO = 2.0, 0.5
METHODS: dict[str, dict[str, Any]] = {
    "confpo": {"loss_type": "confpo"},
    "wpo": {"wpo_weights": True},
    "rc": {"reward_calibration": True},
    "wpo, rc and sft": {"wpo_weights": True, "reward_calibration": True, "sft_weight": 0.3},
    "wpo of confpo": {"loss_type": "confpo", "wpo_weights": True},
}


def recipe_of(keys: dict[str, Any]) -> Recipe:
    return load_recipe({"model_name_or_path": "tiny", "bf16": False, **keys})


# --- the definitions -------------------------------------------------------------------------------------------------


def log_probs_of(model, pair: TokenPair, side: str) -> tuple[Tensor, list[int]]:
    """[|y|, V] of one response's trained tokens, and which tokens they are."""
    ids, start = getattr(pair, f"{side}_ids"), getattr(pair, f"{side}_start")
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
    return torch.log_softmax(logits.double(), dim=-1), ids[start:]


def slow_pair(model, pair: TokenPair, keys: dict[str, Any], *, ratio: float = RATIO) -> tuple[float, Tensor]:
    """The trained loss of a pair, and a number whose gradient is the one to be trained with."""
    means, sums, weight, norms, lengths = {}, {}, 1.0, {}, {}
    for side in ("chosen", "rejected"):
        rows, labels = log_probs_of(model, pair, side)
        logps = [row[label] for row, label in zip(rows, labels, strict=True)]
        probabilities = [math.exp(logp.item()) for logp in logps]
        lengths[side], sums[side] = len(logps), sum(logps)
        kept = logps
        if keys.get("loss_type") == "confpo":
            average = sum(probabilities) / len(probabilities)
            kept = [logp for logp, p in zip(logps, probabilities, strict=True) if p <= average * (1 + 1e-12)]
        means[side] = sum(kept) / len(kept)
        dense = rows.detach().exp()
        likely = [p / (row**2).sum().item() for p, row in zip(probabilities, dense, strict=True)]
        weight *= math.prod(likely) ** (1 / len(likely))
        pulls = [
            torch.nn.functional.one_hot(torch.tensor(y), row.numel()) - row
            for y, row in zip(labels, dense, strict=True)
        ]
        norms[side] = math.sqrt(sum(float((pull**2).sum()) for pull in pulls))
    z = BETA * (means["chosen"] - means["rejected"] - ratio)
    loss = trained = -torch.nn.functional.logsigmoid(z)
    if keys.get("reward_calibration"):
        slope = BETA / (1 + math.exp(z.item()))
        d_w, d_r = slope / lengths["chosen"], slope / lengths["rejected"]
        delta = math.sqrt(d_r * norms["rejected"] / (d_w * norms["chosen"]))
        trained = -d_w * delta * sums["chosen"] + d_r / delta * sums["rejected"]
    weight = min(1.0, weight) if keys.get("wpo_weights") else 1.0
    sft = -keys.get("sft_weight", 0.0) * sums["chosen"] / lengths["chosen"]
    return (weight * loss + sft).item(), weight * trained + sft


def slow(model, pairs: list[TokenPair], keys: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    model = copy.deepcopy(model)
    model.set_attn_implementation("sdpa")
    values, trained = zip(*(slow_pair(model, pair, keys) for pair in pairs), strict=True)
    (sum(trained) / len(pairs)).backward()
    return list(values), {name: p.grad for name, p in model.named_parameters()}


def fast(model, pairs: list[TokenPair], method: str, **layout: bool) -> tuple[list[float], dict[str, Tensor]]:
    recipe = recipe_of(METHODS[method])
    logps = compute_pair_logps(model, build_batch(pairs, **layout), chunk_size=5, extras=recipe.extras)
    losses, _ = trained_losses(logps, recipe, num_pairs=len(pairs), num_chosen_tokens=1)
    (losses.sum() / len(pairs)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return losses.tolist(), gradients


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_the_definition_in_every_layout(random_model, ragged_pairs, method):
    """Pairs of ragged lengths, with responses of one token among them, that begin alike or not at all."""
    model, pairs = random_model("Llama", dtype=torch.float64, tied=False), ragged_pairs(7)
    pairs.append(TokenPair("one token", [5, 6, 7], 2, [5, 6, 8], 2))
    values, gradients = slow(model, pairs, METHODS[method])
    largest = max(float(g.abs().max()) for g in gradients.values())
    for layout in ({}, {"share_prompt": False}, {"pack": False}, {"pack": False, "share_prompt": False}):
        found, found_gradients = fast(model, pairs, method, **layout)
        assert found == pytest.approx(values, rel=2e-6), layout
        for name, gradient in gradients.items():
            assert float((found_gradients[name] - gradient).abs().max()) <= 2e-6 * largest, (name, layout)


# --- the stress cases ------------------------------------------------------------------------------------------------


def near_identical_pairs(count: int) -> list[TokenPair]:
    """One token apart in the middle of a response, as one-token bug fixes are."""
    generator = torch.Generator().manual_seed(4)
    pairs = []
    for index in range(count):
        ids = torch.randint(0, 509, (26,), generator=generator).tolist()
        wrong = [*ids[:12], (ids[12] + 1 + index) % 509, *ids[13:]]
        pairs.append(TokenPair(f"bug-{index}", ids, 6, wrong, 6))
    return pairs


def descend(model, pairs: list[TokenPair], steps: int, **keys: Any) -> tuple[float, float]:
    """By how much m_w and m_w - m_r change in a few small steps of plain gradient descent."""
    recipe, found = recipe_of(keys), []
    for _ in range(steps + 1):
        logps = compute_pair_logps(model, build_batch(pairs), extras=recipe.extras)
        found.append((logps.chosen_mean.mean().item(), (logps.chosen_mean - logps.rejected_mean).mean().item()))
        losses, _ = trained_losses(logps, recipe, num_pairs=len(pairs), num_chosen_tokens=1)
        gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 3e-3 * gradient
    return found[-1][0] - found[0][0], found[-1][1] - found[0][1]


@pytest.mark.parametrize(("learnt", "falls_by"), [(8, 0.5), (15, 0.0)], ids=["half learnt", "learnt"])
def test_calibration_keeps_chosen_responses_from_falling_where_the_rejected_side_pulls_harder(
    random_model, learnt, falls_by
):
    """Displacement: the rejected token is the less likely one, whose gradient is the larger and points the same way.

    m_w changes by -7.5e-3, with RC -2.8e-3, where the model half knows the responses; by -2.0e-4 and +9.8e-4 where it
    knows them.
    """
    changes = {}
    for name, keys in (("plain", {}), ("calibrated", {"reward_calibration": True})):
        model, pairs = random_model("Llama"), near_identical_pairs(4)
        sharpen(model, [pair.chosen_ids for pair in pairs], learnt)
        changes[name] = descend(model, pairs, 6, **keys)
    assert changes["plain"][0] < 0 < changes["plain"][1], "no displacement to be seen"
    assert changes["calibrated"][0] > falls_by * changes["plain"][0]
    assert changes["calibrated"][1] > 0


def sharpen(model, sequences: list[list[int]], steps: int = 25) -> None:
    """Teach the model sequences, so that it is sure of them and not of others."""
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    batch = build_batch([TokenPair(str(i), s, 1, [*s[:-1], 0], 1) for i, s in enumerate(sequences)], share_prompt=False)
    for _ in range(steps):
        loss = -compute_pair_logps(model, batch).chosen_mean.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_pairs_far_from_what_the_model_would_say_weigh_little_and_its_own_answers_one(random_model, ragged_pairs):
    model, pairs = random_model("Llama"), near_identical_pairs(3)
    sharpen(model, [pair.chosen_ids for pair in pairs])
    own = [TokenPair(pair.row_id, pair.chosen_ids, 6, pair.chosen_ids, 6) for pair in pairs]
    with torch.no_grad():
        far, near = (
            wpo_weights(compute_pair_logps(model, build_batch(each), extras={"squares"}))
            for each in (ragged_pairs(5), own)
        )
    assert float(far.max()) < 0.1 < float(near.min())
    assert float(near.max()) <= 1.0


def test_confpo_looks_at_the_few_tokens_that_the_model_does_not_expect(random_model):
    """What it was made for: a mistake of a token in twenty is a twentieth of SimPO's reward."""
    model, pairs = random_model("Llama"), near_identical_pairs(4)
    sharpen(model, [pair.chosen_ids for pair in pairs])
    logps = compute_pair_logps(model, build_batch(pairs), extras={"low"})
    (low_chosen, low_rejected), (_, kept) = logps.extra("low_sum"), logps.extra("low_length")
    assert int(kept.max()) <= 3 < int(logps.rejected_length.min()) == 20
    margins = low_chosen / logps.extra("low_length")[0] - low_rejected / kept
    assert bool((margins > 5 * (logps.chosen_mean - logps.rejected_mean)).all())


def test_responses_whose_tokens_are_all_alike_keep_them_all_and_finite_gradients(random_model, ragged_pairs):
    """Every token is equally likely: a mean may be rounded below what it is a mean of."""
    model, pairs = random_model("Llama", tied=False), ragged_pairs(5, longest=40)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
    for method in METHODS:
        found, gradients = fast(model, pairs, method)
        assert all(math.isfinite(value) for value in found), method
        assert all(g.isfinite().all() for g in gradients.values()), method
    logps = compute_pair_logps(model, build_batch(pairs), extras={"low"})
    low, whole = logps.extra("low_length"), (logps.chosen_length, logps.rejected_length)
    assert [torch.equal(a, b.to(a.dtype)) for a, b in zip(low, whole, strict=True)] == [True, True]


def test_calibration_scales_no_gradient_more_than_tenfold_and_none_that_one_side_lacks():
    """A response of which the model is certain pulls at nothing: chosen, rejected, both."""
    pulls = torch.tensor([[1e-9, 1.0, 0.0, 1.0, 0.0], [1.0, 1e-9, 1.0, 0.0, 0.0]])
    one = torch.ones(5)

    def gradients(keys: dict[str, Any]) -> Tensor:
        sums = torch.zeros(2, 5, requires_grad=True)
        extras = [{"pull": pull, "log_squares": one} for pull in pulls]
        logps = PairLogps(*sums, one, one, chosen_extras=extras[0], rejected_extras=extras[1])
        losses, _ = trained_losses(logps, recipe_of(keys), num_pairs=5, num_chosen_tokens=5)
        return torch.autograd.grad(losses.sum(), sums)[0]

    scales = gradients({"reward_calibration": True}) / gradients({})
    torch.testing.assert_close(scales, torch.tensor([[10.0, 0.1, 1, 1, 1], [0.1, 10.0, 1, 1, 1]]))


# --- real weights ----------------------------------------------------------------------------------------------------

SCORED = [
    ("What do bees make?", ["Bees make honey.", "Honey, and wax for their combs.", "I do not know."], [3.0, 2.5, 0.0]),
    ("Name a cold season.", ["Winter.", "It is spring, or summer, or both.", "In winter it snows."], [2.0, -1.0, 2.5]),
    ("Is ice hot?", ["No, ice is cold.", "Yes, very hot."], [1.0, 0.0]),
]
"""Prompts, answers and scores; the best answer does not always come first."""
ON_REAL_WEIGHTS: dict[str, dict[str, Any]] = {
    **{name: METHODS[name] for name in ("confpo", "wpo, rc and sft")},
    "score margin": {"score_margin": 2.0},
    "r_dpo": {"loss_type": "r_dpo", "beta": 0.1, "r_dpo_alpha": 0.3},
    "plackett_luce": {"loss_type": "plackett_luce"},
    "infonca": {"loss_type": "infonca"},
    "swepo": {"loss_type": "swepo"},
}


def slow_list(model, pair: TokenPair, loss_type: str) -> tuple[float, Tensor]:
    sequences = (pair.chosen_ids, *pair.more_ids, pair.rejected_ids)
    starts = (pair.chosen_start, *pair.more_starts, pair.rejected_start)
    means = []
    for ids, start in zip(sequences, starts, strict=True):
        rows, labels = log_probs_of(model, TokenPair("", ids, start, ids, start), "chosen")
        means.append(BETA * sum(row[label] for row, label in zip(rows, labels, strict=True)) / len(labels))
    scores, r = list(pair.scores), torch.stack(means)
    if loss_type == "plackett_luce":
        order = sorted(range(len(scores)), key=lambda k: -scores[k])  # no equal scores here
        loss = sum(r[order[k:]].logsumexp(0) - r[order[k]] for k in range(len(order)))
    elif loss_type == "infonca":
        loss = -(torch.tensor(scores, dtype=torch.float64).softmax(0) * r.log_softmax(0)).sum()
    else:
        away = torch.tensor([score - sum(scores) / len(scores) for score in scores], dtype=torch.float64)
        loss = (r + away.abs()).logsumexp(0) - (r + away.abs())[away > 0].logsumexp(0)
    return loss.item(), loss


def slow_r_dpo(model, pair: TokenPair, keys: dict[str, Any]) -> tuple[float, Tensor]:
    """Its reference is the model itself, so D is 0 in value, and not in its gradient."""
    (l_w, n_w), (l_r, n_r) = (
        (sum(row[label] for row, label in zip(rows, labels, strict=True)), len(labels))
        for rows, labels in (log_probs_of(model, pair, side) for side in ("chosen", "rejected"))
    )
    z = keys["beta"] * ((l_w - l_w.detach()) - (l_r - l_r.detach())) + keys["r_dpo_alpha"] * (n_w - n_r)
    loss = -torch.nn.functional.logsigmoid(z)
    return loss.item(), loss


@pytest.mark.long
@pytest.mark.real_model
@pytest.mark.parametrize("method", ON_REAL_WEIGHTS)
def test_a_step_on_real_weights_is_that_of_the_definition(smol_model: Path, tmp_path: Path, method: str):
    """SmolLM2-135M, from scored rows to the gradients of the trainer's step, in float32 on both sides."""
    keys = ON_REAL_WEIGHTS[method]
    columns = ("prompt", "all_generated_responses", "all_rm_scores")
    lines = [json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in SCORED]
    (tmp_path / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    own = {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"), "preprocessing_num_workers": 1}
    trainer = build(
        {
            **{"model_name_or_path": str(smol_model), "dataset_name": str(tmp_path / "train.jsonl"), **own, **keys},
            **{"bf16": False, "validation_fraction": 0.0, "per_device_train_batch_size": 3, "num_threads": 1},
        }
    )
    _, losses = trainer._accumulate(next(trainer.loader.plans(0, 1)))
    found = {row_id: loss.item() for ids, each in losses for row_id, loss in zip(ids, each, strict=True)}
    pairs = [trainer.loader.store[index] for index in range(3)]
    assert [len(pair.more_ids) for pair in pairs] == ([1, 1, 0] if trainer.recipe.loss.is_of_lists else [0, 0, 0])
    gaps = [3.0, 3.5, 1.0]
    model = AutoModelForCausalLM.from_pretrained(smol_model, dtype=torch.float32)
    expected = {}
    for pair, gap in zip(pairs, gaps, strict=True):
        if trainer.recipe.loss.is_of_lists:
            assert sorted(pair.scores, reverse=True)[0] == pair.scores[0]
            value, trained = slow_list(model, pair, keys["loss_type"])
        elif method == "r_dpo":
            value, trained = slow_r_dpo(model, pair, keys)
        else:
            ratio = RATIO * min(2.0, gap / (sum(gaps) / 3)) if "score_margin" in keys else RATIO
            value, trained = slow_pair(model, pair, keys, ratio=ratio)
        (trained / 3).backward()
        expected[pair.row_id] = value
    assert found == pytest.approx(expected, rel=1e-4)
    ours = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert ours.keys() == dict(model.named_parameters()).keys()
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert float((ours[name] - parameter.grad).abs().max()) <= 1e-4 * largest, name
