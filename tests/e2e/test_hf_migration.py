"""Scripts for TRL's CPOTrainer and for the SimPO authors' trainer, with only imports and config class changed."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import alignment_standin
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from hf_hosts import adapters, read_rows, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpo.core.losses import PairLogps
from simpo.data.prepare import prepare_rows
from simpo.hosts.hf import SimPOConfig, SimPOTrainer
from simpo.model.load import load_tokenizer
from simpo.recipe import load_recipe

TRL_SCRIPT = """
import json, pathlib
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL)
rows = [json.loads(line) for line in pathlib.Path(ROWS).read_text().splitlines()]
args = CPOConfig(
    output_dir=OUTPUT, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=1.4, beta=2.5, label_smoothing=0.1,
    max_length=96, dataset_num_proc=None, disable_dropout=True, learning_rate=1e-3, lr_scheduler_type="cosine",
    warmup_steps=0, per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=3, max_grad_norm=1.0,
    optim="adamw_torch", logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
    gradient_checkpointing=False, disable_tqdm=True, remove_unused_columns=False, seed=1,
)
trainer = CPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
trainer.train()
"""

# The steps of the authors' run_simpo.py, by the names and calls that it uses.
AUTHORS_SCRIPT = """
import logging, random, torch
from transformers import set_seed
from alignment import (
    DataArguments, H4ArgumentParser, ModelArguments, decontaminate_humaneval, get_checkpoint, get_datasets,
    get_peft_config, get_quantization_config, get_tokenizer,
)
from simpo_config import SimPOConfig
from simpo_trainer import SimPOTrainer

logger = logging.getLogger("run_simpo")
model_args, data_args, training_args = H4ArgumentParser((ModelArguments, DataArguments, SimPOConfig)).parse()
logger.setLevel(training_args.get_process_log_level())
logger.info(f"Training/evaluation parameters {training_args}")
last_checkpoint = get_checkpoint(training_args)
set_seed(training_args.seed)
raw_datasets = get_datasets(data_args, splits=data_args.dataset_splits, configs=data_args.dataset_configs)
data_args.truncation_side = "left"
tokenizer = get_tokenizer(model_args, data_args)

def render(example):
    texts = {"text_prompt": tokenizer.apply_chat_template(example["chosen"][:-1], tokenize=False)}
    for side in ("chosen", "rejected"):
        text = tokenizer.apply_chat_template(example[side][-1:], tokenize=False)
        texts[f"text_{side}"] = text.removeprefix(tokenizer.bos_token)
    return texts

raw_datasets = raw_datasets.map(
    render, num_proc=data_args.preprocessing_num_workers, remove_columns=list(raw_datasets["train"].features)
)
raw_datasets = raw_datasets.filter(decontaminate_humaneval, fn_kwargs={"text_column": "text_chosen"}, batched=True)
for split in ["train", "test"]:
    raw_datasets[split] = raw_datasets[split].rename_columns(
        {"text_prompt": "prompt", "text_chosen": "chosen", "text_rejected": "rejected"}
    )
for index in random.sample(range(len(raw_datasets["train"])), 3):
    logger.info(raw_datasets["train"][index]["prompt"])
dtype = model_args.torch_dtype
training_args.model_init_kwargs = dict(
    revision=model_args.model_revision, trust_remote_code=model_args.trust_remote_code,
    use_flash_attention_2=model_args.use_flash_attention_2,
    torch_dtype=dtype if dtype in ["auto", None] else getattr(torch, dtype),
    use_cache=False if training_args.gradient_checkpointing else True, device_map=None,
    quantization_config=get_quantization_config(model_args), attn_implementation=model_args.attn_implementation,
)
trainer = SimPOTrainer(
    model=model_args.model_name_or_path, args=training_args, train_dataset=raw_datasets["train"],
    eval_dataset=raw_datasets["test"], tokenizer=tokenizer, peft_config=get_peft_config(model_args),
)
checkpoint = None
if training_args.resume_from_checkpoint is not None:
    checkpoint = training_args.resume_from_checkpoint
elif last_checkpoint is not None:
    checkpoint = last_checkpoint
train_result = trainer.train(resume_from_checkpoint=checkpoint)
metrics = train_result.metrics
metrics["train_samples"] = len(raw_datasets["train"])
trainer.log_metrics("train", metrics)
trainer.save_metrics("train", metrics)
trainer.save_state()
trainer.save_model(training_args.output_dir)
datasets_used = list(data_args.dataset_mixer.keys())
kwargs = {
    "finetuned_from": model_args.model_name_or_path, "dataset": datasets_used, "dataset_tags": datasets_used,
    "tags": ["alignment-handbook"],
}
if trainer.accelerator.is_main_process:
    trainer.create_model_card(**kwargs)
    trainer.model.config.use_cache = True
    trainer.model.config.save_pretrained(training_args.output_dir)
