"""Shared fixtures. Real pairs and the real model are optional: tests that need them skip with a reason."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
import tokenizers_for_tests

import simpo  # noqa: F401  before torch: its settings of the environment

gc.disable()  # until all is imported, of which nothing is garbage
os.environ["SIMPO_REPORT"] = "0"  # a second or two a run, in this process and those it starts; its own tests turn it on
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# In the background of a script, and under nohup, these are ignored; a command then ignores them as well.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    if signal.getsignal(number := getattr(signal, name, signal.SIGTERM)) is signal.SIG_IGN:
        signal.signal(number, handler)

pytest_plugins = ["miniature", "ranks", "traces"]

REPO = Path(__file__).resolve().parents[1]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """SIMPO_PART=3/32 (make test-long PART=3/32): of the tests that were asked for, every 32nd, from number 3."""
    if part := os.environ.get("SIMPO_PART"):
        first, parts = map(int, part.split("/"))
        items[:] = items[first % parts :: parts]


def pytest_collection_finish() -> None:
    import frozen  # noqa: F401

    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if session.items and not session.config.option.collectonly:
        import forks

        forks.serve()


REAL_DATA = Path(os.environ.get("SIMPO_DATA", REPO.parent / "shared" / "data"))
"""Folder of real preference pairs, `../shared/data` beside the checkout unless SIMPO_DATA says another."""


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real preference pairs at {REAL_DATA}; set SIMPO_DATA to a folder that has them")
    return REAL_DATA


@pytest.fixture(scope="session")
def held_out_files() -> list[Path]:
    """Files of held-out pairs: the demo's, and the real ones where there are any."""
    return [REPO / "examples" / "demo" / "pairs" / "test.jsonl", *sorted(REAL_DATA.glob("*/test.jsonl.gz"))]


@pytest.fixture(scope="session")
def smol_model() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors (`SIMPO_MODEL`, else the user cache that `make demo` fills)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = Path(os.environ.get("SIMPO_MODEL", cache / "simpo" / "models" / "SmolLM2-135M-Instruct"))
    if not (folder / "config.json").is_file():
        pytest.skip(f"no SmolLM2-135M-Instruct at {folder}; run `make model` or set SIMPO_MODEL")
    return folder


@pytest.fixture(scope="session")
def needs_bf16() -> None:
    """For real weights in bfloat16, which take a CPU without instructions for it tens of times as long."""
    from simpo.model.load import has_bf16, pick_device

    if not has_bf16(pick_device("cpu")):
        pytest.skip("this CPU has no instructions for bfloat16")


@pytest.fixture(scope="session")
def build_tokenizer():
    """Small tokenizers by kind ("chatml", "llama3", "plain", ...); see `tokenizers_for_tests.py`."""
    return tokenizers_for_tests.build_tokenizer


@pytest.fixture
def data_recipe(tmp_path: Path):
    """A recipe from a dataset (path, or {path: fraction}) and keys, with a cache of its own and one process."""
    from simpo.recipe import load_recipe

    def build(mixer, **keys):
        mixer = mixer if isinstance(mixer, dict) else {str(mixer): 1.0}
        base = {"model_name_or_path": "none", "cache_dir": str(tmp_path / "cache"), "preprocessing_num_workers": 1}
        return load_recipe({**base, "dataset_mixer": mixer, **keys})

    return build
