"""`simpo export --gguf`: transformers reads back equal logits and equal tokens, and the Modelfile's template writes the
chat template's tokens."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from go_template import render_go
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from simpo.cli import app
from simpo.recipe import load_recipe
from simpo.shipping.gguf import run_export, write_gguf
from simpo.shipping.modelfile import DIALOGUES, find_pieces, write_modelfile

gguf = pytest.importorskip("gguf")
# torch warns of the memory-mapped arrays that transformers hands to it.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")

TEXTS = (
    "Hello world, it's 2026: 12345 rivers and 3.14!",
    "  two blanks, a tab\tand\n\n\nlines  \n end ",
    "Ünïcödé 水 — «ça» don't I'LL 😀",
    "def f(x):\n    return x + 1  # <|im_end|> and <think> stay whole\n",
)
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [*TEXTS, "the river is green and the water is slow and the stone is in the water"] * 3


def byte_level(split: str | None, *, digits: bool = False) -> Any:
    """A byte-level tokenizer whose text is split by a regex, by digits, or as GPT-2's."""
    backend = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    return trained(backend, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def in_pieces() -> Any:
    """A tokenizer as sentencepiece's: blanks are letters, and what is unknown falls apart into bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # while it is trained: no token goes beyond a word
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return trained(backend, first=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))], unk_token="<unk>")


def trained(backend: Tokenizer, *, first: list[str] | None = None, unk_token: str | None = None, **options: Any) -> Any:
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(vocab_size=620, special_tokens=first or SPECIAL, show_progress=False, **options)
    backend.train_from_iterator(CORPUS, trainer)
    if first:  # as Llama-2's: bytes are ordinary tokens
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        state = {**json.loads(backend.to_str()), "pre_tokenizer": None}
        state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
        backend = Tokenizer.from_str(json.dumps(state))
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    extra = {} if unk_token is None else {"unk_token": unk_token}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **extra)
    fast.chat_template = TEMPLATE
    return fast


def splits(name: str) -> str:
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    return gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS[name]


FAMILIES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama, tied": ("Llama", lambda: byte_level(splits("llama-bpe")), {"tie_word_embeddings": True}),
    "llama, digits": ("Llama", lambda: byte_level(None, digits=True), {"head_dim": 32}),
    "mistral": ("Mistral", in_pieces, {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", lambda: byte_level(splits("qwen2")), {}),
    "qwen3, tied": ("Qwen3", lambda: byte_level(splits("qwen2")), {"tie_word_embeddings": True, "head_dim": 128}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A tiny random model whose logits are as large as real ones, and its tokenizer."""
    name, tokenizer, changes = FAMILIES[request.param]
    tokenizer = tokenizer()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, "vocab_size": len(tokenizer) + 3, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if "norm" in each or each.endswith("bias") else 0.1))
        model.get_output_embeddings().weight.mul_(4)
    return model, tokenizer


def read_back(path: Path) -> tuple[Any, Any]:
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        **where
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = (torch.arange(1, 40) * 37 % model.config.vocab_size)[None]
    return model(input_ids=ids, use_cache=False).logits.float()


def test_transformers_reads_back_the_same_model_and_the_same_tokens(family: tuple[Any, Any], tmp_path: Path):
    model, tokenizer = family
    expected = logits(model)
    assert 3 < expected.abs().max() < 100
    noise = {}
    for quantize in ("f32", "q8_0"):
        path = tmp_path / f"{quantize}.gguf"
        write_gguf(model, tokenizer, path, quantize=quantize, name="tiny")
        again, its_tokenizer = read_back(path)
        read_as = {"mistral": "llama"}  # as llama.cpp does: without a window they are the same
        assert again.config.model_type == read_as.get(model.config.model_type, model.config.model_type)
        noise[quantize] = (logits(again) - expected).abs().max().item()
    assert noise["f32"] == 0
    assert 0 < noise["q8_0"] < 0.05 * expected.abs().max()
    for text in TEXTS:
        if model.config.model_type == "mistral":  # transformers sets one blank, at the very beginning; llama.cpp, as
            text = text.strip().replace("<|im_end|> and <think>", "all")  # the tokenizer itself, at each new piece
        assert its_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert its_tokenizer.chat_template == tokenizer.chat_template


