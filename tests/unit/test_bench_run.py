"""The benchmark's bookkeeping: processes, their order, what ends badly, the numbers of the table, the charts."""

from __future__ import annotations

import copy
import io
import json
import re
import sys
from pathlib import Path

import pytest
from peers import run as bench
from peers.machine import describe_machine, package_versions, peak_tflops, resident_gib
from peers.report import render, save_report
from peers.run import BenchOptions, _has_bf16, describe_command, run_process, show_results
from peers.summary import compare_sides, summarise
from rich.console import Console


def worker_result(times: list[float], losses: list[float], *, peak: float, loaded: float = 1.0) -> dict:
    return {
        "step_times_s": times,
        "losses": losses,
        "peak_gib": peak,
        "loaded_gib": loaded,
        "warm_up_matmul_flops": 700,
        "gpu": None,
        "threads": 2,
    }


def work(executed: int, computed: int, unpadded: int) -> dict:
    return {
        "matmul_flops": executed - 100,
        "attention_flops": 100,
        "executed_flops": executed,
        "tokens_computed": computed,
        "tokens_unpadded": unpadded,
        "warm_up_matmul_flops": 700,
    }


@pytest.fixture
def results() -> dict:
    """Two rounds of two timed steps after two, four pairs each; a case that was skipped; a side that failed."""

    def side(status: str, reason: str | None, done: dict, rounds: list[dict]) -> dict:
        return {"status": status, "reason": reason, "work": done, "rounds": rounds}

    ours = [
        {"round": 0, **worker_result([9.0, 3.0, 1.0, 2.0], [1.5, 1.5, 1.4, 1.3], peak=4.0)},
        {"round": 1, **worker_result([8.0, 3.0, 1.0, 1.0], [1.5, 1.5, 1.4, 1.3], peak=5.0)},
    ]
    theirs = [
        {"round": 0, **worker_result([30.0, 9.0, 2.0, 6.0], [1.5, 1.5, 1.4, 1.31], peak=10.0, loaded=2.0)},
        {"round": 1, **worker_result([30.0, 9.0, 4.0, 4.0], [1.52, 1.5, 1.4, 1.3], peak=9.0, loaded=2.0)},
    ]
    case = {
        "name": "chat",
        "about": "",
        "kind": "drawn",
        "pairs_per_micro_batch": 4,
        "pairs_per_step": 4,
        "timed_pairs": 8,
        "skipped": None,
        "lengths": {"prompt": 17.0, "chosen": 20.0, "rejected": 21.0, "longest_row": 50},
        "tokens_needed": 500,
        "floor_flops": 2000.0,
        "sides": {
            "simpo": side("ok", None, work(2100, 500, 500), ours),
            "trl": side("ok", None, work(5250, 1000, 800), theirs),
            "padded": side("failed", "killed by signal 9, probably out of memory", work(5250, 1000, 800), []),
        },
    }
    found = {
        "format": 1,
        "command": "python benchmarks/bench.py --cases chat,hh",
        "date": "2026-01-02T03:04:05+00:00",
        "versions": package_versions() | {"commit": "abc"},
        "machine": describe_machine() | {"device": "cpu"},
        "conditions": {
            "model": "small",
            "weights": "random",
            "dtype": "bf16",
            "num_parameters": 123_000_000,
            "accumulation": 1,
            "flops_only": False,
            "rounds": 2,
            "warm_up_steps": 2,
            "timed_steps": 2,
            "threads": 2,
            "peak_tflops": None,
        },
        "cases": [case, {"name": "hh", "pairs_per_micro_batch": 4, "skipped": "there is no folder"}],
    }
    summarise(found)
    return found


def shown(results: dict) -> str:
    file = io.StringIO()
    render(results, Console(width=80, file=file))
    return file.getvalue()


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_side_is_summarised_over_all_timed_steps_of_all_rounds(results):
    summary = results["cases"][0]["sides"]["simpo"]["summary"]
    assert summary["step_time_s"] == {"median": 1.0, "min": 1.0, "max": 2.0}
    assert summary["first_step_s"] == 8.5
    assert summary["pairs_per_s"] == pytest.approx(4 * 4 / 5.0)  # four steps of four pairs; the warm-up is left out
    assert (summary["peak_gib"], summary["loaded_gib"]) == (5.0, 1.0)
    assert summary["executed_over_floor"] == pytest.approx(1.05)
    assert summary["useful_tflops"] == pytest.approx(2 * 2000.0 / 5.0 / 1e12)
    assert summary["count_confirmed"] is True
    assert results["cases"][0]["sides"]["trl"]["summary"]["row_fill"] == 0.8
    assert results["cases"][0]["sides"]["trl"]["summary"]["tokens_over_needed"] == 2.0


