"""A linear layer and cross entropy over its classes in one op that never has all logits.

    hidden (T, D), weight (C, D) of this rank's classes, bias (C) or none, place (T) as in `rows`, scale ()
    -> loss (), the sum of the losses of rows whose class is here, times the scale; fp32 at least

Rows go in chunks: a chunk's logits are a matrix product, turned in place into their gradients, of which two more
products make the chunk's gradients of hidden and its share of the weight's. All that is done in the forward, for a
loss whose gradient is 1, and the backward only scales it. So there are the plain form's three products of 2 T C D FLOP
and no fourth, by the library's matmul, which no product written in Triton comes up to; and of logits there is one
chunk, where the plain form has them all and their gradients besides.

Bytes beside those of the products: logits are read and written once (the plain form reads them twice), the weight's
gradient is read and written once a chunk (the plain form writes it once), hence few chunks. At T = 8,192, C = 50,304,
D = 768 in bf16 that is 1.9 TFLOP, 2.9 ms at 650 TFLOP/s; 1.6 GB of logits and in 4 chunks 0.5 GB of gradients, 0.4 ms
at 4.8 TB/s, against 2.5 GB, 0.5 ms.

Where other ranks have other classes, each gives the logarithm of its rows' sums to `exchange`, chunk by chunk, and gets
that of all. After Liger Kernel's fused linear cross entropy (Hsu et al., 2024) and Megatron-LM's exchange (Shoeybi et
al., 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autopar.core.chunks import rows_at_once
from autopar.kernels.rows import IGNORED, rows_of, wide

Exchange = Callable[[Tensor], Tensor]
"""The logarithms of sums (t) over this rank's classes -> those over all."""
Made = tuple[Tensor, Tensor, Tensor, Tensor]
"""The loss and the gradients of hidden, weight and bias; empty where they aren't wanted."""
CLASSES_ALIGNED = 64
NARROWEST = 8
"""The matmul library's quick kernels want 16-bit rows that are a multiple of so many."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """So many rows at once; over chunks the gradient of the weight is summed in `dtype`."""

    rows: int
    dtype: torch.dtype


def chunks_for(hidden: Tensor, classes: int) -> Chunks:
    """What suits so many rows and classes. Sums over rows before they are scaled may exceed fp16."""
    rows, width = hidden.shape
    return Chunks(rows_at_once(rows, width, classes),
                  torch.float32 if hidden.dtype == torch.float16 else hidden.dtype)


def reference(hidden: Tensor, weight: Tensor, place: Tensor, bias: Tensor | None = None,
              scale: Tensor | None = None) -> Tensor:
    """The loss by the plain form, where all classes are here."""
    logits = F.linear(hidden, weight, bias)
    loss = F.cross_entropy(logits.to(wide(logits.dtype)), place, ignore_index=IGNORED, reduction="sum")
    return loss if scale is None else loss * scale


def alone(total: Tensor) -> Tensor:
    """The exchange where all classes are here."""
    return total


def classes_worked_on(classes: int) -> int:
    """So many classes a GPU's matmuls have, some of them filled up with nothing where they would be slow without."""
    return classes if classes % NARROWEST == 0 else -(-classes // CLASSES_ALIGNED) * CLASSES_ALIGNED


def _padded(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with more classes where a GPU's matmul would be slow without."""
    more = classes_worked_on(len(weight)) - len(weight)
    if not weight.is_cuda or not more:
        return weight, bias
    return F.pad(weight, (0, 0, 0, more)), None if bias is None else F.pad(bias, (0, more))


def _loss(total: Tensor, found: Tensor, place: Tensor) -> Tensor:
    """The sum of the losses of rows whose class is here."""
    return (total - found).where(place >= 0, 0.0).sum()


def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor, at_once: int,
            exchange: Exchange = alone) -> Tensor:
    """The loss alone, not scaled."""
    wider, offset = _padded(weight, bias)
    losses = [hidden.new_zeros((), dtype=wide(hidden.dtype))]
    for x, at in zip(hidden.split(at_once), place.split(at_once), strict=True):
        logits = F.linear(x, wider, offset)
        total, found = rows_of(logits).sums(logits, at, len(weight))
        losses.append(_loss(exchange(total), found, at))
    return torch.stack(losses).sum()


def forward_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor, scale: Tensor, chunks: Chunks,
                     wanted: list[bool], exchange: Exchange = alone) -> Made:
    """The loss, not scaled, and those of its gradients with respect to hidden, weight and bias that are `wanted`."""
    wider, offset = _padded(weight, bias)
    for_hidden = hidden.new_empty(hidden.shape if wanted[0] else (0,))
    for_weight = weight.new_empty(wider.shape if wanted[1] else (0,), dtype=chunks.dtype)
    for_bias = weight.new_zeros(len(wider) if wanted[2] else 0, dtype=wide(weight.dtype))
    room = hidden.new_empty(chunks.rows, len(wider))
    losses = [hidden.new_zeros((), dtype=wide(hidden.dtype))]
    for first in range(0, len(hidden), chunks.rows):
        x, at = hidden[first:first + chunks.rows], place[first:first + chunks.rows]
        slopes = _product(x, wider, offset, room[:len(x)])
        losses.append(_loss_and_slopes(slopes, at, scale, len(weight), exchange))
        if wanted[0]:
            torch.mm(slopes, wider, out=for_hidden[first:first + chunks.rows])
        if wanted[1]:
            _add_product(for_weight, slopes.t(), x, first > 0)
        if wanted[2]:
            for_bias += slopes.sum(0, dtype=for_bias.dtype)
    return torch.stack(losses).sum(), for_hidden, for_weight[:len(weight)], for_bias[:len(weight)]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _loss_and_slopes(logits: Tensor, place: Tensor, scale: Tensor, classes: int, exchange: Exchange) -> Tensor:
    """The loss of a chunk; its gradients are written over the logits."""
    rows = rows_of(logits)
    if exchange is alone:
        return _loss(*rows.both(logits, place, scale, classes), place)
    total, found = rows.sums(logits, place, classes)
    whole = exchange(total)
    rows.slopes(logits, place, whole, scale, classes)
    return _loss(whole, found, place)


