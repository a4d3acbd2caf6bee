"""The benchmark from the command line, with real processes: same pairs, same losses, every promised number."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
from bench import app
from peers.cases import CASES, build_pairs, find_cases
from peers.models import SHAPES, write_random_model
from peers.sides import SideSpec, missing_package, run_side
from typer.testing import CliRunner

from simpo.core.packing import TokenPair
from simpo.plan import shapes

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PEERS = ["padded"] + ([] if missing_package("trl") else ["trl"])


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[None]:
    """The benchmark's processes are forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peers.run.subprocess", SimpleNamespace(Popen=forks.Program))
        yield


@pytest.fixture(scope="module")
def outcome(tiny_model: Path, pair_files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What one small benchmark printed, and where its files are."""
    folder = tmp_path_factory.mktemp("bench")
    cases = f"{pair_files / 'train.jsonl'},hh"
    words = ["--model", str(tiny_model), "--data", str(folder), "--cases", cases, "--output", str(folder)]
    words += ["--peers", ",".join(PEERS), "--steps", "1", "--warm-up", "2", "--rounds", "1"]
    words += ["--dtype", "fp32", "--device", "cpu"]
    words += ["--pairs-per-micro-batch", "2", "--accumulation", "2"]
    done = CliRunner().invoke(app, words, env=ONE_THREAD | {"XDG_CACHE_HOME": str(folder / "cache")})
    assert done.exit_code == 0, done.output
    return done.output, folder


@pytest.fixture
def results(outcome: tuple[str, Path]) -> dict:
    return json.loads((outcome[1] / "results.json").read_text(encoding="utf-8"))


def test_every_side_trained_the_same_pairs_to_the_same_losses(results: dict) -> None:
    case = results["cases"][0]
    assert list(case["sides"]) == ["simpo", *PEERS]
    assert case["pairs_per_step"] == 4
    for peer in PEERS:
        side = case["sides"][peer]
        assert side["status"] == "ok"
        assert side["beside_simpo"]["largest_loss_difference"] < 1e-4
        assert len(side["rounds"][0]["losses"]) == 3  # two of the warm-up and one more
        assert side["rounds"][0]["losses"][0] != side["rounds"][0]["losses"][1]


@pytest.mark.filterwarnings("ignore")  # the peer's
@pytest.mark.parametrize("peer", PEERS)
def test_after_large_updates_the_losses_are_still_the_same(peer: str, tiny_model: Path, tmp_path: Path) -> None:
    pairs = build_pairs(CASES["chat"], 12, vocab_size=300, tokenizer=None, data=None)
    pairs = [cut_pair(pair) for pair in pairs]

    def losses(side: str) -> list[float]:
        spec = SideSpec(side, str(tiny_model), 2, 2, 2, "cpu", False, 1, str(tmp_path), learning_rate=1e-2)
        return run_side(spec, pairs).losses

    ours = losses("simpo")
    assert ours == pytest.approx(losses(peer), abs=1e-4)
    assert max(ours) - min(ours) > 0.1  # so that an update which differs would show


def test_random_weights_are_the_same_model_on_every_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    small |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    small |= {"bos_token_id": 1, "eos_token_id": 2}
    for table in (SHAPES, shapes.SHAPES):
        monkeypatch.setitem(table, "llama-tiny", table["llama-1b"] | small)
    write_random_model("llama-tiny", tmp_path / "model", device="cpu")
    pairs = build_pairs(find_cases("20/9/8")[0], 4, vocab_size=300, tokenizer=None, data=None)
    specs = [SideSpec(s, str(tmp_path / "model"), 2, 1, 1, "cpu", False, 1, str(tmp_path)) for s in ("simpo", "padded")]
    records = [run_side(spec, pairs) for spec in specs]
    assert records[0].losses == pytest.approx(records[1].losses, abs=1e-5)


def cut_pair(pair: TokenPair) -> TokenPair:
    """The last 40 tokens of the prompt and the first 30 of each response."""
    start = pair.chosen_start
    first = max(0, start - 40)
    chosen, rejected = (ids[first : start + 30] for ids in (pair.chosen_ids, pair.rejected_ids))
    return TokenPair(pair.row_id, chosen, start - first, rejected, start - first)


def test_what_was_counted_ahead_is_what_a_real_step_executed(results: dict) -> None:
    sides = results["cases"][0]["sides"]
    assert [sides[name]["summary"]["count_confirmed"] for name in sides] == [True] * len(sides)
    ours, padded = sides["simpo"]["summary"], sides["padded"]["summary"]
    assert ours["executed_over_floor"] <= 1.08 < padded["executed_over_floor"]
    assert ours["row_fill"] == 1.0 > padded["row_fill"]


def test_missing_data_is_named(outcome: tuple[str, Path], results: dict) -> None:
    assert results["cases"][1]["skipped"].startswith("there is no folder en_hh_helpful in the data folder")
    assert "hh: skipped: there is no folder en_hh_helpful" in outcome[0]


def test_the_file_has_every_promised_number(results: dict) -> None:
    assert set(results) == {"format", "command", "date", "versions", "machine", "conditions", "cases"}
    assert {"python", "torch", "transformers", "trl", "liger-kernel", "simpo", "commit"} <= set(results["versions"])
    assert {"cpu", "cpu_flags", "cores", "memory_gib", "device"} <= set(results["machine"])
    assert {"model", "dtype", "threads", "timed_steps", "rounds", "num_parameters"} <= set(results["conditions"])
    case = results["cases"][0]
    assert {"lengths", "tokens_needed", "floor_flops", "pairs_per_micro_batch"} <= set(case)
    for name, side in case["sides"].items():
        assert {"matmul_flops", "attention_flops", "executed_flops", "tokens_computed"} <= set(side["work"])
        summary = side["summary"]
        assert min(summary["pairs_per_s"], summary["useful_tflops"]) > 0
        assert 0 < summary["loaded_gib"] <= summary["peak_gib"]
        assert summary["step_time_s"]["min"] <= summary["step_time_s"]["median"] <= summary["step_time_s"]["max"]
        if name != "simpo":
            beside = side["beside_simpo"]
            assert min(beside["step_time_ratio"]["median"], beside["memory_share"]) > 0
            assert beside["executed_ratio"] > 1


def test_nothing_in_the_file_says_where_this_machine_keeps_things(outcome: tuple[str, Path], results: dict) -> None:
    text = json.dumps(results)
    assert os.path.expanduser("~") not in text
    assert str(outcome[1]) not in text


def test_it_says_where_table_numbers_and_charts_are(outcome: tuple[str, Path]) -> None:
    output, folder = outcome
    pytest.importorskip("matplotlib")
    for name in ("table.md", "results.json", "charts.png"):
        assert str(folder / name) in output
        assert (folder / name).stat().st_size > 0


def test_weights_that_cannot_be_loaded_are_a_failed_side_with_its_reason(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    words = ["--model", str(broken), "--cases", "9/5/4", "--peers", "none", "--steps", "1", "--rounds", "1"]
    words += ["--dtype", "fp32", "--device", "cpu", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, words, env=ONE_THREAD)
    assert done.exit_code == 0, done.output
    side = json.loads((tmp_path / "results.json").read_text())["cases"][0]["sides"]["simpo"]
    assert side["status"] == "failed"
    assert "safetensors" in side["reason"]
    assert f"simpo failed (9/5/4): {side['reason'][:40]}" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cases", "nope"], "error: cases: 'nope' is none of chat, hh"),
        (["--peers", "axolotl"], "error: peers: 'axolotl' must be one of trl, liger, padded"),
        (["--device", "tpu"], "error: device: 'tpu' must be one of auto, cpu, cuda"),
        (["--from", "nowhere.json"], "error: from: cannot read nowhere.json"),
    ],
)
def test_wrong_words_are_one_line_that_names_what_is_allowed(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["--model", "llama-1b", *words])
    assert done.exit_code == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
