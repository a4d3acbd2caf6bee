"""The log-prob head: a model's own output layer that gives log-probs of labels, and a batch's log-probs through it.

That these and packed attention agree with the model's ordinary forward pass is checked in `model.probe`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from simpo.core.batch import PackedPairs
from simpo.core.context import sum_over
from simpo.core.device import move
from simpo.core.experts import router_losses
from simpo.core.logprobs import VocabShard, at_most_mean, logit_gradient_squares, response_logps, token_logps
from simpo.core.losses import ListLogps, PairLogps
from simpo.model.attention import PACKED, is_packed, plain_attention, unwrap
from simpo.model.costs import experts_per_token
from simpo.model.low_memory import READ_ROWS
from simpo.parallel.sharding import original_class, swap_class


def _find_transforms(base: PreTrainedModel) -> tuple[float, float | None, list[tuple[Any, str, float | None]]]:
    """What this architecture does to logits after `lm_head`, read from its configuration.

    Returns:
        The scale, the soft-cap after it (None = none), and the attributes that say so: owner, name, neutral value.
    """
    config, inner = base.config.get_text_config(), getattr(base, "model", None)
    scale, softcap = 1.0, getattr(config, "final_logit_softcapping", None)
    attributes = [] if softcap is None else [(config, "final_logit_softcapping", None)]
    divides = "hyperclovax" not in config.model_type
    # Cohere keeps its scale on the model, Falcon-H1 on the model within.
    for owner, name in ((config, "logits_scaling"), (base, "logit_scale"), (inner, "lm_head_multiplier")):
        value = getattr(owner, name, None)
        if isinstance(value, int | float) and value != 1.0:
            scale *= 1.0 / value if owner is config and divides else value
            attributes.append((owner, name, 1.0))
    return scale, softcap, attributes


class LogprobHead(nn.Linear):
    """The model's own `lm_head`, its class swapped: log-probs of given labels when asked for, logits otherwise.

    The parameters, their names and their tying stay as they were, so saving, LoRA and sharding do not notice.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [R, T, D] -> logits [R, T, V]; inside `labels_in_head`, token log-probs [1, N] or [2, N] fp32."""
        request: tuple[PackedPairs, dict[str, Any]] | None = self.__dict__.get("_request")
        if request is None:
            return (self.__dict__.get("_logits_over_ranks") or super().forward)(hidden)
        batch, options = request
        rows = hidden.flatten(0, -2).index_select(0, batch.source_rows)
        device_type = hidden.device.type
        compute = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        weight, bias, shard = _own_rows(self.weight, self.bias)
        logps = token_logps(rows, weight, batch.labels, bias=bias, shard=shard, compute_dtype=compute, **options)
        return logps if options["squares"] else logps[None].clone()  # what FSDP2 hands on must not be a view


def _own_rows(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabShard | None]:
    """This process's rows of an output embedding, with their bias, and where they lie; whole ones as they are."""
    if not isinstance(weight, DTensor):
        return weight, bias, None
    mesh = weight.device_mesh
    if mesh.ndim != 1 or weight.placements != (Shard(0),):
        raise ValueError(f"the output head is sharded as {weight.placements}; only its rows can be (Shard(0))")
    _, start = Shard.local_shard_size_and_offset(weight.shape[0], mesh.size(), mesh.get_local_rank())
    shard = VocabShard(mesh.get_group(), start, weight.shape[0])
    return weight.to_local(), bias.to_local() if isinstance(bias, DTensor) else bias, shard


def install_head(model: nn.Module) -> LogprobHead:
    """Swap the class of the model's output embedding for `LogprobHead`; idempotent.

    Raises:
        ValueError: the head is not a plain nn.Linear (adapters or quantisation on it, or no head at all).
    """
    head = unwrap(model).get_output_embeddings()
    if isinstance(head, LogprobHead):
        return head
    if head is None or original_class(head) is not nn.Linear:
        raise ValueError(
            f"{original_class(unwrap(model)).__name__} has a {type(head).__name__} as output embedding, not a plain "
            "linear layer; remove lm_head from lora_target_modules, lora_modules_to_save and quantisation"
        )
    swap_class(head, LogprobHead)
    if "forward" in head.__dict__:  # transformers' tensor parallelism puts its own on the instance
        head.__dict__["_logits_over_ranks"] = head.__dict__.pop("forward")
    return head


