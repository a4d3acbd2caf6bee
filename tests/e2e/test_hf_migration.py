"""Scripts for TRL's CPOTrainer and for the SimPO authors' trainer, with only imports and config class changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hf_hosts import read_rows, settings

from simpo.data.prepare import prepare_rows
from simpo.hosts.hf import SimPOConfig
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

AUTHORS_SCRIPT = """
import json, pathlib
from datasets import Dataset
from transformers import AutoTokenizer
from simpo_config import SimPOConfig
from simpo_trainer import SimPOTrainer

tokenizer = AutoTokenizer.from_pretrained(MODEL)
dataset = Dataset.from_list([json.loads(line) for line in pathlib.Path(ROWS).read_text().splitlines()])
training_args = SimPOConfig(
    output_dir=OUTPUT, beta=2.5, gamma_beta_ratio=0.56, sft_weight=0.0, loss_type="sigmoid", label_smoothing=0.1,
    max_length=96, max_prompt_length=64, max_target_length=None, truncation_mode="keep_end", label_pad_token_id=-100,
    generate_during_eval=False, evaluation_strategy="steps", eval_steps=2, warmup_ratio=0.0, learning_rate=1e-3,
    lr_scheduler_type="cosine", per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=3,
    logging_steps=1, save_strategy="no", report_to=[], bf16=False, gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False}, remove_unused_columns=False, disable_tqdm=True, seed=1,
)
training_args.model_init_kwargs = {"torch_dtype": None, "use_cache": False, "trust_remote_code": False}
trainer = SimPOTrainer(
    model=MODEL, args=training_args, train_dataset=dataset, eval_dataset=dataset, tokenizer=tokenizer, peft_config=None,
)
trainer.train()
"""

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


def test_the_authors_script_runs_with_only_its_imports_changed(
    tiny_model: Path, rendered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = "from simpo_config import SimPOConfig\nfrom simpo_trainer import SimPOTrainer"
    lines = run_script(AUTHORS_SCRIPT.replace(old, OUR_IMPORTS), tiny_model, rendered, tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["loss"] - lines[2]["loss"] > 0.1
    said = capsys.readouterr().out
    for name in ("truncation_mode", "label_pad_token_id", "generate_during_eval"):
        assert f"{name}: not used here" in said


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
