"""The processes under transformers' Trainer: whether accelerate has made of them what they were launched for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from simpo.hosts.hf.config import SimPOConfig, check_pairs_are_dealt, parallel_sizes
from simpo.parallel.mesh import Mesh, MeshSizes

if TYPE_CHECKING:
    from simpo.recipe import Recipe


def join_launched_world(args: SimPOConfig) -> Mesh:
    """The processes that transformers has met, checked against what the launcher said.

    Raises:
        ValueError: fewer met than were started, or they talk through a backend that does not fit the device.
    """
    if args.device.type == "mps":
        raise ValueError("device: mps (Apple's GPUs) has not been tested and is refused; set use_cpu=True")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != started:
        raise ValueError(
            f"the launcher started {started} processes, and accelerate made a world of {args.world_size} of them: each "
            "would train alone. On CPUs give use_cpu=True and ddp_backend='gloo', and no GPU-only configuration"
        )
    if started == 1:
        if args.n_gpu > 1:  # transformers would split every batch over the GPUs of one process
            print(f"{args.n_gpu} GPUs are visible and one is used; accelerate launch or torchrun uses them all")
            args._n_gpu = 1
        return Mesh(MeshSizes(), device=args.device)
    backend = str(torch.distributed.get_backend())
    if args.device.type == "cpu" and "nccl" in backend:
        raise ValueError(f"processes that compute on CPUs talk through gloo, not {backend}; give ddp_backend='gloo'")
    return Mesh(MeshSizes(dp_replicate=started), device=args.device)


def check_launch(accelerator: Any, recipe: Recipe) -> None:
    """Raise ValueError where accelerate has silently become something else than it was launched as, or cannot do what
    the recipe asks for."""
    for name, wanted in (("FSDP", "ACCELERATE_USE_FSDP"), ("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED")):
        asked = os.environ.get(wanted, "false").lower() in ("1", "true")
        if asked and accelerator.distributed_type.value != name:
            raise ValueError(
                f"accelerate was launched for {name} and runs as {accelerator.distributed_type.value}: "
                "FSDP needs GPUs; choose another configuration file"
            )
    check_pairs_are_dealt(parallel_sizes(getattr(accelerator.state, "parallelism_config", None)))
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and recipe.num_eval_generations:
        raise ValueError(
            f"num_eval_generations = {recipe.num_eval_generations}: not under accelerate's FSDP, whose weights are put "
            "together for training alone; DeepSpeed's ZeRO and the native trainer (torchrun, dp_shard) generate"
        )
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError("fsdp_version: only 2 is supported; see recipes/accelerate/fsdp2.yaml")
    if plugin is not None and accelerator.mixed_precision == "bf16":
        # accelerate's own would round log-probs on their way out, and add up gradients in bfloat16.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        config = plugin.deepspeed_config
        tensor = (config.get("tensor_parallel") or {}).get("autotp_size")
        sizes = {"tensor_parallel: autotp_size": tensor, "sequence_parallel_size": config.get("sequence_parallel_size")}
        check_pairs_are_dealt(sizes)
    if plugin is not None and plugin.zero_stage == 0 and accelerator.mixed_precision != "no":
        raise ValueError(
            "zero_stage: 0 keeps fp32 weights where they cannot be read; use zero_stage: 1, or for plain data "
            "parallelism recipes/accelerate/multi_gpu.yaml"
        )
