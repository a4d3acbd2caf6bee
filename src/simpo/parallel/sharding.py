"""Models spread over a mesh: loading options, the format weights are gathered in, adapters, gradients, whole weights.

FSDP2, HSDP and tensor parallelism are transformers' (`DistributedConfig`): it reads each process's shards straight
from the checkpoint. What it leaves open is done here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from simpo.core.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe


def loading_options(mesh: Mesh, recipe: Recipe) -> dict[str, Any]:
    """What `from_pretrained` needs to load this process's shards and nothing more; empty for a whole model."""
    sizes = mesh.sizes
    if not sizes.is_sharded:
        return {}
    if recipe.load_in_4bit:
        raise ValueError(
            "load_in_4bit: 4-bit weights are not sharded here; set dp_shard: 1, cp: 1, tp: 1 and dp_replicate to the "
            "number of processes"
        )
    if not OPTIMIZERS[recipe.optim].shards:
        raise ValueError(f"optim: {recipe.optim} does not support sharded weights; use adamw_bf16, or set dp_shard: 1")
    if recipe.torch_compile and sizes.tp > 1:
        raise ValueError(
            "torch_compile: torch's compiler cannot trace tensor-parallel blocks whose rows change in length; set it "
            "to false, or tp: 1"
        )
    if recipe.use_liger_kernel and sizes.tp > 1:
        raise ValueError(
            "use_liger_kernel: Liger's kernels do not support tensor-parallel weights; set it to false, or tp: 1"
        )
    for key in ("lora_modules_to_save", "use_dora") if recipe.use_peft else ():
        if getattr(recipe, key):
            raise ValueError(f"{key}: not supported with sharded weights; leave it out, or set dp_shard: 1")
    if sizes.cp > 1 and not (recipe.pack or recipe.share_prompt):
        raise ValueError(f"cp = {sizes.cp}: padded rows cannot be split; set pack: true, or cp: 1")
    options = {"fsdp_size": sizes.shard, "tp_size": sizes.tp}
    if sizes.dp_replicate > 1:
        if "dp_replicate_size" not in DistributedConfig.__dataclass_fields__:
            raise ValueError(
                f"dp_replicate = {sizes.dp_replicate}: transformers {transformers.__version__} cannot replicate a "
                "sharded model; update transformers, or set dp_replicate: 1"
            )
        options["dp_replicate_size"] = sizes.dp_replicate
    return {"distributed_config": DistributedConfig(**options)}


def check_sharded_by_block(model: nn.Module) -> None:
    """Raise ValueError where transformers' plan found no block of this model, so that FSDP would gather all at once."""
    if isinstance(model, FSDPModule) and sum(isinstance(module, FSDPModule) for module in model.modules()) < 3:
        raise ValueError(
            f"{original_class(model).__name__}: transformers has no sharding plan that fits this architecture; "
            "set dp_shard: 1, cp: 1 and dp_replicate to the number of processes"
        )


def gather_blocks_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Gather the weights of sharded blocks in `dtype`; their gradients are reduced in fp32.

    Embedding, last norm and head are gathered as they are, and nothing but weights is cast: the residual stream stays
    fp32 and autocast decides the rest, as in one process. (The policy that transformers offers casts each block's
    input as well.)
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    base = _base_of(model)
    ends = {base.get_input_embeddings(), base.get_output_embeddings()}
    # The last norm shares its state with the head: what it belongs to is known by its state, not by its place.
    left_alone = {id(part._get_fsdp_state()) for part in sharded if not ends.isdisjoint(part.modules())}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in sharded:
        state = block._get_fsdp_state()
        if id(state) not in left_alone:
            state._mp_policy = policy
            for group in _param_groups(state):
                group.mp_policy = policy
                group._init_mp_dtypes()


