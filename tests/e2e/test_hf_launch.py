"""The shipped configurations of accelerate, adapted to two CPU processes, train what one process trains."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forks import num_tracebacks
from hf_hosts import METRICS, assert_same_run, first_rows, launch, run_native
from miniature import write_pairs

REPO = Path(__file__).resolve().parents[2]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps of 4 leave one pair for the last step, and nothing for one of two processes."""
    return write_pairs(tmp_path_factory.mktemp("rows") / "train.jsonl", 21, seed=3)


@pytest.mark.long
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_makes_the_update_of_one_process(stage: int, tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """Losses, norms and gradients, with an empty process in the last step, checkpointing, LoRA, a resumed run and
    numbers that are none: in one launch, because starting it is what takes time."""
    row, output = first_rows(tiny_model, pairs, tmp_path / "plan")[0], tmp_path / "outcomes.pt"
    done = launch(f"deepspeed_zero{stage}.yaml", tmp_path, REPO / "tests/hf_hosts.py", output, tiny_model, pairs, row)
    assert output.is_file(), done.stdout + done.stderr
    outcomes: dict[str, Any] = torch.load(output)

    native = run_native(tiny_model, pairs, tmp_path / "native", max_steps=6)
    assert outcomes["plain"]["wrapper"] == "DeepSpeedEngine"
    assert_same_run(outcomes["plain"], native)
    assert_same_run(outcomes["checkpointing"], native)
    targets = {"lora_target_modules": ["q_proj", "v_proj", "down_proj"]}
    lora = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **targets}
    assert_same_run(outcomes["lora"], run_native(tiny_model, pairs, tmp_path / "lora", **lora))
    assert_same_run(outcomes["dpo"], run_native(tiny_model, pairs, tmp_path / "dpo", loss_type="dpo", beta=0.1))
    for ours, theirs in zip(outcomes["resumed"]["lines"], outcomes["saved"]["lines"], strict=True):
        assert [ours[name] for name in METRICS] == pytest.approx([theirs[name] for name in METRICS], rel=1e-6)

    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).named_parameters())
    for what, said in (("loss", "a loss is not finite"), ("gradient", "the gradient norm is")):
        assert said in outcomes[what]["error"]
        assert row in outcomes[what]["error"]
        assert outcomes[what]["weights"]
        assert all(torch.equal(before[name], value) for name, value in outcomes[what]["weights"].items())


@needs_deepspeed
def test_accelerate_launch_trains_a_recipe_into_the_usual_run_directory(
    tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answers = {"num_eval_generations": 2, "eval_generation_max_new_tokens": 3}
    recipe = {**tiny_recipe, "gradient_accumulation_steps": 1, "max_steps": 5, **answers}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = launch("deepspeed_zero3.yaml", tmp_path, "-m", "simpo", "train", tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    run = Path(recipe["output_dir"])
    assert {"recipe.yaml", "audit.json", "metrics.jsonl", "checkpoints", "model"} <= {p.name for p in run.iterdir()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "eval_loss" in line] == [5]
    generated = [json.loads(line) for line in (run / "generations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], 0 < line["tokens"] <= 3) for line in generated] == [(5, True)] * 2
    assert sorted(p.name for p in (run / "checkpoints").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    trained, first = (AutoModelForCausalLM.from_pretrained(p) for p in (run / "model", recipe["model_name_or_path"]))
    assert not torch.equal(trained.lm_head.weight, first.lm_head.weight)
    assert AutoTokenizer.from_pretrained(run / "model").chat_template


@pytest.mark.long
@needs_deepspeed
def test_the_guard_ends_both_processes_with_its_exit_code(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    collapse = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_steps": 8}
    keys = {"gradient_accumulation_steps": 1, "guard": {"displacement": "stop", "learning_rate": "off"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**tiny_recipe, **collapse, **keys}), encoding="utf-8")
    done = launch("deepspeed_zero3.yaml", tmp_path, "-m", "simpo", "train", tmp_path / "recipe.yaml")
    assert done.returncode != 0
    assert done.stdout.count("stopped by the guard after step") == 1, done.stdout
    assert re.findall(r"exitcode +: (\d+)", done.stdout + done.stderr)[:1] == ["4"], done.stdout + done.stderr
    assert len((Path(tiny_recipe["output_dir"]) / "guard.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_fsdp_where_there_is_no_gpu_stops_with_one_line(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe), encoding="utf-8")
    done = launch("fsdp2.yaml", tmp_path, "-m", "simpo", "train", tmp_path / "recipe.yaml")
    assert done.returncode != 0
    assert "error: accelerate was launched for FSDP" in done.stdout
    assert num_tracebacks(done.stdout) == 0, done.stdout