if training_args.do_eval:
    metrics = trainer.evaluate()
    metrics["eval_samples"] = len(raw_datasets["test"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
if training_args.push_to_hub is True:
    trainer.push_to_hub(**kwargs)
"""
AUTHORS_RECIPE = {
    **{"torch_dtype": "bfloat16", "use_flash_attention_2": True, "preprocessing_num_workers": 1},
    **{"dataset_splits": ["train", "test"], "bf16": False, "beta": 2.5, "gamma_beta_ratio": 0.55, "do_eval": True},
    **{"evaluation_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 3, "warmup_ratio": 0.1},
    **{"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "seed": 42},
    **{"hub_model_id": "simpo-exps", "log_level": "info", "logging_steps": 1, "lr_scheduler_type": "cosine"},
    **{"max_length": 96, "max_prompt_length": 64, "num_train_epochs": 1, "optim": "adamw_torch", "report_to": "none"},
    **{"run_name": "tiny", "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "push_to_hub": False},
    **{"save_strategy": "steps", "save_steps": 2, "save_total_limit": 20},
}

OUR_IMPORTS = "from simpo.hosts.hf import SimPOConfig, SimPOTrainer"


def run_script(text: str, model: Path, rows: Path, output: Path) -> list[dict[str, Any]]:
    """Training lines of the script's trainer."""
    names: dict[str, Any] = {"MODEL": str(model), "ROWS": str(rows), "OUTPUT": str(output)}
    exec(compile(text, "script", "exec"), names)
    return [line for line in names["trainer"].state.log_history if "loss" in line]


@pytest.fixture
def rendered(tiny_model: Path, pair_files: Path, tmp_path: Path) -> Path:
    """Twelve pairs, one step's, as text that the chat template has rendered: both trainers take it as it is."""
    keys = {"max_length": 96, "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.0}
    recipe = load_recipe({"model_name_or_path": str(tiny_model), **keys})
    tokenizer = load_tokenizer(recipe)
    data = prepare_rows(recipe, tokenizer, read_rows(pair_files / "train.jsonl"))
    lines = []
    for row in data.train.select(range(12)):
        start = row["chosen_start"]
        texts = {"prompt": row["chosen_ids"][:start], "chosen": row["chosen_ids"][start:]}
        texts["rejected"] = row["rejected_ids"][start:]
        lines.append(json.dumps({name: tokenizer.decode(ids) for name, ids in texts.items()}) + "\n")
    path = tmp_path / "rendered.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.filterwarnings("ignore")  # the peer's
def test_a_trl_script_gives_the_same_numbers_with_only_imports_and_config_changed(
    tiny_model: Path, rendered: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    ours = TRL_SCRIPT.replace("from trl.experimental.cpo import CPOConfig, CPOTrainer", OUR_IMPORTS)
    ours = ours.replace("CPOConfig", "SimPOConfig").replace("CPOTrainer", "SimPOTrainer")
    theirs = run_script(TRL_SCRIPT, tiny_model, rendered, tmp_path / "trl")
    mine = run_script(ours, tiny_model, rendered, tmp_path / "ours")
    assert len(mine) == len(theirs) == 3
    assert mine[0]["loss"] - mine[2]["loss"] > 0.1  # it did train
    for a, b in zip(mine, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)  # TRL logs four digits of the metrics, all of the loss
        assert a["grad_norm"] == pytest.approx(float(b["grad_norm"]), rel=1e-4)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], rel=1e-4)
        assert a["learning_rate"] == pytest.approx(b["learning_rate"])


# --- TRL's own cases -------------------------------------------------------------------------------------------------

TRLS_NAMES = [  # of the loss there -> what gives the same here
    ({"loss_type": "sigmoid"}, {"loss_type": "cpo"}),
    ({"loss_type": "hinge"}, {"loss_type": "cpo_hinge"}),
    ({"loss_type": "ipo"}, {"loss_type": "ipo", "gamma_beta_ratio": 0.0}),
    ({"loss_type": "simpo", "simpo_gamma": 0.3}, {"loss_type": "simpo", "simpo_gamma": 0.3}),
    (
        {"loss_type": "simpo", "simpo_gamma": 0.3, "alpha": 0.5},
        {"loss_type": "alphapo", "simpo_gamma": 0.3, "alpha": 0.5},
    ),
]


@pytest.mark.filterwarnings("ignore")  # the peer's
@pytest.mark.parametrize(("there", "here"), TRLS_NAMES)
def test_each_loss_of_trl_has_an_equal_here(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Losses, rewards and gradients; TRL gives its losses sums for sigmoid and hinge, and means for the others."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    lengths = torch.tensor([[3, 9, 5], [7, 2, 5]])
    sums = (-2 * torch.rand(2, 3, generator=torch.Generator().manual_seed(0)) * lengths).requires_grad_()
    settings_there = {"alpha": 0.0, "simpo_gamma": 0.5, "label_smoothing": 0.0, "beta": 0.2, **there}
    stub = SimpleNamespace(**settings_there, accelerator=SimpleNamespace(device="cpu"))
    given = sums if there["loss_type"] in ("sigmoid", "hinge") else sums / lengths
    theirs = cpo.CPOTrainer.cpo_loss(stub, *given)
    (wanted,) = torch.autograd.grad(theirs[0].sum(), sums)
    recipe = SimPOConfig(output_dir="runs/none", report_to=[], beta=0.2, cpo_alpha=1.0, **here).to_recipe()
    ours = recipe.loss(PairLogps(*sums, *lengths), **recipe.loss_values)
    (gradient,) = torch.autograd.grad(ours.losses.sum(), sums)
    for a, b in zip([*ours, gradient], [*theirs, wanted], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert recipe.sft_weight == 1.0
    assert float(wanted.abs().sum()) > 0


def rows_in_shape(shape: str) -> list[dict[str, Any]]:
    """Pairs of text or of messages, with the prompt in a column of its own or as what both responses begin with."""
    rows = []
    for number in range(8):
        asked, sides = f"What is {number} and one?", {"chosen": f"It is {number + 1}.", "rejected": "Stone and paper."}
        if shape.startswith("conversational"):
            prompt: Any = [{"role": "user", "content": asked}]
            responses: dict[str, Any] = {s: [{"role": "assistant", "content": text}] for s, text in sides.items()}
        else:
            prompt, responses = asked, {side: f" {text}" for side, text in sides.items()}
        if shape.endswith("implicit"):
            rows.append({side: prompt + response for side, response in responses.items()})
        else:
            rows.append({"prompt": prompt, **responses})
    return rows


def run_case(model: Path, folder: Path, shape: str, *, lora: bool = False, **keys: Any) -> Any:
    """A trainer as TRL's cases build theirs, after three steps that moved every weight it trains."""
    base = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "eval_strategy": "steps"}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False, "warmup_steps": 0}
    args = SimPOConfig(
        **{"output_dir": str(folder), "beta": 0.1, **base, **quiet, "remove_unused_columns": False, **keys}
    )
    rows = Dataset.from_list(rows_in_shape(shape))
    network, tokenizer = (each.from_pretrained(model) for each in (AutoModelForCausalLM, AutoTokenizer))
    trainer = SimPOTrainer(
        network,
        args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapters() if lora else None,
    )
    assert trainer.ledger.splits["train"].kept == len(rows)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    for name, value in before.items():
        assert not torch.equal(value, trainer.model.get_parameter(name)), name
    history = trainer.state.log_history
    assert "train_loss" in history[-1]
    assert sum("eval_loss" in line for line in history) == 3
    return trainer


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        ({"loss_type": "cpo", "cpo_alpha": 1.0}, "text"),
        ({"loss_type": "cpo_hinge", "cpo_alpha": 1.0}, "conversational"),
        ({"loss_type": "cpo_hinge", "cpo_alpha": 1.0}, "text implicit"),
        ({"loss_type": "ipo", "gamma_beta_ratio": 0.0, "cpo_alpha": 1.0}, "conversational"),
        ({"loss_type": "simpo", "cpo_alpha": 1.0}, "text"),
        ({"loss_type": "alphapo", "alpha": 0.5, "simpo_gamma": 0.5}, "text"),
    ],
)
def test_trls_cases_train(tiny_model: Path, tmp_path: Path, keys: dict[str, Any], shape: str) -> None:
    trainer = run_case(tiny_model, tmp_path / "run", shape, **keys)
    trainer.create_model_card(dataset_name="org/pairs", tags=["trl"])  # as TRL's scripts do, through push_to_hub
    assert "org/pairs" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("shape", ["text", "text implicit", "conversational", "conversational implicit"])