def test_each_step_is_compared_with_the_same_step_of_the_same_round(results):
    beside = results["cases"][0]["sides"]["trl"]["beside_simpo"]
    assert beside["step_time_ratio"] == {"median": 3.5, "min": 2.0, "max": 4.0}  # 2, 3, 4, 4
    assert beside["whole_time_ratio"] == pytest.approx(16 / 5)
    assert beside["memory_share"] == 0.5
    assert beside["executed_ratio"] == 2.5
    assert beside["largest_loss_difference"] == pytest.approx(0.02)  # in a warm-up step


def test_a_round_that_only_one_side_finished_is_not_compared(results):
    sides = copy.deepcopy(results["cases"][0]["sides"])
    sides["simpo"]["rounds"].pop()
    assert compare_sides(sides["simpo"], sides["trl"], warm_up=2)["step_time_ratio"] == {
        "median": 2.5,
        "min": 2.0,
        "max": 3.0,
    }
    sides["simpo"]["rounds"].clear()
    assert set(compare_sides(sides["simpo"], sides["trl"], warm_up=2)) == {"executed_ratio"}


def test_mfu_is_the_floor_over_the_time_over_the_peak(results):
    results["conditions"]["peak_tflops"], results["machine"]["matmul_tflops"] = 1e-9, 2e-9
    summarise(results)
    summary = results["cases"][0]["sides"]["simpo"]["summary"]
    assert summary["mfu"] == pytest.approx(2 * 2000.0 / 5.0 / 1e3)
    assert summary["mfu_of_measured_ceiling"] == pytest.approx(summary["mfu"] / 2)


def test_a_count_that_a_real_step_did_not_confirm_is_said(results):
    results["cases"][0]["sides"]["trl"]["rounds"][0]["warm_up_matmul_flops"] = 701
    summarise(results)
    assert "chat, TRL CPOTrainer: a real step executed other operations than were counted" in shown(results)


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_table_names_every_side_and_what_was_skipped_or_failed_and_the_conditions(results):
    text = shown(results)
    for part in ("3.50 (3.20)", "8.50", "30.0", "0.50", "2.0e-02", "1.05", "80%", "10.00 (2.00)"):
        assert part in text, part
    assert "hh: skipped: there is no folder" in text
    assert "padded reference failed (chat): killed by signal 9, probably out of memory" in text
    assert "2 rounds of 2 timed steps after 2 to warm up; 2026-01-02" in text
    assert "python benchmarks/bench.py --cases chat,hh" in text


def test_table_and_charts_are_made_from_the_file_alone(results, tmp_path: Path):
    pytest.importorskip("matplotlib")
    (tmp_path / "results.json").write_text(json.dumps(results))
    console = Console(quiet=True)
    assert show_results(tmp_path / "results.json", output=None, console=console) == tmp_path
    show_results(tmp_path / "results.json", output=str(tmp_path / "other"), console=console)
    for folder in (tmp_path, tmp_path / "other"):
        assert (folder / "charts.png").read_bytes().startswith(b"\x89PNG")
        rows = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
        assert len(rows) == 2 + 3
        assert len({line.count("|") for line in rows}) == 1
    assert (tmp_path / "table.md").read_text() == (tmp_path / "other" / "table.md").read_text()


def test_charts_write_no_label_over_another(results, tmp_path: Path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    case = results["cases"][0]
    results["cases"] = [case | {"name": name} for name in ("chat", "longprompt", "1000/300/300", "4096/256/256")]
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    save_report(results, tmp_path)
    (figure,) = drawn
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in (*figure.texts, *figure.legends)]
    for axis in figure.axes:
        texts = [*axis.texts, *axis.get_xticklabels(), axis.title, axis._left_title]
        boxes += [text.get_window_extent(renderer) for text in texts if text.get_text()]
    overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]
    assert not overlapping
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 for box in boxes)


