"""Trap 51: OpenMP threads that spin for long burn a core that a neighbour needs: two threads slower than one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simpo.environment import SETTINGS, set_defaults

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP runtime, which torch brings on Linux")

FOLDERS = os.pathsep.join(str(Path(__file__).resolve().parents[2] / name) for name in ("benchmarks", "src"))
TORCHRUN = ("-P", "-m", "torch.distributed.run", "--nproc-per-node=1", "--rdzv-backend=c10d")  # -P: the real torch
ENTRIES = {
    "simpo": ("-c", "from simpo.cli import main; main()", "train", "RECIPE"),
    "torchrun -m simpo": (*TORCHRUN, "--rdzv-endpoint=127.0.0.1:0", "-m", "simpo", "train", "RECIPE"),
    "Hugging Face host": ("-c", "from simpo.hosts.hf import SimPOTrainer"),
    "bench worker": ("-m", "peers.worker", "SPEC"),
}
# In place of torch, where importing all of it tells no more: OpenMP's runtime reads its settings when it is loaded.
STAND_IN = "import ctypes\nctypes.CDLL({runtime!r})\nraise SystemExit\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a process starts and therefore finds `STAND_IN` under the name of torch."""
    (tmp_path / "torch").mkdir()
    runtime = str(next((Path(torch.__file__).parent / "lib").glob("libgomp*")))
    (tmp_path / "torch" / "__init__.py").write_text(STAND_IN.format(runtime=runtime), encoding="utf-8")
    return tmp_path


def run(words: tuple[str, ...], folder: Path, **environment: str) -> str:
    """What a process says on stderr, OpenMP's settings included, when only `environment` is set by the user."""
    (folder / "recipe.yaml").write_text(
        "model_name_or_path: nowhere\ndataset_mixer: {nothing.jsonl: 1.0}\noutput_dir: out\n", encoding="utf-8"
    )
    (folder / "spec.json").write_text('{"task": "write_model", "model": "", "folder": "", "device": ""}')
    files = {"RECIPE": str(folder / "recipe.yaml"), "SPEC": str(folder / "spec.json")}
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS and name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, *(files.get(word, word) for word in words)],
        env={**clean, "PYTHONPATH": FOLDERS, "OMP_DISPLAY_ENV": "verbose", **environment},
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return done.stderr


def spin_counts(stderr: str) -> list[str]:
    """As each process's runtime read it when it was loaded."""
    return re.findall(r"GOMP_SPINCOUNT = '(\d+)'", stderr)


@pytest.mark.parametrize("entry", ENTRIES)
def test_openmp_spins_briefly_whatever_starts_the_process(entry, folder):
    counts = spin_counts(run(ENTRIES[entry], folder))
    # torchrun itself imports torch and not simpo; its child is the last to speak.
    assert counts[-1:] == ["20000"], counts


def test_what_the_user_set_wins(folder):
    assert spin_counts(run(("-c", "import simpo, torch"), folder, GOMP_SPINCOUNT="7")) == ["7"]


def test_a_waiting_policy_of_the_user_is_not_overruled_by_a_count():
    environment = {"OMP_WAIT_POLICY": "active"}
    set_defaults(environment, platform="linux")
    assert "GOMP_SPINCOUNT" not in environment


def test_ranks_of_the_tests_have_the_settings_too(two_ranks):
    assert two_ranks.run(_spin_count) == [os.environ["GOMP_SPINCOUNT"]] * 2


def _spin_count() -> str:
    return os.environ["GOMP_SPINCOUNT"]


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_gpu_allocator_keeps_the_settings_it_was_given(name):
    given = {name: "max_split_size_mb:64"}
    environment = dict(given)
    set_defaults(environment, platform="linux")
    assert {key: value for key, value in environment.items() if "ALLOC_CONF" in key} == given


def test_the_gpu_allocator_grows_its_segments_on_linux_alone():
    environments: dict[str, dict[str, str]] = {"linux": {}, "win32": {}, "darwin": {}}
    for platform, environment in environments.items():
        set_defaults(environment, platform=platform)
    assert environments["linux"].pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    assert environments["linux"] == environments["win32"] == environments["darwin"]


def test_torch_takes_the_allocator_settings_without_a_gpu_and_without_a_word(tmp_path):
    code = "import simpo, torch; torch.ones(1).sum(); torch.accelerator.is_available()"
    assert "llocator" not in run(("-W", "error", "-c", code), tmp_path, OMP_DISPLAY_ENV="false")
