"""A whole run in miniature: a tiny random Llama, a small tokenizer with a chat template, forty pairs, one recipe.

Imports torch when a fixture is asked for: the process that only hands out tests to others needs none.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

WORDS = (  # noqa: SIM905  a list of fifty quoted words reads worse
    "the a of and to in is was for on with as by at from it an be this that which or are not have has had were one two "
    "water light river stone bread paper glass green quick slow open close short long answer question write read think"
).split()
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def write_pairs(path: Path, count: int, *, seed: int) -> Path:
    """Pairs in which the chosen answer speaks of water and the rejected one of stone: learnable in a few steps."""
    rng = random.Random(seed)
    rows = [
        {
            "prompt": f"{_sentence(rng, 3, 12)}?",
            "chosen": "water " + _sentence(rng, 2, 9),
            "rejected": "stone " + _sentence(rng, 2, 9),
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama (9 query and 3 KV heads, tied embeddings) and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (40 pairs) and test.jsonl (10)."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.jsonl", 40, seed=1)
    write_pairs(folder / "test.jsonl", 10, seed=2)
    return folder


@pytest.fixture(scope="session")
def scored_lists(pair_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs as lists of 2 to 5 scored responses: up to 3 of other rows are between."""
    folder = tmp_path_factory.mktemp("scored")
    for path in pair_files.glob("*.jsonl"):
        pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
        rows = []
        for at, pair in enumerate(pairs):
            others = [pairs[at - k]["rejected"] for k in range(1, 1 + at % 4)]
            responses = [pair["rejected"], *others, pair["chosen"]]
            scores = [*(1.0 + k for k in range(len(others) + 1)), 5.0 + at % 3]
            rows.append({"prompt": pair["prompt"], "responses": responses, "scores": scores})
        (folder / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def recipe_in(folder: Path, model: Path, pairs: Path) -> dict[str, Any]:
    """As `tiny_recipe`, for fixtures that several tests share: the run directory is `folder`/run."""
    return {
        "model_name_or_path": str(model),
        "dataset_mixer": {str(pairs): 1.0},
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "max_length": 96,
        "max_prompt_length": 64,
        "bf16": False,
        "save_steps": 4,
        "eval_steps": 5,
        "num_threads": 1,
        "preprocessing_num_workers": 1,
    }


@pytest.fixture(scope="session")
def tiny_recipe_in(tiny_model: Path, pair_files: Path, tmp_path_factory: pytest.TempPathFactory):
    """build(folder): ten optimizer steps of four pairs in fp32, run in that folder; takes about a second.

    Its cache holds the tokenised pairs, which takes longer than the run, and nothing else.
    """
    from simpo.data.prepare import prepare_pairs
    from simpo.model.load import load_tokenizer
    from simpo.recipe import load_recipe

    first = load_recipe(recipe_in(tmp_path_factory.mktemp("tokenised"), tiny_model, pair_files))
    prepare_pairs(first, load_tokenizer(first), progress=False)

    def build(folder: Path) -> dict[str, Any]:
        shutil.copytree(first.cache_dir, folder / "cache")
        return recipe_in(folder, tiny_model, pair_files)

    return build


@pytest.fixture
def tiny_recipe(tiny_recipe_in, tmp_path: Path) -> dict[str, Any]:
    """`tiny_recipe_in` a folder of this test."""
    return tiny_recipe_in(tmp_path)


@pytest.fixture(scope="session")
def model_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """build(architecture=, **config): a folder with a random two-layer Llama of that shape and the tiny tokenizer."""
    import torch
    import transformers

    made: dict[str, Path] = {}

    def build(architecture: str = "Llama", **config: Any) -> str:
        key = json.dumps([architecture, config], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture.lower())
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
                if (tiny_model / name).is_file():
                    shutil.copy(tiny_model / name, folder)
            settings = {
                "vocab_size": 512,
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "tie_word_embeddings": False,
                "initializer_range": 0.1,
                **config,
            }
            torch.manual_seed(0)
            configuration = getattr(transformers, f"{architecture}Config")(**settings)
            transformers.AutoModelForCausalLM.from_config(configuration).save_pretrained(folder)
            made[key] = folder
        return str(made[key])

    return build


@pytest.fixture
def saved_model(tiny_model: Path, tmp_path: Path):
    """save(model, name): a folder with a model of any family, logits of realistic size, and the tiny tokenizer."""
    import torch
    import transformers

    def save(model: Any, name: str = "model") -> str:
        folder = tmp_path / name
        model.eval()
        with torch.no_grad():
            ids = torch.arange(5, 200).view(5, -1)
            text = model(input_ids=ids, use_cache=False).logits.abs().max()
            model.get_output_embeddings().weight.mul_(10 / text)
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def step_recipe(tiny_recipe: dict[str, Any]):
    """A recipe of steps of four pairs, whatever the mesh: settings(model, data ranks, **keys).

    A micro-batch holds all of its pairs; measuring that they fit would take a third of a short run.
    """

    def build(model: str, data: int, *, pairs: int = 4, accumulation: int = 1, **keys: Any) -> dict[str, Any]:
        assert pairs % (data * accumulation) == 0
        changes = {
            "model_name_or_path": model,
            "per_device_train_batch_size": pairs // (data * accumulation),
            "gradient_accumulation_steps": accumulation,
            "max_grad_norm": 0.5,
            "eval_steps": 100,
        }
        if keys.get("pack", True):
            changes["max_tokens_per_micro_batch"] = 4096
        return {**tiny_recipe, **changes, **keys}

    return build


def sampling_recipe(folder: Path, model: Path, prompts: Sequence[Any], **generate: Any) -> dict[str, Any]:
    """A recipe that samples answers to prompts in one process, in float32, with all it writes in a folder.

    Args:
        prompts: text or messages of each.
        generate: keys of its own.
    """
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return {
        "model_name_or_path": str(model),
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "dataset_mixer": {str(path): 1.0},
        "bf16": False,
        "num_threads": 1,
        "generate": {"num_samples": 3, "max_new_tokens": 12, "processes": 1, **generate},
    }


def rounds_recipe(folder: Path, model: Path, prompts: Sequence[Any], **generate: Any) -> dict[str, Any]:
    """A recipe of one round that likes answers of six words, held-out prompts included."""
    return {
        **sampling_recipe(folder, model, prompts, **generate),
        "max_length": 120,
        "per_device_train_batch_size": 2,
        "score": {"scorers": {"length": {"kind": "length", "min": 6}}},
        "pair": {"test_fraction": 0.2, "finished_only": False},
    }


@pytest.fixture
def rounds_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of `simpo rounds` in this process, which has loaded torch already."""
    from typer.testing import CliRunner

    from simpo.cli import app
    from simpo.onpolicy import rounds

    def run(words: list[str], *, is_launcher: bool = False) -> int:
        result = CliRunner().invoke(app, words[words.index("simpo") + 1 :])
        print(result.output)
        return result.exit_code

    monkeypatch.setattr(rounds, "run_command", run)


@pytest.fixture(scope="module")
def sweeps_in_process() -> Iterator[None]:
    """The commands of a sweep's trials in this process."""
    from typer.testing import CliRunner

    from simpo.cli import app
    from simpo.tuning import calibrate, jobs

    def run(words: list[str], log: Path, **_: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, words)
        log.write_text(result.output)
        return result.exit_code, result.output.strip().rpartition("\n")[2]

    with pytest.MonkeyPatch.context() as patch:
        for module in (jobs, calibrate):
            patch.setattr(module, "run_command_line", run)
        yield
