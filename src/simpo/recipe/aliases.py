"""Names that other programs give to keys: aliases of ours, and names that mean nothing here but are not mistakes.

Tables, read by `recipe.load`. Imports nothing but the standard library. Sources of the names: transformers'
TrainingArguments, the alignment-handbook, the SimPO authors' trainer, TRL (DPO, CPO, ORPO, model and script
arguments), Megatron-Core and MindSpeed-LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

UNSET = object()
"""What a conversion returns when the value asks for nothing."""


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of one of our keys."""

    target: str  # our key, or an input key
    # the value under our key, or UNSET, where the other program counts or spells differently; raises ValueError for a
    # value that has no equal here
    convert: Callable[[Any], Any] | None = None
    is_switch: bool = False  # whether it is true or false
    # whether it gives way, with a notice, where our own key is given too; else that is a contradiction
    yields: bool = False
    notice: str = ""  # printed when the alias is used, with {value}; "" for a plain renaming
    unset: str = "not used here (it changes nothing)"  # printed when the value asks for nothing


def _switch(target: str, when_true: str) -> Alias:
    """An alias whose true stands for a value of our key, and whose false asks for nothing."""

    def convert(value: Any) -> Any:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return when_true if value else UNSET

    return Alias(target, convert, is_switch=True)


def _master_dtype(value: Any) -> Any:
    names = {"auto": "float32", "float32": "float32", "fp32": "float32", "torch.float32": "float32"}
    names |= {"bfloat16": UNSET, "bf16": UNSET, "torch.bfloat16": UNSET}
    if not isinstance(value, str) or value not in names:
        raise ValueError(
            "must be float32, bfloat16, auto or null; float16 weights are not supported "
            "(bf16: true computes in bfloat16)"
        )
    return names[value]


def _no_evaluation(value: Any) -> Any:
    """Megatron's eval_iters: 0 batches evaluates nothing; other counts ask for nothing, since all pairs are used."""
    return "no" if value == 0 and not isinstance(value, bool) else UNSET


def _mixture(value: Any) -> Any:
    """The alignment-handbook's dataset_mixture as entries of dataset_mixer; a name that comes twice gets a number."""
    datasets = value.get("datasets") if isinstance(value, Mapping) else None
    if not isinstance(datasets, list) or not all(isinstance(each, Mapping) and each.get("id") for each in datasets):
        raise ValueError("a mapping with datasets: [{id: NAME, ...}, ...] is needed")
    if unknown := [str(name) for name in value if name not in ("datasets", "seed", "test_split_size")]:
        raise ValueError(f"{unknown[0]} is not known here; it may hold datasets, seed and test_split_size")
    mixer: dict[str, dict[str, Any]] = {}
    for each in datasets:
        ours = {"id": "path", "weight": "fraction"}
        name, times = str(each["id"]), [other["id"] for other in datasets].count(each["id"])
        if times > 1:
            name = next(label for label in (f"{name} {number}" for number in range(1, times + 1)) if label not in mixer)
        settings = {ours.get(str(key), str(key)): given for key, given in each.items()}
        mixer[name] = {key: given for key, given in settings.items() if (key, given) != ("path", name)}
    return mixer


def _datasets(value: Any) -> Any:
    """TRL's list of datasets, whose name is a configuration's."""
    if not isinstance(value, list) or not all(isinstance(each, Mapping) and each.get("path") for each in value):
        raise ValueError("a list of {path: NAME, ...} is needed")
    names = {"path": "id", "name": "config"}
    return _mixture({"datasets": [{names.get(str(key), key): given for key, given in each.items()} for each in value]})


def _held_out_share(value: Any) -> Any:
    """Megatron's split, "95,5,0": the shares of training, validation and test."""
    try:
        parts = [float(part) for part in str(value).strip("[]").split(",")]
        return round(1 - parts[0] / sum(parts), 6)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError("must be shares such as 95,5,0; see validation_fraction and dataset_splits") from None


