"""plan.footprint and plan.trace: the memory of a step without memory, beside real models' tensors."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from cases import rarely
from transformers import AutoConfig, AutoModelForCausalLM

from simpo.core.batch import build_batch
from simpo.core.packing import TokenPair
from simpo.model.attention import PACKED
from simpo.model.head import compute_pair_logps, install_head
from simpo.model.load import add_adapters, checkpoint_activations, lora_config
from simpo.model.low_memory import install_low_memory_blocks
from simpo.parallel.mesh import MeshSizes
from simpo.plan.footprint import MOMENTS, compute_footprint, compute_state
from simpo.plan.search import Machines, plan_recipe
from simpo.plan.shapes import SHAPES, load_config
from simpo.plan.sizes import describe_model
from simpo.plan.trace import KEPT, traced_passes
from simpo.recipe import load_recipe
from simpo.run.memory import kept_bytes
from simpo.run.optim import build_optimizer

pytestmark = pytest.mark.usefixtures("shared_traces")
CPU = torch.device("cpu")
ONE = MeshSizes()


def recipe_of(**keys):
    return load_recipe({"model_name_or_path": "any", **keys})


PLAIN = recipe_of()


def tiny_config(kind: str = "llama", **changes):
    settings = {
        "vocab_size": 301,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(kind, **(settings | changes))


def build(config, recipe):
    torch.manual_seed(0)
    dtype = getattr(torch, recipe.master_dtype)
    model = base = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=dtype).train()
    if recipe.use_peft:
        pytest.importorskip("peft")
        model = add_adapters(model, lora_config(recipe), seed=0)
    install_head(model)
    install_low_memory_blocks(model)
    if recipe.gradient_checkpointing:
        checkpoint_activations(base)
    return model


# --- the traced passes -----------------------------------------------------------------------------------------------


def kept_and_traced(config, **keys) -> tuple[float, float]:
    """Bytes that a real forward pass on the CPU leaves for its backward pass, and the traced ones; a pair of 70."""
    recipe = recipe_of(device="cpu", **keys)
    pair = TokenPair("row", [3] * 30 + [1] * 21, 30, [3] * 30 + [2] * 19, 30)

    def forward(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bf16):
            return compute_pair_logps(build_once, batch)

    build_once = build(config, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = kept_bytes(build_once, forward, build_batch([pair]), device=CPU)
    model = describe_model(config, recipe)
    copied = sum(weight.local_numel() for weight in model.weights if weight.kind in ("linear", "adapter"))
    # Copies in bf16 that autocast made wait for the backward pass, unless checkpoints make them again.
    copies = recipe.bf16 and recipe.master_dtype == "float32" and not recipe.gradient_checkpointing
    return found, traced_passes(model, recipe, tokens=70, labels=40)["head"][KEPT] + copies * 2 * copied


FORMATS = {"autocast": {}, "bf16 weights": {"master_dtype": "bfloat16"}, "fp32": {"bf16": False}}


@pytest.mark.parametrize(
    ("kind", "numbers", "checkpointing"),
    [
        ("llama", "autocast", False),
        ("llama", "bf16 weights", True),
        ("llama", "fp32", False),
        ("gemma3_text", "autocast", False),
        *(rarely("llama", numbers, True) for numbers in ("autocast", "fp32")),
        rarely("llama", "bf16 weights", False),
        *(rarely(kind, "autocast", False) for kind in ("qwen2", "qwen3", "mistral", "olmo2", "granite", "phi3")),
    ],
)
def test_the_traced_passes_keep_what_real_tensors_keep(kind, numbers, checkpointing):
    """To 3%; with checkpoints the last norm's output, which the head reads and drops, shows in a model this small."""
    config = tiny_config(kind, **({"head_dim": 16} if kind == "phi3" else {}))
    found, traced = kept_and_traced(config, gradient_checkpointing=checkpointing, **FORMATS[numbers])
    assert traced == pytest.approx(found, rel=0.1 if checkpointing else 0.03)