def test_trls_cases_train_adapters(tiny_model: Path, tmp_path: Path, shape: str) -> None:
    run_case(tiny_model, tmp_path / "run", shape, lora=True, gradient_accumulation_steps=4, loss_type="cpo")


def test_trls_cases_without_an_equal_here_are_refused_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    args = SimPOConfig(output_dir=str(tmp_path / "run"), report_to="none")
    with pytest.raises(ValueError, match=r"compute_metrics: .*no logits"):
        SimPOTrainer(
            str(tiny_model), args, train_dataset=rows_in_shape("text"), compute_metrics=lambda *_: {"test": 0.0}
        )
    with pytest.raises(ValueError, match="encoder-decoder models are not supported"):
        SimPOConfig(output_dir=str(tmp_path / "run"), is_encoder_decoder=True)


# --- the authors' script ---------------------------------------------------------------------------------------------


def run_authors_script(recipe: Path, *words: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script's names after it ran under our imports."""
    theirs = "from simpo_config import SimPOConfig\nfrom simpo_trainer import SimPOTrainer"
    assert theirs in AUTHORS_SCRIPT
    monkeypatch.setitem(sys.modules, "alignment", alignment_standin)
    monkeypatch.setattr(sys, "argv", ["run_simpo.py", str(recipe), *words])
    names: dict[str, Any] = {}
    exec(compile(AUTHORS_SCRIPT.replace(theirs, OUR_IMPORTS), "run_simpo.py", "exec"), names)
    return names


@pytest.fixture
def authors_recipe(tiny_model: Path, pair_files: Path, tmp_path: Path) -> Iterator[Path]:
    values = {"model_name_or_path": str(tiny_model), "dataset_mixer": {str(pair_files): 1.0}, **AUTHORS_RECIPE}
    path = tmp_path / "tiny-simpo.yaml"
    path.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / "run")}), encoding="utf-8")
    verbosity = transformers.logging.get_verbosity()
    yield path
    transformers.logging.set_verbosity(verbosity)  # the script's log_level is everybody's