@contextlib.contextmanager
def labels_in_head(
    model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None, squares: bool = False
) -> Iterator[None]:
    """Inside, `model(...).logits` are the log-probs of the batch's labels, [1, N]; with `squares` as `token_logps`.

    Scales and soft-caps that the architecture applies after its head are done in the head and switched off behind it.
    """
    head = install_head(model)
    scale, softcap, attributes = _find_transforms(unwrap(model))
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in attributes]
    for owner, name, neutral in attributes:  # past those that check what they are set to
        if name not in vars(owner):
            raise ValueError(f"{original_class(unwrap(model)).__name__}: its {name} cannot be moved into the head")
        vars(owner)[name] = neutral
    options = {"scale": scale, "softcap": softcap, "chunk_size": chunk_size, "squares": squares}
    head.__dict__["_request"] = batch, options
    try:
        yield
    finally:
        head.__dict__["_request"] = None
        for owner, name, value in saved:
            vars(owner)[name] = value


def compute_token_logps(model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None) -> Tensor:
    """Log-probs of the batch's labels, [N] fp32, through one forward pass.

    Raises:
        ValueError: rows that share a prefix or are packed, on a model whose attention is not ours. Restarted positions
            without our mask would silently be taken for separate documents.
    """
    return _forward(model, batch, chunk_size=chunk_size).logits.squeeze(0)


def _forward(
    model: nn.Module, batch: PackedPairs, *, chunk_size: int | None, squares: bool = False, **options: Any
) -> Any:
    """The model's output, with log-probs of the labels [1, N] in place of logits; see `labels_in_head`."""
    base = unwrap(model)
    implementation = base.config._attn_implementation
    if batch.blocks is not None and not is_packed(implementation):
        raise ValueError(
            f"packed or shared-prompt rows need attention {PACKED!r}, not {implementation!r}; load the model with "
            f"attn_implementation={PACKED!r}, or set pack: false and share_prompt: false"
        )
    if batch.blocks is None:
        inputs, attention = {"attention_mask": batch.attention_mask}, plain_attention(model)
    else:  # blocks without a use for the rows that are read ignore them, like packed_blocks
        inputs, attention = {"packed_blocks": batch.blocks, READ_ROWS: batch.read_rows}, contextlib.nullcontext()
        # Without a mask transformers looks for packed rows in the positions, and waits for the device to tell.
        inputs["attention_mask"] = torch.ones_like(batch.input_ids, dtype=torch.bool)
        inputs["position_ids"] = batch.position_ids  # elsewhere the model counts, from the number that it begins at
    inputs |= {"input_ids": batch.input_ids, "use_cache": False, **options}
    with attention, labels_in_head(model, batch, chunk_size=chunk_size, squares=squares):
        output = model(**inputs)
    if output.logits.dtype in (torch.bfloat16, torch.float16):  # the head gives float32
        raise ValueError(f"the engine around the model rounds log-probs to {output.logits.dtype}; they need float32")
    return output


