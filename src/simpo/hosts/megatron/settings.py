"""What the Megatron host is told: arguments under Megatron's names, checked by the recipe's rules.

Reads an argparse Namespace (Megatron's own, or that of a script) or a mapping. Must not import torch or megatron: the
arguments are added to a parser before anything heavy is loaded.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from simpo.core.losses import LOSSES
from simpo.recipe import KEYS, Recipe, load_recipe

Method = Literal["simpo", "dpo"]

# Megatron's name -> the name that load_recipe takes. It knows the simpo_* names and uses them in its messages.
SIMPO_ARGUMENTS = {key.megatron: key.megatron for key in KEYS.values() if key.megatron}
SIMPO_ARGUMENTS["gamma_beta_ratio"] = "gamma_beta_ratio"  # as forks call it; theirs to add to the parser
DPO_ARGUMENTS = {
    "dpo_beta": "beta",
    "dpo_loss_type": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "pref_ftx": "sft_weight",
    "r_dpo_alpha": "r_dpo_alpha",
}
NOT_HERE = ("wpo_weights", "reward_calibration", "score_margin")
"""Keys that need more of the head than its cross entropies, or scores of pairs."""
DPO_LOSSES = {"sigmoid": "dpo", **{name: name for name, loss in LOSSES.items() if loss.needs_reference}}
REFERENCE_FREE = tuple(name for name, loss in LOSSES.items() if not loss.needs_reference and not loss.is_of_lists)


def add_simpo_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the preference arguments to Megatron's parser; made to be its `extra_args_provider`.

    Every default is None, which stands for the recipe's default (`simpo keys` lists them).
    """
    group = parser.add_argument_group("preference optimization (simpo)")
    group.add_argument("--simpo-loss-type", choices=REFERENCE_FREE, help="the loss; default sigmoid, which is SimPO")
    for key in KEYS.values():
        if key.megatron and key.types == {float}:
            meaning = f"{key.meaning} Default: {key.default}.".replace("%", "%%")
            group.add_argument(f"--{key.megatron.replace('_', '-')}", type=float, help=meaning)
    group.add_argument("--dpo-beta", type=float, help="reward scale of the DPO twin; default 0.1 (dpo_norm: 2.0)")
    group.add_argument("--dpo-label-smoothing", type=float, help="label smoothing of the DPO twin; default 0")
    group.add_argument("--dpo-loss-type", choices=tuple(DPO_LOSSES), help="loss of the DPO twin; default sigmoid = dpo")
    return parser


