"""A packed row spread over ranks: attention, sums and gradients of the whole row on one process.

The slices are checked in this process, for any number of them; what needs a group runs on all ranks of one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import rarely
from ranks import Place, Ranks
from torch import Tensor, nn

from simpo.core.attention import packed_attention, reference_attention
from simpo.core.batch import PackedPairs, build_batch, build_list_batch
from simpo.core.blocks import AttentionBlocks
from simpo.core.context import rows_to_heads, split_rows, sum_over
from simpo.core.logprobs import reference_token_logps, response_logps, token_logps
from simpo.core.packing import TokenPair
from simpo.model.load import checkpoint_activations

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}  # relative to the largest entry of each tensor
VOCABULARY = 61

LAYOUTS = [(True, True), (True, False), (False, True)]  # pack, share_prompt

# Padding at the start, between and at the end; responses that share a prefix; a prefix that ends inside a sequence.
# 39 tokens: no number of ranks here divides them.
BLOCKS = ((2, 2, 2, 9), (2, 5, 9, 13), (2, 5, 13, 14), (2, 5, 14, 20), (22, 22, 22, 30), (22, 29, 30, 35))
NUM_TOKENS = 39

# Query and key heads. Key heads fewer than ranks, more, dividing them or not, one for each query head, one for all.
HEADS = {
    2: [(6, 3), (2, 1), (4, 2), (4, 4), (6, 2), (6, 1), (18, 9), (2, 2)],
    4: [(12, 3), (4, 1), (8, 2), (4, 4), (12, 6), (20, 5), (8, 8), (24, 6)],
}


def make_pairs() -> list[TokenPair]:
    """Ragged pairs; the first has a prompt so long that a slice of a row holds nothing else."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()

    pairs = []
    for index, (prompt, common, chosen, rejected) in enumerate([(40, 0, 3, 2), (1, 0, 1, 4), (5, 3, 2, 6)]):
        start = tokens(prompt)
        both = start + tokens(common)
        pairs.append(TokenPair(f"row-{index}", both + tokens(chosen), prompt, both + tokens(rejected), prompt))
    return pairs


def make_batches() -> dict[str, PackedPairs]:
    """Pairs in every layout that has blocks; one pair by itself, whose first labels stand late; a list of three."""

    class Three:
        row_id, starts = "three", [3, 3, 4]
        sequences = ((7, 8, 9, 1, 2), (7, 8, 9, 4), (7, 8, 9, 1, 5, 0, 0))

    first, *others = make_pairs()
    gaps = [replace(first, chosen_gaps=[41, 42]), *others]
    batches = {f"pack={p} share={s}": build_batch(make_pairs(), pack=p, share_prompt=s) for p, s in LAYOUTS}
    batches["gaps"] = build_batch(gaps)
    return batches | {"one pair": build_batch(make_pairs()[:1]), "list": build_list_batch([Three()])}


# --- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [rarely(name) if name == "pack=False share=True" else name for name in make_batches()])
def test_slices_put_together_are_the_row_and_every_label_with_its_predictor(name):
    whole = make_batches()[name]
    ids, positions = whole.input_ids.flatten().tolist(), whole.position_ids.flatten().tolist()
    owners = torch.arange(len(whole.response_lengths)).repeat_interleave(whole.response_lengths)
    expected = sorted(zip(owners.tolist(), whole.source_rows.tolist(), whole.labels.tolist(), strict=True))
    for size in range(1, len(ids) + 3):
        slices = [split_rows(whole, Place(rank, size)) for rank in range(size)]
        length = slices[0].num_tokens
        assert (
            {part.input_ids.shape for part in slices} == {part.position_ids.shape for part in slices} == {(1, length)}
        )
        padding = [0] * (length * size - len(ids))
        assert torch.cat([part.input_ids for part in slices], 1)[0].tolist() == ids + padding
        assert torch.cat([part.position_ids for part in slices], 1)[0].tolist() == positions + padding
        found, read = [], []
        for rank, part in enumerate(slices):
            assert part.local_lengths.dtype == torch.int64
            here = torch.arange(len(part.local_lengths)).repeat_interleave(part.local_lengths)
            rows = (part.source_rows + rank * length).tolist()
            assert part.source_rows.numel() == 0 or 0 <= part.source_rows.min() <= part.source_rows.max() < length
            found += zip(here.tolist(), rows, part.labels.tolist(), strict=True)
            read += (part.read_rows + rank * length).tolist()
            assert part.blocks.ranges == whole.blocks.ranges
            assert torch.equal(part.response_lengths, whole.response_lengths)
        assert sorted(found) == expected
        assert read == whole.read_rows.tolist()
        assert torch.equal(sum(part.local_lengths for part in slices), whole.response_lengths)