BF16_MASTERS_NOTICE = (
    "fp32 master weights are kept: at small learning rates bf16 weights do not move; "
    "set master_dtype: bfloat16 to insist (with optim: adamw_bf16 they do move)"
)

ALIASES: dict[str, Alias] = {
    # transformers, older and newer spellings
    "evaluation_strategy": Alias("eval_strategy"),
    "dtype": Alias("master_dtype", _master_dtype, yields=True, unset=BF16_MASTERS_NOTICE),
    "torch_dtype": Alias("master_dtype", _master_dtype, yields=True, unset=BF16_MASTERS_NOTICE),
    "use_flash_attention_2": _switch("attn_implementation", "flash_attention_2"),
    "activation_checkpointing": Alias("gradient_checkpointing"),
    "activation_checkpointing_kwargs": Alias("gradient_checkpointing_kwargs"),
    "activation_offloading": Alias("activation_offload"),
    "use_liger": Alias("use_liger_kernel"),
    "push_to_hub_model_id": Alias("hub_model_id"),
    "push_to_hub_token": Alias("hub_token"),
    "no_cuda": _switch("device", "cpu"),
    "use_cpu": _switch("device", "cpu"),
    # TRL and the alignment-handbook
    "dataset_num_proc": Alias("preprocessing_num_workers"),
    "dataset_config_name": Alias("dataset_config"),
    "use_bnb_nested_quant": Alias("bnb_4bit_use_double_quant"),
    "dataset_mixture": Alias("dataset_mixer", _mixture, notice="seed chooses the rows, as for every recipe"),
    "test_split_size": Alias("validation_fraction", yields=True),
    "datasets": Alias("dataset_mixer", _datasets),
    "cpo_alpha": Alias("sft_weight"),
    "use_weighting": Alias("wpo_weights"),
    "simpo_gamma": Alias("gamma"),
    "ref_model": Alias("ref_model_name_or_path"),
    # Megatron-style SimPO trainers
    "simpo_beta": Alias("beta"),
    "simpo_loss_type": Alias("loss_type"),
    "simpo_label_smoothing": Alias("label_smoothing"),
    "simpo_gamma_beta_ratio": Alias("gamma_beta_ratio"),
    "pref_ftx": Alias("sft_weight"),
    "micro_batch_size": Alias("per_device_train_batch_size"),
    "lr": Alias("learning_rate"),
    "lr_decay_style": Alias("lr_scheduler_type"),
    "lr_warmup_fraction": Alias("warmup_ratio"),
    "lr_warmup_iters": Alias("warmup_steps"),
    "tensor_model_parallel_size": Alias("tp"),
    "context_parallel_size": Alias("cp"),
    "clip_grad": Alias("max_grad_norm"),
    "adam_eps": Alias("adam_epsilon"),
    "seq_length": Alias("max_length"),
    "train_iters": Alias("max_steps"),
    "save_interval": Alias("save_steps"),
    "eval_interval": Alias("eval_steps"),
    "log_interval": Alias("logging_steps"),
    "tensorboard_dir": Alias("logging_dir"),
    "eval_iters": Alias("eval_strategy", _no_evaluation, yields=True),
    "split": Alias("validation_fraction", _held_out_share, yields=True),
    "load": Alias("model_name_or_path", yields=True, notice="{value} must be in Hugging Face format"),
    "save": Alias("output_dir", yields=True),
    "data_path": Alias(
        "dataset_name",
        yields=True,
        notice="{value} must be a file, folder or dataset of pairs, not a Megatron index",
    ),
}
"""Other name -> our key."""

