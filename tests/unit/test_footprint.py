"""plan.footprint: the memory of a step from sizes alone, beside measured activations and real models' tensors."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from simpo.model.attention import PACKED
from simpo.model.head import compute_pair_logps, install_head
from simpo.model.low_memory import install_low_memory_blocks
from simpo.parallel.mesh import MeshSizes
from simpo.plan.footprint import (
    GIB,
    Adapters,
    StepOptions,
    compute_activations,
    compute_footprint,
    compute_reserve,
    compute_state,
    fit_tokens,
    step_options,
)
from simpo.plan.shapes import SHAPES, build_config, load_config
from simpo.plan.sizes import describe_model
from simpo.recipe import load_recipe
from simpo.run.memory import measure_activations
from simpo.run.optim import build_optimizer

CPU = torch.device("cpu")
ONE = MeshSizes()


def tiny_config(kind: str = "llama", **changes):
    settings = {
        "vocab_size": 301,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(kind, **(settings | changes))


def build(config, *, dtype=torch.float32, adapters: Adapters | None = None, checkpointing: bool = False):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=dtype).train()
    base = model
    if adapters is not None:
        peft = pytest.importorskip("peft")
        targets = adapters.targets if isinstance(adapters.targets, str) else list(adapters.targets)
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM", r=adapters.rank, target_modules=targets, lora_dropout=adapters.dropout
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads a renamed attribute
            model = peft.get_peft_model(model, lora)
    install_head(model)
    install_low_memory_blocks(model)
    if checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    return model


def measured(model, *, bf16: bool):
    def forward(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return compute_pair_logps(model, batch)

    return measure_activations(model, forward, device=CPU)


# --- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("numbers", ["autocast", "bf16 weights", "fp32"])
def test_bytes_of_a_token_and_a_label_are_those_measured(kind, checkpointing, numbers):
    """Exact but for the way one block's share of what lies outside the blocks is counted: within 0.5%."""
    config = tiny_config(kind)
    bf16, dtype = numbers != "fp32", torch.bfloat16 if numbers == "bf16 weights" else torch.float32
    found = measured(build(config, dtype=dtype, checkpointing=checkpointing), bf16=bf16)
    options = StepOptions(
        master_bytes=dtype.itemsize, compute_bytes=2 if bf16 else 4, gradient_checkpointing=checkpointing, on_cpu=True
    )
    predicted = compute_activations(describe_model(config), options, ONE)
    assert predicted.per_token == pytest.approx(found.per_token, rel=0.005)
    assert predicted.per_label == pytest.approx(found.per_label, rel=0.005, abs=4)


@pytest.mark.parametrize("layers", [2, 7])
def test_activations_follow_every_size_of_the_model(layers):
    config = tiny_config(
        num_hidden_layers=layers, hidden_size=96, intermediate_size=100, num_attention_heads=6, num_key_value_heads=6,
        head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    found = measured(build(config), bf16=True)
    predicted = compute_activations(describe_model(config), StepOptions(on_cpu=True), ONE)
    assert (predicted.per_token, predicted.per_label) == pytest.approx((found.per_token, found.per_label), rel=0.005)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "adapters",
    [Adapters(4, 0.0), Adapters(4, 0.05), Adapters(8, 0.05, ("q_proj", "v_proj"))],
    ids=["no dropout", "dropout", "q and v"],
)
def test_adapters_are_predicted_from_above_within_a_tenth(adapters, checkpointing):
    """From above: the first block's norm, whose input needs no gradient, keeps nothing; a small model shows it."""
    config = tiny_config(num_hidden_layers=8)
    found = measured(build(config, adapters=adapters, checkpointing=checkpointing), bf16=True)
    options = StepOptions(adapters=adapters, on_cpu=True, gradient_checkpointing=checkpointing)
    predicted = compute_activations(describe_model(config), options, ONE)
    assert 0.98 <= predicted.of(100, 80) / (found.per_token * 100 + found.per_label * 80) <= 1.12


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "phi3", "olmo2", "granite", "cohere"])
def test_other_architectures_are_estimated_within_half(kind):
    """Blocks that are not rewritten keep 1.4 to 2.1 times as much; the greatest factor is used for all."""
    config = tiny_config(kind, **({"head_dim": 16} if kind == "phi3" else {}))
    found = measured(build(config), bf16=True)
    predicted = compute_activations(describe_model(config), StepOptions(on_cpu=True), ONE)
    assert 0.9 <= predicted.per_token / found.per_token <= 1.5


def test_offloaded_activations_count_as_the_measuring_does():
    config = tiny_config()
    model = build(config)
    found = measure_activations(model, lambda batch: compute_pair_logps(model, batch), device=CPU, offloaded=True)
    options = StepOptions(compute_bytes=4, activation_offload=True, on_cpu=True)
    predicted = compute_activations(describe_model(config), options, ONE)
    assert predicted.per_token == pytest.approx(found.per_token, rel=0.005)


