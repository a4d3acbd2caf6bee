"""What of a loaded model depends on chance or on its neighbours in a batch, and which rows it takes: settled before it
trains. What its owner might not expect is noted with the model, to be shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from simpo.errors import first_line, one_line
from simpo.model.attention import PACKED, OrdinaryRows, is_packed, plain_implementation, unwrap
from simpo.model.kernels import choose_kernel
from simpo.model.probe import check_forward, find_chance, probe_layout
from simpo.parallel.sharding import original_class

if TYPE_CHECKING:
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe

_NOTES, _RATES = "_simpo_notes", "_simpo_rates"  # where a transformers model keeps them


def notes_of(model: nn.Module) -> list[str]:
    """Lines for people: what was settled otherwise than the recipe or the checkpoint says."""
    return unwrap(model).__dict__.setdefault(_NOTES, [])


def disable_dropout(model: nn.Module) -> None:
    """Set every rate of dropout, layer dropout and jitter to 0: a policy's log-probs should not depend on chance.

    That of adapters stays: it has a key of its own. Some architectures read theirs from the configuration at each pass;
    `as_configured` brings those back.
    """
    base = unwrap(model)
    changed: list[tuple[Any, str, float]] = base.__dict__.setdefault(_RATES, [])
    owners: list[Any] = [module for name, module in base.named_modules() if "lora_dropout" not in name]
    owners += {id(config): config for module in owners if (config := module.__dict__.get("config"))}.values()
    for owner in owners:
        for name, value in list(vars(owner).items()):
            is_rate = isinstance(value, int | float) and 0 < value <= 1 and ("drop" in name or "jitter" in name)
            if is_rate or (name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd)):
                setattr(owner, name, 0.0)
                if not isinstance(owner, nn.Module):
                    changed.append((owner, name, value))


@contextlib.contextmanager
def as_configured(model: nn.Module) -> Iterator[None]:
    """Inside, the model's configuration is its checkpoint's: to be saved."""
    changed = unwrap(model).__dict__.get(_RATES, [])
    for owner, name, value in changed:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, _ in changed:
            setattr(owner, name, 0.0)


def settle_chance(model: nn.Module, recipe: Recipe, *, bf16: bool, mesh: Mesh | None = None) -> None:
    """Keep modules that draw at random in train mode in eval mode; note what cannot be kept from it."""
    layout = {"pack": recipe.pack, "share_prompt": recipe.share_prompt}
    held: set[type] = set()
    while (found := find_chance(model, **layout, bf16=bf16, mesh=mesh)) is not None:
        name, rms = found
        culprit = model.get_submodule(name)
        kinds = {type(culprit)} - held
        if not kinds or getattr(culprit, "gradient_checkpointing", False) or culprit is unwrap(model):
            notes_of(model).append(
                f"chance remains in train mode, first in {name or 'the model'} ({type(culprit).__name__}): two passes "
                f"over the same rows differ by {rms:.2g} nats (rms)"
            )
            return
        held |= kinds
        for module in model.modules():
            if type(module) is type(culprit):
                module.eval()
                module.train = _stay_in_eval  # type: ignore[method-assign]
        notes_of(model).append(
            f"{type(culprit).__name__} draws at random in train mode ({rms:.2g} nats between two passes over the same "
            "rows); it is kept in eval mode, since disable_dropout is true"
        )


def _stay_in_eval(mode: bool = True) -> None:
    """In place of a module's `train`."""