def test_a_batch_moves_to_a_device_with_its_local_lengths():
    part = split_rows(build_batch(make_pairs()), Place(0, 2))
    assert part.to("meta").local_lengths.device.type == "meta"
    assert build_batch(make_pairs()).to("cpu").local_lengths is None


def test_what_cannot_be_split_is_refused():
    whole = build_batch(make_pairs())
    with pytest.raises(ValueError, match="set pack or share_prompt to true"):
        split_rows(build_batch(make_pairs(), pack=False, share_prompt=False), Place(0, 2))
    with pytest.raises(ValueError, match="already a slice"):
        split_rows(split_rows(whole, Place(0, 2)), Place(0, 2))


# --- attention -------------------------------------------------------------------------------------------------------


def random_tensors(heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """query, key, value (of another head size) and the output's gradient of the whole row, alike on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads[0], 8), (heads[1], 8), (heads[1], 6), (heads[0], 6)]
    return [
        torch.randn(1, count, NUM_TOKENS, size, generator=generator, dtype=torch.float64).to(dtype)
        for count, size in shapes
    ]


def own_slice(tensor: Tensor) -> Tensor:
    size = dist.get_world_size()
    padded = nn.functional.pad(tensor, (0, 0, 0, -NUM_TOKENS % size))
    return padded.chunk(size, dim=2)[dist.get_rank()].clone()


def attend_in_slices(tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Output and gradients of this rank's slice."""
    *inputs, grad = [own_slice(tensor) for tensor in tensors]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = packed_attention(*inputs, AttentionBlocks(BLOCKS, group=dist.group.WORLD), **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def attend_whole(tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    *inputs, grad = [tensor.double() for tensor in tensors]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = reference_attention(*inputs, AttentionBlocks(BLOCKS), **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of this rank's slices from the whole, relative to each tensor's largest entry."""
    assert [a.shape for a in actual] == [own_slice(e).shape for e in expected]
    return max(
        float((a - own_slice(e)).abs().max()) / float(e.abs().max()) for a, e in zip(actual, expected, strict=True)
    )


def compare_attention(dtype: torch.dtype) -> dict[str, float]:
    errors = {}
    for heads in HEADS[dist.get_world_size()]:
        tensors = random_tensors(heads, dtype)
        for options in (
            {},
            {"sliding_window": 4},
            {"softcap": 1.5, "scale": 0.7},
            {"softcap": 1.5, "sliding_window": 9},
        ):
            errors[f"{heads} {options}"] = worst(attend_in_slices(tensors, options), attend_whole(tensors, options))
    return errors


def compare_strided_attention() -> float:
    """Projections hand heads over as [1, t, H, D] transposed, and their gradients come back so."""
    tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in random_tensors((6, 3), torch.float64)]
    return worst(attend_in_slices(tensors, {}), attend_whole(tensors, {}))


def exchange_under_autocast() -> tuple[float, list[str]]:
    """Difference from exact attention, and the dtypes that crossed between ranks."""
    tensors, crossed = random_tensors((6, 3), torch.float32), []

    def record(received: Tensor, sent: Tensor, **options: Any) -> None:
        crossed.append(str(sent.dtype))
        original(received, sent, **options)

    original = dist.all_to_all_single
    with mock.patch.object(dist, "all_to_all_single", record), torch.autocast("cpu", dtype=torch.bfloat16):
        return worst([t.float() for t in attend_in_slices(tensors, {})], attend_whole(tensors, {})), crossed


def refusal_of_heads(heads: int) -> str:
    query = torch.zeros(1, heads, 4, 2)
    try:
        rows_to_heads(query, query, query, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "none"


def assert_all_within(per_rank: list[dict[str, float]], tolerance: float) -> None:
    for rank, errors in enumerate(per_rank):
        wrong = {case: error for case, error in errors.items() if not error <= tolerance}
        assert not wrong, (rank, wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_over_two_slices_equals_the_reference_in_values_and_gradients(two_ranks: Ranks, dtype):
    assert_all_within(two_ranks.run(compare_attention, dtype), TOLERANCE[dtype])


@pytest.mark.four_processes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_over_four_slices_equals_the_reference_in_values_and_gradients(four_ranks: Ranks, dtype):
    assert_all_within(four_ranks.run(compare_attention, dtype), TOLERANCE[dtype])


def test_heads_that_lie_transposed_in_memory_are_exchanged_alike(two_ranks: Ranks):
    assert max(two_ranks.run(compare_strided_attention)) < 1e-12


def test_under_autocast_half_the_bytes_cross_one_exchange_each_way(two_ranks: Ranks):
    for error, crossed in two_ranks.run(exchange_under_autocast):
        assert error < 2e-2
        assert crossed == ["torch.bfloat16"] * 4  # to heads and back to rows, forward and backward


def test_heads_that_do_not_divide_are_refused_with_both_numbers(two_ranks: Ranks):
    for message in two_ranks.run(refusal_of_heads, 9):
        assert message.startswith("cp: 2 does not divide the 9 query heads")


# --- sums and parameters' gradients ----------------------------------------------------------------------------------


class Decoder(nn.Module):
    """One attention layer between an embedding and a head; tokens know their positions."""

    def __init__(self, heads: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        generator = torch.Generator().manual_seed(1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.5 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))

        width, size = 8 * heads[0], 8
        self.embedding, self.positions = parameter(VOCABULARY, width), parameter(64, width)
        self.query, self.key = parameter(width, heads[0] * size), parameter(width, heads[1] * size)
        self.value, self.head = parameter(width, heads[1] * size), parameter(VOCABULARY, width)

    def forward(self, batch: PackedPairs, attention: Any, logps: Any) -> Tensor:
        """Token log-probs [N] of a batch of one row, or of a slice of it."""
        tokens, places = batch.input_ids.flatten(), batch.position_ids.flatten()
        x = self.embedding[tokens] + self.positions[places]
        heads = [
            (x @ weight).unflatten(1, (count, 8)).transpose(0, 1)[None]
            for weight, count in zip(
                (self.query, self.key, self.value), (self.heads[0], *self.heads[1:] * 2), strict=True
            )
        ]
        x = torch.tanh(x + attention(*heads, batch.blocks)[0].transpose(0, 1).flatten(1))
        return logps(x[batch.source_rows], self.head, batch.labels)


def weigh(sums: Tensor, batch: PackedPairs) -> Tensor:
    """A loss that is not linear in the sums, so that adding gradients up twice, or not at all, would show."""
    factors = torch.linspace(-1.0, 1.5, len(sums), dtype=sums.dtype)
    return (factors * (sums / batch.response_lengths).square()).sum()


def sums_and_gradients(model: nn.Module, sums: Tensor, batch: PackedPairs) -> list[Tensor]:
    weigh(sums, batch).backward()
    found = [sums.detach(), *(parameter.grad for parameter in model.parameters())]
    model.zero_grad(set_to_none=True)
    return found


def compare_training(dtype: torch.dtype, heads: tuple[int, int]) -> tuple[dict[str, float], dict[str, int]]:
    """Sums and summed gradients of every batch beside the whole row's, and how many labels are here.

    The whole row goes through the references, in the same dtype.
    """
    group = dist.group.WORLD
    model, errors, labels = Decoder(heads, dtype), {}, {}
    for name, batch in make_batches().items():
        logps = model(batch, reference_attention, reference_token_logps)
        expected = sums_and_gradients(model, response_logps(logps, batch.response_lengths), batch)
        part = split_rows(batch, group)
        here = response_logps(model(part, packed_attention, token_logps), part.local_lengths)
        actual = sums_and_gradients(model, sum_over(here, group), part)
        for gradient in actual[1:]:
            dist.all_reduce(gradient)
        errors[name] = max(
            float((a - e).abs().max()) / float(e.abs().max()) for a, e in zip(actual, expected, strict=True)
        )
        labels[name] = len(part.labels)
    return errors, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_response_sums_and_summed_gradients_equal_the_whole_row_s(two_ranks: Ranks, dtype):
    outcomes = two_ranks.run(compare_training, dtype, (6, 3))
    assert_all_within([errors for errors, _ in outcomes], TOLERANCE[dtype])
    (_, first), (_, second) = outcomes
    assert first["one pair"] == 0  # a rank that has no label
    assert min(first["pack=True share=False"], second["pack=True share=False"]) > 0


@pytest.mark.four_processes
@pytest.mark.parametrize("heads", [(12, 3), (4, 1)])
def test_response_sums_and_summed_gradients_over_four_ranks_equal_the_whole_row_s(four_ranks: Ranks, heads):
    outcomes = four_ranks.run(compare_training, torch.float64, heads)
    assert_all_within([errors for errors, _ in outcomes], 1e-12)


# --- a real decoder --------------------------------------------------------------------------------------------------


def build_model(architecture: str, **config: Any) -> nn.Module:
    import transformers

    from simpo.model.attention import PACKED
    from simpo.model.low_memory import install_low_memory_blocks

    settings = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, architecture + "Config")(**settings, **config), attn_implementation=PACKED
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    install_low_memory_blocks(model)
    return model


def compare_architecture(architecture: str, config: dict[str, Any]) -> dict[str, float]:
    """`model.head.compute_response_logps` of slices, with activation checkpointing and without, beside the whole."""
    from simpo.model.head import compute_response_logps

    group = dist.group.WORLD
    model, errors = build_model(architecture, **config).double(), {}
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
        for name in ("pack=True share=True", "pack=False share=True", "one pair"):
            batch = make_batches()[name]
            expected = sums_and_gradients(model, compute_response_logps(model, batch)[0], batch)
            part = split_rows(batch, group)
            sums, lengths = compute_response_logps(model, part)
            assert torch.equal(lengths, batch.response_lengths)
            actual = sums_and_gradients(model, sums, part)
            for gradient in actual[1:]:
                dist.all_reduce(gradient)
            errors[f"{name} checkpointing={checkpointing}"] = max(
                float((a - e).abs().max()) / float(e.abs().max()) for a, e in zip(actual, expected, strict=True)
            )
    return errors


def refusal_of_window(length: int) -> str:
    """What a Qwen2-MoE says of a window that its mask alone knows, when a slice is shorter than the window."""
    from simpo.model.head import compute_response_logps

    moe = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    model = build_model("Qwen2Moe", **moe, use_sliding_window=True, sliding_window=12, max_window_layers=1)
    batch = build_batch([TokenPair("row", [*range(10, 10 + length)], 9, [*range(10, 19), 50], 9)])
    part = split_rows(batch, dist.group.WORLD)
    assert part.num_tokens < 12
    try:
        compute_response_logps(model, part)
    except ValueError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("Llama", {}),
        (
            "Gemma2",
            {
                "query_pre_attn_scalar": 8,
                "sliding_window": 8,
                "attn_logit_softcapping": 1.0,
                "final_logit_softcapping": 2.0,
                "hidden_activation": "gelu_pytorch_tanh",
            },
        ),
    ],
)
def test_a_decoder_over_two_slices_gives_the_whole_row_s_sums_and_gradients(two_ranks: Ranks, architecture, config):
    """Gemma2's norms compute in fp32 whatever the weights are, so its bound is that of fp32."""
    tolerance = {"Llama": 1e-12, "Gemma2": 2e-6}[architecture]
    assert_all_within(two_ranks.run(compare_architecture, architecture, config), tolerance)


def test_a_window_shorter_than_the_row_is_not_lost_where_it_is_longer_than_the_slice(two_ranks: Ranks):
    assert two_ranks.run(refusal_of_window, 12) == ["none"] * 2
    for message in two_ranks.run(refusal_of_window, 15):
        assert "attends to 12 tokens at a time" in message
        assert "a sequence here has 15 tokens" in message


def extras_of_slices() -> dict[str, float]:
    """What `compute_pair_logps` says of responses besides, and gradients through it, of slices beside the whole row."""
    from dataclasses import replace

    from simpo.core.losses import LOSSES
    from simpo.core.reweight import calibrated, wpo_weights
    from simpo.model.head import compute_pair_logps

    model, errors = build_model("Llama").double(), {}
    prompt, scores = [*range(7)], torch.tensor([2.0, 1.0, 1.5, 0.0, 1.0, 0.0], dtype=torch.float64)
    more = {"more_ids": [[*prompt, 8, 9], [*prompt, 9, 9, 3, 4, 5]], "more_starts": [7, 7]}
    lists = [TokenPair("list", [*prompt, 1, 2], 7, [*prompt, 3], 7, **more), TokenPair("two", [4, 5], 1, [4, 6, 7], 1)]
    batches = {**make_batches(), "lists": build_batch(lists)}
    for name in ("pack=True share=True", "pack=False share=True", "one pair", "lists"):
        batch, results = batches[name], []
        for rows in (batch, split_rows(batch, dist.group.WORLD)):
            logps = replace(compute_pair_logps(model, rows, extras={"low", "squares"}), scores=scores)
            found = [*logps.chosen_extras.values(), *logps.rejected_extras.values(), wpo_weights(logps)]
            of_lists = [LOSSES[loss](logps).losses for loss in ("plackett_luce", "infonca", "swepo") if name == "lists"]
            of_pairs = (LOSSES["confpo"](logps).losses, calibrated(LOSSES["sigmoid"], logps).losses)
            for losses in (*of_lists, *of_pairs):
                gradients = torch.autograd.grad(losses.sum(), list(model.parameters()), retain_graph=True)
                for gradient in gradients if rows is not batch else ():
                    dist.all_reduce(gradient)
                found += [losses, *gradients]
            results.append(torch.cat([each.detach().flatten() for each in found]))
        errors[name] = float((results[1] - results[0]).abs().max() / results[0].abs().max())
    return errors


def test_masks_means_and_gradients_of_a_row_over_two_slices_are_the_whole_row_s(two_ranks: Ranks):
    assert_all_within(two_ranks.run(extras_of_slices), 1e-11)
