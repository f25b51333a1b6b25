"""A linear layer and the cross entropy of its classes as one op, in chunks of rows, whose rows and classes are cut.

Of each chunk the ranks that have other classes exchange the logarithm of their rows' sums, inside of the op: what runs
is opaque to a compiler, has no other effect, and its backward sends nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autopar.codegen import private
from autopar.codegen.communicator import Group
from autopar.codegen.primitives import all_reduce
from autopar.codegen.site import Site
from autopar.codegen.vocabulary import Places, places_of
from autopar.kernels import linear_cross_entropy as kernel
from autopar.kernels.linear_cross_entropy import Chunks, chunks_for, empty, made, scales, wanted_of
from autopar.kernels.rows import ELSEWHERE, IGNORED, wide
from autopar.passes.exchanges import Exchange, chunk_exchanges, count_exchanges
from autopar.passes.rules.losses import MEAN


class LinearCrossEntropy(nn.Module):
    """Cross entropy of a linear layer's rows and classes that are cut: a partial sum over the axes of both.

    A mean is this rank's sum over the count of all ranks. hidden (T/n, D), target (T/n) class numbers, weight (C/m, D),
    bias (C/m); targets equal to `ignore_index` count nowhere.
    """

    def __init__(self, rows: Group, classes: Group, places: Places) -> None:
        super().__init__()
        self.rows, self.classes, self.places = rows.axes, classes.axes, places
        self.row_group, self.class_group = rows, classes

    def forward(self, hidden: Tensor, target: Tensor, weight: Tensor, reduction: int = MEAN, ignore_index: int = -100,
                bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        counted = target != ignore_index
        here, place = self.places.of(target.where(counted, 0))
        own = place.where(here | self.places.is_unknown(place), ELSEWHERE).where(counted, IGNORED)
        scale = None
        if reduction == MEAN:
            scale = all_reduce(counted.sum(), self.row_group).to(wide(hidden.dtype)).reciprocal()
        return self._loss(hidden, weight, own, bias, scale).to(dtype or hidden.dtype)

    def _loss(self, hidden: Tensor, weight: Tensor, place: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        if self.class_group.size == 1:
            return kernel.linear_cross_entropy(hidden, weight, place, bias, scale)
        one = torch.ones((), dtype=wide(hidden.dtype), device=hidden.device)
        inside, outside = scales(scale, hidden.dtype, one)
        chunks = chunks_for(hidden, len(weight))
        loss: Tensor = _apart(hidden, weight, bias, place, inside, chunks.rows, chunks.dtype,
                              wanted_of(hidden, weight, bias), self.class_group.size, self.class_group.name)[0]
        return loss if outside is None else loss * outside

    def result(self, hidden: Tensor, target: Tensor, weight: Tensor, reduction: int = MEAN, ignore_index: int = -100,
               bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """An empty result, for shapes."""
        return hidden.new_empty((), dtype=dtype or hidden.dtype)

    def exchanges(self, hidden: Tensor, target: Tensor, weight: Tensor, reduction: int = MEAN,
                  *_: Any) -> list[Exchange]:
        """What a call sends."""
        return (chunk_exchanges(len(hidden), (len(weight), weight.shape[1]), hidden.dtype, self.classes,
                                self.class_group.size)
                + count_exchanges(self.rows if reduction == MEAN else ()))


@torch.library.custom_op("autopar::linear_cross_entropy_apart", mutates_args=())
def _apart(hidden: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor, scale: Tensor, rows: int,
           summed: torch.dtype, wanted: list[bool], ranks: int, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def exchange(total: Tensor) -> Tensor:
        return torch.logsumexp(private.all_gather(total.unsqueeze(0), ranks, group), 0)

    return made(hidden, weight, bias, place, scale, Chunks(rows, summed), wanted, exchange)


@_apart.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor, scale: Tensor, rows: int,
      summed: torch.dtype, wanted: list[bool], *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty(hidden, weight, summed, wanted)


_apart.register_autograd(kernel.scale_gradients, setup_context=kernel.keep_gradients)


def linear_cross_entropy(site: Site, _: int) -> nn.Module:
    """What runs in place of the op, cut or not."""
    return LinearCrossEntropy(site.group(site.axes("t")), site.group(site.axes("n")), places_of(site, "n"))
