"""Scores that models give: reward models of real architectures with random weights, and mean log-probs."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature import TEMPLATE, WORDS
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import simpo
from simpo.data.columns import RowError
from simpo.onpolicy.journal import read_about, read_rows
from simpo.onpolicy.score import run_score
from simpo.onpolicy.scorers.models import RewardModel
from simpo.recipe import load_recipe
from simpo.recipe.scorers import read_scorer

SHAPE = {
    "hidden_size": 72,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "sliding_window": None,
}


def make_rows(count: int, *, seed: int = 0, longest: int = 30) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))

    return [
        {
            "id": f"row{i}",
            "prompt": [{"role": "user", "content": text()}],
            "responses": [{"text": text()} for _ in range(rng.randint(1, 4))],
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """build(architecture, **changes of its configuration): a folder with a reward model, scores between about +-10."""
    made: dict[str, Path] = {}

    def build(kind: str = "llama", **changes: Any) -> Path:
        key = json.dumps([kind, changes], sort_keys=True)
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp(f"reward-{kind}")
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.save_pretrained(folder)
        options = {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id, **SHAPE}
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **{**options, **changes}))
        model.score.weight.data.mul_(15)
        model.save_pretrained(folder)
        return made.setdefault(key, folder)

    return build


def load(folder: Path, **options: Any) -> RewardModel:
    chosen = read_scorer({"kind": "reward_model", "model": str(folder), "dtype": "float32", **options})[1]
    own = load_recipe({"model_name_or_path": str(folder), "trust_remote_code": chosen.trust_remote_code})
    return RewardModel(chosen, own)


def rate(folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[Any]:
    return load(folder, **options)(rows)


def flat(scores: list[Any]) -> list[float]:
    return [*itertools.chain(*scores)]


@torch.no_grad()
def one_by_one(folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[list[Any]]:
    """Each dialogue alone, unpadded, in fp32, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        dialogues = [[*row["prompt"], {"role": "assistant", "content": each["text"]}] for each in row["responses"]]
        ids = [tokenizer.apply_chat_template(each, return_tensors="pt", return_dict=False) for each in dialogues]
        found.append([model(each) for each in ids])
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("pad", ["own", "end of turn", "none"])
def test_batches_score_as_each_dialogue_alone(kind: str, pad: str, reward_model, tiny_model: Path):
    end = AutoTokenizer.from_pretrained(tiny_model).eos_token_id
    folder = reward_model(
        kind, **{"own": {}, "end of turn": {"pad_token_id": end}, "none": {"pad_token_id": None}}[pad]
    )
    rows = make_rows(6)
    alone = [[float(each.logits) for each in row] for row in one_by_one(folder, rows)]
    assert max(abs(score) for row in alone for score in row) > 2
    for batch_tokens in (1, 300, 10**6):
        model = load(folder, batch_tokens=batch_tokens)
        assert model.is_packed, "a prompt is computed once for its responses"
        torch.testing.assert_close(flat(model(rows)), flat(alone), rtol=0, atol=2e-5)
        model.model.set_attn_implementation("sdpa")
        model.is_packed = False
        torch.testing.assert_close(flat(model(rows)), flat(alone), rtol=0, atol=2e-5)


def test_bf16_is_near(reward_model):
    rows = make_rows(4)
    exact, near = (torch.tensor(flat(rate(reward_model(), rows, dtype=name))) for name in ("float32", "bfloat16"))
    assert 0 < (exact - near).abs().max() < 0.5


def test_bfloat16_is_said_to_be_slow_where_it_is(reward_model, tiny_model: Path, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(2)))
    specs = {
        "reward": {"kind": "reward_model", "model": str(reward_model()), "dtype": "bfloat16"},
        "logprob": {"kind": "logprob", "model": str(tiny_model)},
    }
    for has in (True, False):
        monkeypatch.setattr("simpo.model.load.has_bf16", lambda device, has=has: has)
        run_score(scoring(tmp_path / str(has), specs, bf16=True), input=tmp_path / "responses.jsonl")
        said = " ".join(capsys.readouterr().err.split())
        assert ("note: reward: this CPU has no instructions for bfloat16" in said) is not has
        assert ("tens of times as long as float32; dtype: float32 computes in float32" in said) is not has
        assert ("note: logprob: this CPU" in said and "the recipe's bf16: false computes" in said) is not has


def test_several_outputs_need_an_index(reward_model):
    folder, rows = reward_model(num_labels=3), make_rows(3)
    with pytest.raises(ValueError, match=r"index: logits of .* has 3 entries for each response; say which .* 0 to 2"):
        rate(folder, rows)
    alone = [[each.logits[0, 2].item() for each in row] for row in one_by_one(folder, rows)]
    torch.testing.assert_close(flat(rate(folder, rows, index=2)), flat(alone), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"output: .* gives no 'score_of_all'; it gives logits"):
        rate(folder, rows, output="score_of_all")