@torch.no_grad()
def test_llama_cpp_itself_reads_the_tokens_and_answers_as_the_model(family: tuple[Any, Any], tmp_path: Path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="no llama.cpp (pip install xllamacpp)")
    model, tokenizer = family
    write_gguf(model, tokenizer, tmp_path / "x.gguf", quantize="f32", name="tiny")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(tmp_path / "x.gguf"), 256, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    asked = {"temperature": 0, "max_tokens": 8, "logprobs": 1, "ignore_eos": True}
    reply = xllamacpp.Server(settings).handle_completions({"prompt": TEXTS[0], **asked})
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert reply["usage"]["prompt_tokens"] == len(ids)
    for said in reply["choices"][0]["logprobs"]["content"]:
        logps = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert logps[said["id"]] > logps.max() - 0.02
        assert said["logprob"] == pytest.approx(float(logps[said["id"]]), abs=0.05)  # its cache is in float16
        ids = [*ids, said["id"]]


def test_formats_between_are_rounded_as_torch_rounds(family: tuple[Any, Any], tmp_path: Path):
    model, tokenizer = family
    for quantize, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        path = tmp_path / f"{quantize}.gguf"
        write_gguf(model, tokenizer, path, quantize=quantize, name="tiny")
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        found = gguf.dequantize(tensors["blk.1.ffn_down.weight"].data, tensors["blk.1.ffn_down.weight"].tensor_type)
        expected = model.model.layers[1].mlp.down_proj.weight.detach().to(dtype).float()
        assert torch.equal(torch.from_numpy(found.copy()), expected)


def test_rotary_factors_are_the_models_own(tmp_path: Path):
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    tokenizer = byte_level(splits("llama-bpe"))
    shape = {**SHAPE, "vocab_size": len(tokenizer)}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, rope_parameters=scaled))
    write_gguf(model, tokenizer, tmp_path / "x.gguf", quantize="f16", name="x")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    inverse = 10000.0 ** -(torch.arange(0, 16, 2) / 16) / torch.from_numpy(tensors["rope_freqs.weight"].copy())
    torch.testing.assert_close(inverse, model.model.rotary_emb.inv_freq)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, rope_parameters=yarn))
    with pytest.raises(ValueError, match="yarn"):
        write_gguf(model, tokenizer, tmp_path / "y.gguf", quantize="f16", name="y")