def compute_response_logps(
    model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Summed log-probs [S] fp32 and lengths [S] int64 of the batch's S responses, pairs or lists, in its order.

    A batch may be spread over ranks (`core.context`); all of them get the same sums.
    """
    return _response_sums(compute_token_logps(model, batch, chunk_size=chunk_size), batch), batch.response_lengths


def _response_sums(values: Tensor, batch: PackedPairs) -> Tensor:
    """[S] sums over each response of a value [N] of each of its tokens that is here."""
    here = batch.response_lengths if batch.local_lengths is None else batch.local_lengths
    sums = response_logps(values, here)
    if batch.blocks is not None and batch.blocks.group is not None:
        sums = sum_over(sums, batch.blocks.group)
    return sums


def _extra_sums(
    logps: Tensor, squares: Tensor | None, batch: PackedPairs, extras: Collection[str]
) -> dict[str, Tensor]:
    """What `core.losses.EXTRAS` says of each response, [S]."""
    found: dict[str, Tensor] = {}
    if "low" in extras:
        here = batch.response_lengths if batch.local_lengths is None else batch.local_lengths
        probabilities = logps.detach().double().exp()
        means = _response_sums(probabilities, batch) / batch.response_lengths
        low = at_most_mean(probabilities, means.repeat_interleave(here, output_size=len(logps)))
        found["low_sum"] = _response_sums(torch.where(low, logps, 0.0), batch)
        found["low_length"] = _response_sums(low.to(logps.dtype), batch)
    if squares is not None:
        found["log_squares"] = _response_sums(squares, batch)
        found["pull"] = _response_sums(logit_gradient_squares(logps.detach(), squares), batch)
    return found


def compute_pair_logps(
    model: nn.Module, batch: PackedPairs, *, chunk_size: int | None = None, extras: Collection[str] = ()
) -> PairLogps:
    """Sums and lengths of the batch's pairs, as the losses want them, and what their experts add to a loss.

    Of a list of more responses the first is taken for chosen and the last for rejected; `lists` has all.

    Args:
        extras: of `core.losses.EXTRAS`, what else is wanted of each response; nothing is computed for those left out.
    Raises:
        ValueError: the batch holds a list of one response.
    """
    first, last = _ends(batch)
    router: tuple[float, int] | None = unwrap(model).__dict__.get(_ROUTER)
    options = {} if router is None else {"output_router_logits": True}
    output = _forward(model, batch, chunk_size=chunk_size, squares="squares" in extras, **options)
    logps, squares = output.logits if "squares" in extras else (output.logits.squeeze(0), None)
    sums, lengths = _response_sums(logps, batch), batch.response_lengths
    more = _extra_sums(logps, squares, batch, extras)
    added = None
    if router is not None:
        if not output.router_logits:
            raise ValueError(
                f"router_aux_loss_coef: {original_class(unwrap(model)).__name__} gave no logits of its routers; set it "
                "to 0"
            )
        coefficient, num_selected = router
        added = coefficient * router_losses(output.router_logits, batch, num_selected=num_selected)
    chosen, rejected = ({name: values[side] for name, values in more.items()} for side in (first, last))
    return PairLogps(
        *(sums[first], sums[last], lengths[first], lengths[last]),
        router_loss=added,
        chosen_extras=chosen,
        rejected_extras=rejected,
        lists=ListLogps(sums, lengths, batch.group_sizes),
    )


def _ends(batch: PackedPairs) -> tuple[Any, Any]:
    """Where the first and the last response of each pair or list stand among all."""
    if set(batch.group_sizes) == {2}:
        return slice(0, None, 2), slice(1, None, 2)
    sizes = torch.tensor(batch.group_sizes)
    if sizes.min() < 2:
        raise ValueError("a list of one response has none to compare it with; use compute_response_logps")
    ends, device = sizes.cumsum(0), batch.labels.device
    return move(ends - sizes, device), move(ends - 1, device)


_ROUTER = "_simpo_router_loss"  # where a transformers model keeps the coefficient, and how many experts a token gets


def install_router_loss(model: nn.Module, coefficient: float | None) -> float:
    """Have `compute_pair_logps` add the auxiliary loss of the model's routers, if it has any; returns its coefficient.

    Args:
        coefficient: by which it is multiplied; None = the model's own where its configuration asks for the loss
            (output_router_logits), and 0 elsewhere.
    Raises:
        ValueError: there are no routers, or they do not say what they decide.
    """
    base = unwrap(model)
    config = base.config.get_text_config()
    if coefficient is None:
        asked = getattr(config, "output_router_logits", False)
        own = getattr(config, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None)  # JetMoe's
        coefficient = float(own or 0.0) if asked else 0.0
    base.__dict__.pop(_ROUTER, None)
    if coefficient == 0.0:
        return 0.0
    num_selected = experts_per_token(config)
    if num_selected is None or not hasattr(config, "output_router_logits"):
        raise ValueError(
            f"router_aux_loss_coef = {coefficient:g}: {original_class(base).__name__} gives no logits of routers; set "
            "it to 0"
        )
    base.__dict__[_ROUTER] = coefficient, num_selected
    return coefficient
