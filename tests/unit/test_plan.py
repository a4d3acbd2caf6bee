"""simpo plan: which sizes it picks and why, what it refuses, and what it says would help."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from cases import rarely
from typer.testing import CliRunner

from simpo.cli import app
from simpo.parallel.mesh import MeshSizes
from simpo.plan.footprint import GIB, compute_footprint
from simpo.plan.report import describe_plan, launch_line, plan_as_dict
from simpo.plan.search import Machines, plan_recipe
from simpo.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("shared_traces")
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def recipe_of(**keys):
    return load_recipe({"model_name_or_path": "any", "max_length": 2048, **keys})


def plan_of(shape: str, gpus: int, gib: float = 80, *, per_node: int | None = None, **keys):
    machines = Machines.of(gpus=gpus, nodes=None, gpus_per_node=per_node, gpu_gib=gib)
    return plan_recipe(recipe_of(**keys), machines, shape=shape)


def sizes(plan) -> tuple[int, int, int, int, bool]:
    mesh = plan.mesh
    return mesh.dp_replicate, mesh.dp_shard, mesh.cp, mesh.tp, plan.recipe.gradient_checkpointing


# --- what is picked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "gpus", "keys", "expected"),
    [
        ("llama-1b", 1, {}, (1, 1, 1, 1, False)),
        ("llama-1b", 8, {}, (8, 1, 1, 1, False)),  # whole on every GPU
        ("llama-8b", 8, {}, (1, 8, 1, 1, False)),  # sharded within the node
        ("llama-8b", 64, {}, (8, 8, 1, 1, False)),  # copies over nodes, shards within
        ("qwen-32b", 16, {}, (1, 16, 1, 1, True)),  # over nodes when one is not enough
        ("llama-8b", 8, {"max_length": 65536}, (1, 4, 2, 1, True)),  # long rows: checkpointing, then cp
        rarely("llama-70b", 8, {"use_peft": True}, (1, 8, 1, 1, True)),
        # 4 bits are not sharded
        rarely("llama-70b", 8, {"use_peft": True, "load_in_4bit": True}, (8, 1, 1, 1, True)),
    ],
)
def test_the_first_of_the_preferred_sizes_that_fits_is_picked(shape, gpus, keys, expected):
    plan = plan_of(shape, gpus, **keys)
    assert plan.fits
    assert sizes(plan) == expected


@pytest.mark.long
def test_a_reference_model_and_padded_batches_take_their_room():
    plain, dpo = (plan_of("llama-8b", 1, use_peft=True, loss_type=loss) for loss in ("sigmoid", "dpo"))
    assert "reference" not in plain.footprint.moments
    found = dpo.footprint.moments["reference"]
    assert found["the reference's weights"] == found["weights"] == dpo.state.weights
    padded = plan_of("llama-1b", 1, 40, pack=False, share_prompt=False, per_device_train_batch_size=16, max_length=4096)
    assert padded.tokens == padded.search.needed == 16 * 2 * 4096
    assert not padded.fits
    assert padded.choices["per_device_train_batch_size"][0] == 16
    assert "max_tokens_per_micro_batch" not in {**padded.choices, **dict.fromkeys(padded.remedies)}
    assert any(words.startswith("per_device_train_batch_size: ") for words in padded.remedies)


def test_a_pick_fits_and_what_was_preferred_to_it_does_not():
    plan = plan_of("llama-8b", 8)
    limit = plan.machines.gpu_bytes - plan.reserve
    assert plan.footprint.total <= limit
    whole = compute_footprint(plan.model, plan.recipe, MeshSizes(dp_replicate=8), tokens=plan.longest_pair)
    assert whole.total > limit


def test_every_size_has_a_reason_of_one_line():
    for plan in (plan_of("llama-8b", 8), plan_of("llama-8b", 8, dp_shard=8)):
        assert list(plan.choices) == [
            *("dp_replicate", "dp_shard", "cp", "tp", "gradient_checkpointing", "max_tokens_per_micro_batch")
        ]
        assert all(reason and "\n" not in reason for _, reason in plan.choices.values())


def test_a_recipe_that_sets_its_mesh_is_only_reported_on():
    plan = plan_of("llama-8b", 8, tp=2)
    assert sizes(plan) == (1, 4, 1, 2, False)
    assert [reason for _, reason in plan.choices.values()][:5] == ["as the recipe says"] * 5


@pytest.mark.long
def test_tokens_of_the_recipe_decide_what_must_fit():
    assert sizes(plan_of("llama-8b", 8, max_tokens_per_micro_batch=30000))[4], "checkpointing for 30,000 tokens"
    plan = plan_of("llama-8b", 8, max_tokens_per_micro_batch=90000, dp_shard=8, gradient_checkpointing=True)
    assert not plan.fits
    assert f"max_tokens_per_micro_batch: {plan.tokens_that_fit}" in plan.remedies


def test_a_micro_batch_is_never_larger_than_a_ranks_share_of_a_step():
    plan = plan_of("llama-1b", 8, per_device_train_batch_size=1)
    assert plan.tokens == plan.longest_pair < plan.tokens_that_fit


# --- published claims ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_seven_billion_on_one_40_gb_card_takes_adapters_or_host_memory():
    """Published: with ZeRO-3 and offload. All weights with their moments take 126 GiB."""
    whole = plan_of("mistral-7b", 1, 40)
    assert not whole.fits
    assert any("use_peft" in words for words in whole.remedies)
    assert any("optimizer_offload: true" in words and "27.0 GiB of CPU memory" in words for words in whole.remedies)
    assert plan_of("mistral-7b", 1, 40, use_peft=True, master_dtype="bfloat16").fits


@pytest.mark.long
def test_eight_billion_on_two_40_gb_cards_takes_adapters():
    assert not plan_of("llama-8b", 2, 40).fits
    assert plan_of("llama-8b", 2, 40, use_peft=True).fits
    assert plan_of("llama-8b", 8, 40).fits


def test_a_step_that_fits_but_cannot_be_saved_does_not_fit():
    """70B with bf16 weights and moments on eight cards: shards cut twice by rows are put in one piece to be saved."""
    plan = plan_of("llama-70b", 8, cp=4, tp=2, master_dtype="bfloat16", optim="adamw_bf16", gradient_checkpointing=True)
    totals = plan.footprint.totals
    limit = plan.machines.gpu_bytes - plan.reserve
    assert not plan.fits
    assert plan.footprint.moment == "save"
    assert max(size for moment, size in totals.items() if moment != "save") < limit < totals["save"]


@pytest.mark.long
def test_seventy_billion_on_eight_80_gb_cards_takes_adapters():
    whole = plan_of("llama-70b", 8)
    assert not whole.fits
    assert 130 * GIB < whole.footprint.total < 160 * GIB
    assert plan_of("llama-70b", 8, use_peft=True).fits
    assert plan_of("llama-70b", 16, master_dtype="bfloat16", optim="adamw_bf16").fits
    assert plan_of("llama-70b", 32).fits


@pytest.mark.parametrize(
    ("name", "shape", "gib"),
    [
        ("llama-3-8b-instruct-simpo-1x80gb", "llama-8b", 80),
        ("llama-3-8b-instruct-lora-1x24gb", "llama-8b", 24),
        ("llama-3-8b-instruct-qlora", "llama-8b", 24),
        ("mistral-7b-instruct-simpo-1x40gb", "mistral-7b", 40),
    ],
)
def test_recipes_for_one_card_fit_it(name, shape, gib):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    machines = Machines.of(gpus=1, nodes=None, gpus_per_node=None, gpu_gib=gib)
    plan = plan_recipe(recipe, machines, shape=shape)
    assert plan.fits, plan.footprint
    assert launch_line(plan, recipe, recipe_name=name) == f"simpo train {name}"


# --- what would help -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_where_nothing_fits_it_says_what_would():
    plan = plan_of("llama-8b", 2, 24)
    said = " | ".join(plan.remedies)
    for word in ("8 GPUs", "use_peft", "master_dtype"):
        assert word in said
    text = describe_plan(plan, recipe_of())
    assert "warning: this does not fit: with the longest pair (4,096 tokens) a GPU needs" in text
    assert "start:" not in text


def test_remedies_of_a_fixed_mesh_begin_with_another_mesh():
    plan = plan_of("llama-8b", 8, dp_replicate=8)
    assert not plan.fits
    assert plan.remedies[0].startswith("another mesh of the same GPUs (dp_shard: 8")


def test_the_next_machines_are_nodes_that_there_are():
    made = {3: (4, 4), 6: (8, 8), 4: (8, 8), 8: (16, 8)}
    for gpus, next_ in made.items():
        more = Machines(gpus, min(gpus, 8), 80).more()
        assert (more.gpus, more.gpus_per_node) == next_
    assert Machines(8, 4, 80).more().nodes == 4


def test_remedies_fit():
    """One that is named for Llama-3-8B on two small cards does."""
    plan = plan_of("llama-8b", 2, 24)
    assert not plan.fits
    assert any("use_peft: true and master_dtype: bfloat16" in each for each in plan.remedies)
    assert plan_of("llama-8b", 2, 24, use_peft=True, master_dtype="bfloat16").fits


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"cp": 3}, "needs a multiple of 3"),
        ({"dp_shard": 4}, "dp_shard 4"),
        ({"tp": 8, "dp_shard": 1, "shape": "qwen-14b", "gpus": 16, "dp_replicate": 2, "per_node": 4}, "beyond a node"),
        ({"tp": 16, "gpus": 16, "per_node": 16}, "num_key_value_heads = 8"),
        ({"cp": 3, "gpus": 6}, "cp = 3"),
        ({"optim": "adamw_8bit", "dp_shard": 8}, "adamw_8bit cannot be sharded"),
        (
            {"optim": "adamw_bf16", "optimizer_offload": True, "dp_shard": 8},
            "optimizer_offload: true cannot be sharded",
        ),
        ({"shape": "llama-9b"}, "llama-8b"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_line(keys, said):
    keys = {"shape": "llama-8b", "gpus": 8} | keys
    with pytest.raises(ValueError, match=said) as error:
        plan_of(keys.pop("shape"), keys.pop("gpus"), **keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"gpus": 8}, (8, 8)),
        ({"gpus": 4}, (4, 4)),
        ({"gpus": 64}, (64, 8)),
        ({"nodes": 2}, (16, 8)),
        ({"nodes": 2, "gpus_per_node": 4}, (8, 4)),
        ({"gpus": 8, "nodes": 2}, (8, 4)),
        ({}, (8, 8)),
    ],
)
def test_machines_are_what_was_given(given, expected):
    machines = Machines.of(**({"gpus": None, "nodes": None, "gpus_per_node": None, "gpu_gib": 80.0} | given))
    assert (machines.gpus, machines.gpus_per_node) == expected


@pytest.mark.parametrize(
    "given",
    [
        *({"gpus": 12}, {"gpus": 20, "nodes": 3}, {"gpus": 8, "nodes": 2, "gpus_per_node": 8}),
        *({"gpu_gib": gib} for gib in (0.0, math.inf, math.nan)),
    ],
)
def test_machines_that_contradict_themselves_are_refused(given):
    with pytest.raises(ValueError, match="--gpu"):
        Machines.of(**({"gpus": None, "nodes": None, "gpus_per_node": None, "gpu_gib": 80.0} | given))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: any\nglobal_batch_size: 128\nper_device_train_batch_size: 2\n")
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_the_command_prints_the_plan_and_writes_json(recipe_file, tmp_path):
    result = run(
        recipe_file, "--gpus", 8, "--gpu-memory", 80, "--shape", "llama-8b", "--output", tmp_path / "plan.json"
    )
    assert result.exit_code == 0, result.output
    assert "8.03 billion parameters" in result.output
    assert "batch: 128 pairs an optimizer step (2 x 8 accumulated x 8 ranks)" in result.output
    assert f"torchrun --nproc-per-node 8 -m simpo train {recipe_file} --dp_shard 8" in result.output
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["mesh"] == {"dp_replicate": 1, "dp_shard": 8, "cp": 1, "tp": 1}
    assert found["fits"] is True
    memory = found["memory"]
    assert memory["total_bytes"] == max(memory["moments"].values()) == memory["moments"][memory["moment"]]
    assert memory["total_bytes"] == pytest.approx(sum(memory["bytes"].values()), abs=1)
    assert found["choices"]["dp_shard"]["value"] == 8


def test_ranks_of_one_tp_group_share_their_pairs_of_a_global_batch(recipe_file):
    result = run(recipe_file, "--gpus", 8, "--shape", "llama-8b", "--tp", 2)
    assert "batch: 128 pairs an optimizer step (2 x 16 accumulated x 4 ranks)" in result.output


def test_overrides_and_a_configuration_file_are_taken(recipe_file, tmp_path):
    (tmp_path / "tiny.yaml").write_text(
        "model_type: llama\nhidden_size: 64\nintermediate_size: 128\nnum_hidden_layers: 2\nnum_attention_heads: 4\n"
    )
    result = run(recipe_file, "--gpus", 8, "--shape", tmp_path / "tiny.yaml", "--tp", 2, "--max_length", 512)
    assert result.exit_code == 0, result.output
    assert "tp                                          2  as the recipe says" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "8", "--shape", "nowhere/at/all"], "error: cannot read the configuration"),
        (["--gpus", "8", "--shape", "llama-8b", "--tp", "3"], "error: the mesh"),
        (["--gpus", "8", "--shape", "llama-8b", "--tensor", "3"], "error: unknown key"),
        (["--gpus", "96", "--shape", "llama-8b"], "error: global_batch_size"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, recipe_file):
    result = run(recipe_file, *arguments)
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert said in result.output


def test_launch_lines_name_nodes_and_keys():
    plan = plan_of("llama-70b", 64)
    line = launch_line(plan, recipe_of(), recipe_name="r.yaml")
    assert line.startswith("torchrun --nnodes 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id RUN ")
    assert line.endswith("-m simpo train r.yaml --dp_replicate 2 --dp_shard 32 --gradient_checkpointing true")
    assert launch_line(plan_of("llama-1b", 1), recipe_of(), recipe_name="r.yaml") == "simpo train r.yaml"


def test_the_recipe_decides_the_options_of_the_step():
    plan = plan_of("llama-8b", 8, optim="adamw_bf16", use_peft=True, lora_r=8)
    assert {weight.kind for weight in plan.model.weights if weight.is_trained} == {"adapter"}
    assert plan_as_dict(plan)["model"]["parameters"] == 8_030_261_248