def share_tied_shards(model: nn.Module) -> None:
    """Let parts that hold one tied weight gather it from the same memory.

    torch 2.13 pads a shard that does not divide once for each part, and an update would reach the last copy only.
    """
    base = _base_of(model)
    if not isinstance(base, FSDPModule):
        return
    base._get_fsdp_state()._lazy_init()  # pads; the first forward pass would do it otherwise
    states = {id(state): state for state in (m._get_fsdp_state() for m in base.modules() if isinstance(m, FSDPModule))}
    held = [part for state in states.values() for group in _param_groups(state) for part in group.fsdp_params]
    updated = {
        id(part.sharded_param): part._sharded_param_data
        for part in held
        if _storage(part._sharded_param_data) == _storage(part.sharded_param.to_local())
    }
    for part in held:
        part._sharded_param_data = updated[id(part.sharded_param)]


def _param_groups(state: Any) -> list[Any]:
    """What an FSDP2 module gathers, in the groups it does so."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.12 has one group a module, or none
        return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return groups


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def gathered_bytes(model: nn.Module) -> int:
    """The most that FSDP2 holds in one piece at a time on this process, in bytes; 0 where it shards nothing.

    At the head that and a block; in the backward pass two blocks, and of one its gradients as they come and in fp32.
    """
    base = _base_of(model)
    ends = {base.get_input_embeddings(), base.get_output_embeddings()}
    parts = [part for part in base.modules() if isinstance(part, FSDPModule)]
    of_ends = {part._get_fsdp_state() for part in parts if not ends.isdisjoint(part.modules())}
    at_head, block, backward = 0, 0, 0
    for state in dict.fromkeys(part._get_fsdp_state() for part in parts):
        gathered = gradients = 0
        for group in _param_groups(state):
            for weight in (each.sharded_param for each in group.fsdp_params):
                numel = local_part(weight).numel() * _times_sharded(weight)
                size = (group.mp_policy.param_dtype or weight.dtype).itemsize
                gathered, gradients = gathered + numel * size, gradients + numel * (size + 4) * weight.requires_grad
        if state in of_ends:
            at_head = max(at_head, gathered)
            continue
        block, backward = max(block, gathered), max(backward, 2 * gathered + gradients)
    return max(at_head + block, backward)


def _times_sharded(weight: DTensor) -> int:
    """How many processes FSDP2 spreads each part of a weight over."""
    names = weight.device_mesh.mesh_dim_names or ()
    return weight.device_mesh.size(names.index("fsdp")) if "fsdp" in names else 1


def drop_gathered(model: nn.Module) -> None:
    """Free the weights that sharded parts still hold whole after a forward pass that no backward pass follows.

    Until then the parameters of those parts are the whole ones: not to be handed to an optimizer, or saved.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _base_of(model: nn.Module) -> Any:
    """The transformers model in `model`, which may have adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def original_class(module: nn.Module) -> type:
    """A module's class, without the one that FSDP2 put around it."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def swap_class(module: nn.Module, new: type) -> None:
    """Give a module another class, inside the one that FSDP2 put around its own."""
    module.__class__ = type(f"FSDP{new.__name__}", (FSDPModule, new), {}) if isinstance(module, FSDPModule) else new