@pytest.mark.parametrize(
    "keys",
    [
        rarely({"lora_dropout": 0.0}),
        {"lora_dropout": 0.05},
        rarely({"lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]}),
    ],
    ids=["no dropout", "dropout", "q and v"],
)
def test_adapters_keep_what_is_traced(keys):
    found, traced = kept_and_traced(tiny_config(), use_peft=True, **keys)
    assert traced == pytest.approx(found, rel=0.03)


# --- weights, gradients, moments -------------------------------------------------------------------------------------


def tensor_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, torch.float32),
        ({"optim": "adamw_torch"}, torch.float32),
        ({"optim": "adamw_bf16"}, torch.float32),
        ({"optim": "adamw_bf16", "master_dtype": "bfloat16"}, torch.bfloat16),
        ({"use_peft": True, "lora_r": 4}, torch.float32),
        ({"use_peft": True, "lora_target_modules": ["q_proj", "down_proj"]}, torch.bfloat16),
    ],
    ids=["fused", "plain", "bf16 moments", "bf16 all", "adapters", "some adapters"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_moments_are_those_of_a_real_model(keys, dtype, tied):
    """To the byte, scalar step counts apart."""
    recipe = recipe_of(**keys | {"master_dtype": "bfloat16" if dtype == torch.bfloat16 else "float32"})
    config = tiny_config(tie_word_embeddings=tied)
    model = build(config, recipe)
    optimizer = build_optimizer(model, recipe)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.ndim]
    state = compute_state(describe_model(config, recipe), recipe, ONE)
    assert state.weights == tensor_bytes(model.parameters())
    assert state.gradients == tensor_bytes(parameter.grad for parameter in trained)
    assert state.moments == tensor_bytes(moments)


def test_eight_bit_moments_are_those_that_bitsandbytes_documents():
    """Two bytes a number and two fp32 scales for every 256; below 4096 numbers fp32."""
    recipe = recipe_of(optim="adamw_8bit")
    model = describe_model(tiny_config(), recipe)
    state = compute_state(model, recipe, ONE)
    large = [w.local_numel() for w in model.weights if w.local_numel() >= 4096]
    small = sum(w.local_numel() for w in model.weights) - sum(large)
    assert state.moments == 2 * sum(large) + sum(8 * -(-numel // 256) for numel in large) + 8 * small


def test_four_bit_weights_take_their_constants_along():
    """QLoRA: 4 bits and an fp32 scale for every 64 weights in the blocks' linear layers; the rest stays as it is."""
    recipe = recipe_of(use_peft=True, load_in_4bit=True)
    model = describe_model(load_config("llama-8b"), recipe)
    state = compute_state(model, recipe, ONE)
    adapters = sum(weight.local_numel() for weight in model.weights if weight.is_trained)
    others = model.num_parameters - model.linear_numel
    assert state.weights == pytest.approx(model.linear_numel * 4.5 / 8 + 4 * others + 4 * adapters, rel=1e-9)


def test_shards_are_those_of_the_rank_that_holds_the_most():
    model = describe_model(tiny_config(vocab_size=301), PLAIN)
    state = compute_state(model, PLAIN, MeshSizes(dp_shard=2, tp=2))
    head = next(w for w in model.weights if w.name == "lm_head.weight")
    down = next(w for w in model.weights if w.name.endswith("0.mlp.down_proj.weight"))
    norm = next(w for w in model.weights if w.name == "model.norm.weight")
    assert head.local_shape(shard=2, tp=2) == (76, 64)  # ceil(ceil(301 / 2) / 2)
    assert down.local_shape(shard=2, tp=2) == (32, 80)
    assert norm.local_shape(shard=2, tp=2) == (32,)
    assert state.weights == 4 * sum(w.local_numel(shard=2, tp=2) for w in model.weights)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-1b", 1_235_814_400),
        ("llama-3b", 3_212_749_824),
        ("mistral-7b", 7_241_732_096),
        ("llama-8b", 8_030_261_248),
        ("qwen-14b", 14_770_033_664),
        ("qwen-32b", 32_763_876_352),
        ("llama-70b", 70_553_706_496),
    ],
)
def test_known_shapes_have_the_published_number_of_parameters(name, parameters):
    """As their model cards and weight files say."""
    assert name in SHAPES
    assert describe_model(load_config(name), PLAIN).num_parameters == parameters


