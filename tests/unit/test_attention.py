"""core.attention: the portable and the CUDA path against `reference_attention`, and the mask against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention as flex_function

from simpo.core import attention, matmul_attention
from simpo.core import flex_attention as flex
from simpo.core.attention import ATTENTION_PATHS, attention_path, packed_attention, reference_attention, why_not
from simpo.core.blocks import AttentionBlocks, ScoreOptions, dense_mask

reproducible = settings(deadline=None, derandomize=True, max_examples=40)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6}  # relative to the largest value of the tensor


def by_keywords(path):
    """An attention path under `packed_attention`'s keywords."""

    def attend(query, key, value, blocks, *, scale=None, sliding_window=None, softcap=None):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return path(query, key, value, blocks, ScoreOptions(scale, sliding_window, softcap))

    return attend


block_by_block, flex_attention = by_keywords(attention.block_attention), by_keywords(flex.flex_attention)

# Padding at the start, between and at the end; three responses that share one prefix; a one-token block; a block whose
# prefix is only the start of the sequence before it.
BLOCKS = AttentionBlocks(
    ((2, 2, 2, 9), (2, 5, 9, 13), (2, 5, 13, 14), (2, 5, 14, 20), (22, 22, 22, 30), (22, 29, 30, 35), (35, 35, 35, 36))
)
NUM_TOKENS = 39
PADDING = [0, 1, 20, 21, 36, 37, 38]


def random_qkv(
    num_tokens: int, *, dtype: torch.dtype, heads: tuple[int, int] = (9, 3), size: int = 8, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, count, num_tokens, size) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def output_and_gradients(function, tensors: list[Tensor], *args, **options) -> list[Tensor]:
    out = function(*tensors, *args, **options)
    generator = torch.Generator().manual_seed(99)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, tensors, direction)]


def assert_close(actual: list[Tensor], expected: list[Tensor], *, tolerance: float) -> None:
    for name, a, e in zip(("output", "d query", "d key", "d value"), actual, expected, strict=True):
        limit = tolerance * max(1.0, float(e.abs().max()))
        assert float((a - e).abs().max()) <= limit, name


@st.composite
def block_layouts(draw) -> tuple[AttentionBlocks, int]:
    """Random groups of responses that share a prefix, with random padding around them."""
    ranges, at = [], 0
    for _ in range(draw(st.integers(1, 3))):
        at += draw(st.integers(0, 2))
        group = at
        at += draw(st.integers(1, 8))
        ranges.append((group, group, group, at))
        first_end = at
        for _ in range(draw(st.integers(0, 3))):
            at += draw(st.integers(0, 1))
            length = draw(st.integers(1, 6))
            ranges.append((group, group + draw(st.integers(0, first_end - group)), at, at + length))
            at += length
    return AttentionBlocks(tuple(ranges)), at + draw(st.integers(0, 3))


windows = st.one_of(st.none(), st.integers(1, 9))


