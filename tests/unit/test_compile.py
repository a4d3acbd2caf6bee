"""model.compile: blocks of several architectures, each compiled once for all layers and lengths."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from cases import rarely
from packaging.version import Version
from torch import Tensor, nn

from simpo.core.batch import PackedPairs, build_batch
from simpo.model.attention import PACKED
from simpo.model.compile import compile_blocks, find_blocks
from simpo.model.head import compute_token_logps, install_head


class Pair(NamedTuple):
    row_id: str
    chosen_ids: list[int]
    chosen_start: int
    rejected_ids: list[int]
    rejected_start: int


def make_batch(seed: int) -> PackedPairs:
    rng = random.Random(seed)

    def tokens() -> list[int]:
        return [rng.randrange(1, 100) for _ in range(rng.randint(2, 30))]

    prompts = [tokens() for _ in range(rng.randint(1, 4))]
    return build_batch([Pair("row", p + tokens(), len(p), p + tokens(), len(p)) for p in prompts])


def make_model(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attention_dropout=0.0,
        attn_implementation=PACKED,
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).train()
    install_head(model)
    return model


def gradients(model: nn.Module, batch: PackedPairs) -> dict[str, Tensor]:
    compute_token_logps(model, batch).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# Dynamo looks for a gradient on every tensor it meets and hides torch's warning about that only where warnings show.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("architecture", ["Gemma2", *map(rarely, ("Qwen3", "Phi3"))])
def test_each_piece_of_a_block_is_compiled_once_and_gives_the_same_gradients(architecture: str) -> None:
    """Query and key norms; windows in every other layer and soft-caps; fused projections."""
    from torch._dynamo.backends.debugging import aot_eager

    model = make_model(architecture)
    batches = [make_batch(seed) for seed in range(5)]
    expected = [gradients(model, batch) for batch in batches]
    compilations: set[Any] = set()

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        compilations.add(torch._guards.CompileContext.current_compile_id())
        return aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    assert len(compile_blocks(model, device=torch.device("cpu"), backend=backend)) == 2
    compilations.clear()  # the trial's
    for batch, theirs in zip(batches, expected, strict=True):
        ours = gradients(model, batch)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), name
    times = max(Counter(each.frame_id for each in compilations).values())
    assert times == (
        1 if Version(torch.__version__) >= Version("2.12") else len(find_blocks(model))
    )  # 2.11: each layer's


def test_blocks_are_the_decoder_layers() -> None:
    model = make_model("Qwen3")
    assert find_blocks(model) == list(model.model.layers)


def test_a_model_that_does_not_name_its_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch_compile: Linear does not say which of its modules are its blocks"):
        compile_blocks(nn.Linear(2, 2), device=torch.device("cpu"), backend="eager")
