"""The start-up check: log-probs of the rows that train, against the model's ordinary ones.

It finds architectures that do something after their head, or attend in a way, that this package does not reproduce.
Ordinary are the logits that transformers computes with its own attention for unpadded sequences. How far rounding alone
moves those is measured on the model, since it grows with its logits and depth and differs between precisions: in
bfloat16 it is around 0.08 nats of SmolLM2-135M, half of what a logit scale that is off by 2% makes.

Owns the probe rows, the noise and the verdict.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from simpo.core.batch import build_batch
from simpo.core.packing import TokenPair
from simpo.model.attention import is_packed, plain_attention, unwrap
from simpo.model.head import compute_token_logps
from simpo.parallel.mesh import Mesh, MeshSizes
from simpo.parallel.sharding import original_class

NOISE_FACTOR = 1.4
"""A layout may differ from the ordinary log-probs by this many times what rounding moves those by. Measured on
SmolLM2-135M in bfloat16, six draws of tokens: right ones differ by 0.8 to 1.1 times that, a rotary position that is off
by one by 1.6 to 3.1 times, a leak of one token by 3 to 11 times. Chosen and rejected responses are judged each for
themselves: a mistake may touch one kind only."""

DRAWS = 3
"""Draws of tokens that a layout gets where only that limit speaks against it, by no more than twice: right layouts pass
one of them, a fault of this size stays above the limit in each."""

OUTLIER_FACTOR = 4.0
"""The same for all labels. The limit above is for nine tenths of them: rounding moves a few labels far."""

FLOOR = 1e-4
"""Nats that are never held against a layout, however little rounding moves the model."""

SCALE_LIMIT = 0.008
"""The factor on the logits that explains the differences best may differ from 1 by this much. Noise averages out of it:
a scale that is off by 2% shows where single tokens hide it."""

# Tokens of the prompts, of all sequences with a chosen and of all with a rejected response. Sequences of one kind are
# equally long, so that they need no padding; the layouts that train see prompts and responses of many lengths.
_PROMPTS, _CHOSEN, _REJECTED = (12, 20, 8, 16), 52, 40


@dataclass(frozen=True)
class Agreement:
    """How a layout's log-probs compare with the ordinary ones."""

    # root mean square of the differences in nats, without the tenth of the labels that differ most; of chosen or of
    # rejected responses, whichever is larger
    rms: float
    rms_of_all: float  # with that tenth
    noise: float | None  # what rounding moves the ordinary ones by, as `rms`; None where it was not needed
    # the factors on the logits that would explain the differences best, one in the head and one behind it, each with
    # the nats (root of the sum of squares) by which a factor of 2 would show
    scales: tuple[tuple[float, float], ...]
    precision: torch.dtype  # what was computed in

    @property
    def limit(self) -> float:
        """The largest `rms` that is accepted."""
        return max(FLOOR, NOISE_FACTOR * (self.noise or 0.0))

    @property
    def is_good(self) -> bool:
        """Whether rounding explains the differences, which may be nan."""
        outliers_fit = self.rms_of_all <= self.limit * OUTLIER_FACTOR / NOISE_FACTOR
        return self.rms <= self.limit and outliers_fit and self._odd_scale is None

    @property
    def is_close(self) -> bool:
        """Whether another draw of tokens may show it good."""
        return replace(self, rms=self.rms / 2).is_good

    @property
    def _odd_scale(self) -> float | None:
        """The factor that is further from 1 than rounding leaves it, if there is one."""
        for scale, shows in self.scales:
            if not abs(scale - 1) <= max(SCALE_LIMIT, 5 * (self.noise or 0.0) / max(shows, 1e-12)):
                return scale
        return None

    def __str__(self) -> str:
        precision = str(self.precision).removeprefix("torch.")
        noise = "" if self.noise is None else f"; rounding alone makes {self.noise:.2g}"
        scale = "" if self._odd_scale is None else f", as if logits were scaled by {self._odd_scale:.3f}"
        return (
            f"differ from the model's ordinary ones by {self.rms_of_all:.2g} nats (rms, in {precision}{noise}){scale}"
        )


