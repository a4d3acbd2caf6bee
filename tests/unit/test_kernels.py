"""model.kernels: the kernel of packed attention that a recipe asks for, or that `auto` finds to work."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from simpo.core import attention
from simpo.core.blocks import AttentionBlocks
from simpo.model import kernels
from simpo.model.attention import PACKED, is_packed, packed_by
from simpo.model.kernels import choose_kernel, describe_attention
from simpo.recipe import load_recipe

CPU = torch.device("cpu")


@pytest.fixture
def model():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation=PACKED)


@pytest.fixture
def hopper(monkeypatch):
    """Everything believes in an H100 with FlashAttention-3 installed, except for the tensors, which stay on the CPU."""
    monkeypatch.setattr(attention, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "has_compiler", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "_is_installed", lambda package: package == "flash_attn_interface")
    removed = []

    class Handle:
        def remove(self):
            removed.append(True)

    registry = torch.nn.attention._registry
    monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, "FA3", Handle)
    monkeypatch.setattr(registry, "_FLASH_ATTENTION_ACTIVE", None)
    return removed


def problems_of(monkeypatch, **problems: str):
    """Trials end as said; FlashAttention-3 is tried as varlen while it is active."""

    def tried(path, heads):
        return problems.get(torch.nn.attention.current_flash_attention_impl() or path)

    monkeypatch.setattr(kernels, "_try", tried)


def test_auto_on_a_cpu_tries_nothing(model, monkeypatch):
    monkeypatch.setattr(kernels, "_try", lambda path, heads: pytest.fail("nothing to try"))
    assert choose_kernel(model, device=CPU, half=True) is None
    assert model.config._attn_implementation == PACKED
    assert describe_attention(model, half=True) == "products of matrices, in tiles"


@pytest.mark.parametrize("kernel", ["matmul", "blocks"])
def test_a_kernel_that_works_is_used_by_every_layer(model, kernel):
    assert choose_kernel(model, kernel, device=CPU, half=True) is None
    assert model.config._attn_implementation == packed_by(kernel) == f"simpo_packed_{kernel}"
    assert is_packed(model.config._attn_implementation)
    assert is_packed(model.model.layers[0].self_attn.config._attn_implementation)


@pytest.mark.parametrize("kernel", ["varlen", "flash3", "flash4", "flex"])
def test_a_kernel_that_this_machine_cannot_do_is_one_clear_line(model, kernel):
    with pytest.raises(ValueError) as error:
        choose_kernel(model, kernel, device=CPU, half=True)
    assert str(error.value) == (
        f"attention_kernel: {kernel} cannot be used here: it needs a CUDA GPU, not cpu; this machine and model can do "
        "matmul, blocks; auto takes the fastest"
    )


def test_auto_takes_flash_attention_3_where_it_is_installed_and_right(model, monkeypatch, hopper):
    problems_of(monkeypatch)
    assert choose_kernel(model, device=CPU, half=True) is None
    assert torch.nn.attention.current_flash_attention_impl() == "FA3"
    assert describe_attention(model, half=True) == "varlen_attn (FA3), all blocks at once"
    assert choose_kernel(model, "varlen", device=CPU, half=True) is None
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert hopper == [True]


def test_auto_leaves_out_what_is_wrong_and_says_so(model, monkeypatch, hopper):
    problems_of(monkeypatch, FA3="its results differ")
    assert choose_kernel(model, device=CPU, half=True) == "flash3 was left out: its results differ"
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert model.config._attn_implementation == packed_by("varlen")
    assert describe_attention(model, half=True).endswith("(flash3 was left out: its results differ)")
    problems_of(monkeypatch, FA3="its results differ", varlen="no kernel")
    note = choose_kernel(model, device=CPU, half=True)
    assert note == "flash3 was left out: its results differ; varlen was left out: no kernel"
    assert model.config._attn_implementation == packed_by("blocks")


def test_a_soft_capped_model_falls_back_to_tiles(model, monkeypatch, hopper):
    model.config.attn_logit_softcapping = 50.0
    problems_of(monkeypatch)
    assert choose_kernel(model, device=CPU, half=True) is None
    assert describe_attention(model, half=True) == "FlexAttention, all blocks at once"
    with pytest.raises(
        ValueError, match=r"flash3 cannot be used here: this model soft-caps its scores; .* flex, matmul"
    ):
        choose_kernel(model, "flash3", device=CPU, half=True)
    problems_of(monkeypatch, flex="out of shared memory")
    assert choose_kernel(model, device=CPU, half=True) == "flex was left out: out of shared memory"
    assert model.config._attn_implementation == packed_by("matmul")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("flash4", "the package flash_attn.cute.interface is not installed"),
        ("flash3", "its results differ"),
    ],
)
def test_a_kernel_asked_for_by_name_is_refused_with_its_reason(model, monkeypatch, hopper, kernel, reason):
    problems_of(monkeypatch, FA3="its results differ")
    with pytest.raises(ValueError, match=f"attention_kernel: {kernel} cannot be used here: {reason}; .*varlen, flex"):
        choose_kernel(model, kernel, device=CPU, half=True)


def test_a_trial_passes_what_is_right_and_finds_what_is_not(model, monkeypatch):
    """On a CPU the products in tiles stand for a kernel: in bf16 they pass, and a leak between blocks does not."""
    heads = kernels._heads(model, CPU, True)
    assert kernels._try("matmul", heads) is None
    right = attention.packed_attention

    def leaking(query, key, value, blocks, **options):
        return right(query, key, value, AttentionBlocks(((0, 0, 0, 150), (0, 71, 150, 300))), **options)

    monkeypatch.setattr(kernels, "packed_attention", leaking)
    assert "differ from the reference" in kernels._try("matmul", heads)

    def broken(*args, **options):
        raise RuntimeError("no kernel image is available\nmore lines")

    monkeypatch.setattr(kernels, "packed_attention", broken)
    assert kernels._try("matmul", heads) == "no kernel image is available"


def test_a_kernel_for_rows_that_are_not_packed_is_refused():
    with pytest.raises(ValueError, match="attention_kernel: flex computes packed attention, and pack"):
        load_recipe({"model_name_or_path": "m", "pack": False, "share_prompt": False, "attention_kernel": "flex"})