def test_without_matplotlib_the_table_is_written_and_the_charts_are_missed_aloud(results, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    console = Console(width=120)
    with console.capture() as capture:
        bench._report(results, tmp_path, console)
    assert "no charts: matplotlib is not installed: pip install matplotlib" in capture.get()
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 0, "cases": []}'])
def test_a_file_that_is_no_result_is_refused(content, tmp_path: Path):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="from: "):
        show_results(path, output=None, console=Console(quiet=True))


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "tpu"}, "device: 'tpu' must be one of auto, cpu, cuda"),
        ({"dtype": "fp16"}, "dtype: 'fp16' must be one of auto, bf16, fp32"),
        ({"peers": "trl,axolotl"}, "peers: 'axolotl' must be one of trl, liger, padded, or none"),
        ({"cases": "chat,nope"}, "cases: 'nope' is none of chat, hh"),
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"warm_up_steps": 0}, "warm_up_steps: 0 must be at least 1"),
        ({"model": "nowhere"}, "model: nowhere is neither a folder"),
    ],
)
def test_wrong_options_are_named_with_what_is_allowed(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BenchOptions(**({"model": "llama-1b"} | option)).check()


def test_no_peers_is_this_trainer_alone():
    assert BenchOptions(model="llama-1b", peers="none").sides() == ["simpo"]
    assert BenchOptions(model="llama-1b", peers="padded, trl,padded").sides() == ["simpo", "padded", "trl"]


def test_the_command_is_written_without_paths_of_this_machine(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(tmp_path / "me/models/m"), f"--data={tmp_path}/data", "--cases", "a b"]
    assert describe_command(words) == "python benchmarks/bench.py --model ~/models/m --data=data --cases 'a b'"


# --- processes -------------------------------------------------------------------------------------------------------


def python(code: str, **options):
    return run_process([sys.executable, "-c", code], environment={"GIVEN": "yes"}, **options)


def test_a_process_gives_its_last_line_and_sees_its_environment():
    done = python("import os, json; print('noise'); print(json.dumps({'env': os.environ['GIVEN']}))")
    assert (done.result, done.reason) == ({"env": "yes"}, None)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('CUDA out of memory')", "RuntimeError: CUDA out of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9, probably out of memory"),
        ('print(\'{"error": "no such thing"}\'); raise SystemExit(2)', "no such thing"),
        ("raise SystemExit(3)", "nothing said"),
        ("print('not JSON')", "nothing said"),
    ],
)
def test_a_process_that_ends_badly_says_why(code, reason):
    assert python(code) == bench._Done(reason=reason)


def test_a_process_is_stopped_before_the_machine_is_full():
    done = python("import time; time.sleep(60)", reserve_gib=1e9)
    assert re.fullmatch(r"out of memory: stopped when [\d.]+ GiB of the machine's memory were left", done.reason)


class Scripted:
    """Stands in for the benchmark's processes: remembers what was asked, answers as told."""

    def __init__(self, *, fails: tuple[str, ...] = (), missing: tuple[str, ...] = (), parameters: int = 1000) -> None:
        self.fails, self.missing, self.parameters = fails, missing, parameters
        self.ran: list[tuple[str, str]] = []

    def __call__(self, command, *, environment):
        spec = json.loads(Path(command[-1]).read_text())
        if spec["task"] == "prepare":
            return bench._Done(self._prepared(spec))
        side, case = spec["side"]["side"], spec["pairs_file"]
        self.ran.append((case, side))
        if side in self.fails:
            return bench._Done(reason="killed by signal 9, probably out of memory")
        steps = spec["side"]["warm_up_steps"] + spec["side"]["steps"]
        return bench._Done(worker_result([1.0] * steps, [1.0] * steps, peak=1.0))

    def _prepared(self, spec: dict) -> dict:
        def entry(case: dict) -> dict:
            if case["name"] == "hh":
                return {"skipped": "there is no folder en_hh_helpful"}
            missing = {side: "not installed" if side in self.missing else None for side in spec["sides"]}
            return {
                "skipped": None,
                "pairs_file": case["name"],
                "lengths": {"prompt": 1.0, "chosen": 1.0, "rejected": 1.0, "longest_row": 2},
                "tokens_needed": 500,
                "floor_flops": 2000.0,
                "work": {side: work(2100, 500, 500) for side in spec["sides"]},
                "missing": missing,
            }

        return {
            "device": "cpu",
            "gpu": {},
            "num_parameters": self.parameters,
            "tokenizer": None,
            "cases": [entry(case) for case in spec["cases"]],
        }


