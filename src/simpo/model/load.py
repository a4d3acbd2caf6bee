"""Loading of tokenizers and Hugging Face models, LoRA and QLoRA included, ready for preference training."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto import tokenization_auto
from transformers.utils import logging as transformers_logging

from simpo.errors import first_line
from simpo.hub import unreachable_hub
from simpo.model.attention import plain_implementation, unwrap
from simpo.model.costs import check_heads
from simpo.model.head import install_head, install_router_loss
from simpo.model.low_memory import install_liger_kernels, install_low_memory_blocks, why_no_liger
from simpo.model.settle import attend_packed, check_rows, disable_dropout, fix_rotary_factors
from simpo.parallel.mesh import Mesh, MeshSizes, local_rank_of
from simpo.parallel.sharding import (
    check_sharded_by_block,
    drop_gathered,
    gather_blocks_in,
    loading_options,
    original_class,
    rebuild_adapters,
    share_tied_shards,
)

if TYPE_CHECKING:
    from simpo.recipe import Recipe

# peft imports bitsandbytes, which on a CPU warns of a kernel for inference that it would fetch from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


SLOW_BF16 = "this CPU has no instructions for bfloat16, which takes it tens of times as long as float32"


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


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16. CUDA refuses it without; on a CPU it is slow without."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in every build of torch
    return device.type != "cpu" or known is None or known()


def slow_bf16(device: torch.device, instead: str) -> str | None:
    """What to say of bfloat16 on this device where it is slow; `instead` is what computes in float32."""
    return None if device.type != "cpu" or has_bf16(device) else f"{SLOW_BF16}; {instead} computes in float32"


def set_precision(recipe: Recipe, device: torch.device) -> str | None:
    """Let CUDA compute as the recipe's `tf32` says, and refuse a precision that this machine does not have.

    Returns:
        What to say of a precision that is far slower here than another.
    Raises:
        ValueError: which key, and what this machine can do.
    """
    name, on_cuda, fits = f"a {device.type.upper()}", device.type == "cuda", has_bf16(device)
    if on_cuda:
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    for key, wanted in (("bf16", recipe.bf16), ("master_dtype", recipe.master_dtype == "bfloat16")):
        if wanted and on_cuda and not fits:
            instead = "bf16: false, which computes in float32" if key == "bf16" else "master_dtype: float32"
            raise ValueError(f"{key}: {name} has no bfloat16, which needs 8.0 (Ampere) or more; set {instead}")
    if recipe.tf32 and not (on_cuda and fits):
        raise ValueError(f"tf32: {name} has no TensorFloat-32, which needs 8.0 (Ampere) or more; remove the key")
    if recipe.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
    instead = "bf16: false" + " with master_dtype: float32" * (recipe.master_dtype == "bfloat16")
    return slow_bf16(device, instead) if recipe.computes_in_bf16 else None


def load_tokenizer(recipe: Recipe) -> Any:
    """The recipe's tokenizer, with a padding token."""
    name = recipe.tokenizer_name_or_path or recipe.model_name_or_path
    tokenizer = load_pretrained(AutoTokenizer, name, recipe, what="tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    recipe: Recipe,
    *,
    device: torch.device,
    name: str | None = None,
    trainable: bool = True,
    in_4bit: bool | None = None,
    mesh: Mesh | None = None,
    check: bool = True,
) -> nn.Module:
    """The recipe's model on a device, ready for `compute_pair_logps`.

    Args:
        recipe: says which model, attention, master dtype, adapters.
        device: where its weights go.
        name: another checkpoint to load instead (a reference model, a model to evaluate).
        trainable: False loads it frozen, in eval mode and without adapters of the recipe.
        in_4bit: hold the weights in 4 bits; None = as the recipe says where it is trained, not otherwise.
        mesh: the processes to spread it over, all of which must call this; None = whole, on this process.
        check: compare its log-probs with its ordinary ones; False leaves that to the caller (`model.probe`).
    Raises:
        ValueError: no such model; an adapter, quantisation or attention kernel that does not work here; a mesh that the
            model cannot be spread over; or log-probs that do not agree with the model's ordinary forward pass.
    """
    mesh = mesh or Mesh(MeshSizes(), device=device)
    in_4bit = recipe.load_in_4bit and trainable if in_4bit is None else in_4bit
    name = name or recipe.model_name_or_path
    model: nn.Module = _load_weights(recipe, name, device=device, mesh=mesh, in_4bit=in_4bit)
    if recipe.disable_dropout or not trainable:
        disable_dropout(model)
    fix_rotary_factors(model, recipe.max_length)
    attend_packed(model, recipe, device=device)
    if trainable and recipe.use_peft:
        model = add_adapters(model, lora_config(recipe), seed=recipe.seed)
        if mesh.sizes.tp > 1:
            rebuild_adapters(model, seed=recipe.seed)
        check_tied_adapters(model)
    install_head(model)
    if recipe.use_liger_kernel and why_no_liger(unwrap(model), device) is None:
        install_liger_kernels(unwrap(model))
    install_low_memory_blocks(model)
    if trainable:
        install_router_loss(model, recipe.router_aux_loss_coef)
    if trainable and recipe.gradient_checkpointing:
        checkpoint_activations(unwrap(model), **(recipe.gradient_checkpointing_kwargs or {}))
    if not trainable:
        model.requires_grad_(False)
        model.eval()
    if mesh.sizes.is_sharded and recipe.bf16 and recipe.fsdp_param_dtype != "float32":
        gather_blocks_in(model, torch.bfloat16)  # from here on a forward pass needs autocast
    share_tied_shards(model)
    if check:
        check_rows(model, recipe, bf16=bool(recipe.bf16), mesh=mesh)
        drop_gathered(model)
    return model