# --- the peak --------------------------------------------------------------------------------------------------------

LLAMA_8B = describe_model(load_config("llama-8b"), PLAIN, name="llama-8b")
EIGHT = MeshSizes(dp_shard=8)


def peak(mesh: MeshSizes = EIGHT, tokens: int = 1024, **keys) -> float:
    recipe = recipe_of(**keys)
    return compute_footprint(describe_model(LLAMA_8B.config, recipe), recipe, mesh, tokens=tokens).total


def test_every_moment_has_its_parts_and_the_peak_is_the_largest():
    found = compute_footprint(LLAMA_8B, PLAIN, EIGHT, tokens=1024)
    assert tuple(found.moments) == MOMENTS
    assert found.total == max(found.totals.values()) == pytest.approx(sum(found.parts.values()), abs=1)
    state = compute_state(LLAMA_8B, PLAIN, EIGHT)
    assert found.totals["clip"] == sum(state) + found.parts["CUDA and NCCL"]
    assert "gradients" not in found.moments["save"]


def test_the_peak_grows_with_tokens():
    sizes = [peak(tokens=tokens) for tokens in (64, 300, 1024, 4096, 65536, 10**6)]
    assert sizes == sorted(sizes)


def test_what_saves_memory_does():
    assert peak(gradient_checkpointing=True) < peak()
    assert peak(activation_offload=True) < peak()
    assert peak(optim="adamw_bf16") < peak()
    assert peak(use_peft=True) < peak()
    assert peak(MeshSizes(dp_shard=16)) < peak()
    assert peak(MeshSizes(dp_shard=4, cp=2)) < peak()


def test_tokens_that_fit_fill_the_memory_up_to_the_reserve():
    plan = plan_recipe(recipe_of(gradient_checkpointing=True, dp_shard=8), Machines(8, 8, 80), shape="llama-8b")
    room = plan.machines.gpu_bytes - plan.reserve
    assert 0.99 * room < peak(gradient_checkpointing=True, tokens=plan.tokens_that_fit) <= room
    whole = plan_recipe(recipe_of(dp_shard=1), Machines(1, 1, 80), shape="llama-8b")
    assert whole.tokens_that_fit == 0  # 16 bytes a parameter


def test_a_row_is_shared_by_context_parallel_ranks():
    """But attention's output is there before and after its exchange."""
    long = compute_footprint(LLAMA_8B, PLAIN, MeshSizes(dp_shard=2, cp=4), tokens=4096)
    short = compute_footprint(LLAMA_8B, PLAIN, EIGHT, tokens=1024)
    assert short.parts[KEPT] < long.parts[KEPT] == pytest.approx(short.parts[KEPT], rel=0.1)


def test_tensor_parallel_ranks_keep_less_but_all_of_the_stream():
    one, tp = (
        compute_footprint(LLAMA_8B, PLAIN, mesh, tokens=1024).moments["head"][KEPT] for mesh in (ONE, MeshSizes(tp=2))
    )
    assert one / 2 < tp < 0.7 * one


def test_an_asynchronous_save_keeps_a_copy_in_cpu_memory_and_the_final_model_comes_together_there():
    recipe = recipe_of(async_save=True, save_dtype="bfloat16")
    state, found = compute_state(LLAMA_8B, recipe, EIGHT), compute_footprint(LLAMA_8B, recipe, EIGHT, tokens=64).saving
    assert found["a checkpoint on its way to the disk"] == state.weights + state.moments
    assert found["the final model, in the first process"] == 2 * LLAMA_8B.num_parameters


