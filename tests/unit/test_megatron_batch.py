"""Arguments and batches of the Megatron host; needs no Megatron."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpo.core.packing import TokenPair
from simpo.hosts.megatron.batch import IGNORED, MegatronBatch, collate, iterate_batches
from simpo.hosts.megatron.settings import MegatronSettings, add_simpo_arguments

NAMES = ("row_id", "chosen_ids", "chosen_start", "rejected_ids", "rejected_start")


def settings_of(**arguments: Any) -> MegatronSettings:
    return MegatronSettings.from_arguments({"micro_batch_size": 2, "seq_length": 16, **arguments})


def pairs_of(count: int) -> list[TokenPair]:
    return [TokenPair(f"row-{i}", [9, 8, 10 + i, 0], 2, [9, 8, 20 + i], 2) for i in range(count)]


def test_pairs_of_ones_own_need_no_gaps() -> None:
    own = [SimpleNamespace(**{n: getattr(pair, n) for n in NAMES}) for pair in pairs_of(2)]
    assert torch.equal(collate(own, settings_of()).labels, collate(pairs_of(2), settings_of()).labels)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_settings_of_a_command_line_are_those_of_the_recipe() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--seq-length", type=int)
    assert add_simpo_arguments(parser) is parser
    words = "--micro-batch-size 4 --seq-length 32 --simpo-beta 2.5 --simpo-gamma-beta-ratio 1.4 --pref-ftx 0.1"
    settings = MegatronSettings.from_arguments(parser.parse_args([*words.split(), "--simpo-label-smoothing=0.2"]))
    recipe = settings.recipe
    assert (recipe.loss_type, recipe.beta, recipe.gamma_beta_ratio) == ("sigmoid", 2.5, 1.4)
    assert (recipe.label_smoothing, recipe.sft_weight, recipe.sft_reduction) == (0.2, 0.1, "pairs")
    assert (settings.micro_batch_size, settings.actual_micro_batch_size) == (4, 8)
    assert not settings.needs_reference


def test_without_arguments_the_recipes_defaults_hold() -> None:
    recipe = settings_of(simpo_beta=None).recipe
    assert (recipe.loss_type, recipe.beta, recipe.gamma_beta_ratio, recipe.sft_weight) == ("sigmoid", 2.0, 0.5, 0.0)


def test_a_forks_name_of_the_ratio_is_read_but_not_beside_ours() -> None:
    assert settings_of(gamma_beta_ratio=1.4).recipe.gamma_beta_ratio == 1.4
    with pytest.raises(ValueError, match="gamma_beta_ratio"):
        settings_of(gamma_beta_ratio=1.4, simpo_gamma_beta_ratio=0.5)


@pytest.mark.parametrize(
    ("dpo_loss_type", "loss_type", "beta"), [(None, "dpo", 0.1), ("sigmoid", "dpo", 0.1), ("dpo_norm", "dpo_norm", 2.0)]
)
def test_the_twin_reads_its_own_arguments(dpo_loss_type: str | None, loss_type: str, beta: float) -> None:
    arguments = {"micro_batch_size": 1, "seq_length": 8, "simpo_beta": 7.0, "dpo_loss_type": dpo_loss_type}
    settings = MegatronSettings.from_arguments(arguments, method="dpo")
    assert (settings.recipe.loss_type, settings.recipe.beta, settings.needs_reference) == (loss_type, beta, True)


def test_a_loss_by_import_path_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "losses_for_megatron.py").write_text("def f(logps):\n    return -logps.chosen_mean\n")
    with pytest.raises(ValueError, match="simpo_loss_type = 'losses_for_megatron:f': a loss of your own is for simpo"):
        settings_of(simpo_loss_type="losses_for_megatron:f")


@pytest.mark.parametrize(
    ("arguments", "multiple"),
    [
        ({"tensor_model_parallel_size": 4}, 1),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 4),
        ({"context_parallel_size": 2}, 4),
        ({"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}, 4),
        ({"context_parallel_size": 2, "tensor_model_parallel_size": 8, "sequence_parallel": True}, 16),
    ],
)
def test_rows_are_multiples_of_what_cuts_them(arguments: dict[str, Any], multiple: int) -> None:
    settings = settings_of(**arguments)
    assert settings.row_multiple == multiple
    assert collate(pairs_of(2), settings).tokens.shape == (4, -(-4 // multiple) * multiple)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"simpo_beta": -1.0}, "simpo_beta"),
        ({"simpo_loss_type": "hinge", "simpo_label_smoothing": 0.1}, "label_smoothing"),
        ({"simpo_loss_type": "dpo"}, "needs a reference model; use dpo_forward_step"),
        ({"simpo_loss_type": "nonsense"}, "nonsense"),
        ({"pref_ftx": -0.1}, "pref_ftx"),
        ({"sft_reduction": "tokens"}, "sft_reduction: only pairs"),
        ({"wpo_weights": True}, "wpo_weights: not in Megatron; simpo train and the Hugging Face host have it"),
        ({"micro_batch_size": 0}, "micro_batch_size = 0"),
        ({"seq_length": None}, "seq_length = None"),
        ({"seq_length": 18, "context_parallel_size": 2}, "seq_length = 18: must be a multiple of 4"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dpo_beta": 0.0}, r"beta = 0.0.*of the dpo_\* arguments"), ({"dpo_loss_type": "hinge"}, "dpo_loss_type = 'hin")],
)
def test_wrong_arguments_of_the_twin_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MegatronSettings.from_arguments({"micro_batch_size": 1, "seq_length": 8, **arguments}, method="dpo")


# --- batches ----------------------------------------------------------------------------------------------------------


def test_chosen_and_rejected_stand_side_by_side_and_labels_are_shifted_once() -> None:
    batch = collate(pairs_of(2), settings_of())
    assert batch.tokens.tolist() == [[9, 8, 10, 0], [9, 8, 20, 0], [9, 8, 11, 0], [9, 8, 21, 0]]
    assert batch.labels.tolist() == [
        [IGNORED, 10, 0, IGNORED],  # token 0 is a label like any other
        [IGNORED, 20, IGNORED, IGNORED],
        [IGNORED, 11, 0, IGNORED],
        [IGNORED, 21, IGNORED, IGNORED],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 4
    assert batch.row_ids == ("row-0", "row-1")
    assert batch.mean_pairs is None


def test_gaps_have_no_labels() -> None:
    pair = TokenPair("a", [5, 1, 2, 3, 4], 2, [5, 1, 6], 2, chosen_gaps=[3, 4])
    labels = collate([pair], settings_of()).labels
    assert labels is not None
    assert labels[0, :5].tolist() == [IGNORED, 2, IGNORED, 4, IGNORED]
    assert labels[1, :3].tolist() == [IGNORED, 6, IGNORED]


def test_pipeline_stages_get_rows_of_one_shape() -> None:
    settings = settings_of(pipeline_model_parallel_size=2)
    for count in (0, 1, 2):
        batch = collate(pairs_of(count), settings)
        assert batch.tokens.shape == batch.labels.shape == batch.position_ids.shape == (4, 16)
        assert len(batch.row_ids) == count
        assert (batch.labels[2 * count :] == IGNORED).all()
    variable = settings_of(pipeline_model_parallel_size=2, variable_seq_lengths=True)
    assert collate(pairs_of(1), variable).tokens.shape == (2, 4)


def test_no_pair_is_no_trained_label() -> None:
    batch = collate([], settings_of())
    assert batch.row_ids == ()
    assert (batch.labels == IGNORED).all()


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (TokenPair("short", [1, 2], 2, [1, 2], 1), "pair short: the chosen response starts at token 2 of 2"),
        (TokenPair("early", [1, 2], 1, [1, 2], 0), "pair early: the rejected response starts at token 0 of 2"),
        (TokenPair("long", [1] * 17, 1, [1, 2], 1), "pair long: the chosen sequence has 17 tokens; seq_length is 16"),
    ],
)
def test_pairs_that_cannot_be_trained_are_named(pair: TokenPair, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate([pair], settings_of())


def test_too_many_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="3 pairs in a micro-batch of 2"):
        collate(pairs_of(3), settings_of())


def test_reference_sums_stand_in_the_pairs_order_and_missing_ones_are_named() -> None:
    reference = {"row-1": (-3.0, -4.0), "row-0": (-1.0, -2.0)}
    batch = collate(pairs_of(2), settings_of(), reference=reference)
    assert batch.reference_sums.tolist() == [[-1.0, -2.0], [-3.0, -4.0]]
    assert collate([], settings_of(), reference=reference).reference_sums.shape == (0, 2)
    with pytest.raises(ValueError, match=r"row-1 have no reference log-probs"):
        collate(pairs_of(2), settings_of(), reference={"row-0": (-1.0, -2.0)})


def epoch_of(count: int, *, ranks: int, micro_batches: int, start_step: int = 0) -> list[list[list[MegatronBatch]]]:
    """[step][rank] -> micro-batches, of two epochs."""
    steps = 2 * -(-count // (2 * ranks * micro_batches)) - start_step
    iterators = [
        iterate_batches(
            pairs_of(count),
            settings_of(),
            num_microbatches=micro_batches,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            seed=3,
            start_step=start_step,
        )
        for rank in range(ranks)
    ]
    return [[list(itertools.islice(batches, micro_batches)) for batches in iterators] for _ in range(steps)]


@pytest.mark.parametrize(("count", "ranks", "micro_batches"), [(21, 2, 3), (13, 1, 4), (5, 2, 2), (1, 2, 2)])
def test_every_epoch_has_every_pair_once_over_all_ranks(count: int, ranks: int, micro_batches: int) -> None:
    steps = epoch_of(count, ranks=ranks, micro_batches=micro_batches)
    half = len(steps) // 2
    orders = []
    for epoch in (steps[:half], steps[half:]):
        seen = [row for step in epoch for rank in step for batch in rank for row in batch.row_ids]
        assert sorted(seen) == sorted(pair.row_id for pair in pairs_of(count))
        orders.append(seen)
    if count > 5:
        assert orders[0] != orders[1]
    for step in steps:
        sizes = [len(batch.row_ids) for rank in step for batch in rank]
        assert max(sizes) - min(sizes) <= 1
        means = {batch.mean_pairs for rank in step for batch in rank}
        assert means == {sum(sizes) / len(sizes)}


def test_a_resumed_run_goes_on_where_it_was() -> None:
    whole = epoch_of(21, ranks=2, micro_batches=3)
    resumed = epoch_of(21, ranks=2, micro_batches=3, start_step=2)
    assert len(resumed) == len(whole) - 2
    for step, wanted in zip(resumed, whole[2:], strict=True):
        for rank, wanted_rank in zip(step, wanted, strict=True):
            for batch, wanted_batch in zip(rank, wanted_rank, strict=True):
                assert batch.row_ids == wanted_batch.row_ids
                assert torch.equal(batch.tokens, wanted_batch.tokens)


def test_no_pairs_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="no pairs to train on"):
        next(iterate_batches([], settings_of(), num_microbatches=1, data_parallel_rank=0, data_parallel_size=1, seed=0))
