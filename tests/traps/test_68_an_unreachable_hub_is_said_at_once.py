"""Trap 68: a hub name without network took 31 to 52 s to fail, and several lines."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import datasets
import pytest
from huggingface_hub import constants

from simpo import hub
from simpo.data.sources import find_sources
from simpo.hosts.hf.model import load_by_name
from simpo.model.load import load_tokenizer, source_dtype
from simpo.plan.shapes import load_config
from simpo.recipe import load_recipe

RECIPE = load_recipe({"model_name_or_path": "nobody/nothing", "dataset_mixer": {"nobody/data": 1.0}})
ASKED: dict[str, Callable[[], object]] = {
    "tokenizer": lambda: load_tokenizer(RECIPE),
    "model": lambda: load_by_name("nobody/nothing", RECIPE, {}),
    "configuration": lambda: source_dtype(RECIPE),
    "plan": lambda: load_config("nobody/nothing"),
    "dataset": lambda: find_sources(RECIPE),
}


@pytest.fixture(params=["refuses", "is silent"])
def no_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that cannot be reached, of which nobody knows yet."""
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    if request.param == "refuses":
        server.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.unreachable_hub.cache_clear()
    yield
    hub.unreachable_hub.cache_clear()
    server.close()


def test_every_way_to_the_hub_fails_within_seconds_in_one_line(no_hub: None) -> None:
    began = time.monotonic()
    for what, ask in ASKED.items():
        with pytest.raises(ValueError, match="'nobody/") as caught:
            ask()
        assert "\n" not in str(caught.value)
        if what != "plan":
            assert "http://127.0.0.1" in str(caught.value), what
    assert time.monotonic() - began < 10  # all together, of which the first takes 1 to 4


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def head(self, url: str, **options: object) -> object:
            return type("Answer", (), {"status_code": 404})

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.unreachable_hub.cache_clear()
    assert hub.unreachable_hub() == ""
    assert not constants.HF_HUB_OFFLINE
    hub.unreachable_hub.cache_clear()