def follows_length(config: Any) -> bool:
    """Whether rotary factors follow the longest row of a batch, and are fixed to `max_length` here."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    of_layers = [each for each in found.values() if isinstance(each, dict)] or [found]
    return any(_follows(each.get("rope_type")) for each in of_layers)


def _follows(rope_type: Any) -> bool:
    return rope_type == "longrope" or "dynamic" in str(rope_type)


def fix_rotary_factors(model: nn.Module, max_length: int) -> None:
    """Fix rotary factors that follow the longest row of a batch (longrope, dynamic) to those of `max_length` tokens.

    A pair's log-probs would depend on its neighbours otherwise. Up to the length that the model was first trained with
    they are what they are without this.
    """
    base = unwrap(model)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    length = min(max_length, limit or max_length)
    for module in base.modules():
        kinds = module.__dict__.get("rope_type")
        of_layers = kinds if isinstance(kinds, dict) else {None: kinds}
        followed = {layer: kind for layer, kind in of_layers.items() if _follows(kind)}
        for layer, kind in followed.items():
            buffer = "inv_freq" if layer is None else f"{layer}_inv_freq"
            before = getattr(module, buffer).clone()
            last = torch.tensor([[length - 1]], device=before.device)
            with torch.no_grad():
                module(before.new_zeros(1, 1, 1), last, **({} if layer is None else {"layer_type": layer}))
            if not torch.equal(getattr(module, buffer), before):
                notes_of(model).append(
                    f"rotary factors ({kind}): those of {length} tokens (max_length) for every row, also for short "
                    "ones; a lower max_length may keep those of short texts"
                )
            if layer is None:
                module.rope_type = "fixed"
            else:
                module.rope_type = {**module.rope_type, layer: "fixed"}


def attend_packed(model: nn.Module, recipe: Recipe, *, device: torch.device) -> str | None:
    """Have the model attend to packed rows, if the recipe asks for them and the architecture lets it.

    Returns:
        For people: what `attention_kernel: auto` had to leave out.
    """
    if not (recipe.pack or recipe.share_prompt):
        return None
    if (reason := _take_packed_attention(model)) is not None:
        _pad(model, recipe, reason)
        return None
    return choose_kernel(model, recipe.attention_kernel, device=device, half=bool(recipe.bf16))


def check_rows(model: nn.Module, recipe: Recipe, *, bf16: bool, mesh: Mesh | None = None) -> None:
    """Check the forward pass of the rows that train; where only packed ones are wrong, go over to padded ones.

    Args:
        model, bf16, mesh: as in `probe.check_forward`.
    Raises:
        ValueError: padded rows are wrong as well, or the recipe cannot do without packed ones.
    """
    base = unwrap(model)
    packed = is_packed(base.config._attn_implementation)
    if packed and (reason := why_not_packed(model, recipe, bf16=bf16, mesh=mesh)) is not None:
        _pad(model, recipe, reason)
    recipe = as_it_trains(recipe, model)
    implementation = base.config._attn_implementation
    # Kernels that take no fp32 are checked where autocast or the weights' dtype spares them it.
    if not is_packed(implementation) and (implementation in ("sdpa", "eager") or recipe.computes_in_bf16):
        check_forward(model, pack=False, share_prompt=False, bf16=bf16, mesh=mesh)
    if recipe.disable_dropout and any(parameter.requires_grad for parameter in model.parameters()):
        settle_chance(model, recipe, bf16=bf16, mesh=mesh)


def why_not_packed(model: nn.Module, recipe: Recipe, *, bf16: bool, mesh: Mesh | None = None) -> str | None:
    """What keeps the model from taking the recipe's packed rows; None = nothing, and it attends to them from now on."""
    base = unwrap(model)
    if not is_packed(base.config._attn_implementation) and (reason := _take_packed_attention(model)) is not None:
        return reason
    try:
        found = probe_layout(model, pack=recipe.pack, share_prompt=recipe.share_prompt, bf16=bf16, mesh=mesh)
    except (torch.OutOfMemoryError, OSError):
        raise
    except ValueError as error:
        return first_line(error)
    except OrdinaryRows:
        return "it does not tell its attention of them"
    except Exception as error:  # whatever its code makes of a mask that it does not expect
        return f"its own code fails on them: {one_line(error, limit=120)}"
    return None if found.is_good else f"packed log-probs {found}"


def _take_packed_attention(model: nn.Module) -> str | None:
    base = unwrap(model)
    try:
        base.set_attn_implementation(PACKED)
    except ValueError as error:
        return first_line(error)
    return None if is_packed(base.config._attn_implementation) else "its attention is not transformers' common one"


def _pad(model: nn.Module, recipe: Recipe, reason: str) -> None:
    """Go over to padded rows."""
    base = unwrap(model)
    needs = {"max_tokens_per_micro_batch": recipe.max_tokens_per_micro_batch is not None, "cp": recipe.cp > 1}
    for key in (key for key, is_set in needs.items() if is_set):
        raise ValueError(f"{key} needs packed rows, which {original_class(base).__name__} does not take: {reason}")
    base.set_attn_implementation(plain_implementation(base))
    notes_of(model).append(
        f"rows are padded, which is slower: {original_class(base).__name__} does not take packed ones ({reason})"
    )


def as_it_trains(recipe: Recipe, model: nn.Module) -> Recipe:
    """The recipe with the rows that the model takes."""
    packs = recipe.pack or recipe.share_prompt
    if not packs or is_packed(unwrap(model).config._attn_implementation):
        return recipe
    from simpo.recipe import load_recipe  # here: benchmarks/gpu.py runs where there is no pydantic

    return load_recipe(recipe, {"pack": False, "share_prompt": False, "attention_kernel": "auto"})