INPUT_KEYS: dict[str, tuple[str, str]] = {
    "gamma": (
        "gamma_beta_ratio",
        "Target reward margin of the paper; becomes gamma_beta_ratio = gamma / beta.",
    ),
    "global_batch_size": (
        "gradient_accumulation_steps",
        "Pairs in one optimizer step over all processes; becomes gradient_accumulation_steps = "
        "global_batch_size / (per_device_train_batch_size x processes), which must be whole.",
    ),
    "lr_scheduler_kwargs": (
        "min_lr",
        "Of lr_scheduler_type: cosine_with_min_lr (transformers), which is cosine with min_lr: min_lr, or "
        "min_lr_rate, a share of learning_rate.",
    ),
    "dataset_name": ("dataset_mixer", "One dataset, all of it; the same as dataset_mixer: {NAME: 1.0}."),
    "dataset_config": ("dataset_configs", "Configuration name of the one dataset."),
    "dataset_train_split": ("dataset_splits", "Name of the training split (TRL)."),
    "dataset_test_split": ("dataset_splits", "Name of the evaluation split (TRL)."),
}
"""Keys accepted on input and resolved into another: key -> (the key it becomes, meaning). Never both of a pair."""


_MEANINGLESS: Mapping[str, str] = {
    "the model is uploaded once, when it is complete": "hub_strategy hub_always_push",
    "batches are planned ahead": (
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order group_by_length length_column_name "
        "remove_unused_columns label_names auto_find_batch_size accelerator_config split_batches dispatch_batches "
        "even_batches num_workers dataloader_type data_cache_path data_impl mmap_bin_files variable_seq_lengths "
        "pad_to_multiple_of reset_position_ids reset_attention_mask no_create_attention_mask_in_dataloader "
        "create_attention_mask_in_dataloader"
    ),
    "the layout is dp_replicate, dp_shard, cp and tp": (
        "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap deepspeed parallelism_config "
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend local_rank "
        "local_process_index pipeline_model_parallel_size context_parallel_algo cp_attention_mask_type "
        "virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage expert_model_parallel_size "
        "sequence_parallel use_distributed_optimizer overlap_grad_reduce overlap_param_gather "
        "overlap_p2p_communication distributed_backend distributed_timeout_minutes use_cp_send_recv_overlap "
        "ulysses_degree_in_cp noop_layers use_torch_fsdp2 data_parallel_size rank world_size master_addr "
        "master_port nnodes node_rank nproc_per_node tp_comm_overlap num_distributed_optimizer_instances "
        "model_parallel ignore_bias_buffers"
    ),
    "read from the model's own configuration": (
        "num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups kv_channels "
        "max_position_embeddings make_vocab_size_divisible_by padded_vocab_size vocab_size rotary_base rotary_percent "
        "rotary_seq_len_interpolation_factor position_embedding_type use_rotary_position_embeddings normalization "
        "norm_epsilon layernorm_epsilon swiglu untie_embeddings_and_output_weights disable_bias_linear add_qkv_bias "
        "add_bias_linear qk_layernorm init_method_std initial_loss_scale rope_scaling_type rope_scaling_factor "
        "low_freq_factor high_freq_factor original_max_position_embeddings tokenizer_type tokenizer_model "
        "tokenizer_not_use_fast tokenizer_padding_side tokenizer_kwargs vocab_file merge_file use_mcore_models spec "
        "transformer_impl num_experts moe_router_topk window_size sliding_window apply_query_key_layer_scaling "
        "base_model_attribute_name"
    ),
    "precision is set by bf16 and master_dtype": (
        "fp16_full_eval bf16_full_eval fp16_opt_level half_precision_backend fp16_backend attention_softmax_in_fp32 "
        "accumulate_allreduce_grads_in_fp32 reuse_fp32_param loss_scale fp32_residual_connection main_grads_dtype "
        "main_params_dtype bnb_4bit_quant_storage bnb_4bit_compute_dtype"
    ),
    "kernels are chosen here": (
        "torch_compile_backend torch_compile_mode liger_kernel_config jit_mode_eval use_ipex use_flash_attn "
        "no_masked_softmax_fusion no_bias_gelu_fusion no_bias_swiglu_fusion no_rope_fusion use_fused_rmsnorm "
        "use_fused_swiglu use_fused_rotary_pos_emb use_fused_mlp gradient_accumulation_fusion "
        "no_gradient_accumulation_fusion use_mc2 attention_backend swap_attention padding_free use_unsloth unsloth "
        "use_reentrant_gc torch_empty_cache_steps manual_gc manual_gc_interval cross_entropy_loss_fusion "
        "transformer_engine enable_recompute_layers_per_pp_rank lora_fusion"
    ),
    "see logging_steps and report_to": (
        "logging_strategy logging_first_step log_level log_level_replica log_on_each_node disable_tqdm "
        "logging_nan_inf_filter include_num_input_tokens_seen include_tokens_per_second include_for_metrics "
        "include_inputs_for_metrics log_throughput log_params_norm log_num_zeros_in_grad log_timers_to_tensorboard "
        "timing_log_level tensorboard_log_interval tensorboard_queue_size skip_memory_metrics debug project "
        "trackio_space_id trackio_bucket_id trackio_static_space_id wandb_project wandb_entity wandb_run_group "
        "wandb_log_unique_prompts use_wandb wandb_exp_name wandb_save_dir profile log_completions"
    ),
    "no other way here": (
        "ignore_data_skip restore_callback_states_from_checkpoint past_index mp_parameters ray_scope "
        "use_cache eval_do_concat_batches eval_use_gather_object eval_accumulation_steps batch_eval_metrics "
        "prediction_loss_only eval_delay save_on_each_node save_only_model save_safetensors enable_jit_checkpoint "
        "average_tokens_across_devices use_legacy_prediction_loop "
        "use_mps_device tpu_num_cores no_load_optim no_load_rng no_save_optim no_save_rng finetune use_checkpoint_args "
        "exit_on_missing_checkpoint ckpt_format override_opt_param_scheduler use_tpu lora_modules_scaling eval_packing"
    ),
    "log in with `hf auth login`, or set HF_TOKEN": "use_auth_token token",
    "the command says what is done": "do_train do_predict",
    "no run is overwritten: resume it, or choose another output_dir": "overwrite_output_dir",
    "set eval_strategy or eval_steps": "do_eval",
    "see eval_on_start": "initial_eval",
    "set num_eval_generations to the number of answers to sample": "generate_during_eval",
    "responses have no limit of their own; see max_length": "max_completion_length max_target_length",
    "prompts are cut left, responses right; see overlong": "truncation_mode truncation_side cut_max_seqlen",
    "nothing is padded": (
        "label_pad_token_id padding_value pad_token padding_side pad_to_max_length no_pad_to_seq_lengths"
    ),
    "one adapter": "model_adapter_name",
    "always done, once, for the losses that need it": "precompute_ref_log_probs",
    "see per_device_eval_batch_size": "precompute_ref_batch_size",
    "only other losses read it": "discopop_tau f_alpha_divergence_coef ref_model_mixup_alpha ref_model_sync_steps",
    "see loss_type": "force_use_ref_model",
    "always so: only response tokens reach the vocabulary projection": "use_logits_to_keep use_num_logits_to_keep",
    "see use_peft and load_in_4bit": "qlora_save_dequantize",
    "data is read whole, so that its audit is complete": "dataset_streaming",
    "data is always pairs": "is_pairwise_dataset is_instruction_dataset",
    "the tokenizer's chat template is used; see chat_template": "prompt_type prompt_type_path",
    "see cache_dir": "tokenized_path",
    "see max_length": "decoder_seq_length encoder_seq_length",
    "see pack": "pack_samples packing",
    "see gradient_checkpointing": (
        "recompute_granularity recompute_method recompute_num_layers recompute_activations recompute_norm "
        "recompute_activation_function"
    ),
}