def check_forward(
    model: nn.Module, *, pack: bool = True, share_prompt: bool = True, bf16: bool = False, mesh: Mesh | None = None
) -> Agreement:
    """Refuse a model whose log-probs in a layout are not its ordinary ones.

    Args:
        model: as it will train, inside an engine or not; left in the mode it was in.
        pack, share_prompt: the layout that trains.
        bf16: compute under autocast to bfloat16; False = in what the model, its engine and the caller's context say.
        mesh: the processes that hold the model, all of which must call this; None = this one.
    Returns:
        How well they agree, in the precision that trains.
    Raises:
        ValueError: they do not, in that precision or in the model's own fp32; says whether the padded layout would.
    """
    found = probe_layout(model, pack=pack, share_prompt=share_prompt, bf16=bf16, mesh=mesh)
    if found.is_good:
        return found
    layout = "packed" if pack or share_prompt else "padded"
    kind = f"{original_class(unwrap(model)).__name__}: {layout} log-probs {found}"
    reason = "this architecture does something after its head or in its attention that is not supported here"
    if layout == "packed" and probe_layout(model, pack=False, share_prompt=False, bf16=bf16, mesh=mesh).is_good:
        raise ValueError(f"{kind}: {reason}; set pack and share_prompt to false: that layout agrees")
    also = ", with pack and share_prompt set to false as well" if layout == "packed" else ""
    raise ValueError(f"{kind}: {reason}{also}; it cannot be trained")


@torch.no_grad()
def probe_layout(
    model: nn.Module, *, pack: bool, share_prompt: bool, bf16: bool, mesh: Mesh | None = None
) -> Agreement:
    """Compare; arguments as in `check_forward`. The same verdict on every process.

    Whole fp32 weights that train under autocast are compared in fp32 first, where nothing hides in rounding.
    """
    probe, was_training = _Probe(model, mesh, pack=pack, share_prompt=share_prompt), model.training
    model.eval()
    try:
        if bf16 and _can_be_exact(model):
            with _precision(probe.device, bf16=True, exact=True):
                found = probe.compare()
            if not found.is_good:
                return found
        with _precision(probe.device, bf16=bf16):
            return probe.compare()
    finally:
        model.train(was_training)


@torch.no_grad()
def find_chance(
    model: nn.Module, *, pack: bool, share_prompt: bool, bf16: bool = False, mesh: Mesh | None = None
) -> tuple[str, float] | None:
    """Where two passes in train mode over the same rows first differ, by a module's name, and by how many nats (rms).

    Dropout before adapters is left out: it has a key of its own. What two passes in eval mode differ by is no chance:
    some kernels add in another order each time. Arguments as in `check_forward`; the same finding on every process.
    """
    probe, was_training = _Probe(model, mesh, pack=pack, share_prompt=share_prompt), model.training
    device = probe.device
    try:
        cards = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(cards), _precision(device, bf16=bf16, exact=_can_be_exact(model)):
            model.train()
            for name, module in model.named_modules():
                if "lora_dropout" in name:
                    module.eval()
            chance = probe.repeat()
            if chance == 0.0:
                return None
            first = probe.first_difference()
            model.eval()
            return None if chance <= max(1e-6, 4 * probe.repeat()) else (first, chance)
    finally:
        model.train(was_training)