def test_saving_shards_that_are_cut_twice_by_rows_takes_a_copy_of_them():
    plain, both = (
        compute_footprint(LLAMA_8B, PLAIN, mesh, tokens=64).moments["save"].get("copies to save", 0)
        for mesh in (MeshSizes(dp_shard=8), MeshSizes(dp_shard=4, tp=2))
    )
    state = compute_state(LLAMA_8B, PLAIN, MeshSizes(dp_shard=4, tp=2))
    assert plain < both < state.weights + state.moments


# --- configurations --------------------------------------------------------------------------------------------------


def test_a_configuration_is_read_from_json_and_yaml_files(tmp_path):
    settings = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    (tmp_path / "a.yaml").write_text("\n".join(f"{key}: {value}" for key, value in settings.items()))
    (tmp_path / "a.json").write_text(str(settings).replace("'", '"'))
    yaml, json = (load_config(str(tmp_path / name)) for name in ("a.yaml", "a.json"))
    assert (yaml.num_hidden_layers, yaml.hidden_size) == (json.num_hidden_layers, json.hidden_size) == (3, 64)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", None, "cannot read"),
        ("a.json", "{", "cannot read"),
        ("a.yaml", "hidden_size: 4", "model_type"),
        ("a.yaml", "model_type: nothing-like-it", "transformers knows"),
        ("nowhere/at/all", None, "llama-70b"),
    ],
)
def test_what_is_no_configuration_is_refused_in_one_line(name, text, said, tmp_path):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        load_config(str(path))
    assert "\n" not in str(error.value)


MIXTRAL = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2},
}


def test_experts_are_planned_whole_and_multiplied_in_part():
    config = AutoConfig.for_model("mixtral", **MIXTRAL)
    model = describe_model(config, PLAIN)
    experts = [weight for weight in model.weights if weight.kind == "experts"]
    assert len(experts) == 2 * 4
    assert {weight.split_dim for weight in experts} == {1, 2}
    all_of_them = sum(weight.local_numel() for weight in experts)
    assert all_of_them == 4 * 8 * 3 * 64 * 96
    others = sum(weight.local_numel() for weight in model.weights if weight.kind == "linear")
    assert model.linear_numel == others + all_of_them // 4


@pytest.mark.long
def test_what_experts_keep_grows_with_those_that_a_token_is_sent_to():
    def kept(**changes):
        model = describe_model(AutoConfig.for_model("mixtral", **{**MIXTRAL, **changes}), PLAIN)
        return traced_passes(model, PLAIN, tokens=2000, labels=1000)["forward"]["activations"]

    two, four = kept(), kept(num_experts_per_tok=4)
    assert 1.4 * two < four < 2 * two
    assert kept(num_local_experts=16) == pytest.approx(two, rel=0.05)


@pytest.mark.long
def test_dense_blocks_before_the_experts_do_not_stand_for_them():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, "n_routed_experts": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 6, "n_group": 1, "topk_group": 1}
    sizes |= {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    sizes |= {"vocab_size": 512, "num_experts_per_tok": 4}

    def kept(dense):
        model = describe_model(AutoConfig.for_model("deepseek_v3", **sizes, first_k_dense_replace=dense), PLAIN)
        return traced_passes(model, PLAIN, tokens=2000, labels=1000)["forward"]["activations"]

    assert kept(3) == kept(0)


def test_sizes_describe_the_model():
    model = describe_model(tiny_config("qwen3", tie_word_embeddings=True), PLAIN, name="q")
    assert (model.name, model.head_tied, model.num_layers) == ("q", True, 5)
    assert len({weight.unit for weight in model.weights if weight.unit.startswith("block ")}) == 5
    assert {weight.unit for weight in model.weights} >= {"end"}
    assert dataclasses.is_dataclass(model)
