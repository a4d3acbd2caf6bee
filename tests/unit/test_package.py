"""What is shipped: the wheel and the source distribution hold the package and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
BUILD = "import sys, setuptools.build_meta as b; out = sys.argv[1]; b.build_wheel(out); b.build_sdist(out)"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names in the wheel and in the source distribution (below its top folder), built from a copy."""
    copy, out = tmp_path_factory.mktemp("copy") / "simpo", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(REPO, copy, ignore=ignored)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=copy, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel, tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        return set(wheel.namelist()), {name.partition("/")[2] for name in sdist.getnames()}


def test_the_wheel_holds_every_source_file_and_only_the_package(shipped):
    wheel, _ = shipped
    files = (REPO / "src" / "simpo").rglob("*.*")
    sources = {
        str(path.relative_to(REPO / "src"))
        for path in files
        if path.suffix in (".py", ".txt", ".typed", ".css", ".html")
    }
    assert {name for name in wheel if ".dist-info/" not in name} == sources
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)
    assert any(name.endswith("/LICENSE") for name in wheel)


def test_the_source_distribution_is_enough_to_build_from(shipped):
    _, sdist = shipped
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "src/simpo/py.typed",
        "src/simpo/cli/app.py",
    } <= sdist
    assert not [name for name in sdist if name.startswith(("tests", "benchmarks", "examples", "recipes", "docs"))]