@pytest.fixture
def scripted(monkeypatch, tiny_model: Path, tmp_path: Path):
    """Runs the whole benchmark with scripted processes: (the script, the results)."""

    def go(options: dict, **behaviour) -> tuple[Scripted, dict]:
        script = Scripted(**behaviour)
        monkeypatch.setattr(bench, "run_process", script)
        monkeypatch.setattr(bench, "_has_bf16", lambda options: False)  # asks another process, for seconds
        given = BenchOptions(**{"model": str(tiny_model), "steps": 2, "output": str(tmp_path), **options})
        path = bench.run_benchmark(given, command="python benchmarks/bench.py", console=Console(quiet=True))
        return script, json.loads(path.read_text())

    return go


def test_sides_alternate_and_every_second_round_is_reversed(scripted):
    script, _ = scripted({"cases": "chat,9/9/9", "peers": "trl", "rounds": 3})
    order = ["simpo", "trl", "trl", "simpo", "simpo", "trl"]
    assert script.ran == [("chat", side) for side in order] + [("9/9/9", side) for side in order]


def test_a_side_that_fails_is_kept_with_its_reason_and_the_others_go_on(scripted):
    script, results = scripted({"cases": "chat,9/9/9", "peers": "trl,padded"}, fails=("trl",))
    for case in results["cases"]:
        assert case["sides"]["trl"]["status"] == "failed"
        assert case["sides"]["trl"]["reason"] == "killed by signal 9, probably out of memory"
        assert [len(case["sides"][side]["rounds"]) for side in ("simpo", "trl", "padded")] == [2, 0, 2]
    assert script.ran.count(("chat", "trl")) == 1  # not tried again in the second round
    assert "failed" in shown(results)


def test_a_side_that_is_not_installed_is_named_and_not_run(scripted):
    script, results = scripted({"cases": "chat", "peers": "trl,padded"}, missing=("trl",))
    assert {side for _, side in script.ran} == {"simpo", "padded"}
    assert "TRL CPOTrainer not run (chat): not installed" in shown(results)


def test_missing_data_is_named_and_the_other_cases_run(scripted):
    script, results = scripted({"cases": "hh,chat", "peers": "none"})
    assert {case for case, _ in script.ran} == {"chat"}
    assert "hh: skipped: there is no folder en_hh_helpful" in shown(results)


def test_a_model_that_cannot_fit_is_counted_and_not_run(scripted):
    script, results = scripted({"cases": "chat", "peers": "padded"}, parameters=10**14)
    assert script.ran == []
    assert "operations are counted, nothing runs" in shown(results)
    assert results["cases"][0]["sides"]["simpo"]["summary"]["executed_over_floor"] == pytest.approx(1.05)


def test_counting_alone_runs_nothing(scripted):
    script, results = scripted({"cases": "chat", "peers": "padded", "flops_only": True})
    assert script.ran == []
    assert "only operations were asked for" in shown(results)


# --- the machine -----------------------------------------------------------------------------------------------------


def test_memory_is_this_processes_own():
    now, peak = resident_gib("VmRSS"), resident_gib("VmHWM")
    assert 0 < now <= peak < describe_machine()["memory_gib"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H200", 989.0), ("NVIDIA H100 PCIe", 756.0), ("Some GPU", None)],
)
def test_the_peak_is_looked_up_by_the_gpus_name(name, peak):
    assert peak_tflops(name) == peak


@pytest.mark.long
def test_another_process_says_whether_the_device_has_bfloat16():
    import torch

    from simpo.model.load import has_bf16

    assert _has_bf16(BenchOptions(model="llama-1b", device="cpu")) is has_bf16(torch.device("cpu"))
    if not torch.cuda.is_available():
        assert _has_bf16(BenchOptions(model="llama-1b", device="cuda")), "that there is none is said by the sides"
