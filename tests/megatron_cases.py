"""One optimizer step of the Megatron host for tests: small models, pairs, cases and layouts, and how ranks run them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, Qwen2Config, Qwen2ForCausalLM

from simpo.core.packing import TokenPair
from simpo.hosts.megatron.batch import iterate_batches
from simpo.hosts.megatron.settings import MegatronSettings
from simpo.model.attention import PACKED

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "megatron"
SEED = 5


# --- models and pairs, built alike in every process -------------------------------------------------------------------


def build_model(kind: str) -> LlamaForCausalLM | Qwen2ForCausalLM:
    """Four layers (for 2 stages x 2 virtual ones), 4 query and 2 KV heads; "llama", "tied" or "qwen2"."""
    torch.manual_seed(0)
    family, config = (Qwen2ForCausalLM, Qwen2Config) if kind == "qwen2" else (LlamaForCausalLM, LlamaConfig)
    model = family._from_config(
        config(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            max_position_embeddings=128,
            tie_word_embeddings=kind == "tied",
            initializer_range=0.1,
        ),
        attn_implementation=PACKED,
    )
    with torch.no_grad():  # norms begin as 1 and biases as 0, which would hide mistakes in their conversion
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def make_pairs(count: int, *, seed: int = SEED) -> list[TokenPair]:
    """Ragged pairs; the first has responses of one token. Trained tokens 0 and 256 are id 0 of two shards."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return torch.randint(0, 512, (length,), generator=generator).tolist()

    pairs = []
    for index in range(count):
        prompt, most = tokens(2, 9), 1 if index == 0 else 13
        chosen, rejected = tokens(1, most), tokens(1, most)
        if index:
            chosen, rejected = [*chosen, 256], [*rejected, 0]
        pairs.append(TokenPair(f"row-{index}", prompt + chosen, len(prompt), prompt + rejected, len(prompt)))
    return pairs


SEQ_LENGTH = 28  # of the fixed shapes; divides into 4 chunks for cp 2
NUM_PAIRS = 7


@dataclasses.dataclass(frozen=True)
class Case:
    """One optimizer step.

    Attributes:
        loss: Megatron arguments of the loss.
        model: see `build_model`.
        num_pairs: spread over the micro-batches; fewer than those leaves some empty.
        per_token: Megatron's calculate_per_token_loss.
        dpo: the DPO twin.
    """

    loss: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: str = "llama"
    num_pairs: int = NUM_PAIRS
    per_token: bool = True
    dpo: bool = False

    def settings(self, **layout: Any) -> MegatronSettings:
        arguments = {"micro_batch_size": 2, "seq_length": SEQ_LENGTH, **self.loss, **layout}
        return MegatronSettings.from_arguments(arguments, method="dpo" if self.dpo else "simpo")


SIMPO = Case()
REFERENCE_SUMS = {f"row-{index}": (-3.0 - index, -2.5 - 0.7 * index) for index in range(NUM_PAIRS)}

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2, two virtual stages each": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "dp2": {},
    "cp2": {"context_parallel_size": 2},
}


# --- in the ranks -----------------------------------------------------------------------------------------------------


def load_example(name: str) -> Any:
    """A module of examples/megatron, which is a folder of scripts."""
    if str(EXAMPLE) not in sys.path:
        sys.path.insert(0, str(EXAMPLE))
    return importlib.import_module(name)


def run_cases(cases: Sequence[Case], sizes: dict[str, int], num_microbatches: int) -> list[dict[str, Any]]:
    """Every case on one layout: metrics (of last stages), and gradients by Hugging Face names (on rank 0)."""
    from megatron_on_cpu import on_cpu

    with on_cpu(**{name: size for name, size in sizes.items() if size > 1}):
        return [run_step(case, sizes, num_microbatches) for case in cases]


def run_step(case: Case, sizes: dict[str, int], num_microbatches: int) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from simpo.hosts.megatron import step as host

    settings = case.settings(**sizes)
    config = build_model(case.model).config
    wrapped, chunks = build_megatron(case, config, sizes)
    reports = get_forward_backward_func()(
        forward_step_func=functools.partial(
            host.dpo_forward_step if case.dpo else host.forward_step, settings=settings
        ),
        data_iterator=[
            iterate_batches(
                make_pairs(case.num_pairs),
                settings,
                num_microbatches=num_microbatches,
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                data_parallel_size=parallel_state.get_data_parallel_world_size(),
                seed=1,
                reference=REFERENCE_SUMS if case.dpo else None,
            )
            for _ in wrapped
        ],
        model=wrapped,
        num_microbatches=num_microbatches,
        seq_length=settings.seq_length,
        micro_batch_size=settings.actual_micro_batch_size,
        forward_only=False,
    )
    gradients = load_example("convert").gather_weights(chunks, config, value=lambda parameter: parameter.main_grad)
    # As arrays: torch sends tensors between processes by a channel that these ranks lack.
    return {
        "metrics": host.reduce_metrics(reports),
        "gradients": {name: gradient.numpy() for name, gradient in gradients.items()},
    }


def build_megatron(
    case: Case, config: PretrainedConfig, sizes: dict[str, int], **others: Any
) -> tuple[list[Any], list[Any]]:
    """The chunks with the model's weights, wrapped in Megatron's DDP and bare."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron_on_cpu import GatheredAttention

    convert = load_example("convert")
    options: dict[str, Any] = {name: size for name, size in sizes.items() if size > 1}
    if sizes.get("pipeline_model_parallel_size", 1) > 1:
        options["pipeline_dtype"] = torch.float32
    if "virtual_pipeline_model_parallel_size" in options:
        # With two stages each is the other's predecessor and successor: batched messages would be taken for each other.
        options |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    options |= {"calculate_per_token_loss": case.per_token, "finalize_model_grads_func": finalize_model_grads}
    megatron = convert.megatron_config(config, **(options | others))
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if sizes.get("context_parallel_size", 1) > 1:  # megatron's own needs Transformer Engine, hence CUDA
        spec.submodules.self_attention.submodules.core_attention = ModuleSpec(module=GatheredAttention)
    chunks = convert.build_chunks(config, megatron, max_sequence_length=SEQ_LENGTH, layer_spec=spec)
    convert.load_weights(chunks, config, build_model(case.model).state_dict())
    wrapped = [
        DistributedDataParallel(megatron, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk)
        for chunk in chunks
    ]
    return wrapped, chunks
