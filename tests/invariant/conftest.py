"""Tiny random models of many architectures, ragged random pairs, and recipes on meshes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mesh_runs import FOUR, MESHES, Settings, data_ranks
from ranks import Ranks
from transformers import PreTrainedModel

from simpo.core.packing import TokenPair
from simpo.model.attention import PACKED

VOCABULARY = 509

# What each architecture adds over a plain Llama. Windows of 8 are shorter than most sequences here.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},  # biases on query, key and value
    "Mistral": {"sliding_window": 8},
    "Gemma2": {  # attention soft-cap, final soft-cap, alternating windows
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 2.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "Phi3": {"sliding_window": 6},  # fused projections
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.5},
    "Cohere": {"logit_scale": 0.25},  # parallel blocks, LayerNorm, logits scaled
    "Phi": {"num_key_value_heads": 9},  # LayerNorm, biases everywhere, on the head too, partial rotary
}


@pytest.fixture(scope="session")
def random_model() -> Callable[..., PreTrainedModel]:
    """build(architecture, *, seed=0, dtype=float32, tied=True, **config): random weights, packed attention."""

    def build(
        architecture: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = True, **config: Any
    ) -> PreTrainedModel:
        settings = {
            "hidden_size": 72,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
            "tie_word_embeddings": tied,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, architecture + "Config")(**(settings | ARCHITECTURES.get(architecture, {}) | config)),
            attn_implementation=PACKED,
        ).to(dtype)
        with torch.no_grad():  # biases are created as 0 and norms as 1, which would hide mistakes in them
            for parameter in model.parameters():
                spread = 0.1 if parameter.ndim > 1 else 0.2
                parameter.copy_(parameter if parameter.ndim == 1 else torch.zeros_like(parameter))
                parameter.add_(spread * torch.randn_like(parameter))
        return model.train()

    return build


@pytest.fixture(scope="session")
def ragged_pairs() -> Callable[..., list[TokenPair]]:
    """make(count, *, seed=0, longest=14): pairs of ragged lengths; some share more than their prompt."""

    def make(count: int, *, seed: int = 0, longest: int = 14) -> list[TokenPair]:
        generator = torch.Generator().manual_seed(seed)

        def tokens(at_least: int, at_most: int) -> list[int]:
            length = int(torch.randint(at_least, at_most + 1, (1,), generator=generator))
            return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

        pairs = []
        for index in range(count):
            prompt = tokens(1, longest)
            common = tokens(1, 4) if index % 3 == 1 else []  # the responses begin alike
            chosen, rejected = prompt + common + tokens(1, longest), prompt + common + tokens(1, longest)
            pairs.append(TokenPair(f"row-{index}", chosen, len(prompt), rejected, len(prompt)))
        return pairs

    return make


@pytest.fixture
def on_mesh(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """on_mesh(mesh, function, *args): its answers by ranks, from as many processes as the mesh has."""

    def call(mesh: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        if mesh == "1 process":
            return [function(*args, **kwargs)]
        ranks: Ranks = request.getfixturevalue("four_ranks" if mesh in FOUR else "two_ranks")
        return ranks.run(function, *args, **kwargs)

    return call


@pytest.fixture
def settings_of(step_recipe, model_folder, tmp_path: Path) -> Callable[..., Settings]:
    """settings_of(mesh, shape, name=, **keys): a recipe on that mesh in a run directory of that name."""

    def build(mesh: str, shape: Settings, *, name: str | None = None, **keys: Any) -> Settings:
        folder = tmp_path / (name or mesh.replace(" ", "-"))
        mesh_keys = {**MESHES[mesh], "output_dir": str(folder), **keys}
        return step_recipe(model_folder(**shape), data_ranks(mesh), **mesh_keys)

    return build
