"""The example examples/megatron: trains, converts weights both ways, and refuses what it cannot do."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from megatron_cases import LAYOUTS, Case, build_megatron, build_model, load_example
from ranks import Ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="needs megatron-core: pip install 'simpo[megatron]'"
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks of this module alone: Megatron's global state stays out of the other tests' processes."""
    ranks = Ranks(2)
    with pytest.MonkeyPatch.context() as patch:  # ranks start in the environment of the first call
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield ranks
    ranks.stop()


def run_example(words: Sequence[str], sizes: dict[str, int]) -> list[dict[str, float]]:
    """examples/megatron/train.py in processes that are joined already, without CUDA."""
    from megatron_on_cpu import on_cpu

    example = load_example("train")
    arguments = example.build_parser().parse_args(words)
    with on_cpu(**sizes):
        example.start()
        return example.train(arguments)


@pytest.mark.long
def test_the_example_trains_hugging_face_weights_alike_on_every_layout(
    two: Ranks, pair_files: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    start, histories, models = two_head_model(tmp_path / "start"), {}, {}
    for layout in ("tp2", "pp2, two virtual stages each", "dp2"):
        folder, sizes = tmp_path / layout, LAYOUTS[layout]
        options = [f"--{name.replace('_', '-')}={size}" for name, size in sizes.items()]
        words = [f"--load={start}", f"--data-path={pair_files}", f"--save={folder}", "--seq-length=64", "--lr=3e-3"]
        words += ["--micro-batch-size=2", "--global-batch-size=8", "--train-iters=6", "--seed=1", *options]
        histories[layout] = two.run(run_example, words, sizes)[-1]
        models[layout] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    reference, *others = histories.values()
    assert len(reference) == 6
    assert reference[-1]["lm loss"] < 0.7 * reference[0]["lm loss"]
    for history in others:
        for found, wanted in zip(history, reference, strict=True):
            assert found == pytest.approx(wanted, rel=2e-3, abs=2e-3)  # Adam normalises near-zero gradients too
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    reference, *others = models.values()
    for name, weight in reference.items():
        step = (weight - before[name]).norm()
        assert step > 0, name
        for weights in others:
            assert (weights[name] - weight).norm() < 0.02 * step, name


def two_head_model(folder: Path) -> Path:
    """A small model with a tokenizer whose sizes two ranks can share."""
    from miniature import TEMPLATE, WORDS
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    build_model("tied").save_pretrained(folder)
    return folder


def test_the_example_says_in_one_line_that_it_needs_cuda(two: Ranks, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    words = ["train.py", "--load=none", "--data-path=none", f"--save={tmp_path}"]
    (code, said), (other_code, nothing) = two.run(run_main, words)
    assert code == other_code == 1
    assert said.startswith("error: Megatron-Core's schedules and optimizers need CUDA")
    assert said.count("\n") == 1
    assert nothing == ""


def run_main(words: Sequence[str]) -> tuple[int, str]:
    """The exit code of examples/megatron/train.py and what it says in processes that are not joined yet."""
    import megatron_on_cpu  # noqa: F401  silences what importing megatron warns of

    main = load_example("train").main  # which warns of what Megatron does without
    joined = mock.patch.object(torch.distributed, "is_initialized", return_value=False)
    with joined, mock.patch.object(sys, "argv", words), contextlib.redirect_stderr(io.StringIO()) as said:
        code = main()
    return code, said.getvalue()


def test_converted_weights_come_back_bit_for_bit(two: Ranks, tmp_path: Path) -> None:
    for kind in ("llama", "tied", "qwen2"):
        model = build_model(kind)
        wanted = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for layout in ("tp2", "pp2", "pp2, two virtual stages each"):
            found = two.run(round_trip, kind, LAYOUTS[layout])[0]
            assert set(found) == set(wanted)
            for name, weight in wanted.items():
                assert np.array_equal(found[name], weight.numpy()), (kind, layout, name)


def round_trip(kind: str, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    from megatron_on_cpu import on_cpu

    with on_cpu(**sizes):
        config = build_model(kind).config
        _, chunks = build_megatron(Case(model=kind), config, sizes)
        weights = load_example("convert").gather_weights(chunks, config)
    return {name: weight.numpy() for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("change", "layout", "message"),
    [
        ({"model_type": "gpt2"}, {}, "model type 'gpt2'"),
        ({"mlp_bias": True}, {}, "mlp_bias = True"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, {}, "rope_parameters"),
        ({}, {"tp": 3}, "tensor_model_parallel_size = 3: does not divide the model's num_attention_heads, 4"),
        ({"vocab_size": 509}, {"tp": 2}, "does not divide the model's vocab_size, 509"),
        ({}, {"pp": 3}, "pipeline_model_parallel_size = 3"),
        ({}, {"pp": 2, "chunks": 3}, "with 3 virtual stage"),
    ],
)
def test_the_example_refuses_what_it_cannot_convert(
    two: Ranks, change: dict[str, Any], layout: dict[str, int], message: str
) -> None:
    assert message in two.run(refusal_of, change, {"tp": 1, "pp": 1, "chunks": 1} | layout)[0]


def refusal_of(change: dict[str, Any], layout: dict[str, int]) -> str:
    import megatron_on_cpu  # noqa: F401  silences what importing megatron warns of

    config = build_model("llama").config
    for name, value in change.items():
        # The class of a configuration decides its type.
        setattr(type(config) if name == "model_type" else config, name, value)
    try:
        load_example("convert").check_config(config, **layout)
    except ValueError as error:
        return str(error)
    finally:
        type(config).model_type = "llama"
    return ""
