"""Hugging Face models for preference training: load, attend to packed rows, read log-probs off the head.

Owns: tokenizer and model loading (LoRA and QLoRA included), registration of packed attention with transformers, and the
log-prob head. That both agree with the model's ordinary forward pass is checked in `engine.probe`. Must not import
data, train or evaluate.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging as transformers_logging

from simpo.core.attention import ATTENTION_PATHS, AttentionPath, packed_attention
from simpo.core.batch import PackedPairs
from simpo.core.context import sum_over
from simpo.core.logprobs import VocabShard, response_logps, token_logps
from simpo.core.losses import PairLogps
from simpo.engine.lean import READ_ROWS, install_lean_blocks, install_liger_kernels, why_no_liger
from simpo.engine.mesh import Mesh, MeshSizes, check_heads, has_joined, local_rank_of
from simpo.engine.sharding import (
    check_sharded_by_block,
    drop_gathered,
    gather_blocks_in,
    loading_options,
    original_class,
    rebuild_adapters,
    share_tied_shards,
    swap_class,
)

if TYPE_CHECKING:
    from simpo.recipe import Recipe

PACKED = "simpo_packed"  # the attention implementation's name in transformers; see also `packed_by`


# --- attention -------------------------------------------------------------------------------------------------------


def packed_by(path: AttentionPath | None) -> str:
    """The implementation's name in transformers where a path of `core.attention` is preferred; None = no preference."""
    return PACKED if path is None else f"{PACKED}_{path}"


def is_packed(implementation: str | None) -> bool:
    """Whether an implementation's name in transformers is that of packed attention, whichever path it prefers."""
    return implementation is not None and (implementation == PACKED or implementation.startswith(f"{PACKED}_"))


