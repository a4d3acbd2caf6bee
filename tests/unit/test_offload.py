"""model.offload: the same gradients bit for bit, activations moved once each, weights never."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from simpo.model.offload import offload_activations


def anything(tensor: Tensor) -> bool:
    """Stands in for "is on a GPU" where there is none."""
    return True


class Block(nn.Module):
    """Two projections that save the same input, a product, and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width, bias=False)
        self.down, self.norm = nn.Linear(2 * width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(16), nn.Dropout(0.5), Block(16))


def gradients(model: nn.Module, context=None, *, autocast: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 50, 16)
    if context is None:
        out = model(x)
    else:
        with context, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
    out.float().square().sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def test_gradients_are_the_same_bit_for_bit():
    model = make_model()
    expected = gradients(model)
    with offload_activations(model, eligible=anything, min_bytes=1) as offload:
        torch.manual_seed(1)
        out = model(torch.randn(2, 50, 16))
    assert offload.num_tensors > 0
    out.square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_no_weight_is_moved_nor_its_bf16_copy(monkeypatch, autocast):
    from simpo.model import offload as module

    model = make_model()
    moved: list[Tensor] = []
    copy_to_cpu = module._copy_to_cpu
    monkeypatch.setattr(module, "_copy_to_cpu", lambda t: moved.append(t) or copy_to_cpu(t))
    gradients(model, offload_activations(model, eligible=anything, min_bytes=1), autocast=autocast)
    weights = {tuple(p.shape) for p in model.parameters()}
    assert moved
    assert not [t.shape for t in moved if tuple(t.shape) in weights or tuple(t.shape)[::-1] in weights]
    assert not {t.untyped_storage().data_ptr() for t in moved} & {
        p.untyped_storage().data_ptr() for p in model.parameters()
    }


def test_weights_put_in_place_for_the_step_are_weights_too():
    """A view of a swapped-in copy (its transpose is what a linear layer saves) shares the copy's storage."""
    linear = nn.Linear(30, 20, bias=False)
    linear._parameters["weight"] = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
    x = torch.randn(7, 30, dtype=torch.bfloat16, requires_grad=True)
    with offload_activations(linear, eligible=anything, min_bytes=1) as offload:
        linear(x * 1.0)
    assert offload.num_bytes == 0  # only the weight is saved, since nothing else needs a gradient


def test_a_tensor_that_several_operations_save_is_moved_once():
    x = torch.randn(100, 10, requires_grad=True)
    weights = nn.ParameterList([torch.randn(10, 3) for _ in range(3)])
    with offload_activations(weights, eligible=anything, min_bytes=1) as offload:
        h = x * 2.0
        total = sum((h @ w).sum() for w in weights)
    assert (offload.num_tensors, offload.num_bytes) == (1, h.numel() * 4)
    total.backward()
    assert all(torch.equal(w.grad, (x * 2.0).t() @ torch.ones(100, 3)) for w in weights)


