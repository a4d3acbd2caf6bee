"""The Megatron host computes the same update as one process: loss, every gradient and metrics, on every layout.

Each layout trains one optimizer step of a real Megatron-Core GPTModel (through its schedules, DDP and gradient
finalisation, on CPU by the shims of `megatron_on_cpu`) whose weights come from a Hugging Face model by the example's
conversion. It is compared with this project's native path on the same weights, and that with the formulas written out.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cases import rarely
from megatron_cases import (
    LAYOUTS,
    NUM_PAIRS,
    REFERENCE_SUMS,
    SEQ_LENGTH,
    SIMPO,
    Case,
    build_megatron,
    build_model,
    make_pairs,
    run_cases,
)
from ranks import Ranks
from torch import Tensor

from simpo.core.batch import build_batch
from simpo.core.losses import PairLogps
from simpo.hosts.megatron.batch import collate, iterate_batches
from simpo.model.head import compute_pair_logps
from simpo.run.metrics import PAIR_METRICS
from simpo.run.objective import trained_losses

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="needs megatron-core: pip install 'simpo[megatron]'"
)
TOLERANCE = 2e-6  # relative, fp32

LOSSES = {
    "sigmoid, smoothed, with sft": Case({"simpo_beta": 2.5, "simpo_label_smoothing": 0.1, "pref_ftx": 0.3}),
    "hinge": Case({"simpo_loss_type": "hinge", "simpo_gamma_beta_ratio": 1.4}),
    "ipo": Case({"simpo_loss_type": "ipo", "pref_ftx": 1.0}, per_token=False),
    "confpo": Case({"simpo_loss_type": "confpo"}),
}


# --- in this process: what must come out ------------------------------------------------------------------------------


_NATIVE: dict[str, tuple[dict[str, float], dict[str, Tensor]]] = {}


def native(case: Case) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of the native path, once: packed rows, shared prompts, the log-prob head, one process.

    In fp64 (norms and rotations aside), so that only one side of a comparison has fp32's noise, which is 1e-6 here.
    """
    if repr(case) not in _NATIVE:
        _NATIVE[repr(case)] = compute_native(case)
    return _NATIVE[repr(case)]