class _Probe:
    """Probe pairs, and what a model on a mesh makes of them; `compare` is the whole of it."""

    def __init__(self, model: nn.Module, mesh: Mesh | None, **layout: bool) -> None:
        self.model, self.layout = model, layout
        self.device = unwrap(model).get_input_embeddings().weight.device
        self.mesh = mesh or Mesh(MeshSizes(), device=self.device)
        self.precision = torch.float32

    def repeat(self) -> float:
        """By how many nats (rms) two passes over the same rows differ, on the process where they differ most."""
        self._draw(seed=0)
        first, second = self._layout_logps(), self._layout_logps()
        return max(self.mesh.gather(float((first - second).double().square().mean().sqrt())))

    def first_difference(self) -> str:
        """The module in which two passes over the same rows part, as the first process sees it."""
        passes: list[list[tuple[str, str, float]]] = []
        for _ in range(2):
            with _traced(self.model) as events:
                self._layout_logps()
            passes.append(events)
        names = {name for name, _ in self.model.named_modules()}
        for (name, side, one), (_, _, other) in zip(*passes, strict=False):
            if one != other:
                return self.mesh.from_main(name if side == "out" or name not in names else name.rpartition(".")[0])
        return self.mesh.from_main("")

    def _draw(self, *, seed: int) -> None:
        config = unwrap(self.model).config.get_text_config()
        self.pairs = _probe_pairs(config.vocab_size, getattr(config, "max_position_embeddings", None), seed=seed)
        self.batch = build_batch(self.pairs, **self.layout)

    def compare(self) -> Agreement:
        """In the precision of the context that it is called in."""
        for seed in range(DRAWS):
            self._draw(seed=seed)
            found = self._compare_draw()
            if found.is_good or not found.is_close:
                break
        return found

    def _compare_draw(self) -> Agreement:
        ordinary, *slopes = self._ordinary()
        difference = self._layout_logps() - ordinary
        scales = tuple(_fit(difference, slope) for slope in slopes)
        rms, rms_of_all = self._rms(difference, share=0.9), self._rms(difference, share=1.0)
        found = self._of_all(Agreement(rms, rms_of_all, None, scales, self.precision))
        if found.is_good:
            return found
        noise = self._rms(self._rounded_logps() - ordinary, share=0.9)
        return self._of_all(replace(found, noise=noise))

    def _of_all(self, found: Agreement) -> Agreement:
        """One process's finding for all: if they went different ways, some would wait forever."""
        everyone = self.mesh.gather(found)
        return next((theirs for theirs in everyone if not theirs.is_good), everyone[0])

    def _rms(self, difference: Tensor, *, share: float) -> float:
        """Over that share of the chosen labels or of the rejected ones, whichever is larger; nan if any is nan."""
        responses = difference.double().split(self.batch.response_lengths.tolist())
        found = []
        for side in (0, 1):
            squares = torch.cat(responses[side::2]).square().sort().values  # nan comes last
            kept = squares[: math.ceil(share * len(squares))]
            found.append(kept.mean().sqrt() if not squares[-1].isnan() else squares[-1])
        return float(torch.stack(found).amax())

    def _layout_logps(self) -> Tensor:
        """Log-probs of all labels, in the layout and by the attention that train."""
        mine = self.mesh.own_rows(self.batch)
        logps = compute_token_logps(self.model, mine.to(self.device))
        if self.mesh.cp_group is None:
            return logps
        here = self.batch.source_rows // mine.num_tokens == self.mesh.cp_rank
        every = logps.new_zeros(len(here))
        every[here.to(self.device)] = logps
        dist.all_reduce(every, group=self.mesh.cp_group)
        return every

    def _ordinary(self) -> list[Tensor]:
        """What `_read` gives for all labels from ordinary logits, chosen and rejected in turn."""
        sides = []
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([getattr(pair, side) for pair in self.pairs])
            rows = zip(self._plain_logits(ids), ids.to(self.device), self.pairs, strict=True)
            sides.append([_read(logits[p.chosen_start - 1 : -1], row[p.chosen_start :]) for logits, row, p in rows])
        in_turn = [part for pair in zip(*sides, strict=True) for part in pair]
        return [torch.cat(column) for column in zip(*in_turn, strict=True)]

    def _rounded_logps(self) -> Tensor:
        """Log-probs of all labels from ordinary logits of one padded batch whose embeddings are rounded differently.

        The padded batch alone would give small models the very bits of the unpadded ones. Once the first rounding falls
        differently all later ones do, as in another layout on another kernel.
        """
        padded = build_batch(self.pairs, pack=False, share_prompt=False).to(self.device)
        generator = torch.Generator().manual_seed(1)

        def round_otherwise(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            wide = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
            factor = 1 + self._rounding() * (torch.rand(embedded.shape, generator=generator) - 0.5)
            return (wide * factor.to(self.device)).to(embedded.dtype)

        hook = unwrap(self.model).get_input_embeddings().register_forward_hook(round_otherwise)
        try:
            logits = self._plain_logits(padded.input_ids, attention_mask=padded.attention_mask)
        finally:
            hook.remove()
        return _read(logits.flatten(0, 1)[padded.source_rows], padded.labels)[0]

    def _plain_logits(self, ids: Tensor, **options: Any) -> Tensor:
        hook = unwrap(self.model).get_output_embeddings().register_forward_hook(self._note_precision)
        try:
            with plain_attention(self.model):
                return self.model(input_ids=ids.to(self.device), use_cache=False, **options).logits
        finally:
            hook.remove()

    def _note_precision(self, head: nn.Module, args: Any, logits: Tensor) -> None:
        """The head's own output says what is computed in: an engine may autocast inside its wrapper, then widen."""
        self.precision = logits.dtype

    def _rounding(self) -> float:
        """The distance of neighbouring numbers around 1, as products round them."""
        tf32 = self.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        return 2.0**-10 if tf32 and self.precision == torch.float32 else torch.finfo(self.precision).eps


@contextlib.contextmanager
def _traced(model: nn.Module) -> Iterator[list[tuple[str, str, float]]]:
    """Inside, what goes into and comes out of each module is noted in order: (name, "in" or "out", a sum of it)."""
    events: list[tuple[str, str, float]] = []

    def note(name: str, side: str, values: Any) -> None:
        floats = [v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()]
        events.append((name, side, sum(float(v.detach().double().abs().sum()) for v in floats)))

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: note(name, "in", args)))
        hooks.append(module.register_forward_hook(lambda _, args, out, name=name: note(name, "out", out)))
    try:
        yield events
    finally:
        for hook in hooks:
            hook.remove()


