"""`simpo merge`: what is written answers as what was trained, whatever it was trained as; nothing is overwritten."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mesh_runs
import pytest
import torch
from cases import rarely
from mesh_runs import MESHES
from ranks import Ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from simpo.cli import app
from simpo.display import Display
from simpo.onpolicy.rounds import merge_adapter
from simpo.recipe import load_recipe
from simpo.run.export import is_own_card
from simpo.run.saved import list_checkpoints
from simpo.shipping.merge import run_merge
from simpo.shipping.source import find_source, load_source_tokenizer
from simpo.trainer import Trainer

Settings = dict[str, Any]
IDS = torch.arange(3, 40)[None]
SHORT = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}


def train(settings: Settings, **changes: Any) -> Trainer:
    trainer = Trainer(load_recipe({**settings, **SHORT, **changes}), display=Display(quiet=True))
    trainer.run()
    return trainer


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """By the model's ordinary head."""
    from simpo.model.attention import plain_attention

    model.eval()
    with plain_attention(model):
        return model(input_ids=IDS, use_cache=False).logits.float()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({}, True),
        ({"use_dora": True}, True),
        ({"lora_modules_to_save": ["embed_tokens", "norm"]}, False),
    ],
    ids=["LoRA", "DoRA", "modules to save"],
)
def test_merged_adapters_have_the_trained_logits(
    tiny_recipe: Settings, model_folder: Any, changes: Settings, tied: bool
):
    if not tied:
        tiny_recipe |= {"model_name_or_path": str(model_folder(tie_word_embeddings=False))}
    trainer = train(tiny_recipe, use_peft=True, learning_rate=0.05, **changes)
    run = trainer.output_dir
    expected, base = logits(trainer.model), logits(load(Path(trainer.recipe.model_name_or_path)))
    merged = run_merge(str(run), ["--save_dtype", "float32"])
    assert merged == run / "merged"
    assert not (merged / "adapter_config.json").exists()
    found = logits(load(merged))
    assert (found - base).abs().max() > 0.05  # it was trained
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == trainer.tokenizer.chat_template
    assert (merged / "generation_config.json").is_file()
    assert json.loads((merged / "config.json").read_text())["dtype"] == "float32"
    again = run_merge(str(run / "checkpoints" / "step-4"), ["--save_dtype", "float32"], output=str(run / "again"))
    torch.testing.assert_close(logits(load(again)), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_what_a_coarse_base_loses_of_its_adapters_is_said(
    tiny_recipe: Settings, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Small changes to weights on bfloat16's own grid were rounded away, and the card had the adapters' numbers."""
    pytest.importorskip("peft")
    from peft import PeftModel

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    trainer = train({**tiny_recipe, "model_name_or_path": str(base)}, use_peft=True, learning_rate=0.01)
    written = PeftModel.from_pretrained(load(base), trainer.output_dir / "model")
    expected = logits(written).log_softmax(-1)
    capsys.readouterr()
    for dtype in ("auto", "float32"):
        merged = run_merge(str(trainer.output_dir), ["--save_dtype", dtype], output=str(tmp_path / dtype))
        lost = (logits(load(merged)).log_softmax(-1) - expected).abs().max().item()
        said = re.findall(r"written in (\w+), which changes log-probs by up to ([\d.]+) nats", capsys.readouterr().out)
        card = (merged / "README.md").read_text()
        assert is_own_card(card)
        assert len(re.findall("Its weights were written in", card)) == len(said)
        if dtype == "float32":
            assert said == []
            assert lost < 1e-4
        else:
            assert lost > 1e-3
            assert said[0][0] == "bfloat16"
            assert 0.3 * lost < float(said[0][1]) < 3 * lost, "of other tokens"
    merge_adapter(trainer.output_dir / "model", tmp_path / "round", trainer.recipe)
    assert (logits(load(tmp_path / "round")).log_softmax(-1) - expected).abs().max() < 1e-4, "between rounds nothing is"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("changes", [{}, {"lora_modules_to_save": ["norm"]}], ids=["QLoRA", "and modules to save"])
def test_adapters_trained_over_four_bits_are_merged_into_weights_that_never_were(
    tiny_recipe: Settings, model_folder: Any, changes: Settings
):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    from peft import PeftModel

    base = str(model_folder(hidden_size=64, intermediate_size=128))
    tiny_recipe |= {"model_name_or_path": base, "use_peft": True, "load_in_4bit": True, "learning_rate": 0.05}
    trainer = train(tiny_recipe, **changes)
    run = trainer.output_dir
    adapted = PeftModel.from_pretrained(load(Path(base)), run / "model")
    expected, quantised, before = logits(adapted), logits(trainer.model), logits(load(Path(base)))
    for name, output in ((run, None), (run / "checkpoints" / "step-4", str(run / "again"))):
        found = logits(load(run_merge(str(name), ["--save_dtype", "float32"], output=output)))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
        # Nearer to what was trained, the rounding to four bits aside, than the base is.
        assert (found - quantised).norm() < 0.5 * (before - quantised).norm()


@pytest.mark.parametrize("mesh", ["fsdp2", rarely("tp2")])
def test_a_checkpoint_of_two_ranks_is_the_model_that_they_exported(
    mesh: str, tiny_recipe: Settings, model_folder: Any, two_ranks: Ranks
):
    model = model_folder(num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True)
    settings = {**tiny_recipe, **SHORT, "save_steps": 4, "save_dtype": "float32", **MESHES[mesh]}
    settings["model_name_or_path"] = model
    assert two_ranks.run(mesh_runs.run, settings) == ["finished"] * 2
    run = Path(settings["output_dir"])
    merged = run_merge(str(run / "checkpoints" / "step-4"))
    assert merged == run / "step-4-merged"
    expected = load_file(run / "model" / "model.safetensors")
    found = load_file(merged / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_chat_template_that_is_asked_for_is_written(tiny_model: Path, tmp_path: Path):
    """A key that the command takes and that changed nothing."""
    words = ["--save_dtype", "float32", "--chat_template", "{% for m in messages %}A{{ m['content'] }}{% endfor %}"]
    folder = run_merge(str(tiny_model), words, output=str(tmp_path / "merged"))
    assert AutoTokenizer.from_pretrained(folder).chat_template == words[-1]


def test_a_run_with_a_tokenizer_from_elsewhere_keeps_the_template_that_it_was_trained_with(
    tiny_recipe: Settings, tiny_model: Path, tmp_path: Path
):
    """The recipe names the other tokenizer, whose own template is not the run's."""
    own = "{% for m in messages %}A{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}B{% endif %}"
    other = tmp_path / "other"
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(other)
    run = train(tiny_recipe, use_peft=True, tokenizer_name_or_path=str(other), chat_template=own).output_dir
    for name in (run, run / "model", run / "checkpoints" / "step-4"):
        assert load_source_tokenizer(find_source(str(name))).chat_template == own, name
    asked = find_source(str(run), ["--tokenizer_name_or_path", str(other)])
    assert load_source_tokenizer(asked).chat_template != own
    assert AutoTokenizer.from_pretrained(run_merge(str(run))).chat_template == own


@pytest.mark.parametrize("content", ["{}", '{"base_model_name_or_path": null}', "[", "[]"])
def test_an_adapter_that_names_no_base_is_said_in_a_line(content: str, tmp_path: Path):
    path = tmp_path / "adapter_config.json"
    path.write_text(content)
    refused = CliRunner().invoke(app, ["merge", str(tmp_path)])
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)
    assert str(path) in refused.stderr


def test_a_name_that_is_a_model_already_and_a_folder_in_use_are_refused(tiny_recipe: Settings, tmp_path: Path):
    run = train(tiny_recipe).output_dir
    refused = CliRunner().invoke(app, ["merge", str(run)])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "is an ordinary model already: there is nothing to merge" in refused.stderr
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    refused = CliRunner().invoke(app, ["merge", str(run / "checkpoints" / "step-2"), "--output", str(taken)])
    assert refused.exit_code == 2
    assert "is there already, and nothing is overwritten" in refused.stderr
    assert [path.name for path in taken.iterdir()] == ["file"]
    for name, message in (("/no/where", "there is no such folder"), (str(tmp_path), "holds no model")):
        refused = CliRunner().invoke(app, ["merge", name])
        assert (refused.exit_code, message in refused.stderr) == (2, True)
    narrow = run_merge(str(run), ["--save_dtype", "bfloat16"], output=str(tmp_path / "narrow"))
    assert load_file(narrow / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_run_without_its_model_stands_for_its_newest_checkpoint(tiny_recipe: Settings):
    trainer = train(tiny_recipe, save_dtype="float32")
    expected = load_file(trainer.output_dir / "model" / "model.safetensors")
    shutil.rmtree(trainer.output_dir / "model")
    assert [c.step for c in list_checkpoints(trainer.checkpoint_dir)] == [2, 4]
    merged = run_merge(str(trainer.output_dir), [])
    for name, value in load_file(merged / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name
    card = (merged / "README.md").read_text()
    assert "optimizer step of these weights: 4 of 4" in card
    assert "| rewards/accuracies |" in card