_LOSSES_OF_TRL = {name: "'cpo' for TRL's sigmoid" for name in (None, "sigmoid")}
_LOSSES_OF_TRL |= {"hinge": "'cpo_hinge' for TRL's hinge", "ipo": "gamma_beta_ratio 0 beside 'ipo' for TRL's ipo"}


def check_loss_of_trl(loss: Any, name: str, *, ratio: Any) -> None:
    """Raise ValueError for a loss_type, None for TRL's default, that means another loss beside a key of TRL alone.

    Args:
        name: the key of TRL's CPOConfig that is given.
        ratio: gamma_beta_ratio; at 0, ipo is TRL's.
    """
    if isinstance(loss, str | None) and loss in _LOSSES_OF_TRL and not (loss == "ipo" and ratio == 0):
        shown = "its default, sigmoid" if loss is None else repr(loss)
        raise ValueError(
            f"loss_type = {shown}, with {name} of TRL's CPOConfig: there it names a CPO loss, here one of SimPO; "
            f"write loss_type 'simpo' for SimPO, {_LOSSES_OF_TRL[loss]}, or drop {name}"
        )


_REFUSED: Mapping[str, str] = {
    "float16 is not supported; use bf16: true, or bf16: false for float32": "fp16",
    "8-bit numbers are not supported; bf16: true computes in bfloat16": "fp8_format",
    "8-bit bases are not supported; use load_in_4bit: true with use_peft: true": "load_in_8bit",
    "write use_peft: true and load_in_4bit: true": "qlora",
    "encoder-decoder models are not supported": "is_encoder_decoder",
    "no weights are offloaded here; accelerate launch with DeepSpeed ZeRO-3 and offload_param_device: cpu does it": (
        "fsdp_cpu_offload"
    ),
    "only simpo; for other losses set loss_type": "stage",
    "that smooths token labels; for noisy preferences use label_smoothing": "label_smoothing_factor",
    "set label_smoothing": "dpo_label_smoothing",
    "set beta, with loss_type: dpo": "dpo_beta",
    "set loss_type": "dpo_loss_type",
    "its noise is scaled by the length of a padded row, so that the update would depend on how pairs are batched; "
    "remove it": "neftune_noise_alpha",
    "write it as sft_weight, with sft_reduction: tokens for TRL's mean over a batch's tokens": "rpo_alpha",
    "write sft_weight": "dpo_ftx",
    "write loss_type: alphapo with alphapo_alpha": "alpha",
    "the loss is without it; `simpo losses` lists what there is": (
        "ld_alpha f_divergence_type reference_free loss_weights"
    ),
    "the reference stays as it was before training": "sync_ref_model refer_model_iter ref_adapter_name",
    "set adam_beta1, adam_beta2 and adam_epsilon": "optim_args",
    "every trainable weight is optimised alike": "optim_target_modules",
    "the optimizer is AdamW; see optim": "optimizer",
    "the decay ends with the last step, max_steps": "lr_decay_iters",
    "the warm-up starts at 0": "lr_warmup_init",
    "set warmup_ratio or warmup_steps": "lr_warmup_samples",
    "set num_train_epochs or max_steps": "epochs train_samples",
    "the batch size is constant": "rampup_batch_size",
    "every pair is trained on, the last ones in a smaller step": "dataloader_drop_last",
    "one seed decides the order of the pairs too: set seed": "data_seed",
    "pairs are shuffled by seed": "no_shuffle train_sampling_strategy",
    "the end of a turn is trained as part of its answer": "eod_mask_loss",
    "the chat template ends a turn; see chat_template": "eos_token",
    "only answers are trained on; see train_on": "assistant_only_loss",
    "only adapters have dropout here, lora_dropout; see disable_dropout for the model's own": (
        "hidden_dropout attention_dropout"
    ),
    "write its entries as keys: model_revision, trust_remote_code, attn_implementation, master_dtype": (
        "model_init_kwargs ref_model_init_kwargs"
    ),
    "set model_revision": "base_model_revision model_code_revision",
    "the model is uploaded to the branch main": "hub_revision hub_model_revision",
    "write hub_model_id: ORGANIZATION/NAME": "push_to_hub_organization",
    "only causal language models are trained": "lora_task_type",
    "name the wanted modules in lora_target_modules: `layers.3.self_attn.q_proj` is one of layer 3": (
        "layers_to_transform layers_pattern exclude_modules"
    ),
    "adapters are of whole linear layers; see lora_target_modules": "lora_target_parameters",
    "every adapter has lora_r, lora_alpha and no bias": "rank_pattern alpha_pattern lora_bias",
    "adapters begin as peft draws them, and the base as it is": "init_lora_weights loftq_config pissa_init",
    "merge the adapter into its base first, and train from that": "lora_load adapter_name_or_path",
    "the magnitudes are not quantised; see use_dora": "use_dora_quant",
    "set prompt_column, chosen_column and rejected_column": "text_column",
    "set max_train_samples": "max_samples",
    "name the pairs in dataset_name or dataset_mixer": "train_data_path valid_data_path",
}