@reproducible
@given(block_layouts(), windows)
def test_dense_mask_equals_the_rule_applied_to_each_sequence_of_tokens(layout, window):
    blocks, num_tokens = layout
    expected = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for prefix_start, prefix_end, start, end in blocks.ranges:
        sequence = list(range(prefix_start, prefix_end)) + list(range(start, end))  # this response as one document
        for (i, row), (j, column) in itertools.product(enumerate(sequence), repeat=2):
            if row >= start and j <= i and (window is None or i - j < window):
                expected[row, column] = True
    assert torch.equal(dense_mask(blocks, num_tokens, sliding_window=window), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("heads", [(9, 3), (2, 2)])
@pytest.mark.parametrize("path", [packed_attention, block_by_block])
def test_packed_attention_equals_the_reference_in_values_and_gradients(dtype, softcap, window, heads, path):
    tensors = random_qkv(NUM_TOKENS, dtype=dtype, heads=heads)
    options = {"sliding_window": window, "softcap": softcap}
    packed = output_and_gradients(path, tensors, BLOCKS, **options)
    reference = output_and_gradients(reference_attention, tensors, BLOCKS, **options)
    assert_close(packed, reference, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_scale_is_used_in_both_paths(softcap):
    tensors = random_qkv(NUM_TOKENS, dtype=torch.float64)
    packed = output_and_gradients(packed_attention, tensors, BLOCKS, scale=0.7, softcap=softcap)
    reference = output_and_gradients(reference_attention, tensors, BLOCKS, scale=0.7, softcap=softcap)
    assert_close(packed, reference, tolerance=1e-10)
    assert not torch.allclose(packed[0], packed_attention(*tensors, BLOCKS, softcap=softcap))


@reproducible
@given(block_layouts(), windows, st.sampled_from([None, 1.0]), st.integers(0, 1000))
def test_packed_attention_equals_the_reference_on_random_layouts(layout, window, softcap, seed):
    blocks, num_tokens = layout
    tensors = random_qkv(num_tokens, dtype=torch.float64, heads=(2, 1), size=4, seed=seed)
    options = {"sliding_window": window, "softcap": softcap}
    packed = output_and_gradients(packed_attention, tensors, blocks, **options)
    assert_close(packed, output_and_gradients(reference_attention, tensors, blocks, **options), tolerance=1e-10)


# Blocks longer than a tile, a prefix longer than one, and one that ends inside a tile.
LONG = AttentionBlocks(((0, 0, 0, 150), (0, 133, 150, 217), (0, 40, 217, 218), (220, 220, 220, 485)))


@pytest.mark.parametrize("tile_bytes", [1, 4 * 2**20])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 60, 140])
def test_tiles_leave_no_trace(monkeypatch, tile_bytes, softcap, window):
    monkeypatch.setattr(matmul_attention, "TILE_BYTES", tile_bytes)
    tensors = random_qkv(490, dtype=torch.float64, heads=(4, 2), size=4)
    options = {"sliding_window": window, "softcap": softcap}
    packed = output_and_gradients(packed_attention, tensors, LONG, **options)
    assert_close(packed, output_and_gradients(reference_attention, tensors, LONG, **options), tolerance=1e-10)