def _read(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From logits [n, V]: log-probs of the labels [n], and how a scale would make those that train differ.

    By 1 + x on the logits: x times the logit's distance from their mean. Behind a head that gives log-probs instead of
    logits: (1 + x) log p stands where the ordinary one is that of scaled logits, x times the entropy less.
    """
    logits = logits.float()
    every = logits.log_softmax(dim=-1)
    logps, logit = every.gather(1, labels[:, None])[:, 0], logits.gather(1, labels[:, None])[:, 0]
    in_head = logit - (every.exp() * logits).sum(dim=-1)
    return logps, in_head, logps - in_head


def _fit(difference: Tensor, slope: Tensor) -> tuple[float, float]:
    """The factor 1 + x with the least squares of difference - x slope, and the norm of the slope."""
    norm = float(slope.double().norm())
    return 1 + float((difference * slope).double().sum()) / max(norm, 1e-12) ** 2, norm


def _probe_pairs(vocabulary: int, max_positions: int | None, *, seed: int = 0) -> list[TokenPair]:
    """The same for every model of that vocabulary; shortened in proportion where a model takes fewer tokens."""
    generator = torch.Generator().manual_seed(seed)
    longest = min(_CHOSEN, max_positions or _CHOSEN)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    pairs = []
    for number, length in enumerate(_PROMPTS):
        start = max(1, length * longest // _CHOSEN)
        prompt = tokens(start)
        chosen, rejected = tokens(longest - start), tokens(_REJECTED * longest // _CHOSEN - start)
        pairs.append(TokenPair(f"probe-{number}", prompt + chosen, start, prompt + rejected, start))
    return pairs


def _precision(device: torch.device, *, bf16: bool, exact: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Autocast as the run has it; with `exact`, none."""
    if not bf16:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=not exact)


def _can_be_exact(model: nn.Module) -> bool:
    """Whether a pass without autocast is one in float32: every weight lies here, unsharded, in it."""
    attention = unwrap(model).config._attn_implementation
    takes_fp32 = is_packed(attention) or attention in ("sdpa", "eager")  # flash kernels do not
    return takes_fp32 and all(
        p.dtype == torch.float32 and not (p.is_meta or isinstance(p, DTensor) or hasattr(p, "ds_id"))
        for p in model.parameters()
    )
