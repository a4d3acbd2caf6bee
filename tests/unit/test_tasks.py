"""`simpo eval --tasks`: lm-evaluation-harness on local tasks, before against after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from simpo.cli import app
from simpo.evaluation.tasks import Measure, compare_measures

pytest.importorskip("lm_eval", reason="no lm-evaluation-harness (simpo[tasks])")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's, and of what it imports

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [
        {"question": f"What is {n} like?", "choices": ["water", "stone and light", "river"], "answer": n % 3}
        for n in range(12)
    ]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(TASK.format(data=tmp_path / "colours.jsonl"))
    return tmp_path / "colours.yaml"


@pytest.fixture
def other_model(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model with other weights in its last layer."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if "layers.1." in name:
            weights[name] = torch.randn(weight.shape, generator=generator).to(weight.dtype) / 10
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_local_task_is_compared_by_a_paired_test(task, tiny_model, other_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    words = ["eval", "--tasks", str(task), "--model", str(other_model), "--compare", str(tiny_model)]
    words += ["--output", str(tmp_path / "tasks.json"), "--bf16", "false", "--num_threads", "1"]
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, words)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "tasks.json").read_text())
    assert [(row["task"], row["metric"], row["documents"]) for row in content["tasks"]] == [
        ("colours", "acc", 12),
        ("colours", "acc_norm", 12),
    ]
    for row in content["tasks"]:
        change = row["value"]["value"] - row["baseline"]["value"]
        assert row["difference"]["value"] == pytest.approx(change)
        assert 0 < row["difference"]["p_value"] <= 1
        assert f"colours, {row['metric']} (12)" in result.stdout
    by_hand = score_by_hand(other_model)
    assert content["tasks"][0]["value"]["value"] == pytest.approx(by_hand)


def test_what_is_no_mean_over_documents_has_no_test(tmp_path, tiny_model, monkeypatch):
    """lm-eval's number of a document is a log-likelihood there, and its result a perplexity."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [{"question": f"What is {n} like?", "answer": word} for n, word in enumerate(("water", "stone", "river"))]
    (tmp_path / "ends.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ends.yaml").write_text(
        TASK.replace("multiple_choice", "loglikelihood")
        .replace("acc_norm", "perplexity")
        .replace('doc_to_choice: "{{{{choices}}}}"\n', "")
        .replace("colours", "ends")
        .format(data=tmp_path / "ends.jsonl")
    )
    words = ["eval", "--tasks", str(tmp_path / "ends.yaml"), "--model", str(tiny_model), "--bf16", "false"]
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, [*words, "--output", str(tmp_path / "tasks.json")])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "tasks.json").read_text())
    assert [row["metric"] for row in content["tasks"]] == ["acc"]
    assert content["others"]["ends perplexity"] > 1
    again = CliRunner().invoke(app, [*words, "--max-pairs", "1", "--output", str(tmp_path / "one.json")])
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "one.json").read_text())["tasks"][0]["documents"] == 1  # and no interval


def score_by_hand(folder: Path) -> float:
    """Share of the questions whose right answer has the highest summed log-prob."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for n in range(12):
        question, sums = f"What is {n} like?", []
        for choice in ("water", "stone and light", "river"):
            start = len(tokenizer(question, add_special_tokens=False)["input_ids"])
            ids = tokenizer(f"{question} {choice}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1)
            sums.append(float(logps.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        right += sums.index(max(sums)) == n % 3
    return right / 12


def test_the_test_is_mcnemars_where_documents_are_right_or_wrong():
    a = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.float64)
    b = torch.tensor([0.0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.float64)
    found = compare_measures(Measure("t", "acc", a), Measure("t", "acc", b))
    assert (found.value, found.p_value) == (0.5, pytest.approx(2 * 7 / 64))  # 5 against 1
    shares = compare_measures(Measure("t", "f1", a / 2), Measure("t", "f1", b / 3))
    assert shares.value == pytest.approx(float((a / 2 - b / 3).mean()))
    with pytest.raises(ValueError, match="t: 8 documents of one model and 7 of the other"):
        compare_measures(Measure("t", "acc", a), Measure("t", "acc", b[:7]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "none.yaml", "--model", "any"], "--tasks: none.yaml: no such file"),
        (["--tasks", "none.yaml"], "say with --model which model to evaluate"),
        (["pairs.jsonl", "--tasks", "none.yaml", "--model", "any"], "--tasks runs benchmarks in place of pairs"),
        ([], "say what to evaluate on: a recipe, a file of pairs, or --tasks"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(words, message):
    result = CliRunner().invoke(app, ["eval", *words])
    assert result.exit_code == 2
    assert message in result.stderr