def compute_native(case: Case) -> tuple[dict[str, float], dict[str, Tensor]]:
    model, pairs = build_model(case.model).double(), make_pairs(case.num_pairs)
    logps = compute_pair_logps(model, build_batch(pairs), extras=case.settings().recipe.extras)
    if case.dpo:
        reference = torch.tensor([REFERENCE_SUMS[pair.row_id] for pair in pairs]).unbind(1)
        logps = PairLogps(logps.chosen_sum, logps.rejected_sum, logps.chosen_length, logps.rejected_length, *reference)
    losses, sums = trained_losses(logps, case.settings().recipe, num_pairs=len(pairs), num_chosen_tokens=1)
    (losses.sum() / len(pairs)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    means = dict(zip(PAIR_METRICS, (sums / len(pairs)).tolist(), strict=True))
    means["lm loss"] = means.pop("loss")
    return means, gradients


def assert_same(results: Sequence[dict[str, Any]], case: Case) -> None:
    """One layout's results of a case, by rank, against the native path."""
    metrics, gradients = native(case)
    reported = [result["metrics"] for result in results if result["metrics"]]
    assert reported, "no rank reported metrics"
    for found in reported:
        assert set(found) == set(metrics)
        for name, value in metrics.items():
            assert found[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name
    assert_same_gradients(results[0]["gradients"], gradients)


def assert_same_gradients(found: dict[str, np.ndarray], wanted: dict[str, Tensor]) -> None:
    """Each within TOLERANCE of its own norm, or of 1% of the whole's where its own terms cancel (key biases)."""
    assert set(found) == set(wanted)
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        difference = (torch.from_numpy(found[name]) - gradient).norm() / max(gradient.norm(), 0.01 * whole)
        assert difference < TOLERANCE, f"{name}: relative difference {difference:.2e}"


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two ranks of this module alone: Megatron's global state stays out of the other tests' processes."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


def check(ranks: Ranks, cases: Sequence[Case], sizes: dict[str, int], num_microbatches: int) -> None:
    """Run the cases on one layout (in one go: starting it costs most) and compare each."""
    results = ranks.run(run_cases, cases, sizes, num_microbatches)
    for index, case in enumerate(cases):
        assert_same([rank[index] for rank in results], case)


CASES = {
    **{f"simpo {name}": case for name, case in LOSSES.items()},
    "micro-batches weighed by the batch": Case(per_token=False),
    "some micro-batches empty": Case(num_pairs=3),
    "some micro-batches empty, weighed by the batch": Case(num_pairs=3, per_token=False),
    "tied embeddings": Case(model="tied"),
    "biases": Case(model="qwen2"),
    "dpo": Case({"dpo_beta": 0.3, "dpo_label_smoothing": 0.05}, dpo=True),
    "r_dpo": Case({"dpo_loss_type": "r_dpo", "r_dpo_alpha": 0.02}, dpo=True),
}


# Virtual stages are harder than pp2.
@pytest.mark.parametrize("layout", [rarely(layout) if layout == "pp2" else layout for layout in LAYOUTS])
def test_a_step_equals_the_native_path(two: Ranks, layout: str) -> None:
    """Seven ragged pairs in four micro-batches of two (so one is not full); with dp2, two on each rank."""
    check(two, list(CASES.values()), LAYOUTS[layout], 2 if layout == "dp2" else 4)


@pytest.mark.four_processes
@pytest.mark.parametrize(
    ("sizes", "replicas"),
    [
        pytest.param({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1, id="tp2 x pp2"),
        pytest.param({"tensor_model_parallel_size": 2, "context_parallel_size": 2}, 1, id="tp2 x cp2"),
        pytest.param({"pipeline_model_parallel_size": 2, "context_parallel_size": 2}, 1, id="pp2 x cp2"),
        pytest.param({"pipeline_model_parallel_size": 2}, 2, id="pp2 x dp2"),
        pytest.param({"context_parallel_size": 2}, 2, id="cp2 x dp2"),
    ],
)
def test_a_step_on_four_ranks_equals_the_native_path(four: Ranks, sizes: dict[str, int], replicas: int) -> None:
    check(four, list(CASES.values()), sizes, 4 // replicas)


# --- what the native path itself must equal ---------------------------------------------------------------------------


def test_the_native_path_equals_the_formulas_on_padded_rows() -> None:
    """SimPO with smoothing and SFT term, written out: ordinary logits of every row, log-softmax, means, loss."""
    case = LOSSES["sigmoid, smoothed, with sft"]
    model, pairs = build_model(case.model).double(), make_pairs(NUM_PAIRS)
    model.config._attn_implementation = "eager"
    losses, chosen_means = [], []
    for pair in pairs:
        means = []
        for ids, start in ((pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)):
            logps = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            means.append(torch.stack([logps[at - 1, ids[at]] for at in range(start, len(ids))]).mean())
        z = 2.5 * (means[0] - means[1] - 0.5)
        sigmoid = torch.nn.functional.logsigmoid
        losses.append(-0.9 * sigmoid(z) - 0.1 * sigmoid(-z) - 0.3 * means[0])
        chosen_means.append(means[0])
    loss = torch.stack(losses).mean()
    loss.backward()
    metrics, gradients = native(case)
    # transformers computes norms and rotations in fp32 whatever the weights are
    assert metrics["lm loss"] == pytest.approx(loss.item(), rel=1e-7)
    assert metrics["sft_loss"] == pytest.approx(-torch.stack(chosen_means).mean().item(), rel=1e-7)
    assert_same_gradients({name: p.grad.numpy() for name, p in model.named_parameters()}, gradients)


# --- other ways through a schedule ------------------------------------------------------------------------------------


def evaluate_and_reference(case: Case, sizes: dict[str, int], num_microbatches: int) -> dict[str, Any]:
    """Metrics of a forward-only pass, and reference log-probs collected by one."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron_on_cpu import on_cpu

    from simpo.hosts.megatron import step as host

    with on_cpu(**sizes):
        settings = case.settings(**sizes, variable_seq_lengths=True)
        # The dispatcher is of experts, of which there are none; Megatron checks it all the same.
        others = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
        wrapped, _ = build_megatron(case, build_model(case.model).config, sizes, **others)

        def run(reference: dict[str, tuple[float, float]], **options: Any) -> list[Any]:
            batches = iterate_batches(
                make_pairs(case.num_pairs),
                settings,
                num_microbatches=num_microbatches,
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                data_parallel_size=parallel_state.get_data_parallel_world_size(),
                seed=1,
                reference=reference,
            )
            return get_forward_backward_func()(
                forward_step_func=functools.partial(host.dpo_forward_step, settings=settings),
                data_iterator=batches,
                model=wrapped,
                num_microbatches=num_microbatches,
                seq_length=1,  # not read: stages tell each other the shapes
                micro_batch_size=1,
                forward_only=True,
                **options,
            )

        gathered = host.gather_reference(run({}, collect_non_loss_data=True))
        run(gathered)  # a stage that is not the last has none, and needs none
        return {"metrics": host.reduce_metrics(run(REFERENCE_SUMS)), "reference": gathered}


@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_evaluation_and_reference_log_probs_with_variable_lengths(two: Ranks, layout: str) -> None:
    case = CASES["dpo"]
    sizes = LAYOUTS[layout]
    results = two.run(evaluate_and_reference, case, sizes, 2 if layout == "dp2" else 4)
    metrics, _ = native(case)
    pairs = make_pairs(case.num_pairs)
    with torch.no_grad():
        logps = compute_pair_logps(build_model(case.model), build_batch(pairs))
    wanted = torch.stack([logps.chosen_sum, logps.rejected_sum], dim=1)
    last = [result for result in results if result["metrics"]]
    assert len(last) == (2 if layout == "dp2" else 1)
    for result in last:
        for name, value in metrics.items():
            assert result["metrics"][name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name
        assert set(result["reference"]) == {pair.row_id for pair in pairs}
        found = torch.tensor([result["reference"][pair.row_id] for pair in pairs])
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=1e-5)


def poisoned_step(sizes: dict[str, int], victim: int) -> str:
    """What is raised, "" for nothing, when one rank's log-probs of one micro-batch are not a number."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron_on_cpu import on_cpu

    from simpo.hosts.megatron import step as host
    from simpo.trainer import NonFiniteError

    with on_cpu(**sizes):
        settings = SIMPO.settings(**sizes)
        wrapped, _ = build_megatron(SIMPO, build_model("llama").config, sizes, finalize_model_grads_func=None)

        def step(data_iterator: Any, model: Any) -> Any:
            output, loss = host.forward_step(data_iterator, model, settings=settings)
            if dist.get_rank() == victim:
                output = output.clone()
                output[1] = float("nan")  # the first pair's rejected response
            return output, loss

        batches = iterate_batches(
            make_pairs(4),
            settings,
            num_microbatches=2 // parallel_state.get_data_parallel_world_size(),
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            seed=1,
        )
        try:
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=batches,
                model=wrapped,
                num_microbatches=2 // parallel_state.get_data_parallel_world_size(),
                seq_length=SEQ_LENGTH,
                micro_batch_size=settings.actual_micro_batch_size,
                forward_only=False,
            )
        except NonFiniteError as error:
            return str(error)
        return ""


def test_nan_on_one_data_parallel_rank_names_the_rank_and_its_row(two: Ranks) -> None:
    """The other rank computes its own pairs; what it then waits for is for its launcher to end it."""
    fine, broken = two.run(poisoned_step, {}, 1)
    assert fine == ""
    assert broken.startswith("rank 1: the loss of 1 pair(s) is not finite, nothing was updated: row-")


def test_nan_on_one_context_parallel_rank_stops_both_and_names_its_source(two: Ranks) -> None:
    """Both ranks need each other's sums: neither is left waiting in a reduction."""
    messages = two.run(poisoned_step, {"context_parallel_size": 2}, 1)
    for rank, message in enumerate(messages):
        assert message.startswith(f"rank {rank} (log-probs computed on rank 1): the loss of 1 pair(s) is not finite")
    assert messages[0].split(": ")[-1] == messages[1].split(": ")[-1]


def refusals() -> dict[str, str]:
    """Messages of what a step refuses."""
    from megatron.core.utils import get_model_config
    from megatron_on_cpu import on_cpu

    from simpo.hosts.megatron import step as host

    pairs, found = make_pairs(2), {}
    settings = SIMPO.settings()
    dpo = Case(dpo=True).settings()

    def attempt(name: str, function: Any) -> None:
        try:
            function()
        except ValueError as error:
            found[name] = str(error)

    def lose(options: Any, batch: Any, **others: Any) -> None:
        wrapped, _ = build_megatron(
            Case(per_token=False), build_model("llama").config, {"tensor_model_parallel_size": 2}
        )
        vars(get_model_config(wrapped[0])).update(others)
        step = host.dpo_forward_step if options is dpo else host.forward_step
        output, loss = step(iter([batch]), wrapped[0], settings=options)
        loss(output)

    with on_cpu(tensor_model_parallel_size=2):
        attempt("dropout", lambda: lose(settings, collate(pairs, settings), hidden_dropout=0.1))
        attempt("ragged", lambda: lose(settings, collate(pairs[:1], settings)))
        attempt("no reference", lambda: lose(dpo, collate(pairs, dpo)))
        attempt("wrong twin", lambda: host.forward_step(iter([]), None, settings=dpo))
        attempt("wrong other twin", lambda: host.dpo_forward_step(iter([]), None, settings=settings))
        attempt("no data", lambda: host.get_batch(None))
        attempt("no settings", lambda: host.forward_step(iter([]), None))
    return found


def test_what_cannot_be_exact_is_refused(two: Ranks) -> None:
    found = two.run(refusals)[0]
    assert "hidden_dropout = 0.1: a policy's log-probs" in found["dropout"]
    assert "1 pairs, not micro_batch_size = 2" in found["ragged"]
    assert "calculate_per_token_loss" in found["ragged"]
    assert "no reference_sums" in found["no reference"]
    assert "use dpo_forward_step" in found["wrong twin"]
    assert "use forward_step" in found["wrong other twin"]
    assert "data_iterator is None" in found["no data"]
    assert "settings" in found["no settings"]


def settings_from_global_arguments(argument: str, value: float) -> tuple[str, float]:
    """Loss and beta that a twin finds where Megatron-LM's `get_args` gives them."""
    import types

    import megatron_on_cpu  # noqa: F401  silences what importing megatron warns of

    from simpo.hosts.megatron import step as host

    training = types.ModuleType("megatron.training")
    training.get_args = lambda: argparse.Namespace(micro_batch_size=2, seq_length=8, **{argument: value})
    sys.modules["megatron.training"] = training
    try:
        recipe = host._settings_of_megatron(argument.split("_")[0]).recipe
    finally:
        del sys.modules["megatron.training"]
        host._settings_of_megatron.cache_clear()
    return recipe.loss_type, recipe.beta


def test_without_settings_the_global_arguments_of_megatron_are_read(two: Ranks) -> None:
    assert two.run(settings_from_global_arguments, "simpo_beta", 2.5)[0] == ("sigmoid", 2.5)
    assert two.run(settings_from_global_arguments, "dpo_beta", 0.3)[0] == ("dpo", 0.3)
