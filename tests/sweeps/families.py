"""Which families of transformers' causal language models train packed, padded, or not at all: the table of the docs.

    python tests/sweeps/families.py [FAMILY ...] [--write docs/families.md]

Each family that has a causal language model is built from its own configuration, made small, with random weights and
logits as large as a trained model's. Then it is loaded as `simpo train` loads it. Slow (some minutes), so not in CI;
needs no network.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import tempfile
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "attention_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "ffn_hidden_size", "mlp_hidden_size"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "feed_forward_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_intermediate_size", "intermediate_size_mlp", "expert_ffn_hidden_size", "moe_d_ff"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "kv_channels", "d_kv", "dim_head"), 16),
    "vocab_size": 512,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "moe_topk"), 2),
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1},
    **{"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{
        "state_size": 8,
        "mamba_d_state": 8,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_expand": 2,
        "chunk_size": 16,
    },
    **{
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "n_groups": 1,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_chunk_size": 16,
    },
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"sliding_window": 64, "attention_chunk_size": 64, "lru_width": 64, "hidden_size_per_layer_input": 16},
    **{"vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0, "pad_token_id": 0, "bos_token_id": 1},
    **{
        "eos_token_id": 2,
        "attention_window_size": 64,
        "word_embed_proj_dim": 64,
        "ssm_state_size": 8,
        "index_head_dim": 16,
    },
    **{
        "image_size": 32,
        "patch_size": 16,
        "num_channels": 3,
        "index_topk": 64,
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
    **{"layers_block_type": None, "block_types": None, "layer_types": None, "mlp_layer_types": None},
}
"""Sizes by the names that configurations have for them."""

OF_FAMILY: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family's configuration needs beyond them."""


LONGEST_S = 240  # for one family
PAGE = """# Model families

What becomes of the families that transformers {version} has a causal language model for. Each was built small, with
random weights and logits as large as a trained model's, and loaded as `simpo train` loads a model: with
[the check at start](seams.md#the-check-at-start), whose verdict this is. Of {tried} families {num_packed} train on
packed rows with shared prompts, and {num_padded} on padded rows, which the run says in one line; {num_refused} are
refused. A model is checked again whenever it is loaded, so nothing depends on this list, which
`tests/sweeps/families.py` writes.

## Packed

{packed}.

## Padded

Slower, and otherwise the same. States that run through a row (Mamba, gated delta rules, convolutions) would mix the
texts in it; attention sinks, and attention that is not transformers' common function, cannot be given packed rows.

{padded}

## Refused

{refused}

## Not tried

Their default configuration could not be made small by the script, or needs a package that was not installed:
{not_built}.
"""


class Row(NamedTuple):
    """What became of a family: packed, padded, refused or not built, and why."""

    family: str
    rows: str
    why: str = ""


def main() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as families

    import simpo.model.load  # noqa: F401  once, before the forks

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", type=Path, help="Page for the table.")
    asked = parser.parse_args()
    context = multiprocessing.get_context("fork")
    found = []
    for family in asked.families or families:
        with context.Pool(1) as pool:  # a crash, or a class changed for good, must not reach the next family
            try:
                row = pool.apply_async(try_family, (family,)).get(timeout=LONGEST_S)
            except multiprocessing.TimeoutError:
                row = Row(family, "not built", f"it took longer than {LONGEST_S} s")
        found.append(row)
        print(*row, sep=" | ", flush=True)
    if asked.write:
        asked.write.write_text(render(found), encoding="utf-8")


def render(found: Sequence[Row]) -> str:
    """The page: what trains packed, padded, or not at all."""
    import transformers

    by_rows = {
        rows: [row for row in found if row.rows == rows] for rows in ("packed", "padded", "refused", "not built")
    }
    packed, padded, refused, not_built = by_rows.values()
    return PAGE.format(
        version=transformers.__version__,
        tried=len(found) - len(not_built),
        packed=_list(packed),
        **{f"num_{rows.replace(' ', '_')}": len(of) for rows, of in by_rows.items()},
        padded=_table(padded),
        refused=_table(refused),
        not_built=_list(not_built),
    )


def _list(rows: Sequence[Row]) -> str:
    return textwrap.fill(", ".join(row.family for row in rows), width=118, break_on_hyphens=False)