@torch.compiler.disable(reason="it loops over ranges that are data")
def _packed_attention_for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_blocks: Any = None,
    prefer: AttentionPath | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [B, H, T, D] -> [B, T, H, D]. B rows are taken as one flattened row."""
    if packed_blocks is None:
        raise RuntimeError(
            f"attention {PACKED!r} was called on ordinary rows; use engine.model.plain_attention(model) around "
            "generate() and other ordinary forward passes"
        )
    if others.get("s_aux") is not None:
        raise ValueError(
            "attention sinks (s_aux) are not supported by packed attention; set pack and share_prompt to false"
        )
    if attention_mask is not None and sliding_window is None:
        _check_local_mask(module, packed_blocks, attention_mask)
    batch, _, width, _ = query.shape

    def flatten(x: Tensor) -> Tensor:
        return x if batch == 1 else x.transpose(0, 1).flatten(1, 2)[None]

    out = packed_attention(
        flatten(query),
        flatten(key),
        flatten(value),
        packed_blocks,
        scale=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        dropout=dropout,
        prefer=prefer,
    )
    return out.squeeze(0).transpose(0, 1).unflatten(0, (batch, width)), None


def _packed_mask(*, q_length: int, local_size: int | None = None, **others: Any) -> Tensor | None:
    """In place of a mask: None, or how far a layer may look where that can be less than the row is long."""
    slices = dist.get_world_size() if has_joined() else 1  # as many as there can be
    return None if local_size is None or local_size >= slices * q_length else torch.tensor(local_size)


def _check_local_mask(module: nn.Module, blocks: Any, mask: Tensor) -> None:
    """Refuse a layer whose window exists in its mask alone (Llama4's chunks, Qwen2-MoE's windows): it would be lost."""
    if mask.ndim == 2:  # the ones that `compute_token_logps` passes, handed on by a model that builds no mask
        return
    if mask.ndim != 0:
        raise ValueError(
            f"{type(module).__name__} builds an attention mask of its own, which packed attention does not read; set "
            "pack and share_prompt to false"
        )
    local_size = int(mask)
    longest = max(prefix_end - prefix_start + end - start for prefix_start, prefix_end, start, end in blocks.ranges)
    if longest > local_size:
        raise ValueError(
            f"{type(module).__name__} attends to {local_size} tokens at a time through its mask alone, which packed "
            f"attention does not read, and a sequence here has {longest} tokens; lower max_length to {local_size}, or "
            "set pack and share_prompt to false"
        )


for _name, _path in {PACKED: None, **{packed_by(path): path for path in ATTENTION_PATHS}}.items():
    AttentionInterface.register(_name, functools.partial(_packed_attention_for_transformers, prefer=_path))
    # Without a mask function of that name transformers would pass no mask and say nothing.
    AttentionMaskInterface.register(_name, _packed_mask)


def plain_implementation(model: PreTrainedModel) -> str:
    """transformers' own attention for this model: sdpa, or eager where sdpa cannot do what it needs (soft-caps)."""
    softcapped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "sdpa" if model._supports_sdpa and not softcapped else "eager"


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Inside, the model attends as transformers does: for generate() and padded batches."""
    base = unwrap(model)
    before = base.config._attn_implementation
    if is_packed(before):
        base.set_attn_implementation(plain_implementation(base))
    try:
        yield
    finally:
        if is_packed(before):
            base.set_attn_implementation(before)


# --- the head --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Transform:
    """A step after the head that must move into it: where its value is kept, what kind it is, what switches it off."""

    owner: Any
    attribute: str
    scale: float = 1.0
    softcap: float | None = None

    @property
    def neutral(self) -> float | None:
        return None if self.softcap is not None else 1.0


def _find_transforms(base: PreTrainedModel) -> list[_Transform]:
    """What this architecture does to logits after `lm_head`, read from its configuration."""
    config = base.config.get_text_config()
    found: list[_Transform] = []
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:
        found.append(_Transform(config, "final_logit_softcapping", softcap=float(softcap)))
    scaling = getattr(config, "logits_scaling", None)
    if scaling not in (None, 1.0):
        scale = float(scaling) if "hyperclovax" in config.model_type else 1.0 / float(scaling)
        found.append(_Transform(config, "logits_scaling", scale=scale))
    if isinstance(getattr(base, "logit_scale", None), int | float):  # Cohere keeps it on the model
        found.append(_Transform(base, "logit_scale", scale=float(base.logit_scale)))
    inner = getattr(base, "model", None)
    if isinstance(getattr(inner, "lm_head_multiplier", None), int | float):  # Falcon-H1
        found.append(_Transform(inner, "lm_head_multiplier", scale=float(inner.lm_head_multiplier)))
    return [t for t in found if t.softcap is not None or t.scale != 1.0]


@dataclass
class _HeadRequest:
    """What the head is to compute during one forward pass."""

    source_rows: Tensor
    labels: Tensor
    scale: float
    softcap: float | None
    chunk_size: int | None


class LogprobHead(nn.Linear):
    """The model's own `lm_head`, its class swapped: log-probs of given labels when asked for, logits otherwise.

    The parameters, their names and their tying stay as they were, so saving, LoRA and sharding do not notice.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [R, T, D] -> logits [R, T, V]; inside `labels_in_head`, token log-probs [1, N] fp32."""
        request: _HeadRequest | None = self.__dict__.get("_request")
        if request is None:
            return (self.__dict__.get("_logits_over_ranks") or super().forward)(hidden)
        rows = hidden.flatten(0, -2).index_select(0, request.source_rows)
        device_type = hidden.device.type
        compute = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        weight, bias, shard = _own_rows(self.weight, self.bias)
        logps = token_logps(
            rows,
            weight,
            request.labels,
            bias=bias,
            shard=shard,
            scale=request.scale,
            softcap=request.softcap,
            compute_dtype=compute,
            chunk_size=request.chunk_size,
        )
        return logps[None].clone()  # what FSDP2 hands on must not be a view


def _own_rows(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabShard | None]:
    """This process's rows of an output embedding, with their bias, and where they lie; whole ones as they are."""
    if not isinstance(weight, DTensor):
        return weight, bias, None
    mesh = weight.device_mesh
    if mesh.ndim != 1 or weight.placements != (Shard(0),):
        raise ValueError(f"the output head is sharded as {weight.placements}, and only rows of it can be")
    _, start = Shard.local_shard_size_and_offset(weight.shape[0], mesh.size(), mesh.get_local_rank())
    shard = VocabShard(mesh.get_group(), start, weight.shape[0])
    return weight.to_local(), bias.to_local() if isinstance(bias, DTensor) else bias, shard


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an engine's wrapper (DDP, DeepSpeed) and a PEFT wrapper, or the model itself."""
    while isinstance(inner := model._modules.get("module"), nn.Module):
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def install_head(model: nn.Module) -> LogprobHead:
    """Swap the class of the model's output embedding for `LogprobHead`; idempotent.

    Raises:
        ValueError: the head is not a plain nn.Linear (adapters or quantisation on it, or no head at all).
    """
    head = unwrap(model).get_output_embeddings()
    if isinstance(head, LogprobHead):
        return head
    if head is None or original_class(head) is not nn.Linear:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has a {type(head).__name__} as output embedding, not a plain linear "
            "layer; remove lm_head from lora_target_modules, lora_modules_to_save and quantisation"
        )
    swap_class(head, LogprobHead)
    if "forward" in head.__dict__:  # transformers' tensor parallelism puts its own on the instance
        head.__dict__["_logits_over_ranks"] = head.__dict__.pop("forward")
    return head