def test_the_authors_script_trains_with_only_its_imports_changed(
    authors_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_authors_script(authors_recipe, "--learning_rate=1e-3", "--beta=2", monkeypatch=monkeypatch)
    trainer, tokenizer = names["trainer"], names["tokenizer"]
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert (trainer.recipe.beta, lines[0]["learning_rate"] <= 1e-3) == (2.0, True)
    assert len(lines) == 4
    assert lines[0]["loss"] - lines[-1]["loss"] > 0.1
    told = trainer.ledger.splits["train"]
    assert told.kept == 40
    texts = names["raw_datasets"]["train"]
    for row in trainer.data.train:
        start, text = row["chosen_start"], texts[int(row["row_id"].split("#")[1])]
        assert tokenizer.decode(row["chosen_ids"][:start]) == text["prompt"]
        response = tokenizer.decode(row["chosen_ids"][start:])  # with the header that the script wrote
        assert response == text["chosen"].rstrip("\n"), "up to the end of turn, and no second one"
    folder = tmp_path / "run"
    for name in ("train_results.json", "eval_results.json", "trainer_state.json", "README.md", "model.safetensors"):
        assert (folder / name).is_file(), name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["use_cache"] is True
    assert not any("attn_implementation" in name for name in config)
    assert "instead of flash_attention_2" in capsys.readouterr().out

    weights = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    shutil.rmtree(folder / "checkpoint-4")
    again = run_authors_script(authors_recipe, "--learning_rate=1e-3", "--beta=2", monkeypatch=monkeypatch)
    assert again["checkpoint"].endswith("checkpoint-2")
    for name, value in again["trainer"].model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_the_authors_script_trains_the_adapters_that_its_recipe_asks_for(
    authors_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "max_steps": 2}
    values = yaml.safe_load(authors_recipe.read_text(encoding="utf-8"))
    authors_recipe.write_text(yaml.safe_dump({**values, **lora}), encoding="utf-8")
    trainer = run_authors_script(authors_recipe, "--learning_rate=1e-3", monkeypatch=monkeypatch)["trainer"]
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 4
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)


def test_plain_text_is_put_into_the_chat_template_unless_it_was_already(
    tiny_model: Path, rendered: Path, pair_files: Path, tmp_path: Path
) -> None:
    from simpo.hosts.hf.batches import prepare_datasets

    recipe = SimPOConfig(**settings(tmp_path / "run")).to_recipe(str(tiny_model))
    tokenizer = load_tokenizer(recipe)

    def prompts(rows: list[dict[str, str]], text_as_is: bool | None) -> list[str]:
        data = prepare_datasets(rows, None, recipe, tokenizer, text_as_is=text_as_is, progress=False)
        return [tokenizer.decode(row["chosen_ids"]) for row in data.train]

    before = copy.deepcopy(tokenizer.chat_template)
    done, plain = read_rows(rendered), read_rows(pair_files / "train.jsonl")
    assert prompts(done, None) == [row["prompt"] + row["chosen"] for row in done]
    assert all(text.startswith("<|im_start|>user\n") for text in prompts(plain, None))
    assert prompts(plain, True)[0].startswith(plain[0]["prompt"])
    assert tokenizer.chat_template == before
