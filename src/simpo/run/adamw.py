"""AdamW whose moments, and where wanted weights, are bfloat16 without losing what is smaller than their last bit.

Rounding to nearest drops every change below half a unit in the last place: at beta2 = 0.999 the second moment of a
bfloat16 AdamW stands still, and at a learning rate of 1e-6 so do its weights. Rounding up or down at random, with
the probability that makes the expected value right, loses nothing on average.

Must not import data, the trainer or evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from simpo.parallel.sharding import local_part
from simpo.run.cpu_memory import empty_on_cpu

# Elements worked on at one time. Temporaries take about 40 bytes for each: CPU pieces fit a cache, CUDA pieces hide
# the cost of launching kernels within a third of a GiB.
PIECE = {"cpu": 2**17, "cuda": 2**23}

_Slice = tuple[Tensor, Tensor, Tensor, Tensor]  # flat parts of a weight, its gradient, first and second moment


class AdamWBf16(torch.optim.Optimizer):
    """AdamW with bfloat16 moments, computed in fp32 and written with stochastic rounding.

    fp32 weights are updated as ever. bfloat16 weights are updated in fp32 and rounded stochastically as well, so that
    steps far below their precision add up. A weight costs 4 bytes of moments instead of 8.

    The random bits of a step follow from `seed` (kept in the parameter groups) and the step's number (kept in the
    state), so a `state_dict` holds all there is to know: a resumed run draws what an uninterrupted one would. torch's
    global generators are not touched.

    Args:
        params: fp32 or bfloat16 parameters, or groups of them.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        seed: of the rounding.
        piece_numel: elements worked on at one time; None = by device. Part of what decides the random bits.
        offload: keep the moments in CPU memory, pinned where weights are on a GPU. Each piece's come to the device
            for its update and go back, while its neighbours are computed. The bits are the same.
    Raises:
        ValueError: a parameter is neither fp32 nor bfloat16.
    Source: stochastic rounding of bfloat16 weights, arXiv:2010.06192.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        piece_numel: int | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})
        self._piece_numel = piece_numel
        self._offload = offload
        self._ferries: dict[torch.device, _Ferry] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype not in (torch.float32, torch.bfloat16):
                    raise ValueError(f"AdamWBf16 updates float32 and bfloat16 weights, not {p.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group_index, group in enumerate(self.param_groups):
            batches = self._advance(group)
            for batch_index, ((step, dtype, device), tensors) in enumerate(batches.items()):
                limit = self._piece_numel or PIECE.get(device.type, PIECE["cuda"])
                generator = torch.Generator(device)
                pieces = _pieces(tensors, limit)
                if self._offload:
                    if device not in self._ferries:
                        self._ferries[device] = _Ferry(device, limit)
                    pieces = self._ferries[device].carry(pieces)
                for piece_index, piece in enumerate(pieces):
                    generator.manual_seed(_seed_of(group["seed"], step, group_index, batch_index, piece_index))
                    _update(piece, step, group, generator, round_weights=dtype == torch.bfloat16)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim.Optimizer, but the moments stay bfloat16, and in CPU memory if that is their place."""
        self._wait_for_host()
        load_state_as_saved(self, state_dict, place=_on_host if self._offload else None)

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim.Optimizer, once all moments are back in CPU memory."""
        self._wait_for_host()
        return super().state_dict()

    def _wait_for_host(self) -> None:
        for ferry in self._ferries.values():
            ferry.wait()

    def _moment(self, p: Tensor) -> Tensor:
        if self._offload:
            return empty_on_cpu(p, dtype=torch.bfloat16).zero_()
        return torch.zeros_like(p, dtype=torch.bfloat16)

    def _advance(self, group: dict[str, Any]) -> dict[tuple[int, torch.dtype, torch.device], list[_Slice]]:
        """Count a step for each parameter with a gradient; flat tensors by (step, dtype of weight, device)."""
        batches: dict[tuple[int, torch.dtype, torch.device], list[_Slice]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = self._moment(p), self._moment(p)
            state["step"] += 1
            # A step has no sums, so the parts of a sharded weight need nothing of each other.
            tensors = (p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"])
            weight, grad, first, second = map(local_part, tensors)
            # Gradients may have strides of their own; the others are written to, so they must be views.
            flat = (weight.view(-1), grad.reshape(-1), first.view(-1), second.view(-1))
            batches.setdefault((int(state["step"]), p.dtype, weight.device), []).append(flat)
        return batches


def load_state_as_saved(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    *,
    place: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Load an optimizer's state in the dtypes it was saved in; torch would give all of it the weights' dtype.

    Args:
        place: from a tensor and the parameter it belongs to, to the tensor to keep; None = on the parameter's device.
    """
    place = place or (lambda value, p: value.to(p.device))
    torch.optim.Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}})
    saved = [key for group in state_dict["param_groups"] for key in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, p in zip(saved, parameters, strict=True):
        if key in state_dict["state"]:
            optimizer.state[p] = {
                name: place(value, p) if isinstance(value, Tensor) and name != "step" else value
                for name, value in state_dict["state"][key].items()
            }


def _on_host(value: Tensor, p: Tensor) -> Tensor:
    """A saved moment of `p` in CPU memory, pinned where that helps: itself if it is."""
    if value.device.type == "cpu" and (not p.is_cuda or value.is_pinned()):
        return value
    return empty_on_cpu(p, dtype=value.dtype).copy_(value)


class _Ferry:
    """Carries the moments of one piece after the other from CPU memory to a device and back.

    There are two berths: while a piece is updated in one, the next arrives in the other. On a GPU both directions are
    streams of their own, so that they overlap with the computation and with each other; torch.cpu's do nothing.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._berths = torch.empty(2, 2, limit, dtype=torch.bfloat16, device=device)
        self._device, self._module = device, torch.get_device_module(device)
        self._here, self._back = self._module.Stream(device), self._module.Stream(device)
        self._left = [self._back.record_event(), self._back.record_event()]  # when each berth's last piece was gone

    def carry(self, pieces: Iterable[list[_Slice]]) -> Iterator[list[_Slice]]:
        """The pieces with their moments on the device; what is there when the next is asked for goes back."""
        current = self._module.current_stream(self._device)
        self._here.wait_stream(self._back)  # what the last update left
        self._here.wait_stream(current)  # whoever had this memory before
        arriving = (self._fetch(piece, number % 2) for number, piece in enumerate(pieces))
        ahead = next(arriving, None)
        while ahead is not None:
            (piece, berth, on_device, arrived), ahead = ahead, next(arriving, None)
            current.wait_event(arrived)
            yield on_device
            self._back.wait_stream(current)
            with self._module.stream(self._back):
                for (_, _, first, second), (_, _, new_first, new_second) in zip(piece, on_device, strict=True):
                    first.copy_(new_first, non_blocking=True)
                    second.copy_(new_second, non_blocking=True)
                self._left[berth] = self._back.record_event()

    def wait(self) -> None:
        """Until all that was carried back is in CPU memory."""
        self._module.synchronize(self._device)

    def _fetch(self, piece: list[_Slice], berth: int) -> tuple[list[_Slice], int, list[_Slice], Any]:
        """The piece, its berth, the piece with its moments in there, and when they have arrived."""
        sizes = [weight.numel() for weight, *_ in piece]
        firsts, seconds = (row[: sum(sizes)].split(sizes) for row in self._berths[berth])
        on_device = [
            (weight, grad, to_first, to_second)
            for (weight, grad, _, _), to_first, to_second in zip(piece, firsts, seconds, strict=True)
        ]
        with self._module.stream(self._here):
            self._here.wait_event(self._left[berth])
            for (_, _, first, second), (_, _, to_first, to_second) in zip(piece, on_device, strict=True):
                to_first.copy_(first, non_blocking=True)
                to_second.copy_(second, non_blocking=True)
            return piece, berth, on_device, self._here.record_event()


def stochastic_round(values: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bfloat16, up with the probability that keeps the expected value.

    A bfloat16 is the upper half of an fp32. Adding 16 random bits to the lower half and cutting it off carries into
    the upper half with probability lower half / 2**16, in magnitude, whatever the sign. Values that bfloat16 has are
    returned unchanged, and so are infinities and NaN.

    Args:
        values: fp32.
        bits: int32 of the same shape, uniform in [0, 65536).
    Returns:
        bfloat16, of the same shape.
    """
    carried = ((values.view(torch.int32) + bits) & -65536).view(torch.float32)
    return torch.where(values.isfinite(), carried, values).to(torch.bfloat16)


def _update(
    piece: list[_Slice], step: int, group: dict[str, Any], generator: torch.Generator, *, round_weights: bool
) -> None:
    """One AdamW step of one piece; Kingma and Ba's algorithm 1 with decoupled weight decay."""
    weights, grads, firsts, seconds = zip(*piece, strict=True)
    beta1, beta2 = group["betas"]
    grad, first, second = (torch.cat(tensors).float() for tensors in (grads, firsts, seconds))
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight = torch.cat(weights).float()
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.addcdiv_(first, denominator, value=-group["lr"] / (1 - beta1**step))

    # One 63-bit draw an element holds three independent groups of 16.
    draw = torch.empty(weight.numel(), dtype=torch.int64, device=weight.device).random_(generator=generator)
    bits = draw.view(torch.int16).view(-1, 4)
    _scatter(stochastic_round(first, bits[:, 0].int() & 0xFFFF), firsts)
    _scatter(stochastic_round(second, bits[:, 1].int() & 0xFFFF), seconds)
    _scatter(stochastic_round(weight, bits[:, 2].int() & 0xFFFF) if round_weights else weight, weights)


def _scatter(values: Tensor, targets: tuple[Tensor, ...]) -> None:
    torch._foreach_copy_(list(targets), list(values.split([t.numel() for t in targets])))


def _pieces(tensors: list[_Slice], limit: int) -> Iterator[list[_Slice]]:
    """Large tensors cut, small ones together: pieces of `limit` elements, the last one smaller."""
    piece: list[_Slice] = []
    room = limit
    for parts in tensors:
        start, numel = 0, parts[0].numel()
        while start < numel:
            end = min(numel, start + room)
            weight, grad, first, second = (t[start:end] for t in parts)
            piece.append((weight, grad, first, second))
            room -= end - start
            start = end
            if not room:
                yield piece
                piece, room = [], limit
    if piece:
        yield piece


def _seed_of(*numbers: int) -> int:
    """One seed from several numbers, without the patterns that their sum would have."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1