@contextlib.contextmanager
def labels_in_head(model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None) -> Iterator[None]:
    """Inside, `model(...).logits` are the log-probs of the batch's labels, [1, N].

    Scales and soft-caps that the architecture applies after its head are done in the head and switched off behind it.
    """
    base = unwrap(model)
    head = install_head(model)
    transforms = _find_transforms(base)
    scale, softcap = 1.0, None
    for transform in transforms:
        scale *= transform.scale
        softcap = transform.softcap if transform.softcap is not None else softcap
    saved = [(t, getattr(t.owner, t.attribute)) for t in transforms]
    for transform in transforms:
        setattr(transform.owner, transform.attribute, transform.neutral)
    head.__dict__["_request"] = _HeadRequest(batch.source_rows, batch.labels, scale, softcap, chunk_size)
    try:
        yield
    finally:
        head.__dict__["_request"] = None
        for transform, value in saved:
            setattr(transform.owner, transform.attribute, value)


# --- log-probs of a batch --------------------------------------------------------------------------------------------


def compute_token_logps(model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None) -> Tensor:
    """Log-probs of the batch's labels, [N] fp32, through one forward pass.

    Raises:
        ValueError: rows that share a prefix or are packed, on a model whose attention is not ours. Restarted positions
            without our mask would silently be taken for separate documents.
    """
    base = unwrap(model)
    implementation = base.config._attn_implementation
    if batch.blocks is not None and not is_packed(implementation):
        raise ValueError(
            f"packed or shared-prompt rows need attention {PACKED!r}, not {implementation!r}; load the model with "
            f"attn_implementation={PACKED!r}, or set pack: false and share_prompt: false"
        )
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if batch.blocks is not None:
        inputs["packed_blocks"] = batch.blocks
        inputs[READ_ROWS] = batch.read_rows  # blocks that do not know it pass it on, like the one before
        # Without a mask transformers looks for packed rows in the positions, and waits for the device to tell.
        inputs["attention_mask"] = torch.ones_like(batch.input_ids, dtype=torch.bool)
        attention = contextlib.nullcontext()
    else:
        inputs["attention_mask"] = batch.attention_mask
        attention = plain_attention(model)
    with attention, labels_in_head(model, batch, chunk_size=chunk_size):
        return model(**inputs).logits.squeeze(0)


