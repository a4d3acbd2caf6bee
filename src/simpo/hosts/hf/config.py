"""SimPOConfig: transformers' TrainingArguments and the keys of a recipe, under the names their users know.

What a key means, its default and what is wrong with a value is the recipe's to say: every value passes through
`load_recipe`. Also takes the names of TRL's CPOConfig and of the SimPO authors' config.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, make_dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from simpo.recipe import KEYS, Recipe, load_recipe
from simpo.recipe.aliases import check_loss_of_trl, refusal
from simpo.recipe.yaml import parse_yaml

# Recipe keys that are fields here and not TrainingArguments' own. None in a field is the recipe's default.
RECIPE_FIELDS = tuple(name for name, key in KEYS.items() if key.hf == "field")
# Those that the other dataclasses of a script have as well: TRL's ModelConfig, the alignment-handbook's and the SimPO
# authors' ModelArguments and DataArguments. An InitVar is a keyword and no field, so HfArgumentParser leaves the option
# of the command line to them.
_NEIGHBOURS = ("model_revision", "trust_remote_code", "attn_implementation", "chat_template")
_NEIGHBOURS += ("auto_insert_empty_system_msg", "preprocessing_num_workers")
KEYWORDS = tuple(name for name in RECIPE_FIELDS if name in _NEIGHBOURS)
# Names of TRL and of the authors that the recipe knows to mean nothing here: one printed line each.
_MEANINGLESS: dict[str, Any] = {
    **dict.fromkeys(("max_completion_length", "max_target_length"), int),
    "truncation_mode": str,
    **dict.fromkeys(("label_pad_token_id", "padding_value"), int),
    **dict.fromkeys(("generate_during_eval", "is_encoder_decoder"), bool),
    **dict.fromkeys(("overwrite_output_dir", "save_safetensors", "group_by_length"), bool),
}
_OTHER_NAMES = ("gamma", "simpo_gamma", "cpo_alpha", "dataset_num_proc")  # of recipe keys, which the recipe knows
_NUMBERS = (*_OTHER_NAMES, "alpha", "warmup_ratio")
# Options of from_pretrained that the recipe has a say in.
_OF_MODEL = ("dtype", "torch_dtype", "attn_implementation", "use_flash_attention_2", "trust_remote_code")

# TrainingArguments' own that the recipe's rules refuse. (Schedules and optimizers are the Trainer's here.)
_NOT_HONOURED = (
    *("fp16", "label_smoothing_factor", "neftune_noise_alpha"),
    *("data_seed", "dataloader_drop_last", "train_sampling_strategy"),
)

_ROUNDS = "it would round the weights that train; evaluation computes as training does (bf16)"
_REFUSED = {
    "bf16_full_eval": _ROUNDS,
    "fp16_full_eval": _ROUNDS,
    "auto_find_batch_size": "micro-batches are planned before training; set max_tokens_per_micro_batch, which limits "
    "their memory and leaves the update the same (simpo train finds it by itself)",
    "ignore_data_skip": "a resumed run goes on with the pairs that its plan has next; leave it out",
    "torch_compile": "not with this trainer; the native one (simpo train) compiles its blocks",
    # transformers would put Liger's own head in place after the start-up check
    "use_liger_kernel": "not with this trainer; the native one (simpo train) has Liger's kernels",
}

_MEANS_HERE = {
    "max_tokens_per_micro_batch": "Tokens after which a micro-batch is split; the update stays the same. null = no "
    "limit.",
    "save_dtype": "Number format of what save_model writes: float32, bfloat16 or float16; null = that of the trained "
    "weights.",
}


def _field(name: str) -> tuple[str, Any, Any]:
    """A recipe key as a field of a dataclass: its name, type and default, None for the recipe's."""
    (kind,) = KEYS[name].types
    kind = dict | str if kind is dict else kind  # as transformers has its mappings: JSON on a command line
    meaning = _MEANS_HERE.get(name) or f"{KEYS[name].meaning} Allowed: {KEYS[name].allowed}."
    declared = InitVar[kind | None] if name in KEYWORDS else kind | None
    return name, declared, _argument(meaning.replace("%", "%%"))


def _argument(meaning: str, default: Any = None) -> Any:
    """A field with what --help says of it."""
    return field(default=default, metadata={"help": meaning})


# TrainingArguments and the fields of the recipe. (Any: they are known once this has run, not to a type checker.)
_Arguments: Any = make_dataclass(
    "_Arguments",
    [
        *map(_field, RECIPE_FIELDS),
        *((name, kind | None, _argument("Accepted, not used here.")) for name, kind in _MEANINGLESS.items()),
    ],
    bases=(TrainingArguments,),
)


_CHECKPOINTING = "activation_checkpointing"  # the name in transformers; 5.17 has the older one alone
if _CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    _CHECKPOINTING = "gradient_checkpointing"