@pytest.mark.parametrize("window", [None, 40])
def test_keys_that_a_window_hides_in_whole_tiles_leave_no_trace(window):
    """torch's flash kernel takes 512 keys at a time: here some queries see none of the first 512."""
    blocks = AttentionBlocks(((0, 0, 0, 900), (0, 700, 900, 1000)))
    tensors = random_qkv(1000, dtype=torch.float64, heads=(2, 1), size=4)
    packed = output_and_gradients(packed_attention, tensors, blocks, sliding_window=window)
    reference = output_and_gradients(reference_attention, tensors, blocks, sliding_window=window)
    assert_close(packed, reference, tolerance=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_attention_is_no_further_from_the_truth_than_torch_s_own(autocast):
    """Scores and their gradients are fp32 in both; operands and results are bf16, one rounding in 256 each."""
    exact = [t.detach().to(torch.bfloat16).double().requires_grad_() for t in random_qkv(490, dtype=torch.float32)]
    half = [t.detach().to(torch.float32 if autocast else torch.bfloat16).requires_grad_() for t in exact]
    truth = output_and_gradients(reference_attention, exact, LONG)

    def errors(path) -> list[float]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            results = output_and_gradients(path, half, LONG)
        return [float((r.double() - t).norm() / t.norm()) for r, t in zip(results, truth, strict=True)]

    for name, ours, theirs in zip(
        ("output", "d query", "d key", "d value"), errors(packed_attention), errors(block_by_block)
    ):
        assert ours < min(4e-3, 1.3 * theirs), name


def test_fp32_products_are_fp32_again_after_bf16_attention():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    half = [t.detach().to(torch.bfloat16).requires_grad_() for t in random_qkv(490, dtype=torch.float32)]
    output_and_gradients(packed_attention, half, LONG)
    assert settings.fp32_precision == before


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_packed_attention_equals_each_sequence_attended_alone(softcap):
    """Independent of the reference's mask: every response written out as its own document."""
    tensors = random_qkv(NUM_TOKENS, dtype=torch.float64)
    packed = packed_attention(*tensors, BLOCKS, softcap=softcap)
    query, key, value = (t[0].repeat_interleave(9 // t.shape[1], 0) for t in tensors)
    for prefix_start, prefix_end, start, end in BLOCKS.ranges:
        rows = [*range(prefix_start, prefix_end), *range(start, end)]
        scores = query[:, rows] @ key[:, rows].transpose(1, 2) / 8**0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores += torch.full((len(rows), len(rows)), float("-inf"), dtype=torch.float64).triu(1)
        alone = scores.softmax(-1) @ value[:, rows]
        assert torch.allclose(packed[0, :, start:end], alone[:, prefix_end - prefix_start :], rtol=0, atol=1e-12)


def test_padding_rows_are_zero_and_take_no_gradient():
    for softcap in (None, 1.5):
        tensors = random_qkv(NUM_TOKENS, dtype=torch.float64)
        for result in output_and_gradients(packed_attention, tensors, BLOCKS, softcap=softcap):
            assert torch.equal(result[:, :, PADDING], torch.zeros_like(result[:, :, PADDING]))


def test_nothing_leaks_between_pairs_nor_between_responses_of_a_pair():
    """The gradient of one block's output with respect to what it must not see is exactly 0."""
    for prefix_start, prefix_end, start, end in BLOCKS.ranges:
        tensors = random_qkv(NUM_TOKENS, dtype=torch.float64)
        out = packed_attention(*tensors, BLOCKS)[:, :, start:end]
        hidden = sorted(set(range(NUM_TOKENS)) - set(range(prefix_start, prefix_end)) - set(range(start, end)))
        seen = sorted(set(range(NUM_TOKENS)) - set(hidden))
        d_key, d_value = torch.autograd.grad(out.square().sum(), tensors[1:])
        assert torch.count_nonzero(d_key[:, :, hidden]) == torch.count_nonzero(d_value[:, :, hidden]) == 0
        assert (d_value[:, :, seen].abs().sum(dim=(0, 1, 3)) > 0).all()


def test_dropout_reaches_every_block():
    query, key, value = random_qkv(NUM_TOKENS, dtype=torch.float64)
    for softcap in (None, 1.5):
        torch.manual_seed(0)
        out = packed_attention(query, key, torch.ones_like(value), BLOCKS, softcap=softcap, dropout=0.5)
        sums = out[0, 0, :, 0]  # with all values 1, kept weights scaled by 2 no longer sum to 1
        assert all((sums[start:end] - 1).abs().max() > 1e-3 for _, _, start, end in BLOCKS.ranges)


@pytest.mark.parametrize(
    "ranges",
    [
        ((0, 0, 0, 4), (0, 2, 3, 6)),  # overlap
        ((0, 0, 0, 0),),  # empty
        ((0, 0, 4, 6), (0, 0, 0, 4)),  # not ascending
        ((0, 5, 4, 6),),  # prefix reaches into the block
        ((3, 2, 4, 6),),
        ((-1, 0, 0, 2),),
    ],
)
def test_blocks_that_make_no_sense_are_refused(ranges):
    with pytest.raises(ValueError, match="overlaps or is empty"):
        AttentionBlocks(ranges)


# --- the CUDA paths --------------------------------------------------------------------------------------------------


def slow_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """What torch's varlen_attn computes, one sequence at a time: causal at the bottom right, left window included."""
    left, right = window_size
    assert right == 0
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert query.shape[2] % 8 == 0
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (query.shape[0], key.shape[0])
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outputs = []
    for q0, q1, k0, k1 in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        q, k, v = query[q0:q1], key[k0:k1], value[k0:k1]
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        i, j = torch.arange(len(q))[:, None] + len(k) - len(q), torch.arange(len(k))[None, :]
        hidden = (j > i) | ((j < i - left) if left >= 0 else torch.zeros_like(j > i))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v))
    return torch.cat(outputs)


def slow_varlen_gqa(query, key, value, *args, enable_gqa=False, **options):
    """torch 2.13's, which insists on being told that heads share keys."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return slow_varlen(query, key, value, *args, **options)


@pytest.fixture(params=[slow_varlen, slow_varlen_gqa], ids=["without enable_gqa", "with enable_gqa"])
def fake_varlen(request, monkeypatch):
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", request.param)


varlen_path = by_keywords(attention.varlen_attention)


@pytest.mark.usefixtures("fake_varlen")
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("heads", [(9, 3), (2, 2)])
def test_varlen_layout_equals_the_reference(window, heads):
    tensors = random_qkv(NUM_TOKENS, dtype=torch.float64, heads=heads)
    options = {"sliding_window": window, "scale": 0.5}
    varlen = output_and_gradients(varlen_path, tensors, BLOCKS, **options)
    assert_close(varlen, output_and_gradients(reference_attention, tensors, BLOCKS, **options), tolerance=1e-10)


@pytest.mark.usefixtures("fake_varlen")
@pytest.mark.parametrize("ranges", [((0, 0, 0, 5), (0, 3, 5, 9)), ((0, 0, 0, 4), (4, 4, 4, 9))], ids=["shared", "own"])
@pytest.mark.parametrize("padding", [0, 2])
def test_varlen_layout_with_and_without_prefixes_and_padding_equals_the_reference(ranges, padding):
    blocks = AttentionBlocks(ranges)
    tensors = random_qkv(9 + padding, dtype=torch.float64)
    varlen = output_and_gradients(varlen_path, tensors, blocks)
    assert_close(varlen, output_and_gradients(reference_attention, tensors, blocks), tolerance=1e-10)


@reproducible
@given(block_layouts(), windows, st.integers(0, 1000))
def test_varlen_layout_equals_the_reference_on_random_layouts(layout, window, seed):
    blocks, num_tokens = layout
    tensors = random_qkv(num_tokens, dtype=torch.float64, heads=(2, 1), size=8, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", slow_varlen_gqa)
        varlen = output_and_gradients(varlen_path, tensors, blocks, sliding_window=window)
    assert_close(
        varlen, output_and_gradients(reference_attention, tensors, blocks, sliding_window=window), tolerance=1e-10
    )


@pytest.mark.usefixtures("fake_varlen")
@pytest.mark.parametrize(("size", "value_size"), [(10, 10), (24, 16), (8, 20)])
def test_heads_that_no_kernel_takes_are_padded_without_a_trace(size, value_size):
    query, key, _ = random_qkv(NUM_TOKENS, dtype=torch.float64, size=size)
    value = random_qkv(NUM_TOKENS, dtype=torch.float64, size=value_size, seed=1)[2]
    for scale in (None, 0.3):
        varlen = output_and_gradients(varlen_path, [query, key, value], BLOCKS, scale=scale)
        reference = output_and_gradients(reference_attention, [query, key, value], BLOCKS, scale=scale)
        assert_close(varlen, reference, tolerance=1e-10)


@pytest.mark.usefixtures("fake_varlen")
def test_queries_and_unshared_keys_are_not_copied(monkeypatch):
    seen = []

    def varlen_attn(query, key, value, *args, **options):
        seen.append([t.data_ptr() for t in (query, key, value)])
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    tensors = random_qkv(9, dtype=torch.float64, heads=(2, 2))
    pointers = [t.data_ptr() for t in tensors]
    varlen_path(*tensors, AttentionBlocks(((0, 0, 0, 4), (4, 4, 4, 9))))
    varlen_path(*tensors, AttentionBlocks(((0, 0, 0, 5), (0, 3, 5, 9))))
    assert seen[0] == pointers
    assert seen[1][0] == pointers[0]
    assert seen[1][1:] != pointers[1:]


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """FlexAttention written out in torch's own operations, which have a backward pass on a CPU too."""
    module = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("heads", [(9, 3), (2, 2)])
def test_flex_attention_equals_the_reference_in_values_and_gradients(softcap, window, heads):
    tensors = random_qkv(NUM_TOKENS, dtype=torch.float64, heads=heads)
    options = {"sliding_window": window, "softcap": softcap, "scale": 0.7}
    flex = output_and_gradients(flex_attention, tensors, BLOCKS, **options)
    assert_close(flex, output_and_gradients(reference_attention, tensors, BLOCKS, **options), tolerance=1e-10)


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("window", [None, 60, 140])
def test_flex_attention_over_several_tiles_equals_the_reference(window):
    tensors = random_qkv(490, dtype=torch.float64, heads=(4, 2), size=4)
    options = {"sliding_window": window, "softcap": 1.5, "scale": None}
    flex = output_and_gradients(flex_attention, tensors, LONG, **options)
    assert_close(flex, output_and_gradients(reference_attention, tensors, LONG, **options), tolerance=1e-10)


@reproducible
@given(block_layouts(), windows)
def test_tiles_of_flex_attention_hold_what_the_dense_mask_holds(layout, window):
    """A tile is listed if some row of it sees some column, and listed as full if every row sees every column."""
    blocks, num_tokens = layout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "TILE", 4)
        mask = flex._block_mask(blocks, num_tokens, torch.device("cpu"), window)
    dense = dense_mask(blocks, num_tokens, sliding_window=window)
    at = torch.arange(num_tokens)
    assert torch.equal(mask.mask_mod(None, None, at[:, None], at[None, :]), dense)
    pad = -num_tokens % 4
    squares = torch.nn.functional.pad(dense, (0, pad, 0, pad)).unfold(0, 4, 4).unfold(1, 4, 4).flatten(2)
    some, every = squares.any(-1), squares.all(-1)

    def listed(numbers, columns):
        found = torch.zeros_like(some)
        for row, (number, order) in enumerate(zip(numbers[0, 0].tolist(), columns[0, 0], strict=True)):
            found[row, order[:number].long()] = True
        return found

    partial, full = (
        listed(mask.kv_num_blocks, mask.kv_indices),
        listed(mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    assert torch.equal(partial | full, some)
    assert not (partial & full).any()
    assert (full <= every).all()
    assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), partial.T)
    assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), full.T)


