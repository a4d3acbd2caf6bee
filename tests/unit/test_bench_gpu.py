"""benchmarks/gpu.py: every command in miniature on the CPU, its arithmetic by hand, what is CUDA's with stand-ins."""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gpu.attention as attention_bench
import pytest
import torch
from cases import often
from gpu import ladder, memory, parity, parts, profile, train, workload
from gpu.device import (
    CpuMeter,
    CudaMeter,
    Deadline,
    TimeUp,
    attempt,
    pick_meter,
    stop_at,
)
from gpu.report import Report, shown_command, table_lines
from gpu.workload import DEFAULT_RUNG, PADDED_RUNG, RUNGS, LengthCase, StagedModel, WeightPlan
from peers import flops
from scripts import load_script

import simpo.core.attention
import simpo.model.attention
import simpo.model.compile
import simpo.model.head
from simpo.core.attention import packed_attention
from simpo.core.blocks import AttentionBlocks
from simpo.core.logprobs import token_logps

REPO = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# Dynamo looks for a gradient on every tensor it meets and hides torch's warning about that only where warnings show.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(scope="module")
def gpu():
    """The script as a module."""
    return load_script("benchmarks", "gpu.py")


@pytest.fixture(autouse=True)
def light_compiler(monkeypatch):
    """Traces and differentiates, generates no code."""
    monkeypatch.setattr(simpo.model.compile, "BACKEND", "aot_eager")


@pytest.fixture
def command(gpu, tmp_path):
    """Run a command on the CPU: its exit code and its file."""

    def run(*words: str) -> tuple[int, dict]:
        code = gpu.main([*words, "--device", "cpu", "--model", "tiny", "--output", str(tmp_path)], began=None)
        (path,) = tmp_path.glob("*.json")
        return code, json.loads(path.read_text())

    return run


@pytest.fixture
def no_cuda(monkeypatch):
    """Every call into CUDA that measuring makes fails. Not for what is compiled: Dynamo looks at all of torch."""

    def forbidden(*args, **kwargs):
        raise AssertionError("a call into CUDA on the CPU's way")

    for name in ("Event", "Stream", "current_stream", "synchronize", "empty_cache", "mem_get_info", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, forbidden)


def make_report(folder: Path, **conditions) -> Report:
    return Report("test", folder, command="test", meter=CpuMeter(CPU), conditions=conditions, say=lambda text: None)


def make_staged(*, autocast: bool = False) -> StagedModel:
    model = workload.build_model(workload.build_config("tiny"), device=CPU, dtype=torch.float32)
    return StagedModel(model, device=CPU, autocast=autocast)


# --- ladder ----------------------------------------------------------------------------------------------------------


def stand_in_for_compiling(model, *, device):
    """Blocks with a forward of their own, as `compile_blocks` leaves them; `parity` compiles them in earnest."""
    blocks = simpo.model.compile.find_blocks(model)
    for block in blocks:
        block.forward = block.forward
    return blocks


def test_all_rungs_have_the_same_losses_in_fp32_and_the_table_counts_their_tokens(command, capsys, monkeypatch):
    monkeypatch.setattr(workload, "compile_blocks", stand_in_for_compiling)
    code, results = command("ladder", "--compute", "fp32", "--rounds", "2", "--steps", "2")
    assert code == 0
    assert results["complete"]
    rows = {(row["case"], row["rung"]): row for row in results["rows"]}
    assert len(rows) == 2 * len(RUNGS)
    for case in ("ragged-12/8/9", "20/6/6"):
        expected = rows[case, "padded"]["losses"]
        for rung in RUNGS:
            row = rows[case, rung.name]
            assert row["losses"] == pytest.approx(expected, abs=1e-4)
            assert len(row["times_s"]) == (1 if rung.name == "compiled" else 2)  # it joins in for the second half
            assert row["micro_batches"] == 1
            assert row["mfu"] is None  # no stated peak for a CPU
            assert row["mfu_of_ceiling"] > 0
    assert results["profile"]["kernels"][0]["seconds"] > 0
    # Two steps of four pairs of 20/6/6: both responses with the prompt, or the prompt once.
    assert rows["20/6/6", "packed"]["tokens_computed"] == 2 * 4 * 2 * 26
    assert rows["20/6/6", "shared"]["tokens_computed"] == rows["20/6/6", "shared"]["tokens_needed"] == 2 * 4 * 32
    assert rows["ragged-12/8/9", "padded"]["tokens_computed"] > rows["ragged-12/8/9", "packed"]["tokens_computed"]
    assert "first/this" in capsys.readouterr().out


def test_useful_flops_and_mfu_are_those_counted_by_hand():
    """tiny: H 48, I 64, 2 layers, 3 query heads and 1 KV head of 16, V 199; one pair of 5 + 2 / 3 tokens."""
    block = 2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 64
    attended = 15 + 5 * (2 + 3) + 3 + 6
    floor = 3 * (2 * 2 * block * 10 + 4 * 2 * 48 * attended + 2 * 199 * 48 * 5)
    pair = workload.random_pair(0, (5, 2, 3), 199)
    shape = flops.model_shape(workload.build_config("tiny"))
    track = ladder.Track(DEFAULT_RUNG, [[pair]], times=[(0, 0, 0.5), (1, 0, 0.25), (2, 0, 0.25)])
    first = ladder.Track(PADDED_RUNG, [[pair]], times=[(0, 0, 1.0), (1, 0, 1.0)])
    conditions = {"peak_tflops": 1e-6, "measured_ceiling_tflops": 2e-6}
    _, row = ladder.summarise_case("case", [first, track], shape, conditions)
    assert row["useful_tflops"] == pytest.approx(3 * floor / 1.0 / 1e12)
    assert row["mfu"] == pytest.approx(3 * floor / 1e6)
    assert row["mfu_of_ceiling"] == pytest.approx(row["mfu"] / 2)
    assert row["step_s"] == {"median": 0.25, "min": 0.25, "max": 0.5}
    assert row["speedup"] == {"median": 3.0, "min": 2.0, "max": 4.0}


