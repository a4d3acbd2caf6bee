"""SimPOConfig: other programs' names, the recipe's rules."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from simpo.hosts import hf
from simpo.hosts.hf import SimPOConfig
from simpo.hosts.hf.config import check_arguments
from simpo.hosts.hf.launch import check_launch
from simpo.hosts.hf.model import make_ready, tokenizer_of
from simpo.hosts.hf.run import build_config, check_keys
from simpo.hosts.launcher import launched_by_accelerate
from simpo.recipe import KEYS, load_recipe
from simpo.run.resume import find_checkpoint
from simpo.run.saved import TRAINERS

REPO = Path(__file__).resolve().parents[2]
SCALING = (REPO / "docs" / "scaling.md").read_text(encoding="utf-8")
WILD = sorted((REPO / "tests" / "unit" / "recipes_in_the_wild").glob("*.yaml"))


def config(**values: Any) -> SimPOConfig:
    return SimPOConfig(**{"output_dir": "runs/none", "report_to": [], **values})


def test_the_defaults_are_a_recipes():
    args, recipe = config(), load_recipe({"model_name_or_path": "any"})
    expected = {**recipe.to_dict(), "validation_fraction": 0.0, "output_dir": "runs/none"}
    assert args.to_recipe("any").to_dict() == expected
    assert args.lr_scheduler_type == recipe.lr_scheduler_type
    assert args.get_warmup_steps(50) == 5
    assert (args.beta, args.gamma_beta_ratio, args.sft_weight) == (2.0, 0.5, 0.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"beta": 2.5, "gamma_beta_ratio": 0.3}, (2.5, 0.3)),
        ({"beta": 2.5, "gamma": 1.0}, (2.5, 0.4)),
        ({"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.0}, (2.5, 0.4)),  # TRL: beta * (M - simpo_gamma / beta)
        ({"loss_type": "simpo", "simpo_gamma": 0.5, "beta": 0.1}, (0.1, 5.0)),  # TRL's own defaults
    ],
)
def test_gamma_is_what_each_program_means_by_it(given: dict[str, Any], expected: tuple[float, float]):
    args = config(**given)
    assert (args.beta, args.gamma_beta_ratio) == pytest.approx(expected)
    assert (args.gamma, args.simpo_gamma) == (None, None)
    again = dataclasses.replace(args, learning_rate=1e-5)
    assert (again.beta, again.gamma_beta_ratio) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"gamma": 1.0, "gamma_beta_ratio": 0.5}, "both set gamma_beta_ratio"),
        ({"loss_type": "simpo", "simpo_gamma": 1.0, "gamma": 1.0}, "gamma and simpo_gamma: two names"),
        ({"cpo_alpha": 0.0}, "there it names a CPO loss"),
        ({"cpo_alpha": 1.0, "loss_type": "sigmoid"}, "write loss_type 'simpo' for SimPO, 'cpo' for TRL's sigmoid"),
        ({"cpo_alpha": 1.0, "loss_type": "hinge"}, "'cpo_hinge' for TRL's hinge"),
        ({"cpo_alpha": 1.0, "loss_type": "ipo"}, "gamma_beta_ratio 0 beside 'ipo' for TRL's ipo"),
        ({"beta": 0.0}, "beta = 0.0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing = 0.1: not defined"),
        ({"max_length": 64, "max_prompt_length": 64}, "max_prompt_length = 64: must be less"),
        ({"fp16": True}, "float16 is not supported"),
        ({"is_encoder_decoder": True}, "encoder-decoder models are not supported"),
        ({"label_smoothing_factor": 0.1}, "for noisy preferences use label_smoothing"),
        ({"torch_compile": True}, "torch_compile: not with this trainer"),
        ({"use_liger_kernel": True}, "use_liger_kernel: not with this trainer"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(given: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        config(**given)


def test_an_unknown_name_is_an_error():
    with pytest.raises(TypeError, match="gama_beta_ratio"):
        config(gama_beta_ratio=0.5)


def test_names_that_mean_nothing_here_are_said_once_each():
    notices = config(truncation_mode="keep_end", padding_value=0, max_completion_length=64).to_recipe().notices
    assert [notice.split(":")[0] for notice in notices] == ["max_completion_length", "truncation_mode", "padding_value"]


def test_trls_alphapo_is_alphapo_with_its_alpha():
    for given in ({"loss_type": "alphapo", "alpha": 0.1}, {"loss_type": "simpo", "alpha": 0.1}):
        recipe = config(**given).to_recipe()
        assert (recipe.loss_type, recipe.alphapo_alpha) == ("alphapo", 0.1)


def test_names_of_older_transformers_are_read():
    args = config(evaluation_strategy="epoch", warmup_ratio=0.2, gradient_checkpointing=True, dataset_num_proc=3)
    assert args.eval_strategy == "epoch"
    assert args.get_warmup_steps(50) == 10
    kwargs = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs
    assert kwargs == {"use_reentrant": False}
    assert args.to_recipe().preprocessing_num_workers == 3


def test_options_of_loading_go_where_they_belong():
    options = {"torch_dtype": torch.bfloat16, "revision": "v1", "use_cache": False, "attn_implementation": "sdpa"}
    args = config(model_init_kwargs=options)
    recipe = args.to_recipe("any")
    assert args.loading_options() == {"use_cache": False}
    assert (recipe.model_revision, recipe.master_dtype) == ("v1", "float32")
    assert any("fp32 master weights are kept" in notice for notice in recipe.notices)


def test_precision_of_launcher_and_settings_must_agree(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launched_by_accelerate()
    with pytest.raises(ValueError, match="launched with mixed_precision bf16"):
        config(bf16=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="bf16: true, but accelerate was launched with mixed_precision fp16"):
        config()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert not launched_by_accelerate()


def test_a_config_survives_json(tmp_path: Path):
    args = config(beta=3.0, gamma_beta_ratio=0.1)
    values = json.loads(args.to_json_string())
    assert (values["beta"], values["gamma_beta_ratio"]) == (3.0, 0.1)


# --- recipes under accelerate launch ---------------------------------------------------------------------------------


def recipe_of(tmp_path: Path, **keys: Any) -> Any:
    base = {"model_name_or_path": "any", "dataset_mixer": {"rows.jsonl": 1.0}, "output_dir": str(tmp_path / "run")}
    return load_recipe({**base, **keys})


OTHER_VALUES = {
    "learning_rate": 3e-7, "lr_scheduler_type": "linear", "warmup_steps": 7, "num_train_epochs": 2.0, "max_steps": 9,
    "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "max_grad_norm": 0.5, "seed": 3,
    "optim": "adamw_torch", "bf16": False, "ddp_timeout": 60, "eval_strategy": "steps", "eval_steps": 3,
    "eval_on_start": True, "per_device_eval_batch_size": 3, "per_device_train_batch_size": 5, "run_name": "x",
    "gradient_accumulation_steps": 3, "gradient_checkpointing": True, "save_strategy": "epoch", "save_steps": 11,
    "save_total_limit": 2, "logging_steps": 4, "metric_for_best_model": "eval_rewards/margins",
    "full_determinism": True,
}  # fmt: skip


def test_every_key_of_the_trainer_reaches_it(tmp_path: Path):
    args = build_config(recipe_of(tmp_path, **OTHER_VALUES), torch.device("cpu"))
    for name, value in OTHER_VALUES.items():
        assert getattr(args, name) == value, name
    assert args.output_dir == str(tmp_path / "run" / "checkpoints")
    assert args.greater_is_better is True
    assert args.use_cpu


def test_every_key_of_the_recipe_is_honoured_or_refused():
    """A key whose flag says that the run reads it, or that TrainingArguments has it, is one that this file has seen."""
    keys = {kind: {name for name, key in KEYS.items() if key.hf == kind} for kind in ("run", "argument", "shared")}
    assert keys["run"] == {
        *("model_name_or_path", "tokenizer_name_or_path", "dataset_mixer", "dataset_splits", "dataset_configs"),
        *("validation_fraction", "output_dir", "resume_from_checkpoint", "report_to", "logging_dir", "device"),
        *("num_threads", "tf32", "ref_model_name_or_path", "warmup_ratio", "warmup_steps", "min_lr"),
        *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "use_rslora", "use_dora"),
        *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"),
        *("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
        *("generate", "score", "pair", "rounds", "judge"),  # other commands read them
        *("early_stopping_patience", "early_stopping_threshold"),
    }
    elsewhere = {"greater_is_better", "load_best_model_at_end", "gradient_checkpointing_kwargs"}
    assert keys["argument"] | keys["shared"] == {*OTHER_VALUES} - keys["run"] | elsewhere


@pytest.mark.parametrize("path", WILD, ids=lambda path: path.stem)
def test_the_authors_recipes_run_under_accelerate_as_they_are(path: Path):
    check_keys(load_recipe(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("dp_replicate", 2), ("dp_shard", 2), ("cp", 2), ("tp", 2), ("fsdp_param_dtype", "float32")),
        *(("async_save", True), ("activation_offload", True), ("torch_compile", True)),
        *(("use_liger_kernel", True), ("optim", "adamw_bf16")),
    ],
)
def test_a_key_that_only_the_native_trainer_honours_is_refused_by_name(tmp_path: Path, key: str, value: Any):
    with pytest.raises(ValueError, match=f"^{key} = {value}: "):
        check_keys(recipe_of(tmp_path, **{key: value}))


def test_a_reference_other_than_the_model_itself_is_refused(tmp_path: Path):
    itself = recipe_of(tmp_path, loss_type="dpo").model_name_or_path
    for reference in (None, itself):
        check_keys(recipe_of(tmp_path, loss_type="dpo", ref_model_name_or_path=reference))
    with pytest.raises(ValueError, match=r"^ref_model_name_or_path = other/model: with accelerate launch"):
        check_keys(recipe_of(tmp_path, loss_type="dpo", ref_model_name_or_path="other/model"))


def test_a_run_in_the_way_is_not_overwritten(tmp_path: Path):
    saved = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    saved.mkdir(parents=True)
    (saved / "simpo.json").touch()  # the last that is written into it
    (saved.parent / "checkpoint-6").mkdir()
    with pytest.raises(ValueError, match="already holds a run \\(checkpoint at step 4\\)"):
        find_checkpoint(recipe_of(tmp_path), TRAINERS)
    assert find_checkpoint(recipe_of(tmp_path, resume_from_checkpoint=True), TRAINERS).folder == saved
    with pytest.raises(ValueError, match=r"no complete checkpoint at .*elsewhere; in .* there is: checkpoint-4"):
        find_checkpoint(recipe_of(tmp_path, resume_from_checkpoint=str(tmp_path / "elsewhere")), TRAINERS)


@pytest.mark.parametrize("name", ["deepspeed_zero2", "deepspeed_zero3", "fsdp2", "multi_gpu"])
def test_shipped_configurations_are_what_accelerate_reads(name: str):
    from accelerate.commands.config.config_args import ClusterConfig

    path = REPO / "recipes" / "accelerate" / f"{name}.yaml"
    read = ClusterConfig.from_yaml_file(str(path))  # refuses unknown keys
    assert read.mixed_precision == "no", "precision is the recipe's"
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["num_processes"] == 8


@pytest.mark.parametrize("name", ["deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_over_two_machines_is_one_torchrun(name: str, monkeypatch: pytest.MonkeyPatch):
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    line = re.search(r"accelerate launch [^`]*?deepspeed_zero3[^`]*--num_machines 2[^`]*", SCALING)[0]
    words = line.replace("\\\n", " ").replace("zero3", name[-5:]).replace("$RANK", "1").split()[2:]
    words[words.index("--config_file") + 1] = str(REPO / words[words.index("--config_file") + 1])
    found: list[Any] = []
    monkeypatch.setattr(launch, "deepspeed_launcher", found.append)
    launch.launch_command(launch.launch_command_parser().parse_args(words))
    (args,) = found
    command, _ = prepare_deepspeed_cmd_env(args)
    assert command is None, "not deepspeed's own launcher, which without a hostfile starts local processes alone"
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "HOST:29500")


# --- the documentation -----------------------------------------------------------------------------------------------

PAGE = (REPO / "docs" / "hugging_face.md").read_text(encoding="utf-8")


def test_python_in_the_documentation_uses_names_that_exist():

    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    blocks += ["".join(re.findall(r"^\+(from .*\n)", part, flags=re.M)) for part in PAGE.split("```diff")[1:]]
    assert len(blocks) == 4
    fields = {field.name for field in dataclasses.fields(SimPOConfig)}
    for block in blocks:
        compile(block, "hugging_face.md", "exec")
        for names in re.findall(r"from simpo\.hosts\.hf import (.*)", block):
            assert all(hasattr(hf, name.strip()) for name in names.split(","))
    for call in re.findall(r"SimPOConfig\((.*)\)", PAGE):
        assert set(re.findall(r"(\w+)=", call)) <= fields


def test_names_in_the_tables_of_the_documentation_are_fields_or_keys():
    fields = {field.name for field in dataclasses.fields(SimPOConfig)} | {*KEYS}
    elsewhere = {"tokenizer", "processing_class", "model_init_kwargs", "nll_loss", "sft_loss", "use_flash_attention_2"}
    elsewhere |= {"compute_metrics", "logits", "accelerate", "H4ArgumentParser", "cpo_hinge", "on_evaluate", "simpo"}
    elsewhere |= {"cpo", "multi_gpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2", "sigmoid", "hinge", "ipo"}
    for line in PAGE.splitlines():
        if line.startswith("| ") and "|---" not in line:
            for name in re.findall(r'`"?(\w+)', line):
                assert name in fields | elsewhere, name


def test_what_the_trainer_cannot_take_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"auto_find_batch_size: micro-batches are planned .* max_tokens_per"):
        config(use_cpu=True, auto_find_batch_size=True)
    with pytest.raises(ValueError, match="ignore_data_skip: a resumed run goes on with"):
        config(use_cpu=True, ignore_data_skip=True)
    with pytest.raises(ValueError, match="args: a SimPOConfig is needed, not TrainingArguments"):
        check_arguments(TrainingArguments(use_cpu=True), {})
    with pytest.raises(ValueError, match="compute_loss_func: not taken by this trainer: the loss is loss_type"):
        check_arguments(config(use_cpu=True), {"callbacks": [], "compute_loss_func": print})
    check_arguments(config(use_cpu=True), {"callbacks": [], "compute_loss_func": None})


def test_a_model_of_no_name_needs_its_tokenizer_given() -> None:
    for model in (None, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="processing_class: this model has no name_or_path"):
            tokenizer_of(model, config(use_cpu=True).to_recipe())


def test_answers_are_refused_by_name_under_fsdp(tmp_path: Path):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2))
    accelerator = SimpleNamespace(state=state, mixed_precision="no")
    check_launch(accelerator, recipe_of(tmp_path))
    with pytest.raises(ValueError, match=r"^num_eval_generations = 4: not under accelerate's FSDP"):
        check_launch(accelerator, recipe_of(tmp_path, num_eval_generations=4))


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_what_shares_pairs_between_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """Every process trains on the pairs that the plan deals it."""
    refusal = pytest.raises(ValueError, match=rf"^parallelism_config: {name} = 2: not with this .* with tp or cp$")
    with refusal:
        config(use_cpu=True, parallelism_config=ParallelismConfig(**{name: 2}))
    config(use_cpu=True, parallelism_config=ParallelismConfig(dp_replicate_size=2, dp_shard_size=2))
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")  # as accelerate launch says it
    with refusal:
        check_launch(
            SimpleNamespace(state=SimpleNamespace(parallelism_config=ParallelismConfig())), recipe_of(tmp_path)
        )


def test_what_shares_pairs_under_deepspeed_is_refused(tmp_path: Path):
    for given, name in (
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel: autotp_size"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
    ):
        plugin = SimpleNamespace(zero_stage=1, deepspeed_config=given)
        with pytest.raises(ValueError, match=f"^{name} = 2: not with this trainer"):
            check_launch(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)), recipe_of(tmp_path))
    plugin = SimpleNamespace(zero_stage=1, deepspeed_config={"tensor_parallel": {"autotp_size": 0}})
    check_launch(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)), recipe_of(tmp_path))


def test_a_model_that_was_loaded_over_several_processes_is_refused():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    model._tp_size = 2  # as from_pretrained with a tp_plan leaves it
    with pytest.raises(ValueError, match=r"^model: tp_size = 2: not with this trainer"):
        make_ready(model, config(use_cpu=True).to_recipe(), device=torch.device("cpu"))