@dataclass(frozen=True)
class MegatronSettings:
    """What a step needs to know beyond the model.

    Attributes:
        recipe: the loss and its numbers; its other keys are not read.
        micro_batch_size: pairs in a full micro-batch; its rows are twice as many.
        seq_length: longest sequence; with `fixed_shapes` every row has this length.
        row_multiple: lengths of rows are multiples of this, so that context and sequence parallelism can cut them.
        fixed_shapes: every micro-batch is [2 * micro_batch_size, seq_length], as pipeline stages expect.
        check_for_nan: look at every micro-batch's losses before they are used; Megatron's own check does the same.
    """

    recipe: Recipe
    micro_batch_size: int
    seq_length: int
    row_multiple: int = 1
    fixed_shapes: bool = False
    check_for_nan: bool = True

    @property
    def actual_micro_batch_size(self) -> int:
        """Rows of a micro-batch: what `micro_batch_size` means to Megatron's schedules."""
        return 2 * self.micro_batch_size

    @property
    def needs_reference(self) -> bool:
        """Whether batches must carry log-probs of a reference model."""
        return self.recipe.loss.needs_reference

    @classmethod
    def from_arguments(
        cls, arguments: argparse.Namespace | Mapping[str, Any], *, method: Method = "simpo"
    ) -> MegatronSettings:
        """Settings of a Megatron run.

        Args:
            arguments: with `micro_batch_size` (in pairs) and `seq_length`; the preference arguments (see
                `add_simpo_arguments`), `tensor_model_parallel_size`, `pipeline_model_parallel_size`,
                `context_parallel_size`, `sequence_parallel`, `variable_seq_lengths` and
                `check_for_nan_in_loss_and_grad` where they are not Megatron's defaults. Others are not read.
            method: "simpo" reads the simpo_* arguments, "dpo" the dpo_* ones; both read `pref_ftx`.
        Raises:
            ValueError: a value out of range, a loss of the other method, or a seq_length that the layout cannot cut.
        """
        values = dict(arguments) if isinstance(arguments, Mapping) else vars(arguments)

        def read(name: str, default: Any) -> Any:
            value = values.get(name)
            return default if value is None else value

        tp, cp = read("tensor_model_parallel_size", 1), read("context_parallel_size", 1)
        per_rank = (
            tp if read("sequence_parallel", False) else 1
        )  # sequence parallelism cuts each cp rank's tokens by tp
        settings = cls(
            recipe=_loss_recipe(values, method),
            micro_batch_size=_whole(values, "micro_batch_size"),
            seq_length=_whole(values, "seq_length"),
            # Context parallelism cuts a row into 2 * cp chunks and gives each rank an early and a late one.
            row_multiple=math.lcm(2 * cp, cp * per_rank) if cp > 1 else per_rank,
            fixed_shapes=read("pipeline_model_parallel_size", 1) > 1 and not read("variable_seq_lengths", False),
            check_for_nan=read("check_for_nan_in_loss_and_grad", True),
        )
        if settings.seq_length % settings.row_multiple:
            raise ValueError(
                f"seq_length = {settings.seq_length}: must be a multiple of {settings.row_multiple} with "
                f"context_parallel_size {cp}, tensor_model_parallel_size {tp} and sequence_parallel "
                f"{read('sequence_parallel', False)}"
            )
        return settings


def _whole(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} = {value!r}: a whole number of at least 1 is needed")
    return value


def _loss_recipe(values: Mapping[str, Any], method: Method) -> Recipe:
    if values.get("sft_reduction") not in (None, "pairs"):
        raise ValueError("sft_reduction: only pairs here; the token mean needs counts that Megatron's batches lack")
    for name in NOT_HERE:
        if values.get(name):
            raise ValueError(f"{name}: not in Megatron; simpo train and the Hugging Face host have it")
    names = SIMPO_ARGUMENTS if method == "simpo" else DPO_ARGUMENTS
    given = {key: values[name] for name, key in names.items() if values.get(name) is not None}
    if method == "simpo":
        recipe = load_recipe({"model_name_or_path": "megatron", **given}, processes=1)
        if recipe.loss_type not in LOSSES:
            raise ValueError(
                f"simpo_loss_type = {recipe.loss_type!r}: a loss of your own is for simpo train and the Hugging Face "
                f"host; here one of {', '.join(REFERENCE_FREE)}"
            )
        if recipe.loss.is_of_lists:
            raise ValueError(
                f"simpo_loss_type = {recipe.loss_type!r}: Megatron's batches are of pairs; simpo train and the Hugging "
                "Face host train on lists"
            )
        if recipe.loss.needs_reference:
            raise ValueError(
                f"simpo_loss_type = {recipe.loss_type!r}: needs a reference model; use dpo_forward_step with "
                f"dpo_loss_type, or one of {', '.join(REFERENCE_FREE)}"
            )
        return recipe
    wanted = given.get("loss_type", "sigmoid")
    if wanted not in DPO_LOSSES:
        raise ValueError(f"dpo_loss_type = {wanted!r}: not one of {', '.join(DPO_LOSSES)}")
    given["loss_type"] = DPO_LOSSES[wanted]
    try:
        return load_recipe({"model_name_or_path": "megatron", **given}, processes=1)
    except ValueError as error:
        raise ValueError(f"{error} (of the dpo_* arguments, whose ending is the key's name)") from None