@dataclass
class SimPOConfig(_Arguments):
    """What to train and how, for `SimPOTrainer`.

    Every field of TrainingArguments, with a recipe's defaults where both have one (learning rate 1e-6, cosine with 10%
    warm-up, one epoch, bf16 compute, 2 pairs a micro-batch), and every recipe key of data, loss and log-probs, which
    `simpo keys` explains. Batch sizes count pairs. After construction the fields of the loss hold what will be used.

    HfArgumentParser takes it beside TRL's ModelConfig and ScriptArguments, the alignment-handbook's dataclasses and the
    SimPO authors'. What those have as options is a keyword of the constructor here and no option; the script hands
    their values on (`model_init_kwargs`, `peft_config`, the tokenizer). A subclass's `__post_init__` takes `*keywords`
    and passes them on.

    Raises:
        ValueError: as `simpo.recipe.load_recipe`, and for names of TRL whose meaning is not the one here.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "loss_kwargs", "clean"]  # noqa: RUF012

    # --- TrainingArguments' own, with a recipe's defaults
    per_device_train_batch_size: int = _argument("Pairs in one micro-batch of one process.", 2)
    per_device_eval_batch_size: int = _argument("Pairs in one evaluation batch.", 4)
    num_train_epochs: float = _argument("Passes over the training pairs.", 1.0)
    learning_rate: float = _argument("Peak learning rate.", 1e-6)
    lr_scheduler_type: str = _argument("Shape of the learning rate after warm-up.", "cosine")
    warmup_steps: float = _argument("Steps of warm-up; below 1, a share of all steps.", 0.1)
    logging_steps: float = _argument("Steps between two logged lines, which are means over them.", 1)
    bf16: bool | None = _argument("Compute in bfloat16; null = true.")
    ddp_find_unused_parameters: bool | None = _argument(
        "As in TrainingArguments; true where an architecture leaves weights unused.", False
    )
    gamma: float | None = _argument("Target reward margin of the paper: gamma_beta_ratio times beta. Never both.")

    # --- this host's own
    text_as_is: bool | None = _argument("Another name of rendered_text: true = keep, false = render.")
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further options of from_pretrained, for a model given by name."}
    )

    # --- names of TRL's CPOConfig, of the SimPO authors' config and of older transformers
    simpo_gamma: float | None = _argument("TRL's name of gamma.")
    cpo_alpha: float | None = _argument("TRL's name of sft_weight.")
    alpha: float | None = _argument("TRL's name of alphapo_alpha; not 0 means loss_type alphapo.")
    dataset_num_proc: int | None = _argument("TRL's name of preprocessing_num_workers.")
    warmup_ratio: float | None = _argument("Share of the steps over which the learning rate rises.")
    evaluation_strategy: str | None = _argument("Older name of eval_strategy.")

    def __post_init__(self, *keywords: Any) -> None:
        vars(self).update(zip(KEYWORDS, keywords, strict=True))
        self._read_text()
        self._rename()
        if self.bf16 is None:
            self.bf16 = not self.fp16
        self._settle_device()
        recipe = self.to_recipe()  # what is wrong is said before a process group is started
        check_pairs_are_dealt(parallel_sizes(self.parallelism_config))
        super().__post_init__()
        loss = ("loss_type", "beta", "gamma_beta_ratio", "label_smoothing", "sft_weight")
        for name in (*loss, "max_length", "preprocessing_num_workers"):
            if name not in recipe.unread_keys:
                setattr(self, name, getattr(recipe, name))
        for name in _OTHER_NAMES:  # the recipe's own names hold them now
            setattr(self, name, None)
        for name, why in _REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name}: {why}")

    def _read_text(self) -> None:
        """Values that parsers of command lines and YAML 1.1 leave as text: "2.5", "1e-6"."""
        ours = (
            name for name, key in KEYS.items() if key.hf in ("field", "argument", "shared") and str not in key.types
        )
        for name in (*ours, *_NUMBERS):
            if isinstance(getattr(self, name), str):
                setattr(self, name, parse_yaml(getattr(self, name), where=name))

    def _rename(self) -> None:
        """Other programs' names -> ours, as far as their meaning depends on more than their own value."""
        trl = [name for name in ("simpo_gamma", "cpo_alpha", "alpha") if getattr(self, name) is not None]
        loss = self.loss_type[0] if isinstance(self.loss_type, list) and len(self.loss_type) == 1 else self.loss_type
        if trl:
            check_loss_of_trl(loss, trl[0], ratio=self.gamma_beta_ratio)
        self.loss_type = loss
        if self.alpha is not None:
            if self.alpha or self.loss_type == "alphapo":
                self.loss_type, self.alphapo_alpha = "alphapo", self.alpha
            self.alpha = None
        if self.evaluation_strategy is not None:
            self.eval_strategy, self.evaluation_strategy = self.evaluation_strategy, None
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise ValueError(f"warmup_ratio = {self.warmup_ratio}: must be at least 0 and less than 1")
            # As everywhere, steps that are given win over the ratio; 0.1 is the default of warmup_steps.
            if self.warmup_steps in (0, SimPOConfig.warmup_steps):
                self.warmup_steps = self.warmup_ratio
            self.warmup_ratio = None
        if _CHECKPOINTING != "gradient_checkpointing":  # said here, so that transformers need not warn
            if getattr(self, _CHECKPOINTING) is None and self.gradient_checkpointing is not None:
                setattr(self, _CHECKPOINTING, self.gradient_checkpointing)
            if getattr(self, f"{_CHECKPOINTING}_kwargs") is None:
                setattr(self, f"{_CHECKPOINTING}_kwargs", self.gradient_checkpointing_kwargs)
        if getattr(self, _CHECKPOINTING):
            given = getattr(self, f"{_CHECKPOINTING}_kwargs")
            given = given if isinstance(given, dict) else {}
            setattr(self, f"{_CHECKPOINTING}_kwargs", {**given, "use_reentrant": False})

    def _settle_device(self) -> None:
        """Without an accelerator: the CPU, and gloo between processes, without which DeepSpeed makes worlds of one."""
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in ("no", "bf16" if self.bf16 else "fp16" if self.fp16 else "no"):
            raise ValueError(
                f"bf16: {str(bool(self.bf16)).lower()}, but accelerate was launched with mixed_precision {launched}; "
                "set mixed_precision: 'no' in its configuration file, so that bf16 decides"
            )
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.use_cpu and self.ddp_backend is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.ddp_backend = "gloo"

    def to_recipe(self, model: str | None = None) -> Recipe:
        """The recipe of these settings: what the data, the loss and the log-probs are computed by.

        Args:
            model: its name or folder; None where it was loaded by somebody else.
        """
        options = self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}
        values: dict[str, Any] = {"model_name_or_path": model or "a loaded model", "validation_fraction": 0.0}
        shared = [name for name, key in KEYS.items() if key.hf == "shared"]
        values |= {name: getattr(self, name) for name in (*RECIPE_FIELDS, *_OTHER_NAMES, *shared, *_MEANINGLESS)}
        for name in _OF_MODEL:
            if options.get(name) is not None and values.get(name) is None:
                values[name] = str(options[name]) if isinstance(options[name], torch.dtype) else options[name]
        if options.get("revision") is not None and self.model_revision is None:
            values["model_revision"] = options["revision"]
        asked = {name: getattr(self, name, None) for name in _NOT_HONOURED}
        values |= {name: value for name, value in asked.items() if refusal(name, value) is not None}
        if self.guard is not None and "back" in str(self.guard):  # it needs every checkpoint evaluated
            names = ("eval_strategy", "eval_steps", "save_strategy", "save_steps", "logging_steps")
            by = ("metric_for_best_model", "greater_is_better")
            values |= {name: getattr(value, "value", value) for name in names + by for value in [getattr(self, name)]}
        values |= {"output_dir": self.output_dir, "gradient_checkpointing": bool(getattr(self, _CHECKPOINTING))}
        return load_recipe({name: value for name, value in values.items() if value is not None}, processes=1)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with the keywords that are given."""
        given = {name: value for name in KEYWORDS if (value := getattr(self, name)) is not None}
        return super().to_dict() | given

    def loading_options(self) -> dict[str, Any]:
        """What of `model_init_kwargs` goes to from_pretrained as it is."""
        options = self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}
        return {name: value for name, value in options.items() if name not in (*_OF_MODEL, "revision")}


def parallel_sizes(config: Any) -> dict[str, Any]:
    """What of accelerate's ParallelismConfig, or None, makes several processes compute the same pairs."""
    return {f"parallelism_config: {name}": getattr(config, name, 1) for name in ("tp_size", "cp_size", "sp_size")}


def check_pairs_are_dealt(sizes: Mapping[str, Any]) -> None:
    """Raise ValueError for a size that makes several processes compute the same pairs: the plan deals each its own."""
    for name, size in sizes.items():
        if (size or 1) > 1:
            raise ValueError(
                f"{name} = {size}: not with this trainer, which gives every process pairs of its own; set it to 1, or "
                "use the native one (torchrun -m simpo train) with tp or cp"
            )


def check_arguments(args: Any, others: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of transformers' Trainer that `SimPOTrainer` does not take."""
    if not isinstance(args, SimPOConfig):
        raise ValueError(f"args: a SimPOConfig is needed, not {type(args).__name__}")
    refused = {
        "data_collator": "batches are planned and built here",
        "compute_loss_func": "the loss is loss_type",
        "compute_metrics": "there are no logits to compute from; rewards, log-probs and accuracies are logged",
        "preprocess_logits_for_metrics": "there are no logits to process",
    }
    for name, reason in refused.items():
        if others.get(name) is not None:
            raise ValueError(f"{name}: not taken by this trainer: {reason}")
