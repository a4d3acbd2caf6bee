"""Trap 46: the last evaluation is not of the weights that were saved (margin -0.227 evaluated, -0.256 saved)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from simpo.display import Display
from simpo.recipe import load_recipe
from simpo.run.export import WeightSample, as_saved, describe_loss_by_rounding, overflows, saved_tensors
from simpo.run.guard import RunGuard
from simpo.trainer import Trainer, TrainResult

SMALL_STEPS = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_steps": 4}
SAID = "of the weights that training moved are as they were before it"


class Lines(Display):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str, **_: object) -> None:
        self.said.append(text)


@pytest.fixture
def half(tiny_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe whose model comes in bf16, as most do, with steps as small as most are."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, source = tmp_path / "half", tiny_recipe["model_name_or_path"]
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return {**tiny_recipe, **SMALL_STEPS, "model_name_or_path": str(folder)}


def train(settings: dict[str, Any]) -> tuple[Trainer, TrainResult, list[str]]:
    display = Lines()
    trainer = Trainer(load_recipe(settings), display=display)
    return trainer, trainer.run(), display.said


def saved(result: TrainResult) -> dict[str, Tensor]:
    (path,) = result.model_dir.glob("*.safetensors")
    return load_file(path)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "eval_saved_loss" in line]


def test_rounded_weights_are_evaluated_as_they_are_in_the_file(half: dict[str, Any], tmp_path: Path) -> None:
    trainer, result, said = train(half)
    again = {**half, "model_name_or_path": str(result.model_dir), "output_dir": str(tmp_path / "again")}
    expected = Trainer(load_recipe(again), display=Display(quiet=True)).evaluate()
    assert result.saved_metrics.keys() == {name.replace("eval_", "eval_saved_") for name in expected}
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert result.saved_metrics[f"eval_saved_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=1e-6)
        assert abs(result.metrics[f"eval_{name}"] - expected[f"eval_{name}"]) > 1e-5  # what was wrong
    (line,) = lines_of(result.output_dir)
    assert line.items() >= result.saved_metrics.items()
    card = (result.model_dir / "README.md").read_text(encoding="utf-8")
    assert "| eval_loss |" in card
    assert "| eval_saved_loss |" in card
    assert any(text.startswith("as written in bfloat16: loss ") for text in said)
    assert [text for text in said if SAID in text and "save_dtype: float32" in text]
    # The training state stays: the live weights are the last checkpoint's, not what was written.
    resumed = Trainer(load_recipe({**half, "resume_from_checkpoint": True}), display=Display(quiet=True))
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], weight), name
    resumed.run()
    assert len(lines_of(result.output_dir)) == 1


def test_float32_files_hold_the_masters_and_need_no_second_evaluation(half: dict[str, Any]) -> None:
    trainer, result, said = train({**half, "save_dtype": "float32"})
    assert result.saved_metrics == {}
    assert lines_of(result.output_dir) == []
    assert not [text for text in said if SAID in text]
    for name, weight in saved(result).items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, trainer.model.state_dict()[name]), name
    assert json.loads((result.model_dir / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_are_written_and_evaluated_in_the_dtype_asked_for(dtype: str, tiny_recipe: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    keys = {"max_steps": 2, "use_peft": True, "lora_r": 4, "learning_rate": 1e-2, "save_dtype": dtype}
    trainer, result, said = train({**tiny_recipe, **keys})
    for name, weight in saved(result).items():
        assert weight.dtype == getattr(torch, dtype)
        live = trainer.model.get_parameter(name.replace(".weight", ".default.weight"))
        assert torch.equal(weight, live.to(weight.dtype)), name
    assert result.saved_metrics["eval_saved_loss"] != result.metrics["eval_loss"]
    assert not [text for text in said if SAID in text]  # what adapters add is not lost


def test_without_held_out_evaluations_there_is_none_of_the_file(half: dict[str, Any]) -> None:
    _, result, said = train({**half, "eval_strategy": "no"})
    assert result.saved_metrics == {}
    assert [text for text in said if SAID in text]


def test_weights_that_float16_cannot_hold_are_written_in_float32(tiny_recipe: dict[str, Any]) -> None:
    recipe = load_recipe({**tiny_recipe, "max_steps": 1, "eval_strategy": "no", "save_dtype": "float16"})
    display = Lines()
    trainer = Trainer(recipe, display=display)
    with torch.no_grad():
        trainer.model.model.layers[0].mlp.down_proj.weight[0, 0] = 7e4
    trainer.guard = RunGuard(recipe, trainer.output_dir, trainer.mesh, display)  # as run() makes it
    result = trainer._finish()
    assert "save_dtype: a weight is too large for float16; the model is written in float32" in display.said
    assert {weight.dtype for weight in saved(result).values()} == {torch.float32}


def test_rounding_is_undone_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 30)
    model.bias.data.fill_(0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with as_saved(saved_tensors(model), torch.bfloat16) as changed:
        assert changed
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name].bfloat16().float())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with as_saved([model.bias.detach()], torch.bfloat16) as changed:
        assert not changed  # 0.5 is 0.5 in bf16


def test_shares_of_moved_and_lost_weights_are_those_of_all() -> None:
    torch.manual_seed(0)
    weights = {"large": torch.randn(300, 200).mul(0.02).bfloat16().float(), "small": torch.ones(5)}
    sample = WeightSample(weights.items)
    weights["large"][:150] += 1e-7  # moved, and lost in bf16
    weights["small"] += 1.0  # moved, and seen
    counts = sample.count_moved(torch.bfloat16)
    assert counts.tolist() == pytest.approx([30_005, 30_000], rel=0.02)
    assert "bfloat16, 99.9% of the weights" in describe_loss_by_rounding(counts, torch.bfloat16)
    assert describe_loss_by_rounding(torch.tensor([100.0, 40.0]), torch.bfloat16) is None
    assert describe_loss_by_rounding(torch.tensor([0.0, 0.0]), torch.bfloat16) is None


def test_only_narrower_ranges_can_overflow() -> None:
    large = [torch.tensor([7e4])]
    assert overflows(large, torch.float16)
    assert overflows([large[0].bfloat16()], torch.float16)
    assert not overflows(large, torch.bfloat16)
    assert not overflows([torch.tensor([6e4])], torch.float16)