def compute_response_logps(
    model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Summed log-probs [S] fp32 and lengths [S] int64 of the batch's S responses, pairs or lists, in its order.

    Of a batch that is spread over ranks (`core.context`) too; all of them get the same sums.
    """
    here = batch.response_lengths if batch.local_lengths is None else batch.local_lengths
    sums = response_logps(compute_token_logps(model, batch, chunk_size=chunk_size), here)
    if batch.blocks is not None and batch.blocks.group is not None:
        sums = sum_over(sums, batch.blocks.group)
    return sums, batch.response_lengths


def compute_pair_logps(model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None) -> PairLogps:
    """Sums and lengths of the batch's pairs, as the losses want them.

    Raises:
        ValueError: the batch holds lists of another number of responses than two.
    """
    if set(batch.group_sizes) != {2}:
        raise ValueError(
            f"pairs have two responses each, this batch has lists of {sorted(set(batch.group_sizes))}; "
            "use compute_response_logps"
        )
    sums, lengths = compute_response_logps(model, batch, chunk_size=chunk_size)
    return PairLogps(
        chosen_sum=sums[0::2],
        rejected_sum=sums[1::2],
        chosen_length=lengths[0::2],
        rejected_length=lengths[1::2],
    )


# --- loading ---------------------------------------------------------------------------------------------------------


def pick_device(requested: str) -> torch.device:
    """The recipe's `device` as a torch device.

    Raises:
        ValueError: "cuda" where there is none.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no CUDA GPU; use device: auto or cpu")
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(requested)


def set_precision(recipe: Recipe, device: torch.device) -> None:
    """Let CUDA compute as the recipe's `tf32` says, and refuse a precision that this machine does not have.

    Raises:
        ValueError: which key, and what this machine can do.
    """
    name, has_bf16 = f"a {device.type.upper()}", device.type != "cuda"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        has_bf16 = major >= 8
        name = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    for key, wanted in (("bf16", recipe.bf16), ("master_dtype", recipe.master_dtype == "bfloat16")):
        if wanted and not has_bf16:
            instead = "bf16: false, which computes in float32" if key == "bf16" else "master_dtype: float32"
            raise ValueError(f"{key}: {name} has no bfloat16, which begins with 8.0 (Ampere); set {instead}")
    if recipe.tf32 and not (device.type == "cuda" and has_bf16):
        raise ValueError(f"tf32: {name} has no TensorFloat-32, GPUs from 8.0 (Ampere) on have; remove it")
    if recipe.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = recipe.tf32


def load_tokenizer(recipe: Recipe) -> Any:
    """The recipe's tokenizer, with the recipe's chat template and a padding token."""
    name = recipe.tokenizer_name_or_path or recipe.model_name_or_path
    tokenizer = load_pretrained(AutoTokenizer, name, recipe, what="tokenizer")
    if recipe.chat_template is not None:
        tokenizer.chat_template = recipe.chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    recipe: Recipe,
    *,
    device: torch.device,
    name: str | None = None,
    trainable: bool = True,
    mesh: Mesh | None = None,
    check: bool = True,
) -> nn.Module:
    """The recipe's model on a device, ready for `compute_pair_logps`.

    Args:
        recipe: says which model, attention, master dtype, adapters.
        device: where its weights go.
        name: another checkpoint to load instead (a reference model, a model to evaluate).
        trainable: False loads it frozen, in eval mode and without adapters of the recipe.
        mesh: the processes to spread it over, all of which must call this; None = whole, on this process.
        check: compare its log-probs with its ordinary ones; False leaves that to the caller (`engine.probe`).
    Raises:
        ValueError: no such model, an adapter, quantisation or attention kernel that cannot be had, a mesh that the
            model cannot be spread over, or a model whose log-probs here do not agree with its ordinary forward pass.
    """
    packed = recipe.pack or recipe.share_prompt
    mesh = mesh or Mesh(MeshSizes(), device=device)
    name = name or recipe.model_name_or_path
    options: dict[str, Any] = {
        "attn_implementation": PACKED if packed else recipe.attn_implementation,
        "dtype": getattr(torch, recipe.master_dtype),
    }
    if recipe.load_in_4bit and trainable:
        options |= quantization_options(recipe, device)
    if mesh.sizes.is_sharded:
        check_heads(load_pretrained(AutoConfig, name, recipe, what="configuration"), mesh.sizes)
    sharding = loading_options(mesh, recipe)
    with local_rank_of(device):
        model = load_pretrained(AutoModelForCausalLM, name, recipe, what="model", **options, **sharding)
    check_sharded_by_block(model)
    keep_quantized_trainable(model)
    if not packed and recipe.attn_implementation is None:
        model.set_attn_implementation(plain_implementation(model))
    if not (sharding or (recipe.load_in_4bit and trainable)):
        model = model.to(device)
    if recipe.disable_dropout or not trainable:
        disable_dropout(model)
    if packed:
        from simpo.engine.kernels import choose_kernel  # it imports this module

        choose_kernel(model, recipe.attention_kernel, device=device, half=bool(recipe.bf16))
    if trainable and recipe.use_peft:
        model = add_adapters(model, lora_config(recipe), seed=recipe.seed)
        if mesh.sizes.tp > 1:
            rebuild_adapters(model, seed=recipe.seed)
    install_head(model)
    if recipe.use_liger_kernel and why_no_liger(unwrap(model), device) is None:
        install_liger_kernels(unwrap(model))
    install_lean_blocks(model)
    if trainable and recipe.gradient_checkpointing:
        base = unwrap(model)  # transformers 5.17 has the older name alone
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({**(recipe.gradient_checkpointing_kwargs or {}), "use_reentrant": False})
    if not trainable:
        model.requires_grad_(False)
        model.eval()
    in_half = bool(sharding) and bool(recipe.bf16) and recipe.fsdp_param_dtype != "float32"
    if in_half:
        gather_blocks_in(model, torch.bfloat16)  # from here on a forward pass needs autocast
    share_tied_shards(model)
    # Kernels that take no fp32 are checked where autocast or the weights' dtype spares them it.
    if check and (packed or recipe.attn_implementation in (None, "sdpa", "eager") or recipe.bf16):
        from simpo.engine.probe import check_forward  # it imports this module

        check_forward(model, pack=recipe.pack, share_prompt=recipe.share_prompt, bf16=bool(recipe.bf16), mesh=mesh)
        drop_gathered(model)
    return model