_ASKS_NOTHING = (None, False, 0, "", "null", "none", [], {})
_IS_DONE_HERE: Mapping[str, tuple[Any, ...]] = {
    "stage": ("simpo",),
    "optimizer": ("adam", "adamw"),
    "lora_task_type": ("CAUSAL_LM",),
    "init_lora_weights": (True,),
    "f_divergence_type": ("reverse_kl",),
    "loss_weights": (1, [1]),
    "refer_model_iter": (1,),
    "train_sampling_strategy": ("random", "group_by_length"),
    "text_column": ("text",),
    **dict.fromkeys(("model_code_revision", "base_model_revision", "hub_revision", "hub_model_revision"), ("main",)),
}


def _by_name(table: Mapping[str, str]) -> dict[str, str]:
    return {name: hint for hint, names in table.items() for name in names.split()}


REFUSED: dict[str, str] = _by_name(_REFUSED)
"""Names of settings that change what is trained or where it goes, and are not supported -> what to do instead."""

KNOWN_ELSEWHERE: dict[str, str] = _by_name(_MEANINGLESS) | REFUSED
"""Names that are known and are not ours -> why they mean nothing here, or what to do instead."""


def refusal(name: str, value: Any) -> str | None:
    """Why this value of a setting cannot be honoured; None where it asks for nothing, or for what is done anyway."""
    return None if name not in REFUSED or _asks_nothing(name, value) else REFUSED[name]


