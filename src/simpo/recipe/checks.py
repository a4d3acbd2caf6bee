"""What keys decide for each other: defaults that depend on other keys, and checks between keys.

Each step takes the typed recipe and the list of notices, and returns values to fill in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from simpo.core.losses import GENERAL_KEYS, LOSSES, loss_keys, losses_reading
from simpo.core.optimizers import OPTIMIZERS
from simpo.errors import short

if TYPE_CHECKING:
    from simpo.recipe.keys import Recipe
    from simpo.recipe.stages import Stage

_4BIT_KEYS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
_LORA_KEYS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora"),
    *_4BIT_KEYS,
)

METRICS: dict[str, bool] = {
    "eval_loss": False,
    "eval_sft_loss": False,
    "eval_rewards/accuracies": True,
    "eval_rewards/margins": True,
    "eval_rewards/chosen": True,
    "eval_rewards/rejected": False,
    "eval_logps/chosen": True,
    "eval_logps/rejected": False,
}
"""Evaluation metrics that can choose the best checkpoint -> whether greater is better."""


PAPER = "arXiv:2405.14734 and princeton-nlp/SimPO"


def far_from_published(recipe: Recipe, pairs_per_step: int) -> list[str]:
    """A line for each setting of SimPO that is far from those it was published with, and their range.

    The published ones are for models of 7 to 9B whose weights are all trained. What is called far is chosen here: about
    three times beyond the range, or beyond what the authors advise.
    """
    if recipe.loss_type != "sigmoid":
        return []
    rates = "published 3e-7 to 1e-6 for 7-9B models, where 1e-5 degenerates into repetition; small models need more"
    found = [
        ("learning_rate", recipe.learning_rate, (5e-8, 1e-4 if recipe.use_peft else 3e-6), rates),
        ("beta", recipe.beta, (1.0, 20.0), "published 2 to 10; DPO's is around 0.1, on another scale"),
        ("gamma_beta_ratio", recipe.gamma_beta_ratio, (0.0, 1.2), "published 0.1 to 0.8, advised 0 to 1"),
        ("sft_weight", recipe.sft_weight, (0.0, 1.0), "published 0"),
        ("pairs in an optimizer step", pairs_per_step, (32, 512), "published 128"),
        ("num_train_epochs", recipe.num_train_epochs, (0.0, 3.0), "published 1"),
    ]
    if recipe.max_steps > 0:
        found.pop()  # they say how long it trains
    return [
        f"{name} = {value:g}: far from what SimPO was published with ({range_}; {PAPER})"
        for name, value, (least, most), range_ in found
        if not least <= value <= most
    ]


def in_vain(recipe: Recipe) -> list[str]:
    """A line for pairs that would be held out for nothing, and for a warm-up over a whole run, however long it is."""
    lines = []
    if recipe.eval_strategy == "no" and recipe.validation_fraction > 0:
        lines.append(
            f"validation_fraction = {recipe.validation_fraction:g}: with eval_strategy no, pairs that are held out "
            "where no eval split exists are neither trained on nor evaluated; set it to 0, or leave eval_strategy out"
        )
    if recipe.eval_strategy == "no" and recipe.num_eval_generations and not recipe.eval_on_start:
        lines.append("num_eval_generations: without effect, as eval_strategy is no")
    for key in ("warmup_steps", "warmup_ratio") if recipe.lr_scheduler_type == "constant" else ():
        if getattr(recipe, key) not in (0, type(recipe).model_fields[key].default):
            lines.append(f"{key}: without effect: lr_scheduler_type constant has no warm-up; constant_with_warmup has")
    if recipe.warmup_ratio >= 1 and recipe.warmup_steps == 0 and recipe.lr_scheduler_type != "constant":
        lines.append(f"warmup_ratio = {recipe.warmup_ratio:g}: no step of the run has the full learning_rate; lower it")
    return lines


def resolve(recipe: Recipe) -> list[str]:
    """Fill in the values that other keys decide; returns a line for each thing that acts differently than it may seem.

    Raises:
        ValueError: keys that contradict each other.
    """
    notices: list[str] = []
    for step in (_resolve_loss, _resolve_model, _resolve_lengths, _resolve_evaluation):
        vars(recipe).update(step(recipe, notices))  # the model is frozen for everybody else
    _check_best_model(recipe)
    _check_early_stopping(recipe)
    return notices


def _resolve_loss(recipe: Recipe, notices: list[str]) -> dict[str, Any]:
    name, loss, unread = recipe.loss_type, recipe.loss, recipe.unread_keys
    if recipe.loss_kwargs and name in LOSSES:
        raise ValueError(
            f"loss_kwargs: only for a loss of your own, loss_type: module:function; {name} reads "
            f"{', '.join(loss.defaults) or 'no key'}"
        )
    for key in (key for key in loss_keys() if key in recipe.model_fields_set & unread):
        value, reading = getattr(recipe, key), losses_reading(key)
        if key not in GENERAL_KEYS:
            raise ValueError(f"{key}: loss_type {name!r} does not read it, only {reading[0]} does; remove one of them")
        if key != "label_smoothing":
            own = f", it reads {', '.join(loss.own_keys)}" * bool(loss.own_keys)
            notices.append(f"{key}: not used, since loss_type {name!r} does not read it{own}")
        elif value:
            raise ValueError(
                f"label_smoothing = {value}: not defined for loss_type {name!r}; set it to 0 or use one of "
                f"{', '.join(reading)}"
            )
    if recipe.reward_calibration and "low" in loss.extras:
        raise ValueError(f"reward_calibration: not with loss_type {name!r}, whose means are over some tokens only")
    for key in ("wpo_weights", "reward_calibration"):
        if getattr(recipe, key) and loss.is_of_lists:
            raise ValueError(f"{key}: only for losses of pairs, and loss_type {name!r} is one of lists; remove it")
    if recipe.keep_lists and not loss.is_of_lists:
        raise ValueError(
            f"keep_lists: loss_type {name!r} compares two responses; remove it, or use one of "
            f"{', '.join(each.name for each in LOSSES.values() if each.is_of_lists)}"
        )
    if recipe.score_margin is not None and "gamma_beta_ratio" not in loss.defaults:
        raise ValueError(
            f"score_margin: loss_type {name!r} has no gamma_beta_ratio that it could multiply; remove it, or use one "
            f"of {', '.join(losses_reading('gamma_beta_ratio'))}"
        )
    if recipe.ref_model_name_or_path is not None and not loss.needs_reference:
        notices.append(f"ref_model_name_or_path: never loaded, since loss_type {name!r} has no reference model")
    resolved: dict[str, Any] = {"sft_weight": loss.sft_weight, "keep_lists": loss.is_of_lists}
    resolved |= {key: loss.defaults.get(key, neutral) for key, neutral in (("beta", 1.0), ("gamma_beta_ratio", 0.0))}
    resolved |= {key: value for key in resolved if (value := getattr(recipe, key)) is not None and key not in unread}
    if name not in LOSSES:
        options = {key: value for key, value in loss.defaults.items() if key not in GENERAL_KEYS}
        resolved["loss_kwargs"] = options or None
    return resolved


def _resolve_model(recipe: Recipe, notices: list[str]) -> dict[str, Any]:
    on_cpu, packs = recipe.device == "cpu", recipe.pack or recipe.share_prompt
    for contradict, message in (
        (
            recipe.load_in_4bit and not recipe.use_peft,
            "load_in_4bit: 4-bit weights cannot be trained themselves; set use_peft: true as well (QLoRA)",
        ),
        (
            recipe.torch_compile and recipe.load_in_4bit,
            "torch_compile: blocks with 4-bit weights are not compiled here; set one of them to false",
        ),
        (
            recipe.torch_compile and recipe.use_liger_kernel,
            "use_liger_kernel: torch_compile fuses the same operations; set one of them to false",
        ),
        (
            recipe.activation_offload and on_cpu,
            "activation_offload: with device: cpu activations are in CPU memory already; remove it",
        ),
        (
            recipe.optimizer_offload and on_cpu,
            "optimizer_offload: with device: cpu the optimizer is in CPU memory already; remove it",
        ),
        (
            recipe.optimizer_offload and not OPTIMIZERS[recipe.optim].offloads,
            f"optimizer_offload: optim {recipe.optim} keeps its moments where the weights are; set optim: adamw_bf16, "
            "or optimizer_offload: false",
        ),
        (
            recipe.attention_kernel != "auto" and not packs,
            f"attention_kernel: {recipe.attention_kernel} computes packed attention, and pack and share_prompt are "
            "false; remove it, or choose transformers' own with attn_implementation",
        ),
    ):
        if contradict:
            raise ValueError(message)
    if not recipe.use_peft:
        _resolve_adapters(recipe, notices)
    elif not recipe.load_in_4bit:
        notices.extend(_unused(recipe, _4BIT_KEYS, "load_in_4bit is false"))
    clean = recipe.clean
    near = clean.near_duplicates or clean.leaks == "near"
    for name, has_effect, why in (
        ("leaks_from", clean.leaks != "keep", "clean.leaks is keep"),
        ("similarity", near, "neither clean.near_duplicates nor clean.leaks: near is set"),
        ("benchmark_ngram", clean.benchmarks, "clean.benchmarks is not set"),
    ):
        notices.extend(f"clean.{line}" for line in ([] if has_effect else _unused(clean, [name], why)))
    resolved: dict[str, Any] = {"bf16": True if recipe.bf16 is None else recipe.bf16}
    if recipe.attn_implementation is not None and packs:
        notices.append(
            f"attn_implementation: packed attention is used instead of {recipe.attn_implementation}; "
            "pack: false with share_prompt: false uses theirs"
        )
        resolved["attn_implementation"] = None
    settings = recipe.gradient_checkpointing_kwargs
    if settings and settings.get("use_reentrant"):
        notices.append("gradient_checkpointing_kwargs: use_reentrant is always false here")
    if settings is not None:
        resolved["gradient_checkpointing_kwargs"] = {**settings, "use_reentrant": False}
    return resolved


def _resolve_adapters(recipe: Recipe, notices: list[str]) -> None:
    """Settings of adapters without adapters: an error, unless use_peft itself says that there are none."""
    given = {name: getattr(recipe, name) for name in _LORA_KEYS if name in recipe.model_fields_set}
    if "use_peft" in recipe.model_fields_set:
        notices.extend(_unused(recipe, given, "use_peft is false"))
    elif asked := [name for name, value in given.items() if value]:
        raise ValueError(
            f"{asked[0]} = {short(given[asked[0]])}: adapters are trained with use_peft: true alone; set it, or "
            "use_peft: false to train all weights"
        )


def _unused(values: Recipe | Stage, names: Iterable[str], why: str) -> list[str]:
    """A line for those keys that are not at their defaults while what they belong to is off."""
    unused = [name for name in names if getattr(values, name) != type(values).model_fields[name].default]
    return [f"{', '.join(unused)}: not used, since {why}"] if unused else []


def _resolve_lengths(recipe: Recipe, notices: list[str]) -> dict[str, Any]:
    prompt = recipe.max_prompt_length
    if prompt is None and "max_prompt_length" not in recipe.model_fields_set:
        prompt = 1800 if recipe.max_length > 1800 else recipe.max_length // 2
    if prompt is not None and prompt >= recipe.max_length:
        raise ValueError(
            f"max_prompt_length = {prompt}: must be less than max_length = {recipe.max_length}, "
            "so that a response fits; lower it or raise max_length"
        )
    if recipe.dataset_configs is not None and len(recipe.dataset_configs) != len(recipe.dataset_mixer):
        raise ValueError(
            f"dataset_configs: {len(recipe.dataset_configs)} names for {len(recipe.dataset_mixer)} datasets of "
            "dataset_mixer; give one for each, in the same order"
        )
    if recipe.min_lr and recipe.lr_scheduler_type not in ("cosine", "linear"):
        raise ValueError(f"min_lr = {recipe.min_lr}: with lr_scheduler_type {recipe.lr_scheduler_type} nothing decays")
    if recipe.min_lr and recipe.min_lr >= recipe.learning_rate:
        raise ValueError(f"min_lr = {recipe.min_lr}: must be less than learning_rate = {recipe.learning_rate}")
    if recipe.max_steps == 0:
        raise ValueError("max_steps = 0: must be >= 1, or -1 to train for num_train_epochs")
    if recipe.max_tokens_per_micro_batch is not None and not recipe.pack:
        raise ValueError(
            "max_tokens_per_micro_batch counts packed tokens, and pack is false; set pack: true, or leave it out and "
            "choose per_device_train_batch_size"
        )
    if recipe.max_steps > 0 and (line := describe_long_warmup(recipe.max_steps, recipe)):
        notices.append(line)
    return {"max_prompt_length": prompt}


def warmup_steps(total_steps: int, recipe: Recipe) -> int:
    """Steps of warm-up: `warmup_steps` where given, else `warmup_ratio` of the run, rounded up."""
    return recipe.warmup_steps if recipe.warmup_steps > 0 else math.ceil(recipe.warmup_ratio * total_steps)


def describe_long_warmup(total_steps: int, recipe: Recipe) -> str | None:
    """A line where the warm-up leaves no step of a run at the full learning rate; None elsewhere."""
    warmup = warmup_steps(total_steps, recipe)
    if recipe.lr_scheduler_type == "constant" or warmup < total_steps:
        return None
    highest = recipe.learning_rate * (total_steps - 1) / warmup
    trained = f"the highest is {highest:.3g}" if highest else "it is 0, so that nothing is trained"
    return (
        f"warm-up over {warmup} step{'s' * (warmup > 1)} leaves none of {total_steps} at learning_rate = "
        f"{recipe.learning_rate:g} ({trained}); lower warmup_steps or warmup_ratio, or train more steps"
    )


def _resolve_evaluation(recipe: Recipe, notices: list[str]) -> dict[str, Any]:
    strategy, steps = recipe.eval_strategy, recipe.eval_steps
    if strategy is None and steps is not None:
        strategy = "steps"
    if strategy == "steps" and steps is None:
        steps = recipe.logging_steps
        notices.append(f"eval_steps: not given, so evaluation runs every logging_steps = {steps} steps")
    if strategy != "steps" and steps is not None:
        notices.append(f"eval_steps: not used, since eval_strategy is {strategy!r}")
        steps = None
    metric = recipe.metric_for_best_model
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    if metric not in METRICS:
        raise ValueError(
            f"metric_for_best_model = {short(recipe.metric_for_best_model)}: must be one of {', '.join(METRICS)}"
        )
    better = METRICS[metric] if recipe.greater_is_better is None else recipe.greater_is_better
    return {
        "eval_strategy": strategy,
        "eval_steps": steps,
        "metric_for_best_model": metric,
        "greater_is_better": better,
    }


def _check_best_model(recipe: Recipe) -> None:
    """load_best_model_at_end, and a guard that goes back, need every checkpoint evaluated when it is saved."""
    key = "load_best_model_at_end" if recipe.load_best_model_at_end else "guard: back"
    if key == "guard: back" and "back" not in recipe.guard.values():
        return
    saves, evaluates = recipe.save_strategy, recipe.eval_strategy
    if evaluates == "no" or saves != evaluates:
        raise ValueError(
            f"{key}: eval_strategy ({evaluates or 'once at the end'}) and save_strategy ({saves}) "
            "must be the same, steps or epoch, so that every checkpoint has its metric"
        )
    steps = recipe.eval_steps or 0  # set where eval_strategy is steps
    if saves == "steps" and (steps < 1 or recipe.save_steps % steps):
        raise ValueError(
            f"{key}: save_steps = {recipe.save_steps} must be a multiple of "
            f"eval_steps = {recipe.eval_steps}, so that every checkpoint has its metric"
        )


def _check_early_stopping(recipe: Recipe) -> None:
    """It counts evaluations during training, so there have to be some."""
    if recipe.early_stopping_patience is None:
        if recipe.early_stopping_threshold:
            raise ValueError(
                f"early_stopping_threshold = {recipe.early_stopping_threshold:g}: means nothing without "
                "early_stopping_patience, the number of evaluations without improvement after which training stops"
            )
    elif recipe.eval_strategy not in ("steps", "epoch"):
        when = "once at the end" if recipe.eval_strategy is None else "no"
        raise ValueError(
            f"early_stopping_patience = {recipe.early_stopping_patience}: nothing is evaluated during training "
            f"(eval_strategy: {when}); set eval_steps, or eval_strategy: epoch"
        )