GATED = """
from dataclasses import dataclass
from typing import Optional
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput

@dataclass
class GatedOutput(ModelOutput):
    rewards: Optional[torch.Tensor] = None
    gates: Optional[torch.Tensor] = None
    score: Optional[torch.Tensor] = None
    logits: Optional[torch.Tensor] = None

class GatedRewards(LlamaPreTrainedModel):
    config_class = LlamaConfig
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression = nn.Linear(config.hidden_size, 4, bias=False)
        self.gating = nn.Linear(config.hidden_size, 4, bias=False)
        self.post_init()
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        last = torch.eq(input_ids, self.config.pad_token_id).int().argmax(-1) - 1
        hidden = hidden[torch.arange(len(hidden)), last % input_ids.shape[-1]]
        rewards, gates = self.regression(hidden), self.gating(hidden).softmax(-1)
        score = (rewards * gates).sum(-1)
        return GatedOutput(rewards=rewards, gates=gates, score=score, logits=rewards)
"""


def test_a_gated_model_with_its_own_code_gives_its_score(reward_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "gated"
    shutil.copytree(reward_model(), folder)
    (folder / "model.safetensors").unlink()
    (folder / "gated.py").write_text(GATED)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "gated.GatedRewards"}
    (folder / "config.json").write_text(json.dumps(config))
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(folder))
        from gated import GatedRewards  # pyright: ignore[reportMissingImports]

        torch.manual_seed(0)
        model = GatedRewards(AutoConfig.from_pretrained(folder))
        model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    rows = make_rows(4)
    alone = [each.score.item() for row in one_by_one(folder, rows, trust_remote_code=True) for each in row]
    scores = rate(folder, rows, trust_remote_code=True)
    torch.testing.assert_close(flat(scores), alone, rtol=0, atol=2e-5)
    assert flat(rate(folder, rows, trust_remote_code=True, output="rewards", index=1)) != alone


def test_what_is_no_reward_model_or_has_no_template_is_refused(reward_model, tiny_model: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"is no reward model: it has no score\.weight"):
        rate(tiny_model, make_rows(1))
    folder = tmp_path / "plain"
    shutil.copytree(reward_model(), folder)
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "responses.jsonl").write_text(json.dumps(make_rows(1)[0]))
    for options, said in (
        ({"model": str(folder)}, "chat_template: the tokenizer has none"),
        ({"model": str(folder), "chat_template": "none"}, "chat_template: a reward model rates dialogues"),
        ({"model": str(tmp_path / "nothing")}, "model: folder '.*nothing' does not exist"),
    ):
        with pytest.raises(ValueError, match=f"score.scorers.rm: {said}"):
            run_score(scoring(tmp_path, {"rm": {"kind": "reward_model", **options}}))
    assert rate(folder, make_rows(1), chat_template=TEMPLATE) == rate(reward_model(), make_rows(1))


def scoring(folder: Path, scorers: dict[str, Any], **keys: Any):
    given = {"model_name_or_path": "any", "output_dir": str(folder), "num_threads": 1, **keys}
    return load_recipe({**given, "score": {"scorers": scorers}})


def test_a_row_that_is_too_long_is_left_out_and_never_cut(reward_model, tmp_path: Path):
    rows = make_rows(3)
    rows[1]["responses"][0]["text"] = "water " * 300
    found = rate(reward_model(), rows)
    assert isinstance(found[1], RowError)
    assert found[1].reason == "too long"
    assert "tokens with its prompt, over 256" in found[1].detail
    assert [found[0], found[2]] == rate(reward_model(), [rows[0], rows[2]])
    assert isinstance(rate(reward_model(), rows[:1], max_length=5)[0], RowError)


@pytest.mark.long
def test_processes_share_the_work(reward_model, tmp_path: Path):
    rows = make_rows(150, longest=4)
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"kind": "reward_model", "model": str(reward_model()), "dtype": "float32", "processes": 2}
    found = list(read_rows(run_score(scoring(tmp_path, {"rm": spec}))))
    scores = [[each["score"] for each in row["responses"]] for row in found]
    torch.testing.assert_close(flat(scores), flat(rate(reward_model(), rows)), rtol=0, atol=2e-5)


# --- log-probs -------------------------------------------------------------------------------------------------------


def test_mean_log_probs_are_those_of_evaluation(tiny_model: Path, tmp_path: Path):
    rows = [row for row in make_rows(12, longest=12) if len(row["responses"]) > 1]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for row in rows:
            chosen, rejected = (each["text"] for each in row["responses"][:2])
            file.write(json.dumps({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}) + "\n")
    keys = {"model_name_or_path": str(tiny_model), "bf16": False, "cache_dir": str(tmp_path / "cache")}
    spec = {"kind": "logprob", "model": str(tiny_model)}
    path = run_score(scoring(tmp_path, {"policy": spec}, **keys))
    scores = [[each["score"] for each in row["responses"][:2]] for row in read_rows(path)]
    records = simpo.evaluate(tiny_model, pairs, recipe={**keys, "preprocessing_num_workers": 1}, progress=False).pairs
    expected = [[pair.chosen_mean, pair.rejected_mean] for pair in records]
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)


def test_written_log_probs_are_divided_by_their_tokens(tmp_path: Path):
    rows = make_rows(3)
    for row in rows:
        for response in row["responses"]:
            response |= {"num_tokens": 4, "logprob": -6.0}
    rows[1]["responses"][0]["logprob"] = None
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = run_score(scoring(tmp_path, {"policy": {"kind": "logprob"}}))
    assert {each["score"] for row in read_rows(path) for each in row["responses"]} == {-1.5}
    assert read_about(path)["left_out"]["policy: no log-prob"]["count"] == 1