def tokens_of(modelfile: Path, tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """What a runner of the Modelfile gives to the model."""
    (template,) = re.findall(r'^TEMPLATE """(.*?)"""$', modelfile.read_text(), re.DOTALL | re.MULTILINE)
    turns = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    text = render_go(template, {"Messages": turns, "System": system})
    adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return [tokenizer.bos_token_id] * adds_bos + tokenizer(text, add_special_tokens=False)["input_ids"]


SYSTEM_FIRST = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (s if PLACE else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA31 = (  # a system turn of its own in front of what the dialogue's says
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday is Friday.\n\n' + s + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
OTHERS = {
    "Llama 3.1": LLAMA31,
    "system in the first turn": SYSTEM_FIRST.replace("PLACE", "loop.first"),
    "system in the last turn": SYSTEM_FIRST.replace("PLACE", "loop.last"),
    "braces": "{% for m in messages %}{{ '{{' + m.role + '}}' + m.content + '\n' }}{% endfor %}{{ '{{' }}",
}


@pytest.mark.parametrize(
    ("kind", "has_system"),
    [
        *((kind, True) for kind in ("chatml", "smollm", "llama3", "empty_thinking", "words", *OTHERS)),
        *((kind, False) for kind in ("mistral", "gemma")),
    ],
)
def test_the_modelfile_writes_the_tokens_of_the_chat_template(
    kind: str, has_system: bool, build_tokenizer: Any, tmp_path: Path
):
    tokenizer = copy.deepcopy(
        build_tokenizer({"braces": "chatml", "Llama 3.1": "llama3"}.get(kind, "mistral" if kind in OTHERS else kind))
    )
    tokenizer.chat_template = OTHERS.get(kind, tokenizer.chat_template)
    recipe = load_recipe({"model_name_or_path": "none"})
    (line,) = write_modelfile(tmp_path / "Modelfile", tokenizer, "x.gguf", recipe)
    assert ("has no system turn" in line) is not has_system
    said = {
        "system": "Answer in one line.",
        "user": 'What is "x"?\n\n- one\n- two {{ .Content }}',
        "assistant": "It is 水.",
    }
    for roles in DIALOGUES:
        if has_system or "system" not in roles:
            messages = [{"role": role, "content": f"{said[role]} {place}"} for place, role in enumerate(roles)]
            expected = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            assert tokens_of(tmp_path / "Modelfile", tokenizer, messages) == expected, roles


@pytest.mark.parametrize("kind", ["counting", "plain"])
def test_a_template_that_a_modelfile_cannot_say_is_refused(kind: str, build_tokenizer: Any, tmp_path: Path):
    tokenizer = build_tokenizer(kind)
    assert isinstance(find_pieces(tokenizer), str)
    (line,) = write_modelfile(tmp_path / "Modelfile", tokenizer, "x.gguf", load_recipe({"model_name_or_path": "none"}))
    assert line.startswith("no Modelfile: ")
    assert not (tmp_path / "Modelfile").exists()


def test_a_runner_that_adds_what_the_template_lacks_gets_no_modelfile(build_tokenizer: Any, tmp_path: Path):
    tokenizer = copy.deepcopy(build_tokenizer("mistral"))
    tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{ bos_token }}")
    (line,) = write_modelfile(tmp_path / "Modelfile", tokenizer, "x.gguf", load_recipe({"model_name_or_path": "none"}))
    assert line == "no Modelfile: ollama would begin with <s>, and the chat template does not"


def test_the_command_writes_both_files_and_overwrites_neither(tiny_model: Path, tmp_path: Path):
    out = tmp_path / "my models"
    words = ["export", str(tiny_model), "--gguf", "--quantize", "f32", "--output", str(out / "x.gguf")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert f"ollama create NAME -f '{out}/x.Modelfile'" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["x.Modelfile", "x.gguf"]
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    assert torch.equal(logits(read_back(out / "x.gguf")[0]), expected)
    again = CliRunner().invoke(app, words)
    assert (again.exit_code, "nothing is overwritten" in again.stderr) == (2, True)
    for change, message in ((["--quantize", "q4_k"], "must be one of f32"), ([], "")):
        refused = CliRunner().invoke(app, ["export", str(tiny_model), *change, *["--gguf"] * bool(change)])
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_other_architectures_are_named_or_left_to_llama_cpp(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(model_folder())
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=378, n_positions=64)
    other = tmp_path / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(other)
    AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(ValueError, match=r"gpt2 is not written here .*convert_hf_to_gguf.py may know it"):
        run_export(str(other), quantize="f16")
    converter = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    converter.parent.mkdir()
    converter.write_text(
        "import sys\nfolder, _, out, _, kind = sys.argv[1:]\nassert open(folder + '/config.json').read()\n"
        "open(out, 'w').write(kind)\n"
    )
    monkeypatch.setenv("LLAMA_CPP", str(converter.parent))
    assert run_export(str(other), quantize="f16").read_text() == "f16"
    converter.write_text("raise SystemExit('it does not know this')")
    with pytest.raises(ValueError, match="does not convert gpt2: it does not know this"):
        run_export(str(other), quantize="f16", output=str(tmp_path / "again.gguf"))


@pytest.mark.long
@pytest.mark.real_model
def test_the_real_model_is_read_back_exactly(smol_model: Path, tmp_path: Path):
    expected, tokenizer = (
        logits(AutoModelForCausalLM.from_pretrained(smol_model, dtype=torch.float32)),
        AutoTokenizer.from_pretrained(smol_model),
    )
    apart = {}
    for quantize in ("f32", "q8_0"):
        path = run_export(str(smol_model), quantize=quantize, output=str(tmp_path / f"{quantize}.gguf"))
        again, its_tokenizer = read_back(path)
        apart[quantize] = (logits(again).log_softmax(-1) - expected.log_softmax(-1)).abs()
        for text in TEXTS:
            assert its_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert apart["f32"].max() == 0
    assert apart["q8_0"].mean() < 0.1  # nats; 0.060 was measured
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    expected_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokens_of(tmp_path / "f32.Modelfile", tokenizer, messages) == expected_ids
