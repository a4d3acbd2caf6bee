"""Models for `SimPOTrainer`: given by name or loaded by somebody else, made ready for packed pairs.

Loading for the native trainer's meshes is `model.load`'s; here accelerate, DeepSpeed or transformers' Trainer places
the weights.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from simpo.hosts.hf.config import check_pairs_are_dealt
from simpo.hosts.hf.masters import narrow_partitions, reading_in_fp32
from simpo.model.attention import is_packed, plain_implementation, unwrap
from simpo.model.head import install_head, install_router_loss
from simpo.model.load import (
    add_adapters,
    check_tied_adapters,
    keep_quantized_trainable,
    load_pretrained,
    load_tokenizer,
)
from simpo.model.low_memory import install_low_memory_blocks
from simpo.model.settle import attend_packed, disable_dropout, fix_rotary_factors
from simpo.recipe import Recipe, load_recipe


def load_by_name(name: str, recipe: Recipe, options: dict[str, Any]) -> PreTrainedModel:
    """A model with weights in the recipe's master dtype, split over ranks as it is read where ZeRO-3 is on.

    Args:
        name: folder or hub name.
        options: further ones of from_pretrained.
    Raises:
        ValueError: no such model.
    """
    dtype = getattr(torch, recipe.master_dtype)
    with reading_in_fp32():
        model = load_pretrained(AutoModelForCausalLM, name, recipe, what="model", dtype=dtype, **options)
    narrow_partitions(model)
    return model


def tokenizer_of(model: Any, recipe: Recipe) -> Any:
    """The tokenizer that lies beside a model. Raises ValueError where it does not say where that is."""
    name = getattr(getattr(unwrap(model), "config", None), "name_or_path", "") if model is not None else ""
    if not name:
        raise ValueError("processing_class: this model has no name_or_path to load one from; give its tokenizer")
    return load_tokenizer(load_recipe(recipe, {"model_name_or_path": name}))


def wrap_in_adapters(model: nn.Module, peft_config: Any, *, seed: int) -> nn.Module:
    """A PEFT model around the model.

    Raises:
        ValueError: peft is not installed, or the model has adapters already.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("peft_config needs peft: pip install 'simpo[peft]'")
    if unwrap(model) is not model:
        raise ValueError("peft_config: the model has adapters already; give one of the two")
    # Under ZeRO-3 every weight must have the dtype of the engine; elsewhere adapters are trained in fp32.
    options = {"autocast_adapter_dtype": False} if is_deepspeed_zero3_enabled() else {}
    return add_adapters(model, peft_config, seed=seed, **options)


def make_ready(model: nn.Module, recipe: Recipe, *, device: torch.device) -> list[str]:
    """Packed attention, the log-prob head, low-memory blocks, no dropout, trainable weights in the master dtype.

    Args:
        device: where the model will compute; it may still be elsewhere.
    Returns:
        Lines to print: what was changed that its owner might not expect.
    Raises:
        ValueError: the model cannot be trained on pairs here, see `model.load`.
    """
    base = unwrap(model)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"model: a transformers model, or the name of one, is needed, not {type(base).__name__}")
    check_pairs_are_dealt({"model: tp_size": getattr(base, "tp_size", 1)})  # loaded with a tp_plan
    check_tied_adapters(model)
    if recipe.disable_dropout:
        disable_dropout(base)
    fix_rotary_factors(model, recipe.max_length)
    left_out = attend_packed(model, recipe, device=device)
    lines = [] if left_out is None else [f"attention: {left_out}"]
    packs, before = recipe.pack or recipe.share_prompt, base.config._attn_implementation
    if not packs and recipe.attn_implementation is not None:
        base.set_attn_implementation(recipe.attn_implementation)
    elif not packs and (before is None or is_packed(before)):
        base.set_attn_implementation(plain_implementation(base))
    keep_quantized_trainable(model)
    install_head(model)
    install_low_memory_blocks(model)
    install_router_loss(model, recipe.router_aux_loss_coef)
    return lines if weights_are_elsewhere(model) else lines + _keep_masters(model, recipe)


def _keep_masters(model: nn.Module, recipe: Recipe) -> list[str]:
    """Trained weights below the master dtype are widened: at small learning rates they would not move."""
    if recipe.master_dtype != "float32" or getattr(model, "is_quantized", False):
        return []
    narrow = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not narrow:
        return []
    came_in = str(narrow[0].dtype).removeprefix("torch.")
    for parameter in narrow:
        parameter.data = parameter.data.float()
    return [
        f"the trained weights came in {came_in} and are kept in float32: at small learning rates they would not move; "
        "set master_dtype='bfloat16' to insist"
    ]


def weights_are_elsewhere(model: nn.Module) -> bool:
    """Whether this process holds only a part of the weights before the engine has prepared the model."""
    some = next(model.parameters())
    loads_on_one = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("1", "true")
    return hasattr(some, "ds_id") or some.is_meta or (loads_on_one and os.environ.get("ACCELERATE_USE_FSDP") == "true")