def test_most_inner_tiles_of_flex_attention_skip_the_mask():
    mask = flex._block_mask(AttentionBlocks(((0, 0, 0, 1280),)), 1280, torch.device("cpu"), None)
    assert mask.kv_num_blocks.sum() == 10  # the diagonal
    assert mask.full_kv_num_blocks.sum() == 45


def test_one_compiled_flex_attention_serves_rows_of_every_length(monkeypatch):
    """Compiled with dynamo alone: a graph for the first row, and no other for rows of other lengths and blocks."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_function, fullgraph=True, dynamic=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda cuda: flex.for_all_lengths(compiled))
    for length, prefix in ((490, 100), (700, 0), (900, 60)):
        blocks = AttentionBlocks(((0, 0, 0, 200), (0, prefix, 200, length - 5)))
        tensors = [t.detach() for t in random_qkv(length, dtype=torch.float32)]
        for window in (None, 64):
            options = {"sliding_window": window, "softcap": 1.5, "scale": 0.3}
            out = flex_attention(*tensors, blocks, **options)
            assert torch.allclose(out, reference_attention(*tensors, blocks, **options), atol=1e-5)
    assert counter.frame_count == 1


@pytest.fixture
def card(monkeypatch):
    """card(capability, compiler=True): tensors say that they are on such a CUDA device."""

    def pretend(capability, *, compiler=True):
        monkeypatch.setattr(attention, "_capability", lambda device: capability)
        monkeypatch.setattr(attention, "has_compiler", lambda: compiler)

    return pretend


class OnCuda:
    """As much of a tensor as the choice of a path looks at."""

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        self.dtype, self.shape, self.device, self.is_cuda = dtype, (1, 1, 1, size), torch.device("cuda:0"), True


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype", "sizes", "softcap", "path"),
    [
        ((9, 0), BF16, (128, 128), None, "varlen"),
        ((8, 0), FP16, (64, 64), None, "varlen"),
        ((8, 6), BF16, (100, 100), None, "varlen"),  # padded to 104
        ((9, 0), BF16, (192, 128), None, "varlen"),  # values padded to 192
        ((9, 0), BF16, (512, 512), None, "blocks"),
        ((9, 0), FP32, (128, 128), None, "blocks"),
        ((9, 0), BF16, (256, 256), 50.0, "flex"),
        ((9, 0), FP32, (256, 256), 50.0, "matmul"),
        ((7, 5), FP16, (128, 128), None, "blocks"),  # T4: torch's memory-efficient attention
        ((7, 5), BF16, (128, 128), None, "matmul"),  # for which it takes no bf16
        ((7, 0), BF16, (256, 256), 50.0, "matmul"),
    ],
)
def test_the_path_suits_the_card_the_heads_and_the_dtype(card, capability, dtype, sizes, softcap, path):
    card(capability)
    query, value = (OnCuda(dtype, size) for size in sizes)
    assert attention_path(query, value, softcap=softcap, dropout=0.0) == path
    assert attention_path(query, value, softcap=softcap, dropout=0.1) == "blocks"
    for name in ATTENTION_PATHS:
        possible = why_not(name, query, value, softcap=softcap, dropout=0.0) is None
        chosen = attention_path(query, value, softcap=softcap, dropout=0.0, prefer=name)
        assert chosen == (name if possible else path)


def test_soft_caps_without_triton_are_computed_in_tiles(card):
    card((9, 0), compiler=False)
    rows = OnCuda(BF16, 256)
    assert attention_path(rows, rows, softcap=50.0, dropout=0.0) == "matmul"
    assert why_not("flex", rows, rows, softcap=50.0, dropout=0.0) == "it needs triton"


@pytest.mark.parametrize("prefer", ATTENTION_PATHS)
def test_a_path_that_cannot_is_not_taken_though_preferred(prefer):
    tensors = random_qkv(NUM_TOKENS, dtype=torch.float64)
    expected = reference_attention(*tensors, BLOCKS)
    assert torch.allclose(packed_attention(*tensors, BLOCKS, prefer=prefer), expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("fake_varlen")
def test_autocast_casts_before_the_path_is_chosen(monkeypatch):
    """Rotary embedding under autocast leaves query and key in fp32, which no flash attention takes."""
    seen = []

    def path(query, value, **options):
        seen.append({query.dtype, value.dtype})
        return "varlen"

    monkeypatch.setattr(attention, "attention_path", path)
    query, key, value = random_qkv(NUM_TOKENS, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed_attention(query, key, value.to(torch.bfloat16), BLOCKS)
    assert seen == [{torch.bfloat16}]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads", [(9, 3), (2, 2)])
def test_cuda_varlen_kernel_equals_the_reference_to_bf16(window, heads):
    """bf16 keeps 8 bits: values within 2e-2 and gradients within 3e-2 of the largest, against fp32 on bf16 inputs."""
    exact = random_qkv(NUM_TOKENS, dtype=torch.float32, heads=heads, size=64)
    half = [t.detach().to("cuda", torch.bfloat16).requires_grad_() for t in exact]
    assert attention.attention_path(half[0], half[2], softcap=None, dropout=0.0) == "varlen"
    expected = output_and_gradients(
        reference_attention, [t.detach().float().requires_grad_() for t in half], BLOCKS, sliding_window=window
    )
    actual = output_and_gradients(packed_attention, half, BLOCKS, sliding_window=window)
    assert_close([t.float() for t in actual], expected, tolerance=3e-2)
    assert torch.count_nonzero(actual[0][:, :, PADDING]) == 0