@pytest.mark.long
def test_a_rung_whose_loss_differs_is_an_error(command, monkeypatch, no_cuda):
    dense = workload.dense_token_logps
    monkeypatch.setattr(workload, "dense_token_logps", lambda *args, **options: dense(*args, **options) * 1.01)
    code, results = command("ladder", "--compute", "fp32", "--rounds", "1", "--rungs", "head,low-memory,shared")
    assert code == 1
    assert any("shared" not in note and "head" in note and "differs" in note for note in results["notes"])


@pytest.mark.long
def test_a_rung_switches_what_it_says_and_nothing_stays():
    staged, pairs = make_staged(), LengthCase("9/4/4").pairs(2, vocab_size=199)
    before = [type(module) for module in staged.model.modules()]
    seen = {}
    for rung in RUNGS:
        with staged.on(rung):
            block = staged.model.model.layers[0]
            seen[rung.name] = (
                staged.model.config._attn_implementation,
                simpo.model.head.token_logps is workload.dense_token_logps,
                [type(module) for module in staged.model.modules()] != before,
                "forward" in vars(block),
            )
            assert torch.isfinite(staged.losses(rung, workload.lay_out(rung, pairs))).all()
    packed = simpo.model.attention.PACKED
    assert seen == {
        "padded": ("sdpa", True, False, False),
        "packed": (packed, True, False, False),
        "shared": (packed, True, False, False),
        "head": (packed, False, False, False),
        "low-memory": (packed, False, True, False),
        "compiled": (packed, False, False, True),
        "checkpoints": (packed, False, True, False),
    }
    assert [type(module) for module in staged.model.modules()] == before
    assert "forward" not in vars(staged.model.model.layers[0])
    assert simpo.model.head.token_logps is not workload.dense_token_logps


def test_a_step_leaves_weights_and_no_gradients(no_cuda):
    staged = make_staged(autocast=True)
    before = [p.detach().clone() for p in staged.model.parameters()]
    optimizer = workload.build_optimizer(staged.model, "adamw")
    batch = workload.lay_out(DEFAULT_RUNG, LengthCase("9/4/4").pairs(2, vocab_size=199))
    with staged.on(DEFAULT_RUNG):
        first, second = (staged.step(DEFAULT_RUNG, [batch], optimizer)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert len(optimizer.state) == len(before)  # it did update
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, staged.model.parameters(), strict=True))


def test_a_step_over_micro_batches_is_the_step_at_once():
    staged, pairs = make_staged(), LengthCase("ragged-12/8/9").pairs(5, vocab_size=199)
    for rung in (PADDED_RUNG, DEFAULT_RUNG):
        whole, split = ladder.Track(rung, [pairs]), ladder.Track(rung, [pairs], micro_batches=2)
        assert [workload.count_pairs(batch) for batch in split.batches[0]] == [3, 2]
        (loss, gradients), (split_loss, split_gradients) = (step_of(staged, track) for track in (whole, split))
        torch.testing.assert_close(loss, split_loss)
        torch.testing.assert_close(gradients, split_gradients)


def step_of(staged, track) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of the track's first step."""
    kept: list[torch.Tensor] = []
    with staged.on(track.rung), pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "clip_gradients", lambda model, norm: kept.extend(p.grad for p in model.parameters()))
        loss = staged.step(track.rung, track.batches[0], None)[0]
    return loss, kept