def rebuild_adapters(model: nn.Module, *, seed: int) -> None:
    """Give LoRA adapters on a tensor-parallel model the shapes of whole layers, and shard them like their layers.

    peft sizes them by the shards it sees. The side that faces a layer's sharded dimension is sharded as well: B of a
    layer split by outputs, A of one split by inputs. Every process draws the same values: A as torch draws a linear
    layer's, B zero.

    Raises:
        ValueError: a layer is sharded in a way that adapters cannot follow.
    """
    base = model.get_base_model()
    mesh = base._mesh_manager.get_mesh("tp")
    generator = torch.Generator().manual_seed(seed)
    for layer, module in base.named_modules():
        if not (hasattr(module, "lora_A") and hasattr(module, "base_layer")):
            continue
        style = getattr(module.base_layer, "_hf_tp_plan", None) or ""
        if style not in ("", "colwise", "rowwise") or not hasattr(module.base_layer, "weight"):
            raise ValueError(
                f"tp = {mesh.size()}: {layer} of {original_class(base).__name__} is sharded as {style or 'experts'}, "
                "which adapters do not follow; leave it out of lora_target_modules, or set tp: 1"
            )
        num_out, num_in = module.base_layer.weight.shape  # of a DTensor: the whole layer's
        for name in module.lora_A:
            a, b = module.lora_A[name], module.lora_B[name]
            rank, like = module.r[name], {"dtype": a.weight.dtype, "device": a.weight.device}
            values = (torch.rand(rank, num_in, generator=generator) * 2 - 1) * num_in**-0.5
            a_weight, b_weight = values.to(**like), torch.zeros(num_out, rank, **like)
            if style == "rowwise":
                a_weight = distribute_tensor(a_weight, mesh, [Shard(1)], src_data_rank=None)
            if style == "colwise":
                b_weight = distribute_tensor(b_weight, mesh, [Shard(0)], src_data_rank=None)
            a.weight, b.weight = nn.Parameter(a_weight), nn.Parameter(b_weight)
            a.in_features, a.out_features, b.in_features, b.out_features = num_in, rank, rank, num_out


class GradientSync:
    """How gradients of one step's micro-batches come together over the processes.

    DDP and FSDP2 average their own; adapters on a sharded model, which FSDP2 does not manage, are averaged here, in one
    piece. The loss is scaled by the number of processes averaged over, so that averages are sums. Norms of heads that
    tensor parallelism spreads (Qwen3, Gemma-3) are summed over its ranks by transformers, after every backward pass and
    with all that was summed before; what it will multiply is divided first.

    Args:
        model: as it was loaded.
        mesh: of the run.
    Attributes:
        module: what to call in a training step: the model, inside DDP where that is used.
        scale: by which every micro-batch's loss is multiplied before its backward pass.
    """

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.mesh, self.module = mesh, model
        self.scale = mesh.sizes.gradient
        self._strays: list[nn.Parameter] = []
        self._summed = _summed_by_transformers(model) if mesh.sizes.tp > 1 else []
        if mesh.sizes.is_sharded and mesh.gradient_group is not None:
            self._strays = [p for p in model.parameters() if p.requires_grad and not _is_known_to_fsdp(p)]
        elif mesh.gradient_group is not None:
            device_ids = [mesh.device] if mesh.device.type == "cuda" else None
            config = _base_of(model).config
            self.module = DistributedDataParallel(
                model,
                device_ids=device_ids,
                gradient_as_bucket_view=True,
                find_unused_parameters=config.get_text_config() is not config,  # what sees is not reached by text
            )

    def micro_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: DDP waits with its reduction for the step's last one.

        FSDP2 reduces each: gradients of the whole model would not fit anywhere.
        """
        for parameter in self._summed:
            if parameter.grad is not None:
                parameter.grad /= self.mesh.sizes.tp
        waits = isinstance(self.module, DistributedDataParallel) and not is_last
        return self.module.no_sync() if waits else contextlib.nullcontext()

    @torch.no_grad()
    def finish(self) -> None:
        """After a step's last backward pass: average the gradients that neither DDP nor FSDP2 does."""
        if not self._strays:
            return
        for parameter in self._strays:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        parts = [local_part(parameter.grad) for parameter in self._strays]
        flat = torch.cat([part.reshape(-1).float() for part in parts])
        dist.all_reduce(flat, group=self.mesh.gradient_group)
        flat /= self.mesh.sizes.gradient
        for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(mean.view_as(part))


