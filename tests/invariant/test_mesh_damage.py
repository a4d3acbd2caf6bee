"""A checkpoint that is not what was saved is noticed, on every process alike and before any of them waits for ever."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mesh_runs import TIED, Settings, build, error_of, errors_of, train_and_save
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from simpo.run.digest import record_files

Q = "model.layers.{}.self_attn.q_proj.weight"
MOMENT = "state.{}.{}"


def save_with_an_identity(settings: Settings) -> str:
    """A checkpoint in which rows of one weight have equal sums, as a permutation's have."""
    trainer = build(settings)
    trainer.train_step(next(trainer.loader.plans(0, 1)))
    with torch.no_grad():
        weight = dict(trainer.model.named_parameters())[Q.format(0)]
        weight.copy_(torch.eye(*weight.shape))
    return str(trainer.save().folder)


def flip_a_bit(state: dict[str, dict[str, Any]]) -> None:
    words = state["model"][Q.format(1)].view(torch.int32)
    words[3, 5] ^= 1  # the last bit of the mantissa


def flip_a_sign(state: dict[str, dict[str, Any]]) -> None:
    state["model"][Q.format(1)][0, 0] *= -1


def swap_two_rows(state: dict[str, dict[str, Any]]) -> None:
    weight = state["model"][Q.format(1)]
    weight[[2, 7]] = weight[[7, 2]]


def swap_two_rows_of_the_identity(state: dict[str, dict[str, Any]]) -> None:
    weight = state["model"][Q.format(0)]
    weight[[0, 1]] = weight[[1, 0]]


def transpose_a_square(state: dict[str, dict[str, Any]]) -> None:
    state["model"][Q.format(1)] = state["model"][Q.format(1)].T.contiguous()


def exchange_two_tensors(state: dict[str, dict[str, Any]]) -> None:
    _exchange(state["model"], Q.format(0), Q.format(1))


def exchange_two_moments(state: dict[str, dict[str, Any]]) -> None:
    name = Q.format(1)
    _exchange(state["optimizer"], MOMENT.format(name, "exp_avg"), MOMENT.format(name, "exp_avg_sq"))


def exchange_two_layers_moments(state: dict[str, dict[str, Any]]) -> None:
    _exchange(state["optimizer"], *(MOMENT.format(Q.format(layer), "exp_avg") for layer in (0, 1)))


def count_a_step_less(state: dict[str, dict[str, Any]]) -> None:
    state["optimizer"][MOMENT.format(Q.format(1), "step")] -= 1


def _exchange(tensors: dict[str, Tensor], one: str, other: str) -> None:
    assert not torch.equal(tensors[one], tensors[other])
    tensors[one], tensors[other] = tensors[other], tensors[one]


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a checkpoint's files hold, and leave them in perfect order."""
    one_file = checkpoint / "whole.pt"
    with warnings.catch_warnings():  # dcp says each time that it assumes a single process
        warnings.simplefilter("ignore")
        dcp_to_torch_save(checkpoint / "tensors", one_file)
        state = torch.load(one_file, weights_only=False)
        change(state)
        torch.save(state, one_file)
        shutil.rmtree(checkpoint / "tensors")
        torch_save_to_dcp(one_file, checkpoint / "tensors")
    one_file.unlink()
    record_files(checkpoint)


CHANGES = [
    flip_a_bit,
    flip_a_sign,
    swap_two_rows,
    swap_two_rows_of_the_identity,
    transpose_a_square,
    exchange_two_tensors,
    exchange_two_moments,
    exchange_two_layers_moments,
    count_a_step_less,
]


def test_every_change_of_the_saved_values_is_noticed(settings_of, tmp_path):
    saved = Path(save_with_an_identity(settings_of("1 process", TIED)))
    rewrite(saved, lambda state: None)
    copies = [tmp_path / change.__name__ / saved.name for change in CHANGES]
    for change, copy in zip(CHANGES, copies, strict=True):
        shutil.copytree(saved, copy)
        rewrite(copy, change)
    settings = settings_of("1 process", TIED, name="resumed")
    fine, *errors = errors_of(settings, str(saved), *map(str, copies))
    assert fine == ("nothing", "")  # the rewriting itself is not what is noticed
    for change, (kind, text) in zip(CHANGES, errors, strict=True):
        assert kind == "ValueError", change.__name__
        assert "is damaged: its tensors are not the ones that were saved" in text
        assert "\n" not in text