def source_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype that the base model's own checkpoint is stored in; the final model is saved in it."""
    config = load_pretrained(AutoConfig, recipe.model_name_or_path, recipe, what="configuration")
    return config.dtype or torch.float32


def load_pretrained(factory: Any, name: str, recipe: Recipe, *, what: str, **options: Any) -> Any:
    """factory.from_pretrained with the recipe's revision; a ValueError of one line where there is no such thing."""
    if _looks_local(name) and not Path(name).is_dir():
        raise ValueError(f"model_name_or_path: there is no folder {name!r}; give a folder or a hub name")
    if Path(name).is_dir():  # a bar for reading local weights is noise beside the run's own; a download keeps its bar
        transformers_logging.disable_progress_bar()
    try:
        return factory.from_pretrained(
            name,
            revision=recipe.model_revision or "main",
            trust_remote_code=recipe.trust_remote_code,
            **options,
        )
    except (OSError, KeyError, ImportError) as error:  # a missing or broken checkpoint, an attention not installed
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load the {what} {name!r}: {first_line}") from error


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: a policy's log-probs should not depend on the dice."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)


def quantization_options(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to hold the weights in 4 bits; a ValueError where this machine cannot."""
    # On a CPU it warns of a kernel for inference that it would fetch from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError("load_in_4bit needs bitsandbytes: pip install 'simpo[qlora]'") from error
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if recipe.bf16 else torch.float32
    kind, nested = recipe.bnb_4bit_quant_type, recipe.bnb_4bit_use_double_quant
    try:  # not every build of bitsandbytes runs everywhere, and what is raised differs from build to build
        layer = bitsandbytes.nn.Linear4bit(
            64, 64, bias=False, compute_dtype=compute, compress_statistics=nested, quant_type=kind
        ).to(device)
        layer(torch.ones(2, 64, dtype=compute, device=device, requires_grad=True)).sum().backward()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"load_in_4bit: bitsandbytes {bitsandbytes.__version__} cannot hold 4-bit weights on {device.type} here "
            f"({reason}); set it to false for LoRA on unquantised weights (master_dtype: bfloat16 halves them)"
        ) from error
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=compute,
    )
    return {
        "quantization_config": quantization,
        "device_map": {"": device.index or 0 if device.type == "cuda" else device.type},
    }


def keep_quantized_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes on a CPU from packing 4-bit weights for inference in the first pass in eval mode.

    They stay packed, and in 0.50 no gradient passes through packed ones: adapters below the last layer would not learn.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def lora_config(recipe: Recipe) -> Any:
    """The recipe's adapters as peft wants them; a ValueError where peft is not installed."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("use_peft needs peft: pip install 'simpo[peft]'") from error
    targets = recipe.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(recipe.lora_modules_to_save) if recipe.lora_modules_to_save else None,
    )


def add_adapters(model: PreTrainedModel, config: Any, *, seed: int, **options: Any) -> nn.Module:
    """A PEFT model around the model; its adapters' initial values follow from the seed, whatever ran before.

    Args:
        config: peft's, see `lora_config`.
        options: further ones of `peft.get_peft_model`.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(model, config, **options)
