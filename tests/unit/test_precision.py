"""A precision that a machine does not have is refused with one line that says what it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpo.model.load import (
    has_bf16,
    keep_quantized_trainable,
    load_pretrained,
    quantization_options,
    set_precision,
)
from simpo.recipe import load_recipe
from simpo.run import reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def settle(monkeypatch: pytest.MonkeyPatch):
    """settle(compute capability or None for a CPU, **keys): whether products are then in TF32."""
    switches = SimpleNamespace(allow_tf32=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", switches)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    def call(capability: tuple[int, int] | None, **keys: Any) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        recipe = load_recipe({"model_name_or_path": "any", **keys})
        set_precision(recipe, CPU if capability is None else CUDA)
        return switches.allow_tf32

    return call


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_before_ampere_only_float32_is_left(capability, settle):
    number = rf"{capability[0]}\.{capability[1]}"
    with pytest.raises(ValueError, match=rf"^bf16: Some GPU \(compute capability {number}\) has .*set bf16: false"):
        settle(capability)
    with pytest.raises(ValueError, match=r"^master_dtype: .*set master_dtype: float32$"):
        settle(capability, bf16=False, master_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"^tf32: .*remove the key$"):
        settle(capability, bf16=False, tf32=True)
    assert not settle(capability, bf16=False)


def test_from_ampere_on_everything_is_allowed(settle):
    assert not settle((9, 0))
    assert settle((8, 0), tf32=True, master_dtype="bfloat16")


def test_a_cpu_has_bfloat16_and_no_tf32(settle):
    assert not settle(None, master_dtype="bfloat16", tf32=False)
    with pytest.raises(ValueError, match=r"^tf32: a CPU has no TensorFloat-32"):
        settle(None, tf32=True)


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_without_instructions_for_bfloat16_is_said_to_be_slow(has, monkeypatch):
    """An AVX2 processor took 34 to 53 times as long for products of SmolLM2-135M's shapes as in float32."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    assert has_bf16(CPU) is has
    said = set_precision(load_recipe({"model_name_or_path": "any"}), CPU)
    assert (said is None) if has else (said is not None and "bf16: false computes in float32" in said)
    assert set_precision(load_recipe({"model_name_or_path": "any", "bf16": False}), CPU) is None


@pytest.mark.parametrize("works", [True, False])
def test_four_bits_are_tried_on_the_device_first(works, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    recipe = load_recipe({"model_name_or_path": "any", "use_peft": True, "load_in_4bit": True, "bf16": False})
    if works:
        options = quantization_options(recipe, CPU)
        assert options["device_map"] == {"": "cpu"}
        assert options["quantization_config"].bnb_4bit_compute_dtype == torch.float32
        return

    def forward(self: Any, x: Any) -> Any:
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", forward)
    with pytest.raises(ValueError, match=r"^load_in_4bit: bitsandbytes .* on cpu here \(no kernel\); set it to false"):
        quantization_options(recipe, CPU)


def test_gradients_pass_four_bit_weights_after_a_pass_in_eval_mode():
    """On CPUs with AVX512-BF16, bitsandbytes packs them for inference in that pass, and x gets no gradient any more."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16)).to(CPU)
    keep_quantized_trainable(model)
    x = torch.ones(2, 64, requires_grad=True)
    with torch.no_grad():
        model.eval()(x.detach())
    model.train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


def test_the_revision_is_the_models_and_no_other_repositorys(monkeypatch):
    """A reference's stored log-probs are of the commit that it was loaded at."""
    asked = {}

    class Factory:
        @staticmethod
        def from_pretrained(name: str, revision: str, **options: Any) -> Any:
            asked[name] = revision
            return SimpleNamespace(_commit_hash=f"commit of {name}", get_text_config=SimpleNamespace)

    keys = {"model_name_or_path": "a/policy", "model_revision": "abc", "ref_model_name_or_path": "a/guide"}
    recipe = load_recipe({**keys, "tokenizer_name_or_path": "a/words", "loss_type": "dpo"})
    for name in ("a/policy", "a/guide", "a/words", "a/base"):
        load_pretrained(Factory, name, recipe, what="model")
    assert asked == {"a/policy": "abc", "a/guide": "main", "a/words": "main", "a/base": "abc"}
    monkeypatch.setattr(reference, "AutoConfig", Factory)
    assert reference._model_fingerprint("a/guide", recipe) == "a/guide@commit of a/guide"