def test_a_changed_bit_is_noticed_by_every_rank(two_ranks, settings_of):
    saved = two_ranks.run(train_and_save, settings_of("fsdp2", TIED), 1)[0]["folder"]
    rewrite(Path(saved), flip_a_bit)
    settings = settings_of("tp2", TIED, name="resumed")
    for kind, text in two_ranks.run(error_of, settings, saved):
        assert kind == "ValueError"
        assert "is damaged: its tensors are not the ones that were saved" in text


def _remove(path: Path) -> None:
    path.unlink()


def _cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _overwrite_the_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(content))


def _overwrite_all(path: Path) -> None:
    path.write_bytes(b"\x00" * path.stat().st_size)


HARMS = [
    ("tensors/__1_0.distcp", _remove, "No such file or directory"),
    ("tensors/__1_0.distcp", _cut_short, "EOFError"),
    ("tensors/__1_0.distcp", _overwrite_the_middle, "damaged"),
    ("tensors/__1_0.distcp", _overwrite_all, "cannot be loaded"),
    ("tensors/.metadata", _remove, "is damaged: tensors/.metadata is missing"),
    ("tensors/.metadata", _cut_short, "is damaged: tensors/.metadata is not as it was saved"),
    ("rng-1.json", _remove, "is damaged: rng-1.json is missing"),
    ("rng-1.json", _cut_short, "is damaged: rng-1.json is not as it was saved"),
    ("files.json", _remove, "is damaged: [Errno 2] No such file or directory"),
    ("files.json", _cut_short, "is damaged: "),
    ("trainer_state.json", _remove, "is not a complete checkpoint"),
    ("trainer_state.json", _cut_short, "is not a complete checkpoint"),
]


@pytest.fixture
def saved(two_ranks, settings_of) -> Path:
    """A checkpoint of two processes."""
    return Path(two_ranks.run(train_and_save, settings_of("fsdp2", TIED, name="whole"), 1)[0]["folder"])


def test_a_file_that_one_rank_cannot_read_stops_every_rank_with_one_line(saved, two_ranks, settings_of, tmp_path):
    copies = [tmp_path / f"harm {index}" / saved.name for index in range(len(HARMS))]
    for (file, harm, _), copy in zip(HARMS, copies, strict=True):
        shutil.copytree(saved, copy)
        harm(copy / file)
    one, other = two_ranks.run(errors_of, settings_of("fsdp2", TIED, name="resumed"), *map(str, copies))
    assert one == other
    for (file, harm, said), copy, (kind, text) in zip(HARMS, copies, one, strict=True):
        assert kind == "ValueError", (file, harm)
        assert str(copy) in text
        assert said in text
        assert "\n" not in text


def error_where_one_rank_cannot_read(settings: Settings, checkpoint: str) -> tuple[str, str]:
    """As `error_of`, with a file system that fails under the last rank."""
    from torch.distributed.checkpoint import FileSystemReader

    read_data = FileSystemReader.read_data

    def fail(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    if dist.get_rank() == dist.get_world_size() - 1:
        FileSystemReader.read_data = fail
    try:
        return error_of(settings, checkpoint)
    finally:
        FileSystemReader.read_data = read_data


def test_a_file_system_that_fails_under_one_rank_stops_every_rank(saved, two_ranks, settings_of):
    settings = settings_of("fsdp2", TIED, name="resumed")
    answers = two_ranks.run(error_where_one_rank_cannot_read, settings, str(saved))
    assert len(set(answers)) == 1, answers
    kind, text = answers[0]
    assert kind == "ValueError"
    assert "cannot be loaded into this model: rank 1: [Errno 5] Input/output error; no other one in " in text
