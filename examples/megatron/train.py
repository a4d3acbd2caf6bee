"""SimPO in Megatron-Core alone: Hugging Face weights in, Hugging Face weights out.

    torchrun --nproc-per-node 8 examples/megatron/train.py --load MODEL --data-path PAIRS --save OUT \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --bf16

Everything between `get_forward_backward_func` and the optimizer is Megatron's; the step it runs, the batches and the
metrics are `simpo.hosts.megatron.step`. Arguments have Megatron's names. Meant to be read and changed: there are no
checkpoints, no evaluation and no distributed optimizer.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from convert import build_chunks, check_config, gather_weights, load_weights, megatron_config
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from simpo.data.loader import PairStore
from simpo.data.prepare import prepare_pairs
from simpo.hosts.megatron.batch import iterate_batches
from simpo.hosts.megatron.settings import MegatronSettings, add_simpo_arguments
from simpo.hosts.megatron.step import forward_step, reduce_metrics
from simpo.model.load import load_tokenizer
from simpo.recipe import load_recipe


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="folder or hub name of a Hugging Face model")
    parser.add_argument("--data-path", required=True, help="file, folder or dataset of pairs")
    parser.add_argument("--save", required=True, help="folder for the trained Hugging Face model")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--virtual-pipeline-model-parallel-size", type=int)
    parser.add_argument("--micro-batch-size", type=int, default=2, help="pairs in a micro-batch of one model replica")
    parser.add_argument("--global-batch-size", type=int, default=32, help="pairs in an optimizer step")
    parser.add_argument("--seq-length", type=int, default=1024, help="longest prompt + response, tokens")
    parser.add_argument("--train-iters", type=int, default=100, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--lr-warmup-fraction", type=float, default=0.1)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, with fp32 main weights")
    parser.add_argument("--seed", type=int, default=42)
    return add_simpo_arguments(parser)


def start() -> None:
    """Join the processes that torchrun started."""
    if dist.is_initialized():
        return
    if not torch.cuda.is_available():
        raise ValueError("Megatron-Core's schedules and optimizers need CUDA, and this machine has none")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")


def train(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """The whole run; returns each step's metrics on ranks of the last pipeline stage, nothing on others.

    Raises:
        ValueError: arguments, model, layout or data do not fit together.
    """
    settings = MegatronSettings.from_arguments(arguments)
    hf_config = AutoConfig.from_pretrained(arguments.load)
    check_config(
        hf_config,
        tp=arguments.tensor_model_parallel_size,
        pp=arguments.pipeline_model_parallel_size,
        chunks=arguments.virtual_pipeline_model_parallel_size or 1,
    )
    model_parallel_cuda_manual_seed(arguments.seed)
    num_microbatches = count_microbatches(arguments)
    recipe = load_recipe(
        {
            "model_name_or_path": arguments.load,
            "dataset_name": arguments.data_path,
            "max_length": arguments.seq_length,
            "seed": arguments.seed,
        },
        processes=1,
    )
    tokenizer = load_tokenizer(recipe)
    if dist.get_rank() == 0:
        prepare_pairs(recipe, tokenizer)
    dist.barrier()
    pairs = PairStore(prepare_pairs(recipe, tokenizer, progress=False).train, share_prompt=False)

    config = build_config(arguments, hf_config)
    chunks = build_chunks(hf_config, config, max_sequence_length=arguments.seq_length)
    weights = AutoModelForCausalLM.from_pretrained(arguments.load, dtype=torch.float32).state_dict()
    load_weights(chunks, hf_config, weights)
    del weights
    model = wrap(chunks, config)
    optimizer, scheduler = build_optimizer(arguments, model)
    config.grad_scale_func = optimizer.scale_loss

    batches = [  # each virtual stage reads the same micro-batches, at its own time
        iterate_batches(
            pairs,
            settings,
            num_microbatches=num_microbatches,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            seed=arguments.seed,
        )
        for _ in chunks
    ]
    forward_backward = get_forward_backward_func()
    history = []
    for step in range(arguments.train_iters):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = forward_backward(
            forward_step_func=functools.partial(forward_step, settings=settings),
            data_iterator=batches,
            model=model,
            num_microbatches=num_microbatches,
            seq_length=settings.seq_length,
            micro_batch_size=settings.actual_micro_batch_size,
            forward_only=False,
        )
        updated, grad_norm, _ = optimizer.step()
        if not updated:
            raise ValueError(f"step {step + 1}: the gradient is not finite, nothing was updated")
        scheduler.step(increment=arguments.global_batch_size)
        if metrics := reduce_metrics(reports):
            history.append(metrics | {"grad_norm": float(grad_norm)})
        if metrics and dist.get_rank() == dist.get_world_size() - 1:  # always of the last stage
            shown = ("lm loss", "rewards/accuracies", "rewards/margins", "sft_loss")
            numbers = "  ".join(f"{name} {metrics[name]:.4f}" for name in shown)
            print(f"step {step + 1}/{arguments.train_iters}  {numbers}  grad_norm {grad_norm:.3f}", flush=True)
    save(arguments, chunks, hf_config, tokenizer)
    return history


def count_microbatches(arguments: argparse.Namespace) -> int:
    replicas = parallel_state.get_data_parallel_world_size()
    count, left = divmod(arguments.global_batch_size, arguments.micro_batch_size * replicas)
    if left or count < 1:
        raise ValueError(
            f"global_batch_size = {arguments.global_batch_size}: must be a multiple of micro_batch_size "
            f"{arguments.micro_batch_size} x {replicas} model replica(s)"
        )
    return count


def build_config(arguments: argparse.Namespace, hf_config: PretrainedConfig) -> TransformerConfig:
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    virtual = arguments.virtual_pipeline_model_parallel_size
    return megatron_config(
        hf_config,
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        # Between two stages, batched messages of the interleaved schedule would be taken for each other.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        bf16=arguments.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        finalize_model_grads_func=finalize_model_grads,
        # The loss is divided once, by the pairs of all micro-batches on all ranks: exact where some hold fewer.
        calculate_per_token_loss=True,
    )


def wrap(chunks: Sequence[GPTModel], config: TransformerConfig) -> list[DistributedDataParallel]:
    on_device = [chunk.to(torch.cuda.current_device()) for chunk in chunks]
    halved = [Float16Module(config, chunk) if config.bf16 else chunk for chunk in on_device]
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return [DistributedDataParallel(config, ddp, chunk) for chunk in halved]


def build_optimizer(
    arguments: argparse.Namespace, model: list[DistributedDataParallel]
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=arguments.lr,
            min_lr=0.0,
            weight_decay=arguments.weight_decay,
            adam_beta2=0.999,
            clip_grad=arguments.clip_grad,
            bf16=arguments.bf16,
            params_dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
        ),
        model,
    )
    pairs = arguments.train_iters * arguments.global_batch_size  # Megatron counts schedules in samples
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=arguments.lr,
        min_lr=0.0,
        lr_warmup_steps=int(arguments.lr_warmup_fraction * pairs),
        lr_decay_steps=pairs,
        lr_decay_style="cosine",
        start_wd=arguments.weight_decay,
        end_wd=arguments.weight_decay,
        wd_incr_steps=pairs,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def save(arguments: argparse.Namespace, chunks: list[GPTModel], hf_config: PretrainedConfig, tokenizer: Any) -> None:
    """Write the model where it came from: a Hugging Face folder, by rank 0."""
    weights = gather_weights(chunks, hf_config)
    if dist.get_rank() == 0:
        model = AutoModelForCausalLM.from_pretrained(arguments.load)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        tied = ["lm_head.weight"] if hf_config.tie_word_embeddings else []
        if unexpected or missing != tied:
            raise ValueError(f"not converted: {missing}; of no use to the model: {unexpected}")
        model.save_pretrained(arguments.save)
        tokenizer.save_pretrained(arguments.save)
        print(f"saved to {arguments.save}", flush=True)
    dist.barrier()


def main() -> int:
    arguments = build_parser().parse_args()
    try:
        start()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=arguments.tensor_model_parallel_size,
            pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=arguments.virtual_pipeline_model_parallel_size,
        )
        train(arguments)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