def _summed_by_transformers(model: nn.Module) -> list[nn.Parameter]:
    """Parameters whose gradients transformers adds up over tp in place; FSDP2 takes each of its own away before."""
    base = _base_of(model)
    summed = [name for name, style in base.tp_plan.items() if style == "replicated_with_grad_allreduce"]
    patterns = [re.compile(re.escape(name).replace(r"\*", r"\d+") + r"(\.\w+)?") for name in summed]
    return [
        parameter
        for name, parameter in base.named_parameters()
        if not _is_known_to_fsdp(parameter) and any(pattern.fullmatch(name) for pattern in patterns)
    ]


def _is_known_to_fsdp(parameter: nn.Parameter) -> bool:
    names = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else ()
    return "fsdp" in (names or ())


@torch.no_grad()
def total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, whole, however each is sharded; the same on every process.

    Squares are summed over the mesh dimensions that split a tensor, and no others. (torch's own function takes
    sharded tensors of one mesh only, and on a CPU loses 0.1% on large ones.) No gradient is copied, whatever its
    dtype, and an accelerator is not waited for.

    Returns:
        A scalar in fp64, where the gradients are; on the CPU if some of them are there.
    """
    groups: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        split = ()
        if isinstance(gradient, DTensor):
            split = tuple(
                (gradient.device_mesh, dim)
                for dim, placement in enumerate(gradient.placements)
                if isinstance(placement, Shard | _StridedShard)
            )
        part = local_part(gradient)
        groups.setdefault((split, part.device), []).append(part)
    squares = []
    for (split, _), parts in groups.items():
        square = _sum_of_squares(parts)
        for mesh, dim in split:
            dist.all_reduce(square, group=mesh.get_group(dim))
        squares.append(square)
    if len({square.device for square in squares}) > 1:  # offloaded gradients are in CPU memory, adapters' are not
        squares = [square.cpu() for square in squares]
    return sum(squares[1:], squares[0]).sqrt() if squares else torch.zeros((), dtype=torch.float64)


_ROW = 1024  # numbers that a CPU adds up one after the other in fp32
_ROWS = 2**12  # of these rows, how many are widened to fp32 at a time


def _sum_of_squares(parts: list[Tensor]) -> Tensor:
    """The sum of squares of tensors on one device, a scalar in fp64 on it."""
    if parts[0].device.type != "cpu":  # an accelerator adds in a tree, and widens what it reads as it goes
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for part in parts:
            by_dtype.setdefault(torch.promote_types(part.dtype, torch.float32), []).append(part)
        norms = [torch.stack(torch._foreach_norm(same, 2, dtype=dtype)) for dtype, same in by_dtype.items()]
        return sum(norm.double().square().sum() for norm in norms)
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        flat = part.reshape(-1)
        rows = flat[: len(flat) // _ROW * _ROW].view(-1, _ROW)
        norms = [torch.linalg.vector_norm(some.float(), dim=1) for some in rows.split(_ROWS)]
        total += torch.cat(norms).double().square().sum()
        total += torch.linalg.vector_norm(flat[rows.numel() :].float()).double().square()
    return total


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_weights(model: nn.Module, *, keep: bool) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole tensor) of a model's state dict; one that was sharded in CPU memory, a tied one by its first name.

    One at a time: a device that holds the model need not hold it twice. Every process must run through all of it.

    Args:
        keep: whether this process wants the tensors; others get None.
    """
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            yield name, (whole if whole is value else whole.cpu()) if keep else None


@contextlib.contextmanager
def on_one_process(base: nn.Module) -> Iterator[None]:
    """Inside, transformers takes the model for one that is not spread over processes: its `save_pretrained` neither
    waits for others nor writes the mesh into the configuration."""
    config = base.config
    spread = config.__dict__.pop("distributed_config", None)
    mesh, base._device_mesh = getattr(base, "_device_mesh", None), None
    tp_size, base._tp_size = getattr(base, "_tp_size", None), None
    try:
        yield
    finally:
        base._device_mesh, base._tp_size = mesh, tp_size
        if spread is not None:
            config.distributed_config = spread
