"""The server that commands fork from, each command's scene, and the table of what held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos import harness
from chaos.commands import COMMANDS


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[harness.Server]:
    server = harness.Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def scene(server: harness.Server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """scene(name): of a command; made once."""
    made: dict[str, harness.Scene] = {}

    def build(name: str) -> harness.Scene:
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            made[name] = harness.Scene(name, lambda root: COMMANDS[name](root, tiny_model), server, folder)
        return made[name]

    return build


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if harness.Table.all:
        terminalreporter.section("a hostile machine")
        for line in harness.summary():
            terminalreporter.write_line(line)