def _add_product(total: Tensor, left: Tensor, right: Tensor, begun: bool) -> None:
    """Add left @ right to `total`, in whose place it comes unless that has `begun`."""
    beta = 1 if begun else 0
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=beta)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta)


def made(hidden: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor, scale: Tensor, chunks: Chunks,
         wanted: list[bool], exchange: Exchange = alone) -> Made:
    """The loss times `scale`, and the gradients that are wanted."""
    if any(wanted):
        loss, *gradients = forward_backward(hidden, weight, bias, place, scale, chunks, wanted, exchange)
    else:
        loss = forward(hidden, weight, bias, place, chunks.rows, exchange)
        _, *gradients = empty(hidden, weight, chunks.dtype, wanted)
    return (loss * scale, *gradients)  # type: ignore[return-value]


def empty(hidden: Tensor, weight: Tensor, summed: torch.dtype, wanted: list[bool]) -> Made:
    """Results of the right shapes."""
    return (hidden.new_empty((), dtype=wide(hidden.dtype)), hidden.new_empty(hidden.shape if wanted[0] else (0,)),
            weight.new_empty(weight.shape if wanted[1] else (0,), dtype=summed),
            weight.new_empty(len(weight) if wanted[2] else 0, dtype=wide(weight.dtype)))


@torch.library.custom_op("autopar::linear_cross_entropy_in_chunks", mutates_args=())
def _op(hidden: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor, scale: Tensor, rows: int,
        summed: torch.dtype, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return made(hidden, weight, bias, place, scale, Chunks(rows, summed), wanted)


@_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor, scale: Tensor, rows: int,
      summed: torch.dtype, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty(hidden, weight, summed, wanted)


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: Made) -> None:
    """For the backward."""
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)
    hidden, weight, *_ = inputs
    ctx.dtypes, ctx.others = (hidden.dtype, weight.dtype, weight.dtype), len(inputs) - 3


def scale_gradients(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The kept gradients times that of the loss, a number: in fp32 at least."""
    found = [None if gradient is None or not kept.numel() else (kept.to(gradient.dtype) * gradient).to(dtype)
             for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
    return (*found, *(None,) * ctx.others)


_op.register_autograd(scale_gradients, setup_context=keep_gradients)


def wanted_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[bool]:
    """Which of them a gradient is wanted of."""
    here = torch.is_grad_enabled()
    return [here and x is not None and x.requires_grad for x in (hidden, weight, bias)]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, place: Tensor, bias: Tensor | None = None,
                         scale: Tensor | None = None, chunks: Chunks | None = None) -> Tensor:
    """The loss, where all classes are here."""
    one = torch.ones((), dtype=wide(hidden.dtype), device=hidden.device)
    cut = chunks or chunks_for(hidden, len(weight))
    inside, outside = scales(scale, hidden.dtype, one)
    loss: Tensor = _op(hidden, weight, bias, place, inside, cut.rows, cut.dtype, wanted_of(hidden, weight, bias))[0]
    return loss if outside is None else loss * outside


def scales(scale: Tensor | None, dtype: torch.dtype, one: Tensor) -> tuple[Tensor, Tensor | None]:
    """What to scale by inside of the op and after it: inside, so that gradients are rounded once, but for fp16, whose
    range an unscaled gradient fits better."""
    if scale is None or dtype == torch.float16:
        return one, scale
    return scale.to(one.dtype), None
