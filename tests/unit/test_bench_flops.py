"""The floor of a step, and the count of what a layout executes, against tables, hands and brute force."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from peers import flops
from peers.models import SHAPES, build_config, num_parameters
from peers.sides import forward_backward, missing_package
from peers.worker import prepare
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from simpo.core.packing import TokenPair
from simpo.model.load import load_model
from simpo.plan import shapes
from simpo.recipe import load_recipe

SMOL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def fixed_pair(prompt: int, chosen: int, rejected: int, *, row_id: str = "0") -> TokenPair:
    """Responses that differ from their first token on."""
    ids = [1] * prompt
    return TokenPair(row_id, ids + [2] * chosen, prompt, ids + [3] * rejected, prompt)


def random_pairs(count: int, *, seed: int, vocab_size: int = 4) -> list[TokenPair]:
    """Few words, so that responses often begin alike."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(rng.randint(low, high))]

    pairs = []
    for index in range(count):
        prompt = words(1, 9)
        chosen, rejected = words(1, 12), words(1, 12)
        if chosen == rejected:
            chosen.append(0)
        pairs.append(TokenPair(str(index), prompt + chosen, len(prompt), prompt + rejected, len(prompt)))
    return pairs


@pytest.fixture(scope="module")
def llama_8b() -> flops.ModelShape:
    return flops.model_shape(build_config("llama-8b"))


# --- the floor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "lengths", "tflop", "response_head", "full_head"),
    [  # the table of the project's performance notes, per pair; the last two: prompt duplicated, no padding
        ("llama-8b", (200, 350, 350), "40.3", "1.21", "1.24"),
        ("llama-8b", (1000, 300, 300), "70.8", "1.60", "1.69"),
        ("llama-8b", (4096, 256, 256), "211", "1.87", "2.00"),
        ("smol", (200, 350, 350), "0.751", "1.18", "1.27"),
        ("smol", (4096, 256, 256), "5.21", "1.83", "2.10"),
    ],
)
def test_the_floor_and_what_duplicated_prompts_cost_agree_with_the_table(
    model, lengths, tflop, response_head, full_head
):
    shape = flops.model_shape(LlamaConfig(**SMOL) if model == "smol" else build_config(model))
    work = flops.pair_work(fixed_pair(*lengths))
    floor = flops.floor_flops(shape, [work])
    assert f"{floor / 1e12:.3g}" == tflop
    rows = [lengths[0] + response for response in lengths[1:]]
    attended = sum(size * (size + 1) // 2 for size in rows)
    for head_rows, ratio in ((sum(lengths[1:]), response_head), (sum(rows), full_head)):
        duplicated = flops.step_flops(shape, tokens=sum(rows), attended=attended, head_rows=head_rows)
        assert f"{duplicated / floor:.2f}" == ratio


def test_the_work_of_a_pair_is_its_distinct_contexts():
    """Brute force: a token's context is all before it; equal contexts are computed once, equal predictions too."""
    for pair in random_pairs(300, seed=1):
        work = flops.pair_work(pair)
        sides = [(pair.chosen_ids, pair.chosen_start), (pair.rejected_ids, pair.rejected_start)]
        contexts = {tuple(ids[: end + 1]) for ids, _ in sides for end in range(len(ids))}
        predictions = {tuple(ids[: at + 1]) for ids, start in sides for at in range(start, len(ids))}
        # Where one response is the other's beginning, one token of each stays its own though it is the same.
        shorter = min(len(ids) for ids, _ in sides)
        nested = pair.chosen_ids[:shorter] == pair.rejected_ids[:shorter]
        assert work.shape.tokens == len(contexts) + nested
        assert work.head_rows == len(predictions) + nested
        assert work.labels == sum(len(ids) - start for ids, start in sides)
        if not nested:
            assert work.shape.attended == sum(len(context) for context in contexts)


def test_without_a_longer_shared_prefix_the_head_has_a_row_for_every_label():
    work = flops.pair_work(fixed_pair(20, 7, 5))
    assert work.head_rows == work.labels == 12


def test_labels_inside_the_shared_prefix_are_needed_once():
    pair = TokenPair("0", [1, 1, 1, 5, 6, 7, 8], 3, [1, 1, 1, 5, 6, 9], 3)
    assert flops.pair_work(pair) == flops.PairWork(flops.PairShape(5, 2, 1), head_rows=5, labels=7)


@pytest.mark.parametrize("config", [MixtralConfig(), GPT2Config()])
def test_models_whose_floor_is_not_known_are_refused(config):
    with pytest.raises(ValueError, match=f"{config.model_type}"):
        flops.model_shape(config)


def test_a_model_with_other_linear_layers_than_the_formula_is_refused():
    from transformers import OPTConfig

    config = OPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, ffn_dim=32)
    config.intermediate_size = 32
    with pytest.raises(ValueError, match="linear layers"):
        flops.build_on_meta(config, packed=False)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-1b", 1_235_814_400), ("llama-3b", 3_212_749_824), ("llama-8b", 8_030_261_248)],
)  # as published for Llama-3.2-1B, Llama-3.2-3B and Meta-Llama-3-8B
def test_named_shapes_are_the_published_models(name, parameters):
    assert set(SHAPES) == {"llama-1b", "llama-3b", "llama-8b"}
    assert num_parameters(name) == parameters