def _load_weights(recipe: Recipe, name: str, *, device: torch.device, mesh: Mesh, in_4bit: bool) -> PreTrainedModel:
    """A checkpoint with the recipe's attention and master dtype, whole on the device or this process's shards."""
    options: dict[str, Any] = {
        "attn_implementation": recipe.attn_implementation,
        "dtype": getattr(torch, recipe.master_dtype),
    }
    if in_4bit:
        options |= quantization_options(recipe, device)
    if mesh.sizes.is_sharded:
        check_heads(load_pretrained(AutoConfig, name, recipe, what="configuration"), mesh.sizes)
    sharding = loading_options(mesh, recipe)
    with local_rank_of(device):
        model = load_pretrained(AutoModelForCausalLM, name, recipe, what="model", **options, **sharding)
    check_sharded_by_block(model)
    keep_quantized_trainable(model)
    if recipe.attn_implementation is None:
        model.set_attn_implementation(plain_implementation(model))
    return model if sharding or in_4bit else model.to(device)


def source_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype that the base model's own checkpoint is stored in; the final model is saved in it."""
    config = load_pretrained(AutoConfig, recipe.model_name_or_path, recipe, what="configuration")
    return config.dtype or torch.float32


def identify_weights(recipe: Recipe) -> dict[str, str]:
    """Which weights the names of the run's models stand for on this machine: by name, as `weights_at` says."""
    keys = ["model_name_or_path", *["ref_model_name_or_path"] * recipe.loss.needs_reference]
    found = {}
    for key in keys:
        if (name := getattr(recipe, key)) is not None:
            config = load_pretrained(AutoConfig, name, recipe, what="configuration", key=key)
            found[f"weights of {name}"] = weights_at(name, config)
    return found


def weights_at(name: str, config: Any) -> str:
    """The hub's commit that a configuration was loaded from; of a folder, a digest of its files' ends."""
    folder = Path(name).expanduser()
    return digest_ends(folder, 2**16) if folder.is_dir() else str(getattr(config, "_commit_hash", None))


