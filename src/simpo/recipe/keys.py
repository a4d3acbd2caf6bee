"""The keys of a recipe: each with its type, range, meaning, default and flags, and the checks between them.

A key is declared once, in `Recipe`: what is written there is what `simpo keys` prints, what a value is checked
against, and what resuming, the store of prepared data and each host read. The keys that one loss alone reads are
declared with it in `core.losses`. How files, other programs' names and overrides become a recipe is in `recipe.load`.
Longer than most files because it is mostly documentation. Must not import torch, transformers or datasets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, create_model, model_validator

from simpo.core.losses import LOSSES, Loss, loss_keys, losses_reading
from simpo.core.optimizers import OPTIMIZERS
from simpo.recipe.aliases import ALIASES, INPUT_KEYS
from simpo.recipe.checks import METRICS, resolve
from simpo.recipe.declare import Key, declared_key, in_section
from simpo.recipe.stages import STAGES, Clean, Generate, Judge, Pair, Rounds, Score
from simpo.recipe.values import (
    GUARD_CHECKS,
    OWN_KEYS,
    Number,
    PathText,
    RenderedText,
    Steps,
    Strategy,
    Text,
    Tracker,
    TrainOn,
    Whole,
    Words,
    as_guard,
    as_lora_targets,
    as_loss,
    as_mixture,
    as_optimizer,
    as_resume,
    as_settings,
    as_trackers,
    as_words,
)
from simpo.recipe.yaml import dump_yaml

SECTIONS = (
    "model",
    "data",
    "loss",
    "packing",
    "optimisation",
    "lora",
    "parallel",
    "evaluation",
    "saving",
    "run",
    "stages",
)

_model, _optimisation, _parallel, _evaluation, _saving, _run = map(
    in_section, ("model", "optimisation", "parallel", "evaluation", "saving", "run")
)
_data = in_section("data", decides_tokens=True, hf="field")  # prepared alike for every host
_loss, _packing, _lora = in_section("loss", hf="field"), in_section("packing", hf="field"), in_section("lora", hf="run")
_stage = in_section("stages", hf="run", may_change=True, derived="each of its keys has one")


def _by_loss(values: Mapping[str, float]) -> str:
    """A default that the loss decides, in words: "2.0; 0.1 for cpo and dpo"."""
    by_value: dict[float, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    first, *others = sorted(by_value, key=lambda value: -len(by_value[value]))
    named = (" and ".join(", ".join(by_value[value]).rsplit(", ", 1)) for value in others)
    return "; ".join([str(first), *(f"{value} for {names}" for value, names in zip(others, named, strict=True))])


def _default_by_loss(key: str) -> str:
    return _by_loss({name: LOSSES[name].defaults[key] for name in losses_reading(key)})


def _own_keys() -> dict[str, Any]:
    """Fields for the keys that one loss alone reads, as they are declared with it."""
    kinds = {bool: bool, int: Whole, float: Number, str: Text}
    fields: dict[str, Any] = {}
    for loss in LOSSES.values():
        for name, key in loss.own_keys.items():
            default = loss.defaults[name]
            rest = {"only": loss.name, "megatron": name if isinstance(default, float) else "", **key.bounds}
            fields[name] = (kinds[type(default)], _loss(default, key.meaning, **rest))
    return fields


_LossKeys = create_model("_LossKeys", **_own_keys())


class Recipe(_LossKeys):
    """A complete, resolved, read-only recipe; `simpo.recipe.load_recipe` makes one from any accepted spelling.

    After construction every derived default is filled in: `beta`, `gamma_beta_ratio` and `sft_weight` by the loss,
    `bf16`, `greater_is_better`, `max_prompt_length`. Two recipes are equal when their resolved values
    are. A loss that does not read `beta` or `gamma_beta_ratio` has them at 1 and 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    # fmt: off
    # -- model
    model_name_or_path: PathText = _model(
        ..., "The model to train: a local folder or a hub name.", "path or name", hf="run", shown=True)
    model_revision: Text | None = _model(
        None, "Branch, tag or commit of a hub model.", "text", null="main", hf="field")
    trust_remote_code: bool = _model(
        False, "Run code that comes with the model or dataset.", hf="field")
    tokenizer_name_or_path: PathText | None = _model(
        None, "Tokenizer, where it is not in the model's folder.", "path or name", null="the model's", hf="run")
    ref_model_name_or_path: PathText | None = _model(
        None, "Reference model of losses that need one (dpo, dpo_norm, r_dpo, or your own); no other loads it.",
        "path or name", null="the model to train, before training", hf="run")
    attn_implementation: Text | None = _model(
        None, "transformers' attention for padded batches; only with pack: false and share_prompt: false.",
        "null = packed attention of this package; eager, sdpa, flash_attention_2, ...", hf="field")
    attention_kernel: Literal["auto", "varlen", "flash3", "flash4", "flex", "matmul", "blocks"] = _model(
        "auto", "What computes packed attention. varlen: torch's FlashAttention; flash3, flash4: the same through "
        "FlashAttention-3 (flash_attn_interface, Hopper) or -4 (flash_attn.cute, Hopper and Blackwell); flex: "
        "FlexAttention, compiled; matmul: products in tiles, anywhere; blocks: torch's own, block by block. auto takes "
        "the fastest that works with this machine and model; kernels for a GPU are tried at start.",
        hf="field", may_change=True)
    master_dtype: Literal["float32", "bfloat16"] = _model(
        "float32", "Number format of the weights the optimizer changes. bfloat16 loses most updates at small "
        "learning rates, except with optim: adamw_bf16.", hf="field", shown=True)
    bf16: bool = _model(
        None, "Compute in bfloat16 (weights stay in master_dtype); false computes in float32 where master_dtype is.",
        derived="true", hf="shared", shown=True)
    tf32: bool | None = _model(
        None, "TensorFloat-32 matrix products where CUDA computes float32.", null="as torch is set", hf="run")
    # -- data
    dataset_mixer: Annotated[dict[str, float | dict[str, Any]], BeforeValidator(as_mixture)] = _data(
        {}, "Datasets and the fraction of each: local files, folders or hub names. A fraction is taken after a seeded "
        "shuffle; over 1 repeats rows. In place of a fraction {fraction, config, split, columns, data_files, path}: a "
        "configuration, splits of its own (as dataset_splits), the columns to keep, files of a folder, a hub dataset, "
        "json, csv or parquet, and the dataset itself where the name is only a name. It may also say for itself, in "
        f"place of the recipe: {', '.join(OWN_KEYS)} (at most this many of its rows, a seeded choice after fraction).",
        "mapping of name to fraction > 0 or to settings",
        decides_tokens=False, hf="run", shown=True)  # the files themselves are, and their fractions
    dataset_splits: Words = _data(
        ["train", "test"], "Splits to read: the first to train on, the others to evaluate on unless they say `train`.",
        "list of names", hf="run", shown=True, min_length=1)
    dataset_configs: Annotated[list[str | None] | None, BeforeValidator(as_words)] = _data(
        None, "Configuration name of each dataset, in the mixer's order.", "list as long as dataset_mixer, or null",
        hf="run")
    validation_fraction: Number = _data(
        0.05, "Share of the training prompts held out when no evaluation split exists, before mixer fractions and "
        "max_train_samples; 0 holds out none.",
        hf="run", ge=0, lt=1)
    prompt_column: Text | None = _data(
        None, "Column of the prompt, when its name is not a usual one.", "column name", null="found")
    chosen_column: Text | None = _data(
        None, "Column of the chosen response, when its name is not a usual one.", "column name", null="found")
    rejected_column: Text | None = _data(
        None, "Column of the rejected response, when its name is not a usual one.", "column name", null="found")
    score_column: Text | None = _data(
        None, "Column of the score in rows of one answer each; of a prompt's answers the best is chosen, the worst "
        "rejected.", "column name", null="helpfulness or score")
    chat_template: PathText | None = _data(
        None, "Chat template that replaces the tokenizer's and is saved with the model: Jinja text, a file of it, a "
        "name that the tokenizer knows, or chatml (built in). none trains text rows without any, prompt and answer "
        "glued together.", "template", null="the tokenizer's; without one the run is refused",
        decides_tokens=False)  # the template that is used does, whichever it is
    rendered_text: RenderedText = _data(
        "auto", "Text rows that a chat template has rendered already: auto recognises them one by one (they begin as "
        "the template's prompts do, and end as its prompts or answers do) and keeps them; keep takes every text as it "
        "is; render puts every text into the template.")
    train_on: TrainOn = _data(
        "answer", "What is trained: the assistant's turns after the prompt, or those in it too (on both sides). Users' "
        "turns and tools' results never are.")
    keep_lists: bool = _data(
        None, "Keep every response of a scored list, not only the best and the worst; for losses of lists.",
        derived="true for losses of lists, else false")
    system_prompt: Text | None = _data(
        None, "System message for pairs that have none.", "text", null="none is added")
    auto_insert_empty_system_msg: bool = _data(
        False, "Add an empty system message to pairs that have none, if the template takes one.")
    max_length: Whole = _data(
        2048, "Longest prompt + response, in tokens.", shown=True, ge=2)
    max_prompt_length: Whole | None = _data(
        None, "How far, in tokens, a prompt is cut (on the left) in a pair that exceeds max_length.",
        "whole, >= 1 and < max_length", null="half of max_length",
        derived="1800, or half of max_length where that is 1800 or less", shown=True, ge=1)
    overlong: Literal["truncate", "drop", "error"] = _data(
        "truncate", "What happens to a pair that exceeds max_length; always counted in audit.json.")
    max_dropped_fraction: Number = _data(
        0.2, "Stop when a larger share of rows than this is unusable.", decides_tokens=False, ge=0, le=1)
    max_train_samples: Whole | None = _data(
        None, "At most this many training pairs, after the seeded shuffle.", null="all", ge=1)
    max_eval_samples: Whole | None = _data(
        None, "At most this many evaluation pairs.", null="all", ge=1)
    drop_duplicates: bool = _data(
        False, "Drop pairs that repeat an earlier one exactly.")
    clean: Annotated[Clean, Field(strict=False)] = _data(
        Clean(), "Pairs to drop that are usable but better left out; each filter is off unless asked for.",
        "mapping; see `simpo keys clean`", derived="each of its keys has one")
    preprocessing_num_workers: Whole | None = _data(
        None, "Processes that tokenise; never more than one for 2,000 rows.", null="one a core, at most 8",
        decides_tokens=False, may_change=True, ge=1)
    cache_dir: PathText | None = _data(
        None, "Folder of tokenised data.", "path", null="the user's cache", decides_tokens=False, may_change=True)
    # -- loss
    loss_type: Annotated[str, BeforeValidator(as_loss)] = _loss(
        "sigmoid", "The preference loss; `simpo losses` prints the equations. sigmoid (or simpo) is SimPO. "
        "module:function is a loss of your own, imported from the working directory or an installed package: it takes "
        "PairLogps and keyword-only options, and returns PairLoss or losses [P]. Options called beta, gamma_beta_ratio "
        "and label_smoothing are the keys of these names; loss_kwargs holds the others.",
        f"one of {', '.join(LOSSES)}; or module:function", megatron="simpo_loss_type", shown=True)
    loss_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(as_settings)] = _loss(
        None, "Options of a loss of your own (loss_type: module:function); the function's defaults fill in the rest.",
        "mapping of option to value, or null")
    beta: Number = _loss(
        None, "Reward scale: the reward is beta times the mean log-prob per token.",
        derived=_default_by_loss("beta"), megatron="simpo_beta", shown=True, gt=0)
    gamma_beta_ratio: Number = _loss(
        None, "Target margin gamma / beta, in nats per token: how much better chosen must be before a pair is "
        "satisfied. `gamma` may be given instead, never both.", derived=_default_by_loss("gamma_beta_ratio"),
        megatron="simpo_gamma_beta_ratio", shown=True, ge=0)
    label_smoothing: Number = _loss(
        0.0, "Assumed probability that a pair is labelled the wrong way round.",
        only=", ".join(losses_reading("label_smoothing")), megatron="simpo_label_smoothing", ge=0, lt=0.5)
    sft_weight: Number = _loss(
        None, "Weight of an added term: the chosen response's mean negative log-prob.",
        derived=_by_loss({name: loss.sft_weight for name, loss in LOSSES.items()}),
        megatron="pref_ftx", shown=True, ge=0)
    sft_reduction: Literal["pairs", "tokens"] = _loss(
        "pairs", "What the added term is a mean over: pairs (independent of batching) or the batch's tokens (as the "
        "SimPO authors' trainer).")
    wpo_weights: bool = _loss(
        False, "Multiply each pair's preference loss by how likely the model is to answer so itself, at most 1 (WPO).")
    reward_calibration: bool = _loss(
        False, "Scale the gradients of chosen and rejected to balance, so that chosen responses need not become less "
        "likely (RC); the losses stay what they are.", "true or false; true not with loss_type confpo")
    score_margin: Number | None = _loss(
        None, "Give each pair its own gamma: times its gap of scores over the mean gap of its data set, at least 0 and "
        "at most this. Every pair needs a score of chosen and of rejected.",
        "x >= 1; only losses that read gamma_beta_ratio", null="the same gamma for all", ge=1)
    router_aux_loss_coef: Number | None = _loss(
        None, "Weight of an added term for models with experts: each pair's load-balancing loss, what transformers "
        "computes for a padded batch of that pair alone.",
        "x >= 0; 0 = off; null = the model's own where its configuration has output_router_logits: true", ge=0)
    # -- packing
    pack: bool = _packing(
        True, "Lay pairs of a micro-batch end to end in one row instead of padding them.")
    share_prompt: bool = _packing(
        True, "Compute the common prefix of chosen and rejected once.")
    max_tokens_per_micro_batch: Whole | None = _packing(
        None, "Tokens after which a micro-batch is split, whatever its number of pairs; the update stays the same. A "
        "single process that runs out of memory in a step continues with half as many.",
        null="as many as fit into free memory when the run starts (no limit with pack: false)", may_change=True, ge=2)
    logits_chunk_size: Whole | None = _packing(
        None, "Response tokens whose vocabulary logits exist at one time; smaller needs less memory.",
        null="chosen by memory", may_change=True, ge=1)
    # -- optimisation
    per_device_train_batch_size: Whole = _optimisation(
        2, "Pairs in one micro-batch of one process; times gradient_accumulation_steps, in one optimizer step.",
        hf="shared", may_change=True, shown=True, ge=1)
    gradient_accumulation_steps: Whole = _optimisation(
        1, "Micro-batches in one optimizer step; more where its pairs exceed max_tokens_per_micro_batch.",
        hf="shared", may_change=True, shown=True, ge=1)
    num_train_epochs: Number = _optimisation(
        1.0, "Passes over the training pairs.", hf="shared", shown=True, gt=0)
    max_steps: Whole = _optimisation(
        -1, "Optimizer steps; overrides num_train_epochs.", "whole, >= 1; -1 = by epochs", hf="shared", ge=-1)
    learning_rate: Number = _optimisation(
        1e-6, "Peak learning rate. The critical setting: try 3e-7, 5e-7, 8e-7, 1e-6 for 7-8B models.",
        hf="shared", shown=True, ge=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = _optimisation(
        "cosine", "Shape of the learning rate after warm-up; cosine and linear end at min_lr. transformers' "
        "cosine_with_min_lr is cosine.", hf="argument", shown=True)
    min_lr: Number = _optimisation(
        0.0, "Learning rate at the end of the decay.", "0 <= x < learning_rate", hf="run", ge=0)
    warmup_ratio: Number = _optimisation(
        0.1, "Share of the steps over which the learning rate rises from 0.", hf="run", ge=0, le=1)
    warmup_steps: Whole = _optimisation(
        0, "Steps of warm-up; more than 0 overrides warmup_ratio.", hf="run", ge=0)
    optim: Annotated[str, BeforeValidator(as_optimizer)] = _optimisation(
        "adamw_torch_fused", "The optimizer; all compute AdamW. "
        f"{'; '.join(f'{name} {each.meaning}' for name, each in OPTIMIZERS.items() if each.meaning)}.",
        f"one of {', '.join(OPTIMIZERS)}", hf="argument")
    weight_decay: Number = _optimisation(
        0.0, "AdamW's decoupled weight decay; biases and norms are spared.", hf="shared", ge=0)
    adam_beta1: Number = _optimisation(
        0.9, "AdamW's decay of the first moment.", hf="argument", ge=0, lt=1)
    adam_beta2: Number = _optimisation(
        0.999, "AdamW's decay of the second moment.", hf="argument", ge=0, lt=1)
    adam_epsilon: Number = _optimisation(
        1e-8, "AdamW's term that keeps its division finite.", hf="argument", gt=0)
    max_grad_norm: Number = _optimisation(
        1.0, "Gradients are scaled down to this global norm.", "x >= 0; 0 = off", hf="shared", ge=0)
    gradient_checkpointing: bool = _optimisation(
        False, "Recompute activations in the backward pass: less memory, about a third more time.", hf="argument",
        may_change=True)
    gradient_checkpointing_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(as_settings)] = _optimisation(
        None, "Settings of gradient checkpointing; only use_reentrant: false is supported.", "mapping or null",
        hf="argument")
    activation_offload: bool = _optimisation(
        False, "Keep what the backward pass needs in CPU memory instead of the GPU's: less GPU memory, the same "
        "numbers, more time.", "true or false; true only on CUDA", may_change=True)
    optimizer_offload: bool = _optimisation(
        False, "Keep AdamW's moments in pinned CPU memory, 4 bytes a weight; each piece comes to the GPU for its "
        "update. The same numbers, more time.", "true or false; true only on CUDA with optim: adamw_bf16",
        may_change=True)
    torch_compile: bool = _optimisation(
        False, "Compile the transformer blocks with torch.compile: a slow first step, then fewer and larger kernels.",
        "true or false; true not with load_in_4bit")
    use_liger_kernel: bool = _optimisation(
        False, "Compute norms, rotary embeddings and gated MLPs by Liger's fused kernels (install simpo[liger]), for "
        "the architectures that it supports; head and loss stay simpo's. Without CUDA it has no effect, and says so.",
        "true or false; true not with torch_compile, nor with tp")
    disable_dropout: bool = _optimisation(
        True, "Set the model's dropout to 0.", hf="field")
    seed: Whole = _optimisation(
        42, "Seed of shuffles, splits, dropout, adapters and stochastic rounding.", "whole, 0 <= x < 2^32",
        decides_tokens=True, hf="shared", shown=True, ge=0, lt=2**32)
    full_determinism: bool = _optimisation(
        False, "Use torch's deterministic algorithms alone: runs and resumed runs are equal bit for bit on CUDA too, "
        "as on CPUs they are without it; slower.", hf="argument", may_change=True)
    # -- lora
    use_peft: bool = _lora(
        False, "Train LoRA adapters instead of all weights (install simpo[peft]).")
    lora_r: Whole = _lora(
        16, "Rank of the adapters.", ge=1)
    lora_alpha: Number = _lora(
        32.0, "Scale of the adapters: alpha / r multiplies them.", gt=0)
    lora_dropout: Number = _lora(
        0.05, "Dropout before the adapters; applied also with disable_dropout.", ge=0, lt=1)
    lora_target_modules: Annotated[list[str] | str, BeforeValidator(as_lora_targets)] = _lora(
        "all-linear", "Modules that get adapters.", "list of module names, or all-linear (all but the output head)")
    use_rslora: bool = _lora(
        False, "Scale the adapters by alpha / sqrt(r) instead of alpha / r.")
    use_dora: bool = _lora(
        False, "DoRA: train the magnitudes of the adapted weights besides; not with sharded weights.")
    lora_modules_to_save: Annotated[list[str] | None, BeforeValidator(as_words)] = _lora(
        None, "Modules trained whole besides the adapters.", "list of module names, or null")
    load_in_4bit: bool = _lora(
        False, "QLoRA: hold the frozen weights in 4 bits (install simpo[qlora]; needs use_peft).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _lora(
        "nf4", "4-bit number format.")
    bnb_4bit_use_double_quant: bool = _lora(
        False, "Quantise the quantisation constants too.")
    # -- parallel
    dp_replicate: Whole = _parallel(
        1, "Copies of the (sharded) model; each computes other pairs.", hf="launcher", may_change=True, ge=1)
    dp_shard: Whole | None = _parallel(
        None, "Processes over which weights, gradients and moments are sharded (FSDP2); each computes other pairs. "
        "With dp_replicate, HSDP; 1 with dp_replicate above 1 is DDP.",
        null="every process that dp_replicate, cp and tp leave", hf="launcher", may_change=True, ge=1)
    cp: Whole = _parallel(
        1, "Context parallel: processes that share each row's tokens. Must divide the attention heads of a tp rank.",
        may_change=True, ge=1)
    tp: Whole = _parallel(
        1, "Tensor parallel: processes that share each weight, the output head by vocabulary. Must divide the "
        "attention and the key-value heads.", may_change=True, ge=1)
    fsdp_param_dtype: Literal["float32", "bfloat16"] | None = _parallel(
        None, "Number format in which sharded blocks are gathered to compute; gradients are reduced in float32.",
        null="bfloat16 with bf16: true, else float32", hf="launcher")
    ddp_timeout: Whole = _parallel(
        1800, "Seconds after which a process that waits for another one gives up.",
        hf="argument", may_change=True, ge=1)
    # -- evaluation
    eval_strategy: Strategy | None = _evaluation(
        None, "When to evaluate on the evaluation split.", null="steps if eval_steps is given, else once at the end",
        hf="argument", may_change=True)
    eval_steps: Steps | None = _evaluation(
        None, "Optimizer steps from one evaluation to the next; between 0 and 1, a share of all steps.",
        "whole >= 1, or 0 < x < 1", null="logging_steps", hf="argument", may_change=True)
    eval_on_start: bool = _evaluation(
        False, "Evaluate once before the first step.", hf="argument", may_change=True)
    per_device_eval_batch_size: Whole = _evaluation(
        4, "Pairs in one evaluation batch of one process; also for reference log-probs.", hf="shared",
        may_change=True, ge=1)
    num_eval_generations: Whole = _evaluation(
        0, "Evaluation prompts whose answer is generated and written down at each evaluation.", hf="field",
        may_change=True, ge=0)
    eval_generation_max_new_tokens: Whole = _evaluation(
        128, "Longest generated answer, in tokens.", hf="field", may_change=True, ge=1)
    metric_for_best_model: Text = _evaluation(
        "eval_loss", "Metric that chooses the best checkpoint; `eval_` in front may be left out.",
        "one of " + ", ".join(METRICS), hf="argument")
    greater_is_better: bool = _evaluation(
        None, "Whether a larger metric is better.", derived="by the metric", hf="argument")
    early_stopping_patience: Whole | None = _evaluation(
        None, "Stop once metric_for_best_model has not improved in this many evaluations in a row.",
        null="train to the end", hf="run", may_change=True, ge=1)
    early_stopping_threshold: Number = _evaluation(
        0.0, "What the best value has to be surpassed by to count as improvement, for early_stopping_patience.",
        hf="run", may_change=True, ge=0)
    guard: Annotated[dict[str, str], BeforeValidator(as_guard)] = _evaluation(
        {"all": "warn"}, "What happens when training looks like a collapse, for all checks or for each: see "
        "docs/trouble.md. stop saves a checkpoint and exits with 4; back ends with the best checkpoint before it.",
        "off, say, warn, stop or back; or a mapping of " + ", ".join(GUARD_CHECKS) + " or all to them", derived="warn",
        hf="field", may_change=True)
    # -- saving
    output_dir: PathText | None = _saving(
        None, "Folder of the run; needed to train.", "path", hf="run", may_change=True, shown=True)
    save_strategy: Strategy = _saving(
        "steps", "When to save a checkpoint; the final model is always saved.", hf="argument", may_change=True)
    save_steps: Whole = _saving(
        500, "Optimizer steps from one checkpoint to the next.", hf="argument", may_change=True, ge=1)
    save_total_limit: Whole | None = _saving(
        None, "Checkpoints kept, newest first; the best is kept too.", null="all", hf="argument", may_change=True, ge=1)
    async_save: bool = _saving(
        False, "Write checkpoints in the background while training continues.", may_change=True)
    load_best_model_at_end: bool = _saving(
        False, "Save the best evaluation's weights as the final model; each that is the best so far gets a checkpoint.",
        hf="argument", may_change=True)
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _saving(
        "auto", "Number format of the final model's files. Small learning rates move weights by less than bfloat16 "
        "tells apart; float32 keeps all that was learnt.",
        "auto (that of the model's own checkpoint), float32, bfloat16 or float16", hf="field", may_change=True)
    resume_from_checkpoint: Annotated[bool | str | None, BeforeValidator(as_resume)] = _saving(
        None, "Continue a run: true for the newest checkpoint of output_dir, or a checkpoint's folder.",
        "true, path or null", hf="run", may_change=True)
    push_to_hub: bool = _saving(
        False, "Upload the final model to the hub once it is complete; the repository is created at start.",
        hf="run", may_change=True)
    hub_model_id: Text | None = _saving(
        None, "Repository that push_to_hub uploads to.", "NAME or ORGANIZATION/NAME", null="the folder's name",
        hf="run", may_change=True)
    hub_private_repo: bool | None = _saving(
        None, "Whether a repository that is created is private.", null="as the account's settings say", hf="run",
        may_change=True)
    hub_token: Text | None = _saving(
        None, "Access token for push_to_hub; never written down.", "text", null="of `hf auth login`, or HF_TOKEN",
        hf="run", may_change=True, secret=True)
    # -- run
    logging_steps: Whole = _run(
        1, "Optimizer steps from one line of metrics to the next; each line holds means over them.",
        hf="argument", may_change=True, ge=1)
    report_to: Annotated[list[Tracker], BeforeValidator(as_trackers)] = _run(
        [], "Trackers, in addition to metrics.jsonl (each installed on its own). A resumed run goes on in their runs.",
        f"list of {', '.join(get_args(Tracker))}; none", hf="run", may_change=True)
    run_name: Text | None = _run(
        None, "Name of the run in trackers.", "text", null="the folder's name", hf="argument", may_change=True)
    logging_dir: PathText | None = _run(
        None, "Folder of tensorboard's files.", "path", null="inside output_dir", hf="run", may_change=True)
    device: Literal["auto", "cpu", "cuda"] = _run(
        "auto", "Where to compute; auto is CUDA if there is one.", hf="run")
    num_threads: Whole | None = _run(
        None, "CPU threads of one process.", null="as torch is set", hf="run", may_change=True, ge=1)
    # -- stages
    generate: Annotated[Generate, Field(strict=False)] = _stage(
        Generate(), "How `simpo generate` samples responses.", "mapping; see `simpo keys generate`")
    score: Annotated[Score, Field(strict=False)] = _stage(
        Score(), "How `simpo score` rates responses.", "mapping; see `simpo keys score`")
    pair: Annotated[Pair, Field(strict=False)] = _stage(
        Pair(), "How `simpo pair` makes pairs of them.", "mapping; see `simpo keys pair`")
    rounds: Annotated[Rounds, Field(strict=False)] = _stage(
        Rounds(), "How often `simpo rounds` goes from prompts to a model.", "mapping; see `simpo keys rounds`")
    judge: Annotated[Judge, Field(strict=False)] = _stage(
        Judge(), "Which answers `simpo judge` compares, and by what.", "mapping; see `simpo keys judge`")
    # fmt: on

    _notices: tuple[str, ...] = PrivateAttr(())
    _global_batch_size: int | None = PrivateAttr(None)
    # Input keys that others were resolved with: what was given, and what that became.
    _relative: dict[str, tuple[Any, Any]] = PrivateAttr(default_factory=dict)
    _shared_by: int = PrivateAttr(1)

    @model_validator(mode="after")
    def _resolve(self) -> Recipe:
        self._notices = tuple(resolve(self))
        return self

    @property
    def notices(self) -> tuple[str, ...]:
        """One line for each thing accepted that has no effect or another effect than elsewhere."""
        return self._notices

    @property
    def global_batch_size(self) -> int | None:
        """Pairs in one optimizer step over all processes, where they were asked for; None elsewhere."""
        return self._global_batch_size

    @property
    def computes_in_bf16(self) -> bool:
        """Under autocast, or because the weights are in it."""
        return bool(self.bf16) or self.master_dtype == "bfloat16"

    @property
    def loss(self) -> Loss:
        """The chosen loss. One of the user's own is imported, and tried, when it is first asked for."""
        if self.loss_type in LOSSES:
            return LOSSES[self.loss_type]
        from simpo.core.own_loss import load_own_loss

        return load_own_loss(self.loss_type, json.dumps(self.loss_kwargs or {}, sort_keys=True))

    @property
    def loss_values(self) -> dict[str, Any]:
        """Keyword arguments of the loss."""
        own = self.loss_kwargs or {}
        return {name: own[name] if name in own else getattr(self, name) for name in self.loss.defaults}

    @property
    def extras(self) -> frozenset[str]:
        """What is to be known of responses besides their log-probs, see `core.losses.EXTRAS`."""
        return self.loss.extras | {"squares"} if self.wpo_weights or self.reward_calibration else self.loss.extras

    @property
    def unread_keys(self) -> frozenset[str]:
        """Loss keys that the chosen loss does not read."""
        return frozenset(loss_keys()) - (set(self.loss.defaults) - set(self.loss_kwargs or ()))

    @property
    def gamma(self) -> float:
        """Target reward margin of the paper, beta * gamma_beta_ratio."""
        return self.beta * self.gamma_beta_ratio

    def pairs_per_step(self, world: int = 1) -> int:
        """Pairs in one optimizer step over `world` data-parallel processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world

    def loss_at_zero_margin(self) -> float:
        """Predicted pair loss in nats when chosen and rejected are equally likely, without the added SFT term.

        For orpo the pair term only: see `loss.zero_margin_note`.
        """
        return self.loss.at_zero_margin(**self.loss_values)

    def describe_loss(self) -> str:
        """One line: the loss, the effective values of its keys, and the loss they predict at zero margin."""
        values, shown = self.loss_values, {"gamma_beta_ratio": "gamma/beta"}
        parts = [
            f"{shown.get(key, key)} {value:g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
            if (key, value) != ("label_smoothing", 0.0)
        ]
        if {"beta", "gamma_beta_ratio"} <= set(values):
            parts.append(f"gamma {self.gamma:g}")
        if self.sft_weight:
            parts.append(f"sft_weight {self.sft_weight:g} (per {self.sft_reduction[:-1]})")
        without = [
            note for note in (self.loss.zero_margin_note, "without the sft term" * bool(self.sft_weight)) if note
        ]
        predicted = f"{self.loss_at_zero_margin():.4f} nats at zero margin" + "".join(f", {note}" for note in without)
        return f"{self.loss_type}: {', '.join([*parts, predicted])}"

    def require(self, *names: str) -> None:
        """Raise ValueError naming those of the keys that are not set, for commands that cannot do without."""
        missing = [name for name in names if not getattr(self, name)]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be set in the recipe, or given as --{missing[0]} VALUE")

    def to_dict(self) -> dict[str, Any]:
        """Every key and its resolved value, in the order of the documentation; plain Python values, and no secret."""
        values = self.model_dump()
        values |= {name: getattr(self, name).model_dump(exclude_unset=True) for name in STAGES}
        return {name: values[name] for name in KEYS if name in values}

    def to_yaml(self, *, for_any_processes: bool = False) -> str:
        """The resolved recipe as YAML with sections; reads back equal. Keys the loss does not read are left out.

        Args:
            for_any_processes: write a global_batch_size that was asked for, not what it is for those there are here.
        """
        lines = [f"# Resolved recipe, written by simpo {version('simpo')}. `simpo keys` explains every key.\n"]
        values = {name: value for name, value in self.to_dict().items() if name not in self.unread_keys}
        for name in ("dataset_mixer", *STAGES):
            if not values[name]:
                del values[name]
        for section in SECTIONS:
            part = {name: value for name, value in values.items() if KEYS[name].section == section}
            if not part:
                continue
            if for_any_processes and self.global_batch_size and part.pop("gradient_accumulation_steps", None):
                part["global_batch_size"] = self.global_batch_size
            lines.append(f"\n# {section}\n{dump_yaml(part)}")
        return "".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe to `path`; `load_recipe(path)` gives an equal one."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  values are lists and mappings


def _aliases(name: str) -> tuple[str, ...]:
    aliases = [alias for alias, target in ALIASES.items() if target.target == name]
    return (*aliases, *(key for key, (target, _) in INPUT_KEYS.items() if target == name))


KEYS: dict[str, Key] = {
    key.name: key
    for key in sorted(
        (declared_key(name, info, aliases=_aliases(name)) for name, info in Recipe.model_fields.items()),
        key=lambda key: (SECTIONS.index(key.section), key.name in _LossKeys.model_fields),
    )
}
"""Every key by name, grouped by section in order."""
