"""Log-probs of every pair under a model that is not being trained, and those of a frozen reference, cached.

Only losses that need a reference compute one; for all others no second model is ever loaded. Uses the same packed
forward pass as training.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoConfig

from simpo.core.batch import PackedPairs, build_batch
from simpo.core.device import move
from simpo.core.losses import PairLogps
from simpo.data.cache import cache_folder, user_cache
from simpo.data.files import write_whole
from simpo.data.loader import PairStore, evaluation_batches
from simpo.display import say
from simpo.errors import first_line
from simpo.model.load import load_model, load_pretrained
from simpo.model.settle import follows_length
from simpo.run.objective import recipe_logps
from simpo.run.stopping import needs_memory

if TYPE_CHECKING:
    from simpo.parallel.mesh import Mesh
    from simpo.recipe import Recipe

Forward = Callable[[PackedPairs], PairLogps]


@torch.no_grad()
def pair_sums(
    forward: Forward,
    store: PairStore,
    *,
    pairs_per_batch: int,
    pack: bool,
    share_prompt: bool,
    mesh: Mesh,
    advance: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """Summed log-probs of every pair: [num_pairs, 2] fp64, chosen and rejected, nats.

    Every process computes a share and has all of them in the end.

    Args:
        forward: from a batch on the mesh's device (this process's part of its rows) to its log-probs.
        pairs_per_batch, pack, share_prompt: how batches are built.
        advance: is told how many pairs were done.
    """
    sums = torch.zeros(len(store), 2, dtype=torch.float64)
    batches = evaluation_batches(store, pairs_per_batch=pairs_per_batch, rank=mesh.data_rank, num_ranks=mesh.sizes.data)
    for indices in batches:
        # A rank without pairs takes part with the first one: shards are put together by all.
        batch = build_batch([store[i] for i in indices or [0]], pack=pack, share_prompt=share_prompt)
        logps = forward(mesh.own_rows(batch).to(mesh.device))
        if indices:
            sums[indices] = torch.stack([logps.chosen_sum, logps.rejected_sum], dim=1).double().cpu()
        advance(len(indices))
    return mesh.sum_over_data(sums.to(mesh.device)).cpu().numpy()


@dataclass(frozen=True)
class ReferenceLogps:
    """Summed reference log-probs of every pair of a store: [num_pairs, 2] fp32, chosen and rejected, nats."""

    sums: np.ndarray

    @classmethod
    def compute(cls, forward: Forward, store: PairStore, recipe: Recipe, mesh: Mesh) -> ReferenceLogps:
        """By a forward pass of the reference, as for `pair_sums`; the recipe says how batches are built."""
        size, layout = recipe.per_device_eval_batch_size, {"pack": recipe.pack, "share_prompt": recipe.share_prompt}
        return cls(pair_sums(forward, store, pairs_per_batch=size, **layout, mesh=mesh).astype(np.float32))

    def is_of(self, num_pairs: int) -> bool:
        """Whether there are finite ones for exactly this many pairs: what was read from a file may be anything."""
        return self.sums.shape == (num_pairs, 2) and bool(np.isfinite(self.sums).all())

    def put_into(self, logps: PairLogps, indices: Sequence[int]) -> PairLogps:
        """Log-probs of the given pairs, with the reference's."""
        rows = move(torch.from_numpy(self.sums[list(indices)]), logps.chosen_sum.device)
        return replace(logps, ref_chosen_sum=rows[:, 0], ref_rejected_sum=rows[:, 1])


def load_references(
    recipe: Recipe, stores: Mapping[str, PairStore], *, mesh: Mesh, fingerprint: str
) -> dict[str, ReferenceLogps] | None:
    """Reference log-probs of every store, from the cache where they are known; None where the loss reads none.

    Args:
        recipe: names the reference (`ref_model_name_or_path`, else the initial policy `model_name_or_path`).
        stores: split name -> pairs.
        mesh: the processes that the reference runs on; it is freed afterwards.
        fingerprint: of the tokenised data; with the model's it keys the cache.
    Raises:
        OutOfMemory: there is too little for the reference.
    """
    if not recipe.loss.needs_reference:
        return None
    name = recipe.ref_model_name_or_path or recipe.model_name_or_path
    paths = {split: _cache_path(recipe, name, fingerprint, split) for split in stores}
    found = mesh.on_main(lambda: {split: _read(path, len(stores[split])) for split, path in paths.items()})
    missing = [split for split, logps in found.items() if logps is None]
    with needs_memory("the reference's log-probs", advice="lower per_device_eval_batch_size"):
        if missing:
            kind = {"trainable": False, "in_4bit": recipe.load_in_4bit}
            model = load_model(recipe, device=mesh.device, name=name, mesh=mesh, **kind)
            forward = functools.partial(recipe_logps, model, recipe=recipe)
        for split in missing:
            found[split] = ReferenceLogps.compute(forward, stores[split], recipe, mesh)
            mesh.on_main(functools.partial(_write, paths[split], found[split]))
    return {split: logps for split, logps in found.items() if logps is not None}


def _cache_path(recipe: Recipe, name: str, fingerprint: str, split: str) -> Path:
    root = cache_folder(recipe) if recipe.cache_dir else user_cache()
    settings = f"{_model_fingerprint(name, recipe)}|{fingerprint}|{split}|{recipe.bf16}"
    if recipe.load_in_4bit or recipe.master_dtype != "float32":
        names = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "master_dtype")
        settings += f"|{[getattr(recipe, each) for each in names]}"
    key = hashlib.sha256(settings.encode()).hexdigest()[:20]
    return root / "reference" / f"{key}.logps"


def _model_fingerprint(name: str, recipe: Recipe) -> str:
    """A local model by the names, sizes and times of its weight files; a hub model by name and commit.

    Where rotary factors are those of `max_length` tokens, by that too.
    """
    folder = Path(name)
    config = load_pretrained(AutoConfig, name, recipe, what="configuration", key="ref_model_name_or_path")
    length = f"|max_length {recipe.max_length}" * follows_length(config)
    if not folder.is_dir():
        return f"{name}@{getattr(config, '_commit_hash', None) or recipe.model_revision}{length}"
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json"))
    return (
        "|".join([str(folder.resolve()), *(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)])
        + length
    )


def _read(path: Path, num_pairs: int) -> ReferenceLogps | None:
    """What is stored; None where nothing is, or what was not written so, which is removed with a line."""
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
        if hashlib.blake2b(content[:-_DIGEST_SIZE], digest_size=_DIGEST_SIZE).digest() != content[-_DIGEST_SIZE:]:
            raise ValueError("it is not as it was written")
        logps = ReferenceLogps(np.load(io.BytesIO(content)))
        if not logps.is_of(num_pairs):
            raise ValueError("it is of other pairs")
    except (OSError, ValueError, EOFError) as error:
        line = f"cached reference log-probs {path} are broken ({first_line(error)}); computing them again"
        say(line, Console(stderr=True))
        path.unlink(missing_ok=True)
        return None
    return logps


_DIGEST_SIZE = 16  # bytes, behind the array, which np.load does not look at


def _write(path: Path, logps: ReferenceLogps) -> None:
    content = io.BytesIO()
    np.save(content, logps.sums)
    digest = hashlib.blake2b(content.getbuffer(), digest_size=_DIGEST_SIZE).digest()
    try:
        write_whole(path, content.getvalue() + digest)
    except OSError as error:
        say(f"reference log-probs not cached: {error}", Console(stderr=True))