def test_tensor_and_context_parallel_ranks_keep_less_but_tensor_parallel_ones_keep_the_stream():
    model, options = describe_model(tiny_config()), StepOptions(gradient_checkpointing=True)
    one, tp, cp = (
        compute_footprint(model, options, mesh, tokens=8192).parts["activations"]
        for mesh in (ONE, MeshSizes(tp=2), MeshSizes(cp=2))
    )
    assert one / 2 < cp == pytest.approx(one / 2, rel=0.07)  # attention's output is there before and after its exchange
    assert one / 2 < tp < one


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
    keys = keys | {"master_dtype": "bfloat16" if dtype == torch.bfloat16 else "float32"}
    recipe = load_recipe({"model_name_or_path": "any", **keys})
    options, config = step_options(recipe), tiny_config(tie_word_embeddings=tied)
    model = build(config, dtype=dtype, adapters=options.adapters)
    optimizer = build_optimizer(model, recipe)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.ndim]
    state = compute_state(describe_model(config), options, ONE)
    assert state.weights == tensor_bytes(model.parameters())
    assert state.gradients == tensor_bytes(parameter.grad for parameter in trained)
    assert state.moments == tensor_bytes(moments)
    assert state.trainable == sum(parameter.numel() for parameter in trained)


def test_eight_bit_moments_are_those_that_bitsandbytes_documents():
    """Two bytes a number and two fp32 scales for every 256; below 4096 numbers fp32."""
    model = describe_model(tiny_config())
    state = compute_state(model, StepOptions(optim="adamw_8bit"), ONE)
    large = [w.local_numel() for w in model.weights if w.local_numel() >= 4096]
    small = sum(w.local_numel() for w in model.weights) - sum(large)
    assert state.moments == 2 * sum(large) + sum(8 * -(-numel // 256) for numel in large) + 8 * small


def test_four_bit_weights_take_their_constants_along():
    """QLoRA: 4 bits and an fp32 scale for every 64 weights in the blocks' linear layers; the rest stays as it is."""
    model = describe_model(build_config("llama-8b"))
    recipe = load_recipe({"model_name_or_path": "any", "use_peft": True, "load_in_4bit": True})
    state = compute_state(model, step_options(recipe), ONE)
    adapters = state.trainable
    others = model.num_parameters - model.linear_numel
    assert state.weights == pytest.approx(model.linear_numel * 4.5 / 8 + 4 * others + 4 * adapters, rel=1e-9)


def test_shards_are_those_of_the_rank_that_holds_the_most():
    model = describe_model(tiny_config(vocab_size=301))
    state = compute_state(model, StepOptions(), MeshSizes(dp_shard=2, tp=2))
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
    assert describe_model(build_config(name)).num_parameters == parameters


# --- the peak --------------------------------------------------------------------------------------------------------

LLAMA_8B = describe_model(build_config("llama-8b"), name="llama-8b")
EIGHT = MeshSizes(dp_shard=8)


def peak(options: StepOptions | None = None, mesh: MeshSizes = EIGHT, tokens: int = 4096) -> float:
    return compute_footprint(LLAMA_8B, options or StepOptions(), mesh, tokens=tokens).total


def test_parts_add_up_and_the_peak_grows_with_tokens():
    found = compute_footprint(LLAMA_8B, StepOptions(), EIGHT, tokens=4096)
    assert found.total == sum(found.parts.values())
    sizes = [peak(tokens=tokens) for tokens in (0, 64, 4096, 65536)]
    assert sizes == sorted(sizes)


def test_what_saves_memory_does():
    assert peak(StepOptions(gradient_checkpointing=True)) < peak()
    assert peak(StepOptions(activation_offload=True)) < peak()
    assert peak(StepOptions(optim="adamw_bf16")) < peak()
    assert peak(StepOptions(adapters=Adapters(16, 0.0))) < peak()
    assert peak(mesh=MeshSizes(dp_shard=16)) < peak()
    assert peak(StepOptions(chunk_size=64)) < peak(StepOptions(chunk_size=8192))
    assert peak(mesh=MeshSizes(dp_shard=4, cp=2)) < peak()
    offloaded = compute_footprint(LLAMA_8B, StepOptions(offload_weights=True), EIGHT, tokens=4096)
    assert offloaded.total < peak()
    assert offloaded.host == compute_state(LLAMA_8B, StepOptions(), EIGHT).total


def test_tokens_that_fit_fill_the_memory_up_to_the_reserve():
    options, limit = StepOptions(gradient_checkpointing=True), 80 * GIB
    tokens = fit_tokens(LLAMA_8B, options, EIGHT, gpu_bytes=limit)
    room = limit - compute_reserve(LLAMA_8B, options, EIGHT, gpu_bytes=limit)
    assert peak(options, tokens=tokens) <= room < peak(options, tokens=tokens + 128)
    assert fit_tokens(LLAMA_8B, StepOptions(), MeshSizes(), gpu_bytes=limit) == 0  # 16 bytes a parameter


def test_a_row_is_shared_by_context_parallel_ranks():
    long = compute_footprint(LLAMA_8B, StepOptions(), MeshSizes(dp_shard=2, cp=4), tokens=32768)
    short = compute_footprint(LLAMA_8B, StepOptions(), MeshSizes(dp_shard=8), tokens=8192)
    assert long.parts["activations"] == pytest.approx(short.parts["activations"], rel=0.07)


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


def test_experts_are_refused():
    config = AutoConfig.for_model("mixtral", hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ValueError, match="mixtral: what its experts need"):
        describe_model(config)


def test_sizes_describe_the_model():
    model = describe_model(tiny_config("qwen3", tie_word_embeddings=True), name="q")
    assert (model.name, model.head_tied, model.norms_heads, model.is_known) == ("q", True, True, True)
    assert len({weight.unit for weight in model.weights if weight.unit.startswith("block ")}) == 4
    assert {weight.unit for weight in model.weights} >= {"end"}
    assert dataclasses.is_dataclass(model)
