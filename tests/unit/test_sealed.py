"""run.saved: processes share the reading of a Trainer's checkpoint, and say alike what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

IDENTITY = {"recipe": {}, "data_fingerprint": "f", "pairs_per_step": 1, "total_steps": 2}
SIZES = {"optim/a.bin": 4000, "b.bin": 3000, "c.bin": 2000, "d.json": 1000}


def write_files(folder: Path) -> Path:
    for name, size in SIZES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * size)
    return folder


def seal_and_check(folder: Path, *, blind: bool) -> dict[str, Any]:
    """What this rank reads to seal and to check a checkpoint, and what it says of one that is damaged.

    Args:
        blind: the second rank does not see the files yet.
    """
    import torch
    import torch.distributed as dist

    from simpo.parallel.mesh import Mesh, MeshSizes
    from simpo.run import saved

    read: list[str] = []
    mesh, digest_file = Mesh(MeshSizes(dp_replicate=2), device=torch.device("cpu")), saved.digest_file

    def noted(path: Path) -> str:
        if blind and dist.get_rank() == 1:
            raise FileNotFoundError(path)
        read.append(path.relative_to(folder).as_posix())
        return digest_file(path)

    def refusal() -> str:
        mesh.barrier()
        with pytest.raises(ValueError) as error:
            saved.read_sealed(folder, mesh)
        mesh.barrier()
        return str(error.value)

    saved.digest_file = noted
    try:
        saved.seal(folder, IDENTITY, mesh)
        found: dict[str, Any] = {"sealed": read[:]}
        read.clear()
        saved.check_sealed(folder, mesh)
        found["checked"] = read[:]
        mesh.barrier()
        if mesh.is_main:
            (folder / "c.bin").write_bytes(b"other")
        found["changed"] = refusal()
        if mesh.is_main:
            (folder / "c.bin").unlink()
        found["missing"] = refusal()
    finally:
        saved.digest_file = digest_file
    return found


@pytest.mark.parametrize("blind", [False, True])
def test_each_process_reads_its_share_and_all_say_what_is_wrong(two_ranks: Any, tmp_path: Path, blind: bool) -> None:
    from simpo.run.saved import check_sealed, seal

    folder = write_files(tmp_path / "checkpoint-2")
    first, second = two_ranks.run(seal_and_check, folder, blind=blind)
    shares = (["optim/a.bin", "c.bin"], ["b.bin", "d.json"])
    wanted = (shares[0] + shares[1], []) if blind else shares
    for found, names in zip((first, second), wanted, strict=True):
        assert found["sealed"] == found["checked"] == names
        for how in ("changed", "missing"):
            assert f"{folder} is damaged: c.bin is not as it was saved; no other one in" in found[how]
    whole = write_files(tmp_path / "checkpoint-1")
    seal(whole, IDENTITY)
    with pytest.raises(ValueError, match=r"c\.bin is not as it was saved"):
        check_sealed(folder)
    write_files(folder)
    assert check_sealed(folder) == check_sealed(whole)


def refusal_on_two_nodes(folder: Path) -> str:
    """What this rank, on a node of its own, says of a checkpoint that is damaged on the second node alone."""
    import os
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from simpo.hosts.hf.trainer import SimPOTrainer
    from simpo.parallel.mesh import Mesh, MeshSizes
    from simpo.run.saved import check_sealed

    mesh = Mesh(MeshSizes(dp_replicate=2), device=torch.device("cpu"))
    host = SimpleNamespace(args=SimpleNamespace(save_on_each_node=True), mesh=mesh)
    before, os.environ["LOCAL_RANK"] = os.environ["LOCAL_RANK"], "0"
    try:
        with pytest.raises(ValueError) as error:
            SimPOTrainer._check_sealed(host, folder / f"node{dist.get_rank()}" / "checkpoint-2", check_sealed)
        return str(error.value)
    finally:
        os.environ["LOCAL_RANK"] = before


def test_what_each_node_saves_for_itself_is_checked_on_each(two_ranks: Any, tmp_path: Path) -> None:
    from simpo.run.saved import seal

    for node in range(2):
        seal(write_files(tmp_path / f"node{node}" / "checkpoint-2"), IDENTITY)
    (tmp_path / "node1" / "checkpoint-2" / "c.bin").write_bytes(b"other")
    for line in two_ranks.run(refusal_on_two_nodes, tmp_path):
        assert "node1/checkpoint-2 is damaged: c.bin is not as it was saved" in line
