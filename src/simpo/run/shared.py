"""Whether all processes of a run see one run directory. Must not import the trainer or evaluation."""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from simpo.data.files import named_if_refused, write_whole

if TYPE_CHECKING:
    from simpo.parallel.mesh import Mesh

TOKEN_FILE = "_token"  # transformers' Trainer uploads nothing that begins with "_"
WAIT_S = 60.0
"""How long a machine may take to see what another has written: NFS shows files late."""


def check_shared(folder: Path, mesh: Mesh) -> None:
    """See that every process finds what the first one writes in a folder, which has made and locked it before.

    Nothing is left behind. Every process calls it.

    Raises:
        ValueError: on every process; names the machines that have a folder of their own there, or none.
    """
    if mesh.sizes.world == 1:
        return
    path, token = folder / TOKEN_FILE, mesh.from_main(secrets.token_hex(16))
    with named_if_refused("output_dir", folder):
        mesh.on_main(lambda: write_whole(path, token))
    until = time.monotonic() + WAIT_S
    while not (sees := _holds(path, token)) and time.monotonic() < until:
        time.sleep(0.5)
    everyone = mesh.gather((socket.gethostname(), sees))
    mesh.on_main(lambda: path.unlink(missing_ok=True))
    blind = sorted({host for host, sees in everyone if not sees})
    if blind:
        raise ValueError(
            f"output_dir: {folder} is not one folder on all nodes: what {everyone[0][0]} writes there is not seen on "
            f"{', '.join(blind[:8])}{', ...' * (len(blind) > 8)}; choose one on a file system that all nodes share"
        )


def _holds(path: Path, token: str) -> bool:
    try:
        return path.read_bytes() == token.encode()
    except OSError:
        return False
