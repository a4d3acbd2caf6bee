"""Checksums of a checkpoint: of its tensors by their elements, the same on every mesh, and of every other file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from simpo.parallel.mesh import Mesh

_DIGEST_CHUNK = {"cpu": 2**20, "cuda": 2**24}  # elements at a time: 16 bytes each, and a few kernels a chunk
FILES_FILE = "files.json"
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest_files(folder: Path) -> dict[str, str]:
    """Of each file below a checkpoint's folder but those of the tensors' elements and the record of these digests."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".distcp")
    named = {path.relative_to(folder).as_posix(): path for path in found if path.name != FILES_FILE}
    return {name: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() for name, path in named.items()}


def record_files(folder: Path) -> None:
    """Write down the digests of a checkpoint whose files are all there."""
    (folder / FILES_FILE).write_text(json.dumps(digest_files(folder), indent=1), encoding="utf-8")


def check_files(folder: Path) -> None:
    """Raise ValueError for a file that is missing or not as `record_files` found it."""
    saved, found = json.loads((folder / FILES_FILE).read_text(encoding="utf-8")), digest_files(folder)
    for name, digest in saved.items():
        if found.get(name) != digest:
            raise ValueError(f"{name} is {'not as it was saved' if name in found else 'missing'}")


def digest_values(tensors: dict[str, Any]) -> dict[str, dict[str, str]]:
    """A checksum of what is not a tensor in each part (the settings of an optimizer's groups), by the last word of its
    name: a version of torch that has further ones still knows these."""
    found: dict[str, dict[str, Any]] = {}
    for part, values in tensors.items():
        digests = found.setdefault(part, {})
        for name, value in sorted(values.items()):
            if not isinstance(value, Tensor):
                digest = digests.setdefault(name.rpartition(".")[2], hashlib.blake2b(digest_size=8))
                digest.update(f"{name} {value!r}\n".encode())
    return {part: {name: digest.hexdigest() for name, digest in digests.items()} for part, digests in found.items()}


def digest_tensors(tensors: dict[str, Any], mesh: Mesh) -> dict[str, str]:
    """A checksum of every bit of the whole tensors of each part: of elements, not of files; the same on every mesh.

    All of it is read on the device, wherever it lies, and the sums are fetched together.
    """
    sums: list[tuple[str, Tensor]] = []
    for part, values in tensors.items():
        for name, value in sorted(values.items()):
            if isinstance(value, Tensor) and value.numel():
                key = int.from_bytes(hashlib.blake2b(f"{part} {name}".encode(), digest_size=8).digest(), "little") | 1
                total = _tensor_digest(value.detach(), mesh.device, is_main=mesh.is_main)
                if total is not None:
                    sums.append((part, total * (key - 2**64 if key >= 2**63 else key)))
    totals = dict.fromkeys(tensors, 0)
    numbers = torch.stack([total for _, total in sums]).tolist() if sums else []
    for (part, _), number in zip(sums, numbers, strict=True):
        totals[part] += number
    everyone = mesh.gather(totals)
    return {part: f"{sum(theirs[part] for theirs in everyone) % 2**64:016x}" for part in totals}


def _tensor_digest(tensor: Tensor, device: torch.device, *, is_main: bool) -> Tensor | None:
    """This process's share of the sum of elements, as whole numbers, times odd weights by place, modulo 2**64.

    A place's weight is the product of one for each of its indices, so that shards need no more than their offsets. Odd
    weights let no changed bit pass; irregular ones no exchange of places.

    Returns:
        A scalar in int64 on `device`, not waited for; None where this process has no share.
    """
    offsets = [0] * tensor.ndim
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        # The first copy counts; where a mesh is only a part of the world, the other parts hold copies too.
        copies = [dim for dim, placement in enumerate(placements) if not placement.is_shard()]
        counts = bool((mesh.mesh == 0).any()) and all(mesh.get_local_rank(dim) == 0 for dim in copies)
        tensor = tensor.to_local()
    else:
        counts = is_main
    if not counts or not tensor.numel():
        return None
    words = tensor.contiguous().view(_WORDS[tensor.element_size()])
    if words.ndim == 0:
        words, offsets = words[None], [0]
    weights = [
        _place_weights(torch.arange(offset, offset + size, device=device), dim)
        for dim, (offset, size) in enumerate(zip(offsets, words.shape, strict=True))
    ]
    chunk = _DIGEST_CHUNK.get(device.type, _DIGEST_CHUNK["cuda"])
    total, many = torch.zeros((), dtype=torch.int64, device=device), max(1, chunk // words[0].numel())
    for start in range(0, len(words), many):
        sums = words[start : start + many].to(device, non_blocking=True)
        sums = sums.to(torch.int64, copy=sums.dtype == torch.int64)  # else the model's own memory
        for of_dim in reversed(weights[1:]):
            sums = sums.mul_(of_dim).sum(dim=-1)
        total += (sums * weights[0][start : start + many]).sum()
    return total


def _place_weights(places: Tensor, dim: int) -> Tensor:
    """An odd 64-bit number for each index along a dimension, without any pattern; wraps around on purpose."""
    mixed = (places + ((dim + 1) << 48)) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 29)) * 0x2545F4914F6CDD1D
    return (mixed ^ (mixed >> 32)) | 1