def test_a_rung_that_runs_out_of_memory_takes_more_micro_batches_and_others_go_on(command, monkeypatch):
    step = StagedModel.step

    def limited(self, rung, batches, optimizer, **options):
        if rung.name == "packed" or (rung.name == "padded" and workload.count_pairs(batches[0]) > 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17 GiB.\nMore lines")
        return step(self, rung, batches, optimizer, **options)

    def no_compiler(*args, **kwargs):
        raise ValueError("torch_compile: torch cannot compile for cpu here (no g++)")

    monkeypatch.setattr(StagedModel, "step", limited)
    monkeypatch.setattr(workload, "compile_blocks", no_compiler)
    words = ("--rounds", "1", "--cases", "9/4/4", "--rungs", "padded,packed,low-memory,compiled", "--compute", "fp32")
    code, results = command("ladder", *words)
    padded, packed, low_memory, compiled = results["rows"]
    assert code == 0
    assert (padded["micro_batches"], low_memory["micro_batches"]) == (4, 1)
    assert packed["failed"] == "out of memory: CUDA out of memory. Tried to allocate 17 GiB."
    assert "no g++" in compiled["failed"]
    assert low_memory["losses"] == pytest.approx(padded["losses"], abs=1e-4)
    assert low_memory["speedup"]["median"] > 0


@pytest.mark.long
def test_a_rung_that_cannot_run_leaves_the_others_and_is_an_error(command, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(workload, "dense_token_logps", broken)
    code, results = command("ladder", "--rounds", "1", "--cases", "9/4/4", "--rungs", "shared,low-memory")
    assert code == 1
    assert results["rows"][0]["failed"] == "cannot run: no kernel image is available"
    assert results["rows"][1]["rounds"] == 1


def test_a_profile_tells_kernels_from_calls_and_names_the_lines_that_wait():
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(key, count, device, micros):
        return SimpleNamespace(
            key=key, count=count, device_type=device, self_device_time_total=micros, self_cpu_time_total=7
        )

    events = [
        event("aten::mm", 3, cpu, 900),
        event("gemm", 3, cuda, 900),
        event("flash", 2, cuda, 1500),
        event("cudaLaunchKernel", 4, cpu, 0),
        event("cuLaunchKernelEx", 2, cpu, 0),
        event("cudaStreamSynchronize", 5, cpu, 0),
    ]
    kernels, calls = profile.read_events(events, on_gpu=True)
    assert [(row["name"], row["count"], row["seconds"]) for row in kernels] == [("flash", 2, 1.5e-3), ("gemm", 3, 9e-4)]
    assert calls["kernel launches"] == 6
    assert calls["cudaStreamSynchronize"] == 5
    assert calls["cudaDeviceSynchronize"] == 0
    modes = []
    fake = SimpleNamespace(get_sync_debug_mode=lambda: 0, set_sync_debug_mode=modes.append)

    def work():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    ((line, count),) = profile.find_waits(work, fake).items()
    assert line.startswith("test_bench_gpu.py:") or line.split(":")[0].endswith("tests/unit/test_bench_gpu.py")
    assert (count, modes) == (2, ["warn", 0])
    assert profile.short_path("/home/me/src/simpo/model/load.py") == "simpo/model/load.py"


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_memory_grows_its_micro_batches_and_predicts_more_for_more(command, no_cuda):
    code, results = command("memory")
    assert (code, results["complete"]) == (0, True)
    by_mode = {}
    for row in results["rows"]:
        by_mode.setdefault(row["mode"], []).append(row)
    assert list(by_mode) == [mode.name for mode in memory.MODES if not mode.optimizer_offload]
    for mode, rows in by_mode.items():
        assert [row["pairs"] for row in rows] == [2, 4]  # of 29 packed tokens, within 64 and 128
        if not mode.startswith("padded"):
            assert rows[0]["predicted_bytes"] < rows[1]["predicted_bytes"]
            assert (rows[1]["offloaded_bytes"] > 0) == (mode == "offload")
        else:
            assert rows[1]["tokens_computed"] == 4 * 2 * 21


def test_memory_with_the_moments_on_the_host(command):
    code, results = command("memory", "--optimizer", "adamw_bf16", "--modes", "optimizer-offload", "--tokens", "29")
    (row,) = results["rows"]
    assert (code, row["mode"], row["failed"]) == (0, "optimizer-offload", None)
    network, plan = make_staged().model, WeightPlan("bf16", "adamw_bf16", "")
    here, away = (memory.state_bytes(network, plan, optim) for optim in ("adamw_bf16", "offloaded"))
    assert here - away == 4 * sum(p.numel() for p in network.parameters())


def test_what_follows_a_micro_batch_that_does_not_fit_is_not_tried(tmp_path, monkeypatch):
    tried = []

    def step(self, rung, batches, optimizer, **options):
        tried.append(batches[0].input_ids.numel())
        if tried[-1] > 60:
            raise RuntimeError("CUDA error: out of memory")
        return torch.tensor(0.0), 0

    monkeypatch.setattr(StagedModel, "step", step)
    report = make_report(tmp_path)
    plan = WeightPlan("fp32", "none", "")
    options = {"model": "tiny", "plan": plan, "case": LengthCase("12/8/9"), "tokens": [29, 64, 128, 256]}
    assert memory.run_memory(report, CpuMeter(CPU), Deadline(5), modes=memory.MODES[:1], **options)
    assert tried == [29, 29, 58, 116]
    failed = [row["failed"] for row in report.results["rows"]]
    assert failed == [None, None, *["CUDA error: out of memory"] * 2]
    assert report.results["complete"]


def test_offloading_more_than_the_host_has_is_not_tried(monkeypatch):
    monkeypatch.setattr(memory, "available_gib", lambda: 10.0)
    assert memory.host_shortage(3 * 2**30) is None
    assert "10 GiB free" in memory.host_shortage(5 * 2**30)


def test_checkpointing_runs_blocks_again_only_inside():
    staged = make_staged()
    calls = []
    staged.model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    batch = workload.lay_out(DEFAULT_RUNG, LengthCase("9/4/4").pairs(1, vocab_size=199))
    for rung, expected in ((DEFAULT_RUNG, 1), (workload.CHECKPOINTS_RUNG, 2), (DEFAULT_RUNG, 1)):
        calls.clear()
        with staged.on(rung):
            staged.step(rung, [batch], None)
        assert len(calls) == expected


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_parity_passes_on_the_cpu_and_covers_every_way(command):
    code, results = command("parity", "--only", "kernels,llama 9/3 heads")
    assert (code, results["complete"]) == (0, True)
    subjects = {row["subject"] for row in results["rows"]}
    for mode in parity.MODES:
        for way in ("", ", repeated prompts", ", unpacked", ", shared", ", head"):
            assert f"llama 9/3 heads, {mode}{way}" in subjects
    assert "llama 9/3 heads, bf16, compiled" in subjects
    checked = {row["what"] for row in results["rows"]}
    assert {"twice, deterministic algorithms", "checkpointing", "activation offload", "gradients", "loss"} <= checked
    assert {"off / learning rate", "units in the last place"} <= checked
    assert any(subject.startswith("attention 4/2x256 softcap") for subject in subjects)


@pytest.mark.parametrize("name", often(["mistral window", "qwen3", "gemma2 soft-caps"], "gemma2 soft-caps"))
def test_other_architectures_agree_with_the_reference(name, tmp_path, no_cuda):
    report = make_report(tmp_path)
    config = parity.architectures(tiny=True)[name]
    parity.check_architecture(parity.Checks(report), name, config, CPU, tiny=True, thorough=False)
    assert [row for row in report.results["rows"] if row["ok"] is not True] == []
    assert len(report.results["rows"]) == 12


def off_by_one(query, key, value, blocks, **options):
    """The last token of every shared prefix is forgotten."""
    ranges = tuple((low, max(low, high - 1), start, end) for low, high, start, end in blocks.ranges)
    return packed_attention(query, key, value, AttentionBlocks(ranges), **options)


def slightly_off(query, key, value, blocks, *, scale=None, **options):
    return packed_attention(query, key, value, blocks, scale=0.9 * (scale or query.shape[-1] ** -0.5), **options)


def scaled_logits(*tensors, scale=1.0, **options):
    return token_logps(*tensors, scale=1.02 * scale, **options)


@pytest.mark.parametrize("wrong", [off_by_one, slightly_off, scaled_logits])
def test_parity_fails_in_every_precision_when_attention_or_head_is_wrong(wrong, tmp_path, monkeypatch):
    """Logits 2% off among them: that logits are as large as trained models' is what shows it in bf16."""
    if wrong is scaled_logits:
        monkeypatch.setattr(simpo.model.head, "token_logps", wrong)
    else:
        monkeypatch.setattr(simpo.model.attention, "packed_attention", wrong)
    report = make_report(tmp_path)
    config = parity.architectures(tiny=True)["llama tied"]
    parity.check_architecture(parity.Checks(report), "llama", config, CPU, tiny=True, thorough=False)
    failed = {row["subject"] for row in report.results["rows"] if row["ok"] is False}
    assert failed == {"llama, fp32", "llama, autocast", "llama, bf16"}


def test_a_wrong_gradient_alone_fails_and_the_command_says_so(command, monkeypatch):
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logps):
            return logps.clone()

        @staticmethod
        def backward(ctx, grad):
            return 0.99 * grad

    token_logps = simpo.model.head.token_logps
    monkeypatch.setattr(simpo.model.head, "token_logps", lambda *a, **k: Half.apply(token_logps(*a, **k)))
    monkeypatch.setattr(parity, "RUNGS", ())  # nothing is compiled
    monkeypatch.setattr(parity, "check_ways", lambda *args: None)
    monkeypatch.setattr(parity, "check_optimizers", lambda *args: None)
    code, results = command("parity", "--only", "llama 9/3 heads")
    assert code == 1
    assert "FAILED llama 9/3 heads, fp32: gradients" in results["notes"]
    assert not any("log-probs" in note for note in results["notes"])


def test_a_step_that_gives_other_bits_under_deterministic_algorithms_fails(tmp_path, monkeypatch):
    packed_outcome, calls = parity.packed_outcome, []

    def drifting(staged, *args, **options):
        """As atomics would be, unless torch was told to raise where it has nothing better."""
        outcome = packed_outcome(staged, *args, **options)
        truly = (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        calls.append(truly)
        for gradient in outcome.gradients.values():
            gradient.mul_(1 + 1e-6 * len(calls))
        return outcome

    monkeypatch.setattr(parity, "packed_outcome", drifting)
    monkeypatch.setattr(parity, "RUNGS", ())
    monkeypatch.setattr(parity, "check_optimizers", lambda *args: None)
    report, config = make_report(tmp_path), parity.architectures(tiny=True)["llama tied"]
    parity.check_architecture(parity.Checks(report), "llama", config, CPU, tiny=True, thorough=True)
    failed = {row["what"] for row in report.results["rows"] if row["ok"] is False}
    assert failed == {"twice, deterministic algorithms"}
    assert sum(calls) == 3 * len(parity.MODES)


def test_an_operation_without_a_deterministic_kernel_is_a_failed_check(tmp_path):
    checks = parity.Checks(report := make_report(tmp_path))
    with checks.surviving("llama, bf16", "deterministic algorithms"):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation\nmore")
    (row,) = report.results["rows"]
    assert (row["ok"], row["note"]) == (False, "cumsum_cuda_kernel does not have a deterministic implementation")


def test_nan_fails_a_check(tmp_path):
    checks = parity.Checks(make_report(tmp_path))
    assert not checks.at_most("subject", "what", float("nan"), 1.0)
    assert checks.at_most("subject", "what", 0.0, 0.0)


def test_bf16_on_a_gpu_must_go_through_varlen_attn(monkeypatch):
    cuda = SimpleNamespace(type="cuda")
    plain, softcapped = SimpleNamespace(), SimpleNamespace(attn_logit_softcapping=50.0)
    assert parity.takes_varlen(cuda, "autocast", plain)
    assert parity.takes_varlen(cuda, "bf16", plain)
    assert not parity.takes_varlen(cuda, "fp32", plain)
    assert not parity.takes_varlen(cuda, "bf16", softcapped)
    assert not parity.takes_varlen(CPU, "bf16", plain)
    monkeypatch.setattr(simpo.core.attention, "attention_path", lambda *args, **options: "varlen")
    monkeypatch.setattr(simpo.core.attention, "varlen_attention", lambda query, *args, **options: query)
    tensor = torch.zeros(1, 2, 3, 4)
    with parity.counted_varlen() as calls:
        packed_attention(tensor, tensor, tensor, AttentionBlocks(((0, 0, 0, 3),)))
    assert len(calls) == 1


# --- head, attention -------------------------------------------------------------------------------------------------


def test_head_times_every_chunk_size_beside_the_dense_head(command, no_cuda):
    code, results = command("head", "--rows", "40", "--chunks", "default,16", "--repeats", "2")
    assert (code, results["complete"]) == (0, True)
    heads = [(row["weights"], row["head"]) for row in results["rows"]]
    assert heads == [(w, h) for w in ("bf16", "fp32") for h in ("dense", "default (40 rows)", "16 rows")]
    assert all(row["largest_difference"] < 1e-2 for row in results["rows"])


def test_a_head_with_wrong_values_is_an_error(command, monkeypatch):
    from gpu import head

    monkeypatch.setattr(head, "token_logps", lambda *a, chunk_size, **k: workload.dense_token_logps(*a, **k) + 0.5)
    code, results = command("head", "--rows", "8", "--chunks", "default", "--repeats", "1")
    assert code == 1
    assert len(results["notes"]) == 2


def test_attention_checks_and_times_every_way(command, no_cuda):
    code, results = command("attention", "--repeats", "1", "--cases", "20/6/6", "--pairs", "2,3")
    assert (code, results["complete"]) == (0, True)
    ways = ["packed", "per-block"]
    assert [(row["pairs"], row["way"]) for row in results["rows"]] == [(n, way) for n in (2, 3) for way in ways]
    assert all(results["conditions"][f"{way} differs"] < 1e-2 for way in ways)
    assert results["conditions"]["packed takes"] == "matmul"  # on a CPU
    # A step of two pairs: 3 * 4 * heads * size * attended over its time.
    packed = results["rows"][0]
    attended = 2 * (210 + 20 * 12 + 21 + 21)
    assert packed["step_tflops"] * packed["step_s"] * 1e12 == pytest.approx(12 * 3 * 16 * attended)


def test_soft_capped_attention_is_timed_alone(command):
    code, results = command("attention", "--softcap", "20", "--repeats", "1", "--cases", "20/6/6", "--pairs", "1")
    assert code == 0
    assert [row["way"] for row in results["rows"]] == ["packed"]


def test_a_way_that_is_wrong_is_named_and_not_timed(command, monkeypatch):
    def wrong(query, key, value, blocks, **options):
        return 1.1 * query + 0 * (key + value).sum()

    monkeypatch.setattr(attention_bench, "packed_attention", wrong)
    code, results = command("attention", "--repeats", "1", "--cases", "9/4/4", "--pairs", "1")
    assert code == 1
    assert [row["way"] for row in results["rows"]] == ["per-block"]
    assert results["notes"][0].startswith("packed: wrong")


# --- train -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_trainer_is_resumed_and_compared_and_an_option_that_fails_leaves_the_others(command, monkeypatch):
    options = {
        "refused": {"learning_rate": -1.0},
        "checkpointing": {"gradient_checkpointing": True},
        "new": {"no_key": 1},
    }
    run_steps = train.run_steps

    def broken(keys):
        if keys["output_dir"].endswith("broken"):
            raise RuntimeError("CUDA error")
        return run_steps(keys)

    monkeypatch.setattr(train, "OPTIONS", {"broken": {}} | options)
    monkeypatch.setattr(train, "run_steps", broken)
    code, results = command("train")
    assert (code, results["complete"]) == (1, True)
    rows = {row["what"]: row for row in results["rows"]}
    resumed = [row for what, row in rows.items() if what.startswith("resume")]
    assert [row["note"] for row in resumed] == ["resumed: equal bits"] * len(resumed)  # on a CPU without any key too
    assert (rows["broken"]["ok"], rows["broken"]["note"]) == (False, "CUDA error")
    assert rows["refused"]["ok"] is None
    assert "learning_rate" in rows["refused"]["note"]
    assert (rows["checkpointing"]["ok"], rows["checkpointing"]["steps"]) == (True, 3)
    assert "new" not in rows
    assert not torch.are_deterministic_algorithms_enabled()  # full_determinism of one run is not the next one's


@pytest.mark.parametrize(("off", "deterministic", "fine"), [(0, True, True), (1e-9, True, False), (1e-9, False, True)])
def test_a_deterministic_run_must_be_resumed_to_the_bit(off, deterministic, fine, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_weights", lambda folder: {"w": next(weights)})
    weights = iter([torch.ones(3).double(), torch.ones(3).double() + off, torch.zeros(3).double()])
    monkeypatch.setattr(train, "run_steps", lambda keys: {"steps": 6, "loss": 1.0})
    assert train.check_resume(tmp_path, {}, deterministic)["ok"] is fine


def test_without_the_packages_of_simpo_train_its_part_says_which_are_missing(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "NEEDED", ("json", "no_such_package"))
    assert gpu.main(["train", "--device", "cpu", "--model", "tiny", "--output", str(tmp_path)]) == 2
    assert "needs no_such_package; carry wheels" in capsys.readouterr().err


# --- time, memory, devices -------------------------------------------------------------------------------------------


def test_a_deadline_counts_from_the_start_of_the_command():
    now = [100.0]
    deadline = Deadline(1.0, began=70.0, clock=lambda: now[0])
    assert deadline.left_s == 30.0
    assert deadline.allows(29.0)
    assert not deadline.allows(31.0)
    now[0] = 131.0
    assert not deadline.allows()


def test_what_takes_too_long_is_interrupted():
    def work() -> None:
        with stop_at(Deadline(0.05 / 60)):
            time.sleep(30)

    with pytest.raises(TimeUp):
        work()
    time.sleep(0.1)  # the alarm is off


def test_a_deadline_that_passes_in_a_collection_of_garbage_is_not_lost():
    def slow(phase: str, info: dict[str, int]) -> None:
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            pass

    def work() -> None:
        with stop_at(Deadline(0.05 / 60)):
            gc.collect()
            time.sleep(30)

    gc.callbacks.append(slow)
    try:
        with pytest.raises(TimeUp):
            work()
    finally:
        gc.callbacks.remove(slow)


@pytest.mark.parametrize("name", ["ladder", "memory", "attention", "head", "parity"])
def test_when_the_time_is_over_the_file_says_what_is_missing(name, gpu, tmp_path):
    words = [name, "--device", "cpu", "--model", "tiny", "--output", str(tmp_path), "--minutes", "1"]
    code = gpu.main(words, began=time.monotonic() - 61)
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert code == (1 if name == "parity" else 3)  # what was not checked is not right
    assert not results["complete"]
    assert results["notes"]


def test_rounds_end_when_the_case_has_used_its_share(tmp_path):
    now = [0.0]
    meter = SimpleNamespace(
        measure=lambda work: (work(), now.__setitem__(0, now[0] + 10.0), SimpleNamespace(seconds=10.0, peak_bytes=1))[
            -1
        ]
    )
    staged = make_staged()
    track = ladder.Track(DEFAULT_RUNG, [LengthCase("9/4/4").pairs(1, vocab_size=199)])
    deadline = Deadline(200 / 60, began=0.0, clock=lambda: now[0])
    kept = []
    visit = functools.partial(ladder._visit, staged, None, meter)
    ladder.go_round(visit, [track], range(50), deadline, 100.0, lambda: kept.append(len(track.times)))
    assert now[0] <= 100.0
    assert len(track.times) >= 7
    assert kept == list(range(len(track.times) + 1))  # on the disk after every round


def test_out_of_memory_is_a_reason_and_other_errors_go_on():
    meter = CpuMeter(CPU)

    def fail(error):
        raise error

    assert attempt(lambda: 3, meter) == (3, None)
    assert attempt(lambda: fail(torch.OutOfMemoryError("CUDA out of memory.\nx")), meter) == (
        None,
        "CUDA out of memory.",
    )
    with pytest.raises(RuntimeError, match="shapes"):
        attempt(lambda: fail(RuntimeError("shapes do not fit")), meter)


class FakeCuda:
    """torch.cuda for a GPU that needs 250 ms for anything and holds what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.now = 1000

    def Event(self, enable_timing):
        return SimpleNamespace(record=lambda: self.calls.append("record"), elapsed_time=lambda end: 250.0)

    def synchronize(self, device):
        self.calls.append("synchronize")

    def memory_allocated(self, device):
        return self.now

    def max_memory_allocated(self, device):
        return self.now + 500

    def reset_peak_memory_stats(self, device):
        self.calls.append("reset")


def test_cuda_is_timed_by_events_and_its_peak_counts_from_the_beginning():
    cuda = FakeCuda()
    meter = CudaMeter(torch.device("cuda", 0), cuda)
    measured = meter.measure(lambda: cuda.calls.append("work"))
    assert cuda.calls == ["synchronize", "reset", "record", "work", "record", "synchronize"]
    assert (measured.seconds, measured.before_bytes, measured.extra_bytes) == (0.25, 1000, 500)


def test_without_a_gpu_the_command_says_so(gpu, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cpu --model tiny"):
        pick_meter("cuda")
    assert gpu.main(["parity"]) == 2
    assert "no CUDA GPU is at hand" in capsys.readouterr().err


def test_weights_are_as_precise_as_fits():
    h200, h100 = 139 * 2**30, 78 * 2**30
    plans = {
        (size, total): workload.plan_weights(int(size * 1e9), total)
        for size in (1.24, 8.03, 30)
        for total in (h200, h100)
    }
    assert [(plan.weights, plan.optimizer) for plan in plans.values()] == [
        ("fp32", "adamw"),
        ("fp32", "adamw"),
        ("bf16", "adamw_bf16"),
        ("bf16", "adamw_bf16"),
        ("bf16", "none"),
        ("bf16", "none"),
    ]
    asked = workload.plan_weights(int(8e9), h200, weights="fp32", optimizer="none")
    assert (asked.weights, asked.optimizer) == ("fp32", "none")


# --- the command line ------------------------------------------------------------------------------------------------


def test_lengths_come_from_a_file(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps([[7, 3, 4], [5, 2, 2]]))
    (case,) = workload.find_cases("", str(path))
    pairs = case.pairs(2, vocab_size=50)
    assert [(p.chosen_start, len(p.chosen_ids), len(p.rejected_ids)) for p in pairs] == [(7, 10, 11), (5, 7, 7)]
    assert flops.pair_work(pairs[0]).shape.prefix == 7
    with pytest.raises(ValueError, match="2 entries and 3 are needed"):
        case.pairs(3, vocab_size=50)
    path.write_text(json.dumps({"a": [[7, 3]]}))
    with pytest.raises(ValueError, match="cannot read"):
        workload.find_cases("", str(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ladder", "--cases", "chat"], "ragged-200/350/350"),
        (["ladder", "--rungs", "fast"], "padded, packed"),
        (["ladder", "--model", "gpt"], "llama-8b"),
        (["ladder", "--weights", "bf16", "--compute", "fp32"], "needs --weights fp32"),
        (["memory", "--tokens", "0"], "at least 1"),
        (["memory", "--modes", "magic"], "packed, checkpoints"),
        (["head", "--chunks", "many"], "or default"),
        (["parity", "--only", "gpt2"], "llama 9/3 heads"),
        (["parity", "--minutes", "20"], "at most 9"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(words, message, gpu, capsys, tmp_path):
    defaults = [] if "--model" in words else ["--model", "tiny"]
    assert gpu.main([*words, "--device", "cpu", "--output", str(tmp_path), *defaults]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_kept_command_names_no_folder_of_this_machine(tmp_path, gpu):
    words = [
        "ladder",
        "--name",
        "a",
        "--output",
        str(tmp_path),
        "--lengths",
        str(tmp_path / "l.json"),
        f"--output={tmp_path}",
    ]
    assert shown_command(words) == "python benchmarks/gpu.py ladder --lengths l.json"
    assert gpu.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_table_is_plain_text():
    lines = table_lines(("name", "value"), [["long name", "1"], ["b", "23456"]])
    assert lines == ["name       value", "-" * 16, "long name      1", "b          23456"]


# --- the whole plan --------------------------------------------------------------------------------------------------

ENDINGS = {
    "fine": "pass",
    "wrong": "import sys; print('differs'); sys.exit(1)",
    "crash": "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "error": "import sys; print('RuntimeError: an illegal memory access'); sys.exit(4)",
    "hang": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
}


def run_endings(folder: Path, *names: str, minutes: float = 5.0, least_s: float = 0, say=lambda line: None) -> int:
    """A plan of parts that end in these ways; a hang has some seconds, the others more than they need."""
    plan = [parts.Part(name, minutes if name == "hang" else 60 * minutes, least_s, name) for name in names]

    def command_of(part, seconds):
        write = f"open({str(folder / part.name) + '.json'!r}, 'w').write({json.dumps(PARTIAL)!r})"
        return [sys.executable, "-c", f"{write}\n{ENDINGS[part.name]}"]

    return parts.run_parts(plan, folder, minutes=minutes, command_of=command_of, say=say)


PARTIAL = {"tables": [{"title": "", "head": ["what", "ms"], "cells": [["a|b", "12.5"]]}], "notes": ["cut"], "rows": []}


def test_parts_that_crash_hang_or_fail_leave_the_others_and_keep_what_they_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "GRACE_S", 0.0)
    said = []
    code = run_endings(tmp_path, "hang", "crash", "error", "wrong", "fine", say=said.append)
    assert code == 3
    ended = {path.stem: json.loads(path.read_text())["outcome"] for path in tmp_path.glob("*.json")}
    assert {name: outcome["how"] for name, outcome in ended.items()} == {
        "crash": "failed",
        "hang": "killed",
        "error": "failed",
        "wrong": "WRONG",
        "fine": "done",
    }
    assert ended["crash"]["reason"] == "ended by SIGSEGV; before"
    assert ended["error"]["reason"] == "RuntimeError: an illegal memory access"
    assert ended["hang"]["seconds"] < 60
    table = (tmp_path / "table.md").read_text()
    assert table.count("| a\\|b | 12.5 |") == 5  # of every part, however it ended
    assert said[-2] == table
    assert parts.make_table(tmp_path, ["hang", "crash", "error", "wrong", "fine"]) == table  # from the files alone


def test_the_exit_code_says_whether_parity_held(tmp_path, monkeypatch):
    for name, ending in {"kernels": "pass", "parity": ENDINGS["wrong"], "memory": ENDINGS["error"]}.items():
        monkeypatch.setitem(ENDINGS, name, ending)
    assert run_endings(tmp_path, "kernels", "fine") == 0
    assert run_endings(tmp_path, "kernels", "memory") == 3
    assert run_endings(tmp_path, "kernels", "parity", "fine") == 1
    assert run_endings(tmp_path, "kernels", "parity", least_s=1e6) == 1  # not seen to its end
    assert "**Parity does not hold, or was not seen to its end" in (tmp_path / "table.md").read_text()
    monkeypatch.setitem(ENDINGS, "parity", "pass")
    assert run_endings(tmp_path, "kernels", "parity", "memory") == 3
    assert "**Parity holds.**" in (tmp_path / "table.md").read_text()


def test_without_a_gpu_the_first_part_ends_the_plan(tmp_path, monkeypatch):
    monkeypatch.setitem(ENDINGS, "none", "import sys; print('error: no CUDA GPU is at hand'); sys.exit(2)")
    assert run_endings(tmp_path, "none", "fine") == 2
    assert "no CUDA GPU is at hand" in (tmp_path / "table.md").read_text()
    assert not (tmp_path / "fine.json").exists()


def test_a_part_for_which_no_time_is_left_is_skipped_with_the_reason(tmp_path):
    assert run_endings(tmp_path, "fine", "error", minutes=1, least_s=100) == 3
    outcome = json.loads((tmp_path / "error.json").read_text())["outcome"]
    assert outcome["how"] == "skipped"
    assert "it needs 100" in outcome["reason"]


def test_a_plan_that_is_told_to_stop_writes_its_table(tmp_path):
    script = f"""
import sys
sys.path[:0] = [{str(REPO / "benchmarks")!r}]
from pathlib import Path
from gpu.parts import Part, run_parts
sleep = [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(600)"]
run_parts([Part("a", 60, 0, "a")], Path({str(tmp_path)!r}), minutes=1, command_of=lambda *_: sleep,
          say=lambda line: print(line, flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    while "begun" not in (line := process.stdout.readline()):
        assert line
    process.terminate()
    process.communicate(timeout=60)
    assert "| a | interrupted |" in (tmp_path / "table.md").read_text()


def test_the_plan_takes_at_most_twelve_minutes_and_eight_files(gpu):
    assert sum(part.limit_s for part in gpu.PARTS) == 720
    assert all(part.least_s < part.limit_s for part in gpu.PARTS)
    assert len(gpu.PARTS) + 1 <= 8


@pytest.mark.parametrize("name", [part.name for part in load_script("benchmarks", "gpu.py").PARTS])
def test_every_part_of_the_plan_is_a_command_that_is_understood(name, gpu, tmp_path, monkeypatch):
    """On the GPU and in a rehearsal alike; that it runs too is tested command by command above."""
    (part,) = (part for part in gpu.PARTS if part.name == name)
    for device in ("cuda", "cpu"):
        words = ["--device", device] + ["--model", "tiny"] * (device == "cpu")
        args = gpu.build_parser().parse_args(words)
        command = gpu.command_of(args, tmp_path, part, 60.0)
        parsed = gpu.build_parser().parse_args(command[2:])
        parsed.device = "cpu"
        gpu.COMMANDS[parsed.command](parsed, CpuMeter(CPU))
        assert (parsed.name, parsed.output, parsed.minutes) == (name, str(tmp_path), 1.0)


WITHOUT = """
import importlib.machinery, runpy, sys

hidden = {"datasets", "pydantic", "typer", "rich", "pyarrow", "trl", "peft", "accelerate", "matplotlib", "pandas",
          "bitsandbytes", "liger_kernel"}


class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)


sys.meta_path = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
sys.path = [entry for entry in sys.path if not entry.rstrip("/").endswith("src")]
sys.argv = sys.argv[1:]
from pathlib import Path
sys.path[:0] = ["benchmarks", "src"]
for module in sorted(Path("benchmarks/gpu").glob("*.py")):
    __import__(f"gpu.{module.stem}")
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


@pytest.mark.long
def test_the_rehearsal_survives_a_part_that_hangs_and_one_that_fails(gpu, tmp_path, monkeypatch, capsys):
    """One real part, where only torch, transformers and numpy are, behind two that end badly; and a readable table."""
    ladder_words = "ladder --rungs padded,low-memory --rounds 1 --steps 1 --cases ragged-200/350/350"
    plan = (parts.Part("hang", 2, 0, "hang"), parts.Part("error", 60, 1, "error"))
    monkeypatch.setattr(gpu, "PARTS", (*plan, parts.Part("ladder-1b", 600, 1, ladder_words)))
    command_of = gpu.command_of

    def replaced(args, folder, part, seconds):
        python, *command = command_of(args, folder, part, seconds)
        return [python, "-c", ENDINGS[part.name]] if part.name in ENDINGS else [python, "-c", WITHOUT, *command]

    monkeypatch.setattr(gpu, "command_of", replaced)
    code = gpu.main(["--device", "cpu", "--model", "tiny", "--minutes", "11", "--output", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert code == 3, table
    lines = table.splitlines()
    assert lines[0].startswith("# A rehearsal on a CPU")
    ended = {line.split(" | ")[0].strip("| "): line.split(" | ")[1] for line in lines if line.count(" | ") == 4}
    assert ended == {"part": "ended", "---": "---:", "hang": "killed", "error": "failed", "ladder-1b": "done"}
    assert any(line.startswith("| 12/8/9 | low-memory |") for line in lines)
    assert any(line.startswith("One step (low-memory): ") for line in lines)
    assert capsys.readouterr().out.rstrip().endswith(f"written: {tmp_path}")
    (tmp_path / "table.md").unlink()
    assert gpu.main(["table", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() == table


def test_wheels_come_before_what_is_installed(tmp_path):
    with pytest.raises(ValueError, match=r"no \.whl file"):
        parts.install_wheels(tmp_path)
    with zipfile.ZipFile(tmp_path / "carried_thing-1.2-py3-none-any.whl", "w") as wheel:
        info = "carried_thing-1.2.dist-info"
        wheel.writestr("carried_thing.py", "here = True\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    environment, remark = parts.install_wheels(tmp_path)
    assert remark == "carried: carried_thing-1.2"
    code = "import carried_thing; assert carried_thing.here"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ) | environment).returncode == 0
