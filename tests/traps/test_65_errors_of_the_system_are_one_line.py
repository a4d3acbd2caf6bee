"""Trap 65: a read-only folder, a path through a file, a name too long ended in a traceback, after the work was done."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from simpo.cli import app
from simpo.data.cache import user_cache
from simpo.data.files import check_writable, write_whole
from simpo.errors import explain, is_disk_full
from simpo.recipe.yaml import dump_yaml
from simpo.run.lock import OutputLock

COMMANDS: dict[str, tuple[str, ...]] = {
    # command -> its words behind the recipe; PLACE is where nothing can be written
    "train": ("RECIPE", "--output_dir", "PLACE"),
    "audit": ("RECIPE", "--output_dir", "PLACE"),
    "audit, --output": ("RECIPE", "--output", "PLACE"),
    "eval, --output": ("RECIPE", "--output", "PLACE"),
    "plan, --output": ("RECIPE", "--output", "PLACE"),
    "generate": ("RECIPE", "--output_dir", "PLACE"),
    "generate, --output": ("RECIPE", "--output", "PLACE.jsonl"),
    "score": ("RECIPE", "--output_dir", "PLACE"),
    "score, --output": ("RECIPE", "--output", "PLACE"),
    "pair": ("RECIPE", "--output_dir", "PLACE"),
    "pair, --output": ("RECIPE", "--output", "PLACE"),
    "rounds": ("RECIPE", "--output_dir", "PLACE"),
    "sweep": ("RECIPE", "--output_dir", "PLACE", "--beta", "2,3"),
    "calibrate": ("RECIPE", "--output_dir", "PLACE"),
    "calibrate, --output": ("RECIPE", "--output", "PLACE"),
    "judge": ("RECIPE", "--output_dir", "PLACE"),
    "judge, --output": ("RECIPE", "--output", "PLACE"),
    "merge, --output": ("MODEL", "--output", "PLACE"),
    "export, --output": ("MODEL", "--gguf", "--output", "PLACE"),
    "report, --output": ("MODEL", "--output", "PLACE"),
    "init, init": ("PLACE.yaml", "--data", "DATA", "--model", "MODEL"),
}


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(tiny_recipe), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_cannot_be_is_one_line_before_the_work(
    name: str, recipe: Path, tiny_model: Path, pair_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*args: Any, **options: Any) -> None:
        raise AssertionError("a tokenizer or a model is loaded already")

    for each in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, each), "from_pretrained", too_late)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    command, _, key = name.partition(", ")
    places = {
        str(tmp_path / "file" / "below" / "run"): f"{tmp_path / 'file'} is a file, not a folder",
        str(tmp_path / ("long" * 80)): "File name too long",
    }
    for place, why in places.items():
        names = {"RECIPE": str(recipe), "MODEL": str(tiny_model), "DATA": str(pair_files), "PLACE": place}
        words = [names.get(word, word.replace("PLACE", place)) for word in COMMANDS[name]]
        result = CliRunner().invoke(app, [command, *words])
        assert result.exit_code == 2, (result.output, result.exception)
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {key or 'output_dir'}: {place}"), line
        assert line.endswith(f" cannot be written ({why}); choose another place"), line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_what_a_system_refuses_names_the_key(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Any, *args: Any, **options: Any) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(ValueError, match=r"^output_dir: \S+/run cannot be written \(") as caught:
        OutputLock(tmp_path / "run").acquire()
    is_full = number in (errno.ENOSPC, errno.EDQUOT)
    assert ("the disk is full); make room, or choose another place" in str(caught.value)) == is_full


def test_a_folder_that_cannot_be_made_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in /proc, where mkdir says that there is no such folder."""

    def refused(path: Any, *args: Any, **options: Any) -> int:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(ValueError, match=r"output_dir: \S+ cannot be written \(.*No such file or directory\)"):
        OutputLock(tmp_path / "run").acquire()


def test_a_disk_is_known_to_be_full_whoever_says_so() -> None:
    named = OSError(errno.ENOSPC, "No space left on device", "/runs/model.safetensors")
    assert explain(named) == "/runs/model.safetensors: the disk is full"
    for said in (
        "I/O error: No space left on device (os error 28)",
        "Error writing bytes: Disk quota exceeded",
        "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598",
        "6912 requested and 3456 written",
    ):
        wrapped = RuntimeError("cannot save")
        wrapped.__cause__ = Exception(said)
        assert is_disk_full(wrapped)
        assert explain(wrapped) == "the disk is full: cannot save"
    assert not is_disk_full(ValueError("beta = -1"))
    hidden = RuntimeError("stopped")
    hidden.__context__, hidden.__suppress_context__ = named, True
    assert not is_disk_full(hidden)
    assert explain(PermissionError(errno.EACCES, "Permission denied", "/srv/a", None, "/srv/b")) == (
        "/srv/a -> /srv/b: Permission denied"
    )


def test_a_user_without_a_home_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.chdir(tmp_path)
    assert user_cache() == tmp_path / ".cache" / "simpo"


def test_what_is_no_file_is_written_to_as_it_is(tmp_path: Path) -> None:
    """`--output /dev/null` replaced the device by a file."""
    check_writable("/dev/null", "--output")
    write_whole("/dev/null", "text")
    assert not Path("/dev/null").is_file()
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_look_that_is_killed_stands_in_no_way(
    is_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before it had removed its probe, a start left a file where the run's folder was to be."""
    wanted = tmp_path / "new" / "place"
    for call in ("unlink", "rmdir"):
        monkeypatch.setattr(Path, call, killed)
    with pytest.raises(SystemExit):
        check_writable(wanted, "--output", is_folder=is_folder)
    monkeypatch.undo()
    check_writable(wanted, "--output", is_folder=is_folder)
    assert not wanted.is_file()


def test_what_killed_processes_left_half_written_goes(tmp_path: Path) -> None:
    half, fresh, mine = (tmp_path / name for name in (".a.json.0123abcd", ".a.json.0123abce", ".a.json.backup"))
    for path in (half, fresh, mine):
        path.write_text("half")
        os.utime(path, (0, 0))
    fresh.touch()
    write_whole(tmp_path / "a.json", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("a.json", fresh.name, mine.name))


def killed(*_: object) -> None:
    raise SystemExit
