"""`push_to_hub`: the final model reaches a stand-in of the hub's API whole, and a failed upload loses nothing."""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import yaml
from finished_runs import write_run
from huggingface_hub import HfApi, hf_api
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from simpo.cli import app
from simpo.hosts.hf import SimPOConfig, SimPOTrainer
from simpo.hosts.hf.run import run_recipe
from simpo.recipe import load_recipe
from simpo.shipping.card import card_of
from simpo.shipping.merge import run_merge
from simpo.shipping.source import find_source
from simpo.trainer import Trainer

# huggingface_hub 2.4 hands files to httpx in a way that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
TOKEN = "hf_" + "secret" * 5


class Hub:
    """Repositories with their files, as far as an upload of a folder asks for them.

    Attributes:
        created: the payloads that made repositories.
        files: repository -> path -> content, of what was committed.
        refuses: part of a path whose requests are answered with 403.
        tokens: what clients gave as their authorization.
    """

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.refuses = "nothing"
        self.tokens: set[str | None] = set()

    def answer(self, path: str, body: bytes, url: str) -> dict[str, Any]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(asked)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.files.setdefault(name, {})
            return {"url": f"{url}/{name}", "id": name}
        if path == "/api/validate-yaml":
            return {"warnings": [], "errors": []}
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{url}/lfs/{o['oid']}", "header": {}}}} for o in objects]
            return {"transfer": "basic", "objects": actions}
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.files[name][line["value"]["path"]] = self.objects[line["value"]["oid"]]
            return {"commitUrl": f"{url}/{name}/commit/0", "commitOid": "0" * 40, "success": True}
        raise AssertionError(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    stand_in = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_POST(self) -> None:
            body, path = self.body(), self.path.partition("?")[0]
            stand_in.tokens.add(self.headers.get("Authorization"))
            if stand_in.refuses in path:
                self.reply(403, {"error": "not yours"})
            else:
                self.reply(200, stand_in.answer(path, body, url))

        def do_PUT(self) -> None:
            stand_in.objects[self.path.rpartition("/")[2]] = self.body()
            self.reply(200, {})

        def log_message(self, *parts: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in (("ENDPOINT", url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(hub_constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", url)  # of the functions that transformers imports
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # its own, kept from an earlier test
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield stand_in
    server.shutdown()
    server.server_close()
    thread.join()


def recipe_file(folder: Path, tiny_recipe: dict[str, Any], **keys: Any) -> Path:
    path = folder / "recipe.yaml"
    short = {"max_steps": 2, "save_strategy": "no", "eval_steps": 2, "push_to_hub": True, "hub_model_id": "team/small"}
    path.write_text(yaml.safe_dump({**tiny_recipe, **short, **keys}))
    return path


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_final_model_is_uploaded_whole_and_the_token_is_written_nowhere(
    hub: Hub, tiny_recipe: dict[str, Any], tmp_path: Path
):
    path = recipe_file(tmp_path, tiny_recipe, hub_private_repo=True, hub_token=TOKEN)
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    run = Path(tiny_recipe["output_dir"])
    assert hub.files["team/small"] == files_under(run / "model")
    assert (hub.created[0]["organization"], hub.created[0]["name"]) == ("team", "small")
    assert hub.created[0].get("visibility") == "private" or hub.created[0].get("private") is True
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert "/team/small" in result.output
    assert not any(TOKEN.encode() in content for content in files_under(run).values())
    assert TOKEN not in result.output + repr(load_recipe(path)) + CliRunner().invoke(app, ["check", str(path)]).output


def test_the_trainer_under_accelerate_uploads_the_same(hub: Hub, tiny_recipe: dict[str, Any], tmp_path: Path):
    run_recipe(load_recipe(recipe_file(tmp_path, tiny_recipe, device="cpu", hub_model_id=None)))
    assert hub.files == {"me/run": files_under(Path(tiny_recipe["output_dir"]) / "model")}


def test_a_repository_that_cannot_be_made_is_said_before_the_model_is_loaded(
    hub: Hub, tiny_recipe: dict[str, Any], tmp_path: Path
):
    hub.refuses = "/api/repos/create"
    result = CliRunner().invoke(app, ["train", str(recipe_file(tmp_path, tiny_recipe))])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: push_to_hub: the repository 'team/small' cannot be created: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (Path(tiny_recipe["output_dir"]) / "recipe.yaml").exists()


@pytest.mark.parametrize("refuses", ["/commit/", "/info/lfs/"])
def test_a_failed_upload_leaves_the_model_and_says_how_to_try_again(
    refuses: str, hub: Hub, tiny_recipe: dict[str, Any], tmp_path: Path
):
    hub.refuses = refuses
    result = CliRunner().invoke(app, ["train", str(recipe_file(tmp_path, tiny_recipe))])
    folder = Path(tiny_recipe["output_dir"]) / "model"
    assert result.exit_code == 2
    assert f"its model is in {folder}, but uploading it to team/small failed: " in result.stderr
    assert f"hf upload team/small {folder}" in result.stderr
    AutoModelForCausalLM.from_pretrained(folder)


def test_without_a_network_it_is_said_at_start(tiny_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="push_to_hub: the repository 'run' cannot be created"):
        Trainer(load_recipe({**tiny_recipe, "push_to_hub": True}))


def test_simpo_trainer_uploads_as_transformers_trainer_does(hub: Hub, tiny_model: Path, tmp_path: Path):
    args = SimPOConfig(
        output_dir=str(tmp_path / "out"),
        push_to_hub=True,
        hub_model_id="team/small",
        hub_token=TOKEN,
        report_to=[],
        bf16=False,
        max_steps=1,
        save_strategy="no",
    )
    rows = [{"prompt": f"{word}?", "chosen": "water", "rejected": "stone"} for word in ("one", "two", "light", "river")]
    trainer = SimPOTrainer(str(tiny_model), args, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(hub.files["team/small"])
    assert HfApi().endpoint.startswith("http://127.0.0.1")


def test_a_finished_run_is_pushed_with_a_card_that_has_its_numbers(
    hub: Hub, tiny_recipe: dict[str, Any], tmp_path: Path
):
    path = recipe_file(tmp_path, tiny_recipe, push_to_hub=False, hub_model_id=None, eval_on_start=True)
    assert CliRunner().invoke(app, ["train", str(path)]).exit_code == 0
    run = Path(tiny_recipe["output_dir"])
    before = files_under(run)
    shown = CliRunner().invoke(app, ["push", str(run), "--repo", "team/small", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "would be sent to team/small" in shown.stdout
    assert "model.safetensors" in shown.stdout
    assert not hub.created
    pushed = CliRunner().invoke(app, ["push", str(run), "--repo", "team/small", "--hub_token", TOKEN])
    assert pushed.exit_code == 0, pushed.output
    sent = hub.files["team/small"]
    assert sent.keys() == files_under(run / "model").keys()
    card = sent.pop("README.md").decode()
    assert sent == {name: content for name, content in files_under(run / "model").items() if name != "README.md"}
    assert files_under(run) == before
    for line in ("| metric | before training | after |", "- training pairs: 40 of 40", "- held-out pairs: 10 of 10"):
        assert line in card
    assert "10 pairs; intervals at 95%" in card
    (known,) = re.findall(r"\n- data fingerprint: .*\n", (run / "model" / "README.md").read_text())
    assert known in card
    assert json.loads((run / "audit.json").read_text())["fingerprint"] not in card, "which is not of tokens"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in card + pushed.output
    readme = run / "model" / "README.md"
    own = readme.read_text()
    for mine in ("mine", "from_pretrained('me/small-simpo')", f"{own}\nMore.\n", f"# A\n{own}"):
        readme.write_text(mine)
        assert "by somebody else than simpo: it is sent as it is" in (
            CliRunner().invoke(app, ["push", str(run), "--dry-run"]).stdout
        )
    refused = CliRunner().invoke(app, ["push", str(tmp_path / "nowhere")])
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)


def test_what_a_run_says_to_type_next_can_be_typed_and_ends_on_the_card(tiny_recipe: dict[str, Any], tmp_path: Path):
    path = recipe_file(tmp_path, tiny_recipe, push_to_hub=False, hub_model_id=None, use_peft=True, learning_rate=0.05)
    lines = CliRunner().invoke(app, ["train", str(path)]).stdout.split("next:\n")[1].splitlines()
    assert [line.split()[1] for line in lines] == ["chat", "eval", "report", "merge", "export", "push"]
    for line in lines[:-1]:
        done = CliRunner().invoke(app, shlex.split(line)[1:], input="water\n")
        assert done.exit_code == 0, (line, done.output)
    run = Path(tiny_recipe["output_dir"])
    compared = json.loads((run / "evaluation.json").read_text())
    shown = CliRunner().invoke(app, [*shlex.split(lines[-1])[1:], "--dry-run"]).stdout
    assert "| 10 held-out pairs | before | after |" in shown
    before, after = (f"{each['accuracy']['value']:.1%}" for each in (compared["baseline"], compared))
    assert re.search(rf"\| preference accuracy \| {before} \[.*\] \| {after} \[.*\] \|", shown)
    assert f"tokens {compared['data_fingerprint']}" in shown


# --- what the card has of the files of a run -------------------------------------------------------------------------


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Path:
    """A run of 40 steps, evaluated at 0, 20 and 40, with a model and one checkpoint of transformers' Trainer."""
    folder = write_run(tmp_path / "first", model_name_or_path=str(tiny_model))
    checkpoint = folder / "checkpoints" / "checkpoint-20"
    for place in (folder / "model", checkpoint):
        shutil.copytree(tiny_model, place, dirs_exist_ok=True)
    for name in ("optimizer.pt", "trainer_state.json", "simpo.json"):
        (checkpoint / name).write_text("{}")
    return folder


def dry_run(folder: Path) -> str:
    shown = CliRunner().invoke(app, ["push", str(folder), "--repo", "me/x", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    return shown.stdout


def evaluation_of(model: Path) -> dict[str, Any]:
    interval = {"value": 0.987, "low": 0.9, "high": 1.0}
    about = {"model": str(model), "num_pairs": 24, "accuracy_by_length": [], "data": "pairs", "data_fingerprint": "f"}
    return {**about, "accuracy": interval, "margin": interval}


def test_a_merged_model_keeps_the_card_that_merging_wrote(run: Path):
    merged = run_merge(str(run / "checkpoints" / "checkpoint-20"))
    card = (merged / "README.md").read_text()
    assert "optimizer step of these weights: 20 of 40" in card
    assert card in dry_run(merged)


def test_a_checkpoint_of_transformers_trainer_is_merged_first(run: Path):
    checkpoint = run / "checkpoints" / "checkpoint-20"
    refused = CliRunner().invoke(app, ["push", str(checkpoint), "--dry-run"])
    assert refused.exit_code == 2
    assert f"write it as a model first: simpo merge {checkpoint}" in refused.stderr
    merged = run_merge(str(checkpoint))
    assert merged == run / "checkpoint-20-merged"
    kept = {path.name for path in merged.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= kept
    assert not kept & {"optimizer.pt", "trainer_state.json", "simpo.json"}


def test_no_state_of_a_training_is_pushed_whatever_its_folder_is_called(run: Path, tmp_path: Path):
    renamed = (run / "checkpoints" / "checkpoint-20").rename(run / "checkpoints" / "best so far")
    (renamed / "trainer_state.json").write_text('{"global_step": 20}')
    foreign = tmp_path / "foreign"
    shutil.copytree(run / "model", foreign)
    (foreign / "checkpoint-3").mkdir()
    (foreign / "checkpoint-3" / "optimizer.pt").touch()
    for folder, file in ((renamed, "optimizer.pt"), (foreign, "checkpoint-3/optimizer.pt")):
        refused = CliRunner().invoke(app, ["push", str(folder), "--dry-run"])
        assert refused.exit_code == 2, refused.output
        assert f"holds the state of a training ({file}); write it as a model first: " in refused.stderr
        assert f"simpo merge {shlex.quote(str(folder))}, or move that out of it\n" in refused.stderr
        merged = run_merge(str(folder))
        assert not [path for path in merged.rglob("*") if "optimizer" in path.name or path.name == "simpo.json"]
    assert "optimizer step of these weights: 20 of 40" in (run / "best so far-merged" / "README.md").read_text()


def test_a_command_to_type_is_quoted_and_a_number_that_is_none_is_a_dash(run: Path):
    run = run.rename(run.with_name("my run"))
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[-1] |= {"eval_loss": math.nan, "eval_rewards/accuracies": math.nan}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = dry_run(run)
    assert f"--model '{run}' --compare " in shown
    assert f"--output '{run}/evaluation.json'" in shown
    assert re.search(r"\| rewards/accuracies \| \d.*\| - \|", shown)


def test_an_evaluation_is_shown_for_the_model_that_it_is_of(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, checkpoint = run / "evaluation.json", run / "checkpoints" / "checkpoint-20"
    path.write_text(json.dumps(evaluation_of(run / "model")))
    assert "98.7%" in dry_run(run)
    assert "98.7%" not in card_of(find_source(str(checkpoint)))
    path.write_text(json.dumps(evaluation_of(checkpoint)))
    assert "98.7%" in card_of(find_source(str(checkpoint)))
    assert "98.7%" not in dry_run(run)
    path.write_text(json.dumps(evaluation_of(Path("runs") / "first" / "model")))  # from where it was trained
    monkeypatch.chdir(tmp_path)
    assert "98.7%" in dry_run(Path("first"))


def test_a_comparison_with_another_model_than_the_one_before_names_it(run: Path):
    found = {**evaluation_of(run / "model"), "baseline": evaluation_of(Path("somebody/else"))}
    (run / "evaluation.json").write_text(json.dumps(found))
    card = card_of(find_source(str(run)))
    assert "held-out pairs | `somebody/else` | this model |" in card
    found["baseline"]["model"] = find_source(str(run)).base
    (run / "evaluation.json").write_text(json.dumps(found))
    assert "held-out pairs | before | after |" in card_of(find_source(str(run)))


def test_the_step_of_a_card_is_what_the_trainer_said(run: Path):
    """Whatever the run's log would have been the best: it was resumed elsewhere, or lost its best checkpoint."""
    readme = run / "model" / "README.md"
    said = "- optimizer step of these weights: 20 of 50"
    readme.write_text(f"# run\n\n{said}\n")
    assert said in card_of(find_source(str(run)))
    state = run / "checkpoints" / "checkpoint-20" / "simpo.json"
    readme.unlink()
    state.write_text(json.dumps({"total_steps": 70}))
    assert "weights: 20 of 70" in card_of(find_source(str(state.parent)))


def test_an_evaluation_of_weights_as_written_is_of_their_step(run: Path):
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 40, "of_step": 20, "eval_saved_loss": 0.123456}) + "\n")
    cards = [card_of(find_source(str(place))) for place in (run / "checkpoints" / "checkpoint-20", run)]
    assert ["0.1235" in card for card in cards] == [True, False]


def test_results_of_benchmarks_are_not_on_the_card(run: Path):
    (run / "evaluation.json").write_text(json.dumps({"model": str(run / "model"), "versions": {}, "tasks": {}}))
    shown = dry_run(run)
    assert "is of benchmarks or of another model: the card has nothing of it" in shown
    assert "| metric | before training | after |" in shown


def test_a_last_line_that_a_killed_run_left_half_is_skipped_and_another_one_is_named(run: Path):
    path = run / "metrics.jsonl"
    whole, card = path.read_text(), card_of(find_source(str(run)))
    path.write_bytes(whole.encode() + b'{"step": 41, "lo\xc3')
    assert card_of(find_source(str(run))) == card
    path.write_text('{"step": 41, "lo\n' + whole)
    refused = CliRunner().invoke(app, ["push", str(run), "--dry-run"])
    assert (refused.exit_code, refused.stderr) == (2, f"error: {path}: line 1 is no JSON object with a step\n")