def _table(rows: Sequence[Row]) -> str:
    lines = [f"| {row.family} | {row.why.replace('|', '/')} |" for row in rows]
    return "\n".join(["| family | why |", "|---|---|", *lines])


def small_config(family: str) -> Any:
    """The family's configuration with small sizes, sub-configurations included."""
    from transformers import CONFIG_MAPPING

    return shrink(CONFIG_MAPPING[family], OF_FAMILY.get(family, {}))


def shrink(kind: type, changes: dict[str, Any]) -> Any:
    default = kind()
    known = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    settings = {name: value for name, value in SMALL.items() if name in known}
    for name in getattr(default, "attribute_map", {}):  # one of two names
        settings.pop(name, None)
    for name in ("layers_block_type", "block_types", "layer_types", "mlp_layer_types"):
        pattern = getattr(default, name, None)
        if name in settings and isinstance(pattern, list | tuple) and pattern:
            kinds = list(dict.fromkeys(pattern))
            settings[name] = [kinds[index % len(kinds)] for index in range(max(2, len(kinds)))]
            layers = "num_hidden_layers" if "num_hidden_layers" in known else "n_layer"
            settings[layers] = max(2, len(kinds))
        else:
            settings.pop(name, None)
    if "qk_rope_head_dim" in known:  # latent attention has a key for every query head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
        settings["head_dim"] = settings["qk_rope_head_dim"]
    if hasattr(default, "is_decoder"):
        settings["is_decoder"] = True
    for name in getattr(default, "sub_configs", {}):
        present = getattr(default, name, None)
        if present is not None and name != "backbone_config":
            settings[name] = shrink(type(present), {})
    return kind(**{**settings, **changes})


def try_family(family: str) -> Row:
    """Build it, load it as a run would, and compute the gradient of one batch."""
    import torch
    from transformers import AutoModelForCausalLM

    _be_quiet()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = AutoModelForCausalLM.from_config(small_config(family))
            enlarge(model)
            model.save_pretrained(folder)
            AutoModelForCausalLM.from_pretrained(folder)
        except Exception as error:  # what a configuration lacks decides what is raised
            return Row(family, "not built", _in_short(error))
        try:
            return _load_and_compute(family, folder)
        except Exception as error:
            return Row(family, "refused", _in_short(error))


def _load_and_compute(family: str, folder: str) -> Row:
    import torch

    from simpo.core.batch import build_batch
    from simpo.core.packing import TokenPair
    from simpo.model.attention import is_packed
    from simpo.model.head import compute_pair_logps
    from simpo.model.load import load_model
    from simpo.model.settle import notes_of
    from simpo.recipe import load_recipe

    recipe = load_recipe({"model_name_or_path": folder, "bf16": False, "device": "cpu"})
    model = load_model(recipe, device=torch.device("cpu"))
    packs = is_packed(model.config._attn_implementation)
    pairs = [
        TokenPair("a", [*range(20, 32), 50, 51, 52], 12, [*range(20, 32), 60, 61], 12),
        TokenPair("b", [*range(90, 97), 70], 7, [*range(90, 97), 71, 72, 73], 7),
    ]
    logps = compute_pair_logps(model.train(), build_batch(pairs, pack=packs, share_prompt=packs))
    (logps.chosen_sum - logps.rejected_sum).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients or not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        raise ValueError("the gradient is not finite")
    why = "; ".join(notes_of(model))
    found = re.fullmatch(r"rows are padded, which is slower: \w+ does not take packed ones \((.*)\)", why)
    why = found[1] if found else why
    return Row(family, "packed" if packs else "padded", re.sub(r" \(rms.*", "", why))


def _be_quiet() -> None:
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _in_short(error: Exception) -> str:
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]


def enlarge(model: Any, largest: float = 15.0) -> None:
    """Scale the output layer so that logits are as large as a trained model's."""
    import torch

    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
        ids = torch.randint(3, 500, (2, 24))
        logits = model(input_ids=ids).logits
        if not torch.isfinite(logits).all():
            raise ValueError("logits are not finite")
        head = model.get_output_embeddings()
        head.weight.mul_(largest / logits.abs().max())


if __name__ == "__main__":
    main()
