"""`simpo generate` by a server, by vLLM (a stand-in for it) and over Ray: the rows that the local backend writes."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, completion
from miniature import sampling_recipe
from typer.testing import CliRunner

from simpo.cli import app
from simpo.onpolicy import client as client_module
from simpo.onpolicy.backends import RayBackend, VllmBackend
from simpo.onpolicy.generate import run_generate
from simpo.onpolicy.journal import read_about, read_rows
from simpo.onpolicy.rounds import run_rounds
from simpo.recipe import load_recipe

QUESTIONS = ["river?", "water and stone", "light", "a longer question about water, stone and light", "wind", "sand"]


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """A recipe of six prompts, one of them with a system turn."""
    prompts: list[Any] = list(QUESTIONS)
    prompts[1] = [{"role": "system", "content": "short"}, {"role": "user", "content": QUESTIONS[1]}]
    return sampling_recipe(tmp_path, tiny_model, prompts, batch_size=6)


def sample(settings: dict[str, Any], **keys: Any) -> dict[str, dict[str, Any]]:
    path = run_generate(load_recipe({**settings, "generate": {**settings["generate"], **keys}}))
    return {row["id"]: row for row in read_rows(path)}


def command(settings: dict[str, Any], tmp_path: Path, **keys: Any) -> Any:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**settings, "generate": {**settings["generate"], **keys}}))
    return CliRunner().invoke(app, ["generate", str(recipe)])


# --- a server ---------------------------------------------------------------------------------------------------------

openai_is_there = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="simpo[openai]")


def echo(body: dict[str, Any]) -> dict[str, Any]:
    """As many answers as asked for, each by the question and its seed."""
    asked = body["messages"][-1]["content"]
    texts = [f"{asked} by {body['seed'] + place}" for place in range(body.get("n", 1))]
    return completion(*texts, logprobs="logprobs" in body)


def one_by_one(body: dict[str, Any]) -> dict[str, Any]:
    return echo({name: value for name, value in body.items() if name not in ("n", "logprobs")})


@openai_is_there
@pytest.mark.parametrize("answer", [echo, one_by_one])
def test_a_servers_answers_belong_to_their_prompts(settings, answer):
    with ChatServer(answer) as server:
        rows = sample(settings, backend="openai", url=server.url, top_k=5, stop=["END"], options={"user": "me"})
    assert len(rows) == len(QUESTIONS)
    for row in rows.values():
        texts = [response["text"] for response in row["responses"]]
        assert len(set(texts)) == 3
        assert all(text.startswith(row["prompt"][-1]["content"]) for text in texts)
        assert all(response["finished"] and response["num_tokens"] for response in row["responses"])
        assert all((response["logprob"] is None) == (answer is one_by_one) for response in row["responses"])
    sampling = {"temperature": 0.8, "top_p": 0.95, "top_k": 5, "stop": ["END"], "max_tokens": 12, "user": "me"}
    assert all(sampling.items() <= body.items() for body in server.asked[2:])
    systems = [body["messages"][0] for body in server.asked if len(body["messages"]) == 2]
    assert systems == [{"role": "system", "content": "short"}] * (1 if answer is echo else 3)


@openai_is_there
def test_tools_go_along(settings, tmp_path):
    tool = {"type": "function", "function": {"name": "depth", "parameters": {"type": "object", "properties": {}}}}
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"prompt": "How deep?", "tools": [tool]}) + "\n")
    with ChatServer(echo) as server:
        (row,) = sample(settings, backend="openai", url=server.url, prompts={str(path): 1.0}).values()
    assert server.asked[-1]["tools"] == row["tools"] == [tool]


@openai_is_there
def test_a_server_that_fails_midway_costs_no_row_and_gives_none_twice(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "RETRIES", 0)
    with ChatServer(echo) as server:
        expected = sample(settings, backend="openai", url=server.url)
        whole = Path(settings["output_dir"], "responses.jsonl").read_bytes()
    settings["output_dir"] = str(tmp_path / "second")
    failing = {"river?": b"<html>", "light": 500, "wind": None, "sand": {"choices": []}}

    def answer(body):
        return failing.get(body["messages"][-1]["content"], echo(body))

    with ChatServer(answer) as server:
        keys = {"backend": "openai", "url": server.url}
        done = command(settings, tmp_path, **keys)
        assert done.exit_code == 3, done.output
        assert done.output.count("2 not an answer") == 1
        about = read_about(Path(settings["output_dir"], "responses.jsonl"))
        assert {reason: entry["count"] for reason, entry in about["left_out"].items()} == {
            "not an answer": 2,
            "server error": 1,
            "no connection": 1,
        }
        failing.clear()
        server.asked.clear()
        assert sample(settings, **keys) == expected
        assert Path(settings["output_dir"], "responses.jsonl").read_bytes() == whole
        assert len(server.asked) == 1 + 4
        assert sample(settings, **keys) == expected
        assert len(server.asked) == 1 + 4, "of a file that is complete nothing is asked"
        with ChatServer(echo, models=("another",)) as other:
            again = command(settings, tmp_path, **keys | {"url": other.url})
    assert again.exit_code == 2
    assert "model was 'small' and is 'another'" in again.output


@openai_is_there
@pytest.mark.usefixtures("rounds_in_process")
def test_a_round_of_pairs_by_a_server(settings, tmp_path):
    """A server that answers by numbers of words, and a rule that likes them: the model trains on its answers."""
    prompts = tmp_path / "many.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"water and stone {number}"}) + "\n" for number in range(24)))

    def answer(body):
        return completion(" ".join(["river"] * (1 + body["seed"] % 7)))

    settings |= {
        "generate": {"num_samples": 3, "max_new_tokens": 8, "backend": "openai", "prompts": {str(prompts): 1.0}},
        "score": {"scorers": {"length": {"kind": "length"}}},
        "pair": {"test_fraction": 0.25},
        "rounds": {"rounds": 1},
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
    }
    with ChatServer(answer) as server:
        settings["generate"]["url"] = server.url
        path = run_rounds(load_recipe(settings))
    folder = path.parent
    assert all(
        "river" in response["text"]
        for row in read_rows(folder / "round-1" / "responses.jsonl")
        for response in row["responses"]
    )
    assert (folder / "round-1" / "run" / "model" / "config.json").is_file()
    assert len(json.loads(path.read_text())["models"]) == 2


@openai_is_there
def test_what_is_wrong_with_a_server_is_one_line_before_any_work(settings, tmp_path):
    for keys, said in (
        ({}, "generate.url: backend openai needs a server"),
        ({"url": "http://127.0.0.1:9"}, "no server answers"),
        ({"tensor_parallel": 2}, "generate.tensor_parallel is a setting of vllm, and openai samples here"),
        ({"url": "http://127.0.0.1:9", "api_key_variable": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
    ):
        done = command(settings, tmp_path, backend="openai", **keys)
        assert done.exit_code == 2
        assert said in done.output
        assert len(done.output.splitlines()) == 1
    assert not Path(settings["output_dir"], "responses.jsonl").exists()


# --- vLLM -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch, tmp_path: Path) -> Iterator[Path]:
    """With the stand-in installed, and its engines in this process; the file that it says what it was given in."""
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("the real one is installed")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "standins")
    monkeypatch.setenv("VLLM_STANDIN_LOG", str(tmp_path / "vllm.log"))
    monkeypatch.setattr(VllmBackend, "_by_processes", lambda self, batches, places, build: map(build(), batches))
    yield tmp_path / "vllm.log"
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


def logged(log: Path, key: str) -> list[dict[str, Any]]:
    return [entry for entry in map(json.loads, log.read_text().splitlines()) if key in entry]


def test_vllm_gets_the_tokens_of_training_and_its_rows_are_those_of_local(settings, tmp_path, vllm):
    greedy = {"num_samples": 1, "temperature": 0}
    expected = sample(settings, **greedy)
    settings["output_dir"] = str(tmp_path / "vllm")
    rows = sample(settings, **greedy, backend="vllm", options={"enforce_eager": True})
    assert rows.keys() == expected.keys()
    for row_id, row in rows.items():
        (found,), (wanted,) = row.pop("responses"), expected[row_id].pop("responses")
        assert found.pop("logprob") == pytest.approx(wanted.pop("logprob"), abs=1e-4)
        assert found == wanted
        assert row == expected[row_id]
    (made,) = logged(vllm, "model")
    assert made["logprobs_mode"] == "raw_logprobs"


def test_vllms_samples_do_not_depend_on_what_is_asked_together(settings, tmp_path, vllm, monkeypatch):
    keys = {"backend": "vllm", "stop": ["water"]}
    expected = sample(settings, **keys)
    assert all(len({response["text"] for response in row["responses"]}) > 1 for row in expected.values())
    assert not any("water" in response["text"] for row in expected.values() for response in row["responses"])
    whole = Path(settings["output_dir"], "responses.jsonl").read_bytes()
    settings["output_dir"] = str(tmp_path / "second")
    monkeypatch.setattr("simpo.onpolicy.backends.ENGINE_RESPONSES", 6)
    assert sample(settings, **keys) == expected
    assert [entry["prompts"] for entry in logged(vllm, "prompts")] == [6, 2, 2, 2]
    path = Path(settings["output_dir"], "responses.jsonl")
    path.write_bytes(whole[: len(whole) // 2])
    sample(settings, **keys)
    assert path.read_bytes() == whole
    assert sum(entry["prompts"] for entry in logged(vllm, "prompts")[4:]) == 6 - whole[: len(whole) // 2].count(b"\n")


@pytest.mark.long
def test_engines_of_vllm_are_processes_of_their_own(settings, vllm, monkeypatch):
    monkeypatch.undo()
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "standins")
    monkeypatch.setenv("VLLM_STANDIN_LOG", str(vllm))
    monkeypatch.setattr("simpo.onpolicy.backends.ENGINE_RESPONSES", 6)
    assert len(sample(settings, backend="vllm", processes=2)) == 6
    pids = {entry["pid"] for entry in logged(vllm, "model")}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_what_vllm_does_not_finish_is_left_out(settings, tmp_path, vllm, monkeypatch):
    monkeypatch.setenv("VLLM_STANDIN_ABORTS", "water and stone")
    done = command(settings, tmp_path, backend="vllm")
    assert done.exit_code == 3, done.output
    assert "left out: 1 not finished" in done.output
    monkeypatch.delenv("VLLM_STANDIN_ABORTS")
    assert len(sample(settings, backend="vllm")) == 6


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 reads it
def test_an_adapter_goes_to_vllm_as_one(settings, tmp_path, vllm, tiny_model):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    peft.get_peft_model(model, peft.LoraConfig(r=12, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    settings["model_name_or_path"] = str(tmp_path / "adapter")
    sample(settings, backend="vllm", num_samples=1, max_new_tokens=2)
    (made,), (asked,) = logged(vllm, "model"), logged(vllm, "prompts")
    assert (made["model"], made["enable_lora"], made["max_lora_rank"]) == (str(tiny_model), True, 16)
    assert asked["lora"] == settings["model_name_or_path"]


def test_what_is_wrong_with_vllm_is_one_line(settings, tmp_path, monkeypatch, vllm):
    done = command(settings, tmp_path, backend="vllm", options={"no_such_argument": 1})
    assert done.exit_code == 2
    assert "vLLM's engine does not start" in done.output
    assert "no_such_argument" in done.output
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = command(settings, tmp_path, backend="vllm")
    assert done.exit_code == 2
    assert "vLLM is not installed: pip install vllm" in done.output
    assert len(done.output.splitlines()) == 1


def test_an_engine_has_as_many_gpus_as_it_is_spread_over(settings, monkeypatch):
    import torch

    from simpo.onpolicy import sampler

    monkeypatch.setattr(sampler, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5,6,7")
    settings["generate"]["processes"] = None
    recipe = load_recipe(settings)
    places, _ = sampler.find_places(recipe, 9, None, gpus_each=2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0,1", "4,5", "6,7"]
    assert len(sampler.find_places(recipe, 9, None, gpus_each=4)[0]) == 1
    with pytest.raises(ValueError, match=r"tensor_parallel = 8: this machine has 6 GPUs"):
        sampler.find_places(recipe, 9, None, gpus_each=8)


# --- Ray --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of two CPUs on this machine; its worker processes can be told from others by their parents."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    folder = tempfile.mkdtemp(prefix="ray")  # whose path must be short: sockets lie in it
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _temp_dir=folder,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # which it raises about itself
def test_rays_workers_write_the_rows_of_one_process_though_one_is_killed(settings, tmp_path, monkeypatch, cluster):
    psutil = pytest.importorskip("psutil")
    settings["generate"] |= {"max_new_tokens": 40}
    expected = sample(settings)
    whole = Path(settings["output_dir"], "responses.jsonl").read_bytes()
    settings["output_dir"] = str(tmp_path / "ray")
    killed = []
    computed = RayBackend._computed

    def kill_one(self, batches):
        for answers in computed(self, batches):
            if not killed:
                ours = psutil.Process().children(recursive=True)
                actors = [child for child in ours if "MapWorker" in " ".join(child.cmdline())]
                killed.append(len(actors))
                actors[0].kill()
            yield answers

    monkeypatch.setattr(RayBackend, "_computed", kill_one)
    assert sample(settings, backend="ray", processes=2) == expected
    assert killed == [2]
    path = Path(settings["output_dir"], "responses.jsonl")
    assert path.read_bytes() == whole
    path.write_bytes(whole[: len(whole) // 2])  # begun by local, as its samples are the same
    about = path.with_suffix(".json").read_bytes()
    path.with_suffix(".json").write_bytes(Path(tmp_path, "run", "responses.json").read_bytes())
    assert sample(settings, backend="ray", processes=2) == expected
    assert path.with_suffix(".json").read_bytes() == about
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="the cluster has 0 GPUs, and each of its processes needs 4"):
        sample(settings | {"output_dir": str(tmp_path / "no")}, backend="ray", on_ray="vllm", tensor_parallel=4)