def _asks_nothing(name: str, value: Any) -> bool:
    return value in _ASKS_NOTHING or value in _IS_DONE_HERE.get(name, ())


_SIGNS: Mapping[str, tuple[str, str]] = {
    "an SFT": (
        "max_seq_length packing dataset_text_field completion_only_loss assistant_only_loss text_column "
        "packing_strategy eval_packing train_on_prompt",
        "sft pt",
    ),
    "a reward model's": ("center_rewards_coefficient", "rm"),
    "a GRPO": (
        "num_generations reward_funcs reward_weights use_vllm num_iterations epsilon_high scale_rewards "
        "generation_batch_size steps_per_generation mask_truncated_completions",
        "grpo ppo",
    ),
    "a KTO": ("desirable_weight undesirable_weight", "kto"),
    "a DPO": (
        "precompute_ref_log_probs precompute_ref_batch_size reference_free sync_ref_model f_divergence_type rpo_alpha "
        "ld_alpha dpo_beta dpo_loss_type dpo_ftx use_weighting discopop_tau force_use_ref_model",
        "dpo",
    ),
}


def recognise(given: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Which other training a recipe looks like, "an SFT" say, and by which of its keys; ("", []) where it does not.

    Args:
        given: names as they were written, with underscores, and values.
    """
    asked = [name for name, value in given.items() if not _asks_nothing(name, value)]
    for kind, (names, stages) in _SIGNS.items():
        signs = [name for name in asked if name in names.split()]
        signs += ["stage"] if str(given.get("stage", "")).lower() in stages.split() else []
        splits = given.get("dataset_splits")
        if kind == "an SFT" and isinstance(splits, list):
            signs += [f"dataset_splits {name}" for name in splits if str(name).endswith("_sft")][:1]
        if signs:
            return kind, signs
    return "", []