# --- the count -------------------------------------------------------------------------------------------------------


def test_matrix_products_are_counted_and_batched_ones_are_not():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert flops.count_matmul_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert flops.count_matmul_flops(lambda: torch.addmm(torch.zeros(7), a, b)) == 2 * 3 * 5 * 7
    assert flops.count_matmul_flops(lambda: torch.bmm(a[None], b[None])) == 0


def test_layouts_count_padding_and_rectangles_only_where_they_are():
    ragged = [fixed_pair(4, 3, 2), fixed_pair(2, 1, 1, row_id="1")]
    assert flops.shared_layout(ragged) == flops.LayoutWork(
        13, 13, sum(flops.pair_work(p).shape.attended for p in ragged)
    )
    assert flops.padded_layout(ragged) == flops.LayoutWork(4 * 7, 7 + 6 + 3 + 3, 4 * 7 * 7)
    equal = [fixed_pair(4, 3, 3)]
    assert flops.padded_layout(equal) == flops.LayoutWork(2 * 7, 14, 2 * 7 * 8 // 2)


def on_meta(side: str, config, pairs) -> int:
    model = flops.build_on_meta(config, packed=side == "simpo")

    def step() -> None:
        with flops.on_meta():
            forward_backward(side, model, pairs)

    return flops.count_matmul_flops(step)


PAIRS = [fixed_pair(9, 5, 4), fixed_pair(3, 8, 6, row_id="1"), *random_pairs(2, seed=3)]


def test_the_padded_count_is_the_one_made_by_hand(tiny_model: Path):
    config = AutoConfig.from_pretrained(tiny_model)
    shape, layout = flops.model_shape(config), flops.padded_layout(PAIRS)
    # Every linear layer and the head, on every slot: 2 operations a weight forward, twice that backward.
    assert on_meta("padded", config, PAIRS) == 6 * (shape.block_weights + shape.head_weights) * layout.slots


def test_the_count_of_this_trainer_stays_near_the_floor(tiny_model: Path):
    config = AutoConfig.from_pretrained(tiny_model)
    shape, works = flops.model_shape(config), [flops.pair_work(pair) for pair in PAIRS]
    attention = flops.attention_flops(shape, flops.shared_layout(PAIRS).attended)
    assert on_meta("simpo", config, PAIRS) + attention <= 1.08 * flops.floor_flops(shape, works)


@pytest.mark.filterwarnings("ignore")  # the peer's
@pytest.mark.parametrize("side", ["simpo", "padded", "liger"])
def test_the_count_on_meta_is_that_of_a_real_step(side: str, tiny_model: Path):
    if missing_package(side) is not None:
        pytest.skip(missing_package(side))
    if side == "simpo":
        recipe = load_recipe({"model_name_or_path": str(tiny_model)})
        model = load_model(recipe, device=torch.device("cpu"))
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
    real = flops.count_matmul_flops(lambda: forward_backward(side, model, PAIRS))
    assert real > 0
    assert on_meta(side, model.config, PAIRS) == real


@pytest.mark.long
def test_a_large_model_is_counted_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Llama-3-8B's operations are counted and meet the floor; of its 32 blocks, which are alike, four."""
    monkeypatch.setitem(shapes.SHAPES, "llama-8b", shapes.SHAPES["llama-8b"] | {"num_hidden_layers": 4})
    case = {"name": "200/350/350", "about": "", "kind": "fixed", "source": None, "lengths": (200, 350, 350)}
    found = prepare(
        model="llama-8b",
        bf16=True,
        cases=[case | {"pairs_per_micro_batch": 1}],
        sides=["simpo"],
        steps=1,
        warm_up_steps=0,
        accumulation=1,
        device="cpu",
        data=None,
        scratch=str(tmp_path),
    )
    (entry,) = json.loads(json.dumps(found["cases"]))
    shape = flops.model_shape(build_config("llama-8b"))
    assert (shape.block_weights, shape.head_weights) == (4 * 218_103_808, 128_256 * 4096)
    assert entry["floor_flops"] == flops.floor_flops(shape, [flops.pair_work(fixed_pair(200, 350, 350))])
    assert entry["work"]["simpo"]["executed_flops"] <= 1.08 * entry["floor_flops"]