def digest_ends(folder: Path, size: int = 2**20) -> str:
    """16 hex digits of the names and sizes of a model's files, and of so many bytes at either end of each."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model"):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(size))
                file.seek(max(0, path.stat().st_size - size))
                digest.update(file.read())
    return digest.hexdigest()


_OF_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken*")


def load_pretrained(
    factory: Any, name: str, recipe: Recipe, *, what: str, key: str = "model_name_or_path", **options: Any
) -> Any:
    """factory.from_pretrained with the recipe's revision, which is the model's; a ValueError of one line on failure.

    A model that its checkpoint does not hold all weights of is refused: transformers would draw them at random.
    """
    name = os.path.expanduser(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local and not Path(name).is_dir():
        raise ValueError(f"{key}: folder {name!r} does not exist; give a folder or a hub name")
    is_local = Path(name).is_dir()
    if is_local:  # only a download deserves a bar of its own
        transformers_logging.disable_progress_bar()
    unreachable = "" if is_local else unreachable_hub()
    is_other = name in (recipe.ref_model_name_or_path, recipe.tokenizer_name_or_path)
    revision = "main" if is_other and name != recipe.model_name_or_path else recipe.model_revision or "main"
    if factory is AutoTokenizer and hasattr(tokenization_auto, "_use_mistral_format"):
        options["mistral_format"] = False  # beside mistral-common, which vLLM brings: it knows no chat template
    if factory is AutoModelForCausalLM:
        options["output_loading_info"] = True
    with naming_what_is_loaded(what, name, key=key, unreachable=unreachable):
        found = factory.from_pretrained(name, revision=revision, trust_remote_code=recipe.trust_remote_code, **options)
    if factory is not AutoModelForCausalLM or not isinstance(found, tuple):  # a class of the checkpoint's own
        return found
    model, loaded = found
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{key}: {name!r} lacks {len(missing)} of the weights of {original_class(model).__name__}, such as "
            f"{missing[0]}, which would be random numbers; give a checkpoint of the whole causal language model"
        )
    return model


@contextlib.contextmanager
def naming_what_is_loaded(what: str, name: str, *, key: str = "", unreachable: str = "") -> Iterator[None]:
    """Around from_pretrained: what is wrong with a folder or hub name becomes a ValueError of one line.

    Args:
        unreachable: why the hub cannot be asked; empty where it can, or need not.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # A missing or broken checkpoint, an attention that is not installed, weights of another shape.
    except (OSError, KeyError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
        why = first_line(error)
        if what == "tokenizer" and Path(name).is_dir() and not any(any(Path(name).glob(f)) for f in _OF_TOKENIZERS):
            why = "the folder has none" + "; give tokenizer_name_or_path" * (key == "model_name_or_path")
        elif "trust_remote_code" in str(error):
            why = "it comes with code of its own, which runs with trust_remote_code: true alone; read it first"
        elif isinstance(error, SafetensorError):
            why = f"a .safetensors file is damaged, or was fetched in part ({why})"
        elif isinstance(error, JSONDecodeError):
            why = f"one of its .json files is damaged ({why})"
        elif "ignore_mismatched_sizes" in str(error):
            why = "its weights have other shapes than its config.json says"
        if unreachable and isinstance(error, OSError):
            why = f"it is neither a folder nor in the hub's cache, and the hub cannot be reached ({unreachable})"
        raise ValueError(f"cannot load the {what} {name!r}: {why}") from error


def checkpoint_activations(model: PreTrainedModel, **options: Any) -> None:
    """Have the model compute its blocks' activations again in the backward pass; options of torch's checkpoint()."""
    # transformers 5.17 has the older name alone.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({**options, "use_reentrant": False})


def quantization_options(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to hold the weights in 4 bits; a ValueError where this machine cannot."""
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
        raise ValueError(
            f"load_in_4bit: bitsandbytes {bitsandbytes.__version__} cannot hold 4-bit weights on {device.type} here "
            f"({first_line(error)}); set it to false for LoRA on unquantised weights "
            "(master_dtype: bfloat16 halves them)"
        ) from error
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=compute,
    )
    place = device.index or 0 if device.type == "cuda" else device.type
    return {"quantization_config": quantization, "device_map": {"": place}}


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
        revision=recipe.model_revision,
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(recipe.lora_modules_to_save) if recipe.lora_modules_to_save else None,
    )


def add_adapters(model: PreTrainedModel, config: Any, *, seed: int, **options: Any) -> nn.Module:
    """A PEFT model around the model; its adapters' initial values follow from the seed, whatever ran before.

    Args:
        config: peft's, see `lora_config`.
        options: further ones of `peft.get_peft_model`.
    Raises:
        ValueError: adapters on a weight of several experts cannot have what was asked for.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(seed)
    try:
        with quiet_peft():
            return get_peft_model(model, config, **options)
    except (ValueError, AttributeError) as error:
        if "ParamWrapper" not in str(error):
            raise
        raise ValueError(
            f"lora_target_modules: {original_class(model).__name__} has its experts in one weight, and adapters there "
            "take neither dropout nor DoRA, nor tp; name modules without the experts, or set lora_dropout: 0 and tp: 1 "
            f"({first_line(error)})"
        ) from None


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Inside, peft may wrap a model without warnings of what is looked after here."""
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings|.*ensure_weight_tying", category=UserWarning)
        yield


def check_tied_adapters(model: nn.Module) -> None:
    """Raise ValueError for adapters, or a trained copy, on an embedding whose weight is the output head's as well.

    The head would compute without them, and a merged model, in which there is one weight for both, would be another.
    """
    base = unwrap(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    adapted = getattr(embedding, "base_layer", getattr(embedding, "original_module", None))
    if adapted is not None and head is not None and getattr(head, "weight", None) is adapted.weight:
        name = next((name for name, module in base.named_modules() if module is embedding), "the embedding")
        raise ValueError(
            f"{name.rpartition('.')[2]} shares its weight with the output head (tie_word_embeddings), which its "
            "adapter would not reach; leave it out of lora_target_modules and lora_modules_to_save"
        )