def test_what_was_copied_out_is_copied_back_once_and_a_little_ahead_of_its_use(monkeypatch):
    from simpo.model import offload as module

    torch.manual_seed(0)
    model = nn.Sequential(*[Block(16) for _ in range(6)])
    with offload_activations(model, eligible=anything, min_bytes=1) as offload:
        out = model(torch.randn(2, 50, 16))
    restored: list[int] = []
    ahead: list[int] = []
    restore, fetch = offload.restore, module.Offload._fetch

    def watched(on_host):
        restored.append(on_host.place)
        tensor = restore(on_host)
        ahead.append(sum(each().values.nbytes for each in offload._ahead))
        return tensor

    fetched: list[int] = []
    monkeypatch.setattr(module.Offload, "_fetch", lambda self, each: fetched.append(each.place) or fetch(self, each))
    monkeypatch.setattr(offload, "restore", watched)
    out.square().sum().backward()
    assert len(restored) > offload.num_tensors == len(fetched) == len(set(fetched))  # several uses, one copy
    assert offload.num_bytes_back == offload.num_bytes
    assert fetched == sorted(fetched, reverse=True)
    largest = 2 * 50 * 32 * 4
    assert 0 < max(ahead) <= max(offload.num_bytes // 8, largest)
    assert all(each() is None for each in offload._order)  # with the graph, both copies are gone


class Stream:
    """In place of a CUDA stream: writes down what it is told."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: Stream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits until {event}")

    def record_event(self) -> str:
        self.told.append(f"{self.name} has copied")
        return "it is back"


def test_a_copy_back_waits_for_the_copy_out_and_its_use_for_the_copy_back(monkeypatch):
    from simpo.model import offload as module

    told: list[str] = []
    main, back = Stream("main", told), Stream("back", told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: told.append(f"memory is {stream.name}'s too"))
    monkeypatch.setattr(module, "_stream", lambda device, name: back)
    values = torch.randn(3)
    on_host = module._CpuCopy(values, torch.device("cpu"), 0, copied="it is out")
    offload = module.Offload()
    assert torch.equal(offload.restore(on_host), values)
    once = ["back waits for main", "back waits until it is out", "back has copied", "memory is back's too"]
    assert told == [*once, "main waits until it is back"]
    offload.restore(on_host)
    assert told == [*once, "main waits until it is back", "main waits until it is back"]


def test_copies_that_came_back_are_freed_with_their_last_use():
    model = nn.Sequential(*[Block(16) for _ in range(6)])
    with offload_activations(model, eligible=anything, min_bytes=1) as offload:
        x = torch.randn(2, 50, 16, requires_grad=True)
        h, alive = x, []
        for block in model:
            h = block(h)
            h.register_hook(
                lambda grad: alive.append(
                    sum(each() is not None and each().back is not None for each in offload._order)
                )
            )
    h.square().sum().backward()
    per_block = offload.num_tensors / 6
    assert len(alive) == 6
    assert max(alive) <= 2 * per_block


def test_a_graph_that_is_kept_gives_the_same_gradients_twice_from_one_copy():
    model = make_model()
    with offload_activations(model, eligible=anything, min_bytes=1) as offload:
        out = model(torch.randn(2, 50, 16)).square().sum()
    first = torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(out, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert offload.num_bytes_back == offload.num_bytes


def test_a_tensor_changed_in_place_between_two_saves_is_two_tensors():
    weights = nn.ParameterList([torch.randn(4, 1) for _ in range(2)])
    h = torch.ones(8, 4, 4)
    with offload_activations(weights, eligible=anything, min_bytes=1) as offload:
        first = (h @ weights[0]).sum()
        h.mul_(3.0)
        second = (h @ weights[1]).sum()
    assert offload.num_tensors >= 2
    (first + second).backward()
    assert torch.equal(weights[1].grad, 3.0 * weights[0].grad)


def test_memory_reused_by_another_tensor_is_not_mistaken_for_the_first():
    weight = nn.Parameter(torch.ones(3, 1))
    with offload_activations(nn.ParameterList([weight]), eligible=anything, min_bytes=1):
        outs = []
        for value in range(50):  # freed at once, so the allocator hands out the same addresses again
            outs.append((torch.full((2, 5, 3), float(value)) @ weight).sum())
    sum(outs).backward()
    assert torch.equal(weight.grad, torch.full((3, 1), 10.0 * sum(range(50))))


def test_small_tensors_and_those_elsewhere_stay():
    model = make_model()
    with offload_activations(model, eligible=anything) as offload:
        model(torch.randn(2, 50, 16))
    assert offload.num_tensors == 0
    with offload_activations(model, min_bytes=1) as offload:
        model(torch.randn(2, 50, 16))
    assert offload.num_tensors == 0


def test_views_come_back_with_their_values():
    weight = nn.Parameter(torch.randn(2, 6, 5))
    x = torch.randn(6, 2, 40, requires_grad=True)
    for view in (lambda t: t.transpose(0, 1), lambda t: t[:2, :, 1:7].expand(2, 2, 6)):
        plain, moved = [], []
        for grads, eligible in ((plain, lambda t: False), (moved, anything)):
            with offload_activations(nn.ParameterList([weight]), eligible=eligible, min_bytes=1):
                h = view(x * 1.0)
                out = (h.transpose(1, 2) @ h).square().sum() + (weight[:, :, 0].sum() * h).sum()
            grads.extend(torch.autograd.grad(out, [x, weight]))
        assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


def test_under_checkpointing_only_the_inputs_of_blocks_travel():
    from torch.utils.checkpoint import checkpoint

    model = make_model()
    expected = gradients(model)
    torch.manual_seed(1)
    x = torch.randn(2, 50, 16)
    with offload_activations(model, eligible=anything, min_bytes=1) as offload:
        h = checkpoint(model[0], x, use_reentrant=False)
        out = checkpoint(model[2], model[1](h), use_reentrant=False)
    # The inputs of both blocks, and the dropout's mask between them.
    assert offload.num_bytes <= 2 * x.numel() * 4 + x.numel() * 4
    assert offload.num_tensors >= 2
    out.square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_on_cuda_memory_falls_and_gradients_stay(autocast):
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(256) for _ in range(6)]).cuda()
    x = torch.randn(1, 8192, 256, device="cuda")
    peaks, results = [], []
    for offloading in (False, True):
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            moving = offload_activations(model, min_bytes=2**16 if offloading else 2**60)
            with moving as offload, torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                out = model(x)
            held = torch.cuda.memory_allocated()
            out.float().square().sum().backward()
            results.append([p.grad.clone() for p in model.parameters()])
            model.zero_grad()
        peaks.append(held)
    assert offload.num_bytes > 2**26
    assert peaks[1] < 0.6 * peaks[0]
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))
